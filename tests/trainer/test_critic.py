"""What is particular to V: its warm-up and its lambda; and the scales of scores and lambda-errors."""

from __future__ import annotations

import itertools
import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import tiny
import torch
from peft import LoraConfig
from torch import Tensor

from klq_kernels import reference
from klq_kernels.trainer import Completions, KLQTrainer
from klq_kernels.trainer.data import keep_short
from klq_kernels.trainer.running import Running

pytestmark = pytest.mark.usefixtures("one_thread")


def parameters(run: KLQTrainer) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in run.actor_critic.named_parameters()}


def series(run: KLQTrainer, name: str) -> list[float]:
    return [logs[name] for logs in run.state.log_history if name in logs]


# ---- warm-up --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("given", "changes"),
    [
        ({}, {}),
        ({}, {"algorithm": "ppo"}),
        ({}, {"weight_decay": 0.1, "gradient_accumulation_steps": 2, "per_device_train_batch_size": 4}),
        ({"value_model": "own"}, {}),
        ({"peft_config": LoraConfig(r=2, target_modules=["q_proj", "lm_head"], task_type="CAUSAL_LM")}, {}),
    ],
    ids=["klq", "ppo", "decay", "value_model", "lora"],
)
def test_the_value_function_alone_learns_at_first(
    given: dict[str, Any], changes: dict[str, Any], tmp_path: Path
) -> None:
    if "value_model" in given:
        given = {"value_model": tiny.classifier()}
    if "peft_config" in given:
        given = given | {"model": tiny.model(tie_word_embeddings=False)}
    run = tiny.trainer(tmp_path, dict(given), max_steps=8, value_warmup_steps=4, logging_steps=1, **changes)
    seen: list[dict[str, Tensor]] = []
    training_step = run.training_step

    def record(*args: Any, **kwargs: Any) -> Any:
        seen.append(parameters(run))
        return training_step(*args, **kwargs)

    run.training_step = record  # type: ignore[method-assign]
    run.train()
    seen = seen[:: run.args.gradient_accumulation_steps]
    moved = [
        {name for name in before if not torch.equal(before[name], after[name])}
        for before, after in itertools.pairwise([*seen, parameters(run)])
    ]
    assert not any(name.startswith("policy.") for names in moved[:4] for name in names)
    assert all("value.head.weight" in names for names in moved)
    assert all(any(name.startswith("policy.") for name in names) for names in moved[4:])
    if "value_model" in given:
        assert any("value.backbone" in name for name in moved[1])


def test_a_warm_start_leaves_no_trace_in_the_optimiser(tmp_path: Path) -> None:
    """The first step of the policy is Adam's first: as large as it would have been without the warm-up."""
    run = tiny.trainer(tmp_path, max_steps=5, value_warmup_steps=4, learning_rate=1e-3)
    before = run.policy.lm_head.weight.detach().clone()
    run.train()
    step = (run.policy.lm_head.weight.detach() - before).abs()
    assert step.max().item() == pytest.approx(1e-3, rel=1e-2)
    assert run.optimizer.state[run.policy.lm_head.weight]["step"] == 1


# ---- lambda ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("algorithm", ["klq", "ppo"])
def test_values_have_a_lambda_of_their_own(algorithm: str, tmp_path: Path) -> None:
    script = [[5, 6, 7, tiny.EOS], [9, 8, tiny.EOS]]
    run = tiny.trainer(
        tmp_path, {"rollout_func": lambda prompts, trainer: Completions(script)}, algorithm=algorithm, lam=0.5,
        value_lam=1.0, whiten_advantages=algorithm == "klq",
    )  # fmt: skip
    torch.nn.init.normal_(run.actor_critic.value.head.weight)
    experience = run.collect(tiny.prompts(2))
    logp, values, errors = (t.double() for t in experience.targets)
    cu_seqlens = torch.tensor([0, 4, 7], dtype=torch.int32)
    for lam, found in ((1.0, errors), (0.5, experience.advantages.double())):
        expected = reference.klq_targets(
            logp, experience.ref_logprobs.double(), values, torch.tensor(tiny.even(script)).double(), tau=0.05, lam=lam,
            cu_seqlens=cu_seqlens,
        ).advantages  # fmt: skip
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


# ---- scales ---------------------------------------------------------------------------------------------------------


