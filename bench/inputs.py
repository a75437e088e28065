"""Realistic inputs: what a language model in training would hand to the loss.

The head is Zipf-like: one hidden direction carries the log of a 1/rank unigram distribution, so that a few tokens are
likely everywhere and most are nearly impossible; the others carry context. The taken token usually stands out, by an
amount that varies from row to row, so softmax rows range from flat to sharply peaked, and the log-normaliser stays
small, as trained models keep it. Uniform noise would hide most of the ways in which a kernel can be wrong.

Sequences are ragged with their prompts masked out, unless the shape asks for plain rows.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from klq_kernels import KLQTargets

from .shapes import Scan, Shape, lengths

SPREAD = 1.5  # standard deviation of the logits' context part
MOST_PEAKED = 14.0  # largest extra logit of a taken token


@dataclass(frozen=True)
class HeadInputs:
    """Flat positions [M], of which ``rows`` (None: all) are valid. hidden, weight and values require gradients."""

    hidden: Tensor  # [M, H]
    weight: Tensor  # [V, H]
    actions: Tensor  # int64 [M]
    values: Tensor  # fp32 [M]
    targets: KLQTargets
    scores: Tensor  # fp32 [M], the advantage of the token's sequence
    mask: Tensor | None  # bool [M]
    rows: Tensor | None  # int64 [n]
    cu_seqlens: Tensor  # int32 [B + 1]
    softcap: float | None

    @property
    def tokens(self) -> int:
        return self.actions.numel() if self.rows is None else self.rows.numel()

    def valid(self, tensor: Tensor) -> Tensor:
        """The valid rows of a per-position tensor, differentiably."""
        return tensor if self.rows is None else tensor.index_select(0, self.rows)

    def valid_targets(self) -> KLQTargets:
        return KLQTargets(*(self.valid(t) for t in self.targets))

    def labels(self, ignored: int = -100) -> Tensor:
        """The actions with masked positions set to ``ignored``, as cross-entropy losses want them."""
        return self.actions if self.mask is None else self.actions.masked_fill(~self.mask, ignored)

    def head(self, most: int) -> HeadInputs:
        """A problem of the same kind over the first positions that hold at most ``most`` valid tokens."""
        end = most if self.rows is None else (int(self.rows[most]) if most < self.tokens else self.actions.numel())

        def leaf(tensor: Tensor) -> Tensor:
            return tensor.detach()[:end].clone().requires_grad_(tensor.requires_grad)

        return replace(
            self,
            hidden=leaf(self.hidden),
            actions=leaf(self.actions),
            values=leaf(self.values),
            targets=KLQTargets(*(leaf(t) for t in self.targets)),
            scores=leaf(self.scores),
            mask=None if self.mask is None else leaf(self.mask),
            rows=None if self.rows is None else self.rows[:most],
            cu_seqlens=self.cu_seqlens.clamp(max=end),
        )

    def only(self, rows: Tensor) -> HeadInputs:
        """The problem of these valid rows (indices among them) alone, as one plain sequence."""
        index = rows if self.rows is None else self.rows[rows]

        def leaf(tensor: Tensor) -> Tensor:
            return tensor.detach()[index].requires_grad_(tensor.requires_grad)

        return replace(
            self,
            hidden=leaf(self.hidden),
            actions=leaf(self.actions),
            values=leaf(self.values),
            targets=KLQTargets(*(leaf(t) for t in self.targets)),
            scores=leaf(self.scores),
            mask=None,
            rows=None,
            cu_seqlens=torch.tensor([0, index.numel()], dtype=torch.int32, device=index.device),
        )


@dataclass(frozen=True)
class ScanInputs:
    """Padded [B, T] tensors; valid tokens are a prefix of each row, as rollout buffers hold them."""

    logprobs: Tensor
    ref_logprobs: Tensor
    values: Tensor
    rewards: Tensor
    mask: Tensor | None
    tau: float = 0.05
    gamma: float = 1.0
    lam: float = 0.95


def _layout(shape: Shape, generator: torch.Generator) -> tuple[Tensor | None, Tensor]:
    """(mask [M] or None, cu_seqlens): some sequences, each after a prompt of half its size."""
    sequences = max(shape.tokens // 512, min(8, max(shape.tokens // 16, 1)))
    counts = lengths(shape.tokens, sequences, ragged=shape.ragged, generator=generator)
    pieces = []
    for count in counts:
        prompt = count // 2 if shape.ragged else 0
        pieces.append(torch.cat([torch.zeros(prompt, dtype=torch.bool), torch.ones(count, dtype=torch.bool)]))
    ends = torch.tensor([0, *(p.numel() for p in pieces)]).cumsum(0).to(torch.int32)
    return (torch.cat(pieces) if shape.ragged else None), ends


def head_inputs(shape: Shape, device: torch.device, seed: int = 0) -> HeadInputs:
    """Inputs of the tasks that read the vocabulary."""
    mask, cu_seqlens = _layout(shape, torch.Generator().manual_seed(seed))
    positions = int(cu_seqlens[-1])
    generator = torch.Generator(device).manual_seed(seed)

    def normal(*size: int) -> Tensor:
        return torch.randn(*size, generator=generator, device=device)

    v, h = shape.vocab, shape.hidden
    rank = torch.arange(1, v + 1, device=device, dtype=torch.float32)
    log_unigram = -rank.log() - (1.0 / rank).sum().log()
    weight = torch.empty(v, h, dtype=shape.dtype, device=device)
    for start in range(0, v, 16_384):
        block = weight[start : start + 16_384]
        block.copy_(normal(block.shape[0], h) / h**0.5)
    weight[:, 0] = log_unigram[torch.randperm(v, generator=generator, device=device)].to(shape.dtype)

    actions = torch.multinomial(weight[:, 0].float().exp(), positions, replacement=True, generator=generator)
    hidden = SPREAD * normal(positions, h)
    peak = MOST_PEAKED * torch.rand(positions, 1, generator=generator, device=device)
    hidden += peak * weight[actions].float()
    hidden[:, 0] = 1.0
    hidden = hidden.to(shape.dtype)

    mask = None if mask is None else mask.to(device)
    rows = None if mask is None else mask.nonzero().squeeze(1)
    old_logprobs = plain_logprobs(hidden, weight, actions, shape.softcap) + 0.05 * normal(positions)
    values = 0.3 * normal(positions)
    targets = KLQTargets(old_logprobs, values + 0.05 * normal(positions), 0.5 * normal(positions))
    cu_seqlens = cu_seqlens.to(device)
    owner = torch.bucketize(torch.arange(positions, device=device), cu_seqlens[1:].long(), right=True)
    scores = normal(cu_seqlens.numel() - 1)[owner]
    return HeadInputs(
        hidden.requires_grad_(), weight.requires_grad_(), actions, values.requires_grad_(), targets, scores,
        mask, rows, cu_seqlens, shape.softcap,
    )  # fmt: skip


def plain_logprobs(hidden: Tensor, weight: Tensor, actions: Tensor, softcap: float | None) -> Tensor:
    """Log-probabilities of the actions in fp32, a few rows of logits at a time, without anything of this library."""
    out = []
    with torch.no_grad():
        for h, a in zip(hidden.split(256), actions.split(256), strict=True):
            z = (h @ weight.T).float()
            if softcap is not None:
                z = softcap * torch.tanh(z / softcap)
            out.append(z.gather(1, a[:, None]).squeeze(1) - z.logsumexp(1))
    return torch.cat(out)


def scan_inputs(shape: Scan, device: torch.device, seed: int = 0) -> ScanInputs:
    """Inputs of the tasks that run over time."""
    generator = torch.Generator(device).manual_seed(seed)
    size = (shape.batch, shape.length)

    def normal() -> Tensor:
        return torch.randn(*size, generator=generator, device=device)

    logprobs = -normal().abs()
    ref_logprobs = (logprobs + 0.1 * normal()).to(shape.dtype)
    mask = None
    if shape.ragged:
        counts = torch.randint(
            shape.length // 4, shape.length + 1, (shape.batch, 1), generator=generator, device=device
        )
        mask = torch.arange(shape.length, device=device) < counts
    return ScanInputs(
        logprobs.to(shape.dtype), ref_logprobs, normal().to(shape.dtype), (0.1 * normal()).to(shape.dtype), mask
    )
