"""A directory of runs to its fronts: points, exact hypervolumes over compute, steps to the front, intervals over seeds.

Reads what runs have written (metrics.jsonl, heldout-before.jsonl, summary.json) and trains nothing.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import mean, median

from align.composers.hypervolume import dominates, hypervolume
from align.evaluate.heldout import reward_of
from align.evaluate.overoptimisation import student
from align.jsons import Fields, Json

Point = tuple[float, ...]
MILLION, HOUR = 1e6, 3600.0


@dataclass(frozen=True)
class Evaluation:
    """Held-out means of a run after a step, and what the run had cost until then."""

    step: int
    values: dict[str, float]
    completions: int
    tokens: float  # of completions drawn
    seconds: float  # of the steps, evaluations apart


@dataclass(frozen=True)
class Run:
    """What a run has left. start: the untrained policy; evaluations with a number for each composed component."""

    start: dict[str, float]
    evaluations: list[Evaluation]
    costs: list[Evaluation]  # of every step, without values
    evaluation_seconds: float
    state: str  # missing, unfinished, unmeasured (it has ended, without a number for each component) or done
    greedy: bool  # whether greedy completions were drawn too, whose tokens no metric tells


def read_run(directory: Path, components: Sequence[str], measured: Sequence[str], batch: int, n: int) -> Run:
    """A run's own files; empty for one that has not begun. batch: prompts of a whole step, n: completions of each."""
    rows = _rows(directory / "metrics.jsonl")
    summary = directory / "summary.json"
    final = json.loads(summary.read_text()) if summary.exists() else None
    costs, evaluations = [], []
    completions, tokens, seconds, passed = 0, 0.0, 0.0, 0.0
    for row in rows:
        # the last step of an epoch may have fewer prompts: data/epoch tells prompts in passes
        share = (row["data/epoch"] - passed) / rows[0]["data/epoch"]
        # with trainer.dynamic_sampling a step draws more than it learns from
        drawn = int(row.get("rollout/drawn_prompts") or round(batch * share)) * n
        passed = row["data/epoch"]
        completions += drawn
        tokens += drawn * row["rollout/tokens"]
        seconds += row["time/step_s"]
        costs.append(Evaluation(row["step"], {}, completions, tokens, seconds))
        evaluations.append(Evaluation(row["step"], _means(row, (*components, *measured)), completions, tokens, seconds))
    if final is not None and evaluations and not evaluations[-1].values:  # trainer.max_steps was lowered to here
        values = _means(final["metrics"], (*components, *measured))
        evaluations[-1] = Evaluation(**{**asdict(evaluations[-1]), "values": values})
    whole = [e for e in evaluations if all(name in e.values for name in components)]
    start = _start(directory / "heldout-before.jsonl", (*components, *measured))
    state = "unfinished" if rows else "missing"
    if final is not None and rows and rows[-1]["step"] == final["step"]:
        known = whole and whole[-1].step == final["step"] and all(name in start for name in components)
        state = "done" if known else "unmeasured"
    return Run(
        start=start,
        evaluations=whole,
        costs=costs,
        evaluation_seconds=sum(row.get("time/eval_s") or 0.0 for row in rows),
        state=state,
        greedy=any(key.startswith("reward/") and key.endswith("_greedy") for row in rows[:1] for key in row),
    )


def _rows(path: Path) -> list[Json]:
    """What a run has logged, without a line that is cut short by a kill or still being written."""
    found = []
    for line in path.read_text(errors="replace").splitlines() if path.exists() else []:
        try:
            found.append(json.loads(line))
        except ValueError:
            continue
    return found


def _means(row: Mapping[str, float | None], names: Sequence[str]) -> dict[str, float]:
    """Held-out means of what is known: over the completions drawn, or else over the greedy ones."""
    found = {name: row.get(f"heldout/{name}", row.get(f"heldout/{name}_greedy")) for name in names}
    return {name: float(value) for name, value in found.items() if value is not None}


def _start(path: Path, names: Sequence[str]) -> dict[str, float]:
    """The same means of the untrained policy."""
    if not path.exists():
        return {}
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    out = {}
    for name in names:
        drawn = [reward_of(sample, name) for line in lines for sample in line["samples"]]
        greedy = [reward_of(line["greedy"], name) for line in lines]
        known = [v for v in drawn if v is not None] or [v for v in greedy if v is not None]
        out |= {name: math.fsum(known) / len(known)} if known else {}
    return out


# ---------------------------------------------------------------------- points


def dominated(point: Point, others: Sequence[Point]) -> bool:
    """Whether another point is at least as great in every objective and greater in one; an equal one does nothing."""
    return any(other != point and all(a >= b for a, b in zip(other, point, strict=True)) for other in others)


