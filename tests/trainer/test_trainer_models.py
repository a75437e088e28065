"""``models``, ``batches``, ``actor_critic``: what the trainer takes out of a language model is what is in it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
import transformers
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import AutoConfig, AutoModel, AutoModelForSequenceClassification

from klq_kernels import linear_logprobs
from klq_kernels.trainer.actor_critic import ActorCritic, ValueFunction
from klq_kernels.trainer.batches import Inputs, Sequence, collate
from klq_kernels.trainer.models import LanguageModel
from klq_kernels.trainer.probe import positions_of, prove_head, prove_value_head, silence
from klq_kernels.trainer.rollout import Completions


def sequences(seed: int = 0, trained: float = 1.0) -> list[Sequence]:
    """Ragged ones, one without a completion."""
    g = torch.Generator().manual_seed(seed)
    shapes = [(3, 5), (1, 1), (6, 2), (2, 0), (4, 7)]
    return [
        Sequence(
            torch.randint(2, tiny.VOCAB, (p,), generator=g),
            torch.randint(2, tiny.VOCAB, (t,), generator=g),
            torch.rand(t, generator=g) < trained,
        )
        for p, t in shapes
    ]


def plain_logprobs(model: nn.Module, sequence: Sequence) -> torch.Tensor:
    """Through the model's own logits, one sequence at a time."""
    logits = model(input_ids=sequence.ids.unsqueeze(0)).logits[0, :-1].double()
    taken = logits.log_softmax(-1).gather(-1, sequence.ids[1:, None]).squeeze(-1)
    return taken[len(sequence.prompt) - 1 :][sequence.trained]


def ours(model: LanguageModel, batch: Inputs) -> torch.Tensor:
    hidden = model.hidden_states(batch).index_select(0, batch.rows)
    return linear_logprobs(
        hidden, **model.head()._asdict(), actions=batch.actions, cu_seqlens=batch.cu_seqlens
    ).logprobs


@pytest.mark.parametrize("family", tiny.FAMILIES)
@pytest.mark.parametrize("padding_free", [False, True])
def test_rows_of_a_batch_are_those_of_each_sequence_alone(family: str, padding_free: bool) -> None:
    model = tiny.model(family).eval()
    language_model = LanguageModel(model)
    prove_head(language_model)
    with torch.no_grad():
        batch = collate(sequences(trained=0.6), pad_id=tiny.PAD, padding_free=padding_free)
        got = ours(language_model, batch)
        expected = torch.cat([plain_logprobs(model, s) for s in sequences(trained=0.6)])
    assert expected.std() > 0.5  # not a flat softmax
    torch.testing.assert_close(got.double(), expected, rtol=0, atol=2e-5)


@pytest.mark.parametrize("family", ["gemma2", "cohere", "granite"])
def test_a_head_that_is_taken_wrongly_is_noticed(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    language_model = LanguageModel(tiny.model(family))
    monkeypatch.setattr(language_model, "_softcap", None)
    monkeypatch.setattr(language_model, "_scale", 1.0)
    with pytest.raises(ValueError, match="not supported"):
        prove_head(language_model)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_rounding_is_no_reason_to_refuse_a_model(family: str, dtype: torch.dtype) -> None:
    for seed in range(4):
        prove_head(LanguageModel(tiny.model(family, seed).to(dtype)))


@pytest.mark.parametrize(("dtype", "factor"), [(torch.float32, 1.02), (torch.float16, 1.02), (torch.bfloat16, 1.1)])
def test_a_scale_that_is_not_known_is_noticed(
    dtype: torch.dtype, factor: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny.model().to(dtype)
    forward = model.forward

    def scaled(*args: object, **kwargs: object) -> object:
        out = forward(*args, **kwargs)
        out.logits = out.logits * factor
        return out

    monkeypatch.setattr(model, "forward", scaled)
    with pytest.raises(ValueError, match="not supported"):
        prove_head(LanguageModel(model))


def test_models_without_a_linear_head_are_refused() -> None:
    with pytest.raises(ValueError, match="lm_head"):
        LanguageModel(tiny.model().model)
    with pytest.raises(ValueError, match="must be a transformers causal LM"):
        LanguageModel(nn.Linear(2, 2))


@pytest.mark.parametrize("target", [["q_proj", "lm_head"], "modules_to_save"])
def test_adapters_on_the_head_count(target: object) -> None:
    if target == "modules_to_save":
        settings = LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=["lm_head"], task_type="CAUSAL_LM")
    else:
        settings = LoraConfig(r=2, target_modules=target, task_type="CAUSAL_LM")  # type: ignore[arg-type]
    base = tiny.model(tie_word_embeddings=False).eval()
    batch = collate(sequences(), pad_id=tiny.PAD, padding_free=False)
    with torch.no_grad():
        before = ours(LanguageModel(base), batch)
        model = get_peft_model(base, settings).eval()
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(len(name))) * 0.3)
        language_model = LanguageModel(model)
        prove_head(language_model)
        adapted = ours(language_model, batch)
        expected = torch.cat([plain_logprobs(model, s) for s in sequences()])
        torch.testing.assert_close(adapted.double(), expected, rtol=0, atol=5e-5)
        with language_model.without_adapters():
            torch.testing.assert_close(ours(language_model, batch), before)
    assert (adapted - before).abs().max() > 0.1
    ours(language_model, batch).sum().backward()
    trained = {n: p.grad for n, p in model.named_parameters() if p.requires_grad and "lm_head" in n}
    assert trained
    assert all(g is not None and g.abs().sum() > 0 for g in trained.values())


