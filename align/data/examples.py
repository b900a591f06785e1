"""A Record to what an objective reads of it: renderings, length, and the rows of its examples.

An objective wants pairs, labelled sequences or sequences to imitate; a pair can serve as all three.
"""

from __future__ import annotations

import hashlib
import importlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import combinations, pairwise
from typing import Any

import numpy as np

from align.config import DataConfig
from align.data.audit import NOT_USED
from align.data.chat import Rendering, Span, control_token, prompt_ids, render, render_text
from align.data.cures import with_cure
from align.data.formats import Dialogue, Message, Record, Tokenised, parse
from align.data.margins import margin_numbers
from align.data.sources import BadRow, NotUsed
from align.data.stored import View
from align.data.suspects import check, refuse_open
from align.data.tokens import Texts
from align.data.unread import unread
from align.data.wanted import Wanted
from align.jsons import Json, Tokenizer
from align.packing import common_prefix_length
from align.types import Example, Kind, Prompt, Row


@dataclass(frozen=True)
class Loaded:
    """One row of a file that was kept."""

    source: str  # "file:line"
    kind: Kind
    renderings: dict[str, Rendering]  # by the names of Record.sides; empty unless they were asked for
    # what generation would start from, tokenised alone, for each rendering; None for rows that came as tokens, and
    # unless renderings were asked for
    prompts: dict[str, tuple[int, ...] | None]
    finished: dict[str, bool]  # whether each completion was said to be whole
    truncated: int  # messages cut off by data.overlong=truncate_turns
    examples: tuple[Example, ...]
    chat: bool = True  # written by the chat template; False: plain texts
    from_text: bool = False  # so written, though the row holds texts
    unread: tuple[str, ...] = ()  # columns
    shape: str = ""  # see formats.Record
    doubt: str = ""  # whether what is learnt is what the assistant said, see suspects.py


def understood(
    row: Json, source: str, tokenizer: Tokenizer, config: DataConfig, wanted: Wanted, keep: bool = False
) -> Loaded:
    """A row as it came, read and rendered. Raises BadRow for one that cannot be used, with what would cure it, and
    ValueError for a kind of data that the objective cannot use."""
    row = {name: value for name, value in row.items() if name not in config.ignore}
    try:
        record = parse(row, config.open_tool_calls)
    except BadRow as bad:
        raise with_cure(bad, row) from None
    left = unread(record)
    doubt = check(record)
    made = in_chat(record, tokenizer, config.text)
    found = loaded(made, source, tokenizer, config, wanted, keep)
    return replace(found, from_text=made is not record, unread=left, shape=record.shape, doubt=doubt)


def in_chat(record: Record, tokenizer: Tokenizer, text: str) -> Record:
    """The record with texts as a user's and an assistant's messages, where data.text says so; itself where it has
    none. A text that nobody has taken apart stays one."""
    sides = {name: as_chat(side, tokenizer, text) for name, side in record.sides.items()}
    return record if sides == record.sides else replace(record, sides=sides)


def as_chat(side: Dialogue | Tokenised, tokenizer: Tokenizer, text: str) -> Dialogue | Tokenised:
    """The same of one conversation. Raises BadRow for a text that has no place in a chat or in plain text."""
    if not isinstance(side, Dialogue) or not isinstance(side.prompt, str) or not isinstance(side.completion, str):
        return side
    if side.whole or not written_as_chat(tokenizer, text) or not side.prompt.strip():
        for name, said in (("system", side.system), ("tools", side.tools)):
            if said:
                cure = f"data.columns.prompt=[{name},prompt]" if name == "system" else "data.ignore=[tools]"
                raise BadRow(name, f"the column {name} has no place beside plain texts; give messages, or use {cure}")
        return side
    for name, said in (("the prompt", side.prompt), ("the answer", side.completion)):
        token = control_token(tokenizer, said)
        if token:
            raise BadRow(
                "control_token",
                f"{name} holds the control token {token}: a chat template has written it, and would again; use "
                "data.text=plain",
            )
    if text == "auto":
        refuse_open(side.prompt)
    opening = [{"role": "system", "content": side.system}] if side.system else []
    # the space before an answer joins two plain texts
    answer = {"role": "assistant", "content": side.completion.lstrip()}
    return replace(side, prompt=(*opening, {"role": "user", "content": side.prompt}), completion=(answer,), system="")


def written_as_chat(tokenizer: Tokenizer, text: str) -> bool:
    """Whether texts are to be written by the chat template. Raises ValueError for data.text=chat without one."""
    if text == "chat" and not tokenizer.chat_template:
        raise ValueError("data.text=chat: the tokenizer has no chat template; use data.text=plain or auto")
    return text == "chat" or (text == "auto" and bool(tokenizer.chat_template))


