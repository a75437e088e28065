"""The row operations in Triton, for CUDA and ROCm; ``portable`` documents what each of them means.

Conventions of every kernel here: arithmetic in fp32 whatever is loaded; 64-bit offsets wherever rows meet the
vocabulary; exponentials as exp2; no atomics, so the same inputs give the same bits.

Rows of logits come from ``token_major``: they begin at multiples of 64 elements, or, under a bias and where V is a
multiple of 16, right behind each other. What lies between V and the next row is padding that ``row_grad`` may
overwrite. So every access is 16 bytes wide whatever V is.
"""

from .klq_metrics import klq_metrics
from .klq_residual import klq_residual
from .row_grad import row_grad
from .row_kl import row_kl, row_kl_grad
from .row_select import row_select
from .row_stats import row_stats
from .row_update import row_update, updates
from .scale import scale
from .scans import lambda_errors, reverse_scan
from .selected_logits import selected_logits
from .weighted_sums import weighted_sums

NAME = "triton"
VOCABULARY_MAJOR = False
PADS_ROWS = True
ADDS_BIAS = True

__all__ = [
    "ADDS_BIAS",
    "NAME",
    "PADS_ROWS",
    "VOCABULARY_MAJOR",
    "klq_metrics",
    "klq_residual",
    "lambda_errors",
    "reverse_scan",
    "row_grad",
    "row_kl",
    "row_kl_grad",
    "row_select",
    "row_stats",
    "row_update",
    "scale",
    "selected_logits",
    "updates",
    "weighted_sums",
]
