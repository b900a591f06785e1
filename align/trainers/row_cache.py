"""Rows that a policy drew, kept in a directory under a key: what was drawn once is read by a later start.

The key says all that the rows depend on. They are drawn in chunks, each a file that is whole or not there; a chunk's
draws depend on its number alone, so that what is drawn again after a kill comes out the same.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

from align.checkpoint import WriteFailed
from align.engine.world import World, by_lead
from align.files import write_atomic
from align.jsons import Fields, Json

Line = Json
Progress = Callable[[Iterable[int], int], Iterable[int]]


class RowCache:
    """Generated rows in a directory, valid for one key. The lead process reads and writes; all make the same calls."""

    def __init__(self, directory: Path, world: World):
        self.directory = directory
        self.world = world

    def begin(self, key: Fields, bound: bool = False, beside: Sequence[Path] = ()) -> bool:
        """Use the directory for rows that depend on `key`; returns whether rows of another key were deleted.

        beside: files elsewhere that depend on it too. bound: whether the run has learnt from what is there, so that
        other rows would be another run's: then raises ValueError for another key.
        """
        return self.world.share(by_lead(self.world, lambda: self._begin(key, bound, beside)))

    def _begin(self, key: Fields, bound: bool, beside: Sequence[Path]) -> bool:
        path = self.directory / "key.json"
        wanted = json.loads(json.dumps(key, default=str))
        was = json.loads(path.read_text(encoding="utf-8")) if path.exists() else None
        if was == wanted:
            return False
        if bound and was is not None:
            changed = ", ".join(sorted(k for k in wanted.keys() | was.keys() if was.get(k) != wanted.get(k)))
            raise ValueError(
                f"{self.directory} was collected with other {changed} than now, and the run has learnt from it; give "
                "another run.dir"
            )
        for old in beside:
            old.unlink(missing_ok=True)
        stale = self.directory.exists()
        if stale:
            shutil.rmtree(self.directory)
        self.directory.mkdir(parents=True)
        write(path, json.dumps(wanted, indent=1) + "\n")
        return stale

    def chunked(
        self, name: str, count: int, size: int, draw: Callable[[int, range], Sequence[Line]], progress: Progress
    ) -> list[Line]:
        """The rows of `count` items, `size` items a chunk; draw: makes those of a chunk, by its number and items.

        A kill loses one chunk at most. progress: wraps the loop over chunks, may raise.
        """
        numbers = range(-(-count // size))
        out: list[Line] = []
        for number in progress(numbers, len(numbers)):
            items = range(number * size, min(count, (number + 1) * size))
            out += self.rows(f"{name}-{number:03d}.jsonl", lambda k=number, items=items: draw(k, items))
        return out

    def rows(self, name: str, draw: Callable[[], Sequence[Line]]) -> list[Line]:
        """The rows of a file, drawn and written if it is not there."""
        found = self.read(name)
        return self.write(name, draw()) if found is None else found

    def read(self, name: str) -> list[Line] | None:
        """The rows of a file; None without it."""
        path = self.directory / name
        return self.world.share(by_lead(self.world, lambda: read_rows(path) if path.exists() else None))

    def write(self, name: str, rows: Sequence[Line]) -> list[Line]:
        """Rows into a file; returned as it is read."""
        path = self.directory / name

        def written() -> list[Line]:
            write_rows(path, rows)
            return read_rows(path)

        return self.world.share(by_lead(self.world, written))


def write(path: Path, text: str) -> None:
    """A file, whole or not there. Raises WriteFailed when the disk is full."""
    try:
        write_atomic(path, text)
    except OSError as error:
        raise WriteFailed(path, error, len(text)) from error


def write_rows(path: Path, rows: Sequence[Fields]) -> None:
    """A line a row."""
    write(path, "".join(json.dumps(row, default=str) + "\n" for row in rows))


def read_rows(path: Path) -> list[Line]:
    """What write_rows wrote."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
