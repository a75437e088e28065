"""The host's part of a call on the GPU path: how many of PyTorch's operators it runs. Its time is on record alone."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

from bench import host_profile
from bench.environment import ROOT

pytest.importorskip("triton")


def test_a_call_runs_few_operators() -> None:
    environment = {name: value for name, value in os.environ.items() if name not in ("TRITON_INTERPRET", "KLQ_BACKEND")}
    code = "import json; from bench import host_profile as h; h.CALLS = 1; print(json.dumps(h.measure()['calls']))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout.splitlines()[-1])
    recorded = json.loads(host_profile.RESULT.read_text())["calls"]
    for now, then in zip(found, recorded, strict=True):
        assert now["call"] == then["call"]
        assert now["working"] <= then["working"]
        assert now["operators"] <= then["operators"], "run python -m bench.host_profile --write"
    assert found[0]["operators"] <= host_profile.MOST_OPERATORS
