"""docs/hosts.md stays true: its Python runs where the host is installed, its names and links exist."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

PAGE = (Path(__file__).parents[2] / "docs" / "hosts.md").read_text()
SNIPPETS = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize("snippet", SNIPPETS, ids=lambda snippet: re.findall(r"integrations\.(\w+)", snippet)[0])
def test_a_snippet_runs(snippet: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    if "import trl" in snippet or "from trl" in snippet:
        pytest.importorskip("trl", reason="TRL is not installed (make test-hosts runs this with it)")
    monkeypatch.chdir(tmp_path)
    exec(compile(snippet, "docs/hosts.md", "exec"), {})


def test_every_function_of_the_table_exists() -> None:
    from klq_kernels.integrations import nemo_rl, prime_rl, skyrl, slime, trl, verl

    functions = (
        trl.patch_trl, verl.register_verl, skyrl.register_skyrl, slime.klq_functions, prime_rl.klq_loss_function,
        nemo_rl.klq_loss_fn,
    )  # fmt: skip
    rows = [line for line in PAGE.splitlines() if line.startswith("| ") and "`" in line.split("|")[2]]
    named = [re.findall(r"`(\w+)", row)[0] for row in rows]
    assert named[: len(functions)] == [function.__name__ for function in functions]
