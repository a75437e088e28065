"""Prompts out of data sets: every place they may lie, every form they are published in, and how they become tokens."""

from __future__ import annotations

import itertools
import json
import logging
from collections import UserDict
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

pytest.importorskip("datasets")
pytest.importorskip("transformers")

from datasets import Dataset, DatasetDict
from datasets.exceptions import DatasetNotFoundError
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from klq_kernels.trainer.data import hh_turns, keep_short, load_prompts, tldr_prompt, tokenize_prompt

ROWS = [{"prompt": f"question {i}", "answer": i} for i in range(6)]
CHAT = [{"role": "user", "content": "a b"}]
TEMPLATE = (
    "{% for m in messages %}{{ m['role'] }} {{ m['content'] }} {% if m['name'] is defined %}f {% endif %}{% endfor %}"
    "{% if add_generation_prompt %}assistant{% endif %}"
)


@pytest.fixture(autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """The cache of ``datasets`` belongs to this test alone."""
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", str(tmp_path_factory.mktemp("cache")))


@pytest.fixture
def tokenizer() -> PreTrainedTokenizerFast:
    """Words, and a [BOS] in front."""
    vocabulary = {word: i for i, word in enumerate("[UNK] [BOS] a b c d e f user assistant".split())}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    backend.post_processor = processors.TemplateProcessing(single="[BOS] $A", special_tokens=[("[BOS]", 1)])
    return PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="[UNK]", bos_token="[BOS]")


def write_file(path: Path, rows: list[dict[str, Any]] = ROWS) -> str:
    dataset = Dataset.from_list(rows)
    if path.suffix == ".parquet":
        dataset.to_parquet(path)
    elif path.suffix == ".csv":
        dataset.to_csv(path)
    elif path.suffix == ".json":
        path.write_text(json.dumps(rows))
    else:
        path.write_text("\n".join(map(json.dumps, rows)))
    return str(path)


# Places


@pytest.mark.parametrize("name", ["train.json", "some.jsonl", "x.csv", "y.parquet"])
def test_a_single_file(name: str, tmp_path: Path):
    assert load_prompts(write_file(tmp_path / name)).to_list() == ROWS


@pytest.mark.parametrize("suffix", ["json", "jsonl", "csv", "parquet"])
def test_a_folder_of_files_has_the_splits_its_names_say(suffix: str, tmp_path: Path):
    write_file(tmp_path / f"train.{suffix}", ROWS[:4])
    write_file(tmp_path / f"test.{suffix}", ROWS[4:])
    assert load_prompts(str(tmp_path)).to_list() == ROWS[:4]
    assert load_prompts(str(tmp_path), split="test").to_list() == ROWS[4:]
    with pytest.raises(ValueError, match=r"split.*validation"):
        load_prompts(str(tmp_path), split="validation")


def test_a_set_saved_to_disk(tmp_path: Path):
    Dataset.from_list(ROWS).save_to_disk(tmp_path / "one")
    DatasetDict(train=Dataset.from_list(ROWS[:4]), test=Dataset.from_list(ROWS[4:])).save_to_disk(tmp_path / "two")
    assert load_prompts(str(tmp_path / "one")).to_list() == ROWS
    assert load_prompts(str(tmp_path / "two"), split="test").to_list() == ROWS[4:]
    with pytest.raises(ValueError, match=r"split.*train, test, got 'validation'"):
        load_prompts(str(tmp_path / "two"), split="validation")
    with pytest.raises(ValueError, match=r"split.*has train, got 'test'"):  # never the training set for a test
        load_prompts(str(tmp_path / "one"), split="test")


def test_a_part_of_it(tmp_path: Path):
    path = write_file(tmp_path / "x.jsonl")
    assert load_prompts(path, max_samples=2).to_list() == ROWS[:2]
    assert load_prompts(path, max_samples=100).to_list() == ROWS
    assert load_prompts(path, split="train[:50%]").to_list() == ROWS[:3]


def test_what_cannot_be_found(tmp_path: Path):
    path = write_file(tmp_path / "x.jsonl")
    (tmp_path / "x.txt").write_text("hello")
    (tmp_path / "broken.jsonl").write_text("{ hello")
    for arguments, message in [
        ({"path": str(tmp_path / "y")}, "path: there is no file"),
        ({"path": "y.jsonl"}, "path: there is no file"),
        ({"path": str(tmp_path / "x.txt")}, "path: a file must be one of .json"),
        ({"path": str(tmp_path / "broken.jsonl")}, r"path: cannot read .*broken.jsonl: JSON"),
        ({"path": path, "split": "test"}, "split: a single file"),
        ({"path": path, "split": "train[9:]"}, "split: cannot take"),
        ({"path": path, "name": "main"}, "name: the file x.jsonl .* leave it out"),
        ({"path": path, "kind": "dpo"}, "kind: must be one of prompt, tldr, hh"),
        ({"path": path, "max_samples": 0}, "max_samples"),
    ]:
        with pytest.raises(ValueError, match=message):
            load_prompts(**arguments)


