"""Relatives on KLQ's cycle: OREO, TBRM, VinePPO and the frozen value model. What they learn, resuming, wrong input."""

from __future__ import annotations

import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import tiny
import torch
from peft import LoraConfig
from safetensors.torch import load_file
from torch import Tensor

from klq_kernels.trainer import Completions, KLQConfig, KLQTrainer
from klq_kernels.trainer.batches import Sequence
from klq_kernels.trainer.checkpoints import VALUE_FILE
from klq_kernels.trainer.relatives import (
    OREOConfig,
    OREOTrainer,
    TBRMConfig,
    TBRMTrainer,
    VinePPOConfig,
    VinePPOTrainer,
)
from klq_kernels.trainer.relatives.vineppo import step_starts

pytestmark = pytest.mark.usefixtures("one_thread")

TRAINERS: dict[str, type[KLQTrainer]] = {"oreo": OREOTrainer, "tbrm": TBRMTrainer, "vineppo": VinePPOTrainer}


def flat_model() -> Any:
    """A policy that chooses almost evenly, so that a small divergence earns something."""
    model = tiny.model()
    with torch.no_grad():
        model.get_output_embeddings().weight.mul_(0.1)
    return model


def share(completion_ids: list[list[int]], **_: Any) -> list[float]:
    """The share of even ids, of four."""
    return [sum(i % 2 == 0 for i in ids) / 4 for ids in completion_ids]


def trainer(kind: str, folder: Path, given: dict[str, Any] | None = None, **changes: Any) -> KLQTrainer:
    defaults: dict[str, Any] = {
        "per_device_train_batch_size": 8, "max_completion_length": 4, "bootstrap_truncated": False, "max_steps": 8,
        "learning_rate": 3e-3, "lr_scheduler_type": "constant", "save_strategy": "no", "use_cpu": True, "report_to": [],
        "disable_tqdm": True, "seed": 3,
    }  # fmt: skip
    made = TRAINERS[kind]
    args = made.config_class(str(folder), **(defaults | changes))
    rest: dict[str, Any] = {"train_dataset": tiny.prompts(), "processing_class": tiny.tokenizer()} | (given or {})
    return made(rest.pop("model", None) or flat_model(), rest.pop("reward_funcs", tiny.even), args, **rest)


def series(run: KLQTrainer, name: str) -> list[float]:
    return [logs[name] for logs in run.state.log_history if name in logs]


def parameters(run: KLQTrainer) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in run.actor_critic.named_parameters()}


def moved(before: dict[str, Tensor], after: dict[str, Tensor]) -> set[str]:
    return {name for name in before if not torch.equal(before[name], after[name])}


# ---- what they learn -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "changes"),
    [("oreo", {"tau": 0.1}), ("tbrm", {"tau": 0.1}), ("vineppo", {"tau": 0.1, "mc_samples": 4, "mc_every": 2})],
)
def test_rewards_rise(kind: str, changes: dict[str, Any], tmp_path: Path) -> None:
    run = trainer(
        kind, tmp_path, {"reward_funcs": share}, per_device_train_batch_size=64, num_update_epochs=2, max_steps=40,
        rollout_forward_batch_size=512, **changes,
    )  # fmt: skip
    run.train()
    scores = series(run, "objective/scores")
    assert sum(scores[-5:]) / 5 > sum(scores[:5]) / 5 + 0.1, scores
    assert series(run, "objective/kl")[-1] > 0.1
    if kind == "vineppo":
        explained = series(run, "val/explained_variance")
        assert sum(explained) / len(explained) > 0.05
        assert series(run, "rollout/mc_completions")[0] == pytest.approx(64 * 2 * 4, rel=0.05)
    else:
        residuals = series(run, "loss/residual_rms")
        assert residuals[-1] < 0.8 * residuals[0]


def test_oreo_weighs_the_exact_divergence(tmp_path: Path) -> None:
    """The price holds the policy near its reference, and the log has the divergence; without it there is none."""
    found = {}
    for coefficient in (0.0, 5.0):
        run = trainer("oreo", tmp_path, max_steps=12, kl_coef=coefficient)
        run.train()
        found[coefficient] = run
    assert "policy/kl_ref" not in found[0.0].state.log_history[0]
    assert series(found[5.0], "policy/kl_ref")[-1] > 0
    assert series(found[5.0], "objective/kl")[-1] < 0.5 * series(found[0.0], "objective/kl")[-1]


