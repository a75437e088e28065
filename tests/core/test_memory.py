"""Peak memory on a CPU, measured from outside: what a fresh process grows by during one call."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

N, V, H = 1024, 65536, 256
WORKSPACE = 32 * 2**20
SLACK = 12 * 2**20  # packing buffers of the matrix library, the autograd engine's thread, fragmentation
GRADIENTS = 4 * (V * H + N * H + N)
LOGITS = 4 * N * V

SCRIPT = """
import json, sys
import torch
from klq_kernels import fused_klq_loss, reference

fused, n, vocab, width, workspace = json.loads(sys.argv[1])

def resident(field):  # getrusage would also count the process that this one was forked from
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) * 1024 for line in status if line.startswith(field))

def step(n, vocab):
    hidden, weight = torch.randn(1, n, width, requires_grad=True), torch.randn(vocab, width).mul_(0.1).requires_grad_()
    values = torch.zeros(1, n, requires_grad=True)
    actions = torch.randint(0, vocab, (1, n))
    keywords = {"ref_logprobs": torch.zeros(1, n), "rewards": torch.zeros(1, n)}
    before = resident("VmRSS:")
    if fused:
        loss = fused_klq_loss(hidden, weight, actions, values, workspace_bytes=workspace, **keywords).loss
    else:
        loss = reference.naive_klq_loss(hidden, weight, actions, values, **keywords).loss
    loss.backward()
    return resident("VmHWM:") - before

step(64, 1000)
print(step(n, vocab))
"""


def growth(*, fused: bool) -> int:
    """Bytes by which the peak of one forward and backward lies above the resident memory just before it."""
    command = [sys.executable, "-c", SCRIPT, json.dumps([fused, N, V, H, WORKSPACE])]
    return int(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_peak_stays_within_the_workspace() -> None:
    """Beyond its gradients the fused call needs the workspace and 10%; naive needs the logits several times over."""
    over = growth(fused=True) - GRADIENTS
    assert over <= 1.1 * WORKSPACE + SLACK, f"{over / 2**20:.1f} MiB over the gradients"
    naive = growth(fused=False) - GRADIENTS
    assert naive >= 2 * LOGITS
    assert naive >= 5 * over
