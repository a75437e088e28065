"""The compiled kernels stay within their recorded resources on every target, without a GPU."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from importlib import import_module
from pathlib import Path

import oldest_triton
import pytest

pytest.importorskip("triton")

from bench import static_gate
from bench.static_gate import Report

ROOT = Path(__file__).parents[2]
RECORD = json.loads(static_gate.RECORD.read_text())
# What these sources and this compiler gave, they give again: then make test compiles a sample.
slow_where_on_record = pytest.mark.slow if static_gate.is_current(RECORD) else lambda test: test
GOOD = Report(registers=64, stack=0, shared=1024, wide_accesses=8, issue_slots=6.0, special_functions=1.125)


@slow_where_on_record
@pytest.mark.timeout(1200)
def test_every_kernel_compiles_within_its_record() -> None:
    """No stack, 16-byte accesses, within budget, nothing worse than recorded: on sm_90, and, where a kernel or the
    compiler is another than that of the record, on sm_80, sm_100 and gfx942 too.
    """
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "bench.static_gate", "--check", "--spot"]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert " 0 complaints" in done.stdout


def test_a_variant_of_each_kernel_compiles_within_its_record() -> None:
    """The last of each, in which most is present, on sm_90."""
    recorded, target = RECORD["targets"]["sm_90"], static_gate.TARGETS["sm_90"]
    for variant in {variant.kernel: variant for variant in static_gate.variants()}.values():
        report = static_gate.inspect(variant, target)
        assert static_gate.broken_rules(variant, "sm_90", report) == []
        if static_gate.recorded_compiler():
            assert static_gate.regressions(variant.name, report, recorded[variant.name]) == []


@pytest.mark.slow
@pytest.mark.timeout(1200)
@oldest_triton.needed
def test_every_kernel_compiles_on_the_oldest_triton() -> None:
    """The lowest version that pyproject.toml declares, by the rules that hold whatever is on record."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = str(oldest_triton.FOLDER)
    command = [sys.executable, "-m", "bench.static_gate", "--check", "--targets", "sm_90"]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"this is {oldest_triton.version()}" in done.stdout


def test_the_record_covers_every_variant() -> None:
    if RECORD["triton"] == static_gate.triton.__version__:
        assert static_gate.is_current(RECORD), "a kernel has changed: python -m bench.static_gate --write"
    names = {variant.name for variant in static_gate.variants()}
    assert set(RECORD["targets"]) == set(static_gate.TARGETS)
    assert all(set(rows) == names for rows in RECORD["targets"].values())


def variant(name: str) -> static_gate.Variant:
    return next(v for v in static_gate.variants() if v.name == name)


@pytest.mark.parametrize("name", ["reverse_scan_kernel", "lambda_errors_kernel"])
def test_a_scan_over_one_sequence_is_the_kernel_over_many(name: str) -> None:
    """Triton's launcher would make constants of counts that are 1, which Triton 3.6 cannot compile."""
    kernel = getattr(import_module("klq_kernels.backends.triton.scans"), name)
    counts = {p.name for p in kernel.params if not p.is_constexpr and p.do_not_specialize}
    assert counts == {"n", "batch", "first_row"} & set(kernel.arg_names)


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ({"stack": 8}, "stack"),
        ({"wide_accesses": 0}, "16-byte"),
        ({"issue_slots": 16.5}, "instructions per logit"),
        ({"special_functions": 2.5}, "special functions"),
    ],
)
def test_a_broken_rule_is_found(change: dict[str, float], complaint: str) -> None:
    kernel = variant("row_stats[bf16]")
    assert static_gate.broken_rules(kernel, "sm_90", GOOD) == []
    [found] = static_gate.broken_rules(kernel, "sm_90", GOOD._replace(**change))
    assert complaint in found


@pytest.mark.parametrize(
    "change", [{"registers": 80}, {"stack": 8}, {"shared": 2048}, {"wide_accesses": 4}, {"issue_slots": 7.0}]
)
def test_a_regression_is_found(change: dict[str, float]) -> None:
    recorded = GOOD._asdict()
    assert static_gate.regressions("kernel", GOOD, recorded) == []
    assert len(static_gate.regressions("kernel", GOOD._replace(**change), recorded)) == 1
    assert static_gate.regressions("kernel", GOOD, None) != []


def test_the_inner_loop_is_found_in_a_listing() -> None:
    listing = """
    /*0000*/ MOV R1, R2 ;
.L_x_1:
    /*0010*/ FADD R1, R1, R2 ;
    /*0020*/ MUFU.EX2 R3, R1 ;
    /*0030*/ @P0 BRA `(.L_x_1) ;
    /*0040*/ @P1 BRA `(.L_x_2) ;
.L_x_2:
    /*0050*/ EXIT ;
"""
    [loop] = static_gate.loops(listing)
    assert len(loop) == 3
    assert sum("MUFU" in line for line in loop) == 1
