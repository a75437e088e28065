"""``linear_kl`` and its gradients, against float64 and against plain PyTorch."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from cases import DTYPES, Case, assert_as_precise_as, assert_close_to_scale, assert_transforms, make_case, ragged_mask
from hypothesis import given
from hypothesis import strategies as st
from strategies import chunk_rows, masks, seeds, vocabularies
from torch import Tensor
from watch import Watch

from klq_kernels import linear_kl, pack, reference
from klq_kernels.vocabulary.chunking import row_stride

LEAVES = ("hidden", "weight", "bias")
DIRECTIONS = ("forward", "reverse")
CAPPED = {"temperature": 0.7, "softcap": 15.0, "ref_temperature": 1.2, "ref_softcap": 20.0}


class Reference(NamedTuple):
    """The constant side of a call."""

    ref_hidden: Tensor
    ref_weight: Tensor
    ref_bias: Tensor | None

    def map(self, function: Callable[[Tensor], Tensor]) -> Reference:
        return Reference(*(None if t is None else function(t) for t in self))


def near(case: Case, size: float, *, seed: int = 1) -> Reference:
    """The policy before some updates: its numbers and noise of this size relative to theirs, in its dtype."""
    g = torch.Generator().manual_seed(seed)

    def moved(t: Tensor) -> Tensor:
        noise = torch.randn(t.shape, generator=g).to(t.device)
        return (t.float() * (1 + size * noise)).to(t.dtype)

    return Reference(moved(case.hidden), moved(case.weight), moved(case.bias))


def other(case: Case, *, width: int, seed: int = 2) -> Reference:
    """Another model of the same vocabulary."""
    mask = case.mask
    assert mask is not None
    vocab, dtype = case.weight.shape[0], case.hidden.dtype
    found = make_case(mask.cpu(), vocab=vocab, width=width, seed=seed, dtype=dtype, device=case.hidden.device)
    return Reference(found.hidden, found.weight, found.bias)


def run(
    function: Callable[..., Tensor], case: Case, ref: Reference, **options: Any
) -> tuple[Tensor, dict[str, Tensor]]:
    """(divergence, {leaf name: gradient}) of a random combination of the valid tokens' divergences."""
    leaves = {name: getattr(case, name).detach().requires_grad_() for name in LEAVES}
    hidden, weight, bias = leaves.values()
    out = function(hidden, weight, ref.ref_hidden, ref.ref_weight, bias=bias, ref_bias=ref.ref_bias, **options)
    total = (torch.where(case.valid, out, 0) * case.advantages).sum()
    gradients = torch.autograd.grad(total, list(leaves.values()))
    return out.detach(), dict(zip(leaves, gradients, strict=True))


def ours(case: Case, ref: Reference, **options: Any) -> tuple[Tensor, dict[str, Tensor]]:
    return run(linear_kl, case, ref, **case.layout, **options)


def oracle(case: Case, ref: Reference, **options: Any) -> tuple[Tensor, dict[str, Tensor]]:
    return run(reference.linear_kl, case.double(), ref.map(lambda t: t.cpu().double()), **options)


def plain_kl(
    hidden: Tensor,
    weight: Tensor,
    ref_hidden: Tensor,
    ref_weight: Tensor,
    *,
    bias: Tensor,
    ref_bias: Tensor,
    direction: str,
    temperature: float = 1.0,
    softcap: float | None = None,
    ref_temperature: float = 1.0,
    ref_softcap: float | None = None,
) -> Tensor:
    """The full logits in the inputs' dtype, the rest in fp32, as ``F.kl_div`` computes it."""

    def log_softmax(x: Tensor, w: Tensor, b: Tensor, heat: float, cap: float | None) -> Tensor:
        logits = F.linear(x, w, b).float()
        return ((logits if cap is None else cap * torch.tanh(logits / cap)) / heat).log_softmax(-1)

    log_p = log_softmax(hidden, weight, bias, temperature, softcap)
    log_q = log_softmax(ref_hidden, ref_weight, ref_bias, ref_temperature, ref_softcap)
    target, found = (log_p, log_q) if direction == "forward" else (log_q, log_p)
    return F.kl_div(found, target, reduction="none", log_target=True).sum(-1)


