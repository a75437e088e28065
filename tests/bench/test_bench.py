"""The benchmarks judge contenders rightly, report what they should, and their GPU suite still runs."""

from __future__ import annotations

import csv
import json
import os
import re
import subprocess
import sys
import time
import weakref
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from bench import (
    caps,
    environment,
    gpu_parts,
    gpu_suite,
    harness,
    memory,
    native_bars,
    oracle,
    page,
    plot,
    report,
    sampled_model,
    split_head,
)
from bench.cli import chosen_contenders, chosen_shapes, run_task
from bench.contenders import Call, Contender, Outputs, gradients, ours, peers, plain, scans
from bench.environment import describe
from bench.harness import measure
from bench.inputs import HeadInputs, head_inputs, scan_inputs
from bench.shapes import RECORDS, Scan, Shape
from bench.tasks import TASKS
from klq_kernels import KLQTargets
from klq_kernels.backends import why_unavailable

CPU = torch.device("cpu")
ROOT = Path(__file__).resolve().parents[2]
SMALL = Shape("small", 160, 32, 1000, torch.float32, ragged=True)
FP32, BF16 = torch.float32, torch.bfloat16


def judged(task: str, contender: Contender, shape: Any) -> harness.Record:
    """The verdict on one contender."""
    (record, _) = measure(TASKS[task], shape, CPU, rounds=1, contenders=[contender])
    return record


# --- inputs --------------------------------------------------------------------------------------------------------


def test_inputs_are_peaked_ragged_and_masked() -> None:
    inputs = head_inputs(SMALL._replace(tokens=600, vocab=5000), CPU)
    assert inputs.mask is not None
    assert inputs.tokens == 600 < inputs.actions.numel()
    probabilities = torch.softmax(inputs.hidden @ inputs.weight.T, -1)
    top = probabilities.amax(1)
    assert (top > 0.9).float().mean() > 0.1, "some rows are sharply peaked"
    assert (top < 0.3).float().mean() > 0.1, "and some are flat"
    assert (probabilities.argmax(1) == inputs.actions).float().mean() > 0.2, "the taken token is often the likeliest"
    counts = torch.stack([m.sum() for m in inputs.mask.tensor_split(inputs.cu_seqlens[1:-1].long())])
    assert counts.unique().numel() > 2


def test_inputs_repeat_with_their_seed() -> None:
    assert torch.equal(head_inputs(SMALL, CPU, 3).hidden, head_inputs(SMALL, CPU, 3).hidden)
    assert not torch.equal(head_inputs(SMALL, CPU, 3).hidden, head_inputs(SMALL, CPU, 4).hidden)


# --- the judge -----------------------------------------------------------------------------------------------------


def test_the_oracle_is_autograd_in_float64() -> None:
    """The closed form against plain autograd on the same double-precision head."""
    inputs = head_inputs(SMALL._replace(softcap=10.0), CPU)
    double = replace(
        inputs,
        hidden=inputs.hidden.detach().double().requires_grad_(),
        weight=inputs.weight.detach().double().requires_grad_(),
    )
    for objective in oracle.OBJECTIVES:
        logp = plain.naive_logprobs(
            double.valid(double.hidden), double.weight, double.valid(double.actions), double.softcap
        )
        loss = oracle.OBJECTIVES[objective](logp, double.valid(double.values).double(), double)
        right = gradients(loss, hidden=double.hidden, weight=double.weight)
        found = oracle.loss(inputs, objective)
        for name, tensor in right.items():
            torch.testing.assert_close(found[name], tensor, rtol=1e-9, atol=1e-12)


RIGHT = [c for c in (*ours.LOSS, *plain.LOSS) if c.name != "torch.compile"]  # which takes long to start


@pytest.mark.parametrize("dtype", [FP32, BF16])
@pytest.mark.parametrize("contender", RIGHT, ids=lambda c: c.name)
def test_right_contenders_pass(contender: Contender, dtype: torch.dtype) -> None:
    record = judged("loss", contender, SMALL._replace(dtype=dtype))
    assert record.status == "ok", record.note
    assert record.ms is not None