def steps_to_front(points: Sequence[tuple[int, Point]], front: Sequence[Point]) -> int | None:
    """The step from whose evaluation on the run's point (step, point) is never dominated by a front; None: it ends
    dominated."""
    found = None
    for step, point in reversed(points):
        if dominated(point, front):
            break
        found = step
    return found


def volumes(runs: Sequence[Run], scale: Callable[[Mapping[str, float]], Point]) -> list[dict[str, float]]:
    """Hypervolume of a family's points along its runs, as if they took their steps at the same time.

    At each step at which one was evaluated: the volume of each run's last point so far, and what all of them have cost
    until then. Before its first evaluation a run is at its start.
    """
    out = [{"step": 0.0, "tokens": 0.0, "seconds": 0.0, "hypervolume": _volume([scale(run.start) for run in runs])}]
    for step in sorted({e.step for run in runs for e in run.evaluations}):
        points, spent = [], []
        for run in runs:
            past = [e for e in run.evaluations if e.step <= step]
            points.append(scale(past[-1].values if past else run.start))
            spent.append([e for e in run.costs if e.step <= step][-1])
        out.append(
            {
                "step": float(step),
                "tokens": math.fsum(e.tokens for e in spent),
                "seconds": math.fsum(e.seconds for e in spent),
                "hypervolume": _volume(points),
            }
        )
    return out


def _volume(points: Sequence[Point]) -> float:
    """Beyond the origin, to which points are relative."""
    return hypervolume(points, [0.0] * len(points[0])) if points else 0.0


# ---------------------------------------------------------------------- the report


def report(out: Path, plan: Fields) -> Json:
    """All that front.json holds, of the plan (align.pareto.plan.Plan as a dictionary)."""
    components, measured = plan["components"], plan["measured"]
    batch, n = plan["settings"]["trainer"]["batch_size"], plan["settings"]["sampling"]["n"]
    runs = {entry["name"]: read_run(out / entry["name"], components, measured, batch, n) for entry in plan["runs"]}
    seeds = sorted({entry["seed"] for entry in plan["runs"]})
    references = {seed: _reference(seed, plan, runs) for seed in seeds}
    scales = {seed: _scale(plan, reference) for seed, reference in references.items() if reference is not None}
    families = {label: _family(label, plan, runs, scales) for label in plan["families"]}
    first = next(iter(families))
    _compare(families, first)
    entries = [_entry(entry, runs, plan, scales, first) for entry in plan["runs"]]
    for label, family in families.items():
        steps = [e["steps_to_front"] for e in entries if e["family"] == label and e["compared"]]
        reached = [step for step in steps if step is not None]
        family["steps_to_front"] = {
            "runs": len(steps), "reached": len(reached), "median": median(reached) if reached else None
        }  # fmt: skip
    data = {
        "components": components,
        "measured": measured,
        "minimise": plan["reading"]["minimise"],
        "spans": {name: plan["reading"]["spans"].get(name, 1.0) for name in components},
        "reference_point": {str(seed): reference for seed, reference in references.items()},
        "reference_point_given": bool(plan["reading"]["reference_point"]),
        "first": first,
        "families": families,
        "runs": entries,
    }
    return data | {"notes": _notes(data, any(run.greedy for run in runs.values()))}


def _reference(seed: int, plan: Fields, runs: Mapping[str, Run]) -> dict[str, float] | None:
    """The point beyond which volumes count: given, or the untrained policy's, the mean over the runs of the seed;
    None before one of them has begun."""
    if plan["reading"]["reference_point"]:
        return {name: plan["reading"]["reference_point"][name] for name in plan["components"]}
    starts = [runs[entry["name"]].start for entry in plan["runs"] if entry["seed"] == seed]
    known = [start for start in starts if all(name in start for name in plan["components"])]
    if not known:
        return None
    return {name: mean(start[name] for start in known) for name in plan["components"]}  # exact where all are equal


def _scale(plan: Fields, reference: Mapping[str, float]) -> Callable[[Mapping[str, float]], Point]:
    """A function of means by component: the point in spans from the reference, more is better."""
    reading = plan["reading"]
    factors = {
        name: (-1.0 if name in reading["minimise"] else 1.0) / reading["spans"].get(name, 1.0)
        for name in plan["components"]
    }
    return lambda values: tuple(factors[name] * (values[name] - reference[name]) for name in factors)


