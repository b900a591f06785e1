"""Hashes of weights by their files: found again for the same files, for no others, and never for those just written."""

from __future__ import annotations

import os
import time

import pytest

from align.models import remembered


@pytest.fixture
def model(tmp_path, monkeypatch):
    """A directory of two files that nobody has touched since well before `since`."""
    monkeypatch.setenv("ALIGN_CACHE", str(tmp_path / "cache"))
    directory = tmp_path / "model"
    directory.mkdir()
    for name in ("model.safetensors", "config.json"):
        (directory / name).write_text("0123456789")
    return directory


def later() -> float:
    """A start an hour from now: the files' times of change cannot be set back."""
    return time.time() + 3600


def test_the_same_files_have_their_hash_again(model):
    key = remembered.key_of(model, later(), "float32")
    assert remembered.recall(key) is None
    remembered.remember(key, "abc")
    assert remembered.recall(remembered.key_of(model, later(), "float32")) == "abc"
    assert remembered.recall(remembered.key_of(model, later(), "bfloat16")) is None


@pytest.mark.parametrize("how", ["rewritten", "replaced", "renamed", "more", "fewer", "touched"])
def test_changed_files_have_another_key(model, how):
    """Rewritten with the same size and time of change, as a copy that keeps times does."""
    key = remembered.key_of(model, later())
    file = model / "model.safetensors"
    stat = file.stat()
    if how == "rewritten":
        file.write_text("0123456788")
        os.utime(file, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    elif how == "replaced":
        (model / "new").write_text("0123456788")
        os.utime(model / "new", ns=(stat.st_atime_ns, stat.st_mtime_ns))
        os.replace(model / "new", file)
    elif how == "renamed":
        file.rename(model / "other.safetensors")
    elif how == "more":
        (model / "more.safetensors").write_text("")
    elif how == "fewer":
        (model / "config.json").unlink()
    else:
        os.utime(file)
    assert remembered.key_of(model, later()) not in (None, key)


def test_what_was_written_during_the_start_or_just_before_is_not_known(model):
    assert remembered.key_of(model, time.time()) is None
    assert remembered.key_of(None, later()) is None
    (model / "adapter_config.json").write_text("{}")  # its base lies elsewhere
    assert remembered.key_of(model, later()) is None
    remembered.remember(None, "abc")
    assert remembered.recall(None) is None


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"hashes": {"k": "x"}, "sha256": "0"}'])
def test_a_damaged_memory_is_none(model, tmp_path, content):
    key = remembered.key_of(model, later())
    remembered.remember(key, "abc")
    (tmp_path / "cache" / "weights.json").write_text(content)
    assert remembered.recall(key) is None
    remembered.remember(key, "abc")
    assert remembered.recall(key) == "abc"


@pytest.mark.usefixtures("model")
def test_only_the_newest_are_kept(monkeypatch):
    monkeypatch.setattr(remembered, "_MOST", 2)
    for key in ("a", "b", "c"):
        remembered.remember(key, key)
    assert [remembered.recall(key) for key in ("a", "b", "c")] == [None, "b", "c"]


@pytest.mark.usefixtures("model")
def test_without_a_place_it_is_made_again(tmp_path):
    (tmp_path / "cache").write_text("a file")
    remembered.remember("k", "abc")
    assert remembered.recall("k") is None
