"""data.train and data.heldout to the two lists of examples and the account of them."""

from __future__ import annotations

import hashlib
import math
from collections import Counter
from dataclasses import dataclass
from typing import Any

import numpy as np

from align.config import DataConfig
from align.data.audit import Audit, SplitAudit
from align.data.pairs import Example, example
from align.data.sources import BadRow, Source, content_hash, locate_all, read


@dataclass(frozen=True)
class Data:
    """Everything a run reads."""

    train: list[Example]
    heldout: list[Example]
    audit: Audit


def load(config: DataConfig, tokenizer: Any) -> Data:
    """Read, check and tokenise both splits.

    Raises ValueError, naming file and line, for the first bad row with on_bad_row=error, for more than
    max_bad_fraction of them with drop, and for a split of which nothing is left.
    """
    audit = Audit()
    sources = locate_all(config.train, "data.train")
    heldout_sources = None if config.heldout is None else locate_all(config.heldout, "data.heldout")
    train = _split(sources, audit.train, config, tokenizer, f"data.train={config.train}")
    if heldout_sources is not None:
        heldout = _split(heldout_sources, audit.heldout, config, tokenizer, f"data.heldout={config.heldout}")
    else:
        train, heldout = _keep_back(train, config.heldout_fraction)
        audit.heldout.rows_in = len(heldout)
        audit.train.rows_in -= len(heldout)
        audit.heldout.sources, audit.heldout.sha256 = audit.train.sources, audit.train.sha256
    for split, examples in ((audit.train, train), (audit.heldout, heldout)):
        split.rows_kept = len(examples)
        split.origins = dict(sorted(Counter(e.pair.origin for e in examples if e.pair.origin).items()))
        rows = [row for e in examples for row in (e.pair.chosen, e.pair.rejected)]
        split.tokens = sum(len(row.token_ids) for row in rows)
        split.target_tokens = sum(int(row.targets.sum()) for row in rows)
    seen = {e.prompt.token_ids for e in train}
    audit.prompts_in_both = len({e.prompt.token_ids for e in heldout} & seen)
    return Data(train, heldout, audit)


def fingerprint(examples: list[Example]) -> str:
    """sha256 over all token ids and targets in order: what "the same data" means when a run is resumed."""
    digest = hashlib.sha256()
    for e in examples:
        for row in (e.pair.chosen, e.pair.rejected):
            digest.update(np.ascontiguousarray(row.token_ids).tobytes())
            digest.update(np.packbits(row.targets).tobytes())
            digest.update(len(row.token_ids).to_bytes(4, "little"))
    return digest.hexdigest()


def _split(sources: list[Source], audit: SplitAudit, config: DataConfig, tokenizer: Any, setting: str) -> list[Example]:
    examples = []
    first_bad = ""
    for source in sources:
        audit.sources.append(source.name)
        audit.sha256.append(content_hash(source))
        for where, record in read(source):
            audit.rows_in += 1
            try:
                if isinstance(record, BadRow):
                    raise record
                examples.append(example(record, where, tokenizer, config.max_tokens))
            except BadRow as bad:
                if config.on_bad_row == "error":
                    raise ValueError(
                        f"{where}: {bad} (reason {bad.reason}; data.on_bad_row=drop leaves such rows out)"
                    ) from None
                audit.drop(where, bad.reason)
                first_bad = first_bad or f"{where}: {bad}"
    if audit.rows_in == 0:
        raise ValueError(f"{setting}: has no rows; give a file with at least one preference pair")
    bad_fraction = sum(audit.dropped.values()) / audit.rows_in
    if not examples:
        raise ValueError(f"{setting}: 0 usable rows of {audit.rows_in}; the first: {first_bad}")
    if bad_fraction > config.max_bad_fraction:
        counts = ", ".join(f"{n} {reason}" for reason, n in sorted(audit.dropped.items()))
        raise ValueError(
            f"{setting}: {bad_fraction:.1%} of {audit.rows_in} rows are bad ({counts}), more than "
            f"data.max_bad_fraction={config.max_bad_fraction}; mend them or raise it. The first: {first_bad}"
        )
    return examples


def _keep_back(examples: list[Example], fraction: float) -> tuple[list[Example], list[Example]]:
    """Split by prompt: the prompts with the smallest hashes are held out; if there are two, each side gets one."""
    prompts = {e.prompt.token_ids for e in examples}

    def order(ids: tuple[int, ...]) -> bytes:
        return hashlib.sha256(np.array(ids, dtype=np.int64).tobytes()).digest()

    count = min(math.ceil(fraction * len(prompts)), len(prompts) - 1)
    held = set(sorted(prompts, key=order)[:count])
    return (
        [e for e in examples if e.prompt.token_ids not in held],
        [e for e in examples if e.prompt.token_ids in held],
    )
