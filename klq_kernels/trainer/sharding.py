"""Weights that an engine shards over the processes: FSDP2 and ZeRO-3, both by way of accelerate.

The engine is left as it is. A sharded weight is whole while the module that owns it, or the outermost module, runs; so
everything that reads a weight does it inside a ``forward`` (``ActorCritic``, ``FrozenPolicy``). What remains is here:

    before the model is wrapped   the value head gets a group of its own, in fp32 (``shard_heads``)
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


def check_parallelism(accelerator: Any) -> None:
    """Raises a ValueError where processes share a sequence or a layer: each is taken to run sequences of its own."""
    config = getattr(accelerator, "parallelism_config", None)
    sizes = {name: getattr(config, name, 1) or 1 for name in ("tp_size", "cp_size", "sp_size")}
    shared = [f"{name}={size}" for name, size in sizes.items() if size > 1]
    require(
        not shared,
        "parallelism_config",
        f"{', '.join(shared)}: tensor, context and sequence parallelism are not supported; leave them at 1 and use "
        "DDP, FSDP2 or ZeRO",
    )


def shard_heads(accelerator: Any, value_head: nn.Linear, lm_head: nn.Module | None) -> None:
    """Makes groups of their own for FSDP2, before accelerate makes the others.

    The value head computes in the precision of its weights: in the group of the policy it would be rounded to the
    policy's 16 bits, and it is where the number of processes does not divide its width. It is split along its width:
    empty parts of its one row would be one to accelerate, which knows weights by where their memory begins.

    A ``lm_head`` stays sharded: nothing calls it but generation, and the loss reads the ``DTensor`` (``sharding`` of
    ``fused_klq_loss``).
    """
    if not accelerator.is_fsdp2:
        return
    from torch.distributed.tensor import Shard

    policy = accelerator.state.fsdp_plugin.mixed_precision_policy
    if (
        policy is not None
        and policy.param_dtype is not None
        and value_head.in_features % accelerator.num_processes == 0
    ):
        _shard_apart(accelerator, value_head, shard_placement_fn=lambda p: Shard(p.ndim - 1))
    if lm_head is not None:
        _shard_apart(accelerator, lm_head, **({} if policy is None else {"mp_policy": policy}))


def _shard_apart(accelerator: Any, module: nn.Module, **settings: Any) -> None:
    from torch.distributed.fsdp import FSDPModule, fully_shard

    if not isinstance(module, FSDPModule):
        plugin, mesh = accelerator.state.fsdp_plugin, accelerator.torch_device_mesh
        mesh = None if mesh is None else mesh[tuple(accelerator.parallelism_config.fsdp_dim_names)]
        fully_shard(module, mesh=mesh, offload_policy=plugin.cpu_offload, **settings)


def check_head_sharding(accelerator: Any, language_model: Any, sharding: str | None) -> None:
    """Raises a ValueError where the lm_head cannot stay sharded."""
    if sharding != "tokens":
        return
    name = "head_sharding"
    require(bool(accelerator.is_fsdp2), name, "'tokens' needs FSDP2, which leaves each process rows of the lm_head")
    embeddings = language_model.backbone.get_input_embeddings()
    require(
        isinstance(language_model.lm_head, nn.Linear) and embeddings.weight is not language_model.lm_head.weight,
        name,
        "'tokens' needs an lm_head of its own: neither tied to the embeddings, which are gathered anyway, nor adapted",
    )
    offload = type(accelerator.state.fsdp_plugin.cpu_offload).__name__
    require(
        offload != "CPUOffloadPolicy", name, "'tokens' needs the weights on the device; turn FSDP's cpu_offload off"
    )


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
    """The module in an engine of DeepSpeed's of its own, with the policy's settings and no optimiser."""
    import deepspeed

    given = accelerator.state.deepspeed_plugin.deepspeed_config
    zero = {name: value for name, value in given["zero_optimization"].items() if name != "offload_optimizer"}
    precision = {name: given[name] for name in ("bf16", "fp16") if name in given}
    config = {**precision, "zero_optimization": zero, "train_micro_batch_size_per_gpu": 1}  # a size it has to be told
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
