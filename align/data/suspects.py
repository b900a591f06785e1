"""What is learnt must be what the assistant said: headers of roles, prompts and JSON of messages inside an answer.

A header counts where a line begins and outside of fenced code; prose that speaks of one is left alone. What no answer
says of itself is refused; what an answer may say, such as a dialogue that was asked for, is a doubt, which is
refused where more than a few rows have it.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence

from align.data.formats import Dialogue, Record
from align.data.shapes import repeats, written_messages
from align.data.sources import BadRow

_FENCED = re.compile(r"```.*?(?:```|\Z)", re.DOTALL)
# What chat templates write before a role's turn; prose names the token, and no new line follows it there.
_MARKER = re.compile(
    r"<\|im_start\|>\s?(?:system|user|assistant|tool)[ \t]*\n"
    r"|<\|start_header_id\|>(?:system|user|assistant|tool|ipython)<\|end_header_id\|>[ \t]*\n"
    r"|<start_of_turn>(?:user|model)[ \t]*\n"
    r"|^[ \t]*<\|(?:system|user|assistant)\|>[ \t]*(?:\n|$)|\A\s*<\|(?:user|assistant|start_header_id|im_start)\|>"
    r"|(?:\A|<s>)\s*\[INST\]|\A\s*\[/INST\]|^\[INST\].*\[/INST\]",
    re.MULTILINE,
)
_USER = r"Human|HUMAN|User|USER"
_ASSISTANT = r"Assistant|ASSISTANT|GPT|Chatbot|AI|Bot"
_LINE = r"^[ \t]*(?:\*\*)?(?:{})(?:\*\*)?:"
_ASKED = re.compile(_LINE.format(_USER) + r"|^#{2,4} ?(?:Instruction|Human|User|Input|Question)\b:?", re.MULTILINE)
_ANSWERED = re.compile(_LINE.format(_ASSISTANT) + r"|^#{2,4} ?(?:Response|Assistant|Answer)\b:", re.MULTILINE)
_BEGINS = re.compile(rf"\s*(?:{_USER}|Assistant|ASSISTANT|GPT|### ?(?:Response|Assistant|Human|User|Instruction)):")
_NEW_TURN = re.compile(r"\n\s*\n(?:Human|### ?(?:Instruction|Human|User)):")
_OPEN = re.compile(r"(?:^|\n)\s*(?:Assistant|ASSISTANT|GPT|### ?(?:Response|Assistant)):?\s*\Z")


def check(record: Record) -> str:
    """A doubt about what is learnt of a row, "" for none. Raises BadRow for what nobody says."""
    doubt = ""
    for name, side in record.sides.items():
        if not isinstance(side, Dialogue):
            continue
        _refuse_transcript(name, side)
        for said in _targets(side):
            if written_messages(said) is not None:
                raise BadRow(
                    "json_text",
                    f"{name} is the text of a list of messages; give the list itself, or all texts of the row alike",
                )
            prose = _FENCED.sub("", said)
            marker = _MARKER.search(prose)
            if marker:
                raise BadRow(
                    "role_header",
                    f"{name} holds {marker.group().strip()!r}, which a chat template writes before a turn: give "
                    "messages, or cut the answer before it",
                )
            doubt = doubt or _doubt(name, prose)
    return doubt or _repeated(record)


def refuse_open(prompt: str) -> None:
    """Raises BadRow for a prompt that is a transcript with an open answer, or that a chat template has written: neither
    is one message."""
    marker = _MARKER.search(_FENCED.sub("", prompt))
    if marker:
        raise BadRow(
            "role_header",
            f"the prompt holds {marker.group().strip()!r}, which a chat template has written; this model's would "
            "stand around it; give messages, or use data.text=plain to learn it as it stands",
        )
    opened = _OPEN.search(prompt)
    if opened:
        raise BadRow(
            "role_header",
            f"the prompt ends with {opened.group().strip()!r}, a role's header, and would become one message of the "
            "user; use data.form=hh where it is a transcript, or data.text=plain to learn it as it stands",
        )


def _refuse_transcript(name: str, side: Dialogue) -> None:
    """Raises BadRow for a text that nobody has taken apart and that holds both roles' turns, and for one whose turns
    go on in the answer."""
    if not isinstance(side.prompt, str) or not isinstance(side.completion, str):
        return
    whole = side.prompt + side.completion
    headed = _ASKED.search(side.completion) or (side.whole and _ASKED.search(side.prompt))
    if headed and _ASKED.search(side.prompt + "\n") and _ANSWERED.search(whole):
        raise BadRow(
            "role_header",
            f"{name} is a transcript: {headed.group().strip()!r} begins a turn; use data.form=hh, which takes the "
            "turns apart, or give messages",
        )


def _targets(side: Dialogue) -> Iterator[str]:
    if isinstance(side.completion, str):
        yield side.completion
        return
    for message in side.completion:
        if message["role"] == "assistant" and message.get("weight", 1) != 0:
            yield message.get("content") or ""


def _doubt(name: str, said: str) -> str:
    found = _BEGINS.match(said) or _NEW_TURN.search(said)
    if found is None and _ANSWERED.search(said):
        found = _ASKED.search(said)
    if found is None:
        return ""
    return (
        f"{name} holds the role header {found.group().strip()!r}, so that more is learnt than the assistant said: cut "
        "it out, or use data.form=hh where the texts are transcripts"
    )


def _repeated(record: Record) -> str:
    """Of a row whose prompt is a text that some of its answers repeat; where all do it is taken off."""
    for name, side in record.sides.items():
        texts: Sequence[object] = (side.prompt, side.completion) if isinstance(side, Dialogue) else ()
        prompt, said = texts if len(texts) == 2 else ("", "")
        if isinstance(prompt, str) and isinstance(said, str) and repeats(prompt, said):
            return f"{name} begins with the prompt, which would be learnt as an answer: take it off"
    return ""
