"""The trainer as a whole under engines that shard weights, on processes of a CPU."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
import trainer_process
from processes import DEEPSPEED, TWO_PROCESSES, start
from safetensors.torch import load_file

pytestmark = pytest.mark.lengthy
KINDS = tuple(trainer_process.KINDS)
RUN = {"max_steps": 4, "num_update_epochs": 2, "learning_rate": 1e-2, "optim": "sgd", "per_device_train_batch_size": 4}
FSDP2 = {"use_cpu": False, "bf16": False, "fsdp": True, "fsdp_config": {"state_dict_type": "SHARDED_STATE_DICT"}}
ZERO = {
    stage: {
        "use_cpu": False,
        "bf16": False,
        "deepspeed": {
            "train_micro_batch_size_per_gpu": "auto", "gradient_accumulation_steps": "auto",
            "gradient_clipping": "auto", "zero_allow_untested_optimizer": True,
            "zero_optimization": {"stage": stage, "stage3_param_persistence_threshold": 0},
        },
    }
    for stage in (1, 2, 3)
}  # fmt: skip
SETTINGS = {  # a few at once
    "plain": {"gradient_checkpointing": True, "value_warmup_steps": 1},
    # one step: after it weights differ in their last bits, and then an entry more may be kept, or one less
    "tied": {"head_gradient": "sampled", "head_samples": 4, "max_steps": 1, "num_update_epochs": 1},
    "lora": {
        "gradient_accumulation_steps": 2,
        "num_generations": 2,
        "replay_cycles": 1,
        "off_policy": "retrace",
        "scale_rewards": True,
    },
}


def runs(folder: Path, **changes: Any) -> list[dict[str, Any]]:
    configs = {kind: {**RUN, **SETTINGS.get(kind, {}), **changes} for kind in KINDS}
    return [{"folder": str(folder / kind), "kind": kind, "config": configs[kind]} for kind in KINDS]


def history(folder: Path) -> list[dict[str, float]]:
    logs = json.loads((folder / "history.json").read_text())
    own = ("time/", "train_", "val/num_eos_tokens")  # seconds, and a count per process
    return [{n: v for n, v in log.items() if not n.startswith(own)} for log in logs]


def weights(folder: Path) -> dict[str, torch.Tensor]:
    """What was saved, and what ``policy_weights`` gave."""
    found = {f"exported {name}": weight for name, weight in load_file(folder / "exported.safetensors").items()}
    for file in sorted((folder / "final").glob("*.safetensors")):
        found |= load_file(file)
    return found


def assert_same(one: Path, other: Path) -> None:
    """Runs logged and saved the same, up to rounding."""
    logs, others = history(one), history(other)
    assert len(logs) == len(others) > 1
    for log, theirs in zip(logs, others, strict=True):
        assert log == pytest.approx(theirs, rel=1e-4, abs=1e-5)
    saved, theirs = weights(one), weights(other)
    assert saved.keys() == theirs.keys()
    for name, tensor in theirs.items():
        torch.testing.assert_close(saved[name], tensor, rtol=1e-4, atol=2e-6, msg=lambda m, n=name: f"{n}: {m}")


def launch(told: list[dict[str, Any]], *, processes: int = 2, deepspeed: bool = False) -> None:
    command = [argument.replace("=2", f"={processes}") for argument in TWO_PROCESSES]
    start([*command, trainer_process.__file__, json.dumps(told), "engine"], deepspeed=deepspeed)


@pytest.fixture(scope="session")
def ddp(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Runs of two processes with whole weights."""
    folder = tmp_path_factory.mktemp("ddp")
    start([*TWO_PROCESSES, trainer_process.__file__, json.dumps(runs(folder))])
    return folder


def check_engine(folder: Path, ddp: Path) -> None:
    """Runs of two processes did what those under DDP did, each with half of the weights."""
    for kind in KINDS:
        assert_same(folder / kind, ddp / kind)
        shares = json.loads((folder / kind / "shares.json").read_text())
        assert all(0.45 < share < 0.6 for share in shares.values()), shares
    tiny.model().from_pretrained(folder / "tied" / "final")


