"""What runs a front has: weight vectors, thresholds and seeds of each family, kept in plan.json."""

from __future__ import annotations

import difflib
import itertools
import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

from omegaconf import DictConfig, OmegaConf

from align.config import Config, ConfigError, OnlineConfig, compose, differences, options, quoted
from align.files import write_atomic
from align.jsons import Json
from align.launch.sweep import Element
from align.pareto.arguments import FrontArguments

PLAN = "plan.json"


@dataclass(frozen=True)
class Family:
    """Runs of one composer."""

    composer: str
    words: list[str]  # of the composer, those that all families had when it was asked for among them
    node: Json  # settings of the composer, without weights and thresholds


@dataclass(frozen=True)
class PlannedRun:
    """One run: what it has besides the settings of all."""

    name: str
    family: str
    seed: int
    weights: dict[str, float]  # {}: not this command's
    thresholds: dict[str, float]


@dataclass(frozen=True)
class Plan:
    """What plan.json holds. reading: how numbers are read, which a report may change."""

    components: list[str]
    measured: list[str]  # components of weight 0
    families: dict[str, Family]
    runs: list[PlannedRun]
    settings: Json  # of all runs, without composer, seed and run
    reading: Json = field(default_factory=lambda: {"reference_point": {}, "spans": {}, "minimise": []})


def lattice(components: int, points: int) -> list[tuple[float, ...]]:
    """Weights ((a_1 + 1/K) / n, ..., (a_K + 1/K) / n) of all whole a >= 0 that sum to n - 1: n an edge, no corners.

    The lattice of Das and Dennis 1998 (SIAM J. Optim. 8(3)) drawn in to the centre, so that none is 0: of two
    components the middles of n equal parts, 0.1, 0.3, ... 0.9 for 5.
    """
    return [tuple((a + 1 / components) / points for a in whole) for whole in _sums(components, points - 1)]


def _sums(parts: int, total: int) -> Iterator[tuple[int, ...]]:
    if parts == 1:
        yield (total,)
        return
    for first in range(total + 1):
        for rest in _sums(parts - 1, total - first):
            yield (first, *rest)


def planned(
    arguments: FrontArguments,
    before: Plan | None,
    config_dir: Path | None,
    show: Callable[[str], None],
) -> tuple[Plan, list[Element]]:
    """All runs of the directory, those of earlier words among them. Raises ConfigError for what would fail."""
    known = options("composer", config_dir)
    for option in arguments.composers.values():
        if option not in known:
            near = difflib.get_close_matches(option, known, 1, 0.5)
            tip = f"did you mean {near[0]}? " if near else ""
            raise ConfigError(f"composers={option}: no such composer; {tip}Options: {', '.join(known)}")
    of_all = [word for word in arguments.settings if word.startswith("composer.")]
    settings = [word for word in arguments.settings if word not in of_all]
    base = compose(settings, config_dir)
    components, measured = _components(base)
    settings = _with_evaluations(settings, base, before, show)
    own = {
        label: Family(option, [*of_all, *arguments.own.get(label, ())], {})
        for label, option in arguments.composers.items()
    }
    new = _plan(arguments, settings, own, components, measured, config_dir)
    plan = new if before is None else _together(arguments.out, before, new)
    check_reading(plan)
    return plan, [_element(arguments.out, plan, entry, settings, config_dir) for entry in plan.runs]


def _family_words(settings: Sequence[str], option: str, own: Sequence[str]) -> tuple[str, ...]:
    return (*settings, f"composer={option}", *own)


def _components(config: Config) -> tuple[list[str], list[str]]:
    """Names of the components that are composed, and of those that are measured only."""
    if config.trainer.kind != "online" or config.reward is None:
        raise ConfigError("align front compares online runs: use an online recipe, for example recipe=rloo")
    t = config.trainer
    assert isinstance(t, OnlineConfig)
    if t.num_samples == 0 or (config.data.heldout is None and config.data.heldout_fraction == 0):
        raise ConfigError("points are means over held-out prompts: set data.heldout, and trainer.num_samples above 0")
    from align.composers.hypervolume import MAX_OBJECTIVES
    from align.rewards.build import counted

    node = OmegaConf.to_container(config.reward, resolve=True)
    assert isinstance(node, dict)
    components = list(counted(node))  # type: ignore[arg-type]
    if len(components) < 2:
        raise ConfigError(
            f"reward: {len(components)} component{'' if len(components) == 1 else 's'} with a weight; a front needs "
            "two, as in reward=[topic,brief]"
        )
    if len(components) > MAX_OBJECTIVES:
        raise ConfigError(
            f"reward: {len(components)} components with a weight; volumes are exact and quick up to {MAX_OBJECTIVES}; "
            "set reward.NAME.weight=0 for those that are measured only"
        )
    return components, [str(name) for name in node if name not in components]


