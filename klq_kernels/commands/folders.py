"""Whether a command can write where it is told to: asked before its work, which may take hours."""

from __future__ import annotations

import tempfile
from pathlib import Path


def usable_folder(option: str, folder: Path) -> None:
    """Makes the folder, where there is none, and writes a file into it that is gone at once.

    Raises:
        ValueError: naming the option, where that cannot be done.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise ValueError(f"{option}: cannot write into {folder} as a folder: {error.strerror}") from error


def usable_file(option: str, file: Path | None) -> None:
    """``usable_folder`` of the folder that a file is to be written into; the file itself is left as it is."""
    if file is not None:
        if file.is_dir():
            raise ValueError(f"{option}: {file} is a folder; name a file in it")
        usable_folder(option, file.parent)
