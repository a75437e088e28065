"""The demonstration: its reward cannot be cheated cheaply, its loop scores what was sampled, its report is honest."""

from __future__ import annotations

import ast
import csv
import importlib.util
import json
import math
import random
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from klq_kernels import reference

pytest.importorskip("transformers")
pytest.importorskip("matplotlib")

from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedModel, PreTrainedTokenizerFast

from klq_kernels.lab import demo
from klq_kernels.lab.demo import memory, policy, report, task, walkthrough
from klq_kernels.lab.demo.train import Learner, Rollout, Settings, rollout

SETTINGS = Settings(batch=8, epochs=2, max_new_tokens=6)
TINY = demo.Size(
    shape=memory.Shape(batch=2, prompt=8, response=24, hidden=16, vocab=50304, workspace_mib=1),
    vocabularies=(), rounds=1, warm_steps=2, settings=SETTINGS, held_out=4, samples=2,
)  # fmt: skip


pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    return task.build_tokenizer(prompt + summary for prompt, summary in islice(task.examples("test"), 300))


@pytest.fixture(params=["GPT-NeoX", "GPT-2"])
def model(request: pytest.FixtureRequest, tokenizer: PreTrainedTokenizerFast) -> PreTrainedModel:
    """Random, and sharp enough that what it predicts depends on every position it sees.

    The demonstration's GPT-NeoX sees distances between tokens only; GPT-2 would notice wrong absolute positions.
    """
    torch.manual_seed(0)
    if request.param == "GPT-NeoX":
        model = policy.build_model(tokenizer)
    else:
        config = GPT2Config(
            vocab_size=len(tokenizer), n_positions=64, n_embd=32, n_layer=2, n_head=2, initializer_range=0.1,
            tie_word_embeddings=False, pad_token_id=tokenizer.pad_token_id, eos_token_id=tokenizer.eos_token_id,
            bos_token_id=tokenizer.eos_token_id,
        )  # fmt: skip
        model = GPT2LMHeadModel(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(2.0)
    return model


# The task


LETTER = task.Letter("Your red lamp arrived broken!", "lamp", "broken")


def test_a_good_summary_earns_all():
    assert task.reward(LETTER, " The lamp is broken. Please help.", finished=True) == pytest.approx(1.0)
    assert task.reward(LETTER, " Could you please mend my broken lamp?", finished=True) == pytest.approx(1.0)


@pytest.mark.parametrize(
    ("summary", "expected"),
    [
        ("", 0.0),
        (" lamp broken please", 0.25),  # too short
        (" Broken lamp.", 0.2),  # too short, and rude
        (" The lamp is broken. Please help", 0.25),  # stops in mid-sentence
        (" The lamp is broken. It is a nice day.", 0.8),  # rude
        (" The kettle is broken. Please help.", 0.6),  # the wrong item
        (" The lamp is late. Please help.", 0.6),  # the wrong problem
        (" " + " ".join(task.ITEMS) + " broken please.", 0.6),  # names every item
        (" The lamp is broken please please please.", 0.25),  # repeats itself
        (" The lamp is broken. Please help. It is a nice day. I like the shop. So it goes.", 0.25),  # rambles
    ],
)
def test_each_shortcut_costs(summary: str, expected: float):
    assert task.reward(LETTER, summary, finished=True) == pytest.approx(expected)


def test_an_unfinished_summary_earns_nothing():
    assert task.reward(LETTER, " The lamp is broken. Please help.", finished=False) == 0.0


def test_careful_writers_earn_all_and_the_average_leaves_room():
    rng = random.Random(0)
    letters = list(islice(task.letters("test"), 200))
    for letter in letters:
        assert task.reward(letter, task.careful(letter, rng), finished=True) == pytest.approx(1.0)
    rewards = [task.reward(letter, writer(letter, rng), finished=True) for letter in letters for writer in task.WRITERS]
    assert 0.2 < sum(rewards) / len(rewards) < 0.5


def test_tokenizer_is_byte_level(tokenizer: PreTrainedTokenizerFast):
    for text in ("Grüße, 你好 \x00\t🙂", *islice((prompt for prompt, _ in task.examples("other")), 20)):
        assert tokenizer.decode(tokenizer.encode(text)) == text
    assert len(tokenizer.encode(" lamp")) == 1


def test_streams_are_reproducible_and_differ_by_seed():
    def first(seed: str) -> list[task.Letter]:
        return list(islice(task.letters(seed), 20))

    assert first("a") == first("a")
    assert first("a") != first("b")


# The rollout


def sampler_logprobs(model: PreTrainedModel, monkeypatch: pytest.MonkeyPatch) -> list[Tensor]:
    """Makes ``model.generate`` leave behind the log-probabilities [B, V] it drew each token from."""
    drawn_from: list[Tensor] = []
    generate = model.generate

    def recording(**inputs: Any) -> Tensor:
        out = generate(**inputs, return_dict_in_generate=True, output_scores=True)
        drawn_from.extend(scores.log_softmax(-1) for scores in out.scores)
        return out.sequences

    monkeypatch.setattr(model, "generate", recording)
    return drawn_from


PROMPTS = {
    "equal lengths": ["The lamp", "The tent"],
    "left padding": ["The lamp", "Dear shop, on Friday I ordered a tent and a radio.", "x", "Summary: The clock is"],
}


@pytest.mark.parametrize("prompts", PROMPTS.values(), ids=PROMPTS)
def test_scored_logprobs_are_the_samplers(
    prompts: list[str],
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerFast,
    monkeypatch: pytest.MonkeyPatch,
):
    drawn_from = sampler_logprobs(model, monkeypatch)
    batch = rollout(model, tokenizer, prompts, max_new_tokens=8)
    targets, metrics = Learner(model, SETTINGS).score(batch, torch.zeros(len(prompts)))
    sampled = torch.stack(drawn_from, dim=1).gather(-1, batch.actions.unsqueeze(-1)).squeeze(-1)
    assert sampled.std() > 1  # contexts differ, so a shift by one would be seen
    torch.testing.assert_close(targets.old_logprobs, sampled * batch.mask, rtol=1e-4, atol=1e-4)
    assert metrics["kl"] == 0.0  # policy and reference are the same yet


class Scripted:
    """A stand-in for a model: ``generate`` answers with given responses."""

    device = torch.device("cpu")

    def __init__(self, responses: list[list[int]]) -> None:
        self.responses = torch.tensor(responses)

    def generate(self, *, input_ids: Tensor, **_: Any) -> Tensor:
        return torch.cat([input_ids, self.responses], dim=1)


def scripted_rollout(tokenizer: PreTrainedTokenizerFast, prompts: list[str]) -> Rollout:
    """Three responses of which the first ends in time, the second with its last token, the third not at all."""
    pad, eos = tokenizer.pad_token_id, tokenizer.eos_token_id
    model: Any = Scripted([[40, eos, pad, pad], [41, 42, 43, eos], [44, 45, 46, 47]])
    return rollout(model, tokenizer, prompts, max_new_tokens=4)


def test_eos_is_trained_on_and_truncation_noticed(tokenizer: PreTrainedTokenizerFast):
    batch = scripted_rollout(tokenizer, ["The lamp is", "The", "The lamp"])
    assert batch.mask.tolist() == [[True, True, False, False], [True] * 4, [True] * 4]
    assert batch.truncated.tolist() == [False, False, True]
    prompt_lengths = [len(tokenizer.encode(p)) for p in ("The lamp is", "The", "The lamp")]
    assert batch.attention.sum(1).tolist() == [n + m for n, m in zip(prompt_lengths, (2, 4, 4), strict=True)]
    assert batch.attention[:, -5].all()  # prompts end where responses begin: padding is on the left


def test_targets_are_those_of_each_sequence_alone(model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast):
    """Against the oracle, one sequence at a time: no padding, the model's own logits, V after a cut as bootstrap."""
    batch = scripted_rollout(tokenizer, ["Dear shop, on Friday I ordered a tent", "The", "The lamp is"])
    learner = Learner(model, SETTINGS)
    with torch.no_grad():
        learner.value_head.weight.normal_()
        for parameter in learner.model.get_output_embeddings().parameters():
            parameter.add_(torch.randn_like(parameter) / 4)  # away from the reference
    rewards = torch.tensor([0.3, 0.7, 0.9])
    targets, metrics = learner.score(batch, rewards)
    for row in range(3):
        ids = batch.ids[row][batch.attention[row].bool()].unsqueeze(0)
        length = int(batch.mask[row].sum())
        with torch.no_grad():
            out = learner.model(ids, output_hidden_states=True)
            values = learner.value_head(out.hidden_states[-1]).squeeze(-1)[:, -length - 1 :]
            logp, ref_logp = (
                m(ids).logits.log_softmax(-1)[:, :-1].gather(-1, ids[:, 1:, None]).squeeze(-1)[:, -length:]
                for m in (learner.model, learner.reference)
            )
        cut = bool(batch.truncated[row])
        assert cut == (row == 2)
        expected = reference.klq_targets(
            logp, ref_logp, values[:, :-1],
            torch.zeros(1) if cut else rewards[row : row + 1],
            bootstrap_values=values[:, -1] if cut else torch.zeros(1),
            tau=SETTINGS.tau, lam=SETTINGS.lam,
        )  # fmt: skip
        for ours, theirs in zip(targets, expected, strict=True):
            torch.testing.assert_close(ours[row, :length], theirs[0], rtol=1e-4, atol=1e-4)
            assert (ours[row, length:] == 0).all()
    assert metrics["truncated"] == pytest.approx(1 / 3)
    assert metrics["length"] == pytest.approx(10 / 3)
    assert metrics["kl"] != 0


def test_update_moves_policy_and_value_head_but_not_the_reference(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast
):
    learner = Learner(model, SETTINGS)
    frozen = [p.clone() for p in learner.reference.parameters()]
    before = [p.detach().clone() for p in learner.parameters]
    batch = scripted_rollout(tokenizer, ["The lamp is", "The", "The lamp"])
    targets, _ = learner.score(batch, torch.tensor([1.0, 0.5, 0.0]))
    learner.update(batch, targets)
    assert all(torch.equal(a, b) for a, b in zip(frozen, learner.reference.parameters(), strict=True))
    assert all(not torch.equal(a, b) for a, b in zip(before[-2:], learner.parameters[-2:], strict=True))
    assert not torch.equal(before[0], learner.parameters[0])


# The comparison


def test_contenders_agree_with_float64():
    inputs = memory.make_inputs(TINY.shape, seed=0)
    assert inputs.mask.any()
    assert not inputs.mask[:, : TINY.shape.prompt].any()
    for name, errors in memory.agreement(inputs).items():
        assert all(error < 1e-5 for error in errors.values()), (name, errors)


def test_inputs_are_peaked():
    inputs = memory.make_inputs(TINY.shape, seed=0)
    probabilities = (inputs.hidden @ inputs.weight.T).softmax(-1)
    top = probabilities.detach().amax(-1)
    assert top.max() > 0.5
    assert top.median() > 100 / TINY.shape.vocab


# From end to end


def run_tiny(out: Path, steps: int) -> dict[str, Any]:
    with pytest.raises(SystemExit) as stopped:  # so few steps teach nothing, and it says so
        demo.run(out, steps, seed=0, size=TINY)
    assert stopped.value.code == 1
    return json.loads((out / "metrics.json").read_text())


@pytest.mark.lengthy
def test_a_tiny_run_writes_everything(tmp_path: Path):
    written = run_tiny(tmp_path, steps=2)
    assert {file.name for file in tmp_path.iterdir()} == set(walkthrough.WRITTEN)
    with open(tmp_path / "metrics.csv") as file:
        rows = list(csv.DictReader(file))
    assert [row["step"] for row in rows] == ["1", "2"]
    assert all(math.isfinite(float(number)) for row in rows for number in row.values())
    assert {"reward", "kl", "entropy", "length", "explained_variance", "loss"} <= rows[0].keys()
    assert [step["reward"] for step in written["history"]] == [float(row["reward"]) for row in rows]
    contenders = written["memory"]["contenders"]
    logits = 4 * TINY.shape.tokens * TINY.shape.vocab
    assert contenders["naive, all tokens"]["peak_bytes"] > 2 * logits
    assert contenders[memory.FUSED]["peak_bytes"] < logits
    text = (tmp_path / "report.md").read_text()
    assert "did not learn" in text
    for name in ("memory.png", "training.png"):
        assert f"]({name})" in text
        assert (tmp_path / name).read_bytes().startswith(b"\x89PNG")
    assert "stopped" not in text


def test_an_interrupted_run_keeps_its_numbers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def interrupted(*args: Any) -> Iterator[dict[str, float]]:
        yield from islice(train(*args), 2)
        raise KeyboardInterrupt

    train = walkthrough.train
    monkeypatch.setattr(walkthrough, "train", interrupted)
    monkeypatch.setattr(walkthrough, "measure", lambda *_: MEASURED)
    (tmp_path / "metrics.csv").write_text("of an earlier run\n" * 10)
    with pytest.raises(KeyboardInterrupt):
        demo.run(tmp_path, steps=5, seed=0, size=TINY)
    assert len((tmp_path / "metrics.csv").read_text().splitlines()) == 3
    assert len(json.loads((tmp_path / "metrics.json").read_text())["history"]) == 2
    assert "stopped after 2 of 5 steps" in (tmp_path / "report.md").read_text()


MEASURED = {
    "shape": {**memory.asdict(TINY.shape), "tokens": 64, "response_tokens": 30},
    "threads": 1,
    "gradient_bytes": {TINY.shape.vocab: 100},
    "contenders": {
        name: {
            "relative_error": {"loss": 0.1, "d_hidden": 0.1, "d_weight": 0.1, "d_values": 0.1},
            "seconds": 1.0,
            "seconds_of_rounds": [1.0],
            "peak_bytes": 200,
            "peak_bytes_by_vocab": {TINY.shape.vocab: 200},
        }
        for name in memory.CONTENDERS
    },
}


def curve(rewards: list[float], kls: list[float]) -> list[dict[str, float]]:
    return [{"reward": r, "kl": k} for r, k in zip(rewards, kls, strict=True)]


def test_the_verdict_is_honest():
    rising = [0.3 + 0.05 * i for i in range(12)]
    assert report.judge(curve(rising, [0.25 * i for i in range(12)]), tau=0.05).learnt
    no_better = report.judge(curve([0.35] * 12, [0.1] * 12), tau=0.05)
    assert not no_better.learnt
    assert "did not learn" in no_better.words()
    once_far_away = report.judge(curve(rising, [1.0] * 6 + [40.0] + [1.0] * 5), tau=0.05)
    assert once_far_away.reward_rose
    assert not once_far_away.kl_bounded
    assert not once_far_away.learnt


def test_the_verdict_does_not_take_nan_for_learning():
    assert not report.judge(curve([0.1] * 6 + [math.nan] * 6, [1.0] * 12), tau=0.05).learnt
    assert not report.judge(curve([0.1] * 6 + [0.9] * 6, [math.nan] * 12), tau=0.05).learnt


def test_steps_must_be_positive(tmp_path: Path):
    with pytest.raises(ValueError, match="steps"):
        demo.run(tmp_path, 0, 0)


@pytest.mark.parametrize("package", ["lab/tasks", "lab/experiments", "trainer"])
def test_nothing_leans_on_the_demonstration(package: str):
    """They share code outside of it (``display``, ``tasks``); the exception is an experiment about the demo."""
    for path in (Path(demo.__file__).parents[2] / package).rglob("*.py"):
        if path.name == "demo_loop.py":
            continue
        imports = [node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.ImportFrom)]
        assert not [node.module for node in imports if "demo" in (node.module or "").split(".")], path


# The example


def test_the_plain_loop_learns(capsys: pytest.CaptureFixture[str]):
    path = Path(__file__).parents[2] / "examples" / "plain_loop.py"
    spec = importlib.util.spec_from_file_location("plain_loop", path)
    assert spec is not None
    assert spec.loader is not None
    example = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(example)
    rewards = example.train(steps=12)
    assert sum(rewards[-3:]) / 3 > rewards[0] + 0.2
    assert capsys.readouterr().out.count("reward") == 12
