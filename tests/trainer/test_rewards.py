"""Reward functions: their arguments, the sum of their scores, and errors that name the function."""

from __future__ import annotations

import asyncio
import json
import math
import time
import warnings
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

pytest.importorskip("transformers")

from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
    PreTrainedTokenizerFast,
)

from klq_kernels.trainer import KLQConfig
from klq_kernels.trainer.completions_log import CompletionsLog
from klq_kernels.trainer.rewards import ModelReward, Rewards, Scores, scores_of, unique

CHAT = "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}{% endfor %}"
CHAT += "{% if add_generation_prompt %}<go>{% endif %}"


def score(rewards: Rewards, completions: list[Any], prompts: list[Any] | None = None, **more: Any) -> Scores:
    context = more.pop("context", None)
    return rewards(
        prompts=prompts or ["p"] * len(completions),
        completions=completions,
        completion_ids=[[1, 2]] * len(completions),
        columns=more,
        context=context,
    )


def length(completions: list[str], **_: Any) -> list[float]:
    return [float(len(c)) for c in completions]


async def slow_length(completions: list[str], **_: Any) -> list[float]:
    await asyncio.sleep(0.1)
    return length(completions)


def test_logged_rewards_hide_nothing_whatever_they_are_called(tmp_path: Path):
    log = CompletionsLog(KLQConfig(str(tmp_path), use_cpu=True))
    log.add(4, ["p"], ["c"], Scores(torch.tensor([3.0]), torch.tensor([[1.0, 2.0]])), ["score", "step"])
    row = json.loads((tmp_path / "completions.jsonl").read_text())
    assert row == {"step": 4, "prompt": "p", "completion": "c", "score": 3.0, "rewards": {"score": 1.0, "step": 2.0}}


# Callables


def test_rows_with_other_columns_are_refused_by_name() -> None:
    for rows in ([{"prompt": "a", "x": 1}, {"prompt": "b"}], [{"prompt": "a"}, {"prompt": "b", "x": 1}]):
        with pytest.raises(ValueError, match=r"^dataset: some rows have the column x"):
            scores_of(Rewards(length), tiny.tokenizer(), rows, [[5], [6]])


def test_functions_get_prompts_completions_tokens_and_columns():
    seen: dict[str, Any] = {}

    def spy(
        prompts: list[str], completions: list[str], completion_ids: list[list[int]], answer: list[int]
    ) -> list[int]:
        seen.update(prompts=prompts, completions=completions, ids=completion_ids, answer=answer)
        return answer

    scores = score(Rewards(spy), ["x", "yy"], answer=[3, 4], context="state")
    assert seen == {"prompts": ["p", "p"], "completions": ["x", "yy"], "ids": [[1, 2], [1, 2]], "answer": [3, 4]}
    assert scores.total.tolist() == [3.0, 4.0]
    assert scores.total.dtype == scores.each.dtype == torch.float32


def test_the_trainers_state_goes_where_it_is_asked_for():
    def asks(completions: list[str], trainer_state: Any) -> list[float]:
        return [trainer_state["step"]] * len(completions)

    def takes_anything(completions: list[str], **kwargs: Any) -> list[float]:
        return [kwargs["trainer_state"]["step"]] * len(completions)

    with pytest.raises(ValueError, match=r"asks.*prompts"):  # it has no place for the other keywords
        score(Rewards(asks), ["x"], context={"step": 7})

    def asks_politely(completions: list[str], trainer_state: Any, **_: Any) -> list[float]:
        return asks(completions, trainer_state)

    assert score(Rewards([asks_politely, takes_anything]), ["x"], context={"step": 7}).each.tolist() == [[7.0, 7.0]]


def test_weights_and_skipped_samples():
    def some(completions: list[str], **_: Any) -> list[float | None]:
        return [None, 1.0]

    scores = score(Rewards([length, some], weights=[0.5, -2.0]), ["xxxx", "yy"])
    assert scores.total.tolist() == [2.0, -1.0]
    assert scores.each[1].tolist() == [2.0, 1.0]
    assert scores.each.isnan().tolist() == [[False, True], [False, False]]


def test_a_sample_that_all_skip_scores_zero_and_is_named_once():
    rewards = Rewards([lambda completions, **_: [1.0, None], lambda completions, **_: [None, None]])
    with pytest.warns(RuntimeWarning, match="sample 1 of a batch of 2"):
        scores = score(rewards, ["x", "y"])
    assert scores.total.tolist() == [1.0, 0.0]
    assert scores.each[1].isnan().all()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        score(rewards, ["x", "y"])


