"""Padded and packed tokens, and the checks on what callers pass.

This is the only place that knows about padding. At the API there are two layouts, padded ``[B, T]`` with an optional
bool mask and packed ``[N]`` with int32 ``cu_seqlens [B + 1]`` and an optional mask. Both are seen here as *flat
positions* ``0 .. M-1`` (M = B*T or N) cut into sequences by ``cu_seqlens``. Ops that touch the vocabulary then work on
the *valid rows* alone: ``rows`` lists the flat positions of the valid tokens, and ``cu_seqlens`` is restated in rows.

The number of valid rows decides sizes, so finding it under a mask costs one device-to-host synchronisation per call.
``pack`` does it once for as many calls as there are epochs; the packed layout without a mask never needs it.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .checks import looks_into, require, require_float, require_tensor


class Packing(NamedTuple):
    """A layout whose valid rows are already known. Build it with ``pack``, pass it as ``packing=``."""

    shape: tuple[int, ...]  # of the caller's per-token tensors: (B, T) or (N,)
    mask: Tensor  # bool [M], flat
    cu_seqlens: Tensor  # int32 [B + 1], in flat positions
    rows: Tensor  # int64 [n], flat positions of the valid tokens
    row_cu_seqlens: Tensor  # int32 [B + 1], in rows


torch.serialization.add_safe_globals([Packing])  # so that torch.load takes a batch that was saved with one


class Layout(NamedTuple):
    """How the caller's per-token tensors are laid out; ``packing`` is set where the valid rows are known already."""

    name: str  # of the argument that the shape is taken from
    shape: tuple[int, ...]
    mask: Tensor | None
    cu_seqlens: Tensor
    packing: Packing | None

    def scan_args(self) -> tuple[Tensor | None, Tensor]:
        """(mask, cu_seqlens) over flat positions, for the scans, which step over masked tokens by themselves."""
        return self.mask, self.cu_seqlens

    def row_args(self) -> dict[str, Any]:
        """mask, cu_seqlens and rows for operators that work on valid rows and find them by ``valid_rows``."""
        if self.packing is not None:
            return {"mask": None, "cu_seqlens": self.packing.row_cu_seqlens, "rows": self.packing.rows}
        return {"mask": self.mask, "cu_seqlens": self.cu_seqlens, "rows": None}

    def flat(self, name: str, tensor: Tensor) -> Tensor:
        """A per-token tensor as [M], or the ValueError that names it."""
        require_tensor(name, tensor)
        device = self.cu_seqlens.device
        if tensor.shape != self.shape:  # messages are made where they are needed: a scan takes as long as five of them
            wanted, found = list(self.shape), list(tensor.shape)
            raise ValueError(f"{name}: must have the shape of {self.name}, {wanted}; got {found}")
        if tensor.device != device:
            raise ValueError(f"{name}: must be on {device}, got {tensor.device}")
        require_float(name, tensor)
        return flattened(tensor)

    def flat_or_none(self, name: str, tensor: Tensor | None) -> Tensor | None:
        """``flat`` for an argument that may be left out; a constant."""
        return None if tensor is None else self.flat(name, tensor).detach()

    def per_sequence(self, name: str, tensor: Tensor | None) -> Tensor | None:
        """A per-sequence tensor as [B], or the ValueError that names it; a constant."""
        if tensor is None:
            return None
        require_tensor(name, tensor)
        batch = self.cu_seqlens.numel() - 1
        require(tuple(tensor.shape) == (batch,), name, f"must have shape [{batch}], got {list(tensor.shape)}")
        require(
            tensor.device == self.cu_seqlens.device, name, f"must be on {self.cu_seqlens.device}, got {tensor.device}"
        )
        require_float(name, tensor)
        return tensor.detach()

    def rewards(self, rewards: Tensor) -> tuple[Tensor | None, Tensor | None]:
        """Splits ``rewards`` into (per token [M], per sequence [B]), one of them None.

        A tensor of the tokens' own shape is per token; this decides the one ambiguous case, packed with N = B.
        """
        require_tensor("rewards", rewards)
        batch = self.cu_seqlens.numel() - 1
        if tuple(rewards.shape) == self.shape:
            return self.flat("rewards", rewards).detach(), None
        require(
            tuple(rewards.shape) == (batch,),
            "rewards",
            f"must be per token {list(self.shape)} or per sequence [{batch}], got {list(rewards.shape)}",
        )
        return None, self.per_sequence("rewards", rewards)


