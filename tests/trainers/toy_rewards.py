"""Rewards of several tests, imported in worker processes: nothing heavy here."""

from __future__ import annotations


def plain(completion):
    """Share of characters below code 128: a random network over bytes writes them half of the time."""
    return sum(ord(c) < 128 for c in completion) / max(1, len(completion))


def short(completion):
    """1 for a completion of at most 6 characters."""
    return float(len(completion) <= 6)


def odd(prompt, completion):
    """Of prompts with an odd number the share of characters below 128; none for the others."""
    return plain(completion) if int(prompt.split()[-1]) % 2 else None


def wanted(completion, answer):
    """1 if the answer's letter is in the completion; none for an answer z."""
    return None if answer == "z" else float(answer in completion)


def up(completion):
    """Differs from text to text."""
    return sum(ord(c) % 13 for c in completion) % 17 / 16


def down(completion):
    """What makes the sum with `up` 1."""
    return 1 - up(completion)


def constant(completion):
    """The same for all."""
    return float(len(completion) >= 0)
