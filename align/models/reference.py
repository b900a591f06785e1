"""Reference log-probs: cached per sequence on disk, from the policy with its adapter off, or from a second model.

A cached value is addressed by what it depends on: token ids and targets of the sequence, the weights, the precision.
Adding rows to a data set costs the new rows only.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from align.engine.world import World, by_lead
from align.packing import micro_batches, pack_groups, shares, to_device
from align.types import Layout, PackedBatch, Row, Stats

# Examples of one file. A chunk is computed whole whatever of it is missing elsewhere, so that its numbers do not
# depend on where an earlier run was killed.
CHUNK_ROWS = 32
_INDEX = "index.json"  # of the files of a directory
_Seen = tuple[int, int, list[str]]  # of a file: bytes, st_mtime_ns, keys


def row_key(row: Row) -> str:
    """Content address of a sequence: hash of its token ids and targets."""
    digest = hashlib.blake2b(digest_size=16)
    digest.update(np.ascontiguousarray(row.token_ids, dtype=np.int32).tobytes())
    digest.update(np.packbits(row.targets).tobytes())
    return digest.hexdigest()


@dataclass(frozen=True)
class CacheStats:
    """What filling the cache took, in distinct examples."""

    found: int
    computed: int


class ReferenceCache:
    """Log-probs [C of a sequence] by content address, below one directory per model and precision."""

    def __init__(self, root: Path, model_hash: str, precision: torch.dtype):
        self.directory = root / f"{model_hash}-{str(precision).removeprefix('torch.')}"
        self.values: dict[str, np.ndarray] = {}

    def fill(
        self,
        groups: Sequence[Sequence[Row]],
        sources: Sequence[str],
        forward: Callable[[PackedBatch], Stats],
        layout: Layout,
        max_tokens: int,
        device: torch.device,
        progress: Callable[[Iterable[int], int], Iterable[int]],
        world: World | None = None,
    ) -> CacheStats:
        """Make `values` hold the rows of every example: read what is on disk, compute the rest and write it there.

        groups: the rows of each example, which begin alike. forward: the reference's stats, without gradients. world:
        the processes that share the work; the lead reads and writes the disk.
        """
        world = world or World()
        keys = [tuple(row_key(row) for row in rows) for rows in groups]
        wanted = {key for part in keys for key in part}
        by_lead(world, lambda: self._read(wanted))
        self.values = world.share(self.values)
        examples = set(keys)
        found = sum(all(key in self.values for key in part) for part in examples)
        chunks = [range(i, min(i + CHUNK_ROWS, len(groups))) for i in range(0, len(groups), CHUNK_ROWS)]
        missing = [c for c in chunks if any(key not in self.values for i in c for key in keys[i])]
        for number in progress(range(len(missing)), len(missing)):
            # Sorting by length and packing happen inside the chunk: see CHUNK_ROWS.
            chunk = [groups[i] for i in missing[number]]
            names = [sources[i] for i in missing[number]]
            new: dict[str, np.ndarray] = {}
            parts = micro_batches(chunk, names, layout, max_tokens, world.size)
            for part, own in shares(parts, world.rank, world.size):
                rows = [row for i in part for row in chunk[i]]
                batch = pack_groups([chunk[i] for i in part], layout, [names[i] for i in part])
                with torch.no_grad():
                    values = forward(to_device(batch, device)).token_logps.float().cpu().numpy()
                if not own:
                    continue
                counts = [int(row.targets.sum()) for row in rows]
                for row, column in zip(rows, np.split(values, np.cumsum(counts)[:-1]), strict=True):
                    new[row_key(row)] = column
            new = {k: v for part in world.gather(new) for k, v in part.items() if k not in self.values}
            by_lead(world, lambda new=new: self._write(new))
            self.values |= new
        return CacheStats(found, len(examples) - found)

    def __call__(self, rows: Iterable[Row]) -> list[np.ndarray]:
        """Log-probs of the targets of each sequence."""
        return [self.values[row_key(row)] for row in rows]

    def _read(self, wanted: set[str]) -> None:
        known = _index(self.directory)
        now: dict[str, _Seen] = {}
        for path in sorted(self.directory.glob("*.safetensors")):
            stat = path.stat()
            size, changed, keys = known.get(path.name, (0, 0, []))
            if (size, changed) != (stat.st_size, stat.st_mtime_ns):
                keys = None
            # a file that was whole is opened for what is wanted of it, and not at all for nothing
            values = _values(path, None if keys is None else sorted(wanted.intersection(keys)))
            if values is None:
                path.unlink(missing_ok=True)  # damaged, or cut short by a full disk; its rows are computed again
                continue
            now[path.name] = (stat.st_size, stat.st_mtime_ns, sorted(values) if keys is None else keys)
            self.values |= {key: values[key] for key in wanted & values.keys()}
        if now != known:
            _remember(self.directory, now)

    def _write(self, new: dict[str, np.ndarray]) -> None:
        if not new:
            return
        self.directory.mkdir(parents=True, exist_ok=True)
        name = hashlib.blake2b("".join(sorted(new)).encode(), digest_size=12).hexdigest()
        scratch = self.directory / f".{name}-{os.getpid()}"
        save_file(new, scratch, {"blake2b": _digest(new)})
        os.replace(scratch, self.directory / f"{name}.safetensors")


def _values(path: Path, keys: Sequence[str] | None) -> dict[str, np.ndarray] | None:
    """What a file holds of these keys, or all of it after a look at its digest; None if it is damaged."""
    if keys is not None and not keys:
        return {}
    try:
        with safe_open(path, "numpy") as file:
            values = {key: file.get_tensor(key) for key in (file.keys() if keys is None else keys)}
            digest = (file.metadata() or {}).get("blake2b")
    except SafetensorError:
        return None
    return values if keys is not None or digest == _digest(values) else None


def _index(directory: Path) -> dict[str, _Seen]:
    """Size, time of change and keys of each file that was whole when it was last read; of those that have neither
    changed since the digest is not made again."""
    try:
        content = json.loads((directory / _INDEX).read_bytes())
        if content["blake2b"] != _text_digest(content["files"]):
            return {}
        return {name: (size, changed, keys) for name, (size, changed, keys) in content["files"].items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError):  # none, or not as written: all are read again
        return {}


def _remember(directory: Path, seen: dict[str, _Seen]) -> None:
    scratch = directory / f".{_INDEX}-{os.getpid()}"
    with suppress(OSError):  # of a cache that can only be read, or a full disk: all are read again
        scratch.write_text(json.dumps({"blake2b": _text_digest(seen), "files": seen}))
        os.replace(scratch, directory / _INDEX)


def _text_digest(files: Mapping[str, object]) -> str:
    return hashlib.blake2b(json.dumps(files, sort_keys=True).encode(), digest_size=16).hexdigest()


def _digest(values: dict[str, np.ndarray]) -> str:
    digest = hashlib.blake2b(digest_size=16)
    for key, value in sorted(values.items()):
        digest.update(f"{key} {value.dtype} {value.shape};".encode())
        digest.update(np.ascontiguousarray(value).tobytes())
    return digest.hexdigest()
