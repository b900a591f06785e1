"""Volumes against counting of cells, the front, and where the factor acts."""

from __future__ import annotations

import itertools
import math

import pytest
import torch

from align.advantages.baselines import GRPO, RLOO, ReinforcePlusPlus, ReMax
from align.composers.base import Observed, tensor
from align.composers.hypervolume import contribution, dominates, front, hypervolume
from tests.composers.parts import NAMES, option


def drawn(num, k, seed):
    raw = torch.rand(num, k, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return [tuple(p) for p in (raw * 1.5 - 0.25).tolist()]  # some below the reference point 0


def cells(points, reference):
    """Volume by the grid that all coordinates make: each cell counts if a point dominates its upper corner."""
    inside = [p for p in points if dominates(p, reference)]
    axes = [sorted({r, *(p[i] for p in inside)}) for i, r in enumerate(reference)]
    total = 0.0
    for index in itertools.product(*(range(len(a) - 1) for a in axes)):
        upper = [axis[i + 1] for axis, i in zip(axes, index, strict=True)]
        if any(all(p >= u for p, u in zip(point, upper, strict=True)) for point in inside):
            total += math.prod(axis[i + 1] - axis[i] for axis, i in zip(axes, index, strict=True))
    return total


@pytest.mark.parametrize("k", [1, 2, 3, 4])
def test_volumes_are_those_of_the_grid_and_contributions_their_differences(k):
    origin = (0.0,) * k
    for seed in range(4):
        points = drawn(6, k, seed)
        whole = hypervolume(points, origin)
        assert whole == pytest.approx(cells(points, origin), rel=1e-12, abs=1e-15)
        added = whole - hypervolume(points[:-1], origin)
        assert contribution(points[:-1], points[-1], origin) == pytest.approx(added, abs=1e-14)
        assert hypervolume(front(points), origin) == pytest.approx(whole, rel=1e-14)
        assert hypervolume(points[::-1], origin) == pytest.approx(whole, rel=1e-14)


def test_front_keeps_what_nothing_beats_once():
    points = [(1.0, 1.0), (2.0, 0.5), (1.0, 1.0), (0.5, 0.5), (2.0, 1.0)]
    assert front(points) == [(2.0, 1.0)]
    assert front(points[:3]) == [(1.0, 1.0), (2.0, 0.5)]


def test_a_point_that_does_not_dominate_the_reference_changes_nothing():
    composer = option("hypervolume", names=NAMES[:2], reference={"helpful": 0.5, "brief": 0.5})
    composer.update(Observed(validation=tensor([0.9, 0.4])))
    found = composer.metrics()
    assert (found["pareto/hypervolume"], found["pareto/size"], found["pareto/factor"]) == (0, 0, 0.5)


def test_by_hand_with_spans_and_a_component_to_be_small():
    """Reference (0.5, 100); (0.7, 50) with span 100 on the second, minimised: 0.2 * 0.5 = 0.1."""
    composer = option("hypervolume", names=NAMES[:2], spans={"brief": 100}, minimise=["brief"])
    assert composer.due
    composer.update(Observed(validation=tensor([0.5, 100.0])))
    assert not composer.due
    assert composer.metrics()["pareto/factor"] == 1
    composer.update(Observed(validation=tensor([0.7, 50.0])))
    found = composer.metrics()
    assert found["pareto/contribution"] == pytest.approx(0.1)
    assert found["pareto/factor"] == pytest.approx(0.5 + 1.5 * math.tanh(0.1))
    assert composer.points() == [{"helpful": pytest.approx(0.7), "brief": pytest.approx(50.0)}]
    streams = tensor([[1.0, 3.0]])
    assert float(composer(streams)) == pytest.approx(2.0 * (0.5 + 1.5 * math.tanh(0.1)))


REMOVING = {
    "grpo": GRPO(True, 1e-6, "in_score", None),
    "reinforce_pp": ReinforcePlusPlus(1.0, False, "after_baseline", None, "sample"),
}
KEEPING = {
    "rloo": RLOO("in_score", None),
    "remax": ReMax("to_go", 1.0, None),
    "dr_grpo": GRPO(False, 1e-6, "in_score", None),
}


@pytest.mark.parametrize("name", [*REMOVING, *KEEPING])
def test_a_factor_that_would_be_divided_out_is_refused(name):
    composer = option("hypervolume", target="reward")
    if name in KEEPING:
        composer.check(KEEPING[name], name, False)
        return
    with pytest.raises(ValueError, match=rf"composer.target=reward: has no effect with advantage={name}, .* use "):
        composer.check(REMOVING[name], name, False)
    option("hypervolume", target="reward", allow_no_effect=True).check(REMOVING[name], name, False)
    option("hypervolume").check(REMOVING[name], name, False)  # on advantages it acts


def test_a_reference_that_nothing_dominates_is_remarked_on():
    composer = option("hypervolume", reference=dict.fromkeys(NAMES, 1.0))
    for step in range(3):
        assert composer.remarks() == [], step
        composer.update(Observed(validation=tensor([0.5, 0.5, 2.0])))
    assert "none of the first 3 measurements is better in every component" in composer.remarks()[0]
