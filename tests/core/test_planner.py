"""The planner: chunk sizes, predicted memory against measured memory, and the plans of ``klq plan``."""

from __future__ import annotations

import json
import math
from typing import Any

import pytest
import torch

from bench import planner_accuracy
from bench.shapes import Shape
from klq_kernels.commands import loss_memory
from klq_kernels.commands.plan import memory, run, search, shapes, table, timing
from klq_kernels.vocabulary import chunking

CPU, GPU = torch.device("cpu"), torch.device("cuda")
GIB = 2**30


def problem(n: int = 512, h: int = 256, v: int = 50_304, **changes: Any) -> loss_memory.Problem:
    return loss_memory.Problem(n, h, v, torch.float32, CPU)._replace(**changes)


@pytest.mark.parametrize("device", [CPU, GPU])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("n", "vocab"), [(1, 7), (4096, 50_304), (100_000, 151_936), (3, 10**9)])
def test_a_chunk_of_logits_stays_within_the_default_workspace(
    n: int, vocab: int, dtype: torch.dtype, device: torch.device
) -> None:
    rows = chunking.chunk_rows(n, vocab, dtype, device, None)
    workspace = chunking.CPU_WORKSPACE if device == CPU else chunking.GPU_WORKSPACE
    row = chunking.row_stride(vocab) * dtype.itemsize
    assert rows == 1 or rows * row <= workspace
    most = max(workspace // row, 1)
    assert math.ceil(n / rows) <= math.ceil(n / (7 / 8 * most)), "hardly more chunks than the workspace asks for"


def test_over_chunking_is_avoided_where_everything_fits() -> None:
    """Liger #1414, #1472: many small chunks where one would do."""
    assert chunking.chunk_rows(1024, 50_304, torch.bfloat16, GPU, None) == 1024


def test_a_gpu_cuts_into_chunks_as_large_as_the_sums_of_the_gradient() -> None:
    """Each chunk more reads and writes V x H fp32 numbers once more: few chunks, in no more memory than those take."""
    many = loss_memory.Problem(16_384, 2048, 248_320, torch.bfloat16, GPU)
    assert (many.rows, many.chunks) == (4096, 4)
    assert many.rows * many.row_bytes == 4 * 248_320 * 2048 > chunking.GPU_WORKSPACE
    assert "1,940 MiB" in loss_memory.why_chunks(many)
    assert many._replace(weight_gradient=False).chunks == 8, "nothing is added up where the head is frozen"
    fp32_weight = many._replace(tokens=8192, hidden=4096, vocab=128_256, weight_dtype=torch.float32)
    assert fp32_weight.chunks == 1


def test_a_workspace_too_small_for_a_row_is_named() -> None:
    with pytest.raises(ValueError, match="workspace_bytes"):
        chunking.chunk_rows(8, 1000, torch.float32, CPU, 100)


def test_why_chunks_names_what_bounds_them() -> None:
    assert "one chunk" in loss_memory.why_chunks(problem(n=8))
    assert "256 MiB" in loss_memory.why_chunks(problem(n=100_000))
    assert "workspace_bytes" in loss_memory.why_chunks(problem(n=100_000, workspace_bytes=2**24))
    assert "1024 MiB" in loss_memory.why_chunks(problem(n=100_000, device=GPU))
    assert "24,576 rows" in loss_memory.why_chunks(problem(n=100_000, v=1000, device=GPU))


def test_memory_of_what_nobody_needs_is_left_out() -> None:
    terms = loss_memory.fused_memory(problem(weight_gradient=False)).terms
    assert set(terms) == {"logits chunk", "hidden gradient", "hidden gradient chunk"}
    assert "weight gradient" not in loss_memory.naive_memory(problem(weight_gradient=False)).backward


@pytest.mark.lengthy
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_predicted_memory_is_within_a_tenth_of_the_measured(dtype: torch.dtype) -> None:
    """On a CPU, in fresh processes; large enough that a process's own noise does not matter."""
    for row in planner_accuracy.accuracy([Shape("test", 1536, 128, 50_304, dtype)], CPU):
        assert row["ratio"] == pytest.approx(1.0, abs=0.1), row


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU here")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_predicted_memory_is_within_a_twentieth_on_cuda(dtype: torch.dtype) -> None:
    for row in planner_accuracy.accuracy([Shape("test", 8192, 1024, 50_304, dtype)], GPU):
        assert row["ratio"] == pytest.approx(1.0, abs=0.05), row


LLAMA = shapes.Model(hidden=4096, vocab=128_256, layers=32, intermediate=14_336, kv_share=0.25)
RUN = run.Run(batch=8, length=2048, response=1024)


def test_parameters_are_counted_from_the_sizes() -> None:
    assert LLAMA.size == pytest.approx(8.03e9, rel=0.001)


def test_a_config_is_read_from_a_directory(tmp_path: Any) -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(
        hidden_size=64, vocab_size=500, num_hidden_layers=3, intermediate_size=96, num_attention_heads=4,
        num_key_value_heads=2,
    )  # fmt: skip
    config.save_pretrained(tmp_path)
    model = shapes.from_config(str(tmp_path))
    assert (model.hidden, model.vocab, model.layers, model.kv_share) == (64, 500, 3, 0.5)
    assert model.parameters == model._replace(parameters=None).size


def test_a_step_with_the_fused_loss_needs_less() -> None:
    found = memory.plan(LLAMA, RUN)
    assert found.total(found.fused) < found.total(found.naive)
    assert sum(found.standing.values()) + found.fused.peak == found.total(found.fused)


def test_lora_leaves_out_the_heads_gradient_and_its_optimiser_state() -> None:
    full, lora = memory.plan(LLAMA, RUN), memory.plan(LLAMA, RUN._replace(lora=16))
    assert "weight gradient fp32" in full.fused.terms
    assert "weight gradient fp32" not in lora.fused.terms
    assert sum(lora.standing.values()) < sum(full.standing.values()) / 3
    assert "2 matrix products" in table.strategy(lora)


def test_adapters_share_the_model_with_the_reference() -> None:
    lora = memory.plan(LLAMA, RUN._replace(lora=16))
    assert lora.standing["weights"] == 2 * LLAMA.size
    assert "reference" not in lora.standing
    assert memory.plan(LLAMA, RUN).standing["reference"] == 2 * LLAMA.size
    assert memory.plan(LLAMA, RUN._replace(lora=16, models=2)).standing["reference"] == 2 * LLAMA.size


def test_fp32_weights_under_autocast_take_twenty_bytes_a_parameter() -> None:
    """``bf16=True`` of the trainer: weights, gradients and two moments of the policy, and the reference's weights."""
    found = memory.plan(LLAMA, RUN._replace(weights=torch.float32))
    standing = {name: size for name, size in found.standing.items() if "activations" not in name}
    of_weights = sum(
        size for name, size in standing.items() if name.startswith(("weights", "reference", "gradients", "optimiser"))
    )
    assert of_weights == 20 * LLAMA.size
    assert found.fused.terms["weight cast"] == 2 * LLAMA.vocab * LLAMA.hidden
    assert memory.autocast_bytes(LLAMA, RUN._replace(weights=torch.float32, checkpointing=False)) < 2 * LLAMA.size
    with pytest.raises(ValueError, match="weights"):
        memory.plan(LLAMA, RUN._replace(weights=torch.float16))


@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16])
def test_what_a_step_holds_is_what_is_counted(stored: torch.dtype) -> None:
    tiny = pytest.importorskip("tiny")
    model = tiny.model().to(stored)
    optimizer = torch.optim.AdamW(model.parameters())
    model(input_ids=torch.arange(6)[None], labels=torch.arange(6)[None]).loss.backward()
    optimizer.step()

    def size(tensors: Any) -> int:
        return sum(t.nbytes for t in tensors)

    parameters = list(model.parameters())
    counted = shapes.Model(8, 8, 1, 8, parameters=sum(p.numel() for p in parameters))
    run = RUN._replace(dtype=torch.bfloat16, weights=stored, models=1)
    standing = memory.plan(counted, run).standing
    assert standing["weights"] == size(parameters)
    assert standing["gradients"] == size(p.grad for p in parameters)
    moments = size(t for state in optimizer.state.values() for t in state.values() if t.dim())
    master = 0 if stored == torch.float32 else 4 * counted.size  # which torch's own AdamW goes without
    fp32_moments = moments if stored == torch.float32 else 2 * moments
    assert standing["optimiser state (adamw)"] == fp32_moments
    assert standing.get("fp32 masters", 0) == master


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_heads_gradient_is_counted_once(dtype: torch.dtype) -> None:
    """It stands among the step's gradients; the loss adds an fp32 accumulator beside one of 16 bits alone."""
    found = memory.plan(LLAMA, RUN._replace(dtype=dtype))
    for loss in (found.fused, found.naive):
        assert "weight gradient" not in loss.terms
    assert ("weight gradient fp32" in found.fused.terms) == (dtype != torch.float32)


