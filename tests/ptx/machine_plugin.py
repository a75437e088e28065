"""pytest -p machine_plugin: the project's own tests, their Triton kernels compiled and run on the PTX machine.

    KLQ_PTX=90 PYTHONPATH=tests/ptx python -m pytest -p machine_plugin tests/kernels/test_kernels.py

Kernels are imported as compiled ones first; only then does TRITON_INTERPRET=1 tell the tests, and the choice of
backends, that Triton serves CPU tensors.

``KLQ_PTX_CASES=pairs`` leaves out cases of tests of many parameters: those that stay show every two values together.
"""

from __future__ import annotations

import importlib
import itertools
import os
import tempfile
from collections import defaultdict

import pytest
import torch

assert "TRITON_INTERPRET" not in os.environ
os.environ.setdefault("TRITON_CACHE_DIR", os.path.join(tempfile.gettempdir(), "klq-ptx-cache"))
os.environ.setdefault("TRITON_DISABLE_LINE_INFO", "1")  # the same instructions, in less time
os.environ.setdefault("KLQ_PTX", "90")
importlib.import_module("klq_kernels.backends.triton")
device = importlib.import_module("device")
device.install(int(os.environ["KLQ_PTX"]))
os.environ["TRITON_INTERPRET"] = "1"
torch.set_num_threads(1)


def pairs(item: pytest.Item) -> set[tuple[str, ...]]:
    """The test's parameters with their values, by two (of a single one: by itself)."""
    call = getattr(item, "callspec", None)
    values = [] if call is None else sorted(f"{name}={value!r}" for name, value in call.params.items())
    return set(itertools.combinations(values, min(len(values), 2)))


def covering(items: list[pytest.Item]) -> list[pytest.Item]:
    """Some of one test's cases: each next one has the most pairs that those before it lack, until none is left."""
    missing: set[tuple[str, ...]] = set().union(*map(pairs, items))
    chosen = []
    while missing:
        best = max(items, key=lambda item: len(pairs(item) & missing))
        missing -= pairs(best)
        chosen.append(best)
    return chosen


@pytest.hookimpl(trylast=True)  # after -k
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if os.environ.get("KLQ_PTX_CASES", "all") != "pairs":
        return
    of_test = defaultdict(list)
    for item in items:
        of_test[item.nodeid.partition("[")[0]].append(item)
    kept = {item for cases in of_test.values() for item in covering(cases)}
    config.hook.pytest_deselected(items=[item for item in items if item not in kept])
    items[:] = [item for item in items if item in kept]


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    state = device.STATE
    terminalreporter.write_line(
        f"PTX machine, sm_{state['arch']}: {state['launches']} launches of {len(state['kernels'])} compiled kernels, "
        f"{state['instructions']:.0f} instructions, {state['diverged']} divergent branches, "
        f"{sum(state['hazards'].values())} hazards"
    )
