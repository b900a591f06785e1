"""Pictures of a run with a composer, from its metrics.jsonl: multipliers and weights over steps, the Pareto front, gold
against proxies."""

from __future__ import annotations

import itertools
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from align.composers.hypervolume import front

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Rows = Sequence[Mapping[str, float]]

FOLDER = "plots"


def draw(run: Path, names: Sequence[str], gold: str | None) -> list[Path]:
    """Write the pictures that the rows of run/metrics.jsonl allow to run/plots; returns their paths.

    names: components that the composer composes. gold: a component without weight, to compare with. The same rows give
    the same files.
    """
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    figures = {"multipliers.png": _over_steps(rows), "front.png": _front(rows, names)}
    if gold is not None:
        figures["gold.png"] = _gold(rows, names, gold)
    folder, out = run / FOLDER, []
    for name, figure in figures.items():
        if figure is None:
            continue
        folder.mkdir(exist_ok=True)
        scratch = folder / f".{name}.tmp"
        try:
            figure.savefig(scratch, format="png", dpi=120, metadata={"Software": None})
            os.replace(scratch, folder / name)
        finally:
            scratch.unlink(missing_ok=True)
        out.append(folder / name)
    return out


def non_dominated(points: Sequence[tuple[float, ...]]) -> list[bool]:
    """Whether each point is on the front, of equal ones the first."""
    best = front(points)
    seen: set[tuple[float, ...]] = set()
    out = []
    for point in points:
        out.append(point in best and point not in seen)
        seen.add(point)
    return out


def _figure(rows: int, columns: int) -> tuple[Figure, Any]:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5 * columns, 3.2 * rows), layout="constrained")
    FigureCanvasAgg(figure)
    return figure, figure.subplots(rows, columns, squeeze=False)


def _curve(rows: Rows, key: str) -> tuple[list[float], list[float]]:
    known = [(row["step"], row[key]) for row in rows if row.get(key) is not None]
    return [step for step, _ in known], [value for _, value in known]


def _over_steps(rows: Rows) -> Figure | None:
    """One panel for each group of metrics that is there."""
    groups = {
        "weight": "weights",
        "multiplier": "multipliers",
        "violation": "violations (> 0: broken)",
        "influence": "influences",
    }
    keys = {group: sorted({k for row in rows for k in row if k.startswith(f"{group}/")}) for group in groups}
    there = [group for group in groups if keys[group]]
    if not there:
        return None
    figure, panels = _figure(len(there), 1)
    for axes, group in zip(panels[:, 0], there, strict=True):
        for key in keys[group]:
            axes.plot(*_curve(rows, key), label=key.partition("/")[2])
        if group == "violation":
            axes.axhline(0, color="grey", linewidth=0.8)
        axes.set_ylabel(groups[group])
        axes.legend(fontsize="small")
    panels[-1, 0].set_xlabel("optimiser step")
    return figure


def _front(rows: Rows, names: Sequence[str]) -> Figure | None:
    """A panel for each pair of components: held-out means of every evaluation, those on the front of all filled."""
    found = [(row["step"], [_heldout(row, name) for name in names]) for row in rows]
    known = [(step, tuple(v for v in p if v is not None)) for step, p in found if None not in p]
    if len(known) < 2 or len(names) < 2:
        return None
    on = non_dominated([p for _, p in known])
    pairs = list(itertools.combinations(range(len(names)), 2))
    figure, panels = _figure(1, len(pairs))
    for axes, (i, j) in zip(panels[0], pairs, strict=True):
        axes.plot([p[i] for _, p in known], [p[j] for _, p in known], color="lightgrey", linewidth=0.8, zorder=0)
        for kept, style in ((True, {"color": "C0"}), (False, {"facecolors": "none", "edgecolors": "C0"})):
            some = [p for (_, p), o in zip(known, on, strict=True) if o == kept]
            axes.scatter([p[i] for p in some], [p[j] for p in some], label=("front" if kept else "dominated"), **style)
        for step, p in (known[0], known[-1]):
            axes.annotate(str(step), (p[i], p[j]), fontsize="small")
        axes.set_xlabel(f"held-out {names[i]}")
        axes.set_ylabel(f"held-out {names[j]}")
    panels[0, 0].legend(fontsize="small")
    return figure


def _gold(rows: Rows, names: Sequence[str], gold: str) -> Figure | None:
    """Gold over each proxy along the run, with the proxy's threshold as a line."""
    known = [
        (row, _heldout(row, gold))
        for row in rows
        if _heldout(row, gold) is not None and all(_heldout(row, n) is not None for n in names)
    ]
    if len(known) < 2:
        return None
    figure, panels = _figure(1, len(names))
    for axes, name in zip(panels[0], names, strict=True):
        axes.plot([_heldout(row, name) for row, _ in known], [value for _, value in known], "o-", markersize=3)
        last = known[-1][0].get(f"threshold/{name}")
        if last is not None:
            axes.axvline(last, color="grey", linestyle="--", label="threshold")
            axes.legend(fontsize="small")
        axes.set_xlabel(f"held-out {name}")
        axes.set_ylabel(f"held-out {gold}")
    return figure


def _heldout(row: Mapping[str, float], name: str) -> float | None:
    return row.get(f"heldout/{name}", row.get(f"heldout/{name}_greedy"))
