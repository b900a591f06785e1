"""Processes on this machine: what they are told, which of them is named when they fail, signals, sweeps one by one."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from align.cli import main
from align.config import compose
from align.launch import local, place
from tests.killer import evidence, settings, shared
from tests.launch.cluster import wait_for

PARTS = [sys.executable, "-m", "tests.launch.parts"]
ROOT = Path(__file__).parents[2]
HOST = socket.gethostname()


def clean() -> dict[str, str]:
    return {k: v for k, v in os.environ.items() if k not in (*place.VARIABLES, "OMP_NUM_THREADS")}


def parts(mode: str, out: Path, number: int = 2, environment: dict[str, str] | None = None) -> subprocess.Popen:
    return subprocess.Popen(
        [*PARTS, "launch", str(number), mode, str(out)],
        cwd=ROOT,
        env=clean() | (environment or {}),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def told(out: Path, rank: int) -> dict:
    return json.loads((out / f"{rank}.json").read_text())


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().split()[2] != "Z"
    except FileNotFoundError:
        return False


def test_each_process_is_told_its_place(tmp_path):
    process = parts("report", tmp_path, 3)
    out, err = process.communicate(timeout=60)
    assert (process.returncode, err) == (0, "")
    assert out == "rank 0 speaks\n"  # the others are silent
    found = [told(tmp_path, rank) for rank in range(3)]
    assert [(f["RANK"], f["LOCAL_RANK"]) for f in found] == [("0", "0"), ("1", "1"), ("2", "2")]
    assert {(f["WORLD_SIZE"], f["LOCAL_WORLD_SIZE"], f["MASTER_ADDR"]) for f in found} == {("3", "3", "127.0.0.1")}
    (port,) = {int(f["MASTER_PORT"]) for f in found}
    assert 1024 < port < 65536
    cores = len(os.sched_getaffinity(0))
    assert {f["OMP_NUM_THREADS"] for f in found} == {str(max(1, cores // 3))}


def test_nodes_of_a_job_count_on(tmp_path):
    """Two launchers with the variables that a template and srun set, two processes each: ranks 0 to 3 of one run."""
    for node in (0, 1):
        with local.DeferredSignals() as held:
            where = place.Place(2, node, "first-node", 12345)
            code = local.launch(["report", str(tmp_path)], 2, where, 3, held, print, "tests.launch.parts")
        assert code == 0
    found = [told(tmp_path, rank) for rank in range(4)]
    assert [(f["RANK"], f["LOCAL_RANK"]) for f in found] == [("0", "0"), ("1", "1"), ("2", "0"), ("3", "1")]
    common = {(f["WORLD_SIZE"], f["LOCAL_WORLD_SIZE"], f["MASTER_ADDR"], f["MASTER_PORT"]) for f in found}
    assert common == {("4", "2", "first-node", "12345")}
    assert {f["OMP_NUM_THREADS"] for f in found} == {"3"}


def test_place_is_read_from_a_job(monkeypatch):
    config = compose(["recipe=wpo"])
    assert place.place(config) == place.Place(1, 0, "127.0.0.1", None)
    for key, value in {"ALIGN_NODES": "2", "SLURM_NODEID": "1", "MASTER_ADDR": "a", "MASTER_PORT": "5000"}.items():
        monkeypatch.setenv(key, value)
    assert place.place(config) == place.Place(2, 1, "a", 5000)
    monkeypatch.setenv("MASTER_PORT", "")
    with pytest.raises(ValueError, match="MASTER_PORT"):
        place.place(config)
    monkeypatch.setenv("SLURM_NODEID", "2")
    monkeypatch.setenv("MASTER_PORT", "5000")
    with pytest.raises(ValueError, match="SLURM_NODEID=2"):
        place.place(config)
    monkeypatch.delenv("MASTER_PORT")
    with pytest.raises(ValueError, match="MASTER_PORT"):
        place.place(config)


def test_a_job_of_one_node_meets_at_any_free_port(monkeypatch):
    """Of another job on the node, or of another program, it must not depend."""
    for key, value in {"ALIGN_NODES": "1", "SLURM_NODEID": "0", "MASTER_ADDR": "a", "MASTER_PORT": ""}.items():
        monkeypatch.setenv(key, value)
    config = compose(["recipe=wpo"])
    assert place.place(config) == place.Place(1, 0, "127.0.0.1", None)
    monkeypatch.setenv("MASTER_PORT", "5000")
    assert place.place(config) == place.Place(1, 0, "a", 5000)


@pytest.mark.parametrize("mode", ["raise", "lost"])
def test_the_process_that_failed_first_is_named_with_its_traceback(tmp_path, mode):
    """raise: rank 0 would wait a minute for it. lost: rank 0 fails too, because rank 1 is gone."""
    start = time.monotonic()
    process = parts(mode, tmp_path)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 1
    lines = err.splitlines()
    assert lines[0] == f"align: rank 1 on {HOST} failed first:"
    assert lines[1].startswith("align: Traceback") or lines[1].startswith("Traceback")
    assert "LookupError: the cause" in err
    assert "PeerLost" not in err
    assert lines[-1] == f"align: rank 1 on {HOST} ended with exit code 1; the other 1 here were ended"
    assert time.monotonic() - start < 30
    assert not any(alive(told(tmp_path, rank)["pid"]) for rank in (0, 1))


def test_a_killed_process_is_named(tmp_path):
    process = parts("kill", tmp_path)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 128 + signal.SIGKILL
    assert f"rank 1 on {HOST} was killed by SIGKILL" in err
    assert not alive(told(tmp_path, 0)["pid"])


def test_what_a_silent_process_said_is_shown(tmp_path):
    process = parts("code", tmp_path)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 2
    assert f"rank 1 on {HOST} failed first:" in err
    assert "align: the row is wrong" in err


@pytest.mark.parametrize("number, code", sorted(place.CODES.items()))
def test_a_signal_waits_until_it_is_heard(tmp_path, number, code):
    """It comes while the processes are deaf, as a run is while it imports torch; each hears it once."""
    process = parts("listen", tmp_path)
    assert wait_for(lambda: all((tmp_path / f"{rank}.json").exists() for rank in (0, 1)), 60)
    process.send_signal(number)
    (tmp_path / "listen").touch()
    _, err = process.communicate(timeout=60)
    assert (process.returncode, err) == (code, "")
    assert [json.loads((tmp_path / f"{rank}.heard").read_text()) for rank in (0, 1)] == [[number]] * 2


def test_a_second_interrupt_ends_deaf_processes(tmp_path):
    process = parts("wait", tmp_path)
    assert wait_for(lambda: all((tmp_path / f"{rank}.json").exists() for rank in (0, 1)), 60)
    process.send_signal(signal.SIGINT)
    assert wait_for(lambda: process.poll() is not None, 0.5) is False  # one is a wish, and nobody has heard it
    process.send_signal(signal.SIGINT)
    process.communicate(timeout=60)
    assert process.returncode == 130
    assert not any(alive(told(tmp_path, rank)["pid"]) for rank in (0, 1))


def test_processes_do_not_outlive_their_launcher(tmp_path):
    process = parts("wait", tmp_path)
    assert wait_for(lambda: all((tmp_path / f"{rank}.json").exists() for rank in (0, 1)), 60)
    process.kill()
    process.communicate(timeout=60)
    assert wait_for(lambda: not any(alive(told(tmp_path, rank)["pid"]) for rank in (0, 1)), 10)


def refusal(capfd, *words: str) -> str:
    assert main(["train", "recipe=wpo", "model=tiny", *words]) == 2
    err = capfd.readouterr().err
    assert err.count("\n") == 1
    return err


def test_refusals_before_anything_starts(capfd):
    several = refusal(capfd, "launch.processes=2")
    assert "launch.processes=2: engine=local is one process; choose engine=zero0" in several
    assert "launch.nodes is not a setting here; launch=slurm has it" in refusal(capfd, "launch.nodes=2")
    assert "launch.port has no effect on one process" in refusal(capfd, "launch.port=20000")
    assert "launch.port=80: must be at least 1024" in refusal(capfd, "launch.port=80")
    assert "--dry-run shows what launch=slurm" in refusal(capfd, "--dry-run")
    assert "here each key has one" in refusal(capfd, "-m")


def test_a_taken_port_is_told(capfd):
    with socket.socket() as held:
        held.bind(("127.0.0.1", 0))
        held.listen()
        port = held.getsockname()[1]
        err = refusal(capfd, "engine=zero0", "launch.processes=2", f"launch.port={port}")
    assert f"launch.port={port}: Address already in use on {HOST}" in err


def test_a_process_of_a_launcher_starts_no_others(monkeypatch, capfd):
    """Also torchrun's: the words are run here, whatever they say of processes."""
    for key, value in {"RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1"}.items():
        monkeypatch.setenv(key, value)
    assert place.is_worker()
    assert main(["train", "recipe=wpo", "model=tiny", "data.train=/no/such.jsonl"]) == 2
    assert "no such file" in capfd.readouterr().err
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert "engine=local is one process" in refusal(capfd)


