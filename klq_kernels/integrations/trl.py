"""TRL: ``linear_logprobs`` under the log-probabilities of GRPOTrainer and its relatives.

    with patch_trl():
        GRPOTrainer(...).train()

TRL's trainers give their models a fused head (``trl.trainer.utils.add_fused_lm_head``), whose forward calls
``_ChunkedLogProbFunction.apply`` on flat hidden states. Two globals of that module are replaced:

- ``_ChunkedLogProbFunction`` by an object with the same ``apply``. It calls ``linear_logprobs``, and TRL's own function
  for what that one does not do (``_Head.apply`` lists it).
- ``_use_triton``, by which the forward decides whether it drops masked positions before the head. TRL drops them on
  devices with Triton alone; now they are dropped on a CPU too, where prompts and padding then cost nothing.

The head is looked up at each call, so a model that was made before the patch is served too.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..logprobs import linear_logprobs
from .host import Host, Patch

TRL = Host("trl", written_for="1.16")
FUNCTION, COMPACT = "_ChunkedLogProbFunction", "_use_triton"
PARAMETERS = (
    "ctx", "hidden", "weight", "bias", "targets", "temperature", "chunk_size", "final_logit_softcapping",
    "logit_scale", "outputs",
)  # fmt: skip
OURS = {"log_probs", "entropy"}


class Options(NamedTuple):
    """Keywords of ``linear_logprobs`` that TRL has no setting for."""

    logits_dtype: torch.dtype | None = None
    gradient: str = "dense"
    samples: int = 64
    workspace_bytes: int | None = None


def patch_trl(
    *,
    logits_dtype: torch.dtype | None = None,
    gradient: str = "dense",
    samples: int = 64,
    workspace_bytes: int | None = None,
) -> Patch:
    """Puts ``linear_logprobs`` under the log-probabilities of TRL's trainers, in this process.

    GRPO, RLOO and AsyncGRPO, and the reference models of all, then run on it. SFT, DPO and KTO ask their head for
    outputs that only TRL's function has, and keep it, as does a head that ZeRO-3 has partitioned.

    Args:
        logits_dtype, gradient, samples, workspace_bytes: as in ``linear_logprobs``. A sampled gradient has no part by
            the entropy: GRPO's ``entropy_coef`` must then be 0.

    Returns:
        A ``Patch``, whose ``undo()`` puts TRL's own function back; as a context manager it does so at the end. Where
        TRL is patched already, nothing changes, and undoing the second patch changes nothing either.

    Raises:
        ImportError: without TRL.
        HostMismatch: where the installed TRL has other names or another signature; nothing is changed then.
        ValueError: where TRL is patched with other options.
    """
    from trl.trainer import utils

    options = Options(logits_dtype, gradient, samples, workspace_bytes)
    function = TRL.attribute(utils, FUNCTION)
    if isinstance(function, _Head):
        if function.options != options:
            raise ValueError(f"options: TRL is patched with {function.options}; undo that patch first")
        return Patch([])
    compact = TRL.attribute(utils, COMPACT)
    TRL.require_parameters(TRL.attribute(function, "forward"), PARAMETERS)
    TRL.require_parameters(compact, ("device",))
    for name in (FUNCTION, COMPACT):
        TRL.require_use(TRL.attribute(utils, "add_fused_lm_head"), name)
    return Patch(
        [
            (utils, FUNCTION, _Head(function, options)),
            (utils, COMPACT, lambda device: device.type == "cpu" or compact(device)),
        ]
    )


class _Head:
    """In the place of TRL's autograd function."""

    def __init__(self, original: Any, options: Options) -> None:
        self.original = original
        self.options = options

    def apply(
        self,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        targets: Tensor,
        temperature: float,
        chunk_size: int,
        softcap: float | None = None,
        scale: float = 1.0,
        outputs: tuple[str, ...] = (),
    ) -> tuple[Tensor | None, ...]:
        """(log-probs, entropy, log_sum_sq_probs, mean_logits, is_top1) of flat tokens, as TRL's function gives them.

        The logits are softcap(scale (hidden @ weight.T + bias)) / temperature. A scale before the softcap is the same
        as a softcap and a temperature divided by it.
        """
        partitioned = hasattr(weight, "ds_id")  # by ZeRO-3: TRL gathers it again in backward, which no other op does
        if set(outputs) - OURS or partitioned or not scale > 0:
            return self.original.apply(
                hidden, weight, bias, targets, temperature, chunk_size, softcap, scale, outputs
            )  # fmt: skip
        dtype = hidden.dtype
        if torch.is_autocast_enabled(hidden.device.type):
            dtype = torch.get_autocast_dtype(hidden.device.type)
        if weight.dtype not in (dtype, torch.float32):  # cast_lm_head_to_fp32: fp32 products of a 16-bit weight
            weight = weight.to(dtype)
        found = linear_logprobs(
            hidden.to(dtype)[None],
            weight,
            targets[None],
            bias=bias,
            temperature=temperature / scale,
            softcap=None if softcap is None else softcap / scale,
            return_entropy="entropy" in outputs,
            **self.options._asdict(),
        )
        entropy = None if found.entropy is None else found.entropy[0]
        return found.logprobs[0], entropy, None, None, None
