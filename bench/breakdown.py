"""Where the time of the fused loss goes: the three products, the two row kernels, and what is left."""

from __future__ import annotations

import torch

from klq_kernels import planner
from klq_kernels.ops.dispatch import backend_for

from .contenders import Call, Outputs
from .harness import take_turns
from .inputs import HeadInputs


def row_kernels(inputs: HeadInputs) -> dict[str, Call]:
    """row_stats and row_grad_ over as many rows as the loss has, chunk by chunk in a buffer like its own."""
    weight = inputs.weight
    vocab, n, device = weight.shape[0], inputs.tokens, weight.device
    rows = planner.chunk_rows(n, vocab, weight.dtype, device, None)
    backend = backend_for(device)
    buffer = torch.zeros(rows, planner.row_stride(vocab), dtype=weight.dtype, device=device)[:, :vocab]
    actions = inputs.valid(inputs.actions)
    lse, logp, d_logp = (torch.full((n,), x, dtype=torch.float32, device=device) for x in (10.0, 0.0, 1e-3))
    scale = {"scale": 1.0, "softcap": inputs.softcap}
    chunks = [slice(start, min(start + rows, n)) for start in range(0, n, rows)]

    def statistics() -> Outputs:
        for c in chunks:
            backend.row_stats(buffer[: c.stop - c.start], actions[c], lse[c].clone(), logp[c], None, **scale)
        return {}

    def gradient() -> Outputs:
        for c in chunks:
            backend.row_grad_(
                buffer[: c.stop - c.start], actions[c], lse[c], d_logp[c], -d_logp[c], None, None, **scale
            )
        return {}

    return {"row_stats": statistics, "row_grad_": gradient}


def breakdown(inputs: HeadInputs, whole_ms: float, gemms_ms: float, rounds: int) -> dict[str, float]:
    """ms by part; ``rest`` is what neither bare products nor row kernels explain: chunking, dW in fp32, the scan."""
    samples = take_turns(row_kernels(inputs), inputs.weight.device, rounds, 10.0)
    parts = {"three GEMMs": gemms_ms}
    for name, taken in samples.items():
        values = sorted(t[1] if isinstance(t, tuple) else t for t in taken)
        parts[name] = values[len(values) // 2]
    return {**parts, "rest": whole_ms - sum(parts.values())}
