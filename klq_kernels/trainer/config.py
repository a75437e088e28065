"""``KLQConfig``: the arguments of a run, beside those of ``transformers.TrainingArguments``.

How the numbers hang together (names as in TRL's PPO where it has one):

    rollouts per device and cycle   per_device_train_batch_size x gradient_accumulation_steps x num_mini_batches
    prompts per device and cycle    that / num_generations
    optimizer steps per cycle       num_mini_batches x (num_update_epochs + passes over replayed completions)

``max_steps``, ``save_steps``, ``eval_steps`` and the rest count optimizer steps, as everywhere in transformers.
"""

from __future__ import annotations

import math
import os
import warnings
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, ClassVar

from transformers import TrainingArguments

from ..call.checks import require, require_number
from ..call.head import check_sampling
from ..loss import LOSS_TYPES
from .options import PolicyConfig, SamplingConfig, check_counts, option

OFF_POLICY = ("none", "retrace")
ENGINES = ("transformers", "vllm")
ENGINE_SAMPLING = ("top_k", "top_p", "min_p", "repetition_penalty")  # of generation_kwargs, what engines know
CORRECTION = ("trace_clip", "importance_clip", "dppo_divergence", "dppo_delta")  # the options of off_policy
PRIORITIES = ("error", "uniform")
DPPO_DELTAS = {"tv": 0.15, "kl": 0.05}  # DPPO's thresholds, by divergence
PLACEMENTS = ("device", "cpu", "sharded")  # of frozen weights
# Arguments that only the other algorithm reads.
IGNORED = {
    "klq": ("cliprange", "vf_coef", "whiten_advantages", "importance_clip", "dppo_divergence", "dppo_delta"),
    "ppo": ("alpha", "loss_type", "huber_delta", "log_ratio_clip", "advantage_spread"),
}


