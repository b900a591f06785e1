"""Pictures of runs with several rewards: there where there is something to see, the same for the same rows."""

from __future__ import annotations

import json

from align.report.composed_plots import draw, non_dominated


def write(run, rows):
    run.mkdir(exist_ok=True)
    (run / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def rows_of(num=6):
    return [
        {"step": k, "weight/a": 0.1 * k, "multiplier/a": 0.5 + k / 100, "violation/a": 0.3 - 0.1 * k, "threshold/a": 1}
        | ({"heldout/a": 0.1 * k, "heldout/b_greedy": 1 - 0.1 * k, "heldout/gold": k * (5 - k)} if k % 2 == 0 else {})
        for k in range(1, num + 1)
    ]


def test_front_by_hand():
    points = [(1.0, 1.0), (2.0, 0.5), (1.5, 0.4), (1.0, 1.0)]
    assert non_dominated(points) == [True, True, False, False]


def test_what_is_there_is_drawn_and_again_the_same(tmp_path):
    write(tmp_path, rows_of())
    found = draw(tmp_path, ("a", "b"), "gold")
    assert [p.name for p in found] == ["multipliers.png", "front.png", "gold.png"]
    first = [p.read_bytes() for p in found]
    assert all(data.startswith(b"\x89PNG") and len(data) > 5000 for data in first)
    assert [p.read_bytes() for p in draw(tmp_path, ("a", "b"), "gold")] == first
    assert sorted(p.name for p in (tmp_path / "plots").iterdir()) == ["front.png", "gold.png", "multipliers.png"]


def test_what_was_not_measured_is_not_drawn(tmp_path):
    write(tmp_path, [{"step": 1, "weight/a": 1.0}, {"step": 2, "weight/a": 1.0, "heldout/a": None}])
    assert [p.name for p in draw(tmp_path, ("a", "b"), "gold")] == ["multipliers.png"]
    write(tmp_path / "bare", [{"step": 1, "loss/total": 1.0}])
    assert draw(tmp_path / "bare", ("a", "b"), None) == []
    assert not (tmp_path / "bare" / "plots").exists()
