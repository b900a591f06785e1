"""What a template writes around the texts of conversations, learnt once for all conversations of a shape.

The shape of a conversation is all of it but what its messages say. One of each shape is taken apart as template.py and
chat.py do it, with a single character for each text. Another one of the shape is taken apart alike if its rendering is
that one's with its own texts in place of the characters, and if generation begins where it would there: both are
rendered and compared, so that a template which looks at what messages say is found out. What does not fit is taken
apart by itself.
"""

from __future__ import annotations

import re
from bisect import bisect_left
from collections.abc import Callable, Hashable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import accumulate

from align.data.sources import BadRow
from align.data.template import Message, Template
from align.jsons import Tokenizer

Region = tuple[int, int, str, int | None, bool]  # characters from, to; role, message, target
_PLAIN = {"role", "content", "weight"}  # what a message of a known shape holds
_MOST = 16  # messages of a conversation whose shape comes again
_SHAPES = 4096  # that are remembered
_TEXT = 0xF8000  # a character for each text, far from those that mark places


@dataclass(frozen=True)
class Drawn:
    """A rendering taken apart: who says what of it, and where tokens may not cross."""

    text: str
    regions: list[Region]  # without gaps, up to the last target
    borders: frozenset[int]
    append: str  # end of turn that the template leaves out
    notes: tuple[str, ...]


Draw = Callable[[Sequence[Message], str], Drawn]  # messages, their rendering; raises BadRow


@dataclass(frozen=True)
class Frame:
    """One conversation of a shape, taken apart."""

    drawn: Drawn
    parts: tuple[str, ...]  # of the template, around the texts
    at: tuple[int, ...]  # where the texts stand
    begins: tuple[tuple[int, int], ...]  # assistants' messages that are learnt, where generation would begin each

    @staticmethod
    def of(template: Template, messages: Sequence[Message], draw: Draw) -> Frame | None:
        """Of messages each of which says one character; None where a text stands elsewhere than in its turn, or once
        more, or where an answer does not begin where generation would."""
        try:
            text = template.write(messages, generation=False)
            drawn = draw(messages, text)
            said = [message["content"].strip() for message in messages]
            at = [text.find(one) for one in said if one]
            if any(text.count(one) != 1 for one in said if one) or sorted(at) != at:
                return None
            begins = []
            for _, _, role, i, target in drawn.regions:
                if target and role == "assistant" and i is not None:
                    prompt = template.prompt(messages, i)
                    if not prompt or not text.startswith(prompt):
                        return None
                    begins.append((i, len(prompt)))
        except BadRow:
            return None
        if any(one in note for note in drawn.notes for one in said if one):
            return None
        edges = [0, *(place + 1 for place in at)]
        parts = [text[start:end] for start, end in zip(edges, [*at, len(text)], strict=True)]
        return Frame(drawn, tuple(parts), tuple(at), tuple(begins))

    def around(self, template: Template, messages: Sequence[Message], text: str, said: Sequence[str]) -> Drawn | None:
        """A conversation that says `said` and has this rendering, taken apart; None where it does not fit."""
        whole = [self.parts[0]]
        for one, part in zip(said, self.parts[1:], strict=True):
            whole += one, part
        if "".join(whole) != text:
            return None
        grown = list(accumulate((len(one) - 1 for one in said), initial=0))

        def place(here: int) -> int:
            return here + grown[bisect_left(self.at, here)]

        for i, begin in self.begins:
            prompt = template.prompt(messages, i)
            if len(prompt) != place(begin) or not text.startswith(prompt):
                return None
        own = self.drawn
        regions = [(place(start), place(end), *who) for start, end, *who in own.regions]
        return replace(own, text=text, regions=regions, borders=frozenset(map(place, own.borders)))


class Frames:
    """Those of one template."""

    def __init__(self) -> None:
        self._known: dict[Hashable, Frame | None] = {}
        self._met: set[Hashable] = set()

    def drawn(
        self,
        template: Template,
        messages: Sequence[Message],
        text: str,
        control: re.Pattern[str],
        asked: Hashable,
        draw: Draw,
    ) -> Drawn:
        """A conversation and its rendering, taken apart as `draw` does it for what was asked. control: matches the
        texts of control tokens. Raises BadRow."""
        shape = _shape(template, messages, control)
        frame = None if shape is None else self._frame(template, messages, (shape, asked), draw)
        said = [core for message in messages if (core := message["content"].strip())] if frame else []
        found = frame.around(template, messages, text, said) if frame else None
        return found or draw(messages, text)

    def _frame(self, template: Template, messages: Sequence[Message], shape: Hashable, draw: Draw) -> Frame | None:
        if shape in self._known:
            return self._known[shape]
        if shape not in self._met:  # one that comes once is not worth it
            if len(self._met) < _SHAPES:
                self._met.add(shape)
            return None
        made = Frame.of(template, list(_standing_for(messages)), draw)
        self._known[shape] = made
        return made


@lru_cache(maxsize=16)
def frames_of(tokenizer: Tokenizer, template: str, eos: str | None, size: int) -> Frames:  # noqa: ARG001
    """The frames of a tokenizer's template; the arguments are what they depend on."""
    return Frames()


def _shape(template: Template, messages: Sequence[Message], control: re.Pattern[str]) -> Hashable | None:
    """All of a conversation but what it says; None for one that is taken apart by itself."""
    if template.tools or len(messages) > _MOST:
        return None
    shape = []
    for message in messages:
        said = message["content"]
        if not isinstance(said, str) or not message.keys() <= _PLAIN or control.search(said):
            return None
        core = said.strip()
        before = said.find(core)
        shape.append((message["role"], said[:before], bool(core), said[before + len(core) :], message.get("weight", 1)))
    return tuple(shape)


def _standing_for(messages: Sequence[Message]) -> Iterator[Message]:
    """The messages with one character in place of each text."""
    for i, message in enumerate(messages):
        said = message["content"]
        core = said.strip()
        at = said.find(core)
        text = said[:at] + chr(_TEXT + i) + said[at + len(core) :]
        yield message | {"content": text} if core else message
