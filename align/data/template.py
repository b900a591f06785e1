"""A chat template at work: its rendering of a conversation, where each message stands in it and where turns begin.

Everything is learnt from renderings; no template is known by name. Marks put around what the messages say, in a second
rendering that must be the first one plus the marks, tell where each text stands. Tokens are chat.py's.
"""

from __future__ import annotations

import json
import re
from bisect import bisect_left
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from datetime import datetime
from functools import cached_property, lru_cache
from itertools import accumulate
from typing import Any
from weakref import WeakKeyDictionary

from align.data.sources import BadRow
from align.jsons import Fields, Json, Tokenizer

Message = Json
Tools = Sequence[Fields]  # as JSON schemas
Place = tuple[int | None, int | None]  # of a text in a rendering; None: not to be told
# number of messages -> those messages, their tools and the day; what was written for generation
Prompts = dict[int, tuple[tuple[Sequence[Message], Tools | None, str | None], str]]
REASONING = ("reasoning_content", "reasoning", "thinking")  # fields that hold it; templates differ in the name
_SAID = (*REASONING, "content")
_MARKER = re.compile(r"<[^<>\s]+>|\[/?[A-Z_]+\]")  # the shape of what templates write between messages
_PROVED = 8  # answers of a conversation each of which is proved by a rendering of its own
_REMEMBERED = 16  # messages of the longest prompt that is
_PRIVATE = 0xF0000  # first code point of the planes for private use: the marks


@dataclass(frozen=True)
class Layout:
    """A rendering and where the texts of the messages stand in it."""

    text: str
    places: tuple[tuple[Place, ...], ...]  # [message][text], texts as texts_of lists them
    repeated: frozenset[int] = frozenset()  # messages of which a text stands more than once; places holds the first

    def region(self, i: int) -> tuple[int, int]:
        """From the first to the last place of message i; empty, where the messages before it end, without one."""
        known = [at for place in self.places[i] for at in place if at is not None]
        return (min(known), max(known)) if known else (self.before(i), self.before(i))

    def before(self, i: int) -> int:
        """Where the messages before i end."""
        return self._ends[i]

    def after(self, i: int) -> int:
        """Where the messages after i begin."""
        end = self.region(i)[1]
        if self._begins[i + 1] >= end:  # but for templates that write messages in another order
            return self._begins[i + 1]
        known = [at for places in self.places[i + 1 :] for place in places for at in place if at is not None]
        return min((at for at in known if at >= end), default=len(self.text))

    @cached_property
    def _ends(self) -> list[int]:
        """The last known end of a text before each message, and before what follows all of them."""
        ends = [max((end for _, end in places if end is not None), default=0) for places in self.places]
        return list(accumulate(ends, max, initial=0))

    @cached_property
    def _begins(self) -> list[int]:
        """The first known place of each message or a later one; the end of the rendering without any."""
        size = len(self.text)
        first = [
            min((at for place in places for at in place if at is not None), default=size) for places in self.places
        ]
        return list(accumulate(reversed(first), min, initial=size))[::-1]


@dataclass(frozen=True)
class Turn:
    """Where the emission of a message stands in a rendering."""

    message: int
    start: int
    said_end: int  # after the last character that it says
    end_start: int  # of the end of turn
    end: int
    append: str = ""  # end of turn that the template leaves out


@dataclass(frozen=True)
class Habits:
    """How a chat template writes the assistant's turns, learnt from conversations made for the purpose."""

    generation: str = ""  # what it writes for generation to start from
    last_end: str = ""  # end of turn of the last message
    history_end: str = ""  # what stands there when messages follow
    call_end: str = ""  # end of a turn that calls tools
    no_text: str | None = ""  # the content of a message that only calls tools
    arguments_as_text: bool = False


