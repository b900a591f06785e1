"""Atomic checkpoints: a directory counts only with a manifest that fits the bytes of every file in it.

Written beside its place, flushed to the disk, read again, then renamed. What is in the files is the engine's and
the loop's; here they are bytes. Tensors are safetensors, the rest JSON: loading runs no code.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from align.engine.world import World, by_lead, together
from align.jsons import Json

MANIFEST = "manifest.json"
_SCRATCH = ".incomplete-"
_REPLACED = ".replaced-"  # what atomic_directory replaces, between its two renames


class WriteFailed(OSError):
    """The disk is full, or takes no more for another reason; the message says what to do."""

    def __init__(self, target: Path, error: Exception, needed: int | None = None):
        want = "" if needed is None else f"{needed} bytes needed, "
        place = next(path for path in target.parents if path.exists())
        super().__init__(
            f"{target} cannot be written: {want}{shutil.disk_usage(place).free} bytes free ({error}); what was "
            "saved before is intact: make room and give the same command again"
        )

    def __reduce__(self) -> tuple[Any, ...]:  # other processes of the run raise it too
        return (_write_failed, (str(self),))


def _write_failed(message: str) -> WriteFailed:
    error = WriteFailed.__new__(WriteFailed, message)
    OSError.__init__(error, message)
    return error


@dataclass(frozen=True)
class State:
    """What a checkpoint says besides its tensors, which are the engine's."""

    step: int
    progress: Json  # JSON
    path: Path  # of the whole checkpoint


def save(
    directory: Path,
    step: int,
    progress: Json,
    write: Callable[[Path], None],
    needed: int | None = None,
    world: World | None = None,
) -> Path:
    """Write step-NNNNNN below `directory`.

    write: puts this process's files into a directory. world: the processes that write together. Raises WriteFailed
    when the disk is full; what was written is removed and older checkpoints stay.
    """
    world = world or World()
    target = directory / f"step-{step:06d}"

    def fill(scratch: Path) -> None:
        write(scratch)
        if world.lead:
            (scratch / "state.json").write_text(json.dumps(progress | {"step": step}, indent=1))

    # one of the same step, from an interrupted evaluation, is replaced: the newer one knows more
    atomic_directory(target, fill, needed, world)
    return target


def retain(directory: Path, keep: int) -> None:
    """Remove all but the newest `keep` checkpoints below `directory`."""
    for old in steps(directory)[:-keep]:
        remove(old)


def remove(path: Path) -> None:
    """Remove a directory that was written whole, never leaving half of it under its name."""
    gone = path.with_name(f"{_SCRATCH}{path.name}")
    os.rename(path, gone)
    shutil.rmtree(gone)


def atomic_directory(
    target: Path, write: Callable[[Path], None], needed: int | None = None, world: World | None = None
) -> None:
    """`target` appears complete, with a manifest, or not at all; an existing one is replaced.

    needed: about how many bytes, for the message of WriteFailed. world: the processes that each write files of their
    own into a directory that all of them see; when one of them fails, all raise.
    """
    world = world or World()
    scratch = target.parent / f"{_SCRATCH}{target.name}"
    old = target.parent / f"{_REPLACED}{target.name}"
    try:
        by_lead(world, lambda: _make(scratch))
        together(world, lambda: write(scratch))
        # one process lists: on a network's file system two may see different files for a while
        names = world.share(by_lead(world, lambda: _files(scratch)))
        entries = together(world, lambda: _flushed(scratch, names[world.rank :: world.size]))
        manifest = {name: entry for part in world.gather(entries) for name, entry in part.items()}
        by_lead(world, lambda: _put(scratch, target, old, manifest))
    except BaseException as error:
        if world.lead:
            if old.exists() and not target.exists():
                os.rename(old, target)
            shutil.rmtree(scratch, ignore_errors=True)
        if isinstance(error, (OSError, SafetensorError)):
            raise WriteFailed(target, error, needed) from error
        raise
    if world.lead:
        shutil.rmtree(old, ignore_errors=True)


def _make(scratch: Path) -> None:
    shutil.rmtree(scratch, ignore_errors=True)
    scratch.mkdir(parents=True)


