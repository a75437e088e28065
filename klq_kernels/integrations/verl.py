"""verl: a policy loss "klq" and an advantage estimator that gets the critic's values, in verl's own registries.

    # klq_verl.py, somewhere on the PYTHONPATH; VERL_USE_EXTERNAL_MODULES=klq_verl makes every process import it
    from klq_kernels.integrations.verl import register_verl
    register_verl(tau=0.05)

    actor_rollout_ref.actor.policy_loss.loss_mode=klq  algorithm.adv_estimator=gdpo  critic.enable=True
    algorithm.use_kl_in_reward=True  algorithm.kl_penalty=kl  algorithm.kl_ctrl.kl_coef=0.05

verl hands the values to two estimators alone: to its own GAE, which whitens, and, with the whole batch, to the one
named "gdpo". So the estimator is entered there, in GDPO's place. Under the name "klq" it is entered too, where it says
that it got no values. ``objective`` says what the loss is.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..call.checks import require
from ..returns import gae
from .host import Host
from .objective import Objective, numbers, require_klq_rewards, weights_of

VERL = Host("verl", written_for="0.9.1")
NAME, SLOT = "klq", "gdpo"
LOSS_PARAMETERS = (
    "old_log_prob", "log_prob", "advantages", "response_mask", "loss_agg_mode", "config", "rollout_is_weights",
)  # fmt: skip
ESTIMATOR_PARAMETERS = (
    "token_level_rewards", "response_mask", "index", "epsilon", "norm_adv_by_std_in_grpo", "config",
    "non_tensor_batch", "batch", "kwargs",
)  # fmt: skip
AGGREGATE_PARAMETERS = (
    "loss_mat", "loss_mask", "loss_agg_mode", "dp_size", "batch_num_tokens", "global_batch_size", "loss_scale_factor",
)  # fmt: skip


def register_verl(
    *,
    tau: float = 0.05,
    alpha: float = 1.0,
    loss_type: str = "l2",
    huber_delta: float = 1.0,
    value_clip: float = 0.2,
    log_ratio_clip: float = 0.2,
) -> None:
    """Enters the policy loss "klq" and the estimator in verl's registries, in this process. A second call replaces.

    Args:
        tau, alpha, loss_type, huber_delta, value_clip, log_ratio_clip: as in ``klq_loss``. gamma and lam of the
            estimator are verl's ``algorithm.gamma`` and ``algorithm.lam``.

    Raises:
        ImportError: without verl.
        HostMismatch: where the installed verl has other names or signatures; nothing is registered then.
    """
    import verl.trainer.ppo.core_algos as core

    VERL.require_parameters(VERL.attribute(core, "compute_policy_loss_vanilla"), LOSS_PARAMETERS)
    VERL.require_parameters(VERL.attribute(core, "compute_gdpo_outcome_advantage"), ESTIMATOR_PARAMETERS)
    VERL.require_parameters(VERL.attribute(core, "agg_loss"), AGGREGATE_PARAMETERS)
    losses = VERL.attribute(core, "POLICY_LOSS_REGISTRY")
    estimators = VERL.attribute(core, "ADV_ESTIMATOR_REGISTRY")
    objective = Objective(tau, alpha, loss_type, huber_delta, value_clip, log_ratio_clip)

    def policy_loss(
        old_log_prob: Tensor,
        log_prob: Tensor,
        advantages: Tensor,
        response_mask: Tensor,
        loss_agg_mode: str = "token-mean",
        config: Any = None,
        rollout_is_weights: Tensor | None = None,
    ) -> tuple[Tensor, dict[str, Any]]:
        """verl's call: tensors [B, T]; the loss is aggregated as ``loss_agg_mode`` and the config say."""
        require(config is not None, "config", "must be verl's ActorConfig, which says how losses are aggregated")
        weights = weights_of(
            lambda losses: core.agg_loss(
                loss_mat=losses,
                loss_mask=response_mask,
                loss_agg_mode=loss_agg_mode,
                **config.global_batch_info,
            ),
            log_prob,
        )
        if rollout_is_weights is not None:
            weights = weights * rollout_is_weights.detach()
        found = objective.loss(log_prob, old_log_prob, advantages, response_mask, weights=weights, denom=1.0)
        return found.loss, numbers(found, "actor/klq_")

    def estimator(
        token_level_rewards: Tensor,
        response_mask: Tensor,
        config: Any = None,
        batch: Any = None,
        **_: Any,
    ) -> tuple[Tensor, Tensor]:
        """verl's call: (advantages, returns), [B, T], 0 at masked tokens."""
        given = batch is not None and "values" in batch.keys()  # noqa: SIM118 (a TensorDict's own ``in`` raises)
        require(
            given,
            "values",
            "verl passes them to the estimator in GDPO's place alone, and where it has a critic: set "
            "algorithm.adv_estimator=gdpo and critic.enable=True",
        )
        require(config is not None, "config", "must be verl's AlgoConfig")
        require_klq_rewards(
            "algorithm", on=config.use_kl_in_reward, estimator=config.kl_penalty,
            fixed=config.kl_ctrl.type == "fixed", coefficient=config.kl_ctrl.kl_coef, tau=tau,
        )  # fmt: skip
        values, mask = batch["values"], response_mask.bool()
        with torch.no_grad():
            advantages = gae(token_level_rewards, values, gamma=float(config.gamma), lam=float(config.lam), mask=mask)
            return advantages, advantages + values.where(mask, 0.0)

    losses[NAME] = policy_loss
    estimators[NAME] = estimators[SLOT] = estimator
