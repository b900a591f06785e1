"""Objectives against the reference implementations' vectors and against values derived by hand."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch

from align.objectives.preference import DPO, WPO, Hinge, IpoMean, IpoSum, Robust, Sigmoid
from align.stats import Head, row_sums, token_stats
from align.types import PackedBatch, Stats

VECTORS = json.loads((Path(__file__).parents[1] / "vectors" / "direct_public.json").read_text())
DPO_LOSSES = {
    "sigmoid": lambda _: Sigmoid(0.0),  # TRL ignores label smoothing for this loss
    "hinge": lambda _: Hinge(),
    "ipo": lambda _: IpoMean(),
    "robust": lambda c: Robust(c["label_smoothing"]),
}


def mine(entry) -> bool:
    config = entry["config"]
    if entry["algorithm"] == "dpo":
        return config["loss_type"] in DPO_LOSSES and not {"f_divergence_type", "ld_alpha"} & set(config)
    return entry["algorithm"] in ("cdpo", "ipo_sum", "wpo")


ENTRIES = [e for e in VECTORS if mine(e)]


def tensor(values) -> torch.Tensor:
    return torch.tensor(_finite(values), dtype=torch.float64)


def _finite(v):
    return [_finite(x) for x in v] if isinstance(v, list) else float(v)


def batch_of(lengths: torch.Tensor, row: torch.Tensor) -> PackedBatch:
    """A batch with what objectives read. The vectors hold all chosen rows first, then all rejected."""
    half = len(lengths) // 2
    empty = torch.zeros(0, dtype=torch.long)
    return PackedBatch(
        input_ids=empty, position_ids=empty, segments=(), padded_shape=None, row_lengths=(), target_index=empty,
        target_ids=empty, row=row, lengths=lengths,
        pairs=torch.stack([torch.arange(half), half + torch.arange(half)], 1),
        reference_token_logps=None, sources=("",) * half, origins=("",) * half,
    )  # fmt: skip


def stats_of(token_logps: torch.Tensor, mask: torch.Tensor, **extras: torch.Tensor) -> Stats:
    row = mask.nonzero()[:, 0]
    lengths = mask.sum(1)
    values = token_logps[mask]
    return Stats(values, row_sums(values, row, len(lengths)), lengths, row, **extras)


def objective_of(entry):
    config = entry["config"]
    if entry["algorithm"] == "dpo":
        return DPO(config["beta"], DPO_LOSSES[config["loss_type"]](config))
    if entry["algorithm"] == "cdpo":
        return DPO(config["beta"], Sigmoid(config["label_smoothing"]))
    if entry["algorithm"] == "ipo_sum":
        return DPO(config["beta"], IpoSum())
    return WPO(config["beta"], Sigmoid(config["label_smoothing"]), config["alignment"], config["clamp_max"])


def close(actual: torch.Tensor, expected, tolerance: float = 1e-9) -> None:
    expected = tensor(expected)
    scale = max(1.0, float(expected.abs().max())) if expected.numel() else 1.0
    torch.testing.assert_close(actual.double(), expected, rtol=tolerance, atol=tolerance * scale * 1e-3)


@pytest.mark.parametrize("entry", ENTRIES, ids=lambda e: e["name"])
def test_vector(entry):
    inputs, expected = entry["inputs"], entry["expected"]
    tolerance = 1e-5 if "FLOAT32" in entry["source"] else 1e-9
    objective = objective_of(entry)
    if inputs["layout"] == "pair_tokens":
        leaf = tensor(inputs["policy_token_logps"]).requires_grad_()
        mask = tensor(inputs["token_mask"]).bool()
        policy = stats_of(leaf, mask)
        reference = stats_of(tensor(inputs["ref_token_logps"]), mask)
        gradient = "grad_policy_token_logps"
    else:
        leaf = tensor(inputs["policy_logits"]).requires_grad_()
        # position t is scored by the logits at t - 1
        mask = tensor(inputs.get("completion_mask")).bool()[:, 1:]
        ids = torch.tensor(inputs["input_ids"])[:, 1:]
        identity = Head(torch.eye(leaf.shape[-1], dtype=torch.float64))
        extras = tuple(sorted(objective.needs - {"reference"}))

        def opinion(logits: torch.Tensor) -> Stats:
            values = token_stats(logits[:, :-1][mask], identity, ids[mask], extras, chunk=3)
            row, lengths = mask.nonzero()[:, 0], mask.sum(1)
            return Stats(
                values[0],
                row_sums(values[0], row, len(lengths)),
                lengths,
                row,
                **dict(zip(extras, values[1:], strict=True)),
            )

        policy, reference = opinion(leaf), opinion(tensor(inputs["ref_logits"]))
        gradient = "grad_policy_logits"
    batch = batch_of(policy.lengths, policy.row)
    out = objective(policy, reference, batch)
    losses = out.terms[0].losses
    losses.mean().backward()

    close(losses.mean().detach(), expected["loss"], tolerance)
    close(losses.detach(), expected["per_example_loss"], tolerance)
    close(leaf.grad, expected[gradient], tolerance)
    if "pair_weight" in expected:
        close(out.metrics["wpo/weight"], expected["pair_weight"], tolerance)
    if "seq_weights" in expected:
        close(objective.row_log_weights(policy).exp(), expected["seq_weights"], tolerance)
    if "chosen_rewards" in expected:
        close(out.metrics["reward/chosen"], expected["chosen_rewards"], tolerance)
        close(out.metrics["reward/rejected"], expected["rejected_rewards"], tolerance)
    if "policy_logps" in expected:
        close(policy.logps.detach(), expected["policy_logps"], tolerance)
    if "metrics" in expected:
        close(out.metrics["reward/margin"].mean(), expected["metrics"]["rewards/margins"], tolerance)


def test_all_required_vectors_are_here():
    assert {e["algorithm"] for e in ENTRIES} == {"dpo", "cdpo", "ipo_sum", "wpo"}
    assert len([e for e in ENTRIES if e["algorithm"] == "wpo"]) == len([e for e in VECTORS if e["algorithm"] == "wpo"])


def two_rows(chosen: list[float], rejected: list[float], **extras) -> tuple[Stats, PackedBatch]:
    values = torch.tensor([*chosen, *rejected], dtype=torch.float64, requires_grad=True)
    row = torch.tensor([0] * len(chosen) + [1] * len(rejected))
    lengths = torch.tensor([len(chosen), len(rejected)])
    return Stats(values, row_sums(values, row, 2), lengths, row, **extras), batch_of(lengths, row)


def test_dpo_by_hand():
    # chosen -1 against reference -2, rejected -3 against -1: D = 1 - (-2) = 3; beta 0.5: z = 1.5
    # loss = log(1 + e^-1.5)
    policy, batch = two_rows([-0.5, -0.5], [-3.0])
    reference, _ = two_rows([-1.0, -1.0], [-1.0])
    loss = DPO(0.5, Sigmoid(0.0))(policy, reference, batch).terms[0].losses
    assert loss.item() == pytest.approx(math.log(1 + math.exp(-1.5)), abs=1e-14)


@pytest.mark.parametrize("layout_loss", [Sigmoid(0.0), Sigmoid(0.2)])
def test_equal_networks_give_ln2_and_no_accuracy(layout_loss):
    # a tie is not a win
    policy, batch = two_rows([-0.5, -0.25], [-3.0])
    out = DPO(0.1, layout_loss)(policy, policy, batch)
    assert out.terms[0].losses.item() == pytest.approx(math.log(2), abs=1e-15)
    assert out.metrics["accuracy"].item() == 0.0


def test_gradient_raises_chosen_and_lowers_rejected():
    policy, batch = two_rows([-1.0], [-1.0])
    reference, _ = two_rows([-1.0], [-1.0])
    DPO(0.1, Sigmoid(0.0))(policy, reference, batch).terms[0].losses.sum().backward()
    # -beta s(-z) = -0.05 at z = 0
    assert policy.token_logps.grad.tolist() == pytest.approx([-0.05, 0.05], abs=1e-15)


def test_wpo_weight_by_hand():
    # mean over tokens of logp - log collision: chosen (-1 + 0.6 - 2 + 1)/2 = -0.7, rejected -1.5 + 0.2 = -1.3
    policy, batch = two_rows([-1.0, -2.0], [-1.5], log_collision=torch.tensor([-0.6, -1.0, -0.2]).double())
    objective = WPO(0.1, Sigmoid(0.0), "sampled", 1.0)
    out = objective(policy, policy, batch)
    assert out.metrics["wpo/weight"].item() == pytest.approx(math.exp(-2.0), abs=1e-7)
    assert out.terms[0].losses.item() == pytest.approx(math.exp(-2.0) * math.log(2), abs=1e-7)
    assert out.metrics["reward/margin"].item() == 0.0  # metrics carry no weight


def test_wpo_clamps_the_product_not_the_factors():
    # weights e^0.5 and e^-0.7: product e^-0.2 < 1 stays; clamping each first would give e^-0.7
    policy, batch = two_rows([-0.5], [-1.7], log_collision=torch.tensor([-1.0, -1.0]).double())
    weight = WPO(0.1, Sigmoid(0.0), "sampled", 1.0)(policy, policy, batch).metrics["wpo/weight"]
    assert weight.item() == pytest.approx(math.exp(-0.2), abs=1e-12)


def test_wpo_weight_is_per_token_at_batch_one():
    # open-instruct multiplied sequence sums by a mask: exp of the sum instead of the mean
    policy, batch = two_rows([-0.1] * 20, [-0.1] * 20)
    weight = WPO(0.1, Sigmoid(0.0), "none", None)(policy, policy, batch).metrics["wpo/weight"]
    assert weight.item() == pytest.approx(math.exp(-0.2), abs=1e-12)


def test_empty_completion_has_weight_one_and_poisons_nothing():
    policy, batch = two_rows([], [-1.0])
    out = WPO(0.1, Sigmoid(0.0), "none", None)(policy, policy, batch)
    assert out.metrics["wpo/weight"].item() == pytest.approx(math.exp(-1.0), abs=1e-15)
    assert torch.isfinite(out.terms[0].losses).all()


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: DPO(0.0, Hinge()), "objective.beta=0.0: must be greater than 0"),
        (lambda: Sigmoid(0.5), "label_smoothing=0.5: must be at least 0 and below 0.5"),
        (lambda: WPO(0.1, Hinge(), "sampeld", 1.0), "objective.alignment=sampeld: must be one of"),
        (lambda: WPO(0.1, Hinge(), "greedy", -1.0), "objective.clamp_max=-1.0"),
    ],
)
def test_impossible_values_are_refused(build, message):
    with pytest.raises(ValueError, match=message):
        build()
