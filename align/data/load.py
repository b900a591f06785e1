"""data.train and data.heldout to the two lists of examples and the account of them."""

from __future__ import annotations

import sys
import time
from array import array
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property, partial

import numpy as np

from align.config import DataConfig
from align.data.audit import Audit, SplitAudit
from align.data.examples import Loaded, assign_mismatched, understood
from align.data.splits import Reader, prompt_hash, repeated, repeats
from align.data.spool import Spool
from align.data.stored import Fingerprint, Stored, View
from align.data.template import date_of, fix_date
from align.data.wanted import Wanted
from align.data.workers import num_workers
from align.jsons import Json, Tokenizer
from align.types import Example

Say = Callable[[str], object]
_PATIENCE_S = 5.0  # until people are told how far it is
_EVERY_S = 10.0  # from then on


def _silent(_line: str) -> None:
    pass


@dataclass(frozen=True)
class Data:
    """Everything a run reads."""

    train: Sequence[Example]
    heldout: Sequence[Example]
    audit: Audit
    train_rows: list[Loaded]  # none unless they were to keep their renderings
    heldout_rows: list[Loaded]
    sizes: tuple[int, ...] = ()  # how many of train are of each source of data.train, in their order
    # whether prompts of train are conversations, of those there are; of a stream of those that were read
    chats: set[bool] = field(default_factory=set)

    @cached_property
    def hashes(self) -> dict[str, str]:
        """Fingerprints by setting."""
        return {"data.train": fingerprint(self.train), "data.heldout": fingerprint(self.heldout)}


def load(
    config: DataConfig,
    tokenizer: Tokenizer,
    wanted: Wanted = Wanted(),  # noqa: B008  frozen
    seed: int = 0,
    keep: bool = False,
    to_the_end: bool = False,
    say: Say = _silent,
) -> Data:
    """Read, check and tokenise both splits as an objective wants them.

    keep: rows keep their renderings. to_the_end: bad rows are counted whatever the settings say of them. say: is told
    how far it is when it takes long. Many examples lie in a temporary file and are made when they are asked for.
    Raises ValueError, naming file and line, for the first bad row with on_bad_row=error, for more than
    max_bad_fraction of them with drop, and for a split of which nothing is left.
    """
    audit = Audit()
    coming = _Coming(Spool(all_in_memory=keep), say)
    make = partial(_keeping, tokenizer, date_of(tokenizer), config, wanted, keep)
    reader = Reader(config, make, _key, to_the_end, num_workers(config.workers), coming.keep)
    parts, heldout_rows = reader.splits(audit)
    train_rows = [row for part in parts for row in part]
    for split, rows in ((audit.train, train_rows), (audit.heldout, heldout_rows)):
        _tell(split, rows)
        if not to_the_end:
            refuse_doubts(split, config.max_bad_fraction)
    times = repeats(config, len(parts))
    by_source = [repeated(part, often, seed) for part, often in zip(parts, times, strict=True)]
    learnt = [row for part in by_source for row in part]
    train, heldout = coming.examples(learnt), coming.examples(heldout_rows)
    if not train and not to_the_end:
        raise ValueError(f"data.train={config.train}: no rows are left; give more data, or other data.repeat")
    _account(audit.train, train_rows, learnt)
    _account(audit.heldout, heldout_rows, heldout_rows)
    audit.prompts_in_both = len({p for row in heldout_rows for p in row.prompts if p} & _prompts(learnt))
    if wanted.mismatched and not to_the_end:
        train = assign_mismatched(train, seed, config.max_tokens)
        # a held-out set of one prompt takes its partners from the training data
        others = () if len(_prompts(heldout_rows)) > 1 else train
        both = assign_mismatched(View.of((heldout, None), (others, None)), seed, config.max_tokens) if heldout else []
        heldout = both if not others else View.of((both, range(len(heldout))))
    chats = {row.chat for row in train_rows}
    loaded = [[row.loaded for row in rows if row.loaded is not None] for rows in (train_rows, heldout_rows)]
    sizes = tuple(sum(len(row.numbers) for row in part) for part in by_source)
    return Data(train, heldout, audit, loaded[0], loaded[1], sizes, chats)


def understanding(
    tokenizer: Tokenizer, day: str | None, config: DataConfig, wanted: Wanted, keep: bool
) -> Callable[[Json, str], Loaded]:
    """The function that makes of a row and its "file:line" what is kept of it. day: of templates that ask for it."""
    fix_date(tokenizer, day)  # of another process's copy

    def understand(record: Json, where: str) -> Loaded:
        return understood(record, where, tokenizer, config, wanted, keep)

    return understand


