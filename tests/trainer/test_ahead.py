"""Rollouts that are sampled ahead: beside the learning, by weights one cycle old, and resumed exactly."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import traceback
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import ahead_process
import pytest
import tiny
import torch
from own_engine import OwnEngine
from processes import ROOT, TWO_PROCESSES, start
from sampler import Sampler

from klq_kernels.engines import EngineError, Generated, Request, WeightsLost
from klq_kernels.trainer import Completions, EngineRollout, KLQTrainer, processes
from klq_kernels.trainer.engine import served_model

pytestmark = pytest.mark.usefixtures("one_thread")
CYCLES: dict[str, Any] = {
    "max_steps": 12, "num_update_epochs": 2, "logging_steps": 1, "max_completion_length": 6, "learning_rate": 3e-2,
}  # fmt: skip
SAVING = {"save_strategy": "steps", "save_steps": 1}


def build(folder: Path, rollout: Any, given: dict[str, Any] | None = None, **changes: Any) -> KLQTrainer:
    """A trainer on an engine or a rollout function."""
    function = EngineRollout(rollout) if isinstance(rollout, OwnEngine) else rollout
    return tiny.trainer(
        folder, {"rollout_func": function, **(given or {})}, **({"async_rollouts": True} | CYCLES | changes)
    )


def series(run: KLQTrainer, name: str) -> list[float]:
    return [logs[name] for logs in run.state.log_history if name in logs]


class Watched(OwnEngine):
    """Fails where it is asked for two things at a time, and remembers which weights sampled."""

    def __init__(self) -> None:
        super().__init__()
        self.busy = threading.Lock()
        self.threads: list[str] = []
        self.used: list[str] = []

    def take_weights(self, weights: Any, version: str) -> None:
        assert self.busy.acquire(blocking=False), "new weights while it samples"
        try:
            super().take_weights(weights, version)
        finally:
            self.busy.release()

    def generate(self, request: Request, version: str) -> Generated:
        assert self.busy.acquire(blocking=False), "two requests at a time"
        try:
            self.threads.append(threading.current_thread().name)
            self.used.append(version)
            return super().generate(request, version)
        finally:
            self.busy.release()


class Lagging:
    """Samples with the weights of the cycle before, as it is called: what sampling ahead has to be equal to."""

    def __init__(self) -> None:
        self.weights: list[Any] = []

    def __call__(self, prompts: list[Any], trainer: KLQTrainer) -> Completions:
        self.weights.append([(name, weight.clone()) for name, weight in trainer.policy_weights()])
        seeds = torch.randint(2**31, (len(prompts),)).tolist()
        model = served_model(trainer)
        with torch.random.fork_rng():
            sampler = Sampler(model.config, model.dtype)
        sampler.load(self.weights[max(len(self.weights) - 2, 0)])
        ids = [trainer.tokenize(prompt) for prompt in prompts]
        found = [
            sampler.complete(
                p, seed=seed, temperature=trainer.args.temperature, max_tokens=trainer.args.max_completion_length,
                stop=[tiny.EOS],
            )
            for p, seed in zip(ids, seeds, strict=True)
        ]  # fmt: skip
        age = float(len(self.weights) > 1)
        return Completions([c for c, _ in found], ids, logprobs=[logp for _, logp in found], staleness=age)


# ---- what is sampled, when, by which weights ------------------------------------------------------------------------


def test_it_samples_while_the_trainer_learns(tmp_path: Path) -> None:
    """The engine ends with the second cycle's completions only after the first cycle's learning has begun."""
    learning = threading.Event()

    class Waiting(Watched):
        def generate(self, request: Request, version: str) -> Generated:
            found = super().generate(request, version)
            if len(self.requests) == 3:  # the first is the probe
                assert learning.wait(60), "the trainer waits for the engine before it learns"
            return found

    engine = Waiting()
    run = build(tmp_path, engine, max_steps=4)
    compute_loss = run.compute_loss

    def learn(*args: Any, **settings: Any) -> Any:
        learning.set()
        return compute_loss(*args, **settings)

    run.compute_loss = learn  # type: ignore[method-assign]
    run.train()
    assert len(engine.requests) == 3  # none for a cycle that does not come
    assert engine.threads == ["MainThread", "MainThread", "klq rollout"]


@pytest.mark.parametrize(
    "changes", [{"off_policy": "retrace"}, {"algorithm": "ppo", "num_generations": 4}], ids=["retrace", "ppo, groups"]
)
def test_the_weights_that_sample_are_one_cycle_old(changes: dict[str, Any], tmp_path: Path) -> None:
    """The run is that of a sampler that lags by a cycle; prompts and seeds are also those of one that does not."""
    engine, on_policy = Watched(), Watched()
    run = build(tmp_path / "ahead", engine, **changes)
    run.train()
    expected = build(tmp_path / "lagging", Lagging(), async_rollouts=False, **changes)
    expected.train()
    for name in ("loss", "rollout/staleness", "rollout/staleness_max", "rollout/sampler_kl", "rollout/ess"):
        assert series(run, name) == series(expected, name), name
    assert series(run, "rollout/staleness") == [0.0] + [1.0] * 5  # a cycle of the second epoch among them
    assert max(series(run, "rollout/sampler_kl")[:1]) < 1e-9
    assert min(series(run, "rollout/sampler_kl")[1:]) > 1e-4
    first, *versions = engine.versions
    assert engine.used == [first, first, first, *versions]  # probe, cycles 0 and 1, and then one after the other
    build(tmp_path / "together", on_policy, async_rollouts=False, **changes).train()
    asked = [[(r.prompt_ids, r.seeds) for r in e.requests[1:]] for e in (engine, on_policy)]
    assert asked[0] == asked[1]


def test_evaluation_waits_and_changes_nothing(tmp_path: Path) -> None:
    plain = build(tmp_path / "plain", Watched())
    plain.train()
    engine = Watched()
    held_out = {"eval_dataset": tiny.prompts(4)}
    run = build(tmp_path / "evaluated", engine, held_out, eval_strategy="steps", eval_steps=1)
    run.train()
    assert len(series(run, "eval_reward")) == 12
    assert tiny.losses(run) == tiny.losses(plain)
    assert series(run, "rollout/staleness") == series(plain, "rollout/staleness")


# ---- resuming -------------------------------------------------------------------------------------------------------


def test_a_resumed_run_is_the_same(tmp_path: Path) -> None:
    """From within a cycle and from its end; and a checkpoint is all it takes, whatever the engine then has."""
    changes = {**SAVING, "max_steps": 8, "off_policy": "retrace", "replay_cycles": 2, "num_update_epochs": 1}
    whole = build(tmp_path / "whole", Watched(), **changes)
    whole.train()
    for step in (3, 4):
        resumed = build(tmp_path / str(step), Watched(), **changes)
        resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / f"checkpoint-{step}"))
        for name in ("loss", "rollout/sampler_kl", "rollout/staleness", "replay/ess"):
            assert series(resumed, name) == series(whole, name), (step, name)


def test_a_killed_run_goes_on_as_if_it_had_not_been(tmp_path: Path) -> None:
    folder = tmp_path / "cut"
    command = [ahead_process.__file__, json.dumps({"folder": str(folder), "kill_at": 5})]
    start(command, expect=-signal.SIGKILL)
    assert not (folder / "checkpoint-5").exists()
    resumed = ahead_process.build(folder)
    resumed.train(resume_from_checkpoint=True)
    whole = ahead_process.build(tmp_path / "whole")
    whole.train()
    assert len(tiny.losses(whole)) == 6
    assert tiny.losses(resumed) == tiny.losses(whole)
    ours, theirs = (dict(run.policy_weights()) for run in (resumed, whole))
    assert all(torch.equal(weight, theirs[name]) for name, weight in ours.items())


def test_what_was_sampled_under_other_arguments_is_sampled_anew(tmp_path: Path) -> None:
    build(tmp_path, Watched(), **SAVING, max_steps=4).train()
    (tmp_path / "checkpoint-4").rename(tmp_path / "ended")
    resumed = build(tmp_path, Watched(), temperature=0.8)
    with pytest.warns(UserWarning, match=r"sampled ahead were made with temperature=1\.0 \(now 0\.8\)"):
        resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert series(resumed, "rollout/staleness")[1:] == [0.0, 1.0, 1.0, 1.0, 1.0]


def test_another_dataset_is_sampled_anew(tmp_path: Path) -> None:
    build(tmp_path, Watched(), **SAVING, max_steps=4).train()
    resumed = build(tmp_path, Watched(), {"train_dataset": tiny.prompts(33)}, max_steps=6)
    with pytest.warns(UserWarning, match="prompts of this cycle are not those that were sampled ahead"):
        resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert resumed.state.global_step == 6


# ---- failures -------------------------------------------------------------------------------------------------------


class Failing(Watched):
    """Fails in the request of that number, the probe being 1."""

    def __init__(self, at: int, error: Exception) -> None:
        super().__init__()
        self.at, self.error = at, error

    def generate(self, request: Request, version: str) -> Generated:
        found = super().generate(request, version)
        if len(self.requests) == self.at:
            raise self.error
        return found


def test_an_error_of_the_thread_is_raised_where_it_is_waited_for(tmp_path: Path) -> None:
    settings = {"save_strategy": "steps", "save_steps": 2, "max_steps": 8}
    run = build(tmp_path / "cut", Failing(4, EngineError("it broke")), **settings)
    with pytest.raises(EngineError, match=r"^it broke$") as caught:
        run.train()
    frames = [frame.name for frame in traceback.extract_tb(caught.value.__traceback__)]
    assert "wait" in frames
    assert frames[-1] == "generate"
    run.evaluate(tiny.prompts(2))  # it was said once, and the engine starts again
    resumed = build(tmp_path / "cut", Watched(), **settings)
    resumed.train(resume_from_checkpoint=True)
    whole = build(tmp_path / "whole", Watched(), **settings)
    whole.train()
    assert tiny.losses(resumed) == tiny.losses(whole)


def test_an_engine_that_lost_the_weights_samples_with_those_of_now(tmp_path: Path) -> None:
    engine = Watched()
    run = build(tmp_path, engine, max_steps=10)
    submit = run.ahead.submit

    def lose(sample: Any, prompts: Any, cycle: int) -> None:
        engine.lose = int(cycle == 2)
        submit(sample, prompts, cycle)

    run.ahead.submit = lose  # type: ignore[method-assign]
    run.train()
    assert len(engine.models) == 2
    assert series(run, "rollout/staleness") == [0.0, 1.0, 0.0, 1.0, 1.0]
    assert series(run, "rollout/sampler_kl")[2] < 1e-9


def test_a_program_that_ends_does_not_wait(tmp_path: Path) -> None:
    """It is interrupted while the engine samples, for ever."""
    command = [sys.executable, ahead_process.__file__, json.dumps({"folder": str(tmp_path), "stuck": True})]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120, check=False)
    assert "KeyboardInterrupt" in done.stderr
    assert done.returncode not in (0, -signal.SIGABRT)


def test_two_processes(tmp_path: Path) -> None:
    """Each has its share of the prompts, ahead as otherwise; where the engine of one fails, both say so and end."""
    runs = [
        {"folder": str(tmp_path / "whole")},
        {"folder": str(tmp_path / "together"), "async_rollouts": False},
        {"folder": str(tmp_path / "again"), "resume": str(tmp_path / "whole" / "checkpoint-3")},
        {"folder": str(tmp_path / "lost"), "fails": "lost", "shared": True, "async_rollouts": False},
        {"folder": str(tmp_path / "lost ahead"), "fails": "lost", "shared": True},
        *({"folder": str(tmp_path / name), **told} for name, told in ahead_process.FAILURES.items()),
    ]
    start([*TWO_PROCESSES, ahead_process.__file__, *map(json.dumps, runs)])
    for rank in (0, 1):
        told = {p.name: json.loads((p / f"{rank}.json").read_text()) for p in tmp_path.iterdir()}
        assert told["whole"]["asked"] == told["together"]["asked"]
        assert len(told["whole"]["asked"]) == 3
        assert told["again"]["losses"] == told["whole"]["losses"]
        assert told["whole"]["losses"] != told["together"]["losses"]
        assert told["lost"]["error"] is None
        assert told["lost"]["losses"] == told["together"]["losses"]
        assert told["lost ahead"]["error"] is None
        assert len(told["lost ahead"]["losses"]) == 6
        for name, trouble in ahead_process.FAILURES.items():
            failing = trouble.get("failing", 1)
            own, others = (
                f"{told_by}engine of {failing} broke"
                for told_by in ("", f"process {failing} failed with EngineError: ")
            )
            assert told[name]["error"] == f"EngineError: {own if rank == failing else others}", name
    shares = [json.loads((tmp_path / "whole" / f"{rank}.json").read_text())["asked"] for rank in (0, 1)]
    assert shares[0] != shares[1]


@pytest.mark.parametrize(
    ("here", "elsewhere", "raised", "message"),
    [
        (None, None, None, ""),
        (None, (True, "WeightsLost: gone"), WeightsLost, "process 1 failed with WeightsLost: gone"),
        (None, (False, "ValueError: long"), EngineError, "process 1 failed with ValueError: long"),
        (WeightsLost("gone"), None, WeightsLost, "process 0 failed with WeightsLost: gone"),
        (WeightsLost("gone"), (False, "EngineError: dead"), EngineError, "process 1 failed with EngineError: dead"),
        (ValueError("long"), (True, "WeightsLost: gone"), ValueError, "^long$"),
    ],
    ids=str,
)
def test_processes_fail_together(
    here: Exception | None, elsewhere: Any, raised: Any, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Weights that were lost are given again by all processes together, so none may go on as if that were all."""
    monkeypatch.setattr(processes, "gather_object", lambda mine: [*mine, elsewhere])

    def both() -> None:
        with processes.together(SimpleNamespace(num_processes=2)):
            if here is not None:
                raise here

    if raised is None:
        both()
        return
    with pytest.raises(raised, match=message) as caught:
        both()
    assert type(caught.value) is raised


