"""The row operations in plain PyTorch: the backend for any device, and the fallback where nothing faster is built.

A backend is a module with the functions below; ``triton`` holds the same as kernels, and ``native`` has functions on
strips of logits in place of the first three, which ``VOCABULARY_MAJOR`` says. ``PADS_ROWS`` says whether the rows of a
buffer of logits are padded to multiples of 64 elements (``chunking.row_stride``); under a bias they are not, where V is
a multiple of 16. ``ADDS_BIAS`` says whether the first three take a bias which the product left out (``token_major``).
Per-row vectors are contiguous fp32, all arithmetic is fp32 whatever the logits' dtype, and results are written into the
caller's buffers.

Vocabulary rows are visited a few at a time, in a scratch block small enough to stay in cache, so that a chunk of
logits is read from memory once per operation and never copied whole.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from ..vocabulary.chunking import STRIP_ROWS
from ..vocabulary.chunks import (
    Chosen,
    Divergence,
    LossShape,
    Pair,
    Pull,
    Residuals,
    ScanTerms,
    Selection,
    Statistics,
    Sums,
    Terms,
    slices,
)

NAME = "torch"
VOCABULARY_MAJOR = False
PADS_ROWS = False
ADDS_BIAS = False
SCRATCH_ELEMENTS = 2**18  # fp32 elements of a block: 1 MiB


def _blocks(logits: Tensor) -> Iterator[tuple[slice, Tensor]]:
    """Yields (rows, their logits as an fp32 copy in a scratch block that the next round reuses)."""
    n, vocab = logits.shape
    step = max(SCRATCH_ELEMENTS // max(vocab, 1), 1)
    scratch = torch.empty(min(step, n), vocab, dtype=torch.float32, device=logits.device)
    for start in range(0, n, step):
        rows = slice(start, min(start + step, n))
        yield rows, scratch[: rows.stop - start].copy_(logits[rows])


def _cap_(x: Tensor, softcap: float | None) -> Tensor | None:
    """Turns raw logits into c = softcap(x) in place; returns tanh(x / softcap), which the gradient needs."""
    if softcap is None:
        return None
    tanh = x.div_(softcap).tanh_().clone()
    x.mul_(softcap)
    return tanh


def row_stats(logits: Tensor, actions: Tensor, out: Statistics, *, scale: float, softcap: float | None) -> None:
    """Writes what softmax(z) is normalised by, the log-probability of the taken token and, where asked, the entropy.

    With c = softcap(logits) and z = scale c, scale being 1 / temperature, the normaliser is handed on in two parts,

        top = max c,        log_total = log sum exp(scale (c - top)),        logsumexp(z) = scale top + log_total,

    because a log-probability is a small difference of large logits: (c - top) loses nothing, a logsumexp rounded to
    fp32 has lost more than the 1 - p of a likely token.

    Args:
        logits: [n, V], raw.
        actions: int64 [n]; outside 0 .. V-1 the log-probability is NaN.
        out: written.
    """
    top, log_total, logp, entropy = out
    known = actions.clamp(0, logits.shape[1] - 1)
    for rows, x in _blocks(logits):
        _cap_(x, softcap)
        torch.amax(x, 1, out=top[rows])
        x.sub_(top[rows, None])
        if scale != 1.0:
            x.mul_(scale)
        taken = x.gather(1, known[rows, None]).squeeze(1)
        if entropy is None:
            torch.log(x.exp_().sum(1), out=log_total[rows])
        else:
            e = x.exp()
            total = e.sum(1)
            torch.log(total, out=log_total[rows])
            weighted = torch.where(e > 0, e.mul_(x), 0).sum(1)
            torch.sub(log_total[rows], weighted.div_(total), out=entropy[rows])
        torch.sub(taken, log_total[rows], out=logp[rows])
    logp.masked_fill_(known != actions, torch.nan)


def row_grad(
    logits: Tensor,
    actions: Tensor,
    pull: Pull,
    out: Tensor,
    column_sums: Tensor | None = None,
    *,
    scale: float,
    softcap: float | None,
) -> None:
    """Writes the gradient by each row of logits over the row itself.

    ``out`` is [n, V] in memory of the logits, a row where a row is: ``logits`` itself, or a view in a narrower dtype.

    With p = softmax(z) the row becomes

        (d_action onehot(action) + d_softmax p - d_entropy p (log p + entropy)) * dz/dlogits

    where logp has gradient g and logsumexp(z) has gradient s: d_action = g and d_softmax = s - g. ``top`` and
    ``log_total`` are those of ``row_stats``. An action outside 0 .. V-1 has a ``d_action`` of NaN already.

    To ``column_sums``, fp32 [V], the sum of the gradient over the rows is added, before it is rounded or after.
    """
    top, log_total, d_action, d_softmax, d_entropy, entropy = pull
    known = actions.clamp(0, logits.shape[1] - 1)
    for rows, x in _blocks(logits):
        tanh = _cap_(x, softcap)
        x.sub_(top[rows, None])
        if scale != 1.0:
            x.mul_(scale)
        x.sub_(log_total[rows, None])
        if d_entropy is None or entropy is None:
            x.exp_().mul_(d_softmax[rows, None])
        else:
            p = x.exp()
            x.add_(entropy[rows, None]).mul_(-d_entropy[rows, None]).add_(d_softmax[rows, None]).mul_(p)
            x.masked_fill_(p == 0, 0.0)
        x.scatter_add_(1, known[rows, None], d_action[rows, None])
        if scale != 1.0:
            x.mul_(scale)
        if tanh is not None:
            x.mul_(tanh.square_().neg_().add_(1.0))
        out[rows] = x
    if column_sums is not None:
        column_sums += out.sum(0, dtype=torch.float32)


def row_select(
    logits: Tensor, actions: Tensor, pull: Pull, selection: Selection, *, scale: float, softcap: float | None
) -> None:
    """Writes the entries that the sampled gradient keeps of the gradient by each row of logits (``sampling``).

    The taken token's, whatever it is; every other of magnitude ``threshold`` or more; and of the smaller ones those
    whose share of the threshold carries the row's running sum over a whole number, at the value of the threshold with
    the gradient's sign. A share is rounded to 2^-32. A row whose gradient is NaN keeps the taken token's entry alone.

    Args:
        logits, actions, pull: as in ``row_grad``; of ``pull`` the last two are None. An action outside 0 .. V-1 stands
            for the nearest one, and has a ``d_action`` of NaN.
        selection: what it names as written, is written.
    """
    threshold, fractions, offsets, columns, values, counts = selection
    known = actions.clamp(0, logits.shape[1] - 1)
    rate = pull.d_softmax.abs() * scale / threshold
    for rows, x in _blocks(logits):
        tanh = _cap_(x, softcap)
        p = x.sub_(pull.top[rows, None]).mul_(scale).sub_(pull.log_total[rows, None]).exp_()
        slope = None if tanh is None else tanh.square_().neg_().add_(1.0)
        action = known[rows, None]
        taken = (p.gather(1, action) * pull.d_softmax[rows, None] + pull.d_action[rows, None]) * scale
        share = p.mul_(rate[rows, None])
        if slope is not None:
            taken *= slope.gather(1, action)
            share.mul_(slope)
        small = share < 1.0
        small.scatter_(1, action, False)
        steps = torch.where(small, share * 2.0**32, 0.0).round_().long()
        start = fractions[rows, None].long() & 0xFFFFFFFF
        sums = steps.cumsum(1).add_(start)
        kept = torch.where(small, (sums >> 32) != (sums - steps >> 32), share >= 1.0)
        kept.scatter_(1, action, True)
        entry = torch.copysign(torch.where(small, threshold, share * threshold), pull.d_softmax[rows, None])
        entry.scatter_(1, action, taken)
        row, column = kept.nonzero(as_tuple=True)
        slot = offsets[rows][row] + kept.cumsum(1)[row, column] - 1
        columns[slot] = column.int()
        values[slot] = entry[row, column]
        counts[rows] = kept.sum(1, dtype=torch.int32)


def weighted_sums(sums: Sums, source: Tensor, out: Tensor) -> None:
    """Writes ``out``, [rows, W], as ``Sums`` says: in fp32, rounded once.

    Args:
        source: [any, W] contiguous, of any floating dtype.
        out: contiguous, of any floating dtype.
    """
    step = max(SCRATCH_ELEMENTS // source.shape[1], 1)
    for rows in slices(out.shape[0], step):
        counts = sums.ends[rows] - sums.begins[rows]
        owners = torch.arange(counts.numel(), device=out.device).repeat_interleave(counts)
        before = (sums.begins[rows] - counts.cumsum(0) + counts).repeat_interleave(counts)
        entries = torch.arange(owners.numel(), device=out.device) + before
        total = torch.zeros(counts.numel(), source.shape[1], dtype=torch.float32, device=out.device)
        for piece in slices(entries.numel(), step):
            some = entries[piece]
            total.index_add_(0, owners[piece], source[sums.places[some]].float() * sums.values[some, None])
        out[rows] = total


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
    """Writes scale softcap(c) of each chosen entry, and the slope of the soft cap there.

    c is the dot product of the token's hidden state with the entry's row of the weight, in fp32, plus the entry's bias.
    An id outside 0 .. V - 1 stands for the nearest one, and its logit is NaN.

    Args:
        chosen: its hidden states contiguous.
        weight: [V atoms, H] contiguous, of any floating dtype.
        bias: fp32 [V atoms] or None.
        out: fp32 [n, k, atoms], written.
        slope: like ``out``, written; None without a soft cap.
    """
    (hidden, positions), ids, atoms = chosen
    rows, found = weight.view(-1, atoms, weight.shape[1]), out.view(-1, atoms)
    known = ids.flatten().clamp(0, rows.shape[0] - 1)
    tokens = torch.arange(known.numel(), device=ids.device) // ids.shape[1]
    places = tokens if positions is None else positions[tokens]
    for some in slices(known.numel(), max(SCRATCH_ELEMENTS // rows[0].numel(), 1)):
        products = rows[known[some]].float() * hidden[places[some], None].float()
        torch.sum(products, 2, out=found[some])
    finish_logits(ids, known, bias, found, slope, scale=scale, softcap=softcap)


def finish_logits(
    ids: Tensor,
    known: Tensor,
    bias: Tensor | None,
    found: Tensor,
    slope: Tensor | None,
    *,
    scale: float,
    softcap: float | None,
) -> None:
    """Makes logits of dot products: the rest of ``selected_logits``.

    Args:
        ids: the caller's; ``known``: those that stand for them, flat.
        found: fp32 [pairs, atoms], in and out.
    """
    if bias is not None:
        found.add_(bias.view(-1, found.shape[1])[known])
    tanh = _cap_(found, softcap)
    if tanh is not None and slope is not None:
        torch.sub(1.0, tanh.square_(), out=slope.view(found.shape))
    found.mul_(scale).masked_fill_((known != ids.flatten())[:, None], torch.nan)


def row_kl(logits: Tensor, ref_logits: Tensor, out: Divergence, *, pair: Pair) -> None:
    """Writes the divergence of the softmaxes of two rows of logits, and what each is normalised by, as ``row_stats``.

    With u and w the log-probabilities of the two, the policy's first or, in reverse, the reference's, and d = u - w,

        KL = sum exp(u) h(d),        h(d) = d + exp(-d) - 1 >= 0.

    This is sum exp(u) d, with sum exp(w) - exp(u) = 0 added to it. So no term is negative, equal rows give exactly 0,
    and an error of the normalisers, which all d share, enters in second order only. Where both probabilities are 0 so
    is the term; where the first alone is, it is the second; where the second alone is 0 the divergence is infinite.

    Args:
        logits, ref_logits: [n, V], raw, each of its own dtype.
        out: written.
    """
    top, log_total, ref_top, ref_log_total, kl = out
    for (rows, x), (_, y) in zip(_blocks(logits), _blocks(ref_logits), strict=True):
        for z, scale, softcap, highest, rest in (
            (x, pair.scale, pair.softcap, top, log_total),
            (y, pair.ref_scale, pair.ref_softcap, ref_top, ref_log_total),
        ):
            _cap_(z, softcap)
            torch.amax(z, 1, out=highest[rows])
            z.sub_(highest[rows, None]).mul_(scale)
            torch.log(z.exp().sum(1), out=rest[rows])
            z.sub_(rest[rows, None])
        u, w = (y, x) if pair.reverse else (x, y)
        d = u - w
        p, q = u.exp_(), w.exp_()
        far = (p * d).masked_fill_(p == 0, 0.0).add_(q.sub_(p))
        near = _excess_ratio(d, out=q).mul_(d).mul_(d).mul_(p)
        torch.sum(torch.where(d.abs_() < 0.5, near, far), 1, out=kl[rows])


def _excess_ratio(d: Tensor, out: Tensor) -> Tensor:
    """(d + exp(-d) - 1) / d^2 for |d| < 1/2, by its series; the truncated rest is below a unit of fp32."""
    out.fill_(1 / 40320)
    for factorial in (-5040, 720, -120, 24, -6, 2):
        torch.addcmul(out.new_tensor(1 / factorial), out, d, out=out)
    return out


def row_kl_grad(
    logits: Tensor, ref_logits: Tensor, found: Divergence, d_kl: Tensor, out: Tensor, *, pair: Pair
) -> None:
    """Writes the gradient by each row of the policy's logits over the row itself, as ``row_grad`` does.

    With p and q the softmaxes of policy and reference, and g = ``d_kl``, the row becomes

        g p (log p - log q - KL) * dz/dlogits        for KL(p || q), 0 where p = 0,
        g (p - q) * dz/dlogits                       in reverse.

    Args:
        logits, ref_logits: as in ``row_kl``; ``found`` is what that one wrote.
        d_kl: fp32 [n].
        out: as in ``row_grad``.
    """
    top, log_total, ref_top, ref_log_total, kl = found
    for (rows, x), (_, y) in zip(_blocks(logits), _blocks(ref_logits), strict=True):
        tanh = _cap_(x, pair.softcap)
        _cap_(y, pair.ref_softcap)
        u = x.sub_(top[rows, None]).mul_(pair.scale).sub_(log_total[rows, None])
        w = y.sub_(ref_top[rows, None]).mul_(pair.ref_scale).sub_(ref_log_total[rows, None])
        if pair.reverse:
            d = u.exp_().sub_(w.exp_())
        else:
            p = u.exp()
            d = u.sub_(w).sub_(kl[rows, None]).mul_(p).masked_fill_(p == 0, 0.0)
        d.mul_((pair.scale * d_kl[rows])[:, None])
        if tanh is not None:
            d.mul_(tanh.square_().neg_().add_(1.0))
        out[rows] = d


def klq_residual(terms: Terms, out: Residuals, *, grad_scale: Tensor, shape: LossShape) -> None:
    """Writes each token's weighted loss and its derivatives by logp and V (``reference.klq_residual_loss``).

    The derivatives, not the losses, are multiplied by ``grad_scale`` (fp32, 0-d). Where two squares tie, the unclipped
    one passes its gradient.
    """
    logp, values, old_logp, old_values, advantages, weights = terms
    tau, alpha, loss_type, huber_delta, value_clip, log_ratio_clip = shape
    d = torch.zeros_like(logp) if old_logp is None else logp - old_logp
    v = torch.zeros_like(values) if old_values is None else values - old_values
    target = alpha * advantages
    change = tau * d + v
    e = change - target
    if loss_type == "huber":
        magnitude = e.abs()
        loss = torch.where(magnitude <= huber_delta, 0.5 * e * e, huber_delta * (magnitude - 0.5 * huber_delta))
        by_value = e.clamp(-huber_delta, huber_delta)
        by_logp = tau * by_value
    else:
        loss = e * e
        by_value = 2.0 * e
        by_logp = tau * by_value
    if loss_type in ("value_clipped", "double_clipped"):
        clipped = change.clamp(-value_clip, value_clip) - target
        wins = clipped * clipped > loss
        loss = torch.where(wins, clipped * clipped, loss)
        by_value = by_value.masked_fill(wins, 0.0)
        by_logp = by_logp.masked_fill(wins, 0.0)
    if loss_type in ("ratio_clipped", "double_clipped"):
        clipped = tau * d.clamp(-log_ratio_clip, log_ratio_clip) + v - target
        wins = clipped * clipped > loss
        loss = torch.where(wins, clipped * clipped, loss)
        by_value = torch.where(wins, 2.0 * clipped, by_value)
        by_logp = by_logp.masked_fill(wins, 0.0)
    factor = grad_scale if weights is None else weights * grad_scale
    out.losses.copy_(loss if weights is None else loss * weights)
    torch.mul(by_logp, factor, out=out.d_logp)
    torch.mul(by_value, factor, out=out.d_values)


def reverse_scan(delta: Tensor, decay: Tensor, mask: Tensor | None, cu_seqlens: Tensor, out: Tensor) -> None:
    """Writes A_t = delta_t + decay_t A_{t+1} over valid tokens of each sequence, 0 at masked ones.

    Args:
        delta, decay: [M], any floating dtype; decay may also hold a single element.
        mask: bool [M] or None. Masked tokens are stepped over.
        cu_seqlens: int32 [B + 1] over 0 .. M.
        out: fp32 [M], written.
    """
    keep, ends, _ = _ends(mask, cu_seqlens, 0, delta.numel())
    b = (decay.float().expand(delta.shape) if keep is None else decay.float().expand(delta.shape)[keep]).clone()
    a = delta.float().clone() if keep is None else delta[keep].float()
    b[ends] = 0.0
    _write(_doubling_scan(a, b), keep, out)


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
    """Writes the lambda-error A_t of every valid token, 0 at masked ones.

    One scalar runs backwards through time. With Q = tau (logp - ref_logp) + V (or Q = V where logp is None) and
    u_t = r_t - Q_t, let S_t = gamma V_t + gamma lambda c_t A_t, which is all that token t - 1 needs of its future:

        A_t = u_t + S_{t+1},        S_t = (gamma V_t + b_t u_t) + b_t S_{t+1},        b_t = gamma lambda c_t.

    So the next value and the next error travel together, a masked token is the identity, and beyond the last token of
    sequence i stands S = tail_i = gamma * bootstrap_i + (score_i, where the reward is one number per sequence).

    Args:
        terms: [M] each.
        tail: fp32 [B].
        mask: bool [M] or None, as it must be of a piece, with a ``first_row`` or a ``carry``.
        cu_seqlens: int32 [B + 1]; element j here is position ``first_row + j`` there.
        out: fp32 [M], written.
        carry: fp32 [1], in and out: S beyond the last element (where no sequence ends there), then S of the first.
        kept_logp, kept_values: fp32 [M] or None, written: logp and values at valid tokens, 0 at masked ones.
    """
    assert mask is None or (first_row == 0 and carry is None), "a piece has no mask"
    logp, ref_logp, values, rewards, trace = terms
    keep, ends, owners = _ends(mask, cu_seqlens, first_row, values.numel())

    def rows(t: Tensor) -> Tensor:
        return (t if keep is None else t[keep]).float()

    v = rows(values)
    u = -v if rewards is None else rows(rewards) - v
    if logp is not None and ref_logp is not None:
        u = u - tau * (rows(logp) - rows(ref_logp))
    b = torch.full_like(v, gamma * lam) if trace is None else gamma * lam * rows(trace)
    beyond = torch.zeros_like(v)  # S_{t+1} where t is the last of its sequence, or of this piece
    if carry is not None and v.numel():
        beyond[-1:] = carry
    beyond[ends] = tail[owners]
    stop = torch.zeros_like(v, dtype=torch.bool)
    stop[ends] = True
    stop[-1:] = True
    a = gamma * v + b * torch.where(stop, u + beyond, u)
    following = _doubling_scan(a, b.masked_fill(stop, 0.0))
    _write(u + torch.where(stop, beyond, following.roll(-1)), keep, out)
    for source, kept in ((logp, kept_logp), (values, kept_values)):
        if source is not None and kept is not None:
            _write(rows(source), keep, kept)
    if carry is not None and v.numel():
        carry.copy_(following[:1])


def _ends(
    mask: Tensor | None, cu_seqlens: Tensor, first_row: int, positions: int
) -> tuple[Tensor | None, Tensor, Tensor]:
    """(valid positions or None, index among them of each sequence's last valid token, which sequence that is)."""
    keep = None
    if mask is not None:
        keep = mask.nonzero().squeeze(1)
        cu_seqlens = torch.nn.functional.pad(mask.cumsum(0), (1, 0))[cu_seqlens]
        positions = keep.numel()
    last = cu_seqlens[1:].long() - 1 - first_row
    here = (cu_seqlens[1:] > cu_seqlens[:-1]) & (last >= 0) & (last < positions)
    return keep, last[here], here.nonzero().squeeze(1)


def _doubling_scan(a: Tensor, b: Tensor) -> Tensor:
    """S_t = a_t + b_t S_{t+1} over a flat array cut wherever b = 0, in log2(longest run) vectorised steps.

    After the step of width k every element has absorbed the 2k elements from itself on. The order of additions depends
    only on the distance to the element, so a sequence gives the same bits wherever it lies. Overwrites both inputs.
    """
    width = 1
    while width < a.numel() and bool((b != 0).any()):
        open_ = b[:-width] != 0  # never multiply across a cut: 0 * inf would leak
        absorbed = torch.where(open_, a[:-width] + b[:-width] * a[width:], a[:-width])
        reach = torch.where(open_, b[:-width] * b[width:], 0.0)
        a[:-width] = absorbed
        b[:-width] = reach
        width *= 2
    return a


def _write(result: Tensor, keep: Tensor | None, out: Tensor) -> None:
    if keep is None:
        out.copy_(result)
    else:
        out.zero_()
        out[keep] = result


def scale(source: Tensor, factor: Tensor, out: Tensor) -> None:
    """out = source * factor, rounded once. Nothing is done where the factor is 1 and ``out`` is ``source``.

    Args:
        source: contiguous, any shape and floating dtype.
        factor: fp32, 0-d, on the same device.
        out: written; as ``source``, or like it in another floating dtype.
    """
    if source.device.type != "cpu":  # as a one-element tensor the factor stays fp32, and the kernel rounds as it writes
        torch.mul(source, factor.reshape(1), out=out)
    elif source.dtype == out.dtype:
        known = type(factor) is Tensor  # one that is traced has no number
        if out is not source or not known or factor.item() != 1.0:
            torch.mul(source, factor, out=out)
    else:  # the product stays in cache: one pass over memory
        for part, into in zip(source.split(STRIP_ROWS), out.split(STRIP_ROWS), strict=True):
            into.copy_(part * factor)


def klq_metrics(
    names: list[str],
    loss: Tensor,
    terms: Terms,
    shape: LossShape,
    *,
    ref_logp: Tensor | None,
    entropy: Tensor | None = None,
    decay_next: Tensor | None = None,
) -> Tensor:
    """fp32 [K], one number per name; of one row at least.

    residual_rms is the root mean square of Q_t - G_t; td_error_rms that of the one-step delta_t; explained_variance is
    1 - Var(R - V) / Var(R) with R = A + V the lambda-return at the old policy.

    Args:
        names: of ``vocabulary.metrics.metric_names``, in its order.
        loss: fp32, 0-d.
        ref_logp, entropy: fp32 [n], or None where the call has no such thing.
        decay_next: fp32 [n], gamma lambda c_{t+1}, 0 at sequence ends; on-policy only.
    """
    old_values = terms.values if terms.old_values is None else terms.old_values
    d = torch.zeros_like(terms.logp) if terms.old_logp is None else terms.logp - terms.old_logp
    change = shape.tau * d + (terms.values - old_values)
    returns = terms.advantages + old_values
    spread = returns.var(correction=0)
    unexplained = (returns - terms.values).var(correction=0)
    out = {
        "loss": loss,
        "value_mean": terms.values.mean(),
        "advantage_mean": terms.advantages.mean(),
        "residual_rms": (change - shape.alpha * terms.advantages).square().mean().sqrt(),
        "explained_variance": torch.where(spread == 0, 0.0, 1 - unexplained / spread),
    }
    if decay_next is not None:
        following = torch.where(decay_next == 0, 0.0, decay_next * terms.advantages.roll(-1))
        out["td_error_rms"] = (terms.advantages - following).square().mean().sqrt()
    if terms.old_logp is not None:
        out["kl_old_k1"] = -d.mean()
        out["kl_old_k3"] = (torch.expm1(d) - d).mean()
    if ref_logp is not None:
        rho = terms.logp - ref_logp
        out["q_mean"] = (shape.tau * rho + terms.values).mean()
        out["log_ratio_mean"] = out["kl_ref_k1"] = rho.mean()
        out["kl_ref_k3"] = (torch.expm1(-rho) + rho).mean()
    if "value_clip_fraction" in names:
        out["value_clip_fraction"] = (change.abs() > shape.value_clip).float().mean()
    if "log_ratio_clip_fraction" in names:
        out["log_ratio_clip_fraction"] = (d.abs() > shape.log_ratio_clip).float().mean()
    if entropy is not None:
        out["entropy"] = entropy.mean()
    return torch.stack([out[name] for name in names])
