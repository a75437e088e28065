"""The policy: a small GPT-NeoX (the architecture of Pythia, which the paper trains), warm-started on mixed writing."""

from __future__ import annotations

from collections.abc import Iterator

from transformers import GPTNeoXConfig, GPTNeoXForCausalLM, PreTrainedTokenizerBase

from ..tasks.warm_start import supervise
from . import task


def build_model(tokenizer: PreTrainedTokenizerBase) -> GPTNeoXForCausalLM:
    """Random weights, no dropout."""
    config = GPTNeoXConfig(
        vocab_size=len(tokenizer),
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=3,
        num_attention_heads=4,
        max_position_embeddings=256,
        initializer_range=0.05,
        bos_token_id=tokenizer.eos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return GPTNeoXForCausalLM(config).eval()


def warm_start(
    model: GPTNeoXForCausalLM,
    tokenizer: PreTrainedTokenizerBase,
    *,
    seed: int,
    steps: int,
    batch: int = 64,
    lr: float = 3e-3,
) -> Iterator[float]:
    """Supervised steps on the mixed writers' summaries; yields the loss of each."""
    return supervise(model, tokenizer, task.examples(f"warm start {seed}"), steps=steps, batch=batch, lr=lr)
