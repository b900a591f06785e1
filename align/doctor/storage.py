"""Free disk, caches, and locks that a killed build of a torch extension left behind. Nothing is created or removed."""

from __future__ import annotations

import os
import shlex
import shutil
import sys
import tempfile
import time
from pathlib import Path

from align.doctor.findings import Finding, Level, gib

_GIB = 1 << 30
_SIZE_SECONDS = 3.0  # for adding up a cache's files
# Memory that is a file: weights travel through it to an engine, and processes of one machine talk in it.
_SHARED_GIB = 1.0
_STALE_SECONDS = 3600.0  # DeepSpeed's largest extension takes minutes


def check_run_directory(directory: Path, free_gib: float) -> list[Finding]:
    """Room for checkpoints where runs are written."""
    return [_room("run directory", directory, free_gib, "blocker", "run.dir=DIR on another disk, or remove old runs")]


def check_align_cache(free_gib: float) -> list[Finding]:
    """ALIGN_CACHE: converted models and reference log-probs."""
    from align.config import cache_root

    return [_room("cache", cache_root(), free_gib, "blocker", "ALIGN_CACHE=DIR on another disk", size=True)]


def check_hub_cache(free_gib: float) -> list[Finding]:
    """Where models and data sets of the Hugging Face hub are kept; without effect on local models."""
    return [_room("hub cache", hub_cache(), free_gib, "note", "HF_HOME=DIR on another disk", size=True)]


def check_temporary() -> list[Finding]:
    """/dev/shm and the directory for temporary files."""
    found = [_room("temp", Path(tempfile.gettempdir()), _SHARED_GIB, "note", "TMPDIR=DIR on another disk")]
    shared = Path("/dev/shm")
    if shared.is_dir():
        cure = "in a container: --shm-size=16g or --ipc=host; vLLM's weights go through the run directory until then"
        found.append(_room("shared memory", shared, _SHARED_GIB, "note", cure))
    return found


def hub_cache() -> Path:
    """As huggingface_hub finds it: HF_HUB_CACHE, HF_HOME/hub, or below the user's cache directory."""
    named = os.environ.get("HF_HUB_CACHE")
    home = os.environ.get("HF_HOME") or _user_cache() / "huggingface"
    return Path(named).expanduser() if named else Path(home).expanduser() / "hub"


def extensions_root() -> Path:
    """As torch finds it: TORCH_EXTENSIONS_DIR, or below the user's cache directory."""
    return Path(os.environ.get("TORCH_EXTENSIONS_DIR") or _user_cache() / "torch_extensions")


def _user_cache() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")


def _room(check: str, directory: Path, least_gib: float, level: Level, cure: str, size: bool = False) -> Finding:
    """Whether a file can be written there and how much room there is; of a directory that is not there yet, in the
    nearest one above it."""
    there = next((p for p in (directory, *directory.absolute().parents) if os.path.lexists(p)), Path("/"))
    try:
        with tempfile.TemporaryFile(dir=there):
            pass
    except OSError as error:
        return Finding(check, level, f"{directory}: cannot be written in ({error.strerror})", cure)
    free = shutil.disk_usage(there).free
    text = f"{directory}: {gib(free)} free"
    if size and directory.is_dir():
        text += f", {_size(directory)} in it"
    if free < least_gib * _GIB:
        return Finding(check, level, f"{text}, wanted are {least_gib:g} GiB", cure)
    inodes = os.statvfs(there)
    if inodes.f_files and inodes.f_favail < 1000:
        return Finding(check, level, f"{text}, but room for {inodes.f_favail} files only", cure)
    return Finding(check, "ok", text)


def _size(directory: Path) -> str:
    """What the files below take, or "more than" what was counted in time. Links are not followed."""
    end = time.monotonic() + _SIZE_SECONDS
    total = 0
    for folder, _, names in os.walk(directory):
        for name in names:
            try:
                total += os.lstat(os.path.join(folder, name)).st_size
            except OSError:  # removed while we look
                continue
        if time.monotonic() > end:
            return f"more than {gib(total)}"
    return gib(total)


def check_extension_locks() -> list[Finding]:
    """Locks in torch's extensions directory. Torch waits for ever for one whose process was killed
    (torch/utils/file_baton.py; pytorch issue 189245)."""
    root = extensions_root()
    locks = sorted([*root.glob("*/lock"), *root.glob("*/*/lock")])
    if not locks:
        return [Finding("extension locks", "ok", f"none in {root}")]
    found = []
    for lock in locks:
        try:
            age = max(0.0, time.time() - lock.stat().st_mtime)
        except OSError:  # released meanwhile
            continue
        found.append(_judge_lock(lock, age, holder(lock)))
    return found


def _judge_lock(lock: Path, age: float, owner: int | None) -> Finding:
    """A lock of this age, in seconds. owner: the process that holds it; 0: none here does; None: not known."""
    minutes = f"{age / 60:.0f} min old"
    remove = f"rm {shlex.quote(str(lock))}"
    if owner and age < _STALE_SECONDS:
        return Finding("extension locks", "note", f"process {owner} is building {lock.parent.name}", "wait for it")
    if owner:
        text = f"process {owner} has held {lock} for {age / 3600:.1f} h: starts that need it hang"
        return Finding("extension locks", "blocker", text, f"kill {owner}; then {remove}")
    if owner is None and age < _STALE_SECONDS:
        return Finding("extension locks", "note", f"{lock} is {minutes}; if no build is running: {remove}")
    text = f"{lock} is {minutes} and no process here holds it: starts that need it hang"
    return Finding("extension locks", "blocker", text, f"{remove} (unless another node is building in this directory)")


def holder(path: Path) -> int | None:
    """The process that has a file open; 0: none on this machine; None: cannot be told."""
    if sys.platform != "linux":
        return None
    wanted = os.path.realpath(path)
    hidden = False
    for process in Path("/proc").iterdir():
        if not process.name.isdecimal():
            continue
        try:
            for descriptor in os.scandir(process / "fd"):
                if os.readlink(descriptor.path) == wanted:
                    return int(process.name)
        except PermissionError:
            hidden = hidden or _may_build(process, path)
        except OSError:  # ended while we look
            continue
    return None if hidden else 0


def _may_build(process: Path, lock: Path) -> bool:
    """Whether a process whose files are hidden from us may hold this lock: a Python of the lock's owner."""
    try:
        command = (process / "cmdline").read_bytes().partition(b"\0")[0]
        return b"python" in command and process.stat().st_uid == lock.stat().st_uid
    except OSError:
        return False
