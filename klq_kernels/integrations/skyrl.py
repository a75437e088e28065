"""SkyRL: a policy loss and an advantage estimator "klq" in SkyRL's registries.

    register_skyrl(mini_batch_sequences=policy_mini_batch_size * n_samples_per_prompt)
    # trainer.algorithm: advantage_estimator=klq policy_loss_type=klq use_kl_in_reward=true use_kl_loss=false
    #   kl_estimator_type=k1 kl_loss_coef=0.05 loss_reduction=seq_mean_token_sum_norm max_seq_len=...

SkyRL multiplies the advantages by each token's weight in the loss and then sums over tokens, which is right for losses
that are linear in the advantage alone. KLQ's is quadratic, so the factor has to be taken out again. It can be where it
is the same for all tokens: under ``loss_reduction="seq_mean_token_sum_norm"``, where it is 1 / (sequences of a
mini-batch x ``max_seq_len``). The first number is not in the config that a loss sees, and is therefore an argument.
``objective`` says what the loss is.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..call.checks import require
from ..returns import gae
from .host import Host
from .objective import Objective, numbers, require_klq_rewards

SKYRL = Host("skyrl", written_for="0.3")
NAME, REDUCTION = "klq", "seq_mean_token_sum_norm"
LOSS_PARAMETERS = ("log_probs", "old_log_probs", "advantages", "config", "loss_mask", "rollout_logprobs")
ESTIMATOR_PARAMETERS = ("token_level_rewards", "values", "response_mask", "gamma", "lambd", "kwargs")
CORRECTION_PARAMETERS = ("loss", "old_log_probs", "rollout_logprobs", "loss_mask", "off_policy_correction")


def register_skyrl(
    *,
    mini_batch_sequences: int,
    tau: float = 0.05,
    alpha: float = 1.0,
    loss_type: str = "l2",
    huber_delta: float = 1.0,
    value_clip: float = 0.2,
    log_ratio_clip: float = 0.2,
) -> None:
    """Enters the policy loss and the estimator "klq" in SkyRL's registries. A second call replaces them.

    Call it after ``ray.init()``, or call SkyRL's ``sync_registries()`` later, so that its workers have them.

    Args:
        mini_batch_sequences: sequences that one optimizer step trains on, over all workers.
        tau, alpha, loss_type, huber_delta, value_clip, log_ratio_clip: as in ``klq_loss``. gamma and lam of the
            estimator are SkyRL's.

    Raises:
        ImportError: without SkyRL.
        HostMismatch: where the installed SkyRL has other names or signatures; nothing is registered then.
        ValueError: where ``mini_batch_sequences`` is no positive int.
    """
    require(
        isinstance(mini_batch_sequences, int) and mini_batch_sequences > 0,
        "mini_batch_sequences",
        f"must be a positive int, got {mini_batch_sequences!r}",
    )
    import skyrl.backends.skyrl_train.utils.ppo_utils as utils

    SKYRL.require_parameters(SKYRL.attribute(utils, "ppo_policy_loss"), LOSS_PARAMETERS)
    SKYRL.require_parameters(SKYRL.attribute(utils, "compute_gae_advantage_return"), ESTIMATOR_PARAMETERS)
    correct = SKYRL.attribute(utils, "apply_off_policy_correction")
    SKYRL.require_parameters(correct, CORRECTION_PARAMETERS)
    objective = Objective(tau, alpha, loss_type, huber_delta, value_clip, log_ratio_clip)

    def policy_loss(
        log_probs: Tensor,
        old_log_probs: Tensor,
        advantages: Tensor,
        config: Any,
        loss_mask: Tensor | None = None,
        rollout_logprobs: Tensor | None = None,
    ) -> tuple[Tensor, dict[str, float]]:
        """SkyRL's call: tensors [B, T]; a sum over the tokens of a micro-batch."""
        factor = mini_batch_sequences * _constant_length(config)
        mask = torch.ones_like(log_probs) if loss_mask is None else loss_mask
        ones = torch.ones_like(log_probs.detach())
        weights, mask, metrics = correct(ones, old_log_probs, rollout_logprobs, mask, config.off_policy_correction)
        found = objective.loss(
            log_probs, old_log_probs, advantages * factor, mask, weights=weights.detach() * mask, denom=float(factor)
        )
        return found.loss, numbers(found, "klq_") | metrics

    def estimator(
        token_level_rewards: Tensor,
        response_mask: Tensor,
        values: Tensor | None = None,
        gamma: float = 1.0,
        lambd: float = 1.0,
        config: Any = None,
        **_: Any,
    ) -> tuple[Tensor, Tensor]:
        """SkyRL's call: (advantages, returns), [B, T], 0 at masked tokens."""
        require(values is not None, "values", "are needed: give SkyRL a critic (trainer.critic.model.path)")
        require(config is not None, "config", "must be SkyRL's AlgorithmConfig")
        assert values is not None
        _constant_length(config)
        require_klq_rewards(
            "trainer.algorithm", on=config.use_kl_in_reward, estimator=config.kl_estimator_type,
            fixed=config.kl_ctrl.type == "fixed", coefficient=config.kl_loss_coef, tau=tau,
        )  # fmt: skip
        mask = response_mask.bool()
        with torch.no_grad():
            advantages = gae(token_level_rewards, values, gamma=float(gamma), lam=float(lambd), mask=mask)
            return advantages, advantages + values.where(mask, 0.0)

    for registry, function in (("PolicyLossRegistry", policy_loss), ("AdvantageEstimatorRegistry", estimator)):
        owner = SKYRL.attribute(utils, registry)
        if NAME in owner.list_available():
            owner.unregister(NAME)
        owner.register(NAME, function)


def _constant_length(config: Any) -> int:
    """``max_seq_len`` of SkyRL's config, or a ValueError where its advantages cannot be restored."""
    require(
        config.loss_reduction == REDUCTION,
        "trainer.algorithm.loss_reduction",
        f"must be {REDUCTION!r}, the one whose factor is the same for all tokens; got {config.loss_reduction!r}",
    )
    require(
        not config.advantage_batch_normalize,
        "trainer.algorithm.advantage_batch_normalize",
        "must be False: KLQ's advantages have the unit of rewards",
    )
    require(config.max_seq_len is not None, "trainer.algorithm.max_seq_len", f"must be set for {REDUCTION!r}")
    return int(config.max_seq_len)
