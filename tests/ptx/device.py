"""Makes Triton launch its kernels on ``ptx_machine`` instead of a GPU: a driver for CPU tensors.

``install(arch)`` sets it as Triton's active driver; every ``kernel[grid](...)`` then goes through the real JIT
(specialisation by None, 1, divisibility by 16; compilation; the cache of compiled kernels) and ends in ``Launcher``.
"""

from __future__ import annotations

from collections import Counter

import numpy as np
import torch
import triton
from ptx_machine import Memory, Options, Program
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia import compiler as nvidia_compiler
from triton.runtime.driver import driver

STATE = {
    "arch": 90, "options": Options(), "log": None, "order": None, "launches": 0, "programs": {}, "opcodes": Counter(),
    "instructions": 0.0, "hazards": Counter(), "diverged": 0, "kernels": set(), "poison": {}, "benign": 0, "held": [],
}  # fmt: skip


class Utils:
    def load_binary(self, name, kernel, shared, device):
        return object(), object(), 32, 0, 1024

    def unload_module(self, module):
        pass

    def get_device_properties(self, device):
        return {"max_shared_mem": 101376 if device == 80 else 232448, "multiprocessor_count": 132, "warpSize": 32}


class Launcher:
    def __init__(self, src, metadata):
        self.src, self.metadata = src, metadata
        self.compiled = None

    def __call__(self, gx, gy, gz, stream, function, kernel_metadata, launch_metadata, enter, leave, *args):
        meta = self.metadata
        signature = list(self.src.signature.items())
        assert len(signature) == len(args), (len(signature), len(args))
        assert meta.num_ctas == 1
        assert meta.global_scratch_size == 0
        assert meta.profile_scratch_size == 0
        options = STATE["options"]
        threads = 32 * meta.num_warps
        key = (meta.hash, repr(options))
        program = STATE["programs"].get(key)
        if program is None:
            program = STATE["programs"][key] = Program(PTX[meta.hash], meta.shared, threads, options)
            STATE["kernels"].add(meta.hash)
        memory = Memory(options)
        values = []
        granules = finest(args)
        for (name, kind), arg in zip(signature, args, strict=False):
            if kind == "constexpr":
                continue
            if kind.startswith("*"):
                values.append(segment(memory, name, arg, granules[arg.untyped_storage().data_ptr()]).base)
            else:
                values.append(arg)
        values += [0, 0]
        before = program.counts.copy()
        program.waves = [0, 0]
        program.run((gx, gy, gz), values, memory, STATE["order"])
        STATE["launches"] += 1
        used = program.counts - before
        for ins, n in zip(program.code, used, strict=False):
            if n:
                STATE["opcodes"][ins.op] += n
        STATE["instructions"] += used.sum()
        STATE["hazards"].update(program.hazards)
        program.hazards.clear()
        STATE["diverged"] += getattr(program, "diverged", 0)
        program.diverged = 0
        STATE["benign"] += memory.benign
        if STATE["log"] is not None:
            STATE["log"](meta, program, memory, used, (gx, gy, gz))


PTX: dict[str, str] = {}


def finest(args) -> dict[int, int]:
    """Bytes of the smallest element that an argument has, for each storage: two arguments may view one memory."""
    out: dict[int, int] = {}
    for tensor in args:
        if isinstance(tensor, torch.Tensor):
            key = tensor.untyped_storage().data_ptr()
            out[key] = min(out.get(key, 4), tensor.element_size())
    return out


def segment(memory: Memory, name: str, tensor: torch.Tensor, granule: int):
    storage = tensor.untyped_storage()
    item = tensor.element_size()
    if tensor.dim() == 0:
        n = item
    elif tensor.dim() == 1:
        assert tensor.is_contiguous(), name
        n = tensor.numel() * item
    else:  # rows with padding behind each
        n = tensor.shape[0] * tensor.stride(0) * item
    left = storage.data_ptr() + storage.nbytes() - tensor.data_ptr()
    out = memory.add(name, tensor.data_ptr(), min(n, left), granule, (storage.data_ptr(), storage.nbytes()))
    out.poison = poison_of(tensor.data_ptr(), out.nbytes)
    return out


def poison_of(pointer: int, nbytes: int) -> np.ndarray | None:
    """The part of a poisoned tensor's marks that is about these bytes."""
    for (start, length), marks in STATE["poison"].items():
        if start <= pointer and pointer + nbytes <= start + length:
            return marks[pointer - start : pointer - start + nbytes]
    return None


def poison(tensor: torch.Tensor) -> torch.Tensor:
    """Nothing may read this tensor before it is written; ``unwritten`` says what never was. Until ``forget``."""
    n = (
        tensor.numel() * tensor.element_size()
        if tensor.is_contiguous()
        else tensor.shape[0] * tensor.stride(0) * tensor.element_size()
    )
    STATE["poison"][tensor.data_ptr(), n] = np.ones(n, bool)
    if tensor.is_floating_point():
        tensor.fill_(float("nan"))
    STATE["held"].append(tensor)
    return tensor


def unwritten(tensor: torch.Tensor) -> int:
    """Bytes of a poisoned tensor that nobody wrote."""
    n = tensor.numel() * tensor.element_size()
    return int(STATE["poison"][tensor.data_ptr(), n].sum())


def forget() -> None:
    STATE["poison"].clear()
    STATE["held"].clear()


class Driver:
    launcher_cls = Launcher
    utils = Utils()

    def get_current_device(self):
        return STATE["arch"]

    def set_current_device(self, device):
        pass

    def get_current_stream(self, device):
        return 0

    def get_current_target(self):
        return GPUTarget("cuda", STATE["arch"], 32)

    def get_active_torch_device(self):
        return torch.device("cpu")


def install(arch: int = 90, options: Options | None = None, assemble: bool = False) -> None:
    np.seterr(all="ignore")
    STATE["arch"] = arch
    STATE["options"] = options or Options()
    driver.set_active(Driver())
    if not assemble:  # ptxas is not needed, and half of the time
        nvidia_compiler.CUDABackend.make_cubin = lambda self, src, metadata, opt, capability: b"not assembled"
    original = triton.compiler.compiler.CompiledKernel.__init__
    if getattr(original, "wrapped", False):
        return

    def init(self, src, metadata_group, hash):
        original(self, src, metadata_group, hash)
        PTX[self.metadata.hash] = self.asm["ptx"]

    init.wrapped = True
    triton.compiler.compiler.CompiledKernel.__init__ = init
