"""``DPOTrainer``: DPO and TDPO (``dpo``) as a ``transformers.Trainer``.

A batch is so many pairs. The reference is asked first, without gradients; then the policy, both completions of all
pairs in one pass; the loss is the mean over pairs. transformers' loop is in charge of all else.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase, Trainer, TrainerCallback

from ...call.checks import require
from .. import loading
from ..actor_critic import Objective, held
from ..batches import Inputs, collate
from ..checkpoints import last_complete_checkpoint
from ..frozen import Placed, Policy, reference_policy
from ..means import Means
from ..parts import prove_backbones, proven_policies
from ..processes import turns
from ..sharding import shards_weights
from .dpo import Referred, pair_losses, token_logprobs
from .dpo_config import DPOConfig
from .pairs import PairReader, check_pairs

MEANS = "means_{process}.pt"


class TrainedPolicy(Policy):
    """The module that is trained."""

    accepts_loss_kwargs = False
    main_input_name = "input_ids"

    @property
    def config(self) -> Any:
        return self.model.config

    # transformers renames this in version 5; each name goes on to the same one of the model inside

    def activation_checkpointing_enable(self, **kwargs: Any) -> None:
        self._checkpoint("activation_checkpointing_enable", **kwargs)

    def gradient_checkpointing_enable(self, **kwargs: Any) -> None:
        self._checkpoint("gradient_checkpointing_enable", **kwargs)

    def _checkpoint(self, method: str, **kwargs: Any) -> None:
        getattr(self.model, method)(**kwargs)
        if self.language_model.is_peft:  # frozen embeddings: without it no gradient would enter the checkpoints
            self.model.enable_input_require_grads()  # type: ignore[operator]


class DPOTrainer(Trainer):
    """Trains a causal language model on preferred and rejected completions, by DPO, TDPO1 or TDPO2.

    Args:
        model: the policy: a causal LM, a PEFT model, a path or a hub id.
        args: ``DPOConfig``.
        train_dataset: a dataset with columns ``prompt`` (text or chat messages), ``chosen`` and ``rejected`` (texts,
            or the messages that go on with a chat).
        eval_dataset: likewise, for ``evaluate``.
        processing_class: the tokenizer; by default the one saved with the model.
        ref_model: the frozen reference; by default the policy as it is now (its base model where adapters are trained).
        peft_config: makes the policy a PEFT model.
        callbacks, optimizers: as in ``transformers.Trainer``.

    Raises:
        ValueError: naming the argument that does not fit, and what would.
    """

    def __init__(
        self,
        model: str | nn.Module,
        args: DPOConfig | None = None,
        train_dataset: Any = None,
        eval_dataset: Any = None,
        processing_class: PreTrainedTokenizerBase | None = None,
        ref_model: str | nn.Module | None = None,
        peft_config: Any = None,
        callbacks: list[TrainerCallback] | None = None,
        optimizers: tuple[Any, Any] = (None, None),
    ) -> None:
        args = DPOConfig("dpo_output") if args is None else args
        require(isinstance(args, DPOConfig), "args", f"must be a DPOConfig, got {type(args).__name__}")
        check_pairs("train_dataset", train_dataset)
        if eval_dataset is not None:
            check_pairs("eval_dataset", eval_dataset)
        policy = loading.causal_lm(model, args)
        tokenizer = loading.tokenizer(processing_class, policy)
        policies = proven_policies(
            policy, None if ref_model is None else loading.causal_lm(ref_model, args), tokenizer=tokenizer,
            peft_config=peft_config, temperature=args.temperature, ref_dtype=args.reference_dtype,
        )  # fmt: skip
        trained = TrainedPolicy(policies.language_model.model, args.temperature)
        self.padding_free = prove_backbones(
            trained, {"model": policies.language_model.backbone}, policies, disable_dropout=args.disable_dropout,
            padding_free=args.padding_free,
        )  # fmt: skip
        template: Any = args.chat_template_kwargs  # parsed where it was JSON
        self.read = PairReader(
            tokenizer, policies.language_model.vocab_size, template=template, longest_prompt=args.max_prompt_length,
            longest_completion=args.max_completion_length,
        )  # fmt: skip
        self.read(train_dataset[0])  # what cannot be read is found now
        super().__init__(
            model=trained,
            args=args,
            data_collator=list,  # type: ignore[arg-type]  # a batch is the list of its rows
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            processing_class=tokenizer,
            callbacks=callbacks,
            optimizers=optimizers,
        )
        self.args: DPOConfig
        require(args.n_gpu <= 1, "args", "DataParallel is not supported; use `accelerate launch` for several GPUs")
        require(not shards_weights(self.accelerator), "args", "DPO runs under DDP; FSDP and ZeRO-3 are not supported")
        self.model_accepts_loss_kwargs = False  # the loss is a mean over the pairs of a micro-batch
        self.tokenizer = tokenizer
        self.reference = None
        if policies.reference is not None:
            self.reference = Placed(policies.reference, args.ref_placement, self.accelerator, "ref_placement")
        self.means = Means()

    @property
    def trained(self) -> TrainedPolicy:
        """The module that is trained, out of whatever wraps it."""
        return self.accelerator.unwrap_model(self.model)

    @property
    def policy(self) -> Any:
        """The language model that is trained (with its adapters, if it has any), a ``PreTrainedModel``."""
        return self.trained.model

    # ---- the loss -----------------------------------------------------------------------------------------------

    def compute_loss(
        self, model: nn.Module, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """The mean loss of the pairs of a micro-batch, rows of the dataset."""
        losses, parts = self.losses(model, inputs)
        if model.training:
            self.means.add({name: part.mean() for name, part in parts.items()}, len(losses))
        return (losses.mean(), losses) if return_outputs else losses.mean()

    def losses(self, model: nn.Module, rows: list[dict[str, Any]]) -> tuple[Tensor, dict[str, Tensor]]:
        """``pair_losses`` of rows of the dataset under ``model``, which may be wrapped."""
        pairs = [self.read(row) for row in rows]
        sequences = [pair.chosen for pair in pairs] + [pair.rejected for pair in pairs]
        pad: Any = self.tokenizer.pad_token_id
        batch = collate(sequences, pad_id=pad, padding_free=self.padding_free).to(self.args.device)
        objective = partial(pair_losses, inputs=batch, referred=self._referred(batch), config=self.args)
        return model(batch, objective)

    @torch.no_grad()
    def _referred(self, batch: Inputs) -> Referred:
        with self._reference() as reference:
            states = reference(batch, held)
            logprobs = token_logprobs(states, batch, self.args)
        return Referred(logprobs, states if self.args.compares_laws else None)

    @contextmanager
    def _reference(self) -> Iterator[Callable[[Inputs, Objective], Any]]:
        """The reference, in evaluation mode also where it is the policy without its adapters."""
        trained = self.trained
        training = trained.training
        trained.eval()
        try:
            with reference_policy(self.reference, trained, trained.language_model) as reference:
                yield reference
        finally:
            trained.train(training)

    def _prepare_inputs(self, inputs: Any) -> Any:
        return inputs  # compute_loss puts on the device what belongs there

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Adds the means since the last log to what transformers logs."""
        if self.is_in_train and "loss" in logs:
            logs = {**logs, **self.means.drain(self.accelerator)}
        super().log(logs, start_time)

    # ---- held-out pairs -----------------------------------------------------------------------------------------

    @torch.no_grad()
    def evaluate(
        self, eval_dataset: Any = None, ignore_keys: list[str] | None = None, metric_key_prefix: str = "eval"
    ) -> dict[str, float]:
        """The means over held-out pairs, on any number of processes.

        Returns:
            ``eval_loss``, ``eval_rewards/accuracies`` (share of pairs in the right order), ``eval_rewards/margins`` and
            the other names in the log.
        """
        data: Any = self.eval_dataset if eval_dataset is None else eval_dataset
        check_pairs("eval_dataset", data)
        process, processes = self.args.process_index, self.accelerator.num_processes
        mine = turns(len(data), self.args.per_device_eval_batch_size, process=process, processes=processes)
        self.callback_handler.eval_dataloader = mine  # progress bars ask for its length
        means, trained = Means(), self.trained.to(self.args.device)
        training = trained.training
        trained.eval()
        for turn in mine:
            with self.compute_loss_context_manager():
                losses, parts = self.losses(trained, [data[i] for i in turn.rows])
            found = {"loss": losses.mean(), **{name: part.mean() for name, part in parts.items()}}
            means.add(found, len(losses) if turn.kept else 0)
            self.control = self.callback_handler.on_prediction_step(self.args, self.state, self.control)
        trained.train(training)
        metrics = {f"{metric_key_prefix}_{name}": value for name, value in means.drain(self.accelerator).items()}
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    # ---- saving, resuming ---------------------------------------------------------------------------------------

    def train(self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any) -> Any:
        """As in transformers. ``True`` resumes from the last *complete* checkpoint in ``output_dir``."""
        if resume_from_checkpoint is True:
            folder = str(self.args.output_dir)
            resume_from_checkpoint = last_complete_checkpoint(Path(folder))
            require(resume_from_checkpoint is not None, "resume_from_checkpoint", f"none is complete in {folder}")
        self.means = Means()
        return super().train(resume_from_checkpoint, *args, **kwargs)

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None) -> None:
        """The policy as ``from_pretrained`` reads it, and its tokenizer."""
        folder = Path(str(output_dir or self.args.output_dir))
        self.policy.save_pretrained(folder)
        self.tokenizer.save_pretrained(folder)
        torch.save(self.args, folder / "training_args.bin")

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        super()._load_from_checkpoint(resume_from_checkpoint, self.policy)

    def _load_best_model(self) -> None:
        self._load_from_checkpoint(str(self.state.best_model_checkpoint))

    def _save_rng_state(self, output_dir: str) -> None:
        """Beside the random state, what the next log will say."""
        super()._save_rng_state(output_dir)
        torch.save(self.means.state(), self._means_file(output_dir))
        self.accelerator.wait_for_everyone()  # the state file, which says that all is there, is written next

    def _load_rng_state(self, checkpoint: str | None) -> None:
        super()._load_rng_state(checkpoint)
        if checkpoint is not None and self._means_file(checkpoint).exists():
            self.means.load_state(torch.load(self._means_file(checkpoint), weights_only=True))

    def _means_file(self, folder: str) -> Path:
        return Path(folder) / MEANS.format(process=self.args.process_index)
