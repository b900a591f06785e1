"""A row of a data file to a Record: the field's formats, and every reason for which a row is refused.

Knows JSON and roles; tokens and templates are chat.py's, what an objective wants of a record is examples.py's, the many
ways to write the same row are shapes.py's.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from align.data.margins import FIELDS
from align.data.shapes import shaped
from align.data.sources import BadRow
from align.data.template import REASONING
from align.jsons import Fields, Json
from align.types import Kind

Message = Json
_Tools = tuple[Fields, ...] | None
ROLES = ("system", "user", "assistant", "tool")


@dataclass(frozen=True)
class Dialogue:
    """A prompt and what was answered: texts, or messages of which the assistant's in `completion` are learnt."""

    prompt: str | tuple[Message, ...]
    completion: str | tuple[Message, ...]
    finished: bool = True  # false: cut off, no end of turn is learnt
    tools: tuple[Fields, ...] | None = None
    system: str = ""  # beside a prompt that is a text
    whole: bool = False  # one text that nobody has taken apart: prompt and completion are its beginning and its rest

    @property
    def question(self) -> str:
        """The plain prompt, or the last user message of it."""
        if isinstance(self.prompt, str):
            return self.prompt
        return next((m["content"] for m in reversed(self.prompt) if m["role"] == "user"), "")


@dataclass(frozen=True)
class Tokenised:
    """A conversation as a rollout left it: its tokens, and spans (role, start, end, target) that tile them."""

    token_ids: tuple[int, ...]
    spans: tuple[tuple[str, int, int, bool], ...]
    question: str
    finished: bool = True


@dataclass(frozen=True)
class Record:
    """A row, understood. sides: chosen and rejected of a pair; rank_1, rank_2, ... of a ranked list; else row."""

    kind: Kind
    sides: dict[str, Dialogue | Tokenised]
    origin: str = ""
    label: bool | None = None
    rationale: str | None = None
    numbers: dict[str, float] = field(default_factory=dict)
    by_component: Json = field(default_factory=dict)  # as they stand, for who reads them: margins.py
    unread: Json = field(default_factory=dict)  # fields that hold something and say nothing to a record of this kind
    shape: str = ""  # the fields that made it, and what they hold: of one file usually all the same


def parse(record: Json, open_tool_calls: bool = False) -> Record:
    """A row in one of the field's formats; the fields decide which.

    Pair: prompt, chosen, rejected as texts (no chat template), as lists of messages, or prompt as messages beside
    answers as texts; chosen and rejected alone, whose prompt is what they have in common at the beginning.
    Ranked: prompt and ranked, two or more answers, the best first.
    Labelled: label (true, false) with prompt and completion, or with messages.
    Single: messages (every assistant message is learnt), prompt and completion, or text.
    Each conversation may be {"token_ids", "spans"} instead. Optional: tools, origin, numbers, rationale, *_finished;
    of pairs margins, scores and weights by component. open_tool_calls: a last message may call tools. Raises BadRow.
    """
    record = shaped(record)
    tools = _tools(record.get("tools"))
    read: tuple[str, ...] = ("chosen", "rejected", "prompt", "chosen_finished", "rejected_finished")
    if "chosen" in record or "rejected" in record:
        kind: Kind = "pair"
        sides = _pair(record, tools, open_tool_calls)
    elif "ranked" in record:
        kind, read = "ranked", ("prompt", "ranked")
        sides = _ranked(record, tools, open_tool_calls)
    elif {"prompt_chosen", "prompt_rejected"} & record.keys():
        kind, read = "pair", ("prompt_chosen", "prompt_rejected", "completion", "finished")
        sides = _prompt_pair(record, tools, open_tool_calls)
    else:
        kind = "labelled" if "label" in record else "single"
        row, read = _single(record, tools, open_tool_calls)
        sides, read = {"row": row}, (*read, "finished", *(("label",) if kind == "labelled" else ()))
    label = record.get("label")
    if kind == "labelled" and not isinstance(label, bool):
        raise BadRow(
            "wrong_type",
            f"label must be true or false, found {json.dumps(label, default=str)}; use data.format=module.function "
            "to say which values are good",
        )
    return Record(
        kind,
        sides,
        _optional_text(record, "origin") or "",
        label if kind == "labelled" else None,
        _optional_text(record, "rationale"),
        _numbers(record.get("numbers")),
        {name: record[name] for name in FIELDS if record.get(name) is not None},
        _unread(record, read, sides),
        _shape(record, read),
    )


