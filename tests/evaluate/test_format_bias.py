"""Patterns against the authors' code; preferences for them counted by hand; probes differ in what they say."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from align.evaluate.format_bias import (
    PATTERNS,
    count,
    data_bias,
    frequencies,
    has,
    model_bias,
    probes,
    style,
    style_differences,
    win_rate,
    words,
)

VECTORS = json.loads((Path(__file__).parents[1] / "vectors" / "reward_public.json").read_text())
FORMAT = next(v for v in VECTORS if v["name"] == "format_patterns")
TEXTS = [
    "The river rises in spring. Snow melts on the hills. Then the lower fields are wet for weeks.",
    "A prime number has two divisors. One of them is the number itself.",
    "Bread needs flour, water, salt and time.",
]


def test_patterns_are_the_authors():
    texts, expected = FORMAT["inputs"]["texts"], FORMAT["expected"]
    assert {name: [has(t, name) for t in texts] for name in PATTERNS} == expected["has"]
    assert [count(t, "list") for t in texts] == expected["count_list"]
    assert [count(t, "bold") for t in texts] == expected["count_bold"]
    assert frequencies(texts) == pytest.approx(expected["percent"] | {"mean_words": expected["mean_words"]}, abs=1e-9)


@pytest.mark.parametrize(
    "text, pattern, expected",
    [
        ("****", "bold", 1),  # empty
        ("**a** and **b**", "bold", 2),
        ("*a*", "bold", 0),
        ("  - indented", "list", 0),
        ("+ a\n12. b\n* c\n-d\n1.e", "list", 3),
        ("sure", "affirmative", 0),  # capital letter
        ("\nSure", "affirmative", 0),
        ("Surely not", "affirmative", 1),
        ("HTTP", "link", 0),
        ("the http protocol", "link", 1),
        ("a!!", "exclamation", 2),
        ("✨ \U0001f680", "emoji", 2),
        ("3 × 4 → 12", "emoji", 0),
    ],
)
def test_pattern_by_hand(text, pattern, expected):
    assert count(text, pattern) == expected
    assert has(text, pattern) == bool(expected)


def test_data_bias_by_hand():
    """Bold: 2 of 4 chosen, 1 of 4 rejected: +25 %. Words: means 2 and 1.5."""
    chosen = ["**a** b", "**a** b", "a b", "a b"]
    rejected = ["**a**", "a", "a b", "a b"]
    found = data_bias(chosen, rejected, None)
    assert (found["bold"]["chosen"], found["bold"]["rejected"], found["bold"]["difference"]["mean"]) == (50, 25, 25)
    assert found["words"]["difference"]["mean"] == 0.5
    assert found["link"]["difference"] == {"mean": 0, "low": 0, "high": 0}
    swapped = data_bias(rejected, chosen, None)
    assert swapped["bold"]["difference"]["mean"] == -25


def test_model_bias_by_hand():
    """Bold stands in one answer alone in the first three pairs, in chosen, rejected, chosen. By differences 1, 1, 0 it
    wins, loses, ties: 1/3, with half a tie 1/2; the labels are for it in 2/3."""
    chosen = ["**a**", "a", "**a**", "**a**"]
    rejected = ["a", "**a**", "a", "**b**"]
    found = model_bias(chosen, rejected, np.array([1.0, 1.0, 0.0, 5.0]), None)
    assert found.keys() == {"bold"}  # no text is longer, nothing else is there
    assert (found["bold"]["count"], found["bold"]["ties"]) == (3, 1)
    assert found["bold"]["win_rate"]["mean"] == pytest.approx(1 / 3)
    assert found["bold"]["win_rate_ties_half"]["mean"] == pytest.approx(1 / 2)
    assert found["bold"]["chosen_rate"]["mean"] == pytest.approx(2 / 3)


def test_length_is_the_longer_answer():
    found = model_bias(["a b", "a", "a b"], ["a", "a b c", "c d"], np.array([1.0, -2.0, 3.0]), None)["length"]
    assert found["count"] == 2  # equal lengths are left out
    assert found["win_rate"]["mean"] == 1.0
    assert found["chosen_rate"]["mean"] == 0.5


def test_the_bias_does_not_depend_on_which_answer_is_called_chosen():
    rng = np.random.default_rng(0)
    chosen = [TEXTS[i % 3] + (" **x**" if rng.random() < 0.5 else "") for i in range(60)]
    rejected = [TEXTS[(i + 1) % 3] + (" **x**" if rng.random() < 0.5 else "") for i in range(60)]
    d = rng.normal(0, 1, 60)
    one, other = model_bias(chosen, rejected, d, None), model_bias(rejected, chosen, -d, None)
    assert one["bold"]["win_rate"] == other["bold"]["win_rate"]
    assert one["length"]["win_rate"] == other["length"]["win_rate"]


# ---------------------------------------------------------------------- probes


def test_a_probe_differs_in_its_pattern_and_in_no_other():
    found = probes(TEXTS, seed=0)
    assert len(found) == len(TEXTS) * (len(PATTERNS) + 1)
    for row in found:
        name, edited, plain = row["pattern"], row["chosen"], row["rejected"]
        assert row["subset"] == f"probe/{name}"
        assert plain in TEXTS
        if name == "length":
            assert words(edited) > words(plain)
            assert set(edited.split()) == set(plain.split())  # nothing new is said
        else:
            assert has(edited, name)
            assert not has(plain, name)
        assert all(count(edited, other) == count(plain, other) for other in PATTERNS if other != name)


def test_bold_changes_marks_alone():
    for row in probes(TEXTS, seed=3):
        if row["pattern"] == "bold":
            assert row["chosen"].replace("**", "") == row["rejected"]


def test_a_text_that_has_the_pattern_makes_no_probe_of_it():
    kinds = [row["pattern"] for row in probes(["Sure! See **this** at http://x.y."], seed=0)]
    assert set(kinds) == {"emoji"}  # longer or as a list, another count changes
    assert probes(["", "  \n"], seed=0) == []


def test_probes_are_the_same_for_a_seed_and_a_place():
    assert probes(TEXTS, seed=1) == probes(TEXTS, seed=1)
    assert probes(TEXTS, seed=1) != probes(TEXTS, seed=2)
    first = [row for row in probes(TEXTS, seed=1) if row["rejected"] == TEXTS[0]]
    assert first == probes(TEXTS[:1], seed=1)
    assert {row["prompt"] for row in probes(TEXTS, 0, prompts=["x", "y", "z"])} == {"x", "y", "z"}


def test_scores_with_a_known_taste_are_found_out():
    """A score of 1 for bold and nothing else: bold wins all of its probes, exclamation marks and length tie in all."""
    rows = probes([f"{t} Part {i} ends here." for t in TEXTS for i in range(10)], seed=0)
    for name, rate, half in (("bold", 1.0, 1.0), ("exclamation", 0.0, 0.5), ("length", 0.0, 0.5)):
        part = [row for row in rows if row["pattern"] == name]
        d = np.array([float(has(r["chosen"], "bold")) - has(r["rejected"], "bold") for r in part])
        found = win_rate(d, None)
        assert found["count"] == 30
        assert (found["win_rate"]["mean"], found["win_rate_ties_half"]["mean"]) == (rate, half)


# ---------------------------------------------------------------------- style


def test_style_differences_by_hand():
    chosen, rejected = "# a\n- **b** c", "a b c"  # words 5 and 3, bold 1 and 0, list 1 and 0, headers 1 and 0
    assert style_differences([chosen], [rejected])[0] == pytest.approx([2 / 8, 1, 1, 1])
    assert style_differences([rejected], [chosen])[0] == pytest.approx([-2 / 8, -1, -1, -1])
    assert style_differences(["a"], ["b"])[0] == pytest.approx([0, 0, 0, 0])


def pairs(num: int, seed: int) -> tuple[list[str], list[str], np.ndarray, np.ndarray]:
    """Answers of random length and boldness, the true quality difference, and the style difference in words."""
    rng = np.random.default_rng(seed)
    texts = [
        [("**b** " if rng.random() < 0.5 else "") + "w " * int(rng.integers(5, 60)) for _ in "ab"] for _ in range(num)
    ]
    quality = rng.normal(0, 1, num)
    label = rng.random(num) < 1 / (1 + np.exp(-2 * quality))
    sides = [(a, b) if keep else (b, a) for (a, b), keep in zip(texts, label, strict=True)]
    chosen, rejected = (list(side) for side in zip(*sides, strict=True))
    return chosen, rejected, np.where(label, quality, -quality), style_differences(chosen, rejected)[:, 0]


def test_a_score_that_is_quality_keeps_its_coefficient():
    """log odds = 2 quality, of mean square 1: the coefficient in units of the root mean square is 2."""
    chosen, rejected, quality, _ = pairs(2000, 0)
    found = style(quality, chosen, rejected, [str(i) for i in range(2000)])
    score = found["coefficients"]["score"]
    assert score["low"] < 2 * score["unit"] < score["high"]
    assert found["coefficients"]["words"]["low"] < 0 < found["coefficients"]["words"]["high"]
    assert "header" not in found["coefficients"]  # no text has one
    assert found["accuracy_without_style"]["mean"] == pytest.approx((quality > 0).mean(), abs=0.01)
    assert found["accuracy_of_style"]["mean"] == pytest.approx(0.5, abs=0.05)


def test_a_score_that_is_length_has_nothing_left():
    """Labels that follow length: the score d = length is right as often, and without style it decides nothing."""
    chosen, rejected, _, _ = pairs(600, 1)
    sides = [(c, r) if words(c) >= words(r) else (r, c) for c, r in zip(chosen, rejected, strict=True)]
    chosen, rejected = (list(side) for side in zip(*sides, strict=True))
    length = style_differences(chosen, rejected)[:, 0]
    found = style(3 * length, chosen, rejected, [str(i) for i in range(600)])
    assert (length > 0).mean() > 0.95
    assert found["accuracy_without_style"]["mean"] == 0.0  # all ties
    assert found["accuracy_of_style"]["mean"] > 0.9


def test_a_taste_for_length_on_top_of_quality_is_taken_away():
    """d = quality + 5 * length: plain accuracy falls below that of quality, without style most of it is back."""
    chosen, rejected, quality, length = pairs(2000, 2)
    d = quality + 5 * length
    found = style(d, chosen, rejected, [str(i) for i in range(2000)])
    best, plain = (quality > 0).mean(), (d > 0).mean()
    assert plain < best - 0.1
    assert found["accuracy_without_style"]["mean"] > best - 0.02
    # holding length equal, the score is quality again: log odds 2 d - 10 length
    assert found["coefficients"]["words"]["high"] < 0


def test_style_of_ties_and_of_plain_texts():
    same = style(np.zeros(3), ["a b", "a b", "a"], ["a", "a", "a b"], ["1", "2", "3"])
    assert "score" not in same["coefficients"]
    plain = style(np.array([1.0, -1.0, 2.0]), ["a"] * 3, ["b"] * 3, ["1", "2", "3"])
    assert plain["coefficients"].keys() == {"score"}
    assert "accuracy_without_style" not in plain
