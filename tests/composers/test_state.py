"""What holds for every option: a resumed composer is the uninterrupted one, metrics have their names, rows are rows."""

from __future__ import annotations

import json

import pytest
import torch

from align.composers.base import NEEDS, TARGETS
from tests.composers.parts import NAMES, OPTIONS, call, observed, option

STEPS = 9
stems = pytest.mark.parametrize("stem", [p.stem for p in OPTIONS])


def drive(composer, first, last):
    """Metrics and mixed streams of the steps, bit for bit."""
    out = []
    for step in range(first, last):
        composer.update(observed(step))
        out.append((composer.metrics(), composer.due, call(composer, seed=step).tolist(), composer.remarks()))
    return out


@stems
def test_a_composer_that_was_saved_goes_on_bit_for_bit(stem):
    whole = drive(option(stem), 0, STEPS)
    for stop in range(STEPS):
        before = option(stem)
        drive(before, 0, stop)
        state = json.loads(json.dumps(before.state_dict()))
        after = option(stem)
        after.load_state_dict(state)
        assert after.metrics() == before.metrics()
        assert drive(after, stop, STEPS) == whole[stop:]
        assert json.loads(json.dumps(before.state_dict())) == state  # the loaded one shares nothing with it


def test_composers_with_a_state_do_move():
    still = {"fixed", "satisficing", "uncertainty", "directional"}
    for path in OPTIONS:
        composer = option(path.stem)
        start = composer.state_dict()
        drive(composer, 0, STEPS)
        assert (composer.state_dict() != start) == (path.stem not in still), path.stem


@stems
def test_metrics_are_named_as_others_rely_on(stem):
    composer = option(stem)
    drive(composer, 0, STEPS)
    found = composer.metrics()
    groups = {"weight", "multiplier", "violation", "threshold", "influence", "pareto", "tchebycheff", "search"}
    assert {name.split("/")[0] for name in found} <= groups
    assert all(isinstance(value, float) for value in found.values())
    if stem.startswith("lagrangian"):
        constrained = [n for n in NAMES if n in composer.thresholds]
        for group in ("multiplier", "violation", "threshold"):
            assert [f"{group}/{n}" in found for n in constrained] == [True] * len(constrained)
    if stem == "gradient":
        assert {f"influence/{n}" for n in NAMES} <= found.keys()
    if stem == "hypervolume":
        assert found["pareto/hypervolume"] > 0
    if stem not in ("satisficing", "directional"):
        assert {f"weight/{n}" for n in composer.streams} <= found.keys()


@stems
def test_what_is_declared_is_known(stem):
    composer = option(stem)
    assert composer.needs <= set(NEEDS)
    assert composer.target in TARGETS
    assert composer.apply in ("now", "next")
    assert len(composer.penalty_signs) == len(composer.streams)
    assert ("gold" in composer.needs) == (composer.gold_metric is not None)


@stems
def test_rows_that_are_not_kept_change_nothing_and_are_0(stem):
    """Padding of any value beside the rows that count, NaN too, without and with whitening."""
    composer = option(stem)
    drive(composer, 0, 3)
    generator = torch.Generator().manual_seed(1)
    streams = torch.randn(6, len(composer.streams), generator=generator, dtype=torch.float64)
    context = None
    if "uncertainty" in composer.needs:
        context = torch.rand(6, generator=generator, dtype=torch.float64)
    if "direction" in composer.needs:
        context = torch.nn.functional.normalize(torch.ones_like(streams), dim=1)
    keep = torch.tensor([True, False, True, True, False, True])
    dirty = streams.clone()
    dirty[~keep] = torch.tensor(float("nan"))
    clean = streams.clone()
    clean[~keep] = 1e6
    found = composer(dirty, keep, context)
    assert found[~keep].eq(0).all()
    assert torch.equal(found, composer(clean, keep, context))
    alone = composer(streams[keep], torch.ones(4, dtype=torch.bool), None if context is None else context[keep])
    torch.testing.assert_close(found[keep], alone, rtol=1e-12, atol=1e-12)


@stems
def test_other_components_than_the_checkpoint_has_are_refused(stem):
    other = option(stem, names=(*NAMES[::-1],)).state_dict()
    with pytest.raises(ValueError, match="composer: the checkpoint has components clear, brief, helpful, the settings"):
        option(stem).load_state_dict(other)


@stems
def test_float32_streams_stay_float32(stem):
    composer = option(stem)
    streams = torch.randn(4, len(composer.streams))
    context = None
    if "uncertainty" in composer.needs:
        context = torch.rand(4)
    if "direction" in composer.needs:
        context = torch.nn.functional.normalize(streams, dim=1)
    assert composer(streams, None, context).dtype == torch.float32