# ---- bad input ------------------------------------------------------------------------------------------------------


def test_what_cannot_sample_ahead_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"^async_rollouts: needs an engine .*set engine='vllm'"):
        tiny.trainer(tmp_path, async_rollouts=True)
    plain = {"rollout_func": lambda prompts, trainer: Completions([[5, tiny.EOS]] * len(prompts))}
    with pytest.raises(ValueError, match=r"^rollout_func: needs a method begin\(prompts, trainer\)"):
        tiny.trainer(tmp_path, plain, async_rollouts=True)


class Script:
    """A rollout function of one's own: columns and numbers come to ``begin`` as they do to a call."""

    def __init__(self, answer: Any = None) -> None:
        self.answer = answer

    def __call__(self, prompts: list[str], trainer: KLQTrainer, letter: list[str]) -> Any:
        return self.begin(prompts, trainer, letter)()

    def begin(self, prompts: list[str], trainer: KLQTrainer, letter: list[str]) -> Any:
        ids = [[*trainer.tokenize(c), tiny.EOS] for c in letter]
        return lambda: Completions(ids, staleness=2.0) if self.answer is None else self.answer


def test_a_function_of_ones_own(tmp_path: Path) -> None:
    run = build(tmp_path, Script(), max_steps=4)
    run.train()
    assert series(run, "rollout/staleness") == [2.0, 3.0]
    with pytest.raises(ValueError, match=r"^rollout_func: must return Completions, got int"):
        build(tmp_path, Script(answer=1), max_steps=4).train()

    class NothingToCall(Script):
        def __call__(self, prompts: list[str], trainer: KLQTrainer, letter: list[str]) -> Any:
            return super().begin(prompts, trainer, letter)()

        def begin(self, prompts: list[str], trainer: KLQTrainer, letter: list[str]) -> Any:
            return self(prompts, trainer, letter)

    with pytest.raises(ValueError, match=r"^rollout_func: its method begin must return a function without arguments"):
        build(tmp_path, NothingToCall(), max_steps=4).train()
