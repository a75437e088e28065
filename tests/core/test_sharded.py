"""A head split over processes gives what one process gives with all of it; and so does time that is cut over them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from datetime import timedelta
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import runs_under
import sharding
import torch
from cases import (
    LOSS_TYPES,
    Case,
    Outcome,
    assert_as_precise_as,
    assert_close_to_scale,
    differentiate,
    make_case,
    plain_klq_loss,
    ragged_mask,
    workspace_for,
)
from hypothesis import example, given, settings
from hypothesis import strategies as st
from processes import ROOT, TWO_PROCESSES, start
from ranks import Ranks
from strategies import chunk_rows, masks, seeds
from torch import Tensor

from klq_kernels import backends, fused_klq_loss, klq_targets, linear_logprobs, reverse_scan
from klq_kernels.reference import naive_klq_loss
from klq_kernels.vocabulary.chunks import Statistics
from klq_kernels.vocabulary.sharded import merge

MOST = 4


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Ranks]:
    started = Ranks(MOST, tmp_path_factory.mktemp("ranks"))
    yield started
    started.close()


@st.composite
def splits(draw: st.DrawFn, vocab: int) -> list[int]:
    """Rows of the head per rank: 1, 2 or 4 ranks, any of which may have none."""
    size = draw(st.sampled_from([1, 2, 4]))
    cuts = sorted(draw(st.lists(st.integers(0, vocab), min_size=size - 1, max_size=size - 1)))
    edges = [0, *cuts, vocab]
    return [b - a for a, b in pairwise(edges)]


def together(found: list[Outcome]) -> Outcome:
    """The outcome of all ranks: rows of the head one after another, everything else the same bits on each."""
    first = found[0]
    for other in found[1:]:
        assert torch.equal(first.loss, other.loss)
        for name, value in first.metrics.items():
            assert torch.equal(value, other.metrics[name]), name
        for name in ("hidden", "values"):
            assert torch.equal(first.gradients[name], other.gradients[name]), name
    rows = {n: torch.cat([f.gradients[n] for f in found]) for n in ("weight", "bias") if n in first.gradients}
    return Outcome(first.loss, first.metrics, first.gradients | rows)


def assert_close(ours: Outcome, theirs: Outcome) -> None:
    left, right = ours.tensors(), theirs.tensors()
    assert left.keys() == right.keys()
    for name, value in left.items():
        assert_close_to_scale(value, right[name], name)


@settings(max_examples=20)
@given(
    masks(), st.sampled_from([1, 2, 17, 131]).flatmap(lambda v: st.tuples(st.just(v), splits(v))), seeds, chunk_rows,
    st.sampled_from(LOSS_TYPES), st.booleans(), st.booleans(), st.sampled_from(["padded", "packed", "holes"]),
    st.sampled_from([{}, {"softcap": 10.0}, {"temperature": 0.7}, {"return_entropy": True}]),
)  # fmt: skip
@example(ragged_mask(4, 8), (131, [0, 60, 0, 71]), 0, 3, "l2", True, True, "holes", {"return_entropy": True})
@pytest.mark.runs("tensor parallel", "loss")
def test_loss_of_a_split_head(
    ranks: Ranks, mask: Tensor, split: tuple[int, list[int]], seed: int, rows: int | None, loss_type: str,
    on_policy: bool, bias: bool, layout: str, extras: dict[str, Any],
) -> None:  # fmt: skip
    vocab, sizes = split
    case = make_case(mask, vocab=vocab, seed=seed, spread="large" if seed % 2 else "peaked")
    case = case if layout == "padded" else case.packed(holes=layout == "holes")
    workspace = None if rows is None else workspace_for(rows, case)
    options = {
        **case.loss_arguments(on_policy=on_policy, bootstrap=on_policy), **extras,
        "loss_type": loss_type, "bias": bias, "workspace_bytes": workspace,
    }  # fmt: skip
    found = together(ranks.run(len(sizes), sharding.loss, case, sizes, options))
    assert_close(found, differentiate(fused_klq_loss, case, **options))


@settings(max_examples=12)
@given(
    masks(), st.sampled_from([3, 131]).flatmap(lambda v: st.tuples(st.just(v), splits(v))), seeds, chunk_rows,
    st.booleans(), st.sampled_from([{}, {"softcap": 10.0}, {"temperature": 0.7}]),
)  # fmt: skip
@pytest.mark.runs("tensor parallel", "log-probabilities")
def test_logprobs_of_a_split_head(
    ranks: Ranks, mask: Tensor, split: tuple[int, list[int]], seed: int, rows: int | None, entropy: bool,
    extras: dict[str, Any],
) -> None:  # fmt: skip
    vocab, sizes = split
    case = make_case(mask, vocab=vocab, seed=seed)
    options = {**extras, "return_entropy": entropy, "workspace_bytes": rows and workspace_for(rows, case)}
    by = (case.advantages, case.old_values, case.weights if entropy else None)
    found = ranks.run(len(sizes), sharding.sharded_logprobs, case, sizes, by, options)
    whole = sharding.logprobs(None, case, by, options)
    for name, value in whole.items():
        ours = torch.cat([f[name] for f in found]) if name in ("weight", "bias") else found[0][name]
        assert_close_to_scale(ours, value, name)


@pytest.mark.parametrize("sizes", [[70, 61], [100, 0, 1, 30]], ids=str)
@pytest.mark.parametrize("on_policy", [False, True], ids=["targets", "on-policy"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("extras", [{}, {"logits_dtype": torch.float32}], ids=["", "fp32-logits"])
def test_precision_of_a_split_head(
    ranks: Ranks, sizes: list[int], on_policy: bool, dtype: torch.dtype, extras: dict[str, Any]
) -> None:
    """16 bits: as precise as the whole head in one process has to be."""
    case = make_case(ragged_mask(5, 24), spread="large", dtype=dtype)
    options = case.loss_arguments(on_policy=on_policy)
    found = together(ranks.run(len(sizes), sharding.loss, case, sizes, {**options, **extras})).tensors()
    plain = differentiate(plain_klq_loss, case, **options).tensors()
    gold_case = case.double()
    gold = differentiate(naive_klq_loss, gold_case, **gold_case.loss_arguments(on_policy=on_policy)).tensors()
    for name in ("loss", "hidden", "weight", "bias", "values"):
        assert_as_precise_as(found[name], plain[name], gold[name], name)


@pytest.mark.runs("tensor parallel", "sampled gradient")
def test_the_sampled_gradient_of_a_split_head(ranks: Ranks) -> None:
    """Unbiased, whatever the split: the mean over seeds approaches the dense gradient as one over the root."""
    case, sizes, seeds_taken = make_case(ragged_mask(4, 8), vocab=131), [70, 0, 1, 60], 64
    options = case.loss_arguments(on_policy=False)
    dense = differentiate(fused_klq_loss, case, **options)
    drawn = [
        together(ranks.run(4, sharding.loss, case, sizes, {**options, "gradient": "sampled", "samples": 8, "seed": s}))
        for s in range(seeds_taken)
    ]
    assert 1 < float(drawn[0].metrics["gradient_entries"]) <= 8 + 1 + 3
    for name in ("hidden", "weight", "bias"):
        errors = torch.stack([d.gradients[name] - dense.gradients[name] for d in drawn])
        one, mean = errors.square().sum((1, *range(2, errors.dim()))).mean(), errors.mean(0).square().sum()
        assert one > 0
        assert mean < 3 * one / seeds_taken, name
    again = ranks.run(4, sharding.loss, case, sizes, {**options, "gradient": "sampled", "samples": 8, "seed": 3})
    assert torch.equal(together(again).gradients["weight"], drawn[3].gradients["weight"])


def test_a_group_of_one_is_the_plain_call(ranks: Ranks) -> None:
    case = make_case(ragged_mask(4, 8))
    options = case.loss_arguments(on_policy=True)
    (found,) = ranks.run(1, sharding.loss, case, [131], options)
    # in a process with as many threads, so that every product is the same one
    (again,) = ranks.run(1, sharding.loss, case, [131], options)
    whole = differentiate(fused_klq_loss, case, **options)
    for name, value in found.tensors().items():
        assert torch.equal(value, again.tensors()[name])
        assert_close_to_scale(value, whole.tensors()[name], name)


def test_a_vocabulary_padded_with_impossible_tokens(ranks: Ranks) -> None:
    """Megatron pads the last shards: rows that a bias of -inf rules out, here all of a rank's."""
    case = make_case(ragged_mask(4, 8), vocab=96)
    bias = case.bias.clone()
    bias[64:] = -torch.inf
    case = replace(case, bias=bias, actions=case.actions % 64)
    options = {**case.loss_arguments(on_policy=True), "return_entropy": True}
    found = together(ranks.run(4, sharding.loss, case, [32, 32, 16, 16], options))
    assert_close(found, differentiate(fused_klq_loss, case, **options))


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"tau": 0.1}, "rank 1 was called with other arguments"),
        ({"workspace_bytes": 2**20}, "rank 1 was called with other arguments"),
        ({"denom": 3.0}, "another denom"),
        ({"weights": torch.ones(4, 8)}, "rank 1 was called with other arguments"),
        ({"values": torch.zeros(4, 8, dtype=torch.float64)}, "rank 1 was called with other arguments"),
        ({"actions": torch.zeros(4, 8, dtype=torch.long)}, "rank 1 has other tokens"),
        ({"mask": torch.ones(4, 8, dtype=torch.bool)}, "rank 1 has other tokens"),
    ],
    ids=lambda v: next(iter(v)) if isinstance(v, dict) else "",
)
def test_calls_that_differ_are_refused_everywhere(ranks: Ranks, change: dict[str, Any], says: str) -> None:
    case = make_case(ragged_mask(4, 8))
    for said in ranks.run(2, sharding.refusal, case, [70, 61], change):
        assert said.startswith("process_group: ")
        assert says in said


