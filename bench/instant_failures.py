"""A pytest plugin: prints each failure with its traceback at once, so that a run cut short has told what it found."""

from __future__ import annotations

import sys

import pytest


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    if report.failed:
        print(f"\nFAILURE {report.nodeid} ({report.when})\n{report.longreprtext}\n", file=sys.stdout, flush=True)
