"""Rewards of steps as users write them, good and bad; imported in worker processes only."""

# The names of the parameters are what is tested:
# ruff: noqa: ARG001

from __future__ import annotations

import time

TEXTS = {"one": 0.25, "two": -0.5, "three": 0.75, "": -0.125}


def known(completion, token_ids):
    """A number of a text, and a thousandth for each token."""
    return TEXTS[completion] + len(token_ids) / 1000


def in_its_place(completion, steps, step, answer, factor=1.0):
    """Place and number of steps, the answer's column."""
    assert steps[step] == completion
    return factor * (10 * step + len(steps)) + answer


def at_once(completions, step):
    """Called for the steps of all completions."""
    return [len(c) + 100 * k for c, k in zip(completions, step, strict=True)]


def hangs(completion):
    """Does not come back for one text."""
    if completion == "two":
        time.sleep(600)
    return 1.0


class Here:
    """Runs in the trainer's process."""

    in_process = True


def letters(completion):
    """Share of lower-case letters."""
    return sum("a" <= c <= "z" for c in completion) / max(1, len(completion))
