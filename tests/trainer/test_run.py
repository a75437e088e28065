"""``klq train``: where a value comes from, what a run leaves behind, and that an interrupted one goes on."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import held_out_process
import pytest
import tiny
import torch
from material import REWARD, TINY
from processes import TWO_PROCESSES, start
from rich.progress import Progress
from transformers.utils import logging
from typer.testing import CliRunner

from klq_kernels.commands.cli import app
from klq_kernels.commands.train import run
from klq_kernels.commands.train.arguments import ScriptArguments, parse
from klq_kernels.commands.train.held_out import win_rate
from klq_kernels.commands.train.plots import plot_run
from klq_kernels.commands.train.run import load_function
from klq_kernels.lab.tasks import load_task, warm_started
from klq_kernels.trainer import KLQConfig
from klq_kernels.trainer.relatives import CYCLES, OREOConfig, VinePPOConfig


def write(path: Path, text: str) -> Path:
    path.write_text(text)
    return path


# Arguments


def test_a_flag_wins_over_the_file_and_the_file_over_the_recipe(tmp_path: Path):
    file = write(
        tmp_path / "run.yaml", "task: arithmetic\ntau: 0.2\nlam: 0.5\nlearning_rate: 1e-5\nvalue_model: null\n"
    )
    arguments, config = parse(file, ["--lam", "0.7", "--save-steps", "7"])
    assert (config.lam, config.tau, config.learning_rate, config.save_steps) == (0.7, 0.2, 1e-5, 7)
    assert config.max_completion_length == load_task("arithmetic").max_completion_length  # the recipe's
    assert (arguments.task, arguments.value_model) == ("arithmetic", None)


def test_values_of_a_file_are_read_as_flags_would_be(tmp_path: Path):
    file = write(
        tmp_path / "run.yaml",
        "model: m\ndataset: d\nreward_function: [a:b, c:d]\nlora_target_modules: q_proj\ngamma: '1'\n"
        "bootstrap_truncated: false\ngeneration_kwargs: {top_k: 5}\nuse_cpu: true\n",
    )
    arguments, config = parse(file, [])
    assert arguments.reward_function == ["a:b", "c:d"]
    assert arguments.lora_target_modules == ["q_proj"]
    assert config.gamma == 1.0
    assert not config.bootstrap_truncated
    assert config.generation_kwargs == {"top_k": 5}


@pytest.mark.parametrize(
    ("text", "flags", "steps"),
    [
        ("", ["--max-steps=10"], 10),
        ("max_steps: 10", [], 10),
        ("", ["--num_train_epochs", "3"], -1),
        ("", ["--total_episodes", "64"], 4),
        ("", [], 480),
    ],
)
def test_a_length_of_the_run_that_was_given_replaces_the_recipes(
    tmp_path: Path, text: str, flags: list[str], steps: int
):
    _, config = parse(write(tmp_path / "run.yaml", text), ["--task", "arithmetic", *flags])
    assert config.max_steps == steps


@pytest.mark.parametrize(
    ("text", "flags", "words"),
    [
        ("learning_rat: 1", [], r"unknown key 'learning_rat'; did you mean learning_rate\?"),
        ("", ["--taus", "1"], r"--taus: unknown argument; did you mean --tau\?"),
        ("tau: fast", ["--task", "constant"], "tau.*invalid float"),
        ("tau: [1, 2]", [], "tau takes one value"),
        ("tau: null", [], "tau cannot be null"),
        ("tau: -1", ["--task", "constant"], "tau"),
        (
            "max_steps: 10",
            ["--task", "constant", "--total_episodes", "64"],
            "total_episodes: sets max_steps, here to 4",
        ),
        ("auto_find_batch_size: true", ["--task", "constant"], "auto_find_batch_size: has no effect"),
        ("", ["--task", "constant", "--per_device_eval_batch_size", "4"], "rollout_forward_batch_size"),
        ("- 1", [], "must hold names and values"),
        ("a: [", [], "cannot read"),
        ("", ["--task", "chess"], "task: must be one of"),
        ("", ["--task", "constant", "--dataset", "x"], "dataset: is not used"),
        ("", ["--model", "m"], "dataset: is needed"),
        ("", ["--model", "m", "--dataset", "d"], "reward_function is needed"),
        ("", ["--task", "constant", "--max_samples", "0"], "max_samples: must be at least 1"),
        ("", [], "model: is needed"),
    ],
)
def test_bad_arguments_are_named(tmp_path: Path, text: str, flags: list[str], words: str):
    with pytest.raises(ValueError, match=words):
        parse(write(tmp_path / "run.yaml", text), flags)


def test_the_algorithm_brings_its_options(tmp_path: Path):
    """From a flag or the file; settings of a value function leave the recipe where the algorithm has none."""
    file = write(tmp_path / "run.yaml", "algorithm: oreo\nkl_coef: 0.2\ntask: arithmetic\n")
    arguments, config = parse(file, [])
    assert isinstance(config, OREOConfig)
    assert (config.kl_coef, config.tau, arguments.value_model) == (0.2, 0.03, "copy")
    arguments, config = parse(None, ["--task", "arithmetic", "--algorithm=vineppo", "--mc_samples", "3"])
    assert isinstance(config, VinePPOConfig)
    assert (config.mc_samples, arguments.value_model, config.value_learning_rate) == (3, None, None)
    assert type(parse(None, ["--task", "arithmetic", "--algorithm", "ppo"])[1]) is KLQConfig
    with pytest.raises(ValueError, match="algorithm: must be one of klq, ppo, oreo, tbrm, vineppo, qsharp; got 'dpo'"):
        parse(None, ["--task", "arithmetic", "--algorithm", "dpo"])
    with pytest.raises(ValueError, match="--kl_coef: unknown argument"):
        parse(None, ["--task", "arithmetic", "--kl_coef", "1"])
    shown = CliRunner().invoke(app, ["train", "--algorithm", "vineppo", "--help"])
    assert "--mc_samples" in shown.output


def test_a_missing_file_is_named(tmp_path: Path):
    with pytest.raises(ValueError, match=r"nowhere\.yaml"):
        parse(tmp_path / "nowhere.yaml", [])


def test_the_example_is_understood():
    arguments, config = parse(Path(__file__).parents[2] / "examples" / "train_klq.yaml", ["--use_cpu", "--bf16", "no"])
    assert arguments.dataset_kind == "tldr"
    assert config.rollouts_per_device == 48


def test_reward_functions_are_found_in_files_and_packages(tmp_path: Path):
    file = write(tmp_path / "mine.py", REWARD)
    assert load_function(f"{file}:even")([[0, 2]]) == [0.25]
    assert load_function("json:dumps") is json.dumps
    for name in (f"{file}:odd", "no.such.module:f", "nothing", str(tmp_path / "no.py:f")):
        with pytest.raises(ValueError, match="reward_function"):
            load_function(name)


def test_the_command_lists_its_arguments_and_complains_in_one_line():
    shown = CliRunner().invoke(app, ["train", "--help"])
    assert shown.exit_code == 0
    assert all(name in shown.output for name in ("--task", "--tau", "--lora_rank", "--output_dir"))
    assert "--hub_token" not in shown.output  # transformers' own are documented there
    assert "--use_cpu False" in " ".join(shown.output.split())
    assert not parse(None, ["--task", "constant", "--use_cpu", "False"])[1].use_cpu
    failed = CliRunner().invoke(app, ["train", "--task", "constant", "--taus", "1"])
    assert isinstance(failed.exception, ValueError)


# Runs


def train(flags: list[str]) -> dict[str, dict[str, float]]:
    return run.run(*parse(None, flags))


def test_a_run_leaves_model_history_picture_and_summary(material: list[str], tmp_path: Path):
    results = train(
        [*material, "--output_dir", str(tmp_path), "--max_steps", "2", "--eval_size", "4", "--lora_rank", "2"]
    )
    assert {"reward", "kl", "length"} <= results["after"].keys()
    assert results["before"]["kl"] == pytest.approx(0.0, abs=1e-5)
    assert json.loads((tmp_path / "summary.json").read_text()) == results
    history = json.loads((tmp_path / "history.json").read_text())
    assert sum("objective/scores" in logs for logs in history) == 2
    assert (tmp_path / "training.png").stat().st_size > 10_000
    assert (tmp_path / "final" / "adapter_config.json").exists()


def test_demonstrations_come_from_a_file(material: list[str], tmp_path: Path):
    file = write(tmp_path / "shown.jsonl", json.dumps({"prompt": "ab", "completion": "bd"}) + "\n")
    flags = [*material, "--output_dir", str(tmp_path), "--max_steps", "4", "--off_policy", "retrace"]
    train([*flags, "--replay_cycles", "2", "--demonstrations", str(file)])
    history = json.loads((tmp_path / "history.json").read_text())
    scores = [logs["demonstrations/scores"] for logs in history if "demonstrations/scores" in logs]
    assert scores == [tiny.even([[*tiny.tokenizer()("bd").input_ids, tiny.EOS]])[0]] * 2
    with pytest.raises(ValueError, match=r"^demonstrations: there is no file"):
        train([*flags, "--resume", "--replay_cycles", "2", "--demonstrations", str(tmp_path / "none.jsonl")])


def test_a_guide_is_trained_for_a_model_that_stays(material: list[str], tmp_path: Path):
    flags = [
        *material[: -len(TINY)], "--algorithm", "qsharp", "--output_dir", str(tmp_path), "--rounds", "2",
        "--steps_per_round", "2", "--samples_per_prompt", "2", "--max_completion_length", "6", "--eval_size", "4",
        "--per_device_train_batch_size", "4", "--logging_steps", "1", "--save_steps", "2", "--use_cpu",
    ]  # fmt: skip
    results = train(flags)
    assert {"reward", "ref_reward", "kl", "auroc"} <= results["after"].keys()
    assert results["before"]["kl"] == 0.0
    history = json.loads((tmp_path / "history.json").read_text())
    assert sum("guide/reward" in logs for logs in history) == 4
    assert (tmp_path / "training.png").stat().st_size > 10_000
    assert (tmp_path / "final" / "guide.json").exists()
    again = train([*flags, "--resume", "True", "--guide", str(tmp_path / "final")])
    assert again["after"] == pytest.approx(results["after"])


def test_arguments_of_another_algorithm_are_refused(tmp_path: Path):
    for flags in (["--tau", "1"], ["--value_model", "copy"], ["--lora_rank", "2"], ["--demonstrations", "d"]):
        name = flags[0].removeprefix("--")
        with pytest.raises(ValueError, match=f"^(--)?{name}: "):
            parse(None, ["--task", "constant", "--algorithm", "qsharp", *flags])
    file = write(tmp_path / "run.yaml", "task: arithmetic\nalgorithm: qsharp\nrounds: 3\n")
    arguments, config = parse(file, ["--eta", "0.5"])
    assert (type(arguments).__name__, config.rounds, config.eta) == ("GuideArguments", 3, 0.5)
    shown = CliRunner().invoke(app, ["train", "--algorithm", "qsharp", "--help"])
    assert all(name in shown.output for name in ("--samples_per_prompt", "--guide", "--eta"))


@pytest.mark.parametrize("algorithm", [*CYCLES])
def test_relatives_run_too(algorithm: str, material: list[str], tmp_path: Path):
    flags = ["--algorithm", algorithm, "--output_dir", str(tmp_path), "--max_steps", "2"]
    train([*material, *flags, "--bootstrap_truncated", "False"])
    history = json.loads((tmp_path / "history.json").read_text())
    assert sum("objective/scores" in logs for logs in history) == 2
    assert {"training.png", "final", "history.json"} <= {path.name for path in tmp_path.iterdir()}


def test_a_launcher_starts_it_on_two_processes(material: list[str], tmp_path: Path):
    flags = ["--output_dir", str(tmp_path), "--max_steps", "2", "--eval_size", "4"]
    start([*TWO_PROCESSES, "-m", "klq_kernels", "train", *material, *flags])
    history = json.loads((tmp_path / "history.json").read_text())
    assert [logs["episode"] for logs in history if "objective/scores" in logs] == [8, 16]
    assert (tmp_path / "final" / "model.safetensors").exists()


@pytest.mark.usefixtures("one_thread")
def test_held_out_prompts_are_shared_by_two_processes(tmp_path: Path):
    """Also where there are fewer prompts than processes, and where no process can run the model alone."""
    start([*TWO_PROCESSES, held_out_process.__file__, str(tmp_path / "found.json")])
    found = json.loads((tmp_path / "found.json").read_text())
    alone = held_out_process.build(str(tmp_path))
    for number in held_out_process.NUMBERS:
        expected = held_out_process.held_out(alone, number)
        for weights in ("whole", "sharded"):
            assert found[weights][number]["answers"] == expected["answers"]
            assert found[weights][number]["metrics"] == pytest.approx(expected["metrics"], rel=1e-4, abs=1e-5)
    assert [found["whole"][number]["sampled"] for number in held_out_process.NUMBERS] == [1, 2, 3]


def test_resume_goes_on_from_the_last_checkpoint(material: list[str], tmp_path: Path):
    def history(name: str) -> list[dict[str, Any]]:
        content = json.loads((tmp_path / name / "history.json").read_text())
        return [logs for logs in content if "objective/scores" in logs]

    common = [*material, "--save_steps", "2", "--value_model", "copy", "--resume"]
    train([*common, "--output_dir", str(tmp_path / "whole"), "--max_steps", "4"])
    train([*common, "--output_dir", str(tmp_path / "parts"), "--max_steps", "2"])
    train([*common, "--output_dir", str(tmp_path / "parts"), "--max_steps", "4"])
    assert [logs["step"] for logs in history("parts")] == [1, 2, 3, 4]
    for name in ("objective/scores", "objective/kl", "loss"):
        assert [logs[name] for logs in history("parts")] == [logs[name] for logs in history("whole")]


def test_a_folder_that_cannot_be_used_is_refused_before_any_work(
    material: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """One that cannot be written into; and one with checkpoints, which a later --resume could take for this run's."""
    flags = [*material, "--output_dir", str(tmp_path / "out"), "--max_steps", "1"]
    train(flags)
    monkeypatch.setattr(run, "build_trainer", lambda *_: pytest.fail("work has begun"))
    with pytest.raises(ValueError, match=r"^output_dir: .*out holds checkpoints of another run: pass --resume to go"):
        train(flags)
    with pytest.raises(ValueError, match=r"^output_dir: cannot write into .*a_file as a folder: File exists"):
        train([*material, "--output_dir", str(write(tmp_path / "a_file", ""))])


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--dataset", "no.jsonl"], "^dataset: there is no file or folder no.jsonl"),
        (["--dataset_split", "test"], "^dataset_split: a single file has only 'train'"),
        (["--dataset_split", "train[?]"], "^dataset_split: cannot take 'train.*Unrecognized"),
        (["--eval_split", "test"], "^eval_split: a single file has only 'train'"),
        (["--dataset_name", "main"], "^dataset_name: the file prompts.jsonl has no configurations"),
        (["--dataset_kind", "dpo"], "^dataset_kind: must be one of"),
        (["--dataset_kind", "hh"], "^dataset_kind: 'hh' needs a column chosen, .* choose kind 'prompt'"),
    ],
)
def test_prompts_that_cannot_be_loaded_are_named_by_their_flag(material: list[str], flags: list[str], words: str):
    with pytest.raises(ValueError, match=words):
        run.load_data(parse(None, [*material, *flags])[0])


