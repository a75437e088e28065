"""One suite for every backend: a test that asks for ``place`` (or ``device``) runs once per backend and device.

    pytest                 torch and, where it is built, native on the CPU
    pytest -m gpu          the same tests on a GPU: the Triton kernels, and plain PyTorch

A place that this machine does not have skips its tests and says why.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import NamedTuple

import pytest
import torch
from hypothesis import HealthCheck, settings

from klq_kernels import backends

settings.register_profile(
    "default",
    deadline=None,
    derandomize=True,  # the same examples on every machine; HYPOTHESIS_PROFILE=search looks for new ones
    max_examples=30,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
settings.register_profile("few", settings.get_profile("default"), max_examples=5)  # where each takes long
settings.register_profile("search", settings.get_profile("default"), derandomize=False, max_examples=500)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "default"))


# Without a GPU the kernels run interpreted, in a process of their own (kernels/test_interpreter.py).
INTERPRETED = os.environ.get("TRITON_INTERPRET", "0") == "1"
collect_ignore = [] if torch.cuda.is_available() or INTERPRETED else ["kernels/test_kernels.py"]
if "KLQ_PTX" not in os.environ:  # kernels/test_ptx.py starts it
    collect_ignore.append("ptx/test_matrix.py")
LEFT_OUT = pytest.StashKey[int]()


class Place(NamedTuple):
    """A backend and the device its tensors live on."""

    backend: str
    device: torch.device

    def why_absent(self) -> str | None:
        if self.device.type == "cuda" and not torch.cuda.is_available():
            return "no GPU here"
        if self.backend not in backends.BACKENDS:
            return f"there is no {self.backend} backend"
        return backends.why_unavailable(self.backend)


PLACES = [
    Place("torch", torch.device("cpu")),
    Place("native", torch.device("cpu")),
    Place("triton", torch.device("cuda")),
    Place("torch", torch.device("cuda")),
    *([Place("triton", torch.device("cpu"))] if INTERPRETED else []),
]


def _parameter(place: Place) -> object:
    marks = [pytest.mark.gpu] if place.device.type == "cuda" else []
    return pytest.param(place, id=f"{place.backend}-{place.device}", marks=marks)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """The lengthy tests come first, so that no process is left with one of them alone when the others have ended.

    Without a GPU its tests are left out in one line, unless they were asked for (then each says why it skips).
    """
    items.sort(key=lambda item: item.get_closest_marker("lengthy") is None)
    if torch.cuda.is_available() or "gpu" in config.option.markexpr:
        return
    left_out = [item for item in items if item.get_closest_marker("gpu")]
    items[:] = [item for item in items if not item.get_closest_marker("gpu")]
    config.hook.pytest_deselected(items=left_out)
    config.stash[LEFT_OUT] = len(left_out)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    if config.stash.get(LEFT_OUT, 0):
        terminalreporter.write_line(f"{config.stash[LEFT_OUT]} tests need a GPU and were left out: there is none here")


@pytest.fixture(params=[_parameter(place) for place in PLACES])
def place(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Place:
    """Makes the library use one backend, or skips where it is not to be had."""
    reason = request.param.why_absent()
    if reason is not None:
        pytest.skip(f"{request.param.backend} on {request.param.device.type}: {reason}")
    monkeypatch.setenv("KLQ_BACKEND", request.param.backend)
    return request.param


@pytest.fixture
def device(place: Place) -> torch.device:
    return place.device


@pytest.fixture
def backend(place: Place) -> str:
    return place.backend


@pytest.fixture(scope="module")
def one_thread() -> Iterator[None]:
    """For tests of tiny models, which are slower on two threads; and sums are then the same everywhere."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def poisoned() -> Iterator[None]:
    """Fills every fresh buffer with NaN (or the largest integer), so that an element nobody writes is seen."""
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)  # what switches fill_uninitialized_memory on
    assert torch.empty(1).isnan().all()
    yield
    torch.use_deterministic_algorithms(before[0], warn_only=before[1])