def test_what_is_not_on_the_hub(monkeypatch: pytest.MonkeyPatch):
    def missing(path: str, name: str | None, split: str) -> None:
        raise DatasetNotFoundError(f"{path} {name} {split}")

    def unreachable(path: str, name: str | None, split: str) -> None:
        raise ConnectionError("no network")

    monkeypatch.setattr("datasets.load_dataset", missing)
    with pytest.raises(ValueError, match=r"path: 'some/set' is no file.*hub") as caught:
        load_prompts("some/set", split="test", name="main")
    assert str(caught.value.__cause__) == "some/set main test"
    monkeypatch.setattr("datasets.load_dataset", unreachable)
    with pytest.raises(ValueError, match=r"cannot load 'some/set'.*no network"):
        load_prompts("some/set")


# Prompts


def test_chat_prompts_stay_chats(tmp_path: Path):
    rows = [{"prompt": CHAT, "answer": 1}, {"prompt": [{"role": "system", "content": "c"}, *CHAT], "answer": 2}]
    assert load_prompts(write_file(tmp_path / "x.jsonl", rows)).to_list() == rows


@pytest.mark.parametrize("prompt", ["", None, 3, [], [{"role": "user"}], ["a", "b"]])
def test_what_is_no_prompt(prompt: Any, tmp_path: Path):
    Dataset.from_list([{"prompt": prompt, "x": 1}]).save_to_disk(tmp_path)
    with pytest.raises(ValueError, match="prompt of row 0: must be a text or a list of messages"):
        load_prompts(str(tmp_path))


def test_the_kind_must_fit_the_columns(tmp_path: Path):
    path = write_file(tmp_path / "x.jsonl", [{"question": "q"}])
    for kind, message in [
        ("prompt", "column prompt, and there are question; rename"),
        ("tldr", "info.*there are question"),
        ("hh", "column chosen"),
    ]:
        with pytest.raises(ValueError, match=f"kind: '{kind}'.*{message}"):
            load_prompts(path, kind=kind)  # type: ignore[arg-type]


# TL;DR

POST = {"subreddit": "cats", "title": "My cat", "post": "It sits.\n\nTITLE: king. It sleeps."}
PROMPT = "SUBREDDIT: r/cats\n\nTITLE: My cat\n\nPOST: It sits.\n\nTITLE: king. It sleeps.\n\nTL;DR:"


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": PROMPT, "completion": " A cat."},
        {"prompt": PROMPT.replace("\n\nT", "\nT").replace("\n\nP", "\nP") + " ", "label": "A cat."},
        {**POST, "id": "x", "summary": " A cat. "},
        {"info": {**POST, "id": "x"}, "summary": {"text": " A cat.", "note": "n"}, "worker": "w"},
        {"info": {**POST, "article": None}, "summaries": [{"text": "x"}, {"text": " A cat."}], "choice": 1},
    ],
    ids=["completion", "label", "columns", "info", "comparisons"],
)
def test_tldr_forms(row: dict[str, Any], tmp_path: Path):
    loaded = load_prompts(write_file(tmp_path / "x.jsonl", [row]), kind="tldr")
    expected = PROMPT.replace("\n\nTITLE: king", "\nTITLE: king") if "label" in row else PROMPT
    assert loaded.to_list() == [{"prompt": expected, "reference": "A cat."}]


words = st.text("ab :/\n", min_size=1).filter(str.strip)


@given(words.map(str.strip), words.map(str.strip))
def test_the_standard_form_is_left_as_it_is(title: str, post: str):
    prompt = tldr_prompt({"subreddit": "cats", "title": title, "post": post})
    assert prompt == f"SUBREDDIT: r/cats\n\nTITLE: {title}\n\nPOST: {post}\n\nTL;DR:"
    assert tldr_prompt({"prompt": prompt}) == prompt


