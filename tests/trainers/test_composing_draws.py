"""Dynamic sampling with a composer: which prompts still teach."""

from __future__ import annotations

import math

import numpy as np
import pytest

from align import build
from align.cli import main
from align.config import compose
from align.data.prompts import PromptRow
from align.trainers.composing import composing
from align.trainers.experience import Group
from tests.trainers.online_runs import REWARDS, rows_of, words_of

TOYS = "tests.trainers.toy_rewards."
RLOO = ("objective=policy_gradient", "advantage=rloo", "lora.rank=4")
OPPOSITE = (f"reward.up._target_={TOYS}up", f"reward.down._target_={TOYS}down")
FIXED = ("composer=fixed", "composer.normalise=none", "composer.target=reward")


def group(rewards, greedy=None, measured=0.0) -> Group:
    """A prompt's completions with these rewards of a and b, and a component without weight before them."""
    table = np.array([[measured + i, *row] for i, row in enumerate(rewards)], dtype=float)
    twin = {}
    if greedy is not None:
        row = np.array([99.0, *greedy])
        twin = {"greedy": object(), "greedy_rewards": row, "greedy_score": float(row[1:].sum())}
    return Group(PromptRow("f:1", (1,), "?"), (), (), table, table[:, 1:].sum(1), **twin)


@pytest.fixture(scope="module")
def at_work():
    words = (
        "recipe=rloo", "reward=[]", f"reward.measured._target_={REWARDS}coin", "reward.measured.weight=0",
        f"reward.a._target_={REWARDS}coin", f"reward.b._target_={REWARDS}mixed", "composer=fixed",
    )  # fmt: skip
    config = compose(words)
    return composing(config, config.composer, build.advantage(config), print)


@pytest.mark.parametrize(
    "rewards, greedy, zero_variance",
    [
        ([(1, 0), (1, 0)], None, True),
        ([(1, 0), (0, 1)], None, False),  # the same in sum
        ([(1, 0), (1, 0.5)], None, False),
        ([(1, 0), (1, math.nan)], None, True),  # counts for none of them
        ([(math.nan, 0), (1, math.nan)], None, True),
        ([(math.nan, 5), (1, 0), (1, 0)], None, True),
        ([(1, 0), (1, 0)], (1, 0), True),
        ([(1, 0), (1, 0)], (0, 1), False),  # equal to each other, not to what they are compared with
        ([(1, 0), (0, 1)], (math.nan, 1), True),  # nothing to compare with
    ],
)
def test_a_prompt_teaches_if_a_component_differs(at_work, rewards, greedy, zero_variance):
    assert at_work.zero_variance(group(rewards, greedy)) is zero_variance


def test_prompts_equal_in_sum_are_kept(tmp_path):
    """up + down is 1 for every completion: by the sum all prompts would be replaced."""
    words = (*RLOO, *OPPOSITE, *FIXED, "composer.weights.up=0.8", "composer.weights.down=0.2",
             "trainer.dynamic_sampling=2", "trainer.max_steps=2")  # fmt: skip
    assert main(["train", *words_of(tmp_path, f"run.dir={tmp_path / 'run'}", *words)]) == 0
    for row in rows_of(tmp_path / "run"):
        assert row["reward/total_std"] == pytest.approx(0, abs=1e-12)
        assert row["rollout/kept_prompts"] == 4
        assert row["rollout/settled_prompts"] == pytest.approx(1 - 4 / row["rollout/drawn_prompts"])
        assert row["optimizer/gradient_norm"] > 0


def test_settled_prompts_are_replaced(tmp_path):
    """coin is one of two numbers: of two completions half agree, and others are drawn for them."""
    coins = (f"reward.a._target_={REWARDS}coin", f"reward.b._target_={REWARDS}same")
    words = (*RLOO, *coins, *FIXED, "trainer.dynamic_sampling=3", "trainer.max_steps=3")
    assert main(["train", *words_of(tmp_path, f"run.dir={tmp_path / 'run'}", *words)]) == 0
    rows = rows_of(tmp_path / "run")
    assert max(row["rollout/drawn_prompts"] for row in rows) > 4
    for row in rows:
        taught = (1 - row["rollout/settled_prompts"]) * row["rollout/drawn_prompts"]
        assert row["rollout/kept_prompts"] == pytest.approx(taught)


def test_a_kl_to_be_learnt_from_settles_nothing(tmp_path, capsys):
    words = (
        *RLOO, *OPPOSITE, "trainer.dynamic_sampling=1", "trainer.kl_in_reward=0.05", "composer=lagrangian_mu",
        "composer.thresholds.up=0.9", "composer.thresholds.down=0.1",
    )  # fmt: skip
    assert main(["train", *words_of(tmp_path, f"run.dir={tmp_path / 'run'}", *words)]) == 2
    said = " ".join(capsys.readouterr().err.split())
    assert (
        "trainer.dynamic_sampling=1: with composer=lagrangian_mu every prompt teaches the KL, none is replaced; use 0"
        in said
    )
