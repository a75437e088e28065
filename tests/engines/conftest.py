"""Servers that run a stand-in for vLLM."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import tiny
from stand_in import Server


@pytest.fixture(scope="session")
def served(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of the model that servers serve."""
    folder = tmp_path_factory.mktemp("served")
    tiny.model(seed=5).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def start_server(served: Path) -> Iterator[Callable[[], Server]]:
    started: list[Server] = []

    def start() -> Server:
        started.append(Server(served))
        return started[-1]

    yield start
    for one in started:
        one.kill()


@pytest.fixture(scope="module")
def only_server(start_server: Callable[[], Server]) -> Server:
    return start_server()


@pytest.fixture
def server(only_server: Server) -> Server:
    """A server that has not been given weights, and makes no trouble."""
    only_server.fault(restart=True)
    return only_server
