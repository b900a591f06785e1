"""The processor, the compiler that DeepSpeed's CPU optimiser needs, and the sandbox for programs of a policy."""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
import sysconfig
from pathlib import Path

from align.doctor.findings import Finding

_LAYERS = {
    "limits": "limits of time and memory",
    "audit": "Python's own refusals",
    "network": "a network of its own (user namespaces)",
    "files": "files by Landlock (Linux 5.13 or newer)",
}


def check_threads() -> list[Finding]:
    """Cores this process may use, against OMP_NUM_THREADS."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    quota = _quota()
    usable = max(1, min(cores, int(quota))) if quota else cores
    text = f"{cores} cores" + (f", a quota of {quota:g} of them" if quota and quota < cores else "")
    wanted = os.environ.get("OMP_NUM_THREADS")
    if wanted is None:
        if usable < cores:
            cure = f"OMP_NUM_THREADS={usable}"
            return [Finding("threads", "note", f"{text}; torch will start {cores} threads", cure)]
        return [Finding("threads", "ok", f"{text}, OMP_NUM_THREADS is not set: torch chooses")]
    if not wanted.isdecimal() or int(wanted) < 1:
        return [
            Finding("threads", "note", f"OMP_NUM_THREADS={wanted} is no number of threads", "unset OMP_NUM_THREADS")
        ]
    text += f", OMP_NUM_THREADS={wanted}"
    if int(wanted) > usable:
        cure = f"OMP_NUM_THREADS={usable}, divided by the processes on this machine"
        return [Finding("threads", "note", f"{text}: threads wait for each other", cure)]
    return [Finding("threads", "ok", text)]


def _quota() -> float | None:
    """Cores that the container's limit amounts to, or None."""
    try:
        limit, period = Path("/sys/fs/cgroup/cpu.max").read_text().split()
        return None if limit == "max" else int(limit) / int(period)
    except (OSError, ValueError):
        return None


def check_compiler() -> list[Finding]:
    """A C++ compiler, Python's headers and ninja: torch builds DeepSpeed's CPU optimiser with them on first use."""
    command = shlex.split(os.environ.get("CXX") or "c++")
    if not shutil.which(command[0]):
        return [Finding("compiler", "note", f"no {command[0]}: {_UNBUILT}", "install g++, or set CXX")]
    try:
        done = subprocess.run([*command, "--version"], capture_output=True, text=True, timeout=5)
    except subprocess.TimeoutExpired:
        return [Finding("compiler", "note", f"{command[0]} --version gave no answer within 5 s", "set CXX")]
    if done.returncode:
        return [Finding("compiler", "note", f"{command[0]} fails: {_UNBUILT}", "install g++, or set CXX")]
    version = done.stdout.splitlines()[0] if done.stdout else command[0]
    if not (Path(sysconfig.get_path("include")) / "Python.h").exists():
        cure = "install python3-dev (Debian) or python3-devel"
        return [Finding("compiler", "note", f"{version}, but no Python.h: {_UNBUILT}", cure)]
    beside = Path(sysconfig.get_path("scripts")) / "ninja"
    if not shutil.which("ninja") and not beside.exists():
        return [Finding("compiler", "note", f"{version}, but no ninja: {_UNBUILT}", "pip install ninja")]
    return [Finding("compiler", "ok", f"{version}, Python.h, ninja")]


_UNBUILT = "DeepSpeed's CPU optimiser cannot be built"


def check_sandbox() -> list[Finding]:
    """A program in the sandbox of rewards by unit tests and of the Python tool, and the layers around it."""
    from align.tools.python import Limits, run_python

    result = run_python("print(6 * 7)", Limits(seconds=8))
    if result.error or result.output.strip() != "42":
        cure = "do not use reward=unit_tests and the Python tool here"
        return [Finding("sandbox", "note", f"programs do not run: {result.error or result.output!r}", cure)]
    missing = [name for layer, name in _LAYERS.items() if layer not in result.isolation]
    if missing:
        cure = "run policies that you do not trust in a virtual machine"
        return [Finding("sandbox", "note", f"programs run without {' and without '.join(missing)}", cure)]
    return [Finding("sandbox", "ok", f"programs run behind {', '.join(result.isolation)}")]
