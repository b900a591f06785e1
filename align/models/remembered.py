"""Hashes of weights, remembered by the files that they were read from: a look at 16 GB of numbers takes half a minute.

A file is known by its path, size, inode and times; one that has changed since the run's start, or just before it, is
not trusted to be what was read.
"""

from __future__ import annotations

import hashlib
import json
import os
import time
from contextlib import suppress
from importlib.metadata import version
from pathlib import Path

from align.config import cache_root

_RECENT_S = 5.0  # two writes within a tick of a file system's clock cannot be told apart; clocks of servers differ too
_MOST = 500  # entries that are kept, the newest ones


def key_of(directory: Path | None, since: float, *told: object) -> str | None:
    """What tells the weights that were read from a directory from others, or None where that cannot be known.

    since: time.time before they were read. told: what else they depend on, such as dtypes; its repr must say all of
    it.
    """
    if directory is None or (directory / "adapter_config.json").exists():  # whose base lies elsewhere
        return None
    files = sorted(path for path in directory.iterdir() if path.is_file())
    stats = [(str(path.resolve()), path.stat()) for path in files]
    if not stats or max(max(s.st_mtime, s.st_ctime) for _, s in stats) > since - _RECENT_S:
        return None
    seen = [[name, s.st_size, s.st_ino, s.st_dev, s.st_mtime_ns, s.st_ctime_ns] for name, s in stats]
    versions = [version(name) for name in ("torch", "transformers", "safetensors")]
    return hashlib.sha256(json.dumps([seen, versions, repr(told)]).encode()).hexdigest()


def recall(key: str | None) -> str | None:
    """The hash that was remembered for a key."""
    return None if key is None else _known().get(key)


def remember(key: str | None, found: str) -> None:
    """Keep a hash for the next start; where nothing can be written it is made again."""
    if key is None:
        return
    known = _known()
    known.pop(key, None)
    kept = dict([*known.items(), (key, found)][-_MOST:])
    path = _path()
    scratch = path.with_name(f".{path.name}-{os.getpid()}-{time.monotonic_ns()}")
    with suppress(OSError):
        path.parent.mkdir(parents=True, exist_ok=True)
        scratch.write_text(json.dumps({"hashes": kept, "sha256": _digest(kept)}))
        os.replace(scratch, path)


def _known() -> dict[str, str]:
    try:
        content = json.loads(_path().read_bytes())
        return content["hashes"] if content["sha256"] == _digest(content["hashes"]) else {}
    except (OSError, ValueError, KeyError, TypeError):  # none, or not as written
        return {}


def _digest(hashes: dict[str, str]) -> str:
    return hashlib.sha256(json.dumps(hashes).encode()).hexdigest()


def _path() -> Path:
    return cache_root() / "weights.json"
