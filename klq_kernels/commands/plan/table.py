"""A plan as plain JSON values, and as tables."""

from __future__ import annotations

from typing import Any

import torch

from .. import loss_memory
from .memory import Plan, plan
from .run import Run
from .search import advice, fewest_gpus, largest
from .shapes import Model
from .timing import Rates, products, seconds, step
from .traffic import Move, scoring, traffic

GIB = 2**30


def strategy(found: Plan) -> str:
    """The way in which the library will compute this head, and the reason."""
    skipped = (
        "" if found.problem.weight_gradient else " (the head is frozen: its gradient and accumulator are left out)"
    )
    made = f"one pass, {products(found.problem)} matrix products"
    if found.problem.sampled:
        made = (
            f"one pass, 1 matrix product, gradients from at most {found.problem.samples + 1} entries a token on average"
        )
    return f"{made}{skipped}; {loss_memory.why_chunks(found.problem)}"


def report(model: Model, run: Run, budget: int | None, rates: Rates) -> dict[str, Any]:
    """Everything ``klq plan`` prints, as plain JSON values. Bytes and seconds are those of one rank."""
    found = plan(model, run)
    out: dict[str, Any] = {
        "model": {**model._asdict(), "parameters": model.size, "active_parameters": model.active},
        "run": _run(run),
        "standing_bytes": found.standing,
        "loss_bytes": {
            name: {"terms": memory.terms, "peak": memory.peak}
            for name, memory in (("naive", found.naive), ("fused", found.fused))
        },
        "total_bytes": {"naive": found.total(found.naive), "fused": found.total(found.fused)},
        "scoring_bytes": sum(found.scoring.values()),
        "host_bytes": found.host,
        "traffic": [_move(move, rates) for move in traffic(model, run)],
        "scoring_traffic": [_move(move, rates) for move in scoring(model, run)],
        "chunk_rows": found.problem.rows,
        "chunks": found.problem.chunks,
        "strategy": strategy(found),
    }
    if budget is not None:
        out |= _fitting(model, run, budget)
    if rates.flop is not None:
        out |= _times(model, run, rates)
    return out