@dataclass
class KLQConfig(SamplingConfig, PolicyConfig):
    """Arguments of ``KLQTrainer``; the defaults are the paper's (arXiv 2508.17000), where it names one.

    ``auto_find_batch_size`` and ``per_device_eval_batch_size`` would have no effect and must keep their defaults.

    Raises:
        ValueError: naming the argument that is out of range.
    """

    learning_rate: float = option(1.41e-5, "Initial learning rate.")
    logging_steps: float = option(0, "Log every so many optimizer steps; 0: once per cycle.")
    ddp_find_unused_parameters: bool | None = option(False, "True for a policy with parameters it does not use.")

    algorithms: ClassVar[tuple[str, ...]] = ("klq", "ppo")  # those whose arguments these are
    has_critic: ClassVar[bool] = True  # whether the algorithm reads a value function
    fixed: ClassVar[dict[str, Any]] = {}  # arguments that the algorithm does not leave open

    algorithm: str = option(
        "klq",
        "'klq', or 'ppo' for the PPO-penalty baseline in the same cycle. For klq train also oreo, tbrm or vineppo, "
        "and qsharp, which have options of their own.",
    )
    tau: float = option(0.05, "Price of one nat of KL to the reference, in units of reward. > 0.")
    gamma: float = option(1.0, "Discount, in [0, 1].")
    lam: float = option(0.95, "Trace decay lambda, in [0, 1].")
    lam_final: float | None = option(None, "If given, lambda moves linearly from lam to this over the run.")
    value_lam: float | None = option(None, "Lambda of the errors that V learns from; by default the policy's.")
    alpha: float = option(1.0, "KLQ: step towards the lambda-return, in (0, 1].")
    loss_type: str = option("l2", f"KLQ: one of {', '.join(LOSS_TYPES)}.")
    huber_delta: float = option(1.0, "KLQ: threshold of the huber loss.")
    value_clip: float = option(0.2, "Clip of the change of tau*logp + V (KLQ) or of V (PPO) since the rollout.")
    log_ratio_clip: float = option(0.2, "KLQ: clip of logp - old_logp, for ratio_clipped and double_clipped.")
    cliprange: float = option(0.2, "PPO: clip of the probability ratio.")
    vf_coef: float = option(0.1, "PPO: weight of the value loss.")
    whiten_advantages: bool = option(True, "PPO: advantages to mean 0 and variance 1 over the batch. KLQ never does.")

    num_generations: int = option(1, "Completions for each prompt of a cycle; must divide a process's rollouts.")
    group_baseline: bool = option(
        True,
        "With several completions for a prompt: the others' mean, beside V, is the baseline of the policy's errors.",
    )

    off_policy: str = option(
        "none",
        "'retrace' corrects for a rollout function whose policy differs from the trained one, by the log-probabilities "
        "that it returns: a trace on lambda, and for PPO importance weights and DPPO's mask in place of the clip.",
    )
    trace_clip: float = option(1.0, "off_policy: largest factor of the trace, and of PPO's value targets. > 0.")
    importance_clip: float = option(20.0, "off_policy, PPO: largest weight of a token in the policy loss. > 0.")
    dppo_divergence: str = option("tv", f"off_policy, PPO: of the mask, one of {', '.join(DPPO_DELTAS)}.")
    dppo_delta: float | None = option(
        None,
        f"off_policy, PPO: threshold of the mask, > 0. By default {DPPO_DELTAS['tv']} (tv), {DPPO_DELTAS['kl']} (kl).",
    )

    replay_cycles: int = option(
        0, "Learn again from completions of so many earlier cycles, with off_policy='retrace'; 0: from none."
    )
    replay_epochs: int = option(1, "replay_cycles: passes over as many replayed completions as a cycle samples.")
    replay_priority: str = option(
        "error", "replay_cycles: 'error' draws in proportion to the mean size of lambda-errors, or 'uniform'."
    )

    demonstration_share: float = option(
        0.25, "Of the replayed completions, the share that are demonstrations where the trainer has any, in (0, 1]."
    )

    advantage_spread: float | None = option(
        None,
        "KLQ: the largest spread of lambda-errors, > 0. Where their running root mean square is larger, alpha is made "
        "as much smaller.",
    )

    disable_dropout: bool = option(True, "No dropout: the policy that learns is the one that sampled.")
    num_update_epochs: int = option(4, "Passes over each batch of rollouts.")
    num_mini_batches: int = option(1, "Optimizer steps in one such pass.")
    total_episodes: int | None = option(None, "Rollouts of the whole run; sets max_steps, so give one of the two.")
    value_learning_rate: float | None = option(None, "Learning rate of the value function; by default learning_rate.")
    freeze_value_model: bool = option(
        False, "value_model stays as it is, and the policy alone is trained (DVPO); needs a value_model."
    )
    value_warmup_steps: int = option(0, "Optimizer steps at first in which the value function alone learns.")
    value_gradient: float | None = option(
        None,
        "Share of V's gradient that enters a backbone shared with the policy, in [0, 1]. By default tau for KLQ, whose "
        "loss falls 1/tau times as steeply in V as in the log-probability; 1 for PPO, where vf_coef balances the two.",
    )

    engine: str = option(
        "transformers",
        "What samples: 'transformers', the policy's own generate, or 'vllm', in a process of its own or at engine_url.",
    )
    engine_url: str | None = option(
        None, "engine='vllm': address of a running server (docs/engines.md); by default one is started as a child."
    )
    engine_kwargs: dict[str, Any] | str | None = option(
        None,
        "engine='vllm': arguments of vllm.LLM, such as gpu_memory_utilization or max_model_len, or of VLLMServer where "
        "engine_url is given.",
    )
    engine_timeout: float = option(600.0, "Seconds to wait for an engine's answer. > 0.")
    async_rollouts: bool = option(
        False,
        "An engine, or a rollout_func with a method begin, samples the next cycle's completions while this one's are "
        "learnt; its weights are then those of one cycle ago (off_policy='retrace' corrects for that).",
    )
    bootstrap_truncated: bool = option(
        True, "A completion cut off by max_completion_length gets V of its last state in place of a score."
    )
    missing_eos_penalty: float | None = option(None, "Taken off the score of a completion without EOS.")
    scale_rewards: bool = option(False, "Divide scores by their running standard deviation. tau prices the result.")
    reward_clip: float | None = option(None, "Scores, after any scaling, are clipped to +-this. > 0.")

    ref_placement: str | None = option(
        None,
        "Where the reference's weights are: on the 'device'; on the 'cpu' between uses; 'sharded' over the processes. "
        "By default sharded where the engine shards the policy (FSDP2, ZeRO-3), else on the device.",
    )
    reward_placement: str | None = option(None, "Where the weights of reward models are, as ref_placement.")

    head_gradient: str = option(
        "dense",
        "'sampled' estimates the gradient through the head without bias from a few entries per token, for little more "
        "than a forward pass costs (gradient of fused_klq_loss).",
    )
    head_samples: int = option(64, "A sampled gradient keeps at most this many entries a token and one, on average.")
    head_sharding: str | None = option(
        None,
        "Under FSDP2: 'tokens' leaves the lm_head sharded, and the tokens of all processes come to its parts (sharding "
        "of fused_klq_loss); 'head', the default, leaves it to the engine, which gathers it.",
    )
    log_completions: bool = option(False, "Show a few completions at every log, and append all to completions.jsonl.")
    num_completions_to_print: int = option(4, "How many of them.")
    watch_failures: bool = option(True, "Warn of KL explosion, value divergence, length collapse and the like.")

    _VALID_DICT_FIELDS = [*SamplingConfig._VALID_DICT_FIELDS, "engine_kwargs"]  # noqa: RUF012

    def __post_init__(self) -> None:
        self._check()
        self._check_samples()
        if self.total_episodes is not None:
            per_cycle = self.rollouts_per_device * self._processes()
            steps = math.ceil(self.total_episodes / per_cycle) * self.steps_per_cycle
            require(
                self.max_steps in (TrainingArguments.max_steps, steps),
                "total_episodes",
                f"sets max_steps, here to {steps}, and max_steps={self.max_steps} is given too; drop one of them",
            )
            self.max_steps = steps
        if self.logging_steps == 0:
            self.logging_steps = self.steps_per_cycle
        super().__post_init__()
        self._check_engine()
        counted, processes = self._processes(), self.world_size
        require(
            self.total_episodes is None or counted == processes,
            "total_episodes",
            f"was counted for {counted} processes (WORLD_SIZE), and there are {processes}; give max_steps instead",
        )

    @property
    def mask_delta(self) -> float:
        """``dppo_delta`` with its default filled in."""
        return DPPO_DELTAS[self.dppo_divergence] if self.dppo_delta is None else self.dppo_delta

    @staticmethod
    def _processes() -> int:
        """World size before the distributed state exists: launchers announce it in the environment."""
        return int(os.environ.get("WORLD_SIZE", "1"))

    @property
    def steps_per_cycle(self) -> int:
        """Optimizer steps between two rollouts."""
        return self.num_mini_batches * (self.num_update_epochs + self.replay_passes)

    @property
    def replay_passes(self) -> int:
        """Passes over replayed completions in a cycle."""
        return self.replay_epochs if self.replay_cycles else 0

    @property
    def rollouts_per_device(self) -> int:
        """Rollouts of one process in one cycle."""
        return self.per_device_train_batch_size * self.gradient_accumulation_steps * self.num_mini_batches

    @property
    def errors_differ(self) -> bool:
        """Whether the policy learns from other lambda-errors than the value function."""
        return self.value_lam is not None or self.has_baseline

    @property
    def has_baseline(self) -> bool:
        """Whether the others of a prompt's completions are a baseline."""
        return self.num_generations > 1 and self.group_baseline

    @property
    def shared_value_gradient(self) -> float:
        """``value_gradient`` with its default filled in."""
        if self.value_gradient is not None:
            return self.value_gradient
        return 1.0 if self.is_ppo else min(self.tau, 1.0)

    @property
    def is_ppo(self) -> bool:
        """Whether the policy learns by PPO's gradient, from advantages that may be whitened."""
        return self.algorithm == "ppo"

    @property
    def learns_values(self) -> bool:
        """Whether a value function is trained."""
        return self.has_critic and not self.freeze_value_model

    @property
    def ignored(self) -> tuple[str, ...]:
        """Arguments that the algorithm does not read."""
        return IGNORED[self.algorithm]

    def _check(self) -> None:
        require(
            self.algorithm in self.algorithms,
            "algorithm",
            f"must be {' or '.join(self.algorithms)} in {type(self).__name__}; got {self.algorithm!r}",
        )
        for name, only in self.fixed.items():
            given = getattr(self, name)
            require(given == only, name, f"must be {only!r} in {type(self).__name__}; got {given!r}")
        placements = (None, *PLACEMENTS)
        choices: dict[str, Iterable[str | None]] = {
            "loss_type": LOSS_TYPES, "engine": ENGINES, "off_policy": OFF_POLICY, "dppo_divergence": DPPO_DELTAS,
            "replay_priority": PRIORITIES, "ref_placement": placements, "reward_placement": placements,
            "head_sharding": (None, "tokens", "head"),
        }  # fmt: skip
        for name, known in choices.items():
            self._check_choice(name, known)
        self._warn_of_ignored(self.ignored, f"algorithm={self.algorithm!r}")
        self._check_values()
        check_sampling("head_gradient", self.head_gradient, "head_samples", self.head_samples)
        positive = (
            "tau", "huber_delta", "value_clip", "log_ratio_clip", "cliprange", "trace_clip",
            "importance_clip", "dppo_delta", "advantage_spread", "reward_clip", "engine_timeout",
        )  # fmt: skip
        for name in positive:
            if getattr(self, name) is not None:
                require_number(name, getattr(self, name), positive=True)
        require_number("alpha", self.alpha, high=1.0, positive=True)
        require_number("demonstration_share", self.demonstration_share, high=1.0, positive=True)
        require_number("vf_coef", self.vf_coef, low=0.0)
        for name in ("gamma", "lam", "lam_final", "value_lam", "value_gradient"):
            if getattr(self, name) is not None:
                require_number(name, getattr(self, name), low=0.0, high=1.0)
        if self.value_learning_rate is not None:
            require_number("value_learning_rate", self.value_learning_rate, low=0.0)
        if self.missing_eos_penalty is not None:
            require_number("missing_eos_penalty", self.missing_eos_penalty)
        counts = (
            "per_device_train_batch_size", "gradient_accumulation_steps", "num_update_epochs", "num_mini_batches",
            "total_episodes", "num_generations", "replay_epochs",
        )  # fmt: skip
        check_counts(self, counts)
        for name in ("value_warmup_steps", "replay_cycles"):
            value = getattr(self, name)
            require(isinstance(value, int) and value >= 0, name, f"must be a whole number, not negative; got {value}")

    def _check_values(self) -> None:
        """What a value function that is not trained leaves without effect."""
        if not self.learns_values:
            ignored = ("value_learning_rate", "value_gradient", "value_lam", "vf_coef")
            self._warn_of_ignored(ignored, "a value function that is not trained")
            require(
                self.value_warmup_steps == 0,
                "value_warmup_steps",
                "must be 0 where the value function is not trained: nothing would be, in those steps",
            )

    def _check_samples(self) -> None:
        """Which completions there are in a cycle, and whose."""
        corrected = self.off_policy == "retrace"
        if self.is_ppo and corrected:
            self._warn_of_ignored(("cliprange",), "off_policy='retrace', whose mask takes its place")
        if not corrected:
            read = [name for name in CORRECTION if name not in self.ignored]
            self._warn_of_ignored(read, "off_policy='none'")
        require(
            self.replay_cycles == 0 or corrected,
            "replay_cycles",
            "learns from samples of older policies, which off_policy='retrace' corrects for; set that as well",
        )
        if self.replay_cycles == 0:
            self._warn_of_ignored(("replay_epochs", "replay_priority"), "replay_cycles=0")
        require(
            self.rollouts_per_device % self.num_generations == 0,
            "num_generations",
            f"must divide the {self.rollouts_per_device} rollouts of a process in a cycle, which are "
            "per_device_train_batch_size x gradient_accumulation_steps x num_mini_batches; "
            f"got {self.num_generations}",
        )

    def _check_engine(self) -> None:
        if self.engine == "transformers":
            self._warn_of_ignored(("engine_url", "engine_kwargs", "engine_timeout"), "engine='transformers'")
            return
        unknown = [name for name in self.generation_kwargs or {} if name not in ENGINE_SAMPLING]
        require(
            not unknown,
            "generation_kwargs",
            f"has {', '.join(unknown)}, and engine='vllm' takes {', '.join(ENGINE_SAMPLING)}; leave the others out",
        )

    def _warn_of_ignored(self, names: Iterable[str], because: str) -> None:
        for name in names:
            if getattr(self, name) != type(self).__dataclass_fields__[name].default:
                warnings.warn(f"{name}: has no effect on {because}", stacklevel=5)
