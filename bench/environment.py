"""The facts that a measurement depends on, recorded beside it."""

from __future__ import annotations

import platform
import subprocess
from pathlib import Path
from typing import Any

import torch

import klq_kernels
from klq_kernels.backends import backend_name

ROOT = Path(__file__).resolve().parent.parent


def describe(device: torch.device, command: str) -> dict[str, Any]:
    """Device, versions, threads, commit and the command, all plain JSON values."""
    return {
        "command": command,
        "device": device_name(device),
        "device_type": device.type,
        "driver": driver() if device.type == "cuda" else None,
        "backend": backend_name(device),
        "threads": torch.get_num_threads(),
        "klq_kernels": klq_kernels.__version__,
        "torch": torch.__version__,
        "triton": version_of("triton"),
        "python": platform.python_version(),
        "commit": commit(),
    }


def timed_package(environment: dict[str, Any]) -> str:
    """The klq_kernels that is timed and its backend, in a line: an unbuilt source tree has no native one."""
    where = Path(klq_kernels.__file__).parent
    return (
        f"klq_kernels {environment['klq_kernels']} from {where}, backend {environment['backend']} on "
        f"{environment['device_type']}"
    )


def device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.machine()
    model = next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.machine())
    return ", ".join([model, torch.backends.cpu.get_cpu_capability(), *_sixteen_bit_units()])


def _sixteen_bit_units() -> list[str]:
    """The units of this processor that multiply 16-bit numbers, by their x86 names."""
    units = {"AVX512_BF16": "_is_avx512_bf16_supported", "AMX": "_is_amx_tile_supported"}
    return [name for name, test in units.items() if getattr(torch.cpu, test, lambda: False)()]


def version_of(module: str) -> str | None:
    try:
        return str(__import__(module).__version__)
    except ImportError:
        return None


def commit() -> str | None:
    """The checkout's commit, marked where files differ from it; None outside a checkout.

    Results and pages do not count: a run writes them itself, one section after the other.
    """
    git = ("git", "-C", str(ROOT))
    head = _output(*git, "rev-parse", "--short=12", "HEAD")
    changed = _output(*git, "diff", "--name-only", "HEAD", "--", ".", ":!bench/results", ":!docs")
    return f"{head}-dirty" if changed else head or None


def driver() -> str | None:
    lines = _output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader").splitlines()
    return lines[0] if lines else None


def _output(*command: str) -> str:
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=20, check=True).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return ""
