"""Where the time of the fused loss goes: the three products, the work on rows of logits, and what is left."""

from __future__ import annotations

import torch

from klq_kernels.backends import backend_for, vocabulary_major
from klq_kernels.commands import loss_memory
from klq_kernels.vocabulary import chunking
from klq_kernels.vocabulary.chunks import Pull, Statistics, part, slices

from .contenders import Call, Outputs
from .harness import take_turns, typical
from .inputs import HeadInputs


def row_kernels(inputs: HeadInputs) -> dict[str, Call]:
    """A backend's work on as many logits as the loss has, ``statistics`` and ``gradient``, in buffers like its own."""
    return _on_strips(inputs) if vocabulary_major(inputs.weight.device) else _on_rows(inputs)


def _columns(inputs: HeadInputs) -> tuple[torch.Tensor, ...]:
    """(actions, top, log_total, d_logp) of the valid rows."""
    n, device = inputs.tokens, inputs.weight.device
    columns = (torch.full((n,), x, dtype=torch.float32, device=device) for x in (0.0, 10.0, 1e-3))
    return inputs.valid(inputs.actions), *columns


def _on_rows(inputs: HeadInputs) -> dict[str, Call]:
    weight = inputs.weight
    vocab, n, device = weight.shape[0], inputs.tokens, weight.device
    rows = loss_memory.Problem(n, weight.shape[1], vocab, weight.dtype, device).rows
    backend = backend_for(device)
    buffer = torch.zeros(rows, chunking.row_stride(vocab), dtype=weight.dtype, device=device)[:, :vocab]
    actions, top, log_total, d_logp = _columns(inputs)
    found = Statistics._make([*(torch.empty_like(d_logp) for _ in range(3)), None])
    pull = Pull(top, log_total, d_logp, -d_logp)
    head = {"scale": 1.0, "softcap": inputs.softcap}
    chunks = slices(n, rows)

    def statistics() -> Outputs:
        for c in chunks:
            backend.row_stats(buffer[: c.stop - c.start], actions[c], part(found, c), **head)
        return {}

    def gradient() -> Outputs:
        for c in chunks:
            backend.row_grad(buffer[: c.stop - c.start], actions[c], part(pull, c), buffer[: c.stop - c.start], **head)
        return {}

    return {"statistics": statistics, "gradient": gradient}


def _on_strips(inputs: HeadInputs) -> dict[str, Call]:
    vocab, width = inputs.weight.shape
    problem = loss_memory.Problem(inputs.tokens, width, vocab, inputs.weight.dtype, inputs.weight.device)
    backend = backend_for(problem.device)
    actions, top, log_total, d_logp = _columns(inputs)
    running = [torch.zeros_like(d_logp) for _ in range(3)]
    computed = torch.float32 if chunking.widens(problem.dtype, problem.device) else problem.dtype
    logits, out = (torch.zeros(problem.strip_entries, inputs.tokens, dtype=computed) for _ in range(2))
    turned = None if computed == torch.float32 else torch.empty(inputs.tokens * problem.strip_entries, dtype=computed)
    head = {"scale": 1.0, "softcap": inputs.softcap}
    strips = slices(vocab, problem.strip_entries)
    pull = Pull(top, log_total, d_logp, -d_logp)

    def statistics() -> Outputs:
        highest, total, taken = running
        for strip in strips:
            entries = strip.stop - strip.start
            backend.strip_stats(logits[:entries], strip.start, actions, highest, total, None, taken, **head)
        return {}

    def gradient() -> Outputs:
        for strip in strips:
            entries = strip.stop - strip.start
            copy = None if turned is None else turned[: inputs.tokens * entries].view(inputs.tokens, entries)
            backend.strip_grad(logits[:entries], strip.start, actions, pull, out[:entries], copy, **head)
        return {}

    return {"statistics": statistics, "gradient": gradient}


def breakdown(inputs: HeadInputs, whole_ms: float, gemms_ms: float, rounds: int) -> dict[str, float]:
    """ms by part; ``rest`` is what neither bare products nor row kernels explain: chunking, dW in fp32, the scan.

    It is negative where the loss runs its products in a better form than the plain one they are timed in.
    """
    samples = take_turns(row_kernels(inputs), inputs.weight.device, rounds, 10.0)
    parts = {"three GEMMs": gemms_ms}
    for name, taken in samples.items():
        parts[name] = typical(taken)
    return {**parts, "rest": whole_ms - sum(parts.values())}