def _unread(record: Json, read: Sequence[str], sides: Mapping[str, Dialogue | Tokenised]) -> Json:
    """Fields that hold something and that nothing was taken from."""
    dialogues = [side for side in sides.values() if isinstance(side, Dialogue)]
    # a conversation in tokens was written with its tools
    also = {"tools"} if any(side.tools for side in dialogues) or len(dialogues) < len(sides) else set()
    also |= {"system"} if any(side.system for side in dialogues) else set()
    also |= {name for name in FIELDS if isinstance(record.get(name), dict)}
    known = {*read, *also, "origin", "rationale", "numbers"}
    return {name: value for name, value in record.items() if name not in known and value not in (None, "", [], {})}


def _shape(record: Json, read: Sequence[str]) -> str:
    """For people: prompt, chosen and rejected as messages."""
    names = [name for name in read if name in record and not name.endswith("finished") and name != "spans"]
    kinds = {str: "texts", list: "messages", dict: "tokens"}
    held = sorted({kinds[type(record[name])] for name in names if type(record[name]) in kinds and name != "token_ids"})
    return " and ".join(filter(None, (", ".join(names), ""))) + (f" as {' and '.join(held)}" if held else "")


# ---------------------------------------------------------------------- the three kinds


def _pair(record: Json, tools: _Tools, open_tool_calls: bool) -> dict[str, Dialogue | Tokenised]:
    for name in ("chosen", "rejected"):
        if name not in record:
            raise BadRow("missing_field", f"the field {name!r} is missing; a pair needs chosen and rejected")
    answers = [record[name] for name in ("chosen", "rejected")]
    if any(isinstance(answer, dict) and "token_ids" in answer for answer in answers):
        sides = {name: _tokenised(record[name], name) for name in ("chosen", "rejected")}
        beginnings = [side.token_ids[: _first_target(side)] for side in sides.values()]
        if beginnings[0] != beginnings[1]:
            raise BadRow("different_prompts", "chosen and rejected begin with other tokens; pair answers to one prompt")
        return dict(sides)
    prompt, chosen, rejected = _common(record)
    if chosen == rejected:
        raise BadRow("identical", "chosen and rejected are the same; remove the row or mend one of them")
    out: dict[str, Dialogue | Tokenised] = {}
    for name, completion in (("chosen", chosen), ("rejected", rejected)):
        side = _dialogue(name, prompt, completion, _finished(record, f"{name}_finished"), tools, open_tool_calls)
        out[name] = replace(side, system=_optional_text(record, "system") or "", whole=record.get("prompt") is None)
    return out


