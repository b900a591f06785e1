"""A KL in the reward whose coefficient moves towards a target: by the rule, in checkpoints, and what is refused."""

from __future__ import annotations

import json

import pytest

from align.advantages.kl import kl_coefficient
from align.cli import main
from tests.killer import Hook, shared
from tests.trainers.online_runs import left, rows_of, words_of

RLOO = ("objective=policy_gradient", "advantage=rloo", "lora.rank=4", "optimizer.lr=1e-2")
WORDS = (*RLOO, "trainer.kl_in_reward=0.2", "trainer.kl_target=0.05", "trainer.max_steps=6")


@pytest.mark.parametrize(
    "kl, expected",
    [
        (0.05, 0.2),  # on target
        (0.055, 0.2 * 1.01),  # a tenth above: 1 + 0.1 * 0.1
        (5.0, 0.2 * 1.02),  # at most a fifth of the target counts
        (-5.0, 0.2 * 0.98),
        (0.045, 0.2 * 0.99),
    ],
)
def test_rule(kl, expected):
    assert kl_coefficient(0.2, kl, 0.05) == pytest.approx(expected, rel=1e-12)


@pytest.fixture(scope="module")
def straight(tmp_path_factory):
    base = tmp_path_factory.mktemp("kl")
    ended = shared().run(["train", *words_of(base, f"run.dir={base / 'run'}", *WORDS)])
    assert ended.code == 0, ended.said
    return base


def test_the_coefficient_follows_the_steps_kl(straight):
    rows = rows_of(straight / "run")
    coefficient = 0.2
    for row in rows:
        assert row["kl/coefficient"] == coefficient
        coefficient = kl_coefficient(coefficient, row["kl/reference"], 0.05)
    assert rows[0]["kl/reference"] == pytest.approx(0, abs=1e-4)
    assert rows[1]["kl/coefficient"] == pytest.approx(0.2 * 0.98)  # below the target: the penalty is eased
    state = json.loads((straight / "run/checkpoints/step-000006/state.json").read_text())
    assert _found(state, "kl_coefficient") == coefficient


def _found(node, key):
    if key in node:
        return node[key]
    return next(found for v in node.values() if isinstance(v, dict) and (found := _found(v, key)) is not None)


def test_the_coefficient_reaches_the_penalties(tmp_path, straight):
    """One step on the first coefficient is that of a run without a target; the second step is another one."""
    fixed = [word for word in WORDS if "kl_target" not in word]
    ended = shared().run(["train", *words_of(straight, f"run.dir={tmp_path / 'run'}", *fixed)])
    assert ended.code == 0, ended.said
    there, here = rows_of(straight / "run"), rows_of(tmp_path / "run")
    assert "kl/coefficient" not in here[0]
    assert there[0]["loss/total"] == here[0]["loss/total"]
    assert there[0]["optimizer/gradient_norm"] == here[0]["optimizer/gradient_norm"]
    assert there[-1]["optimizer/gradient_norm"] != here[-1]["optimizer/gradient_norm"]


HELDOUT = "align.trainers.online.heldout:Heldout."


@pytest.mark.parametrize(
    "hook",
    [
        Hook("align.engine.local:LocalEngine.step", 4),
        Hook("align.report.log:Log.row", 3, when="after"),
        Hook(f"{HELDOUT}answers", 3, 15),  # between a step and its evaluation
    ],
    ids=["killed-in-a-step", "killed-after-a-row", "stopped"],
)
def test_resumed_with_the_coefficient_it_had(straight, tmp_path, hook):
    words = ["train", *words_of(straight, f"run.dir={tmp_path / 'run'}", *WORDS)]
    assert shared().run(words, [hook]).code in (-9, 85)
    done = shared().run(words)
    assert done.code == 0, done.said
    assert left(tmp_path / "run") == left(straight / "run")


@pytest.mark.parametrize(
    "words, message",
    [
        ((*RLOO, "trainer.kl_target=0.1"), "trainer.kl_target=0.1 has no effect with trainer.kl_in_reward=0; set"),
        ((*RLOO, "trainer.kl_in_reward=0.1", "trainer.kl_target=0"), "trainer.kl_target=0.0: must be greater than 0"),
        (
            (
                *RLOO, "trainer.kl_in_reward=0.1", "trainer.kl_target=1", "composer=lagrangian_mu",
                "composer.thresholds.mixed=0.5",
            ),
            "trainer.kl_target=1 has no effect with composer=lagrangian_mu, which whitens the KL's stream",
        ),
    ],
)  # fmt: skip
def test_refused(tmp_path, capsys, words, message):
    assert main(["train", *words_of(tmp_path, f"run.dir={tmp_path / 'run'}", *words)]) == 2
    assert message in " ".join(capsys.readouterr().err.split())
