"""The node `reward` of the settings to named components, and their scores side by side."""

from __future__ import annotations

import contextlib
import difflib
import inspect
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from align.contracts import adopt, declared_by
from align.jsons import Fields, Json
from align.rewards.base import NEEDS_LORA, Conversation, Reward, RewardHost, RewardTarget, StepReward
from align.rewards.calls import FunctionReward
from align.rewards.worker import Refused, bound_to, resolve, unmade

# Of a component that the command line names without an option of configs/reward.
DEFAULT_WEIGHT = 1.0
STEPS_WEIGHT = 0.0  # of one that gives rewards of steps: its number is no part of the sum
DEFAULT_SECONDS = 10.0  # deadline of a call


class Rewards:
    """K components in the order of the settings."""

    def __init__(self, parts: Mapping[str, Reward | StepReward], weights: Sequence[float]):
        self.names = tuple(parts)
        self.weights = np.asarray(weights, dtype=np.float64)  # [K]
        self._parts = dict(parts)
        self._open = contextlib.ExitStack()
        for part in parts.values():
            self._open.callback(part.close)
        self.steps_name = next((name for name, part in parts.items() if part.gives_steps), None)

    def score(self, conversations: Sequence[Conversation]) -> np.ndarray:
        """Rewards [N, K] float64, not weighted, in the order of the conversations; NaN where a component has none.

        Of a component that gives rewards of steps the smallest one.
        """
        return self.score_with_steps(conversations)[0]

    def score_with_steps(self, conversations: Sequence[Conversation]) -> tuple[np.ndarray, list[np.ndarray] | None]:
        """The same, and the rewards of steps of the component steps_name: see StepReward. None: there is no such."""
        columns = np.full((len(conversations), len(self.names)), math.nan)
        rows: list[np.ndarray] | None = None if self.steps_name is None else []
        if len(conversations):
            for k, part in enumerate(self._parts.values()):
                if isinstance(part, StepReward):
                    rows = [_finite(row) for row in part.steps(conversations)]
                    columns[:, k] = [np.fmin.reduce(row, initial=math.nan) for row in rows]
                else:
                    columns[:, k] = part(conversations)
        # a component in this process may forget to look
        columns[~np.isfinite(columns)] = math.nan
        return columns, rows

    @property
    def counts(self) -> dict[str, int]:
        """Failures since the start by "NAME/reason"."""
        return {f"{name}/{reason}": n for name, part in self._parts.items() for reason, n in part.counts.items()}

    def close(self) -> None:
        """Give up processes and memory: of every part once, also where another's close fails."""
        self._open.close()


def components(node: Fields, host: RewardHost) -> Rewards:
    """The components that a mapping NAME -> {_target_, weight, seconds, keys of the target} names.

    A target whose class says `in_process = True` is built here as target(host, **keys); every other one is imported
    and called in a process of its own. Raises ValueError in one line that names the setting.
    """
    if not node:
        raise ValueError("no reward: choose reward=everyday_gold, or name one: reward.NAME._target_=my.module.function")
    settings = {str(name): _checked(str(name), part, node) for name, part in node.items()}
    parts: dict[str, Reward | StepReward] = {}
    try:
        for name, (target, _, seconds, keys) in settings.items():
            parts[name] = _component(name, target, seconds, keys, replace(host, name=name))
        stepped = [name for name, part in parts.items() if part.gives_steps]
        _one_of_steps(stepped)
    except BaseException:
        for part in parts.values():
            part.close()
        raise
    return Rewards(parts, [_weight(weight, name in stepped) for name, (_, weight, _, _) in settings.items()])


@dataclass(frozen=True)
class Part:
    """What a component is, known before it is built."""

    weight: float
    steps: bool  # it gives rewards of steps
    columns: tuple[str, ...]  # that each row must have; empty for one that runs in the trainer's process


def examined(node: Fields, lora: bool) -> dict[str, Part]:
    """Each component without its model: a function of ours is bound to its keys here, the user's in a process of its
    own, and a class that runs in the trainer's process is asked what it says of them. lora: the policy is a LoRA model.

    Raises ValueError as `components` does, for all that needs no model.
    """
    out = {}
    for name, part in node.items():
        target, weight, seconds, keys = _checked(str(name), part, node)
        steps, columns = _examined(str(name), target, seconds, keys, lora)
        out[str(name)] = Part(_weight(weight, steps), steps, columns)
    _one_of_steps([name for name, part in out.items() if part.steps])
    return out


def _examined(name: str, target: str, seconds: float | None, keys: Json, lora: bool) -> tuple[bool, tuple[str, ...]]:
    """Whether it gives rewards of steps, and the columns that it needs."""
    if not target.startswith("align."):
        reward = FunctionReward(name, target, keys, seconds=seconds or DEFAULT_SECONDS)
        reward.close()
        if not reward.in_process:
            return False, tuple(reward.required)
    try:
        found = resolve(target)
        declared = declared_by(found, RewardTarget, f"reward.{name}")
        if not declared.in_process:
            ours = declared is found and issubclass(declared, RewardTarget)
            return False, (unmade(declared, keys) if ours else bound_to(found, keys)[1]).required
    except Refused as error:
        raise ValueError(f"reward.{name}._target_={target}: {error}") from error
    keys = _bound_in_process(name, found, seconds, keys)
    try:
        if declared.needs_lora and not lora:
            raise ValueError(NEEDS_LORA)
        declared.check_keys(**keys)
    except ValueError as error:
        raise ValueError(f"reward.{name}: {_line(error)}") from error
    return declared.gives_steps, ()


