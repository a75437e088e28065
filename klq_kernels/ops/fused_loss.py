"""klq_kernels::fused_klq_loss: the loss and all its gradients in one pass over the vocabulary.

The gradients are outputs of the forward; backward only multiplies them by the incoming scalar.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..backends import backend_for
from ..call import layout
from ..vocabulary.chunks import LossShape, Needs, Rows, ScanTerms, Terms
from ..vocabulary.collectives import all_gather, gather_rows
from ..vocabulary.metrics import klq_metrics, metric_names
from ..vocabulary.one_pass import ScanInputs, klq_pass
from ..vocabulary.precision import own_settings
from ..vocabulary.sampling import Sampling
from .gradients import scaled_gradient
from .head import group_named, head_dtypes, make_head, vocabulary, weight_gradient_dtype
from .operator import Operator, Parts, fields_of
from .scans import tail_values


class GradientScale:
    """loss = sum / denom, with 1 / denom = grad_scale * unit: gradients are carried at grad_scale, for backward to
    multiply by unit. That is a power of two near 1 / denom where they would underflow in fp16, and otherwise 1.
    """

    def __init__(self, denom: Tensor | None, n: int, dtype: torch.dtype, device: torch.device) -> None:
        if denom is None or denom.device != device:  # on the host: a fill does not synchronise, a copy would
            number = max(n, 1) if denom is None else float(denom)
            denom = torch.full((), number, dtype=torch.float32, device=device)
        denom = layout.constant(denom, torch.float32)
        self.unit = torch.ones_like(denom)
        self.grad_scale = self._inverse = denom.reciprocal()
        if dtype == torch.float16:
            denom, power = torch.frexp(denom)
            self.unit = torch.ldexp(self.unit, -power)
            self.grad_scale = denom.reciprocal()

    def mean(self, losses: Tensor) -> Tensor:
        """sum(losses) / denom; 0 where there is no row at all."""
        if losses.numel() == 0:
            return torch.zeros((), dtype=torch.float32, device=losses.device)
        return losses.sum() * self._inverse


class Everyones:
    """Gathers per-token vectors and means over processes, which have ``counts`` tokens each."""

    def __init__(self, group: str, counts: list[int]) -> None:
        self.group, self.counts = group_named(group), counts

    def rows(self, vector: Any) -> Any:
        """All processes' rows of a vector, one process's after another's; None of None."""
        return None if vector is None else gather_rows(vector, self.counts, self.group)

    def mean(self, scalar: Tensor) -> Tensor:
        return all_gather(scalar, self.group).mean(0)

    def mean_of_rows(self, mean: Tensor | None) -> Tensor | None:
        """The mean over all processes' rows, from each process's mean."""
        if mean is None:
            return None
        weights = torch.tensor(self.counts, dtype=torch.float32, device=mean.device)
        total: Tensor = (all_gather(mean.reshape(()), self.group) * weights).sum() / weights.sum().clamp(min=1)
        return total


