"""Relatives of KLQ, each in a file of its own that tells its algorithm; ``reference`` states their losses.

oreo        the soft Bellman equation summed to the end of a sequence, with a critic
tbrm        the same equation over whole sequences, with the logits as values and no critic
vineppo     PPO with values sampled from the states
dpo         preferences: DPO and token-level DPO, on offline pairs (pairs)
divergence  the exact KL of policy and reference that OREO and TDPO read

Two more have no file here, since they are options of ``KLQConfig``: DPPO's mask (``off_policy="retrace"``,
``algorithm="ppo"``; ``trainer.off_policy``) and DVPO's frozen value model (``freeze_value_model``).
"""

from __future__ import annotations

from ..trainer import KLQTrainer
from .dpo import DPOConfig, DPOTrainer
from .oreo import OREOConfig, OREOTrainer
from .tbrm import TBRMConfig, TBRMTrainer
from .vineppo import VinePPOConfig, VinePPOTrainer

# Those on KLQ's cycle, which take its datasets and rewards, by the name of the algorithm.
CYCLES: dict[str, type[KLQTrainer]] = {"oreo": OREOTrainer, "tbrm": TBRMTrainer, "vineppo": VinePPOTrainer}

__all__ = [
    "CYCLES",
    "DPOConfig",
    "DPOTrainer",
    "OREOConfig",
    "OREOTrainer",
    "TBRMConfig",
    "TBRMTrainer",
    "VinePPOConfig",
    "VinePPOTrainer",
]
