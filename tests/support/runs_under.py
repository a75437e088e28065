"""The table of what runs under which engine, read from the tests that show it: python tests/support/runs_under.py.

A test says so by ``@pytest.mark.runs("FSDP2", "trainer")``, one line for each engine. The script writes the table into
docs/many-processes.md; ``test_docs`` holds the page to it.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

from klq_kernels.lab.display import with_text

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "many-processes.md"
ENGINES = (
    "one process", "DDP", "FSDP2", "HSDP", "ZeRO-1", "ZeRO-2", "ZeRO-3", "tensor parallel",
    "FSDP2 x tensor parallel", "context parallel",
)  # fmt: skip
FEATURES = (
    "loss", "sampled gradient", "log-probabilities", "scans, targets", "trainer", "trainer, LoRA",
    "trainer, sampled gradient", "resume",
)  # fmt: skip


def shown() -> dict[tuple[str, str], list[str]]:
    """The tests that show (engine, feature), as ``file::name``."""
    found: dict[tuple[str, str], list[str]] = {}
    for file in sorted((ROOT / "tests").rglob("test_*.py")):
        for test, (engine, *features) in _marks(ast.parse(file.read_text())):
            for feature in features:
                if engine not in ENGINES or feature not in FEATURES:
                    raise ValueError(f"{file.name}::{test}: {engine!r}, {feature!r} is not in the table")
                found.setdefault((engine, feature), []).append(f"{file.name}::{test}")
    return found


def _marks(tree: ast.Module) -> Iterator[tuple[str, list[str]]]:
    for node in tree.body:
        for mark in node.decorator_list if isinstance(node, ast.FunctionDef) else []:
            if isinstance(mark, ast.Call) and ast.unparse(mark.func) == "pytest.mark.runs":
                yield node.name, [ast.literal_eval(argument) for argument in mark.args]


def table() -> str:
    """Markdown: a row for each engine, a column for each feature."""
    tests = shown()
    lines = [["", *FEATURES], ["---", *(":-:" for _ in FEATURES)]]
    lines += [[engine, *("yes" if (engine, feature) in tests else "" for feature in FEATURES)] for engine in ENGINES]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def page() -> str:
    """docs/many-processes.md with the table as the tests have it."""
    return with_text(PAGE.read_text(), "runs", table())


if __name__ == "__main__":
    PAGE.write_text(page())
