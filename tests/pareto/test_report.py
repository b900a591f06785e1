"""Fronts, volumes, costs and intervals of runs written by hand; all values are derived here."""

from __future__ import annotations

import json

import pytest

from align.pareto.plot import draw
from align.pareto.report import dominated, markdown, report, steps_to_front
from tests.pareto.runs import ab, plan_of, write_run

# Seed 0: final points f1 (3, 1) and f2 (1, 2), volume 3 x 1 + 1 x (2 - 1) = 4; g1 (2, 2), volume 4, and g2 (1, 1).
RUNS = {
    "f1": {2: ab(1, 1), 4: ab(3, 1)},
    "f2": {2: ab(1, 2), 4: ab(1, 2)},
    "g1": {2: ab(1, 1), 4: ab(2, 2)},
    "g2": {2: ab(2, 2), 4: ab(1, 1)},
}
PLACES = {"f1": ("fixed", 0), "f2": ("fixed", 0), "g1": ("moving", 0), "g2": ("moving", 0)}


@pytest.fixture
def four(tmp_path):
    for name, evaluations in RUNS.items():
        write_run(tmp_path / name, evaluations)
    return tmp_path


def test_domination_and_ties():
    assert dominated((1.0, 1.0), [(1.0, 1.0)]) is False
    assert dominated((1.0, 2.0), [(1.0, 3.0)]) is True
    assert dominated((1.0, 2.0), [(2.0, 1.0), (0.0, 9.0)]) is False


def test_steps_to_front_counts_from_where_it_stays():
    front = [(2.0, 2.0)]
    assert steps_to_front([(1, (3.0, 0.0)), (2, (1.0, 1.0)), (3, (2.0, 2.0)), (4, (0.0, 5.0))], front) == 3
    assert steps_to_front([(1, (3.0, 3.0)), (2, (1.0, 1.0))], front) is None
    assert steps_to_front([(5, (0.0, 0.0))], []) == 5  # nothing to be dominated by


def test_fronts_volumes_and_steps_by_hand(four):
    data = report(four, plan_of(PLACES))
    fixed, moving = (data["families"][label]["by_seed"]["0"] for label in ("fixed", "moving"))
    assert fixed["hypervolume"] == moving["hypervolume"] == pytest.approx(4)
    assert fixed["front"] == ["f1", "f2"]
    assert moving["front"] == ["g1"]
    assert [(e["name"], e["on_front"], e["steps_to_front"]) for e in data["runs"]] == [
        ("f1", True, 4),  # (1, 1) at step 2 is dominated by f2
        ("f2", True, 2),
        ("g1", True, 4),
        ("g2", False, None),  # (2, 2) at step 2 was not, (1, 1) at the end is
    ]
    assert data["families"]["moving"]["steps_to_front"] == {"runs": 2, "reached": 1, "median": 4}
    assert [e["compared"] for e in data["runs"]] == [True] * 4
    assert data["first"] == "fixed"


def test_compute_is_of_all_runs_of_the_family(four):
    """A step: 4 prompts x 2 completions x 10 tokens in 0.5 s; two runs of 4 steps."""
    found = report(four, plan_of(PLACES))["families"]["fixed"]["by_seed"]["0"]
    assert found["curve"] == [
        {"step": 0, "tokens": 0, "seconds": 0, "hypervolume": 0},
        {"step": 2, "tokens": 320, "seconds": 2, "hypervolume": pytest.approx(2)},  # (1, 1) and (1, 2)
        {"step": 4, "tokens": 640, "seconds": 4, "hypervolume": pytest.approx(4)},
    ]
    assert found["gain_per_million_tokens"] == pytest.approx(4 / 640e-6)
    assert found["gain_per_hour"] == pytest.approx(3600)
    assert found["evaluation_seconds"] == 1  # four of 0.25 s


def test_runs_measured_at_other_steps_stand_where_they_last_were(tmp_path):
    write_run(tmp_path / "x", {1: ab(1, 1), 4: ab(2, 1)})
    write_run(tmp_path / "y", {3: ab(1, 3)}, steps=3)
    curve = report(tmp_path, plan_of({"x": ("f", 0), "y": ("f", 0)}))["families"]["f"]["by_seed"]["0"]["curve"]
    # y is at its start until step 3, and costs nothing after it
    assert [(p["step"], p["tokens"], p["hypervolume"]) for p in curve] == [
        (0, 0, 0), (1, 160, 1), (3, 480, 3), (4, 560, pytest.approx(4)),
    ]  # fmt: skip


