"""Optimisers that treat the head's weight in another way than the rest, to find what a sampled gradient does to them.

Adam divides a step by the root of the mean square of the gradients before it, element by element. So an element whose
gradient is small but always there moves as fast as any other; where it is there in a few steps only, at a larger value
and with the same mean, its mean square is larger and it moves more slowly. SGD is linear in the gradient and makes no
difference between the two, and a mean square over a whole row hardly does.

    adamw       AdamW throughout
    head-rows   AdamW, the head with one mean square per row
    head-sgd    AdamW, the head by SGD
    sgd         SGD throughout
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from ...call.checks import require
from ...trainer import KLQTrainer

BETAS, EPS = (0.9, 0.999), 1e-8
RULES = {  # the rule of the rest, and that of the head
    "head-rows": ("adam", "rows"),
    "head-sgd": ("adam", "sgd"),
    "sgd": ("sgd", "sgd"),
}


class Mixed(torch.optim.Optimizer):
    """Adam and SGD by the group: each has an ``lr`` and a ``rule``, "adam", "rows" or "sgd"."""

    def __init__(self, groups: list[dict[str, Any]]) -> None:
        super().__init__(groups, {"lr": 0.0, "rule": "adam"})

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is None:
                    continue
                if group["rule"] == "sgd":
                    parameter.sub_(parameter.grad, alpha=group["lr"])
                else:
                    self._adam(parameter, group["lr"], by_row=group["rule"] == "rows")

    def _adam(self, parameter: torch.Tensor, rate: float, *, by_row: bool) -> None:
        gradient: Any = parameter.grad
        square = gradient.square().mean(1, keepdim=True) if by_row else gradient.square()
        state = self.state[parameter]
        if not state:
            state |= {"step": 0, "mean": torch.zeros_like(gradient), "square": torch.zeros_like(square)}
        state["step"] += 1
        first, second = BETAS
        state["mean"].lerp_(gradient, 1 - first)
        state["square"].lerp_(square, 1 - second)
        mean = state["mean"] / (1 - first ** state["step"])
        root = (state["square"] / (1 - second ** state["step"])).sqrt()
        parameter.sub_(mean / (root + EPS), alpha=rate)


def optimizer_for(name: str, trainer: KLQTrainer, sgd_learning_rate: float) -> Mixed:
    """The optimiser of this name; learning rates but that of SGD are those of the trainer's config.

    Raises:
        ValueError: where there is none of this name.
    """
    require(name in RULES, "optimizer", f"must be one of adamw, {', '.join(RULES)}; got {name!r}")
    of_rest, of_head = RULES[name]
    args, head = trainer.args, trainer.policy.get_output_embeddings().weight
    critic = list(trainer.actor_critic.value.parameters())
    known = {id(parameter) for parameter in (head, *critic)}
    rest = [p for p in trainer.actor_critic.parameters() if p.requires_grad and id(p) not in known]
    rates = {"sgd": sgd_learning_rate, "adam": args.learning_rate, "rows": args.learning_rate}
    return Mixed(
        [
            {"params": rest, "rule": of_rest, "lr": rates[of_rest]},
            {"params": [head], "rule": of_head, "lr": rates[of_head]},
            {"params": critic, "rule": "adam", "lr": args.value_learning_rate},
        ]
    )
