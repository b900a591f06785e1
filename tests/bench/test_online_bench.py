"""Both sides of the online benchmark compute the same update: TRL's loss and gradient from align's own parts."""

from __future__ import annotations

import copy
from dataclasses import replace

import numpy as np
import pytest
import torch

from align.objectives.mismatch import Masked
from tests.bench import data, online_report
from tests.bench.online_data import ALGORITHMS, QUICK, REGIMES, clipped, make_groups, token_counts, told_by_engine
from tests.bench.online_sides import ALIGN, TRL, Align, Trl
from tests.bench.online_worker import both_sides, check, sides_of

pytestmark = pytest.mark.slow  # TRL and two networks of each side

# float32 sums of about 240 tokens; what differs is their order. Of a gradient's norm, and of losses near 0.1.
GRADIENT, LOSS = 1e-5, 2e-6
SAMPLES = QUICK.n * QUICK.num_prompts


def apart(found: torch.Tensor, truth: torch.Tensor) -> float:
    return float((found - truth).double().norm() / truth.double().norm())


def update(side, variant, groups) -> tuple[float, torch.Tensor]:
    side.keep = True
    return side.step(variant, groups), side.gradient


@pytest.fixture
def nano():
    """A reference and a policy some way off it."""
    reference = data.reference_model(QUICK.model)
    policy = data.policy_model(reference)
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for p in reference.parameters():
            p.add_(torch.randn(p.shape, generator=generator), alpha=0.3 * float(p.std()))
    return reference, policy


@pytest.fixture(autouse=True)
def trl_as_shipped():
    """What a variant patches in TRL is undone."""
    import trl.trainer.utils as utils

    before = utils._use_triton
    yield
    utils._use_triton = before


@pytest.mark.parametrize("name", ALGORITHMS)
def test_every_variant_takes_trls_step(name):
    regime = replace(QUICK, algorithm=name, layouts=True)
    trl, align, groups = both_sides(regime)
    sides = {variant: trl for variant in TRL} | {variant: align for variant in ALIGN}
    assert set(sides_of(regime, trl, align)) <= set(sides)
    truth_loss, truth = update(trl, "trl default", groups)
    assert float(truth.norm()) > 0.1
    losses = {}
    for variant, side in sides.items():
        losses[variant], gradient = update(side, variant, groups)
        assert apart(gradient, truth) < GRADIENT, variant
    if name == "rloo":
        # TRL: minus the mean of ratio 1 times the advantages, which are 0 on average
        assert losses["trl best"] == pytest.approx(0.0, abs=1e-5)
        # ours: minus the mean over completions of advantage times log-prob, whatever the layout
        assert losses["align padded"] == pytest.approx(losses["align"], rel=1e-6)
    else:
        assert losses == {variant: pytest.approx(truth_loss, abs=LOSS) for variant in sides}


@pytest.mark.parametrize(
    "loss_type, aggregation",
    [
        ("dapo", "token_mean"),
        ("grpo", "sequence_mean_token_mean"),
        ("dr_grpo", "sequence_sum_over_length"),
    ],
)
def test_clipped_losses_with_a_kl_are_trls(nano, loss_type, aggregation):
    """The policy that drew is another one, and so is the reference: ratios are off 1 and many are clipped."""
    reference, policy = nano
    groups = told_by_engine(make_groups(QUICK), policy, noise=0.3)
    algorithm = replace(
        ALGORITHMS["grpo"],
        # see the next test
        settings={"beta": 0.1, "loss_type": loss_type, "epsilon_high": 0.28, "use_bias_correction_kl": False},
        objective=clipped(
            aggregation=aggregation,
            max_length=512 if loss_type == "dr_grpo" else None,
            kl_coefficient=0.1,
            clip_high=0.28,
        ),
    )
    theirs = Trl(copy.deepcopy(policy), copy.deepcopy(reference), algorithm, QUICK.n, SAMPLES)
    drawn = {tuple(c.token_ids): c.logps for g in groups for c in g.completions}

    def with_old(inputs):
        width = inputs["completion_ids"].shape[1]
        lengths = inputs["completion_mask"].sum(1).tolist()
        rows = [drawn[tuple(ids[:k].tolist())] for ids, k in zip(inputs["completion_ids"], lengths, strict=True)]
        padded = torch.tensor([[*row, *[0.0] * (width - len(row))] for row in rows])
        return inputs | {"old_per_token_logps": padded}

    theirs.loss_inputs = with_old
    truth_loss, truth = update(theirs, "trl best", groups)
    metrics = theirs.trainer._metrics["train"]
    assert metrics["clip_ratio/region_mean"][-1] > 0.01
    assert metrics["kl"][-1] > 1e-3

    ours = Align(copy.deepcopy(policy), reference, algorithm, older=True)
    loss, gradient = update(ours, "align", groups)
    assert loss == pytest.approx(truth_loss, abs=LOSS)
    assert apart(gradient, truth) < GRADIENT


