"""Every kernel by every layout, with and without holes, in every dtype, on 1 to 8 warps, contracted further or not.

Against ``portable``, which other tests hold against float64. A layout is how rows lie in memory, how many tokens there
are, or how sequences cut them; holes are forbidden or masked elements, or weights of 0. What a kernel writes, and the
room it works in, is poisoned: to read it before, or to leave some of it unwritten, is a failure.

    KLQ_PTX=90 PYTHONPATH=tests/ptx python -m pytest -p machine_plugin tests/ptx/test_matrix.py
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator
from types import ModuleType
from typing import Any, NamedTuple

import pytest
import torch
from ptx_machine import Options
from torch import Tensor

from klq_kernels.backends import portable
from klq_kernels.vocabulary.chunks import (
    Chosen,
    Divergence,
    LossShape,
    Pair,
    Pull,
    Residuals,
    ScanTerms,
    States,
    Statistics,
    Sums,
    Terms,
)
from klq_kernels.vocabulary.metrics import klq_metrics
from klq_kernels.vocabulary.sampling import Entries, Sampling

device: Any = importlib.import_module("device")

LAYOUTS = ("one", "short", "ones", "mixed")
SHAPE = LossShape(0.3, 0.8, "double_clipped", 1.0, 0.2, 0.2)
SCALE, SOFTCAP = 1 / 0.7, 30.0
HEAD = {"scale": SCALE, "softcap": SOFTCAP}
FILES = (
    "klq_metrics", "klq_residual", "row_grad", "row_kl", "row_select", "row_stats", "row_update", "scale", "scans",
    "selected_logits", "weighted_sums",
)  # fmt: skip
SHRUNK = ("LANES", "BLOCK", "TILE", "SEGMENT")  # sizes that are spread over threads


class Cell(NamedTuple):
    """One cell of the matrix."""

    layout: str
    holes: bool
    dtype: torch.dtype

    def random(self, *shape: int) -> Tensor:
        return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape)))

    @property
    def eps(self) -> float:
        return max(torch.finfo(self.dtype).eps, 1e-5)

    def rows(self, n: int = 3, seed: int = 0) -> Tensor:
        """Logits [n, V]: aligned; a last tile that is not full; a single one; wide rows of several tiles. Padding is
        NaN, holes are forbidden tokens.
        """
        vocab, stride = {"one": (256, 256), "short": (131, 192), "ones": (1, 64), "mixed": (9_000, 9_088)}[self.layout]
        g = torch.Generator().manual_seed(seed)
        buffer = torch.full((n, stride), float("nan"), dtype=self.dtype)
        z = 3.0 * torch.randn(n, vocab, generator=g) + 2.0
        if self.holes and vocab > 1:
            z[:, vocab // 3 : vocab // 2] = -torch.inf
        return buffer[:, :vocab].copy_(z)

    def actions(self, rows: Tensor) -> Tensor:
        return torch.tensor([0, rows.shape[1] - 1, rows.shape[1] - 1])[: rows.shape[0]]

    @property
    def tokens(self) -> int:
        return {"one": 1024, "short": 50, "ones": 1, "mixed": 2500}[self.layout]

    def weights(self) -> Tensor | None:
        return (torch.arange(self.tokens) % 3 != 0).float() if self.holes else None

    def lengths(self) -> list[int]:
        """Of sequences: one over several tiles; short ones with empty ones between; single tokens; a mixture."""
        tile = module("scans").SCAN.sizes["TILE"]
        return {
            "one": [2 * tile + 150],
            "short": [3, 0, 5, 1, 0, 0, 7, 2, 16, 0, 15, 17, 1],
            "ones": [1] * 40,
            "mixed": [tile + 50, 1, 0, 33, 70],
        }[self.layout]

    def cuts(self) -> Tensor:
        return torch.tensor([0, *self.lengths()]).cumsum(0).int()

    def mask(self, n: int) -> Tensor | None:
        return torch.rand(n, generator=torch.Generator().manual_seed(n)) < 0.6 if self.holes else None


def module(name: str) -> ModuleType:
    return importlib.import_module(f"klq_kernels.backends.triton.{name}")


def empty(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Poisoned (``torch.empty`` is, here)."""
    return torch.empty(*shape, dtype=dtype)


def close(ours: Tensor, wanted: Tensor, *, rtol: float, atol: float) -> None:
    torch.testing.assert_close(ours.float(), wanted.float(), rtol=rtol, atol=atol)


def same(ours: NamedTuple, wanted: NamedTuple, *, rtol: float, atol: float) -> None:
    """Of two bundles: close, and wholly written."""
    for a, b in zip(ours, wanted, strict=True):
        assert device.unwritten(a) == 0
        close(a, b, rtol=rtol, atol=atol)


