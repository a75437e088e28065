"""The checks on hidden states, weight and bias that the functions of the vocabulary share."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ..vocabulary import chunking
from .checks import DTYPES, require, require_alike, require_flag, require_number, require_tensor
from .layout import Layout, constant, flattened
from .transforms import needs_gradient, refuse_tangents

# Asked once, here, since torch.compile of torch 2.11 cannot trace the question.
AUTOCASTS = {kind for kind in ("cpu", "cuda", "xpu", "mps", "hpu", "xla") if torch.amp.is_autocast_available(kind)}

FLATTENED = (
    "; ZeRO-3 and FSDP1 leave a flat or empty weight outside of the module that owns it: call in that module's "
    "forward, or gather it first (deepspeed.zero.GatheredParameters, FSDP.summon_full_params)"
)
GRADIENTS = ("dense", "sampled")
MOST_SAMPLES = 2**16


class HeadInputs(NamedTuple):
    """Checked inputs, flat: hidden [M, H], weight [V, H], bias [V] or None, actions int64 [M]; whether 16-bit products
    are to leave logits in fp32; and of a sampled gradient K (0: dense) and, where one is needed, the seed, int64 0-d.
    """

    hidden: Tensor
    weight: Tensor
    bias: Tensor | None
    actions: Tensor
    fp32_logits: bool
    samples: int
    seed: Tensor | None


def check_head(
    layout: Layout,
    hidden: Tensor,
    weight: Tensor,
    actions: Tensor,
    bias: Tensor | None,
    *,
    temperature: float,
    softcap: float | None,
    logits_dtype: torch.dtype | None,
    return_entropy: bool,
    gradient: str,
    samples: int,
    seed: int | Tensor | None,
    workspace_bytes: int | None,
    split: bool,
) -> HeadInputs:
    """Checks and flattens; under autocast hidden states take autocast's dtype, as ``F.linear`` would make them.

    ``split``: other processes have other rows of the head, so that this one may have none.
    """
    hidden = check_linear(
        layout, hidden, weight, bias, temperature=temperature, softcap=softcap, logits_dtype=logits_dtype, split=split
    )
    (vocab, width), device = weight.shape, hidden.device
    require(actions.device == device, "actions", f"must be on {device}, where hidden is")
    require_alike("actions", actions, "hidden", hidden)
    require(actions.dtype in (torch.int64, torch.int32), "actions", f"must be int64 or int32, got {actions.dtype}")
    require_flag("return_entropy", return_entropy)
    fp32_logits = logits_dtype == torch.float32 and hidden.dtype != torch.float32
    check_workspace(workspace_bytes)
    refuse_tangents(hidden=hidden, weight=weight, bias=bias)
    stored = chunking.head_dtypes(hidden.dtype, device, fp32_logits=fp32_logits).logits
    chunking.chunk_rows(1, max(vocab, 1), stored, device, workspace_bytes)
    check_sampling("gradient", gradient, "samples", samples)
    _check_seed(seed, device)
    sampled = gradient == "sampled"
    needed = any(needs_gradient(tensor) for tensor in (hidden, weight, bias) if tensor is not None)
    return HeadInputs(
        hidden if hidden.dim() == 2 else hidden.reshape(-1, width),
        weight,
        bias,
        constant(flattened(actions), torch.int64).contiguous(),
        fp32_logits,
        samples if sampled else 0,
        _seed_tensor(seed, device) if sampled and needed else None,
    )


def check_linear(
    layout: Layout,
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    *,
    temperature: float,
    softcap: float | None,
    logits_dtype: torch.dtype | None,
    split: bool = False,
    prefix: str = "",
) -> Tensor:
    """Checks a head and the hidden states that it takes; returns those, under autocast in the dtype of autocast.

    ``prefix``: of the names of these arguments, "ref_" for those of a reference.
    """
    states, rows, offset = (prefix + name for name in ("hidden", "weight", "bias"))
    require_tensor(states, hidden)
    require_tensor(rows, weight)
    if bias is not None:
        require_tensor(offset, bias)
    have = "has" if layout.name == "hidden" else "have"
    require(
        hidden.dim() == len(layout.shape) + 1 and tuple(hidden.shape[:-1]) == layout.shape,
        states,
        f"must have shape {[*layout.shape, 'H']}, as {layout.name} {have} {list(layout.shape)}; "
        f"got {list(hidden.shape)}",
    )
    hint = FLATTENED if weight.dim() == 1 else ""
    require(weight.dim() == 2, rows, f"must be [V, H], got {list(weight.shape)}{hint}")
    vocab, width = weight.shape
    enough = (vocab > 0 or split) and width > 0
    require(enough, rows, f"must have at least one row and column, got {list(weight.shape)}")
    require(
        width == hidden.shape[-1],
        rows,
        f"must be [V, {hidden.shape[-1]}] to match {states}, got {list(weight.shape)}",
    )
    device = hidden.device
    for name, tensor in ((rows, weight), (offset, bias)):
        require(tensor is None or tensor.device == device, name, f"must be on {device}, where {states} is")
        if tensor is not None:
            require_alike(name, tensor, states, hidden)
    autocasts = device.type in AUTOCASTS and torch.is_autocast_enabled(device.type)
    if autocasts and hidden.dtype == torch.float32:
        hidden = hidden.to(torch.get_autocast_dtype(device.type))
    require(hidden.dtype in DTYPES, states, f"must be float32, bfloat16 or float16, got {hidden.dtype}")
    require(
        weight.dtype in (hidden.dtype, torch.float32),
        rows,
        f"must have the dtype of {states}, {hidden.dtype}, or be a float32 master weight; got {weight.dtype}",
    )
    if bias is not None:
        require(tuple(bias.shape) == (vocab,), offset, f"must be [{vocab}], got {list(bias.shape)}")
        require(bias.dtype in DTYPES, offset, f"must be float32, bfloat16 or float16, got {bias.dtype}")
    require_number(prefix + "temperature", temperature, positive=True)
    if softcap is not None:
        require_number(prefix + "softcap", softcap, positive=True)
    require(
        logits_dtype in (None, hidden.dtype, torch.float32),
        "logits_dtype",
        f"must be torch.float32, or None for the dtype of {states}, {hidden.dtype}; got {logits_dtype!r}",
    )
    return hidden


def check_whole(function: str, **tensors: Tensor | None) -> None:
    """Raises the ValueError that names what is no plain tensor; biases may be None.

    A DTensor is refused: ``function`` takes a head that is whole on each process.
    """
    for name, tensor in tensors.items():
        whole = f"is a DTensor, and {function} takes a head that is whole on each process; pass its full_tensor()"
        require(not hasattr(tensor, "placements"), name, whole)
        if tensor is not None or not name.endswith("bias"):
            require_tensor(name, tensor)


def check_workspace(workspace_bytes: int | None) -> None:
    """Raises the ValueError that names the argument unless it is an int or None."""
    require(
        workspace_bytes is None or isinstance(workspace_bytes, int),
        "workspace_bytes",
        f"must be an int or None, got {workspace_bytes!r}",
    )


def check_sampling(gradient_name: str, gradient: str, samples_name: str, samples: int) -> None:
    """Raises the ValueError that names one of the two arguments unless it is one of a head's gradient."""
    require(gradient in GRADIENTS, gradient_name, f"must be one of {', '.join(GRADIENTS)}; got {gradient!r}")
    # formatted only on failure: torch.compile cannot format a number that changes from call to call
    if not (isinstance(samples, int) and not isinstance(samples, bool) and 1 <= samples <= MOST_SAMPLES):
        raise ValueError(f"{samples_name}: must be an int in [1, {MOST_SAMPLES}], got {samples!r}")


def _check_seed(seed: int | Tensor | None, device: torch.device) -> None:
    if isinstance(seed, Tensor):
        require_tensor("seed", seed)
        given = f"{seed.dtype} {list(seed.shape)}"
        require(seed.numel() == 1 and seed.dtype == torch.int64, "seed", f"must be one int64 number, got {given}")
        here = seed.device == device or seed.device.type == "cpu"
        require(here, "seed", f"must be on {device} or the CPU, got {seed.device}")
    elif seed is not None and not (isinstance(seed, int) and not isinstance(seed, bool) and -(2**63) <= seed < 2**63):
        raise ValueError(f"seed: must be None, an int64 tensor or an int of 64 bits, got {seed!r}")


def _seed_tensor(seed: int | Tensor | None, device: torch.device) -> Tensor:
    """int64, 0-d, on the device, without waiting for it. None draws from torch's generator there."""
    if isinstance(seed, Tensor):
        return seed.detach().reshape(()).to(device)
    if seed is None:
        return torch.randint(-(2**63), 2**63 - 1, (), dtype=torch.int64, device=device)
    return torch.full((), seed, dtype=torch.int64, device=device)
