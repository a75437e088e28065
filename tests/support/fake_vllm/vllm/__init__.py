"""A stand-in for vLLM with the names and calls that ``klq_kernels.engines.vllm_worker`` relies on.

It samples with a tiny model of transformers, so its log-probabilities are real. ``make test-engines`` runs the same
code against vLLM itself.
"""

from __future__ import annotations

import importlib
import sys
import time
import types
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from sampler import Sampler
from transformers import AutoConfig


@dataclass
class WeightTransferConfig:
    backend: str


class WeightTransferEngine:
    """The parts of vLLM's that subclasses use."""

    init_info_cls: Any
    update_info_cls: Any

    def __init__(self, config: Any, vllm_config: Any, device: Any, model: Any) -> None:
        self.model, self.model_config = model, vllm_config.model_config

    def parse_init_info(self, content: dict[str, Any]) -> Any:
        return self.init_info_cls(**content)

    def parse_update_info(self, content: dict[str, Any]) -> Any:
        return self.update_info_cls(**content)


class WeightTransferEngineFactory:
    _registry: dict[str, Any] = {}  # noqa: RUF012  (as vLLM declares it)

    @classmethod
    def register_engine(cls, name: str, engine: type) -> None:
        cls._registry[name] = lambda: engine


class Served:
    """The model as vLLM's loaders see it: weights that come during a reload take effect at its end."""

    pending: dict[str, Any] | None = None

    def __init__(self, sampler: Sampler) -> None:
        self.sampler = sampler

    def modules(self) -> list[Any]:
        return []  # that make copies of their weights

    def load_weights(self, weights: Any) -> None:
        assert self.pending is not None, "outside of a reload"
        self.pending.update({name: weight.clone() for name, weight in weights})


def initialize_layerwise_reload(model: Served) -> None:
    model.pending = {}


def finalize_layerwise_reload(model: Served, model_config: Any) -> None:
    assert model.pending is not None
    model.sampler.load(model.pending.items())
    model.pending = None


@dataclass
class SamplingParams:
    temperature: float = 1.0
    max_tokens: int = 16
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    stop_token_ids: list[int] = field(default_factory=list)
    ignore_eos: bool = False
    logprobs: int | None = None
    seed: int | None = None
    detokenize: bool = True


class Logprob(NamedTuple):
    logprob: float


class Output(NamedTuple):
    token_ids: list[int]
    logprobs: list[dict[int, Logprob]]
    finish_reason: str


class RequestOutput(NamedTuple):
    outputs: list[Output]


class LLM:
    """The engine with one worker. ``slow`` is no option of vLLM's: seconds that each call of ``generate`` takes."""

    def __init__(
        self, model: str, dtype: str, worker_extension_cls: str, weight_transfer_config: WeightTransferConfig,
        logprobs_mode: str = "raw_logprobs", max_model_len: int | None = None, slow: float = 0.0, **_: Any,
    ) -> None:  # fmt: skip
        config = AutoConfig.from_pretrained(model)
        module, _, name = worker_extension_cls.rpartition(".")
        self.worker = getattr(importlib.import_module(module), name)()
        self.worker.model_config = types.SimpleNamespace(
            hf_text_config=config, max_model_len=max_model_len or config.max_position_embeddings,
            logprobs_mode=logprobs_mode,
        )  # fmt: skip
        self.sampler = Sampler(config, dtype)
        engine = WeightTransferEngineFactory._registry[weight_transfer_config.backend]()
        self.transfer = engine(weight_transfer_config, self.worker, "cpu", Served(self.sampler))
        self.raw, self.slow, self.version = logprobs_mode == "raw_logprobs", slow, "default"

    def collective_rpc(self, method: str) -> list[Any]:
        return [getattr(self.worker, method)()]

    def init_weight_transfer_engine(self, request: dict[str, Any]) -> None:
        self.transfer.init_transfer_engine(self.transfer.parse_init_info(request["init_info"]))

    def start_weight_update(self) -> None:
        self.transfer.start_weight_update()

    def update_weights(self, request: dict[str, Any]) -> None:
        self.transfer.update_weights(request["update_info"])

    def finish_weight_update(self, weight_version: str | None = None) -> None:
        self.transfer.finish_weight_update()
        self.version = weight_version or self.version

    def get_weight_version(self) -> str:
        return self.version

    def reset_prefix_cache(self) -> bool:
        self.sampler.prefixes.clear()
        return True

    def generate(
        self, prompts: list[dict[str, list[int]]], parameters: list[SamplingParams], use_tqdm: bool = True
    ) -> list[RequestOutput]:
        time.sleep(self.slow)
        return [RequestOutput([self._complete(p["prompt_token_ids"], s)]) for p, s in zip(prompts, parameters)]  # noqa: B905

    def _complete(self, prompt: list[int], parameters: SamplingParams) -> Output:
        assert parameters.ignore_eos
        assert parameters.seed is not None
        ids, logprobs = self.sampler.complete(
            prompt, seed=parameters.seed, temperature=parameters.temperature, max_tokens=parameters.max_tokens,
            stop=parameters.stop_token_ids, top_k=parameters.top_k, raw=self.raw,
        )  # fmt: skip
        reason = "stop" if ids[-1] in parameters.stop_token_ids else "length"
        return Output(ids, [{token: Logprob(logp)} for token, logp in zip(ids, logprobs, strict=True)], reason)


def _module(name: str, **content: Any) -> None:
    module = sys.modules[name] = types.ModuleType(name)
    vars(module).update(content)


_module("vllm.config", WeightTransferConfig=WeightTransferConfig)
for _name in ("vllm.distributed", "vllm.distributed.weight_transfer", "vllm.model_executor"):
    _module(_name, __path__=[])
_module("vllm.model_executor.model_loader", __path__=[])
_module(
    "vllm.distributed.weight_transfer.base",
    WeightTransferEngine=WeightTransferEngine,
    WeightTransferInitInfo=object,
    WeightTransferUpdateInfo=object,
)
_module("vllm.distributed.weight_transfer.factory", WeightTransferEngineFactory=WeightTransferEngineFactory)
_module(
    "vllm.model_executor.model_loader.reload",
    initialize_layerwise_reload=initialize_layerwise_reload,
    finalize_layerwise_reload=finalize_layerwise_reload,
)