@pytest.mark.runs("FSDP2", "trainer", "trainer, LoRA", "trainer, sampled gradient")
@pytest.mark.runs("DDP", "trainer", "trainer, LoRA", "trainer, sampled gradient")
def test_fsdp2_is_ddp(ddp: Path, tmp_path: Path) -> None:
    """Whatever is trained: completions, logs and saved weights are those of two processes with whole weights.

    So they are where the lm_head stays sharded.
    """
    told = runs(tmp_path, **FSDP2)
    for run in told:
        if run["kind"] in ("plain", "models"):
            run["config"]["head_sharding"] = "tokens"
    launch(told)
    check_engine(tmp_path, ddp)
    heads = {kind: json.loads((tmp_path / kind / "heads.json").read_text()) for kind in KINDS}
    assert heads["plain"] == heads["models"] == ["sharded"]
    assert heads["tied"] == ["whole"]


@pytest.mark.skipif(not DEEPSPEED.exists(), reason="the Makefile installs DeepSpeed in .venv/deepspeed")
@pytest.mark.runs("ZeRO-1", "trainer")
@pytest.mark.runs("ZeRO-2", "trainer")
@pytest.mark.runs("ZeRO-3", "trainer", "trainer, LoRA", "trainer, sampled gradient", "resume")
def test_zero_is_ddp(ddp: Path, tmp_path: Path) -> None:
    """Likewise, and resumes. A model that is sharded as it is loaded trains as well."""
    told = runs(tmp_path, **ZERO[3])
    for stage in (1, 2):
        config = {**RUN, **SETTINGS["plain"], **ZERO[stage]}
        told.append({"folder": str(tmp_path / str(stage)), "config": config})
    saving = {**RUN, **ZERO[3], "save_strategy": "steps", "save_steps": 3, "logging_steps": 1}
    whole, resumed = str(tmp_path / "whole"), str(tmp_path / "resumed")
    told += [
        {"folder": whole, "config": saving, "use_script": True},
        {"folder": resumed, "config": saving, "use_script": True, "resume": f"{whole}/checkpoint-3"},
        {"folder": str(tmp_path / "loaded"), "config": {**RUN, **ZERO[3], "max_steps": 2}, "sharded_as_loaded": True},
    ]
    launch(told, deepspeed=True)
    check_engine(tmp_path, ddp)
    for stage in ("1", "2"):
        assert_same(tmp_path / stage, ddp / "plain")
    assert history(tmp_path / "resumed") == history(tmp_path / "whole")


STATES = ("SHARDED_STATE_DICT", "FULL_STATE_DICT")


@pytest.mark.runs("FSDP2", "resume")
def test_fsdp2_resumes_on_as_many_processes_and_on_fewer(tmp_path: Path) -> None:
    """In the middle of a cycle on as many, between cycles on any number. And 16 bits leave the results in fp32."""
    halves, alone = [], []
    for state in STATES:
        saving = {"optim": "adamw_torch", "logging_steps": 1, "save_strategy": "steps", "save_steps": 1}
        config = {**RUN, **FSDP2, **saving, "fsdp_config": {"state_dict_type": state}}
        whole, resumed, one = (str(tmp_path / state / name) for name in ("whole", "resumed", "one"))
        halves += [
            {"folder": whole, "config": config, "use_script": True},
            {"folder": resumed, "config": config, "use_script": True, "resume": f"{whole}/checkpoint-3"},
        ]
        both = {**config, "per_device_train_batch_size": 8}
        alone += [{"folder": one, "config": both, "use_script": True, "resume": f"{whole}/checkpoint-2"}]
    in_16_bits = {"folder": str(tmp_path / "bf16"), "config": {**RUN, **FSDP2, "bf16": True}, "use_script": True}
    launch([*halves, in_16_bits])
    launch(alone, processes=1)
    for state in STATES:
        assert history(tmp_path / state / "resumed") == history(tmp_path / state / "whole")
        assert_same(tmp_path / state / "one", tmp_path / state / "whole")
    # under accelerate's own settings what a module returns would be rounded: log-probabilities, losses
    assert json.loads((tmp_path / "bf16" / "rounded.json").read_text()) is False
    assert history(tmp_path / "bf16")[0]["objective/kl"] == 0  # policy and reference compute alike
