"""The recipes of examples/launch, at tiny sizes on two processes of a CPU."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path

import pytest
from processes import DEEPSPEED, ROOT, start

from klq_kernels.commands.train.arguments import parse

POSED = str(ROOT / "tests" / "support" / "posed_klq.py")
RECIPES = ROOT / "examples" / "launch"
FLAGS = ["--max_steps", "2", "--eval_size", "2", "--bf16", "False", "--save_steps", "1", "--use_cpu", "False"]


def check(folder: Path) -> None:
    logs = json.loads((folder / "history.json").read_text())
    assert sum("objective/scores" in log for log in logs) == 2
    assert {"before", "after"} <= json.loads((folder / "summary.json").read_text()).keys()
    assert list((folder / "final").glob("*.safetensors"))
    assert (folder / "checkpoint-2" / "trainer_state.json").exists()


def launched(recipe: str, material: list[str]) -> list[str]:
    """A recipe's command, with two processes in fp32 and, in place of the package, ``posed_klq``."""
    config = ["--config_file", str(RECIPES / recipe), "--num_processes", "2", "--mixed_precision", "no"]
    return ["-m", "accelerate.commands.launch", *config, POSED, "train", *material, *FLAGS]


def test_accelerate_fsdp2(material: list[str], tmp_path: Path) -> None:
    start([*launched("fsdp2.yaml", material), "--output_dir", str(tmp_path)])
    check(tmp_path)
    assert list((tmp_path / "checkpoint-2" / "pytorch_model_fsdp_0").glob("*.distcp"))


@pytest.mark.slow
@pytest.mark.parametrize(
    "flags",
    [
        ["--algorithm", "oreo", "--kl_coef", "0"],
        ["--algorithm", "tbrm", "--bootstrap_truncated", "False"],
        ["--algorithm", "ppo", "--value_model", "copy", "--freeze_value_model", "True"],
    ],
    ids=["oreo", "tbrm", "dvpo"],
)
def test_relatives_under_fsdp2(flags: list[str], material: list[str], tmp_path: Path) -> None:
    start([*launched("fsdp2.yaml", material), *flags, "--output_dir", str(tmp_path)])
    check(tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("flags", "name"),
    [
        (["--algorithm", "oreo"], "kl_coef: compares whole heads"),
        (["--algorithm", "vineppo", "--bootstrap_truncated", "False"], "args: each process samples"),
    ],
    ids=["oreo", "vineppo"],
)
def test_what_needs_whole_weights_refuses_fsdp2(
    flags: list[str], name: str, material: list[str], tmp_path: Path
) -> None:
    with pytest.raises(AssertionError, match=name):  # what the processes said
        start([*launched("fsdp2.yaml", material), *flags, "--output_dir", str(tmp_path)])


@pytest.mark.slow
@pytest.mark.skipif(not DEEPSPEED.exists(), reason="the Makefile installs DeepSpeed in .venv/deepspeed")
def test_accelerate_zero3(material: list[str], tmp_path: Path) -> None:
    start([*launched("zero3.yaml", material), "--output_dir", str(tmp_path)], deepspeed=True)
    check(tmp_path)


def test_torchrun_fsdp2(material: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The flag is read as transformers reads it; ``test_sharded_training`` runs what it asks for."""
    monkeypatch.setenv("LOCAL_RANK", "-1")
    _, config = parse(None, [*material, "--fsdp", "--output_dir", str(tmp_path)])
    assert config.fsdp is True
    assert config.fsdp_plugin_args["fsdp_version"] == 2
    assert not config.fsdp_plugin_args["cpu_ram_efficient_loading"]


def test_slurm(tmp_path: Path) -> None:
    """With stand-ins for slurm's commands, one node runs the command that srun would run on each."""
    tools = tmp_path / "bin"
    tools.mkdir()
    (tools / "accelerate").write_text(f'#!/bin/sh\nprintf "%s\\n" "$@" > {tmp_path}/told\n')
    (tools / "srun").write_text('#!/bin/sh\nexec "$@"\n')
    (tools / "scontrol").write_text("#!/bin/sh\nprintf 'node7\\nnode8\\n'\n")
    for tool in tools.iterdir():
        tool.chmod(0o755)
    told = {"SLURM_JOB_ID": "41", "SLURM_JOB_NODELIST": "node[7-8]", "SLURM_NNODES": "2", "SLURM_NODEID": "1"}
    environment = {**os.environ, **told, "SLURM_GPUS_ON_NODE": "4", "PATH": f"{tools}:{os.environ['PATH']}"}
    subprocess.run(["bash", str(RECIPES / "slurm.sh"), "--tau", "0.1"], env=environment, check=True, cwd=ROOT)
    command = (tmp_path / "told").read_text().split()
    options = dict(zip(command[1::2], command[2::2], strict=False))
    assert options["--machine_rank"] == "1"
    assert options["--num_processes"] == "8"
    assert options["--main_process_ip"] == "node7"
    assert (ROOT / options["--config_file"]).exists()
    assert command[-6:] == ["klq_kernels", "train", "--config", "examples/train_klq.yaml", "--tau", "0.1"]


def test_ray_workers_train(tmp_path: Path) -> None:
    """The function that Ray Train calls on each worker, on one that nothing has joined to others."""
    settings = {
        "output_dir": str(tmp_path), "max_steps": 2, "per_device_train_batch_size": 2, "max_completion_length": 4,
        "num_update_epochs": 1, "use_cpu": True, "report_to": [], "watch_failures": False, "bf16": False,
    }  # fmt: skip
    script = tmp_path / "worker.py"
    script.write_text(
        f"import sys; sys.path.insert(0, {str(RECIPES)!r})\nfrom ray_train import train\ntrain({settings!r})\n"
        "from klq_kernels.trainer import leave_process_group\nleave_process_group()\n"
    )
    start([str(script)])
    assert (tmp_path / "final" / "model.safetensors").exists()