def test_ranks_with_tokens_apart_pass_the_same_kinds_of_arguments(ranks: Ranks) -> None:
    """A mask or none is each rank's own affair; a reward per token here and per sequence there is not."""
    case = make_case(ragged_mask(4, 8))
    for said in ranks.run(2, sharding.refusal_of_own_tokens, case):
        assert "rank 1 was called with other arguments" in said


def test_tokens_outside_the_vocabulary_are_refused_everywhere(ranks: Ranks) -> None:
    case = make_case(ragged_mask(4, 8))
    case = replace(case, actions=torch.full_like(case.actions, 131))
    assert all("[0, 131)" in said for said in ranks.run(2, sharding.refusal, case, [70, 61], {}))


def test_collectives_of_a_loss(ranks: Ranks) -> None:
    """Per call one gather of three integers; per chunk one of 12 bytes a token (16 with the entropy) and one sum."""
    case = make_case(torch.ones(2, 16, dtype=torch.bool))
    n, width = 32, case.hidden.shape[-1]
    for entropy, size in ((False, 2), (True, 4)):
        sizes = [131 // size] * (size - 1) + [131 - 131 // size * (size - 1)]
        chunk = 16
        options = {
            **case.loss_arguments(on_policy=False), "return_entropy": entropy,
            "workspace_bytes": workspace_for(chunk, replace(case, weight=case.weight[: max(sizes)])),
        }  # fmt: skip
        native = backends.backend_for(torch.device("cpu")).VOCABULARY_MAJOR
        chunks = 1 if native and n <= width else n // chunk
        for found in ranks.run(size, sharding.counted, case, sizes, options):
            per_token = 16 if entropy else 12
            statistics = ("all_gather", size * per_token * n // chunks)
            hidden = ("all_reduce", 4 * width * n // chunks)
            assert found["calls"] == [("all_gather", size * 3 * 8), *[statistics, hidden] * chunks]


def test_merging_of_parts_that_lie_far_apart() -> None:
    """Logits in the hundreds and parts without an entry: the float64 softmax of all entries, to fp32 rounding."""
    g = torch.Generator().manual_seed(0)
    logits = 300.0 + 100.0 * torch.randn(64, 40, generator=g, dtype=torch.float64)
    logits[:, 10:20] = -torch.inf
    logits[:8, 20:] -= 1000.0
    actions = torch.randint(0, 10, (64,), generator=g)
    parts = []
    for part in logits.split(10, dim=1):
        top = part.amax(1)
        rest = (part - top[:, None]).logsumexp(1)
        log_p = part - top[:, None] - rest[:, None]
        logp = log_p.gather(1, actions[:, None] % 10)[:, 0]
        parts.append(torch.stack([top, rest, logp, -(log_p.exp() * log_p).nan_to_num(0.0).sum(1)]).float())
    found = Statistics(*(torch.empty(64) for _ in range(4)))
    merge(torch.stack(parts, 1).unbind(0), torch.zeros(64, dtype=torch.long), found, scale=1.0)
    log_p = logits.log_softmax(1)
    assert_close_to_scale(found.top + found.log_total, logits.logsumexp(1).float(), "lse")
    assert_close_to_scale(found.logp, log_p.gather(1, actions[:, None])[:, 0].float(), "logp")
    assert found.entropy is not None
    assert_close_to_scale(found.entropy, -(log_p.exp() * log_p).nan_to_num(0.0).sum(1).float(), "entropy")


MOVES = (None, "tokens", "head")


@st.composite
def spread(draw: st.DrawFn) -> tuple[Tensor, list[int], list[int]]:
    """A mask [B, T], the sequences that each rank has of it, and the rows of a head of 131 that each rank has."""
    mask = draw(masks())
    sizes = draw(splits(131))
    cuts = sorted(draw(st.lists(st.integers(0, mask.shape[0]), min_size=len(sizes) - 1, max_size=len(sizes) - 1)))
    return mask, [b - a for a, b in pairwise([0, *cuts, mask.shape[0]])], sizes


@settings(max_examples=20)
@given(
    spread(), seeds, chunk_rows, st.booleans(), st.booleans(), st.sampled_from([None, 7.0]),
    st.sampled_from(LOSS_TYPES), st.sampled_from(MOVES),
)  # fmt: skip
def test_tokens_apart_and_a_head_of_dtensors(
    ranks: Ranks, batch: tuple[Tensor, list[int], list[int]], seed: int, rows: int | None, on_policy: bool,
    extras: bool, denom: float | None, loss_type: str, move: str | None,
) -> None:  # fmt: skip
    """The gradients are those of the mean over ranks: R times the whole batch's for what a rank has to itself.

    Tokens may move to the head, or the head to the tokens.
    """
    mask, counts, sizes = batch
    case = make_case(mask, seed=seed)
    settings = {"on_policy": on_policy, **(dict.fromkeys(("scores", "bootstrap", "trace"), True) if extras else {})}
    options = {"loss_type": loss_type, "workspace_bytes": None if rows is None else workspace_for(rows, case)}
    told = {**settings, **options, "denom": denom, "sharding": move}
    found = ranks.run(len(sizes), sharding.loss_of_own_tokens, case, counts, sizes, told)
    size = len(sizes)
    whole = differentiate(
        fused_klq_loss,
        case,
        **case.loss_arguments(**settings),
        **options,
        denom=None if denom is None else denom * size,
    )
    for name in ("hidden", "weight", "bias", "values"):
        share = size if name in ("hidden", "values") else 1
        assert_close_to_scale(torch.cat([f.gradients[name] for f in found]), share * whole.gradients[name], name)
    for f in found:
        assert_close_to_scale(f.loss, whole.loss, "loss")
        for name, value in whole.metrics.items():
            assert_close_to_scale(f.metrics[name], value, name)


@settings(max_examples=15)
@given(spread(), seeds, st.sampled_from(MOVES))
@pytest.mark.runs("FSDP2", "log-probabilities")
def test_logprobs_of_tokens_apart(
    ranks: Ranks, batch: tuple[Tensor, list[int], list[int]], seed: int, move: str | None
) -> None:
    mask, counts, sizes = batch
    case = make_case(mask, seed=seed)
    by = case.advantages
    found = ranks.run(len(sizes), sharding.logprobs_of_own_tokens, case, counts, sizes, by, move)
    hidden, weight = (t.clone().requires_grad_() for t in (case.hidden, case.weight))
    whole = linear_logprobs(hidden, weight, case.actions, mask=mask, return_entropy=True)
    assert whole.entropy is not None
    (whole.logprobs * by + whole.entropy).sum().backward()
    assert weight.grad is not None
    expected = {
        "logprobs": whole.logprobs.detach(), "entropy": whole.entropy.detach(), "hidden": hidden.grad,
        "weight": weight.grad / len(sizes),
    }  # fmt: skip
    for name, value in expected.items():
        assert value is not None
        assert_close_to_scale(torch.cat([f[name] for f in found]), value, name)


@pytest.mark.runs("FSDP2 x tensor parallel", "loss", "log-probabilities")
@pytest.mark.parametrize("on_policy", [False, True], ids=["targets", "on-policy"])
def test_a_head_split_by_tensor_parallelism_and_fsdp2(ranks: Ranks, on_policy: bool) -> None:
    case, counts = make_case(ragged_mask(5, 8), vocab=131), [2, 3]
    found = ranks.run(4, sharding.loss_of_a_head_split_twice, case, counts, on_policy)
    leaves = [t.detach().clone().requires_grad_() for t in (case.hidden, case.weight, case.bias, case.values)]
    hidden, weight, bias, values = leaves
    whole = fused_klq_loss(hidden, weight, case.actions, values, bias=bias, **case.loss_arguments(on_policy=on_policy))
    scored = linear_logprobs(hidden, weight, case.actions, bias=bias, mask=case.mask).logprobs
    (whole.loss + scored.sum() / 2).backward()
    expected = {"weight": weight.grad, "bias": bias.grad}
    for first, ranks_there in ((0, found[:2]), (2, found[2:])):  # of each part of the tokens
        own = slice(first, first + counts[first // 2])
        for f in ranks_there:
            assert_close_to_scale(f.loss, whole.loss.detach(), "loss")
            for name, value in whole.metrics.items():
                assert_close_to_scale(f.metrics[name], value, name)
            mine = {"hidden": 2 * hidden.grad[own], "values": 2 * values.grad[own]}
            for name, value in {**expected, **mine}.items():
                assert_close_to_scale(f.gradients[name], value, name)


def test_what_moves_is_what_is_smaller(ranks: Ranks) -> None:
    """The bytes of each way, as counted: of hidden states and their gradient, or of a head and its gradient."""
    case = make_case(ragged_mask(8, 40), vocab=131)
    n, (vocab, width), ranks_there = int(case.valid.sum()), case.weight.shape, 2
    bytes_of: dict[str | None, dict[str, int]] = {}
    for move in MOVES:
        found = ranks.run(ranks_there, sharding.counted_own_tokens, case, [4, 4], [70, 61], move)
        bytes_of[move] = found[0]
    tokens, head = 4 * width * n, 4 * (width + 1) * 2 * 70  # with the bias; the shorter rows are padded
    assert bytes_of["tokens"]["all_reduce"] == tokens
    assert tokens <= bytes_of["tokens"]["all_gather"] <= 1.2 * tokens + 400 * n
    assert bytes_of["head"]["reduce_scatter"] == head
    assert head <= bytes_of["head"]["all_gather"] <= head + 400 * n
    assert bytes_of["head"].get("all_reduce", 0) == 0
    assert bytes_of[None] == bytes_of["head" if 3 * n > 2 * 131 else "tokens"]
    assert 2 * vocab < 3 * n


def test_tokens_outside_the_vocabulary_of_a_head_that_moves(ranks: Ranks) -> None:
    said = ranks.run(2, sharding.refusal_of_a_token, make_case(ragged_mask(4, 6)))
    assert all("actions" in message and "must lie in [0, 131)" in message for message in said), said


@pytest.mark.runs("HSDP", "log-probabilities")
def test_a_weight_in_copies_gets_the_mean_gradient(ranks: Ranks) -> None:
    case = make_case(ragged_mask(5, 7))
    weight = case.weight.clone().requires_grad_()
    (linear_logprobs(case.hidden, weight, case.actions, mask=case.mask).logprobs * case.advantages).sum().backward()
    assert weight.grad is not None
    for found in ranks.run(2, sharding.logprobs_with_copies, case, [2, 3], case.advantages):
        assert_close_to_scale(found, weight.grad / 2, "weight")


@pytest.mark.parametrize("split", ["tokens", "time", "copies"])
@pytest.mark.parametrize("whole_head", [False, True], ids=["rows", "DTensor"])
def test_sequence_parallel(ranks: Ranks, split: str, whole_head: bool) -> None:
    case = make_case(ragged_mask(5, 7))
    case = case.packed() if split == "tokens" else case
    options = case.loss_arguments(on_policy=True)
    found = ranks.run(2, sharding.loss_of_split_states, case, [70, 61], split, whole_head, options)
    assert_close(together(found), differentiate(fused_klq_loss, case, **options))


@pytest.mark.parametrize(
    ("counts", "hybrid"), [([2, 3], False), ([5, 0], False), ([1, 2, 0, 2], False), ([1, 2, 0, 2], True)], ids=str
)
@pytest.mark.runs("FSDP2", "loss")
@pytest.mark.runs("HSDP", "loss")
def test_two_steps_under_fsdp2(ranks: Ranks, counts: list[int], hybrid: bool) -> None:
    """Clipping, AdamW and FSDP2's averaging of the trunk: the parameters of one process with all sequences."""
    case = make_case(ragged_mask(5, 8), vocab=131)
    alone = sharding.model_for(case)
    sharding.step(alone, case, float(case.valid.sum()))
    for found in ranks.run(len(counts), sharding.fsdp2, case, counts, hybrid):
        for name, parameter in alone.named_parameters():
            assert_close_to_scale(found[name], parameter.detach(), name)


def test_tokens_apart_never_allocate_the_head(ranks: Ranks) -> None:
    """Neither a whole weight, nor a whole gradient of it, nor logits of all tokens and all entries."""
    case = make_case(torch.ones(4, 4, dtype=torch.bool), vocab=4096, width=64)
    whole = case.weight.nbytes
    for largest in ranks.run(4, sharding.largest_allocation, case, [1, 1, 1, 1], [1024] * 4):
        assert largest <= whole // 4


@pytest.mark.parametrize("how", ["raises", "dies", "dies amid the call"])
def test_a_rank_that_fails_ends_the_others(tmp_path: Path, how: str) -> None:
    """With an error of their collective, within its timeout: never a hang, never a number."""
    started = Ranks(2, tmp_path, timeout=timedelta(seconds=6))
    (well, said), (other_well, _) = started.outcomes(2, sharding.fails, how)
    started.close()
    assert not well
    assert not other_well
    assert "RuntimeError" in said or "DistBackendError" in said


def test_the_example_under_fsdp2() -> None:
    printed = start([*TWO_PROCESSES, str(ROOT / "examples" / "split_head.py")])
    losses = [float(line.split()[-1]) for line in printed.splitlines() if line.startswith("step")]
    assert len(losses) == 6
    assert losses[-1] < 0.5 * losses[0]


def test_other_placements_are_refused(ranks: Ranks) -> None:
    for said in ranks.run(2, sharding.refused_placement):
        assert said.startswith("weight: is a DTensor")
        assert "must be split by Shard(0)" in said


def test_bad_groups() -> None:
    case = make_case(ragged_mask(2, 4))
    for call in (
        lambda: fused_klq_loss(
            case.hidden, case.weight, case.actions, case.values, process_group=object(),  # type: ignore[arg-type]
            **case.loss_arguments(on_policy=False),
        ),
        lambda: linear_logprobs(case.hidden, case.weight, case.actions, mask=case.mask, process_group=3),  # type: ignore[arg-type]
        lambda: reverse_scan(case.rewards, 0.9, process_group="world"),  # type: ignore[arg-type]
    ):  # fmt: skip
        with pytest.raises(ValueError, match="process_group: must be a ProcessGroup or a DeviceMesh, got"):
            call()


@st.composite
def cut_time(draw: st.DrawFn) -> tuple[Tensor, list[int]]:
    """A mask [B, T], and where each rank's span of the time ends."""
    mask = draw(masks(max_length=12))
    size = draw(st.sampled_from([1, 2, 4]))
    inner = sorted(draw(st.lists(st.integers(0, mask.shape[1]), min_size=size - 1, max_size=size - 1)))
    return mask, [*inner, mask.shape[1]]


@settings(max_examples=15)
@given(cut_time(), seeds)
def test_scan_over_spans_of_time(ranks: Ranks, cut: tuple[Tensor, list[int]], seed: int) -> None:
    mask, cuts = cut
    g = torch.Generator().manual_seed(seed)
    inputs = {name: torch.randn(mask.shape, generator=g) for name in ("delta", "decay")} | {"mask": mask}
    by = torch.randn(mask.shape, generator=g)
    found = ranks.run(len(cuts), sharding.scan, cuts, inputs, by)
    delta, decay = (inputs[name].clone().requires_grad_() for name in ("delta", "decay"))
    whole = reverse_scan(delta, decay, mask=mask)
    d_delta, d_decay = torch.autograd.grad(whole, [delta, decay], by)
    for name, value in {"found": whole.detach(), "delta": d_delta, "decay": d_decay}.items():
        assert_close_to_scale(torch.cat([f[name] for f in found], 1), value, name)


@settings(max_examples=15)
@given(cut_time(), seeds, st.booleans(), st.booleans(), st.booleans())
@pytest.mark.runs("context parallel", "scans, targets")
def test_targets_over_spans_of_time(
    ranks: Ranks, cut: tuple[Tensor, list[int]], seed: int, scores: bool, bootstrap: bool, trace: bool
) -> None:
    mask, cuts = cut
    case = make_case(mask, seed=seed)
    options = {
        "rewards": case.scores if scores else case.rewards, "gamma": 0.97, "lam": 0.9, "mask": mask,
        "bootstrap_values": case.bootstrap_values if bootstrap else None, "trace": case.trace if trace else None,
    }  # fmt: skip
    found = ranks.run(len(cuts), sharding.targets, cuts, case, options)
    whole = klq_targets(case.old_logprobs, case.ref_logprobs, case.values, **options)
    for ours, value in zip(zip(*found, strict=True), whole, strict=True):
        assert_close_to_scale(torch.cat(ours, 1), value, "targets")


@settings(max_examples=12)
@given(cut_time(), seeds, st.booleans(), st.sampled_from([None, 7.0]))
@pytest.mark.runs("context parallel", "loss")
def test_the_on_policy_loss_over_spans_of_time(
    ranks: Ranks, cut: tuple[Tensor, list[int]], seed: int, extras: bool, denom: float | None
) -> None:
    """Loss and metrics of all spans on every rank; gradients are averaged over ranks."""
    mask, cuts = cut
    case, size = make_case(mask, seed=seed), len(cuts)
    flags = dict.fromkeys(("scores", "bootstrap", "trace"), True) if extras else {}
    options = case.loss_arguments(on_policy=True, **flags)
    found = ranks.run(size, sharding.loss_of_spans, cuts, case, {**options, "denom": denom})
    whole = differentiate(fused_klq_loss, case, **options, denom=None if denom is None else denom * size)
    for name in ("hidden", "values"):
        assert_close_to_scale(torch.cat([f.gradients[name] for f in found], 1), size * whole.gradients[name], name)
    for name in ("weight", "bias"):
        assert_close_to_scale(sum(f.gradients[name] for f in found) / size, whole.gradients[name], name)
    for f in found:
        assert_close_to_scale(f.loss, whole.loss, "loss")
        for name in f.metrics.keys() & whole.metrics.keys():
            assert_close_to_scale(f.metrics[name], whole.metrics[name], name)


def test_spans_on_other_ranks_than_those_of_the_head_are_refused(ranks: Ranks) -> None:
    said = ranks.run(4, sharding.refusal_of_spans_beyond_the_head, make_case(ragged_mask(2, 6)))
    assert all(m.startswith("time_group: must be of the ranks over which the weight is split") for m in said), said


def test_on_policy_over_spans_of_time_is_targets_of_the_same_policy() -> None:
    """The recipe of the docs: scored without gradient, then ``klq_targets`` over the spans, then the loss on them."""
    case: Case = make_case(ragged_mask(4, 8))
    options = case.loss_arguments(on_policy=True)
    whole = differentiate(fused_klq_loss, case, **options)
    with torch.no_grad():
        logp = linear_logprobs(case.hidden, case.weight, case.actions, bias=case.bias, mask=case.mask).logprobs
    targets = klq_targets(logp, case.ref_logprobs, case.values, case.rewards, mask=case.mask)
    again = differentiate(fused_klq_loss, case, targets=targets, mask=case.mask, ref_logprobs=case.ref_logprobs)
    assert_close_to_scale(again.loss, whole.loss, "loss")
    for name, value in whole.gradients.items():
        assert_close_to_scale(again.gradients[name], value, name)


# ---- the page -------------------------------------------------------------------------------------------------------


def test_the_page_says_what_runs_under_what() -> None:
    assert runs_under.PAGE.read_text() == runs_under.page()
