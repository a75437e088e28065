"""Proposition 4.1 of the paper in numbers: in what sense a KLQ step is a step of PPO with a KL penalty.

Write d = log pi - log pi_old, v = V - V_old, A for the lambda-error, rho for log pi - log pi_ref. The residual of KLQ
is e = tau d + v - alpha A. With beta = tau (1 - alpha) / alpha, for which tau / alpha = tau + beta, the gradient of e^2
through the policy, divided by 2 alpha tau, is

    [ -(A - v / alpha) + (tau + beta) d ] grad log pi.

Three exact statements follow. Each is checked with PPO's side computed its own way:

    rollout      Where the policy is still the one that sampled, d = v = 0: the gradient is 2 alpha tau times that of
                 PPO with unwhitened advantages and 1/tau as the weight of its halved squared value error. alpha only
                 scales.
    away         On the samples, elsewhere: it is 2 alpha tau times that of
                 -(A - v / alpha) log pi + (tau + beta) d^2 / 2.
    expectation  d^2 / 2 has, over actions of pi, the gradient of KL(pi || pi_old). The part tau of it turns the old
                 policy's distance to the reference, -tau rho_old within A, into the present one's. So KLQ climbs

                     E_pi[A + tau rho_old] - tau KL(pi || pi_ref) - beta KL(pi || pi_old):

                 the regularised objective, with PPO's penalty in its reverse form at the price beta.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ... import reference
from ...trainer import KLQTrainer
from ...trainer.batches import Inputs
from ...trainer.experience import Experience
from ...trainer.objectives import klq
from ...types import KLQTargets

DRIFT, STEP = 0.02, 0.01  # noise on the weights: policy from reference, and policy from the one that sampled


class Sight(NamedTuple):
    """A model's outputs for N trained tokens, in float64 with gradients."""

    logprobs: Tensor  # [N, V], of all actions
    taken: Tensor  # [N]
    values: Tensor  # [N]


def compare_gradients(trainer: KLQTrainer, rows: list[dict[str, Any]], alphas: Iterable[float]) -> dict[str, Any]:
    """Relative errors and cosines between KLQ's gradient and PPO's, on a rollout of ``rows``.

    Returns:
        ``alphas``: for each alpha the three comparisons, and what they become without the penalty beta; ``whitened``:
        the cosine of the policy's gradient with that of PPO's whitened advantages; ``tokens``, ``tau``.
    """
    tau, model = trainer.args.tau, trainer.actor_critic
    generator = torch.Generator().manual_seed(trainer.args.seed)
    disturb(model, DRIFT, generator)
    rollout = trainer.roll_out(rows, seed=trainer.args.seed)
    scores = trainer.reward(rows, rollout).total.double()
    inputs = trainer.collate(rollout.sequences)
    exact = exact_copy(model)
    old = look(exact, inputs)
    ref_logprobs = look_at_reference(trainer, inputs)
    ref_taken = ref_logprobs.gather(1, inputs.actions[:, None]).squeeze(1)
    targets = reference.klq_targets(
        old.taken.detach(), ref_taken, old.values.detach(), scores,
        tau=tau, lam=trainer.args.lam, cu_seqlens=inputs.cu_seqlens,
    )  # fmt: skip
    advantages = shaped_gae(old, ref_taken, scores, inputs, tau=tau, lam=trainer.args.lam)

    parameters = list(exact.parameters())
    ppo = gradient(ppo_loss(old, targets, advantages, value_weight=1 / tau), parameters)
    policy = list(exact.policy.parameters())
    plain = gradient(ppo_loss(old, targets, advantages, value_weight=0.0), policy)
    whitened = gradient(ppo_loss(old, targets, whiten(advantages), value_weight=0.0), policy)

    moved = copy.deepcopy(exact)
    disturb(moved, STEP, generator)
    now = look(moved, inputs)
    table = torch.randn(old.logprobs.shape, dtype=torch.float64, generator=generator) * advantages.std()
    found = []
    for alpha in alphas:
        scale, beta = 2 * alpha * tau, tau * (1 - alpha) / alpha
        ours = gradient(reference.klq_loss(old.taken, old.values, targets, tau=tau, alpha=alpha).loss, parameters)
        fused = fused_gradient(trainer, inputs, targets, rollout.sequences, alpha)
        entry = {
            "alpha": alpha, "beta": beta,
            "rollout": compared(ours, scale * ppo), "rollout_fused": compared(fused, scale * ppo),
        }  # fmt: skip
        for name, price in (("", beta), ("_without_beta", 0.0)):
            entry["away" + name] = compared(*away(moved, now, targets, tau, alpha, price))
            entry["expectation" + name] = compared(
                *in_expectation(moved, now, old, ref_logprobs, table, tau, alpha, price)
            )
        found.append(entry)
    return {"alphas": found, "whitened": compared(whitened, plain), "tokens": len(inputs.actions), "tau": tau}


