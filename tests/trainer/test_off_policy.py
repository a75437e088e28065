"""Samples of another policy than the one that learns: the oracle of their correction, its logs and its warning."""

from __future__ import annotations

import itertools
import math
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from accelerate import Accelerator
from engine import Engine
from torch import Tensor

from klq_kernels import klq_targets, reference
from klq_kernels.trainer import Completions, KLQTrainer
from klq_kernels.trainer.callbacks import FailureWatch
from klq_kernels.trainer.means import Means
from klq_kernels.trainer.off_policy import importance_trace, trusted
from klq_kernels.trainer.rollout import check_completions

pytestmark = pytest.mark.usefixtures("one_thread")

TREE = (3, 3)  # actions, steps
Path3 = tuple[int, ...]


def series(run: KLQTrainer, name: str) -> list[float]:
    return [logs[name] for logs in run.state.log_history if name in logs]


class Tree:
    """A problem small enough to be enumerated: each history of actions is a state; rewards and policies are random."""

    def __init__(self, seed: int = 0) -> None:
        generator = torch.Generator().manual_seed(seed)
        actions, self.steps = TREE
        self.actions = range(actions)
        states = [s for t in range(self.steps) for s in itertools.product(self.actions, repeat=t)]
        self.reward = {(s, a): torch.randn((), generator=generator).item() for s in states for a in self.actions}
        self.pi, self.mu, self.base = (
            {s: torch.randn(actions, generator=generator).double().softmax(0) for s in states} for _ in range(3)
        )
        self.value = {s: torch.randn((), generator=generator).item() for s in states}

    def paths(self, first: int) -> list[Path3]:
        return [(first, *rest) for rest in itertools.product(self.actions, repeat=self.steps - 1)]

    def along(self, path: Path3, policy: dict[Path3, Tensor]) -> Tensor:
        """log policy of each action of the path, [1, T]."""
        return torch.stack([policy[path[:t]][a] for t, a in enumerate(path)]).log()[None]


def errors(tree: Tree, path: Path3, pi: dict[Path3, Tensor], *, tau: float, gamma: float, lam: float, clip: float):
    logp, mu = tree.along(path, pi), tree.along(path, tree.mu)
    rewards = torch.tensor([[tree.reward[path[:t], a] for t, a in enumerate(path)]], dtype=torch.float64)
    values = torch.tensor([[tree.value[path[:t]] for t in range(len(path))]], dtype=torch.float64)
    trace = reference.importance_trace(logp, mu, clip=clip)
    return reference.klq_targets(
        logp, tree.along(path, tree.base), values, rewards, tau=tau, gamma=gamma, lam=lam, trace=trace
    )


def test_the_traced_target_is_unbiased_where_nothing_is_clipped() -> None:
    """Over the samples of mu its mean is the return of pi, with the price of KL from the second token on."""
    tree, tau, gamma = Tree(), 0.3, 0.9

    def value(state: Path3) -> float:
        if len(state) == tree.steps:
            return 0.0
        log_ratio = (tree.pi[state] / tree.base[state]).log()
        return sum(
            tree.pi[state][a].item() * (tree.reward[state, a] - tau * log_ratio[a].item() + gamma * value((*state, a)))
            for a in tree.actions
        )

    for first in tree.actions:
        mean = 0.0
        for path in tree.paths(first):
            found = errors(tree, path, tree.pi, tau=tau, gamma=gamma, lam=1.0, clip=math.inf)
            q = tau * (tree.pi[()][first] / tree.base[()][first]).log() + tree.value[()]
            weight = tree.along(path, tree.mu)[0, 1:].sum().exp()
            mean += (weight * (q + found.advantages[0, 0])).item()
        assert mean == pytest.approx(tree.reward[(), first] + gamma * value((first,)), rel=1e-9)


