"""The ``klq`` command: what it prints, how it fails, and that it stays quick to start."""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
import types
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

import klq_kernels.lab
from klq_kernels import backends
from klq_kernels.commands.cli import app


def klq(*args: str, before: str = "", after: str = "", **env: str) -> subprocess.CompletedProcess[str]:
    """Runs the command in its own interpreter, with statements before it is imported and after it has run."""
    code = f"import sys\nsys.argv = {['klq', *args]!r}\n{before}\nfrom klq_kernels.commands.cli import main\n"
    code += f"try:\n    main()\nexcept SystemExit as end:\n    if end.code:\n        raise\n{after}"
    clean = {k: v for k, v in os.environ.items() if k not in ("KLQ_BACKEND", "KLQ_CHECK", "TRITON_INTERPRET")}
    return subprocess.run(
        [sys.executable, "-c", code],
        cwd=Path(__file__).parents[2],
        env={**clean, **env},
        capture_output=True,
        text=True,
        check=False,
    )


def test_info_json_states_versions_devices_and_why_each_backend_is_not_used():
    done = klq("info", "--json", KLQ_CHECK="1")
    assert done.returncode == 0, done.stderr
    facts = json.loads(done.stdout)
    assert facts["versions"]["klq_kernels"] == klq_kernels.__version__
    assert facts["versions"]["torch"] == torch.__version__
    assert facts["versions"]["python"] == platform.python_version()
    assert facts["settings"] == {"KLQ_BACKEND": None, "KLQ_CHECK": "1", "TRITON_INTERPRET": None}
    assert facts["devices"][0]["device"] == "cpu"
    assert len(facts["devices"]) >= 1 + torch.cuda.device_count()
    for entry in facts["devices"]:
        assert {entry["backend"], *entry["not_used"]} == set(backends.BACKENDS)
        assert entry["backend"] not in entry["not_used"]
        assert all(entry["not_used"].values())


def test_info_tells_what_tensors_really_use(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("KLQ_BACKEND", "torch")
    facts = json.loads(CliRunner().invoke(app, ["info", "--json"]).stdout)
    cpu = facts["devices"][0]
    assert cpu["backend"] == backends.backend_for(torch.device("cpu")).NAME == "torch"
    assert set(cpu["not_used"].values()) >= {"KLQ_BACKEND=torch overrides it"}


def test_info_table_holds_the_same_facts():
    printed = CliRunner().invoke(app, ["info"], env={"COLUMNS": "200"})
    assert printed.exit_code == 0
    for fact in (klq_kernels.__version__, torch.__version__, "KLQ_BACKEND", backends.backend_name(torch.device("cpu"))):
        assert fact in printed.stdout


def test_info_does_not_wait_for_a_training_stack():
    done = klq("info", after="print(sorted({'transformers', 'matplotlib', 'pandas'} & set(sys.modules)))")
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "[]"


def test_bad_input_is_one_line_and_exit_code_2():
    done = klq("info", KLQ_BACKEND="nonsense")
    assert done.returncode == 2
    assert len(done.stderr.splitlines()) == 1
    assert done.stderr.startswith("klq: KLQ_BACKEND: must be one of")


@pytest.mark.parametrize("missing", ["typer", "rich"])
def test_a_core_install_says_what_to_install(missing: str):
    done = klq("info", before=f"sys.modules[{missing!r}] = None")
    assert done.returncode == 1
    assert done.stderr.splitlines() == ["klq needs typer and rich: pip install 'klq_kernels[cli]'"]
    assert done.stdout == ""


def test_training_without_its_packages_says_what_to_install():
    done = klq("train", before="sys.modules['transformers'] = None")
    assert done.returncode != 0
    assert done.stderr.splitlines()[-1] == "klq: the trainer needs transformers: pip install 'klq_kernels[train]'"


def test_without_arguments_every_command_is_listed():
    printed = CliRunner().invoke(app, [])
    for command in ("info", "demo"):
        assert command in printed.output


def test_demo_passes_on_its_options(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    calls = []
    stand_in = types.ModuleType("klq_kernels.lab.demo")
    stand_in.run = lambda out, steps, seed: calls.append((out, steps, seed))  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "klq_kernels.lab.demo", stand_in)
    monkeypatch.setattr(klq_kernels.lab, "demo", stand_in, raising=False)
    done = CliRunner().invoke(app, ["demo", "--out", str(tmp_path), "--steps", "3", "--seed", "7"])
    assert done.exit_code == 0, done.output
    assert calls == [(tmp_path, 3, 7)]
    assert CliRunner().invoke(app, ["demo", "--steps", "0"]).exit_code == 2


def test_a_file_that_ends_too_early_is_not_shown_as_an_abort(monkeypatch: pytest.MonkeyPatch):
    def cut_short() -> None:
        raise EOFError("Ran out of input")

    monkeypatch.setattr("klq_kernels.commands.info.environment", cut_short)
    shown = CliRunner().invoke(app, ["info"])
    assert "Aborted" not in shown.output
    assert isinstance(shown.exception, RuntimeError)
    assert str(shown.exception) == "EOFError: Ran out of input"
    assert isinstance(shown.exception.__cause__, EOFError)


@pytest.mark.parametrize("command", [["demo"], ["experiment", "all"]])
def test_a_folder_that_cannot_be_written_into_is_refused(command: list[str], tmp_path: Path):
    (tmp_path / "file").touch()
    for out in (tmp_path / "file", tmp_path / "file" / "below"):
        shown = CliRunner().invoke(app, [*command, "--out", str(out)])
        assert isinstance(shown.exception, ValueError)
        assert str(shown.exception).startswith(f"--out: cannot write into {out} as a folder: ")
