"""The logs are true: each statistic merges by its own rule, and completions without a score are in none of them."""

from __future__ import annotations

import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import tiny
import torch

from klq_kernels.trainer.callbacks import FailureWatch
from klq_kernels.trainer.means import Means


def process(others: list[Means]) -> Any:
    """An accelerator whose other processes hold these statistics, with the same names in the same order."""

    def reduce(rows: torch.Tensor, reduction: str) -> torch.Tensor:
        for other in others:
            theirs = [[float(other._sums[n]), other._counts[n]] for n in sorted(other._sums)]
            rows = rows + torch.tensor(theirs, dtype=torch.float64)
        return rows

    def gather(mine: torch.Tensor) -> torch.Tensor:
        return torch.cat([mine, *(torch.tensor([[o._maxima[n] for n in sorted(o._maxima)]]).double() for o in others)])

    return SimpleNamespace(reduce=reduce, gather=gather, device=torch.device("cpu"))


def test_each_statistic_merges_by_its_own_rule() -> None:
    """Two processes, and two additions each, of unequal sizes: as if all numbers had been in one place."""
    generator = torch.Generator().manual_seed(0)
    parts = [torch.randn(n, generator=generator) * 3 + 5 for n in (3, 7, 1, 12)]
    errors = [torch.randn(len(p), generator=generator) for p in parts]
    means = [Means(), Means()]
    for at, (values, error) in enumerate(zip(parts, errors, strict=True)):
        into = means[at % 2]
        into.add({"mean": values.mean()}, len(values))
        into.add_maxima({"max": values.max()})
        into.add_deviation("std", values)
        into.add_rms("rms", values.square().mean().sqrt(), len(values))
        into.add_explained("explained", error, values)
    found = means[0].drain(process([means[1]]))
    values, error = torch.cat(parts).double(), torch.cat(errors).double()
    assert found == pytest.approx(
        {
            "mean": values.mean().item(),
            "max": values.max().item(),
            "std": values.std(correction=0).item(),
            "rms": values.square().mean().sqrt().item(),
            "explained": (1 - error.var(correction=0) / values.var(correction=0)).item(),
        },
        rel=1e-6,
    )


def test_statistics_of_nothing_are_left_out_and_a_checkpoint_holds_the_others() -> None:
    means = Means()
    means.add({"mean": torch.zeros(0).mean()}, 0)
    means.add_deviation("std", torch.zeros(0))
    means.add_maxima({"max": -math.inf})
    assert means.drain(process([])) == {}
    means.add_maxima({"max": 30.0})
    means.add_deviation("std", torch.tensor([1.0, 3.0]))
    again = Means()
    again.load_state(means.state())
    again.add_maxima({"max": 10.0})
    assert again.drain(process([])) == {"max": 30.0, "std": 1.0}


def every_other(completion_ids: list[list[int]], **_: Any) -> list[float | None]:
    return [1.0 if at % 2 else None for at in range(len(completion_ids))]


@pytest.mark.parametrize("algorithm", ["klq", "ppo"])
def test_a_sample_without_a_reward_is_skipped(algorithm: str, tmp_path: Path) -> None:
    run = tiny.trainer(tmp_path, {"reward_funcs": every_other}, algorithm=algorithm, max_steps=4, logging_steps=1)
    rows = list(run.train_dataset)[:8]
    experience = run.collect(rows)
    lengths = [int(s.trained.sum()) for s in experience.sequences]
    assert lengths[::2] == [0] * 4
    assert all(n > 0 for n in lengths[1::2])
    assert len(experience.ref_logprobs) == sum(lengths)
    found = run.means.drain(run.accelerator)
    assert found["objective/scores"] == 1.0
    assert found["completions/skipped"] == 0.5


def test_a_cycle_that_nobody_scores_changes_nothing(tmp_path: Path) -> None:
    model = tiny.model()
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    run = tiny.trainer(tmp_path, {"model": model, "reward_funcs": lambda completions, **_: [None] * len(completions)})
    run.train()
    assert tiny.losses(run) == [0.0] * len(tiny.losses(run))
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())


def logged(watch: FailureWatch, **logs: float) -> None:
    state = SimpleNamespace(is_world_process_zero=True, global_step=1)
    watch.on_log(None, state, None, logs={"loss": 0.1, **logs})  # type: ignore[arg-type]


def cycle(**changes: float) -> dict[str, float]:
    usual = {
        "objective/kl": 1.0, "objective/scores": 0.5, "objective/scores_std": 0.2, "completions/mean_length": 60.0,
        "completions/truncated": 0.5, "val/explained_variance": 0.5, "policy/entropy_avg": 1.0,
    }  # fmt: skip
    return usual | {name.replace("__", "/"): value for name, value in changes.items()}


def watch(tmp_path: Path, **changes: Any) -> FailureWatch:
    return FailureWatch(tiny.arguments(tmp_path, **({"max_completion_length": 64} | changes)))


def test_a_loss_that_is_not_a_number_is_seen_between_the_rollouts(tmp_path: Path) -> None:
    seen = watch(tmp_path)
    logged(seen, **cycle())
    logged(seen, grad_norm=float("nan"))
    assert "grad_norm" in seen.warned["not a number"]


def test_length_that_was_at_the_cap_from_the_start_is_no_hacking(tmp_path: Path) -> None:
    for began, warned in ((64.0, False), (62.0, False), (30.0, True)):
        seen = watch(tmp_path)
        logged(seen, **cycle(completions__mean_length=began))
        for at in range(10):
            logged(seen, **cycle(completions__mean_length=64.0, objective__scores=1.0 + at / 5))
        assert ("reward hacking?" in seen.warned) == warned, began


def test_scores_out_of_scale_are_said_at_once(tmp_path: Path) -> None:
    seen = watch(tmp_path)
    logged(seen, **cycle(objective__scores=1e4))
    assert "1e+04" in seen.warned["scores out of scale"]


def test_a_first_cycle_without_an_end_is_said_at_once(tmp_path: Path) -> None:
    for bootstrap in (True, False):
        seen = watch(tmp_path, bootstrap_truncated=bootstrap)
        logged(seen, **cycle(completions__truncated=1.0))
        assert ("everything is truncated" in seen.warned) == bootstrap
