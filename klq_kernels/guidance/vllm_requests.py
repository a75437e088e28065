"""Guided decoding in vLLM: a logits processor that tilts the requests that ask for it.

    processor = "klq_kernels.guidance.vllm_requests:GuidedRequests"
    llm = LLM(model, logits_processors=[processor], additional_config={"klq_guide": "folder of the guide"})
    llm.generate(prompts, SamplingParams(extra_args={"guide_eta": 0.1}))

vLLM batches requests of different lengths, which come and go between steps. So each request has a ``GuidedLogits`` of
its own, with a cache of its own: a step reads 1 + k tokens of the guide for each guided request, one request after
another. vLLM applies a processor before it divides by a request's temperature, as transformers does.

This module imports vLLM, and is imported by vLLM alone.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from vllm import SamplingParams
from vllm.v1.sample.logits_processor import AdapterLogitsProcessor

from ..call.checks import require
from .decoding import GuidedLogits, check_guidance
from .guide import ValueGuide

FOLDER = "klq_guide"  # in additional_config
PREFIX = "guide_"  # of the arguments of GuidedLogits in a request's extra_args
ARGUMENTS = ("eta", "top_k", "others", "offset")


def guidance(params: SamplingParams) -> dict[str, Any] | None:
    """The arguments of ``GuidedLogits`` that a request gives, or None where it asks for no guidance.

    Raises:
        ValueError: naming what is unknown or out of range.
    """
    given = {name: value for name, value in (params.extra_args or {}).items() if name.startswith(PREFIX)}
    if not given:
        return None
    known = [PREFIX + name for name in ARGUMENTS]
    unknown = [name for name in given if name not in known]
    require(not unknown, "extra_args", f"has {', '.join(unknown)}; of guidance it may have {', '.join(known)}")
    require(known[0] in given, "extra_args", f"lacks {known[0]}, in units of reward per nat")
    found = {name.removeprefix(PREFIX): value for name, value in given.items()}
    found["temperature"] = params.temperature or 1.0  # 0 is greedy: the likeliest token at any temperature
    check_guidance(**found)
    return found


class GuidedRequests(AdapterLogitsProcessor):
    """Tilts requests with ``guide_eta`` in their ``extra_args``, and leaves the others alone."""

    def __init__(self, vllm_config: Any, device: torch.device, is_pin_memory: bool) -> None:
        super().__init__(vllm_config, device, is_pin_memory)
        folder = (vllm_config.additional_config or {}).get(FOLDER)
        require(
            isinstance(folder, str),
            "additional_config",
            f"must hold {FOLDER!r}, the folder that ValueGuide.save_pretrained wrote; got {folder!r}",
        )
        self._guide = ValueGuide.from_pretrained(str(folder)).to(device).eval()

    @classmethod
    def validate_params(cls, sampling_params: SamplingParams) -> None:
        """Called by vLLM where a request comes in."""
        guidance(sampling_params)

    def is_argmax_invariant(self) -> bool:
        """Guidance changes which token is the likeliest."""
        return False

    def new_req_logits_processor(self, params: SamplingParams) -> Any:
        """A function of prompt, output so far and logits [V] that returns guided logits, or None."""
        given = guidance(params)
        if given is None:
            return None
        guided = GuidedLogits(self._guide, **given)

        def tilt(prompt: list[int], output: list[int], logits: Tensor) -> Tensor:
            ids = torch.tensor([[*prompt, *output]], device=logits.device)
            return guided(ids, logits[None])[0]

        return tilt
