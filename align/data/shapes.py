"""Rows as they come to rows in the fields of formats.py, where no setting is needed to tell what they mean.

Messages written otherwise, messages as text, one message for a list, null columns, a system column, a prompt that is
repeated. What cannot be told stays as it came: formats.py refuses it, unread.py tells of it.
"""

from __future__ import annotations

import ast
import json
from collections.abc import Callable
from contextlib import suppress
from typing import Any

from align.data.sources import BadRow
from align.jsons import Json

# Fields that decide what a row is: a null in one of them is a column that other rows fill.
_CONVERSATIONS = ("prompt", "chosen", "rejected", "completion", "messages", "prompt_chosen", "prompt_rejected")
_DECIDING = (*_CONVERSATIONS, "conversations", "conversation", "ranked", "label", "text", "system", "tools")
_DECIDED = (*_DECIDING, "token_ids", "spans", "score_chosen", "score_rejected")
_ROLES = {
    **{role: role for role in ("system", "user", "assistant", "tool")},  # in capital letters too
    "human": "user",
    "prompter": "user",
    "developer": "system",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "bing": "assistant",
    "bard": "assistant",
    "claude": "assistant",
    "chatbot": "assistant",
    "bot": "assistant",
    "ai": "assistant",
    "model": "assistant",
    "observation": "tool",
    "function_response": "tool",
    "function_call": "assistant",  # what it says is the call
}
_ROLE, _SAID = ("role", "from", "speaker", "author", "sender"), ("content", "value", "text")
_WRITTEN = ("role", "from")  # in the text of messages: an answer may be an object that has an author


def shaped(row: Json) -> Json:
    """The row in our fields. Raises BadRow where two columns contradict each other."""
    out: Json = {name: value for name, value in row.items() if value is not None or name not in _DECIDED}
    for name in ("conversations", "conversation"):
        alone = not {"prompt", "chosen", "messages"} & out.keys()
        if name in out and (alone or ("messages" not in out and _opens(conversation(out[name])) is not None)):
            out["messages"] = out.pop(name)
    for name in _CONVERSATIONS:
        if name in out:
            out[name] = conversation(out[name])
    if isinstance(out.get("ranked"), list):
        out["ranked"] = [conversation(answer) for answer in out["ranked"]]
    if isinstance(out.get("label"), str) and out["label"].lower() in ("true", "false"):  # CSV has no other
        out["label"] = out["label"].lower() == "true"
    _put_messages(out)
    _put_prompt(out)
    _put_system(out)
    _take_repeated(out)
    _put_scores(out)
    _put_weight(out)
    return out


def conversation(value: object) -> Any:
    """Messages in our words, also from one message and from the text of a list; anything else as it is."""
    if isinstance(value, str):
        found = written_messages(value)
        return value if found is None else conversation(found)
    if isinstance(value, dict) and _is_message(value):
        columns = [value[name] for name in (*_ROLE, *_SAID) if name in value]
        if len(columns) == 2 and all(isinstance(c, list) for c in columns) and len({*map(len, columns)}) == 1:
            return conversation([dict(zip(value, said, strict=True)) for said in _rows(value, len(columns[0]))])
        return [_message(value)]
    if isinstance(value, list) and value and all(isinstance(part, dict) for part in value):
        return [_message(part) if _is_message(part) else part for part in value]
    return value


def is_conversation(value: object) -> bool:
    """Whether it is messages, in our words or in others that are read."""
    found = conversation(value)
    return isinstance(found, list) and bool(found) and all(isinstance(m, dict) and "role" in m for m in found)


def _rows(columns: Json, size: int) -> list[tuple[Any, ...]]:
    """Messages that came by columns, as data sets give a list of objects; a column that is no list of theirs says
    nothing."""
    parts = [part if isinstance(part, list) and len(part) == size else [None] * size for part in columns.values()]
    return list(zip(*parts, strict=True))


