"""Rollouts by an engine: it has the policy's weights whenever it samples, and another model is found out."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from own_engine import OwnEngine
from peft import LoraConfig

from klq_kernels.engines import WeightsLost
from klq_kernels.trainer import EngineRollout, KLQTrainer

pytestmark = pytest.mark.usefixtures("one_thread")
CYCLES = {"max_steps": 6, "num_update_epochs": 2, "logging_steps": 1, "max_completion_length": 6}


def build(folder: Path, engine: OwnEngine, given: dict[str, Any] | None = None, **changes: Any) -> KLQTrainer:
    return tiny.trainer(folder, {"rollout_func": EngineRollout(engine), **(given or {})}, **(CYCLES | changes))


def drift(trained: KLQTrainer) -> list[float]:
    """KL of what sampled to the policy, nats per token, of each cycle."""
    return [logs["rollout/sampler_kl"] for logs in trained.state.log_history if "rollout/sampler_kl" in logs]


@pytest.mark.parametrize(
    ("given", "changes"),
    [
        (dict, {"temperature": 0.7}),
        (dict, {"algorithm": "ppo", "off_policy": "retrace"}),
        (lambda: {"peft_config": LoraConfig(r=2, target_modules=["q_proj", "down_proj"])}, {}),
        (lambda: {"model": tiny.model("gemma2", tie_word_embeddings=True)}, {}),
    ],
    ids=["temperature", "ppo", "lora", "tied, softcap"],
)
def test_the_weights_follow(given: Callable[[], dict[str, Any]], changes: dict[str, Any], tmp_path: Path) -> None:
    engine = OwnEngine()
    run = build(tmp_path, engine, given(), learning_rate=3e-2, **changes)
    before = {name: weight.clone() for name, weight in run.policy_weights()}
    run.train()
    assert any(not torch.equal(weight, before[name]) for name, weight in run.policy_weights())
    assert len(drift(run)) == len(set(engine.versions)) == 3
    assert max(drift(run)) < 1e-9


def test_weights_that_stay_behind_show_in_the_log(tmp_path: Path) -> None:
    engine = OwnEngine()
    run = build(tmp_path, engine, learning_rate=3e-2)
    run.evaluate(tiny.prompts(4))
    engine.deaf = True
    run.train()
    assert max(drift(run)[1:]) > 0.05


def test_an_unchanged_policy_is_not_given_twice(tmp_path: Path) -> None:
    engine = OwnEngine()
    run = build(tmp_path, engine)
    held_out = tiny.prompts(4)
    first = run.evaluate(held_out)
    assert run.evaluate(held_out)["eval_reward"] == first["eval_reward"]
    assert len(engine.versions) == 1
    with torch.no_grad():  # as load_best_model_at_end does, in the same step
        next(run.policy.parameters()).mul_(1.5)
    run.evaluate(held_out)
    assert len(engine.versions) == 2


@pytest.mark.parametrize("optim", ["adamw_torch_fused", "adamw_torch", "sgd"])
def test_a_second_run_begins_with_the_weights_of_now(optim: str, tmp_path: Path) -> None:
    """Steps are counted anew then, and a fused optimizer leaves PyTorch's counters of writes alone."""
    engine = OwnEngine()
    run = build(tmp_path, engine, optim=optim, learning_rate=3e-2)
    run.train()
    run.train()
    assert len(drift(run)) == 3
    assert max(drift(run)) < 1e-9
    assert len(set(engine.versions)) == 6


def test_a_resumed_run_asks_for_the_same_completions(tmp_path: Path) -> None:
    whole, first, second = OwnEngine(), OwnEngine(), OwnEngine()
    expected = build(tmp_path / "whole", whole)
    expected.train()
    build(tmp_path / "cut", first, save_strategy="steps", save_steps=2, max_steps=2).train()
    resumed = build(tmp_path / "cut", second, save_strategy="steps", save_steps=2)
    resumed.train(resume_from_checkpoint=True)
    asked = [r.seeds for r in (*first.requests[1:], *second.requests[1:])]  # the first request of each is the probe
    assert asked == [r.seeds for r in whole.requests[1:]]
    assert len({seed for seeds in asked for seed in seeds}) == 24
    assert tiny.losses(resumed) == tiny.losses(expected)


