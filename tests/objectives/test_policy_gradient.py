"""Policy-gradient objectives against the reference implementations, by hand, their terms, refusals and invariances."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from align.objectives.mismatch import Masked, SequenceMeanMasked, Truncated, Uncorrected
from align.objectives.policy_gradient import Clipped, PolicyGradient, kl_estimate
from align.packing import with_extras
from align.sums import positive
from tests.objectives.build import batch_of, select, stats_of

VECTORS = json.loads((Path(__file__).parents[1] / "vectors" / "online_public.json").read_text())
PLAIN = {
    "aggregation": "token_mean", "max_length": None, "kl_coefficient": 0.0, "kl_estimator": "k3",
    "entropy_coefficient": 0.0, "value_coefficient": 0.0, "value_clip": None, "off_policy_threshold": None,
    "correction": Uncorrected(),
}  # fmt: skip
AGGREGATIONS = {
    "token-mean": "token_mean",
    "seq-mean-token-mean": "sequence_mean_token_mean",
    "seq-mean-token-sum": "sequence_mean_token_sum",
    "seq-mean-token-sum-norm": "sequence_sum_over_length",
}


def entries(algorithm):
    return [pytest.param(e, id=e["name"]) for e in VECTORS if e["algorithm"] == algorithm]


def f64(values):
    return torch.tensor(values, dtype=torch.float64)


def plain(**settings):
    return PolicyGradient(**(PLAIN | settings))


def clipped(low=0.2, high=0.2, dual=3.0, **settings):
    return Clipped(**(PLAIN | settings), clip_low=low, clip_high=high, dual_clip=dual)


def packed(values, mask, num_completions=1):
    """A leaf [B, L] of log-probs and a batch of its masked places, its columns the other entries of `values`."""
    keep = torch.tensor(mask).bool()
    row = keep.nonzero()[:, 0]
    logps = f64(values["log_prob"]).requires_grad_()
    columns = {name: f64(column)[keep] for name, column in values.items() if name != "log_prob"}
    batch = batch_of(row, len(keep), num_completions, columns=columns)
    return logps, stats_of(logps[keep], batch), batch


def reduced(out, whole):
    """The share of `out` in the loss of the step `whole`, as the loop computes it: rows are those with targets."""
    counts = {"row": positive((whole.lengths > 0).sum()), "token": positive(whole.lengths.sum())}
    return sum(term.weight * term.losses.sum() / counts[term.unit] for term in out.terms)


def check(objective, logps, policy, batch, entry, scale=1.0, rtol=1e-10):
    """Loss and gradient of a vector. -> the metrics"""
    out = objective(policy, None, batch)
    loss = scale * reduced(out, batch)
    assert loss.item() == pytest.approx(entry["expected"]["loss"], rel=rtol)
    gradient = torch.autograd.grad(loss, logps)[0]
    torch.testing.assert_close(gradient, f64(entry["expected"]["grad_log_prob"]), rtol=rtol, atol=1e-15)
    return out.metrics


def measured(mean, mask):
    """A metric of verl, whose means divide by the number of tokens + 1e-8, with the number alone."""
    count = sum(map(sum, mask))
    return mean * (count + 1e-8) / count


@pytest.mark.parametrize("entry", entries("policy_loss"))
def test_policy_loss(entry):
    c, given, expected = entry["config"], entry["inputs"], entry["expected"]
    columns = {"log_prob": given["log_prob"], "old_logps": given["old_log_prob"], "advantages": given["advantages"]}
    mask, correction = given["response_mask"], Uncorrected()
    if "rollout_is_weights" in given:
        # engine log-probs that give these weights
        ratio = f64(given["rollout_is_weights"]).masked_fill(~torch.tensor(mask).bool(), 1.0)
        columns["rollout_logps"] = (f64(given["old_log_prob"]) - ratio.log()).tolist()
        correction = Truncated("token", None, 1e3, False)
    objective = clipped(
        c["clip_low"], c["clip_high"], c["clip_c"], aggregation=AGGREGATIONS[c["loss_agg_mode"]],
        max_length=c.get("loss_scale_factor"), correction=correction,
    )  # fmt: skip
    logps, policy, batch = packed(columns, mask, num_completions=3)
    # verl divides the sums by the constant only; here they are a mean over completions as well
    scale = 3.0 if c["loss_agg_mode"] == "seq-mean-token-sum-norm" else 1.0
    # verl's mean over a completion divides by its length + 1e-8; the shortest has 4 tokens
    rtol = 1e-8 / 4 if c["loss_agg_mode"] == "seq-mean-token-mean" else 1e-10
    metrics = check(objective, logps, policy, batch, entry, scale, rtol)
    # one example: its mean over tokens is that of all tokens
    clip_fraction = metrics["policy/clip_low"] + metrics["policy/clip_high"]
    assert clip_fraction.item() == pytest.approx(measured(expected["clipfrac"], mask), rel=1e-10)
    assert metrics["policy/clip_dual"].item() == pytest.approx(measured(expected["clipfrac_lower"], mask), rel=1e-10)
    assert metrics["policy/kl_old"].item() == pytest.approx(measured(expected["ppo_kl"], mask), rel=1e-10)


CORRECTIONS = {
    "tis": lambda low, high: Truncated("token", low, high, False),
    "icepop": lambda low, high: Masked("token", low, high),
    "seq-mask-tis": SequenceMeanMasked,
}


@pytest.mark.parametrize("entry", entries("openrlhf_policy_loss_is"))
def test_openrlhf_corrected_policy_loss(entry):
    c, given = entry["config"], entry["inputs"]
    columns = {
        "log_prob": given["log_prob"],
        "old_logps": given["old_log_prob"],
        "rollout_logps": given["rollout_log_prob"],
        "advantages": given["advantages"],
    }
    objective = clipped(c["clip_low"], c["clip_high"], None, correction=CORRECTIONS[c["type"]](*c["threshold"]))
    check(objective, *packed(columns, given["action_mask"]), entry)


@pytest.mark.parametrize("entry", entries("copo_loss"))
def test_copo_loss(entry):
    c, given = entry["config"], entry["inputs"]
    weight = f64(entry["expected"]["local_weight"])
    weight = {"no global": torch.ones_like(weight), "only global": torch.zeros_like(weight)}.get(c["mode"], weight)
    if weight.ndim == 1:
        weight = weight[:, None].expand(f64(given["log_prob"]).shape)
    columns = {
        "log_prob": given["log_prob"],
        "old_logps": given["old_log_prob"],
        "advantages": given["local_advantages"],
        "global_advantages": given["global_advantages"],
        "local_weight": weight.tolist(),
    }
    objective = clipped(c["clip_low"], c["clip_high"], c["clip_c"], aggregation=AGGREGATIONS[c["loss_agg_mode"]])
    out_of = packed(columns, given["response_mask"])
    out = objective(out_of[1], None, out_of[2])
    loss = reduced(out, out_of[2])
    # the file states 1e-8 for this algorithm, whose advantages went through float32
    assert loss.item() == pytest.approx(entry["expected"]["loss"], rel=1e-8)
    gradient = torch.autograd.grad(loss, out_of[0])[0]
    torch.testing.assert_close(gradient, f64(entry["expected"]["grad_log_prob"]), rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("entry", entries("value_loss"))
def test_value_loss(entry):
    given, expected = entry["inputs"], entry["expected"]
    zeros = torch.zeros_like(f64(given["vpreds"])).tolist()
    columns = {"log_prob": zeros, "advantages": zeros, "returns": given["returns"], "old_values": given["values"]}
    _, policy, batch = packed(columns, given["response_mask"], num_completions=3)
    values = f64(given["vpreds"]).requires_grad_()
    policy = replace(policy, values=values[torch.tensor(given["response_mask"]).bool()])
    out = plain(value_coefficient=0.5, value_clip=entry["config"]["cliprange_value"])(policy, None, batch)
    loss = reduced(out, batch) / 0.5
    assert loss.item() == pytest.approx(expected["loss"], rel=1e-10)
    gradient = torch.autograd.grad(loss, values)[0]
    torch.testing.assert_close(gradient, f64(expected["grad_vpreds"]), rtol=1e-10, atol=1e-15)
    fraction = measured(expected["clipfrac"], given["response_mask"])
    assert out.metrics["value/clip_fraction"].item() == pytest.approx(fraction, rel=1e-10)


@pytest.mark.parametrize("entry", entries("kl_estimator"))
def test_kl_estimators(entry):
    logps = f64(entry["inputs"]["logprob"]).requires_grad_()
    kl = kl_estimate(logps, f64(entry["inputs"]["ref_logprob"]), entry["config"]["kind"])
    torch.testing.assert_close(kl.detach(), f64(entry["expected"]["kl"]), rtol=1e-10, atol=1e-15)
    gradient = torch.autograd.grad(kl.sum(), logps)[0]
    torch.testing.assert_close(gradient, f64(entry["expected"]["grad_logprob"]), rtol=1e-10, atol=1e-15)


def test_k3_is_limited():
    # exp(-d) + d - 1 at d = 1, -2, -3 (16.1), -1000 (inf in float32), 1000: at most 10, without a gradient from there
    difference = torch.tensor([1.0, -2.0, -3.0, -1e3, 1e3]).requires_grad_()
    kl = kl_estimate(difference, torch.zeros(5), "k3")
    assert kl.tolist() == pytest.approx([math.exp(-1), math.exp(2) - 3, 10, 10, 10], rel=1e-6)
    gradient = torch.autograd.grad(kl.sum(), difference)[0]
    assert gradient.tolist() == pytest.approx([1 - math.exp(-1), 1 - math.exp(2), 0, 0, 0], rel=1e-6)


LENGTHS = [3, 1, 0, 2, 4, 2]  # three prompts, two completions each: rows 0 and 3, 1 and 4, 2 and 5


def problem(seed=0, lengths=LENGTHS, scale=0.3, **without):
    """Policy with leaves for log-probs, values and entropy, reference, and a batch with every column."""
    g = torch.Generator().manual_seed(seed)
    row = torch.tensor([i for i, n in enumerate(lengths) for _ in range(n)])

    def noise():
        return torch.randn(len(row), generator=g, dtype=torch.float64)

    logps = -noise().abs()
    columns = {
        "advantages": noise(), "old_logps": logps + scale * noise(), "rollout_logps": logps + scale * noise(),
        "returns": noise(), "old_values": noise(), "global_advantages": noise(), "local_weight": noise().sigmoid(),
    }  # fmt: skip
    columns = {name: column for name, column in columns.items() if name not in without}
    batch = batch_of(row, len(lengths), 2, columns=columns)
    extras = {"values": noise().requires_grad_(), "entropy_bonus": noise().abs().requires_grad_()}
    policy = stats_of(logps.requires_grad_(), batch, **extras)
    return policy, stats_of(logps.detach() + scale * noise(), batch), batch


EVERYTHING = {
    "kl_coefficient": 0.1, "kl_estimator": "k2", "entropy_coefficient": 0.2, "value_coefficient": 0.5,
    "value_clip": 0.3, "off_policy_threshold": 0.1,
}  # fmt: skip
CHOICES = [
    clipped(**EVERYTHING, aggregation=aggregation, max_length=7 if "length" in aggregation else None, correction=c)
    for aggregation in AGGREGATIONS.values()
    for c in (Truncated("sequence", 0.5, 1.2, False), SequenceMeanMasked(0.8, 1.2))
] + [plain(**EVERYTHING, correction=Truncated(level, None, 1.1, True)) for level in ("token", "sequence")]


def whole_step(objective, policy, batch):
    if objective.step_rows is None:
        return batch
    values = objective.step_values(policy, None, batch)
    assert not values.requires_grad
    return with_extras(batch, {"step_values": values, "step_index": torch.arange(len(batch.groups))})


def part_of(policy, reference, batch, examples):
    """The examples as a micro-batch, with the columns and statistics that build.select does not know."""

    def chosen(values):
        return select(stats_of(values, batch), batch, examples)[0].token_logps

    stats, part = select(policy, batch, examples)
    stats = replace(stats, values=chosen(policy.values), entropy_bonus=chosen(policy.entropy_bonus))
    columns = {name: chosen(column) for name, column in batch.columns.items()}
    return stats, select(reference, batch, examples)[0], replace(part, columns=columns)


@pytest.mark.parametrize("objective", CHOICES)
@pytest.mark.parametrize("split", [([0], [1], [2]), ([2, 0], [1]), ([2, 1, 0],)])
def test_loss_and_gradients_do_not_depend_on_the_split_or_the_order(objective, split):
    policy, reference, batch = problem()
    batch = whole_step(objective, policy, batch)
    leaves = (policy.token_logps, policy.values, policy.entropy_bonus)
    whole = objective(policy, reference, batch)
    parts = [(part_of(policy, reference, batch, examples), examples) for examples in split]
    outs = [(objective(*part), examples) for part, examples in parts]
    expected = reduced(whole, batch)
    actual = sum(reduced(out, batch) for out, _ in outs)
    assert actual.item() == pytest.approx(expected.item(), rel=1e-12)
    a, e = (torch.autograd.grad(loss, leaves, retain_graph=True) for loss in (actual, expected))
    torch.testing.assert_close(a, e, rtol=1e-11, atol=1e-14)
    for out, examples in outs:
        for name, values in out.metrics.items():
            torch.testing.assert_close(
                values, whole.metrics[name][examples], rtol=1e-12, atol=1e-14, equal_nan=True, msg=name
            )


def test_aggregations_by_hand():
    # losses -A log p: 1, 2, 3 in the first completion, 4 in the second, none in the third
    logps = {"log_prob": [[-1.0, -2.0, -3.0], [-4.0, 0.0, 0.0], [0.0] * 3], "advantages": [[1.0] * 3] * 3}
    _, policy, batch = packed(logps, [[1, 1, 1], [1, 0, 0], [0, 0, 0]])
    expected = {
        "token_mean": 10 / 4,
        "sequence_mean_token_mean": (2 + 4) / 2,
        "sequence_mean_token_sum": (6 + 4) / 2,
        "sequence_sum_over_length": (6 / 5 + 4 / 5) / 2,
    }
    for aggregation, value in expected.items():
        objective = plain(aggregation=aggregation, max_length=5 if "length" in aggregation else None)
        assert reduced(objective(policy, None, batch), batch).item() == value


def test_weights_of_targets_count():
    row = torch.tensor([0, 0, 1])
    batch = batch_of(row, 2, 1, weights=f64([1.0, 3.0, 2.0]), columns={"advantages": f64([1.0, 1.0, 1.0])})
    policy = stats_of(f64([-1.0, -2.0, -4.0]), batch)
    assert plain()(policy, None, batch).terms[0].losses.tolist() == [1.0, 6.0, 8.0]
    means = plain(aggregation="sequence_mean_token_mean")(policy, None, batch).terms[0].losses
    assert means.tolist() == [7 / 4, 4.0]


def test_dual_clip_by_hand():
    # ratio e^2 = 7.4: A < 0 is limited at 3 |A|, A > 0 at 1.28 A
    old, logps = f64([-3.0, -3.0]), f64([-1.0, -1.0]).requires_grad_()
    batch = batch_of(torch.tensor([0, 0]), 1, 1, columns={"advantages": f64([-2.0, 2.0]), "old_logps": old})
    with_limit = clipped(0.2, 0.28, 3.0)(stats_of(logps, batch), None, batch)
    assert with_limit.terms[0].losses.tolist() == pytest.approx([6.0, -2.56], rel=1e-15)
    assert torch.autograd.grad(with_limit.terms[0].losses.sum(), logps)[0].tolist() == [0.0, 0.0]
    without = clipped(0.2, 0.28, None)(stats_of(logps, batch), None, batch)
    assert without.terms[0].losses[0].item() == pytest.approx(2 * math.exp(2), rel=1e-15)
    assert "policy/clip_dual" not in without.metrics
    fractions = [with_limit.metrics[f"policy/clip_{x}"].item() for x in ("low", "high", "dual")]
    assert fractions == [0.0, 0.5, 0.5]


@pytest.mark.parametrize("given", [True, False])
def test_at_ratio_one_the_clipped_gradient_is_the_plain_one(given):
    policy, _, batch = problem(old_logps=None, global_advantages=None)
    if given:
        batch = replace(batch, columns=batch.columns | {"old_logps": policy.token_logps.detach().clone()})
    outs = [objective(policy, None, batch) for objective in (clipped(0.0, 0.0, 1.5), plain())]
    # the value is -A exactly, the gradient -A exactly, even with a clip range of no width
    assert torch.equal(outs[0].terms[0].losses.detach(), -batch.columns["advantages"])
    a, b = (torch.autograd.grad(out.terms[0].losses.sum(), policy.token_logps)[0] for out in outs)
    assert torch.equal(a, b)
    assert torch.equal(a, -batch.columns["advantages"])
    assert outs[0].metrics["policy/kl_old"].tolist() == [0.0, 0.0, 0.0]


def test_a_positive_advantage_raises_the_log_prob():
    for objective in (plain(), clipped()):
        policy, _, batch = problem(old_logps=None, global_advantages=None)
        gradient = torch.autograd.grad(reduced(objective(policy, None, batch), batch), policy.token_logps)[0]
        assert torch.equal(gradient.sign(), -batch.columns["advantages"].sign())


@pytest.mark.parametrize("objective", [*CHOICES, clipped(dual=None)])
@pytest.mark.parametrize("shift", [1e3, -1e3])
def test_extreme_log_ratios_stay_finite(objective, shift):
    policy, reference, batch = problem()
    columns = {name: column.float() for name, column in batch.columns.items()}
    for name in ("old_logps", "rollout_logps"):
        columns[name] = columns[name] + shift * (1 if name == "old_logps" else -1)
    batch = replace(batch, columns=columns)
    leaves = [x.detach().float().requires_grad_() for x in (policy.token_logps, policy.values, policy.entropy_bonus)]
    policy = stats_of(leaves[0], batch, values=leaves[1], entropy_bonus=leaves[2])
    reference = stats_of(reference.token_logps.float() + shift, batch)
    batch = whole_step(objective, policy, batch)
    out = objective(policy, reference, batch)
    loss = reduced(out, batch)
    assert loss.isfinite()
    gradients = torch.autograd.grad(loss, leaves, allow_unused=True, materialize_grads=True)
    assert all(gradient.isfinite().all() for gradient in gradients)
    assert all(values.isfinite().all() for values in out.metrics.values())


@pytest.mark.parametrize("objective", [plain(), clipped(), clipped(correction=Truncated("token", None, 2.0, True))])
def test_no_advantage_no_gradient(objective):
    policy, _, batch = problem(global_advantages=None)
    columns = batch.columns | {"advantages": torch.zeros_like(batch.columns["advantages"])}
    batch = whole_step(objective, policy, replace(batch, columns=columns))
    out = objective(policy, None, batch)
    gradient = torch.autograd.grad(reduced(out, batch), policy.token_logps)[0]
    assert gradient.tolist() == [0.0] * len(gradient)
    assert out.metrics.get("policy/clip_low", torch.zeros(3)).tolist() == [0.0, 0.0, 0.0]


def test_an_example_without_tokens_has_no_metrics_and_no_gradient():
    # rows 1 and 3 are the second prompt's
    policy, reference, batch = problem(lengths=[2, 0, 3, 0])
    out = CHOICES[0](policy, reference, batch)
    assert all(values.isnan().tolist() == [False, True] for values in out.metrics.values())
    assert torch.autograd.grad(reduced(out, batch), policy.token_logps)[0].isfinite().all()


def test_terms_have_the_signs_and_weights_of_the_settings():
    policy, reference, batch = problem(global_advantages=None)
    out = clipped(kl_coefficient=0.1, kl_estimator="k1", entropy_coefficient=0.2, value_coefficient=0.5)(
        policy, reference, batch
    )
    assert [(term.weight, term.unit) for term in out.terms] == [(w, "token") for w in (1.0, 0.1, 0.2, 0.5)]
    torch.testing.assert_close(out.terms[1].losses, policy.token_logps - reference.token_logps)
    torch.testing.assert_close(out.terms[2].losses, -policy.entropy_bonus)
    torch.testing.assert_close(out.terms[3].losses, 0.5 * (policy.values - batch.columns["returns"]).square())
    assert torch.autograd.grad(reduced(out, batch), policy.entropy_bonus)[0].tolist() == pytest.approx([-0.2 / 12] * 12)


def test_needs_follow_the_settings():
    assert plain().needs == {"entropy"}
    assert clipped(**EVERYTHING).needs == {"entropy_bonus", "reference", "values"}
    assert clipped(correction=Truncated("token", None, 2.0, True)).step_rows == "examples"
    assert clipped(correction=Masked("token", None, 2.0)).step_rows is None


def test_a_correction_multiplies_the_policy_loss_only():
    policy, reference, batch = problem(global_advantages=None)
    settings = {"kl_coefficient": 0.1, "entropy_coefficient": 0.2}
    a, b = (
        clipped(**settings, correction=c)(policy, reference, batch) for c in (Uncorrected(), Masked("token", None, 1e6))
    )
    ratio = (batch.columns["old_logps"] - batch.columns["rollout_logps"]).exp()
    torch.testing.assert_close(b.terms[0].losses, a.terms[0].losses * ratio)
    for without, corrected in zip(a.terms[1:], b.terms[1:], strict=True):
        assert torch.equal(without.losses, corrected.losses)


def test_metrics_of_a_correction_by_hand():
    # ratios 4, 1/4 and a token without a number; truncated at 2: weights 2, 1/4, 0
    rollout = f64([-math.log(4), math.log(4), math.nan])
    columns = {"advantages": f64([1.0, 1.0, 1.0]), "old_logps": f64([0.0, 0.0, 0.0]), "rollout_logps": rollout}
    batch = batch_of(torch.tensor([0, 0, 1]), 2, 2, columns=columns)
    out = plain(correction=Truncated("token", None, 2.0, False))(stats_of(f64([-1.0, -1.0, -1.0]), batch), None, batch)
    assert out.terms[0].losses.tolist() == pytest.approx([2.0, 0.25, 0.0], rel=1e-15)
    assert {
        name: values.item() for name, values in out.metrics.items() if name.startswith("rollout/")
    } == pytest.approx(
        {
            "rollout/logp_diff_mean": math.log(4),
            "rollout/weight_ess": 2.25**2 / (3 * (4 + 0.0625)),
            "rollout/weight_max": 4.0,
            "rollout/weight_changed_fraction": 1 / 3,
            "rollout/dropped_fraction": 1 / 3,
        },
        rel=1e-14,
    )


@pytest.mark.parametrize("drawn_by", ["rollout_logps", "old_logps"])
def test_completions_left_behind_are_left_out(drawn_by):
    # the log-prob fell by 0.5 in the first and the second completion; only the first has a negative advantage
    columns = {"advantages": f64([-1.0, -1.0, 1.0]), drawn_by: f64([-0.5, -0.5, -0.5])}
    batch = batch_of(torch.tensor([0, 0, 1]), 2, 2, columns=columns)
    policy = stats_of(f64([-1.0, -1.0, -1.0]), batch)
    out = plain(off_policy_threshold=0.4)(policy, None, batch)
    assert out.terms[0].losses.tolist() == [0.0, 0.0, 1.0]
    assert out.metrics["rollout/off_policy_fraction"].item() == pytest.approx(2 / 3, rel=1e-15)
    both = plain(off_policy_threshold=0.4, correction=SequenceMeanMasked(0.1, 2.0))
    if drawn_by == "rollout_logps":  # ratios e^-0.5 on top
        losses = both(policy, None, batch).terms[0].losses.tolist()
        assert losses == pytest.approx([0.0, 0.0, math.exp(-0.5)], rel=1e-15)


def test_no_number_of_the_engine_does_not_touch_the_loss_without_a_correction():
    policy, _, batch = problem(global_advantages=None)
    columns = batch.columns | {"rollout_logps": torch.full_like(batch.columns["rollout_logps"], math.nan)}
    out = clipped()(policy, None, replace(batch, columns=columns))
    assert reduced(out, batch).isfinite()
    assert out.metrics["rollout/logp_diff_mean"].isnan().all()


def test_value_metrics_give_the_share_of_variance_explained():
    returns = f64([1.0, 2.0, 6.0])
    batch = batch_of(torch.tensor([0, 0, 0]), 1, 1, columns={"advantages": f64([0.0] * 3), "returns": returns})
    policy = replace(stats_of(f64([-1.0] * 3), batch), values=f64([1.0, 3.0, 5.0]))
    metrics = plain(value_coefficient=1.0)(policy, None, batch).metrics
    error, mean, square = (metrics[f"value/{n}"].item() for n in ("error", "returns", "returns_squared"))
    assert 1 - error / (square - mean**2) == pytest.approx(1 - 2 / 14, rel=1e-14)


@pytest.mark.parametrize(
    "settings, missing, word",
    [
        ({}, "advantages", "online run"),
        ({}, "local_weight", "global_advantages"),
        ({"correction": Masked("token", 0.5, 2.0)}, "rollout_logps", "correction=none"),
        ({"value_coefficient": 1.0}, "returns", "objective.value_coefficient=0"),
        ({"value_coefficient": 1.0, "value_clip": 0.2}, "old_values", "objective.value_clip"),
    ],
)
@pytest.mark.parametrize("make", [plain, clipped])
def test_missing_columns_are_named(make, settings, missing, word):
    policy, reference, batch = problem(**{missing: None})
    with pytest.raises(ValueError, match=f"file:1: the rows have no column {missing}, .*{word}"):
        make(**settings)(policy, reference, batch)


def test_kl_without_a_reference_is_refused():
    policy, _, batch = problem()
    with pytest.raises(ValueError, match=r"objective\.kl_coefficient=0\.1 needs a reference"):
        plain(kl_coefficient=0.1)(policy, None, batch)


@pytest.mark.parametrize(
    "settings, key",
    [
        ({"aggregation": "mean"}, "aggregation"),
        ({"kl_estimator": "k4"}, "kl_estimator"),
        ({"kl_coefficient": -1.0}, "kl_coefficient"),
        ({"aggregation": "sequence_sum_over_length"}, "max_length"),
        ({"max_length": 5}, "max_length"),
        ({"value_clip": 0.2}, "value_clip"),
        ({"low": -0.1}, "clip_low"),
        ({"high": math.nan}, "clip_high"),
        ({"dual": 1.0}, "dual_clip"),
        ({"off_policy_threshold": -1.0}, "off_policy_threshold"),
    ],
)
def test_impossible_settings_are_named(settings, key):
    with pytest.raises(ValueError, match=rf"^objective\.{key}="):
        clipped(**settings)
