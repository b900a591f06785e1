"""RewardBench's numbers against the authors' code, and by hand where that has none."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest

from align.evaluate.reward_bench import (
    COUNTS,
    PRIOR_SETS,
    SECTIONS,
    SECTIONS_2,
    answers,
    best_of_n,
    leaderboard,
    list_report,
    sections,
    ties,
)

VECTORS = json.loads((Path(__file__).parents[1] / "vectors" / "reward_public.json").read_text())
FULL = next(v for v in VECTORS if v["name"] == "rewardbench_full")
TIES = [v for v in VECTORS if v["algorithm"] == "rewardbench2_ties"]


def test_counts_and_sections_are_the_authors():
    assert FULL["config"]["example_counts"] == COUNTS
    assert {name: list(subsets) for name, subsets in SECTIONS.items()} == FULL["config"]["mapping"]


def test_sections_and_leaderboard():
    accuracies = FULL["inputs"]["subset_accuracy"]
    assert sections(accuracies) == pytest.approx(FULL["expected"]["sections"], abs=1e-9)
    board = leaderboard(accuracies | FULL["inputs"]["prior_sets"])
    assert board == pytest.approx({k: v for k, v in FULL["expected"].items() if k != "sections"}, abs=1e-9)


def test_the_plain_mean_is_not_the_one_with_prior_sets():
    """Both are told. 2, 2, 2, 2, 1 over sections of 1 and prior sets of 0 is 8/9."""
    board = leaderboard({name: 1.0 for name in COUNTS} | {name: 0.0 for name in PRIOR_SETS})
    assert board["overall_with_prior"] == pytest.approx(8 / 9)
    assert board["overall_mean_of_4"] == 1.0


def test_what_is_missing_is_absent_and_not_0():
    """Regression: the authors' helper gives a section without subsets 0."""
    only = {"hep-go": 0.5, "math-prm": 0.9}
    assert sections(only) == {"Reasoning": pytest.approx((0.5 * 164 + 0.9 * 984) / 1148)}
    assert leaderboard(only) == {}
    chat = {name: 1.0 for name in COUNTS}
    three = {name: 0.0 for name in PRIOR_SETS[:3]}
    assert leaderboard(chat | three) == {"overall_with_prior": 1.0, "overall_mean_of_4": 1.0}


# ---------------------------------------------------------------------- ties


@pytest.mark.parametrize("vector", TIES, ids=lambda v: v["name"])
def test_ties(vector):
    assert ties(vector["inputs"]["rows"])["overall"]["mean"] == pytest.approx(vector["expected"]["overall"], abs=1e-9)


def rows(ref: list[float], tied: list[float], number: int = 0) -> list[dict]:
    return [
        {"id": f"ref:{number}", "scores": ref, "num_correct": 1},
        {"id": f"tied:{number}", "scores": tied, "num_correct": 2},
    ]


def test_ties_by_hand():
    """ref: gap 3 - 1 = 2. tied: worst correct 4, best wrong 1, gap 3; spread 5 - 4 = 1. All right, both gaps above the
    spread: 0.3 + 0.3 + 0.2 + 0.2 + 0.01 tanh(2 / 1 - 1)."""
    found = ties(rows([3.0, 1.0], [5.0, 4.0, 1.0]))
    assert found["overall"]["mean"] == pytest.approx(1 + 0.01 * math.tanh(1), abs=1e-12)
    assert found["margin"]["mean"] == pytest.approx(math.tanh(1))


@pytest.mark.parametrize(
    "tied, margin, overall",
    [
        ([2.0, 2.0, 1.0], 1.0, 1.01),  # 1 / 0: tanh of infinity; above 1
        ([2.0, 2.0, 2.0], 0.0, 0.3),  # 0 / 0 counts as 0; ref alone is right
        ([2.0, 2.0, 3.0], -1.0, 0.29),
    ],
)
def test_ties_without_a_spread(tied, margin, overall):
    found = ties(rows([9.0, 1.0], tied))
    assert found["margin"]["mean"] == margin
    assert found["overall"]["mean"] == pytest.approx(overall, abs=1e-12)