def layout_of(
    tokens: Tensor,
    *,
    mask: Tensor | None,
    cu_seqlens: Tensor | None,
    packing: Packing | None = None,
    name: str = "actions",
    states: Tensor | None = None,
) -> Layout:
    """The layout of a call, from one of its per-token tensors. Raises ValueError on an inconsistent description.

    ``states``, [..., H], help to name the argument at fault: where they agree with the mask, it is ``tokens``.
    """
    require_tensor(name, tokens)
    shape = tuple(tokens.shape)
    if isinstance(states, Tensor) and isinstance(mask, Tensor):
        wrong = mask.shape == states.shape[:-1] != tokens.shape
        require(not wrong, name, f"must have the shape of hidden and mask, {list(mask.shape)}; got {list(shape)}")
    if packing is not None:
        require(isinstance(packing, Packing), "packing", f"must come from pack, got {type(packing).__name__}")
        require(mask is None and cu_seqlens is None, "packing", "already holds mask and cu_seqlens; pass it alone")
        require(
            packing.shape == shape, "packing", f"was built for shape {list(packing.shape)}, {name} has {list(shape)}"
        )
        _check_packing(packing, tokens.device)
        return Layout(name, shape, packing.mask, packing.cu_seqlens, packing)
    if cu_seqlens is None:
        require(len(shape) == 2, name, f"must be [B, T], or [N] with cu_seqlens; got {list(shape)}")
        batch, length = shape
        cu_seqlens = torch.arange(batch + 1, dtype=torch.int32, device=tokens.device).mul_(length)
    else:
        require_tensor("cu_seqlens", cu_seqlens)
        require(len(shape) == 1, name, f"must be [N] when cu_seqlens is given, got {list(shape)}")
        require(
            cu_seqlens.dim() == 1 and cu_seqlens.numel() >= 1 and cu_seqlens.dtype == torch.int32,
            "cu_seqlens",
            f"must be int32 [B + 1], got {cu_seqlens.dtype} {list(cu_seqlens.shape)}",
        )
        require(
            cu_seqlens.device == tokens.device, "cu_seqlens", f"must be on {tokens.device}, got {cu_seqlens.device}"
        )
    if mask is not None:
        require_tensor("mask", mask)
        require(mask.dtype == torch.bool, "mask", f"must be a bool tensor, got {mask.dtype}")
        require(
            tuple(mask.shape) == shape,
            "mask",
            f"must have the shape of {name}, {list(shape)}; got {list(mask.shape)}",
        )
        require(mask.device == tokens.device, "mask", f"must be on {tokens.device}, got {mask.device}")
        mask = mask.reshape(-1).contiguous()
    # positions are counted in 32 bits, and a scan's last tile of 1024 may begin at the last token
    require(tokens.numel() <= 2**31 - 1024, name, "must hold at most 2**31 - 1024 tokens")
    return Layout(name, shape, mask, cu_seqlens.contiguous(), None)


def layout_of_any(tokens: Tensor, *, mask: Tensor | None, packing: Packing | None, name: str) -> Layout:
    """The layout of tokens in any shape, of which nothing is asked that runs over time: flat, as one sequence."""
    if packing is not None:
        return layout_of(tokens, mask=mask, cu_seqlens=None, packing=packing, name=name)
    shape = tuple(tokens.shape)
    if mask is not None:
        require_tensor("mask", mask)
        wanted = f"must have the shape of the tokens in {name}, {list(shape)}; got {list(mask.shape)}"
        require(tuple(mask.shape) == shape, "mask", wanted)
        mask = mask.reshape(-1)
    ends = torch.arange(2, dtype=torch.int32, device=tokens.device).mul_(tokens.numel())
    return layout_of(tokens.reshape(-1), mask=mask, cu_seqlens=ends, name=name)._replace(shape=shape)


def _check_packing(packing: Packing, device: torch.device) -> None:
    """Checks of a packing that may have been edited by hand, as far as they do not wait for a GPU."""
    require(isinstance(packing.cu_seqlens, Tensor), "packing", "cu_seqlens must be a tensor; build it with pack")
    positions, sequences = math.prod(packing.shape), packing.cu_seqlens.shape
    wanted: dict[str, tuple[torch.dtype, tuple[int, ...] | None]] = {
        "mask": (torch.bool, (positions,)),
        "cu_seqlens": (torch.int32, sequences),
        "rows": (torch.int64, None),
        "row_cu_seqlens": (torch.int32, sequences),
    }
    for name, (dtype, shape) in wanted.items():
        tensor = getattr(packing, name)
        fits = isinstance(tensor, Tensor) and tensor.dtype == dtype
        fits = fits and (tensor.dim() == 1 if shape is None else tuple(tensor.shape) == tuple(shape))
        require(fits, "packing", f"{name} is not {dtype} of the right shape; build the packing with pack")
        require(tensor.device == device, "packing", f"must be on {device}, got {tensor.device}")


def _check_rows(rows: Tensor, cu_seqlens: Tensor, positions: int) -> None:
    """Values of a packing's rows, as far as they are looked at (``checks.looks_into``)."""
    if not looks_into(rows):
        return
    count = int(cu_seqlens[-1])
    require(count == rows.numel(), "packing", f"has {rows.numel()} rows, and sequences that end at {count}")
    if count:
        low, high = (int(x) for x in rows.aminmax())
        require(0 <= low <= high < positions, "packing", f"rows must lie in [0, {positions}), found {low} .. {high}")


def check_denom(denom: Tensor | None) -> None:
    """The value of ``denom``, as far as it is looked at."""
    if denom is None or not looks_into(denom):
        return
    value = float(denom)
    require(0 < value < math.inf, "denom", f"must be a positive number, got {value}")


