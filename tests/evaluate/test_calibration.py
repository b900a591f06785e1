"""Probabilities from differences of scores, and intervals over prompts."""

from __future__ import annotations

import math

import numpy as np
import pytest

from align.evaluate.calibration import (
    calibration,
    fitted_temperature,
    log_losses,
    logistic,
    over_prompts,
    reliability,
    resampled_sums,
)
from align.evaluate.passk import bootstrap

LN2 = math.log(2)
LN3 = math.log(3)


def test_losses_by_hand():
    """s(ln 3) = 3/4: the loss is ln(4/3) if chosen is ahead by ln 3, ln 4 if it is behind."""
    assert log_losses(np.array([LN3, -LN3, 0.0])) == pytest.approx([math.log(4 / 3), math.log(4), LN2], abs=1e-15)
    assert log_losses(np.array([-1e4, 1e4])) == pytest.approx([1e4, 0.0])  # no overflow


def test_calibration_by_hand():
    """Three pairs of confidence 3/4, two of them right, and a tie of confidence 1/2 that is half right.

    Brier: (2 * (1/4)^2 + (3/4)^2 + (1/2)^2) / 4 = 15/64. ECE: 3/4 of the pairs are off by 3/4 - 2/3, the tie by 0:
    1/16.
    """
    out = calibration(np.array([LN3, LN3, -LN3, 0.0]), None, 2, fit_temperature=False)
    assert out["log_loss"]["mean"] == pytest.approx((2 * math.log(4 / 3) + math.log(4) + LN2) / 4)
    assert out["brier"]["mean"] == pytest.approx(15 / 64)
    assert out["ece"]["mean"] == pytest.approx(1 / 16)
    first, second = out["bins"]
    assert (first["low"], first["high"], first["count"], first["accuracy"]["mean"]) == (0.5, 0.75, 1, 0.5)
    assert (second["low"], second["high"], second["count"]) == (0.75, 1.0, 3)
    assert second["confidence"] == pytest.approx(0.75)
    assert second["accuracy"]["mean"] == pytest.approx(2 / 3)


def test_the_bins_do_not_depend_on_which_side_is_called_chosen():
    """A pair told from the other side has -d and is wrong where it was right; 1 - share of both mirrors."""
    d = np.random.default_rng(0).normal(0.3, 2, 500)
    bins, confidence, right = reliability(d, 10)
    other_bins, other_confidence, other_right = reliability(-d, 10)
    assert (bins == other_bins).all()
    assert (confidence == other_confidence).all()
    assert (right + other_right == 1).all()
    assert bins.max() == 9
    assert reliability(np.array([800.0]), 10)[0][0] == 9  # confidence 1 belongs to the last bin


def test_temperature_by_hand():
    """d = ln 3 in nine pairs, -ln 3 in one: the best probability is 9/10, so ln 3 / t = ln 9 and t = 1/2."""
    d = np.array([LN3] * 9 + [-LN3])
    assert fitted_temperature(d) == pytest.approx(0.5, rel=1e-10)
    assert fitted_temperature(1e6 * d) == pytest.approx(0.5e6, rel=1e-10)


def test_temperature_is_the_minimum():
    d = np.random.default_rng(1).normal(1, 3, 400)
    t = fitted_temperature(d)
    assert t is not None
    losses = [log_losses(d / (t * f)).mean() for f in (0.99, 1.0, 1.01)]
    assert losses[1] < min(losses[0], losses[2])
    assert t == pytest.approx(4.5, rel=0.3)  # of normal(m, s) the log odds are 2 m d / s^2: t = 9/2


@pytest.mark.parametrize("d", [[1.0, 2.0], [1.0, 0.0], [-1.0, -2.0], [1.0, -1.0], [0.0, 0.0]])
def test_no_finite_temperature(d):
    assert fitted_temperature(np.array(d)) is None
    out = calibration(np.array(d), None, 10, fit_temperature=True)
    assert out["temperature"] is None
    assert "fitted" not in out


def test_fitting_the_temperature_calibrates_scores_of_a_wrong_size():
    """Labels follow s(d), the model says 4 d. The fitted numbers are out of sample, and near those of d itself."""
    rng = np.random.default_rng(2)
    d = rng.normal(0, 1.5, 4000)
    d *= np.where(rng.random(4000) < 1 / (1 + np.exp(-d)), 1, -1)
    out = calibration(4 * d, None, 10, fit_temperature=True)
    assert out["temperature"] == pytest.approx(4, rel=0.1)
    assert out["fitted"]["log_loss"]["mean"] == pytest.approx(log_losses(d).mean(), abs=2e-3)
    assert out["fitted"]["ece"]["mean"] < 0.03 < 0.15 < out["ece"]["mean"]


def test_a_prompt_is_not_judged_by_the_temperature_it_is_in():
    """Two prompts, one with scores ten times as large: fitted numbers are those of the other one's temperature."""
    d = np.array([2.0, 2.0, 2.0, -2.0, 20.0, 20.0, 20.0, -20.0])
    prompts = ["a"] * 4 + ["b"] * 4
    out = calibration(d, prompts, 10, fit_temperature=True)
    t_a, t_b = 2 / LN3, 20 / LN3
    crossed = np.concatenate([d[:4] / t_b, d[4:] / t_a])
    assert out["fitted"]["log_loss"]["mean"] == pytest.approx(log_losses(crossed).mean(), rel=1e-9)


