"""Rewards of the tests of online training, good and bad; imported in worker processes: nothing heavy here."""

from __future__ import annotations

import math
import time


def mixed(completion):
    """A number between 0 and 1 that differs from text to text."""
    return sum(ord(c) % 13 for c in completion) % 17 / 16


def coin(completion):
    """0 or 1."""
    return float(sum(map(ord, completion)) % 2)


def flaky(completion):
    """Raises for a fifth of the texts, always the same ones."""
    if sum(map(ord, completion)) % 5 == 2:
        raise KeyError("no score for this text")
    return mixed(completion)


def patchy(completion):
    """None for a fifth of the texts, always the same ones."""
    return None if sum(map(ord, completion)) % 4 == 0 else mixed(completion)


def same(completion):
    """The same for all."""
    return 0.5 + 0 * len(completion)


def never(completion):
    """None for all."""
    return None if completion is not None else 0.0


def broken(completion):
    """Raises for all."""
    raise RuntimeError(f"cannot score {len(completion)} characters")


def endless(completion):
    """Infinite for half of the texts, no number for others."""
    code = sum(map(ord, completion)) % 4
    return math.inf if code < 2 else math.nan if code == 2 else 1.0


def hanging(completion):
    """Does not come back for one text in eight."""
    if sum(map(ord, completion)) % 8 == 0:
        time.sleep(600)
    return mixed(completion)


def short_list(completions, **_):
    """One number too few, however many were asked for."""
    return [1.0] * (len(completions) - 1)


def answered(completion, answer):
    """Reads a column of the row."""
    return mixed(completion) + float(answer)