@pytest.mark.parametrize("axis", ["batch", "length"])
@pytest.mark.parametrize("fused", [True, False])
def test_the_largest_that_fits_fits_and_one_more_does_not(axis: str, fused: bool) -> None:
    run, budget = RUN._replace(lora=16), 48 * GIB
    count = search.largest(LLAMA, run, budget, fused=fused, axis=axis)

    def total(value: int) -> int:
        changes = {axis: value} if axis == "batch" else {"length": value, "response": math.ceil(value / 2)}
        found = memory.plan(LLAMA, run._replace(**changes))
        return found.total(found.fused if fused else found.naive)

    assert total(count) <= budget < total(count + 1)


def test_nothing_fits_a_budget_below_the_weights() -> None:
    assert search.largest(LLAMA, RUN, GIB, fused=True, axis="batch") == 0


@pytest.mark.parametrize(
    ("changes", "name"),
    [
        ({"batch": 0}, "batch"),
        ({"response": 4096}, "response"),
        ({"lora": -1}, "lora"),
        ({"optimizer": "x"}, "optimizer"),
    ],
)
def test_bad_runs_are_named(changes: dict[str, Any], name: str) -> None:
    with pytest.raises(ValueError, match=name):
        memory.plan(LLAMA, RUN._replace(**changes))


