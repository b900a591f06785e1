"""Where rows come from: files, saved data sets, the hub, generators. A row is a JSON object and its "file:line".

What a row means is pairs.py's; here a row is only readable or not.
"""

from __future__ import annotations

import csv
import gzip
import hashlib
import io
import json
import os
import re
import zlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from importlib import import_module
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from align.data import GYM
from align.jsons import Json

if TYPE_CHECKING:
    import numpy as np

Kind = Literal["jsonl", "json", "csv", "parquet", "saved", "directory", "hub", "gym", "loader"]
_SUFFIXES: dict[str, Kind] = {".jsonl": "jsonl", ".json": "json", ".csv": "csv", ".parquet": "parquet"}
_PACKED = (".gz", ".zst")  # after one of them but Parquet's, which packs its columns itself
_LONGEST_CELL = 1 << 30
# Words of a file's or a folder's name that say which split it holds, as in data sets on the hub.
_SPLITS = {"train": "train|training", "test": "test|testing|eval|evaluation", "validation": "validation|valid|dev|val"}


class BadRow(ValueError):
    """A row that cannot be used: `reason` is counted in the audit, the message is for the user."""

    def __init__(self, reason: str, message: str):
        super().__init__(message)
        self.reason = reason

    def __reduce__(self) -> tuple[object, ...]:  # a process that reads rows tells another of it
        return _bad_row, (type(self), str(self), vars(self))


def _bad_row(kind: type[BadRow], message: str, told: Json) -> BadRow:
    bad = kind.__new__(kind, message)
    vars(bad).update(told)
    return bad


class NotUsed(BadRow):
    """A good row that the objective, or data.form or data.format, has no use for."""


@dataclass(frozen=True)
class Source:
    """A place to read rows from."""

    name: str  # as the user wrote it
    kind: Kind
    path: Path | None  # None on the hub, for problems of a gym and of a loader
    loader: str | None = None  # dotted path of the user's own


def _file_kind(path: Path) -> Kind | None:
    """What a file's name says that it holds; None for a name that says nothing we know."""
    if path.suffix in _PACKED:
        kind = _SUFFIXES.get(path.with_suffix("").suffix)
        return None if kind == "parquet" else kind
    return _SUFFIXES.get(path.suffix)


def locate_all(names: Any, key: str, loader: str | None = None) -> list[Source]:
    """The sources that the setting `key` means: one name or a list. Raises ValueError; reads nothing.

    loader: data.loader, to which the names belong.
    """
    listed = names if isinstance(names, list) else [names]
    if not listed or not all(isinstance(name, str) and name for name in listed):
        raise ValueError(f"{key}={names}: must be a file, a directory or a hub data set, or a list of them")
    if loader is not None:
        return [Source(name, "loader", None, loader) for name in listed]
    return [locate(name) for name in listed]


def locate(name: str) -> Source:
    """The source a name means. Raises ValueError when there is none; reads nothing."""
    if name.startswith(GYM):
        from align.data import gym

        gym.parse_name(name)
        return Source(name, "gym", None)
    if name.startswith("align:"):
        here = Path(__file__).parent
        path = (here / name.removeprefix("align:")).resolve()
        kind = _file_kind(path)
        if not path.is_file() or kind is None or not path.is_relative_to(here.resolve()):
            raise ValueError(f"{name}: no such data file ships with the package")
        return Source(name, kind, path)
    path = Path(os.path.expanduser(name))  # leaves ~nobody as it is, where Path.expanduser raises
    if path.is_dir():
        if (path / "state.json").exists() or (path / "dataset_dict.json").exists():
            return Source(name, "saved", path)
        return Source(name, "directory", path)
    kind = _file_kind(path)
    if path.is_file():
        if kind is None:
            raise ValueError(
                f"{name}: unknown kind of file; use .jsonl, .json, .csv (each also with .gz or .zst) or .parquet"
            )
        return Source(name, kind, path)
    looks_like_path = kind is not None or path.is_absolute() or name.startswith((".", "~"))
    if looks_like_path or name.count("/") > 1:
        raise ValueError(f"{name}: no such file; give an existing file or directory, or a hub data set")
    return Source(name, "hub", None)


