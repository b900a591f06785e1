"""Reference log-probs: cached per sequence on disk, from the policy with its adapter off, or from a second model.

A cached value is addressed by what it depends on: token ids and targets of the sequence, the weights, the precision.
Adding rows to a data set costs the new rows only.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterable, Sequence
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
        for path in sorted(self.directory.glob("*.safetensors")):
            try:
                with safe_open(path, "numpy") as file:
                    keys = file.keys()
                    values = {key: file.get_tensor(key) for key in keys}
                    digest = (file.metadata() or {}).get("blake2b")
            except SafetensorError:
                values, digest = {}, None
            if digest != _digest(values):
                path.unlink(missing_ok=True)  # damaged, or cut short by a full disk; its rows are computed again
                continue
            self.values |= {key: values[key] for key in wanted & values.keys()}

    def _write(self, new: dict[str, np.ndarray]) -> None:
        if not new:
            return
        self.directory.mkdir(parents=True, exist_ok=True)
        name = hashlib.blake2b("".join(sorted(new)).encode(), digest_size=12).hexdigest()
        scratch = self.directory / f".{name}-{os.getpid()}"
        save_file(new, scratch, {"blake2b": _digest(new)})
        os.replace(scratch, self.directory / f"{name}.safetensors")


def _digest(values: dict[str, np.ndarray]) -> str:
    digest = hashlib.blake2b(digest_size=16)
    for key, value in sorted(values.items()):
        digest.update(f"{key} {value.dtype} {value.shape};".encode())
        digest.update(np.ascontiguousarray(value).tobytes())
    return digest.hexdigest()
