"""Demonstrations: the trace for tokens of an unknown policy, what is read of them, the same in a resumed run."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from torch import Tensor

from klq_kernels import reference
from klq_kernels.trainer import KLQTrainer
from klq_kernels.trainer.demonstrations import Demonstrations
from klq_kernels.trainer.written import Reader

pytestmark = pytest.mark.usefixtures("one_thread")
SHOWN = 2  # of the eight completions of a pass, by default


def series(run: KLQTrainer, name: str) -> list[float]:
    return [logs[name] for logs in run.state.log_history if name in logs]


def written(number: int = 6) -> list[dict[str, Any]]:
    return [{"prompt": "ab"[: 1 + i % 2], "completion": "bdfhjl"[: 1 + i], "worth": float(i)} for i in range(number)]


def worth(completion_ids: list[list[int]], worth: list[float] | None = None, **columns: Any) -> list[float]:
    """Of the policy's own completions 0, of a demonstration what its column says."""
    assert "completion" not in columns
    return [0.0] * len(completion_ids) if worth is None else worth


def trainer(folder: Path, given: dict[str, Any] | None = None, **changes: Any) -> KLQTrainer:
    defaults: dict[str, Any] = {
        "replay_cycles": 2, "off_policy": "retrace", "num_update_epochs": 1, "max_steps": 8, "logging_steps": 1,
    }  # fmt: skip
    chosen = {"demonstrations": written(), "reward_funcs": worth, **(given or {})}
    return tiny.trainer(folder, chosen, **(defaults | changes))


# ---- the oracle -----------------------------------------------------------------------------------------------------


def test_the_tree_backup_is_what_its_recursion_says_for_every_sampler() -> None:
    """Of all histories of three actions in three steps, by enumeration; and no ratio would allow a smaller trace."""
    generator = torch.Generator().manual_seed(0)
    actions, steps, tau, gamma = range(3), 3, 0.3, 0.9
    states = [s for t in range(steps) for s in itertools.product(actions, repeat=t)]
    pi, mu, base = ({s: torch.randn(3, generator=generator).double().softmax(0) for s in states} for _ in range(3))
    reward = {(*s, a): torch.randn((), generator=generator).double() for s in states for a in actions}
    value = {s: torch.randn((), generator=generator).double() for s in states}

    def q(state: tuple[int, ...], a: int) -> Tensor:
        return tau * (pi[state][a] / base[state][a]).log() + value[state]

    def target(state: tuple[int, ...], a: int) -> Tensor:
        after = (*state, a)
        if len(after) == steps:
            return reward[after]
        more = sum(mu[after][b] * pi[after][b] * (target(after, b) - q(after, b)) for b in actions)
        return reward[after] + gamma * (value[after] + more)

    for first in actions:
        mean = torch.zeros((), dtype=torch.float64)
        for path in ((first, *rest) for rest in itertools.product(actions, repeat=steps - 1)):
            along = [torch.stack([p[path[:t]][a] for t, a in enumerate(path)]).log()[None] for p in (pi, mu, base)]
            trace = reference.tree_backup_trace(along[0])
            assert torch.equal(trace, reference.importance_trace(along[0], torch.zeros_like(trace)))
            assert (trace <= (along[0] - along[1]).exp()).all()
            found = reference.klq_targets(
                along[0], along[2], torch.stack([value[path[:t]] for t in range(steps)])[None],
                torch.stack([reward[path[: t + 1]] for t in range(steps)])[None], tau=tau, gamma=gamma, lam=1.0,
                trace=trace,
            )  # fmt: skip
            mean += along[1][0, 1:].sum().exp() * (q((), first) + found.advantages[0, 0])
        torch.testing.assert_close(mean, target((), first), rtol=1e-10, atol=0)


