"""data.train and data.heldout to the two lists of examples and the account of them."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property, partial
from typing import Any

import numpy as np

from align.config import DataConfig
from align.data.audit import Audit, SplitAudit
from align.data.examples import Loaded, assign_mismatched, prompt_key, understood
from align.data.splits import Reader, num_repeated, repeated, repeats
from align.data.stored import Stored
from align.data.template import date_of, fix_date
from align.data.wanted import Wanted
from align.data.workers import num_workers
from align.jsons import Json, Tokenizer
from align.types import Example, Row


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
) -> Data:
    """Read, check and tokenise both splits as an objective wants them.

    keep: rows keep their renderings. to_the_end: bad rows are counted whatever the settings say of them.
    Raises ValueError, naming file and line, for the first bad row with on_bad_row=error, for more than
    max_bad_fraction of them with drop, and for a split of which nothing is left.
    """
    audit = Audit()

    make = partial(understanding, tokenizer, date_of(tokenizer), config, wanted, keep)
    parts, heldout_rows = Reader(config, make, _prompt, to_the_end, num_workers(config.workers)).splits(audit)
    for split, rows in ((audit.train, [row for part in parts for row in part]), (audit.heldout, heldout_rows)):
        _tell(split, rows)
        if not to_the_end:
            refuse_doubts(split, config.max_bad_fraction)
    repeat = repeats(config, len(parts))
    train_rows = [row for part in parts for row in part]
    by_source = [
        [e for row in repeated(part, times, seed) for e in row.examples]
        for part, times in zip(parts, repeat, strict=True)
    ]
    train = [e for part in by_source for e in part]
    heldout = [e for row in heldout_rows for e in row.examples]
    if not train and not to_the_end:
        raise ValueError(f"data.train={config.train}: no rows are left; give more data, or other data.repeat")
    _account(audit.train, train_rows, train)
    _account(audit.heldout, heldout_rows, heldout)
    learnt = {e.prompt.token_ids for e in train}
    audit.prompts_in_both = len({e.prompt.token_ids for e in heldout if e.prompt.token_ids} & learnt)
    if wanted.mismatched and not to_the_end:
        train = assign_mismatched(train, seed, config.max_tokens)
        # a held-out set of one prompt takes its partners from the training data
        others = train if len({prompt_key(e) for e in heldout}) < 2 else []
        heldout = assign_mismatched([*heldout, *others], seed, config.max_tokens)[: len(heldout)] if heldout else []
    chats = {row.chat for row in train_rows}
    if not keep:
        train_rows, heldout_rows = [], []
    return Data(train, heldout, audit, train_rows, heldout_rows, tuple(map(len, by_source)), chats)


def understanding(
    tokenizer: Tokenizer, day: str | None, config: DataConfig, wanted: Wanted, keep: bool
) -> Callable[[Json, str], Loaded]:
    """The function that makes of a row and its "file:line" what is kept of it. day: of templates that ask for it."""
    fix_date(tokenizer, day)  # of another process's copy

    def understand(record: Json, where: str) -> Loaded:
        return understood(record, where, tokenizer, config, wanted, keep)

    return understand


def fingerprint(examples: Sequence[Example]) -> str:
    """sha256 over token ids, targets and what else is learnt from, in order: what "the same data" means when a run
    is resumed."""
    if isinstance(examples, Stored):
        return examples.fingerprint
    digest = hashlib.sha256()
    for e in examples:
        for row in (*e.rows, *e.extras.values()):
            _digest(digest, row)
        if e.label is not None or e.numbers:
            digest.update(repr((e.label, sorted(e.numbers.items()))).encode())
    return digest.hexdigest()


def _digest(digest: Any, row: Row) -> None:
    digest.update(np.ascontiguousarray(row.token_ids).tobytes())
    digest.update(np.packbits(row.targets).tobytes())
    if row.weights is not None:
        digest.update(np.ascontiguousarray(row.weights).tobytes())
    digest.update(len(row.token_ids).to_bytes(4, "little"))


def _account(audit: SplitAudit, rows: list[Loaded], examples: list[Example]) -> None:
    audit.truncated_rows = [row.source for row in rows if row.truncated]
    audit.repeated_prompts = num_repeated(row.examples[0].prompt.token_ids for row in rows)
    audit.examples = len(examples)
    audit.origins = dict(sorted(Counter(e.origin for e in examples if e.origin).items()))
    sequences = [row for e in examples for row in e.rows]
    audit.tokens = sum(len(row.token_ids) for row in sequences)
    audit.target_tokens = sum(int(row.targets.sum()) for row in sequences)


def _tell(audit: SplitAudit, rows: Sequence[Loaded]) -> None:
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


def _prompt(row: Loaded) -> Sequence[int]:
    """A row without a prompt stands for itself."""
    first = row.examples[0]
    return first.prompt.token_ids or first.rows[0].token_ids.tolist()