def read(source: Source, order: np.random.Generator | None = None) -> Iterator[tuple[str, Json | BadRow]]:
    """Each row's "file:line" and its object, or why it cannot be read. Blank lines are no rows.

    order: rows of tables come as they are asked for, without a copy of the whole on this machine; files of a folder and
    parts of a table in an order that is drawn from it. Raises ValueError when the source as a whole cannot be read.
    """
    if source.kind == "jsonl":
        yield from _jsonl(source)
    elif source.kind == "json":
        yield from _json(source)
    elif source.kind == "csv":
        yield from _csv(source)
    elif source.kind == "directory" and (files := _own_files(source)):
        for file in files if order is None else [files[i] for i in order.permutation(len(files))]:
            yield from read(file)
    elif source.kind == "loader":
        yield from _loaded(source)
    elif source.kind == "gym":
        from align.data import gym

        for number, row in enumerate(gym.rows(gym.parse_name(source.name)), 1):
            yield f"{source.name}:{number}", row
    elif order is None or source.kind == "saved":  # which lies there as it is read
        for number, row in enumerate(_table(source), 1):
            yield f"{source.name}:{number}", _present(row)
    else:
        yield from _streamed(source, order)


def columns(source: Source) -> Iterator[set[str]] | None:
    """Names of a source's columns, row by row or at once; None where only loading all of it would tell.

    Of tables the names are read, without their rows, and without the package that loads them.
    """
    if source.kind in ("jsonl", "json", "csv"):
        return (set(row) for _, row in read(source) if isinstance(row, dict))
    if source.kind == "gym":
        from align.data import gym

        return iter([set(gym.COLUMNS)])
    if source.path is None:
        return None
    if source.kind != "saved":
        files = [source.path] if source.path.is_file() else [p for p in source.path.rglob("*") if p.is_file()]
        found = [_file_columns(file) for file in files]
        known = [names for names in found if names is not None]
        return chain.from_iterable(known) if len(known) == len(found) else None
    features = source.path / ("" if (source.path / "state.json").exists() else "train") / "dataset_info.json"
    with suppress(OSError, ValueError, KeyError, TypeError):
        return iter([set(json.loads(features.read_bytes())["features"])])
    return None


def _file_columns(file: Path) -> Iterator[set[str]] | None:
    kind = _file_kind(file)
    if kind is not None and kind != "parquet":
        return columns(Source(str(file), kind, file))
    with suppress(Exception):  # of a damaged file the one who loads it tells
        if file.suffix == ".parquet":
            from pyarrow.parquet import read_schema

            return iter([set(read_schema(file).names)])
    return None


def _own_files(source: Source) -> list[Source]:
    """The files of the split train of a folder, if all that hold rows are read here: a table would guess types and
    make a date of a text. Empty for a folder that is left to the package that reads tables.

    A folder whose names name no split is all train. Raises ValueError where they name others only.
    """
    assert source.path is not None
    inside = sorted(p for p in source.path.rglob("*") if p.is_file() and not _hidden(p.relative_to(source.path)))
    held: list[tuple[Path, Kind]] = [(p, kind) for p in inside if (kind := _file_kind(p)) is not None]
    if not held or any(kind == "parquet" for _, kind in held):
        return []
    splits = {p: _split_of(p.relative_to(source.path)) for p, _ in held}
    if any(splits.values()) and "train" not in splits.values():
        raise ValueError(
            f"{source.name}: holds the splits {', '.join(sorted(set(filter(None, splits.values()))))}; "
            "give a file of it"
        )
    return [Source(str(p), kind, p) for p, kind in held if splits[p] == "train" or not any(splits.values())]


def _hidden(path: Path) -> bool:
    return any(part.startswith((".", "_")) for part in path.parts)


def _split_of(path: Path) -> str | None:
    for name, words in _SPLITS.items():
        if re.search(rf"(?:^|[-_ ./])(?:{words})(?:[-_ ./]|\d|$)", str(path).lower()):
            return name
    return None


def imported(path: str, key: str) -> Callable[..., Any]:
    """A function of the user's own. Raises ValueError, naming the setting, if there is none."""
    module, _, name = path.rpartition(".")
    try:
        found = getattr(import_module(module), name)
    except (ImportError, AttributeError, ValueError) as error:
        raise ValueError(f"{key}={path}: cannot be imported ({' '.join(str(error).split())[:200]})") from error
    if not callable(found):
        raise ValueError(f"{key}={path}: must be a function")
    return found