# The models


def disturb(model: nn.Module, size: float, generator: torch.Generator) -> None:
    """Adds Gaussian noise to every weight."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, dtype=parameter.dtype, generator=generator), alpha=size)


def exact_copy(model: Any) -> Any:
    """A model in float64 throughout: transformers' norms would go on computing in fp32."""
    out = copy.deepcopy(model).double()
    norms = [(name, part) for name, part in out.named_modules() if type(part).__name__.endswith("RMSNorm")]
    for name, part in norms:
        norm = nn.RMSNorm(part.weight.shape, eps=part.variance_epsilon)
        norm.weight = part.weight
        parent, _, child = name.rpartition(".")
        setattr(out.get_submodule(parent), child, norm)
    return out


def look(model: Any, inputs: Inputs) -> Sight:
    """An ``ActorCritic`` in float64, read plainly: full log-softmax, linear value head."""
    states = model.language_model.hidden_states(inputs)
    value_states = states if model.value.backbone is None else hidden_states(model.value.backbone, inputs)
    head = model.language_model.head(model.temperature)
    logits = states.index_select(0, inputs.rows) @ head.weight.T
    logprobs = (logits / head.temperature).log_softmax(-1)
    values = model.value.head(value_states.index_select(0, inputs.rows)).squeeze(-1)
    return Sight(logprobs, logprobs.gather(1, inputs.actions[:, None]).squeeze(1), values)


def hidden_states(backbone: nn.Module, inputs: Inputs) -> Tensor:
    at = {"attention_mask": inputs.attention_mask, "position_ids": inputs.position_ids}
    out = backbone(input_ids=inputs.input_ids, **at, use_cache=False)
    return out.last_hidden_state.flatten(0, 1)


@torch.no_grad()
def look_at_reference(trainer: KLQTrainer, inputs: Inputs) -> Tensor:
    """log pi_ref of all actions, float64 [N, V]."""
    assert trainer.reference is not None
    model = exact_copy(trainer.reference.module.model)
    out = model(input_ids=inputs.input_ids, attention_mask=inputs.attention_mask, position_ids=inputs.position_ids)
    logits = out.logits.flatten(0, 1).index_select(0, inputs.rows)
    return (logits / trainer.args.temperature).log_softmax(-1)


# PPO's side


def shaped_gae(old: Sight, ref_taken: Tensor, scores: Tensor, inputs: Inputs, *, tau: float, lam: float) -> Tensor:
    """PPO's advantages: GAE on rewards -tau rho_t, with the score added at the last token."""
    rewards = -tau * (old.taken.detach() - ref_taken)
    rewards[inputs.cu_seqlens[1:].long() - 1] += scores
    return reference.gae(rewards, old.values.detach(), lam=lam, cu_seqlens=inputs.cu_seqlens)