def plain_kl_of_reversed_width(
    hidden: Tensor, weight: Tensor, ref_hidden: Tensor, ref_weight: Tensor, **options: Any
) -> Tensor:
    """The same with the products' sums in the other order: no error of one order is the measure."""
    reversed_ = [t.flip(-1) for t in (hidden, weight, ref_hidden, ref_weight)]
    return plain_kl(*reversed_, **options)


def workspace(rows: int, case: Case) -> int:
    """Of chunks of so many rows of two heads in the case's dtype."""
    return 2 * rows * row_stride(case.weight.shape[0]) * case.hidden.element_size()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("spread", ["peaked", "large"])
@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("options", [{}, CAPPED], ids=["plain", "capped"])
def test_precision_contract(
    device: torch.device, dtype: torch.dtype, spread: str, direction: str, options: dict[str, float]
) -> None:
    case = make_case(ragged_mask(5, 16), vocab=509, width=64, spread=spread, dtype=dtype, device=device)
    keep = case.valid
    for ref in (near(case, 0.05), other(case, width=64)):
        out, gradients = ours(case, ref, direction=direction, workspace_bytes=workspace(13, case), **options)
        plain, plain_gradients = run(plain_kl, case, ref, direction=direction, **options)
        again, gradients_again = run(plain_kl_of_reversed_width, case, ref, direction=direction, **options)
        gold, gold_gradients = oracle(case, ref, direction=direction, **options)
        assert out.dtype == torch.float32
        assert out[~keep].eq(0).all()
        assert (out >= 0).all()
        assert_as_precise_as(out[keep], (plain[keep], again[keep]), gold[keep.cpu()], "divergence")
        for name, gradient in gradients.items():
            assert gradient.dtype == dtype
            in_two_orders = plain_gradients[name], gradients_again[name]
            assert_as_precise_as(gradient, in_two_orders, gold_gradients[name], f"d {name}")


@given(
    mask=masks(),
    vocab=vocabularies,
    width=st.integers(1, 9),
    ref_width=st.integers(1, 9),
    seed=seeds,
    rows=chunk_rows,
    direction=st.sampled_from(DIRECTIONS),
    options=st.sampled_from([{}, CAPPED]),
)
def test_any_shape_in_all_layouts(
    device: torch.device, mask: Tensor, vocab: int, width: int, ref_width: int, seed: int, rows: int | None, **head: Any
) -> None:
    case = make_case(mask, vocab=vocab, width=width, spread="flat", seed=seed, device=device)
    ref = other(case, width=ref_width, seed=seed + 1)
    options = {"direction": head["direction"], **head["options"]}
    chunks = {} if rows is None else {"workspace_bytes": workspace(rows, case)}
    out, gradients = ours(case, ref, **chunks, **options)
    gold, gold_gradients = oracle(case, ref, **options)
    assert out.shape == mask.shape
    torch.testing.assert_close(out.cpu().double(), torch.where(mask, gold, 0), rtol=1e-5, atol=1e-5)
    for name, gradient in gradients.items():
        torch.testing.assert_close(gradient.cpu().double(), gold_gradients[name], rtol=1e-4, atol=1e-4)
    for holes in (False, True):
        kept = torch.ones_like(case.valid) if holes else case.valid
        packed = case.packed(holes=holes)
        same, same_gradients = ours(packed, ref._replace(ref_hidden=ref.ref_hidden[kept]), **chunks, **options)
        assert_close_to_scale(out[kept], same, "divergence")
        assert_close_to_scale(gradients["hidden"][kept], same_gradients["hidden"], "d hidden")
        for name in ("weight", "bias"):
            assert_close_to_scale(gradients[name], same_gradients[name], f"d {name}")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("direction", DIRECTIONS)