def _family(
    label: str,
    plan: Fields,
    runs: Mapping[str, Run],
    scales: Mapping[int, Callable[[Mapping[str, float]], Point]],
) -> Json:
    """Of each seed the front, its volume and what it cost; over the seeds of which all runs are there, means.

    gain: the volume less that of the start, which is 0 unless a lower reference point was given.
    """
    by_seed = {}
    for seed, scale in scales.items():
        names = [e["name"] for e in plan["runs"] if e["family"] == label and e["seed"] == seed]
        done = [name for name in names if runs[name].state == "done"]
        if not names:
            continue
        points = {name: scale(runs[name].evaluations[-1].values) for name in done}
        curve = volumes([runs[name] for name in done], scale) if done else []
        last = curve[-1] if curve else {"tokens": 0.0, "seconds": 0.0}
        volume = _volume(list(points.values()))
        gain = volume - (curve[0]["hypervolume"] if curve else 0.0)
        by_seed[str(seed)] = {
            "runs": len(names),
            "done": len(done),
            "beyond_reference": sum(dominates(p, [0.0] * len(p)) for p in points.values()),
            "front": [name for name in done if not dominated(points[name], list(points.values()))],
            "hypervolume": volume,
            "gain": gain,
            "tokens": last["tokens"],
            "seconds": last["seconds"],
            "evaluation_seconds": math.fsum(runs[name].evaluation_seconds for name in done),
            "gain_per_million_tokens": gain / last["tokens"] * MILLION if last["tokens"] else 0.0,
            "gain_per_hour": gain / last["seconds"] * HOUR if last["seconds"] else 0.0,
            "curve": curve,
        }
    whole = [found for found in by_seed.values() if found["done"] == found["runs"]]
    keys = ("hypervolume", "gain", "tokens", "seconds", "gain_per_million_tokens", "gain_per_hour")
    return {
        "composer": plan["families"][label]["composer"],
        "words": plan["families"][label]["words"],
        "seeds": len(whole),
        **{key: _interval([found[key] for found in whole]) for key in keys},
        "by_seed": by_seed,
    }


def _interval(values: Sequence[float]) -> dict[str, float | None] | None:
    """Mean with its 95 % interval by Student's t; low and high are None for one value, all is for none."""
    if len(values) > 1:
        return asdict(student(values))
    return {"mean": values[0], "low": None, "high": None} if values else None


def _compare(families: Mapping[str, Json], first: str) -> None:
    """Adds to each family the differences to the first one, paired by seed."""
    base = families[first]["by_seed"]
    for label, family in families.items():
        pairs = [
            (found, base[seed])
            for seed, found in family["by_seed"].items()
            if seed in base and all(part["done"] == part["runs"] for part in (found, base[seed]))
        ]
        for key in ("hypervolume", "gain_per_million_tokens"):
            differences = [found[key] - there[key] for found, there in pairs]
            family[f"{key}_less_first"] = None if label == first else _interval(differences)


def _entry(
    entry: Fields,
    runs: Mapping[str, Run],
    plan: Fields,
    scales: Mapping[int, Callable[[Mapping[str, float]], Point]],
    first: str,
) -> Json:
    """A run of the report. Its points are compared with those of the first family's other runs of its seed."""
    run, last = runs[entry["name"]], None
    others: list[Point] = []
    front_step, on_front = None, False
    if run.state == "done":
        last = run.evaluations[-1]
        scale = scales[entry["seed"]]
        finals = {
            other["name"]: (other["family"], scale(runs[other["name"]].evaluations[-1].values))
            for other in plan["runs"]
            if other["seed"] == entry["seed"] and runs[other["name"]].state == "done"
        }
        others = [point for name, (family, point) in finals.items() if family == first and name != entry["name"]]
        if others:
            front_step = steps_to_front([(e.step, scale(e.values)) for e in run.evaluations], others)
        own = [point for family, point in finals.values() if family == entry["family"]]
        on_front = not dominated(scale(last.values), own)
    spent = run.costs[-1] if run.costs else Evaluation(0, {}, 0, 0.0, 0.0)
    return {
        **entry,
        "state": run.state,
        "steps": spent.step,
        "completions": spent.completions,
        "tokens": spent.tokens,
        "seconds": spent.seconds,
        "evaluation_seconds": run.evaluation_seconds,
        "start": run.start,
        "final": last.values if last else None,
        "on_front": on_front,
        "compared": bool(others),
        "steps_to_front": front_step,
        "evaluations": [asdict(e) for e in run.evaluations],
    }


