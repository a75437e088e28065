"""Hosts that are not installed here, by the calls on record for them: slime, prime-rl, NeMo-RL.

Each fixture makes such a call as the host would, with its names and shapes.
"""

from __future__ import annotations

import enum
import importlib
import inspect
import sys
from dataclasses import dataclass
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from klq_kernels import klq_targets
from klq_kernels.integrations import host, nemo_rl, objective, prime_rl, slime
from klq_kernels.reference import klq_residual_loss

TAU, VOCAB = 0.05, 31
TOTAL, RESPONSE = [9, 6, 12], [5, 4, 7]


def lists(*names: str) -> dict[str, list[Tensor]]:
    """One tensor [R] a sample, as slime has them."""
    g = torch.Generator().manual_seed(0)
    return {name: [torch.randn(n, generator=g) for n in RESPONSE] for name in names}


def rollout() -> dict[str, Any]:
    data: dict[str, Any] = lists("log_probs", "ref_log_probs", "values")
    data["loss_masks"] = [torch.ones(n).int() for n in RESPONSE]
    data["loss_masks"][2][2:4] = 0
    return data | {"rewards": [1.0, -0.5, 0.25], "response_lengths": RESPONSE, "total_lengths": TOTAL}


def arguments(**changes: Any) -> SimpleNamespace:
    settings = {"gamma": 0.99, "lambd": 0.9, "use_rollout_logprobs": False, "rollout_temperature": 0.8}
    return SimpleNamespace(**(settings | changes))


def test_settings_out_of_range_are_refused_before_the_host_begins() -> None:
    for name, value in (("tau", -1.0), ("alpha", 2.0), ("loss_type", "x")):
        with pytest.raises(ValueError, match=f"^{name}: "):
            slime.klq_functions(**{name: value})  # type: ignore[arg-type]


def test_slimes_advantages_are_klqs_targets_sample_by_sample() -> None:
    data = rollout()
    advantages, _ = slime.klq_functions(tau=TAU)
    assert advantages(arguments(), data) is None
    for i, n in enumerate(RESPONSE):
        want = klq_targets(
            *(data[key][i][None] for key in ("log_probs", "ref_log_probs", "values")),
            torch.tensor([data["rewards"][i]]), tau=TAU, gamma=0.99, lam=0.9, mask=data["loss_masks"][i][None].bool(),
        )  # fmt: skip
        assert data["advantages"][i].shape == (n,)
        torch.testing.assert_close(data["advantages"][i], want.advantages[0])
        torch.testing.assert_close(data["returns"][i], (want.advantages + want.old_values)[0])


@pytest.mark.parametrize("with_parallel_state", [False, True])
def test_slimes_loss_is_its_mean_of_klqs_residual(with_parallel_state: bool) -> None:
    g = torch.Generator().manual_seed(1)
    batch = rollout() | lists("advantages")
    batch["unconcat_tokens"] = [torch.randint(VOCAB, (n,), generator=g) for n in TOTAL]
    logits = torch.randn(1, sum(TOTAL), VOCAB, generator=g, requires_grad=True)

    def sum_of_sample_mean(values: Tensor) -> Tensor:
        pairs = zip(values.split(RESPONSE), batch["loss_masks"], strict=True)
        return torch.stack([(v * m).sum() / m.sum() for v, m in pairs]).sum()

    state = (object(),) if with_parallel_state else ()
    _, loss_function = slime.klq_functions(tau=TAU)
    loss, metrics = loss_function(arguments(), *state, batch, logits, sum_of_sample_mean)
    (ours,) = torch.autograd.grad(loss, logits)
    # the oracle: whole log-softmax, the sample's slice of it
    table = torch.log_softmax(logits[0].double() / 0.8, -1)
    per_token: list[Tensor] = []
    begin = 0
    for i, (total, response) in enumerate(zip(TOTAL, RESPONSE, strict=True)):
        tokens = batch["unconcat_tokens"][i]
        per_token += [table[begin + t - 1, tokens[t]] for t in range(total - response, total)]
        begin += total
    change = torch.stack(per_token) - torch.cat(batch["log_probs"])
    losses = klq_residual_loss(change, torch.zeros_like(change), torch.cat(batch["advantages"]).double(), tau=TAU)
    want = sum_of_sample_mean(losses)
    (theirs,) = torch.autograd.grad(want, logits)
    torch.testing.assert_close(loss.double(), want, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-6)
    assert metrics["loss"] == loss
    assert all(not value.requires_grad for value in metrics.values())