def test_equal_policies_diverge_by_exactly_nothing(device: torch.device, dtype: torch.dtype, direction: str) -> None:
    case = make_case(ragged_mask(5, 9), spread="large", dtype=dtype, device=device)
    out, gradients = ours(case, near(case, 0.0), direction=direction, temperature=0.7, softcap=30.0)
    for tensor in (out, *gradients.values()):
        assert tensor.eq(0).all()


@pytest.mark.parametrize("direction", DIRECTIONS)
def test_a_small_divergence_keeps_its_digits(device: torch.device, direction: str) -> None:
    """One of 1e-8, where p log(p / q) in fp32 is noise of 1e-7 of either sign."""
    case = make_case(ragged_mask(5, 9), device=device).with_exact_logits()
    noise = torch.randn(case.bias.shape, generator=torch.Generator().manual_seed(3)).to(device)
    case = replace(case, bias=case.bias.mul(2**10).round() / 2**10)
    ref = Reference(case.hidden, case.weight, case.bias + noise.sign() * 2**-12)  # exact, as all logits are
    keep = case.valid
    out, _ = ours(case, ref, direction=direction)
    gold, _ = oracle(case, ref, direction=direction)
    assert (out >= 0).all()
    assert gold[keep.cpu()].max() < 1e-7
    torch.testing.assert_close(out[keep].cpu().double(), gold[keep.cpu()], rtol=2e-2, atol=1e-13)
    plain, _ = run(plain_kl, case, ref, direction=direction)
    assert ((plain.cpu() - gold)[keep.cpu()].abs() > 0.5 * gold[keep.cpu()]).any()


@pytest.mark.parametrize("direction", DIRECTIONS)
def test_masked_nonsense_changes_nothing(device: torch.device, direction: str) -> None:
    case = make_case(ragged_mask(5, 9), device=device)
    ref = other(case, width=7)
    spoiled = replace(case.spoiled(), advantages=case.advantages)
    spoiled_ref = ref._replace(ref_hidden=ref.ref_hidden.masked_fill(~case.valid[..., None], float("nan")))
    (clean, clean_gradients), (dirty, dirty_gradients) = (
        ours(c, r, direction=direction) for c, r in ((case, ref), (spoiled, spoiled_ref))
    )
    assert torch.equal(clean, dirty)
    assert all(torch.equal(clean_gradients[name], dirty_gradients[name]) for name in LEAVES)
    packed, packed_gradients = run(linear_kl, case, ref, packing=pack(mask=case.mask), direction=direction)
    assert torch.equal(clean, packed)
    assert all(torch.equal(clean_gradients[name], packed_gradients[name]) for name in LEAVES)


@pytest.mark.parametrize("direction", DIRECTIONS)
def test_two_runs_agree_and_every_element_is_written(device: torch.device, poisoned: None, direction: str) -> None:
    case = make_case(ragged_mask(5, 9), vocab=257, device=device)
    ref = other(case, width=7)
    (out, gradients), (again, same_gradients) = (
        ours(case, ref, direction=direction, workspace_bytes=workspace(5, case)) for _ in range(2)
    )
    assert torch.equal(out, again)
    for name, gradient in gradients.items():
        assert gradient.isfinite().all(), name
        assert torch.equal(gradient, same_gradients[name]), name


