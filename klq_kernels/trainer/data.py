"""Data sets of prompts: found wherever they are, brought into one shape, tokenized, and cut to length.

A trainer wants a column ``prompt``, as text or as chat messages, and hands every other column to the reward functions.
Some sets come that way; TL;DR summarisation and Anthropic's HH dialogues are published in forms of their own, which are
rewritten here, with the human's answer kept as ``reference``. Rows that cannot be a prompt are left out, and counted.
"""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

from tqdm.auto import tqdm

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedTokenizerBase

logger = logging.getLogger(__name__)

Row: TypeAlias = dict[str, Any]
Kind: TypeAlias = Literal["prompt", "tldr", "hh"]
READERS = {".json": "json", ".jsonl": "json", ".csv": "csv", ".parquet": "parquet"}


def load_prompts(
    path: str, *, split: str = "train", name: str | None = None, kind: Kind = "prompt", max_samples: int | None = None
) -> Dataset:
    """A data set with a column ``prompt``.

    Args:
        path: a ``save_to_disk`` folder, a folder of json, jsonl, csv or parquet files, one such file, or a hub id.
        split: which split of it; single files and sets saved without splits have "train" only.
        name: the configuration, for hub ids and folders that have several.
        kind: "prompt" keeps the set as it is, and it must have a ``prompt``; "tldr" and "hh" make ``prompt`` and, where
            the set has one, ``reference`` from the published forms of those sets, and drop the rest.
        max_samples: takes the first so many rows.

    Raises:
        ValueError: naming the argument that is wrong, and what would be right.
    """
    if kind not in FORMS:
        raise ValueError(f"kind: must be one of {', '.join(FORMS)}, got {kind!r}")
    if max_samples is not None and max_samples < 1:
        raise ValueError(f"max_samples: must be at least 1, got {max_samples}")
    dataset = find(path, split, name)
    if max_samples is not None:
        dataset = dataset.select(range(min(max_samples, len(dataset))))
    return FORMS[kind](dataset)


# Where data sets are


def find(path: str, split: str, name: str | None) -> Dataset:
    """The split of the set at ``path``, in whatever form it lies there."""
    place = Path(path).expanduser()
    if place.is_file():
        return read_file(place, split, name)
    if (place / "dataset_dict.json").is_file() or (place / "state.json").is_file():
        return read_saved(place, split, name)
    if not place.exists() and (path.startswith((".", "/", "~")) or place.suffix in READERS):
        raise ValueError(f"path: there is no file or folder {path}")
    return read_published(str(place) if place.exists() else path, split, name)


def read_file(place: Path, split: str, name: str | None) -> Dataset:
    from datasets import load_dataset
    from datasets.exceptions import DatasetGenerationError

    if place.suffix not in READERS:
        raise ValueError(f"path: a file must be one of {', '.join(READERS)}, got {place.name}")
    refuse_name(name, f"the file {place.name}")
    if place.stat().st_size == 0:
        raise ValueError(f"path: {place} is empty")
    if split.split("[")[0] != "train":
        raise ValueError(f"split: a single file has only 'train', got {split!r}; a folder can have a file for each")
    try:
        return load_dataset(READERS[place.suffix], data_files=str(place), split=split)
    except DatasetGenerationError as error:  # which says that it failed; its cause says why
        raise ValueError(f"path: cannot read {place}: {error.__cause__ or error}") from error
    except ValueError as error:  # a slice that is none, or that holds nothing
        raise ValueError(f"split: cannot take {split!r} of {place.name}: {error}") from error


def read_saved(place: Path, split: str, name: str | None) -> Dataset:
    from datasets import DatasetDict, load_from_disk

    refuse_name(name, "a set that was saved to disk")
    saved = load_from_disk(str(place))
    splits = saved if isinstance(saved, DatasetDict) else {str(saved.split or "train"): saved}
    if split not in splits:
        raise ValueError(f"split: {place} has {', '.join(splits)}, got {split!r}")
    return splits[split]


def read_published(path: str, split: str, name: str | None) -> Dataset:
    """A folder of files, or a set on the hub: what ``datasets`` finds by itself."""
    from datasets import load_dataset
    from datasets.exceptions import DatasetGenerationError, DatasetNotFoundError

    try:
        return load_dataset(path, name, split=split)
    except DatasetNotFoundError as error:
        raise ValueError(f"path: {path!r} is no file or folder here and no data set on the hub") from error
    except DatasetGenerationError as error:
        raise ValueError(f"path: cannot read {path!r}: {error.__cause__ or error}") from error
    except (ValueError, ConnectionError) as error:  # their messages name the splits or configurations that exist
        raise ValueError(f"path, split or name: cannot load {path!r}, {split!r}, {name!r}: {error}") from error


