"""Processes that form a torch.distributed group over gloo, started once, which run functions for tests."""

from __future__ import annotations

import os
import traceback
from collections.abc import Callable
from contextlib import suppress
from datetime import timedelta
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

TIMEOUT = timedelta(seconds=60)


class Ranks:
    """``most`` processes, of which a call uses the first few. The functions must be importable by name."""

    def __init__(self, most: int, folder: Path, timeout: timedelta = TIMEOUT) -> None:
        context = mp.get_context("spawn")
        ends = [context.Pipe() for _ in range(most)]
        self._connections = [ours for ours, _ in ends]
        self._processes = [
            context.Process(target=_serve, args=(rank, most, str(folder / "store"), timeout, theirs), daemon=True)
            for rank, (_, theirs) in enumerate(ends)
        ]
        for process in self._processes:
            process.start()
        for _, theirs in ends:
            theirs.close()  # so that a rank's death closes its pipe

    def run(self, size: int, function: Callable[..., Any], *arguments: Any) -> list[Any]:
        """``function(group, *arguments)`` on each of ``size`` ranks; the results, or what a rank raised is raised."""
        found = self.outcomes(size, function, *arguments)
        failed = {rank: text for rank, (well, text) in enumerate(found) if not well}
        assert not failed, "\n".join(f"rank {rank}:\n{text}" for rank, text in failed.items())
        return [result for _, result in found]

    def outcomes(self, size: int, function: Callable[..., Any], *arguments: Any) -> list[tuple[bool, Any]]:
        """Of each rank: (True, its result), or (False, the traceback, or that it died)."""
        for connection in self._connections[:size]:
            connection.send((size, function, arguments))
        return [_answer(connection) for connection in self._connections[:size]]

    def close(self) -> None:
        for connection in self._connections:
            with suppress(BrokenPipeError):
                connection.send(None)
        for process in self._processes:
            process.join(timeout=10)


def _answer(connection: Connection) -> tuple[bool, Any]:
    try:
        answer: tuple[bool, Any] = connection.recv()
    except EOFError:
        return False, "died"
    return answer


def _serve(rank: int, most: int, store: str, timeout: timedelta, connection: Connection) -> None:
    torch.set_num_threads(1)
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=most, timeout=TIMEOUT)
    groups = {size: dist.new_group(list(range(size)), timeout=timeout) for size in range(1, most + 1)}
    while (order := connection.recv()) is not None:
        size, function, arguments = order
        try:
            connection.send((True, function(groups[size], *arguments)))
        except Exception:
            connection.send((False, traceback.format_exc()))
    dist.destroy_process_group()