# ---------------------------------------------------------------------- intervals


def test_a_pair_a_prompt_is_the_plain_bootstrap():
    """Same distribution, other draws: the ends agree to the error of 10 000 draws."""
    x = np.random.default_rng(0).normal(0, 1, 200)
    plain, ours = bootstrap(x), over_prompts(x, [str(i) for i in range(200)])
    assert ours.mean == pytest.approx(plain.mean, abs=1e-15)
    assert (ours.low, ours.high) == pytest.approx((plain.low, plain.high), abs=0.005)


def test_both_ways_of_drawing_agree():
    """Few distinct values are drawn as counts, many as prompts; noise of 1e-9 turns the one into the other."""
    x = (np.arange(200) % 4 == 0).astype(float)
    counts = over_prompts(x, None)
    prompts = over_prompts(x + 1e-9 * np.arange(200), None)
    assert (counts.low, counts.high) == pytest.approx((prompts.low, prompts.high), abs=0.011)  # steps of 1/200
    again = over_prompts(x, None)
    assert (again.low, again.high) == (counts.low, counts.high)


def test_pairs_of_a_prompt_stay_together():
    """Every pair ten times over: the same information, hence the same interval, not one sqrt(10) times as narrow."""
    x = np.random.default_rng(3).normal(0, 1, 50)
    once = over_prompts(x, None)
    copies = over_prompts(np.repeat(x, 10), [str(i) for i in np.repeat(np.arange(50), 10)])
    alone = over_prompts(np.repeat(x, 10), None)
    assert copies.high - copies.low == pytest.approx(once.high - once.low, rel=0.03)
    assert alone.high - alone.low < 0.4 * (once.high - once.low)


def test_the_order_of_rows_does_not_matter():
    x = (np.arange(30) % 3 == 0).astype(float)
    prompts = [f"p{i // 2}" for i in range(30)]
    order = np.random.default_rng(0).permutation(30)
    assert over_prompts(x, prompts) == over_prompts(x[order], [prompts[i] for i in order])


def test_intervals_cover():
    """Of 300 data sets of 80 prompts with one to three pairs, 70 % right and alike within a prompt, 95 % of intervals
    hold 0.7; 3 standard errors of the count are 3.8 %, and a percentile interval of 80 prompts is a little short."""
    rng = np.random.default_rng(4)
    hits = 0
    for _ in range(300):
        sizes = rng.integers(1, 4, 80)
        easy = rng.random(80) < 0.5
        right = np.concatenate([rng.random(n) < (0.95 if e else 0.45) for n, e in zip(sizes, easy, strict=True)])
        found = over_prompts(right.astype(float), [str(i) for i in np.repeat(np.arange(80), sizes)])
        hits += found.low <= 0.7 <= found.high
    assert 0.91 <= hits / 300 <= 0.985


def test_one_value():
    found = over_prompts(np.array([0.25]), ["only"])
    assert (found.mean, found.low, found.high) == (0.25, 0.25, 0.25)
    assert resampled_sums(np.array([[1.0, 2.0]]), None, 0).tolist() == [[1.0, 2.0]] * 10_000


# ---------------------------------------------------------------------- logistic regression


def test_one_feature_is_the_temperature():
    """Without a ridge worth the name the coefficient is 1 / t."""
    d = np.random.default_rng(1).normal(1, 3, 400)
    w, _ = logistic(d[:, None], 1e-9, None)
    t = fitted_temperature(d)
    assert t is not None
    assert w[0] == pytest.approx(1 / t, rel=1e-8)


def test_the_ridge_keeps_a_perfect_score_finite():
    """All differences 1, P of them: P s(-w) = ridge w. With P = 4 and ridge 4 s(-1) that is w = 1."""
    w, covariance = logistic(np.ones((4, 1)), 4 / (1 + math.e), None)
    assert w[0] == pytest.approx(1.0, abs=1e-9)
    assert np.isfinite(covariance).all()


def test_regression_finds_what_made_the_labels():
    """Labels from 1.5 x - 0.5 y: of 150 data sets 95 % of normal intervals hold each coefficient."""
    rng = np.random.default_rng(5)
    hits = np.zeros(2)
    for _ in range(150):
        x = rng.normal(0, 1, (300, 2))
        label = rng.random(300) < 1 / (1 + np.exp(-x @ [1.5, -0.5]))
        w, covariance = logistic(np.where(label[:, None], x, -x), 1e-6, None)
        hits += np.abs(w - [1.5, -0.5]) <= 1.96 * np.sqrt(np.diag(covariance))
    assert (hits >= 0.89 * 150).all()
    assert (hits < 150).any()


def test_copies_of_a_pair_do_not_narrow_the_covariance():
    x = np.random.default_rng(6).normal(0.3, 1, (60, 2))
    _, once = logistic(x, 1e-9, None)
    _, copies = logistic(np.repeat(x, 5, axis=0), 5e-9, [str(i) for i in np.repeat(np.arange(60), 5)])
    _, alone = logistic(np.repeat(x, 5, axis=0), 5e-9, None)
    assert copies == pytest.approx(once, rel=1e-6)
    assert alone == pytest.approx(once / 5, rel=1e-6)
