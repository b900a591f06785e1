"""Text files that are whole or not there."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TextIO


@contextmanager
def atomic_writer(path: Path) -> Iterator[TextIO]:
    """A text stream to a temporary file, synced to disk and renamed to `path` when the block ends without an error.

    If the block raises, a file that was at `path` is unchanged and the temporary one is removed. Raises OSError.
    """
    scratch = path.with_name(f".{path.name}.tmp")
    try:
        with scratch.open("w", encoding="utf-8") as stream:
            yield stream
            stream.flush()
            os.fsync(stream.fileno())
        os.replace(scratch, path)
    except BaseException:
        with suppress(OSError):  # the first error is the one to tell
            scratch.unlink()
        raise


def write_atomic(path: Path, text: str) -> None:
    """Write a whole text by `atomic_writer`."""
    with atomic_writer(path) as stream:
        stream.write(text)
