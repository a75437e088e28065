"""Replay: what is drawn, that it is read anew, and that a resumed run draws the same."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from engine import Engine
from torch import Tensor

from klq_kernels import reference
from klq_kernels.trainer import Completions, KLQTrainer
from klq_kernels.trainer.batches import Sequence
from klq_kernels.trainer.experience import Plan
from klq_kernels.trainer.replay import Memory, Sampled

pytestmark = pytest.mark.usefixtures("one_thread")


def series(run: KLQTrainer, name: str) -> list[float]:
    return [logs[name] for logs in run.state.log_history if name in logs]


def trainer(folder: Path, given: dict[str, Any] | None = None, **changes: Any) -> KLQTrainer:
    defaults: dict[str, Any] = {"replay_cycles": 2, "off_policy": "retrace", "num_update_epochs": 2, "max_steps": 12}
    return tiny.trainer(folder, given, **(defaults | changes))


def sampled(rows: list[int], first: int = 0) -> Sampled:
    """Completions of so many tokens, each with numbers of its own from ``first`` on."""
    sequences = [
        Sequence(torch.tensor([5]), torch.full((n,), first + i), torch.ones(n, dtype=torch.bool))
        for i, n in enumerate(rows)
    ]
    number = torch.arange(first, first + len(rows)).float()
    per_token = number.repeat_interleave(torch.tensor(rows))
    return Sampled(sequences, number > first, number, per_token, -per_token)


# ---- the memory -----------------------------------------------------------------------------------------------------


def test_the_memory_holds_the_last_cycles_and_gives_whole_prompts() -> None:
    memory = Memory(cycles=2, size=2)
    for cycle in range(3):
        memory.add(sampled([1, 2, 0, 3], first=10 * cycle), torch.ones(6), cycle)
    assert len(memory) == 4
    taken, cycles = memory.take(torch.tensor([3, 0]))
    assert taken.scores.tolist() == [22.0, 23.0, 10.0, 11.0]
    assert cycles.tolist() == [2, 2, 1, 1]
    assert taken.rows.tolist() == [0, 3, 1, 2]
    assert taken.ref_logprobs.tolist() == [23.0] * 3 + [10.0] + [11.0] * 2
    assert taken.sampler_logprobs is not None
    assert torch.equal(taken.sampler_logprobs, -taken.ref_logprobs)
    assert taken.truncated.tolist() == [True, True, False, True]


@pytest.mark.parametrize("prioritised", [True, False])
def test_prompts_are_drawn_by_the_size_of_their_errors(prioritised: bool) -> None:
    """Of one draw each; and a draw of all is a permutation."""
    memory = Memory(cycles=2, size=1)
    memory.add(sampled([2, 1]), torch.tensor([1.0, -3.0, 6.0]), 0)  # means 2 and 6
    memory.add(sampled([1, 0]), torch.tensor([-2.0]), 1)  # 2, and 0 of no tokens
    generator = torch.Generator().manual_seed(0)
    drawn = torch.cat([memory.draw(1, generator, prioritised=prioritised) for _ in range(4000)])
    expected = torch.tensor([2.0, 6.0, 2.0, 0.0]) + 0.025 if prioritised else torch.ones(4)
    torch.testing.assert_close(drawn.bincount(minlength=4) / 4000, expected / expected.sum(), atol=0.03, rtol=0)
    assert sorted(memory.draw(4, generator, prioritised=prioritised).tolist()) == [0, 1, 2, 3]


def test_priorities_are_those_of_the_last_reading() -> None:
    memory = Memory(cycles=2, size=2)
    memory.add(sampled([1, 1, 1, 1]), torch.tensor([1.0, 1.0, 0.0, 0.0]), 0)
    memory.refresh(torch.tensor([1]), torch.tensor([4.0, -2.0]), torch.tensor([1, 1]))
    assert [entry["priorities"].tolist() for entry in memory.state()["entries"]] == [[1.0, 3.0]]
    again = Memory(cycles=2, size=2)
    again.load_state(memory.state())
    draws = [m.draw(2, torch.Generator().manual_seed(3), prioritised=True).tolist() for m in (memory, again)]
    assert draws[0] == draws[1]
    other = Memory(cycles=2, size=4)
    with pytest.warns(UserWarning, match="num_generations was 2 and is 4 now"):
        other.load_state(memory.state())
    assert len(other) == 0


def test_errors_of_nothing_are_drawn_all_the_same() -> None:
    memory = Memory(cycles=1, size=1)
    memory.add(sampled([1, 1]), torch.zeros(2), 0)
    assert sorted(memory.draw(2, torch.Generator(), prioritised=True).tolist()) == [0, 1]


def test_a_plan_takes_replays_after_the_cycles_own() -> None:
    plan = Plan.shuffled(epochs=2, replays=2, mini_batches=2, accumulation=1, size=4, seed=0)
    assert plan.indices.shape == (8, 1, 4)
    passes = plan.indices.reshape(4, 8).sort(1).values.tolist()
    own = list(range(8))
    assert passes == [own, own, [8 + i for i in own], [16 + i for i in own]]


# ---- in the trainer -------------------------------------------------------------------------------------------------


def moved(run: KLQTrainer) -> None:
    with torch.no_grad():
        run.policy.lm_head.weight.add_(0.3 * torch.randn_like(run.policy.lm_head.weight))
        run.actor_critic.value.head.weight.normal_(std=0.3)


def plain(run: KLQTrainer, sequences: list[Sequence]) -> tuple[Tensor, Tensor]:
    """Log-probabilities and values of completions under the policy as it is, packed, from full logits."""
    logps, values = [], []
    for s in sequences:
        with torch.no_grad():
            hidden = run.policy.model(s.ids[None]).last_hidden_state[0, len(s.prompt) - 1 : -1]
            logps.append(reference.linear_logprobs(hidden, run.policy.lm_head.weight, s.completion).logprobs)
            values.append(run.actor_critic.value.head(hidden).squeeze(1))
    return torch.cat(logps).double(), torch.cat(values).double()


@pytest.mark.parametrize("engine", [False, True])
def test_replayed_completions_are_read_anew(engine: bool, tmp_path: Path) -> None:
    """Their targets are the oracle's, for the policy of now, with the trace to the policy that sampled them."""
    run = trainer(tmp_path, {"rollout_func": Engine()} if engine else {}, trace_clip=1.1)
    torch.manual_seed(0)
    first = run.collect(tiny.prompts(8))
    if not engine:  # at first the cycle replays itself: the same numbers
        torch.testing.assert_close(first.targets.advantages[first.rows[:8].sum() :].sort().values,
                                   first.targets.advantages[: first.rows[:8].sum()].sort().values)  # fmt: skip
    moved(run)
    run.state.global_step = run.args.steps_per_cycle
    experience = run.collect(tiny.prompts(16)[8:])
    assert len(experience.sequences) == 16
    known = {tuple(s.ids.tolist()): i for i, s in enumerate(first.sequences[:8])}
    places = [known[tuple(s.ids.tolist())] for s in experience.sequences[8:]]
    assert sorted(places) == list(range(8))  # all of the cycle before, in another order
    assert places != list(range(8))
    replayed = experience.select(torch.arange(8, 16))
    before = first.select(torch.tensor(places))
    logp, values = plain(run, replayed.sequences)
    mu = before.sampler_logprobs
    assert mu is not None
    if not engine:
        torch.testing.assert_close(mu, before.targets.old_logprobs)
    trace = reference.importance_trace(logp, mu.double(), clip=1.1)
    score = torch.tensor(tiny.even([s.completion.tolist() for s in replayed.sequences])).double()
    expected = reference.klq_targets(
        logp, before.ref_logprobs.double(), values, score, tau=0.05, trace=trace,
        cu_seqlens=torch.tensor([0, *replayed.rows.tolist()]).cumsum(0).int(),
    )  # fmt: skip
    for ours, theirs in zip(replayed.targets, expected, strict=True):
        torch.testing.assert_close(ours.double(), theirs, rtol=1e-4, atol=1e-4)
    assert 0.05 < (trace < 1.09).double().mean() < 0.95
    assert run.means.drain(run.accelerator)["replay/age"] == pytest.approx(0.5)  # 0 at first, then 1


