"""Exports, the best model, early stopping, the average of the weights, callbacks: what is written, through any kill."""

from __future__ import annotations

import json
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from tests.conftest import mostly_slow
from tests.killer import Hook, evidence, leftovers, settings, shared
from tests.trainers.online_runs import REWARDS, rows_of, words_of

pytestmark = pytest.mark.xdist_group("observers")

HERE = "tests.trainers.test_observers."
OBSERVERS = "align.trainers.snapshots:"
STEP = "align.engine.local:LocalEngine.step"
WORDS = (
    "trainer.max_steps=9", "trainer.eval_every=2", "trainer.save_every=3", "trainer.keep_best=accuracy/heldout",
    "trainer.export_every=4", "trainer.export_at=[3]", "trainer.ema=0.9",
)  # fmt: skip


class Recorder:
    """A callback that is no Callback: it has two of the calls."""

    def __init__(self, path: str):
        self.path = Path(path)

    def on_step(self, step: int, metrics: dict[str, Any]) -> None:
        self._write(["step", step, metrics["loss/total"]])

    def on_end(self, summary: dict[str, Any]) -> None:
        self._write(["end", summary["step"], summary["best"]["step"]])

    def _write(self, line: list[Any]) -> None:
        with self.path.open("a") as stream:
            stream.write(json.dumps(line) + "\n")


class Misspelt:
    def on_eval_end(self) -> None: ...


class Mute:
    pass


def words(base: Path, run: Path, *more: str) -> list[str]:
    told = (f"callbacks.told._target_={HERE}Recorder", f"callbacks.told.path={run}-told")
    return [*settings(base, f"run.dir={run}", *WORDS, *more), *told]


def left(run: Path) -> dict[str, Any]:
    """evidence, with the models that observers wrote, and what the average is in the last checkpoint."""
    out = evidence(run)
    for path in sorted(
        [*run.glob("exports/*/*.safetensors"), *run.glob("best/*/*.safetensors"), *run.glob("ema/*.safe*")]
    ):
        out[path.relative_to(run).as_posix()] = path.read_bytes()
    return out


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("observers")


@pytest.fixture(scope="module")
def whole(base) -> Path:
    run = base / "whole"
    ended = shared().run(words(base, run))
    assert ended.code == 0, ended.said
    return run


def test_what_is_written(whole):
    rows = rows_of(whole)
    assert sorted(p.name for p in (whole / "exports").iterdir()) == ["step-000003", "step-000004", "step-000008"]
    evaluated = {row["step"]: row["accuracy/heldout"] for row in rows if "accuracy/heldout" in row}
    assert list(evaluated) == [2, 4, 6, 8, 9]
    best = max(evaluated, key=lambda step: (evaluated[step], -step))  # the first of equals
    assert [p.name for p in (whole / "best").iterdir()] == [f"step-{best:06d}"]
    summary = json.loads((whole / "summary.json").read_text())
    assert summary["best"] == {
        "metric": "accuracy/heldout", "value": evaluated[best], "step": best, "stopped_early": False,
        "path": f"best/step-{best:06d}",
    }  # fmt: skip
    assert "nothing_learnt" not in summary
    lines = [json.loads(line) for line in Path(f"{whole}-told").read_text().splitlines()]
    assert lines[:-1] == [["step", row["step"], row["loss/total"]] for row in rows]
    assert lines[-1] == ["end", 9, best]
    (checkpoint,) = (whole / "checkpoints").glob("step-000009")
    in_checkpoint, ema = (
        load_file(checkpoint / "ema.safetensors"),
        load_file(whole / "ema" / "adapter_model.safetensors"),
    )
    assert len(in_checkpoint) == len(ema) > 0
    assert all(torch.isfinite(w).all() for w in ema.values())


def test_the_average_by_hand(base, tmp_path):
    """Of the matrices B of LoRA, which are 0 at the start: the sum of 0.2 * 0.8^(n - k) times those after step k."""
    run = tmp_path / "run"
    more = ("trainer.max_steps=4", "trainer.export_every=1", "trainer.ema=0.8", "trainer.save_every=2")
    assert shared().run(words(base, run, *more), [Hook(STEP, 4)]).code == -9
    assert shared().run(words(base, run, *more)).code == 0
    ema = load_file(run / "ema" / "adapter_model.safetensors")
    steps = [load_file(run / "exports" / f"step-{k:06d}" / "adapter_model.safetensors") for k in range(1, 5)]
    names = [name for name in ema if "lora_B" in name]
    assert names
    for name in names:
        expected = sum(0.2 * 0.8 ** (4 - k) * w[name] for k, w in enumerate(steps, 1))
        torch.testing.assert_close(ema[name], expected)
        assert not torch.equal(ema[name], steps[-1][name])


DEATHS = [
    Hook(STEP, 1),
    Hook(STEP, 5, when="after"),
    Hook(f"{OBSERVERS}EMA.stepped", 5, when="after"),
    Hook(f"{OBSERVERS}export", 1, when="after"),
    Hook("align.trainers.trained:write_final", 3),
    Hook(f"{OBSERVERS}BestModel.evaluated", 3, when="after"),
    Hook("align.checkpoint:remove", 1, when="after"),
    Hook("align.report.log:Log.row", 8),
    Hook(f"{OBSERVERS}EMA.end", 1),
    Hook(f"{OBSERVERS}EMA.end", 1, when="after"),
    Hook("align.trainers.offline:evaluate", 3, int(signal.SIGTERM)),
    Hook(f"{OBSERVERS}export", 2, int(signal.SIGTERM)),
]


