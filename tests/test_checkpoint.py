"""Checkpoints as files: whole or not there, verified byte by byte, and never fewer than were asked for."""

from __future__ import annotations

import errno
import os
import pickle
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from align import checkpoint
from align.checkpoint import WriteFailed, atomic_directory, clean, latest, load, problem


@dataclass(frozen=True)
class State:
    """A checkpoint's content as an engine would write it."""

    step: int
    model: dict[str, torch.Tensor]
    progress: dict[str, Any]

    def write(self, directory: Path) -> None:
        save_file({k: v.contiguous() for k, v in self.model.items()}, directory / "model.safetensors")
        save_file({"a.weight|exp_avg": torch.ones(4, 3)}, directory / "optimizer.safetensors")


def state(step: int, value: float = 0.0, **progress) -> State:
    generator = torch.Generator().manual_seed(step)
    model = {"a.weight": torch.randn(4, 3, generator=generator) + value, "b": torch.randn(3, generator=generator)}
    return State(step, model, progress)


def save(directory: Path, content: State, keep: int) -> Path:
    path = checkpoint.save(directory, content.step, content.progress, content.write)
    checkpoint.retain(directory, keep)
    return path


def weights(path: Path) -> dict[str, torch.Tensor]:
    return load_file(path / "model.safetensors")


def names(directory):
    return sorted(p.name for p in directory.iterdir())


def refuse(line: str) -> None:
    raise AssertionError(line)


def dies(work) -> int:
    """What became of a child process that did `work`."""
    pid = os.fork()
    if pid == 0:
        try:
            work()
        finally:
            os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def test_comes_back(tmp_path):
    path = save(tmp_path, state(7, pending={"loss": 0.1}, data="x"), 2)
    assert problem(path) == ""
    assert load(path) == checkpoint.State(7, {"pending": {"loss": 0.1}, "data": "x", "step": 7}, path)
    assert torch.equal(weights(path)["a.weight"], state(7).model["a.weight"])


def test_keeps_the_newest(tmp_path):
    for step in (3, 6, 9):
        save(tmp_path, state(step), 2)
    assert names(tmp_path) == ["step-000006", "step-000009"]
    assert latest(tmp_path, refuse) == tmp_path / "step-000009"


def test_order_is_by_number(tmp_path):
    for step in (999_999, 1_000_000):
        save(tmp_path, state(step), 1)
    assert names(tmp_path) == ["step-1000000"]


def test_no_checkpoint_is_no_fault(tmp_path):
    assert latest(tmp_path / "absent", refuse) is None
    (tmp_path / "step-notes").mkdir()
    assert latest(tmp_path, refuse) is None


def test_every_bit_of_every_file_counts(tmp_path):
    path = save(tmp_path, state(1), 1)
    for file in sorted(path.iterdir()):
        content = file.read_bytes()
        for at in range(0, len(content), max(1, len(content) // 60)):
            bad = bytearray(content)
            bad[at] ^= 1 << (at % 8)
            file.write_bytes(bytes(bad))
            assert problem(path), f"{file.name} byte {at}"
        file.write_bytes(content)
    assert problem(path) == ""


@pytest.mark.parametrize(
    "text", ["", "{}", "[]", "3", '{"a": 3}', '{"a": {"bytes": 3}}', '{"a": {}}', '{"\\u0000": {}}']
)
def test_a_manifest_that_is_none(tmp_path, text):
    path = save(tmp_path, state(1), 1)
    (path / checkpoint.MANIFEST).write_text(text)
    assert checkpoint.MANIFEST in problem(path)


def test_damaged_ones_are_set_aside_and_do_not_count(tmp_path):
    for step in (3, 6, 9):
        save(tmp_path, state(step), 3)
    for step in (6, 9):
        (tmp_path / f"step-{step:06d}" / "state.json").unlink()
    said = []
    assert latest(tmp_path, said.append) == tmp_path / "step-000003"
    assert [("step-000009" in a, "state.json is missing" in a) for a in said] == [(True, True), (False, True)]
    assert "step-000006" in said[1]
    save(tmp_path, state(7), 2)  # a changed trainer.save_every
    assert [n for n in names(tmp_path) if n.startswith("step")] == ["step-000003", "step-000007"]


def test_none_whole_is_refused_and_left_alone(tmp_path):
    for step in (3, 6):
        save(tmp_path, state(step), 2)
        (tmp_path / f"step-{step:06d}" / "model.safetensors").write_bytes(b"x")
    with pytest.raises(ValueError, match="no undamaged checkpoint.*step-000006.*step-000003.*remove"):
        latest(tmp_path, refuse)
    assert names(tmp_path) == ["step-000003", "step-000006"]


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("call", [1, 2])
def test_the_only_checkpoint_survives_being_replaced(tmp_path, call, when):
    """keep_checkpoints=1 and the same step again: at no moment is there nothing."""
    save(tmp_path, state(5), 1)

    def replace() -> None:
        rename, calls = os.rename, 0

        def dying(*args) -> None:
            nonlocal calls
            calls += 1
            if calls == call and when == "before":
                os.kill(os.getpid(), 9)
            rename(*args)
            if calls == call:
                os.kill(os.getpid(), 9)

        os.rename = dying
        save(tmp_path, state(5, value=1.0), 1)

    assert dies(replace) == -9
    clean(tmp_path)
    assert names(tmp_path) == ["step-000005"]
    found = latest(tmp_path, refuse)
    assert found is not None
    new = call == 2 and when == "after"
    assert torch.equal(weights(found)["a.weight"], state(5, value=float(new)).model["a.weight"])
    save(tmp_path, state(5, value=2.0), 1)
    assert names(tmp_path) == ["step-000005"]


@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, "No space left on device"), KeyboardInterrupt()])
def test_failed_write_leaves_the_old(tmp_path, error):
    save(tmp_path, state(3), 1)

    def write(path) -> None:
        (path / "part").write_text("x")
        raise error

    kind = WriteFailed if isinstance(error, OSError) else KeyboardInterrupt
    with pytest.raises(kind) as caught:
        atomic_directory(tmp_path / "step-000003", write, needed=12345)
    if kind is WriteFailed:
        assert "12345 bytes needed" in str(caught.value)
        assert "bytes free ([Errno 28]" in str(caught.value)
    assert names(tmp_path) == ["step-000003"]
    assert problem(tmp_path / "step-000003") == ""


def test_a_failed_second_rename_puts_the_old_back(tmp_path, monkeypatch):
    save(tmp_path, state(3), 1)
    rename = os.rename

    def full(a, b) -> None:
        if ".incomplete" in str(a):
            raise OSError(errno.EDQUOT, "Disk quota exceeded")
        rename(a, b)

    monkeypatch.setattr(os, "rename", full)
    with pytest.raises(WriteFailed, match="quota"):
        save(tmp_path, state(3, value=1.0), 1)
    assert names(tmp_path) == ["step-000003"]
    assert torch.equal(weights(tmp_path / "step-000003")["b"], state(3).model["b"])


def test_a_full_disk_is_told_to_other_processes(tmp_path):
    error = WriteFailed(tmp_path / "not" / "there", OSError(errno.ENOSPC, "No space left on device"), 5)
    again = pickle.loads(pickle.dumps(error))
    assert isinstance(again, WriteFailed)
    assert str(again) == str(error)
    assert "5 bytes needed" in str(again)
