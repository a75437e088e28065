"""``KLQTrainer`` as its users meet it: what it learns, that nothing is lost, that variants agree with one another."""

from __future__ import annotations

import asyncio
import json
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import fsdp_process
import numpy as np
import pytest
import tiny
import torch
import trainer_process
from peft import LoraConfig
from processes import TWO_PROCESSES, start
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM, GenerationConfig, GPT2Config, GPT2LMHeadModel, TrainerCallback
from watch import Watch

from klq_kernels import klq_loss, reference
from klq_kernels.trainer import Completions, KLQConfig, KLQTrainer, last_complete_checkpoint
from klq_kernels.trainer.callbacks import FailureWatch
from klq_kernels.trainer.experience import Plan
from klq_kernels.trainer.means import Means
from klq_kernels.trainer.processes import turns
from klq_kernels.trainer.rollout import check_completions, continued, replaced_config, until_eos
from klq_kernels.trainer.sampler import CycleSampler
from klq_kernels.trainer.seeds import Purpose, derived_seed

pytestmark = pytest.mark.usefixtures("one_thread")


def parameters(trained: KLQTrainer) -> dict[str, Tensor]:
    return {n: p.detach().clone() for n, p in trained.actor_critic.named_parameters()}


def assert_same(one: KLQTrainer, other: KLQTrainer, atol: float = 1e-6) -> None:
    a, b = parameters(one), parameters(other)
    assert a.keys() == b.keys()
    for name in a:
        torch.testing.assert_close(a[name], b[name], rtol=1e-4, atol=atol, msg=lambda m, n=name: f"{n}: {m}")


def series(trained: KLQTrainer, name: str) -> list[float]:
    return [logs[name] for logs in trained.state.log_history if name in logs]


# ---- it learns ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("algorithm", ["klq", "ppo"])
def test_the_reward_rises_and_the_kl_is_paid_for(algorithm: str, tmp_path: Path) -> None:
    run = tiny.trainer(
        tmp_path, algorithm=algorithm, per_device_train_batch_size=32, max_steps=100, learning_rate=3e-3, tau=0.02,
        value_learning_rate=1e-2,
    )  # fmt: skip
    run.train()
    scores, kl = series(run, "objective/scores"), series(run, "objective/kl")
    assert len(scores) == 25  # once per cycle of four steps
    assert abs(kl[0]) < 1e-4
    assert kl[-1] > 0.1
    assert sum(scores[-5:]) / 5 > sum(scores[:2]) / 2 + 0.1
    assert {"policy/approxkl_avg", "val/explained_variance", "policy/entropy_avg", "episode", "time/update"} <= set(
        run.state.log_history[0]
    )


def test_a_constant_reward_keeps_the_policy_where_it_is(tmp_path: Path) -> None:
    """V learns the constant; the policy hardly moves."""

    def constant(completions: list[str], **_: Any) -> list[float]:
        return [1.0] * len(completions)

    run = tiny.trainer(
        tmp_path, {"reward_funcs": constant}, per_device_train_batch_size=32, max_steps=100, value_learning_rate=1e-2,
        learning_rate=1e-5, lam=1.0,
    )  # fmt: skip
    run.train()
    assert series(run, "val/value_mean")[-1] > 0.8
    assert abs(series(run, "objective/kl")[-1]) < 0.5


@pytest.mark.parametrize("loss_type", ["huber", "value_clipped", "ratio_clipped", "double_clipped"])
def test_every_loss_trains(loss_type: str, tmp_path: Path) -> None:
    run = tiny.trainer(tmp_path, loss_type=loss_type, lam_final=0.5, max_steps=8)
    run.train()
    assert all(torch.tensor(tiny.losses(run)).isfinite())
    assert series(run, "lam") == [0.95, 0.5]


# ---- variants that must agree ---------------------------------------------------------------------------------------

ONE_STEP: dict[str, Any] = {
    "optim": "sgd",
    "learning_rate": 1.0,
    "max_steps": 1,
    "num_update_epochs": 1,
    "max_grad_norm": 0,
}


def test_accumulated_micro_batches_are_one_big_batch(tmp_path: Path) -> None:
    whole = tiny.trainer(tmp_path / "a", per_device_train_batch_size=8, **ONE_STEP)
    parts = tiny.trainer(tmp_path / "b", per_device_train_batch_size=2, gradient_accumulation_steps=4, **ONE_STEP)
    before = parameters(whole)
    for run in (whole, parts):
        run.train()
    assert (parameters(whole)["policy.lm_head.weight"] - before["policy.lm_head.weight"]).abs().max() > 1e-4
    assert_same(whole, parts)
    assert tiny.losses(whole) == pytest.approx(tiny.losses(parts), rel=1e-5)


@pytest.mark.parametrize("algorithm", ["klq", "ppo"])
def test_padding_free_is_padded(algorithm: str, tmp_path: Path) -> None:
    runs = [tiny.trainer(tmp_path, algorithm=algorithm, padding_free=free, **ONE_STEP) for free in (True, False)]
    for run in runs:
        run.train()
    assert_same(*runs)


def test_activation_checkpoints_change_nothing(tmp_path: Path) -> None:
    runs, forwards = [], []
    for on in (True, False):
        run = tiny.trainer(tmp_path, gradient_checkpointing=on, **ONE_STEP)
        seen: list[bool] = []
        run.policy.model.layers[0].self_attn.register_forward_hook(lambda *_, s=seen: s.append(torch.is_grad_enabled()))
        run.train()
        runs.append(run)
        forwards.append(len(seen))
    assert forwards[0] == forwards[1] + 1  # the one forward with gradient is done again in backward
    assert_same(*runs)


@pytest.mark.runs("DDP", "trainer")
@pytest.mark.runs("one process", "trainer")
def test_two_processes_are_one(tmp_path: Path) -> None:
    """DDP over gloo: half the prompts each, the same weights in the end as one process with all of them."""
    config = {"max_steps": 4, "num_update_epochs": 2, "learning_rate": 1e-2, "optim": "sgd"}
    variants: dict[str, dict[str, Any]] = {
        "klq": {},
        "ppo": {"algorithm": "ppo"},
        "scales": {  # that are those of all processes, and a warm-up, in which DDP waits for gradients of the policy
            "num_generations": 2, "value_warmup_steps": 1, "value_lam": 0.5, "scale_rewards": True, "reward_clip": 1.0,
            "advantage_spread": 0.05,
        },
    }  # fmt: skip
    halves = []
    for name, changes in variants.items():
        mine = config | changes
        trainer_process.run(tmp_path / name / "1", mine | {"per_device_train_batch_size": 8}, use_script=True)
        half = mine | {"per_device_train_batch_size": 4}
        halves.append({"folder": str(tmp_path / name / "2"), "config": half, "use_script": True})
    start([*TWO_PROCESSES, trainer_process.__file__, json.dumps(halves)])
    for variant in variants:
        one, two = (load_file(tmp_path / variant / n / "final" / "model.safetensors") for n in "12")
        for name, tensor in one.items():
            torch.testing.assert_close(two[name], tensor, rtol=1e-4, atol=2e-6, msg=lambda m, n=name: f"{n}: {m}")
        kl, kl_of_two = (history(tmp_path / variant / n, "objective/kl") for n in "12")
        assert kl == pytest.approx(kl_of_two, abs=1e-5)
        assert abs(kl[-1]) > 1e-5


