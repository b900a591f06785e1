"""What composers share: the protocol, what they are told, refusals of settings, weighted sums, whitening."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, get_args

from align import simplex as checks
from align.deferred import Tensor, torch
from align.jsons import Fields, Json

KL = "kl"  # the name of the KL's own stream
NEEDS = ("kl_stream", "influence", "validation", "gold", "uncertainty", "direction")
Target = Literal["reward", "advantage"]
Apply = Literal["now", "next"]
Measure = Literal["exact", "directional"]
TARGETS: tuple[Target, ...] = get_args(Target)
MOMENTS: tuple[Apply, ...] = get_args(Apply)
_COMPONENT = "component with a weight"  # what composers see of the reward


@dataclass(frozen=True)
class Observed:
    """What a composer may use of a step. The loop fills what it knows, a composer reads what it needs. [K]: components
    in order, without the KL; numbers over the batch of an optimiser step, of all processes."""

    means: Tensor | None = None  # [K] mean reward over the completions that have one; NaN where none has
    lowest: Tensor | None = None  # [K] smallest reward of a completion
    highest: Tensor | None = None  # [K] largest
    influences: Tensor | None = None  # [K] <g_i, sum_k g_k>: align.composers.gradient.influences
    learning_rate: float | None = None  # of this optimiser step
    validation: Tensor | None = None  # [K] held-out means, after an evaluation
    gold: float | None = None  # the held-out metric that `gold_metric` names, after an evaluation; higher is better


class Vector:
    """A tensor [K] of a composer, float64 on the CPU. Set as numbers it is made when it is first read: settings are
    checked without torch."""

    def __set_name__(self, owner: type, name: str) -> None:
        self._name = name

    def __get__(self, composer: Composer, owner: type) -> Tensor:
        kept = vars(composer)
        if isinstance(kept[self._name], list):
            kept[self._name] = tensor(kept[self._name])
        return kept[self._name]

    def __set__(self, composer: Composer, value: Tensor | list[float]) -> None:
        vars(composer)[self._name] = value


class Composer(ABC):
    """Streams of K components to one stream, with a state that learns from what it is told.

    names: components whose reward.NAME.weight is not 0, in the order of the settings. Streams are columns in this
    order; with the need "kl_stream" one more, the KL's, stands last. State is JSON and comes back bit for bit.
    """

    __slots__ = ()

    # of NEEDS. kl_stream: a column of its own for penalties. influence, validation, gold: see Observed. uncertainty,
    # direction: the `context` of a call.
    needs: frozenset[str] = frozenset()
    names: tuple[str, ...]
    # reward: streams are rewards [N, K] and the estimator sees their sum. advantage: advantages [C, K], one estimate
    # of each component
    target: Target = "advantage"
    # now: told of a batch before it composes that batch. next: after the optimiser step
    apply: Apply = "next"
    gold_metric: str | None = None  # what follows heldout/, for the need "gold"
    # for the need "influence": how it is measured; the norm to which each gradient is scaled down first (exact only);
    # by which weights gradients are taken, a regular expression that their names hold (None: all)
    measure: Measure = "exact"
    max_norm: float | None = None
    parameters: str | None = None
    # for the need "kl_stream": the KL's stream is brought to one size, so that the strength of the KL has no effect
    whiten: bool = False
    # for the need "direction": bounds of the angles that are drawn (None: rows have directions); how a prompt tells its
    degrees: Sequence[float] | None = None
    message: str = "{weights}"

    def __init__(self, names: Sequence[str], *, smallest: int = 2):
        self.names = tuple(str(name) for name in names)
        if len(set(self.names)) != len(self.names) or KL in self.names:
            raise ValueError(f"reward: components {', '.join(self.names)}: names must differ, and {KL} is the KL's own")
        if len(self.names) < smallest:
            raise ValueError(
                f"composer: {len(self.names)} component{'' if len(self.names) == 1 else 's'} with a weight, nothing "
                f"to compose; name at least {smallest} by reward.NAME._target_, or use composer=null"
            )

    @property
    def streams(self) -> tuple[str, ...]:
        """Names of the columns of a call."""
        return (*self.names, KL) if "kl_stream" in self.needs else tuple(self.names)

    @property
    def penalty_signs(self) -> tuple[float, ...]:
        """By what a stream's penalties (a KL in the reward) are multiplied before its advantages are estimated."""
        return (*(0.0 for _ in self.names), 1.0) if "kl_stream" in self.needs else tuple(1.0 for _ in self.names)

    @property
    def due(self) -> bool:
        """Whether an evaluation is wanted now: before the first step, and after each update."""
        return False

    def check(self, advantage: object, choice: str, penalties: bool) -> None:  # noqa: B027
        """Raises ValueError if it cannot act through this estimator, called `choice`; penalties: a KL in the reward."""

    @abstractmethod
    def __call__(self, streams: Tensor, keep: Tensor | None = None, context: Tensor | None = None) -> Tensor:
        """One number for each row [M] of streams [M, K]. Advantages: 0 where the mask keep [M] is not True. Rewards:
        without keep; NaN where a component that counts is NaN. context: as the needs say."""

    def update(self, observed: Observed) -> None:  # noqa: B027
        """Learn from an optimiser step, or from an evaluation."""

    def metrics(self) -> dict[str, float]:
        """What there is to watch, by name."""
        return {}

    def remarks(self) -> list[str]:
        """Lines for people about what looks wrong; the loop says each once."""
        return []

    def state_dict(self) -> Json:
        """All that the next step depends on."""
        return {"names": list(self.names)}

    def load_state_dict(self, state: Fields) -> None:
        """The inverse. Raises ValueError for other components."""
        if tuple(state["names"]) != tuple(self.names):
            raise ValueError(
                f"composer: the checkpoint has components {', '.join(state['names'])}, the settings "
                f"{', '.join(self.names)}; use those, in that order"
            )

    def checked(self, streams: Tensor, keep: Tensor | None) -> Tensor:
        """The streams. Raises ValueError for another number of them."""
        if streams.ndim != 2 or streams.shape[1] != len(self.streams):
            raise ValueError(
                f"composer: streams of shape {list(streams.shape)}; {len(self.streams)} columns are needed, for "
                f"{', '.join(self.streams)}"
            )
        if keep is not None and keep.shape != streams.shape[:1]:
            raise ValueError(f"composer: a mask of shape {list(keep.shape)} for streams of {list(streams.shape)}")
        return streams

    def vector(self, values: Tensor, what: str) -> Tensor:
        """Values [K] on the CPU in float64. Raises ValueError for another number of them, or one that is not finite."""
        values = values.detach().double().cpu()
        if values.shape != (len(self.names),):
            raise ValueError(f"composer: {what} of shape {list(values.shape)}; one is needed for each of {self.names}")
        odd = [name for name, value in zip(self.names, values.tolist(), strict=True) if not math.isfinite(value)]
        if odd:
            raise ValueError(
                f"composer: the {what} of {', '.join(odd)} is no number: no completion of the step has a finite one; "
                f"mend reward.{odd[0]}, or take it out by reward.{odd[0]}.weight=0"
            )
        return values


