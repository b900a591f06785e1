"""Runs over rows as they come: killed, stopped by a bad row, in two processes, of several sources."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from align.cli import main
from tests.conftest import mostly_slow
from tests.killer import Hook, evidence, leftovers, rows_file, settings, shared

pytestmark = pytest.mark.xdist_group("resume")

STREAMS = "align.data.streams:"
ENGINE = "align.engine.local:LocalEngine."


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    base = tmp_path_factory.mktemp("streaming")
    rows_file(base / "train.jsonl", 0, 70)
    rows_file(base / "heldout.jsonl", 1, 6)
    return base


def words(base: Path, run: Path, *more: str) -> list[str]:
    """A run of 14 steps of 8 from 70 rows: into its second pass."""
    return settings(
        base, "recipe=dpo", "lora.dropout=0", "trainer.max_steps=14", "trainer.micro_batch_tokens=2048",
        "data.streaming=true", "data.shuffle_buffer=12", f"run.dir={run}", *more,
    )  # fmt: skip


@pytest.fixture(scope="module")
def whole(base) -> Path:
    run = base / "whole"
    ended = shared().run(words(base, run))
    assert ended.code == 0, ended.said
    return run


def rows(run: Path) -> list[dict]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def test_a_run_sees_every_row_once_a_pass(base, whole):
    assert [row["data/rows"] for row in rows(whole)] == [8 * step for step in range(1, 15)]
    assert [row["data/epoch"] for row in rows(whole)] == [0] * 8 + [1] * 6
    audit = json.loads((whole / "audit.json").read_text())
    assert (audit["train"]["rows_kept"], audit["heldout"]["rows_kept"]) == (112, 6)
    assert audit["train"]["sources"] == [str(base / "train.jsonl")]


HOOKS = [
    Hook(STREAMS + "Streams.take", 1),
    Hook(STREAMS + "Streams.take", 8),
    Hook(STREAMS + "Streams.take", 11, when="after"),
    Hook(STREAMS + "Stream._end", 1, when="after"),
    Hook(ENGINE + "step", 5, when="after"),
    Hook("align.engine.local:save_file", 6),
    Hook("align.trainers.trained:write_final", 1, when="after"),
]


@pytest.mark.parametrize("hook", mostly_slow(HOOKS, 1, 3), ids=lambda h: f"{h.target.split(':')[1]}-{h.when}-{h.n}")
def test_killed_anywhere_it_ends_as_if_nothing_had_been(base, whole, tmp_path, hook):
    command = words(base, tmp_path / "run")
    killed = shared().run(command, [hook])
    assert killed.code == -9, killed.said
    done = shared().run(command)
    assert done.code == 0, done.said
    assert evidence(tmp_path / "run") == evidence(whole)
    assert (tmp_path / "run/audit.json").read_bytes() == (whole / "audit.json").read_bytes()
    assert leftovers(tmp_path / "run") == []


def test_a_bad_row_saves_what_is_done_and_the_run_goes_on_without_it(base, tmp_path):
    """As if it had been left out from the beginning."""
    lines = (base / "train.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / "train.jsonl").write_text("".join([*lines[:55], '{"prompt": "x"}\n', *lines[55:]]))
    more = (f"data.train={tmp_path / 'train.jsonl'}", "data.max_bad_fraction=0.05", "trainer.save_every=100")
    drop = "data.on_bad_row=drop"
    straight = shared().run(words(base, tmp_path / "straight", *more, drop))
    assert straight.code == 0, straight.said
    stopped = shared().run(words(base, tmp_path / "run", *more))
    assert stopped.code == 2, stopped.said
    assert "train.jsonl:56: " in stopped.said
    assert "data.on_bad_row=drop leaves such rows out" in stopped.said
    done = shared().run(words(base, tmp_path / "run", *more, drop))
    assert done.code == 0, done.said
    assert "resumed" in done.said
    assert evidence(tmp_path / "run") == evidence(tmp_path / "straight")
    assert json.loads((tmp_path / "run/audit.json").read_text())["dropped"] == {"missing_field": 1}


def test_a_row_that_cannot_be_used_in_the_first_step_is_told_before_the_model_is_loaded(base, tmp_path, capsys):
    (tmp_path / "train.jsonl").write_text('{"prompt": "x"}\n')
    assert main(words(base, tmp_path / "run", f"data.train={tmp_path / 'train.jsonl'}")) == 2
    said = capsys.readouterr()
    assert "train.jsonl:1: " in said.err
    assert "model tiny" not in said.out


def test_a_changed_file_is_refused(base, tmp_path, capsys):
    (tmp_path / "train.jsonl").write_bytes((base / "train.jsonl").read_bytes())
    more = f"data.train={tmp_path / 'train.jsonl'}"
    assert main(words(base, tmp_path / "run", more, "trainer.max_steps=5")) == 0
    lines = (tmp_path / "train.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / "train.jsonl").write_text("".join([*lines[:35], lines[36], lines[35], *lines[37:]]))
    assert main(words(base, tmp_path / "run", more, "trainer.max_steps=9")) == 2
    assert "train.jsonl: has other rows than when the run was started" in capsys.readouterr().err


def test_sources_have_their_shares_of_every_step(base, tmp_path):
    rows_file(tmp_path / "other.jsonl", 2, 9)
    sources = f"data.train=[{base / 'train.jsonl'},{tmp_path / 'other.jsonl'}]"
    more = (sources, "data.mixture=schedule", "data.mixture_shares=[[0,[3,1]],[1,[1,3]]]", "trainer.schedule_steps=14")
    assert main(words(base, tmp_path / "run", *more)) == 0
    state = json.loads((tmp_path / "run/checkpoints/step-000014/state.json").read_text())
    first, second = state["streams"]["places"]
    assert (first["passes"], first["drawn"]) == (0, 56)
    assert 9 * second["passes"] + second["drawn"] == 56
    assert evidence(tmp_path / "run")["rows"] != []


@pytest.mark.parametrize(
    "more", [["recipe=reward_model", "lora.rank=0"], ["recipe=inpo_offline"], ["recipe=orpo"]], ids=lambda m: m[0]
)
def test_other_objectives_read_streams(base, tmp_path, more):
    ended = shared().run(words(base, tmp_path / "run", *more, "trainer.max_steps=3", "trainer.micro_batch_tokens=4096"))
    assert ended.code == 0, ended.said
    if more[0] == "recipe=reward_model":  # how its prompts are written is known at the end
        assert json.loads((tmp_path / "run/final/reward_model.json").read_text())["prompts"] == "chat"


@pytest.mark.parametrize("mode", ["adapter", "model"])
def test_a_reference_that_would_be_cached_is_computed_as_rows_come(base, tmp_path, mode):
    """reference.mode=cached is the adapter switched off where there is one, else a second set of weights."""
    rank = "lora.rank=4" if mode == "adapter" else "lora.rank=0"
    for name in ("cached", mode):
        ended = shared().run(
            words(base, tmp_path / name, rank, f"reference.mode={name}", "trainer.max_steps=4", "trainer.eval_every=2")
        )
        assert ended.code == 0, ended.said
        assert "examples from the cache" not in ended.said
    assert evidence(tmp_path / "cached") == evidence(tmp_path / mode)


@pytest.mark.distributed
@pytest.mark.parametrize("stage", ["zero1", "zero3"])
def test_two_processes_have_the_steps_of_one_and_may_be_killed(base, whole, tmp_path, stage):
    more = (f"engine={stage}", "trainer.max_steps=11", "trainer.schedule_steps=14", "engine.timeout_s=60")
    straight = shared().run(words(base, tmp_path / "straight", *more), processes=2)
    assert set(straight.codes) == {0}, straight.said
    for two, one in zip(rows(tmp_path / "straight"), rows(whole), strict=False):
        assert two["loss/total"] == pytest.approx(one["loss/total"], abs=2e-5)
        assert (two["data/rows"], two["tokens/targets"]) == (one["data/rows"], one["tokens/targets"])
    step = Hook("align.engine.deepspeed:DeepSpeedEngine.step", 10, when="after")
    killed = shared().run(words(base, tmp_path / "run", *more), [step], processes=2)
    assert -9 in killed.codes, killed.said
    done = shared().run(words(base, tmp_path / "run", *more), processes=2)
    assert set(done.codes) == {0}, done.said
    assert evidence(tmp_path / "run")["rows"] == evidence(tmp_path / "straight")["rows"]


@pytest.mark.distributed
def test_a_bad_row_ends_all_processes(base, tmp_path):
    lines = (base / "train.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / "train.jsonl").write_text("".join([*lines[:40], '{"prompt": "x"}\n', *lines[40:]]))
    more = (f"data.train={tmp_path / 'train.jsonl'}", "engine=zero1", "engine.timeout_s=60")
    ended = shared().run(words(base, tmp_path / "run", *more), processes=2)
    assert set(ended.codes) == {2}, ended.said
    assert (tmp_path / "run/checkpoints").is_dir()
