"""Files of whole tensors in safetensors' format, written and read one tensor at a time.

The format is safetensors' own: eight bytes of length, a JSON header, the bytes. Neither side maps a file into memory,
so that what a process holds is what it asked for.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

_CODES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e5m2: "F8_E5M2",
}
_DTYPES = {code: dtype for dtype, code in _CODES.items()}


class TensorWriter:
    """A file whose tensors are known by dtype and shape before the first is there."""

    def __init__(self, path: Path, entries: Mapping[str, tuple[torch.dtype, tuple[int, ...]]]):
        header, end = {}, 0
        for name, (dtype, shape) in entries.items():
            start, end = end, end + dtype.itemsize * math.prod(shape)
            header[name] = {"dtype": _CODES[dtype], "shape": list(shape), "data_offsets": [start, end]}
        text = json.dumps(header).encode()
        text += b" " * (-len(text) % 8)  # readers map the data aligned
        self._header = header
        self._missing = set(header)
        self._first = 8 + len(text)
        self._stream = path.open("wb")
        self._stream.write(len(text).to_bytes(8, "little") + text)

    def write(self, name: str, tensor: Tensor) -> None:
        """Put one tensor in its place."""
        entry = self._header[name]
        if [*tensor.shape] != entry["shape"] or _CODES[tensor.dtype] != entry["dtype"]:
            raise ValueError(f"{name} is {tensor.dtype} {[*tensor.shape]}, announced {entry['dtype']} {entry['shape']}")
        self._stream.seek(self._first + entry["data_offsets"][0])
        self._stream.write(_bytes(tensor.detach().cpu().contiguous()))
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
        size = path.stat().st_size
        with path.open("rb") as stream:
            length = int.from_bytes(stream.read(8), "little")
            if length > size - 8:
                raise ValueError(f"{path}: is not a safetensors file")
            self._first = 8 + length
            try:
                header = json.loads(stream.read(length))
            except ValueError as error:
                raise ValueError(f"{path}: is not a safetensors file") from error
        header.pop("__metadata__", None)
        self._header = header
        ends = [entry["data_offsets"][1] for entry in header.values()]
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
        if entry["dtype"] not in _DTYPES:
            raise ValueError(f"{self.path}: {name} has dtype {entry['dtype']}, which is not read here")
        out = torch.empty(entry["shape"], dtype=_DTYPES[entry["dtype"]])
        with self.path.open("rb", buffering=0) as stream:
            stream.seek(self._first + entry["data_offsets"][0])
            view = memoryview(_bytes(out))
            while len(view):
                count = stream.readinto(view)
                if not count:
                    raise ValueError(f"{self.path}: ends inside {name}")
                view = view[count:]
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


def _bytes(tensor: Tensor) -> np.ndarray:
    return tensor.reshape(-1).view(torch.uint8).numpy()