class Arguments(NamedTuple):
    """Flat tensors of M positions, cut into B sequences; ``layout.valid_rows`` finds the valid ones."""

    hidden: Tensor  # [M, H]
    weight: Tensor  # [V, H]
    bias: Tensor | None  # [V]
    group: str  # ``head.HeadArguments``
    shard_sizes: list[int]
    # the name of the processes whose tokens the results are to be of, and how many tokens each has; "" and none for one
    peers: str
    counts: list[int]
    actions: Tensor  # int64 [M]
    values: Tensor  # [M]
    # targets of a rollout, all None on-policy
    old_logp: Tensor | None
    old_values: Tensor | None
    advantages: Tensor | None
    # inputs of the on-policy targets; with given targets the reference only adds metrics
    ref_logp: Tensor | None
    rewards: Tensor | None  # [M]
    scores: Tensor | None  # [B]
    bootstrap_values: Tensor | None  # [B]
    trace: Tensor | None
    weights: Tensor | None
    # ``Layout.row_args``
    mask: Tensor | None
    cu_seqlens: Tensor
    rows: Tensor | None
    denom: Tensor | None  # 0-d
    gamma: float
    lam: float
    # ``LossShape``
    tau: float
    alpha: float
    loss_type: str
    huber_delta: float
    value_clip: float
    log_ratio_clip: float
    temperature: float
    softcap: float | None
    fp32_logits: bool
    return_entropy: bool
    workspace_bytes: int | None
    samples: int  # of a sampled gradient, 0 for the dense one
    seed: Tensor | None  # int64, 0-d: of a sampled gradient, where the head wants one
    # the caller drops the gradients among the results, so backward may scale them in place
    own_gradients: bool
    need_hidden: bool
    need_weight: bool
    need_bias: bool
    need_values: bool

    @property
    def on_policy(self) -> bool:
        return self.advantages is None

    @property
    def needs(self) -> dict[str, bool]:
        """Whether each input needs a gradient, in the order of the gradients among ``Results``."""
        return {
            "hidden": self.need_hidden,
            "weight": self.need_weight,
            "bias": self.need_bias,
            "values": self.need_values,
        }


class Results(NamedTuple):
    """The loss, and everything that backward needs of it; gradients that are not needed are empty."""

    loss: Tensor
    metrics: Tensor  # in the order of ``metric_names``
    d_hidden: Tensor
    d_weight: Tensor
    d_bias: Tensor
    d_values: Tensor
    unit: Tensor  # of ``GradientScale``


def _fake(given: Arguments) -> Results:
    names = metric_names(
        on_policy=given.on_policy,
        reference=given.ref_logp is not None,
        loss_type=given.loss_type,
        entropy=given.return_entropy,
        sampled=given.samples > 0,
    )
    hidden, weight = given.hidden, given.weight
    scalar = hidden.new_empty((), dtype=torch.float32)

    def shaped(needed: bool, *shape: Any, dtype: torch.dtype = torch.float32) -> Tensor:
        return hidden.new_empty(shape, dtype=dtype) if needed else scalar.new_empty(0)

    return Results(
        loss=scalar,
        metrics=scalar.new_empty(len(names)),
        d_hidden=shaped(given.need_hidden, *hidden.shape, dtype=head_dtypes(given).products),
        d_weight=shaped(given.need_weight, *weight.shape, dtype=weight_gradient_dtype(given)),
        d_bias=shaped(given.need_bias, weight.shape[0]),
        d_values=shaped(given.need_values, given.actions.shape[0]),
        unit=scalar.new_empty(()),
    )


def _setup(ctx: Any, given: Arguments, found: Results) -> None:
    _, metrics, *gradients, unit = found
    ctx.mark_non_differentiable(metrics, *gradients, unit)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*gradients, unit)
    ctx.own_gradients = given.own_gradients
    ctx.dtypes = {name: getattr(given, name).dtype for name, needed in given.needs.items() if needed}
    ctx.names = tuple(given.needs)


def _backward(ctx: Any, by: Results, _: dict[str, bool]) -> dict[str, Tensor | None]:
    if by.loss is None:
        return {}
    *saved, unit = ctx.saved_tensors
    scale = by.loss.float() * unit
    return {
        name: scaled_gradient(gradient, scale, ctx.dtypes[name], owned=ctx.own_gradients)
        for name, gradient in zip(ctx.names, saved, strict=True)
        if name in ctx.dtypes
    }


