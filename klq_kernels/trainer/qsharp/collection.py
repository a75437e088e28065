"""A round's data (arXiv 2502.20548, algorithm 1), and held-out completions.

For each prompt and sample of a round the guided policy writes a completion, which is cut after a position t drawn
uniformly from its tokens; from there the reference goes on to the end, and the whole earns a reward. That reward is a
sample of the law after token t and after each of the reference's tokens, whatever wrote the tokens before. A cut after
the last token needs nobody to go on. While the guide is zero the guided policy is the reference, and all its tokens are
learnt from.

Random numbers depend on the seed, the round and the first row of a batch. Batches go round the processes whole, so the
data are the same on any number of them.
"""

from __future__ import annotations

from functools import partial
from typing import Any, NamedTuple

import torch
from accelerate.utils import gather_object
from torch import Tensor
from tqdm.auto import tqdm

from ...guidance import GuidedLogits, ValueGuide
from ..processes import Turn, turns
from ..rewards import Rewards, scores_of
from ..rollout import continued, eos_ids, generate, prompt_ids
from ..seeds import Purpose, derived_seed, seeded
from .config import QSharpConfig
from .examples import Example


class Samples(NamedTuple):
    """Completions of some prompts, and how far each was guided away from the reference."""

    completions: list[list[int]]
    kl: Tensor  # fp32 [S], nats; 0 of the reference's own


class Collection:
    """Samples and scores completions of the reference, guided or not.

    Args:
        reference: a causal LM on its device, not trained.
        guide: a function that returns the guide as it is.
        generation_config: how the reference samples.
        positions: that reference and guide have learned (``rollout.check_room``).
    """

    def __init__(
        self,
        args: QSharpConfig,
        *,
        reference: Any,
        guide: Any,
        tokenizer: Any,
        rewards: Rewards,
        vocab: int,
        generation_config: Any,
        accelerator: Any,
        positions: int | None,
    ) -> None:
        self.args, self.reference, self._guide, self.tokenizer = args, reference, guide, tokenizer
        self.rewards, self._vocab, self.accelerator = rewards, vocab, accelerator
        self.generation_config, self._positions = generation_config, positions

    @property
    def guide(self) -> ValueGuide:
        return self._guide()

    def encode(self, prompt: Any) -> list[int]:
        """The token ids of a prompt."""
        args = self.args
        template, longest = args.chat_template_kwargs, args.max_prompt_length
        return prompt_ids(prompt, self.tokenizer, self._vocab, template=template, longest=longest)

    def sample(self, prompts: list[list[int]], seed: int, *, guided: bool) -> Samples:
        """One completion for each of at most a batch of prompts."""
        processors: list[GuidedLogits] = []

        def processor(attention_mask: Tensor) -> GuidedLogits:
            processors.append(self.processor(attention_mask))
            return processors[-1]

        with seeded(seed, self.args.device), self.accelerator.autocast():
            out = generate(
                self.reference, prompts, self.generation_config, batch_size=len(prompts), device=self.args.device,
                processor=processor if guided else None, positions=self._positions,
            )  # fmt: skip
        kl = processors[0].kl.cpu() if processors else torch.zeros(len(prompts))
        return Samples(out.completion_ids, kl)

    def processor(self, attention_mask: Tensor | None = None, eta: float | None = None) -> GuidedLogits:
        """The guidance of the run, for one generation."""
        args = self.args
        return GuidedLogits(
            self.guide,
            args.eta if eta is None else eta,
            top_k=args.top_k,
            others=args.others,
            temperature=args.temperature,
            pad_token_id=self.generation_config.pad_token_id,
            attention_mask=attention_mask,
            eos_token_id=eos_ids(self.generation_config),
        )

    def round(self, rows: list[int], dataset: Any, number: int) -> tuple[list[Example], list[float]]:
        """The examples of a round over all processes, ``samples_per_prompt`` for each row, and their divergences."""
        guided = not self.guide.is_zero
        asked = [row for row in rows for _ in range(self.args.samples_per_prompt)]
        found: list[tuple[int, list[Example], list[float]]] = []
        mine = self.turns(len(asked))
        quiet = self.args.disable_tqdm or not self.accelerator.is_main_process
        for turn in tqdm(mine, desc=f"Round {number + 1}: completions", disable=quiet, leave=False):
            batch = [asked[i] for i in turn.rows]
            examples, kl = self._batch(batch, [dataset[i] for i in batch], (number, turn.rows.start), guided=guided)
            if turn.kept:
                found.append((turn.rows.start, examples, kl.tolist()))
        gathered = sorted(gather_object(found), key=lambda part: part[0])
        return [e for _, part, _ in gathered for e in part], [x for _, _, part in gathered for x in part]

    def turns(self, number: int) -> list[Turn]:
        """This process's share in ``number`` completions."""
        accelerator = self.accelerator
        size, processes = self.args.rollout_forward_batch_size, accelerator.num_processes
        return turns(number, size, process=accelerator.process_index, processes=processes)

    def _batch(
        self, rows: list[int], records: list[dict[str, Any]], where: tuple[int, int], *, guided: bool
    ) -> tuple[list[Example], Tensor]:
        """One example for each row."""
        seed = partial(derived_seed, self.args.seed)
        prompts = [self.encode(record["prompt"]) for record in records]
        first, kl = self.sample(prompts, seed(Purpose.ROLLOUT, *where), guided=guided)
        completions, begins = first, [0] * len(first)
        if guided:
            generator = torch.Generator().manual_seed(seed(Purpose.CUT, *where))
            kept = [int(torch.randint(len(c), (), generator=generator)) + 1 if c else 0 for c in first]
            completions = self._completed(prompts, first, kept, seed(Purpose.REST, *where))
            begins = [max(k - 1, 0) for k in kept]
        scores = scores_of(self.rewards, self.tokenizer, records, completions)
        parts = zip(prompts, completions, begins, scores.total.tolist(), rows, scores.scored.tolist(), strict=True)
        return [Example(*part) for *part, scored in parts if scored and part[1]], kl

    def _completed(
        self, prompts: list[list[int]], first: list[list[int]], kept: list[int], seed: int
    ) -> list[list[int]]:
        """The first ``kept`` tokens of each completion, and the reference's completion of them."""
        whole = [c[:k] for c, k in zip(first, kept, strict=True)]
        ends, longest = eos_ids(self.generation_config), self.args.max_completion_length
        going_on = [i for i, c in enumerate(whole) if len(c) < longest and not (c and c[-1] in ends)]
        if going_on:
            with seeded(seed, self.args.device), self.accelerator.autocast():
                rest = continued(
                    self.reference, [prompts[i] + whole[i] for i in going_on],
                    [longest - len(whole[i]) for i in going_on], self.generation_config, device=self.args.device,
                    positions=self._positions,
                )  # fmt: skip
            for i, tokens in zip(going_on, rest, strict=True):
                whole[i] = whole[i] + tokens
        return whole
