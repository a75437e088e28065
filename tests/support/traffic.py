"""Functions that a rank runs in tests of ``klq plan``: the collectives of real steps, and the bytes that they leave."""

from __future__ import annotations

from collections import Counter
from typing import Any

import torch
import torch.distributed as dist
from cases import make_case
from sharding import collectives, loss, loss_of_own_tokens
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, Replicate
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.nn.parallel import DistributedDataParallel
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import LlamaConfig, LlamaForCausalLM

VOCAB, LENGTH = 256, 16  # which 2 and 4 divide, so that nothing is padded


class Count(TorchDispatchMode):
    """Inside, adds up the bytes of whole tensors by kind of collective: gathered, reduced, or to be scattered."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        namespace, name = func.namespace, func._schema.name.split("::")[1]
        if namespace in ("c10d", "_c10d_functional"):
            self._add(name, args)
        return func(*args, **(kwargs or {}))

    def _add(self, name: str, args: Any) -> None:
        if name in ("_allgather_base_", "all_gather_single_"):
            self.bytes["all-gather"] += args[0].nbytes
        elif name == "all_gather_into_tensor":
            self.bytes["all-gather"] += args[0].nbytes * args[1]
        elif name in ("_reduce_scatter_base_", "reduce_scatter_single_"):
            self.bytes["reduce-scatter"] += args[1].nbytes
        elif name == "reduce_scatter_tensor":
            self.bytes["reduce-scatter"] += args[0].nbytes
        elif name == "allreduce_":
            self.bytes["all-reduce"] += sum(t.nbytes for t in args[0])
        elif name in ("all_reduce", "all_reduce_"):
            self.bytes["all-reduce"] += args[0].nbytes
        elif name not in ("wait_tensor", "_wrap_tensor_autograd"):
            raise AssertionError(f"a collective that is not counted: {name}")


def model(checkpointing: bool = False, key_heads: int = 2) -> Any:
    """A Llama of two layers, its head apart from its embeddings."""
    config = LlamaConfig(
        vocab_size=VOCAB, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=key_heads, use_cache=False, tie_word_embeddings=False,
    )  # fmt: skip
    built = LlamaForCausalLM(config)
    if checkpointing:
        built.gradient_checkpointing_enable()
    return built.train()


def _local(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def _standing(built: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, int]:
    """Bytes of this rank's weights, gradients and optimiser states."""
    parameters = list(built.parameters())
    moments = [t for state in optimizer.state.values() for t in state.values() if t.dim()]
    kinds = {"weights": parameters, "gradients": [p.grad for p in parameters if p.grad is not None], "states": moments}
    return {name: sum(_local(t).nbytes for t in tensors) for name, tensors in kinds.items()}


def _step(built: nn.Module, parameters: Any, ids: torch.Tensor) -> tuple[dict[str, int], dict[str, int]]:
    optimizer = torch.optim.AdamW(parameters)
    with Count() as count:
        built(input_ids=ids).logits.float().square().mean().backward()
        optimizer.step()
    return dict(count.bytes), _standing(built, optimizer)


def fsdp2(group: dist.ProcessGroup, checkpointing: bool, half: bool) -> Any:
    """A step under FSDP2, one group per layer, as accelerate makes them."""
    mesh = DeviceMesh.from_group(group, "cpu")
    policy = MixedPrecisionPolicy(torch.bfloat16, torch.bfloat16) if half else MixedPrecisionPolicy()
    built = model(checkpointing)
    for layer in built.model.layers:
        fully_shard(layer, mesh=mesh, mp_policy=policy)
    fully_shard(built, mesh=mesh, mp_policy=policy)
    return _step(built, built.parameters(), torch.arange(LENGTH)[None])


def ddp(group: dist.ProcessGroup) -> Any:
    """A step under DDP."""
    built = model()
    wrapped = DistributedDataParallel(built, process_group=group, broadcast_buffers=False)
    return _step(wrapped, built.parameters(), torch.arange(LENGTH)[None])


def tensor_parallel(group: dist.ProcessGroup, checkpointing: bool) -> Any:
    """A step of the body alone under tensor parallelism; the head is this library's."""
    built = model(checkpointing, key_heads=4).model
    plan: dict[str, Any] = {"embed_tokens": RowwiseParallel(input_layouts=Replicate(), output_layouts=Replicate())}
    for layer in range(len(built.layers)):
        columns = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "mlp.gate_proj", "mlp.up_proj")
        plan |= {f"layers.{layer}.{name}": ColwiseParallel() for name in columns}
        plan |= {f"layers.{layer}.{name}": RowwiseParallel() for name in ("self_attn.o_proj", "mlp.down_proj")}
    parallelize_module(built, DeviceMesh.from_group(group, "cpu"), plan)
    with Count() as count:
        built(input_ids=torch.arange(LENGTH)[None]).last_hidden_state.square().mean().backward()
    return dict(count.bytes), {"weights": sum(_local(p).nbytes for p in built.parameters())}


def split_head(group: dist.ProcessGroup, apart: bool) -> list[tuple[str, int]]:
    """The collectives of a loss with a head split by rows; ``apart``: of each rank's own sequences, as under FSDP2."""
    size = group.size()
    case = make_case(torch.ones(4, 8, dtype=torch.bool), vocab=64)
    rows = [64 // size] * size
    with collectives() as calls:
        if apart:
            loss_of_own_tokens(group, case, [4 // size] * size, rows, {"on_policy": False})
        else:
            loss(group, case, rows, case.loss_arguments(on_policy=False))
    return calls
