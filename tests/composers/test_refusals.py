"""Settings and numbers that cannot be meant: one line that names the setting and the cure, or a remark."""

from __future__ import annotations

import math

import pytest
import torch

from align.composers.base import Observed, tensor
from tests.composers.parts import NAMES, OPTIONS, call, observed, option

MU = {"thresholds": {"helpful": 0.4, "brief": 0.5, "clear": 0.3}}
SETTINGS = [
    ("fixed", {"weights": {"helpful": 0.5, "brief": 0.5}}, "composer.weights.clear is missing"),
    ("fixed", {"weights": {"helpful": 0.5, "brief": 0.5, "clear": 0.5}}, "sum to 1.5; they must sum to 1"),
    ("fixed", {"weights": {"helpful": 1.0, "brief": 0.0, "clear": 0.0, "odd": 0.0}}, "composer.weights.odd: no comp"),
    ("fixed", {"normalise": "batch"}, "composer.normalise=batch: must be one of none, whiten"),
    ("fixed", {"target": "loss"}, "composer.target=loss: must be one of reward, advantage"),
    ("fixed", {"epsilon": 0}, "composer.epsilon=0: must be greater than 0"),
    ("uncertainty", {"weights": {"helpful": -0.5, "brief": 1.0, "clear": 0.5}}, "weights.helpful=-0.5: must be at le"),
    ("uncertainty", {"scale": 0.0}, "composer.scale=0.0: must be greater than 0"),
    ("satisficing", {"thresholds": {"brief": "high"}}, "composer.thresholds.brief=high: must be a finite number"),
    ("gradient", {"weights": {"helpful": 1.0, "brief": 0.0, "clear": 0.0}}, "weights.brief=0: must be greater than 0"),
    ("gradient", {"min_weight": 0.4}, "3 weights within them cannot sum to 1"),
    ("gradient", {"max_weight": 0.3}, "3 weights within them cannot sum to 1"),
    ("gradient", {"accumulate": 0}, "composer.accumulate=0: must be an integer of at least 1"),
    ("gradient", {"apply": "later"}, "composer.apply=later: must be one of now, next"),
    ("gradient", {"measure": "directional"}, "composer.max_norm=1: measure=directional knows no norm of a gradient"),
    ("gradient", {"mu": -1.0}, "composer.mu=-1.0: must be greater than 0"),
    ("fixed", {"weights": 0}, "composer.weights=0: must be numbers by name, as in composer.weights.helpful=1"),
    ("gradient", {"weights": 0}, "composer.weights=0: must be numbers by name, as in composer.weights.helpful=1"),
    ("hypervolume", {"spans": {"helpful": 0.0}}, "composer.spans.helpful=0.0: must be greater than 0"),
    ("hypervolume", {"minimise": ["odd"]}, "composer.minimise=odd: must be one of helpful, brief, clear"),
    ("hypervolume", {"reference": {"helpful": 0.1}}, "composer.reference.brief is missing"),
    ("hypervolume", {"reference": dict.fromkeys(NAMES, math.inf)}, "reference.helpful=inf: must be a finite number"),
    ("tchebycheff", {"form": "smooth"}, "composer.mu=None: form=smooth needs it, and no other reads it"),
    ("tchebycheff", {"mu": 0.1}, "composer.mu=0.1: form=smooth needs it, and no other reads it"),
    ("tchebycheff", {"decay": 1}, "composer.decay=1: values would never move"),
    ("tchebycheff", {"weights": {"helpful": 0.0, "brief": 0.5, "clear": 0.5}}, "weights.helpful=0: must be greater"),
    ("lagrangian_mu", {"thresholds": {"odd": 1}}, "composer.thresholds.odd: no component with a weight has this name"),
    ("lagrangian_mu", {"ranges": {"helpful": [0.5, 1]}}, "thresholds.helpful=0.4: outside composer.ranges.helpful"),
    ("lagrangian_mu", {"ranges": {"helpful": [1, 0]}}, r"ranges.helpful=\[1, 0\]: must be \[low, high\]"),
    ("lagrangian_mu", {"relation": "equal"}, "an equality needs multipliers of both signs; use rule.squash=tanh"),
    ("lagrangian_mu", {"rule": {"squash": "softplus"}}, "composer.mix=complement: the weight of the objective turns n"),
    ("lagrangian_mu", {"objective": {"helpful": 1.0}}, "composer.objective.helpful: has a threshold already"),
    ("lagrangian_mu", {"objective": {"kl": 0.0}}, "composer.objective: nothing is maximised"),
    ("lagrangian_xi", {"relation": "at_least"}, "multipliers of both signs are an equality's"),
    ("lagrangian_log", {"rule": {"initial": 30.0}}, "composer.rule.initial=30: must be at most rule.largest=20"),
    ("lagrangian_pid", {"rule": {"proportional": 0.0, "integral": 0.0}}, "all 0, multipliers cannot move"),
    ("lagrangian_search", {"thresholds": {"helpful": 1.0}}, "they are searched for; take them out"),
    ("lagrangian_search", {"search": {"low": {"helpful": 0.7}}}, "search.low.helpful=0.7: must be below high, 0.6"),
    ("lagrangian_search", {"search": {"max_points": 4}}, "max_points=4: the first simplex has 4"),
    ("lagrangian_search", {"search": {"method": {"contraction": 2}}}, "method.contraction=2: must be between 0 and 1"),
]


