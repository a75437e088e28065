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
from torch.nn import Parameter

from ..call.transforms import refuse_transforms


def _nothing(ctx: Any, given: Any, found: Any) -> None:
    pass


def _no_second_derivative(ctx: Any, by: Any, needs: dict[str, bool]) -> dict[str, Tensor | None]:
    raise RuntimeError("there is no second derivative of the fused functions; use klq_kernels.reference")


class Parts(NamedTuple):
    """The parts that make an operator.

    ``arguments`` and ``results`` are NamedTuple types; the fields of ``arguments`` have types that ``torch.library``
    knows, those of ``results`` are tensors.
    """

    arguments: Any
    results: Any
    forward: Callable[[Any], Any]  # arguments → results
    fake: Callable[[Any], Any]  # arguments → results: empty tensors of the right shapes, dtypes and devices
    setup: Callable[[Any, Any, Any], None] = _nothing  # (ctx, arguments, results), after the forward
    # (ctx, gradients by the results, which arguments need a gradient) → gradients by the arguments that have one;
    # the default is for operators that are a backward themselves
    backward: Callable[[Any, Any, dict[str, bool]], dict[str, Tensor | None]] = _no_second_derivative


class Operator:
    """A registered operator. Call it as ``op(*arguments)``; it returns the results as a plain tuple.

    A call that nothing watches runs the parts under an autograd function of their own. A compiler, a mode of PyTorch's
    (one that watches dispatch or functions), a function transform or a tensor of another class sees the registered
    operator, which takes the host half a millisecond longer.

    ``definition`` is what ``torch.library`` made of it. That one takes the arguments as ``packed`` gives them: PyTorch
    looks at the whole schema once per argument in every call that needs gradients, which for forty of them takes a
    third of a millisecond. So all numbers are one argument, a list, and so are all flags.
    """

    def __init__(self, name: str, parts: Parts) -> None:
        self._parts, self._name = parts, name.partition("::")[2]
        hints = typing.get_type_hints(parts.arguments)
        self._of_type = {kind: [n for n in parts.arguments._fields if hints[n] is kind] for kind in (float, bool)}
        listed = {n for names in self._of_type.values() for n in names}
        self._single = [n for n in parts.arguments._fields if n not in listed]
        kinds = {n: hints[n] for n in self._single} | {"numbers": list[float], "flags": list[bool]}
        self.definition = self._register(name, kinds)
        self._direct = _autograd_function(name, parts)

    def __call__(self, *given: Any) -> tuple[Tensor, ...]:
        if _is_watched(given):
            refuse_transforms(self._name, given)
            return self.definition(*self.packed(*given))
        arguments = self._parts.arguments(*given)
        if not torch.is_grad_enabled():
            return tuple(self._parts.forward(arguments))
        names = [n for n, v in zip(arguments._fields, given, strict=True) if isinstance(v, Tensor) and v.requires_grad]
        found: tuple[Tensor, ...] = self._direct.apply(arguments, names, *(getattr(arguments, n) for n in names))
        return found

    def packed(self, *given: Any) -> tuple[Any, ...]:
        """The arguments in the order of the schema."""
        named = self._parts.arguments(*given)
        lists = ([getattr(named, n) for n in names] for names in self._of_type.values())
        return *(getattr(named, n) for n in self._single), *lists

    def _unpacked(self, given: tuple[Any, ...]) -> Any:
        *single, numbers, flags = given
        listed = zip(self._of_type.values(), (numbers, flags), strict=True)
        named = {n: value for names, values in listed for n, value in zip(names, values, strict=True)}
        return self._parts.arguments(**dict(zip(self._single, single, strict=True)), **named)

    def _register(self, name: str, kinds: dict[str, Any]) -> CustomOpDef:
        parts = self._parts

        def forward(*given: Any) -> tuple[Tensor, ...]:
            return tuple(parts.forward(self._unpacked(given)))

        def fake(*given: Any) -> tuple[Tensor, ...]:
            return tuple(parts.fake(self._unpacked(given)))

        def setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
            parts.setup(ctx, self._unpacked(inputs), parts.results(*output))

        def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
            needs = dict(zip(kinds, ctx.needs_input_grad, strict=True))
            found = parts.backward(ctx, parts.results(*gradients), needs)
            return tuple(found.get(n) for n in kinds)

        forward.__signature__ = _signature(kinds, parts.results)  # type: ignore[attr-defined]
        op = torch.library.custom_op(name, forward, mutates_args=())
        op.register_fake(fake)
        op.register_autograd(backward, setup_context=setup)
        return op


def _is_watched(given: tuple[Any, ...]) -> bool:
    """Whether anything but autograd has to see the operator itself, or its fake kernel has to stand in for it."""
    return (
        torch.compiler.is_compiling()
        or torch._C._len_torch_dispatch_stack() > 0
        or torch._C._len_torch_function_stack() > 0
        or torch._C._functorch.peek_interpreter_stack() is not None
        or any(isinstance(v, Tensor) and (type(v) not in (Tensor, Parameter) or v.is_meta) for v in given)
    )


def _autograd_function(name: str, parts: Parts) -> Any:
    """The parts as a function of (arguments, the names of those that need a gradient, those themselves)."""

    def forward(ctx: Any, arguments: Any, names: list[str], *_: Tensor) -> tuple[Tensor, ...]:
        results = parts.forward(arguments)
        parts.setup(ctx, arguments, results)
        ctx.learnt = names
        return tuple(results)

    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
        learnt = zip(ctx.learnt, ctx.needs_input_grad[2:], strict=True)
        needs = dict.fromkeys(parts.arguments._fields, False) | dict(learnt)
        found = parts.backward(ctx, parts.results(*gradients), needs)
        return None, None, *(found.get(n) for n in ctx.learnt)

    functions = {"forward": staticmethod(forward), "backward": staticmethod(backward)}
    return type(name, (torch.autograd.Function,), functions)


def fields_of(bundle: Any, given: Any) -> Any:
    """The NamedTuple ``bundle`` filled with the fields of ``given`` that have the same names."""
    return bundle(**{field: getattr(given, field) for field in bundle._fields})


def _signature(kinds: dict[str, Any], results: Any) -> inspect.Signature:
    """The signature from which ``torch.library`` infers the schema."""
    kind = inspect.Parameter.POSITIONAL_OR_KEYWORD
    return inspect.Signature(
        [inspect.Parameter(name, kind, annotation=hint) for name, hint in kinds.items()],
        return_annotation=tuple[(Tensor,) * len(results._fields)],  # type: ignore[misc]
    )