def _loaded(source: Source) -> Iterator[tuple[str, Json | BadRow]]:
    assert source.loader is not None
    for number, row in enumerate(imported(source.loader, "data.loader")(source.name), 1):
        wrong = BadRow("not_an_object", f"data.loader={source.loader} gave {type(row).__name__}, not a mapping")
        yield f"{source.name}:{number}", dict(row) if isinstance(row, Mapping) else wrong


def content_hash(source: Source) -> str:
    """sha256 of a file's or directory's bytes, or of the rows of a generator; of its name for a hub data set and for
    what a loader reads, whose rows are hashed when read."""
    digest = hashlib.sha256()
    if source.kind == "gym":
        from align.data import gym

        digest.update("\n".join(gym.lines(gym.parse_name(source.name))).encode())
    elif source.path is None:
        digest.update("".join(filter(None, (source.loader, source.name))).encode())
    else:
        files = [source.path] if source.path.is_file() else sorted(p for p in source.path.rglob("*") if p.is_file())
        for file in files:
            with file.open("rb") as stream:
                while part := stream.read(1 << 20):
                    digest.update(part)
    return digest.hexdigest()


def _opened(source: Source) -> io.BufferedIOBase:
    """The bytes of a file, unpacked."""
    assert source.path is not None
    if source.path.suffix == ".gz":
        return gzip.open(source.path)
    if source.path.suffix == ".zst":
        import pyarrow

        return io.BufferedReader(pyarrow.input_stream(str(source.path), compression="zstd"))  # type: ignore[arg-type]
    return source.path.open("rb")


def _unpacked(source: Source, stream: io.BufferedIOBase) -> Iterator[bytes]:
    """Its lines. Raises ValueError for a packed file that is damaged or cut off."""
    try:
        yield from stream
    except (OSError, EOFError, zlib.error) as error:
        if source.path is None or source.path.suffix not in _PACKED:
            raise
        raise ValueError(f"{source.name}: cannot be unpacked ({error}); copy it again") from error


def _csv(source: Source) -> Iterator[tuple[str, Json | BadRow]]:
    """Rows below a line of names. Every cell is a text, or null where it is empty; the number is that of the row."""
    with _opened(source) as stream:
        csv.field_size_limit(_LONGEST_CELL)
        text = (line.decode("utf-8-sig" if first else "utf-8") for first, line in _numbered(source, stream))
        try:
            rows = csv.reader(text, strict=True)
            names = next(rows, [])
            if len(set(names)) != len(names):
                raise ValueError(f"{source.name}: two columns have one name; give each its own")
            for number, cells in enumerate((row for row in rows if row), 1):
                wrong = BadRow("invalid_csv", f"has {len(cells)} cells, the first line names {len(names)} columns")
                row = {name: cell or None for name, cell in zip(names, cells, strict=False)}
                yield f"{source.name}:{number}", row if len(cells) == len(names) else wrong
        except UnicodeDecodeError:
            raise ValueError(f"{source.name}: is not UTF-8; save the file as UTF-8") from None
        except csv.Error as error:
            raise ValueError(f"{source.name}: is no CSV ({error}); close every quote, or use .jsonl") from None


def _numbered(source: Source, stream: io.BufferedIOBase) -> Iterator[tuple[bool, bytes]]:
    """Each line, and whether it is the first."""
    return ((number == 0, line) for number, line in enumerate(_unpacked(source, stream)))


def _jsonl(source: Source) -> Iterator[tuple[str, Json | BadRow]]:
    with _opened(source) as stream:
        for number, line in enumerate(_unpacked(source, stream), 1):
            if not line.strip():
                continue
            try:
                # a byte order mark is no part of the text; it can stand before the first row only
                row = _object(line.decode("utf-8-sig" if number == 1 else "utf-8"))
            except UnicodeDecodeError as error:
                row = BadRow("not_utf8", f"byte {error.start + 1} of the line is not UTF-8; save the file as UTF-8")
            except BadRow as error:
                row = error
            yield f"{source.name}:{number}", row


def _json(source: Source) -> Iterator[tuple[str, Json | BadRow]]:
    with _opened(source) as stream:
        text = b"".join(_unpacked(source, stream)).removeprefix(b"\xef\xbb\xbf")
    if not text.lstrip().startswith(b"["):
        yield from _jsonl(source)
        return
    try:
        rows = _value(text.decode("utf-8"))
    except (UnicodeDecodeError, BadRow) as error:
        raise ValueError(f"{source.name}: {error}; mend the file or use .jsonl, one object a line") from None
    for number, row in enumerate(rows, 1):
        wrong = BadRow("not_an_object", f"expected an object like {{...}}, found {type(row).__name__}")
        yield f"{source.name}:{number}", row if isinstance(row, dict) else wrong


