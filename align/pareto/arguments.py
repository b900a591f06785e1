"""The words of `align front` that are no settings: families, weights, thresholds, seeds, and how numbers are read."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from align.config import ConfigError
from align.jsons import Fields, Json
from align.simplex import SUM_TOLERANCE

_OWN = ("out", "composers", "points", "weights", "seeds", "report_only", "minimise")
_BY_NAME = ("thresholds", "reference_point", "spans", "composers")
# what this command decides, and the word for it
_DECIDED = {"composer": "composers=A,B", "run.dir": "out=DIR"}
_DRY = "--dry-run"


@dataclass(frozen=True)
class FrontArguments:
    """What the command line says besides settings."""

    out: Path
    composers: Mapping[str, str]  # name of a family -> option of composer
    points: int | None
    weights: tuple[tuple[float, ...], ...]
    thresholds: Mapping[str, tuple[float, ...]]
    seeds: int
    report_only: bool
    reading: Fields  # reference_point, spans, minimise: those that were given
    own: Mapping[str, tuple[str, ...]]  # words of one family alone
    settings: tuple[str, ...]  # of every run
    dry: bool


def parse(words: Sequence[str]) -> FrontArguments:
    """Raises ConfigError for a word of ours that cannot be read."""
    own: dict[str, str] = {}
    named: dict[str, dict[str, str]] = {key: {} for key in _BY_NAME}
    settings = []
    for word in words:
        key, _, value = word.partition("=")
        head, dot, name = key.partition(".")
        if key in _OWN:
            own[key] = value
        elif head in _BY_NAME and dot:
            named[head][name] = value
        elif key in _DECIDED:
            raise ConfigError(f"{key} is what this command gives to each run; use {_DECIDED[key]}")
        elif word != _DRY:
            settings.append(word)
    if not own.get("out"):
        raise ConfigError("give out=DIR: where the runs and the report are written")
    if own.get("report_only", "false") not in ("true", "false"):
        raise ConfigError(f"report_only={own['report_only']}: must be true or false")
    reading: Json = {
        key: {name: _number(f"{key}.{name}", value) for name, value in named[key].items()}
        for key in ("reference_point", "spans")
        if named[key]
    }
    if "minimise" in own:
        reading["minimise"] = _listed(own["minimise"])
    arguments = FrontArguments(
        out=Path(own["out"]),
        composers=_families(own.get("composers", "")),
        points=_count("points", own["points"]) if "points" in own else None,
        weights=tuple(_vector(text) for text in _listed(own.get("weights", ""))),
        thresholds={
            name: tuple(_number(f"thresholds.{name}", text) for text in _listed(value))
            for name, value in named["thresholds"].items()
        },
        seeds=_count("seeds", own.get("seeds", "1")),
        report_only=own.get("report_only") == "true",
        reading=reading,
        own=_own_words(named["composers"]),
        settings=tuple(settings),
        dry=_DRY in words,
    )
    _check_arguments(arguments, own)
    return arguments


def _check_arguments(arguments: FrontArguments, own: Mapping[str, str]) -> None:
    if arguments.report_only:
        unused = [f"{key}=" for key in own if key not in ("out", "report_only", "minimise")]
        unused += [f"thresholds.{name}=" for name in arguments.thresholds] + [
            f"composers.{name}." for name in arguments.own
        ]
        unused += [*arguments.settings, *([_DRY] if arguments.dry else [])]
        if unused:
            raise ConfigError(f"{unused[0]} has no effect with report_only=true, which reads what is there; remove it")
        return
    if not arguments.composers:
        raise ConfigError("give composers=A,B: options of composer to compare, for example composers=fixed,gradient")
    if arguments.points is not None and arguments.weights:
        raise ConfigError("points= spreads vectors evenly and weights= names them; give one of them")
    if arguments.points == 1:
        raise ConfigError("points=1 is no front; use points=2 or more")
    for name, values in arguments.thresholds.items():
        if not values:
            raise ConfigError(f"thresholds.{name}=: give one number or more, as in thresholds.{name}=0.2,0.4")
    for label in arguments.own:
        if label not in arguments.composers:
            raise ConfigError(
                f"composers.{label}: composers= names no {label}; there are {', '.join(arguments.composers)}"
            )


def _families(value: str) -> dict[str, str]:
    out: dict[str, str] = {}
    for word in _listed(value):
        label, _, option = word.rpartition(":")
        label = label or option
        if not re.fullmatch(r"[A-Za-z0-9+-][A-Za-z0-9_+-]*", label):
            raise ConfigError(f"composers={word}: a name is letters, digits, _, + and -, as in raw:fixed")
        if label in out:
            raise ConfigError(f"composers: {label} is there twice; give one another name, as in other:{option}")
        out[label] = option
    return out


def _own_words(named: Mapping[str, str]) -> dict[str, tuple[str, ...]]:
    """composers.LABEL.KEY=VALUE by family, as words of the setting composer."""
    out: dict[str, tuple[str, ...]] = {}
    for name, value in named.items():
        label, dot, key = name.partition(".")
        if not dot:
            raise ConfigError(f"composers.{name}={value}: say composers.{name}.KEY=VALUE, a setting of that family")
        out[label] = (*out.get(label, ()), f"composer.{key}={value}")
    return out


def _listed(value: str) -> list[str]:
    """A,B or [A,B]"""
    return [part.strip() for part in value.removeprefix("[").removesuffix("]").split(",") if part.strip()]


def _number(key: str, text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        raise ConfigError(f"{key}={text}: must be a finite number")
    return value


def _count(key: str, text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise ConfigError(f"{key}={text}: must be a whole number of at least 1")
    return int(text)


def _vector(text: str) -> tuple[float, ...]:
    values = tuple(_number("weights", part) for part in text.split("/"))
    total = math.fsum(map(abs, values))
    if abs(total - 1) > SUM_TOLERANCE:
        raise ConfigError(f"weights={text}: sum to {total:g}; they must sum to 1")
    return values
