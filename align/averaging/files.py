"""Weights on disk: which tensors a directory holds, and any span of any of them without loading the rest.

Spans are read with plain reads, not through safetensors' memory map: a bound on memory is promised.
"""

from __future__ import annotations

import hashlib
import json
import math
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from align.jsons import Json
from align.tensor_files import DTYPES, read_header, read_into

_INTEGERS = ("I64", "I32", "I16", "I8", "U64", "U32", "U16", "U8", "BOOL")
FLOATS = {code: DTYPES[code] for code in ("F64", "F32", "F16", "BF16")}
_TYPES = FLOATS | {code: DTYPES[code] for code in _INTEGERS}
EMBEDDINGS = ("embed_tokens.weight", "wte.weight")
INDEX = "model.safetensors.index.json"


@dataclass(frozen=True)
class Entry:
    """One stored tensor: its file and the place of its first byte."""

    file: Path
    dtype: str  # safetensors' code
    shape: tuple[int, ...]
    begin: int

    @property
    def size(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)

    @property
    def torch_dtype(self) -> torch.dtype:
        """The dtype in torch's terms."""
        return _TYPES[self.dtype]

    def read(self, start: int, stop: int) -> Tensor:
        """Elements start to stop, flat, as stored. Raises ValueError if the file ends before."""
        out = torch.empty(stop - start, dtype=self.torch_dtype)
        try:
            whole = read_into(self.file, self.begin + start * self.torch_dtype.itemsize, out)
        except OSError as error:
            raise ValueError(f"{self.file} cannot be read ({error.strerror})") from error
        if not whole:
            raise ValueError(f"{self.file} has become shorter while it was read; average again")
        return out


Tensors = dict[str, Entry]


@dataclass(frozen=True)
class Model:
    """A directory with weights, not loaded. `sets`: tensors by the stem of the file they are written to again."""

    path: Path
    config: Json  # config.json, or adapter_config.json
    adapter: bool
    sets: dict[str, Tensors]
    reward: Json | None  # reward_model.json
    digests: dict[str, str] = field(default_factory=dict, compare=False)

    def files(self) -> list[Path]:
        """The weight files, each once."""
        return sorted({entry.file for tensors in self.sets.values() for entry in tensors.values()})

    def sha256(self) -> dict[str, str]:
        """Digest of each weight file by its name; computed once."""
        for path in self.files():
            if path.name not in self.digests:
                with path.open("rb") as stream:
                    self.digests[path.name] = hashlib.file_digest(stream, "sha256").hexdigest()
        return dict(self.digests)


def open_model(path: Path) -> Model:
    """What `path` holds: a model or a LoRA adapter in Hugging Face format. Reads headers only.

    Raises ValueError, one line, for what is missing, truncated, quantised or not safetensors.
    """
    if not path.is_dir():
        raise ValueError(
            f"{path} is not a directory; give a local model directory (a hub name must be downloaded first)"
        )
    if (path / "adapter_config.json").exists():
        sets = {"adapter_model": _tensors(path / "adapter_model.safetensors")}
        for stem in ("score", "head"):
            if (path / f"{stem}.safetensors").exists():
                sets[stem] = _tensors(path / f"{stem}.safetensors")
        return Model(path, read_json(path / "adapter_config.json"), True, sets, _reward(path))
    if not (path / "config.json").exists():
        inner = path / "final"
        tip = f"give {inner}" if (inner / "config.json").exists() or (inner / "adapter_config.json").exists() else (
            "give a directory in Hugging Face format, such as final/ of a run"
        )  # fmt: skip
        raise ValueError(f"{path} has no config.json; {tip}")
    config = read_json(path / "config.json")
    sets = {"model": _model_tensors(path)}
    if (path / "head.safetensors").exists():
        sets["head"] = _tensors(path / "head.safetensors")
    model = Model(path, config, False, sets, _reward(path))
    _refuse_quantised(model)
    return model


def read_json(path: Path) -> Json:
    """A JSON object. Raises ValueError if it is none."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"{path} is no JSON that can be read ({error}); restore it") from error
    if not isinstance(value, dict):
        raise ValueError(f"{path} is no JSON object; restore it")
    return value


def _reward(path: Path) -> Json | None:
    file = path / "reward_model.json"
    return read_json(file) if file.exists() else None


def _model_tensors(path: Path) -> Tensors:
    """The tensors of a model in one file or in shards named by the index."""
    single, index = path / "model.safetensors", path / INDEX
    if single.exists():  # transformers prefers it too
        return _tensors(single)
    if not index.exists():
        if list(path.glob("model-*-of-*.safetensors")):
            raise ValueError(f"{path} has shards but no {INDEX}, which says what is in them; restore it")
        pickled = any(path.glob("*.bin")) or any(path.glob("*.pt")) or any(path.glob("*.pth"))
        tip = "; pickled weights are not read: load and save them with transformers first" if pickled else ""
        raise ValueError(f"{path} has neither model.safetensors nor {INDEX}{tip}")
    places = read_json(index).get("weight_map")
    if not isinstance(places, dict) or not places:
        raise ValueError(f"{index} has no weight_map; restore it")
    shards: dict[str, Tensors] = {}
    for name in sorted(set(places.values())):
        if not (path / name).exists():
            raise ValueError(f"{path / name} is missing, and {INDEX} names it; copy the shard again")
        shards[name] = _tensors(path / name)
    for key, name in places.items():
        if key not in shards[name]:
            raise ValueError(f"{path / name} has no tensor {key}, which {INDEX} places there; copy the shard again")
    return {key: shards[name][key] for key, name in places.items()}


def _tensors(path: Path) -> Tensors:
    """The header of a safetensors file, checked against its length."""
    if not path.exists():
        raise ValueError(f"{path} is missing; copy it again")
    try:
        header, first, size = read_header(path)
        found = {
            key: (Entry(path, str(at["dtype"]), tuple(at["shape"]), first + at["data_offsets"][0]), at)
            for key, at in header.items()
        }
    except OSError as error:
        raise ValueError(f"{path} cannot be read ({error.strerror})") from error
    except (AttributeError, KeyError, IndexError, TypeError) as error:
        raise ValueError(f"{path} has no safetensors header; copy it again") from error
    end = first
    for key, (entry, at) in sorted(found.items(), key=lambda item: item[1][0].begin):
        if entry.dtype not in _TYPES:
            raise ValueError(f"{path}: {key} is quantised or of an unknown dtype ({entry.dtype}); dequantise it first")
        stop = first + at["data_offsets"][1]
        if entry.begin != end or stop - entry.begin != entry.size * entry.torch_dtype.itemsize:
            raise ValueError(f"{path}: the place of {key} does not fit its shape; copy the file again")
        end = stop
    if end != size:
        raise ValueError(f"{path} is truncated: {size} bytes, and its header says {end}; copy it again")
    return {key: entry for key, (entry, _) in found.items()}


def _refuse_quantised(model: Model) -> None:
    if model.config.get("quantization_config"):
        raise ValueError(f"{model.path} is quantised (quantization_config in config.json); dequantise it first")
    for key, entry in model.sets["model"].items():
        packed = key.endswith(("qweight", "qzeros", "weight_packed", "absmax", ".weight"))
        if packed and entry.dtype not in FLOATS and entry.dtype != "BOOL":
            raise ValueError(f"{model.path}: {key} is quantised ({entry.dtype}); dequantise the model first")
