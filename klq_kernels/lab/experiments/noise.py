"""The noise of a sampled gradient: that it averages out, and what share of a mini-batch's own noise it adds.

A mini-batch's gradient is itself a sample: with other tokens it would be another. Its variance is estimated from the
gradients g_i of its n independent parts, whose sum it is, by n / (n - 1) sum |g_i - mean|^2. For made-up rows the parts
are tokens; for a rollout they are sequences, whose tokens belong together. The variance that sampling adds is the mean
squared distance from the dense gradient over seeds.

Three batches: a rollout of a policy that has been trained for a while; and made-up rows of a large vocabulary, peaked
as a language model's are, or flat.
"""

from __future__ import annotations

import copy
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ... import KLQTargets, fused_klq_loss, linear_logprobs
from ...trainer import KLQTrainer
from ...trainer.actor_critic import States
from ...trainer.experience import Experience
from ...trainer.objectives import klq
from .spec import Settings
from .train import build_trainer

TOKENS, WIDTH = 512, 64  # of the made-up rows
TAU = 0.05
Gradient = Callable[[int | None, int], dict[str, Tensor]]  # of (samples or None for dense, seed), by name


class Batch(NamedTuple):
    """The inputs of a head: n tokens."""

    hidden: Tensor  # [n, H]
    weight: Tensor  # [V, H]
    actions: Tensor  # int64 [n]
    targets: KLQTargets


def measure_noise(settings: Settings, warm: Path) -> dict[str, Any]:
    """``variance``: a row per batch and number of samples. ``unbiased``: errors of means over seeds, on the rollout."""
    samples, repeats, averaged, vocabulary = (
        settings.pop(name) for name in ("samples", "repeats", "averaged", "vocabulary")
    )
    torch.manual_seed(settings.get("seed", 0))
    with tempfile.TemporaryDirectory() as folder:
        trainer, _, rows = build_trainer(settings, warm, folder)
        trainer.train()
        rollout = Rollout(trainer, rows)
    found = []
    batches: list[tuple[str, Batch, Gradient, dict[str, float]]] = [
        ("rollout", rollout.batch(), rollout.gradient, rollout.own_variance())
    ]
    for name, size in (("peaked", 1.0), ("flat", 0.02)):
        batch = made_up(vocabulary, size)
        batches.append((name, batch, partial(head_gradient, batch), own_variance_of_tokens(batch)))
    for name, batch, gradient, own in batches:
        found += [variance(name, batch, gradient, own, k, repeats) for k in samples]
    return {"variance": found, "unbiased": unbiased(rollout.gradient, 16, averaged)}


def variance(
    name: str, batch: Batch, gradient: Gradient, own: dict[str, float], samples: int, repeats: int
) -> dict[str, Any]:
    """The added variance as a share of the batch's own, by gradient; and the error by the logits beside its bound."""
    dense, by_logits = gradient(None, 0), logits_gradient(batch, None, 0)[0]
    added = dict.fromkeys(own, 0.0)
    squares = entries = 0.0
    for seed in range(repeats):
        sampled = gradient(samples, seed)
        for what in own:
            added[what] += float((sampled[what] - dense[what]).square().sum()) / repeats
        estimate, kept = logits_gradient(batch, samples, seed)
        squares += float((estimate - by_logits).square().sum() / by_logits.square().sum()) / repeats
        entries += kept / repeats
    return {
        "batch": name,
        "samples": samples,
        "entries": entries,
        "squared_error": squares,
        "bound": 1 / samples,
        "share": {what: added[what] / own[what] for what in own},
    }


def unbiased(gradient: Gradient, samples: int, most: int) -> dict[str, Any]:
    """Relative errors of the mean over 1, 4, 16 ... ``most`` seeds, by gradient."""
    dense = gradient(None, 0)
    sums = {name: torch.zeros_like(g) for name, g in dense.items()}
    counts: list[int] = []
    errors: dict[str, list[float]] = {name: [] for name in dense}
    for seed in range(most):
        for name, g in gradient(samples, seed).items():
            sums[name] += g
        n = seed + 1
        if n & (n - 1) == 0 and n.bit_length() % 2:  # a power of 4
            counts.append(n)
            for name, g in dense.items():
                errors[name].append(float((sums[name] / n - g).norm() / g.norm()))
    return {"samples": samples, "seeds": counts, "errors": errors}


# The batches


def made_up(vocabulary: int, size: float) -> Batch:
    """Zipf-like rows whose tokens stand out by up to 12, all logits times ``size``."""
    g = torch.Generator().manual_seed(0)
    weight = torch.randn(vocabulary, WIDTH, generator=g)
    hidden = torch.randn(TOKENS, WIDTH, generator=g)
    actions = torch.randint(vocabulary, (TOKENS,), generator=g)
    aim = weight[actions] / weight[actions].norm(dim=1, keepdim=True).square()
    hidden = 0.15 * hidden + 12 * torch.rand(TOKENS, 1, generator=g) * aim
    weight[:, 0], hidden[:, 0] = -torch.arange(1, vocabulary + 1).log(), 1.0
    hidden *= size
    old = linear_logprobs(hidden, weight, actions, cu_seqlens=whole(TOKENS)).logprobs
    return Batch(hidden, weight, actions, KLQTargets(old, torch.zeros(TOKENS), torch.randn(TOKENS, generator=g)))