def test_several_flags_that_may_be_wrong_are_all_named(material: list[str], monkeypatch: pytest.MonkeyPatch):
    def unreachable(*_: Any, **__: Any) -> None:
        raise ConnectionError("name: no network")

    monkeypatch.setattr("datasets.load_dataset", unreachable)
    with pytest.raises(ValueError, match=r"^dataset, dataset_split or dataset_name: cannot load.*: name: no network$"):
        run.load_data(parse(None, [*material, "--dataset", "some/set"])[0])


@pytest.mark.parametrize("name", ["model", "ref_model", "value_model"])
def test_a_model_that_cannot_be_loaded_is_named(material: list[str], tmp_path: Path, name: str):
    with pytest.raises(ValueError, match=f"^{name}: cannot load .*nowhere"):
        train([*material, f"--{name}", str(tmp_path / "nowhere")])


def test_models_are_trained_in_fp32_whatever_they_are_stored_in(material: list[str], tmp_path: Path):
    tiny.model().bfloat16().save_pretrained(tmp_path)
    tiny.tokenizer().save_pretrained(tmp_path)
    built = run.build_trainer(*parse(None, [*material, "--model", str(tmp_path), "--value_model", "copy"]))
    assert {p.dtype for p in built.actor_critic.parameters()} == {torch.float32}


