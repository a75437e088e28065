"""docs/engines.md stays true: its Python runs (that for vLLM where vLLM is), its names and messages exist."""

from __future__ import annotations

import re
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

from klq_kernels.engines.vllm_server import COMMAND

pytestmark = pytest.mark.usefixtures("one_thread")
ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "engines.md").read_text()


def test_snippets_run(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Of that for vLLM without it, all but the run; that for a server is constructed."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    namespace: dict[str, Any] = {}
    local, _, own = snippets = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)
    if find_spec("vllm") is None:
        assert local.endswith("trainer.train()\n")
        snippets[0] = local.removesuffix("trainer.train()\n")
    for snippet in snippets:
        exec(compile(snippet, "docs/engines.md", "exec"), namespace)
        if snippet is not own and namespace["trainer"].state.global_step:
            namespace["trainer"].rollout_func.stop()
    drift = [logs["rollout/sampler_kl"] for logs in namespace["trainer"].state.log_history if "loss" in logs]
    assert len(drift) == 2
    assert max(drift) < 1e-9


def test_the_command_is_the_one_that_errors_name() -> None:
    assert " ".join(COMMAND.split()) in " ".join(PAGE.replace("\\\n", "").split())


def test_links_exist() -> None:
    for target in re.findall(r"\]\(([^)#]+)", PAGE):
        assert (ROOT / "docs" / target).exists(), target
