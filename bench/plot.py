"""Time and memory as pictures: curves over the axis that varies, or bars where there is one shape only.

Where a contender ran out of memory its curve ends, and a cross marks the size that was too much.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from .report import Row, groups, milliseconds, sizes_text

AXES = {"vocab": "vocabulary size", "tokens": "valid tokens", "length": "tokens per sequence", "batch": "sequences"}
OURS = "#c0392b"
OTHERS = ["#2c3e50", "#2980b9", "#27ae60", "#8e44ad", "#e67e22", "#16a085", "#7f8c8d", "#d35400", "#34495e", "#b8860b"]
MARKERS = "osD^vP<>*h"


def varying_axis(rows: list[Row]) -> str | None:
    """The size that takes most values over the rows, None where all have the same sizes."""
    counts = {axis: len({row["sizes"][axis] for row in rows if axis in row["sizes"]}) for axis in AXES}
    axis = max(counts, key=lambda a: counts[a])
    return axis if counts[axis] > 1 else None


def plot(content: dict[str, Any], path: Path) -> None:
    """Writes a PNG with one row of panels (time, memory) per task and dtype."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    rows = [row for row in content["results"] if row["status"] in ("ok", "oom", "floor")]
    panels: dict[str, list[Row]] = {}
    for row in rows:
        panels.setdefault(f"{row['task']}, {row['dtype']}", []).append(row)
    names = list(dict.fromkeys(row["name"] for row in rows))
    with_memory = any(row["peak_bytes"] for row in rows)
    figure, axes = pyplot.subplots(
        len(panels), 1 + with_memory, squeeze=False, figsize=(6.2 * (1 + with_memory), 4.0 * len(panels) + 0.6)
    )
    for (title, members), line in zip(panels.items(), axes, strict=True):
        axis = varying_axis(members)
        quantities = [("time", "ms")] + ([("memory", "MiB over the inputs")] if with_memory else [])
        for panel, (quantity, unit) in zip(line, quantities, strict=True):
            panel.set_title(f"{title}: {quantity}" + ("" if axis else f"\n{sizes_text(members[0])}"), fontsize=10)
            if axis:
                _curves(panel, members, names, quantity, axis)
                panel.set_ylabel(unit)
                panel.set_xlabel(AXES[axis])
            else:
                _bars(panel, members, names, quantity)
                panel.set_xlabel(unit)
    if any(varying_axis(members) for members in panels.values()):
        handles = {h.get_label(): h for line in axes for p in line for h in p.get_legend_handles_labels()[0]}
        figure.legend(
            handles.values(), handles.keys(), loc="outside lower center", ncols=min(len(handles), 4),
            frameon=False, fontsize=9,
        )  # fmt: skip
    figure.suptitle(f"{content['environment']['device']}, torch {content['environment']['torch']}", fontsize=9)
    figure.set_layout_engine("constrained")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=140)
    pyplot.close(figure)


def _value(row: Row, quantity: str) -> float | None:
    if quantity == "time":
        found = row["ms"] if row["device_ms"] is None else row["device_ms"]
        return None if found is None else float(found)
    return None if row["peak_bytes"] is None else max(row["peak_bytes"], 1) / 2**20


def _style(name: str, names: list[str]) -> dict[str, Any]:
    if name == "floor":
        return {"color": "black", "linestyle": ":", "marker": None, "zorder": 1}
    position = names.index(name)
    ours = name.startswith("klq_kernels")
    color = OURS if ours else OTHERS[position % len(OTHERS)]
    line = "--" if ours and name != "klq_kernels" else "-"
    return {"color": color, "linestyle": line, "marker": MARKERS[position % len(MARKERS)], "zorder": 3 if ours else 2}


def _curves(panel: Any, rows: list[Row], names: list[str], quantity: str, axis: str) -> None:
    crossed = 0
    for name in names:
        mine = sorted((r for r in rows if r["name"] == name), key=lambda r: r["sizes"][axis])
        points = [(r["sizes"][axis], v) for r in mine if (v := _value(r, quantity)) is not None]
        label = mine[0]["note"] if mine and name == "floor" else name
        style = _style(name, names)
        if points:
            panel.plot(*zip(*points, strict=True), label=label, linewidth=1.8, markersize=5, **style)
        failed = [r["sizes"][axis] for r in mine if r["status"] == "oom"]
        if failed:
            _cross(panel, failed[0], 0.94 - 0.07 * crossed, style["color"], name)
            crossed += 1
    panel.set_xscale("log", base=2)
    panel.set_yscale("log")
    panel.margins(y=0.12 + 0.07 * crossed)
    ticks = sorted({r["sizes"][axis] for r in rows})
    panel.set_xticks(ticks, [f"{t:,}" for t in ticks])
    panel.minorticks_off()
    panel.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
    panel.grid(alpha=0.3)


def _cross(panel: Any, x: int, height: float, color: str, name: str) -> None:
    """A cross at the top of the panel, over the first size that was too much."""
    where = panel.get_xaxis_transform()
    panel.plot(x, height, marker="x", markersize=8, markeredgewidth=2.5, color=color, transform=where, clip_on=False)
    panel.annotate(
        f"{name}: out of memory", (x, height), (-9, 0), xycoords=where, textcoords="offset points",
        ha="right", va="center", fontsize=8, color=color,
    )  # fmt: skip


def _bars(panel: Any, rows: list[Row], names: list[str], quantity: str) -> None:
    shape = next(iter(groups(rows).values()))
    shown = [(r, v) for r in shape if (v := _value(r, quantity)) is not None]
    labels = [r["note"] if r["name"] == "floor" else r["name"] for r, _ in shown]
    colors = [_style(r["name"], names)["color"] for r, _ in shown]
    bars = panel.barh(labels, [v for _, v in shown], color=colors, alpha=0.85)
    panel.bar_label(bars, [milliseconds(v) for _, v in shown], padding=3, fontsize=8)
    panel.invert_yaxis()
    panel.margins(x=0.15)
    panel.grid(axis="x", alpha=0.3)