def refuse_name(name: str | None, what: str) -> None:
    if name is not None:
        raise ValueError(f"name: {what} has no configurations, so leave it out; got {name!r}")


# Their shapes


def as_prompts(dataset: Dataset) -> Dataset:
    """The set itself, after a look at every prompt."""
    if "prompt" not in dataset.column_names:
        raise ValueError(
            f"kind: 'prompt' needs a column prompt, and there are {', '.join(dataset.column_names)}; rename one, "
            "or choose the kind that these belong to"
        )
    for row, prompt in enumerate(dataset["prompt"]):
        check_prompt(prompt, f"prompt of row {row}")
    return dataset


def as_tldr(dataset: Dataset) -> Dataset:
    columns = set(dataset.column_names)
    if not ("prompt" in columns or "info" in columns or columns >= {"subreddit", "title", "post"}):
        raise ValueError(
            "kind: 'tldr' needs a column prompt, a column info, or the columns subreddit, title and post; there are "
            + ", ".join(dataset.column_names)
        )
    return rewrite(dataset, tldr_row)


def as_hh(dataset: Dataset) -> Dataset:
    if "chosen" not in dataset.column_names:
        raise ValueError(
            f"kind: 'hh' needs a column chosen, and there are {', '.join(dataset.column_names)}; for chats in a column "
            "prompt choose kind 'prompt'"
        )
    return rewrite(dataset, hh_row)


FORMS: dict[str, Callable[[Any], Any]] = {"prompt": as_prompts, "tldr": as_tldr, "hh": as_hh}


def rewrite(dataset: Dataset, convert: Callable[[Row], Row | None]) -> Dataset:
    """The rows as ``convert`` makes them, without those it makes nothing of."""
    from datasets import Dataset

    rows = [row for row in map(convert, dataset) if row is not None]
    if not rows:
        raise ValueError(f"path: none of the {len(dataset)} rows holds a prompt of this kind")
    if len(rows) < len(dataset):
        logger.warning("left out %d of %d rows that hold no prompt", len(dataset) - len(rows), len(dataset))
    if all(row["reference"] is None for row in rows):
        rows = [{"prompt": row["prompt"]} for row in rows]
    return Dataset.from_list(rows)


# TL;DR

TLDR = "SUBREDDIT: r/{subreddit}\n\nTITLE: {title}\n\nPOST: {post}\n\nTL;DR:"
# Sets differ in the blank lines between the parts; the post may hold any.
TLDR_PARTS = re.compile(
    r"\s*SUBREDDIT: r/(?P<subreddit>.*?)\s+TITLE:(?P<title>.*?)\s+POST:(?P<post>.*)\sTL;DR:\s*", re.S
)
SUMMARIES = ("reference", "summary", "completion", "label", "reference_response")


def tldr_row(row: Row) -> Row | None:
    prompt = tldr_prompt(row)
    return None if prompt is None else {"prompt": prompt, "reference": tldr_reference(row)}


def tldr_prompt(row: Row) -> str | None:
    parts = row
    if row.get("prompt") is not None:
        match = TLDR_PARTS.fullmatch(row["prompt"])
        if match is None:
            raise ValueError(
                "kind: 'tldr' needs prompts of the form 'SUBREDDIT: r/… TITLE: … POST: … TL;DR:', got "
                f"{row['prompt'][:80]!r}; for other prompts choose kind 'prompt'"
            )
        parts = match.groupdict()
    elif row.get("info") is not None:
        parts = row["info"]
    if not parts.get("post"):  # the news articles among the comparisons
        return None
    return TLDR.format(**{key: (parts.get(key) or "").strip() for key in ("subreddit", "title", "post")})


def tldr_reference(row: Row) -> str | None:
    """The summary that people wrote or preferred."""
    if row.get("summaries") and row.get("choice") is not None:
        return text_of(row["summaries"][row["choice"]])
    return next((text_of(row[key]) for key in SUMMARIES if row.get(key) is not None), None)


def text_of(summary: str | Mapping[str, Any]) -> str:
    return (summary if isinstance(summary, str) else summary["text"]).strip()


# Helpful and harmless

TURN = re.compile(r"(?:^|\n\n)(Human|Assistant):")
ROLES = {"Human": "user", "Assistant": "assistant"}


def hh_row(row: Row) -> Row | None:
    turns = hh_turns(row["chosen"] or "")
    if len(turns) < 2 or turns[-1]["role"] != "assistant" or not all(turn["content"] for turn in turns):
        return None
    return {"prompt": turns[:-1], "reference": turns[-1]["content"]}


