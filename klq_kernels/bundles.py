"""What travels between the loop (``one_pass``) and a backend's operations (``portable``), in bundles.

Vectors are contiguous [n], and fp32 but for those of ``ScanTerms``, with a number for each row of a pass, or of the
chunk that ``part`` cuts out.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple, TypeVar

from torch import Tensor


class Statistics(NamedTuple):
    """What is found of a row of logits; ``portable.row_stats`` says how. ``entropy`` is None where nobody asked."""

    top: Tensor
    log_total: Tensor
    logp: Tensor
    entropy: Tensor | None


class Pull(NamedTuple):
    """What the gradient by a row of logits is made of (``portable.row_grad_``)."""

    top: Tensor
    log_total: Tensor
    d_action: Tensor
    d_softmax: Tensor
    d_entropy: Tensor | None = None
    entropy: Tensor | None = None


class Terms(NamedTuple):
    """What a token's loss is made of. On-policy, where logp - old_logp = V - old_V = 0, the old ones are None."""

    logp: Tensor
    values: Tensor
    old_logp: Tensor | None
    old_values: Tensor | None
    advantages: Tensor
    weights: Tensor | None


class Residuals(NamedTuple):
    """A token's weighted loss, and its derivatives at the gradient scale."""

    losses: Tensor
    d_logp: Tensor
    d_values: Tensor


class ScanTerms(NamedTuple):
    """What a token's lambda-error is made of, in any floating dtype; all but the values may be absent."""

    logp: Tensor | None
    ref_logp: Tensor | None
    values: Tensor
    rewards: Tensor | None
    trace: Tensor | None


class LossShape(NamedTuple):
    """The hyperparameters of ``reference.klq_residual_loss``."""

    tau: float
    alpha: float
    loss_type: str
    huber_delta: float
    value_clip: float
    log_ratio_clip: float


Bundle = TypeVar("Bundle", Statistics, Pull, Terms, Residuals, ScanTerms)


def each(bundle: Bundle, change: Callable[[Tensor], Tensor]) -> Bundle:
    """The bundle with ``change`` made to each vector that is there."""
    return type(bundle)._make(None if vector is None else change(vector) for vector in bundle)


def part(bundle: Bundle, chunk: slice) -> Bundle:
    """These rows of each vector in the bundle."""
    return each(bundle, lambda vector: vector[chunk])
