"""A model sharded by FSDP2, its head among it, trained with ``fused_klq_loss``; each process has sequences of its own.

    torchrun --nproc_per_node=2 examples/split_head.py

No process ever holds the whole head, or a whole gradient of it (docs/many-processes.md). The rollout is random: tokens
with small ids have the larger advantages, and epochs on it bring the policy and V to their targets. On GPUs replace
"cpu" and "gloo" by "cuda" and "nccl".
"""

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from klq_kernels import KLQTargets, fused_klq_loss, linear_logprobs

VOCAB, WIDTH, BATCH, LENGTH = 211, 32, 8, 12


class Model(nn.Module):
    """A trunk, a value head, and the head of the policy, which is never called: its weight is read."""

    def __init__(self) -> None:
        super().__init__()
        self.trunk = nn.Sequential(nn.Embedding(VOCAB, WIDTH), nn.Linear(WIDTH, WIDTH), nn.Tanh())
        self.value = nn.Linear(WIDTH, 1)
        self.lm_head = nn.Linear(WIDTH, VOCAB, bias=False)


def main(steps: int = 30) -> list[float]:
    dist.init_process_group("gloo")
    rank, size = dist.get_rank(), dist.get_world_size()
    torch.manual_seed(0)
    model = Model()
    mesh = init_device_mesh("cpu", (size,))
    for part in (model.trunk, model.value, model.lm_head):
        fully_shard(part, mesh=mesh)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    generator = torch.Generator().manual_seed(1 + rank)
    states = torch.randint(VOCAB, (BATCH, LENGTH), generator=generator)
    actions = torch.randint(VOCAB, (BATCH, LENGTH), generator=generator)
    mask = torch.arange(LENGTH) < torch.randint(1, LENGTH + 1, (BATCH, 1), generator=generator)
    with torch.no_grad():
        hidden = model.trunk(states)
        old = linear_logprobs(hidden, model.lm_head.weight, actions, mask=mask).logprobs
        targets = KLQTargets(old, model.value(hidden).squeeze(-1), 0.5 - actions / VOCAB)
    # as under DDP: the valid tokens of all processes over the number of processes
    tokens = mask.sum().float()
    dist.all_reduce(tokens)
    losses = []
    for step in range(steps):
        hidden = model.trunk(states)
        values = model.value(hidden).squeeze(-1)
        loss = fused_klq_loss(
            hidden, model.lm_head.weight, actions, values, targets=targets, mask=mask, tau=0.5, denom=tokens / size
        ).loss
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
        if rank == 0 and step % 5 == 0:
            print(f"step {step:2d}  loss {losses[-1]:.4f}", flush=True)
    dist.destroy_process_group()
    return losses


if __name__ == "__main__":
    main()