def test_a_module_sharded_by_fsdp2_gives_the_same_gradients(tmp_path: Path) -> None:
    """The objective runs inside the module, where the sharded lm_head is whole. Generating and exporting work too."""
    start([*TWO_PROCESSES, fsdp_process.__file__, str(tmp_path / "sharded.pt")])
    sharded = torch.load(tmp_path / "sharded.pt", weights_only=True)
    whole = fsdp_process.build()
    loss = fsdp_process.backward(whole, tiny.arguments(tmp_path))
    torch.testing.assert_close(sharded["loss"], loss)
    gradients = {name: p.grad for name, p in whole.named_parameters() if p.grad is not None}
    assert sharded["gradients"].keys() == gradients.keys()
    for name, gradient in gradients.items():
        torch.testing.assert_close(sharded["gradients"][name], gradient, rtol=1e-4, atol=1e-6)
    ids = whole.generate(input_ids=torch.tensor([[5, 6, 7]]), do_sample=False, max_new_tokens=4, pad_token_id=tiny.PAD)
    assert torch.equal(sharded["ids"], ids)
    exported = dict(whole.language_model.weights())
    assert sharded["weights"].keys() == exported.keys()
    assert all(torch.equal(sharded["weights"][name], weight) for name, weight in exported.items())


def history(folder: Path, name: str) -> list[float]:
    return [logs[name] for logs in json.loads((folder / "history.json").read_text()) if name in logs]


# ---- nothing is lost ------------------------------------------------------------------------------------------------

SAVING = {"max_steps": 12, "save_strategy": "steps", "save_steps": 5, "num_mini_batches": 2, "logging_steps": 1}


@pytest.mark.parametrize(
    "changes",
    [{}, {"head_gradient": "sampled", "head_samples": 4}, {"head_gradient": "sampled", "algorithm": "ppo"}],
    ids=str,
)
@pytest.mark.runs("one process", "resume", "trainer, sampled gradient")
def test_a_run_killed_in_an_update_resumes_to_the_same_losses(changes: dict[str, Any], tmp_path: Path) -> None:
    """Step 5 is in the middle of a cycle of eight: its experience has to be in the checkpoint."""
    config = SAVING | changes
    killed = {"folder": str(tmp_path / "killed"), "config": config, "kill_at": 8}
    start([trainer_process.__file__, json.dumps([killed])], expect=-9)
    assert (tmp_path / "killed" / "checkpoint-5" / "experience_0.pt").exists()
    whole, resumed = (tiny.trainer(tmp_path / name, **config) for name in ("whole", "killed"))
    whole.train()
    resumed.train(resume_from_checkpoint=True)
    assert len(tiny.losses(whole)) == 12
    assert series(resumed, "objective/kl") == series(whole, "objective/kl")
    assert tiny.losses(resumed) == tiny.losses(whole)
    assert_same(resumed, whole, atol=0)


def test_a_checkpoint_that_was_not_finished_is_passed_over(tmp_path: Path) -> None:
    assert last_complete_checkpoint(tmp_path) is None
    for step in (5, 10, 15, "best"):
        (tmp_path / f"checkpoint-{step}").mkdir()
    (tmp_path / "checkpoint-best" / "trainer_state.json").write_text("{}")  # not one of transformers' own
    (tmp_path / "checkpoint-5" / "trainer_state.json").write_text("{}")
    (tmp_path / "checkpoint-10" / "trainer_state.json").write_text('{"glob')
    (tmp_path / "checkpoint-15" / "trainer_state.json").write_text("{}")  # of save_only_model
    (tmp_path / "checkpoint-5" / "means_0.pt").touch()
    assert last_complete_checkpoint(tmp_path) == str(tmp_path / "checkpoint-5")


@pytest.mark.parametrize(
    "changes",
    [
        {"tau": 0.1},
        {"temperature": 0.8},
        {"fp32_head": True},
        {"seed": 4},
        {"algorithm": "ppo"},
        {"per_device_train_batch_size": 4},
        {"gradient_accumulation_steps": 2},
        {"num_mini_batches": 4, "num_update_epochs": 2},
    ],
    ids=str,
)
def test_experience_made_under_other_arguments_is_made_anew(changes: dict[str, Any], tmp_path: Path) -> None:
    tiny.trainer(tmp_path, **SAVING | {"max_steps": 5}).train()
    resumed = tiny.trainer(tmp_path, **SAVING | {"max_steps": 8, **changes})
    name = next(iter(changes))
    with pytest.warns(UserWarning, match=rf"resume_from_checkpoint: .*{name}=.* \(now "):
        resumed.train(resume_from_checkpoint=True)
    assert resumed.state.global_step == 8
    assert len(series(resumed, "objective/kl")) == 2  # of the run before, and of the new rollouts


@pytest.mark.parametrize("changes", [{"num_mini_batches": 1}, {"num_update_epochs": 3}], ids=str)
def test_a_cycle_of_another_length_cannot_be_resumed_in_its_middle(changes: dict[str, Any], tmp_path: Path) -> None:
    tiny.trainer(tmp_path, **SAVING | {"max_steps": 5}).train()
    with pytest.raises(ValueError, match=r"^resume_from_checkpoint: was written in the middle of a cycle of 8 steps"):
        tiny.trainer(tmp_path, **SAVING | changes).train(resume_from_checkpoint=True)


