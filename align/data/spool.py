"""Examples that have come and are not wanted yet: a few in memory, many in a temporary file.

A set that is rendered for the first time is as large as it is; what a process holds of it is an index. The file has no
name, so that it ends with the process. Where it cannot be written examples stay in memory, in the form of the file.
"""

from __future__ import annotations

import mmap
import tempfile
from collections.abc import Sequence
from typing import IO, TYPE_CHECKING

from align.data.stored import PIECE, View, columns_of, example_of
from align.jsons import Json
from align.types import Example

if TYPE_CHECKING:
    import pyarrow as pa

_HELD = 4 * PIECE  # examples that stay in memory
_MAPPED = 16  # pieces that are read before their pages are given back


class Spool:
    """Examples by the order in which they were added."""

    def __init__(self, all_in_memory: bool = False):
        self._held = None if all_in_memory else _HELD
        self._last: list[Example] = []  # of no piece yet
        self._count = 0
        self._file: IO[bytes] | None = None
        self._pieces: list[tuple[int, int] | pa.Buffer] = []  # of the file from, to; or in memory
        self._map: mmap.mmap | None = None
        self._read: dict[int, Json] = {}
        self._turns = 0
        self._at = -1

    def add(self, example: Example) -> int:
        """Keep it; its number."""
        self._last.append(example)
        self._count += 1
        if self._held is not None and len(self._last) >= (PIECE if self._pieces else max(self._held, PIECE)):
            for first in range(0, len(self._last) - PIECE + 1, PIECE):
                self._put(self._last[first : first + PIECE])
            self._last = self._last[len(self._last) // PIECE * PIECE :]
        return self._count - 1

    def examples(self, numbers: Sequence[int]) -> Sequence[Example]:
        """Those of these numbers, in this order: made when they are asked for where they lie in the file. None may be
        added any more."""
        if not self._pieces:
            return [self._last[number] for number in numbers]
        if self._file is not None and self._map is None:
            self._file.flush()
            self._map = mmap.mmap(self._file.fileno(), 0, access=mmap.ACCESS_READ)
        return View(len(numbers), lambda n: self._example(numbers[n]))

    def _example(self, number: int) -> Example:
        piece, i = divmod(number, PIECE)
        return example_of(self._columns(piece), i) if piece < len(self._pieces) else self._last[i]

    def _put(self, examples: list[Example]) -> None:
        """Make a piece of them."""
        import pyarrow as pa

        sink = pa.BufferOutputStream()
        batch = columns_of(examples)
        with pa.ipc.new_stream(sink, batch.schema) as out:
            out.write_batch(batch)
        piece = sink.getvalue()
        try:
            if self._file is None:
                self._file = tempfile.TemporaryFile()  # noqa: SIM115  lives as long as this object
            start = self._file.seek(0, 2)
            self._file.write(piece)
            self._file.flush()
            self._pieces.append((start, start + piece.size))
        except OSError:  # no room
            self._pieces.append(piece)

    def _columns(self, number: int) -> Json:
        if number != self._at:
            self._at, self._turns = number, self._turns + 1
            if self._map is not None and self._turns % _MAPPED == 0:
                # what was read counts as the process's memory until its pages are given back
                self._map.madvise(mmap.MADV_DONTNEED)
        if number not in self._read:
            import pyarrow as pa

            piece = self._pieces[number]
            if isinstance(piece, tuple):
                piece = pa.py_buffer(self._map).slice(piece[0], piece[1] - piece[0])
            batch = pa.ipc.open_stream(piece).read_next_batch()
            self._read[number] = {name: batch.column(name) for name in batch.schema.names}
        return self._read[number]
