"""Two real processes through `align train`: the same numbers as one, at every ZeRO stage, and safe to kill."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

from tests.killer import Ended, Hook, evidence, leftovers, rows_file, settings, shared
from tests.trainers.online_runs import FAMILY, words_of
from tests.trainers.test_composing import FAMILY as COMPOSED
from tests.trainers.test_iterate import KINDS
from tests.trainers.test_iterate import words as words_of_rounds
from tests.trainers.test_multiturn import words as words_of_collecting
from tests.trainers.test_reward_model import pairs, write
from tests.trainers.test_warm import words as words_of_members
from tests.variants import variant

pytestmark = [pytest.mark.distributed, pytest.mark.xdist_group("processes")]

STAGES = ["zero0", "zero1", "zero2", "zero3"]
STEP = "align.engine.deepspeed:DeepSpeedEngine.step"
SHORT = (
    "lora.dropout=0", "trainer.max_steps=4", "trainer.batch_size=7", "trainer.save_every=2", "trainer.eval_every=2",
    "trainer.micro_batch_tokens=200", "engine.timeout_s=60",
)  # fmt: skip
# name -> words of a run, at its own settings
RUNS: dict[str, tuple[str, ...]] = {
    "wpo": (*SHORT, "trainer.num_samples=2", "trainer.sample_tokens=4"),
    "whole weights": (*SHORT, "lora.rank=0"),
    "frozen reference": (*SHORT, "lora.rank=0", "reference.mode=model"),
    "kto": (*SHORT, "recipe=", "objective=kto"),
    "reward model": (*SHORT, "recipe=", "objective=bradley_terry", "lora.rank=0"),
}


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("processes")
    (out / "online").mkdir()
    rows_file(out / "labelled.jsonl", 0, 30, "labelled")
    rows_file(out / "labelled_heldout.jsonl", 1, 6, "labelled")
    for name in ("rounds", "members"):
        (out / name).mkdir()
    write(out / "members/train.jsonl", pairs(24))
    write(out / "members/heldout.jsonl", pairs(8, 100))
    return out


def words(base: Path, run: Path, name: str, *more: str) -> list[str]:
    online = FAMILY | {f"composed {key}": value for key, value in COMPOSED.items()}
    if name in online:
        changes = [*online[name], "trainer.save_every=2", "engine.timeout_s=60", "sampling.max_new_tokens=6"]
        return ["train", *words_of(base / "online", *changes, *more, f"run.dir={run}")]
    if name == "members":  # dropout is another in each process
        return words_of_members(base / name, run, "trainer.dropouts=[0.0]", *more)
    if name == "collecting":
        return words_of_collecting(base, "dpo", run, "lora.dropout=0", f"reference.cache_dir={run}-cache", *more)
    if name.startswith("rounds"):
        kind = KINDS[name.removeprefix("rounds of ")]
        return words_of_rounds(base / "rounds", run, *kind, f"reference.cache_dir={run}-cache", *more)
    data = []
    if name == "kto":
        data = [f"data.train={base}/labelled.jsonl", f"data.heldout={base}/labelled_heldout.jsonl"]
    return settings(base, *RUNS[name], *data, f"run.dir={run}", f"reference.cache_dir={run}-cache", *more)


def done(ended: Ended) -> Ended:
    assert set(ended.codes) == {0}, ended.said
    return ended


_alone: dict[str, Path] = {}


def alone(base: Path, name: str) -> Path:
    """The run of one process that others are compared with."""
    if name not in _alone:
        _alone[name] = base / f"alone-{name.replace(' ', '-')}"
        done(shared().run(words(base, _alone[name], name)))
    return _alone[name]


def rows(run: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def weights(run: Path) -> dict[str, np.ndarray]:
    out: dict[str, np.ndarray] = {}
    for path in sorted((run / "final").glob("*.safetensors")):
        out |= load_file(path)
    return out


def assert_same_run(run: Path, other: Path, tolerance: float = 1e-5) -> None:
    """Every number of every step, and the weights in the end."""
    ours, theirs = rows(run), rows(other)
    assert [row["step"] for row in ours] == [row["step"] for row in theirs]
    # where the work is divided otherwise, these are others
    apart = ("time/", "tokens/processed", "tokens/micro_batches")
    for a, b in zip(ours, theirs, strict=True):
        assert a.keys() == b.keys()
        for key in a:
            if not key.startswith(apart):
                assert a[key] == pytest.approx(b[key], rel=tolerance, abs=tolerance), (a["step"], key)
    left, right = weights(run), weights(other)
    assert left.keys() == right.keys()
    for key in left:
        np.testing.assert_allclose(left[key], right[key], rtol=0, atol=2e-5, err_msg=key)


@pytest.mark.parametrize("stage", STAGES)
def test_wpo_at_every_stage(base, tmp_path, stage):
    done(shared().run(words(base, tmp_path / "run", "wpo", f"engine={stage}"), processes=2))
    assert_same_run(tmp_path / "run", alone(base, "wpo"))
    samples = (tmp_path / "run" / "samples.jsonl").read_text()
    assert samples == (alone(base, "wpo") / "samples.jsonl").read_text()


@pytest.mark.parametrize(
    ("name", "stage"),
    [
        ("whole weights", "zero3"), ("frozen reference", "zero3"),
        ("kto", "zero2"), 
        ("reward model", "zero3"), ("remax", "zero3"), ("grpo", "zero3"), ("ppo", "zero2"),
        ("dynamic", "zero2"), ("composed ppo", "zero3"), ("composed hypervolume", "zero2"), ("collecting", "zero3"),
        ("members", "zero3"), ("rounds of pairs", "zero3"), ("rounds of pairs", "zero2"),
        ("rounds of collect", "zero2"),
    ],
)  # fmt: skip
def test_every_trainer(base, tmp_path, name, stage):
    done(shared().run(words(base, tmp_path / "run", name, f"engine={stage}"), processes=2))
    assert_same_run(tmp_path / "run", alone(base, name))


def test_servers_are_asked_by_the_lead(base, tmp_path):
    more = ["engine=zero2", *variant("rollout", "hf", "tests.trainers.served_rollout.Served")]
    done(shared().run(words(base, tmp_path / "run", "remax", *more), processes=2))
    assert_same_run(tmp_path / "run", alone(base, "remax"))
    assert [path.read_text() for path in (tmp_path / "run").glob("served-*")] == ["made"]


@pytest.fixture(scope="module")
def pair(base) -> Path:
    """A run of two processes that nothing happens to, with dropout."""
    run = base / "pair"
    done(shared().run(words(base, run, "wpo", "engine=zero2", "lora.dropout=0.1"), processes=2))
    return run


@pytest.mark.parametrize(
    "hook",
    [
        Hook(STEP, 3, rank=1),
        Hook(STEP, 1, rank=0),
        Hook("align.engine.shards:TensorWriter.write", 9, rank=1),
        Hook("align.checkpoint:_put", 2, rank=0),
        Hook("os:rename", 2, when="after", rank=0),
        Hook(STEP, 4),
    ],
    ids=lambda h: f"{h.target.split(':')[1]}-{h.n}-rank-{h.rank}",
)
def test_killed_processes(base, pair, tmp_path, hook):
    command = words(base, tmp_path / "run", "wpo", "engine=zero2", "lora.dropout=0.1")
    killed = shared().run(command, [hook], processes=2)
    assert -9 in killed.codes
    assert 0 not in killed.codes
    assert killed.seconds < 60  # the survivor does not wait for ever
    done(shared().run(command, processes=2))
    assert evidence(tmp_path / "run") == evidence(pair)
    assert leftovers(tmp_path / "run") == []


@pytest.mark.parametrize(
    ("name", "hook"),
    [
        ("rounds of pairs", Hook("align.trainers.row_cache:RowCache.write", 3, rank=1)),
        ("rounds of pairs", Hook(STEP, 10, rank=1)),
        ("rounds of pairs", Hook("align.trainers.iterate.run:Rounds.evaluate", 1, 15, rank=1)),
        ("collecting", Hook("align.trainers.collect:Collector._chunk", 2, 10, rank=1)),
        ("members", Hook(STEP, 4, rank=0)),
    ],
    ids=["drawing", "the second training", "stopped in an evaluation", "stopped while collecting", "a member"],
)  # fmt: skip
def test_killed_in_a_part(base, tmp_path, name, hook):
    """What one process had drawn or trained is not lost to the others, and comes out as without the kill."""
    command = words(base, tmp_path / "run", name, "engine=zero2", "engine.timeout_s=60")
    ended = shared().run(command, [hook], processes=2)
    assert (-9 in ended.codes) if hook.number == 9 else ended.codes == (85, 85), ended.said
    done(shared().run(command, processes=2))
    assert_same_run(tmp_path / "run", alone(base, name))
    assert leftovers(tmp_path / "run") == []


@pytest.mark.parametrize(("first", "then"), [("zero2 2", "local 1"), ("local 1", "zero3 2"), ("zero1 2", "zero3 2")])
def test_goes_on_with_others(base, tmp_path, first, then):
    """Another number of processes, another stage: the same numbers."""
    for what, steps in ((first, 2), (then, 4)):
        engine, count = what.split()
        command = words(base, tmp_path / "run", "wpo", f"engine={engine}", f"trainer.max_steps={steps}",
                        "trainer.schedule_steps=4")  # fmt: skip
        done(shared().run(command, processes=int(count)))
    whole = base / "alone-scheduled"
    if not whole.exists():
        done(shared().run(words(base, whole, "wpo", "trainer.schedule_steps=4")))
    ours, theirs = rows(tmp_path / "run"), rows(whole)
    for a, b in zip(ours, theirs, strict=True):
        assert a["loss/total"] == pytest.approx(b["loss/total"], rel=1e-5)
        assert a["optimizer/gradient_norm"] == pytest.approx(b["optimizer/gradient_norm"], rel=1e-5)


@pytest.mark.parametrize(
    ("name", "how"),
    [
        ("optimizer-00001-of-00002.safetensors", "flip"), ("model-00002-of-00002.safetensors", "truncate"),
        ("optimizer-00002-of-00002.safetensors", "remove"),
    ],
)  # fmt: skip
def test_a_damaged_file_of_one_process(base, pair, tmp_path, name, how):
    run = Path(shutil.copytree(pair, tmp_path / "run"))
    file = run / "checkpoints" / "step-000004" / name
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 4
    if how == "remove":
        file.unlink()
    else:
        file.write_bytes(content if how == "flip" else content[:-9])
    command = words(base, run, "wpo", "engine=zero2", "lora.dropout=0.1", f"reference.cache_dir={pair}-cache")
    ended = done(shared().run(command, processes=2))
    assert f"step-000004 is damaged ({name}" in ended.said
    assert "resumed" in ended.said
    assert "at step 2" in ended.said
    assert evidence(run) == evidence(pair)


def test_signalled_together(base, pair, tmp_path):
    command = words(base, tmp_path / "run", "wpo", "engine=zero2", "lora.dropout=0.1")
    stopped = shared().run(command, [Hook(STEP, 3, 10, rank=1)], processes=2)  # SIGUSR1 to one of them
    assert stopped.codes == (85, 85), stopped.said
    assert "SIGUSR1 received" in stopped.said
    done(shared().run(command, processes=2))
    assert evidence(tmp_path / "run") == evidence(pair)


def test_refusals(base, tmp_path):
    def said(*more: str, name: str = "wpo") -> str:
        ended = shared().run(words(base, tmp_path / "run", name, *more), processes=2)
        assert set(ended.codes) == {2}, ended.said
        return ended.said

    assert "engine=local is one process" in said()
    assert "the example has" in said("engine=zero2", "trainer.micro_batch_tokens=20")
    assert "composer.measure=exact needs whole gradients" in said("engine=zero3", name="composed gradient")
