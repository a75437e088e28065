"""The compiled operations for CPU tensors (``csrc/``): finds and loads the library, or says why it is absent.

A backend module like ``portable``, which documents what both have. Logits come in strips of the vocabulary here
(``vocabulary_major``), so ``strip_stats``, ``strip_grad`` and ``strip_select`` stand in place of the row operations.

The library picks the best of its instruction sets (portable, avx2, avx512) for the processor at run time. Two
environment variables are for testing it: ``KLQ_NATIVE_ISA`` names an instruction set to use instead,
``KLQ_NATIVE_LIBRARY`` the path of another build (one with sanitizers, say).
"""

from __future__ import annotations

import os
import warnings
from pathlib import Path

import torch
from torch import Tensor

from ..vocabulary.chunks import Chosen, LossShape, Pull, Residuals, ScanTerms, Selection, Sums, Terms
from .portable import finish_logits
from .portable import klq_metrics as klq_metrics
from .portable import row_kl as row_kl
from .portable import row_kl_grad as row_kl_grad
from .portable import scale as scale

NAME = "native"
VOCABULARY_MAJOR = True
ADDS_BIAS = False
PADS_ROWS = False  # of logits stored token by token, which ``row_kl`` reads
ISAS = ("portable", "avx2", "avx512")  # in the order of csrc/ops.cpp
OPERATIONS = (  # of the library, all that this file calls
    "use_isa", "populate", "strip_stats", "strip_grad", "strip_select", "weighted_sums", "row_dots", "klq_residual",
    "lambda_errors", "reverse_scan",
)  # fmt: skip
REPEAT = "with torch and a C++ compiler, repeat the installation with --force-reinstall --no-deps"
LOSS_TYPES = ("l2", "huber", "value_clipped", "ratio_clipped", "double_clipped")  # in the order of csrc/kernels.h


def use_isa(name: str | None = None) -> str:
    """Makes every later call use this instruction set, by default the best; returns its name.

    Raises:
        ValueError: where it is unknown, or this processor does not have it.
    """
    if name is not None and name not in ISAS:
        raise ValueError(f"KLQ_NATIVE_ISA: must be one of {', '.join(ISAS)}, got {name!r}")
    try:
        return ISAS[torch.ops.klq_native.use_isa(-1 if name is None else ISAS.index(name))]
    except RuntimeError as error:
        others = ", ".join(isa for isa in ISAS if isa != name)
        raise ValueError(f"KLQ_NATIVE_ISA: this processor does not have {name}; choose one of {others}") from error


def _load() -> str | None:
    """Loads the library; returns None, or the reason why there is none in a few words, with a warning where there is a
    file that cannot be used. Raises the ValueError of ``use_isa``.
    """
    given = os.environ.get("KLQ_NATIVE_LIBRARY")
    built = [Path(given)] if given else sorted(Path(__file__).parent.glob("_native*.so"))
    if not built:
        return f"not built; {REPEAT}"
    reason = _why_unusable(built[0])
    if reason is not None:
        warnings.warn(f"klq_kernels: plain PyTorch runs in place of the native backend: {reason}", stacklevel=2)
        return reason
    use_isa(os.environ.get("KLQ_NATIVE_ISA") or None)
    return None


def _why_unusable(library: Path) -> str | None:
    """Loads this library; returns None, or the reason why it cannot be used."""
    try:
        torch.ops.load_library(str(library))
    except (OSError, RuntimeError) as error:
        return f"{library.name} does not load: {error}"
    missing = [name for name in OPERATIONS if not hasattr(torch.ops.klq_native, name)]
    return f"{library.name} is of older sources, without {', '.join(missing)}; {REPEAT}" if missing else None


WHY_UNAVAILABLE = _load()


def populate(buffer: Tensor) -> None:
    """Has a Linux kernel provide the memory of a new, contiguous buffer at once; it must be going to be written."""
    torch.ops.klq_native.populate(buffer)