def test_the_log_of_a_cycle_that_was_interrupted_is_whole(tmp_path: Path) -> None:
    """One log per cycle of eight steps: what came before the checkpoint at step 5 counts as well."""
    settings = {**SAVING, "logging_steps": 8, "max_steps": 8}
    whole, resumed = (tiny.trainer(tmp_path / name, **settings) for name in ("whole", "resumed"))
    whole.train()
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-5"))
    for name in ("objective/kl", "objective/scores", "policy/entropy_avg", "policy/approxkl_avg", "val/value_mean"):
        assert series(resumed, name) == pytest.approx(series(whole, name), rel=1e-9), name
        assert len(series(resumed, name)) == 1


def test_resuming_between_cycles_and_across_epochs(tmp_path: Path) -> None:
    """Four cycles are an epoch here; the run is stopped after five."""
    settings = {"max_steps": 28, "save_strategy": "steps", "save_steps": 20}
    whole = tiny.trainer(tmp_path / "whole", **settings)
    whole.train()
    again = tiny.trainer(tmp_path / "again", **settings)
    again.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-20"))
    assert tiny.losses(again) == tiny.losses(whole)
    assert series(again, "objective/scores") == series(whole, "objective/scores")


@pytest.mark.runs("DDP", "resume")
def test_two_processes_resume(tmp_path: Path) -> None:
    """In the middle of the second epoch, with its prompts; where one lacks its experience, both say so."""
    config = {"per_device_train_batch_size": 4, "save_strategy": "steps", "save_steps": 11, "max_steps": 16,
              "num_update_epochs": 2, "logging_steps": 1}  # fmt: skip
    checkpoint = str(tmp_path / "whole" / "checkpoint-11")
    again = {"config": config, "use_script": True, "resume": checkpoint}
    runs = [
        {"folder": str(tmp_path / "whole"), "config": config, "use_script": True},
        {"folder": str(tmp_path / "again"), **again},
        {"folder": str(tmp_path / "refused"), **again, "lacks": "experience_1.pt"},
    ]
    start([*TWO_PROCESSES, trainer_process.__file__, json.dumps(runs)])
    for name in ("objective/scores", "loss"):
        assert history(tmp_path / "again", name) == history(tmp_path / "whole", name), name
    for rank in (0, 1):
        assert "is missing for 1 of 2 processes" in (tmp_path / "refused" / f"refused_{rank}.txt").read_text()


def test_a_checkpoint_is_called_complete_when_every_process_has_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = tiny.trainer(tmp_path, **{**SAVING, "max_steps": 5})
    waits: list[set[str]] = []
    monkeypatch.setattr(
        run.accelerator, "wait_for_everyone", lambda: waits.append({p.name for p in tmp_path.glob("checkpoint-5/*")})
    )
    run.train()
    assert any({"means_0.pt", "experience_0.pt"} <= seen and "trainer_state.json" not in seen for seen in waits)


def test_the_spread_of_held_out_rewards_is_that_of_all_prompts(tmp_path: Path) -> None:
    """Not a mean of spreads within batches, which would be 0 here."""
    run = tiny.trainer(tmp_path, rollout_forward_batch_size=1)
    scores: list[float] = []
    judged = run.reward
    run.reward = lambda rows, rollout: scores.append(judged(rows, rollout).total.item()) or judged(rows, rollout)
    found = run.evaluate(tiny.prompts(6))
    assert found["eval_reward_std"] == pytest.approx(torch.tensor(scores).std(correction=0).item(), abs=1e-6)
    assert found["eval_reward_std"] > 0


def test_the_best_model_is_loaded_at_the_end(tmp_path: Path) -> None:
    settings = {"eval_strategy": "steps", "eval_steps": 4, "save_strategy": "steps", "save_steps": 4, "max_steps": 16}
    run = tiny.trainer(
        tmp_path, {"eval_dataset": tiny.prompts(8)}, load_best_model_at_end=True, metric_for_best_model="eval_kl",
        greater_is_better=False, **settings,
    )  # fmt: skip
    run.train()
    best = Path(str(run.state.best_model_checkpoint))
    assert best.name != "checkpoint-16"
    saved = load_file(best / "model.safetensors")
    assert torch.equal(run.policy.model.norm.weight, saved["model.norm.weight"])
    value = load_file(best / "value_function.safetensors")
    assert torch.equal(run.actor_critic.value.head.weight, value["head.weight"])


def test_a_model_card_is_written(tmp_path: Path) -> None:
    run = tiny.trainer(tmp_path, max_steps=4)
    run.train()
    run.create_model_card(model_name="tiny")
    assert "- klq\n" in (tmp_path / "README.md").read_text()


def test_evaluating_does_not_change_the_run(tmp_path: Path) -> None:
    plain = tiny.trainer(tmp_path)
    watched = tiny.trainer(tmp_path, {"eval_dataset": tiny.prompts(6)}, eval_strategy="steps", eval_steps=2)
    for run in (plain, watched):
        run.train()
    assert tiny.losses(plain) == tiny.losses(watched)
    first, second = watched.evaluate(), watched.evaluate()
    assert first == second
    assert {"eval_reward", "eval_kl", "eval_length", "eval_truncated", "eval_rewards/even"} <= set(first)


def test_callbacks_see_each_batch_of_an_evaluation(tmp_path: Path) -> None:
    """As in transformers' own loop: its progress bar asks how many there will be."""
    seen: list[int] = []

    class Counter(TrainerCallback):
        def on_prediction_step(self, *_: Any, eval_dataloader: Any, **__: Any) -> None:
            seen.append(len(eval_dataloader))

    run = tiny.trainer(
        tmp_path, {"eval_dataset": tiny.prompts(5), "callbacks": [Counter()]}, rollout_forward_batch_size=2
    )
    run.evaluate()
    assert seen == [3, 3, 3]


@pytest.mark.parametrize("processes", [1, 2, 3, 8])
@pytest.mark.parametrize("number", [1, 4, 7, 12])
def test_turns_cover_all_rows_once_and_keep_every_process_busy(number: int, processes: int) -> None:
    shares = [turns(number, 3, process=process, processes=processes) for process in range(processes)]
    assert len({len(share) for share in shares}) == 1
    assert all(turn.rows for share in shares for turn in share)
    kept = sorted((turn.rows for share in shares for turn in share if turn.kept), key=lambda rows: rows.start)
    assert kept == [turn.rows for turn in turns(number, 3, process=0, processes=1)]
    assert [row for rows in kept for row in rows] == [*range(number)]


def test_saved_models_load_as_any_other(tmp_path: Path) -> None:
    run = tiny.trainer(tmp_path)
    run.train()
    run.save_model(str(tmp_path / "final"))
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "final")
    ids = torch.arange(2, 12).unsqueeze(0)
    with torch.no_grad():
        assert torch.equal(loaded(ids).logits, run.policy.eval()(ids).logits)
    again = KLQTrainer(str(tmp_path / "final"), tiny.even, tiny.arguments(tmp_path), tiny.prompts())
    assert again.tokenizer("abc").input_ids == run.tokenizer("abc").input_ids