@pytest.mark.parametrize("direction", DIRECTIONS)
def test_forbidden_tokens(device: torch.device, direction: str) -> None:
    """By both heads: as if they were not in the vocabulary. By the first alone: no trouble. By the second: infinity."""
    case = make_case(ragged_mask(4, 9), device=device)
    ref = other(case, width=7)
    banned = torch.arange(case.bias.numel(), device=device) % 3 == 0
    assert ref.ref_bias is not None
    case = replace(case, bias=case.bias.masked_fill(banned, -torch.inf))
    ref = ref._replace(ref_bias=ref.ref_bias.masked_fill(banned, -torch.inf))
    out, gradients = ours(case, ref, direction=direction)
    allowed = replace(case, weight=case.weight[~banned], bias=case.bias[~banned])
    gold, gold_gradients = oracle(
        allowed, Reference(ref.ref_hidden, ref.ref_weight[~banned], ref.ref_bias[~banned]), direction=direction
    )
    keep = case.valid.cpu()
    torch.testing.assert_close(out.cpu().double(), torch.where(keep, gold, 0), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(gradients["hidden"].cpu().double(), gold_gradients["hidden"], rtol=1e-4, atol=1e-5)
    for name in ("weight", "bias"):
        assert gradients[name][banned].eq(0).all()
        torch.testing.assert_close(gradients[name][~banned].cpu().double(), gold_gradients[name], rtol=1e-4, atol=1e-5)
    open_policy = replace(case, bias=torch.zeros_like(case.bias))
    open_ref = ref._replace(ref_bias=torch.zeros_like(case.bias))
    first_alone, second_alone = (case, open_ref), (open_policy, ref)
    if direction == "reverse":
        first_alone, second_alone = second_alone, first_alone
    gold, _ = oracle(*first_alone, direction=direction)
    out, gradients = ours(*first_alone, direction=direction)
    torch.testing.assert_close(out.cpu().double(), torch.where(keep, gold, 0), rtol=1e-5, atol=1e-5)
    assert all(gradient.isfinite().all() for gradient in gradients.values())
    assert ours(*second_alone, direction=direction)[0][case.valid].eq(torch.inf).all()


def test_the_references_temperature_and_cap_are_the_policys_by_default(device: torch.device) -> None:
    case = make_case(ragged_mask(3, 6), device=device)
    ref = other(case, width=7)
    same = {"temperature": 0.7, "softcap": 9.0}
    written_out = same | {"ref_temperature": 0.7, "ref_softcap": 9.0}
    assert torch.equal(ours(case, ref, **same)[0], ours(case, ref, **written_out)[0])
    for options in ({**same, "ref_softcap": math.inf}, {**same, "ref_temperature": 2.0}):
        gold, _ = oracle(case, ref, **options)
        out, _ = ours(case, ref, **options)
        torch.testing.assert_close(out.cpu().double(), torch.where(case.valid.cpu(), gold, 0), rtol=1e-5, atol=1e-5)


def test_non_contiguous_inputs(device: torch.device) -> None:
    case = make_case(ragged_mask(4, 9), device=device).with_exact_logits()
    ref = near(case, 0.3)

    def strided(t: Tensor) -> Tensor:
        return t.T.contiguous().T if t.dim() == 2 else torch.stack([t, t], -1)[..., 0]

    expected, gradients = ours(case, ref)
    out, same = ours(case.map(strided), ref.map(strided))
    torch.testing.assert_close(out, expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(same, gradients, rtol=1e-5, atol=1e-5)


def test_each_head_has_its_own_dtype(device: torch.device) -> None:
    """A bf16 policy with an fp32 master weight beside an fp32 reference, in one chunk and in many."""
    case = make_case(ragged_mask(4, 9), device=device)
    ref = other(case, width=7)
    mixed = replace(case, hidden=case.hidden.bfloat16())
    exact = replace(mixed, weight=case.weight.bfloat16(), bias=case.bias.bfloat16())
    gold, gold_gradients = oracle(exact, ref)
    for options in ({}, {"workspace_bytes": 6 * 3 * row_stride(131)}):
        out, gradients = ours(mixed, ref, **options)
        assert gradients["weight"].dtype == torch.float32
        assert gradients["hidden"].dtype == torch.bfloat16
        torch.testing.assert_close(out.cpu().double(), torch.where(case.valid.cpu(), gold, 0), rtol=0.05, atol=0.05)
        for name, gradient in gradients.items():
            torch.testing.assert_close(gradient.cpu().double(), gold_gradients[name], rtol=0.05, atol=0.1)


def test_unrounded_logits(device: torch.device) -> None:
    case = make_case(ragged_mask(4, 9), spread="large", dtype=torch.bfloat16, device=device)
    ref = near(case, 0.01)
    gold, _ = oracle(case, ref)
    rounded, unrounded = (ours(case, ref, logits_dtype=dtype)[0].cpu().double() for dtype in (None, torch.float32))
    keep = case.valid.cpu()
    torch.testing.assert_close(unrounded[keep], gold[keep], rtol=1e-3, atol=1e-6)
    assert ((rounded - gold)[keep].abs() > 1e-2 * gold[keep]).any()


def test_autocast_sets_the_dtype(device: torch.device) -> None:
    case = make_case(ragged_mask(4, 9), device=device)
    ref = near(case, 0.1)
    with torch.autocast(device.type, torch.bfloat16):
        out, _ = ours(case, ref)
    narrow = replace(case, hidden=case.hidden.bfloat16())
    expected, _ = ours(narrow, ref._replace(ref_hidden=ref.ref_hidden.bfloat16()))
    assert torch.equal(out, expected)


@pytest.mark.parametrize(("frozen", "products"), [((), 6), (("weight",), 5), (("hidden",), 5), (LEAVES, 2)])
def test_products_and_memory(device: torch.device, frozen: tuple[str, ...], products: int) -> None:
    """Two products forward, two again in backward and one for each gradient; never more logits than the workspace."""
    case = make_case(torch.ones(4, 32, dtype=torch.bool), vocab=1009, width=8, device=device)
    ref = other(case, width=6)
    leaves = {name: getattr(case, name).clone().requires_grad_(name not in frozen) for name in LEAVES}
    size, counted = workspace(16, case), []
    for limit in (size, workspace(128, case)):
        with Watch() as watch:
            out = linear_kl(
                leaves["hidden"], leaves["weight"], ref.ref_hidden, ref.ref_weight, bias=leaves["bias"],
                ref_bias=ref.ref_bias, workspace_bytes=limit,
            )  # fmt: skip
            if out.requires_grad:
                out.sum().backward()
        counted.append(watch.products())
        assert watch.largest() <= limit // 2
    assert counted == [8 * products, products]
    assert size < 128 * 1009 * 4


def test_no_tokens(device: torch.device) -> None:
    for case in (make_case(torch.zeros(2, 3, dtype=torch.bool)), make_case(torch.zeros(2, 0, dtype=torch.bool))):
        here = case.map(lambda t: t.to(device))
        out, gradients = ours(here, other(here, width=5))
        assert out.shape == case.actions.shape
        assert all(tensor.eq(0).all() for tensor in (out, *gradients.values()))


@pytest.mark.parametrize("direction", DIRECTIONS)
def test_compiled(device: torch.device, direction: str) -> None:
    case = make_case(ragged_mask(3, 6), vocab=17, width=4, device=device)
    ref = other(case, width=5)
    torch._dynamo.reset()
    compiled = torch.compile(linear_kl, fullgraph=True, backend="aot_eager")
    (out, gradients), (traced, traced_gradients) = (
        run(f, case, ref, direction=direction, **CAPPED, **case.layout) for f in (linear_kl, compiled)
    )
    assert torch.equal(out, traced)
    assert all(torch.equal(gradients[name], traced_gradients[name]) for name in LEAVES)


def test_transforms() -> None:
    """A stack of policies against one reference gives the gradients of a loop; what is not supported says so."""
    case = make_case(ragged_mask(3, 6), vocab=17, width=4)
    ref = other(case, width=5)

    def total(hidden: Tensor) -> Tensor:
        return linear_kl(hidden, case.weight, ref.ref_hidden, ref.ref_weight, mask=case.mask).sum()

    assert_transforms(total, case.hidden)


BAD: dict[str, tuple[str, Any]] = {
    "hidden of one row": ("hidden", lambda a: a["hidden"][0]),
    "hidden in float64": ("hidden", lambda a: a["hidden"].double()),
    "ref_hidden of other tokens": ("ref_hidden", lambda a: a["ref_hidden"][:, 1:]),
    "ref_hidden in int": ("ref_hidden", lambda a: a["ref_hidden"].int()),
    "ref_hidden elsewhere": ("ref_hidden", lambda a: a["ref_hidden"].to("meta")),
    "ref_hidden of NumPy": ("ref_hidden", lambda a: a["ref_hidden"].numpy()),
    "ref_weight of another width": ("ref_weight", lambda a: a["ref_weight"][:, 1:]),
    "ref_weight of another vocabulary": ("ref_weight", lambda a: a["ref_weight"][1:]),
    "ref_weight in bf16": ("ref_weight", lambda a: a["ref_weight"].bfloat16()),
    "weight of no columns": ("weight", lambda a: a["weight"][:, :0]),
    "bias of another vocabulary": ("bias", lambda a: a["bias"][1:]),
    "ref_bias of another vocabulary": ("ref_bias", lambda a: a["ref_bias"][1:]),
    "ref_hidden with a gradient": ("ref_hidden", lambda a: a["ref_hidden"].requires_grad_()),
    "ref_weight with a gradient": ("ref_weight", lambda a: a["ref_weight"].requires_grad_()),
    "ref_bias with a gradient": ("ref_bias", lambda a: a["ref_bias"].requires_grad_()),
    "temperature of 0": ("temperature", lambda a: 0.0),
    "ref_temperature below 0": ("ref_temperature", lambda a: -1.0),
    "softcap of infinity": ("softcap", lambda a: math.inf),
    "ref_softcap of 0": ("ref_softcap", lambda a: 0.0),
    "direction unknown": ("direction", lambda a: "backward"),
    "logits_dtype of 16 bits": ("logits_dtype", lambda a: torch.float16),
    "mask of other tokens": ("mask", lambda a: torch.ones(3, 5, dtype=torch.bool)),
    "cu_seqlens beside [B, T]": ("hidden", lambda a: a["hidden"]),
    "workspace for one head": ("workspace_bytes", lambda a: 2 * 64 * 4 - 1),
    "workspace in words": ("workspace_bytes", lambda a: "much"),
}


def good_arguments() -> dict[str, Any]:
    case = make_case(ragged_mask(3, 6), vocab=17, width=4)
    ref = other(case, width=5)
    return {**{name: getattr(case, name) for name in LEAVES}, **ref.map(torch.clone)._asdict()}


@pytest.mark.parametrize("what", BAD)
def test_bad_input_is_named(what: str) -> None:
    arguments = good_arguments()
    name, change = BAD[what]
    arguments[name] = change(arguments)
    if what.startswith("cu_seqlens"):
        arguments["cu_seqlens"] = torch.tensor([0, 18], dtype=torch.int32)
    with pytest.raises(ValueError, match=rf"^{name}: "):
        linear_kl(**arguments)


def test_a_reference_with_a_gradient_is_right_where_none_is_computed() -> None:
    arguments = good_arguments()
    expected = linear_kl(**arguments)
    arguments["ref_weight"].requires_grad_()
    with torch.no_grad():
        assert torch.equal(linear_kl(**arguments), expected)


def test_a_split_head_is_refused() -> None:
    class Split(Tensor):
        placements = ("Shard(0)",)

    for name in ("weight", "ref_weight"):
        arguments = good_arguments()
        arguments[name] = arguments[name].as_subclass(Split)
        with pytest.raises(ValueError, match=rf"^{name}: is a DTensor.*full_tensor"):
            linear_kl(**arguments)
