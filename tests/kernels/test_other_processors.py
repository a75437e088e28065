"""The parts of the suite that rest on products and kernels, as another processor would run them.

The libraries take their instruction sets from the environment: MKL and oneDNN compute the matrix products, ATen
PyTorch's own kernels, and ``KLQ_NATIVE_ISA`` names ours. Each setting runs in a process of its own.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

TESTS = Path(__file__).parents[1]
CPU_INFO = Path("/proc/cpuinfo")
SETTINGS = {
    "any x86": {"MKL_CBWR": "COMPATIBLE", "ATEN_CPU_CAPABILITY": "default", "KLQ_NATIVE_ISA": "portable"},
    "AVX2 alone": {
        "MKL_ENABLE_INSTRUCTIONS": "AVX2", "ONEDNN_MAX_CPU_ISA": "AVX2", "ATEN_CPU_CAPABILITY": "avx2",
        "KLQ_NATIVE_ISA": "avx2",
    },
    "one thread": {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "ONEDNN_MAX_CPU_ISA": "DEFAULT"},
    # which sleep where they wait: a core that another process uses too would be spent on looking whether it is free
    "two threads": {"OMP_NUM_THREADS": "2", "MKL_NUM_THREADS": "2", "OMP_WAIT_POLICY": "passive"},
    "no extension": {"KLQ_NATIVE_LIBRARY": "/nowhere/_native.so"},
}  # fmt: skip
FILES = ("core/test_loss.py", "core/test_logprobs.py", "core/test_logits_dtype.py", "kernels/test_vocabulary_major.py")
# what depends on products; of the many cases of the precision contract those of one loss
CHOSEN = "not cuda and (precision and l2 or precise or likely or packing or scoring or unrounded or switches)"


@pytest.mark.lengthy
# one thread is what make test gives each of its processes anyway
@pytest.mark.parametrize("setting", [pytest.param(s, marks=[pytest.mark.slow] * (s == "one thread")) for s in SETTINGS])
def test_on_another_processor(setting: str) -> None:
    if setting == "AVX2 alone" and not (CPU_INFO.exists() and "avx2" in CPU_INFO.read_text()):
        pytest.skip("this processor has no AVX2")
    environment = {**os.environ, "HYPOTHESIS_PROFILE": "few", **SETTINGS[setting]}
    environment.pop("PYTEST_XDIST_WORKER", None)
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "no:xdist"]
    command += ["-k", CHOSEN, *(str(TESTS / name) for name in FILES)]
    done = subprocess.run(command, cwd=TESTS.parent, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
    passed = re.search(r"(\d+) passed", done.stdout)
    assert passed is not None
    assert int(passed.group(1)) > 40
    ran = re.search(r"(\d+) skipped", done.stdout)
    assert (ran is not None) == (setting == "no extension"), "the extension is left out there, and only there"
