"""An engine that is never given new weights."""

from __future__ import annotations

import tiny
import torch

from klq_kernels.trainer import Completions, KLQTrainer


class Engine:
    """Samples from ``tiny.model()``, the policy at the start of a test, and says how likely each token was."""

    def __init__(self) -> None:
        self.model = tiny.model()

    def __call__(self, prompts: list[str], trainer: KLQTrainer) -> Completions:
        completions, logprobs = [], []
        for prompt in prompts:
            ids = trainer.tokenizer(prompt)["input_ids"]
            given = len(ids)
            chosen = []
            while len(ids) < given + 4 and (not chosen or ids[-1] != tiny.EOS):
                with torch.no_grad():
                    logp = self.model(torch.tensor([ids])).logits[0, -1].log_softmax(0)
                ids.append(int(torch.multinomial(logp.exp(), 1)))
                chosen.append(logp[ids[-1]].item())
            completions.append(ids[given:])
            logprobs.append(chosen)
        return Completions(completions, logprobs=logprobs, staleness=trainer.cycle)
