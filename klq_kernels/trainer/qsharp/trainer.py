"""``QSharpTrainer``: Q-sharp (arXiv 2502.20548) as a ``transformers.Trainer``.

A round, repeated, is a collection of data (``collection``) and ``steps_per_round`` updates of the guide on the data of
all rounds so far, by the mean loss of a sequence, then of sequences (``guidance.laws``). The reference policy is never
trained. transformers' loop stays in charge of the rest: the first micro-batch of a round triggers the collection.

Randomness is a function of (seed, round), and a checkpoint holds the examples; so a resumed run repeats exactly what an
uninterrupted one would have done.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import AutoModel, PreTrainedModel, PreTrainedTokenizerBase, TrainerCallback

from ...call.checks import renaming, require
from ...guidance import GuidedLogits, ValueGuide, sequence_mean
from ...guidance.guide import SETTINGS
from .. import loading, probe
from ..base import BaseTrainer
from ..batches import Inputs, collate
from ..means import Means
from ..models import LanguageModel
from ..processes import Turn
from ..resuming import EXAMPLES, fitting
from ..rewards import OF_TRAINERS, RewardFunction, Rewards, as_list, scores_of
from ..rollout import sampling_config
from ..seeds import Purpose, derived_seed
from ..sharding import shards_weights
from .collection import Collection
from .config import GUIDES, QSharpConfig
from .examples import Example, Examples, varied
from .quality import quality


class QSharpTrainer(BaseTrainer):
    """Trains a guide for a reference policy against reward functions.

    Args:
        model: the reference: a causal LM, a PEFT model, a path or a hub id. It is not trained.
        reward_funcs: as in ``KLQTrainer``.
        args: ``QSharpConfig``.
        train_dataset: a dataset with a column ``prompt`` (text or chat messages); other columns reach the rewards.
        eval_dataset: likewise, for ``evaluate``.
        processing_class: the tokenizer; by default the one saved with the model.
        guide: a ``ValueGuide``, the folder of one, or a model (or its path or hub id) whose backbone becomes one; by
            default a copy of the reference's. It reads the reference's tokens.
        callbacks, optimizers: as in ``transformers.Trainer``.
        reward_processing_classes: tokenizers of the reward models; by default those saved with them.

    Raises:
        ValueError: naming the argument that does not fit, and what would.
    """

    def __init__(
        self,
        model: str | nn.Module,
        reward_funcs: RewardFunction | Sequence[RewardFunction],
        args: QSharpConfig | None = None,
        train_dataset: Any = None,
        eval_dataset: Any = None,
        processing_class: PreTrainedTokenizerBase | None = None,
        guide: ValueGuide | PreTrainedModel | str | None = None,
        callbacks: list[TrainerCallback] | None = None,
        optimizers: tuple[Any, Any] = (None, None),
        *,
        reward_processing_classes: Any = None,
    ) -> None:
        args = QSharpConfig("qsharp_output") if args is None else args
        require(isinstance(args, QSharpConfig), "args", f"must be a QSharpConfig, got {type(args).__name__}")
        loading.check_dataset("train_dataset", train_dataset)
        if eval_dataset is not None:
            loading.check_dataset("eval_dataset", eval_dataset)
        reference = loading.causal_lm(model, args)
        tokenizer = loading.tokenizer(processing_class, reference)
        language_model = LanguageModel(reference)
        proven = proven_guide(guide, args, language_model)
        positions = probe.shared_positions((language_model.backbone, proven.backbone), language_model)
        super().__init__(
            model=proven,
            args=args,
            data_collator=list,  # a batch is the list of its numbers
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            processing_class=tokenizer,
            callbacks=callbacks,
            optimizers=optimizers,
        )
        self.args: QSharpConfig
        require(not shards_weights(self.accelerator), "args", "the guide cannot be sharded (FSDP, ZeRO-3); use DDP")
        self.model_accepts_loss_kwargs = False  # the loss is a mean over the sequences of a micro-batch
        self.tokenizer = tokenizer
        self.reference: Any = reference.requires_grad_(False).eval().to(args.device)
        with renaming(OF_TRAINERS):
            rewards = Rewards(
                as_list(reward_funcs),
                weights=args.reward_weights,
                processing_classes=reward_processing_classes,
                batch_size=args.rollout_forward_batch_size,
                device=args.device,
            )
        generation_config = sampling_config(
            reference, tokenizer, temperature=args.temperature, max_new_tokens=args.max_completion_length,
            extra=dict(args.generation_kwargs or {}),  # type: ignore[arg-type]  # parsed where it was JSON
        )  # fmt: skip
        if args.generation_kwargs:
            probe.prove_settings(language_model, generation_config)
        self.collection = Collection(
            args, reference=self.reference, guide=lambda: self.guide, tokenizer=tokenizer, rewards=rewards,
            vocab=language_model.vocab_size, generation_config=generation_config, accelerator=self.accelerator,
            positions=positions,
        )  # fmt: skip
        self.examples = Examples()
        self._held_out: list[tuple[Any, list[Example]]] = []  # of datasets

    @property
    def guide(self) -> ValueGuide:
        """The guide, out of whatever wraps it."""
        return self.accelerator.unwrap_model(self.model)

    def processor(self, eta: float | None = None) -> GuidedLogits:
        """Guidance as in the run, for ``generate``; ``eta`` of one's own where given."""
        return self.collection.processor(eta=eta)

    # ---- data ---------------------------------------------------------------------------------------------------

    def get_train_dataloader(self) -> DataLoader:
        """The numbers of the run's draws, one after another: what is at a number is known when its round comes."""
        args = self.args
        per_step = args.per_device_train_batch_size * args.gradient_accumulation_steps * self.accelerator.num_processes
        numbers: Any = range(args.max_steps * per_step)
        loader = DataLoader(numbers, batch_size=args.per_device_train_batch_size, collate_fn=list, drop_last=True)
        return self.accelerator.prepare(loader)

    def collect(self) -> None:
        """Adds a round's examples; all processes have the same."""
        number, args = self.examples.rounds, self.args
        size = len(self.train_dataset)  # type: ignore[arg-type]
        generator = torch.Generator().manual_seed(derived_seed(args.seed, Purpose.SHUFFLE, number))
        rows = torch.randperm(size, generator=generator).tolist()[: args.prompts_per_round]
        examples, divergences = self.collection.round(rows, self.train_dataset, number)
        kept = varied(examples) if args.drop_constant else examples
        self._check_examples(examples, kept)
        self.examples.add(kept)
        share = len({e.row for e in kept}) / len(rows)
        rewards, kl = torch.tensor([e.reward for e in examples]), torch.tensor(divergences)
        self.means.add(
            {"data/reward": rewards.mean(), "data/kl": kl.mean(), "data/prompts_kept": share,
             "data/examples": float(len(self.examples))}, 1,
        )  # fmt: skip

    def _check_examples(self, examples: list[Example], kept: list[Example]) -> None:
        law = self.guide.law
        for example in examples:
            require(
                law.low - 1e-6 <= example.reward <= law.high + 1e-6,
                "reward_high" if example.reward > law.high else "reward_low",
                f"a completion earned {example.reward:.6g}, outside [{law.low}, {law.high}]; set reward_low and "
                "reward_high to the range of the reward functions",
            )
        require(bool(examples), "reward_funcs", "scored no completion of the round")
        require(
            bool(kept) or len(self.examples) > 0,
            "train_dataset",
            "on each of its prompts all completions earn the same, so that there is nothing to tell apart; raise "
            "samples_per_prompt or the temperature, choose other prompts, or set drop_constant=False",
        )

    # ---- updates ------------------------------------------------------------------------------------------------

    def training_step(self, model: nn.Module, inputs: Any, num_items_in_batch: Any = None) -> Tensor:
        """One micro-batch; the first of a round collects the round's examples."""
        if self.examples.rounds <= self.state.global_step // self.args.steps_per_round:
            with self._timed("time/collect"):
                self.collect()
            self.guide.wake(derived_seed(self.args.seed, Purpose.HEAD))
        return super().training_step(model, inputs, num_items_in_batch)

    def compute_loss(
        self, model: nn.Module, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """The mean loss of the sequences of a micro-batch, each the mean over its trained tokens."""
        examples = self.examples.draw(inputs, self.args.seed)
        batch = self._batch(examples)
        outputs = read(model, batch)
        law = self.guide.law
        rewards = self._rewards(examples, batch)
        loss = sequence_mean(law.loss(outputs, rewards), batch.cu_seqlens)
        predicted = law.mean(outputs.detach())
        self.means.add_explained("guide/explained_variance", rewards - predicted, rewards)
        self.means.add({"guide/mean": predicted.mean(), "guide/reward": rewards.mean()}, len(rewards))
        return (loss, outputs) if return_outputs else loss

    def _batch(self, examples: list[Example]) -> Inputs:
        pad: Any = self.tokenizer.pad_token_id
        return collate([e.sequence() for e in examples], pad_id=pad, padding_free=False).to(self.args.device)

    def _rewards(self, examples: list[Example], batch: Inputs) -> Tensor:
        """The reward of each row of a batch, fp32 [N]."""
        rewards = torch.tensor([e.reward for e in examples], device=self.args.device)
        return rewards.repeat_interleave(batch.cu_seqlens.diff().long(), output_size=len(batch.rows))

    def _counts(self) -> dict[str, float]:
        return {"round": self.examples.rounds}

    # ---- held-out prompts ---------------------------------------------------------------------------------------

    def evaluate(
        self, eval_dataset: Any = None, ignore_keys: list[str] | None = None, metric_key_prefix: str = "eval"
    ) -> dict[str, float]:
        """Guided completions of held-out prompts, and how well the guide knows the law on the reference's own.

        Random numbers are the same each time and on any number of processes.

        Returns:
            ``eval_reward``, ``eval_kl`` (nats per completion, exact over the vocabulary) and ``eval_length`` of guided
            completions; ``eval_ref_reward`` of the reference's; ``eval_auroc``, ``eval_explained_variance`` and
            ``eval_calibration_error`` of the guide after each token of those (``quality``).
        """
        data: Any = self.eval_dataset if eval_dataset is None else eval_dataset
        if isinstance(data, dict):
            return self._evaluate_each(data, ignore_keys, metric_key_prefix)
        loading.check_dataset("eval_dataset", data)
        metrics = {**self._guided(data), **self._quality(self._held_out_completions(data))}
        metrics = {f"{metric_key_prefix}_{name}": value for name, value in metrics.items()}
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def turns(self, number: int) -> list[Turn]:
        """This process's share in sampling completions for ``number`` held-out rows."""
        return self.collection.turns(number)

    def _guided(self, data: Any) -> dict[str, float]:
        means = Means()
        means.add({"reward": 0.0, "kl": 0.0, "length": 0.0}, 0)
        collection = self.collection
        mine = self.turns(len(data))
        self.callback_handler.eval_dataloader = mine  # progress bars ask for its length
        for turn in mine:
            records = [data[i] for i in turn.rows]
            seed = derived_seed(self.args.seed, Purpose.EVALUATION, 1, turn.rows.start)
            sampled = collection.sample([collection.encode(r["prompt"]) for r in records], seed, guided=True)
            if turn.kept:
                scores = scores_of(collection.rewards, self.tokenizer, records, sampled.completions, self.state)
                lengths = torch.tensor([float(len(c)) for c in sampled.completions])
                columns = {"reward": scores.total, "kl": sampled.kl, "length": lengths}
                means.add({name: of[scores.scored].mean() for name, of in columns.items()}, int(scores.scored.sum()))
            self.control = self.callback_handler.on_prediction_step(self.args, self.state, self.control)
        return means.drain(self.accelerator)

    def _held_out_completions(self, data: Any) -> list[Example]:
        """``_reference_completions``; those of the run's own datasets, which it measures again and again, once."""
        known = next((found for dataset, found in self._held_out if dataset is data), None)
        if known is not None:
            return known
        found = self._reference_completions(data)
        own = self.eval_dataset
        if any(data is each for each in (own.values() if isinstance(own, dict) else [own])):
            self._held_out.append((data, found))
        return found

    def _reference_completions(self, data: Any) -> list[Example]:
        """This process's share in the reference's own completions."""
        out: list[Example] = []
        collection = self.collection
        for turn in self._bar(self.turns(len(data)), "Held-out completions of the reference"):
            records = [data[i] for i in turn.rows]
            prompts = [collection.encode(r["prompt"]) for r in records]
            seed = derived_seed(self.args.seed, Purpose.EVALUATION, 0, turn.rows.start)
            completions = collection.sample(prompts, seed, guided=False).completions
            if turn.kept:
                scores = scores_of(collection.rewards, self.tokenizer, records, completions, self.state)
                parts = zip(prompts, completions, scores.total.tolist(), turn.rows, scores.scored.tolist(), strict=True)
                out += [Example(p, c, 0, reward, row) for p, c, reward, row, scored in parts if scored]
        return out

    def _quality(self, held_out: list[Example]) -> dict[str, float]:
        predicted, rewards, means = [], [], Means()
        with self.guide.evaluating() as guide, self.accelerator.autocast():
            for begin in range(0, len(held_out), self.args.rollout_forward_batch_size):
                examples = held_out[begin : begin + self.args.rollout_forward_batch_size]
                batch = self._batch(examples)
                predicted.append(guide.law.mean(read(guide, batch)).cpu())
                rewards.append(self._rewards(examples, batch).cpu())
        means.add({"ref_reward": 0.0}, 0)
        if held_out:
            means.add({"ref_reward": torch.tensor([e.reward for e in held_out]).mean()}, len(held_out))
        gathered = self._gathered(torch.cat([torch.zeros(0), *predicted]), torch.cat([torch.zeros(0), *rewards]))
        return {**means.drain(self.accelerator), **quality(*gathered)}

    def _gathered(self, predicted: Tensor, rewards: Tensor) -> tuple[Tensor, Tensor]:
        """Those of all processes."""
        pairs = torch.stack([predicted, rewards], 1).to(self.args.device)
        padded = self.accelerator.pad_across_processes(pairs, dim=0, pad_index=float("nan"))
        found: Any = self.accelerator.gather(padded)
        found = found[~found[:, 1].isnan()].cpu()
        return found[:, 0], found[:, 1]

    # ---- saving, resuming ---------------------------------------------------------------------------------------

    def _begin(self) -> None:
        self.examples = Examples()

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None) -> None:
        """The guide as ``ValueGuide.from_pretrained`` reads it, and its tokenizer."""
        folder = Path(str(output_dir or self.args.output_dir))
        self.guide.save_pretrained(folder, state_dict)
        self._save_beside(folder)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        with fitting():
            self.guide.load_state_dict(ValueGuide.from_pretrained(resume_from_checkpoint).state_dict())

    def _save_progress(self, folder: str) -> None:
        if self.args.should_save:
            self.examples.save(Path(folder) / EXAMPLES)

    def _load_rng_state(self, checkpoint: str | None) -> None:
        super()._load_rng_state(checkpoint)
        if checkpoint is None:
            return
        file = Path(checkpoint) / EXAMPLES
        require(file.exists(), "resume_from_checkpoint", f"{checkpoint} has no {EXAMPLES}: no run of Q-sharp wrote it")
        self.examples = Examples.load(file)


