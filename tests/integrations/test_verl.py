"""klq in verl's own registries: its trainer's compute_advantage and its policy-loss call, against the reference."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

pytest.importorskip("verl", reason="verl is not installed (make test-hosts runs these tests with it)")

import verl.trainer.ppo.core_algos as core
from omegaconf import OmegaConf
from verl.protocol import DataProto
from verl.trainer.config import AlgoConfig, KLControlConfig
from verl.trainer.ppo.ray_trainer import apply_kl_penalty, compute_advantage
from verl.workers.config import ActorConfig

from klq_kernels import klq_targets
from klq_kernels.integrations.host import HostMismatch
from klq_kernels.integrations.verl import register_verl
from klq_kernels.reference import klq_residual_loss

B, T, TAU = 4, 12, 0.05
MODES = ("token-mean", "token-sum", "seq-mean-token-sum", "seq-mean-token-sum-norm", "seq-mean-token-mean")


@pytest.fixture(autouse=True)
def _registered(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(core, "POLICY_LOSS_REGISTRY", dict(core.POLICY_LOSS_REGISTRY))
    monkeypatch.setattr(core, "ADV_ESTIMATOR_REGISTRY", dict(core.ADV_ESTIMATOR_REGISTRY))
    register_verl(tau=TAU)


def batch() -> dict[str, Tensor]:
    g = torch.Generator().manual_seed(0)
    mask = torch.ones(B, T).long()
    mask[1, 8:] = 0
    mask[3, 5:] = 0
    mask[0, 3:6] = 0  # the answer of a tool
    names = ("token_level_scores", "values", "old_log_probs", "ref_log_prob")
    found = dict(zip(names, torch.randn(4, B, T, generator=g), strict=True))
    found["token_level_scores"] *= mask
    return found | {"response_mask": mask}


def algorithm(**changes: Any) -> Any:
    settings = {
        "gamma": 0.99, "lam": 0.9, "use_kl_in_reward": True, "kl_penalty": "kl",
        "kl_ctrl": {"type": "fixed", "kl_coef": TAU},
    }  # fmt: skip
    return OmegaConf.merge(OmegaConf.create(settings), OmegaConf.create(changes))


def advantages(config: Any, name: str = "gdpo", **changes: Tensor) -> DataProto:
    data = DataProto.from_dict(
        tensors=batch() | changes, non_tensors={"uid": np.array(list("aabb"), dtype=object)}
    )  # fmt: skip
    data, _ = apply_kl_penalty(data, core.get_kl_controller(config.kl_ctrl), config.kl_penalty)
    return compute_advantage(data, name, gamma=config.gamma, lam=config.lam, config=config)


@pytest.mark.parametrize("dataclass", [False, True])
def test_the_estimator_gives_klqs_targets(dataclass: bool) -> None:
    """verl takes tau times the log-ratio off the rewards; the whole is what klq_targets does."""
    config = algorithm()
    if dataclass:
        config = AlgoConfig(**{**config, "kl_ctrl": KLControlConfig(**config.kl_ctrl)})
    b = batch()
    want = klq_targets(
        b["old_log_probs"], b["ref_log_prob"], b["values"], b["token_level_scores"],
        tau=TAU, gamma=0.99, lam=0.9, mask=b["response_mask"].bool(),
    )  # fmt: skip
    found = advantages(config).batch
    torch.testing.assert_close(found["advantages"], want.advantages, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(found["returns"], want.advantages + want.old_values, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"use_kl_in_reward": False}, "use_kl_in_reward=True"),
        ({"kl_penalty": "low_var_kl"}, "got 'low_var_kl'"),
        ({"kl_ctrl": {"kl_coef": 0.1}}, "must be tau, 0.05; got 0.1"),
        ({"kl_ctrl": {"type": "adaptive", "horizon": 10, "target_kl": 1.0}}, "kl_ctrl.type=fixed"),
    ],
)
def test_other_rewards_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        advantages(algorithm(**changes))


def test_without_values_it_says_where_they_are_to_be_had() -> None:
    with pytest.raises(ValueError, match="adv_estimator=gdpo"):
        advantages(algorithm(), "klq")


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("batch_info", [{}, {"dp_size": 2, "batch_num_tokens": 70, "global_batch_size": 8}])
@pytest.mark.parametrize("rollout_weights", [False, True])
def test_the_loss_is_verls_aggregate_of_klqs_residual(
    mode: str, batch_info: dict[str, Any], rollout_weights: bool
) -> None:
    b = batch()
    g = torch.Generator().manual_seed(1)
    ours, theirs = ((b["old_log_probs"] + 3.0).clone().requires_grad_() for _ in range(2))
    advantage = torch.randn(B, T, generator=g)
    weights = torch.rand(B, T, generator=g) if rollout_weights else None
    config = ActorConfig(strategy="fsdp2", rollout_n=1, ppo_micro_batch_size_per_gpu=1, global_batch_info=batch_info)
    mask = b["response_mask"].bool()
    loss, metrics = core.get_policy_loss_fn("klq")(
        old_log_prob=b["old_log_probs"], log_prob=ours, advantages=advantage.masked_fill(~mask, float("nan")),
        response_mask=mask, loss_agg_mode=mode, config=config, rollout_is_weights=weights,
    )  # fmt: skip
    losses = klq_residual_loss(theirs - b["old_log_probs"], torch.zeros(B, T), advantage, tau=TAU)
    want = core.agg_loss(losses * (1 if weights is None else weights), mask, mode, **batch_info)
    loss.backward()
    want.backward()
    torch.testing.assert_close(loss, want, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-5, atol=1e-7)
    assert all(isinstance(v, float) for v in metrics.values())
    assert "actor/klq_residual_rms" in metrics


def test_options_are_those_of_klq_loss() -> None:
    register_verl(tau=0.2, loss_type="huber", huber_delta=0.1)
    b = batch()
    config = OmegaConf.create({"global_batch_info": {}})
    mask = b["response_mask"].bool()
    loss, _ = core.get_policy_loss_fn("klq")(b["old_log_probs"], b["ref_log_prob"], b["values"], mask, config=config)
    losses = klq_residual_loss(
        b["ref_log_prob"] - b["old_log_probs"], torch.zeros(B, T), b["values"], tau=0.2, loss_type="huber",
        huber_delta=0.1,
    )  # fmt: skip
    torch.testing.assert_close(loss, losses[mask].mean())


def test_another_verl_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(core, "agg_loss", lambda loss, mask: loss)
    core.POLICY_LOSS_REGISTRY.clear()
    with pytest.raises(HostMismatch, match=r"takes \(loss, mask\), not \(loss_mat"):
        register_verl()
    assert not core.POLICY_LOSS_REGISTRY
