"""Answers to problems of mathematics, compared by hand; the shapes are those of MATH's and GSM8K's answers."""

from __future__ import annotations

import math
import time

import pytest

from align.rewards.base import Conversation
from align.rewards.build import RewardHost, components
from align.rewards.mathematics import math_answer, same_answer


@pytest.mark.parametrize(
    "one, other",
    [
        ("1/2", "0.5"),
        (r"\frac{1}{2}", "0.5"),
        (r"\dfrac12", r"\tfrac{1}{2}"),
        (r"\frac 3 4", "0.75"),
        (r"\frac{-1}{2}", r"-\frac{1}{2}"),
        (r"\frac{\sqrt{3}}{2}", r"\sqrt{3}/2"),
        (r"\frac{1}{\sqrt 2}", r"\frac{\sqrt{2}}{2}"),  # rationalised
        (r"\sqrt[3]{-8}", "-2"),
        (r"6\sqrt{5}\text{ units}", r"6\sqrt5"),
        ("1,000", "1000"),
        (r"10,\!000", "10000"),
        ("5.", "$5$"),
        (".5", "0.5"),
        ("\u22121", "-1"),
        (r"\$32,348", "32348"),
        (r"50\%", "50"),
        (r"90^\circ", "90"),
        (r"5\text{ cm}", "5"),
        ("x=5", "5"),
        (r"x \in [1,2)", "[1,2)"),
        ("y = 2x+3", "2x+3"),
        (r"1\frac{1}{2}", "3/2"),  # mixed, not a product
        ("2 1/3", "7/3"),
        ("2^{10}", "1024"),
        ("(x+1)^2", "x^2+2x+1"),
        ("2x+3y", "3y+2x"),
        (r"2\pi", "6.283185307179586"),
        ("3+4i", "4i+3"),
        ("(1, 2)", r"\left(1,2\right)"),
        (r"\left(\frac12, 3\right)", "(0.5,3)"),
        ("1,2", "2,1"),  # roots in any order
        (r"11\text{ and }12", "12, 11"),
        (r"\{1,2\}", r"\{2,1\}"),
        (r"(-\infty,2)\cup(3,\infty)", r"(3,\infty) \cup (-\infty, 2)"),
        (r"\begin{pmatrix}1\\2\end{pmatrix}", r"\begin{pmatrix} 1 \\ \frac{4}{2} \end{pmatrix}"),
        (r"\text{Evelyn}", "Evelyn"),
        (r"\text{(A)}", "(A)"),
        ("2516_8", "2516_8"),
    ],
)
def test_the_same_answer(one, other):
    assert same_answer(one, other)
    assert same_answer(other, one)


@pytest.mark.parametrize(
    "one, other",
    [
        ("0.33", "1/3"),
        ("10000000001", "10000000000"),  # exact where both are rational
        ("12", "1 2"),
        ("5", "-5"),
        ("x", "y"),
        ("x", "5"),
        ("a-b", "0"),
        ("a+c", "2b"),
        (r"\sqrt{x^2}", "x"),
        ("x^2", "2x"),
        ("(1,2)", "(2,1)"),
        ("[1,2]", "(1,2)"),
        ("1,2", "1,2,3"),
        ("1,1", "1,2"),
        (r"\{1,2\}", "(1,2)"),
        (r"\begin{pmatrix}1\\2\end{pmatrix}", r"\begin{pmatrix}1&2\end{pmatrix}"),
        ("Evelyn", "Angela"),
        ("east", "seat"),  # words are no products of letters
        ("2516_8", "2516"),
        (r"\frac{1}{0}", r"\frac{2}{0}"),
        ("", "5"),
        ("", ""),
    ],
)
def test_other_answers(one, other):
    assert not same_answer(one, other)
    assert not same_answer(other, one)


@pytest.mark.parametrize(
    "text",
    [
        "9" * 5000,
        "2^{99999999999}",
        "9^{9^{9^9}}",
        "(" * 390,
        "{" * 5000,
        ",".join("12" * 200),
        "(" * 5000 + "1,2)" * 5000,
    ],
)
def test_what_a_policy_may_write_costs_no_time(text):
    start = time.process_time()
    assert not same_answer(text, "5")
    assert time.process_time() - start < 1.0


@pytest.mark.parametrize(
    "completion, answer, score",
    [
        (r"Half of it is $\boxed{\frac{1}{2}}$.", "0.5", 1.0),
        (r"First \boxed{3}, then \boxed{x^{2}+\frac{1}{x}}", r"x^2+\frac1x", 1.0),  # the last box, braces balanced
        (r"\boxed{4}", r"We find $\boxed{4}$.", 1.0),  # the row's answer may be a solution of MATH
        ("2 + 3 = 5\n#### 5", 5, 1.0),
        ("It is 6.", "5", 0.0),
        ("I do not know.", "5", 0.0),
    ],
)
def test_math_answer(completion, answer, score):
    assert math_answer(completion, answer) == score


def test_in_its_process_a_row_without_an_answer_has_no_score():
    rewards = components(
        {"correct": {"_target_": "align.rewards.mathematics.math_answer", "seconds": 20.0}}, RewardHost()
    )
    rows = [
        Conversation("", r"\boxed{1/2}", True, fields={"answer": "0.5"}),
        Conversation("", r"\boxed{1/2}", True, fields={"answer": None}),
        Conversation("", r"\boxed{1/2}", True, fields={}),
    ]
    scores = rewards.score(rows)[:, 0].tolist()
    rewards.close()
    assert scores[0] == 1.0
    assert all(math.isnan(score) for score in scores[1:])