@dataclass(frozen=True)
class Template:
    """The chat template of a tokenizer, with the tools of one conversation."""

    tokenizer: Tokenizer
    tools: Tools | None
    habits: Habits
    prompts: Prompts

    @staticmethod
    def of(tokenizer: Tokenizer, tools: Tools | None = None) -> Template:
        """Raises ValueError when the tokenizer has none."""
        if not tokenizer.chat_template:
            raise ValueError(
                "the data are conversations and the tokenizer has no chat template; set model.chat_template=FILE, "
                "or give prompt, chosen and rejected as plain strings"
            )
        habits, prompts = _habits(tokenizer, str(tokenizer.chat_template), tokenizer.eos_token)
        return Template(tokenizer, tools or None, habits, prompts)

    def write(self, messages: Sequence[Message], generation: bool) -> str:
        """The rendering. Raises BadRow when the template refuses."""
        day = date_of(self.tokenizer)
        clock = {} if day is None else {"strftime_now": datetime.fromisoformat(day).strftime}
        try:
            return self.tokenizer.apply_chat_template(
                [self._form(message) for message in messages],
                tools=self.tools,
                tokenize=False,
                add_generation_prompt=generation,
                **clock,
            )
        except Exception as error:  # Jinja's own exceptions and what templates raise
            why = " ".join(str(error).split())
            raise BadRow("template", f"the chat template refuses the conversation: {why}") from error

    def prompt(self, messages: Sequence[Message], i: int) -> str:
        """What generation of message i would start from; the answers of a row mostly share it. Raises BadRow as write
        does."""
        known = self.prompts.get(i)
        asked = (messages[:i], self.tools, date_of(self.tokenizer))
        if known is not None and known[0] == asked:
            return known[1]
        text = self.write(messages[:i], generation=True) if i > 0 else ""
        if i < _REMEMBERED:
            self.prompts[i] = (asked, text)
        return text

    def layout(self, messages: Sequence[Message], generation: bool, text: str | None = None) -> Layout:
        """The rendering and the places of its texts. text: the rendering, where it is known. Raises BadRow when the
        template refuses."""
        text = self.write(messages, generation) if text is None else text
        layout = self._marked(messages, generation, text, range(len(messages)))
        if layout is None:  # the template looks at how some text begins or ends
            parts = [self._alone(messages, generation, text, i) for i in range(len(messages))]
            repeated = frozenset().union(*(part.repeated for part in parts))
            layout = Layout(text, tuple(part.places[i] for i, part in enumerate(parts)), repeated)
        return layout

    def end(self, layout: Layout, messages: Sequence[Message], i: int, start: int) -> Turn:
        """The end of assistant message i, whose emission begins at `start` or later. Raises BadRow when it
        cannot be told."""
        text, stop, last = layout.text, layout.after(i), i == len(messages) - 1
        said_end = max(layout.region(i)[1], start)
        if messages[i].get("tool_calls"):
            # before a message that says nothing the end that is found could be that message's own
            ends = [self.habits.last_end] if last or layout.places[i + 1] else []
            for end in [*ends, self.habits.call_end]:
                at = text.find(end, said_end, stop)
                if end and at >= 0:
                    return Turn(i, start, at, at, at + len(end))
            raise BadRow(
                "template",
                f"message {i + 1}: the chat template writes no end after a tool call "
                f"({quote(text[said_end:stop])}); use another chat template, or give the message weight 0",
            )
        content, wanted = messages[i]["content"], self.habits.last_end if last else self.habits.history_end
        if content.strip():
            found = re.compile(r"\s*" + re.escape(wanted)).match(text, said_end, stop)
        else:  # only template text stands before the end
            found = re.compile(re.escape(wanted)).search(text, said_end, stop)
        blank = content[len(content.rstrip()) :]
        if content.strip() and text.startswith(blank, said_end):
            said_end += len(blank)
        elif not content.strip():
            nothing = max(start, len(text.rstrip())) if last else start
            said_end = found.end() - len(wanted) if found and wanted else nothing
        if not (found and wanted):
            return Turn(i, start, said_end, said_end, said_end, wanted if last else "")
        end_start = found.end() - len(wanted)
        return Turn(i, start, min(said_end, end_start), end_start, found.end())

    def start(self, layout: Layout, messages: Sequence[Message], i: int) -> tuple[int, list[str]]:
        """Where generation would begin message i, and findings. Raises BadRow when it cannot be told."""
        text, floor = layout.text, layout.before(i)
        starts = [place[0] for place in layout.places[i]]
        known = [start for start in starts if start is not None]
        first = min(known, default=None) if len(known) == len(starts) else None
        stop = layout.region(i)[1] if starts else layout.after(i)
        opening = self.habits.generation
        prompt = self.prompt(messages, i)
        if prompt and text.startswith(prompt) and floor <= len(prompt) <= stop:
            start = len(prompt)
            if not (opening.strip() and first is not None and text.startswith(opening, start, first)):
                return start, []
            start += len(opening)  # the template writes a header here that it forgets for generation
            return start, [f"context: message {i + 1}: {quote(opening)} stands there, and not where generation begins"]
        if prompt:
            opening = prompt[len(_common(prompt, self.write(messages[:i], generation=False))) :]
        region = text[floor : first if first is not None else stop]
        lead = next((lead for lead in _leads(opening) if lead in region), "")
        if lead:
            start = floor + region.index(lead) + len(lead)
        elif first is not None and (not prompt or (not opening and prompt.endswith(region.rstrip()))):
            start = first
        else:
            raise BadRow(
                "template",
                f"message {i + 1}: the chat template does not extend what it rendered before "
                f"(before: {quote(prompt)}, after: {quote(text[: layout.after(i)])}); use another chat template",
            )
        if not prompt:
            return start, []
        if lead != opening:
            why = f"{quote(text[floor:start])} stands where generation begins after {quote(opening)}"
        else:
            why = "the chat template has rewritten the messages before it since"
        return start, [f"context: message {i + 1}: {why}"]

    def _marked(
        self, messages: Sequence[Message], generation: bool, text: str, which: Iterable[int], starts: bool = True
    ) -> Layout | None:
        """Places of the texts of the messages in `which`; None when the marks change anything else."""
        free = _unused(text)
        pairs: list[tuple[int, str, str]] = []

        def mark(i: int, said: str) -> str:
            core = said.strip()
            if not core or i not in which:
                return said
            pairs.append((i, next(free), next(free)))
            at = said.index(core)
            return said[:at] + (pairs[-1][1] if starts else "") + core + pairs[-1][2] + said[at + len(core) :]

        with_marks = [map_texts(message, lambda said, i=i: mark(i, said)) for i, message in enumerate(messages)]
        at: dict[str, int] = {}
        repeated = set()
        if pairs:
            try:
                marked = self.write(with_marks, generation)
            except BadRow:
                return None
            marks = _any_of([mark for _, *both in pairs for mark in both])
            if marks.sub("", marked) != text:
                return None
            for number, found in enumerate(marks.finditer(marked)):
                if found.group() in at:
                    repeated.add(found.group())
                at.setdefault(found.group(), found.start() - number)
        places: list[list[Place]] = [[] for _ in messages]
        for i, first, last in pairs:
            places[i].append((at.get(first), at.get(last)))
        return Layout(text, tuple(map(tuple, places)), frozenset(i for i, _, last in pairs if last in repeated))

    def _alone(self, messages: Sequence[Message], generation: bool, text: str, i: int) -> Layout:
        for starts in (True, False):
            layout = self._marked(messages, generation, text, [i], starts)
            if layout is not None:
                return layout
        # the template looks at both ends of this text: it stands where it can be read, if only there
        places = [
            (text.index(said), text.index(said) + len(said)) if text.count(said) == 1 else (None, None)
            for said in texts_of(messages[i])
        ]
        return Layout(text, tuple(tuple(places) if j == i else () for j in range(len(messages))))

    def _form(self, message: Message) -> Message:
        """A message as this template takes it."""
        message = {key: value for key, value in message.items() if key != "weight"}
        if "tool_calls" in message:
            message["content"] = message["content"] or self.habits.no_text
            if self.habits.arguments_as_text:
                as_text = [(call, json_of(call["function"]["arguments"])) for call in message["tool_calls"]]
                message["tool_calls"] = [c | {"function": c["function"] | {"arguments": a}} for c, a in as_text]
        return message