@pytest.mark.parametrize("stem, settings, message", SETTINGS, ids=[f"{s}-{m[:40]}" for s, _, m in SETTINGS])
def test_settings(stem, settings, message):
    with pytest.raises(ValueError, match=message) as told:
        option(stem, **settings)
    assert "\n" not in str(told.value)


def test_a_threshold_for_each_component_or_a_reason():
    with pytest.raises(ValueError, match="composer.thresholds.extra is missing: give a threshold, or comp"):
        option("lagrangian_mu", names=(*NAMES, "extra"))
    with pytest.raises(ValueError, match="composer.thresholds: none is given"):
        option("lagrangian_mu", needed=False)


@pytest.mark.parametrize("stem", ["fixed", "gradient", "hypervolume", "tchebycheff", "directional"])
def test_a_single_objective(stem):
    with pytest.raises(ValueError, match="1 component with a weight, nothing to compose; name at least 2"):
        option(stem, names=("alone",))


@pytest.mark.parametrize("names", [("a", "a"), ("a", "kl")])
def test_names_that_clash(names):
    with pytest.raises(ValueError, match="names must differ, and kl is the KL's own"):
        option("fixed", names=names)


@pytest.mark.parametrize("stem", [p.stem for p in OPTIONS])
def test_another_number_of_streams(stem):
    composer = option(stem)
    wrong = torch.zeros(4, len(composer.streams) + 1)
    with pytest.raises(ValueError, match=rf"composer: streams of shape \[4, {wrong.shape[1]}\]; .* columns are needed"):
        composer(wrong)
    with pytest.raises(ValueError, match="composer: a mask of shape"):
        composer(torch.zeros(4, len(composer.streams)), torch.ones(3, dtype=torch.bool))


READERS = [p.stem for p in OPTIONS if p.stem.startswith(("lagrangian", "tchebycheff"))]


@pytest.mark.parametrize("stem", READERS)
def test_a_component_that_is_never_there(stem):
    composer = option(stem)
    before = composer.state_dict()
    with pytest.raises(ValueError, match="the mean reward of brief is no number: .* reward.brief.weight=0"):
        composer.update(Observed(means=tensor([0.5, math.nan, 0.5])))
    assert composer.state_dict() == before


def test_numbers_that_are_none_are_never_learnt_from():
    with pytest.raises(ValueError, match="the held-out mean of clear is no number"):
        option("hypervolume").update(Observed(validation=tensor([0.5, 0.5, math.nan])))
    with pytest.raises(ValueError, match="the influence of helpful is no number"):
        option("gradient").update(Observed(influences=tensor([math.inf, 0.0, 0.0]), learning_rate=1e-6))
    with pytest.raises(ValueError, match="composer: influences without the learning rate"):
        option("gradient").update(Observed(influences=tensor([0.0, 0.0, 0.0])))
    composer = option("lagrangian_search", search={"steps": 1})
    composer.update(observed(0, validation=False))
    with pytest.raises(ValueError, match=r"composer.search.metric=gold: is nan; the search needs a finite number"):
        composer.update(Observed(gold=math.nan))


def test_context_that_is_missing_or_no_direction():
    streams = torch.zeros(4, 3)
    with pytest.raises(ValueError, match="one dispersion is needed for each of 4 rows"):
        option("uncertainty")(streams)
    with pytest.raises(ValueError, match="a direction of 3 numbers is needed"):
        option("directional")(streams)
    with pytest.raises(ValueError, match="a direction of a prompt is no unit vector"):
        option("directional")(streams, None, torch.ones(4, 3))


def test_a_threshold_that_no_completion_reaches_is_remarked_on():
    composer = option("lagrangian_mu", thresholds={"helpful": 40})
    for step in range(12):
        composer.update(observed(step))
    assert len(composer.remarks()) == 1
    assert "composer.thresholds.helpful=40: completions of the first 10 steps had rewards from" in composer.remarks()[0]


def test_a_weight_that_vanishes_is_remarked_on():
    composer = option("gradient", mu=1e-8)
    composer.update(Observed(influences=tensor([1.0, 0.0, 0.0]), learning_rate=1e-6))
    assert "the weight of brief, clear has fallen below 1e-6; set composer.min_weight" in composer.remarks()[0]


def test_an_ideal_that_was_passed_is_remarked_on():
    composer = option("tchebycheff", ideal={"helpful": 0.5, "brief": 1.0, "clear": 1.0})
    composer.update(Observed(means=tensor([0.7, 0.2, 0.2])))
    assert composer.remarks() == [
        "composer.ideal.helpful: the mean reward has passed it; an ideal is a best value that is not reached"
    ]
    assert call(composer) is not None
