"""Reference log-probs: cached per pair on disk, from the policy with its adapter off, or from a second model.

A cached value is addressed by what it depends on: the token ids and targets of both sequences, the weights, the
precision. Adding rows to a data set costs the new rows only.
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

from align.packing import micro_batches, pack, to_device
from align.types import Layout, PackedBatch, Pair, Stats

# Rows of one file. A chunk is computed whole whatever of it is missing elsewhere, so that its numbers do not
# depend on where an earlier run was killed.
CHUNK_ROWS = 32


def pair_key(pair: Pair) -> str:
    """Content address of a pair: hash of token ids and targets of both sequences."""
    digest = hashlib.blake2b(digest_size=16)
    for row in (pair.chosen, pair.rejected):
        digest.update(len(row.token_ids).to_bytes(4, "little"))
        digest.update(np.ascontiguousarray(row.token_ids, dtype=np.int32).tobytes())
        digest.update(np.packbits(row.targets).tobytes())
    return digest.hexdigest()


@dataclass(frozen=True)
class CachePass:
    """What filling the cache took."""

    found: int
    computed: int


class ReferenceCache:
    """Log-probs [C of a pair] by content address, below one directory per model and precision."""

    def __init__(self, root: Path, model_hash: str, precision: torch.dtype):
        self.directory = root / f"{model_hash}-{str(precision).removeprefix('torch.')}"
        self.values: dict[str, np.ndarray] = {}

    def fill(
        self,
        pairs: Sequence[Pair],
        forward: Callable[[PackedBatch], Stats],
        layout: Layout,
        max_tokens: int,
        device: torch.device,
        progress: Callable[[Iterable[int], int], Iterable[int]],
    ) -> CachePass:
        """Make `values` hold every pair: read what is on disk, compute the rest and write it there.

        forward: the reference's stats of a batch, without gradients.
        """
        keys = [pair_key(p) for p in pairs]
        wanted = set(keys)
        self._read(wanted)
        found = len(wanted & self.values.keys())
        chunks = [range(i, min(i + CHUNK_ROWS, len(pairs))) for i in range(0, len(pairs), CHUNK_ROWS)]
        missing = [c for c in chunks if any(keys[i] not in self.values for i in c)]
        for number in progress(range(len(missing)), len(missing)):
            # Sorting by length and packing happen inside the chunk: see CHUNK_ROWS.
            chunk = [pairs[i] for i in missing[number]]
            new: dict[str, np.ndarray] = {}
            for part in micro_batches(chunk, layout, max_tokens):
                batch = pack([chunk[i] for i in part], layout)
                with torch.no_grad():
                    values = forward(to_device(batch, device)).token_logps.float().cpu().numpy()
                counts = batch.lengths.view(-1, 2).sum(1).tolist()
                for i, own in zip(part, np.split(values, np.cumsum(counts)[:-1]), strict=True):
                    new[pair_key(chunk[i])] = own
            new = {k: v for k, v in new.items() if k not in self.values}
            self._write(new)
            self.values |= new
        return CachePass(found, len(wanted) - found)

    def __call__(self, pairs: Iterable[Pair]) -> list[np.ndarray]:
        """Log-probs of the targets of each pair, chosen first."""
        return [self.values[pair_key(p)] for p in pairs]

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