def _notes(data: Fields, greedy: bool) -> list[str]:
    """What has to be known to read the numbers."""
    families, runs = data["families"], data["runs"]
    out = ["compute is that of all runs of a family: a front of k points costs k runs; evaluations are not in it"]
    units = ", ".join(f"{name} {span:g}" for name, span in data["spans"].items())
    out.append(f"hypervolume is in products of spans ({units}); with other spans it is another number")
    what = "given" if data["reference_point_given"] else "the untrained policy"
    for seed, point in data["reference_point"].items():
        shown = "not known" if point is None else ", ".join(f"{name} {v:.4g}" for name, v in point.items())
        out.append(f"reference point, {what}, seed {seed}: {shown}")
    sizes = {label: sorted({found["runs"] for found in f["by_seed"].values()}) for label, f in families.items()}
    if len({tuple(size) for size in sizes.values()}) > 1:
        shown = ", ".join(f"{label} {'/'.join(map(str, size))}" for label, size in sizes.items())
        out.append(f"families differ in runs a seed ({shown}): more points cover more, compare hypervolume per compute")
    if len({entry["steps"] for entry in runs if entry["state"] == "done"}) > 1:
        out.append("runs differ in steps")
    if max(f["seeds"] for f in families.values()) < 2:
        out.append("fewer than two whole seeds: no intervals; differences between families may be chance")
    if greedy:
        out.append("greedy completions, drawn as baselines, are not among completions and tokens")
    lost = [f"{entry['name']} ({entry['state']})" for entry in runs if entry["state"] != "done"]
    if lost:
        out.append(f"in no front: {', '.join(lost)}; means are over seeds of which all runs of the family are there")
    return out


# ---------------------------------------------------------------------- for people


def markdown(data: Fields) -> list[str]:
    """The tables of families and of runs, and the notes."""
    interval = ", 95 % interval over seeds" if max(f["seeds"] for f in data["families"].values()) > 1 else ""
    head = [
        "family", "runs a seed", "seeds", f"hypervolume{interval}", f"less {data['first']}", "million tokens a seed",
        "gain per million tokens", "hours a seed", "gain per hour", "beyond reference", "steps to front",
    ]  # fmt: skip
    rows = [_family_row(label, family) for label, family in data["families"].items()]
    names, measured = data["components"], data["measured"]
    run_head = ["run", "state", *names, *(f"({name})" for name in measured)]
    run_head += ["steps", "completions", "tokens", "seconds", "front", "steps to front"]
    run_rows = [_run_row(entry, (*names, *measured)) for entry in data["runs"]]
    return [
        *_table(head, rows),
        "",
        *_table(run_head, run_rows),
        "",
        *(f"- {note}" for note in data["notes"]),
    ]


def _family_row(label: str, family: Fields) -> list[str]:
    found, reached = family["by_seed"].values(), family["steps_to_front"]
    done, beyond = (sum(part[key] for part in found) for key in ("done", "beyond_reference"))
    middle = "" if reached["median"] is None else f", median {reached['median']:g}"
    return [
        label,
        "/".join(map(str, sorted({part["runs"] for part in found}))),
        str(family["seeds"]),
        _shown(family["hypervolume"]),
        _shown(family["hypervolume_less_first"], "+"),
        _mean(family["tokens"], MILLION),
        _shown(family["gain_per_million_tokens"]),
        _mean(family["seconds"], HOUR),
        _shown(family["gain_per_hour"]),
        f"{beyond} of {done}",
        f"{reached['reached']} of {reached['runs']}{middle}",
    ]


def _run_row(entry: Fields, names: Sequence[str]) -> list[str]:
    final = entry["final"] or {}
    reached = entry["steps_to_front"]
    done = entry["state"] == "done"
    return [
        entry["name"],
        entry["state"],
        *(f"{final[name]:.4g}" if name in final else "" for name in names),
        str(entry["steps"]),
        str(entry["completions"]),
        f"{entry['tokens']:.0f}",
        f"{entry['seconds']:.1f}",
        "" if not done else "yes" if entry["on_front"] else "no",
        "" if not entry["compared"] else "none" if reached is None else str(reached),
    ]


def _shown(value: Mapping[str, float | None] | None, sign: str = "") -> str:
    if value is None:
        return ""
    form = f"{sign}.4g"
    interval = "" if value["low"] is None else f" [{value['low']:{form}}, {value['high']:{form}}]"
    return f"{value['mean']:{form}}{interval}"


def _mean(value: Mapping[str, float | None] | None, unit: float) -> str:
    return "" if value is None or value["mean"] is None else f"{value['mean'] / unit:.4g}"


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    widths = [max(len(row[i]) for row in (head, *rows)) for i in range(len(head))]
    lines = ["| " + " | ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) + " |"
             for row in (head, *rows)]  # fmt: skip
    return [lines[0], "|" + "|".join("-" * (width + 2) for width in widths) + "|", *lines[1:]]