def test_long_prompts_are_left_out_of_both_sets(material: list[str], tmp_path: Path):
    cut = ["--output_dir", str(tmp_path), "--max_prompt_length", "4", "--drop_long_prompts", "--eval_size", "8"]
    built = run.build_trainer(*parse(None, [*material, *cut]))
    for prompts in (built.train_dataset, built.eval_dataset):
        assert {len(row["prompt"]) for row in prompts} == {2, 4}


def test_an_interrupted_run_shows_what_it_has_done(material: list[str], tmp_path: Path):
    stopping = [flag.replace(":even", ":stops") for flag in material]
    with pytest.raises(KeyboardInterrupt):
        train([*stopping, "--output_dir", str(tmp_path), "--max_steps", "9"])
    assert len(json.loads((tmp_path / "history.json").read_text())) == 2
    assert (tmp_path / "training.png").exists()
    assert not (tmp_path / "final").exists()


def test_a_model_is_saved_before_it_is_measured(material: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def measure(self: run.HeldOut, when: str) -> None:
        if when == "after":
            raise ConnectionError("the judge is down")

    monkeypatch.setattr(run.HeldOut, "measure", measure)
    with pytest.raises(ConnectionError):
        train([*material, "--output_dir", str(tmp_path), "--max_steps", "1"])
    assert (tmp_path / "final" / "model.safetensors").exists()


def test_a_task_brings_all_it_needs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.setattr(run, "warm_started", lambda task, cache, progress: task.build_model())
    sizes = ["--total_episodes", "8", "--eval_size", "3", "--num_mini_batches", "1"]
    results = train(["--task", "arithmetic", "--output_dir", str(tmp_path), *TINY, *sizes])
    assert 0 <= results["after"]["win_rate"] <= 1
    said = [line.partition("━")[0].strip() for line in capsys.readouterr().out.splitlines()]
    answered, evaluated = "Held-out prompts: completions for the judge", "Held-out prompts: evaluation"
    expected = [answered, f"{evaluated} before training", answered, f"{evaluated} after training", answered]
    assert [line for line in said if line.startswith("Held-out prompts:")] == expected


def test_bars_show_how_far_an_evaluation_is(material: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    seen: list[tuple[str, float | None]] = []

    def advance(progress: Progress, task: Any) -> None:
        seen.append((progress.tasks[task].description, progress.tasks[task].total))

    monkeypatch.setattr(run.Progress, "advance", advance)
    sizes = ["--eval_size", "5", "--rollout_forward_batch_size", "2", "--max_steps", "1"]
    train([*material, "--output_dir", str(tmp_path), *sizes])
    assert seen == [(f"evaluation {when} training", 3) for when in ("before", "after") for _ in range(3)]


def test_bars_of_transformers_are_off_for_the_whole_command(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    """The warm start, a checkpoint and the final model are saved, and one of them is loaded."""

    def briefly(task: Any, cache: Path, progress: Any) -> Any:
        for _ in range(2):
            model = warm_started(task, steps=1, cache=cache)
        return model

    monkeypatch.setattr(run, "warm_started", briefly)
    sizes = ["--total_episodes", "8", "--num_mini_batches", "1", "--save_steps", "1", "--eval_size", "3"]
    assert logging.is_progress_bar_enabled()
    train(["--task", "arithmetic", "--output_dir", str(tmp_path), *TINY, *sizes])
    assert logging.is_progress_bar_enabled()
    assert (tmp_path / "final" / "model.safetensors").exists()
    assert "%|" not in capsys.readouterr().err


def test_bars_that_were_off_stay_off():
    logging.disable_progress_bar()
    try:
        with run.no_other_bars():
            assert not logging.is_progress_bar_enabled()
        assert not logging.is_progress_bar_enabled()
    finally:
        logging.enable_progress_bar()


def test_win_rate_counts_ties_half():
    task = load_task("arithmetic")
    rows = [{"prompt": "1+2+3=", "rest": "3+3", "answer": 6}] * 2
    assert win_rate(task, rows, ["3+3=6", "6"], ["6", "6"]) == 0.75
    assert win_rate(task, rows, ["6", "6"], ["3+3=6", "3+3=6"]) == 0.0


def test_the_picture_needs_one_log_and_skips_what_is_none(tmp_path: Path):
    names = "objective/scores objective/kl policy/entropy_avg val/explained_variance completions/mean_length".split()
    plot_run([{"eval_reward": 1.0}, {"step": 1, **dict.fromkeys(names, 0.5)}], tmp_path / "one.png", tau=0.05)
    assert (tmp_path / "one.png").read_bytes()[:4] == b"\x89PNG"


def test_numbers_of_arguments_are_checked():
    with pytest.raises(ValueError, match="lora_rank"):
        ScriptArguments(task="constant", lora_rank=-1)
