"""What all trainers share: checkpoints written over others, means of one run, and the ways in which data are read."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from peft import LoraConfig
from transformers import TrainerCallback

from klq_kernels.trainer import DPOConfig, KLQConfig, KLQTrainer, QSharpConfig, last_complete_checkpoint
from klq_kernels.trainer.base import BaseTrainer
from klq_kernels.trainer.callbacks import FailureWatch
from klq_kernels.trainer.qsharp.examples import Example, Examples
from klq_kernels.trainer.qsharp.quality import auroc
from klq_kernels.trainer.resuming import set_aside

SAVING: dict[str, Any] = {"save_strategy": "steps", "save_steps": 2, "watch_failures": False}


class Killed(KLQTrainer):
    """Dies between the weights and the optimiser of a checkpoint."""

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        raise KeyboardInterrupt


def test_a_checkpoint_half_written_over_another_is_not_complete(tmp_path: Path) -> None:
    tiny.trainer(tmp_path, max_steps=2, **SAVING).train()
    assert last_complete_checkpoint(tmp_path) is not None
    killed = Killed(
        tiny.model(seed=5), tiny.even, tiny.arguments(tmp_path, max_steps=2, **SAVING), tiny.prompts(),
        processing_class=tiny.tokenizer(),
    )  # fmt: skip
    with pytest.raises(KeyboardInterrupt):
        killed.train()
    assert last_complete_checkpoint(tmp_path) is None


def test_what_another_run_left_in_a_checkpoint_is_gone(tmp_path: Path) -> None:
    tiny.trainer(tmp_path, max_steps=2, num_update_epochs=4, **SAVING).train()
    folder = tmp_path / "checkpoint-2"
    assert (folder / "experience_0.pt").exists()
    (folder / "experience_7.pt").touch()
    tiny.trainer(tmp_path, max_steps=2, num_update_epochs=2, **SAVING).train()
    assert not list(folder.glob("experience_*"))
    resumed = tiny.trainer(tmp_path, max_steps=4, num_update_epochs=2, **SAVING)
    resumed.train(resume_from_checkpoint=True)
    assert resumed.state.global_step == 4


def test_weights_alone_are_no_checkpoint_to_resume_from(tmp_path: Path) -> None:
    tiny.trainer(tmp_path, max_steps=2, **SAVING).train()
    tiny.trainer(tmp_path, max_steps=2, save_only_model=True, **SAVING).train()
    assert last_complete_checkpoint(tmp_path) is None


def test_a_run_does_not_log_what_the_run_before_has_left(tmp_path: Path) -> None:
    cycles = itertools.count(1)

    def reward(prompts: list[str], **_: Any) -> list[float]:
        return [100.0 if next(cycles) == 3 else 0.0] * len(prompts)

    trainer = tiny.trainer(
        tmp_path, {"reward_funcs": reward}, max_steps=3, logging_steps=2, num_update_epochs=1, watch_failures=False
    )
    trainer.train()
    trainer.train()
    assert [logs["objective/scores"] for logs in trainer.state.log_history if "objective/scores" in logs] == [0.0]


def test_a_rate_of_its_own_leaves_the_weight_decay_of_the_value_model(tmp_path: Path) -> None:
    def decay(**changes: Any) -> dict[str, float]:
        trainer = tiny.trainer(tmp_path, {"value_model": tiny.classifier(1)}, weight_decay=0.1, **changes)
        of = {id(p): g["weight_decay"] for g in trainer.create_optimizer().param_groups for p in g["params"]}
        return {name: of[id(p)] for name, p in trainer.actor_critic.named_parameters()}

    assert decay(value_learning_rate=1e-2) == decay()


class Counted(list):  # type: ignore[type-arg]
    reads = 0

    def __getitem__(self, i: Any) -> Any:
        self.reads += 1
        return super().__getitem__(i)


def test_each_prompt_of_a_cycle_is_read_once(tmp_path: Path) -> None:
    data = Counted(tiny.prompts())
    trainer = tiny.trainer(tmp_path, {"train_dataset": data}, max_steps=4, gradient_accumulation_steps=2)
    before = data.reads
    trainer.train()
    assert data.reads - before == 16


def test_a_run_that_skips_no_data_goes_on_with_the_same_prompts(tmp_path: Path) -> None:
    seen: list[list[str]] = []

    def reward(prompts: list[str], completion_ids: list[list[int]], **_: Any) -> list[float]:
        seen.append(prompts)
        return tiny.even(completion_ids)

    config = {"num_update_epochs": 1, "max_steps": 4, **SAVING}
    tiny.trainer(tmp_path, {"reward_funcs": reward}, **config).train()
    resumed = tiny.trainer(tmp_path, {"reward_funcs": reward}, ignore_data_skip=True, **config)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert seen[4:] == seen[2:4]


def test_the_price_of_kl_is_in_the_unit_of_the_scores(tmp_path: Path) -> None:
    def reward(completion_ids: list[list[int]], **_: Any) -> list[float]:
        return [1000 * x for x in tiny.even(completion_ids)]

    trainer = tiny.trainer(
        tmp_path, {"reward_funcs": reward}, max_steps=6, num_update_epochs=1, scale_rewards=True, learning_rate=3e-3
    )
    trainer.train()
    logs = [logs for logs in trainer.state.log_history if "objective/kl" in logs]
    for of in logs:
        price = trainer.args.tau * of["objective/reward_scale"]
        assert of["objective/non_score_reward"] == pytest.approx(-price * of["objective/kl"])
        assert of["objective/rlhf_reward"] == pytest.approx(of["objective/scores"] - price * of["objective/kl"])
    (watch,) = (c for c in trainer.callback_handler.callbacks if isinstance(c, FailureWatch))
    assert "scores out of scale" not in watch.warned


@pytest.mark.parametrize(("levels", "places"), [(2, 5), (7, 4), (40, 1000), (3, 1)])
def test_the_area_counts_all_pairs(levels: int, places: int) -> None:
    generator = torch.Generator().manual_seed(levels)
    rewards = torch.randint(levels, (60,), generator=generator) / 7.0
    predicted = torch.randint(places, (60,), generator=generator) / 3.0
    above = rewards[:, None] > rewards
    right = (predicted[:, None] > predicted) + 0.5 * (predicted[:, None] == predicted)
    assert auroc(predicted, rewards) == pytest.approx(float((right * above).sum() / above.sum()), abs=1e-6)


def test_examples_are_kept_as_they_were(tmp_path: Path) -> None:
    given = [Example([3, 4, i], [5] * (i + 1), i // 2, i / 10, 7 * i) for i in range(5)]
    examples = Examples()
    examples.add(given[:2])
    examples.add([])
    examples.add(given[2:])
    examples.save(tmp_path / "examples.pt")
    loaded = Examples.load(tmp_path / "examples.pt")
    assert (loaded.rounds, len(loaded)) == (3, 5)
    for kept in (examples, loaded):
        assert [kept[i] for i in range(5)] == given
        assert sorted(kept.draw([0, 1, 2, 3, 4], seed=1)) == sorted(given)


@pytest.mark.parametrize("config", [KLQConfig, QSharpConfig, DPOConfig])
def test_every_config_refuses_what_its_trainer_would_not_heed(config: type[Any], tmp_path: Path) -> None:
    refused: dict[str, Any] = {
        "chat_template_kwargs": {"tokenize": False},
        "accelerator_config": {"split_batches": True},
        "bf16_full_eval": True,
        "fp16_full_eval": True,
    }
    if config is not DPOConfig:
        refused |= {"train_sampling_strategy": "sequential", "dataloader_drop_last": True, "dataloader_num_workers": 1}
    for name, value in refused.items():
        with pytest.raises(ValueError, match=f"^{name}: "):
            config(str(tmp_path), use_cpu=True, report_to=[], **{name: value})


def test_episodes_are_those_of_all_processes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(KLQConfig, "world_size", property(lambda _: 2))
    with pytest.raises(ValueError, match=r"^total_episodes: was counted for 1 processes"):
        tiny.arguments(tmp_path, total_episodes=64, max_steps=-1)


def test_a_value_function_that_is_not_trained_has_no_loss(tmp_path: Path) -> None:
    trainer = tiny.trainer(
        tmp_path, {"value_model": tiny.classifier(1)}, max_steps=1, logging_steps=1, freeze_value_model=True
    )
    trainer.train()
    logs = next(logs for logs in trainer.state.log_history if "loss" in logs)
    assert not {"loss/value_avg", "val/clipfrac_avg"} & logs.keys()


def test_a_finished_run_that_is_resumed_takes_no_step(tmp_path: Path) -> None:
    options: dict[str, Any] = {"max_steps": 2, "lr_scheduler_type": "constant", **SAVING}
    finished = tiny.trainer(tmp_path, **options)
    finished.train()
    again = tiny.trainer(tmp_path, {"model": tiny.model(seed=5)}, **options)
    with pytest.warns(UserWarning, match="nothing is trained"):
        assert again.train(resume_from_checkpoint=True).global_step == 2
    for ours, theirs in zip(again.actor_critic.parameters(), finished.actor_critic.parameters(), strict=True):
        assert torch.equal(ours, theirs)
    assert [p.name for p in tmp_path.glob("checkpoint-*")] == ["checkpoint-2"]


def logged(trainer: KLQTrainer, name: str) -> list[tuple[int, Any]]:
    return [(logs["step"], logs[name]) for logs in trainer.state.log_history if name in logs]


def stopped(folder: Path, step: int, **changes: Any) -> KLQTrainer:
    """A run that fails after a step."""

    class Failure(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if state.global_step == step:
                raise ConnectionError("the machine is gone")

    return tiny.trainer(folder, {"callbacks": [Failure()]}, **changes)


LONG: dict[str, Any] = {"max_steps": 12, "save_strategy": "steps", "save_steps": 3}  # logs every fourth step


def test_a_run_that_goes_back_is_resumed_on_its_own_branch(tmp_path: Path) -> None:
    with pytest.raises(ConnectionError):
        stopped(tmp_path, 11, **LONG).train()
    with pytest.raises(ConnectionError), pytest.warns(UserWarning, match="further than step 3, where this one begins"):
        stopped(tmp_path, 8, learning_rate=0.1, **LONG).train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    assert last_complete_checkpoint(tmp_path) == str(tmp_path / "checkpoint-6")
    kept = {path.name for path in tmp_path.glob("*checkpoint-*")}
    assert kept == {"checkpoint-3", "checkpoint-6", "_earlier-checkpoint-6", "_earlier-checkpoint-9"}


def test_a_run_that_begins_anew_sets_the_checkpoints_of_another_aside(
    tmp_path: Path, recwarn: pytest.WarningsRecorder
) -> None:
    for number in range(3):
        tiny.trainer(tmp_path, max_steps=1, **SAVING).train()
        assert any("checkpoints of an earlier run" in str(w.message) for w in recwarn) == (number > 0)
    recwarn.clear()
    tiny.trainer(tmp_path, max_steps=2, **SAVING).train(resume_from_checkpoint=True)
    tiny.trainer(tmp_path, max_steps=3).train()  # which saves nothing, and so cannot be mistaken
    assert not any("checkpoints of an earlier run" in str(w.message) for w in recwarn)
    kept = {path.name for path in tmp_path.glob("*checkpoint-*")}
    assert kept == {"checkpoint-1", "checkpoint-2", "_earlier-checkpoint-1", "_earlier-checkpoint-1.1"}


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_a_resume_that_is_refused_or_has_nothing_to_do_leaves_the_folder_as_it_was(tmp_path: Path) -> None:
    tiny.trainer(tmp_path, log_completions=True, **LONG).train()
    before = contents(tmp_path)
    checkpoint = str(tmp_path / "checkpoint-6")
    with pytest.raises(ValueError, match=r"^resume_from_checkpoint: its optimizer"):
        tiny.trainer(tmp_path, log_completions=True, optim="sgd", **LONG).train(resume_from_checkpoint=checkpoint)
    with pytest.raises(ValueError, match=r"^resume_from_checkpoint: was written in the middle of a cycle"):
        tiny.trainer(tmp_path, log_completions=True, num_update_epochs=5, **LONG).train(
            resume_from_checkpoint=checkpoint
        )
    with pytest.warns(UserWarning, match="nothing is trained"):
        tiny.trainer(tmp_path, log_completions=True, **LONG | {"max_steps": 6}).train(resume_from_checkpoint=checkpoint)
    assert contents(tmp_path) == before


def test_a_branch_that_was_left_can_be_gone_back_to(tmp_path: Path) -> None:
    with pytest.raises(ConnectionError):
        stopped(tmp_path, 7, **LONG).train()
    with pytest.raises(ConnectionError):
        stopped(tmp_path, 8, learning_rate=0.1, **LONG).train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    with pytest.raises(ConnectionError):
        stopped(tmp_path, 8, **LONG).train(resume_from_checkpoint=str(tmp_path / "_earlier-checkpoint-6"))
    assert last_complete_checkpoint(tmp_path) == str(tmp_path / "checkpoint-3")
    kept = {path.name for path in tmp_path.glob("*checkpoint-*")}
    assert kept == {"checkpoint-3", "_earlier-checkpoint-6", "_earlier-checkpoint-6.1"}


def test_what_is_set_aside_names_the_best_checkpoint_as_it_is_called_then(tmp_path: Path) -> None:
    for step in (3, 6):
        (tmp_path / f"checkpoint-{step}").mkdir()
        state = {"global_step": step, "best_model_checkpoint": str(tmp_path / "checkpoint-6")}
        (tmp_path / f"checkpoint-{step}" / "trainer_state.json").write_text(json.dumps(state))
    (tmp_path / "checkpoint-9").mkdir()
    (tmp_path / "checkpoint-9" / "trainer_state.json").write_text("null")
    assert set_aside(tmp_path, 4) == ["_earlier-checkpoint-6"]
    state = json.loads((tmp_path / "_earlier-checkpoint-6" / "trainer_state.json").read_text())
    assert state["best_model_checkpoint"] == str(tmp_path / "_earlier-checkpoint-6")


def test_a_log_says_the_losses_of_all_its_steps_also_of_those_before_the_checkpoint(tmp_path: Path) -> None:
    whole = tiny.trainer(tmp_path / "whole", log_completions=True, gradient_accumulation_steps=2, **LONG)
    whole.train()
    with pytest.raises(ConnectionError):
        stopped(tmp_path / "stopped", 11, log_completions=True, gradient_accumulation_steps=2, **LONG).train()
    resumed = tiny.trainer(tmp_path / "stopped", log_completions=True, gradient_accumulation_steps=2, **LONG)
    resumed.train(resume_from_checkpoint=str(tmp_path / "stopped" / "checkpoint-6"))
    for name in ("loss", "objective/kl", "episode"):
        assert logged(resumed, name) == logged(whole, name), name
    rows = [(tmp_path / name / "completions.jsonl").read_text() for name in ("whole", "stopped")]
    assert rows[0] == rows[1]
    steps = [json.loads(row)["step"] for row in rows[0].splitlines()]
    assert steps == sorted(steps)
    assert set(steps) == {0, 4, 8}
    again = (tmp_path / "stopped" / "_earlier-completions.jsonl").read_text().splitlines()
    assert {json.loads(row)["step"] for row in again} == {8}


def test_the_loss_that_is_logged_is_transformers_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trainer = tiny.trainer(tmp_path, max_steps=4, logging_steps=3, gradient_accumulation_steps=2)
    theirs: list[float] = []
    own = BaseTrainer.log

    def log(self: Any, logs: dict[str, float], *rest: Any) -> None:
        theirs.extend([logs["loss"]] if "loss" in logs else [])
        own(self, logs, *rest)

    monkeypatch.setattr(BaseTrainer, "log", log)
    trainer.train()
    assert [loss for _, loss in logged(trainer, "loss")] == pytest.approx(theirs)


def test_episodes_are_counted_as_they_are_sampled(tmp_path: Path) -> None:
    with pytest.raises(ConnectionError):
        stopped(tmp_path, 5, **LONG | {"save_steps": 4}).train()
    resumed = tiny.trainer(tmp_path, per_device_train_batch_size=4, **LONG)
    resumed.train(resume_from_checkpoint=True)
    assert logged(resumed, "episode") == [(4, 8), (8, 12), (12, 16)]


def test_a_checkpoint_of_another_optimizer_or_of_adapters_is_refused_by_name(tmp_path: Path) -> None:
    tiny.trainer(tmp_path, max_steps=2, **SAVING).train()
    lora = LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM")
    refused: list[tuple[dict[str, Any], dict[str, Any], str]] = [
        ({}, {"optim": "sgd"}, "its optimizer is of another kind, without .*momentum"),
        ({}, {"value_learning_rate": 0.1}, "its optimizer or schedule does not fit .*value_learning_rate"),
        ({"peft_config": lora}, {}, r".* holds a whole model, and this run trains adapters"),
    ]
    for given, changes, message in refused:
        with pytest.raises(ValueError, match=f"^resume_from_checkpoint: {message}"):
            tiny.trainer(tmp_path, given, **{"max_steps": 4, **SAVING, **changes}).train(resume_from_checkpoint=True)
    tiny.trainer(tmp_path / "lora", {"peft_config": lora}, max_steps=2, **SAVING).train()
    with pytest.raises(ValueError, match=r"^resume_from_checkpoint: .* holds adapters \(peft_config\), and this run"):
        tiny.trainer(tmp_path / "lora", max_steps=4, **SAVING).train(resume_from_checkpoint=True)


def test_what_has_no_meaning_here_is_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(NotImplementedError, match=r"^predict: "):
        tiny.trainer(tmp_path).predict(tiny.prompts())
    for name, value in (("include_num_input_tokens_seen", "all"), ("accelerator_config", {"dispatch_batches": True})):
        with pytest.raises(ValueError, match=f"^{name}: "):
            tiny.arguments(tmp_path, **{name: value})
    tiny.arguments(tmp_path, include_num_input_tokens_seen=False)


def test_a_rate_may_fall_where_the_reward_stands_still(tmp_path: Path) -> None:
    trainer = tiny.trainer(
        tmp_path, {"eval_dataset": tiny.prompts(2)}, lr_scheduler_type="reduce_lr_on_plateau", eval_strategy="steps",
        eval_steps=2, max_steps=4,
    )  # fmt: skip
    trainer.train()
    assert trainer.args.greater_is_better


def test_a_checkpoint_of_another_model_is_refused_by_name(tmp_path: Path) -> None:
    tiny.trainer(tmp_path, max_steps=2, **SAVING).train()
    larger = tiny.trainer(tmp_path, {"model": tiny.model(num_hidden_layers=3)}, max_steps=4, **SAVING)
    with pytest.raises(ValueError, match=r"^resume_from_checkpoint: does not fit the model"):
        larger.train(resume_from_checkpoint=True)
    (tmp_path / "checkpoint-2" / "value_function.safetensors").unlink()
    with pytest.raises(ValueError, match=r"has no value_function\.safetensors"):
        tiny.trainer(tmp_path, max_steps=4, **SAVING).train(resume_from_checkpoint=True)