def check_cu_seqlens(cu_seqlens: Tensor, positions: int) -> None:
    """Values of ``cu_seqlens``, as far as they are looked at."""
    if not looks_into(cu_seqlens):
        return
    ends = cu_seqlens.cpu().numpy()  # in a tenth of the time that tensors take, where a scan takes no longer
    if ends[0] != 0 or ends[-1] != positions or (ends[1:] < ends[:-1]).any():
        found = _short(ends.tolist())
        raise ValueError(f"cu_seqlens: must rise from 0 to the number of tokens, {positions}; got {found}")


def check_actions(actions: Tensor, vocab: int, *, name: str = "actions") -> None:
    """Token ids of the valid rows, as far as they are looked at; ids out of range make NaN rows where they are not."""
    check_extremes(*extremes(actions), vocab, name=name)


def extremes(actions: Tensor) -> tuple[int, int]:
    """The smallest and the largest token id, as far as they are looked at; (0, 0) where they are not, or are none."""
    if actions.numel() == 0 or not looks_into(actions):
        return 0, 0
    low, high = actions.aminmax()
    return int(low), int(high)


def check_extremes(low: int, high: int, vocab: int, *, name: str = "actions") -> None:
    """Raises a ValueError unless token ids from ``low`` to ``high`` are in the vocabulary."""
    require(0 <= low <= high < vocab, name, f"must lie in [0, {vocab}) at valid tokens, found {low} .. {high}")


def valid_rows(
    mask: Tensor | None, cu_seqlens: Tensor, rows: Tensor | None, positions: int
) -> tuple[Tensor | None, Tensor]:
    """(rows, cu_seqlens in rows) from the arguments that ``Layout.row_args`` made. Synchronises if there is a mask."""
    if rows is not None:
        _check_rows(rows, cu_seqlens, positions)
        return rows, cu_seqlens
    check_cu_seqlens(cu_seqlens, positions)
    if mask is None:
        return None, cu_seqlens
    counts = torch.zeros(positions + 1, dtype=torch.int32, device=mask.device)
    torch.cumsum(mask, 0, dtype=torch.int32, out=counts[1:])
    return mask.nonzero().squeeze(1), counts[cu_seqlens]


def pack(mask: Tensor, *, cu_seqlens: Tensor | None = None) -> Packing:
    """Finds the valid rows of a mask once, so that every later call on this batch skips the search and its wait.

    Without a mask there is nothing to find: pass ``cu_seqlens`` itself. Call it outside of what is compiled with
    ``torch.compile(fullgraph=True)``.

    Args:
        mask: bool [B, T] (padded), or [N] with ``cu_seqlens`` (packed); True at trained tokens.
        cu_seqlens: int32 [B + 1]; makes the layout packed.

    Returns:
        A ``Packing`` to pass as ``packing=`` in place of ``mask`` and ``cu_seqlens``.

    Raises:
        ValueError: naming the argument that is inconsistent.
    """
    layout = layout_of(mask, mask=mask, cu_seqlens=cu_seqlens, name="mask")
    rows, row_cu_seqlens = valid_rows(layout.mask, layout.cu_seqlens, None, mask.numel())
    assert layout.mask is not None
    assert rows is not None
    # copies, since the caller may change theirs
    return Packing(layout.shape, layout.mask.clone(), layout.cu_seqlens.clone(), rows, row_cu_seqlens)


def flattened(tensor: Tensor) -> Tensor:
    """A per-token tensor as [M]."""
    return tensor if tensor.dim() == 1 else tensor.reshape(-1)


def constant(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """A tensor apart from autograd, in ``dtype``. What is so already costs the host nothing."""
    tensor = tensor.detach() if tensor.requires_grad else tensor
    return tensor if tensor.dtype == dtype else tensor.to(dtype)


def take_rows(tensor: Tensor | None, rows: Tensor | None) -> Tensor | None:
    """The valid rows of a flat tensor; the tensor itself where all rows are valid."""
    return tensor if tensor is None or rows is None else tensor.index_select(0, rows)


def fp32_rows(tensor: Tensor | None, rows: Tensor | None) -> Tensor | None:
    """The valid rows of a flat per-token tensor, contiguous fp32."""
    taken = take_rows(tensor, rows)
    if taken is None:
        return None
    taken = constant(taken, torch.float32)
    return taken if taken.is_contiguous() else taken.contiguous()


def put_rows(values: Tensor, rows: Tensor | None, positions: int) -> Tensor:
    """Rows back at their flat positions, 0 elsewhere."""
    if rows is None:
        return values
    return values.new_zeros(positions, *values.shape[1:]).index_copy_(0, rows, values)


def zero_ends(values: Tensor, cu_seqlens: Tensor) -> Tensor:
    """``values``, [n], with 0 written at the last row of each sequence; ``cu_seqlens`` is over these n rows."""
    if values.numel():  # an empty sequence before the first row has its last one at -1, the last row of all
        values.index_fill_(0, cu_seqlens[1:].long() - 1, 0.0)
    return values


def _short(items: list[int]) -> str:
    return (
        str(items)
        if len(items) <= 12
        else f"[{', '.join(map(str, items[:6]))}, ..., {', '.join(map(str, items[-3:]))}]"
    )
