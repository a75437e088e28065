"""``KLQTrainer``: KL-regularised Q-learning (and its PPO baseline) as a ``transformers.Trainer``.

One cycle, repeated until the steps are used up:

    prompts       one batch for every process, from the dataset
    rollout       a completion for each, sampled from the policy (``rollout``)
    rewards       a score for each completion (``rewards``)
    scoring       one pass per sequence over policy and reference: old log-probs, reference log-probs, values, and from
                  them the targets (``objectives.score``, ``klq_targets``)
    updates       epochs of shuffled mini-batches with the fused loss (``objectives.klq``), trained tokens only

transformers' loop stays in charge of everything else: it asks for one micro-batch after the other, steps the optimiser,
logs, evaluates, saves. The first micro-batch of a cycle triggers the rollout. Randomness is a function of (seed, cycle,
process), and a checkpoint in the middle of a cycle holds the cycle's experience; so a resumed run repeats exactly what
an uninterrupted one would have done.
"""

from __future__ import annotations

import copy
import json
import math
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import DistributedType
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import (
    PreTrainedModel,
    PreTrainedTokenizerBase,
    Trainer,
    TrainerCallback,
)
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from ..call.checks import require
from ..returns import klq_targets
from ..types import KLQTargets
from . import loading
from .actor_critic import ActorCritic, Objective, States, ValueFunction
from .batches import Inputs, collate
from .callbacks import FailureWatch
from .completions_log import CompletionsLog
from .config import KLQConfig
from .data import tokenize_prompt
from .experience import Experience, Plan
from .means import Means
from .models import LanguageModel, disable_dropout
from .objectives import OBJECTIVES, Scored, logprobs, score
from .processes import Turn, turns
from .rewards import RewardFunction, Rewards, Scores, as_list
from .rollout import Completions, Rollout, RolloutFunction, check_completions, eos_ids, generate, sampling_config
from .sampler import CycleSampler
from .seeds import Purpose, derived_seed, seeded
from .statistics import add_rewards, completion_statistics, held_out_statistics, token_statistics

VALUE_FILE = "value_function.safetensors"

# What the losses' metrics are called in the logs: names people know from PPO trainers.
LOGGED = {
    "policy_loss": "loss/policy_avg",
    "value_loss": "loss/value_avg",
    "residual_rms": "loss/residual_rms",
    "kl_old_k3": "policy/approxkl_avg",
    "kl_ref_k3": "policy/kl_ref_k3",
    "policy_clip_fraction": "policy/clipfrac_avg",
    "log_ratio_clip_fraction": "policy/clipfrac_avg",
    "value_clip_fraction": "val/clipfrac_avg",
    "ratio": "val/ratio",
    "value_mean": "val/value_mean",
}


