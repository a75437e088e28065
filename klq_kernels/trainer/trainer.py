"""``KLQTrainer``: KL-regularised Q-learning (and its PPO baseline) as a ``transformers.Trainer``.

One cycle, repeated until the steps are used up, is a rollout, rewards and scoring (``cycle``), and then epochs of
shuffled mini-batches of updates with the fused loss (``objectives``), on trained tokens only.

transformers' loop stays in charge of everything else: it asks for one micro-batch after the other, steps the optimiser,
logs, evaluates, saves. The first micro-batch of a cycle triggers the rollout. Randomness is a function of (seed, cycle,
process), and a checkpoint in the middle of a cycle holds the cycle's experience (``checkpoints``); so a resumed run
repeats exactly what an uninterrupted one would have done.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader
from transformers import PreTrainedTokenizerBase, TrainerCallback

from ..call.checks import renaming, require
from . import loading, sharding
from .actor_critic import ActorCritic
from .ahead import Ahead
from .batches import Inputs
from .callbacks import FailureWatch
from .checkpoints import Checkpoints
from .completions_log import CompletionsLog
from .config import KLQConfig
from .demonstrations import Demonstrations
from .engine import engine_of
from .evaluation import Evaluation
from .experience import Experience, Plan
from .frozen import Placed
from .objectives import OBJECTIVES
from .parts import proven_parts
from .replay import Memory
from .rewards import OF_TRAINERS, RewardFunction, Rewards, as_list
from .rollout import RolloutFunction, check_ahead, eos_ids, sampling_config
from .running import Running
from .sampler import CycleSampler
from .seeds import Purpose, derived_seed
from .written import Reader

# The names of the losses' metrics in the logs, as PPO trainers have them.
LOGGED = {
    "policy_loss": "loss/policy_avg",
    "value_loss": "loss/value_avg",
    "residual_rms": "loss/residual_rms",
    "kl_old_k3": "policy/approxkl_avg",
    "kl_ref_k3": "policy/kl_ref_k3",
    "kl_ref": "policy/kl_ref",
    "policy_clip_fraction": "policy/clipfrac_avg",
    "log_ratio_clip_fraction": "policy/clipfrac_avg",
    "value_clip_fraction": "val/clipfrac_avg",
    "ratio": "val/ratio",
    "value_mean": "val/value_mean",
    "gradient_entries": "policy/gradient_entries",
}
OF_VALUES = ("value_loss", "value_clip_fraction")  # where a value function is trained
RMS = {"residual_rms"}  # those that are root mean squares


class KLQTrainer(Evaluation, Checkpoints):
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
        rollout_func: samples completions in place of ``generate`` (see ``rollout``); by default what ``args.engine``
            names (see ``engine``). For ``async_rollouts`` it needs a method ``begin``.
        demonstrations: a dataset with the columns ``prompt`` and ``completion``, and those that the reward functions
            read: completions to learn from beside the replayed ones (see ``demonstrations``). For KLQ.

    Raises:
        ValueError: naming the argument that does not fit, and what would.
    """

    config_class: ClassVar[type[KLQConfig]] = KLQConfig

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
        demonstrations: Any = None,
    ) -> None:
        args = self.config_class("klq_output") if args is None else args
        right = isinstance(args, self.config_class) and args.algorithm in self.config_class.algorithms
        require(right, "args", f"must be a {self.config_class.__name__}, got {type(args).__name__}")
        require(
            value_model is None or args.has_critic,
            "value_model",
            f"is not read by {args.algorithm}, which has no value function; leave it None",
        )
        require(
            value_model is not None or not args.freeze_value_model,
            "freeze_value_model",
            "needs a value_model that knows the values: a linear head begins at 0, and would stay there",
        )
        require(
            rollout_func is None or args.engine == "transformers",
            "rollout_func",
            f"samples in place of engine={args.engine!r}; give one of the two",
        )
        rollout_func = engine_of(args) if rollout_func is None else rollout_func
        require(
            args.off_policy == "none" or rollout_func is not None or args.replay_cycles > 0,
            "off_policy",
            "'retrace' corrects for a rollout_func or for replay_cycles, and there are none: the trainer's own samples "
            "are on-policy",
        )
        require(
            args.off_policy == "none" or rollout_func is not None or not args.generation_kwargs,
            "generation_kwargs",
            "sample from a policy of which off_policy='retrace' would need the log-probabilities; leave them out, or "
            "sample with a rollout_func that returns them",
        )
        if args.async_rollouts:
            check_ahead(rollout_func)
        loading.check_dataset("train_dataset", train_dataset)
        if eval_dataset is not None:
            loading.check_dataset("eval_dataset", eval_dataset)
        policy = loading.causal_lm(model, args)
        tokenizer = loading.tokenizer(processing_class, policy)
        reward_funcs = as_list(reward_funcs)
        critic = loading.value_model(value_model, args, [policy, ref_model, *reward_funcs])
        reference = None if ref_model is None else loading.causal_lm(ref_model, args)
        generation_config = sampling_config(
            policy, tokenizer, temperature=args.temperature, max_new_tokens=args.max_completion_length,
            extra=dict(args.generation_kwargs or {}),  # type: ignore[arg-type]  # parsed where it was JSON
        )  # fmt: skip
        parts = proven_parts(
            args, policy, critic, reference, tokenizer=tokenizer, peft_config=peft_config, optimizer=optimizers[0],
            generation_config=generation_config if rollout_func is None else None,
        )  # fmt: skip
        super().__init__(
            model=parts.actor_critic,
            args=args,
            data_collator=list,  # a batch is the list of its numbers
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
        self.padding_free, self.positions = parts.reading
        self.reference = None
        if parts.reference is not None:
            self.reference = Placed(parts.reference, args.ref_placement, self.accelerator, "ref_placement")
        with renaming(OF_TRAINERS):
            self.rewards = Rewards(
                reward_funcs,
                weights=args.reward_weights,
                processing_classes=reward_processing_classes,
                batch_size=args.rollout_forward_batch_size,
                place=self._place_reward,
            )
        self.rollout_func = rollout_func
        self.generation_config = generation_config
        self.running = {name: Running() for name in ("scores", "errors")}
        self.episodes = 0  # rollouts of the run so far, on all processes
        self.memory = Memory(args.replay_cycles, args.num_generations)
        self.demonstrations = self._read_demonstrations(demonstrations)
        self.ahead = Ahead(self.accelerator, self.check)
        self.experience: Experience | None = None
        self.micro_step = 0  # within the optimizer step
        self.step_rows = torch.zeros(0)
        if args.watch_failures:
            self.add_callback(FailureWatch(args))
        self.completions_log = CompletionsLog(args) if args.log_completions else None

    # ---- the parts of the model ---------------------------------------------------------------------------------

    @property
    def actor_critic(self) -> ActorCritic:
        return self.accelerator.unwrap_model(self.model)

    def _check_launch(self) -> None:
        sharding.check_engine(self.accelerator)
        sharding.check_head_sharding(self.accelerator, self.language_model, self.args.head_sharding)

    def _read_demonstrations(self, dataset: Any) -> Demonstrations | None:
        args = self.args
        if dataset is None:
            args._warn_of_ignored(("demonstration_share",), "a trainer without demonstrations")
            return None
        require(
            args.algorithm == "klq",
            "demonstrations",
            "serve algorithm='klq' alone, whose targets need no probability of the author's tokens; leave them out "
            f"for {args.algorithm}",
        )
        require(args.replay_cycles > 0, "demonstrations", "are a part of the replayed completions; set replay_cycles")
        require(not isinstance(dataset, dict), "demonstrations", "must be one dataset, got a dict of them")
        loading.check_dataset("demonstrations", dataset)
        template: Any = args.chat_template_kwargs
        reader = Reader(
            self.tokenizer, self.language_model.vocab_size, max_prompt_length=args.max_prompt_length,
            max_completion_length=args.max_completion_length, template=template, ends=eos_ids(self.generation_config),
            positions=self.positions,
        )  # fmt: skip
        return Demonstrations(
            dataset, reader, number=self._demonstrations_per_pass(), passes=args.replay_passes,
            process=args.process_index, processes=self.accelerator.num_processes, seed=args.seed,
        )  # fmt: skip

    def _demonstrations_per_pass(self) -> int:
        """Of a process: ``demonstration_share``, to the nearest whole groups of ``num_generations``."""
        args, prompts = self.args, self._prompts_per_device
        groups = round(args.demonstration_share * prompts)
        require(
            groups >= 1 and (groups < prompts or args.demonstration_share == 1),
            "demonstration_share",
            f"{args.demonstration_share:g} of the {args.rollouts_per_device} completions of a process in a pass comes "
            f"to {'none' if groups == 0 else 'all'} in whole groups of num_generations={args.num_generations}; give a "
            f"multiple of 1/{prompts}",
        )
        return groups * args.num_generations

    def _place_reward(self, model: nn.Module) -> Placed:
        return Placed(model, self.args.reward_placement, self.accelerator, "reward_placement")

    # ---- data ---------------------------------------------------------------------------------------------------

    def get_train_dataloader(self) -> DataLoader:
        """An epoch's micro-batches, by number: the loop counts them, and ``rows_of`` reads a cycle's prompts, once."""
        micro_batches = self.args.steps_per_cycle * self.args.gradient_accumulation_steps
        numbers: Any = range(self._sampler().cycles * micro_batches * self.accelerator.num_processes)
        return self.accelerator.prepare(DataLoader(numbers, batch_size=1, collate_fn=list))

    def num_examples(self, dataloader: Any) -> int:
        """The prompts of an epoch."""
        return len(self.train_dataset)  # type: ignore[arg-type]

    @property
    def _prompts_per_device(self) -> int:
        return self.args.rollouts_per_device // self.args.num_generations

    def _sampler(self) -> CycleSampler:
        args = self.args
        return CycleSampler(
            len(self.train_dataset),  # type: ignore[arg-type]
            per_cycle=self._prompts_per_device * self.accelerator.num_processes,
            seed=args.data_seed if args.data_seed is not None else args.seed,
        )

    def rows_of(self, cycle: int) -> list[dict[str, Any]]:
        number, process = self._prompts_per_device, self.args.process_index
        indices = self._sampler().of(cycle)[process * number : (process + 1) * number]
        return [self.train_dataset[i] for i in indices]  # type: ignore[index]

    # ---- the cycle ----------------------------------------------------------------------------------------------

    def training_step(self, model: nn.Module, inputs: Any, num_items_in_batch: Any = None) -> Tensor:
        """One micro-batch; the first of a cycle samples the experience of the cycle; ``inputs`` only count."""
        step_in_cycle = self.state.global_step % self.args.steps_per_cycle
        if self.experience is None or (step_in_cycle == 0 and self.micro_step == 0):
            self.experience = self.collect(self.rows_of(self.cycle))
            self.episodes += self.args.rollouts_per_device * self.accelerator.num_processes
        if self.micro_step == 0 and (step_in_cycle == 0 or len(self.step_rows) == 0):
            self._begin_updates()
        indices = self._plan.indices[step_in_cycle, self.micro_step]
        args = self.args
        seed = derived_seed(args.seed, Purpose.GRADIENT, self.state.global_step, self.micro_step, args.process_index)
        self.micro_step = (self.micro_step + 1) % self.args.gradient_accumulation_steps
        denom = self.step_rows[step_in_cycle] / self.accelerator.num_processes  # gradients are averaged over processes
        with self._timed("time/update"):
            loss = super().training_step(model, (self.experience.select(indices), denom, seed), num_items_in_batch=1)
        if self.warming_up:  # without a gradient the optimiser leaves a parameter, and what it knows of it, as it is
            for parameter in self.policy.parameters():
                parameter.grad = None
        return loss

    def compute_loss(
        self, model: nn.Module, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """The loss of a micro-batch, its share of the mean over all tokens of the optimizer step on all processes."""
        experience, denom, seed = inputs
        batch = self.collate(experience.sequences)
        objective = partial(
            self.objective_of(batch), inputs=batch, experience=experience, denom=denom, config=self.args, seed=seed
        )
        known = None if self.args.learns_values else experience.targets.old_values
        loss, metrics = model(batch, objective, values_alone=self.warming_up, known_values=known)
        if self.warming_up and isinstance(model, DistributedDataParallel):  # which waits for all gradients
            loss = loss + 0.0 * sum(p.sum() for p in self.policy.parameters() if p.requires_grad)
        tokens = batch.actions.numel()
        unlearnt = () if self.args.learns_values else OF_VALUES
        logged = {name: value for name, value in metrics.items() if name in LOGGED and name not in unlearnt}
        self.means.add({LOGGED[name]: value for name, value in logged.items() if name not in RMS}, tokens)
        for name in RMS & logged.keys():
            self.means.add_rms(LOGGED[name], logged[name], tokens)
        return (loss, metrics) if return_outputs else loss

    def objective_of(self, batch: Inputs) -> Callable[..., tuple[Tensor, dict[str, Tensor]]]:
        """The loss of a micro-batch, a function as in ``objectives``."""
        return OBJECTIVES[self.args.algorithm]

    def step_weights(self, rows: Tensor) -> Tensor:
        """What each sequence counts for in the mean of an optimizer step, [S]: its trained tokens, ``rows``."""
        return rows

    @property
    def warming_up(self) -> bool:
        """Whether the step at hand is one of those in which the value function alone learns."""
        return self.state.global_step < self.args.value_warmup_steps

    def _begin_updates(self) -> None:
        """Shuffles the cycle's mini-batches and counts what each step is a mean over, on all processes."""
        assert self.experience is not None
        args = self.args
        seed = derived_seed(args.seed, Purpose.SHUFFLE, self.cycle, args.process_index)
        self._plan = Plan.shuffled(
            epochs=args.num_update_epochs,
            replays=args.replay_passes,
            mini_batches=args.num_mini_batches,
            accumulation=args.gradient_accumulation_steps,
            size=args.per_device_train_batch_size,
            seed=seed,
        )
        counts = self._plan.rows_per_step(self.step_weights(self.experience.rows)).float().to(args.device)
        self.step_rows = self.accelerator.reduce(counts, reduction="sum").clamp(min=1)

    # ---- what is logged -----------------------------------------------------------------------------------------

    def _counts(self) -> dict[str, float]:
        """The number of episodes so far."""
        return {"episode": self.episodes}

    # ---- optimiser, model card ----------------------------------------------------------------------------------

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """transformers' optimiser, with the value function in groups of its own where it has its own rate."""
        fresh = self.optimizer is None
        optimizer = super().create_optimizer() if model is None else super().create_optimizer(model)
        if fresh and self.args.value_learning_rate is not None:
            ours = {id(p) for p in self.actor_critic.value.parameters()}
            for group in list(optimizer.param_groups):  # each in two, which share the rest of its settings
                moved = [p for p in group["params"] if id(p) in ours]
                group["params"] = [p for p in group["params"] if id(p) not in ours]
                if moved:
                    optimizer.add_param_group({**group, "params": moved, "lr": self.args.value_learning_rate})
        return optimizer

    def create_model_card(  # type: ignore[override]
        self, language: str | None = None, license: str | None = None, tags: Any = None, **kwargs: Any
    ) -> None:
        """transformers' card, with tags that say how the model was trained."""
        given = [tags] if isinstance(tags, str) else list(tags or [])
        super().create_model_card(language, license, [*given, "klq_kernels", self.args.algorithm], **kwargs)
