"""How contenders are measured: checked, then timed in interleaved rounds, with their memory and a floor beside them.

1. Every contender computes its answer once. One whose error against float64 is out of proportion to that of the plain
   computation in the same dtype is reported as wrong, with its error, and never timed.
2. Those that are right, and the floor, take turns: round after round each runs once, so that a machine that slows down
   slows all of them. On a GPU the cache is flushed before each call; *full call* is the time the host waits for the
   result, *device* is what the kernels take once they are queued behind a sleeping GPU. A call that the GPU's sleep is
   too short to queue has no device time: it would be the host's.
3. Peak memory is the growth over the inputs during a call (``memory``).

Medians and quartiles are reported, and ratios to the naive contender and to the floor: 0.5 of naive is twice as fast.
They are of device times where both have one, of full calls otherwise.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from functools import partial
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

from . import memory, oracle
from .contenders import Call, Contender, Outputs
from .tasks import Task

NAIVE = "naive"
FLOOR = "floor"
FEWEST_ROUNDS = 3
# A contender is wrong where its error passes this many times the yardstick's (the library allows its own kernels 1.5)
# and FLOOR_ERROR as well: below that it is less accurate, which the table shows, but makes no mistake.
TOLERANCE = 2.0
FLOOR_ERROR = 1e-3
FLUSH_BYTES = 256 * 2**20
SLEEP_CYCLES = 10_000_000  # about 5 ms, in which the host queues a whole call

Progress = Callable[[str], None]


@dataclass
class Record:
    """One contender on one shape. Times in ms, None where not measured; ratios of medians."""

    task: str
    name: str
    computes: str
    status: str  # ok, wrong, missing, failed, oom; floor
    note: str
    shape: str
    dtype: str
    sizes: dict[str, int]
    error: float | None = None
    errors: dict[str, float] = field(default_factory=dict)
    ms: float | None = None
    ms_quartiles: tuple[float, float] | None = None
    device_ms: float | None = None
    device_ms_quartiles: tuple[float, float] | None = None
    rounds: int = 0
    peak_bytes: int | None = None
    output_bytes: int | None = None
    ratio_to_naive: float | None = None
    ratio_to_floor: float | None = None
    memory_to_naive: float | None = None
    parts: dict[str, float] = field(default_factory=dict)

    @property
    def time(self) -> float | None:
        """The device's where there is one."""
        return self.ms if self.device_ms is None else self.device_ms

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def relative_error(name: str, got: Tensor, want: Tensor) -> float:
    """Log-probabilities: the largest absolute error. Everything else: the norm of the error over the norm."""
    if got.shape != want.shape:
        return float("inf")
    difference = got.double() - want
    if not bool(torch.isfinite(difference).all()):
        return float("inf")
    if name == "logprobs":
        return float(difference.abs().max())
    return float(difference.norm() / want.norm().clamp(min=1e-30))


def judge(errors: dict[str, float], usual: dict[str, float], dtype: torch.dtype, noise: float = 0.0) -> str | None:
    """None where the errors are in proportion, else which is not, in words. ``noise``: of ``Contender``."""
    for name, error in errors.items():
        smallest = max(FLOOR_ERROR, 4 * torch.finfo(dtype).eps if name == "loss" else 0.0)  # one number can err by luck
        limit = max(TOLERANCE * usual.get(name, 0.0), smallest, noise if name in ("hidden", "weight") else 0.0)
        if not error <= limit:
            return f"{name} is off by {error:.1e}, naively {usual.get(name, 0.0):.1e}"
    return None


class Gate:
    """Holds contenders against float64 on (a judged part of) the inputs; answers are computed once per objective.

    Where only a part could be judged, a few rows of d_hidden are checked at full size as well, and d_weight against it.
    """

    def __init__(self, task: Task, inputs: Any, dtype: torch.dtype) -> None:
        self._task, self._dtype = task, dtype
        self._whole, self._inputs = inputs, task.judged(inputs)
        self._answers: dict[str, Outputs] = {}
        self._usual: dict[str, dict[str, float]] = {}
        self._spots: dict[str, tuple[Tensor, Tensor]] = {}

    def check(self, contender: Contender, record: Record) -> None:
        objective = contender.computes
        if objective not in self._answers:
            right = self._answers[objective] = self._task.oracle(self._inputs, objective)
            self._usual[objective] = errors_of(self._task.yardstick(self._inputs, objective), right)
        record.errors = errors_of(contender.make(self._inputs)(), self._answers[objective])
        record.error = max(record.errors.values())
        complaint = judge(record.errors, self._usual[objective], self._dtype, contender.noise)
        if complaint is not None:
            record.status, record.note = "wrong", complaint

    def forget_answers(self) -> None:
        """Frees their memory before that of a contender is measured."""
        self._answers.clear()

    def check_whole(self, contender: Contender, record: Record, found: Outputs) -> None:
        """The second look, at what was computed at full size."""
        if self._task.spots is None or self._inputs is self._whole:
            return
        objective = contender.computes
        if objective not in self._spots:
            self._spots[objective] = self._task.spots(self._whole, objective)
        positions, right = self._spots[objective]
        errors = {
            "hidden": relative_error("hidden", found["hidden"][positions], right),
            "weight": relative_error("weight", *oracle.both_sides(self._whole, found)),
        }
        usual = self._usual[objective]
        of_both = {**usual, "weight": usual["weight"] + usual["hidden"]}
        noise = 2 * contender.noise  # of a few rows, which may have fewer entries than others
        complaint = judge(errors, of_both, self._dtype, noise)
        if complaint is not None:
            record.status, record.note = "wrong", f"at full size {complaint}"
            record.error = max(record.error or 0.0, *errors.values())


