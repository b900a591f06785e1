"""Conversations and plain texts to Rows: which tokens, who wrote them, which the policy answers for.

A conversation is rendered once by the model's own chat template; template.py tells where each message stands in it.
Targets are what the policy would have emitted from where generation starts to its end of turn. No mask is derived from
token ids, and text in a message never becomes a control token. Order and types of messages are formats.py's.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import pairwise
from typing import Any

import numpy as np

from align.data.frames import Drawn, Region, frames_of
from align.data.sources import BadRow
from align.data.template import (
    Layout,
    Message,
    Starts,
    Template,
    Tools,
    Turn,
    check_said,
    json_of,
    map_texts,
    quote,
    texts_of,
    tidy,
)
from align.data.tokens import APART, Texts, after, encode
from align.jsons import Tokenizer
from align.types import Row


@dataclass(frozen=True)
class Span:
    """A run of tokens with one author; the spans of a rendering tile its tokens."""

    start: int
    end: int
    role: str  # of what a message says; "template" for what the template writes around it; "text" without a template
    message: int | None  # index; of template text: the message before it, None before the first
    target: bool


@dataclass(frozen=True)
class Rendering:
    """A row with its authors."""

    row: Row
    spans: tuple[Span, ...]
    prompt_length: int  # tokens that the policy's first emission continues; all of them without a target
    notes: tuple[
        str, ...
    ] = ()  # "kind: text", of context, control_token, dropped, end_of_turn, special_text, white_space


def render(
    tokenizer: Tokenizer,
    messages: Sequence[Message],
    *,
    tools: Tools | None = None,
    first_target: int = 0,
    finished: bool = True,
    target_roles: Sequence[str] = ("assistant",),
    texts: Texts | None = None,
    authors: bool = True,
) -> Rendering:
    """A conversation by the tokenizer's chat template, up to its last target (to its end when it has none).

    Targets are the messages from index first_target on whose role is in target_roles and whose weight is not 0. An
    assistant's target begins where generation would and ends with its end of turn, or with its text when it is the
    last one and not finished. Of other roles it is what the message says. texts: what of the row is tokenised already.
    authors: False where nobody asks who wrote what is no target, and tokens need not be told apart there ("context").
    Raises BadRow("template") when the template refuses the conversation, drops or rewrites what a target says, or
    leaves open where a target begins or ends; ValueError without a template.
    """
    template, messages = Template.of(tokenizer, tools), tidy(messages)
    texts = texts or Texts(tokenizer)
    text = template.write(messages, generation=False)
    texts.admit(text)

    def draw(messages: Sequence[Message], text: str) -> Drawn:
        return _drawn(template, messages, text, first_target, finished, target_roles)

    frames = frames_of(tokenizer, str(tokenizer.chat_template), tokenizer.eos_token, len(tokenizer))
    asked = (first_target, finished, tuple(target_roles))
    drawn = frames.drawn(template, messages, text, _special(tokenizer), asked, draw)
    regions = drawn.regions if authors else _joined(drawn.regions)
    ids, edges = encode(texts, text, drawn.borders, [start for start, *_ in regions] + [regions[-1][1]])
    if drawn.append:
        ids += texts.in_place(after(text[: regions[-1][1]]), drawn.append)[0]
        edges[-1] = len(ids)
    spans = tuple(
        Span(start, end, role, message, target)
        for (start, end), (_, _, role, message, target) in zip(pairwise(edges), regions, strict=True)
        if start < end
    )
    prompt_length = next((span.start for span in spans if span.target), len(ids))
    if prompt_length == 0:
        raise BadRow("template", "nothing stands before the first target that generation could start from")
    return Rendering(_row(ids, spans, messages), spans, prompt_length, drawn.notes)


def render_text(
    tokenizer: Tokenizer, prompt: str, completion: str, finished: bool, texts: Texts | None = None
) -> Rendering:
    """Prompt and completion as they stand, without a chat template; a finished completion ends in EOS. texts: what of
    the row is tokenised already."""
    texts = texts or Texts(tokenizer)
    texts.admit(prompt + completion)
    head, rest = _beginning(tokenizer), None
    if prompt:
        head, both = texts.begun((prompt, prompt + completion))
        rest = both[len(head) :] if both[: len(head)] == head else None
    if not head:
        raise BadRow("empty_prompt", "no prompt, and the tokenizer has no BOS to begin with; add a prompt")
    if rest is None:
        rest, _ = texts.in_place(after(prompt)[-len(APART) - 1 :], completion)
    if finished and tokenizer.eos_token_id is not None and rest[-1:] != [tokenizer.eos_token_id]:
        rest = [*rest, tokenizer.eos_token_id]
    ids = head + rest
    spans = (Span(0, len(head), "text", None, False), Span(len(head), len(ids), "text", None, True))
    inside = _special(tokenizer).search(completion.removesuffix(tokenizer.eos_token or ""))
    note = "it is learnt as such, with what follows: give messages where this is a conversation"
    notes = (f"control_token: the text holds the control token {inside.group()}; {note}",) if inside else ()
    return Rendering(_row(ids, spans, ()), spans, len(head), notes)


def prompt_ids(
    tokenizer: Tokenizer, prompt: str | Sequence[Message], tools: Tools | None = None, limit: int | None = None
) -> list[int]:
    """The tokens generation starts from. limit: of how many of them there may be. Raises BadRow("too_long") for a text
    that has more in any case, before it is tokenised."""
    texts = Texts(tokenizer, limit)
    if isinstance(prompt, str):
        texts.admit(prompt)
        return texts.begun((prompt,))[0]
    template, messages = Template.of(tokenizer, tools), tidy(prompt)
    if not _special(tokenizer).search(json_of([messages, tools])):
        text = template.write(messages, generation=True)
        texts.admit(text)
        return _ids(tokenizer, text)
    layout = template.layout(messages, generation=True)
    texts.admit(layout.text)
    return encode(texts, layout.text, _cuts(tokenizer, layout, messages, tools)[0], [0, len(layout.text)])[0]


def between_turns(
    tokenizer: Tokenizer,
    messages: Sequence[Message],
    new: Sequence[Message],
    *,
    tools: Tools | None = None,
    ended: bool = True,
) -> list[int]:
    """The tokens between the policy's emission of messages[-1] and the start of its next one, after `new`.

    messages[-1] is the assistant's; `ended`: its end of turn was emitted too. What was emitted is not tokenised again
    nor looked at, so it may be anything. Raises BadRow("template") as render does.
    """
    template, at = Template.of(tokenizer, tools), len(messages) - 1
    messages = tidy([*messages, *new])
    if messages[at]["content"] or "tool_calls" not in messages[at]:
        messages[at]["content"] = "x"  # any text: only what follows it counts
    layout = template.layout(messages, generation=True)
    turn = template.end(layout, messages, at, layout.before(at))
    cuts, _ = _cuts(tokenizer, layout, messages, tools)
    return encode(Texts(tokenizer), layout.text, cuts, [turn.end if ended else turn.end_start, len(layout.text)])[0]


def control_token(tokenizer: Tokenizer, text: str) -> str:
    """The first control token whose text stands in a text; "" for none."""
    found = _special(tokenizer).search(text)
    return found.group() if found else ""


def terminator(tokenizer: Tokenizer) -> str:
    """What the chat template writes for the end of the assistant's turn; "" for nothing."""
    return Template.of(tokenizer).habits.last_end