def weighted(streams: Tensor, weights: Tensor, keep: Tensor | None) -> Tensor:
    """Sum over the columns of streams [M, K] times weights [K], see Composer.__call__ [M]."""
    used = (weights != 0).to(streams.device)
    total = streams[:, used] @ weights.to(streams)[used]
    return total if keep is None else torch.where(keep, total, 0.0)


def whitened(streams: Tensor, keep: Tensor | None, epsilon: float) -> Tensor:
    """(x - mean) / (std + epsilon) of each column over the rows of the mask, std unbiased; 0 outside [M, K].

    Exactly 0 in a column of equal values, where the division would blow up the rounding of the mean. Without a mask
    rows with a NaN stay out and stay NaN in that column.
    """
    out = torch.zeros_like(streams)
    for k in range(streams.shape[1]):
        column = streams[:, k]
        mask = ~column.isnan() if keep is None else keep
        kept = column[mask]
        if len(kept) > 1 and not bool((kept == kept[0]).all()):
            out[mask, k] = (kept - kept.mean()) / (kept.std() + epsilon)
        if keep is None:
            out[~mask, k] = math.nan
    return out


def by_name(values: Fields, names: Sequence[str], key: str, complete: bool = True) -> dict[str, float]:
    """align.simplex.by_name of composer.KEY."""
    return checks.by_name(values, names, f"composer.{key}", complete, _COMPONENT)


def simplex(values: Fields | None, names: Sequence[str], key: str, zeros: bool = True) -> list[float]:
    """align.simplex.simplex of composer.KEY [K]."""
    return checks.simplex(values, names, f"composer.{key}", zeros, _COMPONENT)


def summing_to_one(values: Sequence[float], key: str) -> list[float]:
    """align.simplex.summing_to_one of composer.KEY [K]."""
    return checks.summing_to_one(values, f"composer.{key}")


def named(form: str, names: Sequence[str], values: Sequence[float] | Tensor) -> dict[str, float]:
    """Metrics form/NAME."""
    listed = values.tolist() if isinstance(values, torch.Tensor) else values
    return {f"{form}/{name}": float(value) for name, value in zip(names, listed, strict=True)}


def tensor(values: Sequence[float] | Sequence[Sequence[float]]) -> Tensor:
    """float64 on the CPU, as all state."""
    return torch.tensor(values, dtype=torch.float64)


def one_of(key: str, value: object, allowed: Sequence[str]) -> None:
    """Raises ValueError unless value is one of `allowed`."""
    if value not in allowed:
        raise ValueError(f"composer.{key}={value}: must be one of {', '.join(allowed)}")


def positive(key: str, value: float) -> None:
    """Raises ValueError unless 0 < value < inf."""
    if not 0 < value < math.inf:
        raise ValueError(f"composer.{key}={value}: must be greater than 0")


def within(key: str, value: float, low: float, high: float) -> None:
    """Raises ValueError unless low <= value <= high and finite."""
    if not low <= value <= high or math.isinf(value):
        bound = f"at least {low:g}" if math.isinf(high) else f"between {low:g} and {high:g}"
        raise ValueError(f"composer.{key}={value}: must be {bound}")


def count(key: str, value: int) -> None:
    """Raises ValueError unless value is an integer of at least 1."""
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ValueError(f"composer.{key}={value}: must be an integer of at least 1")
