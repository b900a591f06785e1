"""Files of whole tensors in safetensors' format, written and read one tensor at a time.

Neither side maps a file into memory, so that what a process holds is what it asked for.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from align.tensor_files import CODES, DTYPES, raw, read_header, read_into, written_header


class TensorWriter:
    """A file whose tensors are known by dtype and shape before the first is there."""

    def __init__(self, path: Path, entries: Mapping[str, tuple[torch.dtype, tuple[int, ...]]]):
        start, self._header = written_header((name, dtype, shape) for name, (dtype, shape) in entries.items())
        self._missing = set(self._header)
        self._first = len(start)
        self._stream = path.open("wb")
        self._stream.write(start)

    def write(self, name: str, tensor: Tensor) -> None:
        """Put one tensor in its place."""
        entry = self._header[name]
        if [*tensor.shape] != entry["shape"] or CODES[tensor.dtype] != entry["dtype"]:
            raise ValueError(f"{name} is {tensor.dtype} {[*tensor.shape]}, announced {entry['dtype']} {entry['shape']}")
        self._stream.seek(self._first + entry["data_offsets"][0])
        self._stream.write(raw(tensor.detach().cpu().contiguous()).data)
        self._missing.discard(name)

    def close(self, complete: bool = True) -> None:
        """Raises ValueError if a tensor is missing, unless the file is given up."""
        self._stream.close()
        if complete and self._missing:
            raise ValueError(f"{len(self._missing)} tensors were not written, the first is {sorted(self._missing)[0]}")


class TensorFile:
    """What a file holds, by name; a tensor is read when it is asked for. Raises ValueError if it is no such file."""

    def __init__(self, path: Path):
        self.path = path
        self._header, self._first, size = read_header(path)
        ends = [entry["data_offsets"][1] for entry in self._header.values()]
        if self._first + max(ends, default=0) > size:
            raise ValueError(f"{path}: is cut off: {size} bytes, {self._first + max(ends)} announced")

    def names(self) -> list[str]:
        """Names of the tensors."""
        return list(self._header)

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of one."""
        return tuple(self._header[name]["shape"])

    def read(self, name: str) -> Tensor:
        """One of them, in memory of its own."""
        entry = self._header[name]
        if entry["dtype"] not in DTYPES:
            raise ValueError(f"{self.path}: {name} has dtype {entry['dtype']}, which is not read here")
        out = torch.empty(entry["shape"], dtype=DTYPES[entry["dtype"]])
        if not read_into(self.path, self._first + entry["data_offsets"][0], out):
            raise ValueError(f"{self.path}: ends inside {name}")
        return out


class TensorFiles:
    """The tensors of several files as one mapping from names."""

    def __init__(self, paths: list[Path]):
        self._where: dict[str, TensorFile] = {}
        for path in paths:
            file = TensorFile(path)
            for name in file.names():
                self._where[name] = file

    def __contains__(self, name: str) -> bool:
        return name in self._where

    def names(self) -> list[str]:
        """Names of the tensors."""
        return list(self._where)

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of one."""
        return self._where[name].shape(name)

    def read(self, name: str) -> Tensor:
        """One of them, in memory of its own."""
        return self._where[name].read(name)


def file_name(stem: str, rank: int, size: int) -> str:
    """Name of a process's file: model.safetensors alone, model-00001-of-00002.safetensors with others."""
    return f"{stem}.safetensors" if size == 1 else f"{stem}-{rank + 1:05d}-of-{size:05d}.safetensors"


def saved_files(directory: Path, stem: str) -> list[Path]:
    """The files of a checkpoint that one or several processes wrote. Raises ValueError if one is missing."""
    alone = directory / f"{stem}.safetensors"
    if alone.exists():
        return [alone]
    found = sorted(directory.glob(f"{stem}-*-of-*.safetensors"))
    sizes = {int(match[1]) for p in found if (match := re.fullmatch(r".*-of-(\d+)\.safetensors", p.name))}
    if len(sizes) != 1 or len(found) != next(iter(sizes)):
        raise ValueError(f"{directory} holds {len(found)} files {stem}-*.safetensors: not a whole checkpoint")
    return found


def deal(sizes: Mapping[str, int], parts: int) -> dict[str, int]:
    """Which of `parts` takes which name, so that each gets about as much: the largest first, to the emptiest."""
    loads = [0] * parts
    out = {}
    for name in sorted(sizes, key=lambda n: (-sizes[n], n)):
        k = min(range(parts), key=loads.__getitem__)
        loads[k] += sizes[name]
        out[name] = k
    return out