def row_stats(cell: Cell) -> None:
    logits = cell.rows()
    ours, wanted = (Statistics(*(empty(3) for _ in range(4))) for _ in range(2))
    module("row_stats").row_stats(logits, cell.actions(logits), ours, **HEAD)
    portable.row_stats(logits, cell.actions(logits), wanted, **HEAD)
    same(ours, wanted, rtol=1e-5, atol=3e-5)


def _pull(logits: Tensor, actions: Tensor) -> Pull:
    found = Statistics(*(torch.zeros(3) for _ in range(4)))
    portable.row_stats(logits, actions, found, **HEAD)
    g = torch.tensor([0.5, -2.0, 1.0])
    return Pull(found.top, found.log_total, g, -g, torch.tensor([0.1, 0.0, -0.3]), found.entropy)


def row_grad(cell: Cell) -> None:
    ours, wanted = cell.rows(), cell.rows()
    actions = cell.actions(ours)
    pull = _pull(ours, actions)
    module("row_grad").row_grad(ours, actions, pull, ours, **HEAD)
    portable.row_grad(wanted, actions, pull, wanted, **HEAD)
    close(ours, wanted, rtol=2 * cell.eps, atol=cell.eps)


def row_grad_sums(cell: Cell) -> None:
    """Three rows in two groups."""
    ours, wanted = cell.rows(), cell.rows()
    actions = cell.actions(ours)
    pull = _pull(ours, actions)
    sums = torch.ones(ours.shape[1])
    exact = torch.zeros_like(wanted, dtype=torch.float32)
    config = module("row_grad").ROW_GRAD_SUMS
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module("row_grad"), "ROW_GRAD_SUMS", config._replace(sizes=config.sizes | {"ROWS": 2}))
        module("row_grad").row_grad(ours, actions, pull, ours, sums, **HEAD)
    portable.row_grad(wanted.float(), actions, pull, exact, **HEAD)
    close(ours, exact, rtol=2 * cell.eps, atol=cell.eps)
    close(sums, 1 + exact.sum(0), rtol=3e-5, atol=3e-5)


def row_grad_narrower(cell: Cell) -> None:
    wide = cell._replace(dtype=torch.float32)
    ours, wanted = wide.rows(), wide.rows()
    actions = cell.actions(ours)
    pull = _pull(ours, actions)
    narrow = ours if cell.dtype == torch.float32 else ours.view(cell.dtype)[:, : ours.shape[1]]
    module("row_grad").row_grad(ours, actions, pull, narrow, **HEAD)
    portable.row_grad(wanted, actions, pull, wanted, **HEAD)
    close(narrow, wanted, rtol=2 * cell.eps, atol=cell.eps)


def row_update(cell: Cell) -> None:
    cell = cell._replace(dtype=torch.bfloat16)  # which alone it is for
    ours, wanted = cell.rows(), cell.rows()
    actions, head = cell.actions(ours), {"scale": SCALE, "softcap": None}
    values, old_logp, old_values, advantages, weights = 0.5 * cell.random(5, 3)
    factor = torch.tensor(0.25)

    def bundles() -> tuple[Terms, Statistics, Residuals]:
        found = Statistics(empty(3), empty(3), empty(3), None)
        terms = Terms(found.logp, values, old_logp, old_values, advantages, weights if cell.holes else None)
        return terms, found, Residuals(empty(3), empty(3), empty(3))

    terms, found, residuals = bundles()
    module("row_update").row_update(ours, actions, terms, found, residuals, grad_scale=factor, shape=SHAPE, scale=SCALE)
    right_terms, right_found, right = bundles()
    portable.row_stats(wanted, actions, right_found, **head)
    portable.klq_residual(right_terms, right, grad_scale=factor, shape=SHAPE)
    pull = Pull(right_found.top, right_found.log_total, right.d_logp, -right.d_logp)
    portable.row_grad(wanted, actions, pull, wanted, **head)
    same(residuals, right, rtol=1e-4, atol=1e-4)
    close(ours, wanted, rtol=2 * cell.eps, atol=cell.eps)