def test_oreo_of_adapters_compares_with_the_base_model(tmp_path: Path) -> None:
    lora = LoraConfig(r=4, target_modules=["q_proj", "lm_head"], task_type="CAUSAL_LM")
    given = {"model": tiny.model(tie_word_embeddings=False), "peft_config": lora}
    run = trainer("oreo", tmp_path, given, num_update_epochs=2, logging_steps=1, max_steps=4)
    run.train()
    assert run.reference is None
    kl = series(run, "policy/kl_ref")
    assert kl[0] == pytest.approx(0, abs=1e-6)
    assert kl[-1] > 1e-4


def test_tbrm_and_vineppo_have_no_value_function(tmp_path: Path) -> None:
    for kind in ("tbrm", "vineppo"):
        changes = {"mc_samples": 2} if kind == "vineppo" else {}
        run = trainer(kind, tmp_path / kind, **changes)
        before = parameters(run)
        run.train()
        names = moved(before, parameters(run))
        assert names
        assert all(name.startswith("policy.") for name in names)


@pytest.mark.parametrize("kind", ["oreo", "tbrm", "vineppo"])
def test_a_resumed_run_is_the_uninterrupted_one(kind: str, tmp_path: Path) -> None:
    """From the middle of a cycle."""
    settings: dict[str, Any] = {"save_strategy": "steps", "save_steps": 2, "logging_steps": 1, "max_steps": 8}
    settings |= {"mc_samples": 2, "mc_every": 3} if kind == "vineppo" else {}
    whole = trainer(kind, tmp_path, **settings)
    whole.train()
    again = trainer(kind, tmp_path, **settings)
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert tiny.losses(again) == tiny.losses(whole)
    assert not moved(parameters(whole), parameters(again))


def test_completions_that_nothing_scores_count_for_nothing(tmp_path: Path) -> None:
    def some(completion_ids: list[list[int]], letter: list[str], **_: Any) -> list[float | None]:
        scores = tiny.even(completion_ids)
        return [None if first < "e" else score for first, score in zip(letter, scores, strict=True)]

    for kind in ("oreo", "tbrm", "vineppo"):
        changes = {"mc_samples": 2} if kind == "vineppo" else {}
        run = trainer(kind, tmp_path / kind, {"reward_funcs": some}, **changes)
        run.train()
        assert all(math.isfinite(loss) for loss in tiny.losses(run))
        assert any(0 < skipped < 1 for skipped in series(run, "completions/skipped"))


def test_tbrm_is_a_mean_over_sequences(tmp_path: Path) -> None:
    """However long they are: two micro-batches and one give the same step."""
    one = trainer("tbrm", tmp_path / "one", per_device_train_batch_size=8, max_steps=1, num_update_epochs=1)
    two = trainer(
        "tbrm", tmp_path / "two", per_device_train_batch_size=4, gradient_accumulation_steps=2, max_steps=1,
        num_update_epochs=1,
    )  # fmt: skip
    for run in (one, two):
        run.train()
    assert tiny.losses(one) == pytest.approx(tiny.losses(two), rel=1e-5)
    for name, p in parameters(one).items():
        torch.testing.assert_close(parameters(two)[name], p, rtol=1e-3, atol=1e-5)


# ---- VinePPO's values ------------------------------------------------------------------------------------------------


def test_sampled_values_are_the_expected_scores(tmp_path: Path) -> None:
    """Of a policy that draws every token evenly: half of those to come, and the even ones that are there."""
    model = tiny.model(tie_word_embeddings=False)
    with torch.no_grad():
        model.lm_head.weight.zero_()
    run = trainer(
        "vineppo", tmp_path, {"model": model}, mc_samples=300, mc_every=2, max_completion_length=6,
        rollout_forward_batch_size=700,
    )  # fmt: skip
    rows = tiny.prompts(3)
    rollout = run.roll_out(rows, seed=0)
    asked: list[list[int]] = []
    reward = run.reward

    def watched(of: Any, finished: Any) -> Any:
        asked.extend(s.completion.tolist() for s in finished.sequences)
        return reward(of, finished)

    run.reward = watched  # type: ignore[method-assign]
    values = run.sampled_values(rollout, rows)  # type: ignore[attr-defined]
    at = 0
    for sequence in rollout.sequences:
        ids = sequence.completion.tolist()
        for t in range(len(ids)):
            start = t - t % 2
            expected = (sum(i % 2 == 0 for i in ids[:start]) + 0.5 * (6 - start)) / 8
            assert values[at].item() == pytest.approx(expected, abs=0.03)
            at += 1
    assert at == len(values)
    assert len(asked) == 300 * sum(len(range(0, s.rows, 2)) for s in rollout.sequences)
    assert max(map(len, asked)) == 6
    prefixes = {tuple(s.completion[:2].tolist()) for s in rollout.sequences}
    assert (
        sum(tuple(ids[:2]) in prefixes for ids in asked) >= 300 * 6
    )  # those of the later states keep what was written


