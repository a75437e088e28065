"""Tests of the compiled backend alone: instruction sets, threads, forks, awkward sizes; the rest of the suite
runs on it like on every other backend."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor

from klq_kernels.backends import native, portable
from klq_kernels.vocabulary.chunks import (
    Chosen,
    LossShape,
    Pull,
    Residuals,
    ScanTerms,
    States,
    Sums,
    Terms,
    part,
    slices,
)
from klq_kernels.vocabulary.sampling import Entries, Sampling

pytestmark = pytest.mark.skipif(native.WHY_UNAVAILABLE is not None, reason=f"native: {native.WHY_UNAVAILABLE}")

CHECKOUT = Path(__file__).resolve().parents[2]
SIZES = [1, 7, 15, 16, 17, 63, 131, 1009, 1025]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
NAN = float("nan")


@pytest.fixture(params=native.ISAS)
def isa(request: pytest.FixtureRequest) -> Iterator[str]:
    before = native.use_isa(os.environ.get("KLQ_NATIVE_ISA"))
    try:
        yield native.use_isa(request.param)
    except ValueError as error:
        pytest.skip(str(error))
    finally:
        native.use_isa(before)


@pytest.fixture
def threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def logits_of(n: int, vocab: int, dtype: torch.dtype) -> Tensor:
    """[V, n], entry by entry of the vocabulary: peaked columns, -inf among them, and NaN before and behind."""
    whole = torch.full((vocab + 2, n), NAN)
    whole[1:-1] = 9 * torch.randn(vocab, n, generator=generator(vocab))
    whole[2:-1:5] = -float("inf")
    return whole.to(dtype)[1:-1]


def z_of(logits: Tensor, scale: float, softcap: float | None) -> Tensor:
    z = logits.double()
    return (z if softcap is None else softcap * torch.tanh(z / softcap)) * scale


def statistics(
    logits: Tensor, actions: Tensor, *, scale: float = 1.0, softcap: float | None = None, size: int = 4096
) -> list[Tensor]:
    """[top, log_total, logp, entropy] from what strips of this size leave behind."""
    n = logits.shape[1]
    top, total, weighted, taken = (torch.full((n,), x) for x in (-float("inf"), 0.0, 0.0, NAN))
    for strip in slices(logits.shape[0], size):
        native.strip_stats(
            logits[strip], strip.start, actions, top, total, weighted, taken, scale=scale, softcap=softcap
        )
    log_total = total.log()
    return [top, log_total, scale * (taken - top) - log_total, log_total - weighted / total]


def gradient(
    logits: Tensor, actions: Tensor, pull: Pull, *, out: Tensor, size: int = 4096, **head: float | None
) -> Tensor:
    """Fills ``out``, [V, n], strip by strip of this size; returns the turned copies side by side, [n, V]."""
    vocab, n = logits.shape
    turned = [torch.full((n, s.stop - s.start), NAN, dtype=out.dtype) for s in slices(vocab, size)]
    for strip, copy in zip(slices(vocab, size), turned, strict=True):
        native.strip_grad(logits[strip], strip.start, actions, pull, out[strip], copy, **head)
    return torch.cat(turned, 1)


@pytest.mark.parametrize("softcap", [None, 20.0])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("vocab", SIZES)
@pytest.mark.parametrize("n", [0, 1, 16, 35])
def test_strip_stats(isa: str, n: int, vocab: int, dtype: torch.dtype, softcap: float | None) -> None:
    logits = logits_of(n, vocab, dtype)
    actions = torch.randint(0, vocab, (n,), generator=generator()) // 5 * 5  # never at -inf
    z = z_of(logits.T, 0.7, softcap)
    top, logp = z.amax(1), z.log_softmax(1)
    taken, entropy = logp.gather(1, actions[:, None]).squeeze(1), -torch.xlogy(logp.exp(), logp.exp()).sum(1)
    gold = [top / 0.7, z.logsumexp(1) - top, taken, entropy]
    for size in (7, 100, 4096):
        ours = statistics(logits, actions, scale=0.7, softcap=softcap, size=size)
        for found, right in zip(ours, gold, strict=True):
            torch.testing.assert_close(found.double(), right, rtol=3e-7, atol=4e-6)


@pytest.mark.parametrize("entropy", [False, True])
@pytest.mark.parametrize("softcap", [None, 20.0])
@pytest.mark.parametrize(("dtype", "out_dtype"), [*((d, d) for d in DTYPES), *((d, torch.float32) for d in DTYPES[1:])])
@pytest.mark.parametrize("vocab", SIZES)
def test_strip_grad(
    isa: str, vocab: int, dtype: torch.dtype, out_dtype: torch.dtype, softcap: float | None, entropy: bool
) -> None:
    """One and several strips, whole and broken groups of tokens, in place and not, and turned around."""
    for n, size in ((3, 4096), (32, 50), (35, 4096)):
        logits = logits_of(n, vocab, dtype)
        actions = torch.randint(0, vocab, (n,), generator=generator()) // 5 * 5
        top, log_total, _, entropies = statistics(logits, actions, scale=0.7, softcap=softcap)
        d_action, d_softmax, d_entropy = torch.randn(3, n, generator=generator(1))
        pull = Pull(top, log_total, d_action, d_softmax, *((d_entropy, entropies) if entropy else ()))
        head = {"scale": 0.7, "softcap": softcap}
        right = torch.empty(n, vocab).copy_(logits.T)
        portable.row_grad(right, actions, pull, right, **head)
        around = torch.full((vocab + 2, n), 7.0, dtype=out_dtype)
        out = around[1:-1]
        turned = gradient(logits, actions, pull, out=out, size=size, **head)
        rounding = 0.0 if out_dtype == torch.float32 else 0.51 * torch.finfo(out_dtype).eps
        torch.testing.assert_close(out.T.float(), right, rtol=rounding + 2e-5, atol=3e-6)
        assert torch.equal(turned, out.T)
        assert (around[[0, -1]] == 7).all(), "wrote beyond the strip"
        if out_dtype == dtype:
            gradient(logits, actions, pull, out=logits, size=size, **head)
            assert torch.equal(logits, out)


def test_the_gradient_of_a_likely_token_survives_large_logits(isa: str) -> None:
    """1 - p from a log-normaliser of 200 rounded to fp32 would be off by 1e-5."""
    logits = torch.tensor([[200.0, 3.0], [188.0, -9.0]])
    gold = logits.double().softmax(0)
    actions, one = torch.zeros(2, dtype=torch.int64), torch.ones(2)
    top, log_total, *_ = statistics(logits, actions)
    gradient(logits, actions, Pull(top, log_total, one, -one), out=logits, scale=1.0, softcap=None)
    torch.testing.assert_close(logits[0].double(), 1 - gold[0], rtol=0.02, atol=0)


def test_tokens_that_are_not_finite(isa: str) -> None:
    logits = torch.zeros(40, 4)
    logits[7, 0] = NAN
    logits[:, 1] = -float("inf")
    logits[20, 2] = 3e38
    top, log_total, logp, _ = statistics(logits, torch.tensor([1, 1, 20, 1]))
    assert log_total[0].isnan()
    assert logp[0].isnan()
    assert not torch.isfinite(top[1])
    assert (top[2], log_total[2], logp[2]) == (torch.tensor(3e38), 0.0, 0.0)
    assert torch.isfinite(log_total[3])


@pytest.mark.parametrize("action", [-1, 40, -(2**63), 2**63 - 1])
def test_impossible_actions_have_no_log_probability(isa: str, action: int) -> None:
    """Their loss and gradients are NaN; nothing outside the logits is read or written for them."""
    logits = torch.randn(40, 2, generator=generator())
    actions = torch.tensor([action, 3])
    top, log_total, logp, _ = statistics(logits, actions, size=16)
    assert logp.isnan().tolist() == [True, False]
    d_logp = torch.where(logp.isnan(), NAN, 1.0)
    gradient(logits, actions, Pull(top, log_total, d_logp, -d_logp), out=logits, size=16, scale=1.0, softcap=None)
    assert logits[:, 0].isnan().all()
    assert torch.isfinite(logits[:, 1]).all()


@pytest.mark.parametrize("size", [0, 10, 5000, 3_000_000])
def test_populated_memory_keeps_what_it_holds(size: int) -> None:
    buffer = torch.arange(size + 2)
    native.populate(buffer[1:-1])  # begins and ends amid a page
    assert torch.equal(buffer, torch.arange(size + 2))
    native.populate(torch.empty(size))


def test_sixteen_bit_conversions(isa: str) -> None:
    """All 16-bit floats survive a pass that leaves them as they are, and fp32 rounds as torch rounds."""
    for dtype in (torch.bfloat16, torch.float16):
        halves = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(dtype)
        ends = torch.arange(halves.numel() + 1, dtype=torch.int32)
        out = torch.empty(halves.numel())
        native.reverse_scan(halves, torch.zeros(1), None, ends, out)
        torch.testing.assert_close(out, halves.float(), rtol=0, atol=0, equal_nan=True)
    top = torch.finfo(torch.float16).max
    wanted = torch.cat([torch.logspace(-9, 4, 4001), torch.tensor([top, top + 15, top + 17, NAN, 3e38])])
    for dtype in (torch.bfloat16, torch.float16):
        row = torch.zeros(1, wanted.numel(), dtype=dtype)  # one logit: p = 1 and the gradient is d_action + d_softmax
        zero = torch.zeros_like(wanted)
        gradient(row, zero.long(), Pull(zero, zero, wanted, zero), out=row, scale=1.0, softcap=None)
        torch.testing.assert_close(row[0], wanted.to(dtype), rtol=0, atol=0, equal_nan=True)


def scan_case(lengths: list[int], *, masked: str | None) -> tuple[dict[str, Tensor], Tensor | None, Tensor]:
    """(columns, mask, cu_seqlens); NaN at masked tokens: "holes" anywhere, or "prompts", the half of each sequence."""
    total = sum(lengths)
    g = generator(total)
    columns = {name: torch.randn(total, generator=g) for name in ("logp", "ref_logp", "values", "rewards", "delta")}
    columns["decay"] = torch.rand(total, generator=g)
    holes, responses = torch.rand(total, generator=g) > 0.3, torch.ones(total, dtype=torch.bool)
    for begin, length in zip(torch.tensor([0, *lengths]).cumsum(0).tolist(), lengths, strict=False):
        responses[begin : begin + length // 2] = False
    mask = {"holes": holes, "prompts": responses, None: None}[masked]
    ends = torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)
    if mask is not None:
        for name in columns:
            columns[name][~mask] = NAN
    return columns, mask, ends


def run_scans(columns: dict[str, Tensor], mask: Tensor | None, ends: Tensor, backend: object = native) -> list[Tensor]:
    """[reverse_scan, one decay, lambda_errors with trace, kept logp, kept values] over the same tokens."""
    out = [torch.full_like(columns["delta"], 7.0, dtype=torch.float32) for _ in range(5)]
    tail = torch.arange(ends.numel() - 1) / 3.0
    logp, ref_logp, values, rewards, delta, decay = columns.values()
    backend.reverse_scan(delta, decay, mask, ends, out[0])
    backend.reverse_scan(delta, torch.tensor([0.9]), mask, ends, out[1])
    backend.lambda_errors(
        ScanTerms(logp, ref_logp, values, rewards, decay), tail, mask, ends, out[2],
        tau=0.1, gamma=0.99, lam=0.95, kept_logp=out[3], kept_values=out[4],
    )  # fmt: skip
    return out


LENGTHS = [[1], [0, 5, 0], [15, 16, 17], [31, 0, 33, 1, 1], [511, 512, 513], [2000, 3], [1] * 40]


@pytest.mark.parametrize("masked", [None, "holes", "prompts"])
@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64])
@pytest.mark.parametrize("lengths", LENGTHS, ids=str)
def test_scans(isa: str, lengths: list[int], dtype: torch.dtype, masked: str | None) -> None:
    columns, mask, ends = scan_case(lengths, masked=masked)
    columns = {name: column.to(dtype) for name, column in columns.items()}
    wanted = run_scans(columns, mask, ends, portable)
    for ours, right in zip(run_scans(columns, mask, ends), wanted, strict=True):
        torch.testing.assert_close(ours, right, rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("lengths", LENGTHS, ids=str)
def test_a_sequence_has_the_same_bits_wherever_it_lies(isa: str, lengths: list[int]) -> None:
    """Between holes or packed, first or last, at any address."""
    columns, mask, ends = scan_case(lengths, masked="holes")
    assert mask is not None
    spread = run_scans(columns, mask, ends)[:2]
    kept = torch.nn.functional.pad(mask.cumsum(0), (1, 0))[ends.long()].to(torch.int32)
    packed = run_scans({name: c[mask] for name, c in columns.items()}, None, kept)[:2]
    for with_holes, without in zip(spread, packed, strict=True):
        assert torch.equal(with_holes[mask], without)
        assert (with_holes[~mask] == 0).all()
    begin, end = int(kept[-2]), int(kept[-1])
    for offset in range(3):
        moved = {name: torch.nn.functional.pad(c[mask][begin:end], (offset, 0)) for name, c in columns.items()}
        alone = run_scans(moved, None, torch.tensor([0, offset, offset + end - begin], dtype=torch.int32))[:2]
        for without, shifted in zip(packed, alone, strict=True):
            assert torch.equal(without[begin:end], shifted[offset:])


def test_nothing_crosses_a_sequence_end(isa: str) -> None:
    columns, _, ends = scan_case([40, 3, 40], masked=None)
    clean = run_scans(columns, None, ends)
    spoiled = {name: c.index_fill(0, torch.arange(40, 43), float("inf")) for name, c in columns.items()}
    for a, b in zip(clean, run_scans(spoiled, None, ends), strict=True):
        assert torch.equal(a[:40], b[:40])
        assert torch.equal(a[43:], b[43:])


@pytest.mark.parametrize("size", [1, 5, 16, 100])
def test_lambda_errors_in_pieces(isa: str, size: int) -> None:
    columns, _, ends = scan_case([31, 1, 64, 33], masked=None)
    logp, ref_logp, values, rewards, _, decay = columns.values()
    terms = ScanTerms(logp, ref_logp, values, rewards, decay)
    tail = torch.randn(4, generator=generator())
    total = int(ends[-1])
    whole, pieces, carry = torch.empty(total), torch.empty(total), torch.zeros(1)
    options = {"tau": 0.1, "gamma": 0.99, "lam": 0.95}
    native.lambda_errors(terms, tail, None, ends, whole, **options)
    for start in reversed(range(0, total, size)):
        p = slice(start, min(start + size, total))
        native.lambda_errors(part(terms, p), tail, None, ends, pieces[p], **options, first_row=start, carry=carry)
    torch.testing.assert_close(pieces, whole, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("loss_type", native.LOSS_TYPES)
@pytest.mark.parametrize("on_policy", [False, True])
def test_klq_residual(isa: str, loss_type: str, on_policy: bool) -> None:
    n = 1009
    logp, values, old_logp, old_values, advantages, weights = torch.randn(6, n, generator=generator())
    old = (None, None) if on_policy else (old_logp, old_values)
    found = {}
    for backend in (native, portable):
        found[backend] = torch.full((3, n), NAN)
        terms = Terms(logp, values, *old, advantages, weights)
        shape = LossShape(0.3, 0.8, loss_type, huber_delta=0.5, value_clip=0.2, log_ratio_clip=0.3)
        backend.klq_residual(terms, Residuals(*found[backend]), grad_scale=torch.tensor(0.7), shape=shape)
    torch.testing.assert_close(found[native], found[portable], rtol=1e-5, atol=1e-6)


def selected(logits: Tensor, actions: Tensor, pull: Pull) -> list[Tensor]:
    """The entries of a sampled gradient, strip by strip, and the sums that they make of rows of a matrix."""
    vocab, n = logits.shape
    pull = pull._replace(d_entropy=None, entropy=None)
    logp = torch.full((n,), -3.0)
    pull, selection = Entries(n, vocab, Sampling(40, torch.tensor(3))).selection(slice(0, n), pull, logp, 0.9)
    for start in range(0, vocab, 1000):
        native.strip_select(logits[start : start + 1000], start, actions, pull, selection, scale=0.9, softcap=30.0)
    begins = selection.offsets[:-1].clone()
    sums = Sums(begins, begins + selection.counts, selection.columns, selection.values)
    source = torch.randn(vocab, 75, generator=generator()).to(logits.dtype)
    out = torch.empty(n, 75, dtype=logits.dtype)
    native.weighted_sums(sums, source, out)
    held = torch.arange(selection.columns.numel()) < 0
    for begin, count in zip(begins.tolist(), selection.counts.tolist(), strict=True):
        held[begin : begin + count] = True
    return [selection.counts.float(), selection.columns[held].float(), selection.values[held], out.float()]


def dots(n: int, k: int, width: int, dtypes: tuple[torch.dtype, torch.dtype], atoms: int = 2) -> tuple[Tensor, Tensor]:
    """(logits, slopes) of k ids a token, held against float64: tokens in another order, and NaN around the head."""
    hidden = torch.randn(n, width, generator=generator(1)).to(dtypes[0])
    weight = torch.full((13 * atoms + 2, width), NAN, dtype=dtypes[1])
    weight[1:-1] = torch.randn(13 * atoms, width, generator=generator(2))
    ids, places = torch.randint(13, (n, k), generator=generator(3)), torch.arange(n).flip(0)
    logits, slopes = torch.full((2, n, k, atoms), NAN)
    chosen = Chosen(States(hidden, places), ids, atoms)
    native.selected_logits(chosen, weight[1:-1], None, logits, slopes, scale=0.9, softcap=30.0)
    rows = weight[1:-1].double()[ids[..., None] * atoms + torch.arange(atoms)]
    tanh = torch.tanh(torch.einsum("nkah,nh->nka", rows, hidden.double()[places]) / 30.0)
    torch.testing.assert_close(logits.double(), 27.0 * tanh, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(slopes.double(), 1 - tanh.square(), rtol=1e-5, atol=1e-5)
    return logits, slopes


@pytest.mark.parametrize("dtypes", [*((d, d) for d in DTYPES), *((d, torch.float32) for d in DTYPES[1:])])
@pytest.mark.parametrize("width", [1, 15, 16, 75])
def test_selected_logits(isa: str, width: int, dtypes: tuple[torch.dtype, torch.dtype]) -> None:
    for k in (1, 2, 5):  # of fewer entries than are taken at once, and of more
        dots(3, k, width, dtypes)


def everything(isa: str) -> list[Tensor]:
    """Every kernel once, over enough work for several threads, in this instruction set."""
    native.use_isa(isa)
    n, vocab = 131, 4099
    actions = torch.randint(0, vocab, (n,), generator=generator()) // 5 * 5
    out = []
    for dtype in DTYPES:
        logits = logits_of(n, vocab, dtype)
        found = statistics(logits, actions, size=1000)
        pull = Pull(*found[:2], torch.ones(n), -torch.ones(n), torch.ones(n), found[3])
        out += selected(logits, actions, pull)
        out += dots(n, 9, 203, (dtype, dtype))
        out += [*found, gradient(logits, actions, pull, out=logits, size=1000, scale=0.9, softcap=30.0), logits]
    return out + run_scans(*scan_case([3000, 17, 40_000, 5, 20_000, 30_000], masked="holes"))


def test_any_number_of_threads_gives_the_same_bits(isa: str, threads: None) -> None:
    torch.set_num_threads(1)
    alone = everything(isa)
    for count in (2, 3, 8):
        torch.set_num_threads(count)
        for a, b in zip(alone, everything(isa), strict=True):
            assert torch.equal(a.nan_to_num(-7), b.nan_to_num(-7))


def test_avx2_and_avx512_give_the_same_bits() -> None:
    try:
        wide = everything("avx512")
    except ValueError as error:
        pytest.skip(str(error))
    try:
        for a, b in zip(wide, everything("avx2"), strict=True):
            assert torch.equal(a.nan_to_num(-7), b.nan_to_num(-7))
    finally:
        native.use_isa(os.environ.get("KLQ_NATIVE_ISA"))


@pytest.mark.skipif(sys.platform != "linux", reason="counts threads in /proc")
@pytest.mark.parametrize("count", [1, 2, 4])
def test_runs_on_as_many_threads_as_torch_is_told_to(count: int) -> None:
    """A fresh process has one thread until a kernel asks torch's pool for the others."""
    script = f"""
        import os, torch
        torch.set_num_threads({count})
        from klq_kernels.backends import native
        before = len(os.listdir("/proc/self/task"))
        delta, out = torch.zeros(200_000), torch.empty(200_000)
        ends = torch.arange(0, 200_001, 1000, dtype=torch.int32)
        native.reverse_scan(delta, torch.ones(1), None, ends, out)
        print(len(os.listdir("/proc/self/task")) - before)
    """
    assert int(run_python(script)) == count - 1


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
def test_works_in_a_forked_child() -> None:
    """After the parent used several threads, which a fork does not take along."""
    script = """
        import os, signal, numpy, torch
        torch.set_num_threads(2)
        from klq_kernels.backends import native
        delta, ours, theirs = torch.ones(200_000), torch.zeros(200_000), torch.zeros(200_000)
        ends = torch.arange(0, 200_001, 1000, dtype=torch.int32)
        native.reverse_scan(delta, torch.ones(1), None, ends, ours)
        child = os.fork()
        if child == 0:
            signal.alarm(30)
            native.reverse_scan(delta, torch.ones(1), None, ends, theirs)
            os._exit(0 if numpy.array_equal(ours.numpy(), theirs.numpy()) else 1)
        print(os.waitpid(child, 0)[1])
    """
    assert int(run_python(script)) == 0


