"""``fused_klq_loss`` from hidden states, and ``klq_loss`` from given log-probabilities."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .call.checks import require, require_alike, require_number, require_tensor
from .call.group import SplitHead, check_spans, group_of, share_head, split_head
from .call.head import check_head
from .call.layout import Layout, Packing, layout_of
from .call.tokens import AllTokens, mean_count
from .call.transforms import needs_gradient, refuse_tangents
from .logprobs import linear_logprobs
from .ops import fused_loss
from .ops import klq_loss as unfused_loss
from .returns import klq_targets
from .types import KLQLoss, KLQTargets
from .vocabulary.metrics import metric_names

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup
    from torch.distributed.device_mesh import DeviceMesh

WANTED = "must be a KLQTargets(old_logprobs, old_values, advantages), as klq_targets returns"
LOSS_TYPES = ("l2", "huber", "value_clipped", "ratio_clipped", "double_clipped")


def fused_klq_loss(
    hidden: Tensor,
    weight: Tensor,
    actions: Tensor,
    values: Tensor,
    *,
    targets: KLQTargets | None = None,
    ref_logprobs: Tensor | None = None,
    rewards: Tensor | None = None,
    bootstrap_values: Tensor | None = None,
    gamma: float = 1.0,
    lam: float = 0.95,
    trace: Tensor | None = None,
    tau: float = 0.05,
    alpha: float = 1.0,
    loss_type: str = "l2",
    huber_delta: float = 1.0,
    value_clip: float = 0.2,
    log_ratio_clip: float = 0.2,
    weights: Tensor | None = None,
    mask: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    packing: Packing | None = None,
    denom: Tensor | float | None = None,
    bias: Tensor | None = None,
    temperature: float = 1.0,
    softcap: float | None = None,
    logits_dtype: torch.dtype | None = None,
    return_entropy: bool = False,
    gradient: str = "dense",
    samples: int = 64,
    seed: int | Tensor | None = None,
    workspace_bytes: int | None = None,
    process_group: ProcessGroup | DeviceMesh | None = None,
    sharding: str | None = None,
    time_group: ProcessGroup | DeviceMesh | None = None,
) -> KLQLoss:
    """The KLQ loss and all its gradients in one pass over the vocabulary (arXiv 2508.17000; the math: ``reference``).

    Two ways to call it. With ``targets`` made at rollout time by ``klq_targets``, several epochs of updates can run on
    them. Without, ``ref_logprobs`` and ``rewards`` are needed, and the pass itself computes log-ratios, TD errors,
    lambda-errors and the loss on-policy, walking the tokens in reverse time. Either way three matrix products, a
    workspace of logits, and gradients for hidden, weight, bias and values as far as they are required.

    Args:
        hidden: last hidden states, [B, T, H], or [N, H] with ``cu_seqlens``; fp32, bf16 or fp16. hidden[t] predicts
            actions[t]: shift before calling.
        weight: the lm_head, [V, H], in hidden's dtype, or an fp32 master copy. Products run in hidden's dtype.
        actions: taken token ids, [B, T] or [N], int64 or int32.
        values: V of the state before each token, the shape of actions.
        targets: ``KLQTargets`` in the layout of actions.
        ref_logprobs: log pi_b of the taken tokens. Needed on-policy; with targets it only adds metrics.
        rewards: per token, or [B]: one score per sequence on its last valid token (packed, with N = B, what is [N] is
            per token). On-policy only.
        bootstrap_values: [B], V beyond the last valid token of truncated sequences. On-policy only.
        gamma, lam: discount and trace decay, in [0, 1]. On-policy only.
        trace: per-token factor on the decay (Retrace). On-policy only.
        tau: strength of the KL regularisation, > 0.
        alpha: step towards the target, in (0, 1] (eq. 7).
        loss_type: "l2", "huber", "value_clipped", "ratio_clipped" or "double_clipped"
            (``reference.klq_residual_loss`` states them).
        huber_delta, value_clip, log_ratio_clip: their thresholds, > 0.
        weights: a constant factor on each token's loss, the shape of actions.
        mask: bool, the shape of actions, True at trained tokens. What masked tokens hold changes nothing.
        cu_seqlens: int32 [B + 1], makes the layout packed.
        packing: a ``pack(...)`` in place of mask and cu_seqlens.
        denom: what the sum of losses is divided by, > 0; by default the number of valid tokens of this call. Trainers
            pass the count over all micro-batches and ranks, as a number or a 0-d tensor. The value of a tensor on a GPU
            is checked under ``KLQ_CHECK=1`` alone, since reading it would synchronise.
        bias, temperature, softcap, logits_dtype: of the head, as in ``linear_logprobs``.
        return_entropy: also the mean entropy in the metrics.
        gradient, samples, seed: of the head, as in ``linear_logprobs``; also ``gradient_entries`` in the metrics.
        workspace_bytes: memory for one chunk of logits; by default 256 MiB on a CPU, and on a GPU up to 1 GiB or 4 V H
            bytes, whichever is more. In bf16 the logits of up to 2H tokens make one chunk, in place of the fp32
            accumulator of the weight's gradient that several chunks would need. The native CPU backend needs no memory
            for up to H tokens, whose logits lie where the weight's gradient is going to be.
        process_group: of the processes that share the head, as in ``linear_logprobs``. All pass the same tokens, values
            and targets, and get the same loss and metrics.
        sharding: what moves where each rank has tokens of its own, as in ``linear_logprobs``; loss and metrics are
            those of all ranks' tokens either way.
        time_group: on-policy, the ranks that share the time of every sequence (context parallelism), as in
            ``klq_targets``: each passes its span. A token's error depends on those of later ranks, so the
            log-probabilities are computed once more, for the targets. Loss and metrics are those of all spans;
            ``denom`` is the global count over the number of ranks (by default that of valid tokens), and gradients are
            averaged over ranks.

    Returns:
        ``KLQLoss(loss, metrics)``: the scalar loss, fp32, and a dict of detached 0-d tensors (``vocabulary.metrics``).
        Without a single valid token the loss is 0 and so are all gradients.

    Raises:
        ValueError: naming the argument whose shape, dtype, device or value is wrong. Token ids out of range at valid
            positions are found on CPU tensors, on a GPU under ``KLQ_CHECK=1``; otherwise the loss is NaN.
        RuntimeError: in backward, under ``create_graph=True``: there is no second derivative; in forward
            mode, and under ``torch.func.grad``.
    """
    head, spans = split_head(hidden, weight, bias, process_group, sharding), group_of(time_group, "time_group")
    require(time_group is None or targets is None, "time_group", "is for on-policy calls; klq_targets takes the spans'")
    if spans is not None:
        targets = _targets_over_spans(
            spans, head, hidden, weight, actions, values, ref_logprobs, rewards,
            head_options={
                "bias": bias, "temperature": temperature, "softcap": softcap, "logits_dtype": logits_dtype,
                "workspace_bytes": workspace_bytes, "process_group": process_group, "sharding": sharding,
            },
            returns={
                "tau": tau, "gamma": gamma, "lam": lam, "bootstrap_values": bootstrap_values, "trace": trace,
            },
            lengths={"mask": mask, "cu_seqlens": cu_seqlens, "packing": packing},
        )  # fmt: skip
        rewards = bootstrap_values = trace = None
    layout = layout_of(actions, mask=mask, cu_seqlens=cu_seqlens, packing=packing, states=head.hidden)
    inputs = check_head(
        layout, head.hidden, head.weight, actions, head.bias, temperature=temperature, softcap=softcap,
        logits_dtype=logits_dtype, return_entropy=return_entropy, gradient=gradient, samples=samples, seed=seed,
        workspace_bytes=workspace_bytes, split=head.split,
    )  # fmt: skip
    check_loss(tau, alpha, loss_type, huber_delta, value_clip, log_ratio_clip)
    require_number("gamma", gamma, low=0.0, high=1.0)
    require_number("lam", lam, low=0.0, high=1.0)
    if targets is None:
        for name, given in (("ref_logprobs", ref_logprobs), ("rewards", rewards)):
            require(given is not None, name, "is needed where no targets are given")
    else:
        for name, given in (("rewards", rewards), ("bootstrap_values", bootstrap_values), ("trace", trace)):
            require(given is None, name, "is already in targets; give one or the other")
    per_token, scores = (None, None) if rewards is None else layout.rewards(rewards)
    flat_values = layout.flat("values", values)
    require_alike("values", flat_values, "hidden", head.hidden)
    _check_weights(weights)
    refuse_tangents(values=values)
    settings: dict[str, Any] = {
        "gamma": gamma, "lam": lam, "tau": tau, "alpha": alpha, "loss_type": loss_type, "huber_delta": huber_delta,
        "value_clip": value_clip, "log_ratio_clip": log_ratio_clip, "temperature": temperature, "softcap": softcap,
        "return_entropy": return_entropy, "workspace_bytes": workspace_bytes,
    }  # fmt: skip
    arguments: dict[str, Any] = {
        **inputs._asdict(),
        "values": flat_values,
        **_flat_targets(layout, targets),
        "ref_logp": layout.flat_or_none("ref_logprobs", ref_logprobs),
        "rewards": per_token,
        "scores": scores,
        "bootstrap_values": layout.per_sequence("bootstrap_values", bootstrap_values),
        "trace": layout.flat_or_none("trace", trace),
        "weights": layout.flat_or_none("weights", weights),
        **layout.row_args(),
        "denom": _denominator(denom, head.hidden.device),
    }
    call = fused_loss.Arguments(
        **_shared(arguments, settings, layout, head, spans, sharding),
        **settings,
        own_gradients=True,  # the gradients among the results are autograd's alone: they are dropped here
        need_hidden=needs_gradient(inputs.hidden),
        need_weight=needs_gradient(inputs.weight),
        need_bias=inputs.bias is not None and needs_gradient(inputs.bias),
        need_values=needs_gradient(flat_values),
    )
    found = fused_loss.Results(*fused_loss.fused_klq_loss(*call))
    names = metric_names(
        on_policy=targets is None,
        reference=ref_logprobs is not None,
        loss_type=loss_type,
        entropy=return_entropy,
        sampled=gradient == "sampled",
    )
    return KLQLoss(found.loss, dict(zip(names, found.metrics.detach().unbind(), strict=True)))


def _targets_over_spans(
    spans: ProcessGroup,
    head: SplitHead,
    hidden: Tensor,
    weight: Tensor,
    actions: Tensor,
    values: Tensor,
    ref_logprobs: Tensor | None,
    rewards: Tensor | None,
    *,
    head_options: dict[str, Any],
    returns: dict[str, Any],
    lengths: dict[str, Any],
) -> KLQTargets:
    """The on-policy targets of this rank's span of time. The options are those of ``linear_logprobs``, of
    ``klq_targets`` and of both.
    """
    if head.apart is not None:
        check_spans(spans, head.apart)
    if ref_logprobs is None or rewards is None:
        raise ValueError("time_group: needs ref_logprobs and rewards")
    with torch.no_grad():
        logp = linear_logprobs(hidden, weight, actions, **head_options, **lengths).logprobs
    return klq_targets(logp, ref_logprobs, values.detach(), rewards, process_group=spans, **returns, **lengths)


def _shared(
    arguments: dict[str, Any],
    settings: dict[str, Any],
    layout: Layout,
    head: SplitHead,
    spans: ProcessGroup | None,
    sharding: str | None,
) -> dict[str, Any]:
    """The operator's arguments once what processes share is where it is needed, and who shares it."""
    group, peers, counts = head.group, "", []
    if spans is not None and head.apart is None:
        peers, counts = spans.group_name, AllTokens(spans, layout, arguments, settings).counts
        if arguments["denom"] is None:
            arguments = {**arguments, "denom": mean_count(counts, head.hidden.device)}
    if head.apart is not None:
        tokens = AllTokens(head.apart, layout, arguments, settings)
        if tokens.move_head(sharding, split_again=group is not None):
            arguments, peers, counts = tokens.with_whole_head(head.vocab), head.apart.group_name, tokens.counts
        else:
            arguments, group = tokens.arguments(), head.apart
    shards = share_head(group, arguments, settings)
    return {**arguments, **shards._asdict(), "peers": peers, "counts": counts}


