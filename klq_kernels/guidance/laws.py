"""The law of a reward, as the outputs of a guide's head.

    kind          outputs         law of R on [low, high]               loss of an observed reward
    bernoulli     one logit       high with probability sigmoid(z)      cross-entropy at (R - low) / (high - low)
    categorical   A logits        A atoms, evenly from low to high      cross-entropy at the atom nearest to R
    mse           one logit       the mean alone, by sigmoid(z)         squared error of (R - low) / (high - low)

The tilt of a token is log E[exp(R / eta)] for the law after it. With u = (R - low) / (high - low) and the scale
s = (high - low) / eta it is low / eta + log E[exp(s u)], and the second part is

    bernoulli     log(1 - p + p e^s) = softplus(z + s) - softplus(z)
    categorical   logsumexp(log p_i + s u_i)
    mse           s p                                                   the first order in s, controlled decoding's

No exponential of s is formed, so that every eta > 0 is safe. ``mean / eta`` is the offset of controlled decoding (CD,
arXiv 2310.17022) for any law. ``reference.guide_tilt`` is the oracle.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from ..call.checks import require, require_number
from ..call.layout import check_cu_seqlens

KINDS = ("bernoulli", "categorical", "mse")


@dataclass(frozen=True)
class Law:
    """A family of laws on [low, high], in units of reward.

    Args:
        kind: 'bernoulli', 'categorical' or 'mse'.
        atoms: of the categorical law, at least 2; the others have one output whatever it is.
        low, high: the ends of the range of rewards; low < high.

    Raises:
        ValueError: naming the argument that is out of range.
    """

    kind: str = "bernoulli"
    atoms: int = 11
    low: float = 0.0
    high: float = 1.0

    def __post_init__(self) -> None:
        require(self.kind in KINDS, "kind", f"must be one of {', '.join(KINDS)}; got {self.kind!r}")
        whole = isinstance(self.atoms, int) and not isinstance(self.atoms, bool)
        require(whole and self.atoms >= 2, "atoms", f"must be at least 2, got {self.atoms!r}")
        require_number("low", self.low)
        require_number("high", self.high)
        require(self.low < self.high, "high", f"must be above low={self.low}, got {self.high}")

    @property
    def outputs(self) -> int:
        """A, the number of outputs of the head."""
        return self.atoms if self.kind == "categorical" else 1

    def support(self, device: torch.device | str = "cpu") -> Tensor:
        """The atoms of the categorical law in units of reward, fp32 [A]."""
        return torch.linspace(self.low, self.high, self.atoms, device=device)

    def loss(self, outputs: Tensor, rewards: Tensor) -> Tensor:
        """The loss of each prefix, fp32 [...].

        Args:
            outputs: of the head, [..., A].
            rewards: what was earned from each prefix, [...], in [low, high].

        Raises:
            ValueError: where shapes do not fit, or a reward is outside [low, high].
        """
        self._check_outputs(outputs)
        require(
            rewards.shape == outputs.shape[:-1],
            "rewards",
            f"must be {tuple(outputs.shape[:-1])}, one for each prefix of outputs, got {tuple(rewards.shape)}",
        )
        share = self.share(rewards)
        if self.kind == "categorical":
            nearest = (share * (self.atoms - 1)).round().long()
            return F.cross_entropy(outputs.float().movedim(-1, 1), nearest, reduction="none")
        logit = outputs.float().squeeze(-1)
        if self.kind == "bernoulli":
            return F.binary_cross_entropy_with_logits(logit, share, reduction="none")
        return (logit.sigmoid() - share).square()

    def mean(self, outputs: Tensor) -> Tensor:
        """The mean of the law, fp32 [...], in units of reward."""
        self._check_outputs(outputs)
        if self.kind == "categorical":
            return outputs.float().softmax(-1) @ self.support(outputs.device)
        return self.low + (self.high - self.low) * outputs.float().squeeze(-1).sigmoid()

    def tilt(self, outputs: Tensor, eta: float) -> Tensor:
        """log E[exp(R / eta)] of each prefix, fp32 [...].

        Raises:
            ValueError: where eta is not above 0.
        """
        require_number("eta", eta, positive=True)
        self._check_outputs(outputs)
        if self.kind == "mse":
            return self.mean(outputs) / eta
        scale = (self.high - self.low) / eta
        if self.kind == "categorical":
            shares = torch.linspace(0.0, scale, self.atoms, device=outputs.device)
            return self.low / eta + (outputs.float().log_softmax(-1) + shares).logsumexp(-1)
        logit = outputs.float().squeeze(-1)
        # softplus(z + s) - softplus(z), which for large z cancels, and is s + softplus(-z - s) - softplus(-z) as well
        positive = scale + F.softplus(-logit - scale) - F.softplus(-logit)
        return self.low / eta + torch.where(logit > 0, positive, F.softplus(logit + scale) - F.softplus(logit))

    def share(self, rewards: Tensor) -> Tensor:
        """(R - low) / (high - low), fp32.

        Raises:
            ValueError: where a reward is outside [low, high].
        """
        share = (rewards.float() - self.low) / (self.high - self.low)
        if share.numel():
            inside = bool(((share >= -1e-6) & (share <= 1 + 1e-6)).all())  # NaN is not
            require(
                inside,
                "rewards",
                f"must be in [low, high] = [{self.low}, {self.high}]; the smallest is {rewards.min():.6g}, the largest "
                f"{rewards.max():.6g}. Set low and high to the range of the reward function",
            )
        return share.clamp(0, 1)

    def _check_outputs(self, outputs: Tensor) -> None:
        require(
            outputs.dim() >= 1 and outputs.shape[-1] == self.outputs,
            "outputs",
            f"must end in {self.outputs}, the outputs of the {self.kind} law, got {tuple(outputs.shape)}",
        )


def sequence_mean(losses: Tensor, cu_seqlens: Tensor) -> Tensor:
    """The mean of each sequence's losses, and then of the sequences: all count alike, however long they are.

    Args:
        losses: packed, [N].
        cu_seqlens: int32 [S + 1], where sequences begin and end; empty ones count for nothing.

    Raises:
        ValueError: where ``cu_seqlens`` does not rise from 0 to N (on a GPU under ``KLQ_CHECK=1``).
    """
    require(losses.dim() == 1, "losses", f"must be packed, [N]; got {list(losses.shape)}")
    check_cu_seqlens(cu_seqlens, len(losses))
    lengths = cu_seqlens.diff().to(losses.device)
    sequence = torch.repeat_interleave(torch.arange(len(lengths), device=losses.device), lengths)
    weights = 1.0 / lengths.clamp(min=1)
    return (losses * weights[sequence]).sum() / (lengths > 0).sum().clamp(min=1)