def read(guide: nn.Module, batch: Inputs) -> Tensor:
    """The guide's outputs after each trained token of a batch, fp32 [N, A]."""
    outputs = guide(batch.input_ids, batch.attention_mask, position_ids=batch.position_ids, use_cache=False)
    return outputs.flatten(0, 1).index_select(0, batch.rows + 1)  # the rows predict the tokens: those after come next


def proven_guide(given: Any, args: QSharpConfig, reference: LanguageModel) -> ValueGuide:
    """The guide out of what a user gives, proven to read the reference's tokens, padding left aside.

    Raises:
        ValueError: naming what does not fit.
    """
    law = args.reward_law
    if given is None:
        given = copy.deepcopy(reference.backbone)
    if isinstance(given, str):
        given = load_guide(given, args)
    if isinstance(given, ValueGuide):
        require(given.law == law, "guide", f"has {given.law}, and the arguments say {law}")
    else:
        require(
            isinstance(given, PreTrainedModel),
            "guide",
            f"must be a ValueGuide, a transformers model or the path of one, got {type(given).__name__}",
        )
        shared = loading.shares_parameters(given, reference.model)
        given = GUIDES[args.guide_type](copy.deepcopy(given) if shared else given, law)
    given.requires_grad_(True)
    require(
        not loading.shares_parameters(given, reference.model),
        "guide",
        "must share no parameter with model, which is not trained; give it a copy of the backbone",
    )
    loading.check_vocabulary("guide", given.vocab_size, reference.vocab_size)
    loading.warn_of_16_bit("guide", given)
    probe.prove_padding("guide", given.backbone, reference)
    probe.prove_causal("guide", given.backbone, reference)
    return given


def load_guide(name: str, args: QSharpConfig) -> ValueGuide | PreTrainedModel:
    """The guide in a folder, or the backbone of a model at a path or hub id."""
    kwargs = loading.init_kwargs(args)
    is_guide = (Path(name) / SETTINGS).is_file()
    return ValueGuide.from_pretrained(name, **kwargs) if is_guide else AutoModel.from_pretrained(name, **kwargs)
