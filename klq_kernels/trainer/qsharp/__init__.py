"""Q-sharp (arXiv 2502.20548): ``QSharpTrainer`` trains a guide for a reference policy that stays as it is.

config      the settings of a run
trainer     rounds of data and of updates, as a ``transformers.Trainer``
collection  a round's data: guided prefixes, the reference's completions, rewards
examples    what a guide learns from, of all rounds so far
quality     how well a guide knows the law: discrimination, variance explained, calibration
"""

from __future__ import annotations

from .config import QSharpConfig
from .trainer import QSharpTrainer, load_guide

__all__ = ["QSharpConfig", "QSharpTrainer", "load_guide"]
