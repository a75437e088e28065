"""The policy: a small GPT-NeoX (the architecture of Pythia, which the paper trains), warm-started on mixed writing."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import islice

import torch
from torch import Tensor
from transformers import GPTNeoXConfig, GPTNeoXForCausalLM, PreTrainedTokenizerBase

from . import task

IGNORED = -100  # transformers' label of a token that is not trained on


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


def encode(tokenizer: PreTrainedTokenizerBase, examples: list[tuple[str, str]]) -> dict[str, Tensor]:
    """Prompt + summary + EOS, padded on the right (so positions count from 0 by themselves), summaries labelled."""
    pairs = [
        (tokenizer.encode(prompt), [*tokenizer.encode(summary), tokenizer.eos_token_id]) for prompt, summary in examples
    ]
    width = max(len(prompt) + len(summary) for prompt, summary in pairs)
    ids = torch.full((len(pairs), width), tokenizer.pad_token_id)
    labels = torch.full_like(ids, IGNORED)
    for row, (prompt, summary) in enumerate(pairs):
        end = len(prompt) + len(summary)
        ids[row, :end] = torch.tensor(prompt + summary)
        labels[row, len(prompt) : end] = torch.tensor(summary)
    return {"input_ids": ids, "attention_mask": (ids != tokenizer.pad_token_id).long(), "labels": labels}


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
    stream = task.examples(f"warm start {seed}")
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, total_steps=max(steps, 2))
    for _ in range(steps):
        loss = model(**encode(tokenizer, list(islice(stream, batch)))).loss
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        yield loss.item()
