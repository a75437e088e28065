"""Q-sharp (arXiv 2502.20548): a guide learns the law of the reward under a reference policy, and tilts it at decoding.

    pi(a|s)  in proportion to  pi_ref(a|s) E[exp(R / eta) | s, a],      R the reward of pi_ref's completion of (s, a)

The reference is not trained. The law does not depend on eta, so one guide serves every eta.

laws         the law of the reward as a head writes it down: losses, means, tilts
guide        ``ValueGuide``, ``ActionGuide``: a backbone and a head that says the law after each token
candidates   what a guide says of k next tokens, in one forward pass
decoding     ``GuidedLogits``: a ``LogitsProcessor`` for ``generate``
vllm_requests  the same for requests of a vLLM engine, which imports it

A guide is trained by ``klq_kernels.trainer.QSharpTrainer``, or with the losses here in a loop of one's own.
"""

from __future__ import annotations

try:
    import transformers  # noqa: F401
except ImportError as error:
    raise ImportError(f"guidance needs {error.name}: pip install 'klq_kernels[train]'") from None

from .candidates import CandidateScorer
from .decoding import GuidedLogits
from .guide import ActionGuide, ValueGuide
from .laws import Law, sequence_mean

__all__ = ["ActionGuide", "CandidateScorer", "GuidedLogits", "Law", "ValueGuide", "sequence_mean"]
