"""vLLM in a child process, here a stand-in for it: it learns with the policy, and its end is found out."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import tiny
from stand_in import STAND_IN

from klq_kernels.engines import EngineError, Model, Request, VLLMProcess
from klq_kernels.engines.vllm_process import Child
from klq_kernels.trainer import KLQTrainer

pytestmark = pytest.mark.usefixtures("one_thread")
MODEL = Model(tiny.config(architectures=["LlamaForCausalLM"]), "float32")


def gone(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return True
    return False


def build(folder: Path, reward: Callable[..., list[float]] = tiny.even, **changes: Any) -> KLQTrainer:
    options = {"environment": STAND_IN, "bucket_bytes": 5000, "max_model_len": 64}
    settings = {"engine": "vllm", "engine_kwargs": options, "save_strategy": "steps", "save_steps": 2, "max_steps": 6}
    settings |= {"num_update_epochs": 2, "logging_steps": 1, "learning_rate": 1e-2, **changes}
    return tiny.trainer(folder, {"reward_funcs": reward}, **settings)


def test_a_run_whose_engine_is_killed_goes_on_as_if_it_had_not_been(tmp_path: Path) -> None:
    whole = build(tmp_path / "whole")
    whole.train()
    drift = [logs["rollout/sampler_kl"] for logs in whole.state.log_history if "rollout/sampler_kl" in logs]
    assert len(drift) == 3
    assert max(drift) < 1e-9
    engine: Any = whole.rollout_func
    pid = engine.engine.pid
    engine.stop()
    assert gone(pid)

    scored = 0

    def reward(completion_ids: list[list[int]], **_: Any) -> list[float]:
        nonlocal scored
        scored += 1
        if scored == 2:
            killed: Any = cut.rollout_func
            os.kill(killed.engine.pid, signal.SIGKILL)
        return tiny.even(completion_ids)

    cut = build(tmp_path / "cut", reward)
    with pytest.raises(EngineError, match=r"(?s)ended by SIGKILL during .*resume_from_checkpoint=True"):
        cut.train()
    assert (tmp_path / "cut" / "checkpoint-4").is_dir()
    resumed = build(tmp_path / "cut")
    resumed.train(resume_from_checkpoint=True)
    assert resumed.state.global_step == 6
    assert tiny.losses(resumed) == tiny.losses(whole)


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


def test_it_ends_with_the_trainer() -> None:
    """Whose end, however sudden, closes the connection."""
    engine = VLLMProcess(environment=STAND_IN)
    child = Child(engine.python, engine.environment, None, 1)
    child.connection.close()
    assert child.process.wait(60) == 0
    child.stop()


@pytest.mark.skipif(find_spec("vllm") is not None, reason="vLLM is installed")
def test_without_vllm_it_says_so() -> None:
    without = {"PYTHONPATH": STAND_IN["PYTHONPATH"].rsplit(os.pathsep, 1)[0]}
    with pytest.raises(EngineError, match="No module named 'vllm'"):
        VLLMProcess(environment=without).start(MODEL)
