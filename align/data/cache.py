"""Rendered data kept on disk: what one start has read, checked and tokenised, the next ones map into memory.

A set lies below a directory that is named by all that it depends on, so that none is ever out of date: a change makes
another one. It appears whole, with the hashes of its files, or not at all. One process renders, the others of the run
or of the machine wait for it; without a cache that can be written or read the run goes on as if there was none.
"""

from __future__ import annotations

import fcntl
import hashlib
import importlib
import json
import os
import shutil
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import IO

from align import checkpoint
from align.config import DataConfig, cache_root
from align.data.audit import Audit
from align.data.load import Data, Say, load
from align.data.sources import Source, content_hash, locate_all, table_fingerprint
from align.data.stored import Stored, write
from align.data.template import asks_for_date, date_of
from align.data.wanted import Wanted
from align.jsons import Json, Tokenizer

# Of settings, what says nothing about the rows, or only how they are mixed afterwards
_ASIDE = ("gold", "workers", "cache_dir")
_SMALL = 1 << 20  # bytes of all files, below which rendering takes a second and is done by each process for itself
_PATIENCE_S = 3600.0  # how long another process may render what this one waits for
_LOCK = ".lock"
_TOLD = "data.json"  # the account, and what else a run asks of the whole set


@dataclass(frozen=True)
class Kept:
    """A set in the cache."""

    path: Path
    sources: str
    examples: int
    bytes: int
    used: float  # time.time of the last start that read it
    fault: str  # what is wrong with it; "": nothing


def root_of(config: DataConfig) -> Path:
    """The directory of the cache."""
    return Path(config.cache_dir) if config.cache_dir else cache_root() / "data"


def cached(config: DataConfig, tokenizer: Tokenizer, wanted: Wanted, seed: int, say: Say, small: int = _SMALL) -> Data:
    """What load gives, from the cache if it is there, else kept there for the next start.

    small: bytes of all files, below which nothing is kept. Raises ValueError as load does.
    """
    key = _key(config, tokenizer, wanted, seed, small)
    if key is None:
        return load(config, tokenizer, wanted, seed, say=say)
    target = root_of(config) / key
    if (found := _opened(target, say)) is not None:
        return found
    with _alone(target, say) as mine:  # whoever was waited for has made it
        if mine and (found := _opened(target, say)) is not None:
            return found
        start = time.monotonic()
        data = load(config, tokenizer, wanted, seed, say=say)
        if not mine:
            return data
        seconds = time.monotonic() - start
        try:
            checkpoint.atomic_directory(target, lambda scratch: _write(scratch, data, config))
        except checkpoint.WriteFailed as error:
            say(f"data: the cache {target.parent} cannot be written, the run goes on without ({error.__cause__})")
            return data
        say(f"data: {len(data.train)} examples rendered in {seconds:.1f} s, kept in {target}")
    # the file's examples take less memory than those of which it was made
    return _opened(target, say) or data


# ---------------------------------------------------------------------- the address


def _key(config: DataConfig, tokenizer: Tokenizer, wanted: Wanted, seed: int, small: int) -> str | None:
    """The address of the rows: hash of all that they depend on. None for what cannot be known beforehand (a loader's
    rows, a tokenizer that runs in Python) and for little."""
    if config.loader is not None or not tokenizer.is_fast:
        return None
    names = [(config.train, "data.train"), *([(config.heldout, "data.heldout")] if config.heldout is not None else [])]
    sources = [source for listed, key in names for source in locate_all(listed, key)]
    if sum(map(_size, sources)) < small:
        return None
    settings = {k: v for k, v in vars(config).items() if k not in _ASIDE and not k.startswith("mixture")}
    told = {
        "settings": settings,
        "wanted": vars(wanted),
        "seed": seed,
        "rows": [table_fingerprint(source) or content_hash(source) for source in sources],
        "tokenizer": [
            type(tokenizer).__name__,
            hashlib.sha256(tokenizer.backend_tokenizer.to_str().encode()).hexdigest(),
            tokenizer.all_special_tokens,
            [tokenizer.bos_token_id, tokenizer.eos_token_id],
        ],
        "template": str(tokenizer.chat_template),
        "date": (date_of(tokenizer) or time.strftime("%Y-%m-%d")) if asks_for_date(tokenizer) else None,
        "code": _code(config, wanted),
    }
    return hashlib.sha256(json.dumps(told, sort_keys=True, default=str).encode()).hexdigest()[:32]


def _size(source: Source) -> int:
    """Bytes of a source's files; of one without files many."""
    if source.path is None:
        return _SMALL
    files = [source.path] if source.path.is_file() else [p for p in source.path.rglob("*") if p.is_file()]
    return sum(file.stat().st_size for file in files)


