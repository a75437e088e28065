"""Jobs side by side: one process each, a few at a time, each on one thread.

The processes are forked from one that has imported everything, so a job starts at once and nothing of one is left to
the next. What a job prints goes to a log beside its result, which is kept where the job failed. A job ends with the
program that started it, however that ends.
"""

from __future__ import annotations

import multiprocessing
import os
import sys
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import Any

from .spec import Job


def run_all(jobs: list[Job], folder: Path, warm: Path, workers: int, advance: Callable[[], None]) -> None:
    """Runs jobs, ``workers`` at a time, each into ``folder / NAME.json``; calls ``advance`` after each.

    Raises:
        RuntimeError: where a job failed, with the last line it printed. The others that were running have finished.
    """
    folder.mkdir(parents=True, exist_ok=True)
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["klq_kernels.lab.experiments.job"])
    with ThreadPoolExecutor(workers) as threads:
        futures = [threads.submit(in_a_process, context, job, folder, warm) for job in jobs]
        try:
            for future in as_completed(futures):
                future.result()
                advance()
        except BaseException:  # also Ctrl-C: what has not begun does not begin
            threads.shutdown(wait=False, cancel_futures=True)
            raise


def in_a_process(context: Any, job: Job, folder: Path, warm: Path) -> None:
    log = folder / f"{job.name}.log"
    process = context.Process(target=logged, args=(job, folder / f"{job.name}.json", warm, log))
    process.start()
    process.join()
    if process.exitcode != 0:
        last = (log.read_text().strip().splitlines() or ["no output"])[-1] if log.exists() else "no output"
        raise RuntimeError(f"job {job.name} failed: {last} (see {log})")
    log.unlink()


def logged(job: Job, path: Path, warm: Path, log: Path) -> None:
    """The job with all that it prints in a file."""
    with open(log, "w") as file:
        os.dup2(file.fileno(), sys.stdout.fileno())
        os.dup2(file.fileno(), sys.stderr.fileno())
    threading.Thread(target=end_with_parent, daemon=True).start()
    from .job import run_job

    run_job(job, path, warm)


def end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)