def _common(record: Json) -> tuple[Any, Any, Any]:
    """Prompt, chosen, rejected: all texts or all lists of messages."""
    prompt, chosen, rejected = record.get("prompt"), record["chosen"], record["rejected"]
    for name, value in (("prompt", prompt), ("chosen", chosen), ("rejected", rejected)):
        _check_type(name, value, optional=name == "prompt")
    if isinstance(prompt, list):  # an answer beside a conversation is the assistant's
        chosen, rejected = (_as_answer(c) for c in (chosen, rejected))
    if type(chosen) is not type(rejected):
        raise BadRow("wrong_type", "chosen and rejected must both be strings or both be lists of messages")
    if isinstance(chosen, list):
        if not isinstance(prompt, list):
            # chosen and rejected are whole conversations; a string beside them repeats one of their messages
            said = prompt
            for name, messages in (("chosen", chosen), ("rejected", rejected)):
                _check_opening(name, messages)
            prompt, chosen, rejected = _common_messages(chosen, rejected)
            users = [m["content"].strip() for m in prompt if m["role"] == "user"]
            if not users or (said is not None and said.strip() not in users):
                raise BadRow(
                    "different_prompts",
                    "chosen and rejected do not begin with the same user message"
                    + (", the one that the field prompt holds" if users else "")
                    + "; a pair is two answers to one prompt",
                )
        elif chosen[: len(prompt)] == prompt == rejected[: len(prompt)]:
            chosen, rejected = chosen[len(prompt) :], rejected[len(prompt) :]  # the prompt repeated in both
        return prompt, chosen, rejected
    if prompt is None:
        prompt, chosen, rejected = _common_text(chosen, rejected)
    return prompt, chosen, rejected


def _prompt_pair(record: Json, tools: _Tools, open_tool_calls: bool) -> dict[str, Dialogue | Tokenised]:
    """One answer to two prompts, the first of which it fits better (multi-instruction preference)."""
    out: dict[str, Dialogue | Tokenised] = {}
    for name in ("chosen", "rejected"):
        for key in (f"prompt_{name}", "completion"):
            if key not in record:
                raise BadRow(
                    "missing_field", f"the field {key!r} is missing; needed: prompt_chosen, prompt_rejected, completion"
                )
            _check_type(key, record[key])
        prompt, completion = record[f"prompt_{name}"], record["completion"]
        if isinstance(prompt, list):
            completion = _as_answer(completion)
        out[name] = _dialogue(name, prompt, completion, _finished(record, "finished"), tools, open_tool_calls)
    return out


def _ranked(record: Json, tools: _Tools, open_tool_calls: bool) -> dict[str, Dialogue | Tokenised]:
    listed = record["ranked"]
    if not isinstance(listed, list) or len(listed) < 2:
        raise BadRow("wrong_type", "ranked must be a list of two or more answers, the best first")
    if "prompt" not in record:
        raise BadRow("missing_field", "the field 'prompt' is missing; a ranked list needs prompt and ranked")
    out: dict[str, Dialogue | Tokenised] = {}
    for number, completion in enumerate(listed, 1):
        row = {name: record[name] for name in ("prompt", "system") if name in record} | {"completion": completion}
        out[f"rank_{number}"], _ = _single(row, tools, open_tool_calls)
    return out


def _single(record: Json, tools: _Tools, open_tool_calls: bool) -> tuple[Dialogue | Tokenised, tuple[str, ...]]:
    """The one conversation of a row, and the fields that hold it."""
    finished = _finished(record, "finished")
    if "token_ids" in record:
        return _tokenised(record, "the row"), ("token_ids", "spans", "messages")
    if "messages" in record:
        _check_type("messages", record["messages"])
        messages = record["messages"]
        if isinstance(messages, str):
            raise BadRow("wrong_type", "messages must be a list of messages, found str")
        first = next((i for i, m in enumerate(messages) if m["role"] == "assistant"), len(messages))
        dialogue = _dialogue("messages", messages[:first], messages[first:], finished, tools, open_tool_calls)
        return dialogue, ("messages",)
    if "text" in record:
        _check_type("text", record["text"])
        if not isinstance(record["text"], str):
            raise BadRow("wrong_type", "text must be a string, found list")
        return replace(_dialogue("text", "", record["text"], finished, None, False), whole=True), ("text",)
    for name in ("prompt", "completion"):
        if name not in record:
            raise BadRow(
                "missing_field",
                f"the field {name!r} is missing; a row needs chosen and rejected, messages, or prompt and completion",
            )
        _check_type(name, record[name])
    prompt, completion = record["prompt"], record["completion"]
    if isinstance(prompt, list):
        completion = _as_answer(completion)
    if type(prompt) is not type(completion):
        raise BadRow("wrong_type", "prompt and completion must both be strings or both be lists of messages")
    dialogue = _dialogue("completion", prompt, completion, finished, tools, open_tool_calls)
    return replace(dialogue, system=_optional_text(record, "system") or ""), ("prompt", "completion")


