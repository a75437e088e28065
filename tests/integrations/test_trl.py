"""TRL with the drop-in is TRL without it: log-probs, entropies, losses, gradients, whole steps of its trainers."""

from __future__ import annotations

import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("trl", reason="TRL is not installed (make test-hosts runs these tests with it)")

from tiny import model as tiny_model
from tiny import tokenizer
from trl.trainer import utils

from klq_kernels.integrations import trl as dropin
from klq_kernels.integrations.host import HostMismatch
from klq_kernels.integrations.trl import patch_trl

pytestmark = pytest.mark.usefixtures("one_thread")
ORIGINAL, ORIGINAL_COMPACT = utils._ChunkedLogProbFunction, utils._use_triton
OUTPUTS = ("log_probs", "entropy")


@pytest.fixture(autouse=True)
def _unpatched() -> Iterator[None]:
    yield
    left = utils._ChunkedLogProbFunction is not ORIGINAL
    utils._ChunkedLogProbFunction, utils._use_triton = ORIGINAL, ORIGINAL_COMPACT
    assert not left, "the test left its patch in place"


def head(apply: Any, dtype: torch.dtype = torch.float32, outputs: tuple[str, ...] = OUTPUTS, **changes: Any) -> Any:
    """Results and gradients of one call on peaked logits: the head's function, TRL's or ours."""
    g = torch.Generator().manual_seed(0)
    hidden, weight = (torch.randn(n, 32, generator=g).to(dtype) for n in (40, 301))
    bias = torch.randn(301, generator=g).to(dtype) if changes.pop("bias", False) else None
    weight = weight.to(changes.pop("weight_dtype", dtype))
    targets = torch.randint(301, (40,), generator=g)
    weights = torch.randn(2, 40, generator=g)
    leaves = [t.requires_grad_() for t in (hidden, weight, bias) if t is not None]
    settings = {"temperature": 0.7, "softcap": None, "scale": 1.0} | changes
    found = apply(
        hidden, weight, bias, targets, settings["temperature"], 128, settings["softcap"], settings["scale"], outputs
    )
    loss = sum((x * w).sum() for x, w in zip(found[:2], weights, strict=True) if x is not None)
    return found, torch.autograd.grad(loss, leaves)


def assert_same(ours: Any, theirs: Any, tolerance: float = 1e-5) -> None:
    for a, b in zip(ours[0], theirs[0], strict=True):
        assert (a is None) == (b is None)
        if a is not None:
            assert a.dtype == b.dtype
            torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)
    for a, b in zip(ours[1], theirs[1], strict=True):
        assert a.dtype == b.dtype
        assert float((a.double() - b.double()).norm() / b.double().norm()) < tolerance


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"bias": True},
        {"softcap": 5.0},
        {"softcap": 5.0, "scale": 0.3, "bias": True, "temperature": 1.3},
        {"scale": 0.0625, "bias": True},
        {"outputs": ("log_probs",)},
        {"outputs": ("entropy",)},
        {"weight_dtype": torch.bfloat16},  # cast_lm_head_to_fp32 makes the hidden states fp32
    ],
    ids=lambda changes: "-".join(changes) or "plain",
)
def test_a_call_gives_trls_results_and_gradients(changes: dict[str, Any]) -> None:
    theirs = head(ORIGINAL.apply, **changes)
    with patch_trl():
        assert_same(head(utils._ChunkedLogProbFunction.apply, **changes), theirs)


@pytest.mark.parametrize("autocast", [False, True])
def test_sixteen_bits_are_no_further_from_the_truth_than_trl(autocast: bool) -> None:
    dtype = torch.float32 if autocast else torch.bfloat16
    truth = head(ORIGINAL.apply, torch.float64)

    def errors(apply: Any) -> list[float]:
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            found, gradients = head(apply, dtype)
        assert [g.dtype for g in gradients] == [dtype, dtype]
        pairs = [*zip(found[:2], truth[0][:2], strict=True), *zip(gradients, truth[1], strict=True)]
        return [float(((a.double() - b).norm() / b.norm()).detach()) for a, b in pairs]

    with patch_trl():
        ours = errors(utils._ChunkedLogProbFunction.apply)
    for error, bound in zip(ours, errors(ORIGINAL.apply), strict=True):
        assert error <= 1.5 * bound + 1e-6