class KLQTrainer(Trainer):
    """Trains a causal language model against reward functions, by KLQ (arXiv 2508.17000) or PPO.

    Args:
        model: the policy: a causal LM, a PEFT model, a path or a hub id.
        reward_funcs: one or several of: a callable ``f(prompts, completions, completion_ids, **columns)`` returning one
            score (or None) per completion, also async; a sequence-classification model with one label, or its path.
        args: ``KLQConfig``.
        train_dataset: a dataset with a column ``prompt`` (text or chat messages); other columns reach the rewards.
        eval_dataset: likewise, for ``evaluate``.
        processing_class: the tokenizer; by default the one saved with the model.
        ref_model: the frozen reference; by default the policy as it is now (its base model where adapters are trained).
        value_model: a value function with a backbone of its own (a sequence-classification model with one label, a
            backbone, or a path); by default a linear head on the policy's backbone. One that is also the policy, the
            reference or a reward model is copied, and only the copy is trained.
        peft_config: makes the policy a PEFT model.
        callbacks, optimizers: as in ``transformers.Trainer``.
        reward_processing_classes: tokenizers of the reward models; by default those saved with them.
        rollout_func: samples completions in place of ``generate`` (see ``rollout``).

    Raises:
        ValueError: naming the argument that does not fit, and what would.
    """

    def __init__(
        self,
        model: str | nn.Module,
        reward_funcs: RewardFunction | Sequence[RewardFunction],
        args: KLQConfig | None = None,
        train_dataset: Any = None,
        eval_dataset: Any = None,
        processing_class: PreTrainedTokenizerBase | None = None,
        ref_model: str | nn.Module | None = None,
        value_model: str | nn.Module | None = None,
        peft_config: Any = None,
        callbacks: list[TrainerCallback] | None = None,
        optimizers: tuple[Any, Any] = (None, None),
        *,
        reward_processing_classes: Any = None,
        rollout_func: RolloutFunction | None = None,
    ) -> None:
        args = KLQConfig("klq_output") if args is None else args
        require(isinstance(args, KLQConfig), "args", f"must be a KLQConfig, got {type(args).__name__}")
        loading.check_dataset("train_dataset", train_dataset)
        if eval_dataset is not None:
            loading.check_dataset("eval_dataset", eval_dataset)
        policy = loading.causal_lm(model, args)
        tokenizer = loading.tokenizer(processing_class, policy)
        reward_funcs = as_list(reward_funcs)
        critic = loading.value_model(value_model, args, [policy, ref_model, *reward_funcs])
        if peft_config is not None:
            from peft import get_peft_model

            policy = get_peft_model(policy, peft_config)
        language_model = LanguageModel(policy)
        language_model.prove()
        loading.warn_of_16_bit("model", policy)
        loading.warn_of_16_bit("value_model", critic)
        if ref_model is not None:
            reference: nn.Module | None = loading.causal_lm(ref_model, args)
            require(
                not loading.shares_parameters(policy, reference, trained=True),  # type: ignore[arg-type]
                "ref_model",
                "must not share trained parameters with model; leave it None: the policy as it is now is the reference",
            )
        else:
            reference = None if language_model.is_peft else copy.deepcopy(policy)
        value = ValueFunction(language_model.config.hidden_size, critic)
        actor_critic = ActorCritic(policy, value, args.temperature, args.shared_value_gradient)
        if args.disable_dropout:
            disable_dropout(actor_critic)
        super().__init__(
            model=actor_critic,
            args=args,
            data_collator=list,  # type: ignore[arg-type]  # a batch of prompts is the list of their rows
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            processing_class=tokenizer,
            callbacks=callbacks,
            optimizers=optimizers,
        )
        self.args: KLQConfig
        self._check_launch()
        self.model_accepts_loss_kwargs = True  # the losses are normalised over the whole step
        self.tokenizer = tokenizer
        self.reference = None
        if reference is not None:
            reference.requires_grad_(False).eval().to(args.device)
            self.reference = LanguageModel(reference)
            self.reference.prove()
        self.rewards = Rewards(
            reward_funcs,
            weights=args.reward_weights,
            processing_classes=reward_processing_classes,
            batch_size=args.rollout_forward_batch_size,
            device=args.device,
        )
        self.rollout_func = rollout_func
        self.generation_config = sampling_config(
            language_model.model, tokenizer,
            temperature=args.temperature, max_new_tokens=args.max_completion_length,
            extra=dict(args.generation_kwargs or {}),  # type: ignore[arg-type]  # parsed where it was JSON
        )  # fmt: skip
        self.means = Means()
        self._seconds: dict[str, float] = {}
        self.experience: Experience | None = None
        self._micro_step = 0  # within the optimizer step
        self._step_rows = torch.zeros(0)
        if args.watch_failures:
            self.add_callback(FailureWatch(args))
        self.completions_log = CompletionsLog(args) if args.log_completions else None

    # ---- the parts of the model ---------------------------------------------------------------------------------

    @property
    def actor_critic(self) -> ActorCritic:
        return self.accelerator.unwrap_model(self.model)

    @property
    def policy(self) -> PreTrainedModel:
        """The language model that is trained (with its adapters, if it has any)."""
        return self.actor_critic.policy  # type: ignore[return-value]

    def _check_launch(self) -> None:
        args = self.args
        require(args.n_gpu <= 1, "args", "DataParallel is not supported; use `accelerate launch` for several GPUs")
        zero = getattr(self.accelerator.state, "deepspeed_plugin", None)
        require(
            self.accelerator.distributed_type != DistributedType.DEEPSPEED or zero.zero_stage < 3,  # type: ignore[union-attr]
            "deepspeed",
            "ZeRO-3 shards the lm_head, which the fused loss reads whole; use ZeRO-2 or FSDP2",
        )

    # ---- data ---------------------------------------------------------------------------------------------------

    def get_train_dataloader(self) -> DataLoader:
        """Every batch is the prompts of one process for one cycle, once per micro-batch of the cycle."""
        args = self.args
        sampler = CycleSampler(
            len(self.train_dataset),  # type: ignore[arg-type]
            per_cycle=args.rollouts_per_device * self.accelerator.num_processes,
            repeats=args.steps_per_cycle * args.gradient_accumulation_steps,
            seed=args.data_seed if args.data_seed is not None else args.seed,
            cycle=lambda: self.cycle,
        )
        loader = DataLoader(
            self.train_dataset,  # type: ignore[arg-type]
            batch_size=args.rollouts_per_device,
            sampler=sampler,
            collate_fn=self.data_collator,
            num_workers=args.dataloader_num_workers,
            drop_last=True,
        )
        return self.accelerator.prepare(loader)

    # ---- the cycle ----------------------------------------------------------------------------------------------

    def training_step(self, model: nn.Module, inputs: Any, num_items_in_batch: Any = None) -> Tensor:
        """One micro-batch; the first of a cycle samples the cycle's experience from ``inputs``, its prompts."""
        step_in_cycle = self.state.global_step % self.args.steps_per_cycle
        if self.experience is None or (step_in_cycle == 0 and self._micro_step == 0):
            self.experience = self.collect(inputs)
        if self._micro_step == 0 and (step_in_cycle == 0 or len(self._step_rows) == 0):
            self._begin_updates()
        indices = self._plan.indices[step_in_cycle, self._micro_step]
        self._micro_step = (self._micro_step + 1) % self.args.gradient_accumulation_steps
        denom = self._step_rows[step_in_cycle] / self.accelerator.num_processes  # gradients are averaged over processes
        with self._timed("time/update"):
            return super().training_step(model, (self.experience.select(indices), denom), num_items_in_batch=1)  # type: ignore[arg-type]

    def compute_loss(
        self, model: nn.Module, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """The loss of a micro-batch, its share of the mean over all tokens of the optimizer step on all processes."""
        experience, denom = inputs
        batch = self._collate(experience.sequences)
        objective = partial(
            OBJECTIVES[self.args.algorithm], inputs=batch, experience=experience, denom=denom, config=self.args
        )
        loss, metrics = model(batch, objective)
        self.means.add(
            {LOGGED[name]: value for name, value in metrics.items() if name in LOGGED}, batch.actions.numel()
        )
        return (loss, metrics) if return_outputs else loss

    def _prepare_inputs(self, inputs: Any) -> Any:
        return inputs  # compute_loss puts on the device what belongs there

    def _begin_updates(self) -> None:
        """Shuffles the cycle's mini-batches and counts the trained tokens of each step over all processes."""
        assert self.experience is not None
        args = self.args
        seed = derived_seed(args.seed, Purpose.SHUFFLE, self.cycle, args.process_index)
        self._plan = Plan.shuffled(
            epochs=args.num_update_epochs,
            mini_batches=args.num_mini_batches,
            accumulation=args.gradient_accumulation_steps,
            size=args.per_device_train_batch_size,
            seed=seed,
        )
        counts = self._plan.rows_per_step(self.experience.rows).float().to(args.device)
        self._step_rows = self.accelerator.reduce(counts, reduction="sum").clamp(min=1)

    @property
    def cycle(self) -> int:
        """Cycles finished so far."""
        return self.state.global_step // self.args.steps_per_cycle

    @property
    def lam(self) -> float:
        """The trace decay of this cycle, annealed where ``lam_final`` is given."""
        args = self.args
        if args.lam_final is None:
            return args.lam
        progress = min(self.state.global_step / max(self.state.max_steps - args.steps_per_cycle, 1), 1.0)
        return args.lam + (args.lam_final - args.lam) * progress

    @torch.no_grad()
    def collect(self, rows: list[dict[str, Any]]) -> Experience:
        """Samples, rewards and scores a completion for each row of the dataset: the experience of a cycle."""
        seed = derived_seed(self.args.seed, Purpose.ROLLOUT, self.cycle, self.args.process_index)
        with self._timed("time/rollout"):
            rollout = self.roll_out(rows, seed)
        with self._timed("time/reward"):
            scores = self.reward(rows, rollout)
        with self._timed("time/score"):
            scored, ref_logprobs = self.score(rollout)
        targets = self._targets(rollout, scores, scored, ref_logprobs)
        experience = Experience(rollout.sequences, targets, ref_logprobs, self._weighted(targets.advantages))
        statistics = completion_statistics(rollout, scores, scored, experience, self.args.tau)
        self.means.add({**statistics, "lam": self.lam}, len(rollout.sequences))
        add_rewards(self.means, scores, self.rewards.names)
        self.means.add(token_statistics(rollout, scored), len(scored.logprobs))
        if self.completions_log is not None:
            self._log_completions(rows, rollout, scores)
        return experience

    def roll_out(self, rows: list[dict[str, Any]], seed: int) -> Rollout:
        """Completions of the rows' prompts, sampled with the policy as it is."""
        prompts = [self._tokenize(row["prompt"]) for row in rows]
        with seeded(seed, self.args.device), self._inference() as model:
            if self.rollout_func is None:
                completions = generate(
                    model, prompts, self.generation_config,
                    batch_size=self.args.rollout_forward_batch_size, device=self.args.device,
                )  # fmt: skip
            else:
                completions = self.rollout_func([row["prompt"] for row in rows], self)
                require(
                    isinstance(completions, Completions),
                    "rollout_func",
                    f"must return Completions, got {type(completions).__name__}",
                )
        return check_completions(completions, prompts, eos_ids(self.generation_config))

    @contextmanager
    def _inference(self) -> Iterator[ActorCritic]:
        """The module without dropout and gradients, computing (as does the reference) in the precision of training.

        Rollout and scoring share it, so that samples and old log-probabilities are those of one policy.
        """
        model = self.actor_critic
        was_training = model.training
        model.eval()
        try:
            with torch.no_grad(), self.accelerator.autocast():
                yield model
        finally:
            model.train(was_training)

    def _tokenize(self, prompt: Any) -> list[int]:
        ids = tokenize_prompt(prompt, self.tokenizer)
        return ids if self.args.max_prompt_length is None else ids[-self.args.max_prompt_length :]

    def reward(self, rows: list[dict[str, Any]], rollout: Rollout) -> Scores:
        """What the reward functions say, with the penalty for completions that did not end."""
        prompts = [row["prompt"] for row in rows]
        ids = [s.completion.tolist() for s in rollout.sequences]
        texts = self.tokenizer.batch_decode(ids, skip_special_tokens=True)
        chats = [isinstance(prompt, list) for prompt in prompts]
        completions = [
            [{"role": "assistant", "content": text}] if chat else text for chat, text in zip(chats, texts, strict=True)
        ]
        columns = {name: [row[name] for row in rows] for name in rows[0] if name != "prompt"}
        scores = self.rewards(
            prompts=prompts, completions=completions, completion_ids=ids, columns=columns, context=self.state
        )
        if self.args.missing_eos_penalty is not None:
            scores = scores._replace(total=scores.total - self.args.missing_eos_penalty * rollout.truncated)
        return scores

    def score(self, rollout: Rollout) -> tuple[Scored, Tensor]:
        """(what the policy and the value function say of a rollout, log-probs under the reference), packed."""
        passes, references = [], []
        size = self.args.rollout_forward_batch_size
        with self._inference() as model:
            for begin in range(0, len(rollout.sequences), size):
                batch = self._collate(rollout.sequences[begin : begin + size])
                passes.append(model(batch, partial(score, inputs=batch, config=self.args)))
                references.append(self._reference_logprobs(model, batch))
        return Scored(*(torch.cat(column) for column in zip(*passes, strict=True))), torch.cat(references)

    def _reference_logprobs(self, model: ActorCritic, batch: Inputs) -> Tensor:
        read: Objective = partial(logprobs, inputs=batch, config=self.args)
        if self.reference is None:  # the policy without its adapters
            with model.language_model.without_adapters():
                return model(batch, read).logprobs
        hidden = self.reference.hidden_states(batch).index_select(0, batch.rows)
        nothing = hidden.new_zeros(0)
        return read(States(hidden, self.reference.head(self.args.temperature), nothing, nothing)).logprobs

    def _collate(self, sequences: list[Any]) -> Inputs:
        padding_free = self.args.padding_free
        if padding_free is None:
            attention = str(getattr(self.actor_critic.config, "_attn_implementation", ""))
            padding_free = "flash" in attention
        pad: Any = self.tokenizer.pad_token_id
        return collate(sequences, pad_id=pad, padding_free=padding_free).to(self.args.device)

    def _targets(self, rollout: Rollout, scores: Scores, scored: Scored, ref_logprobs: Tensor) -> KLQTargets:
        """lambda-errors. A completion that was cut off earns V of its last state in place of a score."""
        device = scored.logprobs.device
        cut = rollout.truncated.to(device) & self.args.bootstrap_truncated
        total = torch.where(cut, -(self.args.missing_eos_penalty or 0.0), scores.total.to(device))
        counts = torch.tensor([0, *(s.rows for s in rollout.sequences)])
        return klq_targets(
            scored.logprobs,
            ref_logprobs,
            scored.values,
            total,
            bootstrap_values=scored.last_values * cut,
            tau=self.args.tau,
            gamma=self.args.gamma,
            lam=self.lam,
            cu_seqlens=counts.cumsum(0).int().to(device),
        )

    def _weighted(self, advantages: Tensor) -> Tensor:
        """Advantages as the objective takes them: whitened over all processes for PPO, as they are for KLQ."""
        if self.args.algorithm != "ppo" or not self.args.whiten_advantages:
            return advantages
        moments = torch.stack([torch.ones_like(advantages), advantages, advantages.square()]).double().sum(1)
        count, total, squares = self.accelerator.reduce(moments, reduction="sum")
        mean = total / count.clamp(min=1)
        deviation = (squares / count.clamp(min=1) - mean.square()).clamp(min=0).sqrt()
        return ((advantages - mean) / (deviation + 1e-8)).float()

    # ---- what is logged -----------------------------------------------------------------------------------------

    @contextmanager
    def _timed(self, name: str) -> Iterator[None]:
        """Adds the seconds a part of the cycle takes to the log (per cycle; on a GPU, of the host's waiting)."""
        begin = time.perf_counter()
        yield
        self._seconds[name] = self._seconds.get(name, 0.0) + time.perf_counter() - begin

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Adds the means since the last log to what transformers logs, and the number of episodes so far."""
        if self.is_in_train and "loss" in logs:
            logs = {**logs, **self.means.drain(self.accelerator), **self._seconds}
            self._seconds.clear()
            per_cycle = self.args.rollouts_per_device * self.accelerator.num_processes
            logs["episode"] = math.ceil(self.state.global_step / self.args.steps_per_cycle) * per_cycle
        super().log(logs, start_time)

    def _log_completions(self, rows: list[dict[str, Any]], rollout: Rollout, scores: Scores) -> None:
        assert self.completions_log is not None
        texts = self.tokenizer.batch_decode([s.completion.tolist() for s in rollout.sequences])
        self.completions_log.add(
            self.state.global_step, [row["prompt"] for row in rows], texts, scores, self.rewards.names
        )

    # ---- evaluation ---------------------------------------------------------------------------------------------

    def evaluate(
        self, eval_dataset: Any = None, ignore_keys: list[str] | None = None, metric_key_prefix: str = "eval"
    ) -> dict[str, float]:
        """Samples completions for held-out prompts and scores them; random numbers are the same each time.

        They are also the same on any number of processes, which take turns at batches of
        ``rollout_forward_batch_size`` prompts.

        Returns:
            ``eval_reward``, ``eval_reward_std``, ``eval_kl`` (nats per completion), ``eval_length``,
            ``eval_truncated`` and, of each reward function that scored anything, ``eval_rewards/NAME``.
        """
        data: Any = self.eval_dataset if eval_dataset is None else eval_dataset
        if isinstance(data, dict):
            parts = (self.evaluate(d, ignore_keys, f"{metric_key_prefix}_{name}") for name, d in data.items())
            return {name: value for part in parts for name, value in part.items()}
        loading.check_dataset("eval_dataset", data)
        means, mine = Means(), self.turns(len(data))
        names = ["reward", "reward_square", "kl", "length", "truncated", *(f"rewards/{n}" for n in self.rewards.names)]
        means.add(dict.fromkeys(names, 0.0), 0)  # every process has every name, also one that keeps no turn
        self.callback_handler.eval_dataloader = mine  # progress bars ask for its length
        for turn in mine:
            self._evaluate_turn(turn, [data[i] for i in turn.rows], means)
            self.control = self.callback_handler.on_prediction_step(self.args, self.state, self.control)
        found = means.drain(self.accelerator)
        found["reward_std"] = max(found.pop("reward_square") - found["reward"] ** 2, 0.0) ** 0.5
        metrics = {f"{metric_key_prefix}_{n}": found[n] for n in sorted(found)}
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def turns(self, number: int) -> list[Turn]:
        """How this process shares in sampling completions for ``number`` held-out rows."""
        process, processes = self.args.process_index, self.accelerator.num_processes
        return turns(number, self.args.rollout_forward_batch_size, process=process, processes=processes)

    def _evaluate_turn(self, turn: Turn, rows: list[dict[str, Any]], means: Means) -> None:
        seed = derived_seed(self.args.seed, Purpose.EVALUATION, 0, turn.rows.start)  # 1, 2: the judge of ``klq train``
        rollout = self.roll_out(rows, seed)
        scored, ref_logprobs = self.score(rollout)
        if turn.kept:
            scores = self.reward(rows, rollout)
            means.add(held_out_statistics(rollout, scores, scored.logprobs - ref_logprobs), len(rows))
            add_rewards(means, scores, self.rewards.names)

    # ---- optimiser, checkpoints ---------------------------------------------------------------------------------

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """transformers' optimiser, with the value function in a group of its own where it has its own rate."""
        fresh = self.optimizer is None
        optimizer = super().create_optimizer() if model is None else super().create_optimizer(model)
        if fresh and self.args.value_learning_rate is not None:
            ours = {id(p) for p in self.actor_critic.value.parameters()}
            moved = [p for group in optimizer.param_groups for p in group["params"] if id(p) in ours]
            for group in optimizer.param_groups:
                group["params"] = [p for p in group["params"] if id(p) not in ours]
            optimizer.add_param_group({"params": moved, "lr": self.args.value_learning_rate, "weight_decay": 0.0})
        return optimizer

    def train(self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any) -> Any:
        """As in transformers. ``True`` resumes from the last *complete* checkpoint in ``output_dir``."""
        if resume_from_checkpoint is True:
            folder = str(self.args.output_dir)
            resume_from_checkpoint = last_complete_checkpoint(Path(folder))
            require(resume_from_checkpoint is not None, "resume_from_checkpoint", f"none is complete in {folder}")
        self.experience, self._micro_step, self._step_rows = None, 0, torch.zeros(0)
        return super().train(resume_from_checkpoint, *args, **kwargs)

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None) -> None:
        """The policy as ``from_pretrained`` reads it, its tokenizer, and the value function in a file beside it."""
        if not self.args.should_save:
            return
        folder = Path(str(output_dir or self.args.output_dir))
        folder.mkdir(parents=True, exist_ok=True)
        state = self.actor_critic.state_dict() if state_dict is None else state_dict
        policy, value = (
            {name.removeprefix(prefix): tensor for name, tensor in state.items() if name.startswith(prefix)}
            for prefix in ("policy.", "value.")
        )
        self.policy.save_pretrained(folder, state_dict=policy)
        self.tokenizer.save_pretrained(folder)
        save_file({name: tensor.contiguous() for name, tensor in value.items()}, folder / VALUE_FILE)
        torch.save(self.args, folder / "training_args.bin")

    def create_model_card(  # type: ignore[override]
        self, language: str | None = None, license: str | None = None, tags: Any = None, **kwargs: Any
    ) -> None:
        """transformers' card, with tags that say how the model was trained."""
        given = [tags] if isinstance(tags, str) else list(tags or [])
        super().create_model_card(language, license, [*given, "klq_kernels", self.args.algorithm], **kwargs)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        if self.is_fsdp_enabled:
            super()._load_from_checkpoint(resume_from_checkpoint, model)
            return
        super()._load_from_checkpoint(resume_from_checkpoint, self.policy)
        self.actor_critic.value.load_state_dict(load_file(Path(resume_from_checkpoint) / VALUE_FILE))

    def _load_best_model(self) -> None:
        """What ``load_best_model_at_end`` loads."""
        self._load_from_checkpoint(str(self.state.best_model_checkpoint))

    def _save_rng_state(self, output_dir: str) -> None:
        """Beside the random state, what the next log will say, and the experience of a cycle that is not over yet."""
        super()._save_rng_state(output_dir)
        torch.save(self.means.state(), self._file_of_process(output_dir, "means"))
        if self.experience is not None and self.state.global_step % self.args.steps_per_cycle:
            self.experience.save(self._file_of_process(output_dir, "experience"))
        self.accelerator.wait_for_everyone()  # the state file, which says that all is there, is written next

    def _load_rng_state(self, checkpoint: str | None) -> None:
        super()._load_rng_state(checkpoint)
        if checkpoint is None:
            return
        means = self._file_of_process(checkpoint, "means")
        if means.exists():
            self.means.load_state(torch.load(means, weights_only=True))
        if self.state.global_step % self.args.steps_per_cycle:
            file = self._file_of_process(checkpoint, "experience")
            absent = torch.tensor(float(not file.exists()), device=self.args.device)
            # all processes fail together: one that stopped alone would leave the others waiting for it
            missing = int(self.accelerator.reduce(absent, reduction="sum"))
            require(
                missing == 0,
                "resume_from_checkpoint",
                f"experience_RANK.pt is missing for {missing} of {self.accelerator.num_processes} processes: the "
                "checkpoint was not written to its end, or by a run with other processes, epochs or mini-batches; "
                "resume that run, or from another checkpoint",
            )
            self.experience = Experience.load(file, self.args.device)

    def _file_of_process(self, folder: str, name: str) -> Path:
        return Path(folder) / f"{name}_{self.args.process_index}.pt"


def last_complete_checkpoint(output_dir: Path) -> str | None:
    """The newest checkpoint that was written to its end (its state file comes last), or None."""
    found = [p for p in output_dir.glob(f"{PREFIX_CHECKPOINT_DIR}-*") if step_of(p).isdecimal()]
    for folder in sorted(found, key=lambda p: int(step_of(p)), reverse=True):
        try:
            json.loads((folder / TRAINER_STATE_NAME).read_text())
        except (OSError, ValueError):
            continue
        return str(folder)
    return None


def step_of(checkpoint: Path) -> str:
    """What follows ``checkpoint-``: of those that transformers wrote, the step."""
    return checkpoint.name.removeprefix(f"{PREFIX_CHECKPOINT_DIR}-")


__all__ = ["KLQTrainer", "last_complete_checkpoint"]