def stop_ids(tokenizer: Tokenizer, generation_config: Any) -> list[int]:
    """Every token that ends a turn: the generation config's, the tokenizer's and the chat template's."""
    configured = generation_config.eos_token_id if generation_config is not None else None
    ids = [*(configured if isinstance(configured, (list, tuple)) else [configured]), tokenizer.eos_token_id]
    if tokenizer.chat_template:
        end = _ids(tokenizer, terminator(tokenizer))
        ids += end if len(end) == 1 else []
    return sorted({i for i in ids if i is not None})


# ---- spans ----


def _drawn(
    template: Template,
    messages: Sequence[Message],
    text: str,
    first_target: int,
    finished: bool,
    target_roles: Sequence[str],
) -> Drawn:
    """A conversation and its rendering, taken apart. Raises BadRow as render does."""
    layout = template.layout(messages, False, text)
    chosen = [
        i
        for i, message in enumerate(messages)
        if i >= first_target and message["role"] in target_roles and message.get("weight", 1) != 0
    ]
    answers = [i for i in chosen if messages[i]["role"] == "assistant"]
    starts = Starts(template, layout, messages, answers)
    turns, notes = [], _dropped(layout, chosen)
    for i in chosen:
        turn, findings = _target(template, layout, messages, i, finished or i != chosen[-1], starts)
        turns.append(turn)
        notes += findings
    regions = _tile(layout, messages, turns)
    cuts, findings = _cuts(template.tokenizer, layout, messages, template.tools)
    borders = cuts | {edge for turn in turns for edge in (turn.start, turn.end)}
    return Drawn(text, regions, frozenset(borders), turns[-1].append if turns else "", (*notes, *findings))


def _target(
    template: Template, layout: Layout, messages: Sequence[Message], i: int, ended: bool, starts: Starts
) -> tuple[Turn, list[str]]:
    """What the policy is to answer for of message i, and findings."""
    notes = check_said(layout, messages, i)
    if messages[i]["role"] != "assistant":
        start, end = layout.region(i)
        return Turn(i, start, end, end, end), notes
    start, findings = starts.of(i)
    turn = template.end(layout, messages, i, start)
    notes += findings
    habits, last = template.habits, i == len(messages) - 1
    if not ended:
        return replace(turn, end=turn.said_end, append=""), notes
    if not last and not messages[i].get("tool_calls") and habits.history_end != habits.last_end:
        turn = replace(turn, end=turn.said_end)  # what ends a turn of the past is not what the policy ended it with
    if turn.end == turn.said_end and not turn.append:
        eos = template.tokenizer.eos_token or ""
        turn = replace(turn, append=eos if last else "")
        if last and eos:
            notes.append(f"end_of_turn: the chat template writes none after message {i + 1}; {eos} is added")
        else:
            notes.append(f"end_of_turn: message {i + 1} has none that the policy would have emitted; none is learnt")
    return turn, notes