def _forward(given: Arguments) -> Results:
    """The loss, its metrics and its gradients, from rollout targets or on-policy."""
    positions = given.actions.numel()
    index, row_cu_seqlens = layout.valid_rows(given.mask, given.cu_seqlens, given.rows, positions)
    taken = layout.take_rows(given.actions, index)
    assert taken is not None
    layout.check_actions(taken, vocabulary(given))
    layout.check_denom(given.denom)
    head = make_head(given, weight_gradient_dtype(given))
    rows = Rows(layout.constant(given.hidden, head.weight.dtype), index, taken)
    terms = _terms(given, index)
    ref_logp = layout.fp32_rows(given.ref_logp, index)
    scan = _scan_inputs(given, terms, ref_logp, index, row_cu_seqlens) if given.on_policy else None
    shape: LossShape = fields_of(LossShape, given)
    scale = GradientScale(given.denom, taken.numel(), given.hidden.dtype, given.hidden.device)
    backend = backend_for(given.hidden.device)
    with own_settings(given.hidden.device):
        found = klq_pass(
            backend,
            rows,
            head,
            Needs(given.need_hidden, given.need_weight, given.need_bias),
            terms,
            scan,
            shape,
            grad_scale=scale.grad_scale,
            entropy=given.return_entropy,
            sampling=None if given.seed is None else Sampling(given.samples, given.seed),
            workspace_bytes=given.workspace_bytes,
        )
    loss = scale.mean(found.losses)
    decay_next = None if scan is None else _decay_to_next(given, scan)
    entropy, entries = found.entropy, found.entries_per_token
    if given.counts:
        everyones = Everyones(given.peers, given.counts)
        loss, terms = everyones.mean(loss), Terms(*map(everyones.rows, terms))
        ref_logp, entropy, decay_next = map(everyones.rows, (ref_logp, entropy, decay_next))
        entries = everyones.mean_of_rows(entries)
    metrics = klq_metrics(backend, loss, terms, shape, ref_logp=ref_logp, entropy=entropy, decay_next=decay_next)
    if given.samples:
        entries = torch.zeros_like(loss) if entries is None else entries
        metrics = torch.cat((metrics, entries.reshape(1)))
    d_values = layout.put_rows(found.d_values, index, positions) if given.need_values else None

    def given_or_empty(gradient: Tensor | None) -> Tensor:
        return loss.new_empty(0) if gradient is None else gradient

    return Results(
        loss=loss,
        metrics=metrics,
        d_hidden=given_or_empty(found.d_hidden),
        d_weight=given_or_empty(found.d_weight),
        d_bias=given_or_empty(found.d_bias),
        d_values=given_or_empty(d_values),
        unit=scale.unit,
    )


def _terms(given: Arguments, index: Tensor | None) -> Terms:
    """The rows of the loss's terms, with room for log-probabilities and, on-policy, for the lambda-errors."""

    def take(tensor: Tensor | None) -> Any:
        return layout.fp32_rows(tensor, index)

    values = take(given.values)
    return Terms(
        logp=torch.empty_like(values),
        values=values,
        old_logp=take(given.old_logp),
        old_values=take(given.old_values),
        advantages=torch.empty_like(values) if given.on_policy else take(given.advantages),
        weights=take(given.weights),
    )


def _scan_inputs(
    given: Arguments, terms: Terms, ref_logp: Tensor | None, index: Tensor | None, cu_seqlens: Tensor
) -> ScanInputs:
    tail = tail_values(cu_seqlens, given.bootstrap_values, given.scores, given.gamma)
    rewards, trace = layout.fp32_rows(given.rewards, index), layout.fp32_rows(given.trace, index)
    scan_terms = ScanTerms(terms.logp, ref_logp, terms.values, rewards, trace)
    return ScanInputs(scan_terms, tail, cu_seqlens, given.gamma, given.lam)


def _decay_to_next(given: Arguments, scan: ScanInputs) -> Tensor:
    """fp32 [n]: how much of the next row's lambda-error enters a row's; 0 at the end of a sequence."""
    factors, decay = scan.terms.trace, given.gamma * given.lam
    found = torch.full_like(scan.terms.values, decay) if factors is None else decay * factors.roll(-1)
    return layout.zero_ends(found, scan.cu_seqlens)


PARTS = Parts(Arguments, Results, _forward, _fake, _setup, _backward)
fused_klq_loss = Operator("klq_kernels::fused_klq_loss", PARTS)
