"""``QSharpConfig``: the arguments of a run of Q-sharp, beside those of ``transformers.TrainingArguments``.

How the numbers hang together:

    completions of a round          prompts of the round x samples_per_prompt, over all processes
    optimizer steps of the run      rounds x steps_per_round (sets max_steps)
    examples of a step              per_device_train_batch_size x gradient_accumulation_steps x processes
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from transformers import TrainingArguments

from ...call.checks import renaming, require, require_number
from ...guidance import ActionGuide, Law, ValueGuide
from ...guidance.decoding import OTHERS
from ..options import SamplingConfig, check_counts, option

GUIDES = {"value": ValueGuide, "action": ActionGuide}
LAW_ARGUMENTS = {"kind": "law", "atoms": "atoms", "low": "reward_low", "high": "reward_high"}  # by Law's names


@dataclass
class QSharpConfig(SamplingConfig):
    """Arguments of ``QSharpTrainer``; the defaults are the paper's (arXiv 2502.20548), where it names one.

    Raises:
        ValueError: naming the argument that is out of range.
    """

    learning_rate: float = option(2e-5, "Initial learning rate.")
    lr_scheduler_type: str = option("constant", "As in transformers.")
    weight_decay: float = option(1e-2, "Of AdamW.")
    max_grad_norm: float = option(5.0, "Gradients are clipped to this norm.")
    per_device_train_batch_size: int = option(32, "Examples of a micro-batch.")
    logging_steps: float = option(10, "Log every so many optimizer steps.")

    law: str = option("bernoulli", "The law of the reward: 'bernoulli', 'categorical', or 'mse' (its mean alone).")
    atoms: int = option(11, "law='categorical': number of atoms, evenly from reward_low to reward_high.")
    guide_type: str = option(
        "value",
        "Of a new guide: 'value' reads the state after a token (V-type), 'action' has outputs for each token of the "
        "vocabulary in the state before it (Q-type).",
    )
    reward_low: float = option(0.0, "The lowest reward; a lower one is an error.")
    reward_high: float = option(1.0, "The highest reward; a higher one is an error.")

    temperature: float = option(1.0, "Of the reference policy.")
    generation_kwargs: dict[str, Any] | str | None = option(None, "Further GenerationConfig arguments.")
    eta: float = option(0.1, "Units of reward per nat, > 0: of the prefixes that are sampled, and in evaluation.")
    top_k: int = option(20, "Candidates of a guided step.")
    others: str = option("keep", "The other tokens 'keep' their probabilities, or are 'exclude'd.")

    rounds: int = option(2, "Times that data are collected; the guide learns from those of all rounds so far.")
    steps_per_round: int = option(200, "Optimizer steps after each of them.")
    prompts_per_round: int | None = option(None, "Prompts of a round; by default all of the dataset.")
    samples_per_prompt: int = option(16, "Completions for each of them.")
    drop_constant: bool = option(True, "Leave out prompts whose completions all earn the same.")

    def __post_init__(self) -> None:
        self._check()
        steps = self.rounds * self.steps_per_round
        require(
            self.max_steps in (TrainingArguments.max_steps, steps),
            "max_steps",
            f"is rounds x steps_per_round, here {steps}; set those, got {self.max_steps}",
        )
        self.max_steps = steps
        super().__post_init__()

    @property
    def reward_law(self) -> Law:
        """The law that ``law``, ``atoms`` and the range of rewards say."""
        return Law(self.law, self.atoms, self.reward_low, self.reward_high)

    def _check(self) -> None:
        with renaming(LAW_ARGUMENTS):
            self.reward_law  # noqa: B018
        self._check_choice("guide_type", GUIDES)
        self._check_choice("others", OTHERS)
        require_number("eta", self.eta, positive=True)
        check_counts(self, ("top_k", "rounds", "steps_per_round", "prompts_per_round", "samples_per_prompt"))