# ---- memory ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("algorithm", ["klq", "ppo"])
def test_nothing_of_tokens_by_vocabulary_is_ever_allocated(algorithm: str, tmp_path: Path) -> None:
    """Over a whole cycle, generation included (whose last step holds one row per sequence)."""
    run = tiny.trainer(
        tmp_path, algorithm=algorithm, per_device_train_batch_size=16, max_completion_length=32, max_steps=2,
        workspace_bytes=tiny.VOCAB * 4 * 16,
    )  # fmt: skip
    scripted = [[2 + (i * 5 + t) % 250 for t in range(32)] for i in range(16)]
    run.rollout_func = lambda prompts, trainer: Completions(scripted)
    tokens, vocab = 16 * 32, tiny.VOCAB
    with Watch() as seen:
        run.train()
    assert len(seen.allocations) > 1000
    assert seen.at_least(tokens * vocab * 2) == []
    with Watch() as control, torch.no_grad():
        run.policy(torch.tensor(scripted))
    assert control.at_least(tokens * vocab * 2)


def test_generation_holds_one_row_of_logits_per_sequence(tmp_path: Path) -> None:
    run = tiny.trainer(tmp_path, max_completion_length=32)
    rows = [{"prompt": "a" * 60}] * 8
    with Watch() as seen:
        run.roll_out(rows, seed=1)
    assert seen.at_least(8 * 60 * tiny.VOCAB * 2) == []


# ---- models, adapters, value functions ------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["gpt_neox", "qwen3", "gemma2"])
def test_families(family: str, tmp_path: Path) -> None:
    run = tiny.trainer(tmp_path, {"model": tiny.model(family)}, max_steps=4)
    run.train()
    assert all(torch.tensor(tiny.losses(run)).isfinite())
    assert abs(series(run, "objective/kl")[0]) < 1e-4


@pytest.mark.runs("one process", "trainer, LoRA")
def test_adapters_are_trained_and_their_base_is_the_reference(tmp_path: Path) -> None:
    lora = LoraConfig(r=4, target_modules=["q_proj", "v_proj", "lm_head"], task_type="CAUSAL_LM", lora_dropout=0.3)
    settings = {"max_steps": 8, "learning_rate": 1e-2, "save_strategy": "steps", "save_steps": 6}
    run = tiny.trainer(tmp_path, {"model": tiny.model(tie_word_embeddings=False), "peft_config": lora}, **settings)
    before = parameters(run)
    assert run.reference is None
    run.train()
    after = parameters(run)
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    assert moved == {n for n, p in run.actor_critic.named_parameters() if p.requires_grad}
    assert any("lm_head.lora_B" in name for name in moved)
    kl = series(run, "objective/kl")
    assert abs(kl[0]) < 1e-4 < abs(kl[1])
    assert (tmp_path / "checkpoint-6" / "adapter_model.safetensors").exists()
    given = {"model": tiny.model(tie_word_embeddings=False), "peft_config": lora}
    again = tiny.trainer(tmp_path / "again", given, **settings)
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-6"))
    assert_same(run, again, atol=0)


def test_a_value_model_of_its_own_learns_at_its_own_rate(tmp_path: Path) -> None:
    run = tiny.trainer(tmp_path, {"value_model": tiny.classifier()}, value_learning_rate=0.02, max_steps=4)
    before = parameters(run)
    run.train()
    rates = {group["lr"] for group in run.optimizer.param_groups}
    assert rates == {1e-3, 0.02}
    after = parameters(run)
    assert not torch.equal(before["value.head.weight"], after["value.head.weight"])
    assert not torch.equal(
        before["value.backbone.layers.0.mlp.up_proj.weight"], after["value.backbone.layers.0.mlp.up_proj.weight"]
    )
    run.save_model(str(tmp_path / "final"))
    assert "backbone.embed_tokens.weight" in load_file(tmp_path / "final" / "value_function.safetensors")


def test_a_reward_model_that_becomes_the_value_function_is_not_trained_itself(tmp_path: Path) -> None:
    judge = tiny.classifier()
    before = {name: p.detach().clone() for name, p in judge.named_parameters()}
    given = {"reward_funcs": judge, "value_model": judge, "reward_processing_classes": tiny.tokenizer()}
    run = tiny.trainer(tmp_path, given, max_steps=4)
    assert torch.equal(run.actor_critic.value.head.weight, before["score.weight"])
    run.train()
    assert all(torch.equal(before[name], p) for name, p in judge.named_parameters())
    assert not torch.equal(run.actor_critic.value.head.weight, before["score.weight"])


@pytest.mark.parametrize("adapters", [False, True])
def test_a_reference_that_would_be_trained_is_refused(adapters: bool, tmp_path: Path) -> None:
    lora = LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM") if adapters else None
    model = tiny.model()
    with pytest.raises(ValueError, match=r"^ref_model: must not share .* leave it None"):
        tiny.trainer(tmp_path, {"model": model, "ref_model": model, "peft_config": lora})


@pytest.mark.parametrize("adapters", [False, True])
def test_what_is_scored_has_no_dropout(adapters: bool, tmp_path: Path) -> None:
    """Before the first update the policy is its reference, also where updates drop out."""
    lora = LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM") if adapters else None
    given = {"model": tiny.model(attention_dropout=0.5), "peft_config": lora}
    run = tiny.trainer(tmp_path, given, disable_dropout=False, max_steps=4)
    run.train()
    assert series(run, "objective/kl")[0] == pytest.approx(0, abs=1e-4)
    assert series(run, "policy/approxkl_avg")[0] > 1e-3  # and updates do


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_checkpoints_in_16_bits_are_trained_in_fp32(dtype: torch.dtype, tmp_path: Path) -> None:
    """Policy, reference and value model; under autocast all of them compute alike, so that KL starts at 0."""
    path = str(tmp_path / "checkpoint")
    tiny.model().to(dtype).save_pretrained(path)
    tiny.tokenizer().save_pretrained(path)
    given = {"model": path, "ref_model": path, "value_model": path}
    run = tiny.trainer(tmp_path, given, bf16=True, max_steps=4, learning_rate=1e-5)
    before = parameters(run)
    run.train()
    after = parameters(run)
    assert {p.dtype for p in after.values()} == {torch.float32}
    assert (before["policy.lm_head.weight"] != after["policy.lm_head.weight"]).float().mean() > 0.9
    assert series(run, "objective/kl")[0] == 0


