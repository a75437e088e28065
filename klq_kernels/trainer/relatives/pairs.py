"""Pairs of completions for a prompt, one preferred to the other, as rows of a dataset and as sequences.

A row has ``prompt``, and ``chosen`` and ``rejected``, which are completions as ``written`` has them.
"""

from __future__ import annotations

from typing import Any

from ...call.checks import require
from ..batches import Sequence
from ..written import Reader

COLUMNS = ("chosen", "rejected")


def check_pairs(name: str, dataset: Any) -> None:
    """Raises a ValueError unless a dataset that has prompts has pairs too."""
    missing = [column for column in COLUMNS if column not in dataset[0]]
    require(not missing, name, f"must have the columns prompt, chosen and rejected; there is no {', '.join(missing)}")


class PairReader(Reader):
    """Makes sequences of rows; arguments as in ``Reader``."""

    def sequences(self, rows: list[dict[str, Any]], *columns: str) -> list[Sequence]:
        """The chosen sequences of all rows, and then the rejected ones; raises as ``Reader`` does."""
        return super().sequences(rows, *(columns or COLUMNS))
