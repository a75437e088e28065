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

import pytest

pytest.importorskip("triton")
TESTS = Path(__file__).parents[1]
# Files, which of their tests, and how many there are at least. Whole passes take the machine minutes, so the loss is
# held to its contract in one of its types; every kernel's own tests run. Of a test's parameters every two values meet;
# ``make test-ptx`` runs all cases, as the interpreter does.
SUITES = {
    "kernels": ("kernels/test_kernels.py", "cpu", 130),
    "scans": ("core/test_returns.py", "triton-cpu and not long", 15),
    "logprobs": ("core/test_logprobs.py", "triton-cpu and not long", 20),
    "divergence": (
        "core/test_divergence.py",
        "triton-cpu and (forbidden or digits or precision_contract and large and dtype1 and capped)",
        6,
    ),
    "selected": ("core/test_selected.py", "triton-cpu and (precision_contract and large and dtype1 or nan)", 3),
    "loss": ("core/test_loss.py", "triton-cpu and precision_contract and double and (peaked or large)", 7),
    "sampled": (
        "core/test_sampled.py",
        "triton-cpu and (kept_entries and 131 and 0.7 or 16_bits or needed or finite)",
        15,
    ),
    "fp32 logits": ("core/test_logits_dtype.py", "triton-cpu and unrounded and dtype0 and not temperature", 2),
}


def on_the_machine(*arguments: str) -> subprocess.CompletedProcess[str]:
    """Python with these arguments, the machine's modules on its path."""
    paths = [str(TESTS / "ptx"), os.environ.get("PYTHONPATH")]
    environment = os.environ | {
        "HYPOTHESIS_PROFILE": "few",
        "KLQ_PTX": os.environ.get("KLQ_PTX", "90"),
        "KLQ_PTX_CASES": os.environ.get("KLQ_PTX_CASES", "pairs"),
        "PYTHONPATH": os.pathsep.join(path for path in paths if path),
    }
    for name in ("TRITON_INTERPRET", "PYTEST_XDIST_WORKER", "KLQ_BACKEND"):
        environment.pop(name, None)
    command = [sys.executable, *arguments]
    return subprocess.run(command, cwd=TESTS.parent, env=environment, capture_output=True, text=True, timeout=900)


@pytest.mark.lengthy
@pytest.mark.parametrize("suite", SUITES)
def test_compiled_kernels_pass_the_suite(suite: str) -> None:
    file, which, least = SUITES[suite]
    done = on_the_machine(
        "-m", "pytest", "-q", "-p", "machine_plugin", "-p", "no:cacheprovider", "-p", "no:xdist", str(TESTS / file),
        "-k", which,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
    passed = re.search(r"(\d+) passed", done.stdout)
    assert passed is not None
    assert int(passed.group(1)) >= least
    launched = re.search(r"PTX machine, sm_\d+: (\d+) launches of (\d+) compiled kernels.* (\d+) hazards", done.stdout)
    assert launched is not None
    assert int(launched.group(1)) > 0
    assert int(launched.group(3)) == 0


@pytest.mark.lengthy
def test_a_kernel_without_one_of_its_barriers_is_reported() -> None:
    done = on_the_machine(str(TESTS / "ptx" / "without_barriers.py"))
    assert done.returncode == 0, done.stdout + done.stderr
    assert re.search(r"[1-9]\d* barriers, each missed", done.stdout)
