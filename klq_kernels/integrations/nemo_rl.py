"""NeMo-RL: a loss of its ``LossFunction`` protocol, on next-token log-probabilities.

    loss_fn = klq_loss_fn(tau=0.05)    # in the place of ClippedPGLossFn in a GRPO or PPO loop

The advantages in the data stand for KLQ's A, with ``prev_logprobs`` as the old policy's. ``objective`` says what the
loss is, and when such advantages are KLQ's.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from .objective import Objective, numbers


def klq_loss_fn(
    *,
    tau: float = 0.05,
    alpha: float = 1.0,
    loss_type: str = "l2",
    huber_delta: float = 1.0,
    value_clip: float = 0.2,
    log_ratio_clip: float = 0.2,
) -> KLQLossFn:
    """The loss for the settings of ``klq_loss``.

    Raises:
        ImportError: without NeMo-RL.
    """
    from nemo_rl.algorithms.loss import interfaces

    return KLQLossFn(Objective(tau, alpha, loss_type, huber_delta, value_clip, log_ratio_clip), interfaces)


class KLQLossFn:
    """A ``LossFunction`` of NeMo-RL; ``klq_loss_fn`` makes it."""

    def __init__(self, objective: Objective, interfaces: Any) -> None:
        self.loss_type = interfaces.LossType.TOKEN_LEVEL
        self.input_type = interfaces.LossInputType.LOGPROB
        self.metric_normalizations: dict[str, Any] = {}
        self._objective = objective
        self._local_mean = interfaces.MetricNormalizer.NONE

    def __call__(
        self, data: Any, global_valid_seqs: Tensor, global_valid_toks: Tensor, **kwargs: Any
    ) -> tuple[Tensor, dict[str, Any]]:
        """NeMo-RL's call: data [B, S], ``next_token_logprobs`` [B, S - 1]; the sum over tokens by the global count."""
        logprobs = kwargs["next_token_logprobs"]
        mask = data["token_mask"][:, 1:] * data["sample_mask"].unsqueeze(-1)
        found = self._objective.loss(
            logprobs, data["prev_logprobs"][:, 1:], data["advantages"][:, 1:], mask, denom=global_valid_toks
        )
        metrics = numbers(found, "klq_")
        self.metric_normalizations.update(dict.fromkeys(metrics, self._local_mean))
        return found.loss, metrics | {"loss": found.loss.item(), "num_valid_samples": data["sample_mask"].sum().item()}
