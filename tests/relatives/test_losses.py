"""The relatives' objectives, on packed rows from hidden states, against the oracle on padded logits in float64."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import pytest
import tiny
import torch
from torch import Tensor

from klq_kernels import klq_targets, linear_logprobs, reference
from klq_kernels.trainer.actor_critic import States
from klq_kernels.trainer.batches import Inputs
from klq_kernels.trainer.experience import Experience
from klq_kernels.trainer.models import Head
from klq_kernels.trainer.objectives import klq
from klq_kernels.trainer.relatives import DPOConfig, OREOConfig, TBRMConfig
from klq_kernels.trainer.relatives.dpo import pair_losses
from klq_kernels.trainer.relatives.oreo import oreo
from klq_kernels.trainer.relatives.tbrm import tbrm
from klq_kernels.trainer.relatives.vineppo import spread

pytestmark = pytest.mark.usefixtures("one_thread")

HIDDEN, VOCAB = 24, 131
LENGTHS = (7, 0, 1, 12, 3, 5)
TRAINED = ("hidden", "weight", "bias", "values")
HEAD: dict[str, Any] = {"temperature": 0.7, "softcap": 4.0}


class Batch(NamedTuple):
    """Padded tensors in float64 with a mask, and the same packed in fp32."""

    lengths: tuple[int, ...]
    mask: Tensor
    padded: dict[str, Tensor]
    packed: dict[str, Tensor]

    def states(self) -> States:
        p = self.packed
        return States(p["hidden"], Head(p["weight"], p["bias"], **_head()), p["values"], torch.zeros(len(self.lengths)))

    def reference(self) -> States:
        p = self.packed
        head = Head(p["ref_weight"], p["ref_bias"], **_head())
        return States(p["ref_hidden"], head, torch.zeros(0), torch.zeros(0))

    def inputs(self) -> Inputs:
        nothing = torch.zeros(0)
        cu_seqlens = torch.tensor([0, *self.lengths]).cumsum(0).int()
        return Inputs(nothing, None, nothing, nothing, nothing, self.packed["actions"], cu_seqlens)

    def oracle(self, name: str = "") -> Any:
        """Log-probs, log-normalisers of the policy (or of ``ref_``), [B, T]."""
        p = self.padded
        return reference.linear_logprobs(
            p[f"{name}hidden"], p[f"{name}weight"], p["actions"].clamp(0, VOCAB - 1), bias=p[f"{name}bias"], **HEAD
        )

    def kl(self, direction: str) -> Tensor:
        p = self.padded
        return reference.linear_kl(
            p["hidden"], p["weight"], p["ref_hidden"], p["ref_weight"], bias=p["bias"], ref_bias=p["ref_bias"],
            direction=direction, **HEAD,
        )  # fmt: skip

    def assert_same_gradients(self, ours: Tensor, theirs: Tensor, names: tuple[str, ...]) -> None:
        torch.testing.assert_close(ours.double(), theirs, rtol=2e-5, atol=1e-6)
        got = torch.autograd.grad(ours, [self.packed[n] for n in names])
        expected = torch.autograd.grad(theirs, [self.padded[n] for n in names])
        for name, g, e in zip(names, got, expected, strict=True):
            e = e[self.mask] if name in ("hidden", "values") else e
            torch.testing.assert_close(g.double(), e, rtol=1e-4, atol=2e-5 * e.abs().max().item(), msg=name)
            assert e.abs().max() > 1e-4, name


def _head() -> dict[str, Any]:
    return {"softcap": HEAD["softcap"], "temperature": HEAD["temperature"]}


def batch(lengths: tuple[int, ...] = LENGTHS, seed: int = 0) -> Batch:
    g = torch.Generator().manual_seed(seed)

    def random(*shape: int, scale: float = 1.0) -> Tensor:
        return torch.randn(*shape, generator=g, dtype=torch.float64).mul(scale).float().double()

    size = (len(lengths), max(lengths))
    mask = torch.arange(size[1]) < torch.tensor(lengths)[:, None]
    padded = {
        "hidden": random(*size, HIDDEN), "ref_hidden": random(*size, HIDDEN),
        "weight": random(VOCAB, HIDDEN, scale=0.4),
        "ref_weight": random(VOCAB, HIDDEN, scale=0.4), "bias": random(VOCAB, scale=0.3),
        "ref_bias": random(VOCAB, scale=0.3), "values": random(*size), "scores": random(size[0]),
        "actions": torch.randint(VOCAB, size, generator=g),
    }  # fmt: skip
    per_token = ("hidden", "ref_hidden", "values", "actions")
    packed = {n: t[mask] if n in per_token else t for n, t in padded.items()}
    packed = {n: t.float() if t.is_floating_point() else t for n, t in packed.items()}
    for name in TRAINED:
        padded[name].requires_grad_()
        packed[name].requires_grad_()
    return Batch(lengths, mask, padded, packed)


def experience(b: Batch, tau: float, seed: int = 1) -> Experience:
    """What a rollout of an older policy and critic would have left, in fp32 as the cycle makes it."""
    g = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        logp, ref = (b.oracle(name).logprobs[b.mask] for name in ("", "ref_"))
        old = (logp + 0.3 * torch.randn(len(logp), generator=g, dtype=torch.float64)).float()
        values = torch.randn(len(logp), generator=g)
        targets = klq_targets(
            old, ref.float(), values, b.packed["scores"], tau=tau, lam=1.0, cu_seqlens=b.inputs().cu_seqlens
        )
    return Experience([SimpleNamespace(rows=n) for n in b.lengths], targets, ref.float(), targets.advantages)  # type: ignore[misc]


@pytest.mark.parametrize("kl_coef", [0.0, 0.2])
def test_oreo_is_the_oracles(kl_coef: float, tmp_path: Path) -> None:
    b, config = batch(), OREOConfig(str(tmp_path), tau=0.3, kl_coef=kl_coef, use_cpu=True)
    kept = b.reference() if kl_coef else None
    denom = torch.tensor(float(sum(LENGTHS)))
    ours, metrics = oreo(b.states(), b.inputs(), experience(b, 0.3), denom, config, reference=kept)
    theirs = reference.oreo_loss(
        b.oracle().logprobs, b.oracle("ref_").logprobs, b.padded["values"], b.padded["scores"], beta=0.3,
        kl=b.kl("forward"), kl_coef=kl_coef, mask=b.mask,
    )  # fmt: skip
    b.assert_same_gradients(ours, theirs, TRAINED)
    if kl_coef:
        assert metrics["kl_ref"].item() == pytest.approx(b.kl("forward")[b.mask].mean().item(), rel=1e-5)


def test_oreo_begins_as_klq_with_whole_returns(tmp_path: Path) -> None:
    """Until the policy has moved the residuals are the same, so the gradients are: the module's identity."""
    b, config = batch(), OREOConfig(str(tmp_path), tau=0.3, kl_coef=0.0, use_cpu=True)
    kept, denom = experience(b, 0.3), torch.tensor(float(sum(LENGTHS)))
    states, inputs = b.states(), b.inputs()
    now = linear_logprobs(states.hidden, **states.head._asdict(), actions=inputs.actions, cu_seqlens=inputs.cu_seqlens)
    kept.targets = kept.targets._replace(old_logprobs=now.logprobs.detach())
    of_klq = tiny.arguments(tmp_path, tau=0.3, lam=1.0)
    ours, theirs = oreo(states, inputs, kept, denom, config)[0], klq(states, inputs, kept, denom, of_klq)[0]
    tensors = [b.packed[name] for name in TRAINED]
    for mine, its in zip(torch.autograd.grad(ours, tensors), torch.autograd.grad(theirs, tensors), strict=True):
        torch.testing.assert_close(mine, its, rtol=1e-4, atol=1e-6)