def ppo_loss(now: Sight, targets: KLQTargets, advantages: Tensor, *, value_weight: float) -> Tensor:
    """PPO's clipped loss and its halved squared value error (at the rollout the clip does nothing)."""
    ratio = (now.taken - targets.old_logprobs).exp()
    policy = torch.maximum(-advantages * ratio, -advantages * ratio.clamp(0.8, 1.2))
    value = 0.5 * (now.values - (targets.old_values + advantages)).square()
    return (policy + value_weight * value).mean()


def whiten(advantages: Tensor) -> Tensor:
    return (advantages - advantages.mean()) / advantages.std(correction=0)


# Both sides, away from the rollout


def away(model: Any, now: Sight, targets: KLQTargets, tau: float, alpha: float, beta: float) -> tuple[Tensor, Tensor]:
    """Gradients of the policy on the samples: KLQ's, and 2 alpha tau times that of the penalised loss."""
    policy = list(model.policy.parameters())
    ours = gradient(reference.klq_loss(now.taken, now.values.detach(), targets, tau=tau, alpha=alpha).loss, policy)
    shift = (now.values.detach() - targets.old_values) / alpha
    distance = 0.5 * (now.taken - targets.old_logprobs).square()
    penalised = (-(targets.advantages - shift) * now.taken + (tau + beta) * distance).mean()
    return ours, 2 * alpha * tau * gradient(penalised, policy)


def in_expectation(
    model: Any, now: Sight, old: Sight, ref_logprobs: Tensor, table: Tensor, tau: float, alpha: float, beta: float
) -> tuple[Tensor, Tensor]:
    """The same over all actions of the policy, in the batch's states: against the gradient of the objective itself.

    ``table`` [N, V] stands for A + tau rho_old, which a rollout knows of one action only; the identity holds for any.
    """
    policy = list(model.policy.parameters())
    chances, before = now.logprobs.exp(), old.logprobs.detach()
    errors = table - tau * (before - ref_logprobs)
    losses = reference.klq_residual_loss(now.logprobs - before, torch.zeros_like(before), errors, tau=tau, alpha=alpha)
    ours = gradient((chances.detach() * losses).sum(1).mean(), policy)
    objective = chances * (table - tau * (now.logprobs - ref_logprobs) - beta * (now.logprobs - before))
    return ours, 2 * alpha * tau * gradient(-objective.sum(1).mean(), policy)


def fused_gradient(trainer: KLQTrainer, inputs: Inputs, targets: KLQTargets, sequences: Any, alpha: float) -> Tensor:
    """The gradient that the trainer takes, in fp32 through ``fused_klq_loss``."""
    model = trainer.actor_critic
    single = KLQTargets(*(t.float() for t in targets))
    experience = Experience(sequences, single, single.old_logprobs, single.advantages)
    config = replace_alpha(trainer.args, alpha)
    objective = partial(
        klq, inputs=inputs, experience=experience, denom=torch.tensor(float(len(inputs.actions))), config=config
    )
    loss, _ = model(inputs, objective)
    return gradient(loss, list(model.parameters())).double()


def replace_alpha(config: Any, alpha: float) -> Any:
    changed = copy.copy(config)
    changed.alpha = alpha
    return changed


def gradient(loss: Tensor, parameters: list[nn.Parameter]) -> Tensor:
    """The gradient as one vector; 0 for parameters that the loss does not reach."""
    found = torch.autograd.grad(loss, parameters, retain_graph=True, allow_unused=True)
    return torch.cat(
        [torch.zeros_like(p).flatten() if g is None else g.flatten() for p, g in zip(parameters, found, strict=True)]
    )


def compared(ours: Tensor, theirs: Tensor) -> dict[str, float]:
    """One minus the cosine of two vectors, and the norm of their difference relative to that of the second."""
    cosine = (ours @ theirs) / (ours.norm() * theirs.norm())
    return {"cosine_gap": (1 - cosine).item(), "relative_error": ((ours - theirs).norm() / theirs.norm()).item()}