def test_unknown_instruction_sets_are_refused() -> None:
    with pytest.raises(ValueError, match="KLQ_NATIVE_ISA"):
        native.use_isa("sse9")


def test_an_instruction_set_that_was_asked_for_and_is_not_there_is_an_error() -> None:
    script = """
        from klq_kernels import backends
        import torch
        for _ in range(2):
            try:
                backends.backend_name(torch.device("cpu"))
            except ValueError as error:
                print(error)
    """
    answer = run_python(script, KLQ_NATIVE_ISA="sse9")
    assert answer.count("KLQ_NATIVE_ISA: must be one of portable, avx2, avx512, got 'sse9'") == 2


def test_a_library_that_does_not_load_is_left_out_with_one_warning() -> None:
    script = """
        import warnings
        import torch
        with warnings.catch_warnings(record=True) as caught:
            from klq_kernels import backends
            name = [backends.backend_name(torch.device("cpu")) for _ in range(2)][1]
        print(name, backends.why_unavailable("native"), "|", *(w.message for w in caught))
    """
    answer = run_python(script, KLQ_NATIVE_LIBRARY="/nowhere.so")
    assert answer.startswith("torch nowhere.so does not load")
    assert answer.split("|")[1].count("nowhere.so does not load") == 1


def test_a_library_of_older_sources_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    source = Path(native.__file__).read_text()
    assert set(native.OPERATIONS) == set(re.findall(r"torch\.ops\.klq_native\.(\w+)\(", source))
    assert native._load() is None
    monkeypatch.setattr(native, "OPERATIONS", (*native.OPERATIONS, "sum_of_next_year"))
    with pytest.warns(UserWarning, match="without sum_of_next_year"):
        assert "is of older sources, without sum_of_next_year; " in str(native._load())


