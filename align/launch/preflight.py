"""Whether the nodes of a job can run together: a shared directory, a free port, equal versions, a ping.

One process on each node. Nodes report through the shared directory; the first one reads the reports and gives the
verdict, which names the node that does not fit, in time even if others hang.
"""

from __future__ import annotations

import json
import os
import platform
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

from align.files import write_atomic
from align.jsons import Json

_PACKAGES = ("align", "torch", "transformers", "peft", "safetensors", "hydra-core", "numpy", "deepspeed")
_CHILD = Path(__file__).with_name("ping.py")
_POLL_S = 0.1
_LAST = "added up"
_STAGES = ("reported", "imported torch", "come to the meeting point", "met the others", _LAST)
_VERDICT_S = 5.0  # kept back for the verdict


@dataclass(frozen=True)
class _Node:
    """This node among those of the job."""

    number: int
    hosts: tuple[str, ...]
    port: int
    job: str


def run(words: Sequence[str], show: Callable[[str], None], tell: Callable[[str], None]) -> int:
    """`align launch check`; returns 0 if the nodes fit together, as the first one sees it, else 1."""
    own = {"dir": ".", "seconds": "60"}
    for word in words:
        key, equals, value = word.partition("=")
        if key not in own or not equals:
            raise ValueError(f"{word}: align launch check takes dir=DIR and seconds=N")
        own[key] = value
    if not own["seconds"].isdecimal() or not 10 <= int(own["seconds"]) <= 3600:
        raise ValueError(f"seconds={own['seconds']}: must be a whole number from 10 to 3600")
    end = time.monotonic() + int(own["seconds"])
    node = _node()
    name = node.hosts[node.number]
    directory = Path(own["dir"])
    if not directory.is_dir():
        tell(f"check: {name} does not see the directory {directory}; give one on a disk that all nodes share")
        return 1
    board = directory / f".check-{node.job}"
    report: Json = {"node": node.number, "stage": _STAGES[0], "versions": _versions()}
    try:
        board.mkdir(exist_ok=True)
        _write(board, node, report)
    except OSError as error:
        tell(f"check: {name} cannot write to {directory} ({error.strerror})")
        return 1
    if node.number == 0 and (taken := _taken(node.port)):
        _write(board, node, report | {"error": taken})
        tell(f"check: {name}: {taken}; give another launch.port")
        return 1
    problems = _ping(node, board, report, end - _VERDICT_S)
    if node.number > 0:
        for problem in problems:
            tell(f"check: {name}: {problem}")
        return 1 if problems else 0
    return _verdict(node, board, end, show, tell)


def _verdict(node: _Node, board: Path, end: float, show: Callable[[str], None], tell: Callable[[str], None]) -> int:
    """What all reports say together, when all are there or the time is up."""
    while (reports := _reports(board, node)) and not all(_final(r) for r in reports) and time.monotonic() < end - 1:
        time.sleep(_POLL_S)
    shutil.rmtree(board, ignore_errors=True)
    bad = _bad(reports, node.hosts)
    for line in bad:
        tell(f"check: {line}")
    if bad:
        return 1
    first = reports[0]
    assert first is not None
    show(
        f"check: {len(node.hosts)} nodes fit together ({', '.join(node.hosts)}): {first['backend']} adds up in "
        f"{first['milliseconds']:.2g} ms, versions are equal, {board.parent} is shared"
    )
    return 0


def _bad(reports: Sequence[Json | None], hosts: Sequence[str]) -> list[str]:
    """A line for each node that does not fit, the likeliest cause first."""
    out = []
    for host, report in zip(hosts, reports, strict=True):
        if report is None:
            out.append(f"{host} has not reported: it does not see the directory, or could not start")
    here = reports[0] or {"versions": {}}
    for host, report in zip(hosts, reports, strict=True):
        odd = [k for k, v in here["versions"].items() if report is not None and report["versions"].get(k) != v]
        for key in odd:
            out.append(f"{host} has {key} {report['versions'].get(key)}, {hosts[0]} has {here['versions'][key]}")  # type: ignore[index]
    if out:
        return out
    stages = [_stage(r) for r in reports]
    expected = len(hosts) * (len(hosts) + 1) / 2
    for host, report, stage in zip(hosts, reports, stages, strict=True):
        assert report is not None
        # the node that is behind the others is the one that they wait for
        if stage < max(stages) or (stage < len(_STAGES) - 1 and min(stages) == max(stages)):
            out.append(f"{host}: {report.get('error') or 'no answer'}, after it had {report['stage']}")
        elif report["stage"] == _LAST and report["total"] != expected:
            out.append(f"{host}: the nodes add up to {report['total']:g}, not {expected:g}")
    return out


