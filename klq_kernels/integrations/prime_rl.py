"""prime-rl: a custom loss.

    [trainer.loss]
    type = "custom"
    import_path = "klq_kernels.integrations.prime_rl.klq_loss_function"
    kwargs = { tau = 0.05 }

prime-rl has no critic. The host's advantages, one a token, stand for KLQ's A, with the policy that sampled the tokens
as the old one. A penalty against a reference model is KLQ's where those advantages carry it. ``objective`` says what
the loss is.
"""

from __future__ import annotations

from typing import Any

from .objective import Objective


def klq_loss_function(inputs: Any, **settings: Any) -> Any:
    """prime-rl's call: ``LossInputs`` of one sequence in, ``LossOutputs`` out.

    Args:
        inputs: trainer_logprobs, inference_logprobs, advantages, loss_mask, and perhaps ref_logprobs (which adds
            metrics) and loss_weights; all [T].
        settings: tau, alpha, loss_type, huber_delta, value_clip, log_ratio_clip, as in ``klq_loss``.

    Returns:
        The sum of the losses of the tokens under the mask, which prime-rl divides by their number, and the metrics.

    Raises:
        ImportError: without prime-rl.
        TypeError: for a setting of another name.
        ValueError: as ``klq_loss``.
    """
    from prime_rl.trainer.rl.loss import LossOutputs

    weights, reference = inputs.loss_weights, inputs.ref_logprobs
    found = Objective(**settings).loss(
        inputs.trainer_logprobs[None],
        inputs.inference_logprobs[None],
        inputs.advantages[None],
        inputs.loss_mask[None],
        weights=None if weights is None else weights.detach()[None],
        ref_logprobs=None if reference is None else reference[None],
        denom=1.0,
    )
    return LossOutputs(loss=found.loss, metrics={f"klq/{name}": value for name, value in found.metrics.items()})
