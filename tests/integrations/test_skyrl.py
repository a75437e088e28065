"""klq in SkyRL's own registries, from its advantages over their scaling to its sum of losses."""

from __future__ import annotations

import sys
import typing
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

pytest.importorskip("skyrl", reason="SkyRL is not installed (make test-hosts runs these tests with it)")
if sys.version_info < (3, 12):  # pydantic refuses the TypedDict that SkyRL takes from typing there
    import typing_extensions

    typing.TypedDict = typing_extensions.TypedDict

import skyrl.backends.skyrl_train.utils.ppo_utils as utils

from klq_kernels import klq_targets
from klq_kernels.integrations.host import HostMismatch
from klq_kernels.integrations.skyrl import register_skyrl
from klq_kernels.reference import klq_residual_loss

B, T, TAU, LENGTH = 4, 10, 0.05, 16


@pytest.fixture(autouse=True)
def _registered() -> Iterator[None]:
    register_skyrl(mini_batch_sequences=B, tau=TAU)
    yield
    utils.PolicyLossRegistry.unregister("klq")
    utils.AdvantageEstimatorRegistry.unregister("klq")


def config(**changes: Any) -> Any:
    settings: dict[str, Any] = {
        "use_kl_in_reward": True, "kl_estimator_type": "k1", "kl_ctrl": SimpleNamespace(type="fixed"),
        "kl_loss_coef": TAU, "loss_reduction": "seq_mean_token_sum_norm", "advantage_batch_normalize": False,
        "max_seq_len": LENGTH, "off_policy_correction": None,
    }  # fmt: skip
    return SimpleNamespace(**(settings | changes))


def tensors() -> tuple[torch.Tensor, ...]:
    g = torch.Generator().manual_seed(0)
    mask = torch.ones(B, T)
    mask[1, 7:] = 0
    mask[2, 2:4] = 0
    return mask, *torch.randn(4, B, T, generator=g)


def estimated(settings: Any) -> tuple[torch.Tensor, torch.Tensor]:
    mask, old, ref, values, rewards = tensors()
    shaped = (rewards - TAU * (old - ref)) * mask  # as SkyRL's use_kl_in_reward does
    return utils.compute_advantages_and_returns(
        shaped, mask, np.array(list("aabb")), "klq", settings, values=values, gamma=0.99, lambd=0.9
    )


def test_the_estimator_gives_klqs_targets() -> None:
    mask, old, ref, values, rewards = tensors()
    want = klq_targets(old, ref, values, rewards, tau=TAU, gamma=0.99, lam=0.9, mask=mask.bool())
    advantages, returns = estimated(config())
    torch.testing.assert_close(advantages, want.advantages, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(returns, want.advantages + want.old_values, rtol=1e-5, atol=1e-5)


def test_scaled_advantages_give_the_loss_of_unscaled_ones() -> None:
    """Two micro-batches of SkyRL's scaled advantages sum up to the mean over sequences and length."""
    mask, old, *_ = tensors()
    advantages, _ = estimated(config())
    scaled = utils.apply_loss_reduction_to_advantages_minibatch(
        advantages, mask, "seq_mean_token_sum_norm", micro_batch_size=2, max_seq_len=LENGTH
    )
    ours, theirs = ((0.7 * old).clone().requires_grad_() for _ in range(2))
    loss = sum(
        utils.PolicyLossRegistry.get("klq")(ours[s], old[s], scaled[s], config=config(), loss_mask=mask[s])[0]
        for s in (slice(0, 2), slice(2, 4))
    )
    losses = klq_residual_loss(theirs - old, torch.zeros(B, T), advantages, tau=TAU)
    want = (losses * mask).sum() / (B * LENGTH)
    loss.backward()
    want.backward()
    torch.testing.assert_close(loss, want, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-5, atol=1e-7)


def test_off_policy_correction_weighs_the_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    mask, old, rollout, *_ = tensors()

    def halved(
        loss: torch.Tensor,
        old_log_probs: torch.Tensor,
        rollout_logprobs: torch.Tensor,
        loss_mask: torch.Tensor,
        off_policy_correction: Any,
    ) -> Any:
        return 0.5 * loss, loss_mask * (torch.arange(T) < 5), {"is_ratio": 0.5}

    monkeypatch.setattr(utils, "apply_off_policy_correction", halved)
    register_skyrl(mini_batch_sequences=B, tau=TAU)
    loss, metrics = utils.PolicyLossRegistry.get("klq")(old + 1, old, old, config(), mask, rollout)
    losses = klq_residual_loss(torch.ones(B, T), torch.zeros(B, T), old * B * LENGTH, tau=TAU)
    torch.testing.assert_close(loss, 0.5 * (losses * mask)[:, :5].sum() / (B * LENGTH))
    assert metrics["is_ratio"] == 0.5
    assert "klq_residual_rms" in metrics


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"loss_reduction": "token_mean"}, "loss_reduction: must be 'seq_mean_token_sum_norm'"),
        ({"advantage_batch_normalize": True}, "must be False"),
        ({"max_seq_len": None}, "max_seq_len: must be set"),
        ({"use_kl_in_reward": False}, "use_kl_in_reward=True"),
        ({"kl_estimator_type": "k3"}, "got 'k3'"),
        ({"kl_loss_coef": 0.001}, "must be tau"),
    ],
)
def test_settings_that_klq_cannot_be_trained_with_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        estimated(config(**changes))


def test_they_travel_to_skyrls_workers() -> None:
    import cloudpickle

    mask, old, *_ = tensors()
    here = utils.PolicyLossRegistry.get("klq")
    there = cloudpickle.loads(cloudpickle.dumps(here))
    assert there(old + 1, old, old, config(), mask)[0] == here(old + 1, old, old, config(), mask)[0]


def test_bad_sizes_and_another_skyrl_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match="mini_batch_sequences"):
        register_skyrl(mini_batch_sequences=0)
    monkeypatch.setattr(utils, "ppo_policy_loss", lambda log_probs: log_probs)
    with pytest.raises(HostMismatch, match=r"takes \(log_probs\), not \(log_probs, old"):
        register_skyrl(mini_batch_sequences=B)
