"""Conversations and plain texts to Rows: which tokens, who wrote them, which the policy answers for.

A conversation is rendered once by the model's own chat template; template.py tells where each message stands in it.
Targets are what the policy would have emitted from where generation starts to its end of turn. No mask is derived from
token ids, and text in a message never becomes a control token. Order and types of messages are formats.py's.
"""

from __future__ import annotations

import re
from bisect import bisect_left, bisect_right
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import pairwise
from typing import Any

import numpy as np

from align.data.sources import BadRow
from align.data.template import (
    Layout,
    Message,
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
from align.jsons import Tokenizer
from align.types import Row

_Region = tuple[int, int, str, int | None, bool]  # characters from, to; role, message, target
_CONTEXT = 64  # characters before a text that its tokenisation is told of: longer than any control token
_CERTAIN = 32  # characters for each token of the limit, below which no text is looked at: no vocabulary is so good
_BLANKS = " \n\t\r"
# after these no token reaches into most texts, and no tokenizer marks the start of a text any more
_APART = ("\n", "a")


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
) -> Rendering:
    """A conversation by the tokenizer's chat template, up to its last target (to its end when it has none).

    Targets are the messages from index first_target on whose role is in target_roles and whose weight is not 0. An
    assistant's target begins where generation would and ends with its end of turn, or with its text when it is the
    last one and not finished. Of other roles it is what the message says. texts: what of the row is tokenised already.
    Raises BadRow("template") when the template refuses the conversation, drops or rewrites what a target says, or
    leaves open where a target begins or ends; ValueError without a template.
    """
    template, messages = Template.of(tokenizer, tools), tidy(messages)
    texts = texts or Texts(tokenizer)
    text = template.write(messages, generation=False)
    texts.admit(text)
    layout = template.layout(messages, False, text)
    chosen = [
        i
        for i, message in enumerate(messages)
        if i >= first_target and message["role"] in target_roles and message.get("weight", 1) != 0
    ]
    turns, notes = [], _dropped(layout, chosen)
    for i in chosen:
        turn, findings = _target(template, layout, messages, i, finished or i != chosen[-1])
        turns.append(turn)
        notes += findings
    regions = _tile(layout, messages, turns)
    cuts, findings = _cuts(tokenizer, layout, messages, tools)
    borders = cuts | {edge for turn in turns for edge in (turn.start, turn.end)}
    ids, edges = _encode(texts, layout.text, borders, [start for start, *_ in regions] + [regions[-1][1]])
    if turns and turns[-1].append:
        ids += texts.in_place(_after(layout.text[: turns[-1].end]), turns[-1].append)[0]
        edges[-1] = len(ids)
    spans = tuple(
        Span(start, end, role, message, target)
        for (start, end), (_, _, role, message, target) in zip(pairwise(edges), regions, strict=True)
        if start < end
    )
    prompt_length = next((span.start for span in spans if span.target), len(ids))
    if prompt_length == 0:
        raise BadRow("template", "nothing stands before the first target that generation could start from")
    return Rendering(_row(ids, spans, messages), spans, prompt_length, tuple(notes + findings))


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
        rest, _ = texts.in_place(_after(prompt)[-len(_APART) - 1 :], completion)
    if finished and tokenizer.eos_token_id is not None and rest[-1:] != [tokenizer.eos_token_id]:
        rest = [*rest, tokenizer.eos_token_id]
    ids = head + rest
    spans = (Span(0, len(head), "text", None, False), Span(len(head), len(ids), "text", None, True))
    inside = _special(tokenizer).search(completion.removesuffix(tokenizer.eos_token or ""))
    note = "it is learnt as such, with what follows: give messages where this is a conversation"
    notes = (f"control_token: the text holds the control token {inside.group()}; {note}",) if inside else ()
    return Rendering(_row(ids, spans, ()), spans, len(head), notes)


def prompt_ids(tokenizer: Tokenizer, prompt: str | Sequence[Message], tools: Tools | None = None) -> list[int]:
    """The tokens generation starts from."""
    if isinstance(prompt, str):
        return Texts(tokenizer).begun((prompt,))[0]
    template, messages = Template.of(tokenizer, tools), tidy(prompt)
    if not _special(tokenizer).search(json_of([messages, tools])):
        return _ids(tokenizer, template.write(messages, generation=True))
    layout = template.layout(messages, generation=True)
    return _encode(Texts(tokenizer), layout.text, _cuts(tokenizer, layout, messages, tools)[0], [0, len(layout.text)])[
        0
    ]


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
    return _encode(Texts(tokenizer), layout.text, cuts, [turn.end if ended else turn.end_start, len(layout.text)])[0]


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


