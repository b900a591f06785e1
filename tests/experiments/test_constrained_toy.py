"""The plain sum goes past the point where gold falls, the constrained forms stay there: three seeds."""

from __future__ import annotations

import pytest

from tests.experiments.constrained_toy import THRESHOLDS, composers, run


@pytest.mark.parametrize("seed", range(3))
def test_constraints_hold_gold_where_the_sum_loses_it(seed):
    plain, mu, xi = (run(composers()[name], seed) for name in ("sum", "mu", "xi"))
    assert max(plain.gold) > -0.05
    assert plain.gold[-1] < max(plain.gold) - 0.3
    for course in (mu, xi):
        assert course.gold[-1] > -0.05
        assert all(abs(v - t) < 0.1 for v, t in zip(course.means[-1], THRESHOLDS, strict=True))
