"""What mixing sources by shares refuses."""

from __future__ import annotations

from itertools import pairwise

from align.config.schema import Config
from align.objectives.base import Objective


def check(config: Config, objective: Objective) -> None:
    """Raises ValueError for settings that do not go with data.mixture, and for those that only it reads."""
    data, kind = config.data, config.data.mixture
    for name, needed, given in (
        ("shares", "schedule", data.mixture_shares),
        ("target", "gradient", data.mixture_target),
    ):
        if given is not None and kind != needed:
            raise ValueError(f"data.mixture_{name} has no effect without data.mixture={needed}; leave it out")
        if given is None and kind == needed:
            raise ValueError(f"data.mixture={needed} needs data.mixture_{name}; see docs/data.md, Mixing")
    given = config.trainer.kind in ("offline", "warm") and config.collect is None
    if "weight" in (data.columns or {}) and not given:
        raise ValueError(
            "data.columns.weight draws rows that are given; prompts and collect=... have none, leave it out"
        )
    if kind is None:
        return
    sources = data.train if isinstance(data.train, list) else [data.train]
    if not given:
        raise ValueError(f"data.mixture={kind} mixes rows that are given; with prompts or collect=... use data.repeat")
    if len(sources) < 2:
        raise ValueError(f"data.mixture={kind} needs two sources or more: give data.train=[first,second]")
    if data.repeat is not None:
        raise ValueError(f"data.repeat has no effect with data.mixture={kind}; leave it out")
    if kind == "schedule":
        _check_points(data.mixture_shares, len(sources))
    if kind == "gradient":
        _check_gradient(config, objective)


def _check_points(points: object, num_sources: int) -> None:
    said = f"data.mixture_shares={points}".replace(" ", "")
    form = f"must be points [progress,[{'share,' * num_sources}".rstrip(",") + "]], as [[0,[1,1]],[0.9,[1,3]]]"
    if not isinstance(points, list) or not points:
        raise ValueError(f"{said}: {form}")
    for point in points:
        if not (isinstance(point, list) and len(point) == 2 and _number(point[0]) and isinstance(point[1], list)):
            raise ValueError(f"{said}: {form}")
        shares = point[1]
        if len(shares) != num_sources:
            raise ValueError(f"{said}: must have a share for each of the {num_sources} sources of data.train")
        if not all(_number(share) and 0 <= share < 1e9 for share in shares) or not sum(shares) > 0:
            raise ValueError(f"{said}: shares must be numbers of at least 0, one of them above 0")
    places = [point[0] for point in points]
    if not all(0 <= place <= 1 for place in places) or any(b <= a for a, b in pairwise(places)):
        raise ValueError(f"{said}: progress must be in [0, 1] and rise from point to point")


def _number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _check_gradient(config: Config, objective: Objective) -> None:
    other = objective.needs & {"scores", "values", "entropy"}
    if other:
        raise ValueError(
            f"data.mixture=gradient: objective={config.choices['objective']} learns from {', '.join(sorted(other))}, "
            "not from log-probs alone; use data.mixture=schedule"
        )
    if config.lora.dropout:
        raise ValueError("data.mixture=gradient compares gradients without dropout; set lora.dropout=0")
