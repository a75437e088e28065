"""``GuidedLogits``: guidance as a ``LogitsProcessor``, so that ``generate`` works unchanged.

At each step the k likeliest tokens of the reference are the candidates C. With the offsets o_c = log E[exp(R / eta)] of
the guide,

    pi(c) = M pi_ref(c) e^(o_c) / sum over C of pi_ref(c') e^(o_c')        for c in C

where M is the candidates' share of the probability: pi_ref(C) where the other tokens keep theirs (``others='keep'``),
and 1 where they are left out (``'exclude'``). So offsets that are all the same change nothing, to the last bit, and
offsets of another scale move no probability between the candidates and the rest.

The divergence of each step is exact over the whole vocabulary, because outside of C the two policies are the same (or
the guided one is 0): KL(pi || pi_ref) = sum over C of pi(c) log(pi(c) / pi_ref(c)).
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from transformers import LogitsProcessor

from ..call.checks import require, require_number
from .candidates import CandidateScorer
from .guide import ValueGuide

OTHERS = ("keep", "exclude")
OFFSETS = ("tilt", "mean")


def check_guidance(
    eta: float, *, top_k: int = 20, others: str = "keep", offset: str = "tilt", temperature: float = 1.0
) -> None:
    """Raises a ValueError that names the argument of ``GuidedLogits`` that is out of range."""
    require_number("eta", eta, positive=True)
    whole = isinstance(top_k, int) and not isinstance(top_k, bool)
    require(whole and top_k >= 1, "top_k", f"must be at least 1, got {top_k!r}")
    require(others in OTHERS, "others", f"must be one of {', '.join(OTHERS)}; got {others!r}")
    require(offset in OFFSETS, "offset", f"must be one of {', '.join(OFFSETS)}; got {offset!r}")
    require_number("temperature", temperature, positive=True)


def _token_ids(name: str, given: Any) -> list[int]:
    """One token id, several or None as a list."""
    given = given.tolist() if isinstance(given, Tensor) else given
    ids = list(given) if isinstance(given, Iterable) and not isinstance(given, str) else [given]
    ids = [] if given is None else ids
    whole = all(isinstance(i, int) and not isinstance(i, bool) and i >= 0 for i in ids)
    require(whole, name, f"must be a token id, or None; got {given!r:.80}")
    return ids


class GuidedLogits(LogitsProcessor):
    """Tilts a reference policy by a guide: ``model.generate(..., logits_processor=[GuidedLogits(guide, eta=0.1)])``.

    It follows one generation after another: rows may be padded on the left, sampled, or beams. Rows that do not go on
    from those of the step before by one token begin a generation. Call ``reset`` before a prompt that does, although it
    begins one, and where the guide has learnt meanwhile.

    Args:
        guide: reads the tokens of the reference.
        eta: units of reward per nat, > 0: the smaller, the farther from the reference.
        top_k: number of candidates, at least 1; no more than there are tokens are taken.
        others: 'keep' leaves the probabilities of the other tokens as they are, 'exclude' takes them to 0.
        offset: 'tilt' is Q-sharp's log E[exp(R / eta)], 'mean' is E[R] / eta of controlled decoding (CD).
        temperature: at which ``generate`` samples: the reference that is tilted is the model at this temperature, and
            transformers divides by it after this processor.
        pad_token_id: of the padding in front of prompts; needed for batches of unequal prompts. Without it a batch in
            which some prompts begin with the padding token of the guide's configuration is refused.
        attention_mask: the one that ``generate`` gets, where prompts may begin with the padding token themselves.
        eos_token_id: one or several; what comes after one counts for no divergence.

    Raises:
        ValueError: naming the argument that is out of range.
    """

    def __init__(
        self,
        guide: ValueGuide,
        eta: float = 0.1,
        *,
        top_k: int = 20,
        others: str = "keep",
        offset: str = "tilt",
        temperature: float = 1.0,
        pad_token_id: int | None = None,
        attention_mask: Tensor | None = None,
        eos_token_id: int | Iterable[int] | None = None,
    ) -> None:
        require(isinstance(guide, ValueGuide), "guide", f"must be a ValueGuide, got {type(guide).__name__}")
        check_guidance(eta, top_k=top_k, others=others, offset=offset, temperature=temperature)
        self.guide, self.eta, self.top_k, self.others, self.offset = guide, eta, top_k, others, offset
        self.temperature = temperature
        self._ends = _token_ids("eos_token_id", eos_token_id)
        pads = _token_ids("pad_token_id", pad_token_id)
        require(len(pads) <= 1, "pad_token_id", f"must be one token id, got {pad_token_id!r}")
        is_mask = attention_mask is None or (isinstance(attention_mask, Tensor) and attention_mask.dim() == 2)
        require(is_mask, "attention_mask", "must be the tensor [B, L] that generate gets")
        self._scorer = CandidateScorer(guide, pads[0] if pads else None, attention_mask)
        self._ends_there = torch.tensor(self._ends, dtype=torch.long)  # on the device of the last generation
        self._kl: Tensor | None = None
        self._prompt = 0  # tokens before the first that was generated

    @property
    def kl(self) -> Tensor:
        """KL(pi || pi_ref) of each row of the last generation so far, summed over its steps, fp32 [B], in nats.

        Raises:
            ValueError: before a generation.
        """
        require(self._kl is not None, "kl", "there was no generation yet")
        assert self._kl is not None
        return self._kl

    def reset(self) -> None:
        """Forgets the last generation: the next call begins another."""
        self._scorer.forget()
        self._kl = None

    def offsets(self, outputs: Tensor) -> Tensor:
        """Of the guide's outputs [..., A], fp32 [...]."""
        law = self.guide.law
        return law.tilt(outputs, self.eta) if self.offset == "tilt" else law.mean(outputs) / self.eta

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """The guided scores [B, V] for the reference's, in their dtype.

        Raises:
            ValueError: where the two do not fit each other or the guide; where rows are padded and neither
                ``pad_token_id`` nor ``attention_mask`` says so.
        """
        ids = input_ids.dim() == 2 and not input_ids.is_floating_point()
        require(ids, "input_ids", f"must be token ids [B, L], got {input_ids.dtype} {list(input_ids.shape)}")
        fits = scores.dim() == 2 and len(scores) == len(input_ids)
        require(fits, "scores", f"must be [{len(input_ids)}, V], a row for each of input_ids; got {list(scores.shape)}")
        logp = (scores.float() / self.temperature).log_softmax(-1)
        ref, candidates = logp.topk(min(self.top_k, logp.shape[-1]), -1)  # [B, k]
        dead, mass = ref == -torch.inf, ref.logsumexp(-1, keepdim=True)
        offsets = self.offsets(self._scorer(input_ids, candidates, logp.shape[-1])).masked_fill(dead, -torch.inf)
        shift = offsets - offsets.max(-1, keepdim=True).values
        shift = shift - ((ref + shift).logsumexp(-1, keepdim=True) - mass)
        shift = shift.masked_fill(dead, 0.0)
        guided = ref + shift
        kept = scores if self.others == "keep" else torch.full_like(scores, -torch.inf)
        if self.others == "exclude":
            guided = guided - mass
        self._account(input_ids, (guided.exp() * (guided - ref).masked_fill(dead, 0.0)).sum(-1))
        moved = scores.gather(-1, candidates) + (self.temperature * shift).to(scores.dtype)
        return kept.scatter(-1, candidates, moved)

    def _account(self, input_ids: Tensor, kl: Tensor) -> None:
        """Adds a step's divergences to those of the rows that the step continues."""
        parents = self._scorer.parents
        if parents is None or self._kl is None:
            self._prompt, self._kl = input_ids.shape[1], torch.zeros_like(kl)
        else:
            self._kl = self._kl[parents]
        generated = input_ids[:, self._prompt :]
        self._ends_there = self._ends_there.to(input_ids)
        over = torch.isin(generated, self._ends_there).any(1)
        self._kl = self._kl + kl.masked_fill(over, 0.0)
