"""Completions that are written down in a dataset, as sequences.

A row has ``prompt``, a text or chat messages, and a completion in a column of its own: a text, or the messages that
follow those of the prompt, all of them the assistant's. A completion ends as one of the policy does, with the first EOS
in it, which the policy is to learn as well: it is added where neither the text nor the template has one. White space
and further EOS behind it, as templates write them, are left out; anything else there is an error.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

import torch

from ..call.checks import require
from .batches import Sequence
from .data import is_message, tokenize_chat
from .rollout import check_ids, check_room, prompt_ids


class Reader:
    """Makes sequences of rows.

    Args:
        tokenizer: with a chat template where rows are chats.
        vocab: tokens that the policy knows.
        max_prompt_length: longer prompts are cut on the left.
        max_completion_length: longer completions are cut on the right.
        template: further arguments of ``apply_chat_template``.
        ends: ids that end a completion of the policy; by default the tokenizer's EOS.
        positions: that the models have learned (``rollout.check_room``).
    """

    def __init__(
        self,
        tokenizer: Any,
        vocab: int,
        *,
        max_prompt_length: int | None = None,
        max_completion_length: int | None = None,
        template: Mapping[str, Any] | None = None,
        ends: Collection[int] | None = None,
        positions: int | None = None,
    ) -> None:
        self.positions = positions
        self.tokenizer, self.vocab, self.template = tokenizer, vocab, template
        self.ends = {tokenizer.eos_token_id} if ends is None else set(ends)
        self.max_prompt_length, self.max_completion_length = max_prompt_length, max_completion_length

    def sequences(self, rows: list[dict[str, Any]], *columns: str) -> list[Sequence]:
        """The sequences of all rows with the completions of the first column, then with those of the next one.

        Raises:
            ValueError: naming the column of a row that is no text and no messages, that has no token, that goes on
                behind its EOS, or whose template does not go on from the prompt.
        """
        prompts = [prompt_ids(row["prompt"], self.tokenizer, self.vocab, template=self.template) for row in rows]
        return [self._sequence(p, row, column) for column in columns for p, row in zip(prompts, rows, strict=True)]

    def _sequence(self, prompt: list[int], row: dict[str, Any], column: str) -> Sequence:
        said = self._completion(prompt, row["prompt"], row.get(column), column)
        require(bool(said), column, f"{row[column]!r:.80} has no tokens, and so nothing to learn")
        ids = self._ended(said, row[column], column)[: self.max_completion_length]
        check_ids("processing_class", ids, self.vocab)
        start = 0 if self.max_prompt_length is None else max(len(prompt) - self.max_prompt_length, 0)
        check_room(len(prompt) - start, len(ids), self.positions)
        return Sequence(torch.tensor(prompt[start:]), torch.tensor(ids), torch.ones(len(ids), dtype=torch.bool))

    def _ended(self, ids: list[int], said: Any, column: str) -> list[int]:
        """The ids up to the first EOS among them, or with the tokenizer's at their end."""
        end = next((i for i, token in enumerate(ids) if token in self.ends), None)
        if end is None:
            return [*ids, self.tokenizer.eos_token_id]
        behind = self.tokenizer.decode([token for token in ids[end + 1 :] if token not in self.ends])
        require(
            not behind.strip(),
            column,
            f"{said!r:.80} goes on behind an EOS, with {behind.strip()!r:.40}; the policy's completions end there",
        )
        return ids[: end + 1]

    def _completion(self, prompt: list[int], before: Any, said: Any, column: str) -> list[int]:
        """The ids of a completion, which the policy is to say after the prompt."""
        if isinstance(said, str):
            return list(self.tokenizer(said, add_special_tokens=False)["input_ids"])
        chat = isinstance(said, (list, tuple)) and bool(said) and all(map(is_message, said))
        require(
            chat and not isinstance(before, str),
            column,
            f"must be a text, or messages where the prompt has messages; got {said!r:.80}",
        )
        roles = {message["role"] for message in said}
        require(
            roles == {"assistant"},
            column,
            f"must be messages of the assistant alone, has some of {', '.join(sorted(roles - {'assistant'}))}: what "
            "others say would be learnt as the policy's own; end the prompt with them",
        )
        whole = tokenize_chat(
            [*before, *said], self.tokenizer, {**(self.template or {}), "add_generation_prompt": False}
        )
        require(
            whole[: len(prompt)] == prompt,
            column,
            "does not go on from its prompt: the chat template writes an answered conversation in another way than the "
            "prompt that asks for the answer; give texts, or another template",
        )
        return list(whole[len(prompt) :])
