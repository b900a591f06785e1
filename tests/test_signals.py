"""SIGTERM, SIGUSR1 and SIGINT at every stage of a run: exit code, what is saved, and a bit-equal rerun."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest

from align.models.reference import CHUNK_ROWS
from align.trainers.signals import Signals, Stopped
from tests.killer import Hook, evidence, leftovers, settings, shared

STEP = "align.engine.local:LocalEngine.step"
SAMPLES = ["trainer.num_samples=2", "trainer.sample_tokens=4"]
# stage -> where the signal comes, and the newest checkpoint then
STAGES = {
    "reference": (Hook("align.models.reference:ReferenceCache._write", 1), None),
    "samples before": (Hook("align.rollout.hf:HFRollout.generate", 1), None),
    "step": (Hook(STEP, 7), "step-000007"),
    "evaluation": (Hook("align.trainers.offline:evaluate", 2), "step-000010"),
    "last evaluation": (Hook("align.trainers.offline:evaluate", 6), "step-000030"),
    "save": (Hook("align.engine.local:save_file", 4), "step-000006"),
    "samples after": (Hook("align.rollout.hf:HFRollout.generate", 2), "step-000030"),
}
CODES = {signal.SIGTERM: 85, signal.SIGUSR1: 85, signal.SIGINT: 130}


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("signals")


@pytest.fixture(scope="module")
def whole(base) -> dict:
    run = base / "whole"
    ended = shared().run(settings(base, f"run.dir={run}", *SAMPLES))
    assert ended.code == 0, ended.said
    return evidence(run) | {"samples": (run / "samples.jsonl").read_text()}


def _hook(hook: Hook, number: int) -> Hook:
    return Hook(hook.target, hook.n, int(number), hook.when)


# SIGUSR1 differs from SIGTERM in its name only
CASES = [(stage, n) for stage in STAGES for n in CODES if n != signal.SIGUSR1 or stage in ("step", "evaluation")]


@pytest.mark.parametrize("stage,number", CASES, ids=lambda v: getattr(v, "name", v))
def test_saves_and_goes_on(base, whole, tmp_path, stage, number):
    hook, newest = STAGES[stage]
    cache = tmp_path / "cache" if stage == "reference" else base / "cache"
    run = tmp_path / "run"
    words = settings(base, f"run.dir={run}", f"reference.cache_dir={cache}", *SAMPLES)
    stopped = shared().run(words, [_hook(hook, number)])
    assert stopped.code == CODES[number], stopped.said
    assert f"{number.name} received" in stopped.said
    assert leftovers(run) == []
    there = sorted(p.name for p in (run / "checkpoints").glob("step-*"))
    assert (there[-1] if there else None) == newest
    done = shared().run(words)
    assert done.code == 0, done.said
    if stage == "reference":
        # one chunk of the 76 pairs was written before the signal was heeded
        assert f"reference {CHUNK_ROWS} examples from the cache, {76 - CHUNK_ROWS} computed" in done.said
    assert evidence(run) | {"samples": (run / "samples.jsonl").read_text()} == whole


def test_evaluation_interrupted_again_and_again(base, whole, tmp_path):
    """The pending row survives several signals, and SIGKILL after it was replaced by a whole one."""
    run = tmp_path / "run"
    words = settings(base, f"run.dir={run}", *SAMPLES)
    in_evaluation = Hook("align.trainers.offline:evaluate", 1, signal.SIGTERM)
    for _ in range(3):
        assert shared().run(words, [in_evaluation]).code == 85
        assert sorted(p.name for p in (run / "checkpoints").glob("step-*"))[-1] == "step-000005"
    assert shared().run(words, [Hook(STEP, 1)]).code == -9
    assert shared().run(words).code == 0
    assert evidence(run) | {"samples": (run / "samples.jsonl").read_text()} == whole


@pytest.mark.parametrize("first", [signal.SIGINT, signal.SIGTERM], ids=lambda n: n.name)
def test_second_interrupt_stops_at_once(base, tmp_path, first):
    run = tmp_path / "run"
    hooks = [Hook(STEP, 7, int(first)), Hook(STEP, 7, int(signal.SIGINT), "after")]
    if first == signal.SIGTERM:
        hooks.insert(1, Hook("align.engine.local:LocalEngine.backward", 13, int(signal.SIGINT)))
    stopped = shared().run(settings(base, f"run.dir={run}"), hooks)
    assert stopped.code == 130, stopped.said
    assert "Traceback" not in stopped.said
    assert sorted(p.name for p in (run / "checkpoints").glob("step-*")) == ["step-000003", "step-000006"]


def test_interrupt_in_a_save_leaves_nothing_unfinished(base, tmp_path):
    run = tmp_path / "run"
    hooks = [Hook(STEP, 6, int(signal.SIGINT)), Hook("align.engine.local:save_file", 4, int(signal.SIGINT))]
    assert shared().run(settings(base, f"run.dir={run}"), hooks).code == 130
    assert leftovers(run) == []
    assert sorted(p.name for p in (run / "checkpoints").iterdir()) == ["step-000003"]


def test_handlers_are_given_back():
    before = {n: signal.getsignal(n) for n in CODES}
    with Signals() as signals:
        signals.check()
        os.kill(os.getpid(), signal.SIGUSR1)
        os.kill(os.getpid(), signal.SIGTERM)  # the first one counts
        with pytest.raises(Stopped, match="SIGUSR1 received") as stop:
            signals.check()
        assert stop.value.code == 85
    assert {n: signal.getsignal(n) for n in CODES} == before


def test_second_interrupt_counts_after_another_signal():
    with Signals() as signals:
        os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGINT)
        assert signals.received == signal.SIGTERM
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