@given(
    st.lists(st.lists(st.none() | st.floats(-1e6, 1e6), min_size=3, max_size=3), min_size=1, max_size=4),
    st.lists(st.floats(-10, 10), min_size=4, max_size=4),
)
def test_total_is_the_weighted_sum_of_what_was_scored(answers: list[list[float | None]], weights: list[float]):
    functions = [lambda _answer=answer, **_kwargs: _answer for answer in answers]
    weights = weights[: len(functions)]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        scores = score(Rewards(functions, weights=weights), ["x"] * 3)
    for row in range(3):
        expected = math.fsum(w * a[row] for w, a in zip(weights, answers, strict=True) if a[row] is not None)
        assert scores.total[row].item() == pytest.approx(expected, rel=1e-6, abs=1e-3)
        assert scores.each[row].isnan().tolist() == [a[row] is None for a in answers]


@pytest.mark.parametrize(
    "answer",
    [(1, 2), [True, np.float32(2)], np.array([1.0, 2.0]), torch.tensor([1, 2]), [torch.tensor(1.0), np.int64(2)]],
)
def test_numbers_of_any_library_are_numbers(answer: Any):
    assert score(Rewards(lambda **_: answer), ["x", "y"]).total.tolist() == [1.0, 2.0]


def test_an_empty_batch_asks_nobody():
    def never(**_: Any) -> list[float]:
        raise AssertionError

    scores = score(Rewards([never, never]), [])
    assert scores.total.shape == (0,)
    assert scores.each.shape == (0, 2)


# Coroutines


def test_coroutines_run_concurrently_beside_plain_functions():
    rewards = Rewards([slow_length, length, *[slow_length] * 8], weights=[1.0] + [0.0] * 9)
    start = time.monotonic()
    scores = score(rewards, ["x", "yy"])
    assert time.monotonic() - start < 0.5  # one after the other they would sleep 0.9 s
    assert scores.total.tolist() == [1.0, 2.0]
    assert scores.each.tolist() == [[1.0] * 10, [2.0] * 10]


def test_coroutines_run_where_a_loop_runs_already():
    async def notebook() -> Scores:
        return score(Rewards([slow_length, length]), ["xx"])

    assert asyncio.run(notebook()).total.tolist() == [4.0]


def test_a_callable_object_may_be_asynchronous():
    class Client:
        async def __call__(self, completions: list[str], **_: Any) -> list[float]:
            return length(completions)

    rewards = Rewards([Client(), partial(slow_length)])
    assert rewards.names == ["Client", "slow_length"]
    assert score(rewards, ["xx"]).each.tolist() == [[2.0, 2.0]]


@pytest.mark.filterwarnings("error")
def test_a_failure_leaves_no_coroutine_behind():
    def fails(**_: Any) -> list[float]:
        raise KeyError("oops")

    with pytest.raises(KeyError):
        score(Rewards([slow_length, fails]), ["x"])


# Names and blame


def test_names():
    def b(**_: Any) -> list[float]:
        return []

    assert Rewards([length, partial(length, x=1), b, lambda **_: []]).names == ["length", "length_2", "b", "<lambda>"]
    assert unique(["a", "a", "a_2", "a"]) == ["a", "a_3", "a_2", "a_4"]


@given(st.lists(st.sampled_from(["a", "a_2", "b", "a_3"]), max_size=8))
def test_unique_names_are_unique_and_first_ones_stay(names: list[str]):
    renamed = unique(names)
    assert len(set(renamed)) == len(names)
    for i, name in enumerate(names):
        assert renamed[i].startswith(name)
        if name not in names[:i]:
            assert renamed[i] == name


async def broken_async(**_: Any) -> list[float]:
    raise RuntimeError("no such judge")


def broken(**_: Any) -> list[float]:
    raise RuntimeError("no such judge")