def test_adapters_that_are_no_sum_of_matrices_are_refused() -> None:
    settings = LoraConfig(r=2, target_modules=["lm_head"], use_dora=True, task_type="CAUSAL_LM")
    model = get_peft_model(tiny.model(tie_word_embeddings=False), settings)
    with pytest.raises(ValueError, match="plain LoRA is"):
        LanguageModel(model).head()


def test_dropout_is_off_in_training_mode() -> None:
    model = tiny.model("gpt_neox", attention_dropout=0.5, hidden_dropout=0.5)
    model.add_module("more", nn.Dropout(0.5))
    silence(model, {"model": model.base_model}, LanguageModel(model))
    ids = torch.arange(2, 12).unsqueeze(0)
    with torch.no_grad():
        torch.testing.assert_close(model.train()(ids).logits, model.eval()(ids).logits)


@pytest.mark.parametrize("kind", ["shared", "classifier", "backbone"])
def test_values_are_read_before_each_token_and_after_the_last(kind: str) -> None:
    policy = tiny.model().eval()
    critic = {"shared": None, "classifier": tiny.classifier(5), "backbone": tiny.model(seed=5)}[kind]
    actor_critic = ActorCritic(policy, ValueFunction(32, critic), 1.0).eval()
    nn.init.normal_(actor_critic.value.head.weight)
    backbone = policy.model if critic is None else critic.base_model
    with torch.no_grad():
        batch = collate(sequences(), pad_id=tiny.PAD, padding_free=False)
        states = actor_critic(batch, lambda states: states)
        for at, sequence in enumerate(sequences()):
            hidden = backbone(sequence.ids.unsqueeze(0)).last_hidden_state[0]
            v = actor_critic.value.head(hidden).squeeze(-1)
            own = slice(int(batch.cu_seqlens[at]), int(batch.cu_seqlens[at + 1]))
            torch.testing.assert_close(states.values[own], v[len(sequence.prompt) - 1 : -1], rtol=1e-4, atol=1e-4)
            torch.testing.assert_close(states.last_values[at], v[-1], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("share", [0.0, 0.05, 1.0])
def test_a_share_of_the_values_gradient_enters_a_shared_backbone(share: float) -> None:
    gradients = []
    for scale in (share, 1.0):
        actor_critic = ActorCritic(tiny.model(), ValueFunction(32), value_gradient=scale)
        nn.init.ones_(actor_critic.value.head.weight)
        batch = collate(sequences(), pad_id=tiny.PAD, padding_free=False)
        actor_critic(batch, lambda states: states.values).sum().backward()
        gradients.append((actor_critic.value.head.weight.grad, actor_critic.policy.model.norm.weight.grad))
    (head, backbone), (whole_head, whole_backbone) = gradients
    torch.testing.assert_close(head, whole_head)
    if share == 0.0:
        assert backbone is None
    else:
        torch.testing.assert_close(backbone, share * whole_backbone)


def classifier_of(kind: str, **changes: Any) -> Any:
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 4}
    settings = AutoConfig.for_model(kind, vocab_size=tiny.VOCAB, num_labels=1, pad_token_id=0, **sizes, **changes)
    return AutoModelForSequenceClassification.from_config(settings).float()


def test_a_head_of_another_name_is_the_value_head_and_one_that_is_not_linear_is_refused() -> None:
    critic = tiny.classifier()
    critic.reward, critic.score = critic.score, None
    assert ValueFunction(32, critic).head is critic.reward
    with pytest.raises(ValueError, match=r"^value_model: RobertaForSequenceClassification .*classifier.dense"):
        ValueFunction(32, classifier_of("roberta"))