def loaded(record: Record, source: str, tokenizer: Tokenizer, config: DataConfig, wanted: Wanted, keep: bool) -> Loaded:
    """The renderings of a record and its examples.

    Raises BadRow for a row that cannot be used, ValueError for a kind of data that the objective cannot use.
    """
    kind = wanted.kind or record.kind
    wanted = replace(wanted, kind=kind)
    if not _serves(record.kind, kind):
        raise ValueError(_cure(source, record.kind, kind))
    renderings: dict[str, Rendering] = {}
    texts = Texts(tokenizer, config.max_tokens if config.overlong != "truncate_turns" else None)
    truncated = 0
    for name, side in record.sides.items():
        if wanted.whole and not side.finished:
            side = _whole(side)
        rendering = _rendering(side, texts, config, keep)
        if len(rendering.row.token_ids) > config.max_tokens:
            rendering, cut = _shortened(side, rendering, texts, config, keep)
            truncated += cut
        if not rendering.row.targets.any():
            raise BadRow("no_target", f"{name} has no token to learn from; give an answer, or a weight above 0")
        renderings[name] = rendering
    if not config.empty_prompts:
        for name, side in record.sides.items():
            _check_prompt(record.kind, side, renderings[name], tokenizer)
    for one, other in pairwise(renderings) if record.kind in ("pair", "ranked") else ():
        if np.array_equal(renderings[one].row.token_ids, renderings[other].row.token_ids):
            if truncated:
                raise BadRow(
                    "dead_pair", f"after truncation {one} and {other} have the same tokens; raise data.max_tokens"
                )
            raise BadRow("identical", f"{one} and {other} have the same tokens; remove the row or mend one of them")
    prompts = {name: _prompt(record.sides[name], shown, tokenizer) for name, shown in renderings.items()}
    examples = tuple(_examples(record, renderings, prompts, source, tokenizer, config, wanted))
    finished = {name: side.finished for name, side in record.sides.items()}
    alone = {name: _alone(record.sides[name], shown, tokenizer) if keep else None for name, shown in renderings.items()}
    chat = not any(isinstance(side, Dialogue) and isinstance(side.prompt, str) for side in record.sides.values())
    return Loaded(source, record.kind, renderings if keep else {}, alone, finished, truncated, examples, chat)


# ---------------------------------------------------------------------- renderings


def _rendering(side: Dialogue | Tokenised, texts: Texts, config: DataConfig, authors: bool) -> Rendering:
    tokenizer = texts.tokenizer
    if isinstance(side, Tokenised):
        return _as_tokenised(side, len(tokenizer))
    if isinstance(side.prompt, str):
        return render_text(tokenizer, side.prompt, str(side.completion), side.finished, texts)
    roles = tuple(config.target_roles)
    assert not isinstance(side.completion, str)  # both are texts or neither
    return render(
        tokenizer,
        [*side.prompt, *side.completion],
        tools=side.tools,
        # a prompt holds no answers; other roles are learnt wherever they speak
        first_target=len(side.prompt) if roles == ("assistant",) else 0,
        finished=side.finished,
        target_roles=roles,
        texts=texts,
        authors=authors,
    )


def _check_prompt(kind: Kind, side: Dialogue | Tokenised, rendering: Rendering, tokenizer: Tokenizer) -> None:
    """Raises BadRow for a row that answers nothing; a text to imitate has no prompt by nature."""
    if isinstance(side, Tokenised):
        empty = rendering.row.token_ids[: rendering.prompt_length].tolist() == [tokenizer.bos_token_id]
    elif isinstance(side.prompt, str):
        empty = not side.prompt.strip() and not (kind == "single" and side.whole)
    else:
        empty = not any((m.get("content") or "").strip() for m in side.prompt if m["role"] != "system")
    if empty:
        raise BadRow(
            "empty_prompt",
            "the row has no prompt: its answers would be learnt as if nobody had asked; name the column that holds it "
            "with data.columns.prompt=COLUMN, or set data.empty_prompts=true",
        )


def _whole(side: Dialogue | Tokenised) -> Dialogue | Tokenised:
    if isinstance(side, Tokenised):
        raise BadRow(
            "unfinished", "the conversation came as tokens and is cut off: a reward model reads its end of turn"
        )
    return replace(side, finished=True)


def _as_tokenised(side: Tokenised, vocabulary: int) -> Rendering:
    ids = np.array(side.token_ids, dtype=np.int32)
    if ids.max() >= vocabulary:
        raise BadRow(
            "other_vocabulary", f"token {ids.max()} is not in the vocabulary; the row was made for another model"
        )
    targets = np.zeros(len(ids), dtype=bool)
    spans = []
    for number, (role, start, end, target) in enumerate(side.spans):
        targets[start:end] = target
        spans.append(Span(start, end, role, number, target))
    return Rendering(Row(ids, targets), tuple(spans), int(np.flatnonzero(targets)[0]), ())