def row_kl(cell: Cell) -> None:
    pair = Pair(SCALE, SOFTCAP, 1.0, None, reverse=cell.layout in ("short", "mixed"))
    ours, wanted, ref = cell.rows(), cell.rows(), cell._replace(holes=False).rows(seed=1)
    if cell.holes and pair.reverse:  # then the first of the two is the reference, whose tokens may be forbidden alone
        ref[ours == -torch.inf] = -torch.inf
    found, right = (Divergence(*(empty(3) for _ in range(5))) for _ in range(2))
    module("row_kl").row_kl(ours, ref, found, pair=pair)
    portable.row_kl(wanted, ref, right, pair=pair)
    same(found, right, rtol=1e-4, atol=3e-5)
    g = torch.tensor([0.5, -2.0, 1.0])
    module("row_kl").row_kl_grad(ours, ref, found, g, ours, pair=pair)
    portable.row_kl_grad(wanted, ref, right, g, wanted, pair=pair)
    close(ours, wanted, rtol=2 * cell.eps, atol=2 * cell.eps)


def row_select(cell: Cell) -> None:
    """The taken token's entry as by the gradient; as many entries as are right but for a rounded running sum."""
    logits = cell.rows()
    actions, vocab = cell.actions(logits), logits.shape[1]
    found = Statistics(*(torch.zeros(3) for _ in range(4)))
    portable.row_stats(logits, actions, found, **HEAD)
    ours, wanted = _pull(logits, actions)[:4], []
    for backend in (module("row_select"), portable):
        sampling = Sampling(6, torch.tensor(11))
        pull, selection = Entries(3, vocab, sampling).selection(slice(0, 3), Pull(*ours), found.logp, SCALE)
        backend.row_select(logits, actions, pull, selection, **HEAD)
        dense = torch.zeros(3, vocab)
        for t, (begin, count) in enumerate(zip(selection.offsets.tolist(), selection.counts.tolist(), strict=False)):
            dense[t, selection.columns[begin : begin + count].long()] = selection.values[begin : begin + count]
        wanted.append(dense)
    close(*(dense[torch.arange(3), actions] for dense in wanted), rtol=1e-4, atol=1e-5)
    close(*((dense != 0).sum(1) for dense in wanted), rtol=0, atol=1)
    close(*(dense.sum(1) for dense in wanted), rtol=1e-3, atol=1e-3 + float(selection.threshold))


def weighted_sums(cell: Cell) -> None:
    width = {"one": 256, "short": 100, "ones": 1, "mixed": 1500}[cell.layout]
    counts = torch.tensor([0, 1, 2, 5, 9, 0, 40] if cell.holes else [3, 4, 4])
    ends = counts.cumsum(0)
    g = torch.Generator().manual_seed(width)
    sums = Sums(ends - counts, ends, torch.randint(30, (int(ends[-1]),), generator=g).int(), cell.random(int(ends[-1])))
    source = cell.random(30, width).to(cell.dtype)
    ours, wanted = (empty(len(counts), width, dtype=cell.dtype) for _ in range(2))
    module("weighted_sums").weighted_sums(sums, source, ours)
    portable.weighted_sums(sums, source, wanted)
    assert device.unwritten(ours) == 0
    close(ours, wanted, rtol=2 * cell.eps, atol=1e-4)


def selected_logits(cell: Cell) -> None:
    width, k, atoms = {"one": (256, 1, 1), "short": (100, 5, 1), "ones": (1, 3, 7), "mixed": (600, 20, 2)}[cell.layout]
    hidden, weight = cell.random(6, width).to(cell.dtype), cell.random(11 * atoms, width).to(cell.dtype)
    ids = torch.randint(11, (4, k), generator=torch.Generator().manual_seed(width))
    positions = torch.tensor([5, 0, 3, 4]) if cell.holes else None
    states = States(hidden if cell.holes else hidden[:4], positions)
    if cell.holes:
        ids[1, 0], ids[2, -1] = -1, 11
    out = [(empty(4, k, atoms), empty(4, k, atoms)) for _ in range(2)]
    bias = cell.random(11 * atoms)
    for backend, (logits, slopes) in zip((module("selected_logits"), portable), out, strict=True):
        backend.selected_logits(Chosen(states, ids, atoms), weight, bias, logits, slopes, **HEAD)
    for ours, wanted in zip(*out, strict=True):
        assert device.unwritten(ours) == 0
        torch.testing.assert_close(ours, wanted, rtol=1e-4, atol=1e-4, equal_nan=True)


def klq_residual(cell: Cell) -> None:
    terms = Terms(*(0.5 * cell.random(5, cell.tokens)), cell.weights())
    ours, wanted = (Residuals(*(empty(cell.tokens) for _ in range(3))) for _ in range(2))
    module("klq_residual").klq_residual(terms, ours, grad_scale=torch.tensor(0.5), shape=SHAPE)
    portable.klq_residual(terms, wanted, grad_scale=torch.tensor(0.5), shape=SHAPE)
    same(ours, wanted, rtol=1e-5, atol=1e-6)