# ---- in the trainer -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "changes",
    [{}, {"num_generations": 4, "demonstration_share": 0.5}, {"replay_epochs": 2, "value_lam": 0.5}],
    ids=str,
)
def test_their_targets_are_those_of_the_oracle(changes: dict[str, Any], tmp_path: Path) -> None:
    """For the policy of now, with the trace of tree backup, and without a baseline of the others."""
    run = trainer(tmp_path, **changes)
    with torch.no_grad():
        run.policy.lm_head.weight.mul_(1.5)
        run.actor_critic.value.head.weight.normal_(std=0.3)
    experience = run.collect(tiny.prompts(8 // run.args.num_generations))
    number = max(SHOWN, run.args.num_generations)
    found = [i for turn in range(run.args.replay_passes) for i in range(8 * (turn + 2) - number, 8 * (turn + 2))]
    assert len(experience.sequences) == 8 * (1 + run.args.replay_passes)
    shown = experience.select(torch.tensor(found))
    order = torch.randperm(6, generator=torch.Generator().manual_seed(3)).tolist()
    rows = [written()[order[i % 6]] for i in range(len(found))]
    encode = run.tokenizer
    assert [s.prompt.tolist() for s in shown.sequences] == [encode(row["prompt"]).input_ids for row in rows]
    completions = [[*encode(row["completion"]).input_ids, tiny.EOS] for row in rows]
    assert [s.completion.tolist() for s in shown.sequences] == completions
    logps, values = [], []
    for s in shown.sequences:
        with torch.no_grad():
            hidden = run.policy.model(s.ids[None]).last_hidden_state[0, len(s.prompt) - 1 : -1]
            logps.append(reference.linear_logprobs(hidden, run.policy.lm_head.weight, s.completion).logprobs)
            values.append(run.actor_critic.value.head(hidden).squeeze(1))
    logp, value = torch.cat(logps).double(), torch.cat(values).double()
    scores = torch.tensor([row["worth"] for row in rows]).double()
    assert experience.sampler_logprobs is not None
    for lam, ours in ((0.95, shown.advantages), (changes.get("value_lam", 0.95), shown.targets.advantages)):
        expected = reference.klq_targets(
            logp, shown.ref_logprobs.double(), value, scores, tau=0.05, lam=lam,
            trace=reference.tree_backup_trace(logp),
            cu_seqlens=torch.tensor([0, *shown.rows.tolist()]).cumsum(0).int(),
        )  # fmt: skip
        torch.testing.assert_close(ours.double(), expected.advantages, rtol=1e-4, atol=1e-4)
    logs = run.means.drain(run.accelerator)
    assert logs["demonstrations/scores"] == pytest.approx(scores.mean().item())
    assert logs["demonstrations/logprob"] == pytest.approx(logp.mean().item(), rel=1e-4)
    assert logs["objective/scores"] == 0.0  # the policy's own


def test_the_policy_learns_what_is_worth_more(tmp_path: Path) -> None:
    """None of its own completions earns anything; it comes to write the demonstrations that do, and not the others."""
    good, bad = ({"prompt": "ab", "completion": text, "worth": w} for text, w in (("bd", 1.0), ("ca", -1.0)))
    given = {"demonstrations": [good, bad], "train_dataset": [{"prompt": "ab"}] * 8}
    run = trainer(tmp_path, given, max_steps=60, learning_rate=3e-3, demonstration_share=0.5)
    sequences = run.demonstrations.rollout([good, bad]).sequences  # type: ignore[union-attr]

    def likely() -> list[float]:
        rows = torch.tensor([s.rows for s in sequences])
        return [float(part.sum()) for part in run.rescore(sequences).logprobs.split(rows.tolist())]

    before = likely()
    run.train()
    after = likely()
    assert after[0] > before[0] + 2
    assert after[1] < before[1]


@pytest.mark.parametrize("step", [3, 4])
def test_a_resumed_run_reads_the_same(step: int, tmp_path: Path) -> None:
    settings = {"save_strategy": "steps", "save_steps": 1, "learning_rate": 1e-2, "demonstration_share": 0.4}
    whole, resumed = (trainer(tmp_path / name, **settings) for name in ("whole", "resumed"))
    whole.train()
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / f"checkpoint-{step}"))
    for name in ("loss", "demonstrations/scores", "demonstrations/logprob", "replay/ess"):
        assert series(resumed, name) == series(whole, name), name
    assert len(set(series(whole, "demonstrations/scores"))) > 1


def test_processes_and_passes_share_them() -> None:
    """With eight for two processes of two passes of two, each cycle has all, in an order of its own."""
    dataset, reader = written(8), Reader(tiny.tokenizer(), tiny.VOCAB)
    parts = [Demonstrations(dataset, reader, number=2, passes=2, process=p, processes=2, seed=0) for p in (0, 1)]
    cycles = [[row["worth"] for part in parts for turn in (0, 1) for row in part.rows(c, turn)] for c in range(2)]
    assert [sorted(cycle) for cycle in cycles] == [[float(i) for i in range(8)]] * 2
    assert cycles[0] != cycles[1]


def test_all_of_a_pass(tmp_path: Path) -> None:
    """Nothing is drawn from the memory then; chats are read by their template, and long completions are cut off."""
    chat = tiny.tokenizer(chat=True)
    said = {
        "prompt": [{"role": "user", "content": "a"}],
        "completion": [{"role": "assistant", "content": "bdfhjlnprtvx"}],
        "worth": 1.0,
    }
    prompts = [{"prompt": said["prompt"]}] * 8
    given = {"demonstrations": [said], "processing_class": chat, "train_dataset": prompts}
    run = trainer(tmp_path, given, demonstration_share=1.0, max_steps=2)
    run.train()
    assert run.experience is not None
    assert [chat.decode(s.completion) for s in run.experience.sequences[8:]] == ["bdfhjlnp"] * 8
    assert series(run, "replay/age") == []


