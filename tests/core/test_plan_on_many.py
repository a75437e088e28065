"""``klq plan`` on many GPUs: its bytes against those of real steps on 2 and 4 processes, and the answers it gives."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("transformers")
import traffic
from ranks import Ranks
from typer.testing import CliRunner

from klq_kernels.commands.cli import app
from klq_kernels.commands.plan import memory, options, run, search, shapes, table, timing
from klq_kernels.commands.plan import traffic as planned
from klq_kernels.trainer.config import PLACEMENTS

GIB = 2**30
GUIDE = (Path(__file__).parents[2] / "docs" / "plan.md").read_text()
TINY = shapes.Model(
    hidden=32, vocab=traffic.VOCAB, layers=2, intermediate=64, kv_share=0.5, attention=32, heads=4
)  # the model that ``traffic`` trains
SMALL = run.Run(batch=1, length=traffic.LENGTH, response=8, dtype=torch.float32, models=1)
SIZES = pytest.mark.parametrize("size", [2, 4])


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Ranks]:
    started = Ranks(4, tmp_path_factory.mktemp("ranks"))
    yield started
    started.close()


def by_kind(moves: list[planned.Move]) -> dict[str, int]:
    kinds: dict[str, int] = {}
    for move in moves:
        kinds[move.kind] = kinds.get(move.kind, 0) + move.size
    return kinds


def assert_standing(found: dict[str, int], planned_run: run.Run) -> None:
    standing = memory.plan(TINY, planned_run).standing
    names = {"weights": "weights", "gradients": "gradients", "states": "optimiser state (adamw)"}
    for name, size in found.items():
        assert size == standing[names[name]], name


@SIZES
@pytest.mark.parametrize(("checkpointing", "half"), [(True, True), (False, False)])
def test_a_step_under_fsdp2(ranks: Ranks, size: int, checkpointing: bool, half: bool) -> None:
    changes: dict[str, Any] = {"dtype": torch.bfloat16, "weights": torch.float32} if half else {}
    sharded = SMALL._replace(gpus=size, shard="fsdp2", checkpointing=checkpointing, **changes)
    for moved, standing in ranks.run(size, traffic.fsdp2, checkpointing, half):
        assert moved == by_kind(planned.traffic(TINY, sharded))
        assert_standing(standing, sharded)


@SIZES
def test_a_step_under_ddp(ranks: Ranks, size: int) -> None:
    copied = SMALL._replace(gpus=size, shard="ddp")
    for moved, standing in ranks.run(size, traffic.ddp):
        assert moved == by_kind(planned.traffic(TINY, copied))
        assert_standing(standing, copied)


@SIZES
@pytest.mark.parametrize("checkpointing", [True, False])
def test_a_step_of_the_body_under_tensor_parallelism(ranks: Ranks, size: int, checkpointing: bool) -> None:
    model, split = TINY._replace(kv_share=1.0), SMALL._replace(gpus=size, tp=size, checkpointing=checkpointing)
    body = [move for move in planned.traffic(model, split) if "head" not in move.name]
    head = model.embeddings // size * 4
    for moved, standing in ranks.run(size, traffic.tensor_parallel, checkpointing):
        assert moved == by_kind(body)
        assert standing["weights"] == memory.plan(model, split).standing["weights"] - head


@SIZES
@pytest.mark.parametrize("apart", [True, False], ids=["FSDP2", "tensor parallel"])
def test_a_split_head(ranks: Ranks, size: int, apart: bool) -> None:
    """All but the ranks' comparison of their calls, a few integers each."""
    model = shapes.Model(hidden=16, vocab=64, layers=0, intermediate=64)
    split = run.Run(4 // size if apart else 4, 8, 8, torch.float32, models=1, gpus=size)
    split = split._replace(shard="fsdp2", head="split") if apart else split._replace(tp=size)
    head = [move for move in planned.traffic(model, split) if "head" in move.name]
    sequences = 8 * 7 * size + 4 * 4  # how many each rank has, in seven integers, and the lengths of all
    compared = 8 * 3 * size + (sequences if apart else 0)
    for calls in ranks.run(size, traffic.split_head, apart):
        moved: dict[str, int] = {}
        for name, count in calls:
            kind = name.replace("_", "-")
            moved[kind] = moved.get(kind, 0) + count
        moved["all-gather"] -= compared
        assert moved == by_kind(head)


def test_what_rings_send() -> None:
    gather, add = planned.Move("", "all-gather", 800, 8), planned.Move("", "all-reduce", 800, 8)
    assert (gather.sent, add.sent) == (700, 1400)


@pytest.mark.parametrize(
    ("name", "total", "active"),
    [
        ("llama-3.1-8b", 8.03, 8.03),
        ("qwen3-32b", 32.8, 32.8),
        ("llama-3.1-70b", 70.6, 70.6),
        ("qwen3-235b-a22b", 235, 22.2),
        ("llama-3.1-405b", 406, 406),
    ],
)
def test_presets_have_the_published_sizes(name: str, total: float, active: float) -> None:
    model = shapes.preset(name)
    assert model.size / 1e9 == pytest.approx(total, rel=0.005)
    assert model.active / 1e9 == pytest.approx(active, rel=0.005)


def test_experts_are_read_from_a_config(tmp_path: Path) -> None:
    from transformers import Qwen3MoeConfig

    config = Qwen3MoeConfig(
        hidden_size=32, vocab_size=256, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, head_dim=16,
        moe_intermediate_size=24, num_experts=8, num_experts_per_tok=2, mlp_only_layers=[], decoder_sparse_step=1,
    )  # fmt: skip
    config.save_pretrained(tmp_path)
    model = shapes.from_config(str(tmp_path))
    assert (model.experts, model.active_experts, model.intermediate, model.width) == (8, 2, 24, 64)
    assert model.routed == model._replace(routed_parameters=None).routed == 2 * 8 * 3 * 32 * 24
    assert model.active == model.size - model.routed * 6 // 8
    norms_of_heads = 2 * 2 * 16
    assert model.size == model._replace(parameters=None, block_parameters=None).size + norms_of_heads


EIGHT_B = shapes.preset("llama-3.1-8b")
MANY = run.Run(batch=1, length=2048, response=1024, gpus=8, shard="fsdp2")


def test_memory_falls_with_the_stage() -> None:
    sizes = [
        sum(memory.plan(EIGHT_B, MANY._replace(shard=shard, models=1)).standing.values())
        for shard in ("ddp", "zero1", "zero2", "zero3")
    ]
    assert sizes == sorted(sizes, reverse=True)
    standing = memory.plan(EIGHT_B, MANY._replace(shard="zero3")).standing
    names = ("weights", "gradients", "fp32 masters", "optimiser state (adamw)", "reference")
    assert sum(standing[name] for name in names) == pytest.approx(18 * EIGHT_B.size / 8, rel=1e-6)


def test_the_optimiser_and_the_reference_on_the_host() -> None:
    found = memory.plan(EIGHT_B, MANY._replace(shard="zero2", offload_optimizer=True, ref_placement="cpu"))
    assert not {"fp32 masters", "optimiser state (adamw)", "reference"} & set(found.standing)
    assert found.host["reference"] == 2 * EIGHT_B.size
    assert found.host["fp32 masters"] == pytest.approx(4 * EIGHT_B.size / 8, rel=1e-6)
    assert sum(found.scoring.values()) == found.scoring["weights"] + 2 * EIGHT_B.size
    moves = planned.traffic(EIGHT_B, MANY._replace(shard="zero2", offload_optimizer=True))
    assert by_kind(moves)["host"] == pytest.approx(2 * 2 * EIGHT_B.size / 8, rel=1e-6)


def test_a_reference_in_half_the_bits_takes_half_the_memory() -> None:
    wide = MANY._replace(weights=torch.float32)
    half = memory.plan(EIGHT_B, wide._replace(ref_dtype=torch.bfloat16)).standing["reference"]
    assert 2 * half == memory.plan(EIGHT_B, wide).standing["reference"]


def test_a_split_head_is_never_whole() -> None:
    whole, split = (memory.plan(EIGHT_B, MANY._replace(head=head)) for head in ("gathered", "split"))
    assert whole.fused.terms["weight gradient"] == 2 * EIGHT_B.embeddings
    assert "weight gradient" not in split.fused.terms
    ends = "gathered embeddings and head"
    assert whole.standing[ends] - split.standing[ends] == 2 * EIGHT_B.embeddings
    assert split.fused.forward["gathered tokens"] == 8 * 1024 * 4096 * 2
    assert (split.problem.tokens, split.problem.vocab) == (8 * 1024, EIGHT_B.vocab // 8)


@pytest.mark.parametrize(
    ("changes", "name"),
    [
        ({"gpus": 0}, "gpus"),
        ({"gpus": 12, "tp": 8}, "gpus"),
        ({"shard": "fsdp1"}, "shard"),
        ({"shard": "none"}, "shard"),
        ({"gpus": 1, "shard": "fsdp2"}, "shard"),
        ({"gpus": 24, "tp": 3}, "tp"),
        ({"tp": 2, "shard": "zero3"}, "tp"),
        ({"cp": 2, "shard": "zero2"}, "cp"),
        ({"cp": 8, "length": 2044}, "cp"),
        ({"shard": "zero1", "weights": torch.float32}, "weights"),
        ({"head": "halved"}, "head"),
        ({"head": "split", "shard": "ddp"}, "head"),
        ({"head": "split", "tp": 2}, "head"),
        ({"head": "split", "cp": 2}, "head"),
        ({"offload_optimizer": True}, "offload_optimizer"),
        ({"ref_placement": "sharded", "shard": "ddp"}, "ref_placement"),
        ({"ref_placement": "disk"}, "ref_placement"),
        ({"lora": 16, "ref_dtype": torch.bfloat16}, "ref_dtype"),
    ],
)
def test_impossible_combinations_are_named(changes: dict[str, Any], name: str) -> None:
    with pytest.raises(ValueError, match=f"^{name}: "):
        memory.plan(EIGHT_B, MANY._replace(**changes))


def test_a_tied_head_is_not_split() -> None:
    with pytest.raises(ValueError, match=r"^head: a tied one"):
        memory.plan(EIGHT_B._replace(tied=True), MANY._replace(head="split"))


def test_placements_are_the_trainers() -> None:
    assert run.PLACEMENTS == PLACEMENTS


@pytest.mark.parametrize("name", shapes.PRESETS)
@pytest.mark.parametrize("gpus", [8, 64, 1024])
def test_every_model_has_an_answer(name: str, gpus: int) -> None:
    """Either the largest batch fits and one more does not, or the advice lowers the memory."""
    model, budget = shapes.preset(name), 78 * GIB
    tried = MANY._replace(gpus=gpus)
    content = json.loads(json.dumps(table.report(model, tried, budget, timing.H100)))
    most = content["largest"]["batch"]["fused"]
    if most:
        assert search.total(model, tried._replace(batch=most)) <= budget
        assert search.total(model, tried._replace(batch=most + 1)) > budget
    else:
        best = content["advice"][0]
        assert best["total"] < content["total_bytes"]["fused"]
        assert best["total"] == min(change["total"] for change in content["advice"])
        assert content["fewest_gpus"] is None or content["fewest_gpus"] > gpus
    took = content["seconds"]
    assert 0 < took["computing"] <= took["least"] <= took["most"]


def test_where_the_published_limits_lie() -> None:
    """16 bytes a parameter: 405B on 64 GPUs cannot fit 80 GB each, and 8B on 8 can."""
    fits = {
        (name, gpus): search.total(shapes.preset(name), MANY._replace(gpus=gpus, models=1)) <= 78 * GIB
        for name, gpus in (("llama-3.1-8b", 8), ("llama-3.1-70b", 8), ("llama-3.1-70b", 64), ("llama-3.1-405b", 64))
    }
    assert list(fits.values()) == [True, False, True, False]


def test_active_parameters_decide_time_and_all_decide_traffic() -> None:
    model = shapes.preset("qwen3-235b-a22b")
    tried = MANY._replace(gpus=128)
    dense = 8 * 2 * model.active_body * 2048 / 1e15
    assert timing.step_seconds(model, tried, 1e15) == pytest.approx(dense / 2)  # 4 passes of 2 operations
    gathered = planned.traffic(model, tried)[0]
    assert gathered.size == 2 * model.size


def test_a_group_within_a_node_uses_its_links() -> None:
    rates = timing.H100
    inside = planned.Move("", "all-reduce", 8, 8)
    between = planned.Move("", "all-gather", 8, 128, 8)
    wide = planned.Move("", "all-gather", 8, 1024)
    assert [timing.bandwidth(move, rates) for move in (inside, between, wide)] == [450e9, 50e9, 400e9]


def plan_of(*flags: str) -> Any:
    return CliRunner().invoke(app, ["plan", *flags], env={"COLUMNS": "110"})


def test_the_guides_examples_are_what_is_printed() -> None:
    examples = re.findall(r"```console\n\$ klq plan (.*?)\n(.*?)```", GUIDE, re.DOTALL)
    assert len(examples) == 2
    for flags, text in examples:
        printed = plan_of(*flags.split()).output
        assert [line.rstrip() for line in printed.splitlines()] == [line.rstrip() for line in text.splitlines()]


def test_the_guide_names_every_rate() -> None:
    for number in ("760", "3000", "450", "50", "64"):
        assert f"| {number} " in GUIDE


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--preset", "gpt-5"], "preset: must be one of llama-3.1-8b"),
        (["--preset", "qwen3-32b", "--config", "x"], "preset: is given beside config"),
        (
            ["--preset", "qwen3-32b", "--vocab", "7", "--kv-share", "1"],
            "--vocab, --kv-share: the --config or --preset says",
        ),
        (["--gpus", "8", "--link-bandwidth", "0"], "link_bandwidth: must be"),
        (["--gpus", "8", "--ref-dtype", "int8"], "ref_dtype: must be one of"),
        (["--gpus", "8", "--budget-gib", "-1"], "budget_gib: must be"),
    ],
)
def test_bad_options_are_named(flags: list[str], words: str) -> None:
    refused = plan_of(*flags)
    assert isinstance(refused.exception, ValueError)
    assert str(refused.exception).startswith(words)


def test_given_rates_take_the_place_of_known_ones() -> None:
    rates = options.rates(timing.H100, 4, tflops=100, link_bandwidth=25, memory_bandwidth=None)
    assert rates == timing.H100._replace(flop=1e14, link=25e9, gpus_per_node=4)


def test_the_tiny_model_is_the_one_that_is_planned() -> None:
    assert sum(p.numel() for p in traffic.model().parameters()) == TINY.size