def test_a_short_last_step_draws_less(tmp_path):
    """10 prompts: 4, 4 and 2, of two completions each."""
    write_run(tmp_path / "x", {3: ab(1, 1)}, steps=3, epochs=[0.4, 0.8, 1.0])
    entry = report(tmp_path, plan_of({"x": ("f", 0)}))["runs"][0]
    assert (entry["completions"], entry["tokens"]) == (20, 200)


def test_prompts_drawn_in_place_of_others_are_compute_too(tmp_path):
    """7, 4 and 6 prompts, of two completions of 10 tokens each, where a step learns from 4."""
    write_run(tmp_path / "x", {3: ab(1, 1)}, steps=3, drawn=[7, 4, 6])
    entry = report(tmp_path, plan_of({"x": ("f", 0)}))["runs"][0]
    assert (entry["completions"], entry["tokens"]) == (34, 340)


def test_a_line_cut_short_by_a_kill_is_left_out(tmp_path):
    write_run(tmp_path / "x", {4: ab(1, 1)})
    write_run(tmp_path / "y", {2: ab(1, 1)}, steps=2, done=False)
    with (tmp_path / "y" / "metrics.jsonl").open("a") as stream:
        stream.write('{"step": 3, "data/ep')
    data = report(tmp_path, plan_of({"x": ("f", 0), "y": ("f", 0)}))
    assert [(entry["state"], entry["steps"]) for entry in data["runs"]] == [("done", 4), ("unfinished", 2)]


def test_the_reference_point_is_the_start_or_as_given(tmp_path):
    """From the start (1, 1): (3, 2) gains 2. From (0, 0): 6, of which the start had 1."""
    write_run(tmp_path / "x", {4: ab(3, 2)}, start=ab(1, 1), greedy=True)
    write_run(tmp_path / "y", {4: ab(0.5, 9)}, start=ab(1, 1), greedy=True)  # worse in a: no volume
    places = {"x": ("f", 0), "y": ("f", 0)}
    found = report(tmp_path, plan_of(places))["families"]["f"]["by_seed"]["0"]
    assert (found["hypervolume"], found["gain"], found["beyond_reference"]) == (2, 2, 1)
    assert found["front"] == ["x", "y"]
    data = report(tmp_path, plan_of({"x": ("f", 0)}, reference_point=ab(0, 0)))
    found = data["families"]["f"]["by_seed"]["0"]
    assert (found["hypervolume"], found["gain"]) == (6, 5)
    assert data["reference_point"] == {"0": ab(0, 0)}


def test_spans_divide_and_minimised_components_turn(tmp_path):
    """a from 0 to 3 in spans of 2, b from 0 down to -4: 1.5 x 4."""
    write_run(tmp_path / "x", {4: ab(3, -4)})
    write_run(tmp_path / "y", {4: ab(2, -3)})
    data = report(tmp_path, plan_of({"x": ("f", 0), "y": ("f", 0)}, spans={"a": 2.0}, minimise=["b"]))
    assert data["families"]["f"]["by_seed"]["0"]["hypervolume"] == pytest.approx(6)
    assert [e["on_front"] for e in data["runs"]] == [True, False]
    assert data["spans"] == {"a": 2.0, "b": 1.0}


def test_intervals_and_paired_differences_over_seeds(four):
    """Seed 1: volumes 6 and 5. Student's t of two values: mean -+ 12.7062 x |difference| / 2."""
    write_run(four / "f3", {4: ab(6, 1)})
    write_run(four / "g3", {4: ab(5, 1)})
    data = report(four, plan_of(PLACES | {"f3": ("fixed", 1), "g3": ("moving", 1)}))
    fixed, moving = data["families"]["fixed"], data["families"]["moving"]
    assert fixed["hypervolume"] == pytest.approx({"mean": 5, "low": 5 - 12.7062, "high": 5 + 12.7062}, abs=1e-9)
    assert moving["hypervolume_less_first"] == pytest.approx(
        {"mean": -0.5, "low": -0.5 - 12.7062 / 2, "high": -0.5 + 12.7062 / 2}, abs=1e-9
    )
    assert fixed["hypervolume_less_first"] is None
    assert fixed["seeds"] == 2
    assert "-0.5 [-6.853, +5.853]" in "\n".join(markdown(data))
    # a run is compared with the first family of its own seed: (5, 1) is dominated by (6, 1), not by seed 0's
    assert next(e for e in data["runs"] if e["name"] == "g3")["steps_to_front"] is None


