"""A Python interpreter for programs that a policy wrote, in a fresh process with limits.

What it is: a seat belt against what a language model writes by accident (endless loops, floods of output, gigabytes
of memory, a stray file, a download). What it is not: a wall against an adversary. An audit hook written in Python can
be got round by one who tries; the kernel's layers behind it (a network namespace without interfaces, Landlock for
files) are used where the kernel offers them and are named in each result, and none of them hides a kernel bug. Run
policies that may attack the machine in a virtual machine.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import re
import selectors
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

from align.tools import Observation, Tool

_SANDBOX = Path(__file__).with_name("sandbox.py")
# A call is the last closed block: what a policy writes after it is only talk about it.
_BLOCK = re.compile(r"^[ \t]*```python[ \t]*\n(.*?)^[ \t]*```", re.DOTALL | re.MULTILINE)
_ADDRESS = re.compile(r"\bat 0x[0-9a-f]+")


@dataclass(frozen=True)
class Limits:
    """What a program may use. Seconds are of the clock; its CPU time has the same limit, rounded up."""

    seconds: float = 5.0
    memory_mib: int = 512  # of address space, the interpreter's own 20 included
    output_bytes: int = 4096
    file_mib: int = 1  # of each file that it writes
    open_files: int = 32

    def __post_init__(self) -> None:
        if not self.seconds > 0 or min(self.output_bytes, self.file_mib, self.open_files) < 1 or self.memory_mib < 64:
            raise ValueError(f"{self}: limits must be positive, memory_mib at least 64")


@dataclass(frozen=True)
class ToolResult:
    """What became of a program."""

    output: str  # stdout and stderr, cut at the limit, in UTF-8 with broken bytes replaced
    error: str  # "" if the program came to its end with exit code 0
    timed_out: bool
    truncated: bool  # the output went on; the program was ended there
    seconds: float  # of the clock, the interpreter's start included
    isolation: tuple[str, ...]  # layers in force: limits, audit, and network, files where the kernel offers them


def run_python(program: str, limits: Limits) -> ToolResult:
    """Run a program in a process of its own, in an empty directory that is removed after it.

    A last line that is an expression has its value printed, as at Python's prompt. The environment is empty, hashing
    is not randomised, and addresses in the output are replaced: a deterministic program has one result. Modules are
    those of the standard library. New processes and threads, sockets, foreign functions and files outside its directory
    (but for reading Python's own) are refused with PermissionError.
    """
    start = time.monotonic()
    report_read, report_write = os.pipe()
    with tempfile.TemporaryDirectory(prefix="align-tool-") as directory:
        settings = {
            "cpu_s": math.ceil(limits.seconds),
            "memory": limits.memory_mib << 20,
            "file": limits.file_mib << 20,
            "open_files": limits.open_files,
            "report": report_write,
        }
        with os.fdopen(report_read, "rb") as report:
            try:
                process = subprocess.Popen(
                    # no site-packages, no user directory, nothing imported from the working directory
                    [sys.executable, "-s", "-S", "-P", "-B", "-X", "utf8", str(_SANDBOX), json.dumps(settings)],
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                    stderr=subprocess.STDOUT,
                    cwd=directory,
                    env={"PYTHONHASHSEED": "0"},
                    pass_fds=(report_write,),
                    start_new_session=True,
                )
            finally:
                os.close(report_write)
            try:
                output, reported, timed_out, truncated = _talk(process, program, report.fileno(), limits, start)
            finally:
                _end(process)
    isolation, error = _understand(reported)
    cut = output[: limits.output_bytes].decode("utf-8", errors="replace")
    code = process.returncode
    if timed_out or code == -signal.SIGXCPU:
        timed_out, error = True, f"TimeoutError: not finished after {limits.seconds:g} s"
    elif truncated:
        error = f"OutputError: more than {limits.output_bytes} bytes of output"
    elif not error and code < 0:
        error = f"ended by signal {signal.Signals(-code).name}"
    elif not error and code > 0:
        error = f"SystemExit: {code}"
    text = _ADDRESS.sub("at 0x...", cut)
    return ToolResult(text, error, timed_out, truncated, time.monotonic() - start, isolation)


class PythonTool(Tool):
    """Runs the last ```python block of an emission; see run_python."""

    name = "python"

    def __init__(
        self, seconds: float, memory_mib: int, output_bytes: int, *, file_mib: int = 1, open_files: int = 32
    ) -> None:
        self.limits = Limits(seconds, memory_mib, output_bytes, file_mib, open_files)

    def find(self, text: str) -> str | None:
        """The last closed ```python block."""
        blocks = _BLOCK.findall(text)
        return blocks[-1] if blocks else None

    def run(self, call: str) -> Observation:
        """What the program printed, then its error if it failed, each without surrounding blank lines."""
        result = run_python(call, self.limits)
        parts = [result.output.strip("\n"), f"Error: {result.error}" if result.error else ""]
        return Observation("\n".join(p for p in parts if p), bool(result.error))


def _talk(
    process: subprocess.Popen, program: str, report: int, limits: Limits, start: float
) -> tuple[bytes, bytes, bool, bool]:
    """Feed the program in and read until both pipes are closed, time is up or the output is too long."""
    assert process.stdin is not None
    assert process.stdout is not None
    source = memoryview(program.encode("utf-8", errors="replace"))
    output, reported = bytearray(), bytearray()
    os.set_blocking(process.stdin.fileno(), False)
    with selectors.DefaultSelector() as ready:
        ready.register(process.stdin, selectors.EVENT_WRITE)
        ready.register(process.stdout, selectors.EVENT_READ)
        ready.register(report, selectors.EVENT_READ)
        while ready.get_map():
            left = start + limits.seconds - time.monotonic()
            if left <= 0:
                return bytes(output), bytes(reported), True, False
            for key, _ in ready.select(left):
                if key.fileobj is process.stdin:
                    try:
                        source = source[os.write(key.fd, source[:65536]) :]
                    except BrokenPipeError:
                        source = source[len(source) :]
                    if not source:
                        ready.unregister(process.stdin)
                        process.stdin.close()
                    continue
                part = os.read(key.fd, 65536)
                if not part:
                    ready.unregister(key.fileobj)
                elif key.fd == report:
                    reported += part[: 65536 - len(reported)]
                else:
                    output += part
                    if len(output) > limits.output_bytes:
                        return bytes(output), bytes(reported), False, True
    try:  # the pipes are closed; a program may still run without them
        process.wait(max(0.0, start + limits.seconds - time.monotonic()))
    except subprocess.TimeoutExpired:
        return bytes(output), bytes(reported), True, False
    return bytes(output), bytes(reported), False, False


def _end(process: subprocess.Popen) -> None:
    """End the process and what it started, by the group that it leads, and collect it."""
    # Not collected yet, so that the number still belongs to this group and to no other.
    if process.returncode is None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    for stream in (process.stdin, process.stdout):
        if stream is not None and not stream.closed:
            stream.close()


def _understand(reported: bytes) -> tuple[tuple[str, ...], str]:
    """The sandbox's own lines: the layers in force, then the error if there was one."""
    isolation: tuple[str, ...] = ()
    error = ""
    for line in reported.splitlines():
        try:
            said = json.loads(line)
            isolation, error = tuple(said.get("isolation", isolation)), str(said.get("error", error))
        except (ValueError, TypeError, AttributeError):  # the program wrote into the pipe itself
            continue
    return isolation, error
