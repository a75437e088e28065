"""vLLM itself, in a child process and as a server: make test-engines installs it and runs this."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import engine_process
import pytest
import tiny
import torch
from engine_process import SIZES
from peft import LoraConfig
from processes import TWO_PROCESSES, start

from klq_kernels.engines import EngineError, VLLMProcess, VLLMServer
from klq_kernels.engines.vllm_server import COMMAND
from klq_kernels.trainer import EngineRollout, KLQTrainer
from klq_kernels.trainer.engine import requested

try:
    version("vllm")
except PackageNotFoundError:
    pytest.skip("vLLM is not installed (make test-engines runs this with it)", allow_module_level=True)

ROOT = Path(__file__).parents[2]
os.environ["PYTHONPATH"] = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])  # of the engines


def policy(family: str = "qwen3", **changes: Any) -> Any:
    """With heads of 32, which vLLM's kernels take, and a head that leaves many tokens likely."""
    sizes = {"hidden_size": 128, **({"head_dim": 32} if family == "qwen3" else {})}
    model = tiny.model(family, **(sizes | changes))
    with torch.no_grad():
        model.get_output_embeddings().weight.mul_(0.2)
    return model


def build(folder: Path, engine: Any, given: dict[str, Any] | None = None, **changes: Any) -> KLQTrainer:
    settings = {"max_steps": 8, "num_update_epochs": 2, "logging_steps": 1, "learning_rate": 3e-3, "temperature": 0.8}
    return tiny.trainer(
        folder, {"model": policy(), "rollout_func": EngineRollout(engine), **(given or {})}, **(settings | changes)
    )


def drift(trained: KLQTrainer) -> list[float]:
    found = [logs["rollout/sampler_kl"] for logs in trained.state.log_history if "rollout/sampler_kl" in logs]
    print("sampler_kl of each cycle:", *(f"{kl:.1e}" for kl in found))
    return found


@pytest.mark.parametrize(
    ("given", "changes"),
    [
        (dict, {}),
        (lambda: {"model": policy("llama", tie_word_embeddings=True)}, {"algorithm": "ppo", "num_generations": 4}),
        (lambda: {"peft_config": LoraConfig(r=4, target_modules=["q_proj", "o_proj", "gate_proj"])}, {}),
    ],
    ids=["qwen3", "llama, tied, ppo, groups", "lora"],
)
def test_it_follows_the_policy(given: Any, changes: dict[str, Any], tmp_path: Path) -> None:
    run = build(tmp_path, VLLMProcess(bucket_bytes=100_000, **SIZES), given(), **changes)
    run.train()
    assert len(drift(run)) == 4
    assert max(drift(run)) < 1e-6
    run.rollout_func.stop()


def test_without_updates_it_falls_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = build(tmp_path, VLLMProcess(**SIZES))
    run.evaluate(tiny.prompts(4))
    follow = VLLMProcess.take_weights

    def pretend(self: VLLMProcess, weights: Any, version: str) -> None:
        follow(self, run_as_it_was, version)

    run_as_it_was = [(name, weight.clone()) for name, weight in run.policy_weights()]
    monkeypatch.setattr(VLLMProcess, "take_weights", pretend)
    run.train()
    assert drift(run)[0] < 1e-6
    assert min(drift(run)[1:]) > 0.01
    run.rollout_func.stop()


def test_it_samples_ahead(tmp_path: Path) -> None:
    """By the weights of one cycle ago; and a run that goes on from a checkpoint is the same."""
    saving = {"save_strategy": "steps", "save_steps": 3, "async_rollouts": True, "off_policy": "retrace"}
    run = build(tmp_path / "whole", VLLMProcess(**SIZES), **saving)
    run.train()
    run.rollout_func.stop()
    ages = [logs["rollout/staleness"] for logs in run.state.log_history if "rollout/staleness" in logs]
    assert ages == [0.0, 1.0, 1.0, 1.0]
    assert drift(run)[0] < 1e-6
    assert min(drift(run)[1:]) > 1e-3
    resumed = build(tmp_path / "resumed", VLLMProcess(**SIZES), **saving)
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-3"))
    assert tiny.losses(resumed) == pytest.approx(tiny.losses(run), rel=1e-3)
    resumed.rollout_func.stop()


