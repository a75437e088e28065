"""``klq info``: the facts about an installation that decide which code runs, and that a bug report needs."""

from __future__ import annotations

import json
import os
import platform
from importlib import metadata
from typing import Any

import torch

from .. import __version__, backends

PACKAGES = ("numpy", "transformers", "flash-attn")
TRITON_DISTRIBUTIONS = ("triton", "triton-rocm", "pytorch-triton-rocm", "pytorch-triton")  # by what ships it
DEVICE_TYPES = {"triton": "cuda", "native": "cpu"}  # of the backends that serve one type only; ROCm calls itself cuda
SETTINGS = ("KLQ_BACKEND", "KLQ_CHECK", "TRITON_INTERPRET")


def environment() -> dict[str, Any]:
    """Versions (None where absent), devices with their backends, and settings, as plain JSON types.

    Raises:
        ValueError: KLQ_BACKEND names a backend that cannot be loaded.
    """
    return {
        "versions": versions(),
        "platform": platform.platform(),
        "threads": torch.get_num_threads(),
        "devices": [describe(device) for device in devices()],
        "settings": {name: os.environ.get(name) for name in SETTINGS},
    }


def versions() -> dict[str, str | None]:
    found = {"klq_kernels": __version__, "python": platform.python_version(), "torch": torch.__version__}
    triton = next(filter(None, map(_version, TRITON_DISTRIBUTIONS)), None)
    return {**found, "triton": triton, **{name: _version(name) for name in PACKAGES}}


def _version(distribution: str) -> str | None:
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return None


def devices() -> list[torch.device]:
    gpus = [torch.device("cuda", i) for i in range(torch.cuda.device_count())]
    return [torch.device("cpu"), *gpus, *([torch.device("mps")] if torch.backends.mps.is_available() else [])]


def describe(device: torch.device) -> dict[str, Any]:
    """A device, the backend that its tensors use (loaded, to be sure), and why they do not use each other one."""
    active = backends.backend_name(device)
    backends.load(active)
    others = {name: _why_not(name, device, active) for name in backends.BACKENDS if name != active}
    return {"device": str(device), "name": _device_name(device), "backend": active, "not_used": others}


def _why_not(name: str, device: torch.device, active: str) -> str:
    if reason := backends.why_unavailable(name):
        return reason
    if os.environ.get("KLQ_BACKEND"):
        return f"KLQ_BACKEND={active} overrides it"
    only = DEVICE_TYPES.get(name, device.type)
    return f"slower than {active}" if only == device.type else f"for {only} tensors only"


def _device_name(device: torch.device) -> str:
    if device.type == "cpu":
        return f"{platform.machine()}, {torch.backends.cpu.get_cpu_capability()}"
    if device.type != "cuda":
        return platform.machine()
    properties = torch.cuda.get_device_properties(device)
    runtime = f"ROCm {torch.version.hip}" if torch.version.hip else f"CUDA {torch.version.cuda}"
    return f"{properties.name}, {properties.total_memory / 2**30:.0f} GiB, {runtime}"


def print_json(facts: dict[str, Any]) -> None:
    print(json.dumps(facts, indent=2))


def print_tables(facts: dict[str, Any]) -> None:
    """The same facts for people."""
    from rich import box
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    about = Table(box=None, show_header=False)
    rows = {**facts["versions"], "platform": facts["platform"], "threads": facts["threads"], **facts["settings"]}
    for name, value in rows.items():
        absent = "not set" if name in facts["settings"] else "not installed"
        about.add_row(name, Text(absent, "dim") if value is None else Text(str(value)))

    backends = Table("device", "name", "backend", "not used, and why", box=box.SIMPLE_HEAD)
    for entry in facts["devices"]:
        reasons = "\n".join(f"{name}: {reason}" for name, reason in entry["not_used"].items())
        backends.add_row(entry["device"], Text(entry["name"]), Text(entry["backend"], "bold green"), Text(reasons))

    console = Console()
    console.print(about)
    console.print(backends)