def test_slime_with_split_sequences_or_without_a_critic_is_refused() -> None:
    advantages, loss = slime.klq_functions()
    with pytest.raises(ValueError, match="context_parallel_size: must be 1"):
        advantages(arguments(context_parallel_size=2), rollout())
    with pytest.raises(ValueError, match="values: KLQ needs it"):
        advantages(arguments(), rollout() | {"values": None})
    with pytest.raises(ValueError, match="tensor_model_parallel_size: must be 1"):
        loss(arguments(tensor_model_parallel_size=4), {}, torch.zeros(1), sum)
    with pytest.raises(ValueError, match="4 or 5 arguments"):
        loss(arguments(), {})


@pytest.mark.parametrize("name", ["normalize_advantages", "use_opd"])
def test_slimes_settings_that_change_advantages_afterwards_are_refused(name: str) -> None:
    advantages, _ = slime.klq_functions()
    with pytest.raises(ValueError, match=f"{name}: must be off"):
        advantages(arguments(**{name: True}), rollout())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"qkv_format": "bshd"}, "qkv_format: must be thd"),
        ({"use_tis": True}, "use_tis: must be off"),
        ({"use_opsm": True}, "use_opsm: must be off"),
        ({"entropy_coef": 0.01}, "entropy_coef: must be off"),
        ({"use_kl_loss": True, "kl_loss_coef": 0.1}, "kl_loss_coef: must be off"),
    ],
)
def test_slimes_settings_that_the_loss_has_no_part_for_are_refused(changes: dict[str, Any], message: str) -> None:
    _, loss = slime.klq_functions()
    with pytest.raises(ValueError, match=message):
        loss(arguments(**changes), {}, torch.zeros(1), sum)


@dataclass
class LossInputs:
    trainer_logprobs: Tensor
    inference_logprobs: Tensor
    ref_logprobs: Tensor | None
    advantages: Tensor
    loss_mask: Tensor
    loss_weights: Tensor | None = None


@dataclass
class LossOutputs:
    loss: Tensor
    metrics: dict[str, Tensor]


def stub(monkeypatch: pytest.MonkeyPatch, name: str, **contents: Any) -> None:
    """A module of a host, with the packages it lies in."""
    parts = name.split(".")
    for i in range(1, len(parts) + 1):
        module = ModuleType(".".join(parts[:i]))
        module.__path__ = []  # type: ignore[attr-defined]
        monkeypatch.setitem(sys.modules, module.__name__, module)
        if i > 1:
            setattr(sys.modules[".".join(parts[: i - 1])], parts[i - 1], module)
    vars(sys.modules[name]).update(contents)


