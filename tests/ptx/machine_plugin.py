"""pytest -p machine_plugin: the project's own tests, their Triton kernels compiled and run on the PTX machine.

    KLQ_PTX=90 PYTHONPATH=tests/ptx python -m pytest -p machine_plugin tests/kernels/test_kernels.py

Kernels are imported as compiled ones first; only then does TRITON_INTERPRET=1 tell the tests, and the choice of
backends, that Triton serves CPU tensors.
"""

from __future__ import annotations

import importlib
import os
import tempfile

import pytest
import torch

assert "TRITON_INTERPRET" not in os.environ
os.environ.setdefault("TRITON_CACHE_DIR", os.path.join(tempfile.gettempdir(), "klq-ptx-cache"))
os.environ.setdefault("KLQ_PTX", "90")
importlib.import_module("klq_kernels.backends.triton")
device = importlib.import_module("device")
device.install(int(os.environ["KLQ_PTX"]))
os.environ["TRITON_INTERPRET"] = "1"
torch.set_num_threads(1)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    state = device.STATE
    terminalreporter.write_line(
        f"PTX machine, sm_{state['arch']}: {state['launches']} launches of {len(state['kernels'])} compiled kernels, "
        f"{state['instructions']:.0f} instructions, {state['diverged']} divergent branches, "
        f"{sum(state['hazards'].values())} hazards"
    )
