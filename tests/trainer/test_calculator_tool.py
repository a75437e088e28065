"""examples/calculator_tool.py: turns of a policy and a tool, whose tokens are read and not learnt."""

from __future__ import annotations

import re
import runpy
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from klq_kernels.trainer import Completions

pytestmark = pytest.mark.usefixtures("one_thread")
EXAMPLE = Path(__file__).parents[2] / "examples" / "calculator_tool.py"


@pytest.fixture
def example() -> dict[str, Any]:
    return runpy.run_path(str(EXAMPLE))


def answers(example: dict[str, Any], turns: list[list[str]], most: int = 40) -> tuple[list[str], list[str], list[bool]]:
    """(texts, the trained part of each, whether it was cut off), where the policy says ``turns`` to its prompts."""
    tokenizer = example["byte_tokenizer"]()
    contexts: list[list[str]] = []

    def generate(policy: Any, prompts: list[list[int]], config: Any, **_: Any) -> Completions:
        assert set(config.eos_token_id) == {tokenizer.eos_token_id, tokenizer("]")["input_ids"][0]}
        contexts.append(tokenizer.batch_decode(prompts))
        return Completions([tokenizer(text)["input_ids"] for text in turns[len(contexts) - 1]])

    rollout = example["rollout"]
    rollout.__globals__["generate"] = generate
    args = SimpleNamespace(rollout_forward_batch_size=8, device="cpu", max_completion_length=most)
    trainer = SimpleNamespace(tokenizer=tokenizer, args=args, policy=None, generation_config=SimpleNamespace())
    found = rollout(["2*3=", "4*5="], trainer)
    trained = [
        tokenizer.decode([i for i, own in zip(ids, marks, strict=True) if own])
        for ids, marks in zip(found.completion_ids, found.trained, strict=True)
    ]
    assert len(contexts) == len(turns)
    assert contexts[0] == ["2*3=", "4*5="]
    return tokenizer.batch_decode(found.completion_ids), trained, found.truncated


END = "<|endoftext|>"


def test_the_tools_tokens_are_not_the_policys(example: dict[str, Any]) -> None:
    turns = [["[2*3]", f"20.{END}"], ["[6+1]"], [f".{END}"]]
    texts, trained, cut = answers(example, turns)
    assert texts == [f"[2*3]6[6+1]7.{END}", f"20.{END}"]
    assert trained == [f"[2*3][6+1].{END}", f"20.{END}"]
    assert cut == [False, False]


def test_calls_end_and_nothing_is_too_long(example: dict[str, Any]) -> None:
    texts, trained, cut = answers(example, [["[2*3]", "abc"], ["[1+1]"], ["[1+2]"]])
    assert texts == ["[2*3]6[1+1]2[1+2]", "abc"]  # the third call is not answered
    assert trained == ["[2*3][1+1][1+2]", "abc"]
    assert cut == [True, True]
    texts, _, cut = answers(example, [["[99*99]", "[bad]"], ["more"]], most=8)
    assert texts == ["[99*99]9", "[bad]?mo"]
    assert cut == [True, True]


def test_the_calculator(example: dict[str, Any]) -> None:
    calculator = example["calculator"]
    assert [calculator(f"x[{said}]") for said in ("37*48", "5-9", "5+9", "5/9", "")] == ["1776", "-4", "14", "?", "?"]


def test_the_example_trains(example: dict[str, Any], tmp_path: Path) -> None:
    """A few steps; the experience of its last cycle holds the calculator's answers, and trains on none of them."""
    run = example["train"](str(tmp_path), warm_steps=60, episodes=64)
    assert all(torch.tensor([logs["loss"] for logs in run.state.log_history if "loss" in logs]).isfinite())
    answered = 0
    for sequence in run.experience.sequences:
        of_tool = run.tokenizer.decode(sequence.completion[~sequence.trained])
        text = run.tokenizer.decode(sequence.completion[sequence.trained])
        calls = re.findall(r"\[[^\]]*\]", text)
        # the tool answers every closing bracket, one that closes nothing too
        if len(calls) == text.count("]") == 1 and sequence.completion[-1] == run.tokenizer.eos_token_id:
            assert of_tool == example["calculator"](calls[0])
            answered += 1
    assert answered >= 4