def _code(config: DataConfig, wanted: Wanted) -> list[str]:
    """Hashes of the code that makes examples of rows: align's own, the user's functions with what lies beside them,
    and the versions of what tokenises and writes templates."""
    here = Path(__file__).parent
    files = sorted(here.rglob("*.py")) + [here.parent / name for name in ("packing.py", "types.py")]
    paths = [config.format, *(config.margins or {}).values(), *(name for name in wanted.columns if "." in name)]
    for path in filter(None, paths):
        place = importlib.import_module(path.rpartition(".")[0]).__file__
        files += sorted(Path(place).parent.glob("*.py")) if place else []
    hashes = [hashlib.sha256(file.read_bytes()).hexdigest() for file in files]
    return hashes + [version(name) for name in ("tokenizers", "transformers", "jinja2")]


# ---------------------------------------------------------------------- a set


def _write(scratch: Path, data: Data, config: DataConfig) -> None:
    splits = {"train": data.train, "heldout": data.heldout}
    told = {
        "fingerprints": {name: write(examples, scratch / f"{name}.arrow") for name, examples in splits.items()},
        "audit": data.audit.as_dict(),
        "sizes": data.sizes,
        "chats": sorted(data.chats),
        "sources": [config.train, config.heldout],
    }
    (scratch / _TOLD).write_text(json.dumps(told))


def _opened(target: Path, say: Say) -> Data | None:
    """The set that lies there, None if there is none; one that is damaged is told of and removed."""
    if not target.is_dir():
        return None
    if fault := checkpoint.problem(target) or _untold(target):
        say(f"data: the cache {target} is damaged ({fault}), its rows are rendered again")
        shutil.rmtree(target, ignore_errors=True)
        return None
    told: Json = json.loads((target / _TOLD).read_text())
    train, heldout = (Stored(target / f"{name}.arrow", told["fingerprints"][name]) for name in ("train", "heldout"))
    with suppress(OSError):  # of a cache that can only be read
        os.utime(target / _TOLD)  # when it was used last
    say(f"data: {len(train)} examples from the cache {target}")
    audit = Audit.of(told["audit"])
    return Data(train, heldout, audit, [], [], tuple(told["sizes"]), set(told["chats"]))


def _untold(target: Path) -> str:
    """What is wrong with a set whose manifest is: it may tell of other files."""
    missing = [name for name in (_TOLD, "train.arrow", "heldout.arrow") if not (target / name).is_file()]
    return f"{missing[0]} is missing" if missing else ""


@contextmanager
def _alone(target: Path, say: Say) -> Iterator[bool]:
    """Inside, no other process makes this set; False where that cannot be had: nothing can be written there, or
    another one is at it for longer than anybody should."""
    lock = target.with_name(target.name + _LOCK)
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        file = lock.open("a+")
    except OSError as error:
        say(f"data: the cache {target.parent} cannot be written, the run goes on without ({error})")
        yield False
        return
    with file:
        yield _locked(file, say)


def _locked(file: IO[str], say: Say) -> bool:
    end, told = time.monotonic() + _PATIENCE_S, False
    while True:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            break
        except OSError:  # which ends with the process that has it
            if time.monotonic() > end:
                say(f"data: waited {_PATIENCE_S:.0f} s for {file.name}, the rows are rendered here")
                return False
        if not told:
            file.seek(0)
            holder = file.read().strip() or "another process"
            say(f"data: waits for {holder}, which renders the same rows, at most {_PATIENCE_S:.0f} s ({file.name})")
            told = True
        time.sleep(0.2)
    file.truncate(0)
    file.write(f"process {os.getpid()} on {socket.gethostname()}\n")
    file.flush()
    return True


# ---------------------------------------------------------------------- what lies there


def listed(root: Path) -> list[Kept]:
    """The sets below a cache directory, the one used last first."""
    out = []
    for told in root.glob(f"*/{_TOLD}"):
        path = told.parent
        if path.name.startswith("."):
            continue
        try:
            said, used = json.loads(told.read_text()), told.stat().st_mtime
            sources = [str(part) for part in said["sources"] if part]
            examples, fault = said["audit"]["train"]["examples"], checkpoint.problem(path)
        except (OSError, ValueError, KeyError, TypeError):
            sources, examples, used, fault = [], 0, 0.0, f"{_TOLD} cannot be read"
        size = sum(file.stat().st_size for file in path.iterdir())
        out.append(Kept(path, ", ".join(sources), examples, size, used, fault))
    return sorted(out, key=lambda kept: -kept.used)


def clear(root: Path, unused_s: float = 0.0) -> tuple[int, int]:
    """Remove the sets that no start has read for so long, and what killed writers left; how many sets and bytes. A run
    that has one open keeps it: its files last until they are closed."""
    now, count, freed = time.time(), 0, 0
    for kept in listed(root):
        if now - kept.used >= unused_s:
            shutil.rmtree(kept.path, ignore_errors=True)
            count, freed = count + 1, freed + kept.bytes
    for rest in (*root.glob(".incomplete-*"), *root.glob(".replaced-*")):
        lock = root / (rest.name.partition("-")[2] + _LOCK)
        if not _held(lock):
            shutil.rmtree(rest, ignore_errors=True)
    # locks stay: one that is removed while a process waits for it would be two
    return count, freed


def _held(lock: Path) -> bool:
    """Whether a process has it."""
    if not lock.exists():
        return False
    with lock.open("a") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            return True
    return False
