"""Safetensors files written as a stream, and what stands beside them. Whole or not at all is the engine's matter.

A header holds names, dtypes, shapes and places only, all known beforehand: no shard is ever held in memory.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from align import __version__
from align.averaging.arguments import Request
from align.averaging.files import INDEX, Model
from align.jsons import Json
from align.tensor_files import raw, written_header

_COPIED = (
    "generation_config.json", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json",
    "added_tokens.json", "vocab.json", "vocab.txt", "merges.txt", "tokenizer.model", "spiece.model",
    "chat_template.jinja", "chat_template.json", "*.py",
)  # fmt: skip
ACCOUNT = "average.json"


@dataclass(frozen=True)
class Planned:
    """One tensor to be written."""

    key: str
    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def bytes(self) -> int:
        """Its size in the file."""
        return self.dtype.itemsize * torch.Size(self.shape).numel()


def write_tensors(
    directory: Path,
    stem: str,
    planned: Sequence[Planned],
    produce: Callable[[str], Iterator[Tensor]],
    shard_bytes: float | None,
) -> int:
    """Write tensors to STEM.safetensors, or to shards with an index if they exceed `shard_bytes`; returns their bytes.

    produce: key -> the spans of the tensor one after the other, flat, in the planned dtype.
    """
    shards = _shards(planned, shard_bytes)
    if len(shards) == 1:
        _write_file(directory / f"{stem}.safetensors", shards[0], produce)
    else:
        places = {}
        for number, shard in enumerate(shards, 1):
            name = f"{stem}-{number:05d}-of-{len(shards):05d}.safetensors"
            _write_file(directory / name, shard, produce)
            places |= {tensor.key: name for tensor in shard}
        size = sum(tensor.bytes for tensor in planned)
        index = {"metadata": {"total_size": size}, "weight_map": dict(sorted(places.items()))}
        (directory / INDEX).write_text(json.dumps(index, indent=2) + "\n")
    return sum(tensor.bytes for tensor in planned)


def copy_beside(first: Model, directory: Path) -> None:
    """Tokenizer, template, generation settings and code of the first model."""
    for pattern in _COPIED:
        for path in first.path.glob(pattern):
            shutil.copyfile(path, directory / path.name)
    extra = first.path / "additional_chat_templates"
    if extra.is_dir():
        shutil.copytree(extra, directory / extra.name)


def write_json(path: Path, value: Json) -> None:
    """A JSON object, indented."""
    path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")


def account(request: Request, models: Sequence[Model], weights: Sequence[float] | None, base: Model | None) -> Json:
    """average.json: what the result was made from. Without the directories' names it says whether two are the same."""
    members = [{"directory": str(model.path), "sha256": model.sha256()} for model in models]
    if weights is not None:
        for member, weight in zip(members, weights, strict=True):
            member["weight"] = weight
    out = {"align": __version__, "method": request.method, "settings": request.settings(), "models": members}
    if base is not None:
        key = "base" if request.merge is None else "merged_into"
        out[key] = {"directory": str(base.path), "sha256": base.sha256()}
    return out


def identity(record: Json) -> Json:
    """An account without where its inputs lay."""
    bare = {key: value for key, value in record.items() if key not in ("models", "base", "merged_into")}
    members = [record.get("base"), record.get("merged_into"), *record.get("models", [])]
    return bare | {"members": [m and {k: v for k, v in m.items() if k != "directory"} for m in members]}


def card(record: Json, adapter: bool, reward: bool) -> str:
    """README.md: what the model is and what it was made from."""
    lines = "\n".join(
        f"| {member['directory']} | {member.get('weight', '')} | {next(iter(member['sha256'].values()))[:16]} |"
        for member in record["models"]
    )
    beside = "".join(
        f"\n{text}: {record[key]['directory']}\n"
        for key, text in (("base", "Base"), ("merged_into", "Adapters merged into"))
        if key in record
    )
    settings = json.dumps({k: v for k, v in record["settings"].items() if v is not None})
    kind = "LoRA adapter" if adapter else "reward model" if reward else "model"
    return f"""\
---
library_name: {"peft" if adapter else "transformers"}
tags: [align, weight-average]
---
# Weight average ({record["method"]})

One {kind} made from the weights of {len(record["models"])} by `align average` {record["align"]}; nothing was trained.

| model | weight | sha256 of its first weight file |
|---|---|---|
{lines}
{beside}
Settings: `{settings}`. Everything, with all digests, stands in `{ACCOUNT}`.
"""


def _shards(planned: Sequence[Planned], limit: float | None) -> list[list[Planned]]:
    """Tensors in their order, a new shard where the next one would exceed the limit; one tensor is never cut."""
    shards: list[list[Planned]] = [[]]
    size = 0
    for tensor in planned:
        if limit is not None and shards[-1] and size + tensor.bytes > limit:
            shards.append([])
            size = 0
        shards[-1].append(tensor)
        size += tensor.bytes
    return shards


def _write_file(path: Path, tensors: Sequence[Planned], produce: Callable[[str], Iterator[Tensor]]) -> None:
    # wide types first, as the safetensors library does: every tensor is aligned to its element
    ordered = sorted(tensors, key=lambda tensor: (-tensor.dtype.itemsize, tensor.key))
    start, header = written_header(((t.key, t.dtype, t.shape) for t in ordered), {"format": "pt"})
    with path.open("wb") as stream:
        stream.write(start)
        for tensor in ordered:
            for span in produce(tensor.key):
                assert span.dtype == tensor.dtype
                stream.write(raw(span.contiguous()).data)
            assert stream.tell() - len(start) == header[tensor.key]["data_offsets"][1]