def wrong_calls() -> dict[str, Callable[[], None]]:
    row, ends = torch.zeros(4), torch.tensor([0, 4], dtype=torch.int32)
    actions = torch.zeros(4, dtype=torch.int64)
    head = {"scale": 1.0, "softcap": None}

    def stats(logits: Tensor, actions: Tensor = actions) -> Callable[[], None]:
        return lambda: native.strip_stats(logits, 0, actions, row, row, None, row, **head)

    def grad(out: Tensor, turned: Tensor | None = None) -> Callable[[], None]:
        logits = torch.zeros(5, 4, dtype=torch.bfloat16)
        return lambda: native.strip_grad(logits, 0, actions, Pull(row, row, row, row), out, turned, **head)

    def dot(index: Tensor, places: Tensor | None = None, out: Tensor | None = None) -> Callable[[], None]:
        out = torch.zeros(4, 2) if out is None else out
        arguments = torch.zeros(4, 3), places, index.int(), torch.zeros(5, 3), out
        return lambda: torch.ops.klq_native.row_dots(*arguments)

    some = torch.zeros(4, 2)
    return {
        "dots with a row below 0": dot(some - 1),
        "dots with a row beyond": dot(some + 5),
        "dots with a place beyond": dot(some, torch.full((4,), 4)),
        "dots of other tokens": dot(some[:3], out=torch.zeros(3, 2)),
        "short dots": dot(some, out=torch.zeros(4, 1)),
        "short output": lambda: native.reverse_scan(row, row, None, ends, torch.empty(3)),
        "strided delta": lambda: native.reverse_scan(torch.zeros(8)[::2], row, None, ends, torch.empty(4)),
        "int delta": lambda: native.reverse_scan(row.long(), row, None, ends, torch.empty(4)),
        "int64 ends": lambda: native.reverse_scan(row, row, None, ends.long(), torch.empty(4)),
        "short mask": lambda: native.reverse_scan(row, row, torch.ones(3, dtype=torch.bool), ends, torch.empty(4)),
        "few actions": stats(torch.zeros(5, 4), actions[:3]),
        "int32 actions": stats(torch.zeros(5, 4), actions.int()),
        "strided logits": stats(torch.zeros(5, 8)[:, ::2]),
        "flat logits": stats(torch.zeros(20)),
        "float64 logits": stats(torch.zeros(5, 4, dtype=torch.float64)),
        "short gradient": grad(torch.zeros(4, 4, dtype=torch.bfloat16)),
        "gradient of another 16-bit type": grad(torch.zeros(5, 4, dtype=torch.float16)),
        "unturned": grad(torch.zeros(5, 4, dtype=torch.bfloat16), torch.zeros(5, 4, dtype=torch.bfloat16)),
        "turned, of another type": grad(torch.zeros(5, 4, dtype=torch.bfloat16), torch.zeros(4, 5)),
    }


@pytest.mark.parametrize("name", wrong_calls())
def test_what_would_touch_foreign_memory_is_refused(name: str) -> None:
    with pytest.raises(RuntimeError):
        wrong_calls()[name]()


def run_python(script: str, **settings: str) -> str:
    """The output of a fresh interpreter. It runs in the checkout, with these settings beside our environment."""
    lines = [line[8:] for line in script.strip("\n").splitlines()]
    done = subprocess.run(
        [sys.executable, "-c", "\n".join(lines)], cwd=CHECKOUT, env={**os.environ, **settings},
        capture_output=True, text=True, timeout=280, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()