def klq_loss(
    logprobs: Tensor,
    values: Tensor,
    targets: KLQTargets,
    *,
    ref_logprobs: Tensor | None = None,
    tau: float = 0.05,
    alpha: float = 1.0,
    loss_type: str = "l2",
    huber_delta: float = 1.0,
    value_clip: float = 0.2,
    log_ratio_clip: float = 0.2,
    weights: Tensor | None = None,
    mask: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    packing: Packing | None = None,
    denom: Tensor | float | None = None,
) -> KLQLoss:
    """The KLQ loss from log-probabilities (arXiv 2508.17000, eq. 6), differentiable in logprobs and values.

    For trainers that already have them; ``fused_klq_loss`` gives the same numbers from hidden states for less memory.

    Args:
        logprobs: log pi of the taken tokens, [B, T], or [N] with ``cu_seqlens``.
        values: V, same shape.
        targets: from ``klq_targets``, same layout.
        ref_logprobs: log pi_b of the taken tokens; only adds metrics.
        tau ... denom: as in ``fused_klq_loss``.

    Returns:
        ``KLQLoss(loss, metrics)``.

    Raises:
        ValueError: naming the argument whose shape, dtype, device or value is wrong.
        RuntimeError: in backward, under ``create_graph=True``: there is no second derivative; in forward
            mode, and under ``torch.func.grad``.
    """
    layout = layout_of(logprobs, mask=mask, cu_seqlens=cu_seqlens, packing=packing, name="logprobs")
    require(targets is not None, "targets", WANTED)
    check_loss(tau, alpha, loss_type, huber_delta, value_clip, log_ratio_clip)
    _check_weights(weights)
    refuse_tangents(logprobs=logprobs, values=values)
    found = unfused_loss.Results(
        *unfused_loss.klq_loss(
            *unfused_loss.Arguments(
                logp=layout.flat("logprobs", logprobs),
                values=layout.flat("values", values),
                **_flat_targets(layout, targets),
                ref_logp=layout.flat_or_none("ref_logprobs", ref_logprobs),
                weights=layout.flat_or_none("weights", weights),
                **layout.row_args(),
                denom=_denominator(denom, logprobs.device),
                tau=tau,
                alpha=alpha,
                loss_type=loss_type,
                huber_delta=huber_delta,
                value_clip=value_clip,
                log_ratio_clip=log_ratio_clip,
            )
        )
    )
    names = metric_names(on_policy=False, reference=ref_logprobs is not None, loss_type=loss_type, entropy=False)
    return KLQLoss(found.loss, dict(zip(names, found.metrics.detach().unbind(), strict=True)))


