"""Reward functions that are plain rules over text: deterministic, no model involved."""

from __future__ import annotations

import re
from collections.abc import Sequence

FLOOR = -1.5  # of an answer that is empty or off topic; every other answer scores -1 or more

ON_TOPIC_COVERAGE = 0.25  # part of the prompt's content words an answer must mention
FULL_COVERAGE = 0.6  # mentioning more than this part earns nothing further
FULL_SUBSTANCE = 5  # content words beyond the prompt's own that make a whole answer
SHORTEST = 5  # words; fewer are no answer
LONGEST_FREE = 40  # words up to which brevity is whole
LONGEST = 80  # words from which brevity is gone
MARKS_FOR_FULL_PENALTY = 2
LARGEST_PENALTY = 0.5  # of mark-up, and of repetition

# Function words, and the words by which a prompt asks for something ("explain", "short email"):
# repeating these says nothing of what was asked.
STOP_WORDS = frozenset(
    re.findall(
        r"\S+",
        """
        a about above after again against all also although am an and any are aren't as ask asks
        at be because been before being below best better between both but by can can't cannot
        compare could did didn't difference do does doesn't doing don't down during each else
        email explain explaining few find for from get give go good had has have having he help
        helps her here hers him his how i i'm if in instead into is isn't it it's its just keep
        know let like little look lot made make makes making many may me mean message might more
        most much must my name need no nor not note of off on once one only or other our out
        over own people plan please recommend reply s same say she short should simple so some
        someone something start step such suggest t tell than that the their them then there
        these they thing things this those through tip to too two under until up us use used
        useful using very want was way ways we well were what when where which while who whom
        whose why will with without word would write writing yes you your
        """,
    )
)

_WORD = re.compile(r"[^\W_]+(?:['’][^\W_]+)*")
_MARKS = re.compile(
    r"""
    ^[ \t]*(?:[-*+•][ \t]+|\d+[.)][ \t]+|\#{1,6}[ \t]+)  # a list item or a heading
    | \*\*[^*\n]+(?:\*\*|$) | (?<!\w)__[^_\n]+(?:__|$)   # a bold span, also a cut one
    """,
    re.MULTILINE | re.VERBOSE,
)
_SUFFIXES = ("ing", "ed", "es", "er", "ly", "s")


def words(text: str) -> list[str]:
    """Lower-case words of `text` in order; punctuation and mark-up are not words."""
    return [word.replace("’", "'") for word in _WORD.findall(text.lower())]


def stem(word: str) -> str:
    """A crude stem: equal for the usual endings of one word ("bake", "baked"; "egg", "eggs").

    At least three letters stay. Some different words share a stem ("planes", "plan"), which is
    harmless for counting mentions.
    """
    word = word.removesuffix("'s").replace("z", "s")
    word = re.sub(r"our$", "or", word)
    if len(word) > 4 and word.endswith("ies"):
        word = word[:-3] + "y"
    else:
        for suffix in _SUFFIXES:
            if word.endswith(suffix) and not word.endswith("ss") and len(word) - len(suffix) >= 3:
                word = word[: -len(suffix)]
                break
    if len(word) > 3 and word.endswith("e"):
        word = word[:-1]
    if len(word) > 3 and word[-1] == word[-2]:
        word = word[:-1]
    return word[:-1] + "i" if len(word) > 3 and word.endswith("y") else word


def content_stems(text: str) -> set[str]:
    """Distinct stems of the words of `text` that are neither stop words nor a single letter."""
    return {stem(word) for word in words(text) if len(word) > 1 and word not in STOP_WORDS}


def coverage(prompt: str, completion: str) -> float:
    """Part in [0, 1] of the prompt's content words that the completion mentions.

    1.0 for a prompt without content words: there is no topic to miss.
    """
    asked = content_stems(prompt)
    return len(asked & content_stems(completion)) / len(asked) if asked else 1.0


def brevity(count: int) -> float:
    """1 for 5 to 40 words, falling on a line to 0 at 80 words; 0 below 5 words."""
    if count < SHORTEST:
        return 0.0
    return min(1.0, max(0.0, (LONGEST - count) / (LONGEST - LONGEST_FREE)))


def conciseness(completion: str) -> float:
    """`brevity` of a completion's number of words, in [0, 1]."""
    return brevity(len(words(completion)))


def repeated_part(sequence: Sequence[str], size: int = 3) -> float:
    """Part in [0, 1) of the runs of `size` words that occurred before; 0 without any run."""
    runs = [tuple(sequence[i : i + size]) for i in range(len(sequence) - size + 1)]
    return 1.0 - len(set(runs)) / len(runs) if runs else 0.0


def everyday_gold(prompt: str, completion: str, finished: bool) -> float:
    """Score in [-1.5, 3], without unit: how well a completion answers an everyday prompt briefly.

        on topic:   finished + substance * (brevity + topic) - markup - repetition
        otherwise:  -1.5

    on topic    the completion mentions at least a quarter of the prompt's content words
    finished    1 if the model ended its turn by itself, 0 if it was cut
    topic       coverage of the prompt's content words / 0.6, at most 1
    substance   distinct content words that are not the prompt's / 5, at most 1: an answer that only
                repeats the question or its keywords has none, and earns neither topic nor brevity
    brevity     1 for 5 to 40 words, down to 0 at 80 words; 0 below 5 words, which are no answer
    markup      0.25 for each list item, heading or bold span, at most 0.5
    repetition  part of the word trigrams that occurred before, at most 0.5

    An on-topic finished answer scores at least 0 and any on-topic one at least -1, so an empty or
    off-topic completion never wins. The rule reads words, not meaning: it cannot see a false
    answer. Rounded to 4 decimals, so that a stored value compares equal on every machine.
    """
    share = coverage(prompt, completion)
    said = words(completion)
    if not said or share < ON_TOPIC_COVERAGE:
        return FLOOR
    new = content_stems(completion) - content_stems(prompt)
    substance = min(1.0, len(new) / FULL_SUBSTANCE)
    topic = min(1.0, share / FULL_COVERAGE)
    marks = len(_MARKS.findall(completion))
    markup = LARGEST_PENALTY * min(1.0, marks / MARKS_FOR_FULL_PENALTY)
    repetition = min(LARGEST_PENALTY, repeated_part(said))
    score = float(finished) + substance * (brevity(len(said)) + topic) - markup - repetition
    return round(score, 4)
