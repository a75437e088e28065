"""Several completions for a prompt: who samples them, their baseline against the oracle, and what stays unbiased."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from torch import Tensor

from klq_kernels import reference
from klq_kernels.trainer import Completions, KLQTrainer
from klq_kernels.trainer.targets import group_offsets

pytestmark = pytest.mark.usefixtures("one_thread")


def test_the_policy_gradient_stays_unbiased() -> None:
    """Over all groups of three of a problem of two binary choices, with a V that is wrong everywhere."""
    torch.manual_seed(0)
    logits = torch.randn(3, 2, dtype=torch.float64, requires_grad=True)  # of the states (), (0,), (1,)
    base, values = torch.randn(3, 2).double().log_softmax(1), torch.randn(3).double()
    paths = list(itertools.product(range(2), repeat=2))
    score = torch.randn(4).double()
    states = torch.tensor([[0, 1 + first] for first, _ in paths])
    logp = logits.log_softmax(1)[states, torch.tensor(paths)]  # [4, 2], a row for each path
    ref = base[states, torch.tensor(paths)]

    def errors(v: Tensor) -> Tensor:
        return reference.klq_targets(logp.detach(), ref, v, score, tau=0.3, lam=1.0).advantages

    probability, mean = logp.sum(1).exp(), logits.new_zeros(())
    exact = (probability * (score - 0.3 * (logp - ref).sum(1))).sum()
    alone = errors(values[states])[:, 0]
    for group in itertools.product(range(4), repeat=3):
        chosen = torch.tensor(group)
        offsets = reference.group_offsets(alone[chosen], 3)
        for i, at in enumerate(group):
            own = errors(values[states] + offsets[i])
            mean = mean + probability[chosen].prod().detach() * (own[at] * logp[at]).sum() / 3
    ours, theirs = (torch.autograd.grad(x, logits, retain_graph=True)[0] for x in (mean, exact))
    torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-12)


def test_with_whole_returns_it_is_the_leave_one_out_baseline() -> None:
    torch.manual_seed(1)
    logp, ref, values = (torch.randn(4, 3).double() for _ in range(3))
    values[:, 0] = values[0, 0]  # V of the prompt that all share
    score = torch.randn(4).double()
    settings: dict[str, Any] = {"tau": 0.2, "lam": 1.0}
    plain = reference.klq_targets(logp, ref, values, score, **settings).advantages
    offsets = reference.group_offsets(plain[:, 0], 4)
    ours = reference.klq_targets(logp, ref, values + offsets[:, None], score, **settings).advantages
    returns = score - 0.2 * (logp - ref).sum(1)
    others = (returns.sum() - returns) / 3
    spent = 0.2 * (logp - ref)
    before = torch.cat([torch.zeros(4, 1).double(), spent.cumsum(1)[:, :-1]], 1)  # the price of the tokens so far
    expected = (returns - others)[:, None] + before - (values - values[:, :1])
    torch.testing.assert_close(ours, expected)


@pytest.mark.parametrize("size", [1, 2, 4])
def test_offsets_are_those_of_the_oracle(size: int) -> None:
    errors = torch.randn(8)
    expected = reference.group_offsets(errors, size)
    torch.testing.assert_close(group_offsets(errors, torch.ones(8, dtype=torch.bool), size), expected)


def test_completions_that_were_skipped_count_for_nothing() -> None:
    errors, present = torch.tensor([1.0, 2.0, 9.0, 4.0]), torch.tensor([True, True, False, False])
    assert group_offsets(errors, present, 2).tolist() == [2.0, 1.0, 0.0, 0.0]
    assert group_offsets(errors, present, 4).tolist() == [2.0, 1.0, 1.5, 1.5]


SCRIPT = [[5, 6, 7, tiny.EOS], [9, 8], [4, tiny.EOS], [12, 13, 14, 15]]


def scripted(prompts: list[str], trainer: KLQTrainer) -> Completions:
    return Completions([SCRIPT[i % 4] for i in range(len(prompts))])


@pytest.mark.parametrize("bootstrap", [True, False])
@pytest.mark.parametrize("algorithm", ["klq", "ppo"])
def test_policy_and_values_learn_from_their_own_errors(algorithm: str, bootstrap: bool, tmp_path: Path) -> None:
    run = tiny.trainer(
        tmp_path, {"rollout_func": scripted}, algorithm=algorithm, num_generations=4, lam=0.8,
        bootstrap_truncated=bootstrap, whiten_advantages=algorithm == "klq",
    )  # fmt: skip
    torch.nn.init.normal_(run.actor_critic.value.head.weight)
    experience = run.collect(tiny.prompts(2))
    rows = experience.rows
    cu_seqlens = torch.tensor([0, *rows.tolist()]).cumsum(0).int()
    logp, values, errors = (t.double() for t in experience.targets)
    cut = torch.tensor([False, True, False, True] * 2) & bootstrap
    with torch.no_grad():
        last = torch.stack(
            [run.actor_critic.value.head(run.policy.model(s.ids[None]).last_hidden_state[0, -1])[0]
             for s in experience.sequences]
        ).double()  # fmt: skip
    score = torch.tensor(tiny.even(SCRIPT * 2)).double().where(~cut, 0.0)

    def oracle(lam: float, shift: Tensor) -> Tensor:
        return reference.klq_targets(
            logp, experience.ref_logprobs.double(), values + shift.repeat_interleave(rows), score, tau=0.05, lam=lam,
            bootstrap_values=(last + shift) * cut, cu_seqlens=cu_seqlens,
        ).advantages  # fmt: skip

    zero = torch.zeros(8).double()
    offsets = reference.group_offsets(oracle(1.0, zero)[cu_seqlens[:-1].long()], 4)
    torch.testing.assert_close(errors, oracle(0.8, zero), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(experience.advantages.double(), oracle(0.8, offsets), rtol=1e-4, atol=1e-5)
    assert (experience.advantages - experience.targets.advantages).abs().max() > 0.01


@pytest.mark.parametrize("loss_type", ["l2", "huber", "double_clipped"])
def test_the_loss_of_two_errors_is_that_of_the_oracle(loss_type: str, tmp_path: Path) -> None:
    run = tiny.trainer(
        tmp_path, {"rollout_func": scripted}, num_generations=4, loss_type=loss_type, value_gradient=1.0, alpha=0.7
    )
    experience = run.collect(tiny.prompts(2))
    torch.nn.init.normal_(run.actor_critic.value.head.weight, std=0.1)
    count = float(experience.rows.sum())
    loss = run.compute_loss(run.actor_critic, (experience, torch.tensor(count), 0))
    logps, values = [], []
    for s in experience.sequences:
        hidden = run.policy.model(s.ids[None]).last_hidden_state[0, len(s.prompt) - 1 : -1]
        logps.append(reference.linear_logprobs(hidden, run.policy.lm_head.weight, s.completion).logprobs)
        values.append(run.actor_critic.value.head(hidden).squeeze(1))
    old, old_values, errors = experience.targets
    expected = reference.split_residual_loss(
        torch.cat(logps) - old, torch.cat(values) - old_values, experience.advantages, errors, loss_type=loss_type,
        tau=0.05, alpha=0.7,
    ).sum() / count  # fmt: skip
    torch.testing.assert_close(loss, expected, rtol=1e-4, atol=1e-6)
    weights = [run.policy.lm_head.weight, run.policy.model.norm.weight, run.actor_critic.value.head.weight]
    for ours, theirs in zip(torch.autograd.grad(loss, weights), torch.autograd.grad(expected, weights), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-6)


def test_split_losses_with_equal_errors_have_the_gradient_of_the_one() -> None:
    torch.manual_seed(0)
    d, v = (torch.randn(20, dtype=torch.float64, requires_grad=True) for _ in range(2))
    errors = torch.randn(20).double()
    for loss_type in ("l2", "huber", "value_clipped"):
        one = reference.klq_residual_loss(d, v, errors, loss_type=loss_type)
        two = reference.split_residual_loss(d, v, errors, errors, loss_type=loss_type)
        torch.testing.assert_close(one, two)
        for a, b in zip(*(torch.autograd.grad(x.sum(), (d, v)) for x in (one, two)), strict=True):
            torch.testing.assert_close(a, b)


# ---- the rollout ----------------------------------------------------------------------------------------------------


def test_a_cycle_has_so_many_completions_of_each_prompt(tmp_path: Path) -> None:
    prompts: list[list[str]] = []

    def reward(completions: list[str], letter: list[str], **columns: Any) -> list[float]:
        assert all(prompt[0] == own for prompt, own in zip(columns["prompts"], letter, strict=True))
        prompts.append(columns["prompts"])
        return [float(len(text)) for text in completions]

    run = tiny.trainer(tmp_path, {"reward_funcs": reward, "eval_dataset": tiny.prompts(4)}, num_generations=4)
    run.train()
    assert [len(batch) for batch in prompts] == [8, 8]
    for batch in prompts:
        assert batch[0::4] == batch[1::4] == batch[3::4]
        assert batch[0] != batch[4]
    assert len({tuple(s.completion.tolist()) for s in run.experience.sequences}) > 4  # type: ignore[union-attr]
    run.evaluate()
    assert len(prompts[-1]) == 4  # one for each held-out prompt
    assert len(run.get_train_dataloader()) == 16 * 4  # batches of two prompts, once for each step of a cycle


def test_epochs_and_resuming_with_groups(tmp_path: Path) -> None:
    settings = {"num_generations": 4, "save_strategy": "steps", "save_steps": 5, "logging_steps": 1}
    whole, resumed = (tiny.trainer(tmp_path / name, **settings) for name in ("whole", "resumed"))
    whole.train()
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-5"))
    assert tiny.losses(resumed) == tiny.losses(whole)


def test_a_rollout_function_gets_what_it_asks_for(tmp_path: Path) -> None:
    calls: list[dict[str, Any]] = []

    def plain(prompts: list[str], trainer: KLQTrainer) -> Completions:
        calls.append({"prompts": prompts})
        return Completions([[5, tiny.EOS]] * len(prompts))

    def grouped(prompts: list[str], trainer: KLQTrainer, num_generations: int, letter: list[str]) -> Completions:
        calls.append({"prompts": prompts, "number": num_generations, "letter": letter})
        return Completions([[5, tiny.EOS]] * (len(prompts) * num_generations))

    def columns(prompts: list[str], trainer: KLQTrainer, **columns: list[Any]) -> Completions:
        calls.append({"prompts": prompts, **columns})
        return Completions([[5, tiny.EOS]] * len(prompts))

    def asks(prompts: list[str], trainer: KLQTrainer, answer: list[str]) -> Completions:
        raise AssertionError

    def too_few(prompts: list[str], trainer: KLQTrainer, num_generations: int) -> Completions:
        return Completions([[5, tiny.EOS]] * len(prompts))

    run = tiny.trainer(tmp_path, num_generations=2)
    rows = tiny.prompts(3)
    a, b, c = (row["prompt"] for row in rows)
    for function in (plain, grouped, columns):
        run.rollout_func = function
        assert len(run.roll_out(rows, 0, 2).sequences) == 6
    assert calls == [
        {"prompts": [a, a, b, b, c, c]},
        {"prompts": [a, b, c], "number": 2, "letter": [a[0], b[0], c[0]]},
        {"prompts": [a, a, b, b, c, c], "letter": [p[0] for p in (a, a, b, b, c, c)]},
    ]
    run.rollout_func = asks
    with pytest.raises(
        ValueError, match=r"^rollout_func: asks for the column 'answer'; the dataset has prompt, letter"
    ):
        run.roll_out(rows, 0)
    run.rollout_func = too_few
    with pytest.raises(ValueError, match=r"^rollout_func: completion_ids: must have 6 entries, got 3"):
        run.roll_out(rows, 0, 2)


@pytest.mark.parametrize("number", [0, 3, 16])
def test_groups_must_divide_the_rollouts(number: int, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"^num_generations: must (divide the 8 rollouts|be at least 1)"):
        tiny.arguments(tmp_path, num_generations=number)
