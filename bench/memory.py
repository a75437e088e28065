"""Peak memory of one call. On a GPU the caching allocator reports it; on a CPU a fresh process reads its resident size.

    python -m bench.memory TASK PRESET-OR-JSON CONTENDER

prints the growth of the resident set (its high-water mark, reset before the call) over what stood there with the inputs
in place, after one call to warm up. Memory that is allocated and never touched does not count, on either side.
"""

from __future__ import annotations

import ctypes
import gc
import json
import os
import resource
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch

from .contenders import Call

ROOT = Path(__file__).resolve().parent.parent
PROCESS = Path("/proc/self")
CHILD_SECONDS = 600


def is_out_of_memory(error: BaseException) -> bool:
    """torch's CPU allocator and cuBLAS raise a RuntimeError."""
    signs = ("can't allocate memory", "CUBLAS_STATUS_ALLOC_FAILED", "out of memory")
    return isinstance(error, (MemoryError, torch.OutOfMemoryError)) or any(sign in str(error) for sign in signs)


def on_gpu(call: Call) -> int:
    """Peak bytes a call allocates over what is allocated already."""
    call()
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    call()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


def available() -> int | None:
    """Bytes of memory this machine can give to a process; None where the system does not say."""
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:
        return None
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:")), None)


def on_cpu(task: str, shapes: list[Any], contender: str, limit: int | None = None) -> list[int | str]:
    """Peak bytes for each shape from one fresh process, or in its place why there is no figure ("oom", ...)."""
    request = {
        "task": task,
        "shapes": [_to_json(s) for s in shapes],
        "contender": contender,
        "limit": limit or available(),
    }
    child = subprocess.run(
        [sys.executable, "-m", "bench.memory", json.dumps(request)],
        cwd=ROOT, capture_output=True, text=True, timeout=CHILD_SECONDS,
    )  # fmt: skip
    answers = [json.loads(line[len(MARK) :]) for line in child.stdout.splitlines() if line.startswith(MARK)]
    answers += ["failed"] * (len(shapes) - len(answers))
    if child.returncode and "failed" in answers:
        last = (child.stderr.strip().splitlines() or ["no message"])[-1]
        answers[answers.index("failed")] = "oom" if child.returncode == -9 else f"failed: {last}"
    return answers


MARK = "peak bytes: "


def _to_json(shape: Any) -> dict[str, Any]:
    return {**shape._asdict(), "dtype": shape.dtype_name, "kind": type(shape).__name__}


def _from_json(fields: dict[str, Any]) -> Any:
    from . import shapes

    kind = getattr(shapes, fields.pop("kind"))
    return kind(**{**fields, "dtype": shapes.DTYPES[fields["dtype"]]})


def _status_bytes(field: str) -> int:
    for line in (PROCESS / "status").read_text().splitlines():
        if line.startswith(f"{field}:"):
            return int(line.split()[1]) * 1024
    raise OSError(f"{field} is not in /proc/self/status")


def _settle() -> None:
    gc.collect()
    give_back()


def give_back() -> None:
    """What malloc keeps of freed memory goes back to the system: it stands in nobody's way and is not resident."""
    ctypes.CDLL(None).malloc_trim(0)


def peak_growth(call: Call) -> int:
    """How much the resident set grows at most during the second of two calls."""
    call()
    _settle()
    (PROCESS / "clear_refs").write_text("5")  # the high-water mark starts again from here
    before = _status_bytes("VmRSS")
    result = call()
    peak = _status_bytes("VmHWM") - before
    del result
    return peak


def _child(request: dict[str, Any]) -> None:
    from .tasks import TASKS

    task = TASKS[request["task"]]
    contender = next(c for c in task.contenders if c.name == request["contender"])
    if request["limit"]:
        resource.setrlimit(resource.RLIMIT_DATA, (request["limit"], resource.RLIM_INFINITY))
    for fields in request["shapes"]:
        try:
            answer: int | str = peak_growth(contender.make(task.inputs(_from_json(fields), torch.device("cpu"))))
        except Exception as error:
            answer = "oom" if is_out_of_memory(error) else f"failed: {error}"
        print(f"{MARK}{json.dumps(answer)}", flush=True)
        _settle()


if __name__ == "__main__":
    os.environ.setdefault("PYTHONUNBUFFERED", "1")
    _child(json.loads(sys.argv[1]))
