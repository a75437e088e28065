"""Where the weights of the reference and of reward models are, and what engines are refused."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import tiny
import torch
from accelerate.utils import DistributedType
from torch import nn

from klq_kernels.trainer.frozen import Placed
from klq_kernels.trainer.sharding import check_engine, check_parallelism, check_sharded

ONE_STEP = {"max_steps": 1, "num_update_epochs": 1}


def accelerator(**changes: Any) -> Any:
    defaults = {"is_fsdp2": False, "distributed_type": DistributedType.NO, "device": torch.device("cpu")}
    return SimpleNamespace(**defaults | changes)


def test_weights_on_the_host_come_for_a_use_and_are_not_copied_back() -> None:
    module = nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2))
    before = {name: (t.data_ptr(), t.clone()) for name, t in module.state_dict().items()}
    placed = Placed(module, "cpu", accelerator(), "ref_placement")
    for _ in range(2):
        with placed.present() as there:
            for name, tensor in there.state_dict().items():
                assert tensor.data_ptr() != before[name][0]
                assert torch.equal(tensor, before[name][1])
                tensor.zero_()  # what is on the device
        for name, tensor in module.state_dict().items():
            assert tensor.data_ptr() == before[name][0]
            assert torch.equal(tensor, before[name][1])


def test_weights_are_back_on_the_host_after_an_error() -> None:
    module = nn.Linear(3, 2)
    host = module.weight.data_ptr()
    with pytest.raises(KeyError), Placed(module, "cpu", accelerator(), "ref_placement").present():
        raise KeyError
    assert module.weight.data_ptr() == host


@pytest.mark.parametrize("placement", ["device", "cpu"])
def test_a_run_does_not_depend_on_where_the_reference_is(tmp_path: Path, placement: str) -> None:
    given = {"reward_funcs": [tiny.even, tiny.classifier(2)], "reward_processing_classes": tiny.tokenizer()}
    here, there = (
        tiny.trainer(tmp_path, dict(given), **ONE_STEP, ref_placement=p, reward_placement=p) for p in (None, placement)
    )
    here.train()
    there.train()
    assert tiny.losses(here) == tiny.losses(there)


def test_a_reference_in_16_bits(tmp_path: Path) -> None:
    run = tiny.trainer(tmp_path, **ONE_STEP, ref_dtype="bfloat16")
    assert run.reference is not None
    assert {p.dtype for p in run.reference.module.parameters()} == {torch.bfloat16}
    assert {p.dtype for p in run.actor_critic.parameters()} == {torch.float32}
    run.train()
    first = run.state.log_history[0]["objective/kl"]
    assert 0 < abs(first) < 0.5  # of the rounding


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"ref_placement": "disk"}, "^ref_placement: must be one of device, cpu, sharded; got 'disk'"),
        ({"reward_placement": "gpu"}, "^reward_placement: must be one of"),
        ({"ref_dtype": "int8"}, "^ref_dtype: must be one of float32, bfloat16, float16; got 'int8'"),
        ({"head_sharding": "rows"}, "^head_sharding: must be one of tokens, head"),
        ({"ref_placement": "sharded"}, "^ref_placement: 'sharded' needs an engine that shards"),
        ({"head_sharding": "tokens"}, "^head_sharding: 'tokens' needs FSDP2"),
    ],
    ids=str,
)
def test_what_cannot_be_is_refused(tmp_path: Path, changes: dict[str, Any], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        tiny.trainer(tmp_path, **changes)


def fsdp(**changes: Any) -> Any:
    settings = {"fsdp_version": 2, "cpu_ram_efficient_loading": False, "mixed_precision_policy": None}
    plugin = SimpleNamespace(**settings | changes)
    kinds = {"distributed_type": DistributedType.FSDP, "is_fsdp2": plugin.fsdp_version == 2}
    return accelerator(**kinds, state=SimpleNamespace(fsdp_plugin=plugin))


@pytest.mark.parametrize(
    ("changes", "says"),
    [({"fsdp_version": 1}, "^fsdp_config: version 1"), ({"cpu_ram_efficient_loading": True}, "^fsdp_config: cpu_ram")],
    ids=str,
)
def test_settings_of_fsdp_that_are_refused(changes: dict[str, Any], says: str) -> None:
    check_engine(fsdp())
    with pytest.raises(ValueError, match=says):
        check_engine(fsdp(**changes))


def test_processes_that_share_a_sequence_or_a_layer_are_refused() -> None:
    check_parallelism(SimpleNamespace(parallelism_config=SimpleNamespace(tp_size=1, cp_size=1, sp_size=1)))
    check_parallelism(SimpleNamespace(parallelism_config=None))
    for name in ("tp_size", "cp_size", "sp_size"):
        with pytest.raises(ValueError, match=f"^parallelism_config: {name}=2"):
            check_parallelism(SimpleNamespace(parallelism_config=SimpleNamespace(**{name: 2})))


def test_evaluating_before_the_engine_has_sharded_the_model_is_refused() -> None:
    model = nn.Linear(2, 2)
    check_sharded(accelerator(), model, model)
    with pytest.raises(ValueError, match=r"^evaluate: FSDP2 and ZeRO-3 shard the model when training begins"):
        check_sharded(fsdp(), model, model)
