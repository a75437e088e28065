"""Pairs of completions for a prompt, one preferred to the other, as rows of a dataset and as sequences.

A row has ``prompt``, and ``chosen`` and ``rejected``, which are completions as ``written`` has them.
"""

from __future__ import annotations

from typing import Any

from ...call.checks import require
from ..batches import Sequence
from ..loading import column_of
from ..written import Reader

COLUMNS = ("chosen", "rejected")


def check_pairs(name: str, dataset: Any) -> None:
    """Raises a ValueError unless a dataset that has prompts, or each of a dict of them, has pairs too."""
    for part in dataset.values() if isinstance(dataset, dict) else [dataset]:
        lacks = ", ".join(column for column in COLUMNS if column not in part[0])
        require(not lacks, name, f"must have the columns prompt, chosen and rejected; there is no {lacks}")
        for column in COLUMNS:
            for row, said in enumerate(column_of(part, column)):
                require(bool(said), name, f"{column} of row {row} is empty, got {said!r}")


class PairReader(Reader):
    """Makes sequences of rows; arguments as in ``Reader``."""

    def sequences(self, rows: list[dict[str, Any]], *columns: str) -> list[Sequence]:
        """The chosen sequences of all rows, and then the rejected ones; raises as ``Reader`` does."""
        return super().sequences(rows, *(columns or COLUMNS))
