"""``linear_select`` and its gradients, against float64 and against plain PyTorch."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from cases import DTYPES, Case, assert_as_precise_as, assert_close_to_scale, assert_transforms, make_case, ragged_mask
from hypothesis import given
from hypothesis import strategies as st
from strategies import masks, seeds
from torch import Tensor
from watch import Watch

from klq_kernels import linear_select, pack, reference

LEAVES = ("hidden", "weight", "bias")
CAPPED = {"temperature": 0.7, "softcap": 15.0}


def some_ids(case: Case, k: int, *, seed: int = 3, atoms: int | None = None) -> Tensor:
    """Of each token k ids, with repetitions: half of them from the first four, one the token taken."""
    g = torch.Generator().manual_seed(seed)
    vocab = case.weight.shape[0] // (atoms or 1)
    shape = (*case.actions.shape, k)
    common = torch.randint(min(4, vocab), shape, generator=g)
    ids = torch.where(torch.rand(shape, generator=g) < 0.5, common, torch.randint(vocab, shape, generator=g))
    if k and atoms is None:
        ids[..., 0] = case.actions.cpu()
    return ids.to(case.actions.device)


def run(function: Callable[..., Tensor], case: Case, ids: Tensor, **options: Any) -> tuple[Tensor, dict[str, Tensor]]:
    """(logits, {leaf name: gradient}) of a random combination of the valid tokens' logits."""
    leaves = {name: getattr(case, name).detach().requires_grad_() for name in LEAVES}
    hidden, weight, bias = leaves.values()
    out = function(hidden, weight, ids, bias=bias, **options)
    factors = torch.randn(out.shape, generator=torch.Generator().manual_seed(out.numel())).to(out)
    valid = case.valid.reshape(*case.valid.shape, *(1,) * (out.dim() - case.valid.dim()))
    gradients = torch.autograd.grad((torch.where(valid, out, 0) * factors).sum(), list(leaves.values()))
    return out.detach(), dict(zip(leaves, gradients, strict=True))


def ours(case: Case, ids: Tensor, **options: Any) -> tuple[Tensor, dict[str, Tensor]]:
    return run(linear_select, case, ids, mask=case.mask, **options)


def oracle(case: Case, ids: Tensor, **options: Any) -> tuple[Tensor, dict[str, Tensor]]:
    return run(reference.linear_select, case.double(), ids.cpu(), **options)


def plain_select(
    hidden: Tensor,
    weight: Tensor,
    ids: Tensor,
    *,
    bias: Tensor,
    atoms: int | None = None,
    temperature: float = 1.0,
    softcap: float | None = None,
) -> Tensor:
    """The full logits in the inputs' dtype, the rest in fp32."""
    logits = F.linear(hidden, weight, bias).float()
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    logits = logits / temperature
    if atoms is None:
        return logits.gather(-1, ids)
    by_id = logits.unflatten(-1, (-1, atoms))
    return by_id.gather(-2, ids[..., None].expand(*ids.shape, atoms))


def plain_select_of_reversed_width(hidden: Tensor, weight: Tensor, ids: Tensor, **options: Any) -> Tensor:
    """The same with the products' sums in the other order: no error of one order is the measure."""
    return plain_select(hidden.flip(-1), weight.flip(-1), ids, **options)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("spread", ["peaked", "large"])
@pytest.mark.parametrize(("k", "atoms", "options"), [(9, None, {}), (5, 3, CAPPED)], ids=["plain", "atoms, capped"])
def test_precision_contract(
    device: torch.device, dtype: torch.dtype, spread: str, k: int, atoms: int | None, options: dict[str, float]
) -> None:
    case = make_case(ragged_mask(5, 16), vocab=510, width=64, spread=spread, dtype=dtype, device=device)
    ids = some_ids(case, k, atoms=atoms)
    out, gradients = ours(case, ids, atoms=atoms, **options)
    plain, plain_gradients = run(plain_select, case, ids, atoms=atoms, **options)
    again, gradients_again = run(plain_select_of_reversed_width, case, ids, atoms=atoms, **options)
    gold, gold_gradients = oracle(case, ids, atoms=atoms, **options)
    keep = case.valid
    assert out.dtype == torch.float32
    assert out.shape == ids.shape if atoms is None else (*ids.shape, atoms)
    assert out[~keep].eq(0).all()
    assert_as_precise_as(out[keep], (plain[keep], again[keep]), gold[keep.cpu()], "logits")
    for name, gradient in gradients.items():
        assert gradient.dtype == dtype
        in_two_orders = plain_gradients[name], gradients_again[name]
        assert_as_precise_as(gradient, in_two_orders, gold_gradients[name], f"d {name}")


