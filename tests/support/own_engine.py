"""An engine in the process of the test: the protocol and nothing else."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from sampler import Sampler
from torch import Tensor

from klq_kernels.engines import Facts, Generated, Model, Request, WeightsLost
from klq_kernels.engines.protocol import SHAPE


class OwnEngine:
    """Samples with a tiny model. ``changes`` are entries that its configuration has in place of the model's."""

    shared = False

    def __init__(self, max_length: int = 64, **changes: Any) -> None:
        self.max_length, self.changes = max_length, changes
        self.sampler: Sampler | None = None
        self.models: list[Model] = []  # that it was started with
        self.versions: list[str] = []  # of the weights that it was given
        self.requests: list[Request] = []
        self.deaf = False  # takes weights and keeps those that it has
        self.lose = 0  # so many of the next requests find other weights than they want

    def start(self, model: Model) -> Facts:
        self.models.append(model)
        self.sampler = Sampler(model.config, model.dtype)
        return Facts({name: getattr(model.config, name, None) for name in SHAPE} | self.changes, self.max_length)

    def take_weights(self, weights: Iterable[tuple[str, Tensor]], version: str) -> None:
        assert self.sampler is not None
        self.versions.append(version)
        given = [(name, weight.clone()) for name, weight in weights]
        if not self.deaf:
            self.sampler.load(given)
            self.sampler.prefixes.clear()

    def generate(self, request: Request, version: str) -> Generated:
        assert self.sampler is not None
        if self.lose:
            self.lose -= 1
            raise WeightsLost("other weights")
        assert version == self.versions[-1]
        self.requests.append(request)
        found = [
            self.sampler.complete(
                prompt, seed=seed, temperature=request.temperature, max_tokens=request.max_tokens,
                stop=list(request.stop_ids), top_k=request.top_k,
            )
            for prompt, seed in zip(request.prompt_ids, request.seeds, strict=True)
        ]  # fmt: skip
        return Generated([ids for ids, _ in found], [logprobs for _, logprobs in found])

    def stop(self) -> None:
        self.sampler = None
