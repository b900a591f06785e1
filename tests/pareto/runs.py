"""Directories as runs leave them, written by hand, and the plan of a front over them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

BATCH, SAMPLES, TOKENS, SECONDS = 4, 2, 10.0, 0.5  # of a step: prompts, completions of each, their mean length, time


def write_run(
    directory: Path,
    evaluations: dict[int, dict[str, float | None]],
    *,
    steps: int = 4,
    start: dict[str, float | None] | None = None,
    done: bool = True,
    greedy: bool = False,
    epochs: list[float] | None = None,
    drawn: list[int] | None = None,
) -> None:
    """evaluations: step -> held-out means. epochs: data/epoch of each step; a tenth of a pass a prompt without.
    drawn: prompts of each step, which with trainer.dynamic_sampling are more than BATCH."""
    directory.mkdir(parents=True)
    rows: list[dict[str, Any]] = []
    for step in range(1, steps + 1):
        row = {
            "step": step,
            "data/epoch": epochs[step - 1] if epochs else step * BATCH / 10,
            "rollout/tokens": TOKENS,
            "time/step_s": SECONDS,
        }
        if drawn:
            row |= {"data/epoch": sum(drawn[:step]) / 10, "rollout/drawn_prompts": drawn[step - 1]}
        if step in evaluations:
            row["time/eval_s"] = 0.25
            row |= {f"heldout/{name}{'_greedy' * greedy}": value for name, value in evaluations[step].items()}
        rows.append(row)
    (directory / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    origin = {"gold": None} | ({"a": 0.0, "b": 0.0} if start is None else start)
    # two prompts whose means are the start's
    lines = [
        {"samples": [], "greedy": {"rewards": {k: v if v is None else v + side for k, v in origin.items()}, "score": 0}}
        for side in (-1.0, 1.0)
    ]
    (directory / "heldout-before.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    if done:
        (directory / "summary.json").write_text(json.dumps({"step": steps, "metrics": {}}))


def plan_of(
    runs: dict[str, tuple[str, int]], components: tuple[str, ...] = ("a", "b"), **reading: Any
) -> dict[str, Any]:
    """runs: name -> family and seed; families in the order in which they come."""
    families = dict.fromkeys(family for family, _ in runs.values())
    return {
        "components": list(components),
        "measured": ["gold"],
        "families": {label: {"composer": label, "words": [], "node": {}} for label in families},
        "runs": [
            {"name": name, "family": family, "seed": seed, "weights": {}, "thresholds": {}}
            for name, (family, seed) in runs.items()
        ],
        "settings": {"trainer": {"batch_size": BATCH}, "sampling": {"n": SAMPLES}},
        "reading": {"reference_point": {}, "spans": {}, "minimise": []} | reading,
    }


def ab(a: float | None, b: float | None) -> dict[str, float | None]:
    """A point."""
    return {"a": a, "b": b}