def test_tbrm_is_the_oracles(tmp_path: Path) -> None:
    b, config = batch(), TBRMConfig(str(tmp_path), tau=0.3, use_cpu=True)
    denom = torch.tensor(float(sum(n > 0 for n in LENGTHS)))
    ours, _ = tbrm(b.states(), b.inputs(), experience(b, 0.3), denom, config)
    policy, ref = b.oracle(), b.oracle("ref_")
    theirs = reference.tbrm_loss(
        policy.logprobs, policy.logsumexp, ref.logprobs, b.padded["scores"], beta=0.3, mask=b.mask
    )
    b.assert_same_gradients(ours, theirs, ("hidden", "weight", "bias"))


def test_tbrm_vanishes_at_the_optimum() -> None:
    """With logits that solve the soft Bellman equation of a tree every sequence's residual is 0, whoever chose it."""
    g = torch.Generator().manual_seed(0)
    beta, actions = 0.3, 3
    base = torch.randn(1 + actions, actions, generator=g, dtype=torch.float64).log_softmax(
        -1
    )  # root, then its children
    reward = torch.randn(actions, actions, generator=g, dtype=torch.float64)
    last = reward / beta + base[1:]  # Q / beta of the last step: its logits
    first = base[0] + last.logsumexp(-1)
    for a in range(actions):
        for b in range(actions):
            logits = torch.stack([first, last[a]])
            taken, ref = torch.tensor([a, b]), torch.stack([base[0, a], base[1 + a, b]])
            logp = logits.log_softmax(-1).gather(-1, taken[:, None]).squeeze(-1)
            loss = reference.tbrm_loss(logp[None], logits.logsumexp(-1)[None], ref[None], reward[a, b][None], beta=beta)
            assert loss.item() == pytest.approx(0, abs=1e-20)


