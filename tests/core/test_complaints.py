"""Complaints of users of similar libraries, each as a test that such a defect would fail here.

Every docstring names the public issue. Complaints that bad numbers, lost gradients or wasted work went unnoticed were
mostly hidden by tests on uniform inputs, so the inputs here are peaked, masked, strided or long.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from cases import (
    Case,
    differentiate,
    make_case,
    plain_klq_loss,
    ragged_mask,
    rms,
    same_in_all_layouts,
    workspace_for,
)
from torch import Tensor
from watch import Watch

from klq_kernels import fused_klq_loss, gae, klq_targets, linear_logprobs, reference, reverse_scan
from klq_kernels.vocabulary import chunking

# ------------------------------------------------------------------------------------------------------- wrong numbers


@pytest.mark.parametrize("vocab", [1, 5, 63, 127, 129, 1000, 1025, 4099])
def test_columns_beyond_the_vocabulary_add_nothing_to_the_lse(device: torch.device, vocab: int) -> None:
    """verl #2656, #2899: out-of-range tiles added exp(0) to the lse; with all logits near -60 that is everything."""
    case = make_case(ragged_mask(3, 6), vocab=vocab, width=4, spread="flat", device=device)
    bias = torch.full((vocab,), -60.0, device=device)
    got = linear_logprobs(case.hidden, case.weight, case.actions, bias=bias, mask=case.mask, return_entropy=True)
    gold = reference.linear_logprobs(*(t.cpu().double() for t in (case.hidden, case.weight)), case.actions.cpu())
    keep = case.valid.cpu()
    assert (got.logprobs <= 1e-5).all()
    for ours, theirs in zip((got.logprobs, got.entropy), (gold.logprobs, gold.entropy), strict=True):
        torch.testing.assert_close(ours.cpu().double()[keep], theirs[keep], rtol=1e-4, atol=2e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_weight_gradient_is_not_summed_in_16_bits(device: torch.device, dtype: torch.dtype) -> None:
    """axolotl #1601, Liger #1391, fla #874: a 16-bit running sum loses a little at every chunk."""
    case = make_case(torch.ones(4, 64, dtype=torch.bool), vocab=64, width=32, spread="flat", dtype=dtype, device=device)
    # each sequence pushes the same way, so that the sum outgrows what a chunk adds to it
    case = replace(case, actions=torch.zeros_like(case.actions), advantages=torch.full_like(case.advantages, -3.0))
    case = replace(case, hidden=case.hidden.abs())
    arguments = case.loss_arguments(on_policy=False)
    ours = differentiate(fused_klq_loss, case, workspace_bytes=workspace_for(1, case), **arguments)
    gold = differentiate(reference.naive_klq_loss, case.double(), **case.double().loss_arguments(on_policy=False))
    running = torch.zeros_like(case.weight)
    for b in range(4):
        for t in range(64):
            one = case.map(lambda x, b=b, t=t: x[b : b + 1, t : t + 1] if x.shape[:2] == (4, 64) else x)
            part = differentiate(plain_klq_loss, one, denom=256, **one.loss_arguments(on_policy=False))
            running += part.gradients["weight"]
    errors = [rms(g.cpu().double() - gold.gradients["weight"]) for g in (ours.gradients["weight"], running)]
    assert errors[0] < 0.2 * errors[1]
    assert errors[0] <= torch.finfo(dtype).eps * rms(gold.gradients["weight"])


def test_16_bit_checkpoint_with_an_fp32_head(device: torch.device) -> None:
    """TRL #4303, NeMo-RL #3936: an fp32 head must give fp32 log-probs, not ones that were 16 bits on their way."""
    case = make_case(ragged_mask(4, 9), vocab=1009, spread="large", dtype=torch.bfloat16, device=device)
    head = (case.hidden.float(), case.weight.float(), case.actions)
    ours = linear_logprobs(*head, mask=case.mask).logprobs.cpu().double()
    gold = reference.linear_logprobs(*(t.cpu().double() for t in head[:2]), case.actions.cpu()).logprobs
    coarse = linear_logprobs(case.hidden, case.weight, case.actions, mask=case.mask).logprobs.cpu().double()
    keep = case.valid.cpu()
    assert rms((ours - gold)[keep]) < 2e-5 < 0.1 * rms((coarse - gold)[keep])


def test_compiling_with_ignored_tokens_gives_the_same_gradients(device: torch.device) -> None:
    """Liger #1338: torch.compile was silently wrong as soon as some tokens were ignored."""
    torch._dynamo.reset()
    case = make_case(ragged_mask(4, 9), device=device)
    arguments = case.loss_arguments(on_policy=True)
    compiled = torch.compile(fused_klq_loss, fullgraph=True, backend="aot_eager")
    eager, traced = (differentiate(f, case.spoiled(), **arguments) for f in (fused_klq_loss, compiled))
    for name, gradient in eager.gradients.items():
        assert gradient.isfinite().all()
        assert torch.equal(gradient, traced.gradients[name])


def test_micro_batches_with_a_global_denom_are_one_big_batch(device: torch.device) -> None:
    """Liger #1082, TRL #5619: means of means drift under gradient accumulation; sums over one denom do not."""
    case = make_case(ragged_mask(6, 13), device=device)
    whole = differentiate(fused_klq_loss, case, **case.loss_arguments(on_policy=True, scores=True))
    leaves = {n: getattr(case, n).clone().requires_grad_() for n in ("weight", "bias")}
    total = torch.zeros((), device=device)
    for begin, end in ((0, 1), (1, 2), (2, 6)):
        part = case.map(lambda t, b=begin, e=end: t[b:e] if t.shape[:1] == (6,) else t)
        loss = fused_klq_loss(
            part.hidden, leaves["weight"], part.actions, part.values, bias=leaves["bias"],
            denom=case.valid.sum(), **part.loss_arguments(on_policy=True, scores=True),
        ).loss  # fmt: skip
        loss.backward()
        total += loss.detach()
    torch.testing.assert_close(total, whole.loss, rtol=1e-6, atol=0)
    for name, leaf in leaves.items():
        torch.testing.assert_close(leaf.grad, whole.gradients[name], rtol=1e-4, atol=1e-6)


# ------------------------------------------------------------------------------------------------------ lost gradients


def test_entropy_bonus_reaches_the_parameters(device: torch.device) -> None:
    """TRL #6625: the entropy was there, its gradient was not."""
    case = make_case(ragged_mask(3, 7), device=device)
    gradients = []
    for function, c, layout in ((linear_logprobs, case, case.layout), (reference.linear_logprobs, case.double(), {})):
        weight = c.weight.clone().requires_grad_()
        options = {"return_entropy": True, **layout} if layout else {}
        entropy = function(c.hidden, weight, c.actions, **options).entropy
        assert entropy is not None
        (-0.01 * entropy[c.valid].mean()).backward()
        gradients.append(weight.grad)
    assert gradients[0].ne(0).any()
    torch.testing.assert_close(gradients[0].cpu().double(), gradients[1], rtol=1e-4, atol=1e-8)


def test_gradients_reach_three_dimensional_hidden_states(device: torch.device) -> None:
    """verl #6913: a flatten inside the autograd function cut hidden states off the graph."""
    case = make_case(ragged_mask(3, 7), device=device)
    body = torch.nn.Linear(16, 16).to(device)
    values = case.values.clone().requires_grad_()
    loss = fused_klq_loss(
        body(case.hidden), case.weight, case.actions, values, **case.loss_arguments(on_policy=True)
    ).loss
    loss.backward()
    assert body.weight.grad is not None
    assert body.weight.grad.ne(0).any()
    assert values.grad is not None
    assert values.grad.shape == case.values.shape


def test_weight_gradient_under_any_reduction(device: torch.device) -> None:
    """Liger #1298: with reduction="none" the weight's gradient ignored what came from above, token by token."""
    case = make_case(ragged_mask(3, 7), device=device)
    gradients = []
    for function, c, layout in ((linear_logprobs, case, case.layout), (reference.linear_logprobs, case.double(), {})):
        weight = c.weight.clone().requires_grad_()
        logprobs = function(c.hidden, weight, c.actions, **layout).logprobs
        torch.where(c.valid, logprobs * c.advantages, 0).sum().backward()
        gradients.append(weight.grad)
    torch.testing.assert_close(gradients[0].cpu().double(), gradients[1], rtol=1e-4, atol=1e-5)


def test_adapter_on_the_head_is_trained(device: torch.device) -> None:
    """TRL #4612: LoRA on lm_head was ignored. Merged into the weight passed here, both factors get their gradient."""
    case = make_case(ragged_mask(3, 7), device=device)
    generator = torch.Generator().manual_seed(0)
    factors = [torch.randn(131, 2, generator=generator), torch.randn(2, 16, generator=generator)]
    gradients = []
    for function, c in ((fused_klq_loss, case), (reference.naive_klq_loss, case.double())):
        up, down = (f.to(c.weight).requires_grad_() for f in (t.clone() for t in factors))
        merged = c.weight + 0.1 * up @ down
        function(c.hidden, merged, c.actions, c.values, **c.loss_arguments(on_policy=True)).loss.backward()
        gradients.append((up.grad, down.grad))
    for ours, gold in zip(*gradients, strict=True):
        assert ours.ne(0).any()
        torch.testing.assert_close(ours.cpu().double(), gold, rtol=1e-4, atol=1e-5)


def test_actor_and_critic_share_a_backbone(device: torch.device) -> None:
    """OpenRLHF #230: one backbone for both; the policy's and the value's gradients must add up in it."""
    case = make_case(ragged_mask(3, 7), device=device)
    gradients = []
    for function, c in ((fused_klq_loss, case), (reference.naive_klq_loss, case.double())):
        hidden = c.hidden.clone().requires_grad_()
        function(hidden, c.weight, c.actions, hidden[..., 0] / 8, **c.loss_arguments(on_policy=True)).loss.backward()
        gradients.append(hidden.grad)
    torch.testing.assert_close(gradients[0].cpu().double(), gradients[1], rtol=1e-4, atol=1e-5)


# --------------------------------------------------------------------------------------------------- work for nothing


def products(case: Case, *, frozen_head: bool = False, entropy: bool = False) -> tuple[Watch, int]:
    """The operators that one fused call ran, and the rows that its matrix products computed."""
    hidden = case.hidden.clone().requires_grad_()
    weight = case.weight.clone().requires_grad_(not frozen_head)
    with Watch() as watch:
        fused_klq_loss(
            hidden, weight, case.actions, case.values, return_entropy=entropy, **case.loss_arguments(on_policy=True)
        ).loss.backward()
    return watch, watch.products()


def test_frozen_head_costs_no_weight_gradient(device: torch.device) -> None:
    """TRL #7076, prime-rl #3011: dW of a frozen head was computed all the same."""
    case = make_case(ragged_mask(4, 9), vocab=1009, width=24, device=device)
    watch, count = products(case, frozen_head=True)
    assert count == 2
    assert not watch.at_least(1009 * 24 * 4 * 2)
    assert products(case)[1] == 3


def test_masked_tokens_cost_no_head_work(device: torch.device) -> None:
    """prime-rl #3326: the head ran over prompts and padding. Here no buffer has room for a masked row's logits."""
    mask = torch.zeros(8, 64, dtype=torch.bool)
    mask[:, 60:] = True
    case = make_case(mask, vocab=1009, width=8, device=device)
    watch, _ = products(case)
    assert watch.largest() <= chunking.row_stride(1009) * 4 * int(mask.sum())


def test_entropy_costs_nothing_unless_asked_for(device: torch.device) -> None:
    """verl #2608: the entropy took time and memory where it was not asked for."""
    case = make_case(ragged_mask(4, 9), device=device)
    arguments = case.loss_arguments(on_policy=True)
    without = fused_klq_loss(case.hidden, case.weight, case.actions, case.values, **arguments)
    assert "entropy" not in without.metrics
    assert products(case, entropy=True)[1] == products(case)[1]


@pytest.mark.parametrize("function", ["rollout", "reference"])
def test_log_probs_of_a_rollout_need_no_logits(device: torch.device, function: str) -> None:
    """NeMo-RL #3793 ran out in get_logprobs, OpenRLHF #756 in the *reference* logits, AReno #125 on small models."""
    case = make_case(torch.ones(4, 64, dtype=torch.bool), vocab=1009, width=8, device=device)
    workspace = workspace_for(32, case)
    weight = case.weight.clone().requires_grad_(function == "rollout")
    with torch.no_grad(), Watch() as watch:
        linear_logprobs(case.hidden, weight, case.actions, return_entropy=True, workspace_bytes=workspace)
    assert watch.largest() <= workspace < 4 * 64 * 1009 * 4


@pytest.mark.parametrize("device_type", ["cpu", "cuda"])
def test_a_thousand_tokens_are_not_cut_into_many_chunks(device_type: str) -> None:
    """Liger #1414, #1472: 32 chunks at 1,024 tokens cost 18 times; chunks follow bytes, not the ratio V / H."""
    rows = chunking.chunk_rows(1024, 151936, torch.bfloat16, torch.device(device_type), None)
    assert -(-1024 // rows) <= (2 if device_type == "cpu" else 1)


# ---------------------------------------------------------------------------------------------------- sizes and strides


@pytest.mark.parametrize("shape", [(1, 70_000), (70_000, 1)])
def test_more_than_65536_tokens_or_sequences(device: torch.device, shape: tuple[int, int]) -> None:
    """Liger #1294 (a crash at length 65,536), fla #1082: grids have limits in some dimensions."""
    delta = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(device)
    got = reverse_scan(delta, 0.5)
    following = torch.nn.functional.pad(got[:, 1:], (0, 1))
    torch.testing.assert_close(got, delta + 0.5 * following)
    hidden = delta[..., None].clone().requires_grad_()
    weight = torch.tensor([[1.0], [-1.0]], device=device)
    actions = torch.zeros(shape, dtype=torch.int64, device=device)
    logprobs = linear_logprobs(hidden, weight, actions).logprobs
    torch.testing.assert_close(logprobs, torch.nn.functional.logsigmoid(2 * delta), rtol=1e-4, atol=1e-5)
    loss = fused_klq_loss(hidden, weight, actions, delta, ref_logprobs=logprobs.detach(), rewards=delta + 1).loss
    loss.backward()
    assert loss.isfinite()
    assert hidden.grad is not None
    assert hidden.grad.isfinite().all()
    assert hidden.grad.ne(0).any(-1).float().mean() > 0.99


@pytest.mark.gpu
def test_more_than_2_to_the_31_logits_in_one_chunk(device: torch.device) -> None:
    """CCE #37, fla #1082: 32-bit offsets wrapped around where rows times vocabulary passes 2**31."""
    if device.type == "cpu":
        pytest.skip("a chunk of 4 GiB is for a GPU")
    n, vocab = 33_792, 65_536
    assert chunking.chunk_rows(n, vocab, torch.bfloat16, device, n * vocab * 2) == n > 2**31 // vocab
    case = make_case(torch.ones(1, 8, dtype=torch.bool), vocab=vocab, width=16, dtype=torch.bfloat16, device=device)
    few = linear_logprobs(case.hidden, case.weight, case.actions).logprobs
    hidden, actions = case.hidden.repeat(1, n // 8, 1), case.actions.repeat(1, n // 8)
    many = linear_logprobs(hidden, case.weight, actions, workspace_bytes=n * vocab * 2).logprobs
    torch.testing.assert_close(many[:, -8:], many[:, :8])
    torch.testing.assert_close(many[:, :8], few)
    values = torch.zeros_like(many)
    leaf = hidden.requires_grad_()
    loss = fused_klq_loss(
        leaf, case.weight, actions, values, ref_logprobs=many, rewards=torch.ones_like(many), lam=0.0,
        workspace_bytes=n * vocab * 2,
    ).loss  # fmt: skip
    loss.backward()
    assert leaf.grad is not None
    torch.testing.assert_close(leaf.grad[:, -16:-8], leaf.grad[:, :8])


# ------------------------------------------------------------------------------------------------------------- returns


def test_strided_rewards_and_values_are_read_in_order(device: torch.device) -> None:
    """rl_games #358: a transposed buffer [T, B] gave silently wrong advantages."""
    rewards, values = torch.randn(2, 9, 5, generator=torch.Generator().manual_seed(0)).to(device)
    assert torch.equal(gae(rewards.T, values.T), gae(rewards.T.contiguous(), values.T.contiguous()))


def test_bootstrap_is_counted_once(device: torch.device) -> None:
    """rl-triton #4: the value beyond the end entered the last TD error and the recurrence."""
    rewards, values, beyond = (torch.tensor(x, device=device) for x in ([[1.0, 2.0]], [[3.0, 4.0]], [8.0]))
    got = gae(rewards, values, gamma=0.5, lam=0.5, bootstrap_values=beyond)
    assert got.tolist() == [[1 + 2 - 3 + 0.25 * 2, 2 + 4 - 4]]


def test_truncated_and_terminated_sequences_differ_by_the_bootstrap(device: torch.device) -> None:
    """TRL #1536: a truncated response was scored as though the episode had ended there."""
    mask = torch.tensor([[True, True, False], [True, True, False]], device=device)
    zeros = torch.zeros(2, 3, device=device)
    got = gae(zeros, zeros, lam=1.0, bootstrap_values=torch.tensor([0.0, 2.0], device=device), mask=mask)
    assert got.tolist() == [[0, 0, 0], [2, 2, 0]]


def test_score_never_lands_on_a_pad(device: torch.device) -> None:
    """TRL #3750: the reward was put on a padding token, and so was lost."""
    mask = torch.tensor([[True, True, False, False], [True, False, True, False], [False] * 4], device=device)
    zeros = torch.zeros(3, 4, device=device)
    scores = torch.tensor([2.0, 3.0, 5.0], device=device)
    targets = klq_targets(zeros, zeros, zeros, scores, lam=0.0, mask=mask)
    assert targets.advantages.tolist() == [[0, 2, 0, 0], [0, 0, 3, 0], [0, 0, 0, 0]]


def test_tool_tokens_pass_the_advantage_on(device: torch.device) -> None:
    """miles #1827: masked tool output in mid-sequence cut the recurrence, or decayed it once per tool token."""
    mask = torch.tensor([[True, False, False, True]], device=device)
    zeros = torch.zeros(1, 4, device=device)
    got = gae(torch.tensor([4.0], device=device), zeros, gamma=1.0, lam=0.5, mask=mask)
    assert got.tolist() == [[2, 0, 0, 4]]


def test_long_unmasked_and_masked_trajectories_take_the_same_path(device: torch.device) -> None:
    """labs-molt #28 and others: the vectorised path of peers holds for gamma = lam = 1 or without a mask alone."""
    n = 20_000
    rewards, values = torch.randn(2, 1, n, generator=torch.Generator().manual_seed(0)).to(device)
    mask = torch.ones(1, n, dtype=torch.bool, device=device)
    same_in_all_layouts(gae(rewards, values, mask=mask), gae(rewards, values), atol=1e-5)
    mask[0, ::7] = False
    kept: Tensor = gae(rewards, values, gamma=0.99, lam=0.97, mask=mask)[mask]
    ends = torch.tensor([0, kept.numel()], dtype=torch.int32, device=device)
    packed = gae(rewards[mask], values[mask], gamma=0.99, lam=0.97, cu_seqlens=ends)
    same_in_all_layouts(kept, packed, atol=1e-5)