@pytest.mark.parametrize("dtype", DTYPES[1:])
def test_logits_of_16_bit_states_are_not_rounded(device: torch.device, dtype: torch.dtype) -> None:
    case = make_case(ragged_mask(4, 9), spread="large", dtype=dtype, device=device)
    ids = some_ids(case, 7)
    gold, _ = oracle(case, ids)
    torch.testing.assert_close(
        ours(case, ids)[0][case.valid].cpu().double(), gold[case.valid.cpu()], rtol=1e-5, atol=1e-4
    )


@given(
    mask=masks(),
    vocab=st.integers(1, 40),
    atoms=st.sampled_from([None, 1, 3]),
    k=st.integers(0, 6),
    width=st.integers(1, 9),
    seed=seeds,
    options=st.sampled_from([{}, CAPPED]),
)
def test_any_shape_in_all_layouts(
    device: torch.device, mask: Tensor, vocab: int, atoms: int | None, k: int, width: int, seed: int, options: Any
) -> None:
    case = make_case(mask, vocab=vocab * (atoms or 1), width=width, spread="flat", seed=seed, device=device)
    ids = some_ids(case, k, seed=seed, atoms=atoms)
    out, gradients = ours(case, ids, atoms=atoms, **options)
    gold, gold_gradients = oracle(case, ids, atoms=atoms, **options)
    assert out.shape == gold.shape
    valid = mask.reshape(*mask.shape, *(1,) * (out.dim() - 2))
    torch.testing.assert_close(out.cpu().double(), torch.where(valid, gold, 0), rtol=1e-5, atol=1e-5)
    for name, gradient in gradients.items():
        torch.testing.assert_close(gradient.cpu().double(), gold_gradients[name], rtol=1e-4, atol=1e-4)
    packed = case.packed()
    same = linear_select(packed.hidden, case.weight, ids[case.valid], bias=case.bias, atoms=atoms, **options)
    assert_close_to_scale(out[case.valid], same, "logits")
    if mask.any():
        one = linear_select(packed.hidden[0], case.weight, ids[case.valid][0], bias=case.bias, atoms=atoms, **options)
        assert_close_to_scale(same[0], one, "logits of a token")


def test_masked_nonsense_changes_nothing(device: torch.device) -> None:
    case = make_case(ragged_mask(5, 9), device=device)
    ids = some_ids(case, 5)
    spoiled = replace(case, hidden=case.hidden.masked_fill(~case.valid[..., None], float("nan")))
    bad_ids = torch.where(case.valid[..., None], ids, torch.tensor([-100, 2**40, 131, -1, 7], device=device))
    clean, clean_gradients = ours(case, ids)
    packing = pack(mask=case.mask)
    for dirty, dirty_gradients in (ours(spoiled, bad_ids), run(linear_select, spoiled, bad_ids, packing=packing)):
        assert torch.equal(clean, dirty)
        assert all(torch.equal(clean_gradients[name], dirty_gradients[name]) for name in LEAVES)
    assert clean_gradients["hidden"][~case.valid].eq(0).all()


