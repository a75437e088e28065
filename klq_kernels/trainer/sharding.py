"""Weights that an engine shards over the processes: FSDP2 and ZeRO-3, both by way of accelerate.

The engine is left as it is. A sharded weight is whole while the module that owns it, or the outermost module, runs; so
everything that reads a weight does it inside a ``forward`` (``ActorCritic``, ``FrozenPolicy``). What remains is here:

    before the model is wrapped   the value head gets a group of its own, in fp32 (``shard_apart``)
    for generation                all weights are gathered once, not once per token (``whole``)
    a frozen model                is sharded as the policy is (``shard_frozen``)
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from accelerate.utils import DistributedType
from torch import nn

from ..call.checks import require


def zero_stage(accelerator: Any) -> int:
    """The stage of DeepSpeed's ZeRO, 0 where another engine runs."""
    if accelerator.distributed_type != DistributedType.DEEPSPEED:
        return 0
    return int(accelerator.state.deepspeed_plugin.zero_stage)


def shards_weights(accelerator: Any) -> bool:
    """Whether the engine leaves each process a part of every weight."""
    return bool(accelerator.is_fsdp2) or zero_stage(accelerator) == 3


def check_sharded(accelerator: Any, model: Any, wrapped: Any) -> None:
    """Raises a ValueError where the engine is yet to shard the model, which it does as training begins.

    Before that the model is not on the device either, and may be too large for it.
    """
    ready = bool(_groups(model)) if accelerator.is_fsdp2 else wrapped is not model
    require(
        ready or not shards_weights(accelerator),
        "evaluate",
        "FSDP2 and ZeRO-3 shard the model when training begins; call it after train(), or in a callback then",
    )


def check_engine(accelerator: Any) -> None:
    """Prepares accelerate's FSDP2 for a module whose outputs are losses and log-probabilities, which stay in fp32.

    Raises:
        ValueError: naming the setting of the engine that the trainer does not support.
    """
    if accelerator.distributed_type != DistributedType.FSDP:
        return
    plugin = accelerator.state.fsdp_plugin
    require(
        plugin.fsdp_version == 2,
        "fsdp_config",
        "version 1 flattens weights, and the lm_head with them; set version to 2 (fsdp_version: 2 for accelerate)",
    )
    require(
        not plugin.cpu_ram_efficient_loading,
        "fsdp_config",
        "cpu_ram_efficient_loading leaves all processes but one without weights, and the trainer proves on each that "
        "the model is one it can train; set it to false (fsdp_cpu_ram_efficient_loading for accelerate)",
    )
    if plugin.mixed_precision_policy is not None:
        plugin.mixed_precision_policy = replace(plugin.mixed_precision_policy, output_dtype=None)


def shard_apart(accelerator: Any, head: nn.Linear) -> None:
    """Makes a value head a group of its own for FSDP2, computing in the precision of its weights.

    In the group of the policy it would be rounded to the policy's 16 bits, and it is where the number of processes does
    not divide its width. It is split along its width: empty parts of its one row would be one to accelerate, which
    knows weights by where their memory begins.
    """
    policy = accelerator.state.fsdp_plugin.mixed_precision_policy if accelerator.is_fsdp2 else None
    if policy is None or policy.param_dtype is None or head.in_features % accelerator.num_processes:
        return
    from torch.distributed.fsdp import FSDPModule, fully_shard
    from torch.distributed.tensor import Shard

    if not isinstance(head, FSDPModule):
        plugin, mesh = accelerator.state.fsdp_plugin, accelerator.torch_device_mesh
        mesh = None if mesh is None else mesh[tuple(accelerator.parallelism_config.fsdp_dim_names)]
        fully_shard(head, mesh=mesh, offload_policy=plugin.cpu_offload, shard_placement_fn=lambda p: Shard(p.ndim - 1))


