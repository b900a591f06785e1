"""Examples as they are read: what a run trains on that asks for rows instead of holding them, data.streaming=true.

Which rows are kept is splits.py's, what becomes of one examples.py's; here is their order, and where it goes on.
"""

from __future__ import annotations

import hashlib
import json
from collections import deque
from collections.abc import Generator, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import islice
from typing import TypeVar

import numpy as np

from align.data.audit import Audit, SplitAudit
from align.data.examples import Loaded
from align.data.load import refuse_doubts
from align.data.mapping import Columns
from align.data.sources import BadRow, Source, read
from align.data.splits import Reader
from align.data.workers import Made, Read, understood
from align.jsons import Fields, Json
from align.types import Example

T = TypeVar("T")
_FEW = 1000  # rows below which a share of bad ones says little; at the end of a source it is judged by those there are
_LISTED = 100  # rows of a kind that the account names one by one


class StreamFault(ValueError):
    """A row or a source that cannot be used, met while the run goes: the step that wanted it has not begun."""


def shuffled(rows: Iterable[T], size: int, seed: Sequence[int]) -> Iterator[T]:
    """All of the rows, each time a random one of the `size` that are held, whose place the next one takes."""
    coming, rng = iter(rows), np.random.default_rng(seed)
    held = list(islice(coming, size))
    for row in coming:
        at = int(rng.integers(len(held)))
        out, held[at] = held[at], row
        yield out
    for at in rng.permutation(len(held)):
        yield held[at]


@dataclass
class _Place:
    """Where a source is; drawn rows were counted, or refused."""

    passes: int = 0  # that are over
    drawn: int = 0  # rows of this pass
    used: int = 0  # examples of the last of them that steps have had; 0: all of them
    digest: str = ""  # over the drawn rows of this pass, in their order


class Stream:
    """The examples of one source without end: a pass through it follows the other, each in another order.

    The order is a function of (seed, pass). A place in it is the number of rows drawn, so that to go on means to read
    them again, without rendering them.
    """

    def __init__(self, reader: Reader[Loaded], source: Source, setting: str, seed: Sequence[int], audit: SplitAudit):
        """setting: what named the source, for messages. audit: counts its rows, and those of others beside it."""
        self._reader = reader
        self._source = source
        self._setting = setting
        self._seed = seed
        self._audit = audit
        audit.sources.append(source.name)
        self._begin(_Place())

    def _begin(self, place: _Place) -> None:
        self.place = place
        self._marks: deque[str] = deque()  # digests of the rows that are drawn and not counted yet
        self._left: list[Example] = []  # of the last row
        self._chat = True  # whether that is a conversation
        self._columns = Columns(self._reader.config.columns)
        order = [*self._seed, place.passes]
        rows = self._reader.formed(read(self._source, np.random.default_rng([*order, 1])), self._columns)
        self._drawn = shuffled(rows, self._reader.config.shuffle_buffer, order)
        self._made: Iterator[Made[Loaded]] = understood(self._marked(), self._reader.make, self._reader.workers)

    def _marked(self) -> Iterator[Read]:
        for where, row in self._drawn:
            self._marks.append(_digest(row))
            yield where, row

    def take(self, count: int) -> list[tuple[Example, bool]]:
        """The next examples, and whether each is of a conversation. Raises ValueError as Reader does, as soon as a row
        says so."""
        out: list[tuple[Example, bool]] = []
        while len(out) < count:
            if not self._left:
                self._next()
            taken = self._left[: count - len(out)]
            self._left = self._left[len(taken) :]
            self.place.used = self.place.used + len(taken) if self._left else 0
            out += [(example, self._chat) for example in taken]
        return out

    def _next(self) -> None:
        """Count the next row, and have its examples if it has any."""
        found = next(self._made, None)
        if found is None:
            self._end()
            return
        where, made = found
        self._pass_by()
        self._audit.rows_in += 1
        if isinstance(made, BadRow):
            self._reader.drop(self._audit, where, made)
            self._reader.judge(self._audit, self._setting, True, _FEW)
            if self._audit.dropped[made.reason] > _LISTED:
                self._audit.dropped_rows.pop()
            return
        _keep(self._audit, made)
        refuse_doubts(self._audit, self._reader.config.max_bad_fraction, _FEW)
        self._have(made)

    def _have(self, row: Loaded) -> None:
        self._left, self._chat = list(row.examples), row.chat

    def _pass_by(self) -> None:
        self.place.drawn += 1
        self.place.digest = hashlib.blake2b((self.place.digest + self._marks.popleft()).encode()).hexdigest()[:32]

    def _end(self) -> None:
        """The source is over: what only the whole of it tells, and the next pass."""
        if not self.place.drawn:
            again = "when it is read again" if self.place.passes else ""
            raise ValueError(f"{self._source.name}: has no rows {again}".rstrip() + "; give a source with at least one")
        self._reader.judge(self._audit, self._setting, self._audit.rows_kept > 0)
        refuse_doubts(self._audit, self._reader.config.max_bad_fraction)
        self._columns.check(self._source.name)
        self._begin(_Place(self.place.passes + 1))

    def restore(self, told: Fields) -> None:
        """Go on from a place. Raises ValueError if other rows lead to it."""
        there = _Place(**told)
        self._begin(_Place(there.passes))
        for _ in islice(self._marked(), there.drawn - bool(there.used)):
            self._pass_by()
        if there.used:
            _, made = next(self._made, ("", None))
            if isinstance(made, Loaded):
                self._pass_by()
                self._have(made)
                self._left = self._left[there.used :]
                self.place.used = there.used
        if self.place != there:
            raise ValueError(
                f"{self._source.name}: has other rows than when the run was started; give another run.dir or the same "
                "data"
            )

    def close(self) -> None:
        """End the processes that render ahead; may be called again."""
        made = self._made
        self._made = iter(())
        if isinstance(made, Generator):
            made.close()


