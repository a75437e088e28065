"""The compiled kernels, executed without a GPU: what Triton compiles for one runs on the machine of tests/ptx.

The interpreter tests the kernels' source. This tests what the compiler made of it: layouts, shuffles, contraction of
products and sums, barriers. It knows nothing of ptxas, of time, or of programs that run at once.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import oldest_triton
import pytest

pytest.importorskip("triton")
TESTS = Path(__file__).parents[1]


class Suite(NamedTuple):
    """A file, which of its tests, how many there are at least, and which cases of each ``make test`` runs."""

    file: str
    which: str
    least: int
    cases: str = "pairs"


# Whole passes take the machine minutes, so the loss is held to its contract in one of its types; every kernel's own
# tests run. Of a test's parameters every two values meet, and in the matrix every value is met; ``make test-ptx`` runs
# all cases, as the interpreter does.
SUITES = {
    "kernels": Suite("kernels/test_kernels.py", "cpu", 130),
    "matrix": Suite("ptx/test_matrix.py", "test_", 15, "each"),
    "scans": Suite("core/test_returns.py", "triton-cpu and not long", 15),
    "logprobs": Suite("core/test_logprobs.py", "triton-cpu and not long", 20),
    "divergence": Suite(
        "core/test_divergence.py",
        "triton-cpu and (forbidden or digits or precision_contract and large and dtype1 and capped)",
        6,
    ),
    "selected": Suite("core/test_selected.py", "triton-cpu and (precision_contract and large and dtype1 or nan)", 3),
    "loss": Suite("core/test_loss.py", "triton-cpu and precision_contract and double and (peaked or large)", 7),
    "sampled": Suite(
        "core/test_sampled.py",
        "triton-cpu and (kept_entries and 131 and 0.7 or 16_bits or needed or finite)",
        15,
    ),
    "fp32 logits": Suite("core/test_logits_dtype.py", "triton-cpu and unrounded and dtype0 and not temperature", 2),
}
# A case of each kernel but for those of what is not finite, which are no other kernels.
ON_THE_OLDEST = Suite("kernels/test_kernels.py", "cpu and not (impossible or forbidden or finite or fused)", 15, "one")


def on_the_machine(*arguments: str, cases: str = "pairs", oldest: bool = False) -> subprocess.CompletedProcess[str]:
    """Python with these arguments, the machine's modules on its path; on the lowest Triton that is declared, if asked
    (``KLQ_PTX_OLDEST=1`` asks always).
    """
    oldest = oldest or os.environ.get("KLQ_PTX_OLDEST") == "1"
    paths = [str(oldest_triton.FOLDER) if oldest else None, str(TESTS / "ptx"), os.environ.get("PYTHONPATH")]
    environment = os.environ | {
        "HYPOTHESIS_PROFILE": "few",
        "KLQ_PTX": os.environ.get("KLQ_PTX", "90"),
        "KLQ_PTX_CASES": os.environ.get("KLQ_PTX_CASES", cases),
        "PYTHONPATH": os.pathsep.join(path for path in paths if path),
    }
    for name in ("TRITON_INTERPRET", "PYTEST_XDIST_WORKER", "KLQ_BACKEND"):
        environment.pop(name, None)
    command = [sys.executable, *arguments]
    return subprocess.run(command, cwd=TESTS.parent, env=environment, capture_output=True, text=True, timeout=3600)


def passes(suite: Suite, *, oldest: bool = False) -> str:
    """Runs a suite on the machine; the version of Triton that compiled its kernels."""
    done = on_the_machine(
        "-m", "pytest", "-q", "-p", "machine_plugin", "-p", "no:cacheprovider", "-p", "no:xdist",
        str(TESTS / suite.file), "-k", suite.which, cases=suite.cases, oldest=oldest,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
    passed = re.search(r"(\d+) passed", done.stdout)
    assert passed is not None
    assert int(passed.group(1)) >= suite.least
    launched = re.search(
        r"PTX machine, sm_\d+, Triton (\S+): (\d+) launches of (\d+) compiled kernels.* (\d+) hazards", done.stdout
    )
    assert launched is not None
    assert int(launched.group(2)) > 0
    assert int(launched.group(4)) == 0
    return launched.group(1)


@pytest.mark.lengthy
@pytest.mark.timeout(3600)  # of all cases
@pytest.mark.parametrize("suite", SUITES)
def test_compiled_kernels_pass_the_suite(suite: str) -> None:
    passes(SUITES[suite])


@pytest.mark.lengthy
@oldest_triton.needed
def test_what_the_oldest_triton_compiles_passes_too() -> None:
    assert passes(ON_THE_OLDEST, oldest=True).startswith(oldest_triton.version())


@pytest.mark.lengthy
def test_a_kernel_without_one_of_its_barriers_is_reported() -> None:
    done = on_the_machine(str(TESTS / "ptx" / "without_barriers.py"))
    assert done.returncode == 0, done.stdout + done.stderr
    assert re.search(r"[1-9]\d* barriers, each missed", done.stdout)
