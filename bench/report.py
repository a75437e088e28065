"""Measurements as JSON, CSV, tables and comparisons. Nothing here needs more than the standard library but ``show``."""

from __future__ import annotations

import csv
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from .harness import FLOOR, Record

SCHEMA = 1
NARROWEST = 96  # columns of a table
MISSING = "-"
SHORT = {"cross-entropy": "CE", "policy gradient": "PG"}
Row = dict[str, Any]


def document(records: Iterable[Record], environment: dict[str, Any], **about: Any) -> dict[str, Any]:
    """The JSON document of a run."""
    return {"schema": SCHEMA, **about, "environment": environment, "results": [r.to_json() for r in records]}


def save_json(path: Path, content: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content, indent=1) + "\n")


def load_json(path: Path) -> dict[str, Any]:
    """A document of ``save_json``. Raises ValueError where the file is missing or holds something else."""
    try:
        content = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise ValueError(f"{path}: cannot be read as a benchmark: {error}") from error
    if not isinstance(content, dict) or content.get("schema") != SCHEMA:
        raise ValueError(f"{path}: not a benchmark of schema {SCHEMA}")
    return content


def save_csv(path: Path, content: dict[str, Any]) -> None:
    """One line per contender and shape, nested fields spread out."""
    lines = [_flat(row) for row in content["results"]]
    names = list(dict.fromkeys(name for line in lines for name in line))
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, names)
        writer.writeheader()
        writer.writerows(lines)


def _flat(row: Row) -> Row:
    out: Row = {}
    for key, value in row.items():
        if isinstance(value, dict):
            out.update({f"{key}.{inner}": v for inner, v in value.items()})
        elif isinstance(value, (list, tuple)):
            out.update({f"{key}.{n}": v for n, v in zip(("low", "high"), value, strict=True)})
        else:
            out[key] = value
    return out


def milliseconds(value: float | None) -> str:
    return MISSING if value is None else f"{value:.3g}" if value < 100 else f"{value:.0f}"


def bytes_text(value: float | str | None) -> str:
    """As MiB or GiB, three digits; a reason in place of a figure as it is."""
    if value is None or isinstance(value, str):
        return value or MISSING
    mib = value / 2**20
    return f"{mib / 1024:.2f} GiB" if mib >= 1000 else f"{mib:.3g} MiB" if mib < 100 else f"{mib:.0f} MiB"


def ratio(value: float | None) -> str:
    return MISSING if value is None else f"{value:.2f}"


def error_text(value: float | None) -> str:
    return MISSING if value is None else f"{value:.0e}"


def spread(row: Row, key: str = "ms") -> str:
    """median and half the range between the quartiles, in per cent of it."""
    if row[key] is None:
        return MISSING
    low, high = row[f"{key}_quartiles"]
    return f"{milliseconds(row[key])} ±{(high - low) / 2 / row[key]:.0%}"


def problem_text(sizes: dict[str, Any]) -> str:
    """The sizes of a shape, with its dtype."""
    if "vocab" in sizes:
        return f"N={sizes['tokens']} H={sizes['hidden']} V={sizes['vocab']} {sizes['dtype']}"
    return f"{sizes['batch']}x{sizes['length']} {sizes['dtype']}"


def sizes_text(row: Row) -> str:
    return problem_text({**row["sizes"], "dtype": row["dtype"]})


def groups(rows: Iterable[Row]) -> dict[str, list[Row]]:
    """Rows by what was measured on what, in order."""
    out: dict[str, list[Row]] = {}
    for row in rows:
        out.setdefault(f"{row['task']}, {row['shape']}: {sizes_text(row)}", []).append(row)
    return out


def columns(rows: list[Row]) -> list[str]:
    on_gpu = any(row["device_ms"] is not None for row in rows)
    times = ["full call ms", "device ms"] if on_gpu else ["ms"]
    return ["contender", *times, "x naive", "x floor", "memory", "x naive", "error"]


def cells(row: Row, *, on_gpu: bool) -> list[str]:
    name = row["note"] if row["status"] == FLOOR else row["name"]
    times = [spread(row, key) for key in (("ms", "device_ms") if on_gpu else ("ms",))]
    if row["status"] not in ("ok", FLOOR):
        times = [row["note"] if row["status"] == "oom" else row["status"], *times[1:]]
    return [
        name if row["computes"] not in SHORT else f"{name} [{SHORT[row['computes']]}]",
        *times,
        ratio(row["ratio_to_naive"]),
        ratio(row["ratio_to_floor"]),
        bytes_text(row["peak_bytes"]),
        ratio(row["memory_to_naive"]),
        error_text(row["error"]),
    ]


