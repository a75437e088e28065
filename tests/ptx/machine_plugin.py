"""pytest -p machine_plugin: the project's own tests, their Triton kernels compiled and run on the PTX machine.

    KLQ_PTX=90 PYTHONPATH=tests/ptx python -m pytest -p machine_plugin tests/kernels/test_kernels.py

Kernels are imported as compiled ones first; only then does TRITON_INTERPRET=1 tell the tests, and the choice of
backends, that Triton serves CPU tensors.

``KLQ_PTX_CASES=pairs`` leaves out cases of tests of many parameters: those that stay show every two values together.
``each`` leaves fewer, that show every value, and ``one`` the last case of each test, in which most is present.
"""

from __future__ import annotations

import importlib
import itertools
import os
import tempfile
from collections import defaultdict
from collections.abc import Callable

import pytest
import torch
import triton

assert "TRITON_INTERPRET" not in os.environ
os.environ.setdefault("TRITON_CACHE_DIR", os.path.join(tempfile.gettempdir(), "klq-ptx-cache"))
os.environ.setdefault("TRITON_DISABLE_LINE_INFO", "1")  # the same instructions, in less time
os.environ.setdefault("KLQ_PTX", "90")
importlib.import_module("klq_kernels.backends.triton")
device = importlib.import_module("device")
device.install(int(os.environ["KLQ_PTX"]))
os.environ["TRITON_INTERPRET"] = "1"
torch.set_num_threads(1)


def values(item: pytest.Item, together: int) -> set[tuple[str, ...]]:
    """The test's parameters with their values, by so many together (or by as many as there are)."""
    call = getattr(item, "callspec", None)
    each = [] if call is None else sorted(f"{name}={value!r}" for name, value in call.params.items())
    return set(itertools.combinations(each, min(len(each), together)))


def covering(items: list[pytest.Item], together: int) -> list[pytest.Item]:
    """Some of one test's cases. Each next one has the most of the values, by so many together, that those before it
    lack; of equals, the most new pairs. Until none is lacking.
    """
    pairs: set[tuple[str, ...]] = set()
    missing: set[tuple[str, ...]] = set().union(*(values(item, together) for item in items))
    chosen = []
    while missing:
        best = max(items, key=lambda item: (len(values(item, together) & missing), len(values(item, 2) - pairs)))
        missing -= values(best, together)
        pairs |= values(best, 2)
        chosen.append(best)
    return chosen


CHOICES: dict[str, Callable[[list[pytest.Item]], list[pytest.Item]]] = {
    "all": lambda cases: cases,
    "pairs": lambda cases: covering(cases, 2),
    "each": lambda cases: covering(cases, 1),
    "one": lambda cases: cases[-1:],
}


@pytest.hookimpl(trylast=True)  # after -k
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    choose = CHOICES[os.environ.get("KLQ_PTX_CASES", "all")]
    of_test = defaultdict(list)
    for item in items:
        of_test[item.nodeid.partition("[")[0]].append(item)
    kept = {item for cases in of_test.values() for item in choose(cases)}
    config.hook.pytest_deselected(items=[item for item in items if item not in kept])
    items[:] = [item for item in items if item in kept]


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    state = device.STATE
    terminalreporter.write_line(
        f"PTX machine, sm_{state['arch']}, Triton {triton.__version__}: "
        f"{state['launches']} launches of {len(state['kernels'])} compiled kernels, "
        f"{state['instructions']:.0f} instructions, {state['diverged']} divergent branches, "
        f"{sum(state['hazards'].values())} hazards"
    )
