"""What a guide says of k candidates for the next token, in one forward pass.

A V-type guide reads the state *after* a token, so that k candidates are k continuations. They share everything before
them: the guide reads the tokens that are new since the last step and then the k candidates in one pass, over a cache of
the rest. All candidates have the same position, and a mask lets each see the prefix and itself alone:

                  cached prefix     new token     candidates
    new token     1 1 1 1 1         1             0 0 0
    candidate 1   1 1 1 1 1         1             1 0 0
    candidate 2   1 1 1 1 1         1             0 1 0
    candidate 3   1 1 1 1 1         1             0 0 1

After the pass the candidates are taken out of the cache again. A step costs 1 + k tokens of the guide. A Q-type guide
says of all candidates what they are worth in the state before them, so its tail of candidates is empty: one token.

A probe shows on the first call whether the guide's backbone heeds such a mask and these positions. One that does not
(windows, recurrent layers, an attention that ignores masks) reads each candidate in a row of its own, without a cache:
right, and slower.
"""

from __future__ import annotations

import inspect
import warnings
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache

from ..call.checks import require
from .guide import ValueGuide


class CandidateScorer:
    """Scores candidates step after step of one generation.

    The rows of a step continue rows of the step before by one token, in any order and number of times (beams), which is
    found out by their tokens; rows that continue none begin anew.

    Args:
        guide: is called in evaluation mode.
        pad_token_id: tokens with this id in front of a prompt are padding.
        attention_mask: of the prompts [P, L], where they may begin with that token themselves; each prompt stands for
            as many rows, one after another, as there are.
    """

    def __init__(
        self, guide: ValueGuide, pad_token_id: int | None = None, attention_mask: Tensor | None = None
    ) -> None:
        self.guide = guide
        self.pad_token_id = pad_token_id
        self.attention_mask = attention_mask
        self._cache_name = cache_argument(guide.backbone)
        self._shares: bool | None = None  # whether candidates can share a pass
        self.forget()

    def forget(self) -> None:
        """Drops the cache: the next step begins anew."""
        self._ids: Tensor | None = None  # int64 [B, L], the tokens in the cache
        self._cache: Any = None
        self._pads: Tensor | None = None  # int64 [B], the length of the padding of each row
        self.parents: Tensor | None = None  # int64 [B] of the last step, rows of the one before; None: it began anew

    @torch.no_grad()
    def __call__(self, input_ids: Tensor, candidates: Tensor, vocab: int | None = None) -> Tensor:
        """The outputs of the guide after each candidate, fp32 [B, k, A].

        Args:
            input_ids: int64 [B, L], padded on the left.
            candidates: int64 [B, k].
            vocab: all candidates are below it. Where the guide knows so many tokens, prompts alone are checked, which
                spares a copy from the device at every step.

        Raises:
            ValueError: where an id is none of the guide's.
        """
        with self.guide.evaluating():
            self._continue(input_ids)
            if self.parents is None or vocab is None or vocab > self.guide.vocab_size:
                self._check_ids(input_ids, candidates)
            if self._shares is None:
                self._shares = self._probe(input_ids, candidates)
            if self._shares:
                return self._together(input_ids, candidates)
            self._ids = input_ids.clone()
            return self._apart(input_ids, candidates)

    def _check_ids(self, input_ids: Tensor, candidates: Tensor) -> None:
        highest = int(torch.maximum(input_ids.max(), candidates.max()))
        require(
            highest < self.guide.vocab_size,
            "guide",
            f"reads ids below {self.guide.vocab_size}, and there is {highest}; it must know every token of the "
            "reference",
        )

    def _find(self, input_ids: Tensor) -> Tensor | None:
        """The rows of the step before that these continue, or None where one of them continues none."""
        if self._ids is None or input_ids.shape[1] != self._ids.shape[1] + 1:  # a generation goes on by one token
            return None
        before = input_ids[:, : self._ids.shape[1]]
        if before.shape == self._ids.shape and torch.equal(before, self._ids):
            return torch.arange(len(before), device=before.device)
        same = (before[:, None] == self._ids).all(-1)  # [B, rows before]
        return same.long().argmax(1) if bool(same.any(1).all()) else None

    def _continue(self, input_ids: Tensor) -> None:
        """Finds the rows that these continue; rows that begin anew have their padding counted."""
        self.parents = self._find(input_ids)
        self._pads = self._count_pads(input_ids) if self.parents is None else self._known_pads[self.parents]

    @property
    def _known_pads(self) -> Tensor:
        assert self._pads is not None
        return self._pads

    def _count_pads(self, input_ids: Tensor) -> Tensor:
        if self.attention_mask is not None:
            mask = self.attention_mask.to(input_ids.device)
            fits = mask.shape[1] == input_ids.shape[1] and len(input_ids) % len(mask) == 0
            require(
                fits,
                "attention_mask",
                f"must be that of the prompts, {tuple(input_ids.shape)} or of fewer rows, got {tuple(mask.shape)}",
            )
            return (mask == 0).sum(1).repeat_interleave(len(input_ids) // len(mask))
        if self.pad_token_id is None:
            self._refuse_padding(input_ids[:, 0])
            return input_ids.new_zeros(len(input_ids))
        leading = (input_ids[:, :-1] == self.pad_token_id).long().cumprod(1)  # the last token is a token of the prompt
        return leading.sum(1)

    def _refuse_padding(self, first: Tensor) -> None:
        """Raises a ValueError where some rows, by their ``first`` tokens, are padded and nothing says by what."""
        pad = getattr(self.guide.backbone.config.get_text_config(), "pad_token_id", None)
        padded = first == (-1 if pad is None else pad)
        require(
            not bool(padded.any()) or bool(padded.all()),
            "pad_token_id",
            f"is needed: some prompts begin with the guide's padding token, {pad}, and some do not; give it, or the "
            "attention_mask that generate gets",
        )

    def _together(self, input_ids: Tensor, candidates: Tensor) -> Tensor:
        """One pass over the new tokens and the candidates, on the cache."""
        if self.parents is None:
            self._cache, cached = DynamicCache(config=self.guide.backbone.config), 0
        else:
            assert self._ids is not None
            cached = self._ids.shape[1]
            if not torch.equal(self.parents, torch.arange(len(self._ids), device=input_ids.device)):
                self._cache.reorder_cache(self.parents)
        tail = self.guide.tail(candidates)
        k = tail.shape[1]
        ids = torch.cat([input_ids[:, cached:], tail], 1)
        at = torch.arange(input_ids.shape[1] + 1, device=input_ids.device)
        positions = (at - self._known_pads[:, None]).clamp(min=0)
        position_ids = torch.cat([positions[:, cached:-1], positions[:, -1:].expand_as(tail)], 1)
        states = self.guide.backbone(
            input_ids=ids,
            attention_mask=self._mask(input_ids.shape[1], cached, k),
            position_ids=position_ids,
            use_cache=True,
            **{self._cache_name: self._cache},
        ).last_hidden_state
        if k:
            self._cache.crop(-k)  # the candidates leave it again
        self._ids = input_ids.clone()
        return self.guide.after(states, candidates)

    def _mask(self, length: int, cached: int, k: int) -> Tensor:
        """What is added to the attention's scores, [B, 1, queries, L + k]: 0, or the lowest number where not seen."""
        pads = self._known_pads[:, None, None]
        dtype, device = next(self.guide.backbone.parameters()).dtype, pads.device
        if torch.is_autocast_enabled(device.type):
            dtype = torch.get_autocast_dtype(device.type)
        at = torch.arange(length + k, device=device)
        query = at[cached:, None]
        prefix = (at <= query) & (at < length) & (at >= pads)
        hidden = ~(prefix | (at == query))  # a token sees itself, padding too, whose row would else see nothing
        mask = torch.zeros(hidden.shape, dtype=dtype, device=device)
        return mask.masked_fill_(hidden, torch.finfo(dtype).min)[:, None]

    def _apart(self, input_ids: Tensor, candidates: Tensor) -> Tensor:
        """Each candidate of the tail in a row of its own, without a cache."""
        tail = self.guide.tail(candidates)
        k = tail.shape[1]
        each = max(k, 1)  # rows for each prefix
        ids = torch.cat([input_ids.repeat_interleave(each, 0), tail.reshape(len(input_ids) * each, -1 if k else 0)], 1)
        at = torch.arange(ids.shape[1], device=ids.device) - self._known_pads.repeat_interleave(each)[:, None]
        states = self.guide.backbone(
            input_ids=ids, attention_mask=(at >= 0).long(), position_ids=at.clamp(min=0), use_cache=False
        ).last_hidden_state
        return self.guide.after(states[:, -1].unflatten(0, (len(input_ids), each)), candidates)

    def _probe(self, input_ids: Tensor, candidates: Tensor) -> bool:
        """Whether a shared pass gives the states that candidates in rows of their own have, in two steps on one cache.

        The states are compared, not the head's outputs, which a guide that begins at zero has all the same.
        """
        ids, next_ones = input_ids[:1], candidates[:1, : min(4, candidates.shape[1])]
        mask = None if self.attention_mask is None else self.attention_mask[:1]
        probe = CandidateScorer(_States(self.guide), self.pad_token_id, mask)  # type: ignore[arg-type]
        try:
            for _ in range(2):
                probe._continue(ids)
                shared, apart = probe._together(ids, next_ones), probe._apart(ids, next_ones)
                error = (shared - apart).abs().max() / apart.abs().max().clamp(min=1e-6)
                if not error <= _tolerance(self.guide):
                    raise ValueError(f"states differ by {error:.3g}")
                ids = torch.cat([ids, next_ones[:, -1:]], 1)
        except (TypeError, ValueError, RuntimeError, IndexError, AttributeError, NotImplementedError) as failure:
            why = str(failure).splitlines()[0] if str(failure) else type(failure).__name__
            warnings.warn(
                f"guide: {type(self.guide.backbone).__name__} cannot score candidates in one pass over a shared cache "
                f"({why}); each is read in a row of its own, which is slower",
                stacklevel=5,
            )
            return False
        return True


class _States:
    """A guide that hands back its states instead of what the head reads in them."""

    def __init__(self, guide: ValueGuide) -> None:
        self.backbone, self.vocab_size, self.tail = guide.backbone, guide.vocab_size, guide.tail

    def after(self, states: Tensor, candidates: Tensor) -> Tensor:
        return states[:, -max(self.tail(candidates).shape[1], 1) :].float()


def cache_argument(backbone: Any) -> str:
    """What a backbone calls its cache; the name changed within transformers 5."""
    return "cache" if "cache" in inspect.signature(backbone.forward).parameters else "past_key_values"


def _tolerance(guide: ValueGuide) -> float:
    """The relative difference that rounding may make when the same computation is done in another order."""
    dtype = next(guide.backbone.parameters()).dtype
    if torch.is_autocast_enabled(next(guide.backbone.parameters()).device.type):
        dtype = torch.bfloat16
    return 1e-3 if dtype in (torch.float32, torch.float64) else 32 * torch.finfo(dtype).eps