@pytest.mark.parametrize("atoms", [None, 3])
def test_two_runs_agree_and_every_element_is_written(device: torch.device, poisoned: None, atoms: int | None) -> None:
    """Also where one id is in every token's list, in several places."""
    case = make_case(ragged_mask(5, 40), vocab=258, device=device)
    ids = some_ids(case, 6, atoms=atoms)
    ids[..., 2:4] = 5
    (out, gradients), (again, same_gradients) = (ours(case, ids, atoms=atoms, softcap=9.0) for _ in range(2))
    assert torch.equal(out, again)
    for name, gradient in gradients.items():
        assert gradient.isfinite().all(), name
        assert torch.equal(gradient, same_gradients[name]), name
    taken = torch.zeros(258 // (atoms or 1), dtype=torch.bool, device=device)
    taken[ids[case.valid]] = True
    rows = taken.repeat_interleave(atoms or 1)
    assert not rows.all()
    assert gradients["weight"][~rows].eq(0).all()
    assert gradients["weight"][rows].ne(0).any(1).all()


def test_a_forbidden_token_has_a_logit_of_minus_infinity(device: torch.device) -> None:
    case = make_case(ragged_mask(4, 9), device=device)
    ids = some_ids(case, 5)
    case = replace(case, bias=case.bias.masked_fill(torch.arange(131, device=device) == 2, -torch.inf))
    out, gradients = ours(case, ids)
    gold, gold_gradients = oracle(case, ids)
    keep = case.valid
    torch.testing.assert_close(out[keep].cpu().double(), gold[keep.cpu()], rtol=1e-5, atol=1e-5)
    assert out[keep].eq(-torch.inf).any()
    torch.testing.assert_close(gradients["hidden"].cpu().double(), gold_gradients["hidden"], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dtype", DTYPES[1:])
def test_an_fp32_master_weight_is_read_as_it_is(device: torch.device, dtype: torch.dtype) -> None:
    case = make_case(ragged_mask(4, 9), device=device)
    case = replace(case, hidden=case.hidden.to(dtype))
    ids = some_ids(case, 5)
    out, gradients = ours(case, ids)
    gold, gold_gradients = oracle(case, ids)
    keep = case.valid
    torch.testing.assert_close(out[keep].cpu().double(), gold[keep.cpu()], rtol=1e-5, atol=1e-5)
    assert gradients["hidden"].dtype == dtype
    for name in ("weight", "bias"):
        assert gradients[name].dtype == torch.float32
        torch.testing.assert_close(gradients[name].cpu().double(), gold_gradients[name], rtol=1e-5, atol=1e-5)


def test_views_are_read_as_what_they_show(device: torch.device) -> None:
    """Columns of wider tensors, a turned weight, and ids in int32."""
    case = make_case(ragged_mask(4, 9), device=device)
    ids = some_ids(case, 5)
    expected, gradients = ours(case, ids)
    wide = {name: torch.stack([getattr(case, name)] * 2, -1)[..., 0] for name in LEAVES}
    out, same = ours(replace(case, **wide), torch.cat([ids, ids], -1).int()[..., :5])
    assert torch.equal(out, expected)
    assert all(torch.equal(same[name], gradients[name]) for name in LEAVES)
    out, same = ours(case.map(lambda t: t.T.contiguous().T if t.dim() == 2 else t), ids)
    assert torch.equal(out, expected)
    assert all(torch.equal(same[name], gradients[name]) for name in LEAVES)


def test_autocast_sets_the_dtype(device: torch.device) -> None:
    case = make_case(ragged_mask(4, 9), device=device)
    ids = some_ids(case, 5)
    with torch.autocast(device.type, torch.bfloat16):
        out, _ = ours(case, ids)
    expected, _ = ours(replace(case, hidden=case.hidden.bfloat16()), ids)
    assert torch.equal(out, expected)


@pytest.mark.parametrize("frozen", [(), ("weight",), ("hidden",), LEAVES])
def test_memory(device: torch.device, frozen: tuple[str, ...]) -> None:
    """No product, nothing of size [tokens, vocab] or [tokens, k, H]; a weight's gradient only where it is needed."""
    tokens, vocab, width, k = 512, 4096, 64, 40
    case = make_case(torch.ones(4, tokens // 4, dtype=torch.bool), vocab=vocab, width=width, device=device)
    ids = some_ids(case, k)
    leaves = {name: getattr(case, name).clone().requires_grad_(name not in frozen) for name in LEAVES}
    with Watch() as watch:
        out = linear_select(leaves["hidden"], leaves["weight"], ids, bias=leaves["bias"], softcap=9.0)
        if out.requires_grad:
            out.sum().backward()
    assert watch.products() == 0
    gradient = vocab * width * 4
    assert gradient < tokens * k * width * 4 < tokens * vocab * 4
    assert watch.largest() <= (2**20 if "weight" in frozen else max(gradient, 2**20))


def test_no_tokens_and_no_ids(device: torch.device) -> None:
    for mask, k in ((torch.zeros(2, 3), 4), (torch.zeros(2, 0), 4), (torch.ones(2, 3), 0)):
        case = make_case(mask.bool(), device=device)
        out, gradients = ours(case, some_ids(case, k), softcap=5.0)
        assert out.shape == (*mask.shape, k)
        assert all(tensor.eq(0).all() for tensor in (out, *gradients.values()))


def test_compiled(device: torch.device) -> None:
    torch._dynamo.reset()
    compiled = torch.compile(linear_select, fullgraph=True, backend="aot_eager", dynamic=True)
    for shape in ((3, 6), (4, 9)):
        case = make_case(ragged_mask(*shape), vocab=18, width=4, device=device)
        ids = some_ids(case, 5, atoms=2)
        (out, gradients), (traced, traced_gradients) = (
            run(f, case, ids, atoms=2, mask=case.mask, **CAPPED) for f in (linear_select, compiled)
        )
        assert torch.equal(out, traced)
        assert all(torch.equal(gradients[name], traced_gradients[name]) for name in LEAVES)


def test_transforms() -> None:
    """A stack of policies gives the gradients of a loop; what is not supported says so."""
    case = make_case(ragged_mask(3, 6), vocab=17, width=4)
    ids = some_ids(case, 5)

    def total(hidden: Tensor) -> Tensor:
        return linear_select(hidden, case.weight, ids, mask=case.mask, softcap=5.0).square().sum()

    assert_transforms(total, case.hidden)


def test_unseen_ids_out_of_range_are_nan(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the ids are not looked at, as on a GPU: never a plausible wrong number, in the gradients either."""
    monkeypatch.setattr("klq_kernels.call.layout.check_actions", lambda *_, **__: None)
    case = make_case(torch.ones(2, 3, dtype=torch.bool), device=device)
    ids = some_ids(case, 4)
    expected, gradients = ours(case, ids)
    for bad, nearest in ((-1, 0), (131, 130), (2**40, 130)):
        ids_with_one = ids.clone()
        ids_with_one[0, 1, 2] = bad
        out, spoiled = ours(case, ids_with_one)
        others = torch.ones_like(out, dtype=torch.bool)
        others[0, 1, 2] = False
        assert out[0, 1, 2].isnan()
        assert torch.equal(out[others], expected[others])
        assert spoiled["hidden"][0, 1].isnan().all()
        assert spoiled["weight"][nearest].isnan().all()
        assert spoiled["bias"][nearest].isnan()
        assert torch.equal(spoiled["hidden"][1], gradients["hidden"][1])


BAD: dict[str, tuple[str, Any]] = {
    "hidden in float64": ("hidden", lambda a: a["hidden"].double()),
    "hidden of NumPy": ("hidden", lambda a: a["hidden"].numpy()),
    "hidden of no dimension": ("hidden", lambda a: torch.tensor(1.0)),
    "weight of another width": ("weight", lambda a: a["weight"][:, 1:]),
    "weight of no rows": ("weight", lambda a: a["weight"][:0]),
    "weight in bf16": ("weight", lambda a: a["weight"].bfloat16()),
    "bias of another vocabulary": ("bias", lambda a: a["bias"][1:]),
    "ids of other tokens": ("ids", lambda a: a["ids"][:, 1:]),
    "ids without a list": ("ids", lambda a: a["ids"][..., 0]),
    "ids of floats": ("ids", lambda a: a["ids"].float()),
    "ids elsewhere": ("ids", lambda a: a["ids"].to("meta")),
    "ids as a list": ("ids", lambda a: a["ids"].tolist()),
    "ids below 0": ("ids", lambda a: a["ids"] - 17),
    "ids beyond the vocabulary": ("ids", lambda a: a["ids"] + 17),
    "atoms of 0": ("atoms", lambda a: 0),
    "atoms that do not divide": ("atoms", lambda a: 4),
    "atoms of a float": ("atoms", lambda a: 3.0),
    "temperature of 0": ("temperature", lambda a: 0.0),
    "softcap of infinity": ("softcap", lambda a: math.inf),
    "mask of other tokens": ("mask", lambda a: torch.ones(3, 5, dtype=torch.bool)),
    "mask of numbers": ("mask", lambda a: torch.ones(3, 6)),
    "packing of other tokens": ("packing", lambda a: pack(torch.ones(3, 5, dtype=torch.bool))),
}


@pytest.mark.parametrize("what", BAD)
def test_bad_input_is_named(what: str) -> None:
    case = make_case(ragged_mask(3, 6), vocab=18, width=4)
    arguments: dict[str, Any] = {**{name: getattr(case, name) for name in LEAVES}, "ids": some_ids(case, 5)}
    name, change = BAD[what]
    arguments[name] = change(arguments)
    with pytest.raises(ValueError, match=rf"^{name}: "):
        linear_select(**arguments)


def test_ids_beyond_the_atoms_are_named() -> None:
    """The vocabulary is the rows of the head divided by the atoms."""
    case = make_case(ragged_mask(3, 6), vocab=18, width=4)
    with pytest.raises(ValueError, match=r"^ids: must lie in \[0, 6\)"):
        linear_select(case.hidden, case.weight, torch.full((3, 6, 2), 6), atoms=3)


def test_a_split_head_is_refused() -> None:
    class Split(Tensor):
        placements = ("Shard(0)",)

    case = make_case(ragged_mask(3, 6), vocab=18, width=4)
    with pytest.raises(ValueError, match=r"^weight: is a DTensor.*full_tensor"):
        linear_select(case.hidden, case.weight.as_subclass(Split), some_ids(case, 5))
