"""Operators whose arguments are named once.

A ``torch.library`` operator takes positional arguments, and its fake kernel, its autograd set-up and its backward get
them positionally too. Here a NamedTuple lists them: its fields and their types are the operator's schema, and each part
of the operator receives the tuple and reads it by name. A new argument is a new field, wherever it stands.
"""

from __future__ import annotations

import inspect
import typing
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch._library.custom_ops import CustomOpDef


class Parts(NamedTuple):
    """What makes an operator.

    ``arguments`` and ``results`` are NamedTuple types; the fields of ``arguments`` have types that ``torch.library``
    knows, those of ``results`` are tensors.
    """

    arguments: Any
    results: Any
    forward: Callable[[Any], Any]  # arguments → results
    fake: Callable[[Any], Any]  # arguments → results: empty tensors of the right shapes, dtypes and devices
    setup: Callable[[Any, Any, Any], None]  # (ctx, arguments, results), after the forward
    # (ctx, gradients by the results, which arguments need a gradient) → gradients by the arguments that have one
    backward: Callable[[Any, Any, dict[str, bool]], dict[str, Tensor | None]]


def operator(name: str, parts: Parts) -> CustomOpDef:
    """Registers ``namespace::name``. Call it as ``op(*arguments)``; it returns the results as a plain tuple."""
    arguments, results = parts.arguments, parts.results
    fields = arguments._fields

    def forward(*given: Any) -> tuple[Tensor, ...]:
        return tuple(parts.forward(arguments(*given)))

    def fake(*given: Any) -> tuple[Tensor, ...]:
        return tuple(parts.fake(arguments(*given)))

    def setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        parts.setup(ctx, arguments(*inputs), results(*output))

    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
        needs = dict(zip(fields, ctx.needs_input_grad, strict=True))
        found = parts.backward(ctx, results(*gradients), needs)
        return tuple(found.get(field) for field in fields)

    forward.__signature__ = _signature(arguments, results)  # type: ignore[attr-defined]
    op = torch.library.custom_op(name, forward, mutates_args=())
    op.register_fake(fake)
    op.register_autograd(backward, setup_context=setup)
    return op


def fields_of(bundle: Any, given: Any) -> Any:
    """The NamedTuple ``bundle`` filled with the fields of ``given`` that have the same names."""
    return bundle(**{field: getattr(given, field) for field in bundle._fields})


def _signature(arguments: Any, results: Any) -> inspect.Signature:
    """The signature from which ``torch.library`` infers the schema."""
    kind = inspect.Parameter.POSITIONAL_OR_KEYWORD
    hints = typing.get_type_hints(arguments)
    return inspect.Signature(
        [inspect.Parameter(name, kind, annotation=hints[name]) for name in arguments._fields],
        return_annotation=tuple[(Tensor,) * len(results._fields)],  # type: ignore[misc]
    )