class Starts:
    """Where generation would begin the answers of a conversation.

    Each is proved by a rendering of what stands before it. Of many answers, which would take the square of their
    number, only those at doubling distances are, and the last one: one between two of them begins as they do where the
    template writes the same before it as before both.
    """

    def __init__(self, template: Template, layout: Layout, messages: Sequence[Message], answers: Sequence[int]):
        self._template, self._layout, self._messages = template, layout, messages
        many = len(answers) > _PROVED
        proved = [0, *(2**n for n in range(len(answers).bit_length())), len(answers) - 1]
        self._proved = [answers[n] for n in sorted(set(proved)) if n < len(answers)] if many else list(answers)
        self._found: dict[int, tuple[int, list[str]]] = {}

    def of(self, i: int) -> tuple[int, list[str]]:
        """The start of message i, and findings. Raises BadRow when it cannot be told."""
        at = bisect_left(self._proved, i)
        if self._proved[at] == i:
            return self._by_rendering(i)
        own = self._before(i)
        ways = {self._way(other) for other in self._proved[at - 1 : at + 1]}
        (before, begun), *others = ways
        if others or own is None or own != before or begun is None:
            return self._by_rendering(i)
        return self._layout.before(i) + begun, []

    def _by_rendering(self, i: int) -> tuple[int, list[str]]:
        if i not in self._found:
            self._found[i] = self._template.start(self._layout, self._messages, i)
        return self._found[i]

    def _before(self, i: int) -> tuple[str, str] | None:
        """Who speaks before message i, and what the template writes between the two; None where it cannot be told."""
        places = self._layout.places[i]
        starts = [start for start, _ in places if start is not None]
        if not starts or len(starts) < len(places):
            return None
        return self._messages[i - 1]["role"], self._layout.text[self._layout.before(i) : min(starts)]

    def _way(self, i: int) -> tuple[tuple[str, str] | None, int | None]:
        """How a proved answer begins: what stands before it, and how much of that before its start."""
        start, findings = self._by_rendering(i)
        return self._before(i), None if findings else start - self._layout.before(i)


