"""Forms of conversations in other clothes: content in blocks, OpenAI's preference format, HH's transcripts."""

from __future__ import annotations

from collections.abc import Iterator

from align.data.forms.base import Form, given, listed, single, string, transcript, unanswered
from align.data.sources import BadRow
from align.jsons import Json

_TEXT = ("text", "input_text", "output_text")
_KEPT = ("name", "tool_calls", "tool_call_id", "reasoning_content", "reasoning", "weight")  # of a message
_CONVERSATIONS = ("messages", "conversations", "prompt", "chosen", "rejected", "completion")


def plain(value: object, name: str) -> list[Json]:
    """Messages whose content is text: blocks of text joined, of tools as tool_calls and messages of the role tool.

    value: messages, or one. Raises BadRow for images and other blocks that are no text.
    """
    messages = [value] if isinstance(value, dict) else listed(value, name)
    if messages and all(isinstance(m, dict) and "type" in m and "role" not in m for m in messages):
        messages = [{"role": "assistant", "content": messages}]  # an answer that is its blocks alone
    return [made for i, m in enumerate(messages, 1) for made in _message(m, f"message {i} of {name}")]


def _message(message: object, where: str) -> Iterator[Json]:
    if not isinstance(message, dict) or not {"role", "from"} & message.keys():
        raise BadRow("wrong_type", f"{where} must be an object with role and content")
    role, content = message.get("role", message.get("from")), message.get("content", message.get("value"))
    kept = {key: message[key] for key in _KEPT if message.get(key) not in (None, [])}
    if not isinstance(content, list):
        yield {"role": role, "content": content, **kept}
        return
    # an assistant's blocks are pieces of what it said in one go, a user's stand for themselves
    joint = "" if role == "assistant" else "\n\n"
    texts: list[str] = []
    thoughts: list[str] = []
    calls: list[Json] = []
    for block in content:
        kind = block.get("type") if isinstance(block, dict) else None
        if isinstance(block, str):
            texts.append(block)
        elif kind in _TEXT:
            texts.append(string(block.get("text"), f"text of {where}"))
        elif kind == "thinking":
            thoughts.append(string(block.get("thinking"), f"thinking of {where}"))
        elif kind == "tool_use":
            function = {"name": block.get("name"), "arguments": block.get("input") or {}}
            calls.append({"id": block.get("id"), "type": "function", "function": function})
        elif kind == "tool_result":
            if texts:  # what was said before the result
                yield {"role": role, "content": joint.join(texts)}
                texts = []
            yield _result(block, where)
        else:
            raise BadRow("block", f"{where} holds a block of type {kind!r}; only text and tools are learnt")
    if thoughts:
        kept["reasoning_content"] = "".join(thoughts)
    if calls:
        kept["tool_calls"] = [*kept.get("tool_calls", ()), *calls]
    if texts or calls or thoughts or not content:
        yield {"role": role, "content": joint.join(texts), **kept}


def _result(block: Json, where: str) -> Json:
    inside = block.get("content")
    content = next(iter(_message({"role": "tool", "content": inside or ""}, f"a tool_result in {where}")))["content"]
    return {"role": "tool", "tool_call_id": block.get("tool_use_id"), "content": content}


def _said(value: object, name: str) -> object:
    return value if isinstance(value, str) else plain(value, name)


def _tools(tools: object) -> object:
    """Descriptions of tools with input_schema as those with function.parameters; others as they are."""
    if not isinstance(tools, list):
        return tools
    return [_tool(tool) if isinstance(tool, dict) and "input_schema" in tool else tool for tool in tools]


def _tool(tool: Json) -> Json:
    said = {key: tool[key] for key in ("name", "description") if tool.get(key) is not None}
    return {"type": "function", "function": said | {"parameters": tool["input_schema"]}}


def _blocks(row: Json) -> Json:
    made: Json = {}
    for name in _CONVERSATIONS:
        if row.get(name) is not None:
            made[name] = _said(row[name], name)
    if not made:
        raise BadRow("missing_field", f"none of {', '.join(_CONVERSATIONS)} is there; the row has {', '.join(row)}")
    if row.get("system") is not None:
        made["system"] = plain({"role": "system", "content": row["system"]}, "system")[0]["content"]
    if row.get("tools") is not None:
        made["tools"] = _tools(row["tools"])
    return made


def _preferred(row: Json) -> Json:
    asked = given(row, "input")
    inside = asked if isinstance(asked, dict) else {"messages": asked}
    made = {"prompt": _said(given(inside, "messages"), "input"), "tools": _tools(inside.get("tools"))}
    for name, column in (("chosen", "preferred_output"), ("rejected", "non_preferred_output")):
        made[name] = _said(given(row, column), column)
    return made


def _hh(row: Json) -> Json:
    sides = {name: string(given(row, name), name) for name in ("chosen", "rejected")}
    turns = {name: transcript(text) for name, text in sides.items()}
    if None not in turns.values():
        return dict(turns)
    prompt = row.get("prompt")
    asked = transcript(prompt) if isinstance(prompt, str) else None
    if asked is None or any(turns.values()):
        wrong = next(name for name, found in turns.items() if found is None)
        raise BadRow(
            "wrong_type", f"{wrong} must be a transcript, which begins with Human: and goes on with Assistant:"
        )
    return {
        "prompt": unanswered(asked),
        **{name: text.strip().removeprefix("Assistant:").strip() for name, text in sides.items()},
    }


_ASKED = {"role": "user", "content": "Name a fish."}
_CALL = {"type": "tool_use", "id": "a", "name": "pick", "input": {"kind": "fish"}}
_GIVEN = {"type": "tool_result", "tool_use_id": "a", "content": [{"type": "text", "text": "cod"}]}

FORMS = (
    Form(
        "hh",
        'transcripts "Human: ... Assistant: ...", whose common turns are the prompt: HH-RLHF',
        (
            {
                "chosen": "\n\nHuman: Name a fish.\n\nAssistant: Cod.",
                "rejected": "\n\nHuman: Name a fish.\n\nAssistant: Oak.",
            },
        ),
        ("prompt", "chosen", "rejected"),
        single(_hh),
    ),
    Form(
        "openai",
        "input with messages and tools, preferred_output and non_preferred_output: OpenAI's preference format",
        (
            {
                "input": {"messages": [_ASKED], "tools": [], "parallel_tool_calls": True},
                "preferred_output": [{"role": "assistant", "content": "Cod."}],
                "non_preferred_output": [{"role": "assistant", "content": "Oak."}],
            },
        ),
        ("input", "preferred_output", "non_preferred_output"),
        single(_preferred),
    ),
    Form(
        "blocks",
        "messages whose content is a list of blocks: text, thinking, tool_use, tool_result: Anthropic's messages",
        (
            {
                "messages": [
                    _ASKED,
                    {"role": "assistant", "content": [{"type": "text", "text": "I look."}, _CALL]},
                    {"role": "user", "content": [_GIVEN]},
                    {"role": "assistant", "content": [{"type": "text", "text": "Cod."}]},
                ]
            },
        ),
        (*_CONVERSATIONS, "system", "tools"),
        single(_blocks),
    ),
)
