"""The shapes that are measured: N valid tokens x H hidden x V vocabulary, by preset or by the record they come from."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


class Shape(NamedTuple):
    """A head problem. ``ragged``: padded sequences with prompts masked out, rather than N tokens in a row."""

    name: str
    tokens: int
    hidden: int
    vocab: int
    dtype: torch.dtype = torch.bfloat16
    ragged: bool = False
    softcap: float | None = None

    @property
    def dtype_name(self) -> str:
        return next(name for name, dtype in DTYPES.items() if dtype == self.dtype)


class Scan(NamedTuple):
    """A scan problem: B sequences of T tokens."""

    name: str
    batch: int
    length: int
    dtype: torch.dtype = torch.float32
    ragged: bool = False

    @property
    def tokens(self) -> int:
        return self.batch * self.length

    @property
    def dtype_name(self) -> str:
        return next(name for name, dtype in DTYPES.items() if dtype == self.dtype)


# Shapes of published measurements (hardware and figures differ: only what one run measured side by side is compared).
RECORDS = {
    "llama3-8b": Shape("llama3-8b", 16 * 1024, 4096, 128_256),
    "qwen3-8b": Shape("qwen3-8b", 8192, 4096, 151_936),
    "gemma2-2b": Shape("gemma2-2b", 8192, 2304, 256_000, softcap=30.0),
    "pythia-1b": Shape("pythia-1b", 8192, 2048, 50_304),
    "trl-7244": Shape("trl-7244", 8192, 4096, 151_936),
    "trl-6858": Shape("trl-6858", 16_384, 2048, 248_320),
    "liger-1356": Shape("liger-1356", 8192, 4096, 128_256),
    "few-tokens": Shape("few-tokens", 512, 4096, 128_256),
}

HEAD_PRESETS = {
    "tiny": [Shape("tiny", 96, 64, 1000, torch.float32, ragged=True)],
    "quick": [Shape("quick", 128, 128, v, torch.float32, ragged=True) for v in (8192, 32_768, 128_256)],
    "full": [
        Shape("full", n, 1024, 50_304, dtype, ragged=True)
        for dtype in (torch.float32, torch.bfloat16)
        for n in (256, 512, 1024, 2048)
    ],
    **{name: [shape] for name, shape in RECORDS.items()},
}

SCAN_PRESETS = {
    "tiny": [Scan("tiny", 4, 64, ragged=True)],
    "quick": [Scan("quick", 64, t, ragged=True) for t in (128, 512, 2048)],
    "full": [
        *(Scan("full", b, t) for b, t in ((4096, 128), (512, 4096), (4096, 2048), (8192, 2048))),
        *(Scan("full", b, t, ragged=True) for b, t in ((512, 4096), (64, 8192))),
        Scan("full", 16, 131_072),
    ],
}

# A whole training step is a language model of this many layers around the head.
STEP_LAYERS = 2


def scaled(shape: Shape, axis: str, value: int) -> Shape:
    """The shape with its ``axis`` (tokens, hidden or vocab) set to ``value``."""
    if axis not in ("tokens", "hidden", "vocab"):
        raise ValueError(f"axis: must be tokens, hidden or vocab, got {axis!r}")
    return Shape(**{**shape._asdict(), axis: value})


def lengths(tokens: int, sequences: int, *, ragged: bool, generator: torch.Generator) -> list[int]:
    """How many valid tokens each sequence has: equal shares, or ragged ones (log-normal, as responses are)."""
    if not ragged or tokens < 2 * sequences:
        share = math.ceil(tokens / sequences)
        return [min(share, tokens - start) for start in range(0, tokens, share)]
    weights = torch.exp(0.6 * torch.randn(sequences, generator=generator))
    counts = (weights / weights.sum() * (tokens - sequences)).long() + 1
    counts[0] += tokens - int(counts.sum())
    return [int(c) for c in counts]