def _object(line: str) -> Json:
    value = _value(line)
    if not isinstance(value, dict):
        raise BadRow("not_an_object", f"expected an object like {{...}}, found {type(value).__name__}")
    return value


def _value(text: str) -> Any:
    """Strict JSON: Python's reader also takes NaN and the last of two fields of one name."""

    def refuse_constant(name: str) -> None:
        raise BadRow("invalid_json", f"{name} is not JSON; leave the field out or write null")

    def unique(items: list[tuple[str, object]]) -> Json:
        out = dict(items)
        if len(out) != len(items):
            twice = next(k for k, _ in items if [key for key, _ in items].count(k) > 1)
            raise BadRow("invalid_json", f"field {twice!r} stands twice; keep one")
        return out

    try:
        return json.loads(text, parse_constant=refuse_constant, object_pairs_hook=unique)
    except BadRow:
        raise
    except json.JSONDecodeError as error:
        line = f"line {error.lineno} " if error.lineno > 1 else ""
        raise BadRow(
            "invalid_json", f"invalid JSON at {line}column {error.colno} ({error.msg}); a row must be one JSON object"
        ) from None
    except ValueError:  # Python's limit for the digits of an integer
        raise BadRow("invalid_json", "holds a number of thousands of digits; leave the field out") from None
    except RecursionError:
        raise BadRow("invalid_json", "nested too deeply; a row must be one flat JSON object") from None


def _present(value: object, tools: bool = False) -> Any:
    """Without the nulls by which columns fill up tools and calls: else each tool would have every other's arguments."""
    if isinstance(value, dict):
        items = [(key, item) for key, item in value.items() if not (tools and item is None)]
        return {key: _present(item, tools or key in ("tools", "tool_calls")) for key, item in items}
    return [_present(item, tools) for item in value] if isinstance(value, list) else value


def table_fingerprint(source: Source) -> str | None:
    """What tells the rows of a hub data set from others; None for a source whose bytes do."""
    return f"{source.name} {_table(source)._fingerprint}" if source.kind == "hub" else None


def _streamed(source: Source, order: np.random.Generator) -> Iterator[tuple[str, Json | BadRow]]:
    """Rows of a table, part by part, without those that were not asked for yet."""
    table = _table(source, streaming=True)
    for part in order.permutation(table.num_shards).tolist():
        where = source.name if table.num_shards == 1 else f"{source.name}, part {part + 1}"
        rows, number = iter(table.shard(table.num_shards, part)), 0
        while True:
            try:
                row = next(rows, None)
            except Exception as error:  # the library's or the network's, of a dozen kinds
                said = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
                raise ValueError(f"{where}:{number + 1}: cannot be read ({said}); check the source") from error
            if row is None:
                break
            number += 1
            yield f"{where}:{number}", _present(row)


def _table(source: Source, streaming: bool = False) -> Any:
    import datasets

    datasets.disable_progress_bars()  # a run tells its own progress
    name, _, split = source.name.partition(":") if source.kind == "hub" else (source.name, "", "")
    split = split or "train"
    try:
        if source.kind == "parquet" and streaming:
            data = datasets.load_dataset("parquet", data_files=str(source.path), split=split, streaming=True)
        elif source.kind == "parquet":
            data = datasets.Dataset.from_parquet(str(source.path), keep_in_memory=False)
        elif source.kind == "saved":
            data = datasets.load_from_disk(str(source.path))
        elif source.kind == "directory":
            data = datasets.load_dataset(str(source.path), split=split, streaming=streaming)
        else:
            name, _, config = name.partition("@")
            data = datasets.load_dataset(name, config or None, split=split, streaming=streaming)
    except Exception as error:  # the library raises a dozen kinds; each means that the data cannot be had
        first = " ".join(str(error).split())[:300]
        raise ValueError(
            f"{source.name}: cannot be loaded ({type(error).__name__}: {first}); "
            "check the name, the split and the network"
        ) from error
    if isinstance(data, datasets.DatasetDict):
        if split not in data:
            raise ValueError(f"{source.name}: holds the splits {', '.join(map(str, data))}; save one of them alone")
        data = data[split]
    return data