def errors_of(got: Outputs, want: Outputs) -> dict[str, float]:
    """By name; what is missing is infinitely wrong, or a contender could leave out work that the others do."""
    return {name: relative_error(name, got[name], want[name]) if name in got else math.inf for name in want}


def time_cpu(call: Call) -> float:
    """ms until the results are there; giving their memory back is not the call's."""
    start = time.perf_counter()
    results = call()
    taken = (time.perf_counter() - start) * 1e3
    del results
    return taken


class GpuTimer:
    """(full call, device) of one call in ms; no device time where the host was not done in time."""

    def __init__(self, device: torch.device) -> None:
        self._flush = torch.empty(FLUSH_BYTES, dtype=torch.uint8, device=device)

    def full_call(self, call: Call) -> float:
        self._flush.zero_()
        torch.cuda.synchronize()
        start = time.perf_counter()
        call()
        torch.cuda.synchronize()
        return (time.perf_counter() - start) * 1e3

    def device(self, call: Call) -> float | None:
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        self._flush.zero_()
        torch.cuda._sleep(SLEEP_CYCLES)
        start.record()
        call()
        end.record()
        host_was_late = start.query()  # the GPU woke up and began before everything was queued
        torch.cuda.synchronize()
        return None if host_was_late else start.elapsed_time(end)


def quartiles(samples: list[float]) -> tuple[float, tuple[float, float]]:
    """(median, (first quartile, third quartile))."""
    if len(samples) == 1:
        return samples[0], (samples[0], samples[0])
    low, middle, high = statistics.quantiles(samples, n=4, method="inclusive")
    return middle, (low, high)


def take_turns(calls: dict[str, Call], device: torch.device, rounds: int, seconds: float) -> dict[str, list[Any]]:
    """Samples of each call, interleaved; stops early after ``seconds`` once everyone had ``FEWEST_ROUNDS``.

    A sample is ms, or (full call ms, device ms) on a GPU. A call that raises is dropped; its exception is its only
    sample.
    """
    timer = GpuTimer(device) if device.type == "cuda" else None
    samples: dict[str, list[Any]] = {name: [] for name in calls}
    out: dict[str, list[Any]] = {}
    began = time.perf_counter()
    for done in range(rounds + 1):  # the first round warms up
        for name in [n for n in calls if n not in out]:
            try:
                call = calls[name]
                taken = (timer.full_call(call), timer.device(call)) if timer else time_cpu(call)
            except Exception as error:
                out[name] = [error.with_traceback(None)]  # whose frames would hold the memory that ran out
                continue
            if done:
                samples[name].append(taken)
        if done >= FEWEST_ROUNDS and time.perf_counter() - began > seconds:
            break
    return {**samples, **out}


def device_times(samples: list[tuple[float, float | None]]) -> list[float]:
    """None at all where the host was late in most rounds."""
    found = [on_device for _, on_device in samples if on_device is not None]
    return found if 2 * len(found) > len(samples) else []


def typical(samples: list[Any]) -> float:
    """The median; on a GPU of the device times, where there are some."""
    if not isinstance(samples[0], tuple):
        return statistics.median(samples)
    return statistics.median(device_times(samples) or [full for full, _ in samples])


def _fill_times(record: Record, samples: list[Any]) -> None:
    if samples and isinstance(samples[0], Exception):
        _fail(record, samples[0])
        return
    record.rounds = len(samples)
    if isinstance(samples[0], tuple):
        record.ms, record.ms_quartiles = quartiles([full for full, _ in samples])
        on_device = device_times(samples)
        if on_device:
            record.device_ms, record.device_ms_quartiles = quartiles(on_device)
    else:
        record.ms, record.ms_quartiles = quartiles(samples)


