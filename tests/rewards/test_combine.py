"""Ensembles' scores by hand, against the reference vectors, and by what must change nothing."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from align.evaluate.best_of_n import select
from align.rewards.combine import (
    aligned,
    combined,
    disagreement,
    incomplete,
    mean,
    median,
    uncertainty,
    worst,
)

VECTORS = json.loads((Path(__file__).parents[1] / "vectors" / "reward_public.json").read_text())
ENTRIES = [e for e in VECTORS if e["algorithm"] == "ensemble_combine"]
SCORES = np.array([[1.0, 0.0, 4.0], [3.0, 0.0, -2.0], [5.0, 0.0, 1.0], [7.0, 8.0, 1.0]])


@pytest.mark.parametrize("entry", ENTRIES, ids=lambda e: e["name"])
def test_vectors(entry):
    scores, wanted = np.array(entry["inputs"]["member_scores"]), entry["expected"]
    coefficient = entry["config"]["uwo_lambda"]
    found = {
        "mean": combined(scores, "mean", coefficient, 0),
        "wco": combined(scores, "worst", coefficient, 0),
        "uwo_population_variance": combined(scores, "uncertainty", coefficient, 0),
        "median": combined(scores, "median", coefficient, 0),
    }
    if wanted["uwo_sample_variance"] is None:
        with pytest.raises(ValueError, match="ddof=1: one member has no variance"):
            combined(scores, "uncertainty", coefficient, 1)
    else:
        found["uwo_sample_variance"] = combined(scores, "uncertainty", coefficient, 1)
    for name, values in found.items():
        np.testing.assert_allclose(values, wanted[name], rtol=0, atol=1e-9, err_msg=name)


def test_there_are_vectors():
    assert len(ENTRIES) == 4


def test_by_hand():
    """Columns: 1 3 5 7, mean 4, variance 5 (ddof 0), 20/3 (1); 0 0 0 8, mean 2, variance 12, 16; 4 -2 1 1, mean 1,
    variance 4.5, 6."""
    np.testing.assert_allclose(mean(SCORES), [4, 2, 1])
    np.testing.assert_allclose(worst(SCORES), [1, 0, -2])
    np.testing.assert_allclose(median(SCORES), [4, 0, 1])
    np.testing.assert_allclose(uncertainty(SCORES, 0.5, 0), [1.5, -4, -1.25])
    np.testing.assert_allclose(uncertainty(SCORES, 0.5, 1), [4 - 10 / 3, -6, -2])
    np.testing.assert_allclose(disagreement(SCORES), np.sqrt([5, 12, 4.5]))


def test_a_coefficient_of_zero_is_the_mean():
    np.testing.assert_array_equal(uncertainty(SCORES, 0.0, 0), mean(SCORES))
    np.testing.assert_array_equal(uncertainty(SCORES, 0, 1), mean(SCORES))
    assert not np.allclose(uncertainty(SCORES, 1.0, 0), mean(SCORES))  # what the authors' code makes of 0


@pytest.mark.parametrize("how", ["mean", "worst", "uncertainty", "median"])
def test_the_order_of_members_and_completions_changes_nothing(rng, how):
    scores = rng.normal(size=(5, 40))
    members, completions = rng.permutation(5), rng.permutation(40)
    before = combined(scores, how, 0.5, 0)
    after = combined(scores[members][:, completions], how, 0.5, 0)
    np.testing.assert_allclose(after, before[completions], rtol=0, atol=1e-12)
    # members that agree have nothing to combine
    np.testing.assert_allclose(combined(np.tile(scores[:1], (5, 1)), how, 0.5, 0), scores[0], rtol=0, atol=1e-12)


def test_uncertainty_falls_with_the_coefficient_and_a_shift_of_all_members_shifts_it(rng):
    scores = rng.normal(size=(3, 20))
    values = [uncertainty(scores, c, 0) for c in (0, 0.1, 1, 10)]
    assert all((b < a).all() for a, b in zip(values, values[1:], strict=False))
    np.testing.assert_allclose(uncertainty(scores + 1e6, 0.5, 0), values[0] - 0.5 * scores.var(0) + 1e6, atol=1e-8)


@pytest.mark.parametrize("how", ["mean", "worst", "uncertainty", "median"])
@pytest.mark.parametrize("missing", [np.nan, np.inf, -np.inf])
def test_a_member_s_missing_score_is_the_ensemble_s(how, missing):
    scores = SCORES.copy()
    scores[2, 1] = missing
    found = combined(scores, how, 0.5, 0)
    assert np.isnan(found).tolist() == [False, True, False]
    np.testing.assert_array_equal(found[[0, 2]], combined(SCORES, how, 0.5, 0)[[0, 2]])
    assert incomplete(scores).tolist() == [False, True, False]
    assert np.isnan(disagreement(scores)).tolist() == [False, True, False]
    assert np.isnan(combined(np.full((2, 3), missing), how, 0.5, 0)).all()


def test_settings_without_a_value():
    with pytest.raises(ValueError, match="coefficient=-0.1: must be a finite number, at least 0"):
        uncertainty(SCORES, -0.1, 0)
    with pytest.raises(ValueError, match="coefficient=nan"):
        uncertainty(SCORES, np.nan, 0)
    with pytest.raises(ValueError, match="ddof=2: must be 0"):
        uncertainty(SCORES, 0.5, 2)
    with pytest.raises(ValueError, match="ddof=1: one member has no variance"):
        uncertainty(SCORES[:1], 0.5, 1)
    np.testing.assert_array_equal(uncertainty(SCORES[:1], 0.5, 0), SCORES[0])
    with pytest.raises(ValueError, match="combine=wco: must be one of mean, worst, uncertainty, median"):
        combined(SCORES, "wco", 0.5, 0)
    with pytest.raises(ValueError, match=r"\[members, completions\] .* found \(3,\)"):
        mean(SCORES[0])


def in_order(files: list[dict], coefficient: float | None) -> dict:
    """Best-of-n's input for one prompt: ascending by the ensemble, gold beside it."""
    answers = [f["answers"] for f in files]
    scores = aligned(answers, [f["proxy_scores"] for f in files])
    gold = aligned(answers, [f["gold_scores"] for f in files])[0]
    proxy = mean(scores) if coefficient is None else uncertainty(scores, coefficient, 0)
    order = np.argsort(proxy, kind="stable")
    return {
        "answers": [answers[0][i] for i in order],
        "proxy_scores": proxy[order].tolist(),
        "gold_scores": gold[order].tolist(),
    }


