"""The built-in tasks: honest rewards, judges of their own mind, disjoint splits, a warm start that keeps its word."""

from __future__ import annotations

import os
import random
from dataclasses import replace
from itertools import combinations, islice
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

pytest.importorskip("datasets")
pytest.importorskip("transformers")

from klq_kernels.lab.tasks import (
    TASKS,
    Case,
    Task,
    arithmetic,
    load_task,
    star_graph,
    summarize,
    warm_start,
    warm_started,
)

EVERY_TASK = pytest.mark.parametrize("task", [load_task(name) for name in TASKS], ids=TASKS)


pytestmark = pytest.mark.usefixtures("one_thread")


def rewards_of(task: Task, rows: list[tuple[Case, str]]) -> list[float]:
    """The summed rewards of completions, through the keywords that a trainer calls them with."""
    columns = {key: [case.columns[key] for case, _ in rows] for key in rows[0][0].columns}
    texts = [text for _, text in rows]
    prompts = [case.prompt for case, _ in rows]
    ids = [[0]] * len(rows)
    each = [f(prompts=prompts, completions=texts, completion_ids=ids, **columns) for f in task.reward_funcs]
    return [sum(scores) for scores in zip(*each, strict=True)]


def reward(task: Task, case: Case, completion: str) -> float:
    return rewards_of(task, [(case, completion)])[0]


# Every task


def test_tasks_are_found_by_name():
    assert TASKS == ("summarize", "constant", "arithmetic", "star-graph")
    assert [load_task(name).name for name in TASKS] == list(TASKS)
    with pytest.raises(
        ValueError, match="task: must be one of summarize, constant, arithmetic, star-graph, got 'chess'"
    ):
        load_task("chess")


@EVERY_TASK
def test_train_and_eval_share_no_prompt(task: Task):
    train, held_out = (task.dataset(split, 400) for split in ("train", "eval"))
    assert len(train) == len(held_out) == 400
    assert not set(train["prompt"]) & set(held_out["prompt"])
    assert not {e.prompt for e in islice(task.examples(), 400)} & set(held_out["prompt"])
    assert set(train.column_names) == {"prompt", *next(task.cases("train")).columns}


@EVERY_TASK
def test_the_same_seed_draws_the_same(task: Task):
    assert task.dataset("train", 20, seed=1).to_list() == task.dataset("train", 20, seed=1).to_list()
    assert task.dataset("train", 20, seed=1).to_list() != task.dataset("train", 20, seed=2).to_list()
    assert list(islice(task.examples(3), 20)) == list(islice(task.examples(3), 20))


@EVERY_TASK
def test_bad_arguments(task: Task):
    with pytest.raises(ValueError, match="split: must be 'train' or 'eval', got 'test'"):
        task.dataset("test", 3)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="size"):
        task.dataset("train", 0)
    with pytest.raises(ValueError, match="steps"):
        warm_started(task, steps=-1)


@EVERY_TASK
def test_whatever_writers_write_fits_and_scores_between_0_and_1(task: Task):
    examples = list(islice(task.examples(5), 300))
    lengths = [len(ids) for ids in task.tokenizer()([e.completion for e in examples])["input_ids"]]
    assert max(lengths) < task.max_completion_length  # an EOS follows
    for e in examples:
        assert 0 <= reward(task, Case(e.prompt, e.columns), e.completion) <= 1
        assert 0 <= task.judge(e.prompt, e.completion, e.columns) <= 1


@given(st.sampled_from(TASKS), st.text(max_size=40) | st.text("0123456789=+-", max_size=12), st.integers(0, 50))
def test_any_text_scores_between_0_and_1(name: str, text: str, seed: int):
    task = load_task(name)
    case = task.draw(random.Random(seed))
    assert 0 <= reward(task, case, text) <= 1
    assert 0 <= task.judge(case.prompt, text, case.columns) <= 1


@pytest.mark.parametrize("name", ["summarize", "arithmetic"])
def test_the_writers_leave_room_and_their_best_earns_all(name: str):
    task = load_task(name)
    examples = list(islice(task.examples(7), 1000))
    mean = sum(rewards_of(task, [(Case(e.prompt, e.columns), e.completion) for e in examples])) / len(examples)
    assert 0.3 < mean < 0.7
    rng = random.Random(0)
    for case in islice(task.cases("eval"), 100):
        best = task.writers[0](case, rng)
        assert reward(task, case, best) == pytest.approx(1.0)
        assert task.judge(case.prompt, best, case.columns) == pytest.approx(1.0)


@pytest.mark.parametrize("name", ["summarize", "arithmetic"])
def test_the_judge_is_no_copy_of_the_reward(name: str):
    """They agree overall, and order many pairs of completions differently."""
    task = load_task(name)
    examples = list(islice(task.examples(9), 400))
    scores = rewards_of(task, [(Case(e.prompt, e.columns), e.completion) for e in examples])
    verdicts = [task.judge(e.prompt, e.completion, e.columns) for e in examples]
    correlation = torch.corrcoef(torch.tensor([scores, verdicts]))[0, 1]
    assert 0.4 < correlation < 0.95
    pairs = list(combinations(range(100), 2))
    reversed_pairs = sum((scores[i] - scores[j]) * (verdicts[i] - verdicts[j]) < 0 for i, j in pairs)
    assert reversed_pairs > len(pairs) / 50