@pytest.mark.parametrize("optional", [False, True])
def test_prime_rls_loss_is_a_sum_under_its_mask(optional: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    stub(monkeypatch, "prime_rl.trainer.rl.loss", LossOutputs=LossOutputs)
    g = torch.Generator().manual_seed(0)
    logprobs, old, ref, advantages = torch.randn(4, 14, generator=g)
    logprobs.requires_grad_()
    mask = torch.rand(14, generator=g) < 0.6
    weights = torch.rand(14, generator=g) if optional else None
    module, _, name = "klq_kernels.integrations.prime_rl.klq_loss_function".rpartition(".")
    function = getattr(importlib.import_module(module), name)
    inputs = LossInputs(
        logprobs, old, ref if optional else None, advantages.masked_fill(~mask, float("nan")), mask, weights
    )
    out = function(inputs, tau=TAU)
    losses = klq_residual_loss(logprobs - old, torch.zeros(14), advantages, tau=TAU) * (
        1 if weights is None else weights
    )
    torch.testing.assert_close(out.loss, losses[mask].sum())
    assert out.loss.dim() == 0
    assert out.loss.requires_grad
    assert all(value.dim() == 0 and not value.requires_grad for value in out.metrics.values())
    assert any("ref" in key for key in out.metrics) == optional
    with pytest.raises(TypeError, match="beta"):
        function(inputs, beta=1.0)


class LossType(enum.Enum):
    TOKEN_LEVEL = "token_level"


class LossInputType(enum.Enum):
    LOGPROB = "logprob"


class MetricNormalizer(enum.Enum):
    NONE = "none"


def test_nemo_rls_loss_keeps_its_protocol(monkeypatch: pytest.MonkeyPatch) -> None:
    stub(
        monkeypatch, "nemo_rl.algorithms.loss.interfaces", LossType=LossType, LossInputType=LossInputType,
        MetricNormalizer=MetricNormalizer,
    )  # fmt: skip
    loss_fn = nemo_rl.klq_loss_fn(tau=TAU)
    assert loss_fn.loss_type is LossType.TOKEN_LEVEL
    assert loss_fn.input_type is LossInputType.LOGPROB
    parameters = inspect.signature(loss_fn).parameters
    assert tuple(parameters) == ("data", "global_valid_seqs", "global_valid_toks", "kwargs")
    g = torch.Generator().manual_seed(0)
    previous, advantages = torch.randn(2, 3, 10, generator=g)
    logprobs = torch.randn(3, 9, generator=g, requires_grad=True)
    data = {
        "token_mask": (torch.rand(3, 10, generator=g) < 0.7).int(), "sample_mask": torch.tensor([1, 0, 1]),
        "prev_logprobs": previous, "advantages": advantages,
    }  # fmt: skip
    loss, metrics = loss_fn(data, torch.tensor(5), torch.tensor(40.0), next_token_logprobs=logprobs)
    mask = data["token_mask"][:, 1:] * data["sample_mask"][:, None]
    losses = klq_residual_loss(logprobs - previous[:, 1:], torch.zeros(3, 9), advantages[:, 1:], tau=TAU)
    torch.testing.assert_close(loss, (losses * mask).sum() / 40)
    assert metrics["num_valid_samples"] == 2
    assert loss_fn.metric_normalizations["klq_residual_rms"] is MetricNormalizer.NONE


def test_without_the_host_it_is_an_import_error() -> None:
    from klq_kernels.integrations import skyrl, trl, verl

    calls = {
        "trl": trl.patch_trl, "verl": verl.register_verl, "nemo_rl": nemo_rl.klq_loss_fn,
        "skyrl": lambda: skyrl.register_skyrl(mini_batch_sequences=1),
        "prime_rl": lambda: prime_rl.klq_loss_function(None),
    }  # fmt: skip
    for package, call in calls.items():
        if importlib.util.find_spec(package) is None:
            with pytest.raises(ImportError, match=package):
                call()


def test_a_weight_is_the_derivative_of_the_hosts_aggregate() -> None:
    mask = torch.tensor([[1.0, 1, 0], [1, 0, 0]])
    weights = objective.weights_of(lambda x: (x * mask).sum(-1).div(mask.sum(-1)).mean(), mask)
    torch.testing.assert_close(weights, mask / mask.sum(-1, keepdim=True) / 2)


def test_a_patch_is_put_back_in_reverse_order() -> None:
    owner = SimpleNamespace(a=1)
    patch = host.Patch([(owner, "a", 2), (owner, "a", 3)])
    assert owner.a == 3
    patch.undo()
    assert owner.a == 1
    assert not patch.active