def test_a_value_model_whose_head_reads_something_else_is_refused() -> None:
    policy = LanguageModel(tiny.model())
    for dtype in (torch.float32, torch.bfloat16):
        critic = tiny.classifier().to(dtype)
        for _ in range(2):  # the second time its head is fp32 already
            prove_value_head(critic, ValueFunction(32, critic), policy)
    critic = classifier_of("bert", is_decoder=True)  # its head reads a pooler's output
    with pytest.raises(ValueError, match=r"^value_model: BertForSequenceClassification is not supported"):
        prove_value_head(critic, ValueFunction(32, critic), policy)


def test_a_value_model_that_reads_later_tokens_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"^value_model: "):
        tiny.trainer(tmp_path, {"value_model": classifier_of("bert")})


@pytest.mark.parametrize("critic", [None, AutoModelForSequenceClassification, AutoModel])
def test_values_are_read_from_states_of_another_width_than_the_layers(critic: Any, tmp_path: Path) -> None:
    config = transformers.OPTConfig(
        vocab_size=tiny.VOCAB, hidden_size=32, word_embed_proj_dim=16, num_hidden_layers=2, num_attention_heads=4,
        ffn_dim=64, max_position_embeddings=128, pad_token_id=tiny.PAD, bos_token_id=None, eos_token_id=tiny.EOS,
        num_labels=1,
    )  # fmt: skip
    value_model = None if critic is None else critic.from_config(config)
    given = {"model": transformers.OPTForCausalLM(config), "value_model": value_model}
    trainer = tiny.trainer(tmp_path, given, max_steps=1)
    assert trainer.actor_critic.value.head.in_features == 16
    trainer.train()


def learned_positions(number: int) -> transformers.PreTrainedModel:
    config = transformers.GPT2Config(
        vocab_size=tiny.VOCAB, n_positions=number, n_embd=32, n_layer=1, n_head=2, bos_token_id=None,
        eos_token_id=tiny.EOS, pad_token_id=tiny.PAD,
    )  # fmt: skip
    return transformers.GPT2LMHeadModel(config)


def test_tables_of_learned_positions_are_found() -> None:
    opt = transformers.OPTConfig(  # whose table has two more rows, in front
        vocab_size=tiny.VOCAB, hidden_size=32, num_hidden_layers=1, num_attention_heads=2, ffn_dim=32,
        max_position_embeddings=50,
    )  # fmt: skip
    models = [learned_positions(30), transformers.OPTForCausalLM(opt), tiny.model(), tiny.model("gpt_neox")]
    found = [positions_of(known.backbone, known) for known in map(LanguageModel, models)]
    assert found == [30, 50, None, None]


def test_sequences_beyond_learned_positions_are_refused_by_name(tmp_path: Path) -> None:
    def written(prompts: list[str], trainer: Any) -> Completions:
        return Completions([[5] * (23 if len(p) == 4 else 3) for p in prompts])

    for rollout_func, completion in ((None, 22), (written, 30)):
        given = {"model": learned_positions(26), "rollout_func": rollout_func}
        with pytest.raises(ValueError, match=r"^max_prompt_length: a prompt of [45] tokens .* the 26 positions"):
            tiny.trainer(tmp_path, given, max_completion_length=completion).train()
    given = {"model": learned_positions(26)}
    tiny.trainer(tmp_path, given, max_completion_length=22, max_prompt_length=4, max_steps=1).train()


def test_sampling_is_proven_only_where_the_policy_itself_samples(tmp_path: Path) -> None:
    model = tiny.model()
    model.generate = None  # type: ignore[assignment]
    with pytest.raises(ValueError, match=r"^model: LlamaForCausalLM cannot sample.*rollout_func"):
        tiny.trainer(tmp_path, {"model": model})
    tiny.trainer(tmp_path, {"model": model, "rollout_func": lambda prompts, trainer: None})


def test_a_reward_model_lends_its_head_and_one_with_more_labels_is_refused() -> None:
    critic = tiny.classifier()
    assert ValueFunction(32, critic).head is critic.score
    assert ValueFunction(32, tiny.classifier().bfloat16()).head.weight.dtype == torch.float32
    critic.score = nn.Linear(32, 3)
    with pytest.raises(ValueError, match="value_model: must have one label"):
        ValueFunction(32, critic)