def strip_stats(
    logits: Tensor,
    first: int,
    actions: Tensor,
    top: Tensor,
    total: Tensor,
    weighted: Tensor | None,
    taken: Tensor,
    *,
    scale: float,
    softcap: float | None,
) -> None:
    """Takes one more strip of the vocabulary into the running statistics of each token.

    Args:
        logits: [entries, n] contiguous: raw, of the vocabulary's entries from ``first`` on; c = softcap(logits).
        actions: int64 [n].
        top, total, weighted, taken: fp32 [n], updated: the largest c so far, the sum of e = exp(d) with
            d = scale (c - top), the sum of e d (None where no entropy is wanted), and c of the taken token once its
            strip has come. They start at -inf, 0, 0 and NaN.
    """
    torch.ops.klq_native.strip_stats(logits, first, actions, top, total, weighted, taken, scale, softcap)


def strip_grad(
    logits: Tensor,
    first: int,
    actions: Tensor,
    pull: Pull,
    out: Tensor,
    turned: Tensor | None,
    *,
    scale: float,
    softcap: float | None,
) -> None:
    """Writes the gradient by a strip of logits: the formula of ``portable.row_grad``, tokens being columns here.

    Args:
        logits, first: as in ``strip_stats``.
        actions, pull: [n], as in ``portable.row_grad``.
        out: [entries, n] contiguous, in the dtype of logits (it may be logits) or fp32.
        turned: [n, entries] contiguous, the same numbers once more, in the dtype of out; or None.
    """
    torch.ops.klq_native.strip_grad(logits, first, actions, *pull, out, turned, scale, softcap)


def strip_select(
    logits: Tensor,
    first: int,
    actions: Tensor,
    pull: Pull,
    selection: Selection,
    *,
    scale: float,
    softcap: float | None,
) -> None:
    """Takes one more strip of the vocabulary into the selection of ``portable.row_select``.

    Args:
        logits, first: as in ``strip_stats``; strips come in ascending order.
        actions, pull, selection: [n], as in ``portable.row_select``; ``fractions`` holds the running sums.
    """
    torch.ops.klq_native.strip_select(logits, first, actions, *pull[:4], *selection, scale, softcap)


def weighted_sums(sums: Sums, source: Tensor, out: Tensor) -> None:
    torch.ops.klq_native.weighted_sums(*sums, source, out)


def selected_logits(
    chosen: Chosen,
    weight: Tensor,
    bias: Tensor | None,
    out: Tensor,
    slope: Tensor | None,
    *,
    scale: float,
    softcap: float | None,
) -> None:
    (hidden, positions), ids, atoms = chosen
    known = ids.clamp(0, weight.shape[0] // atoms - 1)
    rows = (known[..., None] * atoms + torch.arange(atoms)).int()
    torch.ops.klq_native.row_dots(hidden, positions, rows.flatten(1), weight, out)
    finish_logits(ids, known.flatten(), bias, out.view(-1, atoms), slope, scale=scale, softcap=softcap)


def klq_residual(terms: Terms, out: Residuals, *, grad_scale: Tensor, shape: LossShape) -> None:
    tau, alpha, loss_type, huber_delta, value_clip, log_ratio_clip = shape
    torch.ops.klq_native.klq_residual(
        *terms, *out, grad_scale, tau, alpha, LOSS_TYPES.index(loss_type), huber_delta, value_clip, log_ratio_clip
    )


def reverse_scan(delta: Tensor, decay: Tensor, mask: Tensor | None, cu_seqlens: Tensor, out: Tensor) -> None:
    decay = decay.float() if decay.numel() == 1 else decay
    torch.ops.klq_native.reverse_scan(delta, decay, mask, cu_seqlens, out)


def lambda_errors(
    terms: ScanTerms,
    tail: Tensor,
    mask: Tensor | None,
    cu_seqlens: Tensor,
    out: Tensor,
    *,
    tau: float,
    gamma: float,
    lam: float,
    first_row: int = 0,
    carry: Tensor | None = None,
    kept_logp: Tensor | None = None,
    kept_values: Tensor | None = None,
) -> None:
    torch.ops.klq_native.lambda_errors(
        *terms, tail, mask, cu_seqlens, out, tau, gamma, lam, first_row, carry, kept_logp, kept_values
    )
