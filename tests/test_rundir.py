"""The run directory: its lock, what it refuses, and its small files."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys

import pytest

from align import checkpoint
from align.config import compose
from align.rundir import RunDirectory, default_name, environment

WORDS = ["recipe=wpo", "model=tiny", "data.train=train.jsonl"]


def open_run(path, *more: str) -> RunDirectory:
    return RunDirectory(compose([*WORDS, f"run.dir={path}", *more]))


def saved(run: RunDirectory) -> None:
    checkpoint.save(run.checkpoints, 3, {}, lambda path: (path / "weights").write_text("x"), 2)


def test_same_settings_resume(tmp_path):
    run = open_run(tmp_path / "a" / "run")
    assert not run.resumed
    saved(run)
    run.close()
    run = open_run(tmp_path / "a" / "run", "log.console_every=7", "trainer.save_every=9", "trainer.max_steps=99")
    assert run.resumed
    assert "console_every: 7" in (run.path / "config.yaml").read_text()
    run.close()


@pytest.mark.parametrize("word", ["optimizer.lr=1e-3", "objective.beta=0.3", "data.max_tokens=77", "model.seed=4"])
def test_other_settings_are_named(tmp_path, word):
    run = open_run(tmp_path)
    saved(run)
    run.close()
    before = (tmp_path / "config.yaml").read_text()
    with pytest.raises(ValueError, match=word.split("=")[0]) as caught:
        open_run(tmp_path, word)
    assert (tmp_path / "config.yaml").read_text() == before
    # the refused start holds no lock, even while its error is looked at
    open_run(tmp_path).close()
    assert str(tmp_path) in str(caught.value)


def test_other_settings_are_counted(tmp_path):
    run = open_run(tmp_path)
    saved(run)
    run.close()
    with pytest.raises(ValueError, match=r"and 2 more"):
        open_run(tmp_path, "optimizer.lr=1e-3", "seed=5", "lora.rank=2")


def test_checkpoints_without_settings_are_refused(tmp_path):
    run = open_run(tmp_path)
    saved(run)
    run.close()
    (tmp_path / "config.yaml").unlink()
    with pytest.raises(ValueError, match="config.yaml is gone"):
        open_run(tmp_path)


def test_an_abandoned_start_leaves_nothing(tmp_path):
    run = open_run(tmp_path, "seed=3")
    run.write_json("resolved.json", {"precision": "bfloat16"})
    (tmp_path / "samples.jsonl").write_text("{}\n")
    run.close()
    run = open_run(tmp_path)
    assert run.read_json("resolved.json") is None
    assert not (tmp_path / "samples.jsonl").exists()
    run.close()


def test_what_auto_found_holds_for_the_same_settings_before_the_first_checkpoint(tmp_path):
    """Trajectories may have been collected in this precision; another one would begin the collection anew."""
    run = open_run(tmp_path)
    run.write_json("resolved.json", {"precision": "bfloat16"})
    (tmp_path / "samples.jsonl").write_text("{}\n")
    run.close()
    run = open_run(tmp_path, "log.console_every=7")
    assert run.read_json("resolved.json") == {"precision": "bfloat16"}
    assert not (tmp_path / "samples.jsonl").exists()
    run.close()


def test_an_interrupted_replacement_is_undone_before_anything_is_decided(tmp_path):
    run = open_run(tmp_path)
    saved(run)
    os.rename(run.checkpoints / "step-000003", run.checkpoints / ".replaced-step-000003")
    run.close()
    with pytest.raises(ValueError, match="optimizer.lr"):
        open_run(tmp_path, "optimizer.lr=1e-3")


def test_lock_names_its_owner_and_dies_with_it(tmp_path):
    code = (
        "import sys, time; from align.config import compose; from align.rundir import RunDirectory;"
        f"run = RunDirectory(compose({[*WORDS, f'run.dir={tmp_path}']!r})); print('held', flush=True); time.sleep(60)"
    )
    other = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    try:
        assert other.stdout is not None
        assert other.stdout.readline() == "held\n"
        with pytest.raises(ValueError, match=f"in use by process {other.pid} on {socket.gethostname()}"):
            open_run(tmp_path)
    finally:
        other.kill()
        other.wait()
    open_run(tmp_path).close()  # the file of a dead process is no lock
    assert (tmp_path / ".lock").read_text() == f"process {os.getpid()} on {socket.gethostname()}"


def test_directory_that_cannot_be(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="cannot be made"):
        open_run(tmp_path / "file" / "run")
    with pytest.raises(ValueError, match="cannot be made"):
        open_run(tmp_path / "file")
    (tmp_path / "odd" / ".lock").mkdir(parents=True)
    with pytest.raises(ValueError, match="cannot be locked"):
        open_run(tmp_path / "odd")


def test_small_files(tmp_path):
    run = open_run(tmp_path)
    assert run.read_json("x.json") is None
    run.write_json("x.json", {"a": [1, 2.5, None]})
    assert run.read_json("x.json") == {"a": [1, 2.5, None]}
    assert not list(tmp_path.glob(".x*"))
    run.close()
    told = environment("align train")
    assert told["command"] == "align train"
    assert {"torch", "align-rlhf"} <= told["packages"].keys()
    json.dumps(told)


def test_default_name():
    assert str(default_name(compose([*WORDS, "seed=4"]))) == "runs/wpo-tiny-seed4"


def test_secrets_of_the_environment_are_not_resolved(tmp_path, monkeypatch):
    monkeypatch.setenv("TOKEN_OF_SOMEBODY", "hunter2")
    run = open_run(tmp_path, "log.wandb_project=${oc.env:TOKEN_OF_SOMEBODY}")
    run.close()
    assert "hunter2" not in (tmp_path / "config.yaml").read_text()


def test_a_process_that_does_not_see_the_directory(tmp_path, monkeypatch):
    monkeypatch.setattr("align.rundir._ATTEMPTS", 1)
    run = open_run(tmp_path / "run")
    run._see_it()
    run.path = tmp_path / "elsewhere"
    with pytest.raises(ValueError, match="does not see what process 0 has written there; give a directory that all"):
        run._see_it()
    run.close()


def test_a_changed_variable_is_seen_on_resume(tmp_path, monkeypatch):
    """config.yaml holds its name: the value is compared by a hash."""
    word = "optimizer.lr=${oc.env:ALIGN_TEST_RATE}"
    monkeypatch.setenv("ALIGN_TEST_RATE", "1e-4")
    open_run(tmp_path, word).close()
    (tmp_path / "checkpoints" / "step-000001").mkdir(parents=True)
    open_run(tmp_path, word).close()
    monkeypatch.setenv("ALIGN_TEST_RATE", "1e-5")
    with pytest.raises(ValueError, match="optimizer.lr had another value: its environment variable has changed"):
        open_run(tmp_path, word)
    (tmp_path / "hashes.json").unlink()  # as of a run of before
    open_run(tmp_path, word).close()
