"""Influences of the gradients of two processes: those of one, and steps that do not know that they were measured."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.killer import shared
from tests.trainers.online_runs import rows_of
from tests.trainers.test_processes import alone, assert_same_run, base, done, weights, words  # noqa: F401

pytestmark = [pytest.mark.distributed, pytest.mark.xdist_group("processes")]

# all weights, so that influences are large; three micro-batches, of which one process has one
SMALL = (
    "lora.rank=0", "trainer.batch_size=3", "trainer.micro_batch_tokens=40", "trainer.max_steps=3",
    "trainer.eval_every=0", "trainer.num_samples=0",
)  # fmt: skip


def run_of(base: Path, run: Path, name: str, *more: str, processes: int) -> Path:  # noqa: F811
    done(shared().run(words(base, run, name, *SMALL, *more), processes=processes))
    return run


@pytest.mark.parametrize(("name", "stage"), [("gradient", "zero2"), ("directional", "zero2"), ("directional", "zero3")])
def test_two_processes_find_what_one_finds(base, tmp_path, name, stage):  # noqa: F811
    ours = run_of(base, tmp_path / "run", f"composed {name}", f"engine={stage}", processes=2)
    theirs = base / f"influences-{name}"
    if not theirs.exists():
        run_of(base, theirs, f"composed {name}", processes=1)
    assert_same_run(ours, theirs)
    told = rows_of(ours)
    assert max(abs(row["influence/coin"]) for row in told) > 0.1
    assert told[0]["tokens/micro_batches"] % 2 == 1
    assert told[-1]["weight/mixed"] != 0.5


def test_shards_are_as_they_were(base, tmp_path):  # noqa: F811
    """Weights of objectives that cannot move are fixed ones, and the runs are the same bit for bit: a measurement
    leaves nothing in DeepSpeed's shards and sums."""
    fixed = ("composer=fixed", "composer.normalise=none", "composer.target=advantage")
    unset = ("composer.mu=", "composer.apply=", "composer.measure=", "composer.max_norm=")
    one = run_of(base, tmp_path / "one", "composed directional", "composer.mu=1e30", "engine=zero3", processes=1)
    two = run_of(base, tmp_path / "two", "composed directional", *unset, *fixed, "engine=zero3", processes=1)
    ours, theirs = weights(one), weights(two)
    assert ours.keys() == theirs.keys()
    assert all(ours[name].tobytes() == theirs[name].tobytes() for name in ours)