def _dropped(layout: Layout, chosen: Sequence[int]) -> list[str]:
    return [
        f"dropped: the chat template leaves out message {i + 1}"
        for i, places in enumerate(layout.places)
        if i not in chosen and places and all(end is None for _, end in places)
    ]


def _tile(layout: Layout, messages: Sequence[Message], turns: Sequence[Turn]) -> list[Region]:
    """The regions of the rendering, without gaps, up to the last target."""
    stop = turns[-1].end if turns else len(layout.text)
    named = [(turn.start, turn.end, turn.message, True) for turn in turns]
    for i in {*range(len(messages))} - {turn.message for turn in turns}:
        start, end = layout.region(i)
        if start < min(end, stop):
            named.append((start, min(end, stop), i, False))
    regions: list[Region] = []
    at, before = 0, None
    for start, end, i, target in sorted(named):
        if start < at and (target or regions[-1][4]):
            raise BadRow(
                "template",
                f"message {i + 1}: the chat template writes it into message {(before or 0) + 1} "
                f"({quote(layout.text[start:at])}); use another chat template",
            )
        if start > at:
            regions.append((at, start, "template", before, False))
        regions.append((max(start, at), max(end, at), messages[i]["role"], i, target))
        at, before = max(end, at), i
    if at < stop or not regions:
        regions.append((at, stop, "template", before, False))
    return regions


def _joined(regions: Sequence[Region]) -> list[Region]:
    """The same, of which those without a target that follow each other are one."""
    out: list[Region] = []
    for region in regions:
        if region[4]:
            out.append(region)
        elif out and not out[-1][4]:
            out[-1] = (out[-1][0], region[1], "context", None, False)
        else:
            out.append((region[0], region[1], "context", None, False))
    return out


def _row(ids: list[int], spans: Sequence[Span], messages: Sequence[Message]) -> Row:
    targets = np.zeros(len(ids), dtype=bool)
    weights = np.zeros(len(ids), dtype=np.float32)
    for span in spans:
        if span.target:
            targets[span.start : span.end] = True
            weights[span.start : span.end] = 1 if span.message is None else messages[span.message].get("weight", 1)
    return Row(np.array(ids, dtype=np.int32), targets, weights if (weights[targets] != 1).any() else None)


# ---- tokens ----


def _cuts(
    tokenizer: Tokenizer, layout: Layout, messages: Sequence[Message], tools: Tools | None
) -> tuple[set[int], list[str]]:
    """Places inside the text of control tokens in messages: cut there, it stays text. And findings.

    Raises BadRow where such text cannot be told from what the template writes.
    """
    special = _special(tokenizer)
    cuts: set[int] = set()
    notes = []
    for i, message in enumerate(messages):
        texts, places = texts_of(message), layout.places[i]
        known = [(start, end) for start, end in places if start is not None and end is not None]
        found = [match for start, end in known for match in special.finditer(layout.text, start, end)]
        unsure = [said for said, place in zip(texts, places, strict=True) if place[0] is None or i in layout.repeated]
        if any(special.search(text) for text in [*unsure, json_of(map_texts(message, lambda _: ""))]):
            raise BadRow("template", f"message {i + 1} holds the text of a control token; remove it")
        cuts |= {match.start() + 1 for match in found}
        if found:
            notes.append(f"special_text: message {i + 1} holds the text of the control token {found[0].group()}")
    if tools and special.search(json_of(tools)):
        raise BadRow("template", "tools hold the text of a control token; remove it")
    return cuts, notes


def _special(tokenizer: Tokenizer) -> re.Pattern[str]:
    return _special_pattern(tokenizer, len(tokenizer))


@lru_cache(maxsize=16)
def _special_pattern(tokenizer: Tokenizer, size: int) -> re.Pattern[str]:  # noqa: ARG001  tokens may be added
    """Matches the text of any control token, the longest first."""
    added = {token.content for token in tokenizer.added_tokens_decoder.values() if token.special}
    texts = sorted(added | set(tokenizer.all_special_tokens), key=len, reverse=True)
    return re.compile("|".join(map(re.escape, texts)) or r"(?!)")


def _ids(tokenizer: Tokenizer, text: str) -> list[int]:
    # the template writes BOS itself
    return tokenizer(text, add_special_tokens=False).input_ids


def _beginning(tokenizer: Tokenizer) -> list[int]:
    return [tokenizer.bos_token_id] if tokenizer.bos_token_id is not None else []