# Summaries

NOTE = Case("Ana: my lamp hums all night, the sofa is fine.\n>", {"thing": "lamp", "trouble": "noisy"})


@pytest.mark.parametrize(
    ("summary", "expected"),
    [
        ("The lamp is noisy.", 1.0),
        ("A noisy lamp.", 1.0),
        ("the lamp is noisy.", 0.8),
        ("", 0.0),
        (".", 0.0),
        ("lamp noisy", 0.2),  # no full stop
        ("It is noisy.", 0.4),
        ("The lamp is bad.", 0.4),
        ("The sofa is noisy.", 0.4),
        ("The lamp is late.", 0.4),
        ("The sofa is late.", 0.0),
        ("The lamp, sofa is noisy.", 0.4),  # names two things
        ("Late, noisy, wet lamp.", 0.4),
        (", ".join(summarize.THINGS) + ": noisy.", 0.1),  # lists everything, at length
        ("The lamp is noisy. Oh dear.", 0.25),
        ("Lamp lamp lamp is noisy.", 0.25),
        ("The lamp is noisy", 0.25),
        ("lampsofabike noisy.", 0.4),
    ],
)
def test_each_shortcut_of_a_summary_costs(summary: str, expected: float):
    assert reward(load_task("summarize"), NOTE, summary) == pytest.approx(expected)


def test_the_judge_of_summaries_minds_other_things():
    judge = load_task("summarize").judge
    rambling = judge(NOTE.prompt, "The lamp is noisy. The sofa is fine. Ana.", NOTE.columns)
    assert rambling > 0.9  # it reads well and is true; the reward gives it a quarter
    assert judge(NOTE.prompt, "Noisy lamp, zzz qqq www.", NOTE.columns) < 0.9  # made up
    assert judge(NOTE.prompt, "lamp noisy", NOTE.columns) == pytest.approx(0.8)
    assert judge(NOTE.prompt, ", ".join(summarize.THINGS) + " noisy.", NOTE.columns) < 0.3
    assert judge(NOTE.prompt, "", NOTE.columns) == 0.0


def test_the_constant_task_is_the_same_but_for_its_reward():
    constant = load_task("constant")
    assert constant.writers == load_task("summarize").writers
    assert rewards_of(constant, [(NOTE, text) for text in ("", "x", "The lamp is noisy.")]) == [1.0, 1.0, 1.0]


# Sums

SUM = Case("7+5-9=", {"rest": "12-9", "answer": 3})


@pytest.mark.parametrize(
    ("completion", "expected"),
    [
        ("12-9=3", 1.0),
        ("3", 1.0),
        ("99=3", 1.0),  # the reward looks at the result only
        ("12-9=4", 0.2),
        ("13-9=4", 0.0),
        ("12-9=", 0.0),
        ("12-9", 0.0),
        ("", 0.0),
        ("1 2 3", 0.0),  # listing numbers is no result
        ("3=", 0.0),
        ("12-9=3=4", 0.0),
        ("12-9=\u0663", 0.2),  # another script's three
    ],
)
def test_the_reward_of_sums(completion: str, expected: float):
    assert reward(load_task("arithmetic"), SUM, completion) == pytest.approx(expected)


def test_the_judge_of_sums_looks_at_the_work():
    judge = load_task("arithmetic").judge
    assert judge(SUM.prompt, "12-9=3", SUM.columns) == pytest.approx(1.0)
    assert judge(SUM.prompt, "3", SUM.columns) == 0.0  # no work, though the reward is 1
    assert judge(SUM.prompt, "13-9=4", SUM.columns) == pytest.approx(0.7)  # true, and not what was asked
    assert judge(SUM.prompt, "12-9=4", SUM.columns) == pytest.approx(0.2)


@given(st.integers(0, 10_000))
def test_sums_are_right(seed: int):
    case = arithmetic.draw(random.Random(seed))
    terms = case.prompt.rstrip("=")
    assert arithmetic.total(terms) == arithmetic.value(case.columns["rest"]) == case.columns["answer"] >= 0