def test_models_given_in_16_bits_are_warned_of(tmp_path: Path) -> None:
    with pytest.warns(UserWarning, match=r"^model: its weights are torch.bfloat16.*bf16=True"):
        tiny.trainer(tmp_path, {"model": tiny.model().bfloat16()})
    lora = LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM")
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="model: ")
        tiny.trainer(tmp_path, {"model": tiny.model().bfloat16(), "peft_config": lora})


def test_a_reference_of_its_own(tmp_path: Path) -> None:
    run = tiny.trainer(tmp_path, {"ref_model": tiny.model(seed=9)}, max_steps=4)
    run.train()
    assert abs(series(run, "objective/kl")[0]) > 1


# ---- prompts, rewards, completions ----------------------------------------------------------------------------------


def test_rewards_get_what_grpo_trainers_give_them(tmp_path: Path) -> None:
    calls: list[dict[str, Any]] = []

    def record(
        prompts: list[Any], completions: list[Any], completion_ids: list[list[int]], **columns: Any
    ) -> list[float]:
        calls.append({"prompts": prompts, "completions": completions, "ids": completion_ids, **columns})
        return [0.5] * len(prompts)

    async def slow(completions: list[Any], **_: Any) -> list[float | None]:
        await asyncio.sleep(0)
        return [None if i % 2 else 1.0 for i in range(len(completions))]

    chats = [row | {"prompt": [{"role": "user", "content": row["prompt"]}]} for row in tiny.prompts(8)]
    judge = tiny.classifier()
    run = tiny.trainer(
        tmp_path,
        {"reward_funcs": [record, slow, judge], "train_dataset": chats, "processing_class": tiny.tokenizer(chat=True),
         "reward_processing_classes": [None, None, tiny.tokenizer(chat=True)]},
        max_steps=4, reward_weights=[1.0, 2.0, 0.0],
    )  # fmt: skip
    run.train()
    call = calls[0]
    assert [p[-1]["content"][0] for p in call["prompts"]] == call["letter"]
    assert all(c[0]["role"] == "assistant" for c in call["completions"])
    assert len(call["ids"]) == 8
    assert series(run, "objective/scores")[0] == pytest.approx(1.5)
    assert series(run, "rewards/slow")[0] == 1.0
    assert len([n for n in run.state.log_history[0] if n.startswith("rewards/")]) == 3


def test_a_reward_counts_for_what_it_scored_alone(tmp_path: Path) -> None:
    """Batches of which it scores none, one and all of four: in evaluation, and over the cycles of one log."""
    answers: list[list[float | None]] = []

    def partly(prompts: list[str], **_: Any) -> list[float | None]:
        return answers.pop(0)

    given = {"reward_funcs": [tiny.even, partly], "eval_dataset": tiny.prompts(12)}
    run = tiny.trainer(
        tmp_path, given, per_device_train_batch_size=4, rollout_forward_batch_size=4, num_update_epochs=1, max_steps=3,
        logging_steps=3,
    )  # fmt: skip
    batches: list[list[float | None]] = [[None] * 4, [6.0, None, None, None], [1.0] * 4]
    answers += batches
    assert run.evaluate()["eval_rewards/partly"] == pytest.approx(2.0)
    answers += batches
    run.train()
    assert series(run, "rewards/partly") == pytest.approx([2.0])


@pytest.mark.parametrize("adapters", [False, True])
def test_what_a_checkpoint_says_of_sampling_is_left_out(adapters: bool, tmp_path: Path) -> None:
    """The policy that samples is the one that is trained: no penalties, no cut-offs; saved models keep them."""
    lora = LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM") if adapters else None
    completions = []
    for settings in ({}, {"repetition_penalty": 1.3, "min_p": 0.2}):
        model = tiny.model()
        own = model.generation_config
        own.update(**settings)
        run = tiny.trainer(tmp_path, {"model": model, "peft_config": lora})
        completions.append([s.completion.tolist() for s in run.roll_out([{"prompt": "abc"}] * 8, seed=1).sequences])
        assert model.generation_config is own
    assert completions[0] == completions[1]
    with pytest.raises(KeyError), replaced_config(run.policy, run.generation_config):
        raise KeyError
    assert model.generation_config is own


def test_chat_prompts_are_put_into_the_template(tmp_path: Path) -> None:
    run = tiny.trainer(tmp_path, {"processing_class": tiny.tokenizer(chat=True)}, max_prompt_length=20)
    ids = run.tokenize([{"role": "user", "content": "hi"}])
    assert run.tokenizer.decode(ids) == "<user>hi<assistant>"
    assert len(run.tokenize("x" * 50)) == 20


def targets_of(
    run: KLQTrainer, completions: Completions, scores: Callable[..., list[float]]
) -> tuple[Any, list[Any], list[Any]]:
    """The experience of scripted completions, and per sequence (logp, ref, V, V after the last)."""
    run.rollout_func = lambda prompts, trainer: completions
    torch.nn.init.normal_(run.actor_critic.value.head.weight)
    frozen: Any = run.reference.module.model  # type: ignore[union-attr]
    torch.nn.init.normal_(frozen.lm_head.weight)
    rows = [{"prompt": chr(97 + i) * (i + 1)} for i in range(len(completions.completion_ids))]
    experience = run.collect(rows)
    singles = []
    for sequence in experience.sequences:
        with torch.no_grad():
            hidden = run.policy.model(sequence.ids.unsqueeze(0)).last_hidden_state[0]
            at = slice(len(sequence.prompt) - 1, -1)
            logp, ref = (
                reference.linear_logprobs(h[at], m.lm_head.weight, sequence.completion).logprobs
                for h, m in (
                    (hidden, run.policy),
                    (
                        run.reference.module.model.model(sequence.ids.unsqueeze(0)).last_hidden_state[0],
                        run.reference.module.model,
                    ),  # type: ignore[union-attr]
                )
            )
            values = run.actor_critic.value.head(hidden).squeeze(-1)
        singles.append((logp, ref, values[at], values[-1]))
    return experience, singles, rows


