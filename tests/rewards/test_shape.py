"""Length and form terms by hand."""

from __future__ import annotations

import pytest

from align.rewards.base import Conversation
from align.rewards.shape import Format, Repetition, SoftOverlong, TargetLength, finished


@pytest.mark.parametrize(
    "length, score",
    [(1, 0.0), (16384, 0.0), (17408, -0.25), (18432, -0.5), (20480, -1.0), (20481, -1.0), (99999, -1.0)],
)
def test_soft_overlong_with_the_papers_numbers(length, score):
    # L_max - L_cache = 16384; (16384 - 17408) / 4096 = -0.25
    assert SoftOverlong(max_tokens=20480, buffer_tokens=4096)("text", [0] * length) == score


@pytest.mark.parametrize("length, score", [(0, -1.0), (4, -0.75), (10, 0.0), (12, -0.25), (18, -1.0), (50, -1.0)])
def test_target_length(length, score):
    assert TargetLength(tokens=10, width=8)("" if length == 0 else "text", [0] * length) == score


def test_a_completion_without_its_tokens_has_no_length():
    with pytest.raises(ValueError, match="without its tokens"):
        SoftOverlong(max_tokens=8, buffer_tokens=4)("text", [])


def test_finished():
    assert finished([Conversation("", "", True), Conversation("", "", False)]) == [1.0, 0.0]


@pytest.mark.parametrize(
    "completion, score",
    [("<think>a\nb</think>c", 1.0), ("<think>a</think>", 0.0), (" <think>a</think>c", 0.0), ("", 0.0)],
)
def test_format_is_of_all_of_the_completion(completion, score):
    assert Format(pattern="<think>.*</think>.+")(completion) == score


def test_repetition():
    # a b c, b c a, c a b, a b c: one of four came before
    assert Repetition(size=3)("A b c, a b c.") == -0.25
    assert Repetition(size=3)("a b") == 0.0
    assert Repetition(size=1)("a a a a") == -0.75


@pytest.mark.parametrize(
    "make",
    [
        lambda: SoftOverlong(max_tokens=4, buffer_tokens=5),
        lambda: SoftOverlong(max_tokens=4, buffer_tokens=0),
        lambda: TargetLength(tokens=3, width=0),
        lambda: Format(pattern="["),
        lambda: Repetition(size=0),
    ],
)
def test_impossible_settings(make):
    with pytest.raises(ValueError, match="must be|is no regular"):
        make()