def check_loss(
    tau: float, alpha: float, loss_type: str, huber_delta: float, value_clip: float, log_ratio_clip: float
) -> None:
    """Raises the ValueError that names the setting of the loss which is out of range."""
    require_number("tau", tau, positive=True)
    require_number("alpha", alpha, high=1.0, positive=True)
    require(loss_type in LOSS_TYPES, "loss_type", f"must be one of {', '.join(LOSS_TYPES)}; got {loss_type!r}")
    for name, value in (("huber_delta", huber_delta), ("value_clip", value_clip), ("log_ratio_clip", log_ratio_clip)):
        require_number(name, value, positive=True)


def _check_weights(weights: Tensor | None) -> None:
    if weights is None:
        return
    require_tensor("weights", weights)
    require(not weights.requires_grad, "weights", "carry no gradient; pass weights.detach()")


def _flat_targets(layout: Layout, targets: KLQTargets | None) -> dict[str, Any]:
    """The targets as the operators name them; on-policy there are none."""
    names = {"old_logprobs": "old_logp", "old_values": "old_values", "advantages": "advantages"}
    if targets is None:
        return dict.fromkeys(names.values())
    require(isinstance(targets, tuple) and len(targets) == 3, "targets", WANTED)
    return {
        inside: layout.flat(f"targets.{name}", tensor).detach()
        for (name, inside), tensor in zip(names.items(), targets, strict=True)
    }


def _denominator(denom: Tensor | float | None, device: torch.device) -> Tensor | None:
    if denom is None:
        return None
    if isinstance(denom, Tensor):
        require_tensor("denom", denom)
        require(not denom.requires_grad, "denom", "carries no gradient; pass denom.detach()")
        require(denom.numel() == 1, "denom", f"must be a number or a 0-d tensor, got shape {list(denom.shape)}")
        here = denom.device in (device, torch.device("cpu"))
        require(here, "denom", f"must be on {device} or the CPU, got {denom.device}")
        require(not denom.is_complex(), "denom", f"must be a real number, got {denom.dtype}")
        return denom.detach().reshape(())
    require_number("denom", denom, positive=True)
    one = torch.ones((), dtype=torch.float32, device=device)
    # torch.compile traces a product with a float that changes from call to call
    return one * (denom if isinstance(denom, float) else float(denom))
