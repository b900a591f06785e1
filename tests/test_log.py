"""metrics.jsonl is exact whatever happens to the mirrors, the terminal, the disk or the process."""

from __future__ import annotations

import io
import json
import os
import resource
import sys

import pytest

from align.checkpoint import WriteFailed
from align.config import LogConfig
from align.report.log import Log


def make(directory, tensorboard=False, wandb="off") -> Log:
    return Log(directory, LogConfig(1, tensorboard, wandb, "align"), {"recipe": "wpo"})


def steps(log: Log) -> list[int]:
    return [json.loads(line)["step"] for line in log.path.read_text().splitlines()]


def test_a_tracker_that_raises_is_left_behind(tmp_path, capsys):
    log = make(tmp_path)
    seen = []

    def fails(row):
        seen.append(row["step"])
        if row["step"] == 2:
            raise ConnectionError("the tracker is down")

    def closes():
        raise RuntimeError("close me not")

    good = []
    log.mirrors += [("bad", fails, lambda: None), ("good", lambda row: good.append(row["step"]), closes)]
    for step in (1, 2, 3):
        log.row({"step": step, "loss/total": 0.5})
    log.close()
    assert seen == [1, 2]
    assert good == steps(log) == [1, 2, 3]
    said = capsys.readouterr().err
    assert "bad failed (the tracker is down)" in said
    assert "good failed while closing" in said


def test_a_tracker_that_cannot_start(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "wandb", None)
    log = make(tmp_path, wandb="offline")
    log.row({"step": 1})
    assert steps(log) == [1]
    assert "wandb cannot start" in capsys.readouterr().err


@pytest.mark.parametrize("torn", [b'{"step": 4, "loss/to', b'{"step": 4', b"{", b"\xff\xfe\x00", b"\x00" * 40])
def test_rows_survive_a_torn_last_line(tmp_path, torn):
    log = make(tmp_path)
    for step in (1, 2, 3):
        log.row({"step": step, "x": 0.1 * step})
    before = log.path.read_bytes()
    with log.path.open("ab") as stream:
        stream.write(torn)
    log.keep(9)
    assert log.path.read_bytes() == before
    log.keep(2)
    log.row({"step": 3, "x": 7.0})
    assert steps(log) == [1, 2, 3]
    log.flush()


def test_keep_without_a_file(tmp_path):
    log = make(tmp_path)
    log.keep(3)
    log.flush()
    assert not log.path.exists()


def test_no_nan_in_json(tmp_path, capsys):
    log = make(tmp_path)
    log.row({"step": 1, "a": float("nan"), "b": float("-inf"), "c": 0.25, "tokens": 3})
    text = log.path.read_text()
    assert json.loads(text, parse_constant=pytest.fail) == {"step": 1, "a": None, "b": None, "c": 0.25, "tokens": 3}
    assert "step 1: a, b not finite" in capsys.readouterr().err


def test_full_disk(tmp_path):
    log = make(tmp_path)
    log.row({"step": 1})
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            resource.setrlimit(resource.RLIMIT_FSIZE, (20, resource.RLIM_INFINITY))
            log.row({"step": 2, "x": 1.0})
        except WriteFailed as error:
            code = 0 if "metrics.jsonl cannot be written" in str(error) and "bytes free" in str(error) else 2
        finally:
            os._exit(code)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
    log.keep(2)
    assert steps(log) == [1]


class Gone(io.StringIO):
    """A terminal that has been closed."""

    def __init__(self, error: OSError):
        super().__init__()
        self.error = error

    def write(self, _: str) -> int:
        raise self.error


@pytest.mark.parametrize("error", [BrokenPipeError(), OSError(5, "Input/output error")])
def test_a_terminal_that_is_gone(tmp_path, error):
    log = make(tmp_path)
    log.console.file = Gone(error)
    for step in (1, 2):
        log.say("hello")
        log.row({"step": step})
    assert steps(log) == [1, 2]


def test_brackets_are_not_markup(tmp_path, capsys):
    make(tmp_path).say("[red]as it is[/nothing]")
    assert capsys.readouterr().err == "[red]as it is[/nothing]\n"


def test_progress_passes_everything_on(tmp_path):
    log = make(tmp_path)
    assert list(log.progress("x")(range(5), 5)) == [0, 1, 2, 3, 4]
    assert list(log.progress("x")(range(0), 0)) == []


def test_tensorboard_has_each_step_once_after_a_kill(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    first = make(tmp_path, tensorboard=True)
    for step in (1, 2, 3, 4):
        first.row({"step": step, "loss/total": float(step)})
    first.close()
    # steps 3 and 4 are after the checkpoint and come again, with other values to tell them apart
    again = make(tmp_path, tensorboard=True)
    again.keep(2)
    for step in (3, 4, 5):
        again.row({"step": step, "loss/total": 10.0 * step})
    again.close()
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    read = [(e.step, e.value) for e in events.Scalars("loss/total")]
    assert read == [(1, 1.0), (2, 2.0), (3, 30.0), (4, 40.0), (5, 50.0)]


def test_wandb_offline_writes_a_run(tmp_path):
    log = make(tmp_path, wandb="offline")
    assert [name for name, _, _ in log.mirrors] == ["wandb"]
    for step in (1, 2):
        log.row({"step": step, "loss/total": 0.5})
    log.close()
    runs = list((tmp_path / "wandb").glob("offline-run-*"))
    assert len(runs) == 1
    assert any(p.stat().st_size > 0 for p in runs[0].glob("*.wandb"))
    assert steps(log) == [1, 2]