@pytest.mark.parametrize("bootstrap", [True, False])
def test_targets_are_those_of_the_oracle(bootstrap: bool, tmp_path: Path) -> None:
    """Ended, cut off and tool-calling completions, each on its own against ``reference``."""

    def score(completion_ids: list[list[int]], **_: Any) -> list[float]:
        return [1.0, 2.0, 3.0]

    run = tiny.trainer(
        tmp_path, {"reward_funcs": score}, bootstrap_truncated=bootstrap, missing_eos_penalty=0.25, gamma=0.9, lam=0.8
    )
    trained = [[True] * 4, [True, False, False, True, True], [True] * 2]
    completions = Completions([[5, 6, 7, tiny.EOS], [9, 9, 8, 8, tiny.EOS], [4, 3]], trained=trained)
    experience, singles, _ = targets_of(run, completions, score)
    begin = 0
    for at, (logp, ref, values, last) in enumerate(singles):
        keep = torch.tensor(trained[at])
        cut = at == 2
        total = [1.0, 2.0, 3.0][at] - 0.25 * cut
        if cut and bootstrap:
            total = -0.25
        oracle = reference.klq_targets(
            logp[None], ref[None], values[None], torch.tensor([total]), gamma=0.9, lam=0.8, tau=0.05,
            bootstrap_values=last[None] * (cut and bootstrap), mask=keep[None],
        )  # fmt: skip
        n = int(keep.sum())
        for got, expected in zip(experience.targets, oracle, strict=True):
            torch.testing.assert_close(got[begin : begin + n], expected[0][keep], rtol=1e-4, atol=1e-4)
        begin += n
    assert begin == len(experience.targets.advantages)


def test_the_loss_is_klq_loss_of_the_plain_log_probs(tmp_path: Path) -> None:
    run = tiny.trainer(tmp_path, loss_type="value_clipped", alpha=0.7)
    completions = Completions([[5, 6, tiny.EOS], [7, tiny.EOS]])
    experience, singles, _ = targets_of(run, completions, tiny.even)
    moved = experience.targets._replace(old_values=experience.targets.old_values + 0.1)
    experience.targets = moved
    loss = run.compute_loss(run.actor_critic, (experience, torch.tensor(5.0), 0))
    logp, _, values, _ = (torch.cat([torch.atleast_1d(s[i]) for s in singles]) for i in range(4))
    expected = klq_loss(
        logp, values, moved, alpha=0.7, loss_type="value_clipped", cu_seqlens=torch.tensor([0, 3, 5], dtype=torch.int32)
    )
    torch.testing.assert_close(loss, expected.loss, rtol=1e-4, atol=1e-5)


def test_klq_advantages_are_not_whitened_and_ppos_are(tmp_path: Path) -> None:
    for algorithm in ("klq", "ppo"):
        run = tiny.trainer(tmp_path, algorithm=algorithm)
        experience, *_ = targets_of(run, Completions([[5, 6, 7, tiny.EOS], [9, tiny.EOS]]), tiny.even)
        if algorithm == "klq":
            assert torch.equal(experience.advantages, experience.targets.advantages)
        else:
            assert experience.advantages.mean().item() == pytest.approx(0, abs=1e-6)
            assert experience.advantages.std(correction=0).item() == pytest.approx(1, abs=1e-4)


def test_the_samplers_own_log_probs_are_compared(tmp_path: Path) -> None:
    run = tiny.trainer(tmp_path, max_steps=4)

    def off(prompts: list[str], trainer: KLQTrainer) -> Completions:
        return Completions([[5, tiny.EOS]] * len(prompts), logprobs=[[-30.0, -30.0]] * len(prompts))

    run.rollout_func = off
    run.train()
    assert series(run, "rollout/sampler_kl")[0] > 1


def test_completions_are_logged(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = tiny.trainer(tmp_path, log_completions=True, max_steps=8)
    run.train()
    rows = [json.loads(line) for line in (tmp_path / "completions.jsonl").read_text().splitlines()]
    assert len(rows) == 16
    assert {"step", "prompt", "completion", "score", "rewards"} == set(rows[0])
    assert "step 4" in capsys.readouterr().out


# ---- bad input ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "name"),
    [
        ({"tau": 0.0}, "tau"),
        ({"lam": 1.5}, "lam"),
        ({"alpha": 2.0}, "alpha"),
        ({"loss_type": "l1"}, "loss_type"),
        ({"algorithm": "grpo"}, "algorithm"),
        ({"num_update_epochs": 0}, "num_update_epochs"),
        ({"temperature": -1.0}, "temperature"),
        ({"remove_unused_columns": True}, "remove_unused_columns"),
    ],
)
def test_config_errors_name_the_argument(changes: dict[str, Any], name: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=f"^{name}: "):
        tiny.arguments(tmp_path, **changes)


class Stream(torch.utils.data.IterableDataset[dict[str, str]]):
    """Prompts without a number of them."""

    def __iter__(self) -> Iterator[dict[str, str]]:
        return iter(tiny.prompts(4))


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"train_dataset": None}, "train_dataset: is needed"),
        ({"train_dataset": [{"letter": "a"}]}, "must have a column 'prompt', has letter"),
        ({"train_dataset": Stream()}, "must have a length"),
        ({"train_dataset": []}, "train_dataset: is empty"),
        ({"processing_class": None}, "processing_class: is needed"),
    ],
)
def test_trainer_errors_name_the_argument(given: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message):
        tiny.trainer(tmp_path, given)


@pytest.mark.parametrize(
    ("completions", "message"),
    [
        (Completions([[1]]), "completion_ids: must have 2 entries, got 1"),
        (Completions([[1], [2]], logprobs=[[0.0], []]), r"logprobs\[1\]: must have 1 entries"),
        (Completions([[1], [2]], trained=[[True, True], [True]]), r"trained\[0\]"),
        (Completions([[1], [2]], prompt_ids=[[], [1]]), "prompt_ids: must not be empty"),
        (Completions([[1], [9]]), r"completion_ids\[1\]: must hold ints in \[0, 9\)"),
        (Completions([[-1], [2]]), r"completion_ids\[0\]: must hold ints"),
        (Completions([[1.5], [2]]), r"completion_ids\[0\]: must hold ints"),
        (Completions([[1], [2]], prompt_ids=[[1], [10]]), r"prompt_ids\[1\]: must hold ints"),
    ],
)
def test_rollout_functions_are_checked(completions: Completions, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        check_completions(completions, [[1], [2]], {1}, 9)


def test_the_temperature_is_not_a_matter_of_sampling_alone(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"^generation_kwargs: .* set the option temperature"):
        tiny.trainer(tmp_path, generation_kwargs={"temperature": 0.7})


def test_ids_beyond_the_vocabulary_are_refused(tmp_path: Path) -> None:
    small = tiny.model(vocab_size=100)
    with pytest.raises(ValueError, match=r"^processing_class: must hold ints in \[0, 40\)"):
        tiny.trainer(tmp_path, {"model": tiny.model(vocab_size=40)}).train()  # its tokenizer has 258
    padded = tiny.tokenizer()
    padded.add_special_tokens({"pad_token": "<other>"})
    with pytest.raises(ValueError, match=r"^processing_class: pad_token_id"):
        tiny.trainer(tmp_path, {"model": small, "processing_class": padded})


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("neftune_noise_alpha", {"neftune_noise_alpha": 5.0}),
        ("label_smoothing_factor", {"label_smoothing_factor": 0.1}),
        ("generation_kwargs", {"generation_kwargs": {"num_return_sequences": 2}}),
        ("generation_kwargs", {"generation_kwargs": {"max_new_tokens": 2}}),
        ("generation_kwargs", {"generation_kwargs": {"max_length": 2}}),
    ],
)
def test_settings_that_would_change_what_is_learnt_are_refused(
    name: str, changes: dict[str, Any], tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=rf"^{name}:"):
        tiny.trainer(tmp_path, **changes)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("value_learning_rate", float("nan")),
        ("value_learning_rate", -1e-3),
        ("missing_eos_penalty", float("nan")),
        ("generation_kwargs", {"top_kk": 5}),
    ],
)
def test_numbers_that_are_none_and_misspelt_names_are_refused(name: str, value: Any, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=rf"^{name}:"):
        tiny.trainer(tmp_path, **{name: value})