def shard_frozen(accelerator: Any, module: nn.Module) -> nn.Module:
    """A frozen module with its weights sharded by the engine that runs."""
    if zero_stage(accelerator) == 3:
        return _zero3(accelerator, module)
    from accelerate.utils.fsdp_utils import fsdp2_prepare_model

    state = accelerator.state
    own = state.fsdp_plugin
    state.fsdp_plugin = _plugin_for(own, module)
    try:
        return fsdp2_prepare_model(accelerator, module)
    finally:
        state.fsdp_plugin = own


def reshard(module: nn.Module) -> None:
    """Leaves each process its part again: FSDP2 keeps the outermost group whole after a forward."""
    for group in _groups(module):
        group.reshard()


def _groups(module: nn.Module) -> list[Any]:
    """The modules that FSDP2 gathers and shards one by one."""
    if not torch.distributed.is_available():
        return []
    from torch.distributed.fsdp import FSDPModule

    return [m for m in module.modules() if isinstance(m, FSDPModule)]


def _plugin_for(plugin: Any, module: nn.Module) -> Any:
    """The settings of FSDP with the layers of this module as groups; the policy's may be others."""
    found = {type(m).__name__ for m in module.modules()}
    names = plugin.transformer_cls_names_to_wrap or getattr(module, "_no_split_modules", None) or []
    mine = copy.copy(plugin)
    mine.transformer_cls_names_to_wrap = [name for name in names if name in found]
    return mine


def _zero3(accelerator: Any, module: nn.Module) -> nn.Module:
    import deepspeed

    given = accelerator.state.deepspeed_plugin.deepspeed_config
    names = ("train_micro_batch_size_per_gpu", "bf16", "fp16")
    config = {name: given[name] for name in names if name in given}
    config["train_micro_batch_size_per_gpu"] = 1  # read for training alone
    config["zero_optimization"] = {**given["zero_optimization"], "stage": 3}
    for name in ("offload_optimizer",):
        config["zero_optimization"].pop(name, None)
    engine, *_ = deepspeed.initialize(model=module, config=config)
    engine.eval()
    return engine


@contextmanager
def whole(accelerator: Any, module: nn.Module) -> Iterator[None]:
    """Inside, every process has all weights of the module, gathered once; for many forwards without gradients."""
    if accelerator.is_fsdp2:
        with _unsharded(accelerator, module):
            yield
    elif zero_stage(accelerator) == 3:
        with gathered(module.parameters()), _kept(module):
            yield
    else:
        yield


@contextmanager
def _unsharded(accelerator: Any, module: nn.Module) -> Iterator[None]:
    groups = _groups(module)
    for group in groups:
        group.set_reshard_after_forward(False, recurse=False)
        group.unshard()
    try:
        yield
    finally:
        for group in groups:
            inner = group is not module  # the outermost stays whole from forward to backward, as accelerate has it
            again = inner and bool(accelerator.state.fsdp_plugin.reshard_after_forward)
            group.set_reshard_after_forward(again, recurse=False)
        reshard(module)


@contextmanager
def _kept(module: nn.Module) -> Iterator[None]:
    """Inside, ZeRO-3 does not shard a layer again after its forward: another module is said to be using it."""
    used = [p.ds_active_sub_modules for p in module.parameters() if hasattr(p, "ds_active_sub_modules")]
    for users in used:
        users.add("generation")
    try:
        yield
    finally:
        for users in used:
            users.clear()


@contextmanager
def gathered(parameters: Iterable[nn.Parameter]) -> Iterator[None]:
    """Inside, parameters that ZeRO-3 has sharded are whole; all processes must come here together."""
    sharded = [p for p in parameters if hasattr(p, "ds_id")]
    if not sharded:
        yield
        return
    import deepspeed

    with deepspeed.zero.GatheredParameters(sharded):
        yield


def whole_state(module: nn.Module, *, keep: bool) -> dict[str, torch.Tensor]:
    """The state of a module that ZeRO-3 shards, whole and on the CPU, of the processes that ``keep`` it."""
    state = {}
    for name, tensor in module.state_dict(keep_vars=True).items():
        with gathered([tensor]):
            if keep:
                state[name] = tensor.detach().to("cpu", copy=True)
    return state
