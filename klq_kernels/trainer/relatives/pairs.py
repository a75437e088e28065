"""Pairs of completions, one preferred to the other: rows of a dataset as token sequences."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch

from ...call.checks import require
from .. import loading
from ..batches import Sequence
from ..data import check_prompt, tokenize_chat
from ..rollout import check_ids, prompt_ids

COLUMNS = ("chosen", "rejected")


class Pair(NamedTuple):
    """One prompt with the completion that was preferred and the one that was not."""

    chosen: Sequence
    rejected: Sequence


class PairReader:
    """Reads rows with ``prompt``, ``chosen`` and ``rejected``.

    A prompt is a text or a chat, as everywhere. A completion is a text, which is appended to the prompt's tokens, or
    the messages that go on with a chat. It ends with EOS, and all of its tokens are trained.

    Args:
        tokenizer: with an EOS token.
        vocab: the policy's number of tokens.
        template: further arguments of ``apply_chat_template``.
        longest_prompt: longer prompts are cut on the left.
        longest_completion: longer completions are cut on the right, so that they do not end.

    Raises:
        ValueError: where there is no EOS; in a call, naming the column that cannot be read.
    """

    def __init__(
        self,
        tokenizer: Any,
        vocab: int,
        *,
        template: Mapping[str, Any] | None = None,
        longest_prompt: int | None = None,
        longest_completion: int | None = None,
    ) -> None:
        eos = tokenizer.eos_token_id
        require(eos is not None, "processing_class", "needs an EOS token: without one no completion ends")
        self._tokenizer, self._vocab, self._eos, self._template = tokenizer, vocab, eos, template
        self._longest_prompt, self._longest_completion = longest_prompt, longest_completion

    def __call__(self, row: Mapping[str, Any]) -> Pair:
        prompt = prompt_ids(row["prompt"], self._tokenizer, self._vocab, template=self._template)
        first = torch.tensor(prompt if self._longest_prompt is None else prompt[-self._longest_prompt :])
        return Pair(*(self._sequence(first, self._completion(name, row, prompt)) for name in COLUMNS))

    def _sequence(self, prompt: torch.Tensor, ids: list[int]) -> Sequence:
        completion = torch.tensor(ids[: self._longest_completion])
        return Sequence(prompt, completion, torch.ones(len(completion), dtype=torch.bool))

    def _completion(self, name: str, row: Mapping[str, Any], prompt: list[int]) -> list[int]:
        """The token ids after the prompt's, with EOS as the last."""
        given = row[name]
        check_prompt(given, name)
        if isinstance(given, str):
            ids = list(self._tokenizer(given, add_special_tokens=False)["input_ids"])
        else:
            ids = self._reply(name, row["prompt"], given, prompt)
        check_ids("processing_class", ids, self._vocab)
        if self._eos in ids:  # a template may write a line break after it
            return ids[: len(ids) - ids[::-1].index(self._eos)]
        return [*ids, self._eos]

    def _reply(self, name: str, chat: Any, reply: Any, prompt: list[int]) -> list[int]:
        require(not isinstance(chat, str), name, "is a list of messages and its prompt a text; give texts, or chats")
        template = {**(self._template or {}), "add_generation_prompt": False}
        whole = list(tokenize_chat([*chat, *reply], self._tokenizer, template))
        require(
            whole[: len(prompt)] == prompt,
            name,
            "goes on from a prompt that the chat template writes otherwise once there is a reply; give the reply as a "
            "text, which is appended to the prompt's tokens",
        )
        return whole[len(prompt) :]


def check_pairs(name: str, dataset: Any) -> None:
    """Raises a ValueError unless a dataset has rows with a prompt and two completions."""
    loading.check_dataset(name, dataset)
    require(not isinstance(dataset, dict), name, "must be one dataset, not a dict of several")
    missing = [column for column in COLUMNS if column not in dataset[0]]
    require(not missing, name, f"must have the columns prompt, chosen and rejected; it has no {', '.join(missing)}")
