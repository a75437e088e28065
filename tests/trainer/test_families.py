"""Architectures as transformers builds them: each is run right, or refused by name. No list of families decides."""

from __future__ import annotations

import re
from typing import Any

import families
import pytest
import torch
import transformers
from torch import nn

from klq_kernels import linear_logprobs
from klq_kernels.trainer.batches import Sequence, collate
from klq_kernels.trainer.models import LanguageModel
from klq_kernels.trainer.probe import (
    keeps_sequences_apart,
    prove_causal,
    prove_head,
    prove_padding,
    prove_sampling,
    silence,
)

pytestmark = pytest.mark.usefixtures("one_thread")
# Padding on the left or the KV cache changes what they compute, or they read tokens that come later.
SAMPLE_OTHERWISE = ("bert-generation", "moshi", "rwkv", "trocr", "xlm")
FAMILIES = [name for name in families.FAMILIES if families.known(name)]


def sequences() -> list[Sequence]:
    g = torch.Generator().manual_seed(0)
    return [
        Sequence(
            torch.randint(2, families.VOCAB, (p,), generator=g),
            torch.randint(2, families.VOCAB, (t,), generator=g),
            torch.ones(t, dtype=torch.bool),
        )
        for p, t in ((3, 5), (1, 4), (6, 2))
    ]


def plain_logprobs(model: nn.Module, sequence: Sequence) -> torch.Tensor:
    """Through the model's own logits, one sequence at a time."""
    logits = model(input_ids=sequence.ids.unsqueeze(0)).logits[0, :-1].double()
    return logits.log_softmax(-1).gather(-1, sequence.ids[1:, None]).squeeze(-1)[len(sequence.prompt) - 1 :]


def ours(model: LanguageModel, padding_free: bool) -> torch.Tensor:
    batch = collate(sequences(), pad_id=0, padding_free=padding_free)
    hidden = model.hidden_states(batch).index_select(0, batch.rows)
    head = model.head()._asdict()
    return linear_logprobs(hidden, **head, actions=batch.actions, cu_seqlens=batch.cu_seqlens).logprobs


def test_there_are_many() -> None:
    assert len(FAMILIES) >= 60


@pytest.mark.parametrize("family", FAMILIES)
def test_a_family_is_right_in_training_mode_or_refused_by_name(family: str) -> None:
    """With dropout in its config, under whatever names: log-probabilities in training mode are the model's own."""
    try:
        model = families.with_dropout(family, 0.3)
    except AttributeError as error:  # of transformers' own making, in its first versions with some families
        pytest.skip(f"transformers {transformers.__version__} cannot build it: {error}")
    language_model, why = prepared(model)
    assert language_model is None or family not in SAMPLE_OTHERWISE
    if language_model is None:
        assert family in SAMPLE_OTHERWISE or not re.search("samples by other|not causal", why)
        pytest.skip(f"refused: {why}")
    layouts = [False, True] if keeps_sequences_apart(language_model.backbone, language_model) else [False]
    with torch.no_grad():
        expected = torch.cat([plain_logprobs(model.eval(), s) for s in sequences()])
        model.train()
        for padding_free in layouts:
            torch.testing.assert_close(ours(language_model, padding_free).double(), expected, rtol=0, atol=5e-3)


def prepared(model: nn.Module) -> tuple[LanguageModel | None, str]:
    """The model as ``KLQTrainer`` holds it after construction; None where it is refused, and why."""
    try:
        language_model = LanguageModel(model)
        prove_head(language_model)
        prove_padding("model", language_model.backbone, language_model)
        prove_causal("model", language_model.backbone, language_model)
        silence(model, {"model": language_model.backbone}, language_model)
        prove_sampling(language_model)
    except ValueError as error:
        if not str(error).startswith("model:"):
            raise
        return None, str(error)
    return language_model, ""


def test_most_are_supported() -> None:
    """A probe that refuses everything would fail here."""
    some = "llama qwen3 gpt2 gpt_neox mistral olmo2 gemma2 starcoder2 seed_oss mixtral".split()
    assert all(prepared(families.with_dropout(name, 0.3))[0] for name in some)


