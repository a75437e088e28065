"""The lowest Triton that pyproject.toml declares: the Makefile installs it in a folder of its own."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / ".venv" / "oldest-triton"
needed = pytest.mark.skipif(not FOLDER.exists(), reason=f"the Makefile installs the oldest Triton in {FOLDER}")


def version() -> str:
    """The lowest version that is declared."""
    lowest = re.search(r'"triton>=([\d.]+)', (ROOT / "pyproject.toml").read_text())
    assert lowest is not None
    return lowest.group(1)