@pytest.mark.parametrize(
    ("step", "changes"),
    [
        (6, {}),
        (4, {"algorithm": "ppo", "num_generations": 4, "scale_rewards": True}),
        (6, {"replay_priority": "uniform", "replay_epochs": 2, "max_steps": 16}),
    ],
    ids=str,
)
def test_a_resumed_run_draws_the_same(step: int, changes: dict[str, Any], tmp_path: Path) -> None:
    """From the end of a cycle of three steps, from the middle of one, and from the middle of one of four."""
    settings = {"save_strategy": "steps", "save_steps": 2, "logging_steps": 1, "learning_rate": 1e-2} | changes
    whole, resumed = (trainer(tmp_path / name, **settings) for name in ("whole", "resumed"))
    whole.train()
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / f"checkpoint-{step}"))
    assert tiny.losses(resumed) == tiny.losses(whole)
    for name in ("replay/age", "replay/ess"):
        assert series(resumed, name) == series(whole, name)
    assert series(whole, "replay/age")[0] == 0
    assert all(1 <= age <= 2 for age in series(whole, "replay/age")[1:])
    assert all(0 < ess < 1 for ess in series(whole, "replay/ess")[1:])


def test_replays_are_trained_on(tmp_path: Path) -> None:
    """Each of their passes has a step for every mini-batch, on sequences of earlier cycles."""
    run, steps = trainer(tmp_path, num_mini_batches=2, per_device_train_batch_size=4, max_steps=18), []
    compute_loss = run.compute_loss

    def record(model: Any, inputs: Any, **settings: Any) -> Any:
        steps.append([tuple(s.ids.tolist()) for s in inputs[0].sequences])
        return compute_loss(model, inputs, **settings)

    run.compute_loss = record  # type: ignore[method-assign]
    run.train()
    assert run.args.steps_per_cycle == 6
    cycles = [steps[i : i + 6] for i in range(0, 18, 6)]
    own = [{s for step in cycle[:4] for s in step} for cycle in cycles]
    drawn = [{s for step in cycle[4:] for s in step} for cycle in cycles]
    assert drawn[0] == own[0]
    assert drawn[1] == own[0]
    assert drawn[2] <= own[0] | own[1]


