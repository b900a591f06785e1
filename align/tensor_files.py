"""The safetensors format itself, for what writes or reads a file piece by piece: header and bytes.

Eight bytes of length, a JSON header, the bytes. Nothing is mapped into memory: pages of a map count as memory of the
process for as long as its file is open. Which tensors a file must hold is the callers' matter.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from align.jsons import Json

CODES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint64: "U64",
    torch.uint32: "U32",
    torch.uint16: "U16",
    torch.uint8: "U8",
    torch.bool: "BOOL",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e5m2: "F8_E5M2",
}
DTYPES = {code: dtype for dtype, code in CODES.items()}
# A header is JSON of at most this many bytes, as in the safetensors library.
_MAX_HEADER = 100_000_000


def written_header(
    entries: Iterable[tuple[str, torch.dtype, tuple[int, ...]]], metadata: dict[str, str] | None = None
) -> tuple[bytes, Json]:
    """What a file with these tensors, one after the other, begins with; and each one's dtype, shape and place in the
    bytes that follow."""
    header: Json = {}
    end = 0
    for name, dtype, shape in entries:
        start, end = end, end + dtype.itemsize * math.prod(shape)
        header[name] = {"dtype": CODES[dtype], "shape": list(shape), "data_offsets": [start, end]}
    text = json.dumps({"__metadata__": metadata} | header if metadata else header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # readers map the data aligned
    return len(text).to_bytes(8, "little") + text, header


def read_header(path: Path) -> tuple[Json, int, int]:
    """The header without its metadata, the place of the first byte after it, and the file's size. What the entries say
    is not checked. Raises ValueError if it is no such file."""
    size = path.stat().st_size
    with path.open("rb") as stream:
        length = int.from_bytes(stream.read(8), "little")
        if size < 8 or length > min(size - 8, _MAX_HEADER):
            raise ValueError(f"{path} is truncated or no safetensors file: {size} bytes; copy it again")
        try:
            header = json.loads(stream.read(length))
        except ValueError as error:
            raise ValueError(f"{path} has no safetensors header; copy it again") from error
    if not isinstance(header, dict):
        raise ValueError(f"{path} has no safetensors header; copy it again")
    header.pop("__metadata__", None)
    return header, 8 + length, size


def read_into(path: Path, begin: int, out: Tensor) -> bool:
    """Fill a tensor with the bytes from `begin`; False if the file ends before."""
    view = raw(out).data
    with path.open("rb", buffering=0) as stream:
        stream.seek(begin)
        while len(view):
            count = stream.readinto(view)
            if not count:
                return False
            view = view[count:]
    return True


def raw(tensor: Tensor) -> np.ndarray:
    """The bytes of a contiguous tensor on the CPU, not copied."""
    return tensor.reshape(-1).view(torch.uint8).numpy()