def remarks(rows: list[Row]) -> list[str]:
    """Remarks below a table: why a contender has no figures, which are missing, and how our own time divides."""
    out = [f"{row['name']} is {row['status']}: {row['note']}" for row in rows if row["status"] in ("wrong", "failed")]
    others = {row["computes"] for row in present(rows)} & SHORT.keys()
    out += [f"[{SHORT[o]}] computes {o} instead of KLQ, and is held against that" for o in sorted(others)]
    absent = [f"{row['name']} ({row['note']})" for row in rows if row["status"] == "missing"]
    out += [f"Missing here: {'; '.join(absent)}"] if absent else []
    return out + [text for row in rows if (text := parts_text(row)) is not None]


def present(rows: list[Row]) -> list[Row]:
    return [row for row in rows if row["status"] != "missing"]


def markdown_table(rows: list[Row]) -> list[str]:
    """A table of one group and the remarks below it."""
    names = columns(rows)
    lines = ["| " + " | ".join(names) + " |", "|---" + "|---:" * (len(names) - 1) + "|"]
    lines += ["| " + " | ".join(cells(row, on_gpu="device ms" in names)) + " |" for row in present(rows)]
    return [*lines, "", *(f"- {remark}." for remark in remarks(rows))]


def parts_text(row: Row) -> str | None:
    """How a contender's time divides, where that was measured."""
    parts = row["parts"]
    if not parts:
        return None
    whole = row["ms"] if row["device_ms"] is None else row["device_ms"]
    return f"{row['name']}: " + ", ".join(f"{name} {ms:.3g} ms ({ms / whole:.0%})" for name, ms in parts.items())


STYLES = {"wrong": "bold red", "failed": "red", "oom": "yellow", "missing": "dim", FLOOR: "cyan", "ok": ""}


def _console() -> Any:
    from rich.console import Console

    console = Console(highlight=False)
    console.width = max(console.width, NARROWEST)
    return console


def show(content: dict[str, Any]) -> None:
    """Prints a run as tables (needs rich)."""
    from rich import box
    from rich.markup import escape
    from rich.table import Table

    console = _console()
    for title, rows in groups(content["results"]).items():
        names = columns(rows)
        table = Table(*names, title=title, title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False)
        table.columns[0].no_wrap = True
        for column in table.columns[1:]:
            column.justify, column.no_wrap = "right", True
        for row in present(rows):
            table.add_row(*map(escape, cells(row, on_gpu="device ms" in names)), style=STYLES[row["status"]])
        console.print(table)
        for remark in remarks(rows):
            console.print(escape(remark))
        console.print()


def compare(before: dict[str, Any], after: dict[str, Any]) -> list[Row]:
    """The changes between two runs, contender by contender on the shapes both have.

    A time counts as changed where the two ranges between quartiles do not overlap; memory where it moved by 1%.
    """

    def keyed(content: dict[str, Any]) -> dict[tuple[str, ...], Row]:
        return {(r["task"], r["shape"], sizes_text(r), r["name"]): r for r in content["results"]}

    old, new = keyed(before), keyed(after)
    out = []
    for key in [k for k in old if k in new]:
        a, b = old[key], new[key]
        time = "device_ms" if a["device_ms"] is not None and b["device_ms"] is not None else "ms"
        out.append(
            {
                "task": key[0],
                "shape": f"{key[1]}: {key[2]}",
                "name": key[3],
                "before_ms": a[time],
                "after_ms": b[time],
                "time": _quotient(b[time], a[time]),
                "verdict": _verdict(a, b, time),
                "before_bytes": a["peak_bytes"],
                "after_bytes": b["peak_bytes"],
                "memory": _quotient(b["peak_bytes"], a["peak_bytes"]),
                "status": a["status"] if a["status"] == b["status"] else f"{a['status']} -> {b['status']}",
            }
        )
    return out


def _quotient(b: float | None, a: float | None) -> float | None:
    return b / a if a and b is not None else None


def _verdict(a: Row, b: Row, time: str) -> str:
    if a[time] is None or b[time] is None:
        return MISSING
    (a_low, a_high), (b_low, b_high) = a[f"{time}_quartiles"], b[f"{time}_quartiles"]
    return "faster" if b_high < a_low else "slower" if b_low > a_high else "same"


def show_comparison(rows: list[Row]) -> None:
    """Prints ``compare`` (needs rich)."""
    from rich import box
    from rich.table import Table

    style = {"faster": "green", "slower": "red"}
    console = _console()
    for shape in dict.fromkeys((row["task"], row["shape"]) for row in rows):
        table = Table("contender", "before ms", "after ms", "x time", "", "before", "after", "x memory", "status")
        table.title, table.title_justify, table.box = ", ".join(shape), "left", box.SIMPLE_HEAD
        table.columns[0].no_wrap = True
        for row in [r for r in rows if (r["task"], r["shape"]) == shape]:
            table.add_row(
                row["name"], milliseconds(row["before_ms"]), milliseconds(row["after_ms"]), ratio(row["time"]),
                row["verdict"], bytes_text(row["before_bytes"]), bytes_text(row["after_bytes"]), ratio(row["memory"]),
                row["status"], style=style.get(row["verdict"], ""),
            )  # fmt: skip
        console.print(table)
