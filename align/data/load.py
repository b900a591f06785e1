"""data.train and data.heldout to the two lists of examples and the account of them."""

from __future__ import annotations

import hashlib
import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from align.config import DataConfig
from align.data.audit import NOT_USED, OVERLONG, Audit, SplitAudit
from align.data.examples import Loaded, NotUsed, Wanted, assign_mismatched, loaded, prompt_key
from align.data.formats import parse
from align.data.sources import BadRow, Source, content_hash, locate_all, read
from align.types import Example, Row


@dataclass(frozen=True)
class Data:
    """Everything a run reads."""

    train: list[Example]
    heldout: list[Example]
    audit: Audit
    train_rows: list[Loaded]
    heldout_rows: list[Loaded]


def load(
    config: DataConfig,
    tokenizer: Any,
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
    reader = _Reader(config, tokenizer, wanted, keep, to_the_end)
    sources = locate_all(config.train, "data.train")
    repeat = _repeat(config.repeat, sources)
    heldout_sources = None if config.heldout is None else locate_all(config.heldout, "data.heldout")
    parts = reader.split(sources, audit.train, f"data.train={config.train}")
    if heldout_sources is not None:
        held = reader.split(heldout_sources, audit.heldout, f"data.heldout={config.heldout}")
        heldout_rows = [row for part in held for row in part]
    else:
        kept = _keep_back([row for part in parts for row in part], config.heldout_fraction)
        heldout_rows = [row for part in parts for row in part if row.source in kept]
        parts = [[row for row in part if row.source not in kept] for part in parts]
        audit.heldout.rows_in = len(heldout_rows)
        audit.train.rows_in -= len(heldout_rows)
        audit.heldout.sources, audit.heldout.sha256 = audit.train.sources, audit.train.sha256
    train_rows = [row for part in parts for row in part]
    train = [e for part, times in zip(parts, repeat, strict=True) for e in _repeated(part, times, seed)]
    heldout = [e for row in heldout_rows for e in row.examples]
    if not train and not to_the_end:
        raise ValueError(f"data.train={config.train}: no rows are left; give more data, or other data.repeat")
    _account(audit.train, train_rows, train)
    _account(audit.heldout, heldout_rows, heldout)
    seen = {e.prompt.token_ids for e in train}
    audit.prompts_in_both = len({e.prompt.token_ids for e in heldout if e.prompt.token_ids} & seen)
    if wanted.mismatched and not to_the_end:
        train = assign_mismatched(train, seed, config.max_tokens)
        # a held-out set of one prompt takes its partners from the training data
        others = train if len({prompt_key(e) for e in heldout}) < 2 else []
        heldout = assign_mismatched([*heldout, *others], seed, config.max_tokens)[: len(heldout)] if heldout else []
    return Data(train, heldout, audit, train_rows, heldout_rows)


def fingerprint(examples: Sequence[Example]) -> str:
    """sha256 over token ids, targets and what else is learnt from, in order: what "the same data" means when a run
    is resumed."""
    digest = hashlib.sha256()
    for e in examples:
        for row in (*e.rows, *([e.mismatched] if e.mismatched is not None else [])):
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


@dataclass(frozen=True)
class _Reader:
    config: DataConfig
    tokenizer: Any
    wanted: Wanted
    keep: bool
    to_the_end: bool

    def split(self, sources: Sequence[Source], audit: SplitAudit, setting: str) -> list[list[Loaded]]:
        """The kept rows of each source."""
        parts = []
        for source in sources:
            audit.sources.append(source.name)
            audit.sha256.append(content_hash(source))
            part = []
            for where, record in read(source):
                audit.rows_in += 1
                try:
                    if isinstance(record, BadRow):
                        raise record
                    understood = parse(record, self.config.open_tool_calls)
                    part.append(loaded(understood, where, self.tokenizer, self.config, self.wanted, self.keep))
                except BadRow as bad:
                    self._drop(audit, where, bad)
            parts.append(part)
        if not self.to_the_end:
            self._judge(audit, setting, any(parts))
        return parts

    def _drop(self, audit: SplitAudit, where: str, bad: BadRow) -> None:
        overlong = bad.reason in OVERLONG
        strict = self.config.on_bad_row == "error" and not overlong and not isinstance(bad, NotUsed)
        if strict and not self.to_the_end:
            raise ValueError(
                f"{where}: {bad} (reason {bad.reason}; data.on_bad_row=drop leaves such rows out)"
            ) from None
        audit.drop(where, bad.reason, str(bad))

    def _judge(self, audit: SplitAudit, setting: str, any_left: bool) -> None:
        """Raise if too much is missing."""
        config = self.config
        if audit.rows_in == 0:
            raise ValueError(f"{setting}: has no rows; give a file with at least one")
        first = next((f"{d['source']}: {d['detail']}" for d in audit.dropped_rows), "")
        if not any_left:
            raise ValueError(f"{setting}: 0 usable rows of {audit.rows_in}; the first: {first}")
        counts = ", ".join(f"{n} {reason}" for reason, n in sorted(audit.dropped.items()))
        overlong = sum(audit.dropped.get(reason, 0) for reason in OVERLONG)
        if config.overlong == "error" and overlong > config.max_bad_fraction * audit.rows_in:
            long = next(d for d in audit.dropped_rows if d["reason"] in OVERLONG)
            raise ValueError(
                f"{setting}: {overlong} of {audit.rows_in} rows are longer than data.max_tokens={config.max_tokens} "
                f"({counts}), more than data.max_bad_fraction={config.max_bad_fraction}; raise data.max_tokens, or set "
                f"data.overlong=drop or truncate_turns. The first: {long['source']}: {long['detail']}"
            )
        bad = sum(n for reason, n in audit.dropped.items() if reason not in (*OVERLONG, NOT_USED))
        if bad > config.max_bad_fraction * audit.rows_in:
            raise ValueError(
                f"{setting}: {bad / audit.rows_in:.1%} of {audit.rows_in} rows are bad ({counts}), more than "
                f"data.max_bad_fraction={config.max_bad_fraction}; mend them or raise it. The first: {first}"
            )


def _account(audit: SplitAudit, rows: list[Loaded], examples: list[Example]) -> None:
    audit.rows_kept = len(rows)
    audit.truncated_rows = [row.source for row in rows if row.truncated]
    audit.examples = len(examples)
    audit.origins = dict(sorted(Counter(e.origin for e in examples if e.origin).items()))
    sequences = [row for e in examples for row in e.rows]
    audit.tokens = sum(len(row.token_ids) for row in sequences)
    audit.target_tokens = sum(int(row.targets.sum()) for row in sequences)


def _repeat(repeat: Any, sources: Sequence[Source]) -> list[float]:
    if repeat is None:
        return [1.0] * len(sources)
    if len(repeat) != len(sources):
        raise ValueError(f"data.repeat={repeat}: give one number for each of the {len(sources)} sources of data.train")
    return [float(times) for times in repeat]


def _repeated(rows: Sequence[Loaded], times: float, seed: int) -> list[Example]:
    """The examples of the rows `times` over; of a fraction a fixed random part, in the order of the file."""
    whole = int(times)
    count = round((times - whole) * len(rows))
    part = sorted(np.random.default_rng([seed, len(rows)]).permutation(len(rows))[:count].tolist())
    return [e for row in [*(list(rows) * whole), *(rows[i] for i in part)] for e in row.examples]


def _keep_back(rows: Sequence[Loaded], fraction: float) -> set[str]:
    """Sources of the rows that are held out: those of the prompts with the smallest hashes; if there are two prompts,
    each side gets one. A row without a prompt stands for itself."""
    keys = {row.source: _prompt_key(row) for row in rows}
    prompts = sorted(set(keys.values()))
    count = min(math.ceil(fraction * len(prompts)), len(prompts) - 1)
    held = set(prompts[:count])
    return {source for source, key in keys.items() if key in held}


def _prompt_key(row: Loaded) -> bytes:
    first = row.examples[0]
    ids = first.prompt.token_ids or first.rows[0].token_ids
    return hashlib.sha256(np.array(ids, dtype=np.int64).tobytes()).digest()
