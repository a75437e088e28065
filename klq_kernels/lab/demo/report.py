"""The output of the demonstration: numbers as they come, and a report that says in words what they mean."""

from __future__ import annotations

import csv
import json
from dataclasses import dataclass
from pathlib import Path
from statistics import mean
from typing import Any

from ..display import markdown_table
from .memory import FUSED, MIB

LEARNT_GAIN = 0.2  # of mean reward: less would not be visible


class History:
    """The metrics of every step, on disk as soon as they are known."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.steps: list[dict[str, float]] = []

    def add(self, metrics: dict[str, float]) -> None:
        self.steps.append(metrics)
        first = len(self.steps) == 1
        with open(self.path, "w" if first else "a", newline="") as file:
            writer = csv.DictWriter(file, ["step", *self.steps[0]])
            if first:
                writer.writeheader()
            writer.writerow({"step": len(self.steps), **metrics})


@dataclass(frozen=True)
class Verdict:
    """Whether the model learnt, from the curves alone.

    KL counts as bounded if at no step it cost more than it bought: tau times KL stays below the reward gained. Where
    the policy drifts for no return, or collapses, it does not.
    """

    window: int  # steps that are averaged at either end
    reward_first: float
    reward_last: float
    kl_last: float
    kl_largest: float
    tau: float

    @property
    def gain(self) -> float:
        return self.reward_last - self.reward_first

    @property
    def reward_rose(self) -> bool:
        return self.gain >= LEARNT_GAIN

    @property
    def kl_bounded(self) -> bool:
        return self.tau * self.kl_largest < self.gain

    @property
    def learnt(self) -> bool:
        return self.reward_rose and self.kl_bounded

    def words(self) -> str:
        last = f"the last {self.window} steps" if self.window > 1 else "the last step"
        first = f"the first {self.window}" if self.window > 1 else "the first"
        reward = (
            f"Mean reward went from {self.reward_first:.3f} over {first} to {self.reward_last:.3f} over {last}, "
            f"a gain of {self.gain:+.3f}."
        )
        kl = (
            f"KL to the reference was {self.kl_last:.2f} nats per response at the end and {self.kl_largest:.2f} at its "
            f"largest; at tau = {self.tau} that costs {self.tau * self.kl_largest:.3f} of reward, "
            + ("less than was gained: it is bounded." if self.kl_bounded else "not less than was gained.")
        )
        verdict = "The model learnt." if self.learnt else "**The model did not learn in this run.**"
        return f"{verdict} {reward} {kl}"


def judge(history: list[dict[str, float]], tau: float) -> Verdict:
    window = max(len(history) // 12, 1)
    return Verdict(
        window,
        mean(step["reward"] for step in history[:window]),
        mean(step["reward"] for step in history[-window:]),
        mean(step["kl"] for step in history[-window:]),
        max(step["kl"] for step in history),
        tau,
    )


MEMORY_COLUMNS = ("", "peak MiB", "x fused", "seconds", "loss error", "gradient error")


def memory_rows(measured: dict[str, Any]) -> list[list[str]]:
    """A row of text per contender, under ``MEMORY_COLUMNS``."""
    least = measured["contenders"][FUSED]["peak_bytes"]
    return [
        [
            name,
            f"{c['peak_bytes'] / MIB:,.0f}",
            f"{c['peak_bytes'] / least:.1f}",
            f"{c['seconds']:.2f}",
            f"{c['relative_error']['loss']:.0e}",
            f"{max(error for of, error in c['relative_error'].items() if of != 'loss'):.0e}",
        ]
        for name, c in measured["contenders"].items()
    ]


def held_out_rows(evaluations: dict[str, dict[str, Any]]) -> list[list[str]]:
    """A row of text per evaluation: when, reward, KL, entropy, length, share cut off."""
    return [
        [when, *(f"{e[name]:.3f}" for name in ("reward", "kl", "entropy", "length", "truncated"))]
        for when, e in evaluations.items()
    ]


HELD_OUT_COLUMNS = ("held-out letters", "reward", "KL", "entropy", "tokens", "cut off")


def memory_section(measured: dict[str, Any]) -> str:
    shape = measured["shape"]
    return f"""## Naive against fused

The loss and its gradients for hidden states, lm_head and values: {shape["batch"]} prompts of {shape["prompt"]} tokens
with ragged responses, {shape["tokens"]:,} tokens of which {shape["response_tokens"]:,} are trained, hidden size
{shape["hidden"]}, a vocabulary of {shape["vocab"]:,}, fp32, {measured["threads"]} threads. `{FUSED}` was given a
workspace of {shape["workspace_mib"]} MiB. Peak memory is the growth over the inputs in a fresh process, of which
{measured["gradient_bytes"][shape["vocab"]] / MIB:,.0f} MiB are the gradients themselves. Seconds are the median of
{len(measured["contenders"][FUSED]["seconds_of_rounds"])} interleaved rounds, forward and backward. Errors are relative
to the same computation in float64, of the three gradients the largest; `metrics.json` has all of them.

{markdown_table(MEMORY_COLUMNS, memory_rows(measured))}

![Peak memory and time of naive and fused](memory.png)
"""


def training_section(
    history: list[dict[str, float]], evaluations: dict[str, dict[str, Any]], verdict: Verdict, planned: int
) -> str:
    stopped = "" if len(history) == planned else f"\nThis run was stopped after {len(history)} of {planned} steps.\n"
    return f"""## Training with `{FUSED}`

{verdict.words()}
{stopped}
![Reward, KL, entropy, length and explained variance over the steps](training.png)

The task is to summarise a customer's letter: name the item bought and the problem, be polite, be brief, end properly
(`klq_kernels/lab/demo/task.py`). The model was warm-started on writers of mixed quality, and then trained by the loop
in `klq_kernels/lab/demo/train.py`. On letters that neither has seen (KL in nats per response, entropy in nats per
token, tokens per response, share of responses cut off before they ended):

{markdown_table(HELD_OUT_COLUMNS, held_out_rows(evaluations))}

{"".join(samples_text(evaluations))}"""


def samples_text(evaluations: dict[str, dict[str, Any]]) -> list[str]:
    """Each sampled letter with what was written about it, and its score, before and after."""
    every = list(evaluations.values())
    blocks = []
    for together in zip(*(e["samples"] for e in every), strict=True):
        answers = [
            f"> - {when} ({sample['reward']:.2f}): {sample['summary'].strip() or '(nothing)'}\n"
            for when, sample in zip(evaluations, together, strict=True)
        ]
        blocks.append(f"> {together[0]['letter']}\n>\n{''.join(answers)}\n")
    return blocks


def write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=1) + "\n")