@pytest.mark.slow
def test_a_sweep_runs_one_after_the_other(tmp_path):
    words = settings(tmp_path, "optimizer.lr=1e-3,1e-4", f"run.dir={tmp_path}/sweep", "trainer.max_steps=2")
    command = [sys.executable, "-m", "align.cli", words[0], "-m", *words[1:]]
    done = subprocess.run(command, cwd=ROOT, env=clean(), capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    assert re.findall(r"^run \d of \d.*", done.stdout, re.M) == ["run 1 of 2: lr-0.001", "run 2 of 2: lr-0.0001"]
    assert done.stdout.endswith("lr-0.001: done\nlr-0.0001: done\n")
    alone = tmp_path / "alone"
    assert shared().run(settings(tmp_path, "optimizer.lr=1e-4", f"run.dir={alone}", "trainer.max_steps=2")).code == 0
    assert evidence(tmp_path / "sweep" / "lr-0.0001") == evidence(alone) != evidence(tmp_path / "sweep" / "lr-0.001")


@pytest.mark.slow
@pytest.mark.distributed
def test_align_train_starts_its_processes(tmp_path):
    """Two processes of a real run; killed ranks and equal numbers are the engines' tests."""
    words = settings(tmp_path, "engine=zero0", "launch.processes=2", f"run.dir={tmp_path}/two", "trainer.max_steps=2")
    done = subprocess.run(
        [sys.executable, "-m", "align.cli", *words], cwd=ROOT, env=clean(), capture_output=True, text=True, timeout=240
    )
    assert done.returncode == 0, done.stderr
    summary = json.loads((tmp_path / "two" / "summary.json").read_text())
    assert summary["step"] == 2
