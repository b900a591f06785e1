"""data.train and data.heldout as prompts to answer: what online training and generation read.

What a row may look like is formats.py's, which rows are kept is splits.py's.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass, field

from align.config import DataConfig
from align.data.audit import Audit, SplitAudit
from align.data.chat import prompt_ids
from align.data.cures import with_cure
from align.data.examples import as_chat
from align.data.formats import Dialogue, Message, Tokenised, parse
from align.data.shapes import shaped
from align.data.sources import BadRow
from align.data.splits import Reader, num_repeated, prompt_hash, repeated, repeats
from align.data.unread import refuse_unasked
from align.jsons import Fields, Json, Tokenizer

_ANSWER = "."  # stands for the answer that is to be written, so that the checks of answered rows serve
_PAIR = {"chosen", "rejected", "prompt_chosen", "prompt_rejected"}
_PROMPT_COLUMNS = ("prompt", "messages", "conversations", "conversation")


@dataclass(frozen=True)
class PromptRow:
    """One prompt, and what rewards may ask of its row."""

    source: str  # "file:line"
    token_ids: tuple[int, ...]  # generation starts from these
    text: str  # the plain prompt, or the last user message
    messages: tuple[Message, ...] | None = None  # None for plain text, and for rows that came as tokens
    fields: Fields = field(default_factory=dict)  # the row's other columns, such as answer and tools
    from_text: bool = False  # a message that was a text in its row


@dataclass(frozen=True)
class Prompts:
    """Both splits and the account of them."""

    train: list[PromptRow]
    heldout: list[PromptRow]
    audit: Audit


def load_prompts(config: DataConfig, tokenizer: Tokenizer, max_new_tokens: int, seed: int = 0) -> Prompts:
    """The prompts of both splits, repeated ones included and counted.

    A row is {"prompt": text}, which data.text makes a user's message or leaves as it stands, {"prompt": [messages]},
    {"messages": [messages]}, whose last assistant message is left out, or any row that formats.parse understands, of
    which the prompt is taken.
    A prompt is too long when it and max_new_tokens are more than data.max_tokens; data.overlong=truncate_turns leaves
    it out as drop does: a shorter one would ask something else. seed: of the part that a fraction in data.repeat takes.
    Raises ValueError as Reader.splits does.
    """
    audit = Audit(prompts_only=True)

    def understand(record: Json, where: str) -> PromptRow:
        return _row(record, where, tokenizer, config, max_new_tokens)

    parts, heldout = Reader(config, lambda: understand, lambda row: prompt_hash(row.token_ids)).splits(audit)
    times = repeats(config, len(parts))
    train = [row for part, often in zip(parts, times, strict=True) for row in repeated(part, often, seed)]
    if not train:
        raise ValueError(f"data.train={config.train}: no prompts are left; give more data, or other data.repeat")
    _account(audit.train, [row for part in parts for row in part], train)
    _account(audit.heldout, heldout, heldout)
    audit.prompts_in_both = len({row.token_ids for row in heldout} & {row.token_ids for row in train})
    return Prompts(train, heldout, audit)


def prompts_fingerprint(rows: Sequence[PromptRow]) -> str:
    """sha256 over token ids and fields, in order: what "the same prompts" means when a run is resumed."""
    digest = hashlib.sha256()
    for row in rows:
        # what has no JSON form, such as a date of a parquet file, is told by its words
        digest.update(json.dumps([row.token_ids, row.fields], sort_keys=True, default=str).encode() + b"\n")
    return digest.hexdigest()


def _row(record: Json, where: str, tokenizer: Tokenizer, config: DataConfig, max_new_tokens: int) -> PromptRow:
    try:
        refuse_unasked(record, config.ignore)
        given = _answered(record)
        side = as_chat(given, tokenizer, config.text)
    except BadRow as bad:
        raise with_cure(bad, record) from None
    max_tokens = config.max_tokens
    own = _PROMPT_COLUMNS if isinstance(side, Dialogue) else (*_PROMPT_COLUMNS, "token_ids", "spans")
    fields = {key: value for key, value in record.items() if key not in own}
    if isinstance(side, Tokenised):
        ids = side.token_ids[: next(start for _, start, _, target in side.spans if target)]
        if max(ids) >= len(tokenizer):
            raise BadRow(
                "other_vocabulary", f"token {max(ids)} is not in the vocabulary; the row was made for another model"
            )
        messages = None
    else:
        if not side.prompt or (isinstance(side.prompt, str) and not side.prompt.strip()):
            raise BadRow("empty_prompt", "the prompt is empty; write one or remove the row")
        ids = _prompt_ids(side, tokenizer, max_tokens, max_new_tokens)
        messages = None if isinstance(side.prompt, str) else side.prompt
    if len(ids) + max_new_tokens > max_tokens:
        raise BadRow(
            "prompt_too_long",
            f"the prompt has {len(ids)} tokens, with max_new_tokens={max_new_tokens} it needs data.max_tokens="
            f"{len(ids) + max_new_tokens} or more, which is {max_tokens}; raise it or shorten the prompt",
        )
    return PromptRow(where, ids, side.question, messages, fields, side is not given)


def _prompt_ids(side: Dialogue, tokenizer: Tokenizer, max_tokens: int, max_new_tokens: int) -> tuple[int, ...]:
    """Raises BadRow before a text is tokenised that is too long however it is cut."""
    try:
        return tuple(prompt_ids(tokenizer, side.prompt, tools=side.tools, limit=max_tokens - max_new_tokens))
    except BadRow as bad:
        if bad.reason != "too_long":
            raise
        raise BadRow(
            "prompt_too_long",
            f"the prompt of {len(side.question)} characters has more tokens than data.max_tokens={max_tokens} less "
            f"max_new_tokens={max_new_tokens}; shorten it",
        ) from None


def _answered(record: Json) -> Dialogue | Tokenised:
    """The row as if its prompt had an answer; the fields are looked for in formats.parse's order. Raises BadRow."""
    row = shaped(record)
    if _PAIR & row.keys() or {"token_ids", "spans"} <= row.keys():
        sides = parse(record, open_tool_calls=True).sides
        return sides["row"] if "row" in sides else sides["chosen"]
    name = next((name for name in ("messages", "prompt") if name in row), None)
    if name is None:
        raise BadRow(
            "missing_field",
            "the field 'prompt' is missing; a row needs prompt (a text, or a list of messages) or messages",
        )
    prompt = row[name]
    if name != "prompt":
        if not isinstance(prompt, list):
            raise BadRow("wrong_type", f"{name} must be a list of messages, found {type(prompt).__name__}")
        last = prompt[-1] if prompt and isinstance(prompt[-1], dict) else {}
        if last.get("role") == "assistant":
            prompt = prompt[:-1]
    if isinstance(prompt, list) and prompt and all(isinstance(m, dict) and m.get("role") == "system" for m in prompt):
        raise BadRow("empty_prompt", f"{name} has no user message; an answer needs a question")
    asked = {"prompt": prompt, "completion": _ANSWER, "tools": row.get("tools"), "system": row.get("system")}
    return parse(asked).sides["row"]


def _account(audit: SplitAudit, rows: Sequence[PromptRow], used: Sequence[PromptRow]) -> None:
    """used: as often as an epoch sees them."""
    audit.rows_kept = len(rows)
    audit.repeated_prompts = num_repeated(row.token_ids for row in rows)
    audit.examples = len(used)
    audit.tokens = sum(len(row.token_ids) for row in used)
    audit.from_texts = sum(row.from_text for row in rows)
