"""The number that says how good a checkpoint is, where a run wrote one beside it."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

from align.averaging.files import read_json

_STEP = re.compile(r"(?:step|checkpoint)[-_](\d+)$")


def values_beside(models: Sequence[Path], kind: str) -> tuple[float, ...]:
    """Of each model: its held-out loss, or the step it was saved at.

    loss: `loss/heldout` in summary.json of the run whose final/ it is. steps: the number in a directory's name such as
    checkpoint-500, else `step` of summary.json. Raises ValueError where there is none.
    """
    return tuple(_value(path, kind) for path in models)


def _value(path: Path, kind: str) -> float:
    named = _STEP.search(path.resolve().name)
    if kind == "steps" and named:
        found: object = int(named.group(1))
    else:
        file = next((p for p in (path / "summary.json", path.resolve().parent / "summary.json") if p.exists()), None)
        if file is None:
            raise ValueError(f"{path} has no summary.json beside it; give values=[...], one a model")
        summary = read_json(file)
        metrics = summary.get("metrics")
        found = (
            summary.get("step")
            if kind == "steps"
            else metrics.get("loss/heldout")
            if isinstance(metrics, dict)
            else None
        )
        if not isinstance(found, (int, float)):
            name = "step" if kind == "steps" else "loss/heldout"
            raise ValueError(f"{file} says no {name}; give values=[...], one a model")
    if not found > 0:  # type: ignore[operator]
        raise ValueError(f"{path}: {kind} {found} is not above 0; leave it out or give values=[...]")
    return float(found)  # type: ignore[arg-type]
