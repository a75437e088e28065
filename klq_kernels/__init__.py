"""Fused kernels for KL-regularised Q-learning (KLQ, arXiv 2508.17000) on large-vocabulary language models."""

from .call.layout import Packing, pack
from .divergence import linear_kl
from .logprobs import linear_logprobs
from .loss import fused_klq_loss, klq_loss
from .returns import gae, klq_targets, lambda_returns, reverse_scan
from .selected import linear_select
from .types import KLQLoss, KLQTargets, LinearLogprobs

__version__ = "0.1.0"

__all__ = [
    "KLQLoss",
    "KLQTargets",
    "LinearLogprobs",
    "Packing",
    "__version__",
    "fused_klq_loss",
    "gae",
    "klq_loss",
    "klq_targets",
    "lambda_returns",
    "linear_kl",
    "linear_logprobs",
    "linear_select",
    "pack",
    "reverse_scan",
]
