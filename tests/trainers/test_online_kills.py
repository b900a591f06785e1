"""Online runs that are killed or signalled anywhere end like those that were not."""

from __future__ import annotations

import signal
from pathlib import Path

import pytest

from tests.conftest import mostly_slow
from tests.killer import Hook, leftovers, shared
from tests.trainers.online_runs import FAMILY, assert_survives, left, words_of

pytestmark = pytest.mark.xdist_group("online_kills")  # all are compared with the same undisturbed runs

ROLLOUT = "align.rollout.hf:HFRollout."
ENGINE = "align.engine.local:LocalEngine."
VALUES = "align.trainers.online.values:"
HELDOUT = "align.trainers.online.heldout:Heldout."
SCORE = "align.rewards.build:Rewards.score_with_steps"

# Where they die. generate: the answers before, steps 1 and 2, the answers at 2, step 3, ...
DEATHS = [
    Hook(f"{ROLLOUT}generate", 1),
    Hook(f"{ROLLOUT}_batch", 5),
    Hook(f"{ROLLOUT}generate", 5, when="after"),
    Hook("align.rewards.calls:FunctionReward._part", 6),
    Hook(SCORE, 5, when="after"),
    Hook(f"{VALUES}token_values", 7),  # of the reference, of the probe or of the policy that drew
    Hook(f"{ENGINE}backward", 4, when="after"),
    Hook(f"{ENGINE}step", 3),
    Hook(f"{ENGINE}step", 3, when="after"),
    Hook(f"{ROLLOUT}sync", 3),
    Hook(f"{ROLLOUT}sync", 3, when="after"),
    Hook(f"{HELDOUT}answers", 2),
    Hook(f"{HELDOUT}metrics", 2, when="after"),
    Hook("align.trainers.transcripts:write_atomic", 3, when="after"),
    Hook("align.engine.local:save_file", 3),
    Hook("os:rename", 2, when="after"),
    Hook("align.report.log:Log.row", 3),
    Hook("align.report.log:Log.row", 3, when="after"),
    Hook("align.report.log:Log.row", 5, when="after"),
    Hook("align.trainers.trained:write_final", 1),
    Hook("align.trainers.trained:write_final", 1, when="after"),
]


def _name(value: str | Hook) -> str:
    return f"{value.target.split(':')[1]}-{value.when}-{value.n}" if isinstance(value, Hook) else value


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("online")


@pytest.fixture(scope="module")
def straight(base):
    """A function name -> what the run of FAMILY that nothing happens to leaves."""
    done: dict[str, dict] = {}

    def evidence_of(name: str) -> dict:
        if name not in done:
            run = base / f"straight-{name}"
            ended = shared().run(["train", *words_of(base, f"run.dir={run}", *FAMILY[name])])
            assert ended.code == 0, ended.said
            done[name] = left(run)
            assert {"model.safetensors", "optimizer.safetensors", "summary", "heldout-after.jsonl"} <= done[name].keys()
            assert len(done[name]["samples"]) == len(done[name]["rows"]) >= 5
        return done[name]

    return evidence_of


# all of them for one algorithm, some for each of the others
CASES = [(name, h) for name, every in (("remax", 1), ("grpo", 6), ("ppo", 7), ("dynamic", 9)) for h in DEATHS[::every]]


@pytest.mark.parametrize("name,hook", mostly_slow(CASES, 4, 7, 15, 24), ids=_name)
def test_killed_anywhere(base, straight, tmp_path, name, hook):
    whole = straight(name)
    words = ["train", *words_of(base, f"run.dir={tmp_path / 'run'}", *FAMILY[name])]
    assert_survives(hook, words, tmp_path / "run", whole)


def test_runs_of_the_family_differ_and_learn(straight):
    """The proof above is of each algorithm, and of weights that move."""
    names = list(FAMILY)
    assert len({straight(name)["rows"][-1]["loss/total"] for name in names}) == len(names)
    for name in names:
        norms = [row["optimizer/gradient_norm"] for row in straight(name)["rows"]]
        assert sum(norm > 0 for norm in norms) >= 3, name
    failed = [row.get("reward/failed_flaky/raised", 0) for row in straight("remax")["rows"]]
    assert failed == sorted(failed)
    assert failed[-1] > failed[0]
    assert any(row["rollout/drawn_prompts"] > 4 for row in straight("dynamic")["rows"])


