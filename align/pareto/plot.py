"""front.png: the points of each family with their front, and hypervolume over tokens and seconds."""

from __future__ import annotations

import itertools
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from align.jsons import Fields

_MARKERS = "os^Dvp*X"  # of the seeds


def draw(data: Fields, path: Path) -> None:
    """What align.pareto.report.report returned as a picture. The same data give the same file.

    Raises ImportError without matplotlib.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    pairs = list(itertools.combinations(data["components"], 2))
    figure = Figure(figsize=(5 * (len(pairs) + 2), 4.2), layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(1, len(pairs) + 2, squeeze=False)[0]
    colours = {label: f"C{k % 10}" for k, label in enumerate(data["families"])}
    for axes, (x, y) in zip(panels, pairs, strict=False):
        _points(axes, data, colours, x, y, len(pairs) == 1)
    for axes, key, label in ((panels[-2], "tokens", "tokens drawn by all runs"), (panels[-1], "seconds", "seconds")):
        _volumes(axes, data, colours, key)
        axes.set_xlabel(label)
    scratch = path.with_name(f".{path.name}.tmp")
    try:
        figure.savefig(scratch, format="png", dpi=120, metadata={"Software": None})
        os.replace(scratch, path)
    finally:
        scratch.unlink(missing_ok=True)


def _points(axes: Any, data: Fields, colours: Mapping[str, str], x: str, y: str, line: bool) -> None:
    """Final points, hollow where another of the family and seed dominates; line: the edge of what a front dominates."""
    seeds = sorted({entry["seed"] for entry in data["runs"]})
    for (label, colour), (k, seed) in itertools.product(colours.items(), enumerate(seeds)):
        done = [e for e in data["runs"] if (e["family"], e["seed"], e["state"]) == (label, seed, "done")]
        style = {"marker": _MARKERS[k % len(_MARKERS)], "edgecolors": colour}
        for entry in done:
            face = colour if entry["on_front"] else "none"
            axes.scatter(entry["final"][x], entry["final"][y], facecolors=face, **style)
        if line:
            front = sorted((e["final"][x], e["final"][y]) for e in done if e["on_front"])
            where = "post" if x in data["minimise"] else "pre"  # the edge is of the next point towards better x
            axes.step([p[0] for p in front], [p[1] for p in front], where=where, color=colour, linewidth=0.9)
    for label, colour in colours.items():
        axes.scatter([], [], color=colour, label=label)
    starts = {entry["seed"]: entry["start"] for entry in data["runs"] if x in entry["start"] and y in entry["start"]}
    axes.scatter(
        [p[x] for p in starts.values()], [p[y] for p in starts.values()], marker="x", color="black", label="start"
    )
    if data["reference_point_given"]:
        point = next(iter(data["reference_point"].values()))
        axes.scatter(point[x], point[y], marker="+", color="black", label="reference point")
    axes.scatter([], [], facecolors="none", edgecolors="grey", label="dominated")
    for setter, component in ((axes.set_xlabel, x), (axes.set_ylabel, y)):
        setter(f"held-out {component}" + (" (less is better)" if component in data["minimise"] else ""))
    # below: inside it would hide points
    axes.legend(fontsize="small", loc="upper center", bbox_to_anchor=(0.5, -0.14), ncols=3)


def _volumes(axes: Any, data: Fields, colours: Mapping[str, str], key: str) -> None:
    """A line for each family and seed whose runs have all ended."""
    for label, colour in colours.items():
        whole = [found for found in data["families"][label]["by_seed"].values() if found["done"] == found["runs"]]
        for found in whole:
            curve: Sequence[Mapping[str, float]] = found["curve"]
            axes.plot([p[key] for p in curve], [p["hypervolume"] for p in curve], ".-", color=colour, linewidth=1)
        axes.plot([], [], color=colour, label=label)
    axes.set_ylabel("hypervolume")
    axes.legend(fontsize="small")
