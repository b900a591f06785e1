"""Sources to the rows of both splits: who is kept, who is left out and why. What a row becomes is its reader's."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Generic, Protocol, TypeVar

import numpy as np

from align.config import DataConfig
from align.data.audit import IN_TRAIN, LEFT_OUT, NO_FAULT, OVERLONG, Audit, SplitAudit
from align.data.mapping import Columns
from align.data.sources import BadRow, NotUsed, Source, content_hash, imported, locate_all, read
from align.data.unread import Unread
from align.data.workers import Understand, understood
from align.jsons import Json

if TYPE_CHECKING:
    from align.data.forms import Placed


class Sourced(Protocol):
    """A row that knows where it came from."""

    @property
    def source(self) -> str:
        """ "file:line" """
        ...


T = TypeVar("T")
R = TypeVar("R", bound=Sourced)


def _as_it_is(row: R) -> R:
    return row


@dataclass(frozen=True)
class Reader(Generic[R]):
    """Reads rows by the rules that data.on_bad_row, data.overlong and data.max_bad_fraction make.

    make: the function that says what a row becomes, from its object and its "file:line", and raises BadRow for one
    that cannot be used; one of a module's, or a partial of one. key: the hash of its prompt, or of what stands for it.
    to_the_end: bad rows are counted whatever the settings say of them. workers: processes that share the rows. kept:
    is given each row that is used, in this process, and says what is held of it.
    """

    config: DataConfig
    make: Callable[[], Understand[R]]
    key: Callable[[R], bytes]
    to_the_end: bool = False
    workers: int = 1
    kept: Callable[[R], R] = _as_it_is

    def splits(self, audit: Audit) -> tuple[list[list[R]], list[R]]:
        """The kept rows of each source of data.train, and the held-out rows: those of data.heldout, else a part.

        Raises ValueError, naming file and line, for the first bad row with on_bad_row=error, for more than
        max_bad_fraction of them with drop, and for a split of which nothing is left.
        """
        config = self.config
        sources = locate_all(config.train, "data.train", config.loader)
        repeats(config, len(sources))  # refused before anything is read
        held_names = config.heldout
        heldout_sources = None if held_names is None else locate_all(held_names, "data.heldout", config.loader)
        parts = self._split(sources, audit.train, f"data.train={config.train}")
        if heldout_sources is not None:
            held = self._split(heldout_sources, audit.heldout, f"data.heldout={config.heldout}")
            return parts, [row for part in self._unseen(heldout_sources, held, parts, audit.heldout) for row in part]
        kept = self._keep_back([row for part in parts for row in part])
        heldout = [row for part in parts for row in part if row.source in kept]
        audit.heldout.rows_in = len(heldout)
        audit.train.rows_in -= len(heldout)
        audit.heldout.sources, audit.heldout.sha256 = audit.train.sources, audit.train.sha256
        return [[row for row in part if row.source not in kept] for part in parts], heldout

    def _split(self, sources: Sequence[Source], audit: SplitAudit, setting: str) -> list[list[R]]:
        parts = []
        for source in sources:
            audit.sources.append(source.name)
            audit.sha256.append(content_hash(source))
            part = []
            columns = Columns(self.config.columns)
            for where, made in understood(self.formed(read(source), columns), self.make, self.workers):
                audit.rows_in += 1
                if isinstance(made, BadRow):
                    self.drop(audit, where, made)
                else:
                    part.append(self.kept(made))
            if part or not self.to_the_end:
                columns.check(source.name)
            parts.append(part)
        if not self.to_the_end:
            self.judge(audit, setting, any(parts))
        return parts

    def formed(self, rows: Iterable[Placed], columns: Columns) -> Iterable[Placed]:
        """Rows as data.format, data.columns and then data.form make them; the form may make one of several, or several
        of one."""
        formatted = ((where, self._tried(row, columns)) for where, row in rows)
        if self.config.form is None:
            return formatted
        from align.data.forms import FORMS

        return FORMS[self.config.form].rows(formatted, self.config.ignore)

    def _tried(self, row: Json | BadRow, columns: Columns) -> Json | BadRow:
        try:
            return row if isinstance(row, BadRow) else columns.mapped(self._formatted(row))
        except BadRow as bad:
            return bad

    def _formatted(self, record: Json) -> Json:
        """What data.format makes of a record. Raises BadRow if it fails, and for one that it leaves out."""
        path = self.config.format
        if path is None:
            return record
        function = imported(path, "data.format")
        try:
            made = function(record)
        except Exception as error:  # a function of the user's may raise anything; the row is what it needs to know
            told = " ".join(f"{type(error).__name__}: {error}".split())
            raise BadRow("format", f"data.format={path} failed: {told}") from error
        if made is None:
            raise NotUsed(LEFT_OUT, f"data.format={path} leaves it out")
        if not isinstance(made, Mapping):
            raise BadRow("format", f"data.format={path} gave {type(made).__name__}, not a mapping or None")
        return dict(made)

    def drop(self, audit: SplitAudit, where: str, bad: BadRow) -> None:
        """Count a row that cannot be used. Raises ValueError for one that the settings do not let pass."""
        overlong = bad.reason in OVERLONG
        strict = self.config.on_bad_row == "error" and not overlong and not isinstance(bad, NotUsed)
        if strict and not self.to_the_end:
            raise ValueError(
                f"{where}: {bad} (reason {bad.reason}; data.on_bad_row=drop leaves such rows out)"
            ) from None
        audit.drop(where, bad.reason, str(bad), bad.column if isinstance(bad, Unread) else "")

    def judge(self, audit: SplitAudit, setting: str, any_left: bool, at_least: int = 0) -> None:
        """Raise ValueError if too much is missing. at_least: as of how many rows fractions are judged at the least."""
        config, rows = self.config, max(audit.rows_in, at_least)
        if audit.rows_in == 0:
            raise ValueError(f"{setting}: has no rows; give a file with at least one")
        first = next((f"{d['source']}: {d['detail']}" for d in audit.dropped_rows), "")
        if not any_left:
            raise ValueError(f"{setting}: 0 usable rows of {audit.rows_in}; the first: {first}")
        counts = ", ".join(f"{n} {reason}" for reason, n in sorted(audit.dropped.items()))
        overlong = sum(audit.dropped.get(reason, 0) for reason in OVERLONG)
        if config.overlong == "error" and overlong > config.max_bad_fraction * rows:
            long = next(d for d in audit.dropped_rows if d["reason"] in OVERLONG)
            raise ValueError(
                f"{setting}: {overlong} of {audit.rows_in} rows are longer than data.max_tokens={config.max_tokens} "
                f"({counts}), more than data.max_bad_fraction={config.max_bad_fraction}; raise data.max_tokens, or set "
                f"data.overlong=drop or truncate_turns. The first: {long['source']}: {long['detail']}"
            )
        bad = sum(n for reason, n in audit.dropped.items() if reason not in (*OVERLONG, *NO_FAULT))
        if bad > config.max_bad_fraction * rows:
            raise ValueError(
                f"{setting}: {bad / audit.rows_in:.1%} of {audit.rows_in} rows are bad ({counts}), more than "
                f"data.max_bad_fraction={config.max_bad_fraction}; mend them or raise it. The first: {first}"
            )

    def _unseen(
        self, sources: Sequence[Source], held: list[list[R]], parts: list[list[R]], audit: SplitAudit
    ) -> list[list[R]]:
        """The held-out rows without the generated ones whose prompt is also learnt from.

        Files are somebody's choice and only counted in prompts_in_both; two seeds of a generator meet by chance.
        """
        seen = {self.key(row) for part in parts for row in part}
        out = []
        for source, part in zip(sources, held, strict=True):
            left = []
            for row in part:
                if source.kind == "gym" and self.key(row) in seen:
                    audit.drop(row.source, IN_TRAIN, "the question also stands in data.train")
                else:
                    left.append(row)
            out.append(left)
        if any(held) and not any(out) and not self.to_the_end:
            raise ValueError(
                f"data.heldout={self.config.heldout}: every question also stands in data.train; give another seed, a "
                "larger size, or settings of the task with more different questions"
            )
        return out

    def _keep_back(self, rows: Sequence[R]) -> set[str]:
        """Sources of the rows that are held out: those of the prompts with the smallest hashes; if there are two
        prompts, each side gets one."""
        keys = {row.source: self.key(row) for row in rows}
        prompts = sorted(set(keys.values()))
        count = min(math.ceil(self.config.heldout_fraction * len(prompts)), len(prompts) - 1)
        held = set(prompts[:count])
        return {source for source, key in keys.items() if key in held}


def prompt_hash(token_ids: Sequence[int]) -> bytes:
    """What tells prompts apart, and which of them are held out: sha256 over their tokens."""
    return hashlib.sha256(np.array(token_ids, dtype=np.int64).tobytes()).digest()


def repeats(config: DataConfig, num_sources: int) -> list[float]:
    """data.repeat for each source of data.train."""
    if config.repeat is None:
        return [1.0] * num_sources
    if len(config.repeat) != num_sources:
        raise ValueError(
            f"data.repeat={config.repeat}: give one number for each of the {num_sources} sources of data.train"
        )
    return [float(times) for times in config.repeat]


def repeated(rows: Sequence[T], times: float, seed: int) -> list[T]:
    """The rows `times` over; of a fraction a fixed random part, in the order of the file."""
    whole = int(times)
    count = round((times - whole) * len(rows))
    part = sorted(np.random.default_rng([seed, len(rows)]).permutation(len(rows))[:count].tolist())
    return [*(list(rows) * whole), *(rows[i] for i in part)]


def num_repeated(prompts: Iterable[Sequence[int]]) -> int:
    """How many prompts have come before, token for token; those without tokens are not counted."""
    listed = [tuple(prompt) for prompt in prompts if len(prompt)]
    return len(listed) - len(set(listed))
