"""``DPOTrainer``: what it learns, how pairs are read, resuming bit for bit, adapters, wrong input."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from peft import LoraConfig
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel

from klq_kernels.trainer.relatives import DPOConfig, DPOTrainer
from klq_kernels.trainer.relatives.pairs import PairReader

pytestmark = pytest.mark.usefixtures("one_thread")


def pairs(number: int = 16) -> list[dict[str, Any]]:
    """Completions of letters that are even ids are preferred; lengths differ."""
    return [
        {**row, "chosen": "bdfhj"[: 2 + i % 4], "rejected": "acegi"[: 1 + i % 5]}
        for i, row in enumerate(tiny.prompts(number))
    ]


def trainer(folder: Path, given: dict[str, Any] | None = None, **changes: Any) -> DPOTrainer:
    defaults: dict[str, Any] = {
        "per_device_train_batch_size": 4, "per_device_eval_batch_size": 5, "max_steps": 8, "learning_rate": 1e-3,
        "lr_scheduler_type": "constant", "logging_steps": 2, "save_strategy": "no", "use_cpu": True, "report_to": [],
        "disable_tqdm": True, "seed": 3,
    }  # fmt: skip
    args = DPOConfig(str(folder), **(defaults | changes))
    rest: dict[str, Any] = {"train_dataset": pairs(), "processing_class": tiny.tokenizer()} | (given or {})
    return DPOTrainer(rest.pop("model", None) or tiny.model(), args, **rest)


def series(run: DPOTrainer, name: str) -> list[float]:
    return [logs[name] for logs in run.state.log_history if name in logs]


@pytest.mark.parametrize("loss", ["dpo", "tdpo1", "tdpo2"])
def test_it_learns_what_is_preferred(loss: str, tmp_path: Path) -> None:
    run = trainer(tmp_path, {"eval_dataset": pairs(23)}, loss=loss)
    before = run.evaluate()
    assert before["eval_loss"] == pytest.approx(0.6931, abs=1e-3)  # log 2: policy and reference are the same
    assert before["eval_rewards/margins"] == pytest.approx(0, abs=1e-4)
    run.train()
    after = run.evaluate()
    assert after["eval_loss"] < 0.3
    assert after["eval_rewards/accuracies"] > 0.9
    assert after["eval_rewards/chosen"] > after["eval_rewards/rejected"]
    assert ("eval_kl/rejected" in after) == (loss != "dpo")
    assert run.reference is not None
    for ours, given in zip(run.reference.module.parameters(), tiny.model().parameters(), strict=True):
        assert torch.equal(ours, given)


def test_a_mean_over_held_out_pairs_is_one_over_all(tmp_path: Path) -> None:
    found = [
        trainer(
            tmp_path, {"eval_dataset": pairs(23), "ref_model": tiny.model(seed=1)}, per_device_eval_batch_size=size
        ).evaluate()
        for size in (5, 23)
    ]
    assert found[0] == pytest.approx({**found[1]}, rel=1e-5)


def test_a_resumed_run_is_the_uninterrupted_one(tmp_path: Path) -> None:
    settings: dict[str, Any] = {"save_strategy": "steps", "save_steps": 3, "logging_steps": 2, "loss": "tdpo2"}
    given = {"ref_model": tiny.model()}
    whole = trainer(tmp_path, given, **settings)
    whole.train()
    again = trainer(tmp_path, {"ref_model": tiny.model()}, **settings)
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    for ours, theirs in zip(again.policy.parameters(), whole.policy.parameters(), strict=True):
        assert torch.equal(ours, theirs)
    for name in ("rewards/margins", "kl/rejected", "logps/chosen"):
        assert series(again, name) == series(whole, name), name
    saved = AutoModelForCausalLM.from_pretrained(tmp_path / "checkpoint-8")
    for ours, theirs in zip(saved.parameters(), whole.policy.parameters(), strict=True):
        assert torch.equal(ours, theirs)


def test_a_checkpoint_of_another_model_is_refused_by_name(tmp_path: Path) -> None:
    trainer(tmp_path, save_strategy="steps", save_steps=2, max_steps=2).train()
    for other in (tiny.model(num_hidden_layers=3), tiny.model(hidden_size=16)):
        with pytest.raises(ValueError, match=r"^resume_from_checkpoint: does not fit the model"):
            trainer(tmp_path, {"model": other}).train(resume_from_checkpoint=True)


def test_pairs_beyond_learned_positions_are_refused_by_name(tmp_path: Path) -> None:
    config = GPT2Config(vocab_size=tiny.VOCAB, n_positions=9, n_embd=32, n_layer=1, n_head=2, eos_token_id=tiny.EOS)
    with pytest.raises(ValueError, match=r"^max_prompt_length: .* the 9 positions"):
        trainer(tmp_path, {"model": GPT2LMHeadModel(config)}).train()


def test_the_reference_of_adapters_is_the_base_model(tmp_path: Path) -> None:
    lora = LoraConfig(r=4, target_modules=["q_proj", "lm_head"], task_type="CAUSAL_LM")
    given = {"model": tiny.model(tie_word_embeddings=False), "peft_config": lora, "eval_dataset": pairs(8)}
    run = trainer(tmp_path, given, loss="tdpo1", learning_rate=1e-2)
    base = tiny.model(tie_word_embeddings=False).lm_head.weight
    assert run.reference is None
    assert run.evaluate()["eval_loss"] == pytest.approx(0.6931, abs=1e-3)
    run.train()
    assert run.evaluate()["eval_loss"] < 0.6
    assert torch.equal(run.policy.get_base_model().lm_head.base_layer.weight, base)


def test_the_reference_may_wait_on_the_host_and_sequences_be_concatenated(tmp_path: Path) -> None:
    plain = trainer(tmp_path, loss="tdpo1")
    other = trainer(tmp_path, loss="tdpo1", ref_placement="cpu", padding_free=True, gradient_checkpointing=True)
    assert other.padding_free
    for run in (plain, other):
        run.train()
    assert series(other, "rewards/margins") == pytest.approx(series(plain, "rewards/margins"), rel=1e-2)


# ---- pairs ---------------------------------------------------------------------------------------------------------


def test_texts_and_chats_end_with_one_eos() -> None:
    reader = PairReader(tiny.tokenizer(), tiny.VOCAB)
    chosen, rejected = reader.sequences([{"prompt": "ab", "chosen": "cd", "rejected": "e"}])
    tokenizer = tiny.tokenizer()
    assert tokenizer.decode(chosen.completion) == "cd<eos>"
    assert tokenizer.decode(rejected.completion) == "e<eos>"
    ended, _ = reader.sequences([{"prompt": "ab", "chosen": "cd<eos>", "rejected": "e"}])
    assert torch.equal(ended.completion, chosen.completion)
    assert tokenizer.decode(chosen.prompt) == "ab"
    assert chosen.trained.all()
    chat = tiny.tokenizer(chat=True)
    row = {
        "prompt": [{"role": "user", "content": "hi"}],
        "chosen": [{"role": "assistant", "content": "yes"}], "rejected": [{"role": "assistant", "content": "n"}],
    }  # fmt: skip
    chosen, rejected = PairReader(chat, tiny.VOCAB).sequences([row])
    assert (chat.decode(chosen.prompt), chat.decode(chosen.completion)) == ("<user>hi<assistant>", "yes<eos>")
    assert chat.decode(rejected.completion) == "n<eos>"
    chat.chat_template += "{% if not add_generation_prompt %}<eos>\n{% endif %}"  # as many templates end a turn
    chosen, _ = PairReader(chat, tiny.VOCAB).sequences([row])
    assert chat.decode(chosen.completion) == "yes<eos>"
    chosen, _ = reader.sequences([{"prompt": "ab", "chosen": "cd<eos>", "rejected": "e"}])
    assert tokenizer.decode(chosen.completion) == "cd<eos>"


def test_cuts() -> None:
    reader = PairReader(tiny.tokenizer(), tiny.VOCAB, max_prompt_length=2, max_completion_length=3)
    chosen, rejected = reader.sequences([{"prompt": "abcd", "chosen": "efghi", "rejected": "k"}])
    decode = tiny.tokenizer().decode
    assert (decode(chosen.prompt), decode(chosen.completion)) == ("cd", "efg")
    assert decode(rejected.completion) == "k<eos>"


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"prompt": "a", "chosen": "", "rejected": "b"}, "train_dataset: chosen of row 0 is empty"),
        ({"prompt": "a", "chosen": "b", "rejected": None}, "train_dataset: rejected of row 0 is empty"),
        (
            {"prompt": "a", "chosen": "b", "rejected": [{"role": "assistant", "content": "x"}]},
            "rejected: must be a text",
        ),
        ({"prompt": 3, "chosen": "b", "rejected": "c"}, "train_dataset: prompt of row 0: must be a text"),
    ],
)
def test_rows_that_are_no_pairs_are_refused(row: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message):
        trainer(tmp_path, {"train_dataset": [row]})


def test_a_template_that_does_not_go_on_is_refused() -> None:
    chat = tiny.tokenizer(chat=True)
    chat.chat_template = "{{ messages | length }}" + tiny.CHAT
    row = {"prompt": [{"role": "user", "content": "hi"}], "chosen": [{"role": "assistant", "content": "yes"}]}
    with pytest.raises(ValueError, match="chosen: does not go on from its prompt"):
        PairReader(chat, tiny.VOCAB).sequences([{**row, "rejected": row["chosen"]}])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"loss": "ipo"}, "loss: must be one of dpo, tdpo1, tdpo2; got 'ipo'"),
        ({"beta": 0.0}, "beta: "),
        ({"tdpo_alpha": -1.0}, "tdpo_alpha: "),
        ({"max_completion_length": 0}, "max_completion_length: must be at least 1"),
        ({"ref_placement": "sharded"}, "ref_placement: must be one of device, cpu"),
        ({"ref_dtype": "int8"}, "ref_dtype: "),
        ({"label_smoothing_factor": 0.1}, "label_smoothing_factor: has no effect"),
        ({"remove_unused_columns": True}, "remove_unused_columns: "),
    ],
)
def test_wrong_settings_are_refused(changes: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message):
        trainer(tmp_path, **changes)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"train_dataset": None}, "train_dataset: is needed"),
        ({"train_dataset": tiny.prompts()}, "train_dataset: must have the columns .* no chosen, rejected"),
        ({"train_dataset": {"a": pairs()}}, "train_dataset: must be one dataset"),
        ({"eval_dataset": {"a": pairs(), "b": tiny.prompts()}}, "eval_dataset: .* no chosen, rejected"),
    ],
)
def test_wrong_data_are_refused(given: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message):
        trainer(tmp_path, given)


def test_arguments_of_another_trainer_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="args: must be a DPOConfig, got KLQConfig"):
        DPOTrainer(tiny.model(), tiny.arguments(tmp_path), pairs(), processing_class=tiny.tokenizer())  # type: ignore[arg-type]