@pytest.mark.parametrize("function", [broken, broken_async])
def test_what_a_function_raises_carries_its_name(function: Any, caplog: pytest.LogCaptureFixture):
    with pytest.raises(RuntimeError, match="no such judge") as caught:
        score(Rewards([length, slow_length, function]), ["x"])
    assert function.__name__ in "".join([*getattr(caught.value, "__notes__", []), caplog.text])


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        ([1.0], "1 scores for 2"),
        ([1.0, 2.0, 3.0], "3 scores for 2"),
        (torch.tensor(1.0), "1 scores for 2"),
        (None, "got NoneType"),
        (1.0, "got float"),
        ("ab", "got str"),
        ({"x": 1.0, "y": 2.0}, "got dict"),
        (["1.0", 2.0], "sample 0 must be a number.*'1.0'"),
        ([1.0, [2.0]], "sample 1 must be a number"),
        (torch.zeros(2, 2), "sample 0 must be a number"),
        ([1.0, math.nan], "sample 1 must be finite.*None to skip"),
        ([-math.inf, 1.0], "sample 0 must be finite"),
        ([1.0, 1e39], "sample 1 must be finite"),
        ([1.0, 10**400], "sample 1 must be finite"),
    ],
)
def test_what_is_no_score_is_refused_by_name(answer: Any, message: str):
    def odd(**_: Any) -> Any:
        return answer

    with pytest.raises(ValueError, match=f"(?s)odd.*{message}"):
        score(Rewards(odd), ["x", "y"])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"reward_funcs": []}, "reward_funcs.*at least one"),
        ({"reward_funcs": [3]}, "reward_funcs: 3 is neither"),
        ({"reward_funcs": 3}, "reward_funcs: 3 is neither"),
        ({"reward_funcs": length, "weights": [1.0, 2.0]}, "weights.*1, got 2"),
        ({"reward_funcs": length, "weights": [math.nan]}, "weights.*finite"),
        ({"reward_funcs": length, "weights": ["1"]}, "weights.*finite"),
        ({"reward_funcs": length, "processing_classes": [None, None]}, "processing_classes.*1, got 2"),
        ({"reward_funcs": length, "batch_size": 0}, "batch_size"),
    ],
)
def test_bad_arguments(arguments: dict[str, Any], message: str):
    with pytest.raises(ValueError, match=message):
        Rewards(**arguments)


def test_bad_batches():
    with pytest.raises(ValueError, match="completions: 2 entries for 1 prompts"):
        score(Rewards(length), ["x", "y"], prompts=["p"])
    with pytest.raises(ValueError, match="answer: 1 entries for 2 prompts"):
        score(Rewards(length), ["x", "y"], answer=[1])
    with pytest.raises(ValueError, match=r"'completions'.*rename"):
        Rewards(length)(prompts=[], completions=[], completion_ids=[], columns={"completions": []})

    def needs_more(completions: list[str], answer: list[int], **_: Any) -> list[float]:
        return []

    with pytest.raises(ValueError, match=r"needs_more.*answer"):
        score(Rewards(needs_more), ["x"])


# Models


def word_tokenizer(**more: Any) -> PreTrainedTokenizerFast:
    vocabulary = {word: i for i, word in enumerate("[UNK] [EOS] a b c d e f user assistant < >".split())}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="[UNK]", eos_token="[EOS]", **more)


def llama(labels: int = 1) -> LlamaForSequenceClassification:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=12, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2,
        num_labels=labels, initializer_range=0.5,
    )  # fmt: skip
    return LlamaForSequenceClassification(config)


def alone(model: nn.Module, tokenizer: PreTrainedTokenizerFast, text: str) -> float:
    """The score of one unpadded text."""
    with torch.no_grad():
        return model(**tokenizer(text, return_tensors="pt", return_token_type_ids=False)).logits.item()


TEXTS = ["a", "b c d e f", "c a b", "f", "d d"]


@pytest.mark.parametrize("batch_size", [1, 2, 64])
def test_a_model_scores_each_text_as_if_alone(batch_size: int):
    model, tokenizer = llama().train(), word_tokenizer()
    assert tokenizer.pad_token is None
    rewards = Rewards(model, processing_classes=tokenizer, batch_size=batch_size)
    assert tokenizer.pad_token_id == model.config.pad_token_id == 1
    scores = score(rewards, [" " + text for text in TEXTS], prompts=["e f"] * len(TEXTS))
    assert not model.training
    expected = [alone(model, tokenizer, "e f " + text) for text in TEXTS]
    assert torch.tensor(expected).std() > 0.1
    torch.testing.assert_close(scores.total, torch.tensor(expected), rtol=1e-5, atol=1e-5)
    assert not scores.total.requires_grad


