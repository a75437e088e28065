"""Batches to test on, and the two computations every result is held against.

*gold* is ``reference`` in float64 on the same (already rounded) inputs. *plain* is what a trainer writes today: one
matrix product in the inputs' own dtype, an fp32 ``log_softmax`` of the full logits, autograd. The precision contract
says: our error against gold is at most 1.5 times the error of plain.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from klq_kernels import KLQLoss, KLQTargets, LinearLogprobs, reference
from klq_kernels.vocabulary import chunking

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
SPREADS = ["peaked", "large", "flat"]
LOSS_TYPES = ["l2", "huber", "value_clipped", "ratio_clipped", "double_clipped"]
GRADIENTS = ("hidden", "weight", "bias", "values")

PER_TOKEN = (
    "hidden", "actions", "values", "ref_logprobs", "rewards", "trace", "weights",
    "old_logprobs", "old_values", "advantages",
)  # fmt: skip


@dataclass(frozen=True)
class Case:
    """A batch in one layout. Per-token fields are [B, T] or [N]; hidden has one more dimension."""

    hidden: Tensor
    weight: Tensor
    bias: Tensor
    actions: Tensor
    values: Tensor
    ref_logprobs: Tensor
    rewards: Tensor
    scores: Tensor  # [B]
    bootstrap_values: Tensor  # [B]
    trace: Tensor
    weights: Tensor
    old_logprobs: Tensor
    old_values: Tensor
    advantages: Tensor
    mask: Tensor | None
    cu_seqlens: Tensor | None

    @property
    def layout(self) -> dict[str, Tensor | None]:
        return {"mask": self.mask, "cu_seqlens": self.cu_seqlens}

    @property
    def targets(self) -> KLQTargets:
        return KLQTargets(self.old_logprobs, self.old_values, self.advantages)

    def with_exact_logits(self) -> Case:
        """Hidden states and weights rounded to multiples of 1/8 in [-4, 4], whose products add up exactly in fp32.

        So the logits do not depend on the order in which a matrix library adds, which is its own affair and differs
        from CPU to CPU, and from one shape of a product to the next.
        """
        eighths = {name: (8 * getattr(self, name)).round().clamp(-32, 32) / 8 for name in ("hidden", "weight")}
        return replace(self, **eighths)

    @property
    def valid(self) -> Tensor:
        return torch.ones_like(self.actions, dtype=torch.bool) if self.mask is None else self.mask

    def map(self, function: Callable[[Tensor], Tensor]) -> Case:
        tensors = {f.name: getattr(self, f.name) for f in fields(self)}
        return Case(**{name: None if t is None else function(t) for name, t in tensors.items()})

    def double(self) -> Case:
        """The same numbers in float64, on the CPU: what gold is computed from."""
        return self.map(lambda t: t.cpu().double() if t.is_floating_point() else t.cpu())

    def packed(self, *, holes: bool = False) -> Case:
        """The same padded batch in the packed layout: the valid tokens only, or all of them under a mask."""
        assert self.mask is not None
        batch, length = self.mask.shape
        lengths = torch.full((batch,), length) if holes else self.mask.sum(1).cpu()
        ends = F.pad(lengths.cumsum(0), (1, 0)).to(self.mask.device, torch.int32)
        keep = torch.ones_like(self.mask) if holes else self.mask
        per_token = {name: getattr(self, name)[keep] for name in PER_TOKEN}
        return replace(self, **per_token, mask=self.mask[keep] if holes else None, cu_seqlens=ends)

    def spoiled(self) -> Case:
        """The same batch with NaN, inf and impossible token ids wherever the mask is False."""
        assert self.mask is not None
        bad = ~self.mask
        changes = {}
        for k, name in enumerate(PER_TOKEN):
            tensor = getattr(self, name).clone()
            nonsense = (-100, 2**40)[k % 2] if name == "actions" else (float("nan"), float("inf"), -float("inf"))[k % 3]
            tensor[bad] = nonsense
            changes[name] = tensor
        return replace(self, **changes)

    def loss_arguments(
        self,
        *,
        on_policy: bool,
        scores: bool = False,
        bootstrap: bool = False,
        trace: bool = False,
        weights: bool = False,
    ) -> dict[str, Any]:
        """Keywords that ``fused_klq_loss`` and ``reference.naive_klq_loss`` both understand, bias aside."""
        out: dict[str, Any] = {**self.layout, "ref_logprobs": self.ref_logprobs}
        if weights:
            out["weights"] = self.weights
        if not on_policy:
            return {**out, "targets": self.targets}
        out["rewards"] = self.scores if scores else self.rewards
        if bootstrap:
            out["bootstrap_values"] = self.bootstrap_values
        if trace:
            out["trace"] = self.trace
        return out


def make_case(
    mask: Tensor,
    *,
    vocab: int = 131,
    width: int = 16,
    spread: str = "peaked",
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    seed: int = 0,
) -> Case:
    """A padded batch under this mask [B, T]; ``spread`` says what the head's softmax looks like.

    peaked  Zipf-like: rare tokens have small rows, and most hidden states point at the token taken
    large   the same, with logits in the tens and a common offset of 40, as trained heads have
    flat    near uniform
    """
    g = torch.Generator().manual_seed(seed)
    batch, length = mask.shape

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=g, dtype=torch.float64)

    actions = torch.randint(0, vocab, (batch, length), generator=g)
    weight = normal(vocab, width)
    hidden = normal(batch, length, width)
    bias = 0.3 * normal(vocab)
    if spread == "flat":
        weight *= 0.05
    else:
        zipf = torch.arange(1, vocab + 1, dtype=torch.float64).pow(-0.3)[torch.randperm(vocab, generator=g)]
        weight *= zipf[:, None]
        aim = F.normalize(weight[actions], dim=-1)
        wanted = {"peaked": 12.0, "large": 40.0}[spread] * torch.rand(
            batch, length, 1, generator=g, dtype=torch.float64
        )
        hidden = 0.3 * hidden + wanted * aim / weight[actions].norm(dim=-1, keepdim=True)
        if spread == "large":
            hidden[..., 0], weight[:, 0] = 8.0, 5.0
    logprobs = (hidden @ weight.T + bias).log_softmax(-1).gather(-1, actions[..., None]).squeeze(-1)
    case = Case(
        hidden=hidden,
        weight=weight,
        bias=bias,
        actions=actions,
        values=0.5 * normal(batch, length),
        ref_logprobs=logprobs + 0.5 * normal(batch, length),
        rewards=normal(batch, length),
        scores=normal(batch),
        bootstrap_values=normal(batch),
        trace=torch.rand(batch, length, generator=g, dtype=torch.float64),
        weights=0.1 + torch.rand(batch, length, generator=g, dtype=torch.float64),
        old_logprobs=logprobs + 0.3 * normal(batch, length),
        old_values=0.5 * normal(batch, length),
        advantages=normal(batch, length),
        mask=mask,
        cu_seqlens=None,
    ).map(lambda t: t.float() if t.is_floating_point() else t)
    case = replace(case, hidden=case.hidden.to(dtype), weight=case.weight.to(dtype), bias=case.bias.to(dtype))
    return case.map(lambda t: t.to(device))


def ragged_mask(batch: int, length: int, *, seed: int = 0) -> Tensor:
    """A prompt at the front, padding at the back, a tool call's hole in the middle, and one row without any token."""
    g = torch.Generator().manual_seed(seed)
    begin = torch.randint(0, length // 3 + 1, (batch, 1), generator=g)
    end = torch.randint(length // 2, length + 1, (batch, 1), generator=g)
    position = torch.arange(length)
    mask = (position >= begin) & (position < end)
    mask &= torch.rand(batch, length, generator=g) > 0.15
    if batch > 2:
        mask[1] = False
        mask[2] = position == length // 2
    return mask


def workspace_for(rows: int, case: Case) -> int:
    """``workspace_bytes`` that makes chunks of at most ``rows`` rows."""
    return rows * chunking.row_stride(case.weight.shape[0]) * case.hidden.element_size()


def head_arguments(case: Case, *, bias: bool = True) -> tuple[Tensor, Tensor, Tensor | None]:
    return case.hidden, case.weight, case.bias if bias else None


def plain_logprobs(
    hidden: Tensor,
    weight: Tensor,
    actions: Tensor,
    *,
    bias: Tensor | None = None,
    temperature: float = 1.0,
    softcap: float | None = None,
) -> LinearLogprobs:
    """The full logits in the inputs' dtype, the rest in fp32."""
    logits = F.linear(hidden, weight, bias).float()
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    logits = logits / temperature
    logp = logits.log_softmax(-1)
    taken = logp.gather(-1, actions.unsqueeze(-1)).squeeze(-1)
    return LinearLogprobs(taken, logits.logsumexp(-1), -(logp.exp() * logp).sum(-1))


def plain_klq_loss(
    hidden: Tensor,
    weight: Tensor,
    actions: Tensor,
    values: Tensor,
    *,
    targets: KLQTargets | None = None,
    ref_logprobs: Tensor,
    mask: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    tau: float = 0.05,
    **options: Any,
) -> KLQLoss:
    """``reference.naive_klq_loss`` on ``plain_logprobs``."""
    head = {name: options.pop(name) for name in ("bias", "temperature", "softcap") if name in options}
    scan = {n: options.pop(n) for n in ("rewards", "bootstrap_values", "trace", "gamma", "lam") if n in options}
    logprobs = plain_logprobs(hidden, weight, actions, **head).logprobs
    if targets is None:
        targets = reference.klq_targets(
            logprobs.detach(), ref_logprobs, values.detach(), **scan, tau=tau, mask=mask, cu_seqlens=cu_seqlens
        )
    return reference.klq_loss(logprobs, values, targets, mask=mask, tau=tau, **options)


@dataclass(frozen=True)
class Outcome:
    """A loss, its metrics, and the gradients of hidden, weight, bias (where one was used) and values."""

    loss: Tensor
    metrics: dict[str, Tensor]
    gradients: dict[str, Tensor]

    def tensors(self) -> dict[str, Tensor]:
        return {"loss": self.loss, **self.metrics, **self.gradients}


def differentiate(function: Callable[..., KLQLoss], case: Case, *, bias: bool = True, **options: Any) -> Outcome:
    """Calls a loss on fresh leaves and backpropagates it."""
    names = [name for name in GRADIENTS if bias or name != "bias"]
    leaves = {name: getattr(case, name).detach().clone().requires_grad_() for name in names}
    loss, metrics = function(
        leaves["hidden"], leaves["weight"], case.actions, leaves["values"], bias=leaves.get("bias"), **options
    )
    loss.backward()
    return Outcome(loss.detach(), metrics, {name: leaf.grad for name, leaf in leaves.items() if leaf.grad is not None})


def rms(x: Tensor) -> float:
    return float(x.double().square().mean().sqrt()) if x.numel() else 0.0


def assert_as_precise_as(
    ours: Tensor, plain: Tensor | tuple[Tensor, ...], gold: Tensor, name: str, *, factor: float = 1.5
) -> None:
    """The precision contract: rms error at most ``factor`` times that of plain, plus a few units of fp32 noise.

    Several ``plain`` are the same sums in several orders; the worst of them is the measure, since which order a
    matrix product takes is up to the machine's BLAS.
    """
    gold = gold.detach()
    orders = plain if isinstance(plain, tuple) else (plain,)
    error, *errors = (rms(t.detach().cpu().double() - gold) for t in (ours, *orders))
    allowed = max(errors)
    floor = 4 * torch.finfo(torch.float32).eps * rms(gold)
    assert error <= factor * allowed + floor, f"{name}: error {error:.2e}, plain {allowed:.2e}, gold {rms(gold):.2e}"


def same_in_all_layouts(a: Tensor, b: Tensor, *, atol: float = 2e-6) -> None:
    """Bit for bit; in the kernels, which add in an order that depends on where a token lies, to fp32 rounding."""
    if os.environ["KLQ_BACKEND"] == "triton":
        torch.testing.assert_close(a, b, rtol=1e-5, atol=atol)
    else:
        assert torch.equal(a, b)


def assert_same_bits(a: Outcome, b: Outcome) -> None:
    """Equal to the last bit: for calls whose matrix products have the same shapes, strides and alignments."""
    left, right = a.tensors(), b.tensors()
    assert left.keys() == right.keys()
    for name, value in left.items():
        assert torch.equal(value, right[name]), f"{name} differs by {(value - right[name]).abs().max():.3e}"


def assert_same_in_layouts(a: Outcome, b: Outcome, kept: Tensor) -> None:
    """Equal to fp32 rounding, since the products of two layouts may read rows at other alignments.

    ``kept`` selects the tokens of a's padded layout that b's packed layout holds.
    """
    left, right = a.tensors(), b.tensors()
    assert left.keys() == right.keys()
    for name, value in left.items():
        assert_close_to_scale(value[kept] if name in ("hidden", "values") else value, right[name], name)


def assert_close_to_scale(a: Tensor, b: Tensor, name: str) -> None:
    """Equal to a few units of fp32 rounding of the largest element (of 1, where that is larger)."""
    scale = max(1.0, float(b.abs().max())) if b.numel() else 1.0
    torch.testing.assert_close(a, b, rtol=0, atol=1e-5 * scale, msg=lambda text: f"{name}: {text}")


def assert_transforms(total: Callable[[Tensor], Tensor], hidden: Tensor) -> None:
    """Of a scalar of hidden states: vmap is a loop; forward mode and second derivatives are refused."""
    stack = torch.stack([hidden, 1.5 * hidden]).requires_grad_()
    (together,) = torch.autograd.grad(torch.func.vmap(total)(stack).sum(), stack)
    (apart,) = torch.autograd.grad(total(stack[0]) + total(stack[1]), stack)
    torch.testing.assert_close(together, apart)
    with pytest.raises(RuntimeError, match="jvp"):
        torch.func.jvp(total, (hidden,), (hidden,))
    hidden = hidden.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(total(hidden), hidden, create_graph=True)
    with pytest.raises(RuntimeError, match="second derivative"):
        gradient.sum().backward()
