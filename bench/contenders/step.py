"""A whole training step: a small Llama body, a head of the shape's size, a value head, AdamW; losses as in ``loss``."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from klq_kernels import KLQTargets, fused_klq_loss
from klq_kernels.reference import klq_residual_loss

from ..shapes import HEAD_PRESETS, RECORDS, STEP_LAYERS, Shape, lengths
from . import Call, Contender, Outputs
from .ours import NAME
from .plain import TAU, Logprobs, chunked_logprobs, naive_logprobs

PRESETS = {
    "tiny": HEAD_PRESETS["tiny"],
    "quick": [Shape("quick", 256, 256, 32_768, torch.float32, ragged=True)],
    "full": [Shape("full", n, 512, 50_304, torch.float32, ragged=True) for n in (256, 1024)],
    **{name: [shape._replace(softcap=None)] for name, shape in RECORDS.items()},
}


class Policy(nn.Module):
    """Body, head and value head."""

    def __init__(self, shape: Shape) -> None:
        from transformers import LlamaConfig, LlamaModel

        super().__init__()
        heads = max(shape.hidden // 64, 1)
        config = LlamaConfig(
            vocab_size=shape.vocab, hidden_size=shape.hidden, intermediate_size=2 * shape.hidden,
            num_hidden_layers=STEP_LAYERS, num_attention_heads=heads, num_key_value_heads=heads, use_cache=False,
        )  # fmt: skip
        self.body = LlamaModel(config)
        self.head = nn.Parameter(torch.randn(shape.vocab, shape.hidden) / shape.hidden**0.5)
        self.value = nn.Linear(shape.hidden, 1)

    def forward(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """(hidden [B, T, H], values [B, T])."""
        hidden = self.body(input_ids=tokens).last_hidden_state
        return hidden, self.value(hidden).squeeze(-1)


@dataclass(frozen=True)
class StepInputs:
    policy: Policy
    tokens: Tensor  # [B, T]
    actions: Tensor  # [B, T], the tokens that follow
    mask: Tensor  # bool [B, T]
    targets: KLQTargets


def step_inputs(shape: Shape, device: torch.device, seed: int = 0) -> StepInputs:
    torch.manual_seed(seed)
    generator = torch.Generator().manual_seed(seed)
    sequences = max(shape.tokens // 1024, min(4, shape.tokens))
    counts = torch.tensor(lengths(shape.tokens, sequences, ragged=shape.ragged, generator=generator))
    prompts = counts // 2
    step = torch.arange(int((counts + prompts).max()))
    mask = (step >= prompts[:, None]) & (step < (counts + prompts)[:, None])
    tokens = torch.randint(shape.vocab, (len(counts), len(step) + 1), generator=generator)
    targets = KLQTargets(*(torch.randn(mask.shape, generator=generator) for _ in range(3)))
    targets = targets._replace(old_logprobs=targets.old_logprobs - 11.0, advantages=0.5 * targets.advantages)
    with device:
        policy = Policy(shape).to(shape.dtype)
    return StepInputs(
        policy,
        tokens[:, :-1].to(device),
        tokens[:, 1:].to(device),
        mask.to(device),
        KLQTargets(*(t.to(device) for t in targets)),
    )


Loss = Callable[[Policy, StepInputs], Tensor]


def fused_loss(policy: Policy, inputs: StepInputs) -> Tensor:
    hidden, values = policy(inputs.tokens)
    return fused_klq_loss(
        hidden, policy.head, inputs.actions, values, targets=inputs.targets, tau=TAU, mask=inputs.mask
    ).loss


def loss_by(logprobs: Logprobs) -> Loss:
    def loss(policy: Policy, inputs: StepInputs) -> Tensor:
        hidden, values = policy(inputs.tokens)
        old_logprobs, old_values, advantages = (t[inputs.mask] for t in inputs.targets)
        taken = logprobs(hidden[inputs.mask], policy.head, inputs.actions[inputs.mask], None)
        change = values[inputs.mask] - old_values
        return klq_residual_loss(taken.float() - old_logprobs, change, advantages, tau=TAU).mean()

    return loss


def training(loss_function: Loss) -> Callable[[StepInputs], Call]:
    def make(inputs: StepInputs) -> Call:
        policy = copy.deepcopy(inputs.policy)
        optimizer = torch.optim.AdamW(policy.parameters(), lr=1e-4)

        def call() -> Outputs:
            optimizer.zero_grad(set_to_none=True)
            loss = loss_function(policy, inputs)
            loss.backward()
            found = _found(policy, loss)
            optimizer.step()
            return found

        return call

    return make


def _found(policy: Policy, loss: Tensor) -> Outputs:
    first = next(policy.body.layers.parameters())
    assert policy.head.grad is not None
    assert first.grad is not None
    return {"loss": loss.detach(), "weight": policy.head.grad, "first layer": first.grad}


def oracle(inputs: StepInputs, objective: str) -> Outputs:
    """Autograd through the same network in float64."""
    policy = copy.deepcopy(inputs.policy).double()
    double = StepInputs(
        policy, inputs.tokens, inputs.actions, inputs.mask, KLQTargets(*(t.double() for t in inputs.targets))
    )
    hidden, values = policy(inputs.tokens)
    logp = F.linear(hidden[inputs.mask], policy.head).log_softmax(-1)
    taken = logp.gather(-1, inputs.actions[inputs.mask][:, None]).squeeze(-1)
    old_logprobs, old_values, advantages = (t[inputs.mask] for t in double.targets)
    loss = klq_residual_loss(taken - old_logprobs, values[inputs.mask] - old_values, advantages, tau=TAU).mean()
    loss.backward()
    return _found(policy, loss)


def body_and_gemms(inputs: StepInputs) -> Call:
    """The step without a loss: body forward and backward, the head's three products, the optimiser."""

    def loss_of_nothing(policy: Policy, batch: StepInputs) -> Tensor:
        hidden, values = policy(batch.tokens)
        rows = hidden[batch.mask]
        return rows.sum() + values.sum()

    policy = copy.deepcopy(inputs.policy)
    optimizer = torch.optim.AdamW(policy.parameters(), lr=1e-4)
    n = int(inputs.mask.sum())
    rows = policy.head.detach().new_zeros(n, policy.head.shape[1])
    logits = policy.head.detach().new_empty(n, policy.head.shape[0])
    d_rows, d_head = torch.empty_like(rows), torch.empty_like(policy.head.detach())

    def call() -> Outputs:
        optimizer.zero_grad(set_to_none=True)
        loss_of_nothing(policy, inputs).backward()
        torch.mm(rows, policy.head.detach().T, out=logits)
        torch.mm(logits, policy.head.detach(), out=d_rows)
        torch.mm(logits.T, rows, out=d_head)
        policy.head.grad = d_head
        optimizer.step()
        return {}

    return call


CONTENDERS = [
    Contender(NAME, training(fused_loss), module="transformers", install="pip install transformers"),
    Contender("naive", training(loss_by(naive_logprobs)), module="transformers", install="pip install transformers"),
    Contender(
        "chunked autograd",
        training(loss_by(chunked_logprobs)),
        module="transformers",
        install="pip install transformers",
    ),
]
