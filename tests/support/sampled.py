"""Rows of logits to sample the gradient of, and what must hold of the estimate."""

from __future__ import annotations

import torch
from torch import Tensor

from klq_kernels.vocabulary.sampling import RESOLUTION, uniform_bits

KINDS = ("flat", "peaked", "one-hot", "tied", "masked", "huge", "unlikely")


def rows(kind: str, n: int, vocab: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """(logits [n, V] fp32, actions [n])."""
    g = torch.Generator().manual_seed(seed)
    z = torch.randn(n, vocab, generator=g)
    actions = torch.randint(vocab, (n,), generator=g)
    spread = z - 2.0 * torch.arange(1, vocab + 1).log()
    match kind:
        case "flat":
            z *= 0.01
        case "peaked":
            z = spread
        case "one-hot":
            z[torch.arange(n), actions] += 60.0
        case "tied":
            z = (z > 1.0) * 3.0
        case "masked":
            z = spread.masked_fill(torch.rand(n, vocab, generator=g) < 0.5, -torch.inf)
            z[torch.arange(n), actions] = 1.0
        case "huge":
            z = 1000.0 + 200.0 * z
        case "unlikely":  # the taken token's own p underflows
            z[torch.arange(n), actions] -= 150.0
    return z, actions


def threshold_of(g: Tensor, logp: Tensor, samples: int, scale: float = 1.0) -> float:
    """eps of a chunk in float64, with the upper bound of 1 - p that the library takes."""
    return float((g.double().abs() * scale * (RESOLUTION - torch.expm1(logp.double()))).mean() / samples)


def assert_selected(
    estimate: Tensor, dense: Tensor, actions: Tensor, threshold: float, seed: int, *, exactness: float = 1e-4
) -> None:
    """``reference.sampled_gradient``, stated so that rounding may move an entry whose running sum is at a whole number.

    Args:
        estimate, dense: [n, V], of which ``dense`` is exact; of gradients by the log-probabilities of order 1, which
            fp32 knows the 1 - p of a likely token to.
        exactness: relative error of shares; running sums may be off by that times the number of samples.
    """
    estimate, dense = estimate.double(), dense.double()
    n = dense.shape[0]
    u = (uniform_bits(torch.tensor(seed), n).long() & 0xFFFFFFFF).double() / 2.0**32
    taken = torch.zeros_like(dense, dtype=torch.bool).scatter_(1, actions[:, None], True)
    share = dense.abs() / threshold
    kept = (estimate != 0) & ~taken
    torch.testing.assert_close(estimate[taken], dense[taken], rtol=exactness, atol=5e-6)
    large = (share > 1 + exactness) & ~taken
    torch.testing.assert_close(estimate[large], dense[large], rtol=10 * exactness, atol=0)
    small = (share < 1 - exactness) & ~taken
    sizes = estimate[small & kept]
    torch.testing.assert_close(sizes, dense[small & kept].sign() * threshold, rtol=10 * exactness, atol=0)
    # entries at the threshold itself are either kind: they leave the running sum to a whole number alike
    running = torch.where(taken | large, 0.0, share).cumsum(1) + u[:, None]
    counted = (kept & ~large).cumsum(1).double()
    slack = exactness * (1 + running)
    assert (counted >= (running - slack).floor()).all()
    assert (counted <= (running + slack).floor()).all()
