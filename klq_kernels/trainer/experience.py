"""The experience of one cycle: what was sampled, what policy and reference thought of it, and what to learn from it.

Per-token numbers are kept packed, one sequence after another, trained tokens only. ``select`` gives those of a
mini-batch. The whole of it can be saved, so that a run that is killed in the middle of a cycle goes on with the same
samples.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..call.checks import require
from ..types import KLQTargets
from .batches import Sequence
from .config import KLQConfig


def positions(rows: Tensor, indices: Tensor) -> Tensor:
    """Where the tokens of some sequences are among all, int64; ``rows`` [S] are the tokens of each of all."""
    begins = rows.cumsum(0) - rows
    return torch.cat([torch.arange(b, b + n) for b, n in zip(begins[indices], rows[indices], strict=True)])


@dataclass
class Experience:
    """S sequences with N trained tokens; tensors on the CPU or all on one device."""

    sequences: list[Sequence]
    targets: KLQTargets  # fp32 [N] each; the advantages are those that V learns from, unwhitened
    ref_logprobs: Tensor  # fp32 [N]
    advantages: Tensor  # fp32 [N], those that the policy learns from (PPO: whitened)
    step: float = 1.0  # KLQ: share of alpha by which to go towards the targets
    sampler_logprobs: Tensor | None = None  # fp32 [N], of the policy that sampled, where they are corrected for

    def __post_init__(self) -> None:
        self.rows = torch.tensor([s.rows for s in self.sequences])

    def select(self, indices: Tensor) -> Experience:
        """The experience of some sequences, in that order."""
        at = positions(self.rows, indices).to(self.ref_logprobs.device)
        return Experience(
            [self.sequences[i] for i in indices.tolist()],
            KLQTargets(*(t[at] for t in self.targets)),
            self.ref_logprobs[at],
            self.advantages[at],
            self.step,
            None if self.sampler_logprobs is None else self.sampler_logprobs[at],
        )

    def followed_by(self, other: Experience) -> Experience:
        """Both, with the step of this one; either has ``sampler_logprobs`` or neither."""
        sampler = [e.sampler_logprobs for e in (self, other) if e.sampler_logprobs is not None]
        return Experience(
            self.sequences + other.sequences,
            KLQTargets(*(torch.cat(pair) for pair in zip(self.targets, other.targets, strict=True))),
            torch.cat([self.ref_logprobs, other.ref_logprobs]),
            torch.cat([self.advantages, other.advantages]),
            self.step,
            torch.cat(sampler) if sampler else None,
        )

    def save(self, path: Path, made_under: dict[str, Any]) -> None:
        """``made_under``: ``conditions`` of the run."""
        columns = [*self.targets, self.ref_logprobs, self.advantages]
        sampler = self.sampler_logprobs
        content = {
            "sequences": [list(s) for s in self.sequences],
            "columns": [c.cpu() for c in columns],
            "sampler_logprobs": None if sampler is None else sampler.cpu(),
            "step": self.step,
            "made_under": made_under,
        }
        torch.save(content, path)

    @classmethod
    def load(cls, path: Path, device: torch.device, now: dict[str, Any]) -> Experience | None:
        """The experience of a checkpoint; None, with a warning, where it was made under other conditions than ``now``.

        Raises:
            ValueError: where a cycle has another number of steps now, so that the run is at no step of it.
        """
        content = torch.load(path, weights_only=True)
        then = content.get("made_under", {})
        changed = changes(then, now)
        require(
            then.get("steps_per_cycle") == now["steps_per_cycle"],
            "resume_from_checkpoint",
            f"was written in the middle of a cycle of {then.get('steps_per_cycle')} steps, and a cycle has "
            f"{now['steps_per_cycle']} now; resume with {', '.join(changed)} as they were, or from the end of a cycle",
        )
        if changed:
            warnings.warn(
                "resume_from_checkpoint: the experience in it was made with "
                f"{', '.join(changed)}; it is dropped, and the rest of the cycle learns from new rollouts",
                stacklevel=3,
            )
            return None
        *targets, ref_logprobs, advantages = (c.to(device) for c in content["columns"])
        sampler = content["sampler_logprobs"]
        return cls(
            [Sequence(*s) for s in content["sequences"]],
            KLQTargets(*targets),
            ref_logprobs,
            advantages,
            content["step"],
            None if sampler is None else sampler.to(device),
        )


# Arguments of which the samples of a cycle, their targets, or their division into steps are made.
CONDITIONS = (
    "algorithm", "tau", "gamma", "lam", "lam_final", "temperature", "fp32_head", "seed", "whiten_advantages",
    "bootstrap_truncated", "missing_eos_penalty", "reward_weights", "max_prompt_length", "max_completion_length",
    "generation_kwargs", "num_update_epochs", "num_mini_batches", "steps_per_cycle", "per_device_train_batch_size",
    "gradient_accumulation_steps", "off_policy", "trace_clip", "num_generations", "group_baseline", "value_lam",
    "replay_cycles", "replay_epochs", "replay_priority", "advantage_spread", "scale_rewards", "reward_clip",
    "chat_template_kwargs", "ref_dtype", "freeze_value_model", "demonstration_share",
)  # fmt: skip


def conditions(config: KLQConfig, processes: int) -> dict[str, Any]:
    """The arguments that the experience of a cycle depends on, by name."""
    return {**{name: getattr(config, name) for name in CONDITIONS}, "processes": processes}


def changes(then: dict[str, Any], now: dict[str, Any]) -> list[str]:
    """The conditions that are others ``now``, each with both values."""
    return [f"{name}={then.get(name)!r} (now {now[name]!r})" for name in now if then.get(name) != now[name]]


@dataclass(frozen=True)
class Plan:
    """The sequences of each micro-batch of a cycle: [steps per cycle, accumulation, micro-batch size]."""

    indices: Tensor

    @classmethod
    def shuffled(
        cls, *, epochs: int, mini_batches: int, accumulation: int, size: int, seed: int, replays: int = 0
    ) -> Plan:
        """Each epoch is a new permutation of the cycle's own sequences; each replay is one of as many that follow."""
        generator = torch.Generator().manual_seed(seed)
        number = mini_batches * accumulation * size
        begins = [0] * epochs + [number * (1 + i) for i in range(replays)]
        orders = [begin + torch.randperm(number, generator=generator) for begin in begins]
        return cls(torch.stack(orders).reshape(len(begins) * mini_batches, accumulation, size))

    def rows_per_step(self, rows: Tensor) -> Tensor:
        """int64 [steps]: trained tokens in each optimizer step, from those of each sequence."""
        return rows[self.indices].sum((1, 2))