def test_completions_of_one_prompt_differ(tmp_path: Path) -> None:
    engine = OwnEngine()
    build(tmp_path, engine, num_generations=4, max_steps=2).train()
    _, request = engine.requests
    assert [request.prompt_ids.count(ids) for ids in request.prompt_ids] == [4] * 8
    assert len(set(request.seeds)) == 8


def test_what_an_engine_is_asked(tmp_path: Path) -> None:
    engine = OwnEngine()
    run = build(tmp_path, engine, temperature=0.5, generation_kwargs={"top_k": 5}, max_steps=2)
    run.train()
    probe, request = engine.requests
    assert (request.temperature, request.top_k, request.max_tokens, request.stop_ids) == (0.5, 5, 6, (tiny.EOS,))
    assert (probe.temperature, probe.top_k) == (0.5, 0)  # of the policy's own distribution
    assert engine.models[0].dtype == "float32"
    assert engine.models[0].config.architectures == ["LlamaForCausalLM"]


def test_an_engine_that_lost_the_weights_gets_them_again(tmp_path: Path) -> None:
    expected = build(tmp_path / "undisturbed", OwnEngine())
    expected.train()
    engine = OwnEngine()

    def reward(completion_ids: list[list[int]], **_: Any) -> list[float]:
        engine.lose = 1 if len(engine.versions) == 1 else 0
        return tiny.even(completion_ids)

    run = build(tmp_path / "disturbed", engine, {"reward_funcs": reward})
    run.train()
    assert len(engine.models) == 2
    assert tiny.losses(run) == tiny.losses(expected)
    engine.lose = 2
    with pytest.raises(WeightsLost):
        run.evaluate(tiny.prompts(4))
    started = len(engine.models)
    run.evaluate(tiny.prompts(4))  # another attempt begins with another start
    assert len(engine.models) == started + 1


@pytest.mark.parametrize(
    ("engine", "message"),
    [
        (OwnEngine(vocab_size=300), "vocab_size=300, and the policy has vocab_size=258.*serve that"),
        (OwnEngine(num_hidden_layers=3), "num_hidden_layers=3"),
        (OwnEngine(max_length=8), "takes 8 tokens at most, and a prompt of .* with a completion of 6"),
    ],
    ids=["vocabulary", "layers", "length"],
)
def test_another_model_is_refused(engine: OwnEngine, message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=f"engine: .*{message}"):
        build(tmp_path, engine).train()


def test_other_weights_of_the_same_shape_are_refused(tmp_path: Path) -> None:
    engine = OwnEngine()
    engine.deaf = True
    with pytest.raises(ValueError, match="nats per token from the policy's, under the policy's weights"):
        build(tmp_path, engine).train()


def test_arguments_that_do_not_fit(tmp_path: Path) -> None:
    for changes, message in (
        ({"engine": "sglang"}, "engine: must be one of transformers, vllm"),
        ({"engine": "vllm", "engine_timeout": 0.0}, "engine_timeout"),
        ({"engine": "vllm", "generation_kwargs": {"num_beams": 2}}, "generation_kwargs: has num_beams"),
    ):
        with pytest.raises(ValueError, match=message):
            tiny.arguments(tmp_path, **changes)
    with pytest.raises(ValueError, match="rollout_func: samples in place of engine='vllm'"):
        tiny.trainer(tmp_path, {"rollout_func": EngineRollout(OwnEngine())}, engine="vllm")
    with pytest.raises(ValueError, match="url: must be the address of a server"):
        tiny.trainer(tmp_path, engine="vllm", engine_url="localhost:8000")
    with pytest.warns(UserWarning, match="engine_url: has no effect on engine='transformers'"):
        tiny.arguments(tmp_path, engine_url="http://127.0.0.1:8000")
