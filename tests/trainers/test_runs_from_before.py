"""Run directories of commit 63cd4e7, from before the loop was one, go on as they would have then.

runs_63cd4e7 has runs killed after step 4 of 8, or signalled in the evaluation of step 4, whose row is pending; one in
rounds, killed in the training of its second round, and a WARM one, killed in that of its second member; and the rows of
runs that nothing happened to.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from align.config import ConfigError, compose, compose_run
from tests.killer import Ended, shared
from tests.trainers.online_runs import rows_of

BEFORE = Path(__file__).parent / "runs_63cd4e7"
WORDS = json.loads((BEFORE / "words.json").read_text())


def align(directory: Path, *words: str) -> Ended:
    """In the directory, since the runs' settings name their files from there."""
    return shared().run(words, directory=directory)


def known(row: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in row.items() if not name.startswith("time/")}


@pytest.mark.parametrize("run", ["offline", "offline-pending", "online", "online-pending"])
def test_it_goes_on(tmp_path, run):
    directory = Path(shutil.copytree(BEFORE, tmp_path / "runs"))
    kind = run.removesuffix("-pending")
    done = align(directory, *WORDS[kind], f"run.dir={run}")
    assert done.code == 0, done.said
    assert "at step 4" in done.said
    assert json.loads((directory / run / "summary.json").read_text())["step"] == 8
    rows = rows_of(directory / run)
    assert [row["step"] for row in rows] == list(range(1, 9))
    assert_as_before(rows, kind)


def assert_as_before(rows: list[dict[str, Any]], kind: str) -> None:
    for row, line in zip(rows, (BEFORE / f"{kind}-rows.jsonl").open(), strict=True):
        was = json.loads(line)
        assert known(row).keys() == was.keys()
        # another processor rounds otherwise, and these are small differences of sums over few tokens
        assert known(row) == {name: pytest.approx(value, rel=1e-3, abs=1e-4) for name, value in was.items()}


@pytest.mark.parametrize(
    ("run", "part", "rows"), [("iterate", "rounds/02/train", "."), ("warm", "member-2", "member-2")]
)
def test_a_run_of_parts_goes_on(tmp_path, run, part, rows):
    directory = Path(shutil.copytree(BEFORE, tmp_path / "runs"))
    drawn = {p: p.stat().st_mtime_ns for p in (directory / run).glob("rounds/*/*.jsonl") if p.name != "data.jsonl"}
    done = align(directory, *WORDS[run], f"run.dir={run}")
    assert done.code == 0, done.said
    assert f"resumed {run}/{part} at step" in done.said
    assert_as_before(rows_of(directory / run / rows), run)
    assert {p: p.stat().st_mtime_ns for p in drawn} == drawn
    assert json.loads((directory / run / "summary.json").read_text())["step"] == 2


@pytest.mark.parametrize("run", ["offline", "online"])
def test_its_settings_are_read(run):
    config = compose_run([f"run.dir={BEFORE / run}"])
    assert (config.trainer.kind, config.trainer.max_steps, config.trainer.keep_best) == (run, 8, None)
    assert config.callbacks is None


def test_with_other_settings_it_is_refused(tmp_path):
    directory = Path(shutil.copytree(BEFORE, tmp_path / "runs"))
    refused = align(directory, *WORDS["offline"], "run.dir=offline", "optimizer.lr=0.002")
    assert refused.code == 2
    assert "optimizer.lr=0.001, now it is optimizer.lr=0.002" in refused.said


def test_a_part_that_has_moved_is_found_and_its_old_place_refused(tmp_path):
    """The model of these runs was made by a function that stands elsewhere now."""
    assert "align.pretrained." in (BEFORE / "offline" / "config.yaml").read_text()
    assert compose_run([f"run.dir={BEFORE / 'offline'}"]).model["_target_"].startswith("align.models.pretrained.")
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "mine.yaml").write_text("_target_: align.pretrained.tiny\n")
    with pytest.raises(ConfigError, match=r"model._target_=align.pretrained.tiny has moved; use .*models.pretrained"):
        compose(["recipe=dpo", "model=mine"], tmp_path)