def written_messages(text: str) -> list[Json] | None:
    """The messages that a text of JSON holds, or one of Python's own; None for any other text."""
    begun = text.lstrip()[:1]
    if begun not in ("[", "{") or not any(f"{quote}{name}{quote}" in text for name in _WRITTEN for quote in "\"'"):
        return None
    readers: tuple[Callable[[str], Any], ...] = (json.loads, ast.literal_eval)
    for read in readers:
        with suppress(ValueError, SyntaxError, RecursionError, MemoryError):
            found = read(text.strip())
            listed = [found] if isinstance(found, dict) else found
            if (
                isinstance(listed, list)
                and listed
                and all(isinstance(m, dict) and _is_message(m, _WRITTEN) for m in listed)
            ):
                return listed
    return None


def _is_message(value: Json, roles: tuple[str, ...] = _ROLE) -> bool:
    return any(name in value for name in roles) and any(name in value for name in (*_SAID, "tool_calls"))


def _message(value: Json) -> Json:
    role = next(value[name] for name in _ROLE if name in value)
    said = next((name for name in _SAID if name in value), None)
    # data sets in columns fill each message up with null: two that say the same are to be equal
    rest = {k: v for k, v in value.items() if k not in (*_ROLE, said) and v not in (None, [])}
    out = {"role": _ROLES.get(role.lower(), role) if isinstance(role, str) else role}
    if said is not None:
        out["content"] = value[said]
    if role == "function_call":
        out |= {"content": "", "tool_calls": _calls(value[said] if said else None)}
    return out | rest


def _calls(said: object) -> list[Json]:
    """The calls that a turn of the role function_call says: one {"name", "arguments"} or a list of them."""
    found = said
    with suppress(ValueError):
        found = json.loads(said) if isinstance(said, str) else said
    calls = found if isinstance(found, list) else [found]
    if not calls or not all(isinstance(call, dict) and isinstance(call.get("name"), str) for call in calls):
        raise BadRow("tool_call", 'a turn of the role function_call must say {"name", "arguments"} as JSON')
    return [{"type": "function", "function": call} for call in calls]


# ---------------------------------------------------------------------- which field is which


def _opens(messages: object) -> str | None:
    """The role of the first message that is not the system's; None for what is no list of messages."""
    if not isinstance(messages, list) or not all(isinstance(m, dict) for m in messages):
        return None
    return next((m.get("role") for m in messages if m.get("role") != "system"), None)


def _ends(messages: Any) -> str | None:
    return messages[-1].get("role") if _opens(messages) is not None else None


def _user(text: str) -> list[Json]:
    return [{"role": "user", "content": text}]


def _answer(value: object) -> Any:
    return [{"role": "assistant", "content": value}] if isinstance(value, str) else value


def _put_messages(out: Json) -> None:
    """Messages beside answers are their prompt, or say again what other fields say; a prompt beside messages too."""
    messages: Any = out.get("messages")
    if _opens(messages) is None:
        return
    answer: Any = out.get("chosen", out.get("completion"))
    prompt: Any = out.get("prompt")
    if answer is None:
        asked = [m.get("content") for m in messages if m.get("role") == "user"]
        if (
            isinstance(prompt, str)
            and any(isinstance(a, str) and a.strip() == prompt.strip() for a in asked)
            or isinstance(prompt, list)
            and messages[: len(prompt)] == prompt
        ):
            del out["prompt"]
        return
    asked = _user(prompt) if isinstance(prompt, str) else prompt or []
    if messages in (answer, asked, [*asked, *(_answer(answer) if isinstance(_answer(answer), list) else ())]):
        del out["messages"]  # as the sets of the Zephyr recipe have it
    elif prompt is None and _ends(messages) != "assistant":
        out["prompt"] = out.pop("messages")
    elif prompt is None and messages[-1:] == _answer(answer):
        out["prompt"] = out.pop("messages")[:-1]