def test_completions_that_no_function_scored_can_be_drawn(tmp_path: Path) -> None:
    def sparse(completions: list[str], **_: Any) -> list[float | None]:
        return [None if i % 4 else 1.0 for i in range(len(completions))]

    run = trainer(tmp_path, {"reward_funcs": sparse})
    run.train()
    assert all(torch.tensor(tiny.losses(run)).isfinite())


# ---- bad input ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"replay_cycles": -1}, "replay_cycles: must be a whole number"),
        ({"replay_cycles": 2, "off_policy": "none"}, "replay_cycles: .* which off_policy='retrace' corrects for"),
        ({"replay_epochs": 0}, "replay_epochs: must be at least 1"),
        ({"replay_priority": "td"}, "replay_priority: must be one of error, uniform"),
    ],
)
def test_bad_options_are_named(changes: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=f"^{message}"):
        tiny.arguments(tmp_path, **({"replay_cycles": 2, "off_policy": "retrace"} | changes))


def test_options_without_effect_are_warned_of(tmp_path: Path) -> None:
    with pytest.warns(UserWarning, match="replay_epochs: has no effect on replay_cycles=0"):
        tiny.arguments(tmp_path, replay_epochs=2)


def test_samples_of_an_unknown_policy_are_not_replayed(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"^generation_kwargs: sample from a policy of which"):
        trainer(tmp_path, generation_kwargs={"top_k": 5})
    run = trainer(tmp_path, {"rollout_func": lambda prompts, _: Completions([[5, tiny.EOS]] * len(prompts))})
    with pytest.raises(ValueError, match=r"^off_policy: 'retrace' needs the log-probabilities"):
        run.train()