class Streams:
    """The sources of data.train, each of which has its count of every step."""

    def __init__(self, streams: Sequence[Stream], audit: Audit, heldout: Sequence[Example], chats: set[bool]):
        """audit: in whose account of train the streams count. heldout: whose prompts are looked for in what comes.
        chats: is told whether prompts are conversations, of those that come."""
        self._streams = streams
        self.audit = audit
        self._chats = chats
        self._prompts = {e.prompt.token_ids: i for i, e in enumerate(heldout) if e.prompt.token_ids}
        self._met: set[int] = set()  # held-out prompts that were also learnt from

    @property
    def passes(self) -> int:
        """Whole passes through the source that has the fewest."""
        return min(stream.place.passes for stream in self._streams)

    def take(self, counts: Sequence[int]) -> list[Example]:
        """So many of each source. Raises StreamFault."""
        try:
            found = [one for stream, count in zip(self._streams, counts, strict=True) for one in stream.take(count)]
        except ValueError as error:
            raise StreamFault(str(error)) from error
        self._chats.update(chat for _, chat in found)
        ids = (example.prompt.token_ids for example, _ in found)
        self._met.update(self._prompts[prompt] for prompt in ids if prompt in self._prompts)
        self.audit.prompts_in_both = len(self._met)
        return [example for example, _ in found]

    def state(self) -> Json:
        """Where they are, and the account so far."""
        return {
            "places": [asdict(stream.place) for stream in self._streams],
            "train": vars(self.audit.train),
            "chats": sorted(self._chats),
            "met": sorted(self._met),
        }

    def restore(self, told: Fields) -> None:
        """The inverse. Raises ValueError for sources that have other rows."""
        for stream, place in zip(self._streams, told["places"], strict=True):
            stream.restore(place)
        vars(self.audit.train).update(told["train"])
        self._chats.update(told["chats"])
        self._met = set(told["met"])
        self.audit.prompts_in_both = len(self._met)

    def close(self) -> None:
        """See Stream."""
        for stream in self._streams:
            stream.close()


def _digest(row: Json | BadRow) -> str:
    said = str(row) if isinstance(row, BadRow) else json.dumps(row, sort_keys=True, default=str)
    return hashlib.blake2b(said.encode(), digest_size=16).hexdigest()


def _keep(audit: SplitAudit, row: Loaded) -> None:
    """Count a row that is used."""
    audit.rows_kept += 1
    audit.examples += len(row.examples)
    audit.truncated_rows += [row.source] if row.truncated and len(audit.truncated_rows) < _LISTED else []
    audit.from_texts += row.from_text
    if row.doubt:
        audit.doubts += 1
        audit.first_doubt = audit.first_doubt or f"{row.source}: {row.doubt}"
    for counts, names in ((audit.unread, row.unread), (audit.shapes, (row.shape,))):
        for name in names:
            counts[name] = counts.get(name, 0) + 1
    for example in row.examples:
        if example.origin:
            audit.origins[example.origin] = audit.origins.get(example.origin, 0) + 1
        audit.tokens += sum(len(sequence.token_ids) for sequence in example.rows)
        audit.target_tokens += sum(int(sequence.targets.sum()) for sequence in example.rows)