def _put_prompt(out: Json) -> None:
    """A text as the prompt of answers that are messages is the user's; a conversation that begins with the prompt
    holds the answer after it."""
    prompt = out.get("prompt")
    names = [name for name in ("chosen", "rejected", "completion") if name in out]
    if isinstance(prompt, str) and names and all(_opens(out[name]) == "assistant" for name in names):
        out["prompt"] = prompt = _user(prompt)
    completion: Any = out.get("completion")
    if _opens(completion) is None:
        return
    asked = _user(prompt) if isinstance(prompt, str) else prompt
    if isinstance(asked, list) and completion[: len(asked)] == asked and len(completion) > len(asked):
        out["prompt"], out["completion"] = asked, completion[len(asked) :]


def _put_system(out: Json) -> None:
    """A system column opens the conversation; beside a text it stays, for who renders it."""
    system = out.get("system")
    if isinstance(system, list) and len(system) == 1 and isinstance(system[0], dict):
        system = system[0].get("content")
    if not isinstance(system, str):
        return
    out["system"] = system
    places = [name for name in ("messages", "prompt", "prompt_chosen", "prompt_rejected") if name in out]
    places = places or [name for name in ("chosen", "rejected") if name in out]
    if not system.strip():
        del out["system"]
    elif places and all(_opens(out[name]) is not None for name in places):
        for name in places:
            out[name] = _opened(out[name], system)
        del out["system"]


def _opened(messages: list[Json], system: str) -> list[Json]:
    if messages[0].get("role") != "system":
        return [{"role": "system", "content": system}, *messages]
    if messages[0].get("content") != system:
        raise BadRow("two_systems", "the column system and the system message say two things; keep one of them")
    return messages


def _put_scores(out: Json) -> None:
    """Scores of both answers are numbers of the pair, and margin is their difference."""
    found = {name: out.pop(name) for name in ("score_chosen", "score_rejected") if name in out}
    if not found or not {"chosen", "rejected"} <= out.keys():
        out |= found
        return
    numbers = {name: number(value, name) for name, value in found.items()}
    if len(numbers) == 2:
        numbers["margin"] = numbers["score_chosen"] - numbers["score_rejected"]
    out["numbers"] = numbers | (out.get("numbers") or {})


def _put_weight(out: Json) -> None:
    """How often a row is drawn beside others is a number of it."""
    if "sampling_weight" not in out:
        return
    weight = number(out.pop("sampling_weight"), "the weight")
    if weight < 0:
        raise BadRow("wrong_type", f"the weight must be at least 0, found {weight:g}")
    out["numbers"] = (out.get("numbers") or {}) | {"weight": weight}


def number(value: object, name: str) -> float:
    """A number, also one that is written as text. Raises BadRow."""
    with suppress(TypeError, ValueError):
        found = float(value) if isinstance(value, (int, float, str)) and not isinstance(value, bool) else None
        if found is not None and abs(found) < 1e30:
            return found
    raise BadRow("wrong_type", f"{name} must be a finite number, found {value!r}")


# ---------------------------------------------------------------------- the prompt said twice


def repeats(prompt: str, text: str) -> bool:
    """Whether a text begins with the whole prompt, which has two words or more and ends where a word ends."""
    said = prompt.strip()
    begun = text.lstrip()
    if len(said.split()) < 2 or not begun.startswith(said):
        return False
    after = begun[len(said) : len(said) + 1]
    return not (after.isalnum() and said[-1].isalnum())


def _take_repeated(out: Json) -> None:
    """Answers that are texts without the prompt that all of them repeat."""
    prompt = out.get("prompt")
    names = [name for name in ("chosen", "rejected", "completion") if name in out]
    texts = [out[name] for name in names]
    if not isinstance(prompt, str) or not names or not all(isinstance(text, str) for text in texts):
        return
    if all(repeats(prompt, text) for text in texts):
        for name, text in zip(names, texts, strict=True):
            rest = text.lstrip()[len(prompt.strip()) :]
            # white space at the end of the prompt stands in the prompt, not in the answer
            out[name] = rest if prompt == prompt.rstrip() else rest.lstrip()
