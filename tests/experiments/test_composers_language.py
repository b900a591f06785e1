"""What the experiments on composers with language measure, by hand; the training itself is `make experiments`."""

from __future__ import annotations

import math

import pytest

from tests.experiments import constrained_language, dynamic_language, verses

LOVE, HEART = 3.2, 3.2  # of VADER's lexicon
COMPOUND = 2 * LOVE / math.sqrt((2 * LOVE) ** 2 + 15)  # of "love love"


def test_warmth_counts_a_word_again_and_leaves_cold_ones_out():
    assert verses.warmth(["love", "Love, love!", "hate", ""]) == pytest.approx(
        [math.log(1 + LOVE), math.log(1 + 2 * LOVE), 0, 0]
    )


def test_brevity_counts_words():
    assert verses.brevity(["", "and it came to pass,", "a " * 24]) == pytest.approx([1, 0.75, -0.2])


def test_gold_likes_neither_repetition_nor_an_unnatural_length():
    twelve = "love and the of to in that it he his for unto"
    once, twice = verses.pleasing([twelve, "love love"])
    assert once == pytest.approx(LOVE / math.sqrt(LOVE**2 + 15), abs=1e-4)  # VADER rounds to 4 digits
    assert twice == pytest.approx(COMPOUND * (1 / 2) * (2 / 12), abs=1e-4)
    assert verses.pleasing([""]) == [0.0]


def test_held_out_prompts_begin_no_taught_verse():
    rest, held = verses.split()
    assert not {row["prompt"] for row in held} & {row["prompt"] for row in rest}
    assert all(len(row["prompt"].split()) == 4 for row in rest + held)
    assert 200 < len(held) <= verses.NUM_HELDOUT


def evaluated(step, warmth, brevity, gold):
    return {
        "step": step, "heldout/warmth": warmth, "heldout/brevity": brevity, "heldout/pleasing": gold,
        "kl/reference": 1.0, "multiplier/warmth": 0.5, "multiplier/brevity": 0.5, "time/step_s": 30.0,
    }  # fmt: skip


def test_the_end_is_the_mean_of_the_last_evaluations_and_the_peak_the_highest():
    rows = [evaluated(k, 1.0, 0.4, gold) for k, gold in ((10, 0.1), (20, 0.5), (30, 0.3), (40, 0.2), (50, 0.1))]
    rows.insert(1, {"step": 11, "multiplier/warmth": 0.6, "multiplier/brevity": 0.5, "time/step_s": 30.0})
    got = constrained_language.course(rows)
    assert got["steps"] == [10, 20, 30, 40, 50]
    assert got["multipliers"]["warmth"] == [0.5, 0.6, 0.5, 0.5, 0.5, 0.5]
    assert got["minutes"] == 3
    figures = constrained_language.figures(got)
    assert (figures["peak"], figures["peak_step"]) == (0.5, 20)
    assert figures["pleasing"] == pytest.approx(0.2)


def test_mu_may_be_above_its_thresholds_and_xi_may_not():
    theta, band = constrained_language.THRESHOLDS, constrained_language.BANDS
    high = {name: theta[name] + 2 * band[name] for name in theta}
    low = {name: theta[name] - 2 * band[name] for name in theta}
    assert all(constrained_language.held("mu", high).values())
    assert not any(constrained_language.held("xi", high).values())
    assert not any(constrained_language.held("mu", low).values())
    assert all(constrained_language.held("xi", theta).values())


def test_claims_are_by_seed():
    theta = constrained_language.THRESHOLDS
    fallen, risen = {"peak": 0.5, "pleasing": 0.1, **theta}, {"peak": 0.5, "pleasing": 0.45, **theta}
    got = constrained_language.claims(
        {"sum": {1: fallen, 2: risen}, "mu": {1: risen, 2: fallen}, "xi": {1: risen, 2: risen}}
    )
    by = {claim: list(seeds.values()) for claim, seeds in got.items()}
    assert next(iter(by.values())) == [True, False]
    assert by["mu: gold ends above the sum's"] == [True, False]
    assert by["xi: gold ends above the sum's"] == [True, False]
    assert [v for claim, v in by.items() if claim.startswith("mu: gold ends less")] == [[True, False]]


def test_the_mean_over_steps_is_by_trapezoids():
    curve = [{"step": 0.0, "hypervolume": 0.0}, {"step": 5.0, "hypervolume": 0.2}, {"step": 20.0, "hypervolume": 0.4}]
    assert dynamic_language.mean_area(curve) == pytest.approx((5 * 0.1 + 15 * 0.3) / 20)


def test_differences_are_paired_by_seed_and_only_of_whole_seeds():
    def family(volumes, done=2):
        return {"by_seed": {str(k): {"hypervolume": v, "runs": 2, "done": done} for k, v in volumes.items()}}

    front = {
        "first": "fixed",
        "families": {"fixed": family({1: 0.1, 2: 0.2}), "gradient": family({1: 0.4, 2: 0.1, 3: 9.0})},
    }
    assert dynamic_language.paired(front, "hypervolume")["gradient"] == pytest.approx([0.3, -0.1])
    front["families"]["gradient"] = family({1: 0.4}, done=1)
    assert dynamic_language.paired(front, "hypervolume")["gradient"] == []
