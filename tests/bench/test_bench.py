"""The bench's own side computes DPO, so its figures are about DPO. Needs no TRL."""

from __future__ import annotations

import pytest

from tests.bench import data, report
from tests.bench.sides import ALIGN_VARIANTS, BETA, Align
from tests.test_layouts import gradients, naive_dpo


@pytest.fixture(scope="module")
def measured():
    """What a worker makes of a regime, and loss and gradient from full logits."""
    pairs = data.make_pairs(data.QUICK, 3)
    reference = data.reference_model(data.QUICK.model)
    policy = data.policy_model(reference)
    loss = naive_dpo(policy, pairs, reference, BETA)
    loss.backward()
    truth = gradients(policy)
    policy.zero_grad(set_to_none=True)
    return pairs, policy, reference, float(loss.detach()), truth


@pytest.mark.parametrize("variant", ALIGN_VARIANTS)
def test_every_variant_is_the_naive_dpo_loss(measured, variant):
    # float32: sums of about 100 log-probs near -8 nats are good to 1e-6 of themselves
    pairs, policy, reference, expected, truth = measured
    side = Align(policy, reference)
    side.cache = side.cache_pass(pairs)
    loss = side.loss(variant, pairs)
    loss.backward()
    gradient = gradients(policy)
    policy.zero_grad(set_to_none=True)
    assert expected != pytest.approx(0.693147, rel=1e-4)  # policy and reference differ
    assert float(loss.detach()) == pytest.approx(expected, rel=1e-5)
    assert float((gradient - truth).norm() / truth.norm()) < 1e-4


def test_pairs_have_the_lengths_of_their_regime():
    regime = data.REGIMES["mixed"]
    pairs = data.make_pairs(regime, 4)
    assert data.token_counts(pairs) == {
        "real": 2514,
        "padded": 3360,
        "shared": 1741,
        "completion": 968,
    }
    for row in (row for pair in pairs for row in pair.rows):
        assert regime.completion[0] <= row.targets.sum() <= regime.completion[1]
        assert row.token_ids[-1] == data.EOS
        assert row.token_ids.max() < regime.vocabulary


def test_ratios_are_formed_within_a_round_and_targets_judged_by_their_median():
    cpu = {"trl default": [8.0, 9.0, 20.0], "trl best": [4.0, 4.0, 8.0], "align": [2.0, 2.0, 4.0]}
    figures = {
        "regimes": {"mixed": {"cpu_s": cpu}},
        "memory": {"mixed": {"align": {"dynamic_mib": 6.0}, "trl default": {"dynamic_mib": 10.0}}},
    }
    # 4, 4.5, 5 and 2, 2, 2; memory 0.6
    assert [(t.value, t.met) for t in report.targets(figures)] == [
        (4.5, True),
        (2.0, True),
        (0.6, False),
    ]
