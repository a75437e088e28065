"""vLLM in a child process, here a stand-in for it: it learns with the policy, and its end is found out."""

from __future__ import annotations

import os
import signal
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import tiny
from own_engine import OwnEngine
from stand_in import STAND_IN

from klq_kernels.engines import EngineError, Model, Request, VLLMProcess
from klq_kernels.engines.vllm_process import Child, same_gpu
from klq_kernels.trainer import EngineRollout, KLQTrainer

pytestmark = pytest.mark.usefixtures("one_thread")
MODEL = Model(tiny.config(architectures=["LlamaForCausalLM"]), "float32")


def gone(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return True
    return False


def build(
    folder: Path, rollout: EngineRollout | None = None, *, async_rollouts: bool = False, **given: Any
) -> KLQTrainer:
    options = {"environment": STAND_IN, "bucket_bytes": 5000, "max_model_len": 64}
    settings = {"save_strategy": "steps", "save_steps": 2, "max_steps": 6, "num_update_epochs": 2, "logging_steps": 1}
    settings |= {"engine": "vllm", "engine_kwargs": options} if rollout is None else {}
    settings["async_rollouts"] = async_rollouts
    return tiny.trainer(folder, {"rollout_func": rollout, **given}, learning_rate=1e-2, **settings)


def child_of(run: Any) -> Child:
    return run.rollout_func.engine._child


def doomed(folder: Path, *, async_rollouts: bool = False) -> KLQTrainer:
    """A run whose engine is killed as its second cycle is scored."""
    scored = 0

    def reward(completion_ids: list[list[int]], **_: Any) -> list[float]:
        nonlocal scored
        scored += 1
        if scored == 2:
            os.kill(child_of(run).process.pid, signal.SIGKILL)
        return tiny.even(completion_ids)

    run = build(folder, async_rollouts=async_rollouts, reward_funcs=reward)
    return run


def test_a_run_whose_engine_is_killed_goes_on_as_if_it_had_not_been(tmp_path: Path) -> None:
    whole = build(tmp_path / "whole", EngineRollout(OwnEngine()))  # the same arithmetic, in this process
    whole.train()
    cut = doomed(tmp_path / "cut")
    with pytest.raises(EngineError, match=r"(?s)ended by SIGKILL during .*resume_from_checkpoint=True"):
        cut.train()
    assert (tmp_path / "cut" / "checkpoint-4").is_dir()
    resumed = build(tmp_path / "cut")
    resumed.train(resume_from_checkpoint=True)
    assert resumed.state.global_step == 6
    assert tiny.losses(resumed) == tiny.losses(whole)
    drift = [logs["rollout/sampler_kl"] for logs in resumed.state.log_history if "rollout/sampler_kl" in logs]
    assert len(drift) == 3
    assert max(drift) < 1e-9
    child = child_of(resumed)
    child.connection.close()  # as the end of the trainer's process does, however sudden
    assert child.process.wait(10) == 0


def test_an_engine_that_is_killed_while_it_samples_ahead(tmp_path: Path) -> None:
    """The run ends with the next checkpoint or cycle, and goes on from the checkpoint before."""
    whole = build(tmp_path / "whole", EngineRollout(OwnEngine()), async_rollouts=True)
    whole.train()
    cut = doomed(tmp_path / "cut", async_rollouts=True)
    with pytest.raises(EngineError, match=r"(?s)ended by SIGKILL during generate.*resume_from_checkpoint=True"):
        cut.train()
    resumed = build(tmp_path / "cut", async_rollouts=True)
    resumed.train(resume_from_checkpoint=True)
    assert tiny.losses(resumed) == tiny.losses(whole)
    resumed.rollout_func.stop()  # type: ignore[union-attr]


def test_what_vllm_complains_of_is_passed_on(tmp_path: Path) -> None:
    engine = VLLMProcess(environment=STAND_IN, max_model_len=64, log=tmp_path / "log")
    with pytest.raises(EngineError, match="call start first"):
        engine.take_weights([], "one")
    facts = engine.start(MODEL)
    assert (facts.config["vocab_size"], facts.max_length) == (tiny.VOCAB, 64)
    weights = dict(tiny.model().named_parameters())
    head = weights.pop("lm_head.weight")
    with pytest.raises(EngineError, match=r"failed in finish_weight_update: KeyError: .*lm_head.*its log is"):
        engine.take_weights(weights.items(), "one")
    assert "KeyError" in (tmp_path / "log").read_text()
    engine.take_weights([*weights.items(), ("lm_head.weight", head)], "two")
    with pytest.raises(RuntimeError, match="'two', not 'one'"):
        engine.generate(Request([[5]], [0], 2), "one")
    child: Any = engine._child
    os.kill(child.process.pid, signal.SIGSTOP)  # slow beyond all measure
    engine.timeout = 0.2
    with pytest.raises(EngineError, match=r"longer than 0\.2 s for generate.*engine_timeout"):
        engine.generate(Request([[5]], [0], 2), "two")
    assert gone(child.process.pid)
    assert not child.folder.exists()


def test_a_child_that_reads_nothing_is_ended_in_time(tmp_path: Path) -> None:
    sleeper = tmp_path / "python"
    sleeper.write_text("#!/bin/sh\nexec sleep 600\n")
    sleeper.chmod(0o755)
    child = Child(str(sleeper), {}, tmp_path / "log", 1024)
    with pytest.raises(EngineError, match=r"longer than 0\.2 s for generate.*engine_timeout"):
        child.call("generate", 0.2, request=bytes(2**24))  # more than a pipe holds
    assert gone(child.process.pid)


def test_the_child_sees_the_trainers_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert same_gpu("cpu") == {}
    assert same_gpu("cuda:1") == {"CUDA_VISIBLE_DEVICES": "1"}
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,GPU-5a,6")
    assert [same_gpu(device)["CUDA_VISIBLE_DEVICES"] for device in ("cuda", "cuda:1")] == ["4", "GPU-5a"]


@pytest.mark.slow
@pytest.mark.skipif(find_spec("vllm") is not None, reason="vLLM is installed")
def test_without_vllm_it_says_so() -> None:
    without = {"PYTHONPATH": STAND_IN["PYTHONPATH"].rsplit(os.pathsep, 1)[0]}
    with pytest.raises(EngineError, match="No module named 'vllm'"):
        VLLMProcess(environment=without).start(MODEL)
