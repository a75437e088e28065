"""Adapters: the trained policy is the model with them, and the reference the model as it was given."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import peft
import pytest
import tiny
import torch
from torch import nn

from klq_kernels import linear_logprobs
from klq_kernels.trainer.models import LanguageModel
from klq_kernels.trainer.probe import perturbed, prove_head

LORA: dict[str, Any] = {"r": 2, "task_type": "CAUSAL_LM"}


def untied() -> Any:
    return tiny.model(tie_word_embeddings=False)


def construct(folder: Path, settings: Any, **changes: Any) -> Any:
    return tiny.trainer(folder, {"model": changes.pop("model", None) or untied(), "peft_config": settings, **changes})


@pytest.mark.parametrize("kind", ["pissa", "olora"])
def test_an_initialisation_that_changes_the_base_is_refused(kind: str, tmp_path: Path) -> None:
    settings = peft.LoraConfig(**LORA, target_modules=["q_proj"], init_lora_weights=kind)
    with pytest.raises(ValueError, match=r"^peft_config: changes the base model"):
        construct(tmp_path, settings)
    with pytest.raises(ValueError, match=rf"^model: adapter 'default' was initialised by {kind}"):
        construct(tmp_path, None, model=peft.get_peft_model(untied(), settings))
    construct(tmp_path, settings, ref_model=untied())


@pytest.mark.parametrize(
    "kind",
    [
        peft.LoHaConfig(r=2, target_modules=["lm_head"], task_type="CAUSAL_LM"),
        peft.LoKrConfig(r=2, target_modules=["lm_head"], task_type="CAUSAL_LM"),
        peft.VeraConfig(r=2, target_modules=["lm_head"], task_type="CAUSAL_LM"),
        peft.OFTConfig(oft_block_size=4, r=0, target_modules=["lm_head"], task_type="CAUSAL_LM"),
        peft.IA3Config(target_modules=["lm_head"], feedforward_modules=[], task_type="CAUSAL_LM"),
        peft.LoraConfig(**LORA, target_modules=["lm_head"], use_dora=True),
        peft.LoraConfig(**LORA, target_modules=["lm_head"], lora_bias=True),
    ],
    ids=lambda settings: type(settings).__name__,
)
def test_an_adapter_on_the_head_is_right_or_refused(kind: Any, tmp_path: Path) -> None:
    policy = error = None
    try:
        policy = construct(tmp_path, kind).policy
    except ValueError as refusal:
        error = str(refusal)
    if policy is None:
        assert re.match(r"peft_config: .*lm_head", str(error))
        return
    language_model = LanguageModel(policy)
    with perturbed(language_model.model):
        prove_head(language_model)


def test_the_bias_of_an_adapter_on_the_head_is_trained(tmp_path: Path) -> None:
    settings = peft.LoraConfig(**LORA, target_modules=["lm_head"], lora_bias=True)
    policy = construct(tmp_path, settings).policy
    language_model = LanguageModel(policy)
    hidden, ends = torch.randn(3, 32), torch.tensor([0, 3], dtype=torch.int32)
    linear_logprobs(
        hidden, **language_model.head()._asdict(), actions=torch.arange(3), cu_seqlens=ends
    ).logprobs.sum().backward()
    gradients = {name: p.grad for name, p in policy.named_parameters() if "lora_B" in name and "bias" in name}
    assert gradients
    assert all(g is not None and g.abs().sum() > 0 for g in gradients.values())


def test_dropout_of_an_adapter_on_the_head_is_off_or_refused(tmp_path: Path) -> None:
    settings = peft.LoraConfig(**LORA, target_modules=["lm_head"], lora_dropout=0.5)
    policy = construct(tmp_path, settings).policy
    assert all(part.p == 0 for part in policy.modules() if isinstance(part, nn.Dropout))
    with pytest.raises(ValueError, match=r"^disable_dropout: .*lm_head"):
        tiny.trainer(tmp_path, {"model": untied(), "peft_config": settings}, disable_dropout=False)


def test_a_probe_leaves_no_trace() -> None:
    model = peft.get_peft_model(untied(), peft.LoraConfig(**LORA, target_modules=["q_proj", "lm_head"]))
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    numbers = torch.random.get_rng_state()
    with perturbed(model):
        prove_head(LanguageModel(model))
        assert any(not torch.equal(p, before[name]) for name, p in model.named_parameters())
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())
    assert torch.equal(torch.random.get_rng_state(), numbers)


def test_settings_that_are_no_adapters_of_weights_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"^peft_config: must be a PEFT configuration"):
        construct(tmp_path, {"r": 2})
    prompts = peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2)
    with pytest.raises(ValueError, match=r"^peft_config: .*learns a prompt"):
        construct(tmp_path, prompts)


def test_models_that_do_not_fit_the_policy_are_refused(tmp_path: Path) -> None:
    small = tiny.model(vocab_size=100)
    with pytest.raises(ValueError, match=r"^ref_model: has 100 tokens"):
        construct(tmp_path, None, ref_model=small)
    with pytest.raises(ValueError, match=r"^value_model: has 100 tokens"):
        construct(tmp_path, None, value_model=tiny.classifier(vocab_size=100))
    with pytest.raises(ValueError, match=r"^value_model: must be a transformers model"):
        construct(tmp_path, None, value_model=nn.Linear(32, 1))


# ---- the weights for an engine ---------------------------------------------------------------------------------------

EXPORTS: dict[str, dict[str, Any]] = {
    "LoRA": {"target_modules": ["q_proj", "down_proj"]},
    "LoRA on head and embeddings": {"target_modules": ["q_proj", "lm_head", "embed_tokens"]},
    "DoRA": {"target_modules": ["v_proj"], "use_dora": True},
    "a saved layer": {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]},
}


def test_no_weight_is_left_out_however_memory_is_reused() -> None:
    """Merged copies are freed one after the other, so that later ones lie where earlier ones did."""
    base = tiny.model(num_hidden_layers=24, tie_word_embeddings=False)
    names = [name for name, _ in base.named_parameters()]
    lora = {"target_modules": ["q_proj", "k_proj", "v_proj", "o_proj", "up_proj", "down_proj"]}
    model = peft.get_peft_model(base, peft.LoraConfig(r=2, task_type="CAUSAL_LM", **lora))
    assert [name for name, _ in LanguageModel(model).weights()] == names


@pytest.mark.parametrize("kind", EXPORTS)
def test_weights_for_an_engine_are_those_of_the_merged_model(kind: str) -> None:
    model = peft.get_peft_model(untied(), peft.LoraConfig(r=2, task_type="CAUSAL_LM", **EXPORTS[kind]))
    torch.manual_seed(0)
    for parameter in model.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    engine = untied()
    exported = dict(LanguageModel(model).weights())
    assert exported.keys() == dict(engine.named_parameters()).keys()
    engine.load_state_dict(exported)
    ids = torch.tensor([[5, 6, 7, 8]])
    torch.testing.assert_close(engine(ids).logits, model(ids).logits)
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[name]), name


def test_what_is_frozen_stays_frozen_after_the_reference_was_read() -> None:
    policy = peft.get_peft_model(tiny.model(), peft.LoraConfig(**LORA, target_modules=["q_proj"]))
    for name, parameter in policy.named_parameters():
        if "lora_A" in name:
            parameter.requires_grad_(False)
    before = {name: p.requires_grad for name, p in policy.named_parameters()}
    with pytest.raises(KeyError), LanguageModel(policy).without_adapters():
        raise KeyError
    with LanguageModel(policy).without_adapters():
        pass
    assert {name: p.requires_grad for name, p in policy.named_parameters()} == before
    assert any(before.values())


def test_weights_for_an_engine_without_adapters(tmp_path: Path) -> None:
    """A shared weight comes once, under the name that ``named_parameters`` gives it."""
    trainer = tiny.trainer(tmp_path)
    exported = dict(trainer.policy_weights())
    assert exported.keys() == dict(trainer.policy.named_parameters()).keys()
    assert all(torch.equal(exported[name], p) for name, p in trainer.policy.named_parameters())
    assert not any(tensor.requires_grad for tensor in exported.values())
