"""The exact divergence of policy and reference at each trained token, from the states of both."""

from __future__ import annotations

import math
from typing import Any, Protocol

import torch
from torch import Tensor

from ...call.checks import require
from ...divergence import linear_kl
from ..actor_critic import States
from ..batches import Inputs
from ..sharding import shards_weights


class HeadSettings(Protocol):
    """The arguments of a run that say how logits are computed."""

    workspace_bytes: int | None

    @property
    def logits_dtype(self) -> torch.dtype | None: ...


def divergence(states: States, reference: States, inputs: Inputs, config: HeadSettings, direction: str) -> Tensor:
    """KL(pi || pi_ref) of each trained token over the whole vocabulary, or in reverse KL(pi_ref || pi), fp32 [N]."""
    head, ref = states.head, reference.head
    return linear_kl(
        states.hidden, head.weight, reference.hidden, ref.weight, bias=head.bias, ref_bias=ref.bias,
        temperature=head.temperature, softcap=head.softcap, ref_temperature=ref.temperature,
        ref_softcap=math.inf if ref.softcap is None else ref.softcap, direction=direction,
        logits_dtype=config.logits_dtype, cu_seqlens=inputs.cu_seqlens, workspace_bytes=config.workspace_bytes,
    )  # fmt: skip


def check_whole(accelerator: Any, name: str, instead: str) -> None:
    """Raises a ValueError where an engine shards weights: both heads must be whole on each process."""
    require(
        not shards_weights(accelerator),
        name,
        f"compares whole heads, and FSDP and ZeRO-3 shard them; use DDP, or {instead}",
    )
