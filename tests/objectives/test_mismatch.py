"""Corrections for the engine's probabilities against three reference implementations, by hand, and what they buy."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from align.objectives.mismatch import (
    Masked,
    SequenceMeanMasked,
    Truncated,
    Uncorrected,
    correction_weights,
    gap_of,
    off_policy_mask,
    weight_totals,
)

VECTORS = json.loads((Path(__file__).parents[1] / "vectors" / "online_public.json").read_text())


def entries(algorithm):
    return [pytest.param(e, id=e["name"]) for e in VECTORS if e["algorithm"] == algorithm]


def f64(values):
    return torch.tensor(values, dtype=torch.float64)


def gap_from(given, mask):
    keep = torch.tensor(mask).bool()
    row = keep.nonzero()[:, 0]
    return gap_of(f64(given["old_log_prob"])[keep], f64(given["rollout_log_prob"])[keep], row, len(keep)), keep


@pytest.mark.parametrize("entry", entries("verl_is_weights"))
def test_verl_weights(entry):
    c = entry["config"]
    gap, keep = gap_from(entry["inputs"], entry["inputs"]["response_mask"])
    correction = Truncated(c["level"], None, c["threshold"], c["batch_normalize"])
    weights, _ = correction_weights(correction, gap)
    if c["batch_normalize"]:
        total, count = weight_totals(correction, weights, gap)
        weights = weights / (total.sum() / count.sum())
    # verl adds 1e-8 to what its means divide by, at least 1, in up to two means
    rtol = 2e-8 if c["batch_normalize"] else 1e-10
    torch.testing.assert_close(weights, f64(entry["expected"]["weights"])[keep], rtol=rtol, atol=0)


TRL_MODES = {
    "token_truncate": lambda low, high: Truncated("token", low, high, False),
    "token_mask": lambda low, high: Masked("token", low, high),
    "sequence_truncate": lambda low, high: Truncated("sequence", low, high, False),
    "sequence_mask": lambda low, high: Masked("sequence", low, high),
}


@pytest.mark.parametrize("entry", entries("trl_is_ratio"))
def test_trl_ratios(entry):
    c = entry["config"]
    gap, keep = gap_from(entry["inputs"], entry["inputs"]["completion_mask"])
    weights, _ = correction_weights(TRL_MODES[c["mode"]](c["clip_min"], c["clip_max"]), gap)
    expected = f64(entry["expected"]["ratio"]).expand(keep.shape)  # of a sequence: [B, 1]
    torch.testing.assert_close(weights, expected[keep], rtol=1e-10, atol=0)


@pytest.mark.parametrize("entry", entries("trl_off_policy_mask"))
def test_trl_off_policy_mask(entry):
    given = entry["inputs"]
    keep = torch.tensor(given["completion_mask"]).bool()
    row = keep.nonzero()[:, 0]
    logps, sampled = f64(given["log_prob"])[keep], f64(given["rollout_log_prob"])[keep]
    mask = off_policy_mask(f64(given["advantages"])[row], logps, sampled, row, 3, entry["config"]["threshold"])
    assert mask.tolist() == f64(entry["expected"]["mask"])[:, 0][row].tolist()


def test_off_policy_mask_by_hand():
    # mean sampled - policy: 0.5, 0.5, 0.1; the second has a positive advantage, the third is near
    row = torch.tensor([0, 0, 1, 2])
    logps, sampled = f64([-1.0, -2.0, -1.0, -1.0]), f64([-0.75, -1.25, -0.5, -0.9])
    advantages = f64([-1.0, -1.0, 1.0, -1.0])
    assert off_policy_mask(advantages, logps, sampled, row, 3, 0.4).tolist() == [0, 0, 1, 1]
    assert off_policy_mask(advantages, logps, sampled, row, 3, 0.6).tolist() == [1, 1, 1, 1]
    # the token without a number counts in no mean: what is left of the first row is 0.25 behind
    sampled[1] = float("nan")
    assert off_policy_mask(advantages, logps, sampled, row, 3, 0.4).tolist() == [1, 1, 1, 1]


RATIOS = f64([4.0, 0.25, 1.5, 0.5, 2.0])  # two tokens, then three: products 1 and 1.5


@pytest.mark.parametrize(
    "correction, expected, changed",
    [
        (Uncorrected(), [1, 1, 1, 1, 1], [0, 0, 0, 0, 0]),
        (Truncated("token", None, 2.0, False), [2, 0.25, 1.5, 0.5, 2], [1, 0, 0, 0, 0]),
        (Truncated("token", 0.5, 2.0, False), [2, 0.5, 1.5, 0.5, 2], [1, 1, 0, 0, 0]),
        (Truncated("sequence", None, 1.25, False), [1, 1, 1.25, 1.25, 1.25], [0, 0, 1, 1, 1]),
        (Masked("token", 0.5, 2.0), [0, 0, 1.5, 0.5, 2], [1, 1, 0, 0, 0]),
        (Masked("sequence", 1.25, 2.0), [0, 0, 1.5, 1.5, 1.5], [1, 1, 0, 0, 0]),
        # the geometric mean of the second is 1.5 ** (1 / 3) = 1.145
        (SequenceMeanMasked(0.9, 1.1), [4, 0.25, 0, 0, 0], [0, 0, 1, 1, 1]),
        (SequenceMeanMasked(0.9, 1.2), [4, 0.25, 1.5, 0.5, 2], [0, 0, 0, 0, 0]),
    ],
)
def test_weights_by_hand(correction, expected, changed):
    gap = gap_of(RATIOS.log(), torch.zeros(5, dtype=torch.float64), torch.tensor([0, 0, 1, 1, 1]), 2)
    weights, moved = correction_weights(correction, gap)
    torch.testing.assert_close(weights, f64(expected), rtol=1e-12, atol=0)
    assert moved.tolist() == [bool(x) for x in changed]


@pytest.mark.parametrize("bad", [float("nan"), float("-inf"), float("inf")])
@pytest.mark.parametrize("level", ["token", "sequence"])
def test_tokens_without_a_number_of_the_engine_are_dropped(bad, level):
    rollout = torch.tensor([-1.0, bad, -1.0])
    gap = gap_of(torch.tensor([-0.5, -1.0, -1.0]), rollout, torch.tensor([0, 0, 1]), 2)
    weights, changed = correction_weights(Truncated(level, None, 3.0, False), gap)
    # a sequence goes on with the tokens that are left
    assert weights.tolist() == pytest.approx([torch.tensor(0.5).exp().item(), 0.0, 1.0])
    assert gap.dropped.tolist() == [False, True, False]
    assert not changed.any()
    assert weight_totals(Truncated(level, None, 3.0, False), weights, gap)[1].tolist() == [1.0, 1.0]


@pytest.mark.parametrize(
    "correction",
    [
        Truncated("token", None, 2.0, False),
        Truncated("sequence", None, 2.0, False),
        Masked("token", 0.5, 5.0),
        Masked("sequence", None, 3.0),
        SequenceMeanMasked(0.999, 1.002),
    ],
)
def test_extreme_gaps_stay_finite(correction):
    trainer = torch.tensor([1e3, -1e3, 1e30, 0.0]).requires_grad_()
    gap = gap_of(trainer, torch.zeros(4), torch.tensor([0, 1, 2, 3]), 4)
    weights, _ = correction_weights(correction, gap)
    assert weights.isfinite().all()
    assert not weights.requires_grad
    assert weights[3] == 1  # no gap, weight exactly 1


@pytest.mark.parametrize("low, high, key", [(2.0, 1.0, "low"), (None, 0.0, "high"), (-1.0, 1.0, "low")])
def test_impossible_thresholds(low, high, key):
    with pytest.raises(ValueError, match=rf"objective\.correction\.{key}="):
        Masked("token", low, high)


def test_bias_of_the_gradient_with_another_engine():
    # 10 arms, drawn from a softmax with noise 0.5 on the logits; gradient of the expected reward, exact expectations:
    # sum over arms of p_engine * weight * reward * grad log p_trainer
    generator = torch.Generator().manual_seed(0)
    worst = {"none": 0.0, "truncated": 0.0, "full": 0.0}
    seen = []
    for _ in range(20):
        logits, noise, reward = (torch.randn(10, generator=generator, dtype=torch.float64) for _ in range(3))
        trainer, engine = logits.log_softmax(0), (logits + 0.5 * noise).log_softmax(0)
        gap = gap_of(trainer, engine, torch.arange(10), 10)
        p = trainer.exp()
        score = torch.eye(10, dtype=torch.float64) - p  # d log p(a) / d logits

        def gradient(weights, engine=engine, reward=reward, score=score):
            return (engine.exp() * weights * reward) @ score

        truth = (p * reward) @ score
        weights = {
            "none": Uncorrected(),
            "truncated": Truncated("token", None, 2.0, False),
            "full": Truncated("token", None, 1e6, False),
        }
        biases = {
            name: ((gradient(correction_weights(c, gap)[0]) - truth).norm() / truth.norm()).item()
            for name, c in weights.items()
        }
        seen.append(biases["none"])
        worst = {name: max(worst[name], bias) for name, bias in biases.items()}
        assert biases["truncated"] <= biases["none"]
    assert sum(seen) / len(seen) > 0.1
    assert worst["truncated"] < 0.5 * worst["none"]
    assert worst["full"] < 1e-12
