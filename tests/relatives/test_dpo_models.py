"""DPO and TDPO on whole models: losses and gradients against the oracle, and that the layout of pairs is free."""

from __future__ import annotations

import copy
import math
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from torch import Tensor

from klq_kernels import reference as oracle
from klq_kernels.trainer import DPOConfig, DPOTrainer
from klq_kernels.trainer.actor_critic import held
from klq_kernels.trainer.batches import Sequence, collate
from klq_kernels.trainer.frozen import Policy
from klq_kernels.trainer.relatives.dpo import pair_losses

LOSSES = ("dpo", "tdpo1", "tdpo2")


def arguments(folder: Path, **changes: Any) -> DPOConfig:
    defaults: dict[str, Any] = {
        "per_device_train_batch_size": 8, "learning_rate": 1e-3, "lr_scheduler_type": "constant", "max_steps": 8,
        "logging_steps": 1, "save_strategy": "no", "use_cpu": True, "report_to": [], "disable_tqdm": True, "seed": 3,
    }  # fmt: skip
    return DPOConfig(str(folder), **(defaults | changes))


def pairs(number: int = 32) -> list[dict[str, str]]:
    """Even characters are preferred to odd ones, of different numbers."""
    texts = [row["prompt"] for row in tiny.prompts(number)]
    even, odd = "bdfhjlnp", "acegikmo"
    return [
        {"prompt": t, "chosen": even[i % 4 :][: 2 + i % 3], "rejected": odd[i % 3 :][: 2 + i % 5]}
        for i, t in enumerate(texts)
    ]


def trainer(folder: Path, given: dict[str, Any] | None = None, **changes: Any) -> DPOTrainer:
    defaults: dict[str, Any] = {"train_dataset": pairs(), "processing_class": tiny.tokenizer()}
    given = defaults | (given or {})
    return DPOTrainer(given.pop("model", None) or tiny.model(), args=arguments(folder, **changes), **given)


def logged(run: DPOTrainer, name: str) -> list[float]:
    return [logs[name] for logs in run.state.log_history if name in logs]


# ---- against the oracle --------------------------------------------------------------------------------------------


def ragged() -> list[Sequence]:
    """Three pairs of unequal lengths, the preferred first, with tokens inside that are not trained."""
    generator = torch.Generator().manual_seed(0)
    out = []
    for prompt, completion in ((2, 5), (1, 1), (4, 3), (2, 3), (1, 7), (4, 2)):
        ids = torch.randint(2, tiny.VOCAB, (prompt + completion,), generator=generator)
        trained = torch.rand(completion, generator=generator) < 0.7
        trained[0] = True
        out.append(Sequence(ids[:prompt], ids[prompt:], trained))
    return out


def stated(policy: Policy, frozen: Policy, sequences: list[Sequence], config: DPOConfig) -> Tensor:
    """The loss of each pair by ``reference``, one sequence after another, from whole logits in float64."""
    sums, divergences = [], []
    for sequence in sequences:
        both = []
        for model in (policy.model, frozen.model):
            logits = model(input_ids=sequence.ids.unsqueeze(0)).logits[0, len(sequence.prompt) - 1 : -1].double()
            both.append(logits[sequence.trained])
        identity = torch.eye(both[0].shape[1], dtype=torch.float64)
        actions = sequence.completion[sequence.trained]
        logp, ref = (oracle.linear_logprobs(logits, identity, actions).logprobs for logits in both)
        kl = oracle.linear_kl(both[0], identity, both[1], identity, direction="reverse")
        whole = torch.tensor([0, len(actions)])
        sums.append(oracle.sequence_sums(logp - ref, cu_seqlens=whole))
        divergences.append(oracle.sequence_sums(kl, cu_seqlens=whole))
    chosen, rejected = torch.cat(sums).chunk(2)
    if config.loss == "dpo":
        return oracle.dpo_loss(chosen, rejected, beta=config.beta)
    alpha = None if config.loss == "tdpo1" else config.tdpo_alpha
    return oracle.tdpo_loss(chosen, rejected, *torch.cat(divergences).chunk(2), beta=config.beta, alpha=alpha)


@pytest.mark.parametrize("padding_free", [False, True], ids=["padded", "concatenated"])
@pytest.mark.parametrize("loss", LOSSES)
def test_losses_and_gradients_are_those_of_the_oracle(tmp_path: Path, loss: str, padding_free: bool) -> None:
    config = arguments(tmp_path, loss=loss, beta=0.3, tdpo_alpha=0.7)
    policy, frozen = (Policy(tiny.model(seed=seed)) for seed in (0, 1))
    batch = collate(ragged(), pad_id=tiny.PAD, padding_free=padding_free)
    with torch.no_grad():
        states = frozen(batch, held)
    losses, _ = policy(batch, partial(pair_losses, inputs=batch, reference=states, config=config))
    losses.mean().backward()

    exact = copy.deepcopy(policy).double()
    exact.zero_grad()
    expected = stated(exact, copy.deepcopy(frozen).double(), ragged(), config)
    expected.mean().backward()
    torch.testing.assert_close(losses.double(), expected, rtol=1e-4, atol=1e-5)
    for (name, ours), theirs in zip(policy.named_parameters(), exact.parameters(), strict=True):
        assert ours.grad is not None
        error = (ours.grad.double() - theirs.grad).norm()
        assert error <= 2e-4 * theirs.grad.norm(), name


def test_the_oracle_states_the_papers_equations() -> None:
    chosen, rejected, chosen_kl, rejected_kl = (
        torch.tensor([x], dtype=torch.float64, requires_grad=True) for x in (2.0, -1.0, 0.5, 3.0)
    )
    assert oracle.dpo_loss(chosen, rejected, beta=0.5).item() == pytest.approx(math.log1p(math.exp(-1.5)))
    first = oracle.tdpo_loss(chosen, rejected, chosen_kl, rejected_kl, beta=0.5)
    assert first.item() == pytest.approx(math.log1p(math.exp(-1.5 + 0.5 * 2.5)))
    second = oracle.tdpo_loss(chosen, rejected, chosen_kl, rejected_kl, beta=0.5, alpha=0.2)
    assert second.item() == pytest.approx(math.log1p(math.exp(-1.5 + 0.2 * 0.5 * 2.5)))
    assert torch.autograd.grad(second, chosen_kl, retain_graph=True, allow_unused=True) == (None,)
    assert torch.autograd.grad(second, rejected_kl)[0].item() > 0
    assert torch.autograd.grad(first, chosen_kl)[0].item() < 0


def test_a_run_does_not_depend_on_how_its_pairs_are_laid_out(tmp_path: Path) -> None:
    """Padded or concatenated, in one micro-batch or in two, with the reference on the host between uses."""
    found = []
    for changes in (
        {},
        {"padding_free": True},
        {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 2},
    ):
        run = trainer(tmp_path, loss="tdpo2", max_steps=3, **changes)
        run.train()
        found.append(logged(run, "loss"))
    for losses in found[1:]:
        assert losses == pytest.approx(found[0], rel=1e-4)
