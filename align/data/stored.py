"""Examples as columns of Arrow: written a piece at a time, read by index from a file that is mapped into memory.

An example is made when it is asked for, its tokens are views of the file: a set of a million rows costs an index. What
a run asks of all examples before its first step stands in the file beside them, in numbers. Where files lie and when
one is used is cache.py's.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar, get_args, overload

import numpy as np

from align.jsons import Json
from align.packing import cost
from align.types import Example, Layout, Prompt, Row

if TYPE_CHECKING:
    import pyarrow as pa

PIECE = 1000  # examples of a record batch: what is in memory at once while they are written


T = TypeVar("T")


class View(Sequence[T]):
    """Things that are made when they are asked for, by their number."""

    def __init__(self, size: int, make: Callable[[int], T]):
        self._size = size
        self._make = make

    @classmethod
    def of(cls, *parts: tuple[Sequence[T], Sequence[int] | None]) -> View[T]:
        """Sequences one after the other, of each the items at some places or all of them."""
        places = [(part, i) for part, chosen in parts for i in (range(len(part)) if chosen is None else chosen)]
        return cls(len(places), lambda n: places[n][0][places[n][1]])

    def __len__(self) -> int:
        return self._size

    @overload
    def __getitem__(self, index: int) -> T: ...
    @overload
    def __getitem__(self, index: slice) -> list[T]: ...
    def __getitem__(self, index: int | slice) -> T | list[T]:
        if isinstance(index, slice):
            return [self._make(i) for i in range(*index.indices(self._size))]
        at = index + self._size if index < 0 else index
        if not 0 <= at < self._size:
            raise IndexError(index)
        return self._make(at)


class Stored(View[Example]):
    """Examples [N] of a file that `write` made, in its order. fingerprint: what it gave."""

    def __init__(self, path: Path, fingerprint: str):
        import pyarrow as pa

        table = pa.ipc.open_file(pa.memory_map(str(path))).read_all()
        super().__init__(table.num_rows, self._example)
        self.fingerprint = fingerprint
        self._columns = {name: table.column(name).chunks for name in table.column_names}

    def _example(self, index: int) -> Example:
        chunk, i = divmod(index, PIECE)
        return example_of({name: chunks[chunk] for name, chunks in self._columns.items()}, i)

    def largest_token(self) -> int:
        """Of all sequences."""
        return int(self._numbers("largest").max(initial=0))

    def costs(self, layout: Layout) -> tuple[np.ndarray, np.ndarray]:
        """Of each example [N]: tokens of its sequences in a micro-batch of this layout, and of its longest extra."""
        return self._numbers(layout), self._numbers("extra")

    def _numbers(self, name: str) -> np.ndarray:
        parts = [chunk.to_numpy() for chunk in self._columns[name]]
        return np.concatenate(parts) if parts else np.zeros(0, dtype=np.int64)


def largest_tokens(examples: Sequence[Example]) -> list[int]:
    """The largest token of each sequence, or of all of them where that is known."""
    if isinstance(examples, Stored):
        return [examples.largest_token()] if len(examples) else []
    return [int(row.token_ids.max(initial=0)) for e in examples for row in e.rows]


class Fingerprint:
    """sha256 over token ids, targets and what else is learnt from, in order: what "the same data" means when a run is
    resumed."""

    def __init__(self) -> None:
        self._digest = hashlib.sha256()

    def add(self, example: Example) -> None:
        """The next one."""
        for row in (*example.rows, *example.extras.values()):
            self._add(row)
        if example.label is not None or example.numbers:
            self._digest.update(repr((example.label, sorted(example.numbers.items()))).encode())

    def _add(self, row: Row) -> None:
        self._digest.update(np.ascontiguousarray(row.token_ids).tobytes())
        self._digest.update(np.packbits(row.targets).tobytes())
        if row.weights is not None:
            self._digest.update(np.ascontiguousarray(row.weights).tobytes())
        self._digest.update(len(row.token_ids).to_bytes(4, "little"))

    def hexdigest(self) -> str:
        """Of those that were added."""
        return self._digest.hexdigest()


def write(examples: Iterable[Example], path: Path) -> str:
    """Make a file of examples; their fingerprint."""
    import pyarrow as pa

    fingerprint = Fingerprint()
    with pa.OSFile(str(path), "wb") as file, pa.ipc.new_file(file, _schema()) as out:
        for piece in _pieces(examples):
            for example in piece:
                fingerprint.add(example)
            out.write_batch(columns_of(piece))
    return fingerprint.hexdigest()


def columns_of(examples: Sequence[Example]) -> pa.RecordBatch:
    """A record batch of them, as the file holds it."""
    import pyarrow as pa

    columns, schema = [_columns(e) for e in examples], _schema()
    return pa.record_batch([pa.array([c[f.name] for c in columns], f.type) for f in schema], schema=schema)


def _schema() -> pa.Schema:
    import pyarrow as pa

    return pa.schema(
        [
            ("source", pa.string()),
            ("origin", pa.string()),
            ("label", pa.bool_()),
            ("numbers", pa.string()),  # JSON: floats come back as they were
            ("prompt", pa.list_(pa.int32())),  # null: the first `prompt_length` tokens of the first sequence
            ("prompt_length", pa.int32()),
            ("prompt_text", pa.string()),
            ("extras", pa.list_(pa.string())),  # names of the last sequences
            ("lengths", pa.list_(pa.int32())),  # of the sequences
            ("token_ids", pa.list_(pa.int32())),  # of all of them, one after the other
            ("targets", pa.list_(pa.uint8())),
            ("weighted", pa.list_(pa.bool_())),  # of each sequence: whether it has weights
            ("weights", pa.list_(pa.float32())),  # of those that have
            ("largest", pa.int64()),
            ("shared", pa.int64()),
            ("packed", pa.int64()),
            ("padded", pa.int64()),
            ("extra", pa.int64()),
        ]
    )


def _pieces(examples: Iterable[Example]) -> Iterator[list[Example]]:
    piece: list[Example] = []
    for example in examples:
        piece.append(example)
        if len(piece) == PIECE:
            yield piece
            piece = []
    if piece:
        yield piece


def _columns(example: Example) -> Json:
    """What the file holds of an example."""
    rows = [*example.rows, *example.extras.values()]
    ids = np.concatenate([row.token_ids for row in rows])
    prompt = np.array(example.prompt.token_ids, dtype=np.int32)
    begins = np.array_equal(prompt, example.rows[0].token_ids[: len(prompt)])
    weights = [row.weights for row in rows if row.weights is not None]
    return {
        "source": example.source,
        "origin": example.origin,
        "label": example.label,
        "numbers": json.dumps(dict(example.numbers)) if example.numbers else None,
        "prompt": None if begins else prompt,
        "prompt_length": len(prompt),
        "prompt_text": example.prompt.text,
        "extras": list(example.extras),
        "lengths": [len(row.token_ids) for row in rows],
        "token_ids": ids,
        "targets": np.concatenate([row.targets for row in rows]).view(np.uint8),
        "weighted": [row.weights is not None for row in rows],
        "weights": np.concatenate(weights) if weights else [],
        "largest": int(ids.max(initial=0)),
        **{layout: cost(example.rows, layout) for layout in get_args(Layout)},
        "extra": max((len(row.token_ids) for row in example.extras.values()), default=0),
    }


def example_of(columns: Json, i: int) -> Example:
    """Example i of a record batch, its arrays views of the file."""
    lengths, weighted = columns["lengths"][i].as_py(), columns["weighted"][i].as_py()
    ids, targets = _view(columns["token_ids"], i), _view(columns["targets"], i).view(bool)
    weights = _view(columns["weights"], i)
    rows, at, weighed = [], 0, 0
    for length, has in zip(lengths, weighted, strict=True):
        own = weights[weighed : weighed + length] if has else None
        rows.append(Row(ids[at : at + length], targets[at : at + length], own))
        at, weighed = at + length, weighed + (length if has else 0)
    extras = columns["extras"][i].as_py()
    first = len(rows) - len(extras)
    length = columns["prompt_length"][i].as_py()
    prompt = rows[0].token_ids[:length] if not columns["prompt"][i].is_valid else _view(columns["prompt"], i)
    numbers = columns["numbers"][i].as_py()
    return Example(
        tuple(rows[:first]),
        columns["source"][i].as_py(),
        Prompt(tuple(prompt.tolist()), columns["prompt_text"][i].as_py()),
        columns["origin"][i].as_py(),
        columns["label"][i].as_py(),
        dict(zip(extras, rows[first:], strict=True)),
        {} if numbers is None else json.loads(numbers),
    )


def _view(column: pa.ListArray, i: int) -> np.ndarray:
    """List i of a column without a copy. It cannot be written to."""
    first, last = column.offsets[i].as_py(), column.offsets[i + 1].as_py()
    return column.values[first:last].to_numpy()