def test_tldr_without_summaries_and_with_news(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    news = {"post": None, "title": None, "subreddit": None, "article": "News."}
    rows = [{"info": {**POST, "article": None}}, {"info": news}]
    with caplog.at_level(logging.WARNING):
        loaded = load_prompts(write_file(tmp_path / "x.jsonl", rows), kind="tldr")
    assert loaded.to_list() == [{"prompt": PROMPT}]
    assert "left out 1 of 2 rows" in caplog.text
    with pytest.raises(ValueError, match="none of the 1 rows"):
        load_prompts(write_file(tmp_path / "y.jsonl", rows[1:]), kind="tldr")


def test_prompts_of_another_form_are_no_tldr(tmp_path: Path):
    with pytest.raises(ValueError, match=r"kind: 'tldr' needs prompts of the form.*Hello"):
        load_prompts(write_file(tmp_path / "x.jsonl", [{"prompt": "Hello", "summary": "x"}]), kind="tldr")


# Helpful and harmless


def test_hh(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    shared = "\n\nHuman: Who is the Human: me?\n\nStill me.\n\nAssistant: You.\n\nHuman: Why?\n\nAssistant:"
    rows = [
        {"chosen": shared + " Because.", "rejected": shared + " No."},
        {"chosen": shared, "rejected": shared},  # nobody answered
        {"chosen": "\n\nHuman: Hi", "rejected": ""},
        {"chosen": "Hello.", "rejected": ""},
        {"chosen": "\n\nAssistant: Hi", "rejected": ""},
    ]
    with caplog.at_level(logging.WARNING):
        loaded = load_prompts(write_file(tmp_path / "x.jsonl", rows), kind="hh")
    assert loaded.to_list() == [
        {
            "prompt": [
                {"role": "user", "content": "Who is the Human: me?\n\nStill me."},
                {"role": "assistant", "content": "You."},
                {"role": "user", "content": "Why?"},
            ],
            "reference": "Because.",
        }
    ]
    assert "left out 4 of 5 rows" in caplog.text


said = st.text("ab :\n", min_size=1).map(str.strip).filter(bool)


@given(st.lists(st.tuples(st.sampled_from(["Human", "Assistant"]), said), max_size=6))
def test_turns_alternate_and_lose_nothing(spoken: list[tuple[str, str]]):
    turns = hh_turns("".join(f"\n\n{who}: {what}" for who, what in spoken))
    roles = [turn["role"] for turn in turns]
    assert all(a != b for a, b in itertools.pairwise(roles))
    assert "\n\n".join(turn["content"] for turn in turns) == "\n\n".join(what for _, what in spoken)


# Tokens


def test_text_gets_the_tokenizers_special_tokens(tokenizer: PreTrainedTokenizerFast):
    assert tokenize_prompt("a b", tokenizer) == [1, 2, 3]


def test_a_chat_ends_where_the_assistant_speaks(tokenizer: PreTrainedTokenizerFast):
    tokenizer.chat_template = TEMPLATE
    assert tokenize_prompt(CHAT, tokenizer) == [8, 2, 3, 9]  # and the template's special tokens are all there are
    stored = Dataset.from_list([{"prompt": [{"role": "user", "content": "a", "name": "n"}, *CHAT]}])[0]["prompt"]
    assert stored[1]["name"] is None
    assert tokenize_prompt(stored, tokenizer) == [8, 2, 7, 8, 2, 3, 9]


@pytest.mark.parametrize(
    "returned", [[4, 5], [[4, 5]], {"input_ids": [4, 5]}, UserDict(input_ids=[[4, 5]], attention_mask=[[1, 1]])]
)
def test_templates_return_what_they_like(returned: Any, tokenizer: PreTrainedTokenizerFast, monkeypatch: Any):
    tokenizer.chat_template = TEMPLATE
    monkeypatch.setattr(tokenizer, "apply_chat_template", lambda *_, **__: returned)
    assert tokenize_prompt(CHAT, tokenizer) == [4, 5]


def test_what_cannot_be_tokenized(tokenizer: PreTrainedTokenizerFast):
    with pytest.raises(ValueError, match=r"prompt.*chat template; set tokenizer.chat_template"):
        tokenize_prompt(CHAT, tokenizer)
    with pytest.raises(ValueError, match="prompt: must be a text"):
        tokenize_prompt("", tokenizer)
    with pytest.raises(ValueError, match="prompt: must be a text"):
        tokenize_prompt(None, tokenizer)  # type: ignore[arg-type]
    tokenizer.backend_tokenizer.post_processor = None
    with pytest.raises(ValueError, match=r"prompt.*no tokens"):
        tokenize_prompt("  ", tokenizer)


def test_long_prompts_are_left_out_and_counted(tokenizer: PreTrainedTokenizerFast, caplog: pytest.LogCaptureFixture):
    dataset = Dataset.from_list([{"prompt": "a " * n, "n": n} for n in (1, 5, 2, 3)])
    with caplog.at_level(logging.WARNING):
        assert keep_short(dataset, tokenizer, 6) is dataset
        assert caplog.text == ""
        assert keep_short(dataset, tokenizer, 3)["n"][:] == [1, 2]  # [BOS] counts
    assert "left out 2 of 4 prompts of more than 3 tokens" in caplog.text
    with pytest.raises(ValueError, match=r"max_prompt_length: none of 4 .*shortest has 2"):
        keep_short(dataset, tokenizer, 1)
    with pytest.raises(ValueError, match="max_prompt_length"):
        keep_short(dataset, tokenizer, 0)


def test_an_empty_file_is_said_to_be_empty(tmp_path: Path) -> None:
    (tmp_path / "none.jsonl").touch()
    with pytest.raises(ValueError, match=r"^path: .*none.jsonl is empty"):
        load_prompts(str(tmp_path / "none.jsonl"))
