"""A head sharded over the processes of a launch, gathered as the error says: python sharded_head_process.py FILE."""

from __future__ import annotations

import re
import sys

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Partial, Shard, distribute_tensor

from klq_kernels import linear_logprobs


def main(out: str) -> None:
    dist.init_process_group("gloo")
    rank, size = dist.get_rank(), dist.get_world_size()
    generator = torch.Generator().manual_seed(0)
    whole = torch.randn(11, 4, generator=generator)
    hidden = torch.randn(size, 5, 4, generator=generator)
    actions = torch.randint(11, (size, 5), generator=generator)
    weight = torch.nn.Parameter(distribute_tensor(whole, init_device_mesh("cpu", (size,)), [Shard(0)]))
    ends = torch.tensor([0, 5], dtype=torch.int32)
    with pytest.raises(ValueError, match="weight: is a DTensor") as refused:
        linear_logprobs(hidden[rank], weight, actions[rank], cu_seqlens=ends)
    found = re.search(r"pass (weight\.full_tensor\(.*\)), with Partial", str(refused.value))
    assert found is not None
    gathered = eval(found.group(1), {"weight": weight, "Partial": Partial})
    linear_logprobs(hidden[rank], gathered, actions[rank], cu_seqlens=ends).logprobs.sum().backward()
    gradient = weight.grad.full_tensor()
    whole.requires_grad_()
    linear_logprobs(hidden.flatten(0, 1), whole, actions.flatten(), cu_seqlens=ends * size).logprobs.sum().backward()
    if rank == 0:
        torch.save({"gradient": gradient, "whole": whole.grad}, out)
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1])