def test_what_has_not_ended_is_in_no_front(four):
    write_run(four / "h1", {2: ab(9, 9)}, done=False)
    write_run(four / "h2", {2: ab(1, 1), 4: ab(1, None)})
    places = PLACES | {"h1": ("moving", 0), "h2": ("moving", 0), "h3": ("moving", 0)}
    data = report(four, plan_of(places))
    assert [e["state"] for e in data["runs"]][4:] == ["unfinished", "unmeasured", "missing"]
    moving = data["families"]["moving"]
    assert moving["by_seed"]["0"]["hypervolume"] == pytest.approx(4)
    assert (moving["hypervolume"], moving["hypervolume_less_first"], moving["seeds"]) == (None, None, 0)
    said = "\n".join(markdown(data))
    assert "in no front: h1 (unfinished), h2 (unmeasured), h3 (missing)" in said
    assert "families differ in runs a seed (fixed 2, moving 5)" in said
    json.dumps(data, allow_nan=False)


def test_a_start_without_a_number_is_no_point(tmp_path):
    write_run(tmp_path / "x", {4: ab(1, 1)}, start=ab(0, None))
    data = report(tmp_path, plan_of({"x": ("f", 0)}))
    assert [e["state"] for e in data["runs"]] == ["unmeasured"]
    assert data["reference_point"] == {"0": None}
    assert "seed 0: not known" in "\n".join(markdown(data))


def test_a_run_alone_is_compared_with_nothing(tmp_path):
    write_run(tmp_path / "x", {4: ab(1, 1)})
    write_run(tmp_path / "y", {4: ab(2, 2)})
    data = report(tmp_path, plan_of({"x": ("f", 0), "y": ("g", 0)}))
    assert [(e["compared"], e["steps_to_front"]) for e in data["runs"]] == [(False, None), (True, 4)]
    assert [cell.strip() for cell in markdown(data)[7].split("|")][-2] == ""


def test_measured_components_stand_beside(tmp_path):
    write_run(tmp_path / "x", {4: ab(1, 1) | {"gold": 7.0}})
    data = report(tmp_path, plan_of({"x": ("f", 0)}))
    assert data["runs"][0]["final"] == ab(1, 1) | {"gold": 7}
    head, _, row = markdown(data)[4:7]
    assert [cell.strip() for cell in head.split("|")][5] == "(gold)"
    assert [cell.strip() for cell in row.split("|")][5] == "7"


def test_drawn_completions_count_before_greedy_ones(tmp_path):
    write_run(tmp_path / "x", {4: ab(3, 3) | {"a_greedy": 99}})
    line = {
        "samples": [{"rewards": {"a": a, "b": None, "gold": None}, "score": 0} for a in (1.0, 2.0)],
        "greedy": {"rewards": {"a": 50.0, "b": 1.0, "gold": None}, "score": 0},
    }
    (tmp_path / "x" / "heldout-before.jsonl").write_text(json.dumps(line) + "\n")
    data = report(tmp_path, plan_of({"x": ("f", 0)}))
    assert data["reference_point"] == {"0": ab(1.5, 1)}  # nothing drawn has a b
    assert data["runs"][0]["final"]["a"] == 3


@pytest.mark.parametrize("components", [("a", "b"), ("a", "b", "c")])
def test_the_picture_is_there_and_the_same_again(tmp_path, components):
    for k in range(4):
        point = {name: float(1 + (k + i) % 4) for i, name in enumerate(components)}
        write_run(tmp_path / f"r{k}", {4: point}, start=dict.fromkeys(components, 0.0))
    places = {f"r{k}": ("fg"[k % 2], k // 2) for k in range(4)}
    data = report(tmp_path, plan_of(places, components, minimise=["b"]))
    draw(data, tmp_path / "front.png")
    first = (tmp_path / "front.png").read_bytes()
    assert first.startswith(b"\x89PNG")
    assert len(first) > 5000
    draw(json.loads(json.dumps(data)), tmp_path / "front.png")
    assert (tmp_path / "front.png").read_bytes() == first
