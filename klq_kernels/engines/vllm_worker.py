"""The part that runs inside vLLM; everything here imports vLLM, and nothing else of the package imports it.

vLLM loads it in each of its worker processes, because ``Extension`` is named as its ``worker_extension_cls``. Importing
it enters ``FileTransfer`` among vLLM's weight-transfer engines, by the name ``BACKEND``. An update is then vLLM's own:
start_weight_update, update_weights once for each file of weights, finish_weight_update. Between the first and the last
vLLM collects the weights of a layer until it has all, and brings them into the form in which its kernels read them.

As a program (``python -m klq_kernels.engines.vllm_worker FD``) it is the child process of ``VLLMProcess``: it reads
(method, arguments) from the connection whose file descriptor it gets, calls ``Served``, and writes back what came of
it. It ends when the connection does.
"""

from __future__ import annotations

import os
import sys
import traceback
from collections import Counter
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import Any

import torch
from safetensors.torch import load_file
from vllm.distributed.weight_transfer.base import (
    WeightTransferEngine,
    WeightTransferInitInfo,
    WeightTransferUpdateInfo,
)
from vllm.distributed.weight_transfer.factory import WeightTransferEngineFactory
from vllm.model_executor.model_loader.reload import finalize_layerwise_reload, initialize_layerwise_reload

from .protocol import SHAPE, Generated, Request, check_ends, sampling

BACKEND = "klq_kernels"
EXTENSION = "klq_kernels.engines.vllm_worker.Extension"


@dataclass
class Nothing(WeightTransferInitInfo):
    """There is nothing to agree on beforehand."""


@dataclass
class File(WeightTransferUpdateInfo):
    """One bucket of weights."""

    path: str


class FileTransfer(WeightTransferEngine):
    """Loads weights from files."""

    init_info_cls = Nothing
    update_info_cls = File

    def init_transfer_engine(self, init_info: Nothing) -> None:
        pass

    def start_weight_update(self) -> None:
        initialize_layerwise_reload(self.model)

    def update_weights(self, update_info: dict[str, Any]) -> None:
        self.receive_weights(self.parse_update_info(update_info))  # all is loaded when it returns: nothing to wait for

    def receive_weights(self, update_info: File) -> None:
        self.model.load_weights(iter(load_file(update_info.path).items()))

    def finish_weight_update(self) -> None:
        finalize_layerwise_reload(self.model, self.model_config)
        for layer in tied_layers(self.model):
            layer.quant_method.process_weights_after_loading(layer)

    def shutdown(self) -> None:
        pass


def tied_layers(model: Any) -> list[Any]:
    """Layers that share their weight with another, such as a head with the embeddings.

    The weight comes once, for one of them. The others keep what they made of it before: on a CPU, a packed copy.
    """
    layers = [layer for layer in model.modules() if isinstance(getattr(layer, "weight", None), torch.Tensor)]
    shared = Counter(id(layer.weight) for layer in layers)
    return [layer for layer in layers if shared[id(layer.weight)] > 1 and hasattr(layer, "quant_method")]


if BACKEND not in WeightTransferEngineFactory._registry:
    WeightTransferEngineFactory.register_engine(BACKEND, FileTransfer)


class Extension:
    """Becomes part of vLLM's worker; ``collective_rpc`` calls its methods."""

    def klq_facts(self) -> dict[str, Any]:
        """``Facts`` of the model, and what the log-probabilities are of."""
        config: Any = self.model_config  # type: ignore[attr-defined]
        shape = {name: getattr(config.hf_text_config, name, None) for name in SHAPE}
        return {"config": shape, "max_length": config.max_model_len, "logprobs": str(config.logprobs_mode)}


class Served:
    """vLLM in this process, and what it is asked."""

    llm: Any

    def start(self, options: dict[str, Any]) -> dict[str, Any]:
        from vllm import LLM
        from vllm.config import WeightTransferConfig

        self.llm = LLM(
            **options,
            logprobs_mode="processed_logprobs",
            worker_extension_cls=EXTENSION,
            weight_transfer_config=WeightTransferConfig(backend=BACKEND),
        )
        self.llm.init_weight_transfer_engine({"init_info": {}})
        facts: dict[str, Any] = self.llm.collective_rpc("klq_facts")[0]
        return facts

    def start_weight_update(self) -> None:
        self.llm.start_weight_update()

    def update_weights(self, path: str) -> None:
        self.llm.update_weights({"update_info": {"path": path}})

    def finish_weight_update(self, version: str) -> None:
        self.llm.finish_weight_update(weight_version=version)
        if not self.llm.reset_prefix_cache():
            raise RuntimeError("the prefix cache could not be emptied, and holds keys and values of the old weights")

    def generate(self, request: Request) -> Generated:
        from vllm import SamplingParams

        prompts = [{"prompt_token_ids": ids} for ids in request.prompt_ids]
        parameters = [SamplingParams(**sampling(request), seed=seed, detokenize=False) for seed in request.seeds]
        chosen = [output.outputs[0] for output in self.llm.generate(prompts, parameters, use_tqdm=False)]
        check_ends({output.finish_reason for output in chosen})
        ids = [list(output.token_ids) for output in chosen]
        logprobs = [
            [entry[token].logprob for token, entry in zip(row, output.logprobs, strict=True)]
            for row, output in zip(ids, chosen, strict=True)
        ]
        return Generated(ids, logprobs)


def serve(connection: Connection) -> None:
    """Answers until the other end is closed."""
    served = Served()
    while True:
        try:
            method, arguments = connection.recv()
        except EOFError:
            return
        try:
            answer = ("done", getattr(served, method)(**arguments))
        except Exception as error:
            traceback.print_exc()
            answer = ("failed", f"{type(error).__name__}: {error}")
        connection.send(answer)


if __name__ == "__main__":
    descriptor = int(sys.argv[1])
    os.set_inheritable(descriptor, False)
    serve(Connection(descriptor))
    os._exit(0)  # vLLM's threads are of no more use, and some would keep the process alive