def _fail(record: Record, error: BaseException) -> None:
    if memory.is_out_of_memory(error):
        record.status, record.note = "oom", "out of memory"
    else:
        first = (str(error).strip().splitlines() or [""])[0]
        record.status, record.note = "failed", f"{type(error).__name__}: {first}"[:200]


def _sizes(shape: Any) -> dict[str, int]:
    return {key: value for key, value in shape._asdict().items() if type(value) is int} | {"tokens": shape.tokens}


def measure(
    task: Task,
    shape: Any,
    device: torch.device,
    *,
    rounds: int = 10,
    seconds: float = 60.0,
    contenders: list[Contender] | None = None,
    peaks: dict[str, int | str] | None = None,
    left_out: Mapping[str, str] = MappingProxyType({}),
    deadline: float = math.inf,
    say: Progress = lambda _: None,
) -> list[Record]:
    """All contenders of a task on one shape.

    Args:
        rounds: of timing, fewer where ``seconds`` are over.
        contenders: those of the task where None.
        peaks: on a CPU, peak bytes by contender (or "oom") from ``memory.on_cpu``; a contender that ran out there
            is not run here.
        left_out: contenders that are reported as missing, and why.
        deadline: of ``time.monotonic``; a contender that has not been checked by then is missing too.
        say: told what is going on.
    """
    chosen = task.contenders if contenders is None else contenders
    peaks = peaks or {}
    inputs = task.inputs(shape, device)
    gate = Gate(task, inputs, shape.dtype)
    common = {"shape": shape.name, "dtype": shape.dtype_name, "sizes": _sizes(shape)}
    records = [Record(task.name, c.name, c.computes, "ok", "", **common) for c in chosen]
    calls: dict[str, Call] = {}
    for contender, record in zip(chosen, records, strict=True):
        say(f"{task.name} {shape.name}: checking {contender.name}")
        missing = contender.missing(device) or left_out.get(contender.name)
        if missing is None and time.monotonic() > deadline:
            missing = "no time left"
        if missing is not None:
            record.status, record.note = "missing", missing
        elif peaks.get(contender.name) == "oom":
            record.status, record.note = "oom", "out of memory"
        else:
            _try(record, device, partial(gate.check, contender, record))
    gate.forget_answers()
    for contender, record in zip(chosen, records, strict=True):
        if record.status == "ok":
            say(f"{task.name} {shape.name}: {contender.name} at full size")
            peak = peaks.get(contender.name)
            _try(record, device, partial(_at_full_size, gate, contender, record, inputs, calls, peak))
    floor = Record(task.name, FLOOR, "", FLOOR, task.floor_name, **common)
    try:
        calls[FLOOR] = task.floor(inputs)
    except Exception as error:
        _fail(floor, error)
    say(f"{task.name} {shape.name}: timing {len(calls)} calls")
    samples = take_turns(calls, device, rounds, min(seconds, deadline - time.monotonic()))
    for record in (*records, floor):
        if record.name in samples:
            _fill_times(record, samples[record.name])
    _compare(records, floor)
    return [*records, floor]


def _try(record: Record, device: torch.device, step: Callable[[], None]) -> None:
    """One step for one contender, whose failure is its own."""
    try:
        step()
    except Exception as error:
        _fail(record, error)
    if device.type == "cuda":
        torch.cuda.empty_cache()


def _at_full_size(
    gate: Gate, contender: Contender, record: Record, inputs: Any, calls: dict[str, Call], peak: int | str | None
) -> None:
    """A first call, looked at once more; its memory; and, where all is well, a place among those that are timed."""
    call = contender.make(inputs)
    found = call()
    gate.check_whole(contender, record, found)
    record.output_bytes = sum(t.nbytes for t in found.values())
    on_gpu = any(t.is_cuda for t in found.values())
    del found
    if on_gpu:
        record.peak_bytes = memory.on_gpu(call)
    elif isinstance(peak, int):
        record.peak_bytes = peak
    if record.status == "ok":
        calls[contender.name] = call


def _compare(records: list[Record], floor: Record) -> None:
    naive = next((r for r in records if r.name == NAIVE), None)
    for record in records:
        if naive is not None:
            record.ratio_to_naive = _time_ratio(record, naive)
            record.memory_to_naive = _ratio(record.peak_bytes, naive.peak_bytes)
        record.ratio_to_floor = _time_ratio(record, floor)


def _time_ratio(a: Record, b: Record) -> float | None:
    on_device = _ratio(a.device_ms, b.device_ms)
    return _ratio(a.ms, b.ms) if on_device is None else on_device


def _ratio(a: float | None, b: float | None) -> float | None:
    return a / b if a is not None and b else None