def test_the_optimal_policy_has_no_error_whoever_samples() -> None:
    tree, tau, gamma = Tree(1), 0.3, 0.9
    optimal: dict[Path3, Tensor] = {}
    for state in sorted(tree.base, key=len, reverse=True):
        after = [0.0 if len(state) + 1 == tree.steps else tree.value[(*state, a)] for a in tree.actions]
        q = torch.tensor([tree.reward[state, a] + gamma * after[a] for a in tree.actions], dtype=torch.float64)
        tree.value[state] = (tau * (tree.base[state].log() + q / tau).logsumexp(0)).item()
        optimal[state] = tree.base[state] * ((q - tree.value[state]) / tau).exp()
    for first, clip in itertools.product(tree.actions, (0.5, 1.0, 2.0)):
        for path in tree.paths(first):
            found = errors(tree, path, optimal, tau=tau, gamma=gamma, lam=0.9, clip=clip)
            assert found.advantages.abs().max() < 1e-12


def test_weighted_errors_are_those_of_v_trace() -> None:
    torch.manual_seed(0)
    logp, mu, ref = (torch.randn(3, 6, dtype=torch.float64).neg().clamp(max=-0.1) for _ in range(3))
    rewards, values, last = torch.randn(3, 6).double(), torch.randn(3, 6).double(), torch.randn(3).double()
    trace = reference.importance_trace(logp, mu, clip=1.3)
    found = klq_targets(
        logp.float(), ref.float(), values.float(), rewards.float(), tau=0.2, gamma=0.9, lam=0.8,
        trace=importance_trace(logp.float(), mu.float(), 1.3), bootstrap_values=last.float(),
    )  # fmt: skip
    for row in range(3):
        expected = reference.vtrace_targets(
            rewards[row] - 0.2 * (logp - ref)[row], values[row], trace[row], gamma=0.9, lam=0.8,
            last_value=last[row].item(),
        )  # fmt: skip
        targets = values[row] + trace[row] * found.advantages[row].double()
        torch.testing.assert_close(targets, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("divergence", ["tv", "kl"])
def test_the_mask_is_that_of_the_oracle(divergence: str) -> None:
    torch.manual_seed(1)
    logp, mu = (torch.rand(4000).clamp(min=1e-4).log() for _ in range(2))
    logp[:5], mu[:5] = torch.tensor([-1e-7, -40.0, -1e-3, -0.5, 0.0]), torch.tensor([-40.0, -1e-7, -1e-3, 0.0, 0.0])
    advantages = torch.randn(4000)
    kept = trusted(logp, mu, advantages, divergence, 0.1)
    variable = logp.double().requires_grad_()
    oracle = reference.dppo_policy_loss(
        variable, mu.double(), advantages.double(), divergence=divergence, delta=0.1, clip=math.inf
    )
    oracle.sum().backward()
    assert variable.grad is not None
    assert torch.equal(kept, variable.grad != 0)
    assert 0.2 < kept.float().mean() < 0.9


def test_a_ratio_that_would_overflow_is_clipped() -> None:
    assert importance_trace(torch.tensor([-0.1]), torch.tensor([-1e4]), 20.0).item() == pytest.approx(20.0)


def trainer(folder: Path, **changes: Any) -> KLQTrainer:
    given = {"rollout_func": Engine()}
    return tiny.trainer(folder, given, **({"off_policy": "retrace", "max_steps": 4} | changes))


def collected(run: KLQTrainer) -> Any:
    """The experience of a policy that has moved away from its sampler."""
    torch.nn.init.normal_(run.actor_critic.value.head.weight)
    with torch.no_grad():
        run.policy.lm_head.weight.add_(0.3 * torch.randn_like(run.policy.lm_head.weight))
    return run.collect(tiny.prompts(8))


def packed(experience: Any) -> Tensor:
    return torch.tensor([0, *experience.rows.tolist()]).cumsum(0).int()


def test_the_targets_carry_the_trace(tmp_path: Path) -> None:
    run = trainer(tmp_path, trace_clip=1.2, lam=0.9)
    experience = collected(run)
    logp, values, found = (t.double() for t in experience.targets)
    trace = reference.importance_trace(logp, experience.sampler_logprobs.double(), clip=1.2)
    assert 0.1 < (trace < 1.2).double().mean() < 0.95
    cu_seqlens = packed(experience)
    score = torch.tensor(tiny.even([s.completion.tolist() for s in experience.sequences])).double()
    expected = reference.klq_targets(
        logp, experience.ref_logprobs.double(), values, score, tau=0.05, lam=0.9, trace=trace, cu_seqlens=cu_seqlens
    )
    torch.testing.assert_close(found, expected.advantages, rtol=1e-4, atol=1e-5)


def test_ppo_learns_by_dppos_loss_and_v_traces_values(tmp_path: Path) -> None:
    run = trainer(
        tmp_path, algorithm="ppo", trace_clip=1.1, importance_clip=1.5, dppo_delta=0.02, whiten_advantages=False
    )
    experience = collected(run)
    with torch.no_grad():  # away from the rollout, but less than the clip of the value loss
        run.policy.lm_head.weight.add_(0.1 * torch.randn_like(run.policy.lm_head.weight))
    count = float(experience.rows.sum())
    loss, metrics = run.compute_loss(run.actor_critic, (experience, torch.tensor(count), 0), return_outputs=True)
    logp = torch.cat(
        [
            reference.linear_logprobs(
                run.policy.model(s.ids[None]).last_hidden_state[0, len(s.prompt) - 1 : -1],
                run.policy.lm_head.weight,
                s.completion,
            ).logprobs
            for s in experience.sequences
        ]
    )
    old, values, errors = experience.targets
    sampler = experience.sampler_logprobs
    policy = reference.dppo_policy_loss(logp, sampler, experience.advantages, clip=1.5, delta=0.02)
    returns = values + reference.importance_trace(old, sampler, clip=1.1) * errors
    expected = (policy + 0.1 * 0.5 * (values - returns).square()).sum() / count
    torch.testing.assert_close(loss, expected, rtol=1e-4, atol=1e-5)
    ours, theirs = (torch.autograd.grad(x, run.policy.lm_head.weight)[0] for x in (loss, expected))
    torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-5)
    assert 0 < metrics["policy_clip_fraction"] < 1