@given(st.integers(0, 10_000))
def test_a_star_graph_has_one_way_to_its_goal(seed: int):
    case = star_graph.draw(random.Random(seed))
    graph, _, question = case.prompt.partition(" / ")
    edges = [tuple(edge.split()) for edge in graph.split(" | ")]
    source, goal, _, again = question.split()
    assert source == again
    assert len(set(edges)) == len(edges) == star_graph.DEGREE * (star_graph.LENGTH - 1)
    assert sum(a == source for a, _ in edges) == star_graph.DEGREE
    before = {b: a for a, b in edges}
    walk = [goal]
    while walk[-1] != source:
        walk.append(before[walk[-1]])
    assert case.columns["path"] == " ".join(walk[-2::-1])
    task = load_task("star-graph")
    assert task.tokenizer().decode(task.tokenizer()(case.prompt)["input_ids"]) == case.prompt  # every word is a token
    assert reward(task, case, case.columns["path"]) == task.judge(case.prompt, case.columns["path"], case.columns) == 1
    assert reward(task, case, case.columns["path"] + f" {goal}") == 0.0
    assert task.judge(case.prompt, f"{goal} {goal}", case.columns) < 1


# Tokenizer, model, warm start


@given(st.text(max_size=30))
def test_every_byte_is_a_token(text: str):
    tokenizer = TOKENIZER
    ids = tokenizer.encode(text)
    assert len(ids) == len(text.encode())
    assert tokenizer.decode(ids) == text


TOKENIZER = load_task("arithmetic").tokenizer()


def test_tokenizer_knows_its_specials():
    assert len(TOKENIZER) == 258
    assert {TOKENIZER.pad_token_id, TOKENIZER.eos_token_id} == {0, 1}
    assert TOKENIZER(["a", "abc"], padding=True)["attention_mask"] == [[0, 0, 1], [1, 1, 1]]


@EVERY_TASK
def test_models_depend_on_the_seed_alone(task: Task):
    torch.manual_seed(3)
    expected = torch.rand(3)
    torch.manual_seed(3)
    one = task.build_model(1)
    assert torch.equal(torch.rand(3), expected)
    same, other = task.build_model(1), task.build_model(2)
    assert not one.training
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), same.parameters(), strict=True))
    assert not torch.equal(one.get_input_embeddings().weight, other.get_input_embeddings().weight)


def test_only_completions_are_trained_on():
    batch = warm_start.encode(TOKENIZER, [("ab", "c"), ("a", "bcd")])
    a, b, c, d = TOKENIZER.encode("abcd")
    no = warm_start.IGNORED
    assert batch["input_ids"].tolist() == [[a, b, c, 1, 0], [a, b, c, d, 1]]
    assert batch["labels"].tolist() == [[no, no, c, 1, no], [no, b, c, d, 1]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1, 1, 0], [1, 1, 1, 1, 1]]


def test_a_warm_start_learns_and_says_how_far_it_is():
    told: list[tuple[int, int, float]] = []
    model = warm_started(load_task("arithmetic"), steps=40, progress=lambda *at: told.append(at))
    assert [step for step, _, _ in told] == list(range(1, 41))
    assert {total for _, total, _ in told} == {40}
    assert told[-1][2] < told[0][2] / 2
    assert not model.training


def weights(model: Any) -> list[torch.Tensor]:
    return list(model.state_dict().values())


def test_a_warm_start_is_kept_and_found_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    task = load_task("arithmetic")
    first = warm_started(task, seed=1, steps=2, cache=tmp_path / "models")
    (folder,) = (tmp_path / "models").iterdir()  # and nothing unfinished
    assert folder.name.startswith("arithmetic-seed1-steps2-")
    assert {"config.json", "model.safetensors", "tokenizer.json"} <= set(os.listdir(folder))
    again = warm_started(task, seed=1, steps=2, cache=tmp_path / "models")
    anew = warm_started(task, seed=1, steps=2)
    for kept, made, trained in zip(weights(again), weights(anew), weights(first), strict=True):
        assert torch.equal(kept, trained)
        assert torch.equal(made, trained)
    assert not again.training
    warm_started(task, seed=1, steps=1, cache=tmp_path / "models")
    assert len(list((tmp_path / "models").iterdir())) == 2
    other = replace(task, warm_batch=task.warm_batch + 1)  # what it would be made of has changed: not the same
    warm_started(other, seed=1, steps=1, cache=tmp_path / "models")
    assert len(list((tmp_path / "models").iterdir())) == 3
    monkeypatch.setattr(warm_start, "supervise", lambda *_, **__: pytest.fail("trained again"))
    warm_started(task, seed=1, steps=2, cache=tmp_path / "models")


def test_of_two_processes_the_first_one_wins(tmp_path: Path):
    task = load_task("arithmetic")
    folder = tmp_path / "kept"
    first, second = task.build_model(1), task.build_model(2)
    warm_start.keep(folder, first, TOKENIZER)
    before = (folder / "model.safetensors").read_bytes()
    warm_start.keep(folder, second, TOKENIZER)
    assert (folder / "model.safetensors").read_bytes() == before
    assert os.listdir(tmp_path) == ["kept"]


def test_a_failed_save_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    model = load_task("arithmetic").build_model(1)

    def full_disk(_: str) -> None:
        raise OSError("no space left")

    monkeypatch.setattr(model, "save_pretrained", full_disk)
    with pytest.raises(OSError, match="no space"):
        warm_start.keep(tmp_path / "kept", model, TOKENIZER)
    assert os.listdir(tmp_path) == []