def metrics(cell: Cell) -> None:
    logp, values, old_logp, old_values, advantages, ref = cell.random(6, cell.tokens)
    old = (None, None) if cell.holes else (logp + 0.3 * old_logp, old_values)
    terms = Terms(logp, values, *old, advantages, None)
    given = {"ref_logp": logp + 0.01 * ref, "decay_next": torch.zeros(cell.tokens) if cell.holes else None}
    ours, wanted = (
        klq_metrics(backend, torch.tensor(1.25), terms, SHAPE, **given) for backend in (module("klq_metrics"), portable)
    )
    close(ours, wanted, rtol=1e-4, atol=1e-5)


def scale(cell: Cell) -> None:
    x = cell.random(16 * cell.tokens).to(cell.dtype)
    out = x if cell.holes else empty(x.numel(), dtype=torch.bfloat16)
    wanted = (x.float() * -0.3).to(out.dtype)
    module("scale").scale(x, torch.tensor(-0.3), out)
    torch.testing.assert_close(out, wanted)


def reverse_scan(cell: Cell) -> None:
    cuts = cell.cuts()
    n = int(cuts[-1])
    delta, decay, mask = cell.random(n).to(cell.dtype), torch.full((n,), 0.97).to(cell.dtype), cell.mask(n)
    if mask is not None:
        delta[~mask] = float("nan")
    ours, wanted = empty(n), empty(n)
    module("scans").reverse_scan(delta, decay, mask, cuts, ours)
    portable.reverse_scan(delta, decay, mask, cuts, wanted)
    assert device.unwritten(ours) == 0
    close(ours, wanted, rtol=1e-5, atol=2e-5)


def lambda_errors(cell: Cell) -> None:
    cuts = cell.cuts()
    n = int(cuts[-1])
    terms = ScanTerms(*cell.random(4, n).to(cell.dtype), None)
    mask, tail = cell.mask(n), cell.random(cuts.numel() - 1)
    ours, wanted = empty(n), empty(n)
    for backend, out in ((module("scans"), ours), (portable, wanted)):
        backend.lambda_errors(terms, tail, mask, cuts, out, tau=0.3, gamma=0.99, lam=0.95)
    assert device.unwritten(ours) == 0
    close(ours, wanted, rtol=1e-5, atol=3e-5)


KERNELS: dict[str, Callable[[Cell], None]] = {
    test.__name__: test
    for test in (
        row_stats, row_grad, row_grad_sums, row_grad_narrower, row_update, row_kl, row_select, weighted_sums,
        selected_logits, klq_residual, metrics, scale, reverse_scan, lambda_errors,
    )
}  # fmt: skip


def on_warps(config: Any, warps: int) -> Any:
    """The launch configuration on so many warps, each thread with as much as before."""
    if isinstance(config, dict):
        return {size: on_warps(of_size, warps) for size, of_size in config.items()}
    sizes = {k: max(v * warps // config.num_warps, 1) if k in SHRUNK else v for k, v in config.sizes.items()}
    return config._replace(sizes=sizes, num_warps=warps)


@pytest.fixture(autouse=True)
def poisoned_buffers(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """What ``torch.empty`` makes is poisoned, by kernels' launchers too."""
    plain = torch.empty
    monkeypatch.setattr(torch, "empty", lambda *shape, **kind: device.poison(plain(*shape, **kind)))
    yield
    device.forget()


def set_warps(monkeypatch: pytest.MonkeyPatch, warps: int) -> None:
    launch = vars(module("launch"))
    for name in FILES:
        for config in launch.keys() & vars(module(name)).keys():
            if config.isupper():
                monkeypatch.setattr(module(name), config, on_warps(launch[config], warps))


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("holes", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("warps", [1, 2, 4, 8])
@pytest.mark.parametrize("contract", [False, True])
def test_cell(
    kernel: str, layout: str, holes: bool, dtype: torch.dtype, warps: int, contract: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    set_warps(monkeypatch, warps)
    monkeypatch.setitem(device.STATE, "options", Options(contract=contract))
    KERNELS[kernel](Cell(layout, holes, dtype))


@pytest.mark.parametrize("slots", [128, 8])
@pytest.mark.parametrize("kernel", ["reverse_scan", "lambda_errors"])
def test_a_scan_of_more_tiles_than_slots(kernel: str, slots: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The last tile's pair reaches the first by way of two turns of the loop over slots."""
    config = module("scans").SCAN
    tile = config.sizes["TILE"]
    monkeypatch.setattr(module("scans"), "SCAN", config._replace(sizes={"TILE": tile, "SLOTS": slots}))
    n = tile * (slots + 2) + 5
    monkeypatch.setattr(Cell, "lengths", lambda self: [n])
    KERNELS[kernel](Cell("one", False, torch.float32))
