"""Bad input of every kind gets a ValueError that names the argument, before any work is done."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from cases import Case, make_case, ragged_mask
from watch import Watch

from klq_kernels import (
    KLQTargets,
    fused_klq_loss,
    gae,
    klq_loss,
    klq_targets,
    lambda_returns,
    linear_logprobs,
    pack,
    reverse_scan,
)
from klq_kernels.call import layout

NAN, INF = float("nan"), float("inf")
B, T, V, H = 3, 6, 17, 4


def good() -> dict[str, Any]:
    """Every argument of every function, right; each test breaks one of them."""
    case: Case = make_case(ragged_mask(B, T), vocab=V, width=H)
    names = ("hidden", "weight", "bias", "actions", "values", "ref_logprobs", "rewards", "bootstrap_values")
    names += ("trace", "weights", "mask", "targets")
    return {name: getattr(case, name) for name in names} | {"delta": case.rewards, "logprobs": case.old_logprobs}


HEAD = ("hidden", "weight", "actions", "values", "bias")
FUNCTIONS: dict[str, tuple[Callable[..., Any], tuple[str, ...]]] = {
    "fused": (fused_klq_loss, (*HEAD, "ref_logprobs", "rewards", "bootstrap_values", "trace", "weights", "mask")),
    "fused targets": (fused_klq_loss, ("hidden", "weight", "actions", "values", "targets", "mask")),
    "linear_logprobs": (linear_logprobs, ("hidden", "weight", "actions", "bias", "mask")),
    "klq_loss": (klq_loss, ("logprobs", "values", "targets", "ref_logprobs", "weights", "mask")),
    "klq_targets": (
        klq_targets,
        ("logprobs", "ref_logprobs", "values", "rewards", "bootstrap_values", "trace", "mask"),
    ),
    "gae": (gae, ("rewards", "values", "bootstrap_values", "mask")),
    "lambda_returns": (lambda_returns, ("rewards", "values", "bootstrap_values", "mask")),
    "reverse_scan": (reverse_scan, ("delta", "decay", "mask")),
}


def refuses(function: str, name: str, **broken: Any) -> None:
    """The call raises a ValueError whose message begins with ``name``, and has multiplied nothing by then."""
    call, wanted = FUNCTIONS[function]
    arguments = {n: v for n, v in good().items() if n in wanted} | ({"decay": 0.9} if "decay" in wanted else {})
    call(**arguments)  # right as they are
    with Watch() as watch, pytest.raises(ValueError, match=rf"^{name}:"):
        call(**arguments | broken)
    assert not any("mm" in done for done in watch.calls)


def per_token(*shape: int) -> torch.Tensor:
    return torch.zeros(*(shape or (B, T)))


EVERY_HEAD = ["fused", "fused targets", "linear_logprobs"]


@pytest.mark.parametrize("function", EVERY_HEAD)
@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("hidden", torch.zeros(B, T + 1, H)),
        ("hidden", torch.zeros(B * T, H)),
        ("hidden", torch.zeros(B, T, H, dtype=torch.float64)),
        ("hidden", torch.zeros(B, T, H, dtype=torch.int64)),
        ("weight", torch.zeros(V, H + 1)),
        ("weight", torch.zeros(H)),
        ("weight", torch.zeros(0, H)),
        ("weight", [[0.0] * H] * V),
        ("weight", torch.zeros(V, H, dtype=torch.bfloat16)),
        ("weight", torch.zeros(V, H, dtype=torch.float64)),
        ("weight", torch.zeros(V, H, device="meta")),
        ("bias", torch.zeros(V + 1)),
        ("bias", torch.zeros(V, 1)),
        ("bias", torch.zeros(V, dtype=torch.int64)),
        ("bias", torch.zeros(V, device="meta")),
        ("actions", torch.zeros(B * T, dtype=torch.int64)),
        ("actions", torch.zeros(B, T)),
        ("actions", torch.zeros(B, T, dtype=torch.bool)),
        ("actions", torch.full((B, T), V)),
        ("actions", torch.full((B, T), -100)),
        ("mask", torch.ones(B, T)),
        ("mask", torch.ones(B, T, dtype=torch.int64)),
        ("mask", torch.ones(B, T - 1, dtype=torch.bool)),
        ("mask", torch.ones(B, T, dtype=torch.bool, device="meta")),
        *((n, x) for n in ("temperature", "softcap") for x in (0.0, -1.0, NAN, INF)),
        ("hidden", torch.zeros(B, T, H).to_sparse()),
        ("return_entropy", "yes"),
        ("workspace_bytes", 0),
        ("workspace_bytes", 4 * V - 1),
        ("workspace_bytes", 1e9),
    ],
    ids=lambda x: f"{list(x.shape)}{x.dtype}".replace("torch.", "") if isinstance(x, torch.Tensor) else str(x),
)
def test_head(function: str, name: str, value: Any) -> None:
    refuses(function, name, **{name: value})


@pytest.mark.parametrize("function", FUNCTIONS)
def test_what_is_no_tensor(function: str) -> None:
    """Lists and numbers; and None where the argument is needed."""
    optional = {"bias", "mask", "bootstrap_values", "trace", "weights", "targets"}
    for name in set(FUNCTIONS[function][1]) - {"targets", "decay"}:
        refuses(function, name, **{name: [1.0]})
        if name not in optional and (function, name) != ("klq_loss", "ref_logprobs"):
            refuses(function, name, **{name: None})


PER_TOKEN = [
    *(("fused", n) for n in ("values", "ref_logprobs", "trace", "weights")),
    ("fused targets", "values"),
    *(("klq_loss", n) for n in ("values", "ref_logprobs", "weights")),
    *(("klq_targets", n) for n in ("ref_logprobs", "values", "trace")),
    ("reverse_scan", "decay"),
]


@pytest.mark.parametrize(("function", "name"), PER_TOKEN)
@pytest.mark.parametrize(
    "value",
    [
        per_token(B, T - 1),
        per_token(B * T),
        torch.zeros(B, T, dtype=torch.int64),
        torch.zeros(B, T, dtype=torch.float8_e4m3fn),
        torch.zeros(B, T, device="meta"),
        torch.zeros(B, T).to_sparse(),
    ],
    ids=["short", "flat", "integer", "float8", "elsewhere", "sparse"],
)
def test_per_token(function: str, name: str, value: torch.Tensor) -> None:
    refuses(function, name, **{name: value})


@pytest.mark.parametrize("function", ["fused", "klq_targets", "gae", "lambda_returns"])
@pytest.mark.parametrize("name", ["rewards", "bootstrap_values"])
@pytest.mark.parametrize(
    "value",
    [per_token(B + 1), per_token(T), per_token(B, 1), torch.zeros(B, dtype=torch.int64), torch.zeros(B, device="meta")],
    ids=["B+1", "T", "column", "integer", "elsewhere"],
)
def test_per_sequence(function: str, name: str, value: torch.Tensor) -> None:
    refuses(function, name, **{name: value})


@pytest.mark.parametrize("function", ["fused targets", "klq_loss"])
def test_targets(function: str) -> None:
    old = good()["targets"]
    refuses(function, "targets", targets=old.advantages)
    refuses(function, "targets", targets=old[:2])
    for k, name in enumerate(KLQTargets._fields):
        broken = list(old)
        broken[k] = per_token(B, T - 1)
        refuses(function, f"targets.{name}", targets=KLQTargets(*broken))


def test_targets_or_what_makes_them() -> None:
    refuses("fused", "ref_logprobs", ref_logprobs=None)
    refuses("fused", "rewards", rewards=None)
    for name in ("rewards", "bootstrap_values", "trace"):
        refuses("fused targets", name, **{name: good()[name]})


@pytest.mark.parametrize("function", ["fused", "fused targets", "klq_loss"])
@pytest.mark.parametrize(
    ("name", "value"),
    [
        *(
            (n, x)
            for n in ("tau", "alpha", "huber_delta", "value_clip", "log_ratio_clip")
            for x in (0.0, -1.0, NAN, INF)
        ),
        ("alpha", 1.5),
        ("loss_type", "l3"),
        ("denom", 0.0),
        ("denom", -1),
        ("denom", NAN),
        ("denom", torch.ones(2)),
        ("denom", torch.ones((), device="meta")),
        ("denom", torch.ones((), dtype=torch.complex64)),
    ],
    ids=str,
)
def test_loss_hyperparameters(function: str, name: str, value: Any) -> None:
    refuses(function, name, **{name: value})


@pytest.mark.parametrize("function", ["fused", "klq_targets", "gae", "lambda_returns"])
@pytest.mark.parametrize("name", ["gamma", "lam"])
@pytest.mark.parametrize("value", [-0.1, 1.1, NAN, INF, "1"])
def test_discounts(function: str, name: str, value: Any) -> None:
    refuses(function, name, **{name: value})


@pytest.mark.parametrize("value", [NAN, INF, torch.ones((), dtype=torch.complex64), torch.ones((), dtype=torch.int64)])
def test_decay(value: float | torch.Tensor) -> None:
    refuses("reverse_scan", "decay", decay=value)


def test_tau_of_targets() -> None:
    for value in (0.0, NAN):
        refuses("klq_targets", "tau", tau=value)


@pytest.mark.parametrize("function", list(FUNCTIONS))
def test_tokens_are_padded_or_packed(function: str) -> None:
    """One dimension without cu_seqlens is neither; nor are two dimensions with them."""
    first = {"klq_targets": "logprobs", "klq_loss": "logprobs", "reverse_scan": "delta"}
    first |= {"gae": "values", "lambda_returns": "values"}
    name = first.get(function, "actions")
    refuses(function, name, **{name: good()[name].flatten()})
    refuses(function, name, cu_seqlens=torch.tensor([0, B * T], dtype=torch.int32))


def packed(function: str) -> dict[str, Any]:
    """Right packed arguments of a function, one sequence."""
    _, wanted = FUNCTIONS[function]
    case = make_case(torch.ones(1, 5, dtype=torch.bool), vocab=V, width=H).packed()
    all_of = {"delta": case.rewards, "logprobs": case.old_logprobs, "decay": 0.9}
    return {n: all_of[n] if n in all_of else getattr(case, n) for n in wanted if n != "mask"}


@pytest.mark.parametrize("function", list(FUNCTIONS))
@pytest.mark.parametrize(
    "ends",
    [
        torch.tensor([0, 5]),
        torch.tensor([0.0, 5.0]),
        torch.tensor([[0, 5]], dtype=torch.int32),
        torch.tensor([], dtype=torch.int32),
        torch.tensor([0, 4], dtype=torch.int32),
        torch.tensor([0, 6], dtype=torch.int32),
        torch.tensor([1, 5], dtype=torch.int32),
        torch.tensor([0, 5], dtype=torch.int32, device="meta"),
    ],
    ids=["int64", "float", "matrix", "empty", "too short", "too long", "late start", "elsewhere"],
)
def test_cu_seqlens(function: str, ends: torch.Tensor) -> None:
    call, _ = FUNCTIONS[function]
    arguments = packed(function)
    call(**arguments, cu_seqlens=torch.tensor([0, 5], dtype=torch.int32))
    with Watch() as watch, pytest.raises(ValueError, match=r"^cu_seqlens:"):
        call(**arguments, cu_seqlens=ends)
    assert not any("mm" in done for done in watch.calls)


def test_cu_seqlens_must_not_fall() -> None:
    for mask in (None, torch.ones(5, dtype=torch.bool)):
        with pytest.raises(ValueError, match=r"^cu_seqlens:"):
            reverse_scan(torch.zeros(5), 0.9, cu_seqlens=torch.tensor([0, 4, 2, 5], dtype=torch.int32), mask=mask)


@pytest.mark.parametrize("function", list(FUNCTIONS))
def test_packing(function: str) -> None:
    case = good()
    call, wanted = FUNCTIONS[function]
    arguments = {n: v for n, v in case.items() if n in wanted and n != "mask"}
    arguments |= {"decay": 0.9} if "decay" in wanted else {}
    call(**arguments, packing=pack(mask=case["mask"]))
    wider = torch.ones(B, T + 1, dtype=torch.bool)
    right = pack(mask=case["mask"])
    for broken in ({"packing": pack(mask=wider)}, {"packing": tuple(right)}, {"packing": right, "mask": case["mask"]}):
        with pytest.raises(ValueError, match=r"^packing:"):
            call(**arguments, **broken)


def test_pack() -> None:
    ends = torch.tensor([0, 5], dtype=torch.int32)
    for name, arguments in (
        ("mask", {"mask": torch.ones(2, 3)}),
        ("mask", {"mask": torch.ones(5, dtype=torch.bool)}),
        ("mask", {"mask": torch.ones(2, 3, 4, dtype=torch.bool)}),
        ("mask", {"mask": torch.ones(1, 5, dtype=torch.bool), "cu_seqlens": ends}),
        ("cu_seqlens", {"mask": torch.ones(6, dtype=torch.bool), "cu_seqlens": ends}),
    ):
        with pytest.raises(ValueError, match=rf"^{name}:"):
            pack(**arguments)


@pytest.mark.parametrize("function", EVERY_HEAD)
def test_a_process_group_is_a_process_group(function: str) -> None:
    call, wanted = FUNCTIONS[function]
    arguments = {n: v for n, v in good().items() if n in wanted}
    with pytest.raises(ValueError, match="process_group: must be a ProcessGroup or a DeviceMesh, got object"):
        call(**arguments, process_group=object())


def test_masked_actions_may_be_anything() -> None:
    case = good()
    actions = torch.where(case["mask"], case["actions"], -100)
    linear_logprobs(case["hidden"], case["weight"], actions, mask=case["mask"])


def test_unknown_backend_names_the_variable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KLQ_BACKEND", "numpy")
    with pytest.raises(ValueError, match="KLQ_BACKEND"):
        reverse_scan(torch.zeros(1, 2), 0.5)


def test_actions_out_of_range_where_nobody_looks(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    """NaN for that token alone, never a plausible number or an abort; on a GPU under KLQ_CHECK=1 the error."""
    if device.type == "cpu":  # where it is looked for always, and is a ValueError, tested above
        monkeypatch.setattr(layout, "check_actions", lambda *_: None)
    case = make_case(torch.ones(2, 4, dtype=torch.bool), vocab=V, width=H, device=device)
    for wrong in (V, -1, 2**40):
        actions = case.actions.clone()
        actions[1, 2] = wrong
        hidden = case.hidden.clone().requires_grad_()
        for gradient in ("dense", "sampled"):
            logprobs = linear_logprobs(hidden, case.weight, actions, gradient=gradient, seed=1).logprobs
            assert logprobs.isnan().nonzero().tolist() == [[1, 2]]
            (by_hidden,) = torch.autograd.grad(logprobs.nan_to_num().sum(), hidden)
            # a sampled gradient that is not finite is NaN for the whole chunk; a row in strips has no entry then
            assert by_hidden.isnan().any()
            assert gradient == "sampled" or by_hidden[1, 2].isnan().all()
            assert gradient == "sampled" or by_hidden.isnan().any(-1).nonzero().tolist() == [[1, 2]]
        loss = fused_klq_loss(case.hidden, case.weight, actions, case.values, targets=case.targets).loss
        assert loss.isnan()
        for sampling in ({}, {"gradient": "sampled", "samples": 4, "seed": 1}):
            leaves = [t.detach().clone().requires_grad_() for t in (case.hidden, case.weight)]
            linear_logprobs(*leaves, actions, **sampling).logprobs.sum().backward()
            by_hidden, by_weight = (leaf.grad for leaf in leaves)
            assert by_hidden[1, 2].isnan().all()
            assert by_weight.isnan().any()
            assert sampling or by_hidden.isnan().any(-1).nonzero().tolist() == [[1, 2]]
        if device.type == "cpu":
            continue
        with monkeypatch.context() as checking:
            checking.setenv("KLQ_CHECK", "1")
            with pytest.raises(ValueError, match=r"^actions:"):
                linear_logprobs(case.hidden, case.weight, actions)


@pytest.mark.parametrize("function", ["fused", "klq_loss"])
def test_weights_are_constants(function: str) -> None:
    """A gradient that would be silently zero is refused."""
    call, wanted = FUNCTIONS[function]
    arguments = {n: v for n, v in good().items() if n in wanted}
    arguments["weights"] = arguments["weights"].clone().requires_grad_()
    with pytest.raises(ValueError, match=r"^weights:"):
        call(**arguments)


@pytest.mark.parametrize("function", EVERY_HEAD)
@pytest.mark.parametrize("shape", [(0,), (12,)], ids=["ZeRO-3", "FSDP1"])
def test_weights_that_an_engine_has_flattened_are_named(function: str, shape: tuple[int, ...]) -> None:
    call, wanted = FUNCTIONS[function]
    arguments = {n: v for n, v in good().items() if n in wanted} | {"weight": torch.zeros(shape)}
    with pytest.raises(ValueError, match=r"^weight: must be \[V, H\].*GatheredParameters, FSDP.summon_full_params"):
        call(**arguments)
