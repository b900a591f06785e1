"""The processes of a run on this machine: started together, told of signals, ended together.

Each gets torchrun's variables (RANK, WORLD_SIZE, ...). Several machines are several launchers with the same words and
ALIGN_NODES, SLURM_NODEID, MASTER_ADDR and MASTER_PORT set, as the templates of launch/ and srun do.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import IO, Any

from align.launch.place import CODES, VARIABLES, Place

_POLL_S = 0.05
# After a process failed: long enough for the others to notice it themselves and to say so.
_GRACE_S = 3.0
# After a process stopped on a signal: the others have saved with it and only have to leave.
_STOP_S = 60.0
_TAIL = 4000  # bytes of a silent process's output that are shown
# What a process says when it is another one that failed.
_CONSEQUENCES = ("another process of the run died", "Connection closed by peer", "Connection reset by peer")
_DEATH_SIGNAL = 1  # PR_SET_PDEATHSIG of prctl(2)


@dataclass
class _Process:
    rank: int
    process: subprocess.Popen[bytes]
    output: IO[bytes] | None  # None: it speaks for itself
    failure: Path  # where it writes why it failed
    pending: list[int] = field(default_factory=list)  # signals that it does not hear yet
    code: int | None = None
    ended: float = 0.0
    killed: bool = False  # by us


@dataclass(frozen=True)
class _Failure:
    rank: int
    code: int
    text: str  # its traceback or its last words
    consequence: bool  # of another's failure
    when: float


class DeferredSignals:
    """Remembers signals while inside, so that none is lost before there is someone to tell."""

    def __init__(self) -> None:
        self.received: list[int] = []
        self._before: dict[signal.Signals, Any] = {}

    def __enter__(self) -> DeferredSignals:
        for number in CODES:
            self._before[number] = signal.signal(number, self._handle)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _handle(self, number: int, _: FrameType | None) -> None:
        self.received.append(number)


def launch(
    words: Sequence[str],
    number: int,
    where: Place,
    threads: int | None,
    held: DeferredSignals,
    say: Callable[[str], None],
    module: str = "align.launch.worker",
) -> int:
    """Start `number` processes of `python -m module words` on this machine and wait for them; returns the exit code.

    where.port: must be free on the first machine. Raises ValueError if it is not.
    """
    port = where.port
    if where.node == 0:
        port = _free_port(where.port)
    assert port is not None
    shared = _environment(number, where, port, threads)
    with tempfile.TemporaryDirectory(prefix="align-launch-") as scratch, contextlib.ExitStack() as stack:
        group = _Group(stack, held, say, where)
        for local in range(number):
            rank = where.node * number + local
            failure = Path(scratch) / f"{rank}.json"
            own = {"RANK": str(rank), "LOCAL_RANK": str(local), "ALIGN_FAILURE": str(failure)}
            group.start([sys.executable, "-m", module, *words], shared | own, rank, failure)
        return group.wait()


class _Group:
    """Processes that live and die together."""

    def __init__(self, stack: contextlib.ExitStack, held: DeferredSignals, say: Callable[[str], None], where: Place):
        self.stack, self.held, self.say, self.where = stack, held, say, where
        self.members: list[_Process] = []
        self.forwarded = 0  # of the signals received, those that were handed on

    def start(self, command: Sequence[str], environment: Mapping[str, str], rank: int, failure: Path) -> None:
        output = None
        if rank > 0:
            output = self.stack.enter_context(tempfile.TemporaryFile())  # noqa: SIM115
        process = subprocess.Popen(
            command,
            env=dict(environment),
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            process_group=0,  # a terminal's Ctrl-C comes once, from us
            preexec_fn=_prepared(os.getpid()),
        )
        member = _Process(rank, process, output, failure)
        self.members.append(member)
        self.stack.callback(_end, member)

    def wait(self) -> int:
        """Hand on signals until all have ended, or some have and the others get no longer; returns the exit code."""
        deadline = None
        while (running := self._running()) and (deadline is None or time.monotonic() < deadline):
            self._hand_on(running)
            if self.held.received.count(signal.SIGINT) > 1 and deadline is None:
                deadline = time.monotonic() + _GRACE_S
            time.sleep(_POLL_S)
            for member in running:
                code = member.process.poll()
                if code is None:
                    continue
                member.code, member.ended = code, time.time()
                if code != 0:
                    patience = _GRACE_S if self._failed(member) else _STOP_S
                    deadline = min(deadline or float("inf"), time.monotonic() + patience)
        for member in self._running():
            member.killed = True
            _end(member)
        return self._verdict()

    def _running(self) -> list[_Process]:
        return [member for member in self.members if member.code is None and not member.killed]

    def _hand_on(self, running: Sequence[_Process]) -> None:
        """Tell each process that has a handler; the others when they have one, since they would die or not hear it."""
        new = self.held.received[self.forwarded :]
        self.forwarded += len(new)
        for member in running:
            member.pending += new
            if member.pending and _catches(member.process.pid, member.pending[0]):
                with contextlib.suppress(ProcessLookupError):
                    member.process.send_signal(member.pending.pop(0))

    def _failed(self, member: _Process) -> bool:
        """Whether a process ended otherwise than done or stopped as it was asked to."""
        assert member.code is not None
        if member.code < 0 and -member.code in self.held.received:  # died of it before it could hear it
            return False
        return member.code not in (0, *CODES.values())

    def _verdict(self) -> int:
        failures = [_failure(m) for m in self.members if m.code is not None and self._failed(m)]
        if not failures:
            if any(m.killed for m in self.members) and self.held.received.count(signal.SIGINT) < 2:
                left = [m.rank for m in self.members if m.killed]
                self.say(f"rank {left[0]} on {_host()} did not stop within {_STOP_S:.0f} s and was ended")
            codes = {CODES[-m.code] if m.code < 0 else m.code for m in self.members if m.code is not None}  # type: ignore[index]
            codes |= {130 for _ in range(self.held.received.count(signal.SIGINT) > 1)}
            return next((code for code in (130, 85) if code in codes), 0)
        first = min(failures, key=lambda f: (f.consequence, f.when))
        lead = next((f for f in failures if f.rank == 0), None)
        if lead is not None and lead.code == 2 and first.code == 2:
            return 2  # wrong settings, which the lead has told in a line
        if first.consequence and self.where.nodes > 1:
            time.sleep(_GRACE_S)  # the machine where it began speaks first
        for line in _account(first, len(self.members)):
            self.say(line)
        return first.code if first.code > 0 else 128 - first.code


def _account(first: _Failure, number: int) -> list[str]:
    """What is said of a failure: the process and its host, then its own words."""
    how = f"ended with exit code {first.code}"
    if first.code < 0:
        how = f"was killed by {signal.Signals(-first.code).name}"
        if first.code == -signal.SIGKILL:
            how += " (the system does that when memory runs out)"
    where = f"rank {first.rank} on {_host()}"
    if first.consequence:
        return [first.text, f"{where} {how}, because another process failed: see what its host says"]
    head = [f"{where} failed first:", first.text] if first.text else []
    rest = f"; the other {number - 1} here were ended" if number > 1 else ""
    return [*head, f"{where} {how}{rest}"]


def _failure(member: _Process) -> _Failure:
    assert member.code is not None
    try:
        failure_report = json.loads(member.failure.read_text())
    except (OSError, ValueError):  # killed, or it has told by itself what is wrong
        text = ""
        if member.output is not None:
            member.output.seek(max(0, member.output.seek(0, os.SEEK_END) - _TAIL))
            text = member.output.read().decode(errors="replace").strip()
        return _Failure(member.rank, member.code, text, _consequence(text), member.ended)
    # what a library says of a lost connection is no PeerLost
    consequence = failure_report["elsewhere"] or _consequence(failure_report["traceback"].strip().rpartition("\n")[2])
    return _Failure(member.rank, member.code, failure_report["traceback"].strip(), consequence, failure_report["time"])


def _consequence(text: str) -> bool:
    return any(phrase in text for phrase in _CONSEQUENCES)


def _host() -> str:
    return os.environ.get("SLURMD_NODENAME") or socket.gethostname()


def _environment(number: int, where: Place, port: int, threads: int | None) -> dict[str, str]:
    """Variables that all processes of this machine share."""
    own = {k: v for k, v in os.environ.items() if k not in (*VARIABLES, "ALIGN_NODES")}
    own |= {
        "WORLD_SIZE": str(where.nodes * number),
        "LOCAL_WORLD_SIZE": str(number),
        "MASTER_ADDR": where.host,
        "MASTER_PORT": str(port),
    }
    if where.nodes == 1 and sys.platform == "linux":  # a machine's name need not resolve
        own.setdefault("GLOO_SOCKET_IFNAME", "lo")
    if threads is not None:
        own["OMP_NUM_THREADS"] = str(threads)
    elif number > 1:
        own.setdefault("OMP_NUM_THREADS", str(max(1, _cores() // number)))
    return own


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _free_port(wanted: int | None) -> int:
    """The wanted port if it can be had, or any. Raises ValueError if it is taken."""
    with socket.socket() as found:
        found.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            found.bind(("127.0.0.1" if wanted is None else "", wanted or 0))
        except OSError as error:
            raise ValueError(f"launch.port={wanted}: {error.strerror} on {_host()}; give another, or null") from None
        return int(found.getsockname()[1])


def _prepared(parent: int) -> Callable[[], None]:
    """What a child does before it becomes Python: deaf to signals until the run listens, and gone if we are."""
    libc = ctypes.CDLL(None, use_errno=True) if sys.platform == "linux" else None

    def prepare() -> None:
        for number in CODES:
            signal.signal(number, signal.SIG_IGN)
        if libc is not None:
            libc.prctl(_DEATH_SIGNAL, signal.SIGKILL)
            if os.getppid() != parent:
                os._exit(1)

    return prepare


def _catches(pid: int, number: int) -> bool:
    """Whether a process has a handler of its own for a signal; where that is not told, it is taken to have one."""
    try:
        status = Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return not Path("/proc/self/status").exists()
    mask = next((line.split()[1] for line in status.splitlines() if line.startswith("SigCgt:")), "0")
    return bool(int(mask, 16) >> (number - 1) & 1)


def _end(member: _Process) -> None:
    """End a process and what it has started, by the group that it leads, and collect it."""
    if member.process.returncode is None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(member.process.pid, signal.SIGKILL)
        member.process.wait()
