"""Row statistics: the normaliser, log-probability of the taken token, entropy, in one read of the logits.

One program per row, an online softmax over tiles of GROUPS x LANES logits. Each lane keeps its own running maximum m
and running sums

    s = sum 2^(k (x - m)),        t = sum 2^(k (x - m)) k (x - m),        k = log2(e) / temperature,

so a tile costs one exp2, one subtraction and one product per logit plus one rescaling exp2 per lane, and no thread
talks to another before the row ends. (k x - k m would be one instruction, and lose what large logits differ by.) There
the lanes are joined: with M = max m, S = sum s 2^(k (m - M)), and T alike,

    top = M,    log_total = log2 S ln 2,    logp = (k (x_a - M) - log2 S) ln 2,    entropy = (log2 S - T / S) ln 2.

Lanes start from a finite maximum, so that logits of -inf (a masked vocabulary) need no special case; a NaN or +inf
logit makes the row NaN. A token id outside the vocabulary makes logp NaN: never a plausible wrong number.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from ...vocabulary.chunks import Statistics
from .launch import ROW_STATS, on_device
from .math import LN2, LOG2E, soft_cap

FLOOR = tl.constexpr(-1.0e30)
NEGLIGIBLE = tl.constexpr(-1000.0)  # 2^-1000 is 0 in fp32


@triton.jit
def _absorb(x, m, s, t, k, softcap, ENTROPY: tl.constexpr):
    """The running (m, s, t) of each lane after one more tile x [GROUPS, LANES]."""
    if softcap is not None:
        x, _ = soft_cap(x, softcap)
    top = tl.maximum(m, tl.max(x, axis=0))
    step = (m - top) * k
    shrink = tl.exp2(step)
    y = (x - top[None, :]) * k
    e = tl.exp2(y)
    if ENTROPY:
        y = tl.maximum(y, NEGLIGIBLE)  # a logit of -inf has e = 0, and 0 * -inf would be NaN
        t = shrink * tl.fma(tl.maximum(step, NEGLIGIBLE), s, t) + tl.sum(e * y, axis=0)
    return top, tl.fma(shrink, s, tl.sum(e, axis=0)), t


@triton.jit
def biased(x, bias, cols, inside):
    """The logits x of these columns, and the bias that their product did not add, where there is one. All columns are
    in the row where ``inside`` is None.
    """
    if bias is not None:
        if inside is None:
            x += tl.load(bias + cols).to(tl.float32)
        else:
            x += tl.load(bias + cols, mask=inside, other=0.0).to(tl.float32)
    return x


@triton.jit
def statistics(
    base, bias, action, stride, vocab, scale, softcap, ENTROPY: tl.constexpr, GROUPS: tl.constexpr, LANES: tl.constexpr
):
    """(top, log_total, logp of the action, entropy or 0) of the row that begins at ``base``."""
    TILE: tl.constexpr = GROUPS * LANES
    k = scale * LOG2E
    tile = tl.arange(0, GROUPS)[:, None] * LANES + tl.arange(0, LANES)[None, :]
    m = tl.full([LANES], FLOOR, tl.float32)
    s = tl.zeros([LANES], tl.float32)
    t = tl.zeros([LANES], tl.float32)
    whole = vocab // TILE * TILE
    for start in range(0, whole, TILE):
        x = biased(tl.load(base + start + tile).to(tl.float32), bias, start + tile, None)
        m, s, t = _absorb(x, m, s, t, k, softcap, ENTROPY)
    if whole < vocab:  # the last tile also loads the row's padding, and ignores it
        cols = whole + tile
        x = biased(tl.load(base + cols, mask=cols < stride, other=0.0).to(tl.float32), bias, cols, cols < stride)
        x = tl.where(cols < vocab, x, float("-inf"))
        if softcap is not None:
            x, _ = soft_cap(x, softcap)
            x = tl.where(cols < vocab, x, float("-inf"))
        m, s, t = _absorb(x, m, s, t, k, None, ENTROPY)

    highest = tl.max(m, axis=0)
    step = (m - highest) * k
    shrink = tl.exp2(step)
    total = tl.sum(s * shrink, axis=0)
    log2_total = tl.log2(total)
    known = (action >= 0) & (action < vocab)
    taken = biased(tl.load(base + action, mask=known, other=float("nan")).to(tl.float32), bias, action, known)
    if softcap is not None:
        taken, _ = soft_cap(taken, softcap)
    logp = tl.fma(taken - highest, k, -log2_total) * LN2
    spread = 0.0
    if ENTROPY:
        weighted = tl.sum(shrink * tl.fma(tl.maximum(step, NEGLIGIBLE), s, t), axis=0)
        spread = (log2_total - weighted / total) * LN2
    return highest, log2_total * LN2, logp, spread


@triton.jit
def row_stats_kernel(
    logits, bias, actions, top, log_total, logp, entropy, stride, vocab, scale, softcap,
    GROUPS: tl.constexpr, LANES: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    highest, rest, taken, spread = statistics(
        logits + row * stride, bias, tl.load(actions + row), stride, vocab, scale, softcap, entropy is not None,
        GROUPS, LANES,
    )  # fmt: skip
    tl.store(top + row, highest)
    tl.store(log_total + row, rest)
    tl.store(logp + row, taken)
    if entropy is not None:
        tl.store(entropy + row, spread)


def row_stats(
    logits: Tensor,
    actions: Tensor,
    out: Statistics,
    *,
    scale: float,
    softcap: float | None,
    bias: Tensor | None = None,
) -> None:
    """See ``portable.row_stats``. ``bias``, [stride] in any floating dtype, is added to each row of logits."""
    n, vocab = logits.shape
    config = ROW_STATS[logits.element_size()]
    with on_device(logits):
        row_stats_kernel[(n,)](
            logits, bias, actions, *out, logits.stride(0), vocab, scale, softcap,
            **config.sizes, **config.options,
        )  # fmt: skip