PAIRS = (7, 2, 1, 12, 3, 5)  # three chosen, three rejected


@pytest.mark.parametrize("loss", ["dpo", "tdpo1", "tdpo2"])
def test_preferences_are_the_oracles(loss: str, tmp_path: Path) -> None:
    b, config = batch(PAIRS), DPOConfig(str(tmp_path), loss=loss, beta=0.2, tdpo_alpha=0.4, use_cpu=True)
    losses, said = pair_losses(b.states(), b.inputs(), b.reference(), config)
    ratios = reference.sequence_sums(b.oracle().logprobs - b.oracle("ref_").logprobs, mask=b.mask)
    kl = reference.sequence_sums(b.kl("reverse"), mask=b.mask)
    if loss == "dpo":
        expected = reference.dpo_loss(ratios[:3], ratios[3:], beta=0.2)
    else:
        alpha = None if loss == "tdpo1" else 0.4
        expected = reference.tdpo_loss(ratios[:3], ratios[3:], kl[:3], kl[3:], beta=0.2, alpha=alpha)
    torch.testing.assert_close(losses.double(), expected, rtol=2e-5, atol=1e-6)
    weights = torch.tensor([0.2, 1.0, 3.0])
    b.assert_same_gradients((losses * weights).sum(), (expected * weights).sum(), ("hidden", "weight", "bias"))
    margins = 0.2 * (ratios[:3] - ratios[3:])
    torch.testing.assert_close(said["rewards/margins"].double(), margins.detach(), rtol=1e-4, atol=1e-5)
    assert said["rewards/accuracies"].tolist() == (margins > 0).float().tolist()


def test_stopped_gradients_of_the_oracle() -> None:
    """TDPO2 holds the chosen divergence, and OREO's actor the later log-ratios: told apart from losses that do not."""
    kl = [torch.tensor([x], dtype=torch.float64, requires_grad=True) for x in (1.5, 0.7)]
    ratios = torch.tensor([0.3], dtype=torch.float64), torch.tensor([0.1], dtype=torch.float64)
    chosen, rejected = torch.autograd.grad(reference.tdpo_loss(*ratios, *kl, alpha=0.5).sum(), kl, allow_unused=True)
    assert chosen is None
    sigmoid = torch.sigmoid(-torch.tensor(0.1 * 0.2 - 0.5 * 0.1 * (0.7 - 1.5))).item()
    assert rejected.item() == pytest.approx(0.05 * sigmoid)
    assert torch.autograd.grad(reference.tdpo_loss(*ratios, *kl).sum(), kl)[0].item() < 0
    logp = torch.zeros(1, 2, dtype=torch.float64, requires_grad=True)
    score = torch.ones(1, dtype=torch.float64)
    loss = reference.oreo_loss(logp, torch.zeros_like(logp), torch.zeros_like(logp), score, beta=0.5)
    (gradient,) = torch.autograd.grad(loss, logp)
    assert gradient.tolist() == [[-0.5, -0.5]]  # if the first token's residual pulled at the second, that had -1


def test_values_of_steps() -> None:
    scores = torch.tensor([[1.0, 3.0], [0.0, 1.0], [5.0, 5.0]], dtype=torch.float64)
    expected = reference.monte_carlo_values(scores, [0, 2, 5], 7)
    assert expected.tolist() == [2, 2, 0.5, 0.5, 0.5, 5, 5]
    assert torch.equal(spread(scores.mean(1), [0, 2, 5], 7), expected)
    assert spread(torch.zeros(0), [], 0).shape == (0,)