@dataclass(frozen=True, slots=True)
class Kept:
    """What is known of a row that is used while its examples lie elsewhere."""

    source: str  # "file:line"
    key: bytes  # hash of its prompt, or of what stands for it
    prompts: tuple[bytes, ...]  # hashes of its examples' prompts, b"" for none
    tokens: int  # of all sequences
    target_tokens: int
    origins: tuple[str, ...]  # of its examples
    truncated: bool
    unread: tuple[str, ...]
    shape: str
    from_text: bool
    doubt: str
    chat: bool
    loaded: Loaded | None  # with its renderings, where they were asked for
    examples: tuple[Example, ...] = ()  # until they are put away
    numbers: tuple[int, ...] = ()  # where they are then


def _keeping(
    tokenizer: Tokenizer, day: str | None, config: DataConfig, wanted: Wanted, keep: bool
) -> Callable[[Json, str], Kept]:
    understand = understanding(tokenizer, day, config, wanted, keep)
    return lambda record, where: _kept(understand(record, where), keep)


def _kept(row: Loaded, keep: bool) -> Kept:
    first = row.examples[0]
    sequences = [sequence for example in row.examples for sequence in example.rows]
    prompts = [example.prompt.token_ids for example in row.examples]
    hashes = {ids: prompt_hash(ids) if ids else b"" for ids in dict.fromkeys(prompts)}
    return Kept(
        row.source,
        hashes[prompts[0]] or prompt_hash(first.rows[0].token_ids.tolist()),
        tuple(hashes[ids] for ids in prompts),
        sum(len(sequence.token_ids) for sequence in sequences),
        sum(int(np.count_nonzero(sequence.targets)) for sequence in sequences),
        tuple(example.origin for example in row.examples),
        bool(row.truncated),
        row.unread,
        row.shape,
        row.from_text,
        row.doubt,
        row.chat,
        row if keep else None,
        row.examples,
    )


def _key(row: Kept) -> bytes:
    return row.key


class _Coming:
    """Puts examples away as their rows come, and tells how many have."""

    def __init__(self, spool: Spool, say: Say):
        self._spool = spool
        self._say = say
        self._count = 0
        self._start = time.monotonic()
        self._next = self._start + _PATIENCE_S

    def keep(self, row: Kept) -> Kept:
        """The row without its examples."""
        self._count += 1
        if (now := time.monotonic()) > self._next:
            self._next = now + _EVERY_S
            self._say(f"data: {self._count} rows read, {self._count / (now - self._start):.0f} a second")
        numbers = tuple(self._spool.add(example) for example in row.examples)
        return replace(row, examples=(), numbers=numbers, shape=sys.intern(row.shape))

    def examples(self, rows: Sequence[Kept]) -> Sequence[Example]:
        """Of these rows, in their order."""
        return self._spool.examples(array("q", [number for row in rows for number in row.numbers]))


def fingerprint(examples: Sequence[Example]) -> str:
    """See Fingerprint."""
    if isinstance(examples, Stored):
        return examples.fingerprint
    found = Fingerprint()
    for example in examples:
        found.add(example)
    return found.hexdigest()


def _account(audit: SplitAudit, rows: Sequence[Kept], used: Sequence[Kept]) -> None:
    """used: as often as an epoch sees them."""
    audit.truncated_rows = [row.source for row in rows if row.truncated]
    prompts = [row.prompts[0] for row in rows if row.prompts[0]]
    audit.repeated_prompts = len(prompts) - len(set(prompts))
    audit.examples = sum(len(row.numbers) for row in used)
    audit.origins = dict(sorted(Counter(origin for row in used for origin in row.origins if origin).items()))
    audit.tokens = sum(row.tokens for row in used)
    audit.target_tokens = sum(row.target_tokens for row in used)


def _tell(audit: SplitAudit, rows: Sequence[Kept]) -> None:
    audit.rows_kept = len(rows)
    audit.unread = dict(Counter(name for row in rows for name in row.unread))
    audit.shapes = dict(Counter(row.shape for row in rows))
    audit.from_texts = sum(row.from_text for row in rows)
    audit.doubts = sum(bool(row.doubt) for row in rows)
    audit.first_doubt = next((f"{row.source}: {row.doubt}" for row in rows if row.doubt), "")


def refuse_doubts(audit: SplitAudit, fraction: float, at_least: int = 0) -> None:
    """Raises ValueError if more rows than data.max_bad_fraction may hold what the assistant did not say: a few may
    well be answers that were asked for. at_least: as of how many rows the fraction is judged at the least."""
    if audit.doubts > fraction * max(audit.rows_kept, at_least):
        raise ValueError(
            f"{audit.first_doubt}. {audit.doubts} of {audit.rows_kept} rows do, more than "
            f"data.max_bad_fraction={fraction}; mend them, or raise it where they are meant"
        )


def _prompts(rows: Sequence[Kept]) -> set[bytes]:
    """Hashes of the prompts of their examples; one without stands for itself."""
    return {prompt or row.source.encode() for row in rows for prompt in row.prompts}