@pytest.mark.parametrize("dtype", [FP32, BF16])
@pytest.mark.parametrize("contender", TASKS["select"].contenders, ids=lambda c: c.name)
def test_selections_are_judged(contender: Contender, dtype: torch.dtype) -> None:
    """All but the sums of gathered rows' gradients in bf16, in which those of a row that many tokens share drown."""
    record = judged("select", contender, SMALL._replace(dtype=dtype, softcap=10.0))
    rounds = contender.name == "gathered rows" and dtype == BF16
    assert record.status == ("wrong" if rounds else "ok"), record.note


@pytest.mark.parametrize("dtype", [FP32, BF16])
@pytest.mark.parametrize("contender", TASKS["kl"].contenders, ids=lambda c: c.name)
def test_divergences_are_judged(contender: Contender, dtype: torch.dtype) -> None:
    shape = SMALL._replace(dtype=dtype, softcap=None if contender.name == "Liger JSD" else 10.0)
    record = judged("kl", contender, shape)
    rounds = contender.name == "Liger JSD" and dtype == BF16  # its log-probabilities are in the inputs' dtype
    assert record.status in (("wrong" if rounds else "ok"), "missing"), record.note


@pytest.mark.parametrize("task", ["targets", "scan"])
@pytest.mark.parametrize("ragged", [False, True])
def test_right_scans_pass(task: str, ragged: bool) -> None:
    for record in measure(TASKS[task], Scan("small", 3, 50, ragged=ragged), CPU, rounds=1, contenders=_eager(task)):
        assert record.status in ("ok", "missing", "floor"), f"{record.name}: {record.note}"


def _eager(task: str) -> list[Contender]:
    return [c for c in TASKS[task].contenders if "compile" not in c.name]


def planted_padded_tile(hidden: Tensor, weight: Tensor, actions: Tensor, softcap: float | None) -> Tensor:
    """verl #2656: the columns that fill the last tile count as logits of 0."""
    logits = F.pad(F.linear(hidden, weight), (0, -weight.shape[0] % 256))
    return logits.log_softmax(-1).gather(-1, actions[:, None]).squeeze(-1)


def planted_missing_tile(hidden: Tensor, weight: Tensor, actions: Tensor, softcap: float | None) -> Tensor:
    """The last, incomplete tile is never read."""
    logits = F.linear(hidden, weight)
    whole = logits.shape[1] // 256 * 256
    return logits.gather(-1, actions[:, None]).squeeze(-1) - logits[:, :whole].logsumexp(-1)


def planted_low_precision_sum(inputs: HeadInputs) -> Call:
    """axolotl #1601: the weight's gradient added up over many chunks in bf16."""
    right = ours.fused(inputs)

    def call() -> Outputs:
        found = right()
        total = torch.zeros_like(inputs.weight, dtype=BF16)
        for chunk in torch.arange(inputs.tokens).split(2):
            total += ours.fused(inputs.only(chunk))()["weight"] * (chunk.numel() / inputs.tokens)
        return {**found, "weight": total.to(inputs.weight.dtype)}

    return call


def planted_masked_gradient(inputs: HeadInputs) -> Call:
    """A prompt token gets a gradient."""
    right = ours.fused(inputs)

    def call() -> Outputs:
        found = right()
        assert inputs.mask is not None
        hidden = found["hidden"].clone()
        hidden[~inputs.mask] = hidden.abs().max()
        return {**found, "hidden": hidden}

    return call


def planted_nan(inputs: HeadInputs) -> Call:
    """One element is left unwritten."""
    right = ours.fused(inputs)

    def call() -> Outputs:
        found = right()
        weight = found["weight"].clone()
        weight[-1, -1] = torch.nan
        return {**found, "weight": weight}

    return call


def planted_lost_gradient(inputs: HeadInputs) -> Call:
    """The head is taken as a constant, which saves a product."""
    return plain.loss_through(lambda h, w, a, cap: plain.naive_logprobs(h, w.detach(), a, cap), inputs)


PLANTED: list[tuple[str, Callable[[Any], Call], str]] = [
    ("padded tile", lambda inputs: plain.loss_through(planted_padded_tile, inputs), "hidden"),
    ("missing tile", lambda inputs: plain.loss_through(planted_missing_tile, inputs), "hidden"),
    ("bf16 accumulation", planted_low_precision_sum, "weight"),
    ("gradient at masked tokens", planted_masked_gradient, "hidden"),
    ("unwritten element", planted_nan, "weight"),
    ("lost gradient", planted_lost_gradient, "weight"),
]


