"""Ranking accuracy against the vectors and by hand, and the toy that shows how it differs from reward accuracy."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from align.evaluate.ranking import (
    as_dict,
    difficulty,
    ideal_log_ratio,
    ideally_ranked,
    lines,
    loss_threshold,
    ranked,
    ranking_report,
    rewarded,
)
from align.evaluate.samples import paired_bootstrap

VECTORS = json.loads((Path(__file__).parents[1] / "vectors" / "direct_public.json").read_text())
ENTRIES = [e for e in VECTORS if e["algorithm"] == "ranking_accuracy"]


def columns(inputs: dict, a: str, b: str) -> np.ndarray:
    return np.array([inputs[a], inputs[b]], dtype=float).T


@pytest.mark.parametrize("entry", ENTRIES, ids=lambda e: e["name"])
def test_vector(entry):
    inputs, expected = entry["inputs"], entry["expected"]
    policy = columns(inputs, "policy_chosen_logps", "policy_rejected_logps")
    reference = columns(inputs, "ref_chosen_logps", "ref_rejected_logps")
    lengths = columns(inputs, "chosen_lengths", "rejected_lengths")
    agreement = np.array(inputs["alpha_chosen_preferred"])
    assert ranked(policy).mean() == expected["ranking_accuracy"]
    assert ranked(policy, lengths).mean() == expected["ranking_accuracy_normalized"]
    assert rewarded(policy, reference).mean() == expected["dporm_accuracy"]
    for beta in entry["config"]["beta_grid"]:
        ratio = ideal_log_ratio(reference, agreement, beta)
        np.testing.assert_allclose(ratio, expected[f"ideal_log_ratio_beta{beta}"], rtol=1e-9)
        right = ideally_ranked(reference, agreement, beta)
        assert right.mean() == pytest.approx(expected[f"ideal_ranking_accuracy_beta{beta}"], rel=1e-12)
    np.testing.assert_allclose(loss_threshold(reference, 0.1), expected["dpo_loss_threshold_beta0.1"], rtol=1e-9)
    report = ranking_report(policy, reference, lengths, agreement)
    assert report.ranking.mean == expected["ranking_accuracy"]
    assert [beta for beta, _ in report.ideal] == entry["config"]["beta_grid"]
    assert [share.mean for _, share in report.ideal] == pytest.approx(
        [expected[f"ideal_ranking_accuracy_beta{beta}"] for beta in entry["config"]["beta_grid"]]
    )


def test_two_vectors_were_found():
    assert len(ENTRIES) == 2


def test_a_tie_ranks_rightly_and_earns_no_reward():
    """The definitions differ: >= for the ranking, > for the reward."""
    same = np.array([[-3.0, -3.0]])
    assert ranked(same).tolist() == [True]
    assert rewarded(same, same).tolist() == [False]


def test_per_token_ranking_by_hand():
    """-12 in 4 tokens is -3 per token, -10 in 2 tokens is -5: the shorter wins in sum, the longer per token."""
    logps, lengths = np.array([[-12.0, -10.0]]), np.array([[4, 2]])
    assert ranked(logps).tolist() == [False]
    assert ranked(logps, lengths).tolist() == [True]
    assert ranked(np.array([[0.0, -1.0]]), np.array([[0, 1]])).tolist() == [True]  # no token: no division by 0


def test_difference_not_quotient_of_log_probs():
    """The authors' un-normalised branch divides log-probs: -1 / -2 < 1 would be the wrong way round."""
    reference = np.array([[-1.0, -2.0]])
    assert ideal_log_ratio(reference, np.array([0.5]), 1.0).tolist() == [1.0]
    assert difficulty(reference).tolist() == [-1.0]


def test_full_agreement_is_always_ranked_and_no_agreement_never_moves():
    reference = np.array([[-900.0, -1.0], [-3.0, -3.0], [-2.0, -3.0]])
    assert ideally_ranked(reference, np.ones(3), 10.0).tolist() == [True] * 3
    assert ideally_ranked(reference, np.full(3, 0.5), 0.01).tolist() == [False, False, True]


@pytest.mark.parametrize("agreement", [0.49, 1.01])
def test_agreement_out_of_range(agreement):
    with pytest.raises(ValueError, match=r"must be in \[0.5, 1\]"):
        ideal_log_ratio(np.zeros((1, 2)), np.array([agreement]), 1.0)


@pytest.mark.parametrize("beta", [0.05, 1.0])
def test_loss_below_threshold_exactly_when_ranked(rng, beta):
    policy, reference = rng.normal(size=(2, 400, 2)) * 20
    ratios = policy - reference
    losses = np.logaddexp(0, -beta * (ratios[:, 0] - ratios[:, 1]))
    assert ((losses <= loss_threshold(reference, beta)) == ranked(policy)).all()


