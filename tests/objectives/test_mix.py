"""Weighted sums of objectives: terms, columns, step values, and what cannot be summed."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from align import build
from align.config import compose
from align.objectives.imitation import NLL
from align.objectives.losses import Hinge, Sigmoid
from align.objectives.mix import Mix
from align.objectives.preference import AOT, RPO, WPO
from align.objectives.rationale import RDPO, RORPO
from align.objectives.reference_free import ORPO, SimPO
from align.objectives.unpaired import KTO, ApoZeroUnpaired
from align.types import Extras
from tests.conftest import plain_dpo
from tests.objectives.build import reduced, rows_of, stats_of, with_step

DPO_PART, SIMPO = plain_dpo(0.1, Sigmoid(0.0)), SimPO(2.0, 0.3, Sigmoid(0.0))


def random_rows(num_columns, num=4, **fields):
    generator = torch.Generator().manual_seed(0)
    values = [(-3 * torch.rand(1 + i % 3, generator=generator)).tolist() for i in range(num * num_columns)]
    policy, batch = rows_of(values, num_columns, **fields)
    noise = torch.rand(len(policy.token_logps), generator=generator).double()
    return policy, stats_of(policy.token_logps.detach() - noise, batch), batch


def columns(batch, chosen):
    return replace(batch, groups=batch.groups[:, chosen])


def test_dpo_and_nll_is_rpo():
    policy, reference, batch = random_rows(2)
    a, b = Mix(DPO_PART, NLL(), 1.0, 0.2), RPO(0.1, Sigmoid(0.0), "token_mean", 0.2)
    losses = [reduced(o(policy, reference, batch), batch) for o in (a, b)]
    assert losses[0].item() == pytest.approx(losses[1].item(), abs=1e-14)
    gradients = [torch.autograd.grad(x, policy.token_logps, retain_graph=True)[0] for x in losses]
    torch.testing.assert_close(*gradients, rtol=1e-12, atol=1e-15)
    assert set(a(policy, reference, batch).metrics) == set(b(policy, reference, batch).metrics)
    assert (a.kind, a.needs, a.columns, a.step_rows) == ("pair", {"reference"}, (), None)


@pytest.mark.parametrize(
    "first, second, union, of_first, of_second",
    [
        (ORPO(0.1, "whole"), RDPO(0.1, Sigmoid(0.0), 0.1, "nll"), ("chosen_whole", "rationale"), [0, 1, 2], [0, 1, 3]),
        (RDPO(0.1, Hinge(), 0.1, "nll"), ORPO(0.1, "whole"), ("rationale", "chosen_whole"), [0, 1, 2], [0, 1, 3]),
        (ORPO(0.1, "whole"), RORPO(0.1, "whole", 1.0, "rorpo"), ("chosen_whole", "rationale"), [0, 1, 2], [0, 1, 3, 2]),
        (ORPO(0.1, "whole"), NLL(), ("chosen_whole",), [0, 1, 2], [0]),
    ],
)
def test_each_part_reads_its_own_columns(first, second, union, of_first, of_second):
    mix = Mix(first, second, 0.7, 2.0)
    assert mix.columns == union
    policy, reference, batch = random_rows(2 + len(union))
    a, b = columns(batch, of_first), columns(batch, of_second)
    expected = 0.7 * reduced(first(policy, reference, a), a) + 2.0 * reduced(second(policy, reference, b), b)
    assert reduced(mix(policy, reference, batch), batch).item() == pytest.approx(expected.item(), abs=1e-13)


def test_names_that_both_parts_use():
    policy, reference, batch = random_rows(2)
    wpo = WPO(0.1, Sigmoid(0.0), "none", None)
    out = Mix(SIMPO, wpo, 1.0, 1.0)(policy, reference, batch)
    alone = [o(policy, reference, batch).metrics for o in (SIMPO, wpo)]
    assert torch.equal(out.metrics["reward/margin"], alone[0]["reward/margin"])
    assert torch.equal(out.metrics["second_reward/margin"], alone[1]["reward/margin"])
    assert "second_wpo/weight" not in out.metrics
    assert out.by_origin == ("wpo/weight",)
    assert Mix(wpo, wpo, 1.0, 1.0)(policy, reference, batch).by_origin == ("wpo/weight", "second_wpo/weight")


def test_step_values_are_those_of_the_part_that_needs_them():
    policy, reference, batch = random_rows(3)
    aot, rdpo = AOT(0.1, Sigmoid(0.0), False), RDPO(0.1, Sigmoid(0.0), 0.1, "nll")
    for mix in (Mix(aot, rdpo, 1.0, 0.5), Mix(rdpo, aot, 0.5, 1.0)):
        assert mix.step_rows == "examples"
        own = with_step(mix, policy, reference, batch)
        expected = reduced(aot(policy, reference, own), own) + 0.5 * reduced(rdpo(policy, reference, own), own)
        assert reduced(mix(policy, reference, own), own).item() == pytest.approx(expected.item(), abs=1e-14)


def test_labelled_parts():
    labels, extras = torch.tensor([True, False, True, False]), Extras(step_values=torch.full((4, 1), 0.3).double())
    policy, reference, batch = random_rows(1, labels=labels, extras=extras)
    kto, apo = KTO(0.1, 1.0, 1.0), ApoZeroUnpaired(0.1)
    mix = Mix(kto, apo, 1.0, 0.5)
    assert (mix.kind, mix.step_rows) == ("labelled", "mismatched")
    expected = reduced(kto(policy, reference, batch), batch) + 0.5 * reduced(apo(policy, reference, batch), batch)
    assert reduced(mix(policy, reference, batch), batch).item() == pytest.approx(expected.item(), abs=1e-14)
    assert torch.equal(mix.step_values(policy, reference, batch), kto.step_values(policy, reference, batch))


def test_nested():
    policy, reference, batch = random_rows(3)
    orpo = ORPO(0.1, "whole")
    inner = Mix(orpo, NLL(), 1.0, 0.3)
    mix = Mix(DPO_PART, inner, 1.0, 0.5)
    pair = columns(batch, [0, 1])
    parts = ((1.0, DPO_PART, pair), (0.5, orpo, batch), (0.15, NLL(), pair))
    expected = sum(w * reduced(o(policy, reference, b), b) for w, o, b in parts)
    assert reduced(mix(policy, reference, batch), batch).item() == pytest.approx(expected.item(), abs=1e-13)


@pytest.mark.parametrize(
    "first, second, message",
    [
        (DPO_PART, KTO(0.1, 1.0, 1.0), "DPO reads pair examples and objective.second=KTO labelled ones"),
        (KTO(0.1, 1.0, 1.0), NLL(), "KTO reads labelled examples and objective.second=NLL single ones"),
        (AOT(0.1, Hinge(), True), AOT(0.1, Hinge(), False), "AOT and AOT both need values of the whole step"),
    ],
)
def test_what_cannot_be_summed(first, second, message):
    with pytest.raises(ValueError, match=message):
        Mix(first, second, 1.0, 1.0)


def test_weights_are_positive():
    with pytest.raises(ValueError, match="objective.second_weight=0: must be greater than 0"):
        Mix(DPO_PART, NLL(), 1.0, 0)


def test_parts_are_chosen_on_the_command_line():
    words = ["objective=mix", "objective@objective.first=simpo", "objective.second_weight=0.2"]
    words += ["objective/loss@objective.first.loss=hinge", "objective.first.gamma_beta_ratio=0.1"]
    assert build.objective(compose(words)) == Mix(SimPO(2.0, 0.1, Hinge()), NLL(), 1.0, 0.2)
