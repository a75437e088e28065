"""A tiny model that samples token by token: the arithmetic of the engines in the tests."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM


class Sampler:
    """Random weights in the shape of a configuration, until others are loaded."""

    def __init__(self, config: Any, dtype: str) -> None:
        torch.manual_seed(99)
        self.model = AutoModelForCausalLM.from_config(config).to(getattr(torch, dtype)).eval()
        self.prefixes: dict[tuple[int, ...], Tensor] = {}  # logits after prompts seen before, as engines cache them

    def load(self, weights: Iterable[tuple[str, Tensor]]) -> None:
        """All weights. What has been cached stays, as it does in an engine that is not told to drop it."""
        missing, unexpected = self.model.load_state_dict(dict(weights), strict=False)
        own = {name for name, _ in self.model.named_parameters()}  # of tied weights, the first name
        if unexpected or own & set(missing):
            raise KeyError(f"missing {sorted(own & set(missing))}, unexpected {unexpected}")

    @torch.no_grad()
    def complete(
        self, prompt: list[int], *, seed: int, temperature: float, max_tokens: int, stop: list[int], top_k: int = 0,
        raw: bool = False,
    ) -> tuple[list[int], list[float]]:  # fmt: skip
        """(token ids, log-probabilities) of a completion; ``raw``: log-probabilities before temperature and top_k."""
        generator = torch.Generator().manual_seed(seed)
        if tuple(prompt) not in self.prefixes:
            self.prefixes[tuple(prompt)] = self.model(torch.tensor([prompt])).logits[0, -1].float()
        logits, ids, logprobs = self.prefixes[tuple(prompt)], list[int](), list[float]()
        while True:
            scaled = logits / temperature
            if top_k:
                scaled = scaled.masked_fill(scaled < scaled.topk(top_k).values[-1], -torch.inf)
            logp = scaled.log_softmax(0)
            ids.append(int(torch.multinomial(logp.exp(), 1, generator=generator)))
            logprobs.append((logits.log_softmax(0) if raw else logp)[ids[-1]].item())
            if len(ids) == max_tokens or ids[-1] in stop:
                return ids, logprobs
            logits = self.model(torch.tensor([prompt + ids])).logits[0, -1].float()
