"""KL-regularised Q-learning in plain PyTorch: the oracle every kernel is held against.

Read this file instead of the paper ("KLQ", arXiv 2508.17000; equation numbers below are its own). Nothing here
is fast, nothing here is clever: each function is one equation, written out over explicit time steps, in whatever
dtype its inputs have (the tests use float64).

Notation. State s_t is the prompt plus the response before position t, a_t the response token at t, pi the policy
being trained, pi_b the frozen reference, V the Boltzmann state value.

    rho_t = log pi(a_t|s_t) - log pi_b(a_t|s_t)          log-ratio
    Q_t   = tau rho_t + V_t                              action value            (eq. 13)
    delta_t = r_t + gamma V_{t+1} - Q_t                  TD error                (eq. 14)
    A_t   = delta_t + gamma lambda c_{t+1} A_{t+1}       lambda-error
    G_t   = Q_t + alpha A_t                              target, no gradient     (eq. 7)
    L     = (1/denom) sum_t w_t (Q_t - G_t)^2            loss                    (eq. 6)

V beyond the last trained token is the bootstrap value (0 where the sequence terminated); c is an optional Retrace
trace (1 by default). With targets fixed at rollout time the residual does not mention the reference any more:

    Q_t - G_t = tau (logp_t - old_logp_t) + (V_t - old_V_t) - alpha A_t.

Two layouts are understood everywhere. *Padded*: tensors [B, T] with an optional bool mask. *Packed*: tensors [N] with
int32 ``cu_seqlens`` [B + 1] marking where sequences begin and end, and an optional mask [N]. Only valid tokens exist:
a masked token is skipped, so "t + 1" always means the next valid token of the same sequence.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor

from .types import KLQLoss, KLQTargets, LinearLogprobs

__all__ = [
    "dpo_loss",
    "dppo_policy_loss",
    "gae",
    "group_offsets",
    "guide_tilt",
    "importance_trace",
    "klq_loss",
    "klq_residual_loss",
    "klq_targets",
    "lambda_returns",
    "linear_kl",
    "linear_logprobs",
    "linear_select",
    "monte_carlo_values",
    "naive_klq_loss",
    "oreo_loss",
    "reverse_scan",
    "sampled_gradient",
    "sampling_threshold",
    "sequence_sums",
    "split_residual_loss",
    "step_towards",
    "tbrm_loss",
    "tdpo_loss",
    "vtrace_targets",
]


def sequences(shape: torch.Size, mask: Tensor | None, cu_seqlens: Tensor | None) -> Iterator[list[int]]:
    """Yields, for each sequence, the flat positions of its valid tokens in time order."""
    if cu_seqlens is None:
        batch, length = shape
        bounds = [(b * length, (b + 1) * length) for b in range(batch)]
    else:
        ends = cu_seqlens.tolist()
        bounds = list(pairwise(ends))
    keep = None if mask is None else mask.reshape(-1).tolist()
    for begin, end in bounds:
        yield [i for i in range(begin, end) if keep is None or keep[i]]


def reverse_scan(
    delta: Tensor, decay: Tensor | float, *, mask: Tensor | None = None, cu_seqlens: Tensor | None = None
) -> Tensor:
    """A_t = delta_t + decay_t A_{t+1}, with A = 0 beyond the end of each sequence and at masked tokens."""
    flat = delta.reshape(-1)
    decays = torch.as_tensor(decay, dtype=delta.dtype).expand(delta.shape).reshape(-1)
    out: list[Tensor] = [flat.new_zeros(())] * flat.numel()
    for steps in sequences(delta.shape, mask, cu_seqlens):
        following = flat.new_zeros(())
        for i in reversed(steps):
            following = flat[i] + decays[i] * following
            out[i] = following
    return torch.stack(out).reshape(delta.shape) if out else torch.zeros_like(delta)


def _lambda_errors(
    q: Tensor,
    values: Tensor,
    rewards: Tensor,
    *,
    gamma: float,
    lam: float,
    bootstrap_values: Tensor | None,
    trace: Tensor | None,
    mask: Tensor | None,
    cu_seqlens: Tensor | None,
) -> Tensor:
    """The TD errors (eq. 14) and their reverse lambda-scan. ``rewards`` per token, or [B] scores on the last token."""
    shape = values.shape
    q, values = q.reshape(-1), values.reshape(-1)
    per_sequence = rewards.dim() == 1 and (cu_seqlens is None or rewards.numel() == cu_seqlens.numel() - 1 != q.numel())
    out = torch.zeros_like(q)
    for b, steps in enumerate(sequences(shape, mask, cu_seqlens)):
        value_next = q.new_zeros(()) if bootstrap_values is None else bootstrap_values[b].to(q.dtype)
        carried = q.new_zeros(())
        for k, i in enumerate(reversed(steps)):
            if per_sequence:
                reward = rewards[b] if k == 0 else q.new_zeros(())
            else:
                reward = rewards.reshape(-1)[i]
            delta = reward + gamma * value_next - q[i]
            out[i] = delta + gamma * lam * carried
            value_next = values[i]
            carried = out[i] if trace is None else trace.reshape(-1)[i] * out[i]
    return out.reshape(shape)


def gae(
    rewards: Tensor,
    values: Tensor,
    *,
    gamma: float = 1.0,
    lam: float = 0.95,
    bootstrap_values: Tensor | None = None,
    mask: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
) -> Tensor:
    """Generalised advantage estimation: the lambda-errors with Q_t = V_t."""
    return _lambda_errors(
        values, values, rewards, gamma=gamma, lam=lam, bootstrap_values=bootstrap_values,
        trace=None, mask=mask, cu_seqlens=cu_seqlens,
    )  # fmt: skip


def lambda_returns(
    rewards: Tensor,
    values: Tensor,
    *,
    gamma: float = 1.0,
    lam: float = 0.95,
    bootstrap_values: Tensor | None = None,
    mask: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
) -> Tensor:
    """``gae`` + values at valid tokens, 0 elsewhere."""
    advantages = gae(
        rewards, values, gamma=gamma, lam=lam, bootstrap_values=bootstrap_values, mask=mask, cu_seqlens=cu_seqlens
    )
    returns = advantages + values
    return returns if mask is None else torch.where(mask, returns, 0)


def klq_targets(
    logprobs: Tensor,
    ref_logprobs: Tensor,
    values: Tensor,
    rewards: Tensor,
    *,
    tau: float = 0.05,
    gamma: float = 1.0,
    lam: float = 0.95,
    bootstrap_values: Tensor | None = None,
    trace: Tensor | None = None,
    mask: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
) -> KLQTargets:
    """Everything an update needs to know of the rollout: old log-probs, old values, and A."""
    q = tau * (logprobs - ref_logprobs) + values  # eq. 13
    advantages = _lambda_errors(
        q, values, rewards, gamma=gamma, lam=lam, bootstrap_values=bootstrap_values,
        trace=trace, mask=mask, cu_seqlens=cu_seqlens,
    )  # fmt: skip
    if mask is not None:
        logprobs, values = torch.where(mask, logprobs, 0), torch.where(mask, values, 0)
    return KLQTargets(logprobs.detach(), values.detach(), advantages.detach())


def importance_trace(logprobs: Tensor, sampler_logprobs: Tensor, *, clip: float = 1.0) -> Tensor:
    """c_t = min(clip, pi(a_t|s_t) / mu(a_t|s_t)), for tokens that mu sampled and pi is to be evaluated on.

    As the ``trace`` of ``klq_targets`` it makes A the Retrace(lambda) error of Q (arXiv 1606.02647, whose clip is 1):
    the expected bootstrap there is V_{t+1} here, for V is the value after the price of KL. Two facts follow. With
    clip = inf and lambda = 1, Q_t + A_t is the return of pi from (s_t, a_t), importance-sampled: unbiased. And where Q
    and V are those of the optimal policy, every delta is 0 at every token, whoever chose it: so mu and the clip decide
    how fast and how noisily KLQ gets there, not where.
    """
    return torch.exp(logprobs - sampler_logprobs).clamp(max=clip)


def tree_backup_trace(logprobs: Tensor) -> Tensor:
    """c_t = pi(a_t|s_t), for tokens that nobody knows the probability of: those of a demonstration.

    As the ``trace`` of ``klq_targets`` it makes A the error of tree backup, TB(lambda) (Precup, Sutton and Singh 2000).
    By theorem 1 of arXiv 1606.02647 Q_t + A_t contracts to the Q of pi for every sampler mu with 0 <= c <= pi / mu, and
    pi <= pi / mu for all, as mu <= 1. It is ``importance_trace`` with mu = 1, the most careful guess: what is earned
    counts only as far as pi itself would be likely to follow, and V stands for what comes after. With lambda = 1, in
    the mean over mu's tokens,

        G(s, a) = r + gamma (V(s') + sum_b mu(b|s') pi(b|s') (G(s', b) - Q(s', b))),

    and where Q and V are the optimal policy's, A is 0 at every token, whoever wrote it.
    """
    return torch.exp(logprobs)


def vtrace_targets(
    rewards: Tensor, values: Tensor, trace: Tensor, *, gamma: float = 1.0, lam: float = 0.95, last_value: float = 0.0
) -> Tensor:
    """The targets of V under pi for one sequence of mu's, [T] each (V-trace, arXiv 1802.01561, eq. 1):

        v_s = V_s + sum_{t >= s} gamma^(t-s) (prod_{s <= i < t} lam c_i) c_t (r_t + gamma V_{t+1} - V_t)

    with one clip for both of its weights: c of ``importance_trace``. They are V + c A for the A of ``klq_targets`` with
    that trace (and r_t less the price of KL as the reward): an action value needs no weight for the first token, which
    it takes as given, a state value does.
    """
    following = torch.cat([values[1:], values.new_tensor([last_value])])
    delta = rewards + gamma * following - values
    out = []
    for s in range(len(values)):
        total, weight = values[s], values.new_ones(())
        for t in range(s, len(values)):
            total = total + gamma ** (t - s) * weight * trace[t] * delta[t]
            weight = weight * lam * trace[t]
        out.append(total)
    return torch.stack(out)


def group_offsets(errors: Tensor, size: int) -> Tensor:
    """o_i = mean of E_j over the other completions j of i's prompt, [S], for groups of ``size`` in order.

    E_j is the lambda-error of j's first token with lambda = 1: its return, less the price of KL, less V of the prompt.
    So o_i says by how much V underestimates the prompt. The policy's errors A' are taken with V + o_i in place of V, in
    every state of completion i but the one after its end; V learns from its own errors A. At lambda = gamma = 1

        A'_t = (G_i - mean of G_j) - (V_t - V_0),        G: the returns from the prompt on, less the price of KL,

    which is the leave-one-out baseline of RLOO (arXiv 2402.14740) less what the critic says has changed since
    the prompt. o_i knows nothing of the tokens of i, so V + o_i is a baseline: at lambda = 1 the policy gradient
    E sum_t A'_t grad log pi_t stays unbiased for every V, and for lambda < 1 it is that of GAE with this V + o_i.
    """
    out = []
    for i in range(len(errors)):
        begin = i - i % size
        others = [errors[j] for j in range(begin, begin + size) if j != i]
        out.append(torch.stack(others).mean() if others else errors.new_zeros(()))
    return torch.stack(out)


def dppo_policy_loss(
    logprobs: Tensor,
    sampler_logprobs: Tensor,
    advantages: Tensor,
    *,
    clip: float = 20.0,
    divergence: str = "tv",
    delta: float = 0.15,
) -> Tensor:
    """-A min(clip, pi/mu) m log pi of each token, the weights without gradient (DPPO, arXiv 2602.04879).

    m is 0 where the two policies are too far apart at the token, D > delta, and the step would take them further:
    where A and pi - mu have the same sign. D is the divergence of the two-valued distributions "this token or another":

    tv   |pi - mu|
    kl   mu log(mu / pi) + (1 - mu) log((1 - mu) / (1 - pi))
    """
    pi, mu = logprobs.detach().exp(), sampler_logprobs.exp()
    if divergence == "tv":
        distance = (pi - mu).abs()
    elif divergence == "kl":
        distance = mu * (mu / pi).log() + torch.xlogy(1 - mu, (1 - mu) / (1 - pi))
    else:
        raise ValueError(f"divergence: must be tv or kl, got {divergence!r}")
    outward = advantages * (pi - mu) > 0
    kept = (~(outward & (distance > delta))).to(advantages.dtype)
    return -advantages * (pi / mu).clamp(max=clip) * kept * logprobs


def sequence_sums(x: Tensor, *, mask: Tensor | None = None, cu_seqlens: Tensor | None = None) -> Tensor:
    """The sum over each sequence's valid tokens, [B]."""
    flat = x.reshape(-1)
    sums = [flat[steps].sum() for steps in sequences(x.shape, mask, cu_seqlens)]
    return torch.stack(sums) if sums else flat.new_zeros(0)


def oreo_loss(
    logprobs: Tensor,
    ref_logprobs: Tensor,
    values: Tensor,
    scores: Tensor,
    *,
    beta: float = 0.03,
    kl: Tensor | None = None,
    kl_coef: float = 0.01,
    mask: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
) -> Tensor:
    """OREO's losses of critic and actor and its regulariser, the mean over valid tokens (arXiv 2412.16145).

    With l_i = log pi(a_i|s_i) - log pi_b(a_i|s_i) and the score R of the whole sequence, the soft Bellman equation
    summed from t to the end is V_t = R - beta sum_{i >= t} l_i. Each of the two is held against it:

        critic   (V_t - R + beta sg(sum_{i >= t} l_i))^2
        actor    (sg(V_t) - R + beta l_t + beta sg(sum_{i > t} l_i))^2
        and      kl_coef KL(pi(.|s_t) || pi_b(.|s_t))

    where sg stops the gradient: each token answers for its own log-ratio alone.

    Args:
        logprobs, ref_logprobs, values: [B, T] or [N].
        scores: R, [B].
        kl: the divergence over the whole vocabulary at each token (``linear_kl``), the shape of values.
    """
    ratios, values = (logprobs - ref_logprobs).reshape(-1), values.reshape(-1)
    divergence = torch.zeros_like(values) if kl is None else kl.reshape(-1)
    terms = []
    for b, steps in enumerate(sequences(logprobs.shape, mask, cu_seqlens)):
        for k, t in enumerate(steps):
            later = ratios[steps[k + 1 :]].sum().detach()
            critic = (values[t] - scores[b] + beta * (ratios[t].detach() + later)).square()
            actor = (values[t].detach() - scores[b] + beta * (ratios[t] + later)).square()
            terms.append(critic + actor + kl_coef * divergence[t])
    return torch.stack(terms).mean()


def tbrm_loss(
    logprobs: Tensor,
    logsumexp: Tensor,
    ref_logprobs: Tensor,
    scores: Tensor,
    *,
    beta: float = 0.05,
    mask: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
) -> Tensor:
    """Trajectory Bellman residual minimisation (arXiv 2505.15311), the mean over sequences with a token.

    The logits are the action values, Q(s, a) = beta logit(s, a), so that V(s) = beta logsumexp(s) and log pi = logit -
    logsumexp. Summed over a sequence the soft Bellman residuals Q_t - V_{t+1} - r_t - beta log pi_b telescope, to

        (logit(a_1|s_1) + sum_{t >= 2} log pi(a_t|s_t) - sum_t log pi_b(a_t|s_t) - R / beta)^2.

    Args:
        logprobs, ref_logprobs: [B, T] or [N].
        logsumexp: of the logits that logprobs are of, the same shape.
        scores: R, [B].
    """
    flat, normalisers, ratios = logprobs.reshape(-1), logsumexp.reshape(-1), ref_logprobs.reshape(-1)
    terms = []
    for b, steps in enumerate(sequences(logprobs.shape, mask, cu_seqlens)):
        if steps:
            first, later = steps[0], steps[1:]
            logit = flat[first] + normalisers[first]
            terms.append((logit + flat[later].sum() - ratios[steps].sum() - scores[b] / beta).square())
    return torch.stack(terms).mean()


def dpo_loss(chosen: Tensor, rejected: Tensor, *, beta: float = 0.1) -> Tensor:
    """-log sigmoid(beta (chosen - rejected)) of each pair, [P] (DPO, arXiv 2305.18290, eq. 7).

    Args:
        chosen, rejected: sum_t log pi(a_t|s_t) - log pi_b(a_t|s_t) of the preferred completion and of the other, [P].
            Token by token beta log pi / pi_b is an advantage of the optimal policy (arXiv 2404.12358).
    """
    return -F.logsigmoid(beta * (chosen - rejected))


def tdpo_loss(
    chosen: Tensor,
    rejected: Tensor,
    chosen_kl: Tensor,
    rejected_kl: Tensor,
    *,
    beta: float = 0.1,
    alpha: float | None = None,
) -> Tensor:
    """The loss of each pair in token-level DPO, [P] (arXiv 2404.11999).

        TDPO1   -log sigmoid(beta (chosen - rejected) - beta (rejected_kl - chosen_kl))
        TDPO2   -log sigmoid(beta (chosen - rejected) - alpha beta (rejected_kl - sg(chosen_kl)))

    Args:
        chosen, rejected: as in ``dpo_loss``.
        chosen_kl, rejected_kl: sum_t KL(pi_b(.|s_t) || pi(.|s_t)) along either completion, [P].
        alpha: of TDPO2; None is TDPO1.
    """
    margin = beta * (chosen - rejected)
    if alpha is None:
        return -F.logsigmoid(margin - beta * (rejected_kl - chosen_kl))
    return -F.logsigmoid(margin - alpha * beta * (rejected_kl - chosen_kl.detach()))


def monte_carlo_values(scores: Tensor, states: list[int], length: int) -> Tensor:
    """V of each token's state in one completion, [length] (VinePPO, arXiv 2410.01679).

    V(s_t) = mean of the scores of K completions that the policy samples from s_t. It is known at the chosen states
    alone. A token between two of them belongs to the step that began at the first, and takes its value; so the change
    of V over a step lands on the step's last token.

    Args:
        scores: [P, K].
        states: the position of the token that each of the P states precedes, ascending from 0.
        length: tokens of the completion.
    """
    means = scores.mean(1)
    return torch.stack([means[max(p for p, s in enumerate(states) if s <= t)] for t in range(length)])


def klq_residual_loss(
    d: Tensor,
    v: Tensor,
    advantages: Tensor,
    *,
    tau: float = 0.05,
    alpha: float = 1.0,
    loss_type: str = "l2",
    huber_delta: float = 1.0,
    value_clip: float = 0.2,
    log_ratio_clip: float = 0.2,
) -> Tensor:
    """The loss of each token from d = logp - old_logp, v = V - old_V and A (the residual identity).

    l2              e^2                                    with e = tau d + v - alpha A = Q - G
    huber           e^2/2 if |e| <= huber_delta, else huber_delta (|e| - huber_delta/2)
    value_clipped   max(e^2, (clip(tau d + v, +-value_clip) - alpha A)^2)
    ratio_clipped   max(e^2, (tau clip(d, +-log_ratio_clip) + v - alpha A)^2)
    double_clipped  the largest of the three squares
    """
    e = tau * d + v - alpha * advantages
    if loss_type == "l2":
        return e.square()
    if loss_type == "huber":
        return F.huber_loss(e, torch.zeros_like(e), reduction="none", delta=huber_delta)
    by_value = ((tau * d + v).clamp(-value_clip, value_clip) - alpha * advantages).square()
    by_ratio = (tau * d.clamp(-log_ratio_clip, log_ratio_clip) + v - alpha * advantages).square()
    if loss_type == "value_clipped":
        return torch.maximum(e.square(), by_value)
    if loss_type == "ratio_clipped":
        return torch.maximum(e.square(), by_ratio)
    if loss_type == "double_clipped":
        return torch.maximum(torch.maximum(e.square(), by_value), by_ratio)
    raise ValueError(f"loss_type: unknown loss {loss_type!r}")


def step_towards(alpha: float, spread: float, largest: float) -> float:
    """alpha' = alpha min(1, largest / spread): the step of eq. 7 where lambda-errors are brought to a common scale.

    G_t = Q_t + alpha' A_t is what dividing A by its running root mean square, ``spread``, in units of ``largest`` comes
    to. Policy and V share the step, so Q = tau rho + V goes on holding, and E[A_t|s_t, a_t] = 0 stays the fixed point
    for any alpha' > 0. Whitening would move it, since it subtracts a mean. Small errors are not blown up: alpha' > 1
    would overshoot, and with a spread that falls as Q converges it would not stop doing so.
    """
    return alpha * min(1.0, largest / spread) if spread > 0 else alpha


def split_residual_loss(
    d: Tensor, v: Tensor, policy_advantages: Tensor, value_advantages: Tensor, **loss: float | str
) -> Tensor:
    """The loss of each token where policy and V learn from errors of their own, A' and A.

    Each has the gradient of ``klq_residual_loss`` with its own errors, the other's part of Q held constant:

        L(d, sg v, A') + L(sg d, v, A) - sg L(sg d, v, A).

    With A' = A that is the gradient of L(d, v, A). At the fixed point both errors have mean 0 given the state.
    """
    policy = klq_residual_loss(d, v.detach(), policy_advantages, **loss)  # type: ignore[arg-type]
    value = klq_residual_loss(d.detach(), v, value_advantages, **loss)  # type: ignore[arg-type]
    return policy + value - value.detach()


def klq_loss(
    logprobs: Tensor,
    values: Tensor,
    targets: KLQTargets,
    *,
    weights: Tensor | None = None,
    mask: Tensor | None = None,
    denom: Tensor | float | None = None,
    **loss: float | str,
) -> KLQLoss:
    """L = (1/denom) sum_t w_t loss_t over the valid tokens (eq. 6); ``denom`` defaults to their number."""
    keep = torch.ones_like(logprobs, dtype=torch.bool) if mask is None else mask
    old_logprobs, old_values, advantages = (t.detach()[keep] for t in targets)
    per_token = klq_residual_loss(
        logprobs[keep] - old_logprobs,
        values[keep] - old_values,
        advantages,
        **loss,  # type: ignore[arg-type]
    )
    if weights is not None:
        per_token = per_token * weights[keep]
    count = max(int(keep.sum()), 1) if denom is None else denom
    return KLQLoss(per_token.sum() / count, {})


def _logits(hidden: Tensor, weight: Tensor, bias: Tensor | None, temperature: float, softcap: float | None) -> Tensor:
    """softcap(hidden @ weight.T + bias) / temperature, all of them; a cap of infinity is none."""
    logits = F.linear(hidden, weight, bias)
    if softcap is not None and softcap < float("inf"):
        logits = softcap * torch.tanh(logits / softcap)
    return logits / temperature


def linear_logprobs(
    hidden: Tensor,
    weight: Tensor,
    actions: Tensor,
    *,
    bias: Tensor | None = None,
    temperature: float = 1.0,
    softcap: float | None = None,
) -> LinearLogprobs:
    """log softmax(hidden @ weight.T)[action], its log-normaliser and its entropy, through the full logits."""
    logits = _logits(hidden, weight, bias, temperature, softcap)
    logp = logits.log_softmax(-1)
    taken = logp.gather(-1, actions.unsqueeze(-1)).squeeze(-1)
    return LinearLogprobs(taken, logits.logsumexp(-1), -(logp.exp() * logp).sum(-1))


def linear_kl(
    hidden: Tensor,
    weight: Tensor,
    ref_hidden: Tensor,
    ref_weight: Tensor,
    *,
    bias: Tensor | None = None,
    ref_bias: Tensor | None = None,
    temperature: float = 1.0,
    softcap: float | None = None,
    ref_temperature: float | None = None,
    ref_softcap: float | None = None,
    direction: str = "forward",
) -> Tensor:
    """KL(p || q) = sum_v p_v (log p_v - log q_v), with p = pi and q = pi_b, or in reverse the other way round.

    Both are softmaxes of the full logits, and 0 log 0 = 0. Temperature and soft cap of the reference are the policy's
    where they are None; a cap of infinity is none.
    """
    ref_temperature = temperature if ref_temperature is None else ref_temperature
    ref_softcap = softcap if ref_softcap is None else ref_softcap

    log_p = _logits(hidden, weight, bias, temperature, softcap).log_softmax(-1)
    log_q = _logits(ref_hidden, ref_weight, ref_bias, ref_temperature, ref_softcap).log_softmax(-1)
    if direction == "reverse":
        log_p, log_q = log_q, log_p
    p = log_p.exp()
    return (p * torch.where(p == 0, 0.0, log_p - log_q)).sum(-1)


def linear_select(
    hidden: Tensor,
    weight: Tensor,
    ids: Tensor,
    *,
    bias: Tensor | None = None,
    atoms: int | None = None,
    temperature: float = 1.0,
    softcap: float | None = None,
) -> Tensor:
    """The logits of k ids per token, [..., k], out of all logits softcap(hidden @ weight.T + bias) / temperature.

    With ``atoms``, id v has the rows v A .. v A + A - 1 of the head, and the result is [..., k, A].
    """
    logits = _logits(hidden, weight, bias, temperature, softcap)
    rows = ids.unsqueeze(-1) * (atoms or 1) + torch.arange(atoms or 1, device=ids.device)
    found = logits.gather(-1, rows.flatten(-2).long()).reshape(rows.shape)
    return found.squeeze(-1) if atoms is None else found


def naive_klq_loss(
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
    mask: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    bias: Tensor | None = None,
    temperature: float = 1.0,
    softcap: float | None = None,
    denom: Tensor | float | None = None,
    weights: Tensor | None = None,
    **loss: float | str,
) -> KLQLoss:
    """The result of ``fused_klq_loss``, computed plainly: full logits, then targets, then the loss, then autograd."""
    logprobs = linear_logprobs(hidden, weight, actions, bias=bias, temperature=temperature, softcap=softcap).logprobs
    if targets is None:
        if ref_logprobs is None or rewards is None:
            raise ValueError("targets: give rollout targets, or ref_logprobs and rewards")
        targets = klq_targets(
            logprobs.detach(), ref_logprobs, values.detach(), rewards, tau=tau, gamma=gamma, lam=lam,
            bootstrap_values=bootstrap_values, trace=trace, mask=mask, cu_seqlens=cu_seqlens,
        )  # fmt: skip
    return klq_loss(logprobs, values, targets, mask=mask, denom=denom, weights=weights, tau=tau, **loss)


def guide_tilt(outputs: Tensor, kind: str, eta: float, *, low: float = 0.0, high: float = 1.0) -> Tensor:
    """log E[exp(R / eta)] of the laws that a guide's outputs [..., A] say (Q-sharp, arXiv 2502.20548, eq. 3), [...].

    bernoulli     R is high with probability sigmoid(z), else low
    categorical   R is one of A atoms, evenly from low to high, with probabilities softmax(z)
    mse           R is its mean, low + (high - low) sigmoid(z), for certain: controlled decoding (arXiv 2310.17022)
    """
    if kind == "categorical":
        atoms = torch.linspace(low, high, outputs.shape[-1], dtype=outputs.dtype)
        logp = outputs.log_softmax(-1)
    else:
        z = outputs.squeeze(-1)
        if kind == "mse":
            return (low + (high - low) * torch.sigmoid(z)) / eta
        atoms = torch.tensor([low, high], dtype=outputs.dtype)
        logp = torch.stack([F.logsigmoid(-z), F.logsigmoid(z)], -1)
    return (logp + atoms / eta).logsumexp(-1)


def sampling_threshold(dense: Tensor, actions: Tensor, samples: int) -> Tensor:
    """eps = (1/n) sum_t w_t / K with w_t = sum_{j != a_t} |d_tj|, 0-d: the threshold of ``sampled_gradient``.

    Args:
        dense: d, the gradient by the logits of a chunk of n tokens, [n, V].
        actions: a, int64 [n].
        samples: K.
    """
    return dense.scatter(1, actions[:, None], 0.0).abs().sum(1).mean() / samples


def sampled_gradient(dense: Tensor, actions: Tensor, threshold: Tensor | float, uniforms: Tensor) -> Tensor:
    """An estimate of the gradient by the logits with few entries, from one uniform number per token: [n, V].

    With s_tj = |d_tj| / eps at the small entries, those with |d_tj| < eps and j != a_t, else 0, and
    c_tj = s_t0 + ... + s_tj,

        estimate_tj = sign(d_tj) eps    at small entries with floor(c_tj + u_t) > floor(c_{t,j-1} + u_t),
                      0                 at the other small entries,
                      d_tj              elsewhere.

    Over u_t uniform in [0, 1), and for any d:

    - E estimate = d, since the interval (c_{t,j-1} + u_t, c_tj + u_t] holds a whole number with probability s_tj;
    - a row has within 1 of sum_j s_tj small entries, and their sum is within eps of that of the small d_tj, where all
      have one sign; so, with eps of ``sampling_threshold``, at most K + 1 entries per row on average;
    - E sum_tj (estimate - d)^2 = sum_small (eps |d_tj| - d_tj^2) <= eps sum_t w_t = n eps^2 K <= (1/K) sum_t w_t^2, the
      last since (mean of w)^2 <= mean of w^2. That is at most |d|^2 / K where w_t <= |d_ta|, as it is in the gradient
      of a log-probability: d_ta = g_t (1 - p_a), w_t = |g_t| (1 - p_a).

    Args:
        dense, actions: as in ``sampling_threshold``.
        threshold: eps > 0.
        uniforms: u, [n], in [0, 1).
    """
    column = torch.arange(dense.shape[1], device=dense.device)
    small = (dense.abs() < threshold) & (column != actions[:, None])
    sums = torch.where(small, dense.abs() / threshold, 0.0).cumsum(1) + uniforms[:, None]
    before = torch.cat([uniforms[:, None], sums[:, :-1]], 1)
    kept = torch.where(sums.floor() > before.floor(), dense.sign() * threshold, torch.zeros_like(dense))
    return torch.where(small, kept, dense)
