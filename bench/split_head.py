"""Memory per process of a head split over 1, 2 and 4 of them: python -m bench.split_head [--write]

Each rank holds its rows of the weight and runs the loss with all gradients, in both ways of splitting: all ranks with
the same tokens (tensor parallel), and each with its share of them (a DTensor, as FSDP2 has it). What a rank holds is
its rows of the weight and the growth of its resident set in the call (``memory.peak_growth``). Before any of it counts,
loss and gradients of the hidden states are compared with those of one process.

--write puts the table into docs/many-processes.md; the figures lie in bench/results/split_head.json.
"""

from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard

from klq_kernels import KLQTargets, fused_klq_loss
from klq_kernels.lab.display import markdown_table, with_text

from . import environment, memory, report

ROOT = Path(__file__).parents[1]
OUTPUT = ROOT / "bench" / "results" / "split_head.json"
PAGE = ROOT / "docs" / "many-processes.md"
TOKENS, WIDTH, VOCAB = 512, 1024, 128_256
RANKS = (1, 2, 4)
WAYS = ("tensor parallel", "FSDP2")
MIB = 2**20


def main() -> None:
    rows = [row for way in WAYS for row in measured(way)]
    described = environment.describe(torch.device("cpu"), "python -m bench.split_head")
    report.save_json(OUTPUT, {"environment": described, "rows": rows})
    if "--write" in sys.argv:
        PAGE.write_text(filled(PAGE.read_text()))
    print(table())


def measured(way: str) -> list[dict[str, Any]]:
    """A row for each number of processes; the first has the truth for the others."""
    rows: list[dict[str, Any]] = []
    truth: dict[str, Tensor] = {}
    for size in RANKS:
        with tempfile.TemporaryDirectory() as folder:
            mp.spawn(_rank, (size, way, folder), nprocs=size)
            found = [torch.load(Path(folder) / f"{rank}.pt") for rank in range(size)]
        apart = way == "FSDP2"
        hidden = torch.cat([f["hidden"] / size for f in found]) if apart else found[0]["hidden"]
        truth = truth or {"loss": found[0]["loss"], "hidden": hidden}
        torch.testing.assert_close(found[0]["loss"], truth["loss"], rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(hidden, truth["hidden"], rtol=1e-4, atol=1e-5 * float(truth["hidden"].abs().max()))
        peaks = [f["weight"] + f["growth"] for f in found]
        rows.append(
            {"way": way, "ranks": size, "peak_bytes": max(peaks), "growth_bytes": max(f["growth"] for f in found)}
        )
        print(rows[-1], flush=True)
    return rows


def _rank(rank: int, size: int, way: str, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=size)
    g = torch.Generator().manual_seed(0)
    hidden, columns = torch.randn(TOKENS, WIDTH, generator=g), torch.randn(4, TOKENS, generator=g)
    actions = torch.randint(VOCAB, (TOKENS,), generator=g)
    # every rank draws its rows from a seed of each block, so that no rank ever holds the whole weight
    blocks = list(range(VOCAB // 32))
    mine = [blocks[len(blocks) * r // size : len(blocks) * (r + 1) // size] for r in range(size)][rank]
    weight = torch.empty(32 * len(mine), WIDTH)
    for i, block in enumerate(mine):
        weight[32 * i : 32 * i + 32] = 0.1 * torch.randn(32, WIDTH, generator=torch.Generator().manual_seed(block))
    apart = way == "FSDP2"
    if apart:
        span = slice(TOKENS * rank // size, TOKENS * (rank + 1) // size)
        hidden, actions, columns = hidden[span].contiguous(), actions[span].contiguous(), columns[:, span].contiguous()
        mesh = init_device_mesh("cpu", (size,))
        weight = DTensor.from_local(
            weight, mesh, [Shard(0)], run_check=False, shape=torch.Size((VOCAB, WIDTH)), stride=(WIDTH, 1)
        )
    leaves = [t.requires_grad_() for t in (hidden, weight, columns[0])]
    ends = torch.tensor([0, len(actions)], dtype=torch.int32)

    def call() -> dict[str, Tensor]:
        loss = fused_klq_loss(
            hidden, weight, actions, leaves[2], targets=KLQTargets(*columns[1:].detach()), cu_seqlens=ends,
            process_group=None if apart else dist.group.WORLD,
        ).loss  # fmt: skip
        by_hidden, by_weight, _ = torch.autograd.grad(loss, leaves)
        return {"loss": loss.detach(), "hidden": by_hidden, "weight": by_weight}

    rows = weight.to_local() if isinstance(weight, DTensor) else weight
    first = call()
    found = {"loss": first["loss"], "hidden": first["hidden"].clone(), "weight": rows.nbytes}
    del first
    found["growth"] = memory.peak_growth(call)
    torch.save(found, Path(folder) / f"{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()


def table() -> str:
    """The committed figures, as docs/many-processes.md shows them."""
    rows = json.loads(OUTPUT.read_text())["rows"]
    alone = {row["way"]: row["peak_bytes"] for row in rows if row["ranks"] == 1}
    body = [
        [
            row["way"], str(row["ranks"]), f"{row['peak_bytes'] / MIB:.0f}", f"{row['growth_bytes'] / MIB:.0f}",
            f"{row['peak_bytes'] / alone[row['way']]:.2f}",
        ]
        for row in rows
    ]  # fmt: skip
    header = ("split", "processes", "weight and call, MiB per process", "of it the call", "of one process")
    return markdown_table(header, body)


def filled(page: str) -> str:
    """The page with the table as it is now."""
    return with_text(page, "memory", table())


if __name__ == "__main__":
    main()