def _dialogue(
    name: str,
    prompt: Any,
    completion: Any,
    finished: bool,
    tools: _Tools,
    open_tool_calls: bool,
) -> Dialogue:
    if isinstance(completion, str):
        if not completion.strip():
            raise BadRow("empty_completion", f"{name} is empty; remove the row or write an answer")
        return Dialogue(prompt, completion, finished, tools)
    _check_order(name, prompt, completion)
    _check_tools(name, [*prompt, *completion], open_tool_calls)
    return Dialogue(tuple(prompt), tuple(completion), finished, tools)


def _tokenised(value: object, name: str) -> Tokenised:
    if not isinstance(value, dict) or not {"token_ids", "spans"} <= value.keys():
        raise BadRow("wrong_type", f"{name} must hold token_ids and spans, as the other conversation of the row does")
    ids, spans = value["token_ids"], value["spans"]
    if not isinstance(ids, list) or not ids or not all(type(i) is int and 0 <= i < 2**31 for i in ids):
        raise BadRow("wrong_type", f"token_ids of {name} must be a list of token numbers")
    at = 0
    out = []
    for span in spans if isinstance(spans, list) else []:
        if not isinstance(span, list) or [type(part) for part in span] != [str, int, int, bool]:
            raise BadRow("wrong_type", f"spans of {name} must be [role, start, end, target]: text, two numbers, true")
        if span[1] != at or span[2] < at:
            raise BadRow(
                "wrong_type", f"spans of {name} must be [role, start, end, target], each from the end of the last"
            )
        _check_text(f"spans of {name}", span[0])
        at = span[2]
        out.append((span[0], span[1], span[2], span[3]))
    if at != len(ids):
        raise BadRow("wrong_type", f"spans of {name} cover {at} of {len(ids)} tokens; they must tile them")
    if not any(target for *_, target in out) or out[0][3]:
        raise BadRow("no_target", f"{name} has no span the policy wrote, or nothing before it")
    messages = value.get("messages") or []  # only for reading
    if not isinstance(messages, list):
        raise BadRow("wrong_type", f"messages of {name} must be a list of messages, found {type(messages).__name__}")
    said = [m.get("content") for m in messages if isinstance(m, dict) and m.get("role") == "user"]
    question = next((text for text in said if isinstance(text, str)), "")
    return Tokenised(tuple(ids), tuple(out), question, value.get("finished") is not False)


def _first_target(side: Tokenised) -> int:
    return next(start for _, start, _, target in side.spans if target)


# ---------------------------------------------------------------------- what two conversations share


def _common_messages(chosen: list[Message], rejected: list[Message]) -> tuple[list, list, list]:
    n = 0
    while n < min(len(chosen), len(rejected)) and chosen[n] == rejected[n]:
        n += 1
    if n == len(chosen) == len(rejected):
        raise BadRow("identical", "chosen and rejected are the same; remove the row or mend one of them")
    while n > 0 and (n >= min(len(chosen), len(rejected)) or chosen[n - 1]["role"] == "assistant"):
        n -= 1
    return chosen[:n], chosen[n:], rejected[n:]


def _common_text(chosen: str, rejected: str) -> tuple[str, str, str]:
    """The common beginning up to the last white space: words are not cut."""
    n = 0
    while n < min(len(chosen), len(rejected)) and chosen[n] == rejected[n]:
        n += 1
    while n > 0 and not chosen[n - 1].isspace():
        n -= 1
    while n > 0 and chosen[n - 1] == " ":  # the space belongs to the word after it in most vocabularies
        n -= 1
    return chosen[:n], chosen[n:], rejected[n:]