def counted(node: Fields) -> dict[str, float]:
    """Name -> weight of the components whose weight is not 0, in order, before any of them is built.

    Raises ValueError for settings that no component could have.
    """
    out = {}
    for name, part in node.items():
        target, weight, _, _ = _checked(str(name), part, node)
        stepped = False
        if weight is None and target.startswith("align."):
            with contextlib.suppress(Refused):  # who builds it says why
                stepped = declared_by(resolve(target), RewardTarget, f"reward.{name}").gives_steps
        if weight := _weight(weight, stepped):
            out[str(name)] = weight
    return out


def _weight(given: float | None, steps: bool) -> float:
    if given is not None:
        return given
    return STEPS_WEIGHT if steps else DEFAULT_WEIGHT


def _one_of_steps(names: Sequence[str]) -> None:
    if len(names) > 1:
        raise ValueError(f"reward: {' and '.join(names)} give rewards of steps; keep one of them")


def _finite(row: np.ndarray) -> np.ndarray:
    return np.full_like(row, math.nan) if np.isinf(row).any() else row


def _checked(name: str, part: object, node: Fields) -> tuple[str, float | None, float | None, Json]:
    """Target, weight, seconds (None: not given) and the keys for the target."""
    if not name.isidentifier():
        raise ValueError(f"reward.{name}: a name of letters, digits and _ is needed, for the metrics")
    if not isinstance(part, Mapping) or "_target_" not in part:
        named = [str(n) for n, other in node.items() if isinstance(other, Mapping) and "_target_" in other]
        near = difflib.get_close_matches(name, named, 1)
        tip = f", or did you mean reward.{near[0]}?" if near else ""
        raise ValueError(f"reward.{name}._target_ is missing: give the dotted path of a function or class{tip}")
    keys = {str(key): value for key, value in part.items()}
    target = keys.pop("_target_")
    if not isinstance(target, str):
        raise ValueError(f"reward.{name}._target_={target}: must be a dotted path such as my.module.function")
    weight = keys.pop("weight", None)
    if weight is not None and (not _real(weight) or not math.isfinite(weight)):
        raise ValueError(f"reward.{name}.weight={weight}: must be a finite number")
    seconds = keys.pop("seconds", None)
    if seconds is not None and (not _real(seconds) or not 0 < seconds < math.inf):
        raise ValueError(f"reward.{name}.seconds={seconds}: must be a finite number greater than 0")
    odd = sorted(key for key in keys if key.startswith("_"))
    if odd:
        raise ValueError(f"reward.{name}.{odd[0]} is not a setting; beside _target_ keys begin with a letter")
    return target, None if weight is None else float(weight), seconds, keys


def _real(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _component(name: str, target: str, seconds: float | None, keys: Json, host: RewardHost) -> Reward | StepReward:
    if target.startswith("align."):  # our own tell here where they run; the user's are imported in their process only
        try:
            found = resolve(target)
        except Refused as error:
            raise ValueError(f"reward.{name}._target_={target}: {error}") from error
        if declared_by(found, RewardTarget, f"reward.{name}").in_process:
            return _in_process(name, found, seconds, keys, host)
    reward = FunctionReward(name, target, keys, seconds=seconds or DEFAULT_SECONDS, check=host.check, say=host.say)
    if reward.in_process:
        reward.close()
        return _in_process(name, resolve(target), seconds, keys, host)
    return reward


def _in_process(name: str, found: Any, seconds: float | None, keys: Json, host: RewardHost) -> Reward | StepReward:
    keys = _bound_in_process(name, found, seconds, keys)
    try:
        part = found(host, **keys)
    except (TypeError, ValueError, OSError, RuntimeError) as error:  # of PEFT and transformers
        raise ValueError(f"reward.{name}: {_line(error)}") from error
    steps = declared_by(type(part), RewardTarget, f"reward.{name}").gives_steps
    return adopt(part, StepReward if steps else Reward, f"reward.{name}")  # type: ignore[type-abstract]


def _bound_in_process(name: str, found: Any, seconds: float | None, keys: Json) -> Json:
    """The keys of a class that runs in the trainer's process. Raises ValueError for others than it takes."""
    signature = inspect.signature(found)
    if "seconds" in signature.parameters:
        keys = keys | {"seconds": seconds or DEFAULT_SECONDS}
    elif seconds is not None:
        raise ValueError(
            f"reward.{name}.seconds has no effect: {found.__name__} runs in the trainer's process; remove it"
        )
    try:
        signature.bind(None, **keys)
    except TypeError as error:
        raise ValueError(f"reward.{name}: {_line(error)}") from error
    return keys


def _line(error: Exception) -> str:
    return " ".join(str(error).split())[:400]