def _stage(report: Json | None) -> int:
    return next(i for i, s in enumerate(_STAGES) if report is not None and report["stage"] == s)


def _final(report: Json | None) -> bool:
    return report is not None and ("error" in report or report["stage"] == _LAST)


def _ping(node: _Node, board: Path, report: Json, end: float) -> list[str]:
    """Run this node's part of the ping, writing down how far it came; returns what went wrong."""
    words = [str(node.number), str(len(node.hosts)), _address(node), str(node.port), f"{end - time.monotonic():.1f}"]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "TORCH_CPP_LOG_LEVEL": "ERROR"}
    if len(node.hosts) == 1 and sys.platform == "linux":
        environment.setdefault("GLOO_SOCKET_IFNAME", "lo")
    with tempfile.TemporaryFile("w+", errors="replace") as out, tempfile.TemporaryFile("w+", errors="replace") as err:
        command = [sys.executable, "-P", str(_CHILD), *words]
        process = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=out, stderr=err, env=environment, process_group=0
        )
        try:
            said = 0
            while True:
                code = process.poll()
                lines = _lines(out)
                for line in lines[said:]:
                    report |= line
                    _write(board, node, report)
                said = len(lines)
                if code is not None or time.monotonic() > end:
                    break
                time.sleep(_POLL_S)
        finally:
            if process.returncode is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
        if report["stage"] == _LAST and code == 0:
            return []
        err.seek(0)
        last = [line.strip() for line in err.read().splitlines() if line.strip()]
        error = "no answer from the others" if code is None else (last[-1][:300] if last else f"exit code {code}")
        _write(board, node, report | {"error": error})
        return [error]


def _lines(out: Any) -> list[Json]:
    """The whole JSON lines said so far; libraries print between them."""
    out.seek(0)
    found = []
    for line in out.read().splitlines(keepends=True):
        if line.startswith("{") and line.endswith("\n"):
            found.append(json.loads(line))
    return found


def _write(board: Path, node: _Node, report: Json) -> None:
    write_atomic(board / f"{node.number}.json", json.dumps(report))


def _reports(board: Path, node: _Node) -> list[Json | None]:
    out: list[Json | None] = []
    for number in range(len(node.hosts)):
        path = board / f"{number}.json"
        out.append(json.loads(path.read_text()) if path.exists() else None)
    return out


def _node() -> _Node:
    """This node, by what srun has set; alone without it."""
    number = int(os.environ.get("SLURM_NODEID", "0"))
    count = int(os.environ.get("SLURM_JOB_NUM_NODES", "1"))
    job = os.environ.get("SLURM_JOB_ID", str(os.getpid()))
    start = os.environ.get("SLURM_RESTART_COUNT", "0")
    hosts: tuple[str, ...] = (socket.gethostname(),)
    if "SLURM_JOB_NODELIST" in os.environ:
        command = ["scontrol", "show", "hostnames", os.environ["SLURM_JOB_NODELIST"]]
        try:
            hosts = tuple(subprocess.run(command, capture_output=True, text=True, check=True).stdout.split())
        except (OSError, subprocess.CalledProcessError):  # not on every node of every cluster
            hosts = tuple(f"node {i}" for i in range(count))
    port = int(os.environ.get("MASTER_PORT") or 12000 + int(job) % 20000)
    return _Node(number, hosts, port, f"{job}-{start}")


def _address(node: _Node) -> str:
    return os.environ.get("MASTER_ADDR") or ("127.0.0.1" if len(node.hosts) == 1 else node.hosts[0])


def _taken(port: int) -> str:
    """Why a port cannot be had, "" if it can."""
    with socket.socket() as found:
        found.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            found.bind(("", port))
        except OSError as error:
            return f"port {port}: {error.strerror}"
    return ""


def _versions() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for name in _PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            found[name] = "not installed"
    return found