def test_steps_end_with_the_separator() -> None:
    tokenizer = tiny.tokenizer()
    ids = torch.tensor(tokenizer("ab\ncd\n\n")["input_ids"])
    sequence = Sequence(ids[:1], ids, torch.ones(len(ids), dtype=torch.bool))
    config: Any = SimpleNamespace(mc_separator="\n", mc_every=3)
    assert step_starts(sequence, config, tokenizer) == [0, 3, 6]
    config.mc_separator = None
    assert step_starts(sequence, config, tokenizer) == [0, 3, 6]
    config.mc_every = 4
    assert step_starts(sequence, config, tokenizer) == [0, 4]


# ---- the frozen value model ------------------------------------------------------------------------------------------


def knowing_classifier() -> Any:
    """A value model whose head is not zero."""
    model = tiny.classifier(1)
    torch.nn.init.normal_(model.score.weight, std=0.3)
    return model


@pytest.mark.parametrize("changes", [{}, {"algorithm": "ppo"}, {"loss_type": "double_clipped"}, {"value_lam": None}])
def test_a_frozen_value_model_stays_and_the_policy_learns(changes: dict[str, Any], tmp_path: Path) -> None:
    settings = {"freeze_value_model": True, "max_steps": 8, **changes}
    run = tiny.trainer(tmp_path, {"value_model": knowing_classifier()}, **settings)
    before = parameters(run)
    run.train()
    names = moved(before, parameters(run))
    assert names
    assert all(name.startswith("policy.") for name in names)
    optimised = {id(p) for group in run.optimizer.param_groups for p in group["params"]}
    assert not optimised & {id(p) for p in run.actor_critic.value.parameters()}
    given = knowing_classifier().state_dict()
    assert torch.equal(run.actor_critic.value.head.weight, given["score.weight"].float())


@pytest.mark.parametrize("algorithm", ["klq", "ppo"])
def test_its_first_update_is_that_of_a_value_model_that_learns(algorithm: str, tmp_path: Path) -> None:
    """The policy's gradient is the same where V is known as where it is computed again."""
    gradients = []
    for frozen in (True, False):
        run = tiny.trainer(
            tmp_path, {"value_model": knowing_classifier()}, algorithm=algorithm, freeze_value_model=frozen,
            max_steps=1, num_update_epochs=1, max_grad_norm=0.0, optim="sgd", learning_rate=1.0,
        )  # fmt: skip
        before = parameters(run)
        run.train()
        after = parameters(run)
        gradients.append({n: before[n] - after[n] for n in before if n.startswith("policy.")})
    for name, gradient in gradients[1].items():
        torch.testing.assert_close(gradients[0][name], gradient, rtol=1e-3, atol=1e-6, msg=name)
    assert max(g.abs().max() for g in gradients[1].values()) > 1e-3


def test_a_run_with_a_frozen_value_model_resumes(tmp_path: Path) -> None:
    settings: dict[str, Any] = {
        "freeze_value_model": True, "save_strategy": "steps", "save_steps": 2, "logging_steps": 1, "max_steps": 8,
    }  # fmt: skip
    whole = tiny.trainer(tmp_path, {"value_model": knowing_classifier()}, **settings)
    whole.train()
    again = tiny.trainer(tmp_path, {"value_model": tiny.classifier(5)}, **settings)  # the checkpoint has the right one
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert tiny.losses(again) == tiny.losses(whole)
    assert not moved(parameters(whole), parameters(again))
    saved = load_file(tmp_path / "checkpoint-8" / VALUE_FILE)
    assert torch.equal(saved["head.weight"], knowing_classifier().score.weight.float())