def _with_evaluations(
    settings: Sequence[str], config: Config, before: Plan | None, show: Callable[[str], None]
) -> tuple[str, ...]:
    """The settings with evaluations along the run, where none are asked for: those of the runs that are there."""
    if config.trainer.eval_every > 0:
        return tuple(settings)
    given = any(word.startswith("trainer.eval_every=") for word in settings)
    if before is not None and not given:
        return (*settings, f"trainer.eval_every={before.settings['trainer']['eval_every']}")
    steps = config.trainer.max_steps
    if given or steps is None:
        raise ConfigError("trainer.eval_every=0: curves need evaluations along the run; set it to 5, for example")
    every = max(1, steps // 5)
    show(f"trainer.eval_every={every}: a fifth of trainer.max_steps, as none was given")
    return (*settings, f"trainer.eval_every={every}")


def _plan(
    arguments: FrontArguments,
    settings: Sequence[str],
    own: Mapping[str, Family],
    components: list[str],
    measured: list[str],
    config_dir: Path | None,
) -> Plan:
    """What these words alone ask for. The seeds come first: after the first of them there is a front of each family."""
    families: dict[str, Family] = {}
    points: dict[str, list[tuple[dict[str, float], dict[str, float]]]] = {}
    vectors = [_by_component(vector, components) for vector in arguments.weights]
    if arguments.points is not None:
        vectors = [_by_component(vector, components) for vector in lattice(len(components), arguments.points)]
    unused = {
        "points": arguments.points is not None,
        "weights": bool(arguments.weights),
        "thresholds": bool(arguments.thresholds),
    }
    for label, family in own.items():
        config = compose(_family_words(settings, family.composer, family.words), config_dir)
        assert config.composer is not None
        node = OmegaConf.to_container(config.composer, resolve=False)
        assert isinstance(node, dict)
        if "degrees" in node:
            raise ConfigError(f"composers={family.composer}: one policy for all directions is no point; leave it out")
        if "weights" in node:
            if not vectors:
                raise ConfigError(f"composers={family.composer} has weights: give points=5, or weights=0.5/0.5,0.2/0.8")
            _refuse_set_twice(family, "weights")
            unused |= {"points": False, "weights": False}
            points[label] = [(vector, {}) for vector in vectors]
        elif "thresholds" in node and node.get("search") is None and arguments.thresholds:
            _refuse_set_twice(family, "thresholds", arguments.thresholds)
            unused["thresholds"] = False
            names, values = list(arguments.thresholds), arguments.thresholds.values()
            points[label] = [({}, dict(zip(names, chosen, strict=True))) for chosen in itertools.product(*values)]
        else:
            points[label] = [({}, {})]
        shape = {key: value for key, value in node.items() if key not in ("weights", "thresholds")}
        families[label] = replace(family, node=shape)  # type: ignore[arg-type]
        base = _shared(config)
        seed = config.seed
    for key, without_effect in unused.items():
        if without_effect:
            names = ", ".join(arguments.composers.values())
            raise ConfigError(f"{key} has no effect: none of composers={names} has {_kind(key)}; remove it")
    runs = [
        PlannedRun(_name(label, weights, thresholds, seed + i), label, seed + i, weights, thresholds)
        for i in range(arguments.seeds)
        for label in families
        for weights, thresholds in points[label]
    ]
    plan = Plan(components, measured, families, _distinct(runs), base)
    return replace(plan, reading={**plan.reading, **arguments.reading})


def _kind(key: str) -> str:
    return "thresholds" if key == "thresholds" else "weights"


def _by_component(vector: Sequence[float], components: Sequence[str]) -> dict[str, float]:
    if len(vector) != len(components):
        shown = "/".join(f"{value:g}" for value in vector)
        raise ConfigError(
            f"weights={shown}: {len(vector)} numbers for the {len(components)} components {', '.join(components)}"
        )
    return dict(zip(components, vector, strict=True))


def _refuse_set_twice(family: Family, section: str, names: Iterable[str] = ()) -> None:
    keys = [f"composer.{section}.{name}" for name in names] or [f"composer.{section}"]
    for word in family.words:
        key = word.partition("=")[0]
        if any(key == k or key.startswith(f"{k}.") for k in keys):
            raise ConfigError(f"{key}: this command gives {section} to each run; remove it")


def _shared(config: Config) -> Json:
    """The settings that all runs of a front have in common."""
    tree = OmegaConf.to_container(config.tree, resolve=False)
    assert isinstance(tree, dict)
    return {str(key): value for key, value in tree.items() if key not in ("composer", "seed", "run")}


def _name(label: str, weights: Mapping[str, float], thresholds: Mapping[str, float], seed: int) -> str:
    parts = [f"{name}-{value:.4g}" for name, value in (weights or thresholds).items()]
    return "_".join([label, *parts, f"seed-{seed}"])


def _distinct(runs: Sequence[PlannedRun]) -> list[PlannedRun]:
    """Each run once. Raises ConfigError for two that would have one directory."""
    found: dict[str, PlannedRun] = {}
    for entry in runs:
        if found.setdefault(entry.name, entry) != entry:
            raise ConfigError(
                f"two runs would both be called {entry.name}: their numbers agree to four digits; take others"
            )
    return list(found.values())


def _together(out: Path, before: Plan, new: Plan) -> Plan:
    """The new plan with the runs that are there already. Raises ConfigError for another front's directory."""
    changed = differences(OmegaConf.create(before.settings), OmegaConf.create(new.settings))
    if changed:
        key, (there, now) = next(iter(changed.items()))
        raise ConfigError(f"out={out} holds a front with {key}={there}, now it is {key}={now}; give another out=DIR")
    for label, family in new.families.items():
        old = before.families.get(label)
        if old is None:
            continue
        nodes = [OmegaConf.create({"composer": {"option": f.composer, **f.node}}) for f in (old, family)]
        assert all(isinstance(node, DictConfig) for node in nodes)
        changed = differences(*nodes)  # type: ignore[arg-type]
        if changed:
            key, (there, now) = next(iter(changed.items()))
            raise ConfigError(
                f"out={out} has {label} with {key}={there}, now it is {now}; give it another name, as in "
                f"composers=other:{family.composer}"
            )
    families = {**new.families, **{k: f for k, f in before.families.items() if k not in new.families}}
    # in the order of the families: the first-named is what others are compared with
    runs = _distinct([*before.runs, *new.runs])
    runs.sort(key=lambda entry: (entry.seed, list(families).index(entry.family)))
    reading = {**before.reading, **{key: value for key, value in new.reading.items() if value}}
    return replace(new, families=families, runs=runs, reading=reading)


def _element(out: Path, plan: Plan, entry: PlannedRun, settings: Sequence[str], config_dir: Path | None) -> Element:
    family = plan.families[entry.family]
    own = [
        f"composer.{section}.{name}={value!r}"
        for section, values in (("weights", entry.weights), ("thresholds", entry.thresholds))
        for name, value in values.items()
    ]
    kept = [word for word in settings if not word.startswith("seed=")]
    words = (*_family_words(kept, family.composer, family.words), *own, f"seed={entry.seed}")
    words = (*words, f"run.dir={quoted(str(out / entry.name))}")
    return Element(entry.name, words, compose(words, config_dir))


def check_reading(plan: Plan) -> None:
    """Raises ConfigError for a reference point, spans or names that do not fit the components."""
    reading, names = plan.reading, plan.components
    for key in ("reference_point", "spans"):
        for name in reading[key]:
            if name not in names:
                raise ConfigError(f"{key}.{name}: no composed component has this name; there are {', '.join(names)}")
    missing = [name for name in names if reading["reference_point"] and name not in reading["reference_point"]]
    if missing:
        raise ConfigError(f"reference_point.{missing[0]} is missing: give a number for each of {', '.join(names)}")
    for name, span in reading["spans"].items():
        if span <= 0:
            raise ConfigError(f"spans.{name}={span:g}: must be greater than 0")
    for name in reading["minimise"]:
        if name not in names:
            raise ConfigError(f"minimise={name}: no composed component has this name; there are {', '.join(names)}")


def write_plan(out: Path, plan: Plan) -> None:
    """Make the directory and say what is in it."""
    try:
        out.mkdir(parents=True, exist_ok=True)
        write_atomic(out / PLAN, json.dumps(asdict(plan), indent=1) + "\n")
    except OSError as error:
        raise ConfigError(f"out={out}: cannot be written ({error.strerror}); give another") from None


def read_plan(out: Path) -> Plan | None:
    """What an earlier call has planned, None for a directory that is not there or empty. Raises ConfigError for any
    other."""
    if not (out / PLAN).is_file():
        if out.exists() and not (out.is_dir() and not any(out.iterdir())):
            raise ConfigError(f"out={out}: is there and holds no front; give another directory")
        return None
    raw = json.loads((out / PLAN).read_text())
    families = {label: Family(**family) for label, family in raw["families"].items()}
    return Plan(**raw | {"families": families, "runs": [PlannedRun(**entry) for entry in raw["runs"]]})