@pytest.mark.slow
def test_killed_again_and_again(base, straight, tmp_path):
    """At each of its stages once, in one run."""
    words = ["train", *words_of(base, f"run.dir={tmp_path / 'run'}", *FAMILY["remax"], "trainer.save_every=1")]
    for hook in DEATHS[1::3]:
        assert shared().run(words, [hook]).code in (0, -9)
    done = shared().run(words)
    assert done.code == 0, done.said
    assert left(tmp_path / "run") == straight("remax")


# stage -> where the signal comes, and the newest checkpoint then
STAGES = {
    "answers before": (Hook(f"{ROLLOUT}generate", 1), None),
    "first rollout": (Hook(f"{ROLLOUT}generate", 2), "step-000000"),
    "rollout": (Hook(f"{ROLLOUT}generate", 5), "step-000002"),
    "scoring": (Hook(SCORE, 6), "step-000003"),
    "reference": (Hook(f"{VALUES}token_values", 8), "step-000002"),
    "update": (Hook(f"{ENGINE}backward", 3), "step-000003"),
    "sync": (Hook(f"{ROLLOUT}sync", 3), "step-000003"),
    "evaluation": (Hook(f"{HELDOUT}answers", 2), "step-000002"),
    "last evaluation": (Hook(f"{HELDOUT}answers", 4), "step-000005"),
    "save": (Hook("align.engine.local:save_file", 3), "step-000004"),
}
CODES = {signal.SIGTERM: 85, signal.SIGINT: 130}


BOTH = ("rollout", "evaluation")
SIGNALS = [(stage, n) for stage in STAGES for n in CODES if n == signal.SIGTERM or stage in BOTH]


@pytest.mark.parametrize("stage,number", mostly_slow(SIGNALS, 2, 9), ids=lambda v: getattr(v, "name", v))
def test_signal_saves_and_goes_on(base, straight, tmp_path, stage, number):
    hook, newest = STAGES[stage]
    run = tmp_path / "run"
    words = ["train", *words_of(base, f"run.dir={run}", *FAMILY["remax"])]
    stopped = shared().run(words, [Hook(hook.target, hook.n, int(number), hook.when)])
    assert stopped.code == CODES[number], stopped.said
    assert f"{number.name} received" in stopped.said
    assert leftovers(run) == []
    there = sorted(p.name for p in (run / "checkpoints").glob("step-*"))
    assert (there[-1] if there else None) == newest
    done = shared().run(words)
    assert done.code == 0, done.said
    assert left(run) == straight("remax")


# what differs: draws that go on in the order, a value head, several updates of a step
@pytest.mark.parametrize(
    "name,stage", mostly_slow([("dynamic", "rollout"), ("grpo", "update"), ("ppo", "update"), ("ppo", "evaluation")], 0)
)
def test_signal_in_every_kind_of_run(base, straight, tmp_path, name, stage):
    hook, _ = STAGES[stage]
    run = tmp_path / "run"
    words = ["train", *words_of(base, f"run.dir={run}", *FAMILY[name])]
    assert shared().run(words, [Hook(hook.target, hook.n, int(signal.SIGTERM))]).code == 85
    assert shared().run(words).code == 0
    assert left(run) == straight(name)


@pytest.mark.slow
def test_evaluation_interrupted_again_and_again(base, straight, tmp_path):
    """The pending row survives several signals, and a kill after them."""
    words = ["train", *words_of(base, f"run.dir={tmp_path / 'run'}", *FAMILY["remax"])]
    assert shared().run(words, [Hook(f"{HELDOUT}answers", 2, int(signal.SIGTERM))]).code == 85
    for _ in range(2):
        assert shared().run(words, [Hook(f"{HELDOUT}answers", 1, int(signal.SIGTERM))]).code == 85
    assert shared().run(words, [Hook(f"{HELDOUT}answers", 1, when="after")]).code == -9
    assert shared().run(words).code == 0
    assert left(tmp_path / "run") == straight("remax")
