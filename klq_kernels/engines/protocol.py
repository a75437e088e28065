"""What an engine does for a trainer.

    start            makes it ready, and says which model it serves
    take_weights     replaces all of its weights; what it has cached under the old ones is dropped
    generate         samples a completion for each prompt, and says how likely each of its tokens was
    stop             ends it; a stopped engine can be started again

A trainer calls these one after another; ``generate`` may be called from another thread than the rest. Each of them
returns when its work is done, or raises within the time that the engine was given: a ``ValueError`` where the request
cannot be served as it is, an ``EngineError`` where the engine fails. Every completion has a seed of its own, so that it
does not depend on what else is sampled beside it, and a run that is resumed asks for the same ones.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Protocol

from torch import Tensor

RESUME = "Checkpoints written so far are complete: train(resume_from_checkpoint=True) goes on from the last one"


class EngineError(RuntimeError):
    """The engine is dead, too slow, or answers what it was not asked. The message says which, and what to do."""


class WeightsLost(EngineError):
    """The engine runs, with other weights than those it was given last: it was restarted, or another run uses it."""


@dataclass(frozen=True)
class Model:
    """The model that is to be served."""

    config: Any  # its transformers configuration, with ``architectures``
    dtype: str  # of its weights in the engine, such as "bfloat16"
    device: str = "cpu"  # where the trainer's process has it, such as "cuda:1"


@dataclass(frozen=True)
class Facts:
    """What an engine says of the model that it serves."""

    config: dict[str, Any]  # entries of the configuration, by transformers' names
    max_length: int  # tokens of prompt and completion together


# Entries of a configuration that two models with the same weights have in common.
SHAPE = ("model_type", "vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size")


@dataclass(frozen=True)
class Request:
    """A completion for each prompt, sampled at ``temperature``.

    The other numbers have the meaning that they have in transformers' ``GenerationConfig``; by their defaults the whole
    distribution is sampled from. Tokens in ``stop_ids`` end a completion and belong to it; no others do.
    """

    prompt_ids: list[list[int]]
    seeds: list[int]  # one for each prompt, in [0, 2^31)
    max_tokens: int
    temperature: float = 1.0
    stop_ids: tuple[int, ...] = ()
    top_k: int = 0  # 0: all
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0


@dataclass(frozen=True)
class Generated:
    """Completions in the order of the prompts, and log-probabilities of their tokens under what was sampled from."""

    completion_ids: list[list[int]]
    logprobs: list[list[float]]


class Engine(Protocol):
    """An engine; see above."""

    shared: bool  # serves all processes of a trainer, so that one of them gives it weights; else each has its own

    def start(self, model: Model) -> Facts:
        """Makes the engine ready to serve a model; it may not have the model's weights yet."""

    def take_weights(self, weights: Iterable[tuple[str, Tensor]], version: str) -> None:
        """Replaces all weights by ``weights``, (name, whole tensor) as in a checkpoint, which it asks for one by one.

        ``version`` is what the engine calls them from then on; no two updates have the same.
        """

    def generate(self, request: Request, version: str) -> Generated:
        """Samples under the weights ``version``.

        Raises:
            WeightsLost: where the engine has others.
        """

    def stop(self) -> None:
        """Ends the engine, or the connection to one that others started; does nothing where there is none."""


def sampling(request: Request) -> dict[str, Any]:
    """A request's sampling parameters but for the seed, by vLLM's names.

    All are stated: vLLM takes what is left open from the model's ``generation_config.json``.
    """
    return {
        "temperature": request.temperature, "max_tokens": request.max_tokens, "top_k": request.top_k,
        "top_p": request.top_p, "min_p": request.min_p, "repetition_penalty": request.repetition_penalty,
        "presence_penalty": 0.0, "frequency_penalty": 0.0, "stop_token_ids": list(request.stop_ids),
        "ignore_eos": True, "logprobs": 0,
    }  # fmt: skip


def check_ends(reasons: set[str | None]) -> None:
    """Raises an EngineError unless completions ended by a token of ``stop_ids`` or their length, by vLLM's names."""
    others = reasons - {"stop", "length"}
    if others:
        raise EngineError(f"vLLM broke off completions ({', '.join(map(str, others))}): does another client pause it?")