def _as_answer(completion: object) -> Any:
    return [{"role": "assistant", "content": completion}] if isinstance(completion, str) else completion


# ---------------------------------------------------------------------- checks


def _check_type(name: str, value: object, optional: bool = False) -> None:
    if value is None and optional:
        return
    if not isinstance(value, (str, list)):
        found = "null" if value is None else type(value).__name__
        found += f" of {', '.join(map(str, value))}" if isinstance(value, dict) and value else ""
        raise BadRow("wrong_type", f"{name} must be a string or a list of messages, found {found}")
    if isinstance(value, str):
        _check_text(name, value)
    else:
        _check_messages(name, value)


def _check_messages(name: str, messages: Sequence[object]) -> None:
    if not messages:
        reason = "empty_prompt" if name == "prompt" else "empty_completion"
        raise BadRow(reason, f"{name} holds no message; add one or remove the row")
    for number, message in enumerate(messages, 1):
        where = f"message {number} of {name}"
        calls = isinstance(message, dict) and message.get("tool_calls")
        if not isinstance(message, dict) or "role" not in message or ("content" not in message and not calls):
            raise BadRow("wrong_type", f"{where} must be an object with role and content")
        if message["role"] not in ROLES:
            raise BadRow("unknown_role", f"{where} has role {message['role']!r}; use {', '.join(ROLES)}")
        content = message.get("content")
        if not isinstance(content, str) and not (content is None and calls):
            kind = "null" if content is None else type(content).__name__
            raise BadRow("wrong_type", f"content of {where} must be a string, found {kind}")
        for key in REASONING:
            if not isinstance(message.get(key, ""), str):
                raise BadRow("wrong_type", f"{key} of {where} must be a string, found {type(message[key]).__name__}")
        _check_text(where, json.dumps(message, ensure_ascii=False, default=str))
        weight = message.get("weight")
        if weight is not None and (
            isinstance(weight, bool) or not isinstance(weight, (int, float)) or not 0 <= weight < 1e6
        ):
            raise BadRow("wrong_type", f"weight of {where} must be a number of at least 0, found {weight!r}")
        if calls:
            _check_calls(where, message)


def _check_calls(where: str, message: Message) -> None:
    if message["role"] != "assistant":
        raise BadRow(
            "tool_call", f"{where} has tool_calls and role {message['role']!r}; only the assistant calls tools"
        )
    calls = message["tool_calls"]
    for call in calls if isinstance(calls, list) else [None]:
        function = call.get("function", call) if isinstance(call, dict) else None
        if not isinstance(function, dict) or not isinstance(function.get("name"), str):
            raise BadRow(
                "tool_call", f"tool_calls of {where} must be a list of objects with function.name and .arguments"
            )
        arguments = function.get("arguments", {})
        if isinstance(arguments, str):
            try:
                arguments = json.loads(arguments)
            except json.JSONDecodeError:
                raise BadRow(
                    "tool_call", f"{where}: the arguments of {function['name']} are not closed JSON; mend the call"
                ) from None
        if not isinstance(arguments, dict):
            raise BadRow("tool_call", f"{where}: the arguments of {function['name']} must be an object")


def _check_order(name: str, prompt: Sequence[Message], completion: Sequence[Message]) -> None:
    messages = [*prompt, *completion]
    roles = [message["role"] for message in messages]
    if roles.count("system") > 1:
        raise BadRow("two_systems", f"{name} has {roles.count('system')} system messages; join them into one")
    if "system" in roles[1:]:
        raise BadRow(
            "role_order", f"{name}: message {roles.index('system') + 1} is a system message; it must be the first"
        )
    _check_opening(name, messages)
    if prompt[-1]["role"] == "assistant":
        raise BadRow(
            "role_order",
            "the prompt ends with an assistant message; it must end with another role: use data.format=module.function "
            "to put it at the head of each answer",
        )
    if "user" not in roles:
        raise BadRow("empty_prompt", f"{name} has no user message; an answer needs a question")
    if not completion or completion[-1]["role"] != "assistant":
        raise BadRow("role_order", f"{name} must end with an assistant message")
    for number, (before, role) in enumerate(zip(roles, roles[1:], strict=False), 2):
        if role == before == "assistant":
            raise BadRow("role_order", f"{name}: message {number} is a second answer in a row; join the two")
    for number, message in enumerate(completion, len(prompt) + 1):
        if message["role"] == "assistant" and not message.get("tool_calls") and not message["content"].strip():
            raise BadRow("empty_completion", f"{name}: assistant message {number} is empty; remove the row or fill it")


