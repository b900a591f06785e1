"""Rows that an objective wants beside chosen and rejected: functions (record, both, tokenizer, config) -> Row.

An objective names them in `columns`, these by their name alone, your own by a dotted path.
"""

from __future__ import annotations

import hashlib
from typing import Any

import numpy as np

from align.config import DataConfig
from align.data.chat import render
from align.data.formats import Dialogue, Record
from align.data.sources import BadRow
from align.jsons import Tokenizer
from align.types import Row


def chosen_whole(record: Record, both: tuple[Row, Row], tokenizer: Tokenizer, config: DataConfig) -> Row:  # noqa: ARG001
    """The chosen sequence with every token after the first as a target: ORPO's NLL over prompt and answer."""
    return Row(both[0].token_ids, np.arange(len(both[0].token_ids)) > 0)


def rationale(record: Record, both: tuple[Row, Row], tokenizer: Tokenizer, config: DataConfig) -> Row:  # noqa: ARG001
    """Why chosen is better, as an answer to a prompt that shows both (Just et al. 2024, arXiv 2407.14477).

    The authors always show chosen first, which gives the answer away; here the order is a hash of the row.
    Raises BadRow without a rationale, without plain answers, or if it is too long.
    """
    if not record.rationale or not record.rationale.strip():
        raise BadRow("missing_field", "the field 'rationale' is missing; this objective learns why chosen is better")
    sides = [record.sides[name] for name in ("chosen", "rejected")]
    if not all(isinstance(side, Dialogue) for side in sides):
        raise BadRow("wrong_type", "a rationale needs texts or messages, not token_ids")
    answers = [_text(side.completion) for side in sides]  # type: ignore[union-attr]
    swap = hashlib.blake2b("\0".join([sides[0].question, *answers]).encode(), digest_size=1).digest()[0] % 2 == 1
    shown = answers[::-1] if swap else answers
    better = "B" if swap else "A"
    question = (
        f"A question was answered twice.\n\nQuestion: {sides[0].question}\n\nAnswer A: {shown[0]}\n\n"
        f"Answer B: {shown[1]}\n\nWhy is answer {better} better?"
    )
    messages = [{"role": "user", "content": question}, {"role": "assistant", "content": record.rationale}]
    row = render(tokenizer, messages, first_target=1).row
    if len(row.token_ids) > config.max_tokens:
        raise BadRow(
            "too_long", f"the rationale with both answers has {len(row.token_ids)} tokens; raise data.max_tokens"
        )
    return row


def _text(completion: Any) -> str:
    return completion if isinstance(completion, str) else "\n".join(m.get("content") or "" for m in completion)