@pytest.mark.parametrize(
    ("algorithm", "name", "value"),
    [
        ("klq", "cliprange", 0.1),
        ("klq", "whiten_advantages", False),
        ("ppo", "loss_type", "huber"),
        ("ppo", "alpha", 0.5),
    ],
)
def test_arguments_of_the_other_algorithm_are_warned_of(algorithm: str, name: str, value: Any, tmp_path: Path) -> None:
    with pytest.warns(UserWarning, match=f"{name}: has no effect on algorithm='{algorithm}'"):
        tiny.arguments(tmp_path, algorithm=algorithm, **{name: value})


def test_the_best_model_is_the_one_with_the_highest_reward(tmp_path: Path) -> None:
    best = tiny.arguments(
        tmp_path, load_best_model_at_end=True, eval_strategy="steps", save_strategy="steps", eval_steps=4, save_steps=4
    )
    assert (best.metric_for_best_model, best.greater_is_better) == ("reward", True)


def test_a_policy_that_nothing_trains_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"^model: is frozen"):
        tiny.trainer(tmp_path, {"model": tiny.model().requires_grad_(False)})
    quantised = tiny.model()
    quantised.is_quantized = True
    with pytest.raises(ValueError, match=r"^model: is quantised"):
        tiny.trainer(tmp_path, {"model": quantised})


def test_an_optimiser_without_the_value_function_is_refused(tmp_path: Path) -> None:
    model = tiny.model()
    optimizer = torch.optim.AdamW(model.parameters())
    with pytest.raises(ValueError, match=r"^optimizers: holds no head.weight"):
        tiny.trainer(tmp_path, {"model": model, "optimizers": (optimizer, None)})


def test_a_rollout_function_must_return_completions(tmp_path: Path) -> None:
    run = tiny.trainer(tmp_path, {"rollout_func": lambda prompts, trainer: ["text"] * len(prompts)})
    with pytest.raises(ValueError, match="rollout_func: must return Completions, got list"):
        run.train()


@pytest.mark.parametrize(
    ("completions", "message"),
    [
        ({"completion_ids": "text"}, "completion_ids: must be a list"),
        ({"completion_ids": [5, 6]}, r"completion_ids\[0\]: must be a list"),
        ({"truncated": [None, True]}, r"truncated\[0\]: must hold bools"),
        ({"trained": [[True], [1, 2]]}, r"trained\[1\]: must hold bools"),
        ({"logprobs": [[-1.0], [-1.0, None]]}, r"logprobs\[1\]: must hold numbers"),
        ({"logprobs": [-1.0, -2.0]}, r"logprobs\[0\]: must be a list"),
    ],
)
def test_completions_of_another_kind_are_refused_by_name(completions: dict[str, Any], message: str) -> None:
    given = Completions(**{"completion_ids": [[5], [6, 7]], **completions})
    with pytest.raises(ValueError, match=f"^rollout_func: {message}"):
        check_completions(given, [[3], [4]], {tiny.EOS}, tiny.VOCAB)


def test_a_samplers_numbers_count_at_trained_tokens_alone() -> None:
    given: list[Any] = [[[5, 6]], None, None, torch.tensor([[1, 0]]), [[torch.tensor(-1.0), None]]]
    found = check_completions(Completions(*given), [[3]], {tiny.EOS}, tiny.VOCAB)
    assert found.sampler_logprobs is not None
    assert found.sampler_logprobs.tolist() == [-1.0]
    assert found.sequences[0].trained.tolist() == [True, False]


def test_batches_are_divided_where_positions_run_out() -> None:
    """Each continuation fits, and the longest of a batch behind its longest prefix would not."""
    config = GPT2Config(vocab_size=tiny.VOCAB, n_positions=17, n_embd=32, n_layer=1, n_head=2, eos_token_id=tiny.EOS)
    settings = GenerationConfig(do_sample=True, eos_token_id=tiny.EOS, pad_token_id=tiny.PAD)
    prefixes, most = [[5] * n for n in (5, 16, 9, 6)], [12, 1, 8, 11]
    for model, positions in ((GPT2LMHeadModel(config), 17), (tiny.model(), None)):
        found = continued(
            model.eval(), prefixes, most, settings, device=torch.device("cpu"), positions=positions
        )  # fmt: skip
        assert all(0 < len(ids) <= n for ids, n in zip(found, most, strict=True))


def test_completions_may_be_tensors_and_arrays() -> None:
    ids, truncated, trained = [[5, 6], [7, 1]], [True, False], [[True, False], [True, True]]
    logprobs, ages = [[-1.0, -2.0], [-1.0, -2.0]], [0.0, 1.0]
    lists = Completions(ids, None, truncated, trained, logprobs, ages)
    tensors: list[Any] = [torch.tensor(ids), None, np.array(truncated), tuple(map(torch.tensor, trained))]
    tensors += [np.array(logprobs), torch.tensor(ages)]
    found = [check_completions(c, [[3], [4]], {tiny.EOS}, tiny.VOCAB) for c in (Completions(*tensors), lists)]
    assert repr(found[0]) == repr(found[1])


