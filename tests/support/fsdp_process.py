"""``ActorCritic`` sharded by FSDP2 over the processes of a torch.distributed launch: python fsdp_process.py FILE.

Saves the loss and the whole gradients, for ``test_trainer`` to hold against those of an unsharded module.
"""

from __future__ import annotations

import sys
from functools import partial
from typing import Any

import tiny
import torch
import torch.distributed as dist
from torch import Tensor

from klq_kernels import KLQTargets
from klq_kernels.trainer import KLQConfig
from klq_kernels.trainer.actor_critic import ActorCritic, ValueFunction
from klq_kernels.trainer.batches import Sequence, collate
from klq_kernels.trainer.experience import Experience
from klq_kernels.trainer.objectives import klq
from klq_kernels.trainer.processes import leave_process_group


def build() -> ActorCritic:
    module = ActorCritic(tiny.model(), ValueFunction(32))
    torch.nn.init.ones_(module.value.head.weight)
    return module


def backward(module: ActorCritic, config: KLQConfig) -> Tensor:
    """Gradients of the KLQ loss on a few sequences."""
    g = torch.Generator().manual_seed(0)
    lengths = (3, 5, 8)
    sequences = [Sequence(torch.tensor([5, 6]), torch.arange(n) + 9, torch.ones(n, dtype=torch.bool)) for n in lengths]
    columns = [torch.randn(sum(lengths), generator=g) for _ in range(4)]
    experience = Experience(sequences, KLQTargets(*columns[:3]), columns[3], columns[2])
    inputs = collate(sequences, pad_id=tiny.PAD, padding_free=False)
    objective = partial(klq, inputs=inputs, experience=experience, denom=torch.tensor(16.0), config=config)
    loss, _ = module(inputs, objective)
    loss.backward()
    return loss.detach()


def shard(module: Any) -> None:
    """Leaves each process its part of the weights: layer by layer, and the rest in one."""
    from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method

    mesh = dist.init_device_mesh("cpu", (dist.get_world_size(),))
    for layer in module.policy.model.layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(module, mesh=mesh)
    register_fsdp_forward_method(module, "generate")


def main() -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    module: Any = build()
    shard(module)
    loss = backward(module, tiny.arguments("unused"))
    gradients = {name: p.grad.full_tensor() for name, p in module.named_parameters() if p.grad is not None}
    ids = module.generate(input_ids=torch.tensor([[5, 6, 7]]), do_sample=False, max_new_tokens=4, pad_token_id=tiny.PAD)
    weights = dict(module.language_model.weights())
    if dist.get_rank() == 0:
        torch.save({"loss": loss, "gradients": gradients, "ids": ids, "weights": weights}, sys.argv[1])


if __name__ == "__main__":
    main()
    leave_process_group()
