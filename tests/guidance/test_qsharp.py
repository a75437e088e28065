"""``QSharpTrainer``: what it learns, the data of a round, resuming bit for bit, measures of quality, wrong input."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from transformers import LogitsProcessorList

from klq_kernels.guidance import Law, ValueGuide
from klq_kernels.trainer import QSharpConfig, QSharpTrainer
from klq_kernels.trainer.qsharp.examples import Example, Examples, varied
from klq_kernels.trainer.qsharp.quality import auroc, quality
from klq_kernels.trainer.rollout import until_eos


def arguments(folder: Path, **changes: Any) -> QSharpConfig:
    defaults: dict[str, Any] = {
        "max_completion_length": 6, "rounds": 2, "steps_per_round": 4, "samples_per_prompt": 4, "prompts_per_round": 8,
        "per_device_train_batch_size": 8, "learning_rate": 3e-3, "rollout_forward_batch_size": 16, "top_k": 8,
        "logging_steps": 1, "save_strategy": "no", "use_cpu": True, "report_to": [], "disable_tqdm": True, "seed": 3,
    }  # fmt: skip
    return QSharpConfig(str(folder), **(defaults | changes))


def trainer(folder: Path, given: dict[str, Any] | None = None, **changes: Any) -> QSharpTrainer:
    defaults: dict[str, Any] = {
        "reward_funcs": tiny.even, "train_dataset": tiny.prompts(), "processing_class": tiny.tokenizer()
    }  # fmt: skip
    given = defaults | (given or {})
    return QSharpTrainer(given.pop("model", None) or tiny.model(), args=arguments(folder, **changes), **given)


def logged(run: QSharpTrainer, name: str) -> list[float]:
    return [logs[name] for logs in run.state.log_history if name in logs]


@pytest.fixture(scope="module")
def learnt(tmp_path_factory: pytest.TempPathFactory) -> QSharpTrainer:
    """A run in which the guide learns something, shared by the tests that only look at it."""
    run = trainer(
        tmp_path_factory.mktemp("learnt"), {"eval_dataset": tiny.prompts(48)},
        law="categorical", atoms=9, rounds=2, steps_per_round=80, samples_per_prompt=64, prompts_per_round=None,
        eta=0.2, logging_steps=40, top_k=32,
        per_device_train_batch_size=32, rollout_forward_batch_size=512, eval_strategy="steps", eval_steps=80,
        eval_on_start=True,
    )  # fmt: skip
    run.train()
    return run


def test_guided_completions_earn_more_and_the_reference_stays(learnt: QSharpTrainer) -> None:
    rewards, kl, plain = (logged(learnt, f"eval_{name}") for name in ("reward", "kl", "ref_reward"))
    assert kl[0] == 0.0  # of a zero guide
    assert plain[0] == plain[-1]
    assert rewards[-1] > plain[-1] + 0.03
    assert kl[-1] > 0.1
    for ours, given in zip(learnt.reference.parameters(), tiny.model().parameters(), strict=True):
        assert torch.equal(ours, given)
    assert logged(learnt, "data/kl")[0] == 0.0
    assert logged(learnt, "data/reward")[1] > logged(learnt, "data/reward")[0]


def test_the_guide_comes_to_know_the_law(learnt: QSharpTrainer) -> None:
    assert logged(learnt, "eval_explained_variance")[0] == pytest.approx(0.0, abs=1e-9)
    assert logged(learnt, "eval_explained_variance")[-1] > 0.15
    assert logged(learnt, "eval_auroc")[0] == pytest.approx(0.5)
    assert logged(learnt, "eval_auroc")[-1] > 0.65
    assert logged(learnt, "eval_calibration_error")[-1] < logged(learnt, "eval_calibration_error")[0]


def test_held_out_completions_are_those_of_the_dataset_that_is_measured(tmp_path: Path) -> None:
    ours, others = tiny.prompts(6), tiny.prompts(12)[6:]
    run = trainer(tmp_path, {"eval_dataset": {"ours": ours, "others": others}})
    both = run.evaluate()
    for name, data in (("ours", ours), ("others", others)):
        run.eval_dataset = data
        found = run.evaluate()
        assert found["eval_ref_reward"] == both[f"eval_{name}_ref_reward"]
    assert both["eval_ours_ref_reward"] != both["eval_others_ref_reward"]


def test_a_checkpoint_of_another_guide_is_refused_by_name(tmp_path: Path) -> None:
    trainer(tmp_path, rounds=1, save_strategy="steps", save_steps=2).train()
    other = trainer(tmp_path, {"guide": tiny.model(hidden_size=16).base_model}, rounds=2)
    with pytest.raises(ValueError, match=r"^resume_from_checkpoint: does not fit the model"):
        other.train(resume_from_checkpoint=True)


def test_one_guide_serves_other_etas_through_generate(learnt: QSharpTrainer) -> None:
    prompt = torch.tensor([tiny.tokenizer()("bb")["input_ids"]]).repeat(256, 1)
    means = []
    for eta in (10.0, 0.15):
        torch.manual_seed(0)
        out = learnt.reference.generate(
            prompt, attention_mask=torch.ones_like(prompt), do_sample=True, max_new_tokens=6, top_k=0,
            logits_processor=LogitsProcessorList([learnt.processor(eta)]),
        )  # fmt: skip
        ids = [until_eos(row[2:].tolist(), {tiny.EOS}) for row in out]
        means.append(sum(tiny.even(ids)) / len(ids))
    assert means[1] > means[0] + 0.05


@pytest.mark.parametrize(("law", "guide_type"), [("categorical", "value"), ("mse", "value"), ("categorical", "action")])
def test_other_laws_and_q_type_guides_learn_too(tmp_path: Path, law: str, guide_type: str) -> None:
    """More than a guide that knows nothing, 0. Of four seeds each, the least is 0.09: with 32 prompts and a quarter of
    the samples it hung on the seed, from 0.02 to 0.22.
    """
    run = trainer(
        tmp_path, {"eval_dataset": tiny.prompts(256)}, law=law, guide_type=guide_type, steps_per_round=40, rounds=1,
        samples_per_prompt=64, prompts_per_round=None, per_device_train_batch_size=32, rollout_forward_batch_size=256,
    )  # fmt: skip
    run.train()
    assert run.evaluate()["eval_explained_variance"] > 0.05


# ---- the data of a round -------------------------------------------------------------------------------------------


def test_the_first_round_is_the_references_and_the_second_goes_on_from_cuts(tmp_path: Path) -> None:
    run = trainer(tmp_path, drop_constant=False)
    run.collect()
    assert all(e.first == 0 for e in run.examples)
    assert len(run.examples) == 8 * 4
    torch.nn.init.normal_(run.guide.head.weight)
    run.collect()
    second = list(run.examples)[32:]
    assert len(second) == 32
    assert len({e.first for e in second}) > 2
    for example in second:
        assert 0 <= example.first < len(example.completion) <= 6
        assert example.reward == pytest.approx(tiny.even([example.completion])[0])
        assert tiny.EOS not in example.completion[:-1]
    assert {e.first for e in second if e.completion[e.first] == tiny.EOS} <= set(range(6))


def test_the_rest_is_the_references_own(tmp_path: Path) -> None:
    """With a reference that can only repeat one token, whatever the guide wrote before, the rest is that token."""
    model = tiny.model()
    with torch.no_grad():
        model.lm_head.weight.zero_()
    run = trainer(tmp_path, {"model": model}, drop_constant=False, generation_kwargs={"suppress_tokens": [1]})
    torch.nn.init.normal_(run.guide.head.weight, std=5.0)
    run.collect()
    kept = [e.first + 1 for e in run.examples]
    assert all(len(e.completion) == 6 for e in run.examples)
    assert min(kept) == 1
    assert max(kept) == 6  # a cut after the last token needs nobody to go on


def test_prompts_without_variation_are_left_out() -> None:
    examples = [Example([1], [2], 0, reward, row) for row, reward in ((0, 0.5), (0, 0.5), (1, 0.0), (1, 1.0))]
    assert varied(examples) == examples[2:]


def test_nothing_to_tell_apart_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"^train_dataset: on each of its prompts all completions earn the same"):
        trainer(tmp_path, {"reward_funcs": lambda completions, **_: [1.0] * len(completions)}).train()


def test_completions_that_no_function_scored_count_for_nothing(tmp_path: Path) -> None:
    def every_other(completions: list[str], **_: Any) -> list[float | None]:
        return [1.0 if i % 2 else None for i in range(len(completions))]

    given = {"eval_dataset": tiny.prompts(8), "reward_funcs": every_other}
    found = trainer(tmp_path, given, drop_constant=False).evaluate()
    assert found["eval_reward"] == found["eval_ref_reward"] == 1.0


def test_draws_are_shuffled_passes_over_all() -> None:
    examples = Examples()
    examples.add([Example([1], [2], 0, 0.0, row) for row in range(10)])
    drawn = [e.row for e in examples.draw(list(range(20)), seed=0)]
    assert sorted(drawn[:10]) == sorted(drawn[10:]) == list(range(10))
    assert drawn[:10] != drawn[10:]
    assert [e.row for e in examples.draw([13, 4], seed=0)] == [drawn[13], drawn[4]]


# ---- resuming, saving ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stop", [4, 6])  # between two rounds, and amid one
def test_a_resumed_run_is_the_uninterrupted_one(tmp_path: Path, stop: int) -> None:
    settings: dict[str, Any] = {"save_strategy": "steps", "save_steps": 2, "logging_steps": 3}
    whole = trainer(tmp_path / "whole", **settings)
    whole.train()
    again = trainer(tmp_path / "whole", **settings)
    again.train(resume_from_checkpoint=str(tmp_path / "whole" / f"checkpoint-{stop}"))
    for ours, theirs in zip(again.guide.parameters(), whole.guide.parameters(), strict=True):
        assert torch.equal(ours, theirs)
    other = ("runtime", "per_second", "time/", "loss", "total_flos")  # transformers' loss is that since the resumption
    for name in whole.state.log_history[-2]:
        if not any(part in name for part in other):
            assert logged(again, name)[-1] == pytest.approx(logged(whole, name)[-1], rel=1e-6), name


def test_a_saved_guide_is_the_trained_one(learnt: QSharpTrainer, tmp_path: Path) -> None:
    learnt.save_model(str(tmp_path))
    saved = ValueGuide.from_pretrained(tmp_path)
    ids = torch.tensor([[3, 4, 5]])
    with saved.evaluating(), learnt.guide.evaluating():
        assert torch.equal(saved(ids), learnt.guide(ids))
    again = trainer(tmp_path / "on", {"guide": str(tmp_path)}, law="categorical", atoms=9)
    again.collect()
    assert again.means.drain(again.accelerator)["data/kl"] > 0.1  # it guides from its first round on


def test_a_checkpoint_of_another_trainer_is_refused(tmp_path: Path) -> None:
    other = tiny.trainer(tmp_path, save_strategy="steps", save_steps=2, max_steps=2, num_update_epochs=1)
    other.train()
    with pytest.raises(ValueError, match=r"guide\.json"):
        trainer(tmp_path).train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))


# ---- measures ------------------------------------------------------------------------------------------------------


def test_measures_of_quality() -> None:
    rewards = torch.tensor([0.0, 0.0, 1.0, 1.0, 0.0, 1.0])
    assert quality(rewards, rewards) == pytest.approx(
        {"auroc": 1.0, "explained_variance": 1.0, "calibration_error": 0.0}
    )
    assert auroc(-rewards, rewards) == 0.0
    assert auroc(torch.zeros(6), rewards) == 0.5
    generator = torch.Generator().manual_seed(0)
    predicted, levels = torch.randn(60, generator=generator).round(decimals=1), torch.randint(0, 4, (60,)).double()
    pairs = [(a, b) for a in range(60) for b in range(60) if levels[a] > levels[b]]
    order = [1.0 if predicted[a] > predicted[b] else 0.5 if predicted[a] == predicted[b] else 0.0 for a, b in pairs]
    assert auroc(predicted, levels) == pytest.approx(sum(order) / len(pairs))
    assert "auroc" not in quality(torch.rand(5), torch.ones(5))
    assert quality(torch.full((100,), 0.7), torch.ones(100))["calibration_error"] == pytest.approx(0.3)


# ---- wrong input ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("argument", "changes"),
    [
        ("law", {"law": "beta"}),
        ("atoms", {"atoms": 1}),
        ("reward_high", {"reward_low": 2.0}),
        ("eta", {"eta": 0.0}),
        ("others", {"others": "all"}),
        ("guide_type", {"guide_type": "policy"}),
        ("rounds", {"rounds": 0}),
        ("samples_per_prompt", {"samples_per_prompt": 0}),
        ("max_steps", {"max_steps": 7}),
        ("remove_unused_columns", {"remove_unused_columns": True}),
    ],
)
def test_wrong_settings_are_named(tmp_path: Path, argument: str, changes: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=f"^{argument}: "):
        arguments(tmp_path, **changes)


def test_wrong_models_and_data_are_named(tmp_path: Path) -> None:
    model = tiny.model()
    wrong: list[tuple[str, dict[str, Any]]] = [
        ("guide", {"guide": 3}),
        ("guide", {"guide": tiny.model(vocab_size=40)}),  # does not know every token
        ("guide", {"guide": ValueGuide(model), "model": model}),  # would train the reference
        ("guide", {"guide": ValueGuide(tiny.model(), Law("categorical"))}),  # of another law
        ("train_dataset", {"train_dataset": []}),
    ]
    for argument, given in wrong:
        with pytest.raises(ValueError, match=f"^{argument}: "):
            trainer(tmp_path, given)
    with pytest.raises(ValueError, match=r"^args: must be a QSharpConfig"):
        QSharpTrainer(model, tiny.even, tiny.arguments(tmp_path), tiny.prompts(), None, tiny.tokenizer())  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"^reward_high: a completion earned"):
        trainer(tmp_path, reward_high=0.1).train()
