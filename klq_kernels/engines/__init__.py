"""Inference engines that sample for a trainer and follow its weights.

protocol         what an engine does, what it is asked and what it answers; the errors
weights          a model's weights as files of bounded size
vllm_process     vLLM in a process of its own, a child of the trainer
vllm_server      vLLM as a server, over HTTP
vllm_worker      the part that runs inside vLLM: takes weights, says which model it serves

An engine knows nothing of a trainer: ``klq_kernels.trainer.engine`` makes a rollout function of one.
"""

from __future__ import annotations

from .protocol import Engine, EngineError, Facts, Generated, Model, Request, WeightsLost
from .vllm_process import VLLMProcess
from .vllm_server import VLLMServer

__all__ = [
    "Engine",
    "EngineError",
    "Facts",
    "Generated",
    "Model",
    "Request",
    "VLLMProcess",
    "VLLMServer",
    "WeightsLost",
]