# ---- bad input ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("given", "changes", "message"),
    [
        ({"demonstrations": [{"prompt": "a"}]}, {}, "demonstrations: row 0 must have a prompt and a completion"),
        (
            {"demonstrations": [*written(), {"prompt": "a", "completion": "", "worth": 0.0}]},
            {},
            "demonstrations: row 6 must have",
        ),
        ({"demonstrations": [*written(), {"prompt": "a", "completion": "b"}]}, {}, "demonstrations: .* column worth"),
        ({"demonstrations": {"train": written()}}, {}, "demonstrations: must be one dataset"),
        ({"demonstrations": "demos.jsonl"}, {}, "demonstrations: must be a dataset, got the text 'demos.jsonl'"),
        ({"demonstrations": []}, {}, "demonstrations: is empty"),
        ({"demonstrations": [{"prompt": "a", "completion": 3}]}, {}, "demonstrations: completion: must be a text"),
        (
            {"demonstrations": [{"prompt": "a", "completion": "b<eos>c"}]},
            {},
            "demonstrations: completion: 'b<eos>c' goes",
        ),
        ({}, {"replay_cycles": 0, "off_policy": "none"}, "demonstrations: are a part of the replayed completions"),
        ({}, {"algorithm": "ppo"}, "demonstrations: serve algorithm='klq' alone"),
        ({}, {"demonstration_share": 0.0}, "demonstration_share: "),
        ({}, {"demonstration_share": 1.5}, "demonstration_share: "),
        ({}, {"demonstration_share": 0.05}, "demonstration_share: 0.05 of the 8 completions .* comes to none"),
        ({}, {"num_generations": 4}, "demonstration_share: .* comes to none in whole groups .* multiple of 1/2"),
        ({}, {"num_generations": 4, "demonstration_share": 0.8}, "demonstration_share: .* comes to all"),
    ],
    ids=str,
)
def test_bad_input_is_named(given: dict[str, Any], changes: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=f"^{message}"):
        trainer(tmp_path, given, **changes)


def test_a_completion_ends_with_the_first_of_several_ends() -> None:
    """As the policy's do; white space and ends behind it are the template's, and messages are the assistant's alone."""
    reader = Reader(tiny.tokenizer(chat=True), tiny.VOCAB, ends={tiny.EOS, 9})
    letter = reader.tokenizer.decode([9])
    rows = [{"prompt": "a", "completion": text} for text in (f"b{letter}", f"b{letter} <eos>", "b<eos><eos>", "b")]
    b = reader.tokenizer("b").input_ids
    ends = [s.completion.tolist() for s in reader.sequences(rows, "completion")]
    assert ends == [[*b, 9], [*b, 9], [*b, tiny.EOS], [*b, tiny.EOS]]
    with pytest.raises(ValueError, match="goes on behind an EOS, with 'c'"):
        reader.sequences([{"prompt": "a", "completion": f"b{letter}c"}], "completion")
    asked = [{"role": "user", "content": "a"}]
    said = [{"role": "assistant", "content": "b"}, {"role": "user", "content": "c"}]
    with pytest.raises(ValueError, match="must be messages of the assistant alone, has some of user"):
        reader.sequences([{"prompt": asked, "completion": said}], "completion")


def test_a_reward_function_that_fails_on_them_is_named(tmp_path: Path) -> None:
    def needs_rest(completions: list[str], rest: list[str], **_: Any) -> list[float]:
        return [0.0] * len(completions)

    rows = [{"prompt": "ab", "rest": "x"}] * 8
    run = trainer(tmp_path, {"reward_funcs": needs_rest, "train_dataset": rows}, max_steps=2)
    with pytest.raises(ValueError, match=r"demonstrations: .*rest"):
        run.train()


def test_a_tokenizer_with_another_end(tmp_path: Path) -> None:
    model = tiny.model()
    model.generation_config.eos_token_id = 7
    with pytest.raises(ValueError, match=r"^demonstrations: end with the tokenizer's EOS, 1, and .*\[7\]"):
        trainer(tmp_path, {"model": model})


def test_a_share_of_nothing_is_warned_of(tmp_path: Path) -> None:
    with pytest.warns(UserWarning, match="demonstration_share: has no effect on a trainer without demonstrations"):
        trainer(tmp_path, {"demonstrations": None}, demonstration_share=0.5)