@pytest.mark.parametrize(
    "settings", [{"return_dict_in_generate": True}, {"stop_strings": ["a"]}, {"prompt_lookup_num_tokens": 2}]
)
def test_settings_that_generate_cannot_sample_by_are_refused_by_name(settings: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"^generation_kwargs: generate fails with them"):
        tiny.trainer(tmp_path, generation_kwargs=settings)
    tiny.trainer(tmp_path, generation_kwargs={"min_new_tokens": 4, "top_k": 3}, max_steps=1).train()


def test_completions_without_a_token_are_no_error(tmp_path: Path) -> None:
    run = tiny.trainer(
        tmp_path, {"rollout_func": lambda prompts, trainer: Completions([[]] * len(prompts))}, max_steps=4
    )
    run.train()
    assert tiny.losses(run) == [0.0]


# ---- the small parts ------------------------------------------------------------------------------------------------


def test_episodes_set_the_steps(tmp_path: Path) -> None:
    config = tiny.arguments(
        tmp_path, total_episodes=100, per_device_train_batch_size=4, num_mini_batches=2, max_steps=-1
    )
    assert (config.rollouts_per_device, config.steps_per_cycle) == (8, 8)
    assert config.max_steps == 13 * 8
    assert config.logging_steps == 8
    assert KLQConfig(**json.loads(json.dumps({"output_dir": str(tmp_path), "tau": 0.1, "use_cpu": True}))).tau == 0.1


@pytest.mark.parametrize("size", [3, 8, 20])
def test_every_cycle_is_a_whole_batch_and_an_epoch_sees_every_prompt(size: int) -> None:
    sampler = CycleSampler(size, per_cycle=8, seed=1)
    assert sampler.cycles == -(-size // 8)
    first, second = ([sampler.of(e * sampler.cycles + i) for i in range(sampler.cycles)] for e in (0, 1))
    assert all(len(cycle) == 8 for cycle in first + second)
    assert {i for cycle in first for i in cycle} == {i for cycle in second for i in cycle} == set(range(size))
    assert first != second


def test_epochs_are_shuffled_differently_in_training(tmp_path: Path) -> None:
    seen: list[list[str]] = []
    run = tiny.trainer(tmp_path, {"train_dataset": tiny.prompts(16)}, max_steps=4, num_update_epochs=1)

    def record(prompts: list[str], trainer: KLQTrainer) -> Completions:
        seen.append(prompts)
        return Completions([[5, tiny.EOS]] * len(prompts))

    run.rollout_func = record
    run.train()
    first, second = seen[0] + seen[1], seen[2] + seen[3]
    assert sorted(first) == sorted(second)
    assert first != second


def test_a_plan_takes_every_sequence_once_per_epoch() -> None:
    plan = Plan.shuffled(epochs=2, mini_batches=3, accumulation=2, size=4, seed=0)
    assert plan.indices.shape == (6, 2, 4)
    for epoch in plan.indices.reshape(2, 24):
        assert sorted(epoch.tolist()) == list(range(24))
    rows = torch.arange(24)
    assert plan.rows_per_step(rows).reshape(2, 3).sum(1).tolist() == [rows.sum()] * 2


def test_means_are_true_means() -> None:
    from accelerate import Accelerator

    means = Means()
    means.add({"x": torch.tensor(1.0)}, 1)
    means.add({"x": 4.0, "y": 2.0}, 3)
    means.add({"x": float("nan"), "z": float("nan")}, 0)
    assert means.drain(Accelerator(cpu=True)) == {"x": 3.25, "y": 2.0}
    assert means.drain(Accelerator(cpu=True)) == {}


def test_streams_of_random_numbers_differ() -> None:
    seeds = {derived_seed(s, p, c, r) for s in (0, 1) for p in Purpose for c in range(3) for r in range(2)}
    assert len(seeds) == 2 * len(Purpose) * 3 * 2
    assert len(Purpose.__members__) == len(Purpose)  # no two share a value
    assert derived_seed(0, Purpose.ROLLOUT, 2) != derived_seed(0, Purpose.ROLLOUT, 2, 0)
    assert derived_seed(0, Purpose.ROLLOUT, 1, 0) == derived_seed(0, Purpose.ROLLOUT, 1, 0)


def test_until_eos() -> None:
    assert until_eos([5, 1, 0, 0], {1}) == [5, 1]
    assert until_eos([5, 6], {1}) == [5, 6]


HEALTHY = {
    "loss": 0.1, "objective/kl": 1.0, "objective/scores": 0.5, "objective/scores_std": 0.2,
    "completions/mean_length": 20.0,
    "completions/truncated": 0.1, "loss/residual_rms": 0.3, "policy/entropy_avg": 1.0, "val/explained_variance": 0.5,
}  # fmt: skip


@pytest.mark.parametrize(
    ("name", "sick"),
    [
        ("", {}),
        ("KL explosion", {"objective/kl": 50.0}),
        ("KL collapse", {"objective/kl": 0.0}),
        ("value divergence", {"val/explained_variance": -3.0, "loss/residual_rms": 0.5}),
        ("", {"val/explained_variance": -3.0}),
        ("length collapse", {"completions/mean_length": 1.5}),
        ("no score gets through", {"completions/truncated": 0.99}),
        ("entropy collapse", {"policy/entropy_avg": 0.001}),
        ("not a number", {"loss": float("nan")}),
        ("reward hacking?", {"completions/mean_length": 128.0, "objective/scores": 0.9}),
    ],
)
def test_failures_are_recognised_once(
    name: str, sick: dict[str, float], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    watch = FailureWatch(tiny.arguments(tmp_path, bootstrap_truncated=True, max_completion_length=128))
    run = tiny.trainer(tmp_path)
    for step in range(20):
        logs = {**HEALTHY, "objective/kl": 1.0 + step / 10} if step < 4 else {**HEALTHY, **sick}
        if name == "KL explosion":
            logs["objective/kl"] += step
        watch.on_log(run.args, run.state, run.control, logs)
    assert list(watch.warned) == ([name] if name else [])
    assert len([r for r in caplog.records if r.name.endswith("callbacks")]) == bool(name)


@pytest.mark.parametrize("algorithm", ["klq", "ppo"])
def test_a_run_that_diverges_is_noticed(algorithm: str, tmp_path: Path) -> None:
    run = tiny.trainer(tmp_path, algorithm=algorithm, learning_rate=1e25, max_steps=4)
    run.train()
    watch = next(c for c in run.callback_handler.callbacks if isinstance(c, FailureWatch))
    assert "not a number" in watch.warned
