"""A thin trainer on the kernels: ``KLQTrainer``, a ``transformers.Trainer`` for KLQ and its PPO baseline.

options config               the arguments that several trainers have, and those of ``KLQTrainer``
base resuming                what all trainers share: logging; which checkpoints there are, and whether one fits
trainer                      the seams to transformers: updates, logs, optimiser
cycle                        a cycle up to its updates: rollout, rewards, scoring, targets
checkpoints evaluation       saving and resuming; held-out prompts
loading data rollout rewards models and datasets as users give them; prompts; completions; scores
parts probe                  the models of a run, each proven to be one that the trainer trains rightly
models actor_critic          the parts of a language model; the module that is trained
frozen                       the reference and reward models, and where their weights are
sharding                     engines that shard weights over processes: FSDP2, ZeRO-3
export engine                the policy's weights, as an engine loads them; rollouts by an engine that follows them
ahead                        rollouts that an engine samples while the trainer learns
batches experience           sequences as a model reads them; their targets and log-probabilities
targets                      lambda-errors from the scores, for V and for the policy
objectives                   scores, the KLQ loss, the PPO loss
off_policy                   corrections for samples of another policy than the one that learns
sampler seeds                the prompts of a cycle, reproducible randomness
statistics means             the statistics in the logs, and their means over processes and steps
relatives                    OREO, TBRM, VinePPO, DPO: other methods on the same parts
qsharp                       a guide for a reference that stays as it is
replay demonstrations        completions of earlier cycles, and those of someone else
written                      completions in a dataset, as sequences
running                      running spreads of scores and errors
processes                    shares in held-out rows, failing together, the end of a run that has several
callbacks completions_log    signatures of failure; completions to read
"""

from __future__ import annotations

try:
    import accelerate  # noqa: F401
    import transformers  # noqa: F401
except ImportError as error:
    raise ImportError(f"the trainer needs {error.name}: pip install 'klq_kernels[train]'") from None

from .config import KLQConfig
from .engine import EngineRollout
from .processes import leave_process_group
from .qsharp import QSharpConfig, QSharpTrainer
from .relatives import (
    DPOConfig,
    DPOTrainer,
    OREOConfig,
    OREOTrainer,
    TBRMConfig,
    TBRMTrainer,
    VinePPOConfig,
    VinePPOTrainer,
)
from .resuming import last_complete_checkpoint
from .rewards import RewardFunction, Rewards, Scores
from .rollout import Completions, RolloutFunction
from .trainer import KLQTrainer

__all__ = [
    "Completions",
    "DPOConfig",
    "DPOTrainer",
    "EngineRollout",
    "KLQConfig",
    "KLQTrainer",
    "OREOConfig",
    "OREOTrainer",
    "QSharpConfig",
    "QSharpTrainer",
    "RewardFunction",
    "Rewards",
    "RolloutFunction",
    "Scores",
    "TBRMConfig",
    "TBRMTrainer",
    "VinePPOConfig",
    "VinePPOTrainer",
    "last_complete_checkpoint",
    "leave_process_group",
]
