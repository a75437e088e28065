"""The oracle itself, against numbers worked by hand and identities it was not written from."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from klq_kernels import KLQTargets, reference


def d(*numbers: float) -> Tensor:
    return torch.tensor(numbers, dtype=torch.float64)


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def test_targets_worked_by_hand() -> None:
    # tau 1/2, gamma 1/2, lam 1/2; Q = tau (logp - ref) + V = (2, 1); bootstrap 4
    # delta_1 = 3 + 1/2 * 4 - 1 = 4, delta_0 = 1 + 1/2 * 2 - 2 = 0;  A_1 = 4, A_0 = 0 + 1/4 * 4 = 1
    targets = reference.klq_targets(
        d(-1, -2)[None],
        d(-3, 0)[None],
        d(1, 2)[None],
        d(1, 3)[None],
        tau=0.5,
        gamma=0.5,
        lam=0.5,
        bootstrap_values=d(4),
    )
    assert targets.advantages.tolist() == [[1.0, 4.0]]
    assert targets.old_logprobs.tolist() == [[-1.0, -2.0]]
    assert targets.old_values.tolist() == [[1.0, 2.0]]


def test_trace_of_the_next_token_cuts_the_decay() -> None:
    # as above with c = (9, 1/2): A_0 = 0 + 1/4 * 1/2 * 4, and c_0 is never used
    targets = reference.klq_targets(
        d(-1, -2)[None], d(-3, 0)[None], d(1, 2)[None], d(1, 3)[None],
        tau=0.5, gamma=0.5, lam=0.5, bootstrap_values=d(4), trace=d(9, 0.5)[None],
    )  # fmt: skip
    assert targets.advantages.tolist() == [[0.5, 4.0]]


def test_score_lands_on_the_last_valid_token() -> None:
    mask = torch.tensor([[True, True, False], [True, False, False]])
    values = torch.zeros(2, 3, dtype=torch.float64)
    got = reference.gae(d(2, 7), values, gamma=0.5, lam=1.0, mask=mask)
    assert got.tolist() == [[1.0, 2.0, 0.0], [7.0, 0.0, 0.0]]


def test_reverse_scan_of_ones_is_a_geometric_series() -> None:
    c, length = 0.9, 20
    got = reference.reverse_scan(torch.ones(1, length, dtype=torch.float64), c)
    left = torch.arange(length, 0, -1, dtype=torch.float64)
    torch.testing.assert_close(got[0], (1 - c**left) / (1 - c), rtol=1e-13, atol=0)


def test_reverse_scan_stops_at_sequence_ends() -> None:
    ends = torch.tensor([0, 2, 2, 3], dtype=torch.int32)
    assert reference.reverse_scan(d(1, 1, 1), 1.0, cu_seqlens=ends).tolist() == [2.0, 1.0, 1.0]


def test_masked_tokens_are_as_if_deleted() -> None:
    keep = torch.tensor([True, False, True, True, False])
    q, ref, v, r, c = random(5, 1, 5)
    masked = reference.klq_targets(q, ref, v[0:1], r, trace=c, mask=keep[None])
    deleted = reference.klq_targets(*(t[:, keep] for t in (q, ref, v, r)), trace=c[:, keep])
    assert torch.equal(masked.advantages[:, keep], deleted.advantages)
    assert masked.advantages[:, ~keep].eq(0).all()


def test_padded_and_packed_are_the_same() -> None:
    q, ref, v, r = random(4, 3, 5, seed=1)
    ends = torch.tensor([0, 5, 10, 15], dtype=torch.int32)
    padded = reference.klq_targets(q, ref, v, r).advantages
    packed = reference.klq_targets(*(t.flatten() for t in (q, ref, v, r)), cu_seqlens=ends).advantages
    assert torch.equal(padded.flatten(), packed)


def test_gae_between_its_limits() -> None:
    r, v = random(2, 1, 6, seed=2)
    after = torch.cat([v[:, 1:], torch.zeros(1, 1, dtype=torch.float64)], 1)
    td_errors = r + 0.9 * after - v
    torch.testing.assert_close(reference.gae(r, v, gamma=0.9, lam=0.0), td_errors)
    discounted = torch.stack([sum(0.9 ** (k - t) * r[0, k] for k in range(t, 6)) for t in range(6)])
    torch.testing.assert_close(reference.gae(r, v, gamma=0.9, lam=1.0)[0], discounted - v[0])
    torch.testing.assert_close(reference.lambda_returns(r, v, gamma=0.9, lam=1.0)[0], discounted)


def test_klq_errors_are_gae_on_kl_shaped_rewards() -> None:
    """The identity that ties KLQ to PPO-penalty, at the lambda-weighted sum of every later token's shaped TD error."""
    logp, ref, v, r = random(4, 2, 7, seed=3)
    tau = 0.3
    errors = reference.klq_targets(logp, ref, v, r, tau=tau, gamma=0.9, lam=0.7).advantages
    torch.testing.assert_close(errors, reference.gae(r - tau * (logp - ref), v, gamma=0.9, lam=0.7))


def test_residual_identity() -> None:
    """Q - G from the definitions (eq. 13 and 7) is the residual that never mentions the reference."""
    logp, ref, v, r, old_logp, old_v = random(6, 2, 5, seed=4)
    tau, alpha = 0.2, 0.6
    old = reference.klq_targets(old_logp, ref, old_v, r, tau=tau)
    q = tau * (logp - ref) + v
    g = tau * (old_logp - ref) + old_v + alpha * old.advantages
    residual_squared = reference.klq_residual_loss(logp - old_logp, v - old_v, old.advantages, tau=tau, alpha=alpha)
    torch.testing.assert_close(residual_squared, (q - g).square())


