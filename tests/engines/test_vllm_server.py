"""vLLM as a server, here a stand-in for it: busy, slow, restarted, killed, or not the one that it should be."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import engine_process
import pytest
import tiny
from processes import ROOT, TWO_PROCESSES, start
from stand_in import Server

from klq_kernels.engines import EngineError, Model, Request, VLLMServer, WeightsLost
from klq_kernels.trainer import KLQTrainer

pytestmark = pytest.mark.usefixtures("one_thread")
MODEL = Model(tiny.config(), "float32")
PROMPTS = Request([[5, 6, 7], [5, 6, 7], [8]], [1, 2, 3], max_tokens=5)


def build(folder: Path, server: Server, reward: Callable[..., list[float]] = tiny.even, **given: Any) -> KLQTrainer:
    settings = {"engine": "vllm", "engine_url": server.url, "engine_kwargs": {"bucket_bytes": 5000, "retries": 0}}
    settings |= {"save_strategy": "steps", "save_steps": 2, "max_steps": 6, "num_update_epochs": 2, "logging_steps": 1}
    return tiny.trainer(folder, {"reward_funcs": reward, **given}, learning_rate=1e-2, **settings)


def ready(server: Server, **options: Any) -> VLLMServer:
    engine = VLLMServer(server.url, pause=0.01, **options)
    engine.start(MODEL)
    engine.take_weights(tiny.model().named_parameters(), "one")
    return engine


def test_a_run_survives_a_restart_and_resumes_after_a_kill(
    server: Server, start_server: Callable[[], Server], tmp_path: Path
) -> None:
    whole = build(tmp_path / "whole", server)
    whole.train()
    drift = [logs["rollout/sampler_kl"] for logs in whole.state.log_history if "rollout/sampler_kl" in logs]
    assert len(drift) == 3
    assert max(drift) < 1e-9

    scored, trouble = 0, lambda: server.fault(restart=True)

    def reward(completion_ids: list[list[int]], **_: Any) -> list[float]:
        nonlocal scored
        scored += 1
        if scored == 2:
            trouble()
        return tiny.even(completion_ids)

    restarted = build(tmp_path / "restarted", server, reward)
    restarted.train()
    assert tiny.losses(restarted) == tiny.losses(whole)

    other = start_server()
    scored, trouble = 0, other.kill
    cut = build(tmp_path / "cut", other, reward)
    with pytest.raises(EngineError, match=r"cannot be reached .*is the server running.*resume_from_checkpoint=True"):
        cut.train()
    resumed = build(tmp_path / "cut", server)
    resumed.train(resume_from_checkpoint=True)
    assert resumed.state.global_step == 6
    assert tiny.losses(resumed) == tiny.losses(whole)


def test_a_busy_server_is_asked_again(server: Server) -> None:
    engine = ready(server)
    expected = engine.generate(PROMPTS, "one")
    assert expected.completion_ids[0] != expected.completion_ids[1]  # one prompt, two seeds
    server.fault(busy=3)
    assert engine.generate(PROMPTS, "one") == expected
    server.fault(busy=100)
    with pytest.raises(EngineError, match=r"/v1/completions answers 503: .*busy"):
        engine.generate(PROMPTS, "one")


def test_a_slow_server_is_said_to_be_slow(server: Server) -> None:
    engine = ready(server)
    engine.timeout = 0.3
    server.fault(slow=1.0)
    with pytest.raises(EngineError, match=r"did not answer within 0\.3 s.*engine_timeout"):
        engine.generate(PROMPTS, "one")


def test_a_program_that_ends_does_not_wait_for_a_server() -> None:
    program = """
import socket
from threading import Thread
from klq_kernels.engines import Request, VLLMServer

silent = socket.create_server(("127.0.0.1", 0))
engine = VLLMServer(f"http://127.0.0.1:{silent.getsockname()[1]}")
Thread(target=engine.generate, args=(Request([[5]] * 3, [1, 2, 3], 4), "one"), daemon=True).start()
asked = silent.accept()
"""
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    subprocess.run([sys.executable, "-c", program], env=environment, timeout=120, check=True)


def test_completions_that_were_broken_off_are_refused(server: Server) -> None:
    engine = ready(server)
    server.fault(broken=True)
    with pytest.raises(EngineError, match=r"broke off completions \(abort\)"):
        engine.generate(PROMPTS, "one")


def test_a_server_with_other_weights_is_found_out(server: Server) -> None:
    engine = ready(server)
    ready(server).take_weights(tiny.model(seed=4).named_parameters(), "another run's")
    with pytest.raises(WeightsLost, match="has the weights \"another run's\", not 'one'"):
        engine.generate(PROMPTS, "one")


def test_servers_that_were_started_otherwise(server: Server) -> None:
    server.fault(mode="raw_logprobs")
    with pytest.raises(EngineError, match=r"gives raw_logprobs, .*start it with VLLM_SERVER_DEV_MODE=1 vllm serve"):
        VLLMServer(server.url).start(MODEL)


def test_something_else_at_the_address() -> None:
    class Other(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_error(404)

        def log_message(self, *_: Any) -> None:
            pass

    other = HTTPServer(("127.0.0.1", 0), Other)
    thread = threading.Thread(target=other.serve_forever)
    thread.start()
    try:
        with pytest.raises(
            EngineError, match=r"(?s)answers 404: .*must have been started with: VLLM_SERVER_DEV_MODE=1"
        ):
            VLLMServer(f"http://127.0.0.1:{other.server_port}").start(MODEL)
    finally:
        other.shutdown()
        thread.join()
        other.server_close()
    with pytest.raises(EngineError, match="cannot be reached"):
        VLLMServer(f"http://127.0.0.1:{other.server_port}", retries=1, pause=0.01).start(MODEL)


def test_a_policy_whose_vocabulary_was_changed(server: Server, tmp_path: Path) -> None:
    model = tiny.model()
    model.resize_token_embeddings(tiny.VOCAB + 2)
    with pytest.raises(ValueError, match=f"vocab_size={tiny.VOCAB}, and the policy has vocab_size={tiny.VOCAB + 2}"):
        build(tmp_path, server, model=model).train()


@pytest.mark.slow
def test_two_processes_share_a_server(server: Server, tmp_path: Path) -> None:
    start([*TWO_PROCESSES, engine_process.__file__, str(tmp_path), server.url])
    for rank in range(2):
        history = json.loads((tmp_path / f"{rank}.json").read_text())
        drift = [logs["rollout/sampler_kl"] for logs in history if "rollout/sampler_kl" in logs]
        assert len(drift) == 3
        assert max(drift) < 1e-9