def test_margins_need_both_rows():
    """The tied row 1 without its ref row counts for accuracy alone: tied accuracy 1/2, the rest is of number 0."""
    both = rows([3.0, 1.0], [5.0, 4.0, 1.0])
    alone = {"id": "tied:1", "scores": [1.0, 0.0, 2.0], "num_correct": 2}
    found = ties([*both, alone])
    assert found["tied_accuracy"]["mean"] == 0.5
    assert found["gap_above_spread"]["mean"] == 1.0
    assert found["overall"]["mean"] == pytest.approx(0.85 + 0.01 * math.tanh(1), abs=1e-12)
    # regression: NaN in the authors' script where no number has both rows
    assert ties([alone]) == {"count": 1, "numbers": 1, "tied_accuracy": {"mean": 0.0, "low": 0.0, "high": 0.0}}


def test_an_interval_of_ties():
    rng = np.random.default_rng(0)
    many = [r for n in range(60) for r in rows(list(rng.normal(0, 1, 3)), list(rng.normal(0, 1, 5)), n)]
    found = ties(many)["overall"]
    assert found["low"] < found["mean"] < found["high"]
    assert found == ties(many)["overall"]


@pytest.mark.parametrize(
    "change, message",
    [
        ({"id": "other:0"}, 'must be "ref:N" or "tied:N"'),
        ({"id": None}, 'must be "ref:N" or "tied:N"'),
        ({"id": "ref:0"}, "there twice"),
        ({"num_correct": 1}, "at least two in a tied row"),
        ({"num_correct": 3}, "wrong ones"),
    ],
)
def test_bad_ties(change, message):
    first, second = rows([3.0, 1.0], [5.0, 4.0, 1.0])
    with pytest.raises(ValueError, match=message):
        ties([first, second | change])


# ---------------------------------------------------------------------- lists


@pytest.mark.parametrize(
    "scores, right, credit",
    [
        ([2.0, 1.0, 0.0, 1.9], True, 1.0),
        ([2.0, 1.0, 2.0, 0.0], False, 1 / 2),
        ([2.0, 2.0, 2.0, 2.0], False, 1 / 4),  # a constant model has the chance of a guess
        ([1.0, 2.0, 0.0, 0.0], False, 0.0),
    ],
)
def test_best_of_four(scores, right, credit):
    assert best_of_n(scores, 1) == (right, credit)


def test_lists_by_subset():
    """Two of three right, one of them shared with one other: accuracy 1/3, credit (1 + 1/2) / 3."""
    lists = [
        {"scores": s, "num_correct": 1, "subset": "Math"}
        for s in ([3.0, 1.0, 1.0, 1.0], [3.0, 3.0, 1.0, 1.0], [0.0, 1.0, 1.0, 1.0])
    ]
    found = list_report(lists)
    assert found["by_subset"]["Math"]["accuracy"]["mean"] == pytest.approx(1 / 3)
    assert found["by_subset"]["Math"]["credit"]["mean"] == pytest.approx(1 / 2)
    assert (found["by_subset"]["Math"]["count"], found["by_subset"]["Math"]["shared"]) == (3, 1)
    assert "overall" not in found
    assert found["missing"] == [name for name in SECTIONS_2 if name != "Math"]


def test_overall_is_the_plain_mean_of_six():
    """Five subsets of credit 1, 1, 1, 1, 0, whatever their sizes, and Ties at 1 + 0.01 tanh 1."""
    good = {"scores": [1.0, 0.0], "num_correct": 1}
    bad = {"scores": [0.0, 1.0], "num_correct": 1}
    lists = [good | {"subset": name} for name in SECTIONS_2[:4]] + 9 * [bad | {"subset": SECTIONS_2[4]}]
    found = list_report([*lists, *(r | {"subset": "Ties"} for r in rows([3.0, 1.0], [5.0, 4.0, 1.0]))])
    assert found["missing"] == []
    assert found["overall"]["mean"] == pytest.approx((4 + 0 + 1 + 0.01 * math.tanh(1)) / 6, abs=1e-12)


def test_several_correct_answers_outside_ties():
    with pytest.raises(ValueError, match="needs one correct answer"):
        list_report([{"scores": [1.0, 2.0, 0.0], "num_correct": 2, "subset": "Math"}])


def test_answers_are_in_the_order_of_scores():
    assert answers({"chosen": ["a", "b"], "rejected": ["c"]}) == ["a", "b", "c"]
    with pytest.raises(ValueError, match="rejected of a RewardBench 2 row must be a list"):
        answers({"chosen": ["a"], "rejected": "c"})
