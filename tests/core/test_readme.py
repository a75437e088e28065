"""The README and the guide to the trainer stay true: their Python runs, their commands and links exist."""

from __future__ import annotations

import re
import shlex
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text()


def blocks(language: str, text: str = README) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", text, re.DOTALL)


def assert_learns(trainer: Any) -> None:
    """The run moved, and its rewards rose over those of the first cycle, which nothing has been learnt for."""
    logs = [logs for logs in trainer.state.log_history if "objective/scores" in logs]
    assert all(log["loss"] > 0 for log in logs)
    first, *scores = (log["objective/scores"] for log in logs)
    third = len(scores) // 3
    assert sum(scores[-third:]) / third > first + 0.03, (first, scores)


def test_python_snippets_run_in_order(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)  # one of them trains and saves
    namespace: dict[str, object] = {}
    snippets = blocks("python")
    assert len(snippets) >= 4
    for snippet in snippets:
        exec(compile(snippet, "README.md", "exec"), namespace)
    assert "'loss'" in capsys.readouterr().out
    assert_learns(namespace["trainer"])


def test_the_trainers_guide_runs(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    namespace: dict[str, object] = {}
    snippets = blocks("python", (ROOT / "docs" / "trainer.md").read_text())
    assert len(snippets) == 4
    for number, snippet in enumerate(snippets):
        exec(compile(snippet, "docs/trainer.md", "exec"), namespace)
        if number == 0:
            assert_learns(namespace["trainer"])


def test_the_guide_to_guidance_runs(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    namespace: dict[str, Any] = {}
    snippets = blocks("python", (ROOT / "docs" / "guidance.md").read_text())
    assert len(snippets) == 2
    for snippet in snippets:
        exec(compile(snippet, "docs/guidance.md", "exec"), namespace)
    found = namespace["trainer"].state.log_history[-1]
    assert found["eval_reward"] > found["eval_ref_reward"]
    nats = re.findall(r"eta \S+: (\S+) nats", capsys.readouterr().out)
    assert sorted(nats, key=float) == nats


@pytest.mark.slow
def test_the_page_of_relatives_runs(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    namespace: dict[str, Any] = {}
    snippets = blocks("python", (ROOT / "docs" / "relatives.md").read_text())
    assert len(snippets) == 3
    trainers = []
    for snippet in snippets:
        exec(compile(snippet, "docs/relatives.md", "exec"), namespace)
        trainers.append(namespace["trainer"])
    assert_learns(trainers[0])
    assert not trainers[1].args.learns_values
    explained = [logs["val/explained_variance"] for logs in trainers[1].state.log_history if "lam" in logs]
    assert sum(explained) / len(explained) > 0.05
    held_out = [logs["eval_rewards/accuracies"] for logs in trainers[2].state.log_history if "eval_loss" in logs]
    assert held_out[-1] > 0.9
    assert "eval_loss" in capsys.readouterr().out


def test_shell_commands_exist() -> None:
    """Every command line starts something this project provides; make targets and klq commands are looked up."""
    from typer.testing import CliRunner

    from klq_kernels.commands.cli import app

    targets = set(re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    lines = [line for block in blocks("bash") for line in block.splitlines() if line.strip()]
    lines += [code for code in re.findall(r"`([^`\n]+)`", README) if code.startswith(("make ", "klq "))]
    assert lines
    for line in lines:
        program, *arguments = shlex.split(line, comments=True)
        if program == "make":
            assert arguments[0] in targets, line
        elif program == "klq":
            words = list(dict.fromkeys(arguments))
            command = [w for w in words[:2] if not w.startswith("-") and "/" not in w and "." not in w]
            result = CliRunner().invoke(app, [*command, "--help"])
            assert result.exit_code == 0, (line, result.output)
        elif program == "python":
            module = arguments[arguments.index("-m") + 1].replace(".", "/")
            assert (ROOT / f"{module}.py").exists() or (ROOT / module / "__main__.py").exists(), line
        else:
            assert program == "pip", line


def test_figures_are_those_on_record() -> None:
    from bench import readme

    results = (readme.load(name) for name in ("gpu_suite", "cpu_memory", "cpu_time"))
    assert readme.filled(README, readme.numbers(*results)) == README


def test_links_and_pictures_exist() -> None:
    for target in re.findall(r"\]\(([^)#]+)\)", README):
        assert target.startswith("https://") or (ROOT / target).exists(), target
