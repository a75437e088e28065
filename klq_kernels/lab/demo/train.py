"""KLQ in a plain PyTorch loop. Copy this file: of the library it needs only the four functions imported below.

    rollout     sample responses, note which tokens were sampled and which responses were cut off
    score       log-probs under the policy and the frozen reference (``linear_logprobs``), values, and from them and
                the rewards the targets (``klq_targets``)
    update      a few epochs over shuffled minibatches of ``fused_klq_loss``

Nothing of size [tokens, vocabulary] is made outside ``generate``: the model runs without its lm_head, and the library
reads the head's weight instead.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from klq_kernels import KLQTargets, fused_klq_loss, klq_loss, klq_targets, linear_logprobs


@dataclass(frozen=True)
class Settings:
    """The hyperparameters; tau is the price of one nat of KL in units of reward."""

    batch: int = 96  # responses per step
    minibatches: int = 2
    epochs: int = 2
    max_new_tokens: int = 28
    tau: float = 0.05
    lam: float = 0.95
    lr: float = 5e-4
    value_lr: float = 3e-3  # the value head starts from nothing and has to follow the policy
    max_grad_norm: float = 1.0
    gradient: str = "dense"  # or "sampled", with so many samples per token
    samples: int = 64


class Rollout(NamedTuple):
    """Prompts padded on the left to P tokens, followed by responses padded on the right to T tokens."""

    ids: Tensor  # [B, P + T]
    attention: Tensor  # [B, P + T], 1 at prompt and response tokens, 0 at padding of either side
    mask: Tensor  # bool [B, T], True at sampled tokens, the EOS among them
    truncated: Tensor  # bool [B], True where the response was cut off before an EOS

    @property
    def actions(self) -> Tensor:
        return self.ids[:, -self.mask.shape[1] :]

    def select(self, rows: Tensor) -> Rollout:
        return Rollout(*(tensor[rows] for tensor in self))


@torch.no_grad()
def rollout(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, prompts: list[str], max_new_tokens: int
) -> Rollout:
    """Samples one response per prompt from the policy itself: temperature 1, the whole vocabulary."""
    inputs = tokenizer(prompts, return_tensors="pt", padding=True, padding_side="left").to(model.device)
    ids = model.generate(  # type: ignore[operator]
        **inputs,
        do_sample=True, temperature=1.0, top_k=0, top_p=1.0, max_new_tokens=max_new_tokens,
        eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id,
    )  # fmt: skip
    ended = ids[:, inputs["input_ids"].shape[1] :] == tokenizer.eos_token_id
    mask = ended.cumsum(1) - ended.long() == 0  # no EOS before this token
    attention = torch.cat([inputs["attention_mask"], mask.long()], dim=1)
    return Rollout(ids, attention, mask, ~ended.any(1))


def states(model: PreTrainedModel, batch: Rollout) -> Tensor:
    """Last hidden states [B, T + 1, H]: the one before each response token, and the one after the last.

    states[:, t] is what response token t is predicted from; that is the shift by one.
    """
    positions = (batch.attention.cumsum(1) - 1).clamp(min=0)  # padding on the left does not count
    out = model.base_model(batch.ids, attention_mask=batch.attention, position_ids=positions, use_cache=False)
    return out.last_hidden_state[:, -batch.mask.shape[1] - 1 :]


class Learner:
    """A policy, its frozen reference, and a value head on the policy's hidden states."""

    def __init__(self, model: PreTrainedModel, settings: Settings) -> None:
        self.settings = settings
        self.model = model.eval()  # dropout would make the policy that learns another one than the one that sampled
        self.reference = copy.deepcopy(model).requires_grad_(False)
        self.value_head = nn.Linear(model.config.hidden_size, 1)
        nn.init.zeros_(self.value_head.weight)
        nn.init.zeros_(self.value_head.bias)
        self.parameters = [*model.parameters(), *self.value_head.parameters()]
        groups: list[dict[str, Any]] = [
            {"params": list(model.parameters()), "lr": settings.lr},
            {"params": list(self.value_head.parameters()), "lr": settings.value_lr},
        ]
        self.optimizer = torch.optim.AdamW(groups, weight_decay=0.0)

    @torch.no_grad()
    def score(self, batch: Rollout, rewards: Tensor) -> tuple[KLQTargets, dict[str, Tensor]]:
        """The targets of a rollout, and what it says about the policy. ``rewards`` [B] is one score per response."""
        hidden = states(self.model, batch)
        values = self.value_head(hidden).squeeze(-1)
        head, reference_head = (m.get_output_embeddings().weight for m in (self.model, self.reference))
        policy = linear_logprobs(hidden[:, :-1], head, batch.actions, mask=batch.mask, return_entropy=True)
        reference = linear_logprobs(
            states(self.reference, batch)[:, :-1], reference_head, batch.actions, mask=batch.mask
        )
        targets = klq_targets(
            policy.logprobs,
            reference.logprobs,
            values[:, :-1],
            # A response that was cut off has no score yet; what it may still earn is V of the state it was left in.
            rewards.masked_fill(batch.truncated, 0.0),
            bootstrap_values=values[:, -1] * batch.truncated,
            mask=batch.mask,
            tau=self.settings.tau,
            lam=self.settings.lam,
        )
        before = klq_loss(policy.logprobs, values[:, :-1], targets, mask=batch.mask, tau=self.settings.tau).metrics
        assert policy.entropy is not None
        tokens = batch.mask.sum()
        return targets, {
            "reward": rewards.mean(),
            "kl": (policy.logprobs - reference.logprobs).sum(1).mean(),  # nats per response
            "entropy": policy.entropy.sum() / tokens,  # nats per token
            "length": tokens / len(rewards),
            "truncated": batch.truncated.float().mean(),
            "value": before["value_mean"],
            "explained_variance": before["explained_variance"],  # of the returns, by V as it was at the rollout
            "residual_rms": before["residual_rms"],
        }

    def update(self, batch: Rollout, targets: KLQTargets) -> dict[str, Tensor]:
        """Epochs of shuffled minibatches on one rollout; says how far they moved the policy from it."""
        settings = self.settings
        # Every token weighs the same, whichever minibatch it falls into.
        tokens_per_minibatch = batch.mask.sum() / settings.minibatches
        for _ in range(settings.epochs):
            for rows in torch.randperm(len(batch.ids)).tensor_split(settings.minibatches):
                part = batch.select(rows)
                hidden = states(self.model, part)[:, :-1]
                loss, metrics = fused_klq_loss(
                    hidden,
                    self.model.get_output_embeddings().weight,
                    part.actions,
                    self.value_head(hidden).squeeze(-1),
                    targets=KLQTargets(*(t[rows] for t in targets)),
                    mask=part.mask,
                    denom=tokens_per_minibatch,
                    tau=settings.tau,
                    gradient=settings.gradient,
                    samples=settings.samples,
                )
                self.optimizer.zero_grad()
                loss.backward()
                nn.utils.clip_grad_norm_(self.parameters, settings.max_grad_norm)
                self.optimizer.step()
        return {"loss": loss.detach(), "kl_old": metrics["kl_old_k3"]}  # of the last minibatch


def train(
    learner: Learner,
    tokenizer: PreTrainedTokenizerBase,
    batches: Iterator[tuple[list[str], Callable[[list[str], list[bool]], list[float]]]],
) -> Iterator[dict[str, float]]:
    """One step per batch of (prompts, reward function); yields the step's metrics.

    The reward function gets the decoded responses and, for each, whether it ended by itself.
    """
    for prompts, reward in batches:
        batch = rollout(learner.model, tokenizer, prompts, learner.settings.max_new_tokens)
        texts = tokenizer.batch_decode(batch.actions, skip_special_tokens=True)
        rewards = torch.tensor(reward(texts, (~batch.truncated).tolist()))
        targets, seen = learner.score(batch, rewards)
        metrics = learner.update(batch, targets)
        yield {name: value.item() for name, value in {**seen, **metrics}.items()}