def test_an_encoder_scores_too():
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=12, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, num_labels=1,
        initializer_range=0.5,
    )  # fmt: skip
    model, tokenizer = BertForSequenceClassification(config), word_tokenizer(pad_token="[UNK]")
    scores = score(Rewards(model, processing_classes=tokenizer), TEXTS, prompts=["e "] * 5)
    expected = [alone(model.eval(), tokenizer, "e " + text) for text in TEXTS]
    torch.testing.assert_close(scores.total, torch.tensor(expected), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("completion", ["c d", [{"role": "assistant", "content": "c d"}]], ids=["text", "messages"])
def test_a_chat_is_scored_through_the_template(completion: Any):
    model, tokenizer = llama(), word_tokenizer()
    tokenizer.chat_template = CHAT
    prompt = [{"role": "user", "content": "a b"}]
    scores = score(Rewards(model, processing_classes=tokenizer), [completion], prompts=[prompt])
    expected = alone(model, tokenizer, "<user>a b<assistant>c d")  # no <go>: nothing is to be generated
    assert scores.total.item() == pytest.approx(expected, rel=1e-5)


def test_a_chat_needs_a_template():
    model = llama()
    model.config._name_or_path = "some/judge"
    rewards = Rewards(model, processing_classes=word_tokenizer())
    with pytest.raises(ValueError, match=r"judge.*chat template"):
        score(rewards, ["b"], prompts=[[{"role": "user", "content": "a"}]])


def test_a_model_is_loaded_by_its_id(tmp_path: Path):
    path = tmp_path / "judge"
    llama().save_pretrained(path)
    word_tokenizer().save_pretrained(path)
    rewards = Rewards([str(path), length, f"{path}/"], weights=[1.0, 0.0, 0.0])
    assert rewards.names == ["judge", "length", "judge_2"]
    scores = score(rewards, ["a b"])
    assert scores.total.item() == pytest.approx(alone(llama(), word_tokenizer(), "p a b".replace(" ", "", 1)), rel=1e-5)
    assert scores.each[0, 0] == scores.each[0, 2]
    model = LlamaForSequenceClassification.from_pretrained(path)
    assert Rewards(model).names == ["judge"]  # which says itself where its tokenizer is


def test_what_is_no_reward_model_is_refused(tmp_path: Path):
    word_tokenizer().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"Llama.*num_labels=1, got 2"):
        Rewards(llama(2), processing_classes=word_tokenizer())
    with pytest.raises(ValueError, match=r"Linear.*num_labels=1, got None"):
        Rewards(nn.Linear(1, 1), processing_classes=word_tokenizer())
    with pytest.raises(ValueError, match=r"reward function nowhere: cannot load .*nowhere"):
        Rewards(str(tmp_path / "nowhere"))
    with pytest.raises(ValueError, match=r"processing_classes: the model Llama.*pass one"):
        Rewards(llama())
    llama(2).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=rf"{tmp_path.name}.*num_labels=1, got 2"):
        Rewards(str(tmp_path))
    LlamaForCausalLM(llama().config).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"no trained reward model, it lacks score.weight"):
        Rewards(str(tmp_path))
    no_tokens = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel({"a": 0}, unk_token="a")))
    with pytest.raises(ValueError, match=r"processing_classes.*pad_token"):
        Rewards(llama(), processing_classes=no_tokens)


def test_a_chat_may_be_a_tuple() -> None:
    seen: list[Any] = []

    def score(completions: list[Any], **_: Any) -> list[float]:
        seen.extend(completions)
        return [0.0] * len(completions)

    scores_of(Rewards([score]), tiny.tokenizer(), [{"prompt": ({"role": "user", "content": "a"},)}], [[2, 3]])
    assert seen[0][0]["role"] == "assistant"


@pytest.mark.parametrize("pads_with_eos", [False, True])
def test_a_reward_model_is_read_where_transformers_reads_it(pads_with_eos: bool) -> None:
    """At an EOS that ends a text, unless that is its padding: then at the token before, as it was trained."""
    tokenizer, model = tiny.tokenizer(), tiny.classifier()
    if pads_with_eos:
        tokenizer.pad_token = tokenizer.eos_token
    reward = ModelReward("model", model, tokenizer, batch_size=2, place=torch.device("cpu"))
    score, other = reward(prompts=["ab", "a"], completions=["c<eos>", "d"])
    ids = torch.tensor([tokenizer("abc" if pads_with_eos else "abc<eos>")["input_ids"]])
    with torch.no_grad():
        expected = model.score(model.model(input_ids=ids).last_hidden_state[0, -1]).item()
    assert score == pytest.approx(expected, rel=1e-4)
    assert score != pytest.approx(other)


def test_chats_of_parts_and_calls_of_tools_are_logged(tmp_path: Path) -> None:
    parts = [{"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "image", "image": Path("b")}]}]
    call = ({"role": "assistant", "content": None, "tool_calls": [{"name": "f"}]},)
    scores = Rewards([tiny.even])(prompts=["", ""], completions=["", ""], completion_ids=[[2], [3]], columns={})
    CompletionsLog(tiny.arguments(tmp_path)).add(1, [parts, call], ["x", "y"], scores, ["even"])
    rows = [json.loads(line) for line in (tmp_path / "completions.jsonl").read_text().splitlines()]
    assert rows[0]["prompt"][0]["content"][1]["image"] == "b"
    assert rows[1]["prompt"][0]["tool_calls"] == [{"name": "f"}]