@pytest.mark.parametrize(
    "hook", mostly_slow(DEATHS, 1, 5, 11), ids=lambda h: f"{h.target.split(':')[1]}-{h.when}-{h.n}-{h.number}"
)
def test_killed_anywhere(base, whole, tmp_path, hook):
    run = tmp_path / "run"
    killed = shared().run(words(base, run), [hook])
    assert killed.code == (-9 if hook.number == signal.SIGKILL else 85), killed.said
    done = shared().run(words(base, run))
    assert done.code == 0, done.said
    assert left(run) == left(whole)
    assert leftovers(run) == []


def test_it_stops_when_it_gets_no_better(base, tmp_path):
    """At this rate no loss changes: the second evaluation is no better than the first."""
    run = tmp_path / "run"
    more = ("trainer.keep_best=loss/heldout", "trainer.early_stopping_patience=1", "optimizer.lr=1e-30", "trainer.ema=")
    hook = Hook("align.trainers.trained:write_final", 4)  # after the best one and the exports of steps 3 and 4
    assert shared().run(words(base, run, *more), [hook]).code == -9
    done = shared().run(words(base, run, *more))
    assert done.code == 0, done.said
    assert [row["step"] for row in rows_of(run)] == [1, 2, 3, 4]
    summary = json.loads((run / "summary.json").read_text())
    assert summary["step"] == 4
    assert summary["best"]["step"] == 2
    assert summary["best"]["stopped_early"]
    again = shared().run(words(base, run, *more))
    assert again.code == 0
    assert "is complete at step 4; trainer.early_stopping_patience ended it" in again.said


def test_exports_are_models_that_can_be_averaged_and_started_from(base, tmp_path):
    run, mean = tmp_path / "run", tmp_path / "mean"
    more = ("trainer.max_steps=2", "trainer.export_every=1", "merge=true", "trainer.ema=", "trainer.keep_best=")
    ended = shared().run(settings(base, f"run.dir={run}", *more))
    assert ended.code == 0, ended.said
    exports = [str(run / "exports" / f"step-00000{step}") for step in (1, 2)]
    averaged = shared().run(["average", *exports, f"out={mean}", "method=uniform"])
    assert averaged.code == 0, averaged.said
    one, two, both = (load_file(Path(at) / "model.safetensors") for at in (*exports, mean))
    moved = [name for name in both if not torch.equal(one[name], two[name])]
    assert moved
    for name in moved:
        torch.testing.assert_close(both[name], (one[name] + two[name]) / 2)
    for start in (exports[0], str(mean)):
        again = settings(base, f"run.dir={tmp_path / Path(start).name}", "trainer.max_steps=1", f"model={start}",
                         "model.hidden_size=", "model.num_layers=")  # fmt: skip
        assert shared().run(again).code == 0


@pytest.mark.parametrize("more, why", [
    ((f"reward.same._target_={REWARDS}same",), "all completions of each prompt got the same reward"),
    (("trainer.truncated=mask",), "all completions are masked"),
])  # fmt: skip
def test_an_online_run_that_learns_nothing_says_so(tmp_path, more, why):
    run = tmp_path / "run"
    start = ("objective=policy_gradient", "advantage=rloo", "lora.rank=4", f"run.dir={run}", "trainer.max_steps=6")
    command = ["train", *words_of(tmp_path, *start, *more)]
    assert shared().run(command, [Hook(STEP, 4)]).code == -9
    ended = shared().run(command)
    assert ended.code == 0, ended.said
    assert f"warning: step 5: nothing was learnt in 5 steps: {why}" in " ".join(ended.said.split())
    assert ended.said.count("nothing was learnt") == 1
    assert json.loads((run / "summary.json").read_text())["nothing_learnt"] == {"steps": 6, "of": 6, "why": why}
    assert "6 of 6" in ended.said


@pytest.mark.parametrize("word, said", [
    ("trainer.early_stopping_patience=2", "trainer.early_stopping_patience=2 has no effect without trainer.keep_best"),
    ("trainer.keep_best=loss/heldout trainer.eval_every=0", "needs evaluations: set data.heldout, and trainer.eval_"),
    ("trainer.export_at=[0]", "must be steps from 1 on"),
    ("trainer.ema=1", "trainer.ema=1"),
    (f"callbacks.mine._target_={HERE}Misspelt", "callbacks.mine: Misspelt.on_eval_end is never called"),
    (f"callbacks.mine._target_={HERE}Mute", "callbacks.mine: Mute has none of on_start"),
    ("callbacks.mine._target_=no.such.Thing", "callbacks.mine (no.such.Thing)"),
])  # fmt: skip
def test_refused(base, tmp_path, word, said):
    plain = settings(base, f"run.dir={tmp_path / 'run'}", "trainer.max_steps=1")
    ended = shared().run([*plain, *word.split()])
    assert ended.code == 2, ended.said
    assert said in " ".join(ended.said.split())
    assert "Traceback" not in ended.said


def test_a_metric_that_no_evaluation_has_is_named(base, tmp_path):
    ended = shared().run(
        settings(base, f"run.dir={tmp_path / 'run'}", "trainer.max_steps=5", "trainer.keep_best=loss/x")
    )
    assert ended.code == 2, ended.said
    assert "trainer.keep_best=loss/x: an evaluation has accuracy/heldout" in " ".join(ended.said.split())