def test_report_by_hand():
    """Four pairs; the reference is wrong on the last three, with c = 1, 2, 6: the easier half is {1, 2}.

    The policy ranks pairs 0 and 1 rightly, so 1 of 3 flips: 1 of the easier 2, 0 of the harder 1. Rewards are the
    changes of the difference: 0 (tie, wrong), 2, 1, 3.
    """
    reference = np.array([[-1.0, -2.0], [-3.0, -2.0], [-4.0, -2.0], [-8.0, -2.0]])
    policy = np.array([[-1.0, -2.0], [-2.0, -3.0], [-3.0, -2.0], [-5.0, -2.0]])
    agreement = np.array([np.nan, 0.5, 1.0, np.nan])
    report = ranking_report(policy, reference, np.full((4, 2), 2), agreement, ["in", "in", "out", "out"])
    assert (report.ranking.mean, report.reference_ranking.mean, report.reward.mean) == (0.5, 0.25, 0.75)
    assert report.reward_minus_ranking.mean == 0.25
    assert report.num_wrong_before == 3
    assert report.flipped is not None
    assert report.flipped_easy is not None
    assert report.flipped_hard is not None
    assert report.flipped.mean == pytest.approx(1 / 3)
    assert (report.flipped_easy.mean, report.flipped_hard.mean) == (0.5, 0.0)
    assert report.num_agreement == 2
    assert {share.mean for _, share in report.ideal} == {0.5}
    assert [(name, share.mean) for name, share in report.reward_by_set] == [("in", 0.5), ("out", 1.0)]
    text = "\n".join(lines(report))
    assert "ranking accuracy 50.0% [" in text
    assert "flipped 33.3%" in text
    assert "2 pairs with agreement: min 50.0%, median 50.0%, max 50.0%" in text
    assert json.loads(json.dumps(as_dict(report)))["reward_by_set"]["out"]["mean"] == 1.0


def test_report_when_nothing_can_flip_and_nobody_was_asked():
    logps = np.array([[-1.0, -2.0]])
    report = ranking_report(logps, logps, np.ones((1, 2)), None)
    assert (report.flipped, report.flipped_easy, report.flipped_hard) == (None, None, None)
    assert report.ideal == ()
    text = "\n".join(lines(report))
    assert "ranks every pair rightly" in text
    assert "no pair has one" in text


def test_interval_is_that_of_resampled_pairs(rng):
    """The counts of distinct values are resampled; the pairs themselves give the same quantiles but for noise."""
    policy, reference = rng.normal(size=(2, 300, 2))
    report = ranking_report(policy, reference, np.ones((300, 2)), None)
    direct = paired_bootstrap(ranked(policy), rewarded(policy, reference))
    assert report.reward_minus_ranking.mean == pytest.approx(direct.mean)
    # means are multiples of 1/300; the noise of a 2.5 % quantile of 10 000 draws, about 0.001, may move it by one
    assert report.reward_minus_ranking.low == pytest.approx(direct.low, abs=0.006)
    assert report.reward_minus_ranking.high == pytest.approx(direct.high, abs=0.006)
    assert report == ranking_report(policy, reference, np.ones((300, 2)), None)


def test_refusals():
    good = np.zeros((2, 2))
    with pytest.raises(ValueError, match="found"):
        ranking_report(good, good, np.ones((2, 1)), None)
    with pytest.raises(ValueError, match="P at least 1"):
        ranking_report(good[:0], good[:0], good[:0], None)
    with pytest.raises(ValueError, match="found"):
        ranking_report(good, good, good, None, sets=["in"])
    with pytest.raises(ValueError, match="pair 1 is not finite"):
        ranking_report(np.array([[0, 0], [np.nan, 0]]), good, good, None)


def log_softmax(logits: np.ndarray) -> np.ndarray:
    logits = logits - logits.max(-1, keepdims=True)
    return logits - np.log(np.exp(logits).sum(-1, keepdims=True))


@pytest.mark.parametrize("seed", range(4))
def test_dpo_on_a_softmax_policy_learns_rewards_before_rankings(seed):
    """60 prompts, 12 responses each with 16 features; the policy is a softmax of a linear score, trained by DPO.

    The reference prefers other features than the raters. Reward accuracy is near 1 while many pairs that the
    reference ranks wrongly stay wrong, and those with the smaller c flip first.
    """
    rng = np.random.default_rng(seed)
    features = rng.normal(size=(60, 12, 16))
    start = rng.normal(size=16) * 1.5
    utility = features @ (rng.normal(size=16) - 0.3 * start)
    chosen = np.where(utility[:, 0] > utility[:, 1], 0, 1)
    pairs = np.stack([chosen, 1 - chosen], 1)
    prompts = np.arange(60)

    def logps(weights: np.ndarray) -> np.ndarray:
        return log_softmax(features @ weights)[prompts[:, None], pairs]

    reference, weights, beta = logps(start), start.copy(), 0.5
    # the normaliser cancels in the difference of two log-probs, so its gradient is that of the linear scores
    difference = features[prompts, pairs[:, 0]] - features[prompts, pairs[:, 1]]
    for _ in range(400):
        ratios = logps(weights) - reference
        z = beta * (ratios[:, 0] - ratios[:, 1])
        weights += 0.1 * beta * (difference / (1 + np.exp(z))[:, None]).mean(0)
    report = ranking_report(logps(weights), reference, np.ones((60, 2)), np.full(60, 0.9))
    assert report.reward_minus_ranking.low > 0.1
    assert report.ranking.mean > report.reference_ranking.mean
    assert report.flipped_easy is not None
    assert report.flipped_hard is not None
    assert report.flipped_easy.mean > report.flipped_hard.mean
