"""What a call on the GPU path costs the host, with a CPU in the GPU's place: ``python -m bench.host_profile --write``.

The call is that of a GPU: the same Python, PyTorch's operators, and Triton's launcher up to the point where it would
hand a kernel to the driver, which here does nothing. Tensors are so small that the products take no time. Left out is
what PyTorch and the driver need to launch. What tensors hold is not checked, as on a GPU.
bench/results/host_profile.json is what it leaves, and ``python -m bench.page`` puts it on the page.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import time
from collections.abc import Callable
from statistics import median
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from klq_kernels.call import layout

from .environment import ROOT, describe

RESULT = ROOT / "bench" / "results" / "host_profile.json"
TOKENS, HIDDEN, VOCAB = 64, 16, 128
CALLS, WARM_UP = 500, 50
# for the on-policy forward, which took 1.9 ms before its metrics were one kernel
MOST_OPERATORS, MOST_MS = 40, 1.9 / 3
# Operators that hand out memory or another view of it, unless one of these works inside them
IDLE = (
    "empty", "empty_like", "new_empty", "empty_strided", "slice", "select", "view", "reshape", "detach", "alias", "t",
    "transpose", "numpy_T", "permute", "expand", "unbind", "to", "contiguous", "resolve_conj", "resolve_neg", "squeeze",
    "unsqueeze", "as_strided", "lift_fresh", "result_type",
)  # fmt: skip
COPIES = ("_to_copy", "clone", "copy_")


def pretend_gpu() -> None:
    """Triton compiles for sm_90 and launches into nothing; the library takes CPU tensors for a GPU's."""
    from triton.backends.compiler import GPUTarget
    from triton.runtime.driver import driver

    class Launcher:
        def __init__(self, source: Any, metadata: Any) -> None: ...

        def __call__(self, *arguments: Any) -> None: ...

    class Utils:
        def load_binary(self, *_: Any) -> tuple[object, object, int, int, int]:
            return object(), object(), 32, 0, 1024

        def unload_module(self, module: Any) -> None: ...

        def get_device_properties(self, device: int) -> dict[str, int]:
            return {"max_shared_mem": 232_448, "multiprocessor_count": 132, "warpSize": 32}

    class Driver:
        launcher_cls, utils = Launcher, Utils()

        def get_current_device(self) -> int:
            return 0

        def set_current_device(self, device: int) -> None: ...

        def get_current_stream(self, device: int) -> int:
            return 0

        def get_current_target(self) -> GPUTarget:
            return GPUTarget("cuda", 90, 32)

        def get_active_torch_device(self) -> torch.device:
            return torch.device("cpu")

    importlib.import_module("klq_kernels.backends.triton")  # compiled kernels: before the next line, not interpreted
    layout.looks_into = lambda tensor: False
    os.environ |= {"TRITON_INTERPRET": "1", "KLQ_BACKEND": "triton"}
    driver.set_active(Driver())


def calls() -> dict[str, Callable[[], Any]]:
    """The loss, its forward alone and with backward."""
    from klq_kernels import KLQTargets, fused_klq_loss

    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator)

    hidden, weight, values = (
        t.requires_grad_() for t in (normal(TOKENS, HIDDEN), normal(VOCAB, HIDDEN), normal(TOKENS))
    )
    actions = torch.randint(VOCAB, (TOKENS,), generator=generator)
    ends = torch.tensor([0, TOKENS // 2, TOKENS], dtype=torch.int32)
    targets, reference, scores = KLQTargets(*(normal(TOKENS) for _ in range(3))), normal(TOKENS), normal(2)

    def on_policy() -> Any:
        return fused_klq_loss(
            hidden, weight, actions, values, ref_logprobs=reference, rewards=scores, cu_seqlens=ends
        ).loss

    def from_targets() -> Any:
        return fused_klq_loss(hidden, weight, actions, values, targets=targets, cu_seqlens=ends).loss

    return {
        "on-policy, forward": on_policy,
        "on-policy, forward and backward": lambda: on_policy().backward(),
        "from targets, forward": from_targets,
        "from targets, forward and backward": lambda: from_targets().backward(),
    }


def operators(call: Callable[[], Any]) -> tuple[int, int]:
    """PyTorch's operators of a call that none of its operators called: all, and those that work."""
    with profile(activities=[ProfilerActivity.CPU]) as profiled:
        call()
    events = [event for event in profiled.events() if event.name.startswith("aten::")]
    outer = [e for e in events if e.cpu_parent is None or not e.cpu_parent.name.startswith("aten::")]
    return len(outer), sum(map(_works, outer))


def _works(event: Any) -> bool:
    name = event.name.removeprefix("aten::")
    inner = [child.name.removeprefix("aten::") for child in event.cpu_children]
    return name not in IDLE or any(child in COPIES for child in inner)


def milliseconds(call: Callable[[], Any]) -> float:
    taken = []
    for i in range(WARM_UP + CALLS):
        start = time.perf_counter()
        call()
        taken.append((time.perf_counter() - start) * 1e3 if i >= WARM_UP else 0.0)
    return median(taken[WARM_UP:])


def measure() -> dict[str, Any]:
    pretend_gpu()
    torch.set_num_threads(1)
    rows = []
    for name, call in calls().items():
        call()  # compiles
        every, working = operators(call)
        rows.append({"call": name, "operators": every, "working": working, "ms": milliseconds(call)})
    environment = describe(torch.device("cpu"), "python -m bench.host_profile --write")
    return {"environment": environment, "most_operators": MOST_OPERATORS, "most_ms": MOST_MS, "calls": rows}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", action="store_true", help="record the result")
    write = parser.parse_args().write
    found = measure()
    if write:
        RESULT.write_text(json.dumps(found, indent=1) + "\n")
    for row in found["calls"]:
        print(f"{row['call']:36} {row['operators']:3} operators, {row['working']:3} of them work, {row['ms']:.3f} ms")


if __name__ == "__main__":
    main()
