"""Rows rendered by several processes, in the order of the file."""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from itertools import chain, islice
from multiprocessing import get_context
from typing import TypeVar

from align.data.sources import BadRow
from align.jsons import Json

R = TypeVar("R")
Understand = Callable[[Json, str], R]  # raises BadRow
Read = tuple[str, "Json | BadRow"]  # "file:line", and the row or why it cannot be read
Made = tuple[str, "R | BadRow"]

_ALONE = 2000  # rows done before others are started, each of which costs seconds
_TOGETHER = 100  # rows that a process gets at once

_understand: Understand  # of a process that was started for it


def num_workers(wanted: int | None) -> int:
    """data.workers, or as many as there are cores for each process of the run on this machine."""
    here = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    return wanted or max(1, len(os.sched_getaffinity(0)) // here)


def understood(rows: Iterable[Read], make: Callable[[], Understand[R]], workers: int) -> Iterator[Made[R]]:
    """What each row becomes, or why it cannot be used, in the order of the rows.

    make: the function that understands rows; sent to the processes, so that it must be one of a module's, or a partial
    of one. Raises what understanding raises but BadRow, and ValueError if a process dies.
    """
    rows, own = iter(rows), make()
    yield from _done(own, islice(rows, _ALONE) if workers > 1 else rows)
    first = list(islice(rows, 1))
    if not first:
        return
    waiting: deque[Future[list[Made[R]]]] = deque()
    rows = chain(first, rows)
    pool = ProcessPoolExecutor(workers, get_context("spawn"), _begin, (make,))
    try:
        while part := list(islice(rows, _TOGETHER)):
            waiting.append(pool.submit(_part, part))
            if len(waiting) > 2 * workers:  # so that the file is not read ahead as a whole
                yield from waiting.popleft().result()
        while waiting:
            yield from waiting.popleft().result()
    except BrokenProcessPool as error:
        raise ValueError(
            f"data.workers={workers}: a process that renders rows died, perhaps for want of memory; use data.workers=1"
        ) from error
    finally:
        pool.shutdown(cancel_futures=True)


def _begin(make: Callable[[], Understand[R]]) -> None:
    global _understand
    _understand = make()


def _part(rows: list[Read]) -> list[Made[R]]:
    return list(_done(_understand, rows))


def _done(understand: Understand[R], rows: Iterable[Read]) -> Iterator[Made[R]]:
    for where, row in rows:
        try:
            if isinstance(row, BadRow):
                raise row
            yield where, understand(row, where)
        except BadRow as bad:
            yield where, bad