@pytest.mark.skipif(not families.known("minimax"), reason="no minimax")
def test_a_linear_attention_that_reads_the_padding_is_refused() -> None:
    model = families.build(families.config("minimax", layer_types=["linear_attention", "full_attention"]))
    language_model = LanguageModel(model)
    prove_padding("model", language_model.backbone, language_model)
    with pytest.raises(ValueError, match=r"^model: MiniMaxForCausalLM samples by other"):
        prove_sampling(language_model)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt_neox", "mixtral"])
def test_sampling_is_proven_in_any_precision_and_leaves_no_trace(family: str, dtype: torch.dtype) -> None:
    model = families.build(families.config(family)).to(dtype).train()
    own = model.generation_config
    state = torch.get_rng_state()
    prove_sampling(LanguageModel(model))
    assert torch.equal(torch.get_rng_state(), state)
    assert model.training
    assert model.generation_config is own


def test_a_cache_that_changes_the_logits_is_refused() -> None:
    model = families.build(families.config("llama"))
    forward = model.model.forward

    def late(*args: Any, use_cache: bool, **kwargs: Any) -> Any:
        out = forward(*args, use_cache=use_cache, **kwargs)
        if use_cache:
            out.last_hidden_state = 1.1 * out.last_hidden_state + 0.3
        return out

    model.model.forward = late
    with pytest.raises(ValueError, match=r"^model: LlamaForCausalLM samples by other .*rollout_func or an engine"):
        prove_sampling(LanguageModel(model))


def test_a_model_that_reads_later_tokens_is_refused_by_name() -> None:
    model = LanguageModel(families.build(families.config("bert-generation")))
    with pytest.raises(ValueError, match=r"^value_model: BertGenerationEncoder is not causal"):
        prove_causal("value_model", model.backbone, model)


def test_a_model_that_fails_on_padding_is_refused_by_name() -> None:
    model = families.build(families.config("llama"))
    forward = model.model.forward

    def failing(*args: Any, attention_mask: Any = None, **kwargs: Any) -> Any:
        if attention_mask is not None and not attention_mask.bool().all():
            raise RuntimeError("no padding here")
        return forward(*args, attention_mask=attention_mask, **kwargs)

    model.model.forward = failing
    with pytest.raises(ValueError, match=r"^model: LlamaModel is not supported: it fails .*no padding here"):
        prove_padding("model", model.model, LanguageModel(model))


def test_dropout_that_no_probe_can_silence_is_refused() -> None:
    model = families.build(families.config("llama"))
    forward = model.model.layers[0].mlp.forward
    model.model.layers[0].mlp.forward = lambda x: nn.functional.dropout(forward(x), 0.1, training=model.training)
    language_model = LanguageModel(model)
    with pytest.raises(ValueError, match=r"^model: LlamaModel computes something else in training mode"):
        silence(model, {"model": language_model.backbone}, language_model)


@pytest.mark.parametrize("family", ["mamba", "opt", "bloom"])
def test_a_state_that_crosses_packed_sequences_is_noticed(family: str) -> None:
    language_model = LanguageModel(families.build(families.config(family)))
    assert not keeps_sequences_apart(language_model.backbone, language_model)


@pytest.mark.parametrize("family", ["llama", "qwen3", "gpt_neox", "gemma2"])
def test_models_that_tell_sequences_apart_by_positions_may_pack(family: str) -> None:
    language_model = LanguageModel(families.build(families.config(family)))
    assert keeps_sequences_apart(language_model.backbone, language_model)


def test_router_logits_are_refused() -> None:
    with pytest.raises(ValueError, match=r"^model: .*output_router_logits = False"):
        LanguageModel(families.build(families.config("mixtral", output_router_logits=True)))


def test_encoder_decoders_are_refused() -> None:
    model = families.build(families.config("llama"))
    model.config.is_encoder_decoder = True
    with pytest.raises(ValueError, match=r"^model: .*encoder-decoder"):
        LanguageModel(model)