def test_time_follows_the_products() -> None:
    head = memory.problem(LLAMA, RUN)
    assert timing.loss_seconds(head, 1e14) == pytest.approx(3 * 2 * 8192 * 4096 * 128_256 / 1e14)
    assert timing.step_seconds(LLAMA, RUN, 1e14) > timing.loss_seconds(head, 1e14)


def test_a_gemm_rate_is_measured() -> None:
    assert timing.measured_gemm_rate(problem(n=64, h=32, v=128)) > 0


def test_klq_plan_predicts_from_a_config(tmp_path: Any) -> None:
    transformers = pytest.importorskip("transformers")
    cli = pytest.importorskip("klq_kernels.commands.cli")
    from typer.testing import CliRunner

    transformers.LlamaConfig(
        hidden_size=64, vocab_size=500, num_hidden_layers=2, num_attention_heads=4
    ).save_pretrained(tmp_path)
    command = ["plan", "--config", str(tmp_path), "--device", "cpu", "--budget-gib", "1", "--tflops", "0.1"]
    done = CliRunner().invoke(cli.app, [*command, "--json"])
    assert done.exit_code == 0, done.output
    content = json.loads(done.output)
    assert content["model"]["vocab"] == 500
    assert content["largest"]["batch"]["fused"] >= 1
    shown = CliRunner().invoke(cli.app, command).output
    for text in ("loss, peak", "largest batch within 1.00 GiB", "Strategy: one pass", "TFLOP/s"):
        assert text in shown


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--dtype", "fp8"], "dtype: must be one of"),
        (["--device", "tpu"], "device: must be cuda or cpu, got 'tpu'"),
        (["--tflops", "0"], "tflops: must be"),
        (["--config", "/no/such/folder"], "config: cannot load '/no/such/folder'"),
        (["--measure", "--device", "cuda"], "device: PyTorch sees no GPU here"),
    ],
)
def test_klq_plan_names_what_is_wrong(flags: list[str], words: str, monkeypatch: pytest.MonkeyPatch) -> None:
    cli = pytest.importorskip("klq_kernels.commands.cli")
    from typer.testing import CliRunner

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    refused = CliRunner().invoke(cli.app, ["plan", *flags])
    assert isinstance(refused.exception, ValueError)
    assert str(refused.exception).startswith(words)


def test_the_rate_is_measured_on_what_is_here(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert timing.device_for(None, measure=True) == CPU
    assert timing.device_for(None, measure=False) == GPU


def test_report_is_plain_json() -> None:
    content = json.loads(json.dumps(table.report(LLAMA, RUN, 640 * GIB, timing.Rates(flop=4e14))))
    assert content["largest"]["batch"]["fused"] >= content["largest"]["batch"]["naive"] > 0
    assert content["chunk_rows"] * content["chunks"] >= 8192
    table.show(content)
