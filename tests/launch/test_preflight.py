"""The check of nodes, on this machine alone and as it reads the reports of others."""

from __future__ import annotations

import socket
import subprocess
import sys

import pytest

from align.cli import main
from align.launch.preflight import _bad

HOSTS = ("a", "b", "c")
POINT = "come to the meeting point"


def report(node: int, stage: str = "added up", **more) -> dict:
    return {"node": node, "stage": stage, "versions": {"torch": "2", "python": "3"}, "total": 6.0} | more


def all_of(*changed: dict | None) -> list[dict | None]:
    return [report(0), *changed]


@pytest.mark.parametrize(
    "reports, lines",
    [
        (all_of(report(1), report(2)), []),
        (all_of(report(1), None), ["c has not reported: it does not see the directory, or could not start"]),
        (all_of(report(1, versions={"torch": "1", "python": "3"}), report(2)), ["b has torch 1, a has 2"]),
        (all_of(report(1), report(2, versions={"python": "3"})), ["c has torch None, a has 2"]),
        (all_of(report(1, total=5.0), report(2)), ["b: the nodes add up to 5, not 6"]),
        (
            [report(0, POINT), report(1, "imported torch", error="cannot reach a:5"), report(2, POINT)],
            ["b: cannot reach a:5, after it had imported torch"],
        ),
        (
            [report(0, "met the others"), report(1, "met the others"), report(2, "reported", error="no torch")],
            ["c: no torch, after it had reported"],
        ),
        (
            [report(i, "met the others") for i in range(3)],
            [f"{host}: no answer, after it had met the others" for host in HOSTS],
        ),
    ],
)
def test_the_verdict_names_the_node_that_does_not_fit(reports, lines):
    assert _bad(reports, HOSTS) == lines


def test_a_machine_alone_fits(tmp_path):
    command = [sys.executable, "-m", "align.cli", "launch", "check", f"dir={tmp_path}"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=90)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith(f"check: 1 nodes fit together ({socket.gethostname()}): ")
    assert list(tmp_path.iterdir()) == []


def test_a_taken_port_and_a_missing_directory(tmp_path, capsys, monkeypatch):
    assert main(["launch", "check", f"dir={tmp_path}/none"]) == 1
    assert f"check: {socket.gethostname()} does not see the directory {tmp_path}/none" in capsys.readouterr().err
    with socket.socket() as held:
        held.bind(("127.0.0.1", 0))
        held.listen()
        monkeypatch.setenv("MASTER_PORT", str(held.getsockname()[1]))
        assert main(["launch", "check", f"dir={tmp_path}"]) == 1
    assert "Address already in use; give another launch.port" in capsys.readouterr().err


@pytest.mark.parametrize(
    "words, text",
    [(["check", "x=1"], "takes dir=DIR and seconds=N"), (["check", "seconds=5"], "from 10 to 3600"),
     (["chek"], "say align launch check"), ([], "say align launch check")],
)  # fmt: skip
def test_refusals(capsys, words, text):
    assert main(["launch", *words]) == 2
    assert text in capsys.readouterr().err