_DAYS: WeakKeyDictionary[Tokenizer, str] = WeakKeyDictionary()


def fix_date(tokenizer: Tokenizer, day: str | None) -> None:
    """Let its template take this day (2026-11-30, at midnight) for today, or None: the day it is."""
    if day is not None:
        _DAYS[tokenizer] = day


def date_of(tokenizer: Tokenizer) -> str | None:
    """The day that its template takes for today, if one was fixed."""
    return _DAYS.get(tokenizer)


def asks_for_date(tokenizer: Tokenizer) -> bool:
    """Whether its template may write what day it is, as Llama 3.2's does."""
    return "strftime_now" in str(tokenizer.chat_template)


@lru_cache(maxsize=16)
def _habits(tokenizer: Tokenizer, template: str, eos: str | None) -> tuple[Habits, Prompts]:  # noqa: ARG001
    """What is known of a template; the arguments are what that depends on."""
    return _learnt(tokenizer), {}


def _learnt(tokenizer: Tokenizer) -> Habits:
    """What the template does around words that it cannot know. A probe that it refuses teaches nothing."""
    ask, reply, more = (chr(_PRIVATE + n) for n in range(3))
    user, answer = {"role": "user", "content": ask}, {"role": "assistant", "content": reply}

    def probe(messages: list[Message], generation: bool = False, habits: Habits | None = None) -> str:
        try:
            return Template(tokenizer, None, habits or Habits(), {}).write(messages, generation)
        except BadRow:
            return ""

    prompt, whole = probe([user], generation=True), probe([user, answer])
    opening = prompt[len(_common(prompt, probe([user]))) :]
    before, last = whole.partition(ask)[0], whole.partition(reply)[2]
    middle = probe([user, answer, {"role": "user", "content": more}]).partition(reply)[2].partition(more)[0]
    last_end = history_end = _common(last, middle).strip()
    if not last_end and last.strip():  # the two ends differ
        ends = [_MARKER.match(tail.strip()) for tail in (last, middle)]
        last_end, history_end = (end.group() if end else "" for end in ends)
    elif not last_end:  # the last turn is left open: its end is what stands before a user's header in the middle only
        header = 0
        while header < min(len(before), len(middle)) and before[-header - 1] == middle[-header - 1]:
            header += 1
        last_end = history_end = middle[: len(middle) - header].strip()
    learnt = Habits(opening, last_end, history_end)
    call = {"id": "call00001", "type": "function", "function": {"name": reply, "arguments": {"a": more}}}
    called = [{"role": "user", "content": "x"}, {"role": "assistant", "content": "", "tool_calls": [call]}]
    result = {"role": "tool", "name": reply, "tool_call_id": "call00001", "content": ask}
    for no_text, as_text in (("", False), (None, False), ("", True), (None, True)):
        habits = replace(learnt, no_text=no_text, arguments_as_text=as_text)
        whole = probe(called, habits=habits)
        if reply in whole and more in whole:
            last, middle = (text.partition(more)[2] for text in (whole, probe([*called, result], habits=habits)))
            shared = _common(last, middle) if middle else last
            ends = [last_end] if last_end and last_end in shared else _MARKER.findall(shared)
            return replace(habits, call_end=ends[-1] if ends else "")
    return learnt


# ---- messages ----