def _target(
    template: Template, layout: Layout, messages: Sequence[Message], i: int, ended: bool
) -> tuple[Turn, list[str]]:
    """What the policy is to answer for of message i, and findings."""
    notes = check_said(layout, messages, i)
    if messages[i]["role"] != "assistant":
        start, end = layout.region(i)
        return Turn(i, start, end, end, end), notes
    turn, findings = template.turn(layout, messages, i)
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


def _tile(layout: Layout, messages: Sequence[Message], turns: Sequence[Turn]) -> list[_Region]:
    """The regions of the rendering, without gaps, up to the last target."""
    stop = turns[-1].end if turns else len(layout.text)
    named = [(turn.start, turn.end, turn.message, True) for turn in turns]
    for i in {*range(len(messages))} - {turn.message for turn in turns}:
        start, end = layout.region(i)
        if start < min(end, stop):
            named.append((start, min(end, stop), i, False))
    regions: list[_Region] = []
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


def _encode(texts: Texts, text: str, borders: Iterable[int], edges: Sequence[int]) -> tuple[list[int], list[int]]:
    """Tokens from the first edge to the last, none of which crosses a border; and the number of tokens before each.

    Edges are ascending. A token across an edge that is no border belongs to where it begins.
    """
    first, last = edges[0], edges[-1]
    stops = sorted({first, last} | {border for border in borders if first < border < last})
    inner = [edges[bisect_right(edges, start) : bisect_left(edges, end)] for start, end in pairwise(stops)]
    befores = [text[max(0, start - _CONTEXT) : start] for start in stops[:-1]]
    pieces = [text[start:end] for start, end in pairwise(stops)]
    exact = texts.tokenizer.is_fast  # tells where tokens begin
    for offsets in (True, False):
        asked = [
            (b, b + p)
            for b, p, within in zip(befores, pieces, inner, strict=True)
            if (bool(within) and exact) is offsets
        ]
        texts.ask((whole for both in asked for whole in both), offsets)
    ids: list[int] = []
    at = dict.fromkeys(edges, 0)
    for before, piece, within, (start, end) in zip(befores, pieces, inner, pairwise(stops), strict=True):
        tokens, begins = texts.in_place(_after(before), piece, bool(within) and exact)
        at[start] = len(ids)
        for edge in within:
            if begins is None:  # nearly: the beginning alone may have other tokens
                begun = min(len(texts.in_place(_after(before), text[start:edge])[0]), len(tokens))
            else:
                begun = int(np.searchsorted(begins, edge - start))
            at[edge] = len(ids) + begun
        ids += tokens
        at[end] = len(ids)
    return ids, [at[edge] for edge in edges]


def _after(before: str) -> tuple[str, ...]:
    """Contexts of a text that stands after `before`."""
    return (before, *_APART, "") if before else ("",)


