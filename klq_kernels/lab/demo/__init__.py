"""``klq demo``: what the fused loss saves, and a small model that learns with it, in a few minutes on a CPU.

memory         naive against fused on a realistic head
task           the letters, the tokenizer, the reward
policy         the model and its warm start
train          the training loop, in plain PyTorch
plots, report  pictures, tables, words
walkthrough    all of it, from start to end
"""

from __future__ import annotations

try:
    import matplotlib  # noqa: F401
    import transformers  # noqa: F401
except ImportError:
    raise SystemExit("the demo needs transformers and matplotlib: pip install 'klq_kernels[train]'") from None

from .walkthrough import FULL, Size, run

__all__ = ["FULL", "Size", "run"]
