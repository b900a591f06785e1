"""The benchmark of influences measures what it says, on the smallest model."""

from __future__ import annotations

from align.trainers.influence import STEPS
from tests.bench import influence


def test_costs_and_errors_of_the_smallest_model(monkeypatch):
    monkeypatch.setattr(influence, "OBJECTIVES", (2,))
    monkeypatch.setattr(influence, "STEPS", (1e-3, 1e-1))
    before = dict(STEPS)
    found = influence.measured("nano", 1)
    assert before == STEPS
    assert set(found["cost"]) == {"step", "naive 2", "exact 2", "directional 2", "update now 2", "update next 2"}
    assert found["errors"]["exact"] < 1e-5
    assert found["errors"]["directional 0.001"] < 1e-3 < found["errors"]["directional 0.1"]
    assert found["errors"]["update next"] < 1e-3
    assert any(line.startswith("| directional | ") for line in influence.table(found))
