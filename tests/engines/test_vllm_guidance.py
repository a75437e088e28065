"""Guided decoding in vLLM: its requests are tilted as ``generate`` tilts rows; vLLM itself where it is installed."""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
import types
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from transformers import LogitsProcessorList

from klq_kernels.guidance import GuidedLogits, Law, ValueGuide

ROOT = Path(__file__).parents[2]
PROMPTS = [[5, 9, 11], [7], [3, 4, 8, 12, 6]]
SIZES = {"hidden_size": 128, "head_dim": 32}  # heads that vLLM's kernels take


@dataclass
class Parameters:
    """The part of vLLM's ``SamplingParams`` that guidance reads."""

    extra_args: dict[str, Any] | None = None
    temperature: float = 1.0


class Adapter:
    """The part of vLLM's ``AdapterLogitsProcessor`` that guidance calls."""

    def __init__(self, vllm_config: Any, device: torch.device, is_pin_memory: bool) -> None:
        pass


@pytest.fixture
def requests(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """The module, over stand-ins for what it imports of vLLM."""
    for name, content in {
        "vllm": {"SamplingParams": Parameters, "__path__": []},
        "vllm.v1": {"__path__": []},
        "vllm.v1.sample": {"__path__": []},
        "vllm.v1.sample.logits_processor": {"AdapterLogitsProcessor": Adapter},
    }.items():
        module = types.ModuleType(name)
        vars(module).update(content)
        monkeypatch.setitem(sys.modules, name, module)
    name = "klq_kernels.guidance.vllm_requests"
    monkeypatch.delitem(sys.modules, name, raising=False)
    yield importlib.import_module(name)
    sys.modules.pop(name, None)


def save_guide(folder: Path) -> ValueGuide:
    guide = ValueGuide(tiny.model("qwen3", seed=6, **SIZES).float(), Law("categorical", 3))
    guide.wake(0)
    with torch.no_grad():
        guide.head.weight.mul_(4)
    guide.save_pretrained(folder)
    return guide.eval()


def test_requests_are_tilted_as_rows_of_generate_are(requests: Any, tmp_path: Path) -> None:
    """Three requests, of which one begins two steps later and one another ends in between."""
    guide = save_guide(tmp_path)
    config = types.SimpleNamespace(additional_config={"klq_guide": str(tmp_path)})
    processor = requests.GuidedRequests(config, torch.device("cpu"), False)
    etas = (0.05, 1.0, 0.3)
    tilts = [processor.new_req_logits_processor(Parameters({"guide_eta": e, "guide_top_k": 4})) for e in etas]
    alone = [GuidedLogits(guide, e, top_k=4) for e in etas]
    outputs: list[list[int]] = [[], [], []]
    generator = torch.Generator().manual_seed(0)
    for step, running in enumerate([(0, 1), (1, 0), (2, 0, 1), (0, 2), (2,)]):
        for i in running:
            logits = 3 * torch.randn(tiny.VOCAB, generator=generator)
            found = tilts[i](PROMPTS[i], outputs[i], logits)
            wanted = alone[i](torch.tensor([PROMPTS[i] + outputs[i]]), logits[None])[0]
            torch.testing.assert_close(found, wanted, rtol=0, atol=0)
            assert not torch.equal(found, logits), (step, i)
            outputs[i].append(int(found.argmax()))
    assert not processor.is_argmax_invariant()


def test_a_request_without_guidance_is_left_alone(requests: Any, tmp_path: Path) -> None:
    save_guide(tmp_path)
    config = types.SimpleNamespace(additional_config={"klq_guide": str(tmp_path)})
    processor = requests.GuidedRequests(config, torch.device("cpu"), False)
    assert processor.new_req_logits_processor(Parameters()) is None
    assert processor.new_req_logits_processor(Parameters({"other": 1})) is None


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"guide_eta": 0.0}, "eta"),
        ({"guide_eta": 0.1, "guide_top_k": 0}, "top_k: must be at least 1"),
        ({"guide_top_k": 5}, "extra_args: lacks guide_eta"),
        ({"guide_eta": 0.1, "guide_topk": 5}, "extra_args: has guide_topk; of guidance it may have guide_eta, "),
    ],
)
def test_a_bad_request_is_refused_where_it_comes_in(requests: Any, given: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        requests.GuidedRequests.validate_params(Parameters(given))


def test_an_engine_without_a_guide_says_so(requests: Any, tmp_path: Path) -> None:
    for content, message in (({}, "must hold 'klq_guide'"), ({"klq_guide": str(tmp_path)}, "is no guide, it lacks")):
        config = types.SimpleNamespace(additional_config=content)
        with pytest.raises(ValueError, match=message):
            requests.GuidedRequests(config, torch.device("cpu"), False)


SCRIPT = """
import json, sys
from vllm import LLM, SamplingParams
from vllm.exceptions import VLLMValidationError

if __name__ == "__main__":
    model, guide, prompts, requests = sys.argv[1], sys.argv[2], *map(json.loads, sys.argv[3:5])
    llm = LLM(
        model, dtype="float32", skip_tokenizer_init=True, max_model_len=64, enforce_eager=True,
        logits_processors=["klq_kernels.guidance.vllm_requests:GuidedRequests"], additional_config={"klq_guide": guide},
        kv_cache_memory_bytes=2**27,
    )
    parameters = [
        SamplingParams(temperature=0.0, max_tokens=n, ignore_eos=True, detokenize=False, extra_args=extra)
        for n, extra in requests
    ]
    try:
        llm.generate({"prompt_token_ids": [1]}, SamplingParams(extra_args={"guide_eta": -1.0}), use_tqdm=False)
    except VLLMValidationError as error:
        refused = str(error)
    out = llm.generate([{"prompt_token_ids": p} for p in prompts], parameters, use_tqdm=False)
    with open(sys.argv[5], "w") as file:
        json.dump([refused, [list(each.outputs[0].token_ids) for each in out]], file)
"""


@pytest.mark.skipif(find_spec("vllm") is None, reason="vLLM is not installed (make test-engines runs this with it)")
def test_vllm_writes_what_generate_writes(tmp_path: Path) -> None:
    """Greedy requests of unequal lengths and prices, one of them unguided, against transformers one by one."""
    reference = tiny.model("qwen3", **SIZES).float()
    reference.save_pretrained(tmp_path / "model")
    guide = save_guide(tmp_path / "guide")
    extras: list[tuple[int, dict[str, Any] | None]] = [
        (9, {"guide_eta": 0.05, "guide_top_k": 6}), (3, {"guide_eta": 0.5}), (7, None),
    ]  # fmt: skip
    script = tmp_path / "guided.py"
    script.write_text(SCRIPT)
    written = tmp_path / "written.json"
    arguments = [tmp_path / "model", tmp_path / "guide", json.dumps(PROMPTS), json.dumps(extras), written]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, script, *arguments], capture_output=True, text=True, timeout=500, check=False,
        env=environment, cwd=tmp_path,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    refused, found = json.loads(written.read_text())
    assert "eta: must be" in refused
    plain = []
    for prompt, (new, extra), tokens in zip(PROMPTS, extras, found, strict=True):
        settings = {"do_sample": False, "max_new_tokens": new, "min_new_tokens": new, "pad_token_id": tiny.PAD}
        given = {name.removeprefix("guide_"): value for name, value in (extra or {}).items()}
        processors = LogitsProcessorList([GuidedLogits(guide, **given)] if extra else [])
        ids = torch.tensor([prompt])
        out = reference.generate(ids, eos_token_id=None, logits_processor=processors, **settings)
        assert out[0, len(prompt) :].tolist() == tokens
        unguided = reference.generate(ids, eos_token_id=None, **settings)
        plain.append(unguided[0, len(prompt) :].tolist() == tokens)
    assert plain == [False, False, True]