@pytest.mark.parametrize("dtype", [FP32, BF16])
@pytest.mark.parametrize(("name", "make", "where"), PLANTED, ids=[name for name, *_ in PLANTED])
def test_planted_wrong_contenders_are_caught_and_not_timed(
    name: str, make: Callable[[Any], Call], where: str, dtype: torch.dtype
) -> None:
    record = judged("loss", Contender(name, make), SMALL._replace(dtype=dtype, tokens=400))
    assert record.status == "wrong"
    assert record.error is not None
    assert record.error > 0
    assert record.ms is None
    assert where in record.note or "loss" in record.note or "weight" in record.note


def test_a_wrong_log_probability_is_caught() -> None:
    contender = Contender("padded", lambda inputs: plain.logprobs_through(planted_padded_tile, inputs))
    assert judged("logprobs", contender, SMALL).status == "wrong"


def test_a_scan_that_ignores_the_mask_is_caught() -> None:
    careless = Contender("careless", lambda inputs: scans.gae_by(scans.loop, replace(inputs, mask=None)))
    assert judged("scan", careless, Scan("small", 4, 40, ragged=True)).status == "wrong"


def short_hidden(inputs: HeadInputs) -> Call:
    """The last rows are wrong, as with offsets beyond 32 bits."""
    right = ours.fused(inputs)

    def call() -> Outputs:
        found = right()
        hidden = found["hidden"].clone()
        hidden[400:] = 0
        return {**found, "hidden": hidden}

    return call


def short_weight(inputs: HeadInputs) -> Call:
    """The last tokens' part of the head's gradient is missing."""
    right, rest = ours.fused(inputs), ours.fused(inputs.only(torch.arange(inputs.tokens)[400:]))
    share = max(inputs.tokens - 400, 0) / inputs.tokens

    def call() -> Outputs:
        found = right()
        return {**found, "weight": found["weight"] - share * rest()["weight"]} if share else found

    return call


