"""Atomic checkpoints: a directory counts only with a manifest that fits the bytes of every file in it.

Written beside its place, flushed to the disk, read again, then renamed. What is in the files is the engine's and
the loop's; here they are bytes. Tensors are safetensors, the rest JSON: loading runs no code.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

MANIFEST = "manifest.json"
_SCRATCH = ".incomplete-"
_REPLACED = ".replaced-"  # what atomic_directory replaces, between its two renames


class WriteFailed(OSError):
    """The disk is full, or takes no more for another reason; the message says what to do."""

    def __init__(self, target: Path, error: Exception, needed: int | None = None):
        want = "" if needed is None else f"{needed} bytes needed, "
        super().__init__(
            f"{target} cannot be written: {want}{shutil.disk_usage(target.parent).free} bytes free ({error}); what was "
            "saved before is intact: make room and give the same command again"
        )


@dataclass(frozen=True)
class State:
    """What a checkpoint holds."""

    step: int
    model: dict[str, torch.Tensor]  # trainable weights by name
    optimizer: dict[str, torch.Tensor]
    progress: dict[str, Any]  # JSON


def save(directory: Path, state: State, keep: int) -> Path:
    """Write step-NNNNNN below `directory` and remove all but the newest `keep` checkpoints.

    Raises WriteFailed when the disk is full; what was written is removed and older checkpoints stay.
    """
    directory.mkdir(parents=True, exist_ok=True)
    target = directory / f"step-{state.step:06d}"
    needed = sum(t.nbytes for t in (*state.model.values(), *state.optimizer.values()))
    # one of the same step, from an interrupted evaluation, is replaced: the newer one knows more
    atomic_directory(target, lambda scratch: _write(scratch, state), needed)
    for old in steps(directory)[:-keep]:
        gone = directory / f"{_SCRATCH}{old.name}"  # never half a checkpoint under a checkpoint's name
        os.rename(old, gone)
        shutil.rmtree(gone)
    return target


def atomic_directory(target: Path, write: Callable[[Path], None], needed: int | None = None) -> None:
    """`target` appears complete, with a manifest, or not at all; an existing one is replaced.

    needed: about how many bytes, for the message of WriteFailed.
    """
    scratch = target.parent / f"{_SCRATCH}{target.name}"
    old = target.parent / f"{_REPLACED}{target.name}"
    shutil.rmtree(scratch, ignore_errors=True)
    scratch.mkdir(parents=True)
    try:
        write(scratch)
        files = sorted(p for p in scratch.rglob("*") if p.is_file())
        for path in files:
            _flush(path)
        manifest = {p.relative_to(scratch).as_posix(): {"bytes": p.stat().st_size, "sha256": _sha256(p)} for p in files}
        (scratch / MANIFEST).write_text(json.dumps(manifest, indent=1))
        _flush(scratch / MANIFEST)
        _flush(scratch)
        if target.exists():
            shutil.rmtree(old, ignore_errors=True)
            os.rename(target, old)  # killed here: clean puts it back
        os.rename(scratch, target)
        _flush(target.parent)
    except BaseException as error:
        if old.exists() and not target.exists():
            os.rename(old, target)
        shutil.rmtree(scratch, ignore_errors=True)
        if isinstance(error, (OSError, SafetensorError)):
            raise WriteFailed(target, error, needed) from error
        raise
    shutil.rmtree(old, ignore_errors=True)


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


def latest(directory: Path, warn: Callable[[str], None]) -> Path | None:
    """The newest checkpoint whose files fit its manifest, None if there never was one.

    Each newer one that does not fit is named through `warn` and set aside as damaged-step-NNNNNN, where it counts
    no more. Raises ValueError if there are checkpoints and none is whole: a run never starts over unasked.
    """
    damaged = []
    for path in reversed(steps(directory)):
        fault = problem(path)
        if not fault:
            for bad, what in damaged:
                aside = bad.with_name(f"damaged-{bad.name}")
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


def problem(path: Path) -> str:
    """What is wrong with a checkpoint, in words; empty if nothing is."""
    try:
        manifest = json.loads((path / MANIFEST).read_text())
    except (OSError, ValueError) as error:
        return f"{MANIFEST}: {type(error).__name__}"
    if not isinstance(manifest, dict) or not manifest:
        return f"{MANIFEST} is empty"
    for name, expected in manifest.items():
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
    """A checkpoint's content; call `problem` first."""
    progress = json.loads((path / "state.json").read_text())
    return State(
        progress["step"],
        load_file(path / "model.safetensors"),
        load_file(path / "optimizer.safetensors"),
        progress,
    )


def steps(directory: Path) -> list[Path]:
    """Checkpoints by step, whole or not."""
    found = [p for p in directory.glob("step-*") if p.name.removeprefix("step-").isdecimal()]
    return sorted(found, key=lambda p: int(p.name.removeprefix("step-")))


def _write(path: Path, state: State) -> None:
    save_file({k: v.contiguous() for k, v in state.model.items()}, path / "model.safetensors")
    save_file({k: v.contiguous() for k, v in state.optimizer.items()}, path / "optimizer.safetensors")
    (path / "state.json").write_text(json.dumps(state.progress | {"step": state.step}, indent=1))


def _sha256(path: Path) -> str:
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
