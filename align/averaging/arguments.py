"""The words after `align average` to a checked request. Imports nothing heavy: a misspelt word is refused at once."""

from __future__ import annotations

import difflib
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

DTYPES = ("float32", "bfloat16", "float16", "float64")

# Of each method: the settings it must be given and those it may be given.
METHODS: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "uniform": ((), ("merge",)),
    "weighted": (("weights",), ("extrapolate", "merge")),
    "loss": (("penalty",), ("values", "merge")),
    "steps": (("penalty",), ("values", "merge")),
    "stock": (("base",), ("filter_wise", "clamp")),
    "interpolate": (("base",), ("alpha", "sweep", "blocks", "alphas", "other", "extrapolate")),
    "localize": (("base", "density"), ()),
}
_EVERYWHERE = ("out", "method", "dtype", "shard_gib", "max_memory_mib")
_LINEAR = (
    "method=linear is not offered: of LoRA adapters PEFT's combination of that name multiplies sums of factors, which "
    "adds products of one adapter's A with another's B and is no mean of their deltas; use method=uniform or "
    "method=weighted, which are exact"
)


@dataclass(frozen=True)
class Request:
    """What to average and how. None: not given."""

    models: tuple[Path, ...]
    out: Path | None = None  # None: only with check
    method: str = "uniform"
    weights: tuple[float, ...] | None = None  # weighted: one a model, sum 1
    values: tuple[float, ...] | None = None  # loss, steps: one a model, > 0; None: read beside the models
    penalty: float | None = None  # loss, steps: exponent, >= 0
    base: Path | None = None  # stock, interpolate, localize: the model that the others started from
    alpha: float | None = None  # interpolate: weight of the base
    sweep: tuple[float, ...] | None = None  # interpolate: several of them, a model each
    blocks: tuple[int, ...] | None = None  # interpolate: the last layer of each block but the last
    alphas: tuple[float, ...] | None = None  # interpolate: weight of the base in each block
    other: float | None = None  # interpolate: the same for head and norms outside the layers
    density: float | None = None  # localize: fraction of the entries that each model may change
    filter_wise: bool = False  # stock: one ratio a row instead of one a tensor
    clamp: bool = True  # stock: ratios from 0 to 1, exact cosines; False: as mergekit
    extrapolate: bool = False  # allow weights and alphas outside [0, 1]
    merge: Path | None = None  # adapters: the base model they are added to; None: the result is an adapter
    dtype: str | None = None  # of the written weights; None: that of the first model
    shard_gib: float = 5.0  # largest weight file
    max_memory_mib: int = 256  # for tensors; the interpreter with torch needs about 250 MiB more
    check: bool = False  # only compare the models

    def __post_init__(self) -> None:
        _check_counts(self)
        _check_numbers(self)
        if self.dtype is not None and self.dtype not in DTYPES:
            raise ValueError(f"dtype={self.dtype}: must be one of {', '.join(DTYPES)}")
        if not self.shard_gib > 0 or self.max_memory_mib < 1:
            raise ValueError("shard_gib must be above 0 and max_memory_mib at least 1")

    def settings(self) -> dict[str, object]:
        """What decides the numbers of the result, beside the models; JSON."""
        known = (*METHODS[self.method][0], *METHODS[self.method][1], "dtype", "shard_gib")
        out = {key: getattr(self, key) for key in known if key not in ("base", "merge")}
        return {key: list(value) if isinstance(value, tuple) else value for key, value in out.items()}


def parse(words: Sequence[str]) -> Request:
    """Words to a request. Raises ValueError, one line, for a word or value that cannot be."""
    models: list[Path] = []
    given: dict[str, str] = {}
    for word in words:
        key, equals, value = word.partition("=")
        if word == "--check":
            given["check"] = "true"
        elif word.startswith("-"):
            raise ValueError(f"{word} is not an option of align average; there is --check")
        elif not equals or (key not in _READERS and Path(word).is_dir()):  # a directory may be named lr=1e-5
            models.append(Path(word))
        elif key not in _READERS:
            near = difflib.get_close_matches(key, _READERS, 1, 0.5)
            tip = f"did you mean {near[0]}=?" if near else f"there are {', '.join(_READERS)}"
            raise ValueError(f"{key}= is not a setting of align average; {tip}")
        elif key in given:
            raise ValueError(f"{key}= is given twice; remove one")
        else:
            given[key] = value
    method = given.get("method", "uniform")
    if method == "linear":
        raise ValueError(_LINEAR)
    if method not in METHODS:
        near = difflib.get_close_matches(method, METHODS, 1, 0.5)
        tip = f"did you mean method={near[0]}?" if near else f"there are {', '.join(METHODS)}"
        raise ValueError(f"method={method} is not known; {tip}")
    if not models:
        raise ValueError("name the model directories: align average MODEL_DIR... out=DIR method=uniform")
    if "out" not in given and "check" not in given:
        raise ValueError("give out=DIR: where the average is written; or --check, which writes nothing")
    needed, allowed = METHODS[method]
    for key in needed:
        if key not in given:
            raise ValueError(f"method={method} needs {key}=: {_HELP[key]}")
    for key in given:
        if key not in (*needed, *allowed, *_EVERYWHERE, "check"):
            takers = ", ".join(m for m, parts in METHODS.items() if key in (*parts[0], *parts[1]))
            raise ValueError(f"{key}= has no effect with method={method}; remove it (it belongs to method={takers})")
    values = {key: _READERS[key](key, text) for key, text in given.items()}
    return Request(models=tuple(models), **values)  # type: ignore[arg-type]


