"""Text files that are whole or not there."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TextIO


@contextmanager
def atomic_writer(path: Path) -> Iterator[TextIO]:
    """A stream for a text that takes the place of `path` when the block ends well; on the disk before it has its name.

    What stood there stays if the block raises, and nothing half-written is left. Raises OSError.
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
    """A text at once, as `whole` writes it."""
    with atomic_writer(path) as stream:
        stream.write(text)