def _check_opening(name: str, messages: Sequence[Message]) -> None:
    first = next((message["role"] for message in messages if message["role"] != "system"), None)
    if first == "assistant":
        raise BadRow(
            "assistant_first",
            f"{name} begins with an assistant message; put the user's before it, or give prompt as a list of messages",
        )


def _check_tools(name: str, messages: Sequence[Message], open_tool_calls: bool) -> None:
    """Every call has its result and every result its call."""
    waiting: list[str | None] = []  # ids of the calls without a result, None where the call has no id
    caller = 0
    for number, message in enumerate(messages, 1):
        if message["role"] == "tool":
            given = message.get("tool_call_id")
            if not waiting:
                raise BadRow(
                    "tool_result",
                    f"{name}: message {number} is a tool result without a call; put tool_calls into the "
                    "assistant message before it",
                )
            if given is not None and given not in waiting and None not in waiting:
                raise BadRow("tool_result", f"{name}: message {number} answers call {given!r}, which was not made")
            waiting.remove(given if given in waiting else None if None in waiting else waiting[0])
            continue
        if waiting:
            raise BadRow(
                "open_tool_call",
                f"{name}: message {caller} calls a tool and message {number} is no result; add the result or remove "
                "the call",
            )
        if message.get("tool_calls"):
            waiting = [call.get("id") for call in message["tool_calls"]]
            caller = number
    if waiting and not (open_tool_calls and caller == len(messages)):
        raise BadRow(
            "open_tool_call",
            f"{name}: the tool call of message {caller} has no result; add it, or set data.open_tool_calls=true if "
            "conversations may end in a call",
        )


def _tools(tools: object) -> tuple[Fields, ...] | None:
    if tools is None or tools == []:
        return None
    if isinstance(tools, str):  # data sets in columns keep them as JSON
        try:
            tools = json.loads(tools)
        except json.JSONDecodeError:
            raise BadRow("wrong_type", "tools is a string and no JSON; give a list of tool descriptions") from None
    if not isinstance(tools, list) or not all(isinstance(tool, dict) for tool in tools):
        raise BadRow("wrong_type", "tools must be a list of objects, each the description of a tool")
    _check_text("tools", json.dumps(tools, ensure_ascii=False, default=str))
    return tuple(tools)


def _finished(record: Json, key: str) -> bool:
    value = record.get(key)
    if value is not None and not isinstance(value, bool):
        raise BadRow("wrong_type", f"{key} must be true or false, found {type(value).__name__}")
    return value is not False


def _optional_text(record: Json, key: str) -> str | None:
    value = record.get(key)
    if not isinstance(value, (str, type(None))):
        raise BadRow("wrong_type", f"{key} must be a string, found {type(value).__name__}")
    _check_text(key, value or "")
    return value


def _numbers(value: Any) -> dict[str, float]:
    if value is None:
        return {}
    good = isinstance(value, dict) and all(
        isinstance(v, (int, float)) and not isinstance(v, bool) and abs(v) < 1e30 for v in value.values()
    )
    if not good:
        raise BadRow("wrong_type", "numbers must be an object of finite numbers")
    return {name: float(v) for name, v in value.items()}


def _check_text(name: str, text: str) -> None:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        raise BadRow("not_utf8", f"{name} holds half a surrogate pair; save the text as UTF-8") from None
