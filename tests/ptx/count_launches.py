"""The Triton kernels that calls launch, counted by the driver in Triton's place (``device``).

    python count_launches.py '[["on-policy", 40, 16, 300, null], …]'

Each call is a path of ``bench.gpu_model``, its tokens, hidden size, vocabulary and workspace; prints a list of
{kernel: launches}. ``machine_plugin`` makes Triton compile for the PTX machine, which runs the kernels.
"""

from __future__ import annotations

import json
import os
import sys
from collections import Counter
from typing import Any

import machine_plugin
import torch

from klq_kernels import KLQTargets, fused_klq_loss, linear_logprobs, reverse_scan

COUNTS: Counter[str] = Counter()


def run(path: str, tokens: int, width: int, vocab: int, workspace: int | None) -> None:
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator)

    ends = torch.tensor([0, tokens // 3, tokens], dtype=torch.int32)
    per_token = [normal(tokens) for _ in range(5)]
    if path == "reverse_scan":
        reverse_scan(per_token[0], 0.9, cu_seqlens=ends)
        return
    hidden, weight = (
        t.bfloat16().requires_grad_(path != "no gradient") for t in (normal(tokens, width), normal(vocab, width))
    )
    weight.requires_grad_(path not in ("no gradient", "head frozen"))
    actions = torch.randint(vocab, (tokens,), generator=generator)
    head: dict[str, Any] = {"cu_seqlens": ends, "workspace_bytes": workspace}
    if path.startswith("log-probs"):
        found = linear_logprobs(hidden, weight, actions, **head)
        if path == "log-probs, backward":
            COUNTS.clear()
            found.logprobs.sum().backward()
        return
    values, ref, *targets = per_token
    values.requires_grad_(path != "no gradient")
    given: dict[str, Any] = {"targets": KLQTargets(*targets)}
    if path == "on-policy":
        given = {"ref_logprobs": ref, "rewards": normal(2)}
    loss = fused_klq_loss(hidden, weight, actions, values, **given, **head).loss
    if path != "no gradient":
        loss.backward()


if __name__ == "__main__":
    os.environ["KLQ_BACKEND"] = "triton"
    machine_plugin.device.STATE["log"] = lambda kernel, *_: COUNTS.update([kernel.name])
    counted = []
    for call in json.loads(sys.argv[1]):
        COUNTS.clear()
        run(*call)
        counted.append(dict(COUNTS))
    print(json.dumps(counted))
