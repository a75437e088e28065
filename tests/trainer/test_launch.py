"""The recipes of examples/launch, at tiny sizes on two processes of a CPU."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from processes import DEEPSPEED, ROOT, TWO_PROCESSES, start

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


@pytest.mark.skipif(not DEEPSPEED.exists(), reason="the Makefile installs DeepSpeed in .venv/deepspeed")
def test_accelerate_zero3(material: list[str], tmp_path: Path) -> None:
    start([*launched("zero3.yaml", material), "--output_dir", str(tmp_path)], deepspeed=True)
    check(tmp_path)


def test_torchrun_fsdp2(material: list[str], tmp_path: Path) -> None:
    flags = ["--fsdp", "--output_dir", str(tmp_path)]
    start([*TWO_PROCESSES, POSED, "train", *material, *FLAGS, *flags])
    check(tmp_path)


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
    """The function that Ray Train calls on each worker, on two processes that torchrun has joined instead."""
    settings = {
        "output_dir": str(tmp_path), "max_steps": 2, "per_device_train_batch_size": 2, "max_completion_length": 4,
        "num_update_epochs": 1, "use_cpu": True, "report_to": [], "watch_failures": False, "bf16": False,
    }  # fmt: skip
    script = tmp_path / "worker.py"
    script.write_text(
        f"import sys; sys.path.insert(0, {str(RECIPES)!r})\nfrom ray_train import train\ntrain({settings!r})\n"
        "from klq_kernels.trainer import leave_process_group\nleave_process_group()\n"
    )
    start([*TWO_PROCESSES, str(script)])
    assert (tmp_path / "final" / "model.safetensors").exists()
    start([str(RECIPES / "ray_train.py"), "--help"], expect=0 if _has_ray() else 1)


def _has_ray() -> bool:
    return subprocess.run([sys.executable, "-c", "import ray.train"], capture_output=True, check=False).returncode == 0
