"""Files of whole tensors: safetensors' own, written in any order, read one by one, and nothing taken for whole."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import load_file, save_file

from align.engine.files import TensorFile, TensorFiles, TensorWriter, deal, file_name, saved_files

TENSORS = {
    "a": torch.arange(6, dtype=torch.float32).view(2, 3),
    "b|step": torch.tensor(3.0),
    "c": torch.tensor([1.5, -2.0], dtype=torch.bfloat16),
    "d": torch.zeros(0, 4),
    "e": torch.tensor([1, 2, 3], dtype=torch.uint8),
}


def entries(tensors):
    return {name: (value.dtype, tuple(value.shape)) for name, value in tensors.items()}


def same(found, expected) -> None:
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert found[name].dtype == value.dtype
        assert found[name].shape == value.shape
        assert torch.equal(found[name], value)


def test_written_in_any_order_and_read_by_safetensors(tmp_path):
    writer = TensorWriter(tmp_path / "x", entries(TENSORS))
    for name in reversed(TENSORS):
        writer.write(name, TENSORS[name])
    writer.close()
    same(load_file(tmp_path / "x"), TENSORS)


def test_reads_what_safetensors_wrote(tmp_path):
    save_file(TENSORS, tmp_path / "x", metadata={"format": "pt"})
    file = TensorFile(tmp_path / "x")
    same({name: file.read(name) for name in file.names()}, TENSORS)
    assert file.shape("a") == (2, 3)


def test_a_missing_or_other_tensor_is_told(tmp_path):
    writer = TensorWriter(tmp_path / "x", entries(TENSORS))
    with pytest.raises(ValueError, match="announced"):
        writer.write("a", TENSORS["a"].double())
    with pytest.raises(ValueError, match="announced"):
        writer.write("a", TENSORS["a"].T)
    with pytest.raises(ValueError, match="5 tensors were not written"):
        writer.close()


@pytest.mark.parametrize("keep", [0, 4, 9, 40, -1])
def test_cut_off_file_is_told(tmp_path, keep):
    save_file({"a": torch.ones(50)}, tmp_path / "x")
    whole = (tmp_path / "x").read_bytes()
    (tmp_path / "x").write_bytes(whole[:keep])
    with pytest.raises(ValueError, match="truncated or no safetensors file|cut off"):
        TensorFile(tmp_path / "x")


def test_a_set_of_files_is_one_mapping_or_refused(tmp_path):
    for rank, name in enumerate(("a", "c")):
        save_file({name: TENSORS[name]}, tmp_path / file_name("model", rank, 2))
    files = TensorFiles(saved_files(tmp_path, "model"))
    same({name: files.read(name) for name in files.names()}, {name: TENSORS[name] for name in ("a", "c")})
    (tmp_path / file_name("model", 0, 2)).unlink()
    with pytest.raises(ValueError, match="not a whole checkpoint"):
        saved_files(tmp_path, "model")
    with pytest.raises(ValueError, match="not a whole checkpoint"):
        saved_files(tmp_path, "optimizer")


def test_dealing_by_hand():
    """9 to the first, 8 to the second, 5 to the lighter second, 4 to the first; equal sizes by name."""
    assert deal({"p": 4, "q": 9, "r": 5, "s": 8}, 2) == {"q": 0, "s": 1, "r": 1, "p": 0}
    assert deal({"b": 1, "a": 1}, 2) == {"a": 0, "b": 1}
