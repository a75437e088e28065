"""The launches that a call would make on a GPU, seen without one: fake CUDA tensors run the real code, no kernel runs.

Inside ``launches`` a tensor on "cuda" has a shape and a dtype but no memory, so that a call of any size takes no time.
Every product, every Triton kernel and every other operator that reads or writes memory is noted, with the tensors that
it is passed. Autograd knows no such device: so operators run as if gradients were wanted, and ``FakeCalls.backward``
runs their backward.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from types import SimpleNamespace
from typing import Any, NamedTuple
from unittest import mock

import torch
import triton
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from watch import OPERATORS

from klq_kernels import loss as losses
from klq_kernels.ops import gradients
from klq_kernels.ops.operator import Operator

# H100 SXM
DEVICE = SimpleNamespace(multi_processor_count=132, L2_cache_size=50 * 2**20)


class Launch(NamedTuple):
    """One launch: the operator's or kernel's name, and the tensors that it reads or writes, the output last."""

    name: str
    tensors: list[Tensor]
    flop: int = 0
    adds: bool = False  # a product to its output

    @property
    def bytes(self) -> int:
        """Of all its matrices, each once; what is added to is read as well."""
        matrices = {id(t): t for t in self.tensors if t.dim() > 1}.values()
        return sum(map(size_of, matrices)) + self.adds * size_of(self.tensors[-1])


def size_of(tensor: Tensor) -> int:
    elements = 1
    for size, stride in zip(tensor.shape, tensor.stride(), strict=True):
        elements *= size if stride else 1
    return elements * tensor.element_size()


class Recorder(TorchDispatchMode):
    def __init__(self, calls: FakeCalls) -> None:
        super().__init__()
        self.calls = calls

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in OPERATORS:  # step inside: to the dispatcher they are opaque
            with self:
                return OPERATORS[func]._init_fn(*args, **kwargs)
        name = func._schema.name.removeprefix("aten::")
        if kwargs.get("out") is not None:
            out = kwargs["out"]
        elif name == "copy_":
            out = args[0]
        elif (
            name == "mm" and func._overloadname == "dtype"
        ):  # a product in another dtype than its operands', which is not made up
            out = args[0].new_empty(args[0].shape[0], args[1].shape[1], dtype=args[2])
        else:
            out = func(*args, **kwargs)
        tensors = [t for t in tree_leaves((args, kwargs, out)) if isinstance(t, Tensor)]
        if not (func.is_view or name.startswith(("empty", "new_empty", "detach", "prim::"))):
            self.calls.note(Launch(name, tensors, *_product(name, args, kwargs)))
        self.calls.allocated([t for t in tree_leaves(out) if isinstance(t, Tensor)])
        return out


def _product(name: str, args: Any, kwargs: Any) -> tuple[int, bool]:
    """(FLOP, whether it adds to a matrix) of a matrix product."""
    if name not in ("mm", "addmm"):
        return 0, False
    left, right = args[:2] if name == "mm" else args[1:3]
    adds = name == "addmm" and args[0].dim() > 1 and kwargs.get("beta", 1) != 0
    return 2 * left.shape[0] * left.shape[1] * right.shape[1], adds


class FakeCalls:
    """What ran: the launches in order, and the last operator called with its results."""

    def __init__(self) -> None:
        self.launches: list[Launch] = []
        self.keeps_launches = True  # with their tensors; else ``peak`` is that of a call, nothing being kept alive
        self.peak = 0  # bytes of all tensors at a time
        self._live: dict[int, tuple[StorageWeakRef, int]] = {}
        self.learns: Callable[[Tensor], bool] = lambda _: True  # whether a tensor needs a gradient
        self._last: Any = None

    def note(self, launch: Launch) -> None:
        if self.keeps_launches:
            self.launches.append(launch)

    def allocated(self, tensors: list[Tensor]) -> int:
        """Takes note of what an operator returned, and of the peak; the bytes of all tensors that are alive."""
        for storage in (tensor.untyped_storage() for tensor in tensors):
            self._live[storage._cdata] = StorageWeakRef(storage), storage.nbytes()
        self._live = {key: (ref, size) for key, (ref, size) in self._live.items() if not ref.expired()}
        total = sum(size for _, size in self._live.values())
        self.peak = max(self.peak, total)
        return total

    def operator(self, operator: Operator, *given: Any) -> tuple[Tensor, ...]:
        """In place of a call of the operator, which would go through autograd."""
        parts = operator._parts
        arguments = parts.arguments(*given)
        results = parts.forward(arguments)
        self._last = parts, arguments, results
        return tuple(results)

    def backward(self, *by: Tensor) -> None:
        """The backward of the last operator, with these gradients by its first results."""
        parts, arguments, results = self._last
        context = SimpleNamespace(mark_non_differentiable=_nothing, set_materialize_grads=_nothing)
        context.save_for_backward = lambda *tensors: setattr(context, "saved_tensors", tensors)
        parts.setup(context, arguments, results)
        rest = [None] * (len(results) - len(by))
        needs = {name: isinstance(value, Tensor) for name, value in arguments._asdict().items()}
        parts.backward(context, parts.results(*by, *rest), needs)


def _nothing(*_: Any) -> None:
    pass


def _item(tensor: Tensor, index: Any) -> Tensor:
    """tensor[index]: Python's brackets ask PyTorch for the device, which has none here."""
    for dimension, part in enumerate(index if isinstance(index, tuple) else (index,)):
        if isinstance(part, slice):
            tensor = torch.ops.aten.slice(tensor, dimension, part.start, part.stop)
        elif isinstance(part, int):
            tensor = torch.ops.aten.select(tensor, dimension, part)
        else:
            tensor = torch.ops.aten.index(tensor, [part])
    return tensor


def _set_item(tensor: Tensor, index: Any, value: Any) -> None:
    part = _item(tensor, index)
    torch.ops.aten.copy_(part, value) if isinstance(value, Tensor) else torch.ops.aten.fill_(part, value)


@contextmanager
def fake_gpu() -> Iterator[FakeCalls]:
    """Tensors made inside are on the fake GPU where they ask for "cuda"."""
    calls = FakeCalls()

    def run(kernel: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> None:
        calls.note(Launch(kernel.fn.__name__, [a for a in args if isinstance(a, Tensor)]))

    with ExitStack() as stack:
        for target, name, change in (
            (triton.runtime.jit.JITFunction, "run", run),
            (torch.cuda, "device", lambda _: nullcontext()),
            (torch.cuda, "get_device_properties", lambda _: DEVICE),
            (Tensor, "__getitem__", _item),
            (Tensor, "__setitem__", _set_item),
            (Tensor, "copy_", lambda tensor, source: torch.ops.aten.copy_(tensor, source)),
            (Tensor, "data_ptr", lambda tensor: tensor.untyped_storage()._cdata),
            (Operator, "__call__", lambda *given: calls.operator(*given)),
            (losses, "needs_gradient", lambda tensor: calls.learns(tensor)),
            (gradients, "_graph_is_kept", lambda: False),
            (gradients, "Tensor", FakeTensor),  # so that they are not taken for a compiler's
        ):
            stack.enter_context(mock.patch.object(target, name, change))
        stack.enter_context(torch.no_grad())
        stack.enter_context(FakeTensorMode())
        stack.enter_context(Recorder(calls))
        yield calls