class Texts:
    """Tokens of the texts of one row: those that are asked for together cost one call of the tokenizer, and none is
    tokenised again for the row's other answers.

    limit: of the tokens of a sequence; None where one that is longer is of use.
    """

    def __init__(self, tokenizer: Tokenizer, limit: int | None = None):
        self.tokenizer = tokenizer
        self.limit = limit
        # -> tokens, and where each begins and ends unless nobody asked
        self._known: dict[str, tuple[list[int], Sequence[tuple[int, int]] | None]] = {"": ([], ())}
        self._whole: dict[str, list[int]] = {}

    def admit(self, text: str) -> None:
        """Raises BadRow for a text that has more tokens than a sequence may have however it is cut: tokens of one of 50
        MB take gigabytes, and a long conversation's turns minutes, to be thrown away."""
        if self.limit is None or len(text) <= _CERTAIN * self.limit:
            return
        longest, counted = _longest_token(self.tokenizer, len(self.tokenizer))
        if self.tokenizer.is_fast and self.tokenizer.backend_tokenizer.normalizer is not None:
            counted = bytes(byte for byte in counted if byte < 128)  # it may make others fewer
        rest = bytes(set(range(256)) - set(counted))
        least = -(-len(text.encode("utf-8", "replace").translate(None, rest)) // longest)
        if least > self.limit:
            raise BadRow(
                "too_long",
                f"a sequence of {len(text)} characters has {least} tokens or many more, the limit is data.max_tokens="
                f"{self.limit}; shorten the row",
            )

    def ask(self, texts: Iterable[str], offsets: bool = False) -> None:
        """Have the tokens of these, without what the tokenizer puts around a text."""
        known = self._known
        new = [t for t in dict.fromkeys(texts) if t not in known or (offsets and known[t][1] is None)]
        if new:
            # the template writes BOS itself
            made = self.tokenizer(new, add_special_tokens=False, return_offsets_mapping=offsets)
            spans = made.offset_mapping if offsets else [None] * len(new)
            known |= zip(new, zip(made.input_ids, spans, strict=True), strict=True)

    def in_place(
        self, contexts: Sequence[str], text: str, offsets: bool = False
    ) -> tuple[list[int], np.ndarray | None]:
        """Tokens of `text` standing after the first of some contexts, whose tokens are already fixed; with offsets,
        where each begins.

        Tokenised together, so that tokenizers which mark the start of a text see it in its place; where a token
        would reach across the border, the text is tokenised after the next context: generation starts from fixed
        tokens too.
        """
        if not text:
            return [], None
        for context in contexts:
            self.ask((context, context + text), offsets)
            head, (whole, spans) = self._known[context][0], self._known[context + text]
            if whole[: len(head)] == head:
                break
        if not offsets:
            return whole[len(head) :], None
        assert spans is not None
        own = np.array(spans[len(head) :], dtype=np.int64).reshape(-1, 2) - len(context)
        # a token begins where the one before ended, though offsets leave out spaces; a character's bytes share theirs
        ends = np.concatenate([[0], np.maximum.accumulate(own[:, 1])[:-1]])
        return whole[len(head) :], np.maximum.accumulate(np.minimum(own[:, 0], ends))

    def begun(self, texts: Sequence[str]) -> list[list[int]]:
        """Tokens of whole texts that something follows, with those that the tokenizer puts before a text."""
        new = [text for text in dict.fromkeys(texts) if text not in self._whole]
        if new:
            made = self.tokenizer(new).input_ids
            if _appends_eos(self.tokenizer, len(self.tokenizer)):
                made = [ids[:-1] for ids in made]
            self._whole |= zip(new, made, strict=True)
        return [self._whole[text] for text in texts]


def _ids(tokenizer: Tokenizer, text: str) -> list[int]:
    # the template writes BOS itself
    return tokenizer(text, add_special_tokens=False).input_ids


@lru_cache(maxsize=16)
def _longest_token(tokenizer: Tokenizer, size: int) -> tuple[int, bytes]:  # noqa: ARG001  tokens may be added
    """The most bytes of a text that one token stands for, blanks not counted, and the bytes that are sure to be part of
    one: none of vocabularies in which a token stands for any unknown word."""
    if not tokenizer.is_fast or type(tokenizer.backend_tokenizer.model).__name__ != "BPE":
        return 1, b""
    vocabulary = tokenizer.get_vocab()
    if tokenizer.backend_tokenizer.model.byte_fallback:
        blanks = str.maketrans("", "", _BLANKS + "\u2581")
        longest = max(len(token.translate(blanks).encode()) for token in vocabulary)
        return longest, bytes(set(range(256)) - set(_BLANKS.encode()))
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    letters = bytes_to_unicode()
    blanks = str.maketrans("", "", "".join(letters[byte] for byte in _BLANKS.encode()))
    # without a letter for the space its letters are characters, of which others than those of ASCII may be unknown
    several = 256 if letters[ord(" ")] in vocabulary else 128
    counted = [byte for byte in range(several) if letters[byte] in vocabulary and letters[byte].translate(blanks)]
    return max(len(token.translate(blanks)) for token in vocabulary), bytes(counted)


@lru_cache(maxsize=16)
def _appends_eos(tokenizer: Tokenizer, size: int) -> bool:  # noqa: ARG001  tokens may be added
    """Whether the tokenizer ends every text with EOS, which is then no part of a prompt."""
    return tokenizer.eos_token_id is not None and tokenizer("a").input_ids[-1:] == [tokenizer.eos_token_id]


def _beginning(tokenizer: Tokenizer) -> list[int]:
    return [tokenizer.bos_token_id] if tokenizer.bos_token_id is not None else []