@pytest.mark.parametrize("dtype", [FP32, BF16])
@pytest.mark.parametrize(("make", "where"), [(short_hidden, "hidden"), (short_weight, "weight")])
def test_an_error_beyond_what_the_judge_could_afford_is_caught(
    make: Callable[[Any], Call], where: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Only the first tokens are judged in full."""
    from bench import tasks

    monkeypatch.setitem(tasks.ORACLE_FLOP, "cpu", 0.0)
    shape = SMALL._replace(tokens=600, dtype=dtype)
    for right in (c for c in (*ours.LOSS, *plain.LOSS) if c.name != "torch.compile"):
        assert judged("loss", right, shape).status == "ok"
    record = judged("loss", Contender("short", make), shape)
    assert record.status == "wrong"
    assert f"at full size {where}" in record.note


def test_another_objective_is_judged_by_its_own_answer() -> None:
    contender = next(c for c in plain.LOSS if c.computes == "cross-entropy")
    assert judged("loss", contender, SMALL).status == "ok"
    assert judged("loss", replace(contender, computes="klq"), SMALL).status == "wrong"


# --- timing --------------------------------------------------------------------------------------------------------


def test_a_planted_slow_contender_shows_in_the_ratio() -> None:
    """It sleeps for 50 ms, far longer than naive takes on 160 x 1000 logits even on a busy machine."""

    def make(inputs: HeadInputs) -> Call:
        right = plain.loss_through(plain.naive_logprobs, inputs)

        def call() -> Outputs:
            time.sleep(0.05)
            return right()

        return call

    task = TASKS["loss"]
    naive = next(c for c in task.contenders if c.name == "naive")
    slow, fast, floor = measure(task, SMALL, CPU, rounds=5, contenders=[Contender("slow", make), naive])
    assert slow.status == fast.status == "ok"
    assert slow.ms is not None
    assert slow.ms >= 50
    assert fast.ratio_to_naive == 1.0
    assert slow.ratio_to_naive is not None
    assert slow.ratio_to_naive == pytest.approx(slow.ms / (fast.ms or 0))
    assert slow.ratio_to_floor == pytest.approx(slow.ms / (floor.ms or 0))


def test_rounds_are_interleaved() -> None:
    order: list[str] = []

    def call(name: str) -> Call:
        return lambda: order.append(name) or {}

    harness.take_turns({"a": call("a"), "b": call("b")}, CPU, rounds=3, seconds=10)
    assert order == ["a", "b"] * 4


def test_who_fails_while_timed_leaves_and_the_others_go_on() -> None:
    calls = 0

    def fails_later(inputs: HeadInputs) -> Call:
        right = plain.loss_through(plain.naive_logprobs, inputs)

        def call() -> Outputs:
            nonlocal calls
            calls += 1
            if calls > 3:
                raise MemoryError
            return right()

        return call

    task = TASKS["loss"]
    naive = next(c for c in task.contenders if c.name == "naive")
    bad, good, _ = measure(task, SMALL, CPU, rounds=4, contenders=[Contender("late", fails_later), naive])
    assert bad.status == "oom"
    assert good.status == "ok"
    assert good.rounds == 4


def test_who_ran_out_of_memory_lets_go_of_it() -> None:
    held: list[weakref.ref[Tensor]] = []

    def fails() -> Outputs:
        tensor = torch.ones(1000)
        held.append(weakref.ref(tensor))
        raise MemoryError

    def looks() -> Outputs:
        assert held[0]() is None
        return {}

    samples = harness.take_turns({"fails": fails, "looks": looks}, CPU, rounds=2, seconds=1.0)
    assert isinstance(samples["fails"][0], MemoryError)
    assert all(isinstance(taken, float) for taken in samples["looks"])


def timed(name: str, samples: list[Any]) -> harness.Record:
    record = harness.Record("scan", name, "klq", "ok", "", "", "", {})
    harness._fill_times(record, samples)
    return record


def test_ratios_compare_like_with_like() -> None:
    """A loop that the host is late with has no device time, and is compared by full calls."""
    naive = timed("naive", [(60.0, None), (50.0, 49.0), (40.0, None)])
    fast, floor = timed("fast", [(5.0, 1.0)] * 3), timed("floor", [(4.0, 0.5)] * 3)
    harness._compare([naive, fast], floor)
    assert naive.device_ms is None
    assert (fast.ratio_to_naive, fast.ratio_to_floor) == (0.1, 2.0)
    assert naive.ratio_to_floor == 12.5


def test_who_is_left_out_or_too_late_is_named() -> None:
    shape, task = Scan("small", 3, 50), TASKS["scan"]
    naive = next(c for c in task.contenders if c.name == "naive")
    (record, _) = measure(task, shape, CPU, rounds=1, contenders=[naive], left_out={"naive": "a long loop"})
    assert (record.status, record.note) == ("missing", "a long loop")
    (record, _) = measure(task, shape, CPU, rounds=1, contenders=[naive], deadline=time.monotonic() - 1)
    assert (record.status, record.note) == ("missing", "no time left")


def test_missing_contenders_say_how_to_get_them() -> None:
    record = judged("loss", Contender("absent", ours.fused, module="no_such_package", install="pip install it"), SMALL)
    assert (record.status, record.note) == ("missing", "pip install it")


def test_gpu_contenders_are_missing_on_a_cpu() -> None:
    assert replace(peers.LOSS[0], module=None).missing(CPU) == "needs a GPU"


# --- memory --------------------------------------------------------------------------------------------------------


def test_peak_memory_counts_what_is_freed_again() -> None:
    size = 64 * 2**20

    def call() -> Outputs:
        torch.ones(size // 4)
        return {}

    assert memory.peak_growth(call) == pytest.approx(size, rel=0.05)


def test_memory_comes_from_a_fresh_process_and_fused_needs_less() -> None:
    shape = Shape("memory", 2048, 32, 20_000, FP32)
    (naive,), (fused,) = (memory.on_cpu("loss", [shape], name) for name in ("naive", "klq_kernels"))
    assert isinstance(naive, int)
    assert isinstance(fused, int)
    logits = shape.tokens * shape.vocab * 4
    assert naive > 2.5 * logits
    assert fused < naive


def test_running_out_of_memory_is_an_answer_and_later_shapes_still_get_theirs() -> None:
    large = Shape("large", 4096, 32, 100_000, FP32)
    found = memory.on_cpu("loss", [large, SMALL], "naive", limit=3 * 2**30)
    assert found[0] == "oom"
    assert isinstance(found[1], int)


def test_caps_find_what_fits() -> None:
    shape = Shape("tiny", 1, 16, 128, FP32)
    for allowed in (100, 333, 2000):
        found = caps.largest(shape, CPU, "fused", 2**17, lambda _: None, allowed)
        step = max(int(found["predicted_tokens"] * caps.STEP), 1)
        assert allowed - step < found["tokens"] <= allowed


def test_caps_that_take_too_long_are_no_answer() -> None:
    with pytest.raises(TimeoutError, match="tiny fused"):
        caps.largest(Shape("tiny", 1, 16, 128, FP32), CPU, "fused", 2**17, lambda _: None, 100, time.monotonic() - 1)


# --- the bars of the CPU backend -----------------------------------------------------------------------------------

needs_native = pytest.mark.skipif(why_unavailable("native") is not None, reason="the native backend is not built")


def sections() -> None:
    """All of them, tiny."""
    native_bars.head(SMALL._replace(ragged=False), 1.0)
    native_bars.scan(1, batch=9, length=40)
    native_bars.trajectory(length=200)


@needs_native
def test_right_calls_get_into_the_bars() -> None:
    sections()


def doubled(function: Callable[..., Any]) -> Callable[..., Any]:
    """The same with twice the answer, returned or written where the last tensor argument stands."""

    def wrong(*arguments: Any, **options: Any) -> Any:
        found = function(*arguments, **options)
        if found is None:
            return arguments[-1].mul_(2)
        return found._replace(advantages=2 * found.advantages) if isinstance(found, KLQTargets) else 2 * found

    return wrong


@needs_native
@pytest.mark.parametrize(
    ("module", "name"),
    [
        (plain, "naive_logprobs"), (plain, "fp32_logprobs"), (scans, "loop"), (native_bars, "reverse_scan"),
        (native_bars, "klq_targets"), (native_bars.native, "reverse_scan"), (native_bars.native, "lambda_errors"),
    ],
    ids=lambda x: x if isinstance(x, str) else x.__name__.split(".")[-1],
)  # fmt: skip
def test_a_wrong_call_never_gets_into_the_bars(module: Any, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, name, doubled(getattr(module, name)))
    with pytest.raises(RuntimeError, match="off by"):
        sections()


# --- reports -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def run() -> dict[str, Any]:
    """A small run over two vocabulary sizes, one contender of which is wrong and one out of memory."""
    task = TASKS["loss"]
    wanted = [c for c in task.contenders if c.name in ("klq_kernels", "naive", "quack")]
    wrong = Contender("planted", lambda inputs: plain.loss_through(planted_padded_tile, inputs))
    records = []
    for vocab in (1000, 2000):
        peaks: dict[str, int | str] = {"naive": "oom" if vocab == 2000 else 10**6, "klq_kernels": 4 * 10**5}
        shape = SMALL._replace(vocab=vocab)
        records += measure(task, shape, CPU, rounds=3, contenders=[*wanted, wrong], peaks=peaks)
    return json.loads(json.dumps(report.document(records, describe(CPU, "a test"), preset="test")))


def test_json_carries_what_was_promised(run: dict[str, Any]) -> None:
    for field in ("device", "torch", "triton", "threads", "commit", "command", "backend"):
        assert field in run["environment"]
    rows = {row["name"]: row for row in run["results"] if row["sizes"]["vocab"] == 1000}
    ours_row = rows["klq_kernels"]
    for field in ("shape", "dtype", "ms", "ms_quartiles", "peak_bytes", "ratio_to_naive", "ratio_to_floor", "error"):
        assert ours_row[field] is not None, field
    assert ours_row["status"] == "ok"
    assert ours_row["ms_quartiles"][0] <= ours_row["ms"] <= ours_row["ms_quartiles"][1]
    assert ours_row["memory_to_naive"] == pytest.approx(0.4)
    assert rows["planted"]["status"] == "wrong"
    assert rows["quack"]["status"] == "missing"


def test_files_are_written(run: dict[str, Any], tmp_path: Path) -> None:
    report.save_json(tmp_path / "run.json", run)
    assert report.load_json(tmp_path / "run.json") == run
    report.save_csv(tmp_path / "run.csv", run)
    with (tmp_path / "run.csv").open() as file:
        lines = list(csv.DictReader(file))
    assert len(lines) == len(run["results"])
    assert float(lines[0]["ms"]) == run["results"][0]["ms"]
    plot.plot(run, tmp_path / "curves.png")
    plot.plot({**run, "results": [r for r in run["results"] if r["sizes"]["vocab"] == 1000]}, tmp_path / "bars.png")
    for name in ("curves.png", "bars.png"):
        assert (tmp_path / name).read_bytes().startswith(b"\x89PNG")


def test_another_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "other.json").write_text("{}")
    with pytest.raises(ValueError, match=r"other\.json"):
        report.load_json(tmp_path / "other.json")


def test_tables_name_the_wrong_and_the_missing(run: dict[str, Any], capsys: pytest.CaptureFixture[str]) -> None:
    report.show(run)
    shown = capsys.readouterr().out
    text = "\n".join(line for rows in report.groups(run["results"]).values() for line in report.markdown_table(rows))
    for output in (shown, text):
        assert "planted is wrong: " in output
        assert "pip install quack-kernels" in output
        assert "out of memory" in output
        assert "three GEMMs" in output


def test_compare_tells_faster_from_the_same(run: dict[str, Any]) -> None:
    after = json.loads(json.dumps(run))
    for row in after["results"]:
        if row["name"] == "klq_kernels" and row["ms"] is not None:
            row["ms"] /= 4
            row["ms_quartiles"] = [x / 4 for x in row["ms_quartiles"]]
            row["peak_bytes"] //= 2
    for row in (*run["results"], *after["results"]):  # make the spread a fixed one: this machine may be busy
        if row["ms"] is not None:
            row["ms_quartiles"] = [0.9 * row["ms"], 1.1 * row["ms"]]
    rows = report.compare(run, after)
    ours_rows = [r for r in rows if r["name"] == "klq_kernels"]
    assert [r["verdict"] for r in ours_rows] == ["faster", "faster"]
    assert ours_rows[0]["time"] == pytest.approx(0.25)
    assert ours_rows[0]["memory"] == pytest.approx(0.5)
    assert {r["verdict"] for r in rows if r["name"] == "floor"} == {"same"}
    assert {r["verdict"] for r in report.compare(after, run) if r["name"] == "klq_kernels"} == {"slower"}


# --- commands ------------------------------------------------------------------------------------------------------


def test_shapes_of_a_command() -> None:
    task = TASKS["loss"]
    assert [s.vocab for s in chosen_shapes(task, "quick", None, "vocab=100,200")] == [100, 200]
    assert chosen_shapes(task, "qwen3-8b", "fp16", None)[0].dtype == torch.float16
    assert set(RECORDS) <= set(task.presets)
    for bad in ({"preset": "x"}, {"dtype": "fp8"}, {"sweep": "vocab"}, {"sweep": "colour=1"}):
        given = {"preset": "tiny", "dtype": None, "sweep": None, **bad}
        with pytest.raises(ValueError, match=r"preset|dtype|sweep|axis"):
            chosen_shapes(task, given["preset"], given["dtype"], given["sweep"])  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="contenders"):
        chosen_contenders(task, "nobody", "tiny", CPU)


def test_a_task_runs_with_memory_and_breakdown() -> None:
    task = chosen_contenders(TASKS["loss"], "klq_kernels;naive", "tiny", CPU)
    records = run_task(task, [SMALL], CPU, rounds=1, seconds=1.0, with_memory=True, limit=None, say=lambda _: None)
    mine = next(r for r in records if r.name == "klq_kernels")
    assert mine.peak_bytes is not None
    assert set(mine.parts) == {"three GEMMs", "statistics", "gradient", "rest"}
    assert sum(mine.parts.values()) == pytest.approx(mine.ms)


def test_a_training_step_is_right_in_every_way_of_computing_it() -> None:
    pytest.importorskip("transformers")
    records = measure(TASKS["train-step"], TASKS["train-step"].presets["tiny"][0], CPU, rounds=1)
    assert {r.name: r.status for r in records if r.status != "ok"} == {"floor": "floor"}


def test_the_command_writes_its_files(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "bench", "scan", "--preset", "tiny", "--no-memory", "--rounds", "1"]
    command += [
        "--contenders",
        "klq_kernels;naive",
        "--json",
        str(tmp_path / "a.json"),
        "--plot",
        str(tmp_path / "a.png"),
    ]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True, timeout=280)
    content = report.load_json(tmp_path / "a.json")
    assert {row["status"] for row in content["results"]} == {"ok", "floor"}
    assert (tmp_path / "a.png").exists()
    compared = subprocess.run(
        [sys.executable, "-m", "bench", "compare", str(tmp_path / "a.json"), str(tmp_path / "a.json")],
        cwd=ROOT, check=True, capture_output=True, text=True, timeout=280,
    )  # fmt: skip
    assert "same" in compared.stdout


def test_klq_bench_is_the_same_command() -> None:
    from typer.testing import CliRunner

    from klq_kernels.commands.cli import app

    command = ["bench", "scan", "--preset", "tiny", "--no-memory", "--rounds", "1", "--contenders", "klq_kernels"]
    done = CliRunner().invoke(app, command)
    assert done.exit_code == 0, done.output
    assert "memory copy" in done.output
    assert re.search(r"klq_kernels \S+ from .*klq_kernels, backend \w+ on cpu", done.output)
    assert "train-step" in CliRunner().invoke(app, ["bench", "--help"]).output


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["compare", "none.json", "none.json"], "none.json: cannot be read as a benchmark"),
        (["scan", "--device", "tpu"], "device: must be cpu or cuda"),
        (["scan", "--json", "."], "--json: . is a folder"),
        (["scan", "--csv", "file/below.csv"], "--csv: cannot write into file as a folder"),
        (["loss", "--sweep", "vocab=0"], "sweep: vocab must be at least 1"),
        (["loss", "--sweep", "vocab"], "sweep: must look like"),
    ],
)
def test_bad_arguments_are_named_before_any_work(
    arguments: list[str], message: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    from typer.testing import CliRunner

    from klq_kernels.commands.cli import app

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("bench.cli.run_task", lambda *_, **__: pytest.fail("it began"))
    (tmp_path / "file").touch()
    shown = CliRunner().invoke(app, ["bench", *arguments])
    assert isinstance(shown.exception, ValueError), shown.output
    assert str(shown.exception).startswith(message)


def test_klq_bench_says_that_it_needs_a_checkout(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from typer.testing import CliRunner

    from klq_kernels.commands import cli

    monkeypatch.setattr(cli, "__file__", str(tmp_path / "klq_kernels" / "commands" / "cli.py"))
    assert CliRunner().invoke(cli.app, ["bench", "--help"]).exit_code == 0, "an installed klq, called in a checkout"
    monkeypatch.chdir(tmp_path)
    done = CliRunner().invoke(cli.app, ["bench", "scan"])
    assert isinstance(done.exception, ValueError)
    assert "source checkout" in str(done.exception)


@pytest.mark.slow
@pytest.mark.timeout(1100)
def test_the_gpu_suite_rehearses_on_a_cpu(tmp_path: Path) -> None:
    """All parts end well, the kernels run in the interpreter, and the files are there.

    But for compiled PyTorch, which a rehearsal leaves out: what is left of that part is the loss's.
    """
    pytest.importorskip("triton")
    out = tmp_path / "gpu.json"
    parts = ",".join(name for name in gpu_parts.PARTS if name != "compilers")
    subprocess.run(
        [sys.executable, "-m", "bench.gpu_suite", "--dry-run", "--parts", parts, "--out", str(out)],
        cwd=ROOT, check=True, capture_output=True, timeout=1080,
        env={k: v for k, v in os.environ.items() if k != "KLQ_BACKEND"},
    )  # fmt: skip
    content = report.load_json(out)
    assert {name: part["status"] for name, part in content["parts"].items()} == dict.fromkeys(content["parts"], "ok")
    assert {row["status"] for row in content["results"] if row["name"] == "klq_kernels"} == {"ok"}
    assert all(row["right"] for row in content["parts"]["scans"]["warps"])
    assert all(row["right"] for row in content["parts"]["contact"]["contact"])
    assert not [row for name in ("variants", "sweep") for row in content["parts"][name][name] if "error" in row]
    assert "| caps | ok |" in out.with_suffix(".md").read_text()
    assert "tests collected" in (tmp_path / "gpu_parts" / "tests.log").read_text()


def test_the_gpu_suite_names_every_file_with_tests_for_a_gpu() -> None:
    command = [sys.executable, "-m", "pytest", "tests", "-m", "gpu", "--collect-only", "-q", "-p", "no:cacheprovider"]
    environment = os.environ | {"TRITON_INTERPRET": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=280)
    files = {line.partition("::")[0].removeprefix("tests/") for line in done.stdout.splitlines() if "::" in line}
    assert files == set(gpu_parts.TEST_FILES)


def test_failures_are_found_though_pytest_was_cut_off() -> None:
    progress = [
        "[gw1] [ 40%] PASSED tests/test_gpu.py::test_a",
        "[gw0] [ 50%] FAILED tests/test_gpu.py::test_b[bf16]",
        "tests/test_gpu.py::test_c FAILED                [ 60%]",
    ]
    assert gpu_parts.failures(progress) == progress[1:]
    closing = ["FAILED tests/test_gpu.py::test_b[bf16] - AssertionError", "1 failed, 1 passed in 3 s"]
    assert gpu_parts.failures([*progress, *closing]) == closing[:1]


def test_the_gpu_suite_leaves_out_loops_that_take_its_time() -> None:
    assert "naive" not in gpu_parts.left_out(Scan("s", 64, 8192), compilers=True)
    assert "131072 steps" in gpu_parts.left_out(Scan("s", 16, 131_072), compilers=True)["naive"]
    assert set(gpu_parts.left_out(SMALL, compilers=False)) == set(gpu_parts.COMPILED)


def test_the_commit_is_dirty_by_code_and_not_by_results(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    files = [tmp_path / name for name in ("bench/results/a.json", "docs/b.md", "code.py")]
    for file in files:
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text("before")
    identity = ["-c", "user.name=a", "-c", "user.email=a@example.com", "-c", "commit.gpgsign=false"]
    for command in (["init", "-q"], ["add", "."], [*identity, "commit", "-qm", "all"]):
        subprocess.run(["git", *command], cwd=tmp_path, check=True)
    monkeypatch.setattr(environment, "ROOT", tmp_path)
    clean = environment.commit()
    assert clean is not None
    assert len(clean) == 12
    for file, expected in zip(files, (clean, clean, f"{clean}-dirty"), strict=True):
        file.write_text("after")
        assert environment.commit() == expected


def test_a_part_that_breaks_leaves_the_others_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def run_part(name: str, dry_run: bool, seconds: float, folder: Path) -> dict[str, Any]:
        broken = {"status": "ended with code -11", "seconds": 1.0}
        return broken if name == "loss" else {"status": "ok", "seconds": 1.0, "results": []}

    monkeypatch.setattr(gpu_suite, "run_part", run_part)
    content = gpu_suite.run(True, list(gpu_suite.PARTS), tmp_path / "gpu.json", budget=100.0)
    assert content["parts"]["loss"]["status"].startswith("ended")
    assert content["parts"]["planner"]["status"] == "ok"
    assert "| loss | ended with code -11 | 1.0 |" in gpu_suite.summary(content)
    again = gpu_suite.run(True, ["scans"], tmp_path / "gpu.json", budget=100.0, commit="abc")
    assert again["parts"].keys() == content["parts"].keys(), "parts that did not run again are kept"
    assert again["parts"]["scans"]["commit"] == "abc" != again["parts"]["loss"]["commit"]


def test_the_page_is_what_the_results_say() -> None:
    assert page.PAGE.read_text() == page.page(page.RESULTS), "run python -m bench.page"


def test_inputs_of_scans_mask_a_suffix() -> None:
    mask = scan_inputs(Scan("s", 5, 20, ragged=True), CPU).mask
    assert mask is not None
    assert bool((mask[:, :-1] >= mask[:, 1:]).all())
    assert not bool(mask.all())


def test_the_table_of_split_heads_is_that_of_the_results() -> None:
    """Each of R processes holds about 1/R."""
    assert split_head.filled(split_head.PAGE.read_text()) == split_head.PAGE.read_text()
    rows = json.loads(split_head.OUTPUT.read_text())["rows"]
    alone = {row["way"]: row["peak_bytes"] for row in rows if row["ranks"] == 1}
    assert all(row["peak_bytes"] <= 1.1 * alone[row["way"]] / row["ranks"] for row in rows)


def test_the_page_of_the_sampled_gradient_is_that_of_the_results() -> None:
    """The model of a GPU stays at or below half of three products."""
    assert sampled_model.filled(sampled_model.PAGE.read_text()) == sampled_model.PAGE.read_text()
    _, total, three = sampled_model.model()
    assert total <= 0.5 * three
