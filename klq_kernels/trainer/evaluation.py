"""What a policy writes for held-out prompts."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from accelerate.utils import gather_object

from .seeds import Purpose, derived_seed
from .trainer import KLQTrainer


def answers(
    trainer: KLQTrainer, rows: list[dict[str, Any]], sample: int, advance: Callable[[], None] | None = None
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
