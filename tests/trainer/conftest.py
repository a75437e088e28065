"""Fixtures of the trainer's tests."""

from __future__ import annotations

import material as files
import pytest


@pytest.fixture(scope="session")
def material(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Flags that name a tiny model, its prompts and a reward."""
    return files.flags(tmp_path_factory.mktemp("material"))
