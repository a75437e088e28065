r"""VinePPO (arXiv 2410.01679): PPO whose values are means of completions that the policy goes on to write.

A language model can be put back into any state: a prefix is all of it. So V of a state is estimated without bias by
K completions sampled from it, and their mean score (``reference.monte_carlo_values``), where a value function would
have to generalise. A completion is divided into steps, at every ``mc_every`` tokens or wherever a token holds
``mc_separator`` (the paper divides reasoning into its lines), and V is estimated at the start of each. Inside a step V
is that of its start, so what a step changes lands on its last token; advantages and the clipped loss are PPO's.

The estimates are of the score alone. The price of KL, which is in the rewards of PPO-penalty, is not in them; at
``lam`` = 1 any such V is still a baseline, which leaves the policy's gradient unbiased.

The cost is sampling and scoring: K completions for each step of each completion of the cycle, of half its length on
average. 64 completions of 128 tokens, with ``mc_every=16`` and K = 9, are 64 x 8 x 9 = 4,608 more. ``time/values`` in
the log says what they take, ``rollout/mc_completions`` how many they are.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor

from ...call.checks import require
from ..batches import Inputs, Sequence
from ..config import IGNORED, KLQConfig
from ..objectives import Scored, ppo
from ..options import option
from ..rollout import Completions, Rollout, check_completions, continued, eos_ids
from ..seeds import Purpose, derived_seed, seeded
from ..sharding import shards_weights
from ..trainer import KLQTrainer


@dataclass
class VinePPOConfig(KLQConfig):
    """Arguments of ``VinePPOTrainer``; the defaults are the paper's, where it names one.

    Raises:
        ValueError: naming the argument that is out of range.
    """

    algorithms: ClassVar[tuple[str, ...]] = ("vineppo",)
    has_critic: ClassVar[bool] = False
    fixed: ClassVar[dict[str, Any]] = {
        "value_lam": None, "off_policy": "none", "bootstrap_truncated": False, "freeze_value_model": False,
        "engine": "transformers",
    }  # fmt: skip

    algorithm: str = option("vineppo", "'vineppo'.")
    lam: float = option(0.96, "Trace decay lambda, in [0, 1].")
    group_baseline: bool = option(False, "With several completions for a prompt: the others' mean is a baseline too.")
    bootstrap_truncated: bool = option(False, "Must stay False: at the limit there is no going on from a state.")
    mc_samples: int = option(9, "K: completions for each value.")
    mc_every: int = option(16, "A value every so many tokens.")
    mc_separator: str | None = option(
        None, "If given, steps end with the tokens that hold this text, such as a line end, and not at mc_every."
    )

    @property
    def is_ppo(self) -> bool:
        return True

    @property
    def ignored(self) -> tuple[str, ...]:
        return (*IGNORED["ppo"], "value_clip")

    def _check(self) -> None:
        super()._check()
        for name in ("mc_samples", "mc_every"):
            value = getattr(self, name)
            require(isinstance(value, int) and value >= 1, name, f"must be at least 1, got {value}")
        require(self.mc_separator != "", "mc_separator", "must not be empty")
        if self.mc_separator is not None:
            self._warn_of_ignored(("mc_every",), "mc_separator")


class State(NamedTuple):
    """A state whose value is estimated."""

    sequence: int  # of the rollout
    at: int  # the position of the token it precedes


class VinePPOTrainer(KLQTrainer):
    """Trains a causal language model by VinePPO; arguments as in ``KLQTrainer``, with a ``VinePPOConfig``.

    There is no value_model, and no rollout_func, as completions go on from ids that the policy has written.
    """

    config_class = VinePPOConfig
    args: VinePPOConfig

    def __init__(self, *args: Any, rollout_func: Any = None, **kwargs: Any) -> None:
        require(rollout_func is None, "rollout_func", "cannot go on from a prefix; leave it None")
        super().__init__(*args, **kwargs)

    def _check_launch(self) -> None:
        super()._check_launch()
        require(
            not shards_weights(self.accelerator),
            "args",
            "each process samples as many values as its completions have steps, and FSDP and ZeRO-3 would wait for the "
            "others at each; use DDP",
        )

    def objective_of(self, batch: Inputs) -> Callable[..., tuple[Tensor, dict[str, Tensor]]]:
        return ppo

    def with_values(self, scored: Scored, rollout: Rollout, rows: list[dict[str, Any]]) -> Scored:
        with self._timed("time/values"):
            values = self.sampled_values(rollout, rows)
        return scored._replace(values=values.to(scored.values), last_values=torch.zeros_like(scored.last_values))

    def sampled_values(self, rollout: Rollout, rows: list[dict[str, Any]]) -> Tensor:
        """V of each trained token's state, fp32 [N]; ``rows`` are those of the dataset, one for each completion."""
        starts = [step_starts(s, self.args, self.tokenizer) if s.rows else [] for s in rollout.sequences]
        states = [State(i, at) for i, own in enumerate(starts) for at in own]
        self.means.add({"rollout/mc_completions": float(len(states) * self.args.mc_samples)}, 1)
        seed = derived_seed(self.args.seed, Purpose.VALUES, self.cycle, self.args.process_index)
        with seeded(seed, self.args.device):
            means = dict(zip(states, self._state_values(states, rollout, rows), strict=True))
        columns = [
            spread(torch.tensor([means[State(i, at)] for at in own]), own, len(s.completion))
            for i, (own, s) in enumerate(zip(starts, rollout.sequences, strict=True))
        ]
        return torch.cat(columns)

    def _state_values(self, states: list[State], rollout: Rollout, rows: list[dict[str, Any]]) -> list[float]:
        """The mean score of ``mc_samples`` completions from each state."""
        number, longest = self.args.mc_samples, self.args.max_completion_length
        asked = sorted((state for state in states for _ in range(number)), key=lambda s: s.at)  # of alike lengths
        sums: dict[State, list[float]] = {state: [] for state in states}
        size = self.args.rollout_forward_batch_size
        for begin in self._bar(range(0, len(asked), size), f"Cycle {self.cycle + 1}: values"):
            batch = asked[begin : begin + size]
            sequences = [rollout.sequences[state.sequence] for state in batch]
            kept = [s.completion[: state.at].tolist() for s, state in zip(sequences, batch, strict=True)]
            prompts = [s.prompt.tolist() for s in sequences]
            prefixes = [p + k for p, k in zip(prompts, kept, strict=True)]
            with self._inference() as model:
                rest = continued(
                    model, prefixes, [longest - state.at for state in batch], self.generation_config,
                    device=self.args.device, positions=self.positions,
                )  # fmt: skip
            whole = [k + r for k, r in zip(kept, rest, strict=True)]
            ends = eos_ids(self.generation_config)
            finished = check_completions(Completions(whole), prompts, ends, self.language_model.vocab_size)
            scores = self.reward([rows[state.sequence] for state in batch], finished)
            for state, score, scored in zip(batch, self._rescaled(scores.total).tolist(), scores.scored, strict=True):
                if scored:
                    sums[state].append(score)
        require(all(sums.values()), "reward_funcs", "scored none of the completions that a value is the mean of")
        return [sum(found) / len(found) for found in sums.values()]


def step_starts(sequence: Sequence, config: VinePPOConfig, tokenizer: Any) -> list[int]:
    """Where the steps of a completion with a token begin, ascending from 0."""
    ids = sequence.completion.tolist()
    if config.mc_separator is None:
        return list(range(0, len(ids), config.mc_every))
    return [0, *(at + 1 for at, token in enumerate(ids[:-1]) if config.mc_separator in tokenizer.decode([token]))]


def spread(means: Tensor, starts: list[int], length: int) -> Tensor:
    """V of each token, [length]: that of the step it is in (``reference.monte_carlo_values``)."""
    lengths = torch.tensor([*starts, length]).diff() if starts else torch.zeros(0, dtype=torch.long)
    return means.repeat_interleave(lengths)