def test_trls_own_kl_has_the_gradient_of_k2(nano):
    """TRL multiplies k3 with the ratio, gradient included: k3 + (1 - e^-d) = d, which is what k2 = d^2 / 2 has."""
    reference, policy = nano
    groups = told_by_engine(make_groups(QUICK), policy)
    algorithm = replace(ALGORITHMS["grpo"], settings={"beta": 0.1}, objective=clipped(kl_coefficient=0.1))
    theirs = Trl(copy.deepcopy(policy), copy.deepcopy(reference), algorithm, QUICK.n, SAMPLES)
    truth_loss, truth = update(theirs, "trl best", groups)

    k2 = replace(algorithm, objective=clipped(kl_coefficient=0.1, kl_estimator="k2"))
    _, gradient = update(Align(copy.deepcopy(policy), copy.deepcopy(reference), k2), "align", groups)
    assert apart(gradient, truth) < GRADIENT
    # with k3 the number is TRL's and the gradient is not
    loss, gradient = update(Align(copy.deepcopy(policy), reference, algorithm), "align", groups)
    assert loss == pytest.approx(truth_loss, abs=LOSS)
    assert apart(gradient, truth) > 100 * GRADIENT


def test_an_engines_sequence_beyond_the_limit_is_left_out_by_both(nano):
    _, policy = nano
    algorithm = ALGORITHMS["grpo_engine"]
    groups = told_by_engine(make_groups(QUICK), policy, noise=0.02)
    theirs = Trl(copy.deepcopy(policy), None, algorithm, QUICK.n, SAMPLES)
    _, truth = update(theirs, "trl best", groups)
    assert theirs.trainer._metrics["train"]["sampling/importance_sampling_ratio/min"][-1] == 0
    ours = Align(copy.deepcopy(policy), None, algorithm)
    _, gradient = update(ours, "align", groups)
    assert apart(gradient, truth) < GRADIENT
    # without the limit the sequence counts, so the agreement above is about it
    unlimited = replace(algorithm, objective=clipped(correction=Masked("sequence", None, 1e6)))
    _, other = update(Align(copy.deepcopy(policy), None, unlimited), "align", groups)
    assert apart(other, truth) > 0.05


def test_lora_with_the_adapter_off_as_reference():
    regime = replace(QUICK, algorithm="rloo", lora_rank=4)
    trl, align, groups = both_sides(regime)
    sides = sides_of(regime, trl, align)
    results = check(sides, groups, same_loss=False)
    assert set(results) == {"trl default", "trl best", "align old pass", "align"}
    assert all(r["gradient_apart"] < GRADIENT for r in results.values())
    trained = [p for p in align.model.parameters() if p.requires_grad]
    assert sum(p.numel() for p in trained) < 0.2 * sum(p.numel() for p in align.model.parameters())


def test_a_step_of_the_benchmark_leaves_the_weights_alone(nano):
    _, policy = nano
    groups = told_by_engine(make_groups(QUICK), policy)
    before = policy.state_dict()
    for side, variant in (
        (Trl(copy.deepcopy(policy), None, ALGORITHMS["grpo"], QUICK.n, SAMPLES), "trl best"),
        (Align(copy.deepcopy(policy), None, ALGORITHMS["grpo"]), "align"),
    ):
        side.step(variant, groups)
        assert all(torch.equal(value, before[name]) for name, value in side.model.state_dict().items())


def test_groups_have_the_lengths_of_their_regime():
    regime = REGIMES["long prompt"]
    groups = make_groups(regime)
    # one prompt of 512, eight completions of 64
    assert token_counts(groups) == {"real": 8 * 576, "padded": 8 * 576, "shared": 512 + 8 * 64, "completion": 8 * 64}
    rewards = np.concatenate([g.scores for g in groups])
    assert len(set(rewards.tolist())) == 8


def test_shares_are_formed_within_a_step_and_judged_by_their_median():
    seconds = {"generate": [5.0, 4.0, 8.0], "score": [0.0] * 3, "reference": [0.0] * 3, "update": [4.0, 4.0, 8.0]}
    seconds |= {"sync": [0.0] * 3, "other": [1.0, 0.0, 4.0], "step": [10.0, 8.0, 20.0]}
    # 0.1, 0 and 0.2
    assert online_report.shares(seconds)["other"] == pytest.approx(0.1)
    figures = {"regimes": {}, "steps": {"hf": {"seconds": seconds}}}
    assert "**not met**" in online_report.target_table(figures)