def counted(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The rows of each call that TRL's own function gets."""
    rows: list[int] = []

    class Counting:
        forward = ORIGINAL.forward

        @staticmethod
        def apply(hidden: Tensor, *rest: Any) -> Any:
            rows.append(len(hidden))
            return ORIGINAL.apply(hidden, *rest)

    monkeypatch.setattr(utils, "_ChunkedLogProbFunction", Counting)
    return rows


def test_what_linear_logprobs_lacks_is_left_to_trl(monkeypatch: pytest.MonkeyPatch) -> None:
    theirs = head(ORIGINAL.apply, outputs=("log_probs", "mean_logits", "is_top1"))
    rows = counted(monkeypatch)
    with patch_trl():
        apply = utils._ChunkedLogProbFunction.apply
        assert_same(head(apply), head(ORIGINAL.apply))
        assert rows == []
        assert_same(head(apply, outputs=("log_probs", "mean_logits", "is_top1")), theirs)
        head(apply, scale=0.0)
        partitioned = torch.nn.Parameter(torch.randn(301, 32))
        partitioned.ds_id = 0  # type: ignore[attr-defined]
        apply(torch.randn(7, 32), partitioned, None, torch.zeros(7).long(), 1.0, 128, None, 1.0, OUTPUTS)
    assert rows == [40, 40, 7]


def model_run(family: str, labels: Tensor, **settings: Any) -> tuple[Any, list[Tensor]]:
    model = tiny_model(family)
    utils.add_fused_lm_head(model, temperature=0.7, **({"outputs": OUTPUTS} | settings))
    ids = torch.randint(2, 258, labels.shape, generator=torch.Generator().manual_seed(1))
    out = model(ids, labels=labels.where(labels == -100, ids), fused_lm_head=True)
    weights = torch.randn(out.log_probs.shape, generator=torch.Generator().manual_seed(2))
    loss = -(out.log_probs * weights).sum() + (0 if out.entropy is None else 0.1 * out.entropy.sum())
    loss.backward()
    return out, [p.grad for p in model.parameters()]


@pytest.mark.parametrize("family", ["qwen3", "gemma2", "cohere", "granite"])
def test_models_with_a_fused_head_give_the_same(family: str) -> None:
    """Softcap and logit scales as TRL reads them from the config, prompts and padding masked."""
    labels = torch.zeros(3, 12).long()
    labels[:, :5] = -100
    labels[1, 8:] = -100
    theirs = model_run(family, labels)
    with patch_trl():
        ours = model_run(family, labels)
    for name in ("loss", "log_probs", "entropy", "label_mask"):
        torch.testing.assert_close(ours[0][name], theirs[0][name], rtol=1e-5, atol=1e-5)
    for a, b in zip(ours[1], theirs[1], strict=True):
        assert float((a - b).norm()) <= 1e-5 * float(b.norm())


def test_masked_positions_are_dropped_before_the_head(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = counted(monkeypatch)
    labels = torch.full((2, 10), -100)
    labels[:, 7:] = 0
    everything = ("log_probs", "mean_logits")
    model_run("llama", labels, outputs=everything)
    with patch_trl():
        model_run("llama", labels, outputs=everything)
    assert rows == [18, 6]


def test_a_batch_without_a_label_gives_zero_gradients() -> None:
    with patch_trl():
        out, gradients = model_run("llama", torch.full((2, 6), -100))
    assert not out.log_probs.any()
    assert all(not g.any() for g in gradients)


class Recorded:
    """What a run logged, and the weights it left."""

    def __init__(self, trainer: Any) -> None:
        trainer.train()
        self.losses = [log["loss"] for log in trainer.state.log_history if "loss" in log]
        self.norms = [log["grad_norm"] for log in trainer.state.log_history if "grad_norm" in log]
        self.entropies = [log["entropy"] for log in trainer.state.log_history if "entropy" in log]
        self.weights = {n: p.detach().clone() for n, p in trainer.model.named_parameters()}


def grpo(folder: Path, trainer: str = "GRPO", **changes: Any) -> Recorded:
    import trl
    from datasets import Dataset

    settings = {
        "per_device_train_batch_size": 4, "num_generations": 4, "gradient_accumulation_steps": 2, "max_steps": 2,
        "max_completion_length": 6, "learning_rate": 1e-3, "logging_steps": 1, "report_to": [], "use_cpu": True,
        "save_strategy": "no", "temperature": 0.9, "beta": 0.1, "num_iterations": 2, "bf16": False,
        "disable_tqdm": True, "seed": 0,
    } | changes  # fmt: skip
    config = getattr(trl, f"{trainer}Config")(str(folder), **settings)
    model, words = tiny_model("qwen3"), tokenizer()
    model.save_pretrained(folder / "model")  # TRL looks the model up by its name
    words.save_pretrained(folder / "model")
    model.config._name_or_path = str(folder / "model")
    rows = Dataset.from_dict({"prompt": ["hello ", "1+2=", "abc ", "xyz "] * 4})
    return Recorded(
        getattr(trl, f"{trainer}Trainer")(
            model,
            lambda completion_ids, **_: [sum(i % 2 for i in ids) / 6 for ids in completion_ids],
            config,
            train_dataset=rows,
            processing_class=words,
        )
    )


@pytest.mark.parametrize(
    ("trainer", "changes"),
    [("GRPO", {}), ("GRPO", {"cast_lm_head_to_fp32": True, "entropy_coef": 0.01}), ("RLOO", {})],
    ids=["grpo", "grpo-fp32-head-entropy", "rloo"],
)
def test_a_trainer_takes_the_same_steps(
    trainer: str, changes: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = counted(monkeypatch)
    theirs = grpo(tmp_path / "theirs", trainer, **changes)
    assert rows
    rows.clear()
    with patch_trl():
        ours = grpo(tmp_path / "ours", trainer, **changes)
    assert rows == []
    assert len(ours.losses) == 2
    for name in ("losses", "norms", "entropies"):
        assert getattr(ours, name) == pytest.approx(getattr(theirs, name), rel=1e-4, abs=1e-5), name
    for name, weight in theirs.weights.items():
        assert float((ours.weights[name] - weight).norm()) <= 1e-5 * float(weight.norm()), name


def test_a_sampled_gradient_is_an_option(tmp_path: Path) -> None:
    with patch_trl(gradient="sampled", samples=32):
        run = grpo(tmp_path)
    assert all(torch.isfinite(w).all() for w in run.weights.values())
    with patch_trl(gradient="sampled"), pytest.raises(RuntimeError, match="entropy"):
        head(utils._ChunkedLogProbFunction.apply)


def test_it_can_be_undone_and_applied_twice() -> None:
    with patch_trl() as patch:
        replaced = utils._ChunkedLogProbFunction
        assert patch.active
        assert replaced is not ORIGINAL
        with patch_trl() as second:
            assert utils._ChunkedLogProbFunction is replaced
            assert not second.active
        assert utils._ChunkedLogProbFunction is replaced
        with pytest.raises(ValueError, match="options"):
            patch_trl(samples=3, gradient="sampled")
    assert utils._ChunkedLogProbFunction is ORIGINAL
    assert utils._use_triton is ORIGINAL_COMPACT
    patch.undo()
    assert utils._ChunkedLogProbFunction is ORIGINAL


def other_use(model: Any) -> None:
    """An add_fused_lm_head that no longer calls the function."""


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("_ChunkedLogProbFunction", None, "has no _ChunkedLogProbFunction"),
        ("_use_triton", None, "has no _use_triton"),
        ("_ChunkedLogProbFunction", types.SimpleNamespace(forward=lambda ctx, hidden: 0), r"takes \(ctx, hidden\)"),
        ("_use_triton", lambda: True, r"takes \(\), not \(device\)"),
        ("add_fused_lm_head", other_use, "does not use _ChunkedLogProbFunction"),
    ],
)
def test_another_trl_is_refused(name: str, value: Any, message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patched:
        if value is None:
            patched.delattr(utils, name)
        else:
            patched.setattr(utils, name, value)
        before = dict(vars(utils))
        with pytest.raises(HostMismatch, match=message) as raised:
            patch_trl()
        assert "written for trl 1.16" in str(raised.value)
        assert dict(vars(utils)) == before


def test_the_recorded_parameters_are_trls() -> None:
    import inspect

    assert tuple(inspect.signature(ORIGINAL.forward).parameters) == dropin.PARAMETERS


def test_sft_keeps_trls_function_and_scores_completions_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import trl
    from datasets import Dataset

    def run(name: str) -> Recorded:
        config = trl.SFTConfig(
            str(tmp_path / name), per_device_train_batch_size=4, max_steps=2, learning_rate=1e-3, logging_steps=1,
            report_to=[], use_cpu=True, bf16=False, save_strategy="no", disable_tqdm=True, seed=0,
        )  # fmt: skip
        rows = Dataset.from_dict({"prompt": ["hello there ", "one and one is "] * 4, "completion": ["you", "two"] * 4})
        return Recorded(trl.SFTTrainer(tiny_model("qwen3"), config, train_dataset=rows, processing_class=tokenizer()))

    rows = counted(monkeypatch)
    theirs = run("theirs")
    all_positions = sum(rows)
    rows.clear()
    with patch_trl():
        ours = run("ours")
    assert 0 < sum(rows) < all_positions / 2
    assert ours.losses == pytest.approx(theirs.losses, rel=1e-5)
    assert ours.norms == pytest.approx(theirs.norms, rel=1e-4)