@pytest.mark.parametrize("algorithm", ["klq", "ppo"])
def test_a_sampler_that_is_the_policy_changes_nothing(algorithm: str, tmp_path: Path) -> None:
    """Its weights are 1: KLQ learns as without the correction, and PPO has the targets that it would have."""
    advantages = []
    for off_policy in ("none", "retrace"):
        run = trainer(tmp_path, algorithm=algorithm, off_policy=off_policy, num_update_epochs=1, max_steps=1)
        run.train()
        advantages.append(run.experience.targets.advantages)  # type: ignore[union-attr]
        assert series(run, "rollout/ess")[0] == pytest.approx(1.0, abs=1e-6)
    torch.testing.assert_close(*advantages, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("algorithm", ["klq", "ppo"])
def test_a_run_resumes_in_the_middle_of_a_cycle_with_its_sampler(algorithm: str, tmp_path: Path) -> None:
    config = {
        "max_steps": 8, "save_strategy": "steps", "save_steps": 5, "logging_steps": 1, "algorithm": algorithm,
        "learning_rate": 1e-2,
    }  # fmt: skip
    whole, resumed = (trainer(tmp_path / name, **config) for name in ("whole", "resumed"))
    whole.train()
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-5"))
    assert tiny.losses(resumed) == tiny.losses(whole)
    assert series(resumed, "rollout/ess") == series(whole, "rollout/ess")
    assert 0 < series(whole, "rollout/ess")[-1] < 0.999


def test_drift_and_staleness_are_logged(tmp_path: Path) -> None:
    run = trainer(tmp_path, max_steps=8, learning_rate=1e-2)
    run.train()
    kl, ess = series(run, "rollout/sampler_kl"), series(run, "rollout/ess")
    assert series(run, "rollout/staleness") == [0.0, 1.0]
    assert series(run, "rollout/staleness_max") == [0.0, 1.0]
    assert kl[0] < 1e-6 < kl[1]
    assert ess[1] < ess[0] <= 1.0


def test_the_effective_share_is_that_of_all_samples() -> None:
    weights, means = torch.rand(100), Means()
    for part in weights.split(17):
        means.add_effective("ess", part)
    expected = weights.sum() ** 2 / (100 * weights.square().sum())
    assert means.drain(Accelerator(cpu=True))["ess"] == pytest.approx(expected.item(), rel=1e-6)


@pytest.mark.parametrize(
    ("logs", "off_policy", "seen"),
    [
        ({"rollout/sampler_kl": 0.05, "rollout/staleness": 8.0}, "none", None),
        ({"rollout/sampler_kl": 0.2}, "none", "0.2 nats per token"),
        ({"rollout/sampler_kl": 0.2}, "retrace", None),
        ({"rollout/staleness": 8.0}, "none", "weights 8.0 cycles old"),
        ({"rollout/staleness": 2.0}, "none", None),
    ],
)
def test_stale_samples_are_warned_of(logs: dict[str, float], off_policy: str, seen: str | None, tmp_path: Path) -> None:
    run = tiny.trainer(tmp_path)
    watch = FailureWatch(tiny.arguments(tmp_path, off_policy=off_policy))
    healthy = {"loss": 0.1, "objective/kl": 1.0, "objective/scores": 0.5, "completions/mean_length": 20.0}
    watch.on_log(run.args, run.state, run.control, healthy | logs)
    assert list(watch.warned) == ([] if seen is None else ["stale samples"])
    assert watch.warned.get("stale samples", "").startswith(seen or "")


# ---- bad input ------------------------------------------------------------------------------------------------------


def test_a_correction_needs_the_samplers_log_probs(tmp_path: Path) -> None:
    run = trainer(tmp_path)
    run.rollout_func = lambda prompts, trainer: Completions([[5, tiny.EOS]] * len(prompts))
    with pytest.raises(ValueError, match=r"^off_policy: 'retrace' needs the log-probabilities .* have no logprobs"):
        run.train()
    with pytest.raises(ValueError, match=r"^off_policy: 'retrace' corrects for a rollout_func or for replay_cycles"):
        tiny.trainer(tmp_path, off_policy="retrace")


@pytest.mark.parametrize(
    ("completions", "message"),
    [
        (Completions([[1], [2]], logprobs=[[math.nan], [-1.0]]), r"logprobs\[0\]: must be finite"),
        (Completions([[1], [2]], logprobs=[[-1.0], [-math.inf]]), r"logprobs\[1\]: must be finite"),
        (Completions([[1], [2]], logprobs=[[-1.0], [0.5]]), r"logprobs\[1\]: must be logarithms"),
        (Completions([[1], [2]], staleness=-1), "staleness: must be an int or float in"),
        (Completions([[1], [2]], staleness=[1.0]), "staleness: must have 2 entries"),
    ],
)
def test_what_a_sampler_says_is_checked(completions: Completions, message: str) -> None:
    with pytest.raises(ValueError, match=f"^rollout_func: {message}"):
        check_completions(completions, [[1], [2]], {1}, 9)


def test_a_tool_has_no_log_probs() -> None:
    tool = Completions([[1, 2, 3]], logprobs=[[-1.0, math.nan, -2.0]], trained=[[True, False, True]])
    sampled = check_completions(tool, [[1]], {1}, 9).sampler_logprobs
    assert sampled is not None
    assert sampled.tolist() == [-1.0, -2.0]


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("off_policy", "vtrace"),
        ("trace_clip", 0.0),
        ("importance_clip", -1.0),
        ("dppo_divergence", "js"),
        ("dppo_delta", 0.0),
    ],
)
def test_bad_options_are_named(name: str, value: Any, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=f"^{name}: "):
        tiny.arguments(tmp_path, **({"algorithm": "ppo", "off_policy": "retrace"} | {name: value}))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"trace_clip": 2.0}, "trace_clip: has no effect on off_policy='none'"),
        ({"dppo_delta": 0.1}, "dppo_delta: has no effect on algorithm='klq'"),
        ({"dppo_delta": 0.1, "algorithm": "ppo"}, "dppo_delta: has no effect on off_policy='none'"),
        ({"cliprange": 0.1, "algorithm": "ppo", "off_policy": "retrace"}, "cliprange: has no effect on off_policy='re"),
    ],
)
def test_options_without_effect_are_warned_of(changes: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.warns(UserWarning, match=message):
        tiny.arguments(tmp_path, **changes)