@pytest.mark.parametrize(
    ("loss_type", "point", "loss", "by_logp", "by_value"),
    [
        # (d, v, A) with tau 1/2, alpha 1/2, thresholds 1: e = d/2 + v - A/2
        ("l2", (2, 1, 2), 1.0, 1.0, 2.0),  # e = 1
        ("huber", (2, 1, 3), 0.125, 0.25, 0.5),  # e = 1/2, inside
        ("huber", (2, 2, 0), 2.5, 0.5, 1.0),  # e = 3, outside
        ("value_clipped", (0, 3, 2), 4.0, 2.0, 4.0),  # change 3 clips to 1, (1 - 1)^2 < (3 - 1)^2: unclipped
        ("value_clipped", (0, 3, 8), 9.0, 0.0, 0.0),  # (1 - 4)^2 > (3 - 4)^2: clipped, flat
        ("ratio_clipped", (4, 0, 8), 12.25, 0.0, -7.0),  # d 4 clips to 1: (1/2 - 4)^2 > (2 - 4)^2, flat in logp only
        ("ratio_clipped", (4, 0, 2), 1.0, 1.0, 2.0),  # (1/2 - 1)^2 < (2 - 1)^2: unclipped
        ("double_clipped", (4, 0, 8), 12.25, 0.0, -7.0),  # 4, 9 (value), 12.25 (ratio)
        ("double_clipped", (0, 3, 8), 9.0, 0.0, 0.0),  # 1, 9 (value), 1 (ratio)
    ],
)
def test_losses_worked_by_hand(
    loss_type: str, point: tuple[float, ...], loss: float, by_logp: float, by_value: float
) -> None:
    logp, value, advantage = (d(x).requires_grad_() for x in point)
    got = reference.klq_residual_loss(
        logp, value, advantage.detach(), tau=0.5, alpha=0.5, loss_type=loss_type,
        huber_delta=1.0, value_clip=1.0, log_ratio_clip=1.0,
    )  # fmt: skip
    got.sum().backward()
    assert got.item() == loss
    assert logp.grad is not None
    assert value.grad is not None
    assert (logp.grad.item(), value.grad.item()) == (by_logp, by_value)


@pytest.mark.parametrize("loss_type", ["l2", "huber", "value_clipped", "ratio_clipped", "double_clipped"])
def test_residual_loss_passes_gradcheck(loss_type: str) -> None:
    change, value, advantage = random(3, 12, seed=5)
    leaves = (change.requires_grad_(), value.requires_grad_())
    assert torch.autograd.gradcheck(
        lambda a, b: reference.klq_residual_loss(a, b, advantage, loss_type=loss_type, tau=0.7, alpha=0.8), leaves
    )


def test_no_gradient_flows_through_the_target() -> None:
    logp, value = d(-1.0).requires_grad_(), d(0.5).requires_grad_()
    targets = KLQTargets(d(-2.0).requires_grad_(), d(0.0).requires_grad_(), d(1.0).requires_grad_())
    reference.klq_loss(logp, value, targets, tau=0.5).loss.backward()
    assert logp.grad is not None
    assert value.grad is not None
    assert (logp.grad.item(), value.grad.item()) == (0.0, 0.0)  # e = 1/2 + 1/2 - 1 = 0
    assert all(t.grad is None for t in targets)


def test_loss_is_the_weighted_sum_over_denom() -> None:
    zero, targets = torch.zeros(1, 3, dtype=torch.float64), KLQTargets(*torch.zeros(2, 1, 3).double(), d(1, 2, 9)[None])
    mask = torch.tensor([[True, True, False]])
    assert reference.klq_loss(zero, zero, targets, mask=mask).loss.item() == (1 + 4) / 2
    weighted = reference.klq_loss(zero, zero, targets, mask=mask, weights=d(2, 0.5, 7)[None], denom=8.0)
    assert weighted.loss.item() == (2 * 1 + 0.5 * 4) / 8


def test_uniform_and_two_way_heads_in_closed_form() -> None:
    uniform = reference.linear_logprobs(random(2, 3), torch.zeros(5, 3).double(), torch.tensor([0, 4]))
    torch.testing.assert_close(uniform.logprobs, d(-math.log(5), -math.log(5)))
    torch.testing.assert_close(uniform.entropy, d(math.log(5), math.log(5)))
    # logits (3, 0) at temperature 2: log sigmoid(1.5)
    two = reference.linear_logprobs(d(3)[None], d(1, 0)[:, None], torch.tensor([0]), temperature=2.0)
    p = 1 / (1 + math.exp(-1.5))
    torch.testing.assert_close(two.logprobs, d(math.log(p)))
    torch.testing.assert_close(two.logsumexp, d(math.log(math.exp(1.5) + 1)))
    assert two.entropy is not None
    torch.testing.assert_close(two.entropy, d(-p * math.log(p) - (1 - p) * math.log(1 - p)))


def test_softcap_comes_before_temperature_and_after_bias() -> None:
    got = reference.linear_logprobs(
        d(1)[None], d(3, 0)[:, None], torch.tensor([0]), bias=d(1, 0), softcap=2.0, temperature=0.5
    )
    top = 2 * math.tanh(4 / 2) / 0.5
    torch.testing.assert_close(got.logsumexp, d(math.log(math.exp(top) + 1)))


def test_unknown_loss_and_missing_targets_are_refused() -> None:
    with pytest.raises(ValueError, match="loss_type"):
        reference.klq_residual_loss(d(0), d(0), d(0), loss_type="l3")
    with pytest.raises(ValueError, match="targets"):
        reference.naive_klq_loss(random(1, 1, 2), random(3, 2), torch.zeros(1, 1, dtype=torch.long), random(1, 1))