def _files(scratch: Path) -> list[str]:
    return sorted(p.relative_to(scratch).as_posix() for p in scratch.rglob("*") if p.is_file())


def _flushed(scratch: Path, names: Sequence[str]) -> Json:
    """Files on the disk, and what the manifest says of them."""
    out = {}
    for name in names:
        _flush(scratch / name)
        out[name] = {"bytes": (scratch / name).stat().st_size, "sha256": _sha256(scratch / name)}
    return out


def _put(scratch: Path, target: Path, old: Path, manifest: Json) -> None:
    (scratch / MANIFEST).write_text(json.dumps(dict(sorted(manifest.items())), indent=1))
    _flush(scratch / MANIFEST)
    _flush(scratch)
    if target.exists():
        shutil.rmtree(old, ignore_errors=True)
        os.rename(target, old)  # killed here: clean puts it back
    os.rename(scratch, target)
    _flush(target.parent)


def clean(directory: Path) -> None:
    """Remove what killed writers left behind, and finish or undo a replacement."""
    for path in directory.glob(f"{_SCRATCH}*"):
        shutil.rmtree(path, ignore_errors=True)
    for path in directory.glob(f"{_REPLACED}*"):
        target = directory / path.name.removeprefix(_REPLACED)
        if target.exists():
            shutil.rmtree(path, ignore_errors=True)
        else:
            os.rename(path, target)


def latest(directory: Path, warn: Callable[[str], None], world: World | None = None) -> Path | None:
    """The newest checkpoint whose files fit its manifest, None if there never was one.

    Each newer one that does not fit is named through `warn` and set aside as damaged-step-NNNNNN, where it counts
    no more. world: the processes that check together, each a part of the files, and get the same answer. Raises
    ValueError if there are checkpoints and none is whole: a run never starts over unasked.
    """
    world = world or World()
    damaged = []
    for path in reversed(world.share(steps(directory))):
        fault = next(filter(None, world.gather(problem(path, world.rank, world.size))), "")
        if not fault:
            for bad, what in damaged:
                aside = bad.with_name(f"damaged-{bad.name}")
                if world.lead:
                    shutil.rmtree(aside, ignore_errors=True)
                    os.rename(bad, aside)
                warn(f"checkpoint {bad} is damaged ({what}) and now named {aside.name}; using {path.name} before it")
            return path
        damaged.append((path, fault))
    if damaged:
        faults = "; ".join(f"{path.name}: {fault}" for path, fault in damaged)
        raise ValueError(
            f"{directory} holds no undamaged checkpoint ({faults}); restore one from a copy, or remove {directory} to "
            "start at step 0"
        )
    return None


def problem(path: Path, part: int = 0, parts: int = 1) -> str:
    """What is wrong with a checkpoint, in words; empty if nothing is. part, parts: look at every parts-th file only."""
    try:
        manifest = json.loads((path / MANIFEST).read_text())
    except (OSError, ValueError) as error:
        return f"{MANIFEST}: {type(error).__name__}"
    if not isinstance(manifest, dict) or not manifest:
        return f"{MANIFEST} is empty"
    for name, expected in list(manifest.items())[part::parts]:
        if not isinstance(expected, dict) or expected.keys() != {"bytes", "sha256"}:
            return f"{MANIFEST} is not as written"
        file = path / name
        if not file.is_file():
            return f"{name} is missing"
        try:
            if file.stat().st_size != expected["bytes"]:
                return f"{name} has {file.stat().st_size} bytes, expected {expected['bytes']}"
            if _sha256(file) != expected["sha256"]:
                return f"{name} has other content than was written"
        except OSError as error:
            return f"{name} cannot be read: {error.strerror}"
    return ""


def load(path: Path) -> State:
    """What a checkpoint says; call `problem` first."""
    progress = json.loads((path / "state.json").read_text())
    return State(progress["step"], progress, path)


def steps(directory: Path) -> list[Path]:
    """Checkpoints by step, whole or not."""
    found = [p for p in directory.glob("step-*") if p.name.removeprefix("step-").isdecimal()]
    return sorted(found, key=lambda p: int(p.name.removeprefix("step-")))


def _sha256(path: Path) -> str:
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