def test_seeds_and_stop_tokens(tmp_path: Path) -> None:
    run = build(tmp_path, VLLMProcess(**SIZES), temperature=2.0)
    run.evaluate(tiny.prompts(2))
    rollout: Any = run.rollout_func
    request = requested(run.generation_config, [[5, 6, 7]] * 20, [1, 1, *range(2, 20)])
    request = type(request)(**{**vars(request), "stop_ids": tuple(range(2, 130)), "max_tokens": 12})
    ids = rollout.engine.generate(request, rollout._version).completion_ids
    assert ids[0] == ids[1]
    assert len(set(map(tuple, ids))) > 10
    for row in ids:
        assert not set(row[:-1]) & set(request.stop_ids)
        assert len(row) == 12 or row[-1] in request.stop_ids
    again = rollout.engine.generate(type(request)(**{**vars(request), "seeds": [1, *range(2, 21)]}), rollout._version)
    assert again.completion_ids[1:-1] == ids[2:]  # whatever is sampled beside it
    rollout.stop()


def test_sixteen_bits_are_within_the_tolerance(tmp_path: Path) -> None:
    run = build(tmp_path, VLLMProcess(**SIZES), bf16=True)
    run.train()
    assert 0 < max(drift(run)) < 0.01
    run.rollout_func.stop()


@pytest.mark.slow
def test_two_training_processes_have_one_each(tmp_path: Path) -> None:
    start([*TWO_PROCESSES, engine_process.__file__, str(tmp_path)])
    for rank in range(2):
        history = json.loads((tmp_path / f"{rank}.json").read_text())
        found = [logs["rollout/sampler_kl"] for logs in history if "rollout/sampler_kl" in logs]
        assert len(found) == 3
        assert max(found) < 1e-6


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, subprocess.Popen[bytes]]]:
    """``vllm serve`` as the documentation says, on a model of the policy's shape."""
    folder = tmp_path_factory.mktemp("served")
    policy(seed=5).save_pretrained(folder)
    tiny.tokenizer().save_pretrained(folder)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    options = COMMAND.partition(" MODEL ")[2].replace("'", "").split(" ", 5)
    sizes = [f"--{name.replace('_', '-')}={value}" for name, value in SIZES.items() if value is not True]
    with (folder / "log").open("wb") as log:
        process = subprocess.Popen(
            [sys.executable, "-m", "vllm.entrypoints.cli.main", "serve", str(folder), *options, *sizes,
             "--enforce-eager", "--dtype=float32", "--host=127.0.0.1", f"--port={port}"],
            env={**os.environ, "VLLM_SERVER_DEV_MODE": "1"}, stdout=log, stderr=log,
        )  # fmt: skip
    until = time.monotonic() + 300
    while True:
        try:
            urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=1).close()
            break
        except OSError:
            assert process.poll() is None, (folder / "log").read_text()[-3000:]
            assert time.monotonic() < until
            time.sleep(0.25)
    yield f"http://127.0.0.1:{port}", process
    process.kill()
    process.wait()


def test_a_server_follows_the_policy_until_it_is_killed(
    server: tuple[str, subprocess.Popen[bytes]], tmp_path: Path
) -> None:
    url, process = server
    run = build(tmp_path / "whole", VLLMServer(url, bucket_bytes=100_000))
    run.train()
    assert len(drift(run)) == 4
    assert max(drift(run)) < 1e-6
    child = VLLMProcess(**SIZES)
    alike = build(tmp_path / "child", child)
    alike.train()
    assert tiny.losses(alike) == pytest.approx(tiny.losses(run), rel=1e-3)  # the same seeds, the same completions
    child.stop()

    larger = policy()
    larger.resize_token_embeddings(tiny.VOCAB + 2)
    with pytest.raises(ValueError, match=f"vocab_size={tiny.VOCAB}, and the policy has vocab_size={tiny.VOCAB + 2}"):
        build(tmp_path / "larger", VLLMServer(url), {"model": larger}).train()

    process.kill()
    process.wait()
    with torch.no_grad():
        next(run.policy.parameters()).mul_(2)
    with pytest.raises(EngineError, match=r"cannot be reached .*is the server running\?"):
        run.evaluate(tiny.prompts(2))


def test_the_example_learns(tmp_path: Path) -> None:
    command = [sys.executable, str(ROOT / "examples" / "train_with_vllm.py"), "8"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=500, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    print(done.stdout[-2000:])
    assert done.stdout.count("rollout/sampler_kl") >= 2