def hh_turns(transcript: str) -> list[dict[str, str]]:
    """The messages of a transcript, human and assistant by turns: what one says twice in a row is one message."""
    _, *pieces = TURN.split(transcript)
    turns: list[dict[str, str]] = []
    for speaker, said in zip(pieces[::2], pieces[1::2], strict=True):
        if turns and turns[-1]["role"] == ROLES[speaker]:
            turns[-1]["content"] = f"{turns[-1]['content']}\n\n{said.strip()}".strip()
        else:
            turns.append({"role": ROLES[speaker], "content": said.strip()})
    return turns


# Rows as a trainer reads them


def columns_of(rows: Sequence[Row], repeats: int = 1) -> dict[str, list[Any]]:
    """The columns of rows but for ``prompt``, with ``repeats`` entries for each row.

    Raises:
        ValueError: where a row lacks a column that the first one has, or has one more, as rows in a list may.
    """
    names = dict.fromkeys(name for name in rows[0] if name != "prompt") if rows else {}
    for row in rows:
        odd = ", ".join(sorted(set(row) ^ {"prompt", *names}))
        if odd:
            raise ValueError(
                f"dataset: some rows have the column {odd}, and some have not; give it to all, None where there is none"
            )
    return {name: [row[name] for row in rows for _ in range(repeats)] for name in names}


# Tokens


def check_prompt(prompt: Any, what: str) -> None:
    """Raises a ValueError unless the prompt is a text or a list of chat messages, and not empty."""
    if isinstance(prompt, str) and prompt:
        return
    if isinstance(prompt, (list, tuple)) and prompt and all(map(is_message, prompt)):
        return
    raise ValueError(
        f"{what}: must be a text or a list of messages with role and content, and not empty, got {prompt!r:.80}"
    )


def is_message(message: Any) -> bool:
    return isinstance(message, Mapping) and {"role", "content"} <= message.keys()


def tokenize_prompt(
    prompt: str | list[dict[str, Any]],
    tokenizer: PreTrainedTokenizerBase,
    template: Mapping[str, Any] | None = None,
) -> list[int]:
    """The prompt's token ids: a text with the special tokens that the tokenizer adds by default, a chat up to where the
    assistant is to speak, with ``template`` as further arguments of ``apply_chat_template``.

    Raises:
        ValueError: where the prompt is neither, has no tokens, or is a chat and the tokenizer has no chat template.
    """
    check_prompt(prompt, "prompt")
    ids = tokenizer(prompt)["input_ids"] if isinstance(prompt, str) else tokenize_chat(prompt, tokenizer, template)
    if not ids:
        raise ValueError(f"prompt: {prompt!r:.80} has no tokens, and a response needs one to follow")
    return list(ids)


def tokenize_chat(
    messages: Iterable[Mapping[str, Any]],
    tokenizer: PreTrainedTokenizerBase,
    template: Mapping[str, Any] | None = None,
) -> list[int]:
    if not getattr(tokenizer, "chat_template", None):
        raise ValueError(
            "prompt: is a chat, and the tokenizer has no chat template; set tokenizer.chat_template, or give texts"
        )
    # Keys that only some messages have are None in the others once a data set has stored them.
    said = [{key: value for key, value in message.items() if value is not None} for message in messages]
    settings: dict[str, Any] = {"add_generation_prompt": True, "tokenize": True, **(template or {})}
    ids: Any = tokenizer.apply_chat_template(said, **settings)
    if isinstance(ids, Mapping):  # what it returns by default differs between versions
        ids = ids["input_ids"]
    return ids[0] if len(ids) and isinstance(ids[0], list) else ids


def keep_short(
    dataset: Dataset,
    tokenizer: PreTrainedTokenizerBase,
    max_prompt_length: int,
    template: Mapping[str, Any] | None = None,
) -> Dataset:
    """The rows whose prompt has at most ``max_prompt_length`` tokens; says how many were left out.

    ``template`` as in ``tokenize_prompt``.

    Raises:
        ValueError: where no row is left.
    """
    if max_prompt_length < 1:
        raise ValueError(f"max_prompt_length: must be at least 1, got {max_prompt_length}")
    others = os.environ.get("RANK", "0") != "0"
    bar = tqdm(dataset["prompt"], desc="Lengths of prompts", disable=others, leave=False)
    lengths = [len(tokenize_prompt(prompt, tokenizer, template)) for prompt in bar]
    kept = [row for row, length in enumerate(lengths) if length <= max_prompt_length]
    if not kept:
        shortest = f"; the shortest has {min(lengths)}" if lengths else ""
        raise ValueError(
            f"max_prompt_length: none of {len(lengths)} prompts has at most {max_prompt_length} tokens{shortest}"
        )
    if len(kept) == len(lengths):
        return dataset
    logger.warning(
        "left out %d of %d prompts of more than %d tokens", len(lengths) - len(kept), len(lengths), max_prompt_length
    )
    return dataset.select(kept)
