"""Relatives of KLQ: other losses of the same ingredients, log pi / pi_ref, rewards, values.

pairs divergence         preferred and rejected completions; the exact KL of policy and reference
dpo dpo_config dpo_trainer   DPO and TDPO: pairs of completions
"""

from __future__ import annotations

from .dpo_config import DPOConfig
from .dpo_trainer import DPOTrainer

__all__ = ["DPOConfig", "DPOTrainer"]