def test_gold_scores_go_with_their_answers():
    (entry,) = (e for e in VECTORS if e["algorithm"] == "ensemble_bon_alignment")
    files = [member[0] for member in entry["inputs"]["member_files"]]
    for found in (in_order(files, None), in_order(files, 0.0)):
        wanted = entry["expected"]["correct"]
        assert found["answers"] == wanted["answers"]
        assert found["gold_scores"] == wanted["gold_scores"]
        np.testing.assert_allclose(found["proxy_scores"], wanted["proxy_scores"], rtol=0, atol=1e-9)
        # the authors' code leaves gold as the first member had it, and takes 0 for 1
        assert found["gold_scores"] != entry["expected"]["reference_output"][0]["gold_scores"]
        assert found["proxy_scores"] != pytest.approx(
            entry["expected"]["reference_output_UWO_weight0"][0]["proxy_scores"]
        )


def test_equal_answers_keep_scores_of_their_own():
    """Three times "a", told by place: the authors' search by text gives each of them the first one's score."""
    same = [["a", "b", "a", "a"], ["a", "b", "a", "a"]]
    found = aligned(same, [[1.0, 2.0, 3.0, 4.0], [5.0, 6.0, 7.0, 8.0]])
    assert found.tolist() == [[1.0, 2.0, 3.0, 4.0], [5.0, 6.0, 7.0, 8.0]]
    assert select(mean(found)) == 3
    # another order: the k-th "a" of one is the k-th "a" of the other
    found = aligned([same[0], ["b", "a", "a", "a"]], [[1.0, 2.0, 3.0, 4.0], [6.0, 5.0, 7.0, 8.0]])
    assert found[1].tolist() == [5.0, 6.0, 7.0, 8.0]


def test_members_about_other_answers_are_refused():
    with pytest.raises(ValueError, match="member 2 is about other answers than member 1"):
        aligned([["a", "b"], ["a", "c"]], [[1.0, 2.0], [1.0, 2.0]])
    with pytest.raises(ValueError, match="member 2 is about other answers"):
        aligned([["a", "b"], ["a"]], [[1.0, 2.0], [1.0]])
    with pytest.raises(ValueError, match="member 1 has 1 scores of 2 answers"):
        aligned([["a", "b"]], [[1.0]])