def _shortened(
    side: Dialogue | Tokenised, rendering: Rendering, texts: Texts, config: DataConfig, authors: bool
) -> tuple[Rendering, int]:
    """The conversation without its last messages, ending in an answer, and how many were cut. Raises BadRow."""
    tokens, limit = len(rendering.row.token_ids), config.max_tokens
    if rendering.prompt_length >= limit:
        raise BadRow(
            "prompt_too_long",
            f"the prompt has {rendering.prompt_length} tokens, the limit of a sequence is data.max_tokens={limit}; "
            f"raise it above {rendering.prompt_length} or shorten the prompt",
        )
    if config.overlong == "truncate_turns" and isinstance(side, Dialogue) and not isinstance(side.completion, str):
        told = rendering if authors else _rendering(side, texts, config, True)
        reach = {span.message: span.end for span in told.spans}
        for end in range(len(side.completion) - 1, 0, -1):
            last = side.completion[end - 1]
            if last["role"] != "assistant" or (last.get("tool_calls") and not config.open_tool_calls):
                continue
            if reach.get(len(side.prompt) + end - 1, 0) > limit:  # too long even without what ends it
                continue
            shorter = _rendering(replace(side, completion=side.completion[:end], finished=True), texts, config, authors)
            if len(shorter.row.token_ids) <= limit and shorter.row.targets.any():
                return shorter, len(side.completion) - end
    raise BadRow(
        "too_long", f"a sequence has {tokens} tokens; use data.max_tokens={tokens} or more, or shorten the row"
    )


# ---------------------------------------------------------------------- examples


def _serves(have: Kind, want: Kind) -> bool:
    return have == want or have == "pair" or (have, want) in (("labelled", "single"), ("ranked", "pair"))


def _cure(source: str, have: Kind, want: Kind) -> str:
    fields = {
        "pair": "chosen and rejected",
        "labelled": "label",
        "single": "messages, or prompt and completion",
        "ranked": "prompt and ranked",
    }
    return (
        f"{source}: the row is {have}, the objective needs {fields[want]}; use other data, or another objective: "
        "dpo and its family read pairs, kto labels, nll what is to be imitated"
    )


def _examples(
    record: Record,
    renderings: dict[str, Rendering],
    prompts: dict[str, Prompt],
    source: str,
    tokenizer: Tokenizer,
    config: DataConfig,
    wanted: Wanted,
) -> list[Example]:
    rows = {name: rendering.row for name, rendering in renderings.items()}
    common: Json = {"source": source, "origin": record.origin, "numbers": record.numbers}
    if wanted.kind == "ranked":
        return [Example(tuple(rows.values()), prompt=next(iter(prompts.values())), **common)]
    if record.kind == "ranked":  # every two of them are a pair
        if wanted.columns or wanted.margins or config.targets == "divergent":
            raise BadRow(
                "ranked",
                "ranked rows serve as pairs without further columns or margins and with data.targets=all only",
            )
        first = next(iter(prompts.values()))
        return [Example(two, prompt=first, **common) for two in combinations(rows.values(), 2)]
    if wanted.kind == "pair":
        both = (rows["chosen"], rows["rejected"])
        if config.targets == "divergent":
            both = tuple(after_divergence(row, other) for row, other in (both, both[::-1]))  # type: ignore[assignment]
            if not all(row.targets.any() for row in both):
                raise BadRow(
                    "no_target", "one of chosen and rejected begins as the other and ends there; use data.targets=all"
                )
        extra = tuple(_column(name)(record, both, tokenizer, config) for name in wanted.columns)
        if wanted.margins:
            sides = {name: _said(record.sides[name], rows[name], tokenizer) for name in ("chosen", "rejected")}
            common["numbers"] = record.numbers | margin_numbers(record.by_component, wanted, config.margins, sides)
        return [Example((*both, *extra), prompt=prompts["chosen"], **common)]
    if record.kind == "pair":
        if wanted.kind == "single":
            return [Example((rows["chosen"],), prompt=prompts["chosen"], **common)]
        return [
            Example((rows[name],), prompt=prompts[name], label=name == "chosen", **common)
            for name in ("chosen", "rejected")
        ]
    if wanted.kind == "single" and record.label is False:
        raise NotUsed(NOT_USED, "the row is labelled undesirable; only desirable ones are imitated")
    return [Example((rows["row"],), prompt=prompts["row"], label=record.label, **common)]