def one_process() -> Any:
    return SimpleNamespace(reduce=lambda rows, reduction: rows, device=torch.device("cpu"))


def test_running_moments_are_weighted_means_of_cycles() -> None:
    torch.manual_seed(0)
    cycles, running = [torch.randn(n) * n for n in (5, 9, 3)], Running()
    for cycle in cycles:
        running.update(cycle, one_process())
        running.update(cycle[:0], one_process())  # nothing is no cycle
    weights = torch.tensor([0.81, 0.9, 1.0]).double()
    mean, square = (
        (weights * torch.stack([f(c.double()) for c in cycles])).sum() / weights.sum()
        for f in (torch.mean, lambda c: c.square().mean())
    )
    assert running.rms == pytest.approx(square.sqrt().item())
    assert running.deviation == pytest.approx((square - mean**2).sqrt().item())
    again = Running()
    again.load_state(running.state())
    assert (again.rms, again.deviation) == (running.rms, running.deviation)


def test_scores_are_scaled_and_clipped_before_they_become_errors(tmp_path: Path) -> None:
    script, scores = [[5, tiny.EOS], [7, tiny.EOS], [9, 8]], [100.0, -300.0, 0.0]
    run = tiny.trainer(
        tmp_path,
        {"rollout_func": lambda prompts, trainer: Completions(script), "reward_funcs": lambda **_: list(scores)},
        scale_rewards=True, reward_clip=1.2, missing_eos_penalty=50.0, bootstrap_truncated=False, tau=0.5,
    )  # fmt: skip
    found = []
    for _ in range(2):
        experience = run.collect(tiny.prompts(3))
        found.append(experience.advantages[[1, 3, 5]])  # of the last tokens: V is 0 and pi the reference
    earned = torch.tensor([100.0, -300.0, -50.0])
    expected = (earned / earned.std(correction=0)).clamp(-1.2, 1.2)
    torch.testing.assert_close(found[0], expected, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(found[1], expected, rtol=1e-4, atol=1e-4)
    logged = run.means.drain(run.accelerator)
    assert logged["objective/scores"] == pytest.approx(earned.mean().item())  # the log has them as they were given
    assert logged["objective/reward_scale"] == pytest.approx(earned.std(correction=0).item(), rel=1e-5)


def test_equal_scores_are_not_blown_up(tmp_path: Path) -> None:
    run = tiny.trainer(
        tmp_path, {"reward_funcs": lambda completions, **_: [2.0] * len(completions)}, scale_rewards=True
    )
    assert run.collect(tiny.prompts(4)).advantages.abs().max() < 2.1


@pytest.mark.parametrize(("largest", "share"), [(1e3, 1.0), (0.01, None)])
def test_a_wide_spread_shortens_the_step(largest: float, share: float | None, tmp_path: Path) -> None:
    run = tiny.trainer(tmp_path, advantage_spread=largest, alpha=0.8)
    torch.nn.init.normal_(run.actor_critic.value.head.weight)
    experience = run.collect(tiny.prompts(8))
    rms = experience.advantages.square().mean().sqrt().item()
    expected = reference.step_towards(0.8, rms, largest)
    assert 0.8 * experience.step == pytest.approx(expected, rel=1e-5)
    assert experience.step == (share or pytest.approx(largest / rms, rel=1e-5))
    part = experience.select(torch.tensor([3, 1]))
    loss = run.compute_loss(run.actor_critic, (part, torch.tensor(1.0), 0))
    assert loss.item() == pytest.approx((expected * part.advantages).square().sum().item(), rel=1e-3)


def test_shorter_steps_lead_to_the_same_fixed_point_and_whitened_ones_do_not() -> None:
    """Steps of eq. 7, in expectation, on a problem of three choices among three: Q = tau rho + V after each."""
    torch.manual_seed(0)
    tau, lam, actions, steps = 0.3, 0.9, 3, 3
    paths = torch.tensor(list(itertools.product(range(actions), repeat=steps)))
    states = torch.stack([torch.zeros(27), 1 + paths[:, 0], 4 + 3 * paths[:, 0] + paths[:, 1]], 1).long()
    base = torch.randn(13, actions).double().log_softmax(1)
    rewards = torch.randn(13, actions).double()[states, paths] * 3

    def improved(kind: str) -> tuple[Tensor, Tensor]:
        logp, values, spread = base, torch.zeros(13).double(), Running()
        for _ in range(150):
            taken, ref = logp[states, paths], base[states, paths]
            errors = reference.klq_targets(taken, ref, values[states], rewards, tau=tau, lam=lam).advantages
            weights = taken.sum(1, keepdim=True).exp().expand(-1, 3)
            if kind == "whitened":
                mean = (weights * errors).sum() / weights.sum()
                errors = (errors - mean) / ((weights * (errors - mean).square()).sum() / weights.sum()).sqrt()
            spread.update(errors, one_process())
            alpha = reference.step_towards(1.0, spread.rms, 0.25) if kind == "spread" else 1.0
            at = (states * actions + paths).flatten()
            total, count = (
                torch.zeros(13 * actions).double().index_add_(0, at, x.flatten()) for x in (weights * errors, weights)
            )
            q = tau * (logp - base) + values[:, None] + alpha * (total / count).view(13, actions)
            values = tau * (base + q / tau).logsumexp(1)
            logp = base + (q - values[:, None]) / tau
        return logp, values

    exact, whitened, spread = (improved(kind) for kind in ("plain", "whitened", "spread"))
    for ours, theirs in zip(spread, exact, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-6)
    best = (base[4:] + rewards[:, 2].reshape(9, 3) / tau).logsumexp(1) * tau  # V of the states before the last choice
    torch.testing.assert_close(exact[1][4:], best, rtol=1e-6, atol=1e-6)
    assert (whitened[1] - exact[1]).abs().max() > 0.1


# ---- together -------------------------------------------------------------------------------------------------------


def test_a_run_resumes_exactly(tmp_path: Path) -> None:
    settings: dict[str, Any] = {
        "num_generations": 2, "value_warmup_steps": 2, "value_lam": 0.5, "scale_rewards": True, "advantage_spread": 0.05
    }  # fmt: skip
    settings |= {"save_strategy": "steps", "save_steps": 5, "logging_steps": 1, "max_steps": 12}
    whole, resumed = (tiny.trainer(tmp_path / name, **settings) for name in ("whole", "resumed"))
    whole.train()
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-5"))
    assert tiny.losses(resumed) == tiny.losses(whole)
    for name in ("objective/reward_scale", "loss/step"):
        assert series(resumed, name) == series(whole, name)
    assert len({*series(whole, "loss/step")}) == 3


# ---- prompts --------------------------------------------------------------------------------------------------------


def test_the_template_gets_its_arguments(tmp_path: Path) -> None:
    tokenizer = tiny.tokenizer(chat=True)
    tokenizer.chat_template += "{% if thinking is defined and not thinking %}<think></think>{% endif %}"
    chat = [{"role": "user", "content": "hi"}]
    for given, expected in ((None, "<user>hi<assistant>"), ({"thinking": False}, "<user>hi<assistant><think></think>")):
        run = tiny.trainer(tmp_path, {"processing_class": tokenizer}, chat_template_kwargs=given)
        assert tokenizer.decode(run.tokenize(chat)) == expected
    datasets = pytest.importorskip("datasets")
    rows = datasets.Dataset.from_list([{"prompt": chat}, {"prompt": [{"role": "user", "content": ""}]}])
    assert len(keep_short(rows, tokenizer, 34, {"thinking": False})) == 2
    assert len(keep_short(rows, tokenizer, 33, {"thinking": False})) == 1


def test_streams_are_refused_with_what_to_do(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    stream = datasets.Dataset.from_list(tiny.prompts(4)).to_iterable_dataset()
    with pytest.raises(ValueError, match=r"^train_dataset: must have a length.*Dataset\.from_list\(list\(stream\.take"):
        tiny.trainer(tmp_path, {"train_dataset": stream})


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("value_warmup_steps", -1),
        ("value_warmup_steps", 0.5),
        ("value_lam", 1.5),
        ("reward_clip", 0.0),
        ("advantage_spread", math.inf),
        ("chat_template_kwargs", {"tokenize": False}),
    ],
)
def test_bad_options_are_named(name: str, value: Any, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=f"^{name}: "):
        tiny.arguments(tmp_path, **{name: value})


def test_the_spread_is_klqs(tmp_path: Path) -> None:
    with pytest.warns(UserWarning, match="advantage_spread: has no effect on algorithm='ppo'"):
        tiny.arguments(tmp_path, algorithm="ppo", advantage_spread=0.5)