def _run(run: Run) -> dict[str, Any]:
    plain = {name: _named(value) for name, value in run._asdict().items()}
    derived = {"weights": _named(run.stored), "models": run.held, "ref_placement": run.placement}
    return {**plain, **derived, "sequences": run.batch * run.copies // run.cp}


def _named(value: Any) -> Any:
    return str(value).removeprefix("torch.") if isinstance(value, (torch.dtype, torch.device)) else value


def _move(move: Move, rates: Rates) -> dict[str, Any]:
    return {**move._asdict(), "sent": move.sent, "seconds": seconds(move, rates)}


def _fitting(model: Model, run: Run, budget: int) -> dict[str, Any]:
    sizes = {
        axis: {name: largest(model, run, budget, fused=name == "fused", axis=axis) for name in ("naive", "fused")}
        for axis in ("batch", "length")
    }
    out: dict[str, Any] = {"budget_bytes": budget, "largest": sizes}
    if sizes["batch"]["fused"] == 0:
        out["advice"] = [change._asdict() for change in advice(model, run)]
        out["fewest_gpus"] = fewest_gpus(model, run, budget)
    return out


def _times(model: Model, run: Run, rates: Rates) -> dict[str, Any]:
    took = step(model, run, rates)
    names = ("body", "attention", "loss", "activations", "optimizer", "computing", "least", "most")
    return {
        "rates": rates._asdict(),
        "seconds": {name: getattr(took, name) for name in names} | {"traffic": sum(took.traffic.values())},
    }


def show(content: dict[str, Any]) -> None:
    """Prints ``report`` as tables (needs rich)."""
    from rich.console import Console

    console = Console(highlight=False)
    console.print(_title(content))
    console.print(_memory_table(content))
    if content["traffic"] or content["scoring_traffic"]:
        console.print(_traffic_table(content))
    console.print(f"Strategy: {content['strategy']}.")
    if "seconds" in content:
        console.print(_time(content))
    if "advice" in content:
        console.print(_advice(content))


def _title(content: dict[str, Any]) -> str:
    model, run = content["model"], content["run"]
    size = f"{model['parameters'] / 1e9:.2f}B parameters"
    if model["active_parameters"] != model["parameters"]:
        size += f", {model['active_parameters'] / 1e9:.2f}B active"
    text = (
        f"{size}, H={model['hidden']} V={model['vocab']}; batch {run['batch']} x {run['length']} tokens, "
        f"{run['response']} trained; {run['dtype']}, weights in {run['weights']}, on {run['device']}"
    )
    if run["gpus"] > 1:
        ways = "".join(f", {name} {run[name]}" for name in ("tp", "cp") if run[name] > 1)
        text += f"; {run['gpus']:,} GPUs{ways}, {run['shard']}: {run['sequences']:,} sequences a step"
    return text


def _memory_table(content: dict[str, Any]) -> Any:
    from rich.table import Table

    per_rank = " and rank" if content["run"]["gpus"] > 1 else ""
    table = Table(f"memory of a step{per_rank}", "naive", "fused")
    table.columns[1].justify = table.columns[2].justify = "right"
    for name, size in content["standing_bytes"].items():
        table.add_row(name, _gib(size), _gib(size))
    loss = content["loss_bytes"]
    for name in dict.fromkeys([*loss["naive"]["terms"], *loss["fused"]["terms"]]):
        table.add_row(f"loss: {name}", *(_gib(loss[kind]["terms"].get(name, 0)) for kind in ("naive", "fused")))
    table.add_section()
    table.add_row("loss, peak", *(_gib(loss[kind]["peak"]) for kind in ("naive", "fused")))
    if content["scoring_bytes"]:
        table.add_row("scoring, with models from the host", *[_gib(content["scoring_bytes"])] * 2)
    table.add_row("step, peak", *(_gib(content["total_bytes"][kind]) for kind in ("naive", "fused")), style="bold")
    for axis, found in content.get("largest", {}).items():
        title = f"largest {axis} within {_gib(content['budget_bytes'])}"
        table.add_row(title, *(f"{found[kind]:,}" for kind in ("naive", "fused")))
    for name, size in content["host_bytes"].items():
        table.add_row(f"on the host: {name}", *[_gib(size)] * 2)
    return table


def _traffic_table(content: dict[str, Any]) -> Any:
    from rich.table import Table

    timed = "seconds" in content
    table = Table("traffic of a step and rank", "collective", "ranks", "tensor", "sent", *(["ms"] if timed else []))
    for column in table.columns[2:]:
        column.justify = "right"
    for move in content["traffic"]:
        table.add_row(*_cells(move, timed))
    table.add_section()
    for move in content["scoring_traffic"]:
        table.add_row(*_cells({**move, "name": f"scoring: {move['name']}"}, timed))
    return table


def _cells(move: dict[str, Any], timed: bool) -> list[str]:
    host = move["kind"] == "host"
    ranks = "-" if host else f"{move['ranks']:,}"
    cells = [move["name"], move["kind"], ranks, _gib(move["size"]), _gib(move["sent"])]
    return [*cells, f"{1e3 * move['seconds']:,.1f}"] if timed else cells


def _time(content: dict[str, Any]) -> str:
    took, rates, run = content["seconds"], content["rates"], content["run"]
    text = (
        f"At {rates['flop'] / 1e12:,.3g} TFLOP/s: body {took['body']:.3g} s, attention {took['attention']:.3g} s, loss "
        f"{took['loss']:.3g} s"
    )
    if rates["memory"]:
        text += (
            f"; at {rates['memory'] / 1e12:,.3g} TB/s: activations {took['activations']:.3g} s, optimiser "
            f"{took['optimizer']:.3g} s"
        )
    if took["traffic"]:
        text += f"; traffic {took['traffic']:.3g} s"
    tokens = run["sequences"] * run["length"]
    span = f"{took['least']:.3g} s" if took["most"] < 1.01 * took["least"] else (
        f"{took['least']:.3g} s where all traffic that can overlap does, {took['most']:.3g} s where none does"
    )  # fmt: skip
    return f"{text}. A step takes {span}: {tokens / took['most']:,.0f} tokens a second or more."


def _advice(content: dict[str, Any]) -> str:
    budget, found, fewest = content["budget_bytes"], content["advice"], content["fewest_gpus"]
    if not found:
        text = "No single option lowers the memory of a step"
    else:
        best, *others = found
        fits = "which fits" if best["total"] <= budget else "which does not fit either"
        text = f"What helps most: {best['option']}, {_gib(best['total'])} for one sequence, {fits}"
        if others:
            text += "; then " + ", ".join(f"{c['option']} ({_gib(c['total'])})" for c in others[:3])
    text = f"Not even one sequence fits {_gib(budget)}. {text}."
    if fewest is None:
        return f"{text} No number of GPUs is enough with these options under FSDP2."
    return f"{text} Under FSDP2 with these options one sequence fits on {fewest:,} GPUs."


def _gib(size: int) -> str:
    return f"{size / GIB:,.2f} GiB" if size >= GIB / 10 else f"{size / 2**20:,.1f} MiB" if size else "-"
