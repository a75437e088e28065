"""Held-out prompts: the trainer's ``evaluate``, and the completions that a policy writes for them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from accelerate.utils import gather_object

from . import loading, sharding
from .config import KLQConfig
from .cycle import Cycle
from .means import Means
from .processes import Turn, turns
from .seeds import Purpose, derived_seed
from .statistics import add_held_out, add_rewards


class Evaluation(Cycle):
    """Rewards, KL and lengths of held-out prompts, sampled and scored as in a cycle."""

    args: KLQConfig

    def evaluate(
        self, eval_dataset: Any = None, ignore_keys: list[str] | None = None, metric_key_prefix: str = "eval"
    ) -> dict[str, float]:
        """Samples completions for held-out prompts and scores them; random numbers are the same each time.

        They are also the same on any number of processes, which take turns at batches of
        ``rollout_forward_batch_size`` prompts.

        Returns:
            ``eval_reward``, ``eval_reward_std``, ``eval_kl`` (nats per completion), ``eval_length``,
            ``eval_truncated`` and, of each reward function that scored anything, ``eval_rewards/NAME``.
        """
        data: Any = self.eval_dataset if eval_dataset is None else eval_dataset
        if isinstance(data, dict):
            return self._evaluate_each(data, ignore_keys, metric_key_prefix)
        loading.check_dataset("eval_dataset", data)
        sharding.check_sharded(self.accelerator, self.model, self.model_wrapped)
        means, mine = Means(), self.turns(len(data))
        names = ["reward", "kl", "length", "truncated", *(f"rewards/{n}" for n in self.rewards.names)]
        means.add(dict.fromkeys(names, 0.0), 0)  # every process has every name, also one that keeps no turn
        means.add_deviation("reward_std", torch.zeros(0))
        self.callback_handler.eval_dataloader = mine  # progress bars ask for its length
        for turn in mine:
            self._evaluate_turn(turn, [data[i] for i in turn.rows], means)
            self.control = self.callback_handler.on_prediction_step(self.args, self.state, self.control)
        found = means.drain(self.accelerator)
        metrics = {f"{metric_key_prefix}_{n}": found[n] for n in sorted(found)}
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def turns(self, number: int) -> list[Turn]:
        """This process's share in sampling completions for ``number`` held-out rows."""
        process, processes = self.args.process_index, self.accelerator.num_processes
        return turns(number, self.args.rollout_forward_batch_size, process=process, processes=processes)

    def _evaluate_turn(self, turn: Turn, rows: list[dict[str, Any]], means: Means) -> None:
        seed = derived_seed(self.args.seed, Purpose.EVALUATION, 0, turn.rows.start)  # 1, 2: the judge of ``klq train``
        rollout = self.roll_out(rows, seed)
        scored, ref_logprobs = self.score(rollout)
        if turn.kept or self.rewards.sharded:
            scores = self.reward(rows, rollout)
        if turn.kept:
            add_held_out(means, rollout, scores, scored.logprobs - ref_logprobs)
            add_rewards(means, scores, self.rewards.names)


def answers(
    trainer: Evaluation, rows: list[dict[str, Any]], sample: int, advance: Callable[[], None] | None = None
) -> list[str]:
    """One sampled completion for each row, as text, the same on any number of processes; every process must call it.

    Another ``sample``, other random numbers. ``advance`` is called after each batch of this process.
    """
    written: list[tuple[int, list[str]]] = []
    for turn in trainer.turns(len(rows)):
        seed = derived_seed(trainer.args.seed, Purpose.EVALUATION, 1 + sample, turn.rows.start)
        sequences = trainer.roll_out([rows[i] for i in turn.rows], seed).sequences
        texts = trainer.tokenizer.batch_decode([s.completion.tolist() for s in sequences], skip_special_tokens=True)
        if turn.kept:
            written.append((turn.rows.start, texts))
        if advance is not None:
            advance()
    return [text for _, texts in sorted(gather_object(written)) for text in texts]
