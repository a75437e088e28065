"""An engine that is some cycles behind, as a rollout function.

It samples from a copy of the policy with the weights of ``staleness`` cycles ago (of the first cycle, where there have
been fewer), and gives its log-probabilities of what it sampled. Held-out prompts are answered by the policy as it is.
"""

from __future__ import annotations

import copy
from collections import deque
from typing import Any

import torch
from torch import Tensor

from ...logprobs import linear_logprobs
from ...trainer import Completions
from ...trainer.batches import Sequence, collate
from ...trainer.data import tokenize_prompt
from ...trainer.models import LanguageModel
from ...trainer.rollout import generate


class StaleEngine:
    def __init__(self, policy: Any, staleness: int) -> None:
        self._model = copy.deepcopy(policy).eval()
        self._weights: deque[dict[str, Tensor]] = deque(maxlen=staleness + 1)

    def __call__(self, prompts: list[Any], trainer: Any) -> Completions:
        now = trainer.policy.state_dict()
        if not trainer.is_in_train:
            self._model.load_state_dict(now)
            return self._sample(prompts, trainer)
        self._weights.append({name: weight.clone() for name, weight in now.items()})
        self._model.load_state_dict(self._weights[0])
        completions = self._sample(prompts, trainer)
        completions.staleness = len(self._weights) - 1
        return completions

    def _sample(self, prompts: list[Any], trainer: Any) -> Completions:
        args, tokenizer = trainer.args, trainer.tokenizer
        ids = [tokenize_prompt(prompt, tokenizer) for prompt in prompts]
        settings = {"batch_size": args.rollout_forward_batch_size, "device": args.device}
        completions = generate(self._model, ids, trainer.generation_config, **settings)
        sequences = [
            Sequence(torch.tensor(prompt), torch.tensor(said), torch.ones(len(said), dtype=torch.bool))
            for prompt, said in zip(ids, completions.completion_ids, strict=True)
        ]
        inputs = collate(sequences, pad_id=tokenizer.pad_token_id, padding_free=False)
        language_model = LanguageModel(self._model)
        hidden = language_model.hidden_states(inputs).index_select(0, inputs.rows)
        head = language_model.head(args.temperature)._asdict()
        found = linear_logprobs(hidden, actions=inputs.actions, cu_seqlens=inputs.cu_seqlens, **head).logprobs
        completions.logprobs = [part.tolist() for part in found.split([s.rows for s in sequences])]
        return completions
