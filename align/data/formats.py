"""A row of a preference file to a Pair: formats, and every reason for which a row is refused."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from align.data.chat import ROLES, Message, chat_row, prompt_ids, text_row
from align.data.sources import BadRow
from align.types import Pair, Row


@dataclass(frozen=True)
class Prompt:
    """What a completion is written for, to generate from and to judge by."""

    token_ids: tuple[int, ...]
    text: str  # the plain prompt, or the last user message


@dataclass(frozen=True)
class Example:
    """A row, understood: the pair for training and its prompt."""

    pair: Pair
    prompt: Prompt


def example(record: dict[str, Any], source: str, tokenizer: Any, max_tokens: int) -> Example:
    """A preference row in one of the field's formats.

    prompt, chosen, rejected as strings: plain text, no chat template.
    prompt, chosen, rejected as lists of messages; chosen and rejected may also be strings, the assistant's answer.
    chosen, rejected alone: the prompt is what they have in common at the beginning.
    Optional: chosen_finished, rejected_finished (false: cut off, no end of turn is learnt), origin (for metrics).
    Raises BadRow.
    """
    prompt, chosen, rejected = _normalise(record)
    if chosen == rejected:
        raise BadRow("identical", "chosen and rejected are the same; remove the row or mend one of them")
    rows = []
    for name, completion in (("chosen", chosen), ("rejected", rejected)):
        finished = record.get(f"{name}_finished")
        if finished is not None and not isinstance(finished, bool):
            raise BadRow("wrong_type", f"{name}_finished must be true or false, found {type(finished).__name__}")
        build = text_row if isinstance(prompt, str) else chat_row
        rows.append(build(tokenizer, prompt, completion, finished is not False))
    ids = prompt_ids(tokenizer, prompt) if prompt else []
    _check_length(rows, len(ids), max_tokens)
    if all(len(a) == len(b) and (a == b).all() for a, b in [(rows[0].token_ids, rows[1].token_ids)]):
        raise BadRow("identical", "chosen and rejected have the same tokens; remove the row or mend one of them")
    origin = record.get("origin")
    if not isinstance(origin, (str, type(None))):
        raise BadRow("wrong_type", f"origin must be a string, found {type(origin).__name__}")
    _check_text("origin", origin or "")
    text = (
        prompt if isinstance(prompt, str) else next((m["content"] for m in reversed(prompt) if m["role"] == "user"), "")
    )
    return Example(Pair(rows[0], rows[1], source, origin or ""), Prompt(tuple(ids), text))


def _normalise(record: dict[str, Any]) -> tuple[Any, Any, Any]:
    for name in ("chosen", "rejected"):
        if name not in record:
            raise BadRow("missing_field", f"the field {name!r} is missing; a row needs prompt, chosen and rejected")
    prompt, chosen, rejected = record.get("prompt"), record["chosen"], record["rejected"]
    for name, value in (("prompt", prompt), ("chosen", chosen), ("rejected", rejected)):
        if value is None and name != "prompt" or not isinstance(value, (str, list, type(None))):
            found = "null" if value is None else type(value).__name__
            raise BadRow("wrong_type", f"{name} must be a string or a list of messages, found {found}")
        if isinstance(value, list):
            _check_messages(name, value)
        elif isinstance(value, str):
            _check_text(name, value)
    if isinstance(prompt, list):  # an answer beside a conversation is the assistant's
        chosen, rejected = (
            [{"role": "assistant", "content": c}] if isinstance(c, str) else c for c in (chosen, rejected)
        )
    if type(chosen) is not type(rejected):
        raise BadRow("wrong_type", "chosen and rejected must both be strings or both be lists of messages")
    if isinstance(chosen, list):
        if not isinstance(prompt, list):
            # chosen and rejected are whole conversations; a string beside them repeats their first message
            prompt, chosen, rejected = _common_messages(chosen, rejected)
        for name, completion in (("chosen", chosen), ("rejected", rejected)):
            _check_completion(name, completion)
        if not prompt:
            raise BadRow("empty_prompt", "no message stands before the answers; give prompt as a list of messages")
        for name, completion in (("chosen", chosen), ("rejected", rejected)):
            _check_order(name, prompt, completion)
    else:
        if prompt is None:
            prompt, chosen, rejected = _common_text(chosen, rejected)
        for name, completion in (("chosen", chosen), ("rejected", rejected)):
            if not completion.strip():
                raise BadRow("empty_completion", f"{name} is empty; remove the row or write an answer")
    return prompt, chosen, rejected


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


def _check_messages(name: str, messages: Sequence[Any]) -> None:
    if not messages:
        reason = "empty_prompt" if name == "prompt" else "empty_completion"
        raise BadRow(reason, f"{name} holds no message; add one or remove the row")
    for number, message in enumerate(messages, 1):
        if not isinstance(message, dict) or not {"role", "content"} <= message.keys():
            raise BadRow("wrong_type", f"message {number} of {name} must be an object with role and content")
        if message["role"] not in ROLES:
            raise BadRow(
                "unknown_role", f"message {number} of {name} has role {message['role']!r}; use {', '.join(ROLES)}"
            )
        if not isinstance(message["content"], str):
            kind = "null" if message["content"] is None else type(message["content"]).__name__
            raise BadRow("wrong_type", f"content of message {number} of {name} must be a string, found {kind}")
        _check_text(f"message {number} of {name}", message["content"])


def _check_completion(name: str, messages: Sequence[Message]) -> None:
    if not messages or messages[-1]["role"] != "assistant":
        raise BadRow("role_order", f"{name} must end with an assistant message")
    for message in messages:
        if message["role"] == "assistant" and not message["content"].strip():
            raise BadRow("empty_completion", f"an assistant message of {name} is empty; remove the row or fill it")


def _check_order(name: str, prompt: Sequence[Message], completion: Sequence[Message]) -> None:
    if prompt[-1]["role"] == "assistant":
        raise BadRow("role_order", "the prompt ends with an assistant message; it must end with another role")
    roles = [message["role"] for message in [*prompt, *completion]]
    for number, (before, role) in enumerate(zip(roles, roles[1:], strict=False), 2):
        if role == "system" and before != "system":
            raise BadRow("role_order", f"{name}: message {number} is a system message; those stand at the beginning")
        if role == before == "assistant":
            raise BadRow("role_order", f"{name}: message {number} is a second answer in a row; join the two")


def _check_text(name: str, text: str) -> None:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        raise BadRow("not_utf8", f"{name} holds half a surrogate pair; save the text as UTF-8") from None


def _check_length(rows: list[Row], num_prompt_tokens: int, max_tokens: int) -> None:
    longest = max(len(row.token_ids) for row in rows)
    if num_prompt_tokens >= max_tokens:
        raise BadRow(
            "prompt_too_long",
            f"the prompt has {num_prompt_tokens} tokens, the limit of a sequence is data.max_tokens={max_tokens}; "
            f"raise it above {num_prompt_tokens} or shorten the prompt",
        )
    if longest > max_tokens:
        raise BadRow(
            "too_long", f"a sequence has {longest} tokens; use data.max_tokens={longest} or more, or shorten the row"
        )