def test_a_value_model_learns_alone_and_then_stays(tmp_path: Path) -> None:
    """DVPO's two runs: a warm-up of the value model as a whole run, its folder, and a run with it frozen."""
    critic = tiny.classifier(1)
    first = tiny.trainer(tmp_path, {"value_model": critic}, max_steps=8, value_warmup_steps=8)
    policy = {n: p for n, p in parameters(first).items() if n.startswith("policy.")}
    first.train()
    assert not moved(policy, parameters(first))
    critic.save_pretrained(tmp_path / "critic")
    second = tiny.trainer(tmp_path, {"value_model": str(tmp_path / "critic")}, max_steps=4, freeze_value_model=True)
    values = {n: p for n, p in parameters(first).items() if n.startswith("value.")}
    assert values
    assert not moved(values, parameters(second))
    second.train()
    assert not moved(values, parameters(second))
    assert moved(policy, parameters(second))


# ---- wrong input -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("config", "changes", "message"),
    [
        (OREOConfig, {"kl_coef": -0.1}, "kl_coef: "),
        (OREOConfig, {"lam": 0.9}, "lam: must be 1.0 in OREOConfig; got 0.9"),
        (OREOConfig, {"gamma": 0.9}, "gamma: must be 1.0 in OREOConfig"),
        (OREOConfig, {"algorithm": "klq"}, "algorithm: must be oreo in OREOConfig; got 'klq'"),
        (KLQConfig, {"algorithm": "oreo"}, "algorithm: must be klq or ppo in KLQConfig; got 'oreo'"),
        (TBRMConfig, {"bootstrap_truncated": True}, "bootstrap_truncated: must be False in TBRMConfig"),
        (TBRMConfig, {"off_policy": "retrace"}, "off_policy: must be 'none' in TBRMConfig"),
        (VinePPOConfig, {"engine": "vllm"}, "engine: must be 'transformers' in VinePPOConfig"),
        (VinePPOConfig, {"mc_samples": 0}, "mc_samples: must be at least 1, got 0"),
        (VinePPOConfig, {"mc_every": 0}, "mc_every: must be at least 1, got 0"),
        (VinePPOConfig, {"mc_separator": ""}, "mc_separator: must not be empty"),
        (KLQConfig, {"freeze_value_model": True, "value_warmup_steps": 3}, "value_warmup_steps: must be 0"),
    ],
)
def test_wrong_settings_are_refused(
    config: type[KLQConfig], changes: dict[str, Any], message: str, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=message):
        config(str(tmp_path), use_cpu=True, **changes)


@pytest.mark.parametrize(
    ("config", "changes", "name"),
    [
        (OREOConfig, {"alpha": 0.5}, "alpha"),
        (TBRMConfig, {"value_learning_rate": 1e-3}, "value_learning_rate"),
        (VinePPOConfig, {"mc_separator": "\n", "mc_every": 3}, "mc_every"),
        (KLQConfig, {"freeze_value_model": True, "value_learning_rate": 1e-3}, "value_learning_rate"),
    ],
)
def test_settings_without_effect_are_warned_of(
    config: type[KLQConfig], changes: dict[str, Any], name: str, tmp_path: Path
) -> None:
    with pytest.warns(UserWarning, match=f"{name}: has no effect"):
        config(str(tmp_path), use_cpu=True, **changes)


def test_models_and_functions_that_are_not_read_are_refused(tmp_path: Path) -> None:
    for kind in ("tbrm", "vineppo"):
        with pytest.raises(ValueError, match=f"value_model: is not read by {kind}"):
            trainer(kind, tmp_path, {"value_model": tiny.classifier()})
    with pytest.raises(ValueError, match="rollout_func: cannot go on"):
        trainer("vineppo", tmp_path, {"rollout_func": lambda prompts, trainer: Completions([[5]] * len(prompts))})
    with pytest.raises(ValueError, match="freeze_value_model: needs a value_model"):
        tiny.trainer(tmp_path, freeze_value_model=True)


def test_arguments_of_another_trainer_are_refused(tmp_path: Path) -> None:
    args = tiny.arguments(tmp_path)
    with pytest.raises(ValueError, match="args: must be a OREOConfig, got KLQConfig"):
        OREOTrainer(tiny.model(), tiny.even, args, tiny.prompts(), processing_class=tiny.tokenizer())
    of_oreo = OREOConfig(str(tmp_path), use_cpu=True)
    with pytest.raises(ValueError, match="args: must be a KLQConfig, got OREOConfig"):
        KLQTrainer(tiny.model(), tiny.even, of_oreo, tiny.prompts(), processing_class=tiny.tokenizer())
