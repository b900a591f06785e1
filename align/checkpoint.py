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
from safetensors.torch import load_file, save_file

MANIFEST = "manifest.json"
_SCRATCH = ".incomplete-"


@dataclass(frozen=True)
class State:
    """What a checkpoint holds."""

    step: int
    model: dict[str, torch.Tensor]  # trainable weights by name
    optimizer: dict[str, torch.Tensor]
    progress: dict[str, Any]  # JSON


def save(directory: Path, state: State, keep: int) -> Path:
    """Write step-NNNNNN below `directory` and remove all but the newest `keep` checkpoints.

    Raises OSError when the disk is full; what was written is removed and older checkpoints stay.
    """
    directory.mkdir(parents=True, exist_ok=True)
    target = directory / f"step-{state.step:06d}"
    if target.exists() and not problem(target):
        shutil.rmtree(target)  # an interrupted evaluation is saved under the same step; the newer one knows more
    atomic_directory(target, lambda scratch: _write(scratch, state))
    for old in sorted(directory.glob("step-*"))[:-keep]:
        shutil.rmtree(old)
    return target


def atomic_directory(target: Path, write: Callable[[Path], None]) -> None:
    """`target` appears complete, with a manifest, or not at all; an existing one is replaced."""
    scratch = target.parent / f"{_SCRATCH}{target.name}"
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
            old = target.parent / f"{_SCRATCH}old-{target.name}"
            shutil.rmtree(old, ignore_errors=True)
            os.rename(target, old)
            os.rename(scratch, target)
            shutil.rmtree(old)
        else:
            os.rename(scratch, target)
        _flush(target.parent)
    except BaseException:
        shutil.rmtree(scratch, ignore_errors=True)
        raise


def clean(directory: Path) -> None:
    """Remove what killed writers left behind."""
    for path in directory.glob(f"{_SCRATCH}*"):
        shutil.rmtree(path, ignore_errors=True)


def latest(directory: Path, warn: Callable[[str], None]) -> Path | None:
    """The newest checkpoint whose files fit its manifest; each newer one that does not is named through `warn`."""
    for path in sorted(directory.glob("step-*"), reverse=True):
        fault = problem(path)
        if not fault:
            return path
        warn(f"checkpoint {path} is damaged ({fault}); using the one before it")
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
        file = path / name
        if not file.is_file():
            return f"{name} is missing"
        if file.stat().st_size != expected["bytes"]:
            return f"{name} has {file.stat().st_size} bytes, expected {expected['bytes']}"
        if _sha256(file) != expected["sha256"]:
            return f"{name} has other content than was written"
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