def _check_counts(request: Request) -> None:
    count = len(request.models)
    if request.method == "interpolate":
        if count != 1:
            raise ValueError(f"method=interpolate takes one model and base=; {count} models were given")
        if sum(getattr(request, key) is not None for key in ("alpha", "sweep", "blocks")) != 1:
            raise ValueError("method=interpolate needs one of alpha=0.5, sweep=[0,0.5,1] and blocks=[10,20]")
        _check_blocks(request)
    elif request.method in ("weighted", "loss", "steps", "stock") and count < 2:
        raise ValueError(f"method={request.method} needs at least two models; {count} was given")
    for key in ("weights", "values"):
        numbers = getattr(request, key)
        if numbers is not None and len(numbers) != count:
            raise ValueError(f"{key}= has {len(numbers)} numbers for {count} models; give one for each, in their order")


def _check_blocks(request: Request) -> None:
    cuts, alphas = request.blocks, request.alphas
    if cuts is None:
        if alphas is not None or request.other is not None:
            raise ValueError("alphas= and other= belong to blocks=; give blocks= too, or remove them")
        return
    if alphas is None or len(alphas) != len(cuts) + 1:
        raise ValueError(f"blocks= with {len(cuts)} cuts needs alphas= with {len(cuts) + 1} numbers, one a block")
    if request.other is None:
        raise ValueError("blocks= needs other=: weight of the base for the head and the norms outside the layers")
    if list(cuts) != sorted(set(cuts)) or cuts[0] < 0:
        raise ValueError(f"blocks={list(cuts)}: layers from 0 on, each larger than the one before")


def _check_numbers(request: Request) -> None:
    if request.weights is not None and abs(sum(request.weights) - 1) > 1e-6:
        raise ValueError(
            f"weights={list(request.weights)} sum to {sum(request.weights):.6g}, not 1; divide each by the sum"
        )
    ratios = (*(request.sweep or ()), *(request.alphas or ()))
    ratios += tuple(x for x in (request.alpha, request.other) if x is not None)
    for key, numbers in (("weights", request.weights or ()), ("alpha", ratios)):
        outside = [x for x in numbers if not 0 <= x <= 1]
        if outside and not request.extrapolate:
            raise ValueError(f"{key}: {outside[0]:g} is outside [0, 1]; add extrapolate=true if that is meant")
    if request.sweep is not None and len(set(request.sweep)) != len(request.sweep):
        raise ValueError(f"sweep={list(request.sweep)} names a number twice; remove one")
    if request.values is not None and not all(x > 0 for x in request.values):
        raise ValueError(f"values={list(request.values)}: losses and steps must be above 0; leave step 0 out")
    if request.penalty is not None and request.penalty < 0:
        raise ValueError(f"penalty={request.penalty:g}: must be 0 (uniform) or more")
    if request.density is not None and not 0 < request.density <= 1:
        raise ValueError(f"density={request.density:g}: must be above 0 and at most 1")


def _path(key: str, text: str) -> Path:
    if not text:
        raise ValueError(f"{key}=: give a directory")
    return Path(text)


def _number(key: str, text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        raise ValueError(f"{key}={text}: must be a number") from None
    if not math.isfinite(value):
        raise ValueError(f"{key}={text}: must be a finite number")
    return value


def _whole(key: str, text: str) -> int:
    if not text.isdecimal():
        raise ValueError(f"{key}={text}: must be a whole number")
    return int(text)


def _switch(key: str, text: str) -> bool:
    if text not in ("true", "false"):
        raise ValueError(f"{key}={text}: must be true or false")
    return text == "true"


def _list(read: Callable[[str, str], float]) -> Callable[[str, str], tuple[float, ...]]:
    def numbers(key: str, text: str) -> tuple[float, ...]:
        if not (text.startswith("[") and text.endswith("]") and text[1:-1].strip()):
            raise ValueError(f"{key}={text}: must be a list, for example {key}=[1,2]")
        return tuple(read(key, part.strip()) for part in text[1:-1].split(","))

    return numbers


_READERS: dict[str, Callable[[str, str], object]] = {
    "out": _path,
    "method": lambda _, text: text,
    "weights": _list(_number),
    "values": _list(_number),
    "penalty": _number,
    "base": _path,
    "alpha": _number,
    "sweep": _list(_number),
    "blocks": _list(_whole),
    "alphas": _list(_number),
    "other": _number,
    "density": _number,
    "filter_wise": _switch,
    "clamp": _switch,
    "extrapolate": _switch,
    "merge": _path,
    "dtype": lambda _, text: text,
    "shard_gib": _number,
    "max_memory_mib": _whole,
    "check": _switch,
}
_HELP = {
    "weights": "one number a model, sum 1, for example weights=[0.2,0.8]",
    "penalty": "how sharply a better model counts more; 0 is uniform, 1 in proportion",
    "base": "the directory of the model that the others were trained from",
    "density": "fraction of all entries that each model may change, for example density=0.05",
}
