"""What the experiment measures, on scores written by hand; the training itself is `make experiments`."""

import numpy as np
import pytest

from tests.experiments import kjv, overoptimisation, warm

GOOD, BAD = kjv.Text("good", 0.5), kjv.Text("bad", -0.5)
RIGHT, WRONG = kjv.Pair(GOOD, BAD, False, "train"), kjv.Pair(BAD, GOOD, True, "train")
POOL = tuple(kjv.Text(str(i), i / 300) for i in range(300))
DATA = kjv.Dataset((RIGHT, RIGHT, RIGHT, WRONG, WRONG), (RIGHT, RIGHT), (RIGHT,), POOL, ())


def found(train, pool):
    """Margins of the five training pairs and the pool's scores; one of two held-out pairs is ranked rightly."""
    pairs = {"train": train, "valid": [1.0, -1.0], "ood": [0.0]}
    return {k: np.stack([np.array(v), np.zeros(len(v))], 1) for k, v in pairs.items()} | {"pool": np.array(pool)}


def test_a_pair_is_fitted_where_chosen_is_strictly_above_and_flipped_pairs_count_as_labelled():
    # best of 256 of 300 in gold's own order: C(i - 1, 255) / C(300, 256) sum to the mean highest place, 256 * 301 / 257
    got = warm.figures(DATA, found([1.0, 2.0, -1.0, 3.0, 0.0], [t.gold for t in POOL]))
    want = {"id": 0.5, "ood": 0.0, "clean": 2 / 3, "flipped": 0.5, "gold": (256 * 301 / 257 - 1) / 300}
    assert got == pytest.approx(want, abs=1e-12)


def test_differences_are_paired_by_seed_and_the_gate_is_on_their_sign():
    fits = {0: (0.9, 0.7), 1: (0.8, 0.7)}
    by_seed = {
        seed: {of: dict.fromkeys(warm.MEASURES, value) for of, value in zip(("ensemble", "average"), both, strict=True)}
        for seed, both in fits.items()
    }
    got = warm.differences(by_seed, "average", "ensemble")["flipped"]
    assert got["each"] == pytest.approx([-0.2, -0.1])
    # t of one degree of freedom 12.7062, standard error 0.05
    assert (got["mean"], got["low"], got["high"]) == pytest.approx((-0.15, -0.15 - 0.63531, -0.15 + 0.63531), abs=1e-5)


def test_proxies_are_what_their_names_say():
    got = overoptimisation.proxies(np.array([[0.0, 4.0], [2.0, 0.0]]), np.array([7.0, 8.0]))
    want = {"single": [0, 4], "mean": [1, 2], "WCO": [0, 0], "UWO": [1 - 0.5 * 1, 2 - 0.5 * 4], "WARM": [7, 8]}
    assert {name: values.tolist() for name, values in got.items()} == want


def test_a_fall_that_its_interval_holds_is_not_over_optimisation():
    """Highest at n = 2 with 1.0, then 0.9: chance in [0.7, 1.1], not in [0.85, 0.95]. Highest at the end: no fall."""

    def said(low, high, peak=(2, 1.0)):
        curve = {
            "measured_peak": {"n": peak[0], "gold": peak[1]},
            "lost_after_peak": peak[1] - 0.9,
            "gold": [{"mean": 0.0}, {"mean": 1.0}, {"mean": 0.9, "low": low, "high": high}],
        }
        return overoptimisation.falls({"n": [1, 2, 4], "curves": {"one": curve}}).splitlines()

    assert said(0.7, 1.1) == [
        "- one: mean gold is highest at n = 2 and 0.100 lower at n = 4; the interval there holds the highest mean.",
        "- Over-optimisation, a loss of gold beyond chance, is shown by no curve.",
    ]
    assert said(0.85, 0.95) == [
        "- one: mean gold is highest at n = 2 and 0.100 lower at n = 4; that is over-optimisation."
    ]
    assert said(0.7, 1.1, (4, 0.9)) == ["- Over-optimisation, a loss of gold beyond chance, is shown by no curve."]