def _said(side: Dialogue | Tokenised, row: Row, tokenizer: Tokenizer) -> tuple[str, str, bool]:
    """Prompt, completion and whether it was finished, as a function that scores it gets them."""
    if isinstance(side, Dialogue):
        return side.question, _text(side.completion), side.finished
    return side.question, tokenizer.decode(row.token_ids[row.targets], skip_special_tokens=True), side.finished


def _text(completion: str | tuple[Message, ...]) -> str:
    if isinstance(completion, str):
        return completion
    return "\n".join(m.get("content") or "" for m in completion if m["role"] == "assistant")


def _prompt(side: Dialogue | Tokenised, rendering: Rendering, tokenizer: Tokenizer) -> Prompt:
    """What stands before the first target; of a conversation in which another role is learnt first, its prompt."""
    if isinstance(side, Dialogue) and not side.prompt:
        return Prompt((), "")
    if isinstance(side, Dialogue) and not isinstance(side.prompt, str) and _first(rendering).role != "assistant":
        return Prompt(tuple(prompt_ids(tokenizer, side.prompt, tools=side.tools)), side.question)
    return Prompt(tuple(rendering.row.token_ids[: rendering.prompt_length].tolist()), side.question)


def _alone(side: Dialogue | Tokenised, rendering: Rendering, tokenizer: Tokenizer) -> tuple[int, ...] | None:
    """The proof that generation starts from the same tokens: the messages before the first target by themselves."""
    if isinstance(side, Tokenised):
        return None
    prompt, first = side.prompt, _first(rendering)
    # weights and target_roles can move the first target
    if not isinstance(prompt, str) and not isinstance(side.completion, str) and first.role == "assistant":
        prompt = (*prompt, *side.completion)[: first.message]
    return tuple(prompt_ids(tokenizer, prompt, tools=side.tools)) if prompt else ()


def _first(rendering: Rendering) -> Span:
    return next(span for span in rendering.spans if span.target)


def after_divergence(row: Row, other: Row) -> Row:
    """The row with targets from its first token on that differs from `other` (Xie et al. 2024, arXiv 2405.00451)."""
    shared = common_prefix_length(row.token_ids, other.token_ids)
    targets = row.targets.copy()
    targets[:shared] = False
    return replace(row, targets=targets)


def _column(name: str) -> Any:
    module, _, function = (name if "." in name else f"align.data.columns.{name}").rpartition(".")
    return getattr(importlib.import_module(module), function)


def prompt_key(example: Example) -> tuple[int, ...] | str:
    """What tells its prompt from others; an example without one stands for itself."""
    return example.prompt.token_ids or example.source


def assign_mismatched(examples: Sequence[Example], seed: int, max_tokens: int) -> Sequence[Example]:
    """Each example with its prompt followed by the completion of another prompt: KTO's sample of the KL point.

    The partner is fixed for the whole run, the next one with another prompt in a seeded order, so that the point
    does not depend on batches and its reference log-probs can be cached. Made when they are asked for. Raises
    ValueError for a single prompt.
    """
    order = np.random.default_rng([seed, len(examples)]).permutation(len(examples))
    keys = [hashlib.blake2b(repr(prompt_key(example)).encode(), digest_size=16).digest() for example in examples]
    prompts = [keys[i] for i in order]
    if len(set(prompts)) < 2:
        raise ValueError("the KL point needs at least two different prompts; add data, or use an objective without it")
    # the next position in the circle with another prompt, for all positions in one pass from the back
    n = len(order)
    following = np.zeros(2 * n, dtype=np.int64)
    for k in range(2 * n - 2, -1, -1):
        same = prompts[k % n] == prompts[(k + 1) % n]
        following[k] = following[k + 1] if same else (k + 1) % n
    partners = np.empty(n, dtype=np.int64)
    partners[order] = order[following[:n]]

    def make(i: int) -> Example:
        row = _swapped(examples[i].rows[0], examples[partners[i]].rows[0], max_tokens)
        return replace(examples[i], extras={"mismatched": row})

    return View(n, make)


def _swapped(own: Row, other: Row, max_tokens: int) -> Row:
    a, b = int(np.argmax(own.targets)), int(np.argmax(other.targets))

    def joined(x: np.ndarray, y: np.ndarray) -> np.ndarray:
        return np.concatenate([x[:a], y[b:]])[:max_tokens]

    weights = None
    if own.weights is not None or other.weights is not None:
        ones = [r.weights if r.weights is not None else np.ones(len(r.targets), np.float32) for r in (own, other)]
        weights = joined(*ones)
    return Row(joined(own.token_ids, other.token_ids), joined(own.targets, other.targets), weights)