def whole(n: int) -> Tensor:
    """``cu_seqlens`` of one sequence."""
    return torch.tensor([0, n], dtype=torch.int32)


def head_gradient(batch: Batch, samples: int | None, seed: int) -> dict[str, Tensor]:
    """By the head's weight, [V, H]."""
    hidden, weight, actions, targets = batch
    weight = weight.clone().requires_grad_()
    fused_klq_loss(
        hidden, weight, actions, torch.zeros(len(actions)), targets=targets, tau=TAU, cu_seqlens=whole(len(actions)),
        **sampling(samples), seed=seed,
    ).loss.backward()  # fmt: skip
    assert weight.grad is not None
    return {"head": weight.grad}


def logits_gradient(batch: Batch, samples: int | None, seed: int) -> tuple[Tensor, float]:
    """(gradient by the logits [V, n], kept entries per token): of a head whose hidden states are a unit matrix."""
    n = len(batch.actions)
    logits = (batch.weight @ batch.hidden.T).requires_grad_()
    loss, metrics = fused_klq_loss(
        torch.eye(n), logits, batch.actions, torch.zeros(n), targets=batch.targets, tau=TAU, cu_seqlens=whole(n),
        **sampling(samples), seed=seed,
    )  # fmt: skip
    loss.backward()
    assert logits.grad is not None
    return logits.grad, float(metrics.get("gradient_entries", torch.tensor(0.0)))


def sampling(samples: int | None) -> dict[str, Any]:
    return {"gradient": "dense"} if samples is None else {"gradient": "sampled", "samples": samples}


def own_variance_of_tokens(batch: Batch) -> dict[str, float]:
    """Each token's gradient by the head is that of its logits times its hidden state."""
    by_logits, _ = logits_gradient(batch, None, 0)
    total = head_gradient(batch, None, 0)["head"]
    n = len(batch.actions)
    squares = (by_logits.square().sum(0) * batch.hidden.square().sum(1)).sum()
    return {"head": float(n / (n - 1) * (squares - total.square().sum() / n))}


class Rollout:
    """A cycle's rollout of a trainer, as one batch."""

    def __init__(self, trainer: KLQTrainer, rows: list[dict[str, Any]]) -> None:
        self.trainer = trainer
        self.experience: Experience = trainer.collect(rows)
        self.tokens = int(self.experience.rows.sum())

    def batch(self) -> Batch:
        """The head's part of it."""
        with torch.no_grad():
            states = self.trainer.actor_critic(self.trainer.collate(self.experience.sequences), lambda states: states)
        actions = torch.cat([s.completion[s.trained] for s in self.experience.sequences])
        targets = self.experience.targets._replace(old_values=torch.zeros(self.tokens))
        return Batch(states.hidden, states.head.weight.detach(), actions, targets)

    def gradient(self, samples: int | None, seed: int, part: Tensor | None = None) -> dict[str, Tensor]:
        """By the head's weight, by the hidden states, and by all of the policy's parameters; of a part of the sequences
        the part that they have in the whole.
        """
        trainer, model = self.trainer, self.trainer.actor_critic
        config = copy.copy(trainer.args)
        config.head_gradient, config.head_samples = ("dense", 1) if samples is None else ("sampled", samples)
        experience = self.experience if part is None else self.experience.select(part)
        inputs = trainer.collate(experience.sequences)
        denom = torch.tensor(float(self.tokens))
        hidden: list[Tensor] = []

        def objective(states: States) -> Any:
            states.hidden.retain_grad()
            hidden.append(states.hidden)
            return klq(states, inputs, experience, denom, config, seed)

        model.zero_grad()
        model(inputs, objective)[0].backward()
        of = [p.grad.flatten() for p in trainer.policy.parameters() if p.grad is not None]
        assert hidden[0].grad is not None
        return {
            "head": trainer.policy.get_output_embeddings().weight.grad.clone(),
            "hidden": hidden[0].grad,
            "parameters": torch.cat(of),
        }

    def own_variance(self) -> dict[str, float]:
        """Of the gradients that a mini-batch adds up, from those of its sequences."""
        n = len(self.experience.sequences)
        parts = [self.gradient(None, 0, torch.tensor([i])) for i in range(n)]
        out = {}
        for name in ("head", "parameters"):
            every = torch.stack([part[name].flatten() for part in parts])
            out[name] = float(n / (n - 1) * (every - every.mean(0)).square().sum())
        return out