def tidy(messages: Iterable[Message]) -> list[Message]:
    """Copies with a content, without fields that are null or empty lists, arguments of calls parsed."""
    out = []
    for message in messages:
        message = {key: value for key, value in message.items() if value is not None and value != []}
        message.setdefault("content", "")
        if "tool_calls" in message:
            given = [(call, call["function"].get("arguments") or {}) for call in message["tool_calls"]]
            message["tool_calls"] = [c | {"function": c["function"] | {"arguments": _parsed(a)}} for c, a in given]
        out.append(message)
    return out


def map_texts(message: Message, change: Callable[[str], str]) -> Message:
    """The message with change(text) for each text that it says, in its calls too; keys, ids and roles stay."""

    def leaves(value: object) -> Any:
        if isinstance(value, str):
            return change(value)
        if isinstance(value, dict):
            return {key: leaves(item) for key, item in value.items()}
        return [leaves(item) for item in value] if isinstance(value, list) else value

    message = {key: leaves(value) if key in _SAID else value for key, value in message.items()}
    if "tool_calls" in message:
        message["tool_calls"] = [call | {"function": leaves(call["function"])} for call in message["tool_calls"]]
    return message


def texts_of(message: Message) -> list[str]:
    """Each text that a message says and that is not blank, without the white space around it."""
    out: list[str] = []

    def keep(text: str) -> str:
        out.append(text.strip())
        return text

    map_texts(message, keep)
    return [text for text in out if text]


def check_said(layout: Layout, messages: Sequence[Message], i: int) -> list[str]:
    """Findings. Raises BadRow unless everything that message i says stands in the rendering, but for white space."""
    findings = []
    for said, (start, end) in zip(texts_of(messages[i]), layout.places[i], strict=True):
        begin = layout.before(i) if start is None else start
        stands = layout.text[begin : begin if end is None else end]
        if stands == said or (start is None and stands.endswith(said)) or stands == json_of([said])[2:-2]:
            continue
        squeezed, wanted = "".join(stands.split()), "".join(said.split())
        if end is None or not (squeezed.endswith(wanted) if start is None else squeezed == wanted):
            raise BadRow(
                "template",
                f"message {i + 1}: the chat template {'drops' if end is None else 'rewrites'} what it says (said: "
                f"{quote(said)}, rendered: {quote(layout.text[layout.before(i) : layout.after(i)])}); use another chat "
                "template, give reasoning in the field that it reads (reasoning_content in most), or weight 0",
            )
        findings.append(f"white_space: the chat template changes it within message {i + 1}")
    return findings


def quote(text: str) -> str:
    """A text for a message in one line, its middle left out when it is long."""
    return repr(text if len(text) <= 120 else text[:40] + "..." + text[-77:])


def json_of(value: object) -> str:
    """JSON with all letters as they are; a string as it stands."""
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def _parsed(arguments: object) -> Any:
    try:
        return json.loads(arguments) if isinstance(arguments, str) else arguments
    except ValueError:
        return arguments


def _unused(text: str) -> Iterator[str]:
    """Characters that stand nowhere in the text and mean nothing to a template."""
    used = {c for c in set(text) if ord(c) >= _PRIVATE}
    yield from (chr(n) for n in range(_PRIVATE, 0x110000) if chr(n) not in used)
    raise BadRow("template", "the conversation holds too many texts (arguments of tool calls count too); split it")


def _any_of(characters: Sequence[str]) -> re.Pattern[str]:
    """Matches one of these, which ascend; as runs, since each would be compared with every character of a text."""
    runs: list[list[str]] = []
    for c in characters:
        if runs and ord(runs[-1][1]) == ord(c) - 1:
            runs[-1][1] = c
        else:
            runs.append([c, c])
    return re.compile(f"[{''.join(f'{first}-{last}' for first, last in runs)}]")


def _common(a: str, b: str) -> str:
    """What two texts begin with; a marker that only begins alike is left out."""
    n = 0
    while n < min(len(a), len(b)) and a[n] == b[n]:
        n += 1
    return _whole(a[:n])


def _whole(text: str) -> str:
    return re.sub(r"[<\[][^<>\[\]\s]*$", "", text)


def _leads(opening: str) -> Iterator[str]:
    """Beginnings of a generation prompt, the longest first, that cut no marker and are not blank."""
    for n in range(len(opening), 0, -1):
        if opening[:n].strip() and _whole(opening[:n]) == opening[:n]:
            yield opening[:n]
