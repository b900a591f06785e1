"""Conversations and plain texts to Rows: which tokens stand there and which of them the policy wrote.

The prompt's tokens are those that generation would start from; targets are what the policy would have emitted
after them, its end of turn included. No mask is derived from token ids.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from align.data.sources import BadRow
from align.types import Row

Message = dict[str, Any]
ROLES = ("system", "user", "assistant", "tool")


def prompt_ids(tokenizer: Any, prompt: str | Sequence[Message]) -> list[int]:
    """The tokens generation starts from."""
    if isinstance(prompt, str):
        ids = tokenizer(prompt).input_ids
        return ids[:-1] if _appends_eos(tokenizer) else ids
    return _ids(tokenizer, _render(tokenizer, prompt, generation=True))


def text_row(tokenizer: Any, prompt: str, completion: str, finished: bool) -> Row:
    """Prompt and completion as they stand, without a chat template; a finished completion ends in EOS."""
    head = prompt_ids(tokenizer, prompt) if prompt else _beginning(tokenizer)
    if not head:
        raise BadRow("empty_prompt", "no prompt, and the tokenizer has no BOS to begin with; add a prompt")
    rest = _continue(tokenizer, prompt, completion, special=True)
    if finished and tokenizer.eos_token_id is not None and rest[-1:] != [tokenizer.eos_token_id]:
        rest = [*rest, tokenizer.eos_token_id]
    return _row([(head, False), (rest, True)])


def chat_row(tokenizer: Any, prompt: Sequence[Message], completion: Sequence[Message], finished: bool) -> Row:
    """A conversation by the tokenizer's chat template; targets are the assistant turns of `completion`.

    Each target turn ends with what the template puts after the text, up to and without trailing white space (the
    policy's end of turn); an unfinished last turn ends with its text. Everything else is context.
    Raises BadRow when the template's renderings of the conversation's beginnings do not extend each other.
    """
    messages = [*prompt, *completion]
    parts: list[tuple[list[int], bool]] = []
    done = ""  # rendered text that already has tokens
    for i in range(len(prompt), len(messages)):
        if messages[i]["role"] != "assistant":
            continue
        head = _render(tokenizer, messages[:i], generation=True)
        body = _render(tokenizer, messages[: i + 1], generation=False)
        if not head.startswith(done) or not body.startswith(head):
            raise BadRow(
                "template",
                f"message {i + 1}: the chat template does not extend what it rendered before "
                f"(before: {_tail(head)!r}, after: {_tail(body)!r}); use another chat template",
            )
        emitted = body[len(head) :].rstrip()
        text = messages[i]["content"]
        last = i == len(messages) - 1
        if last and not finished:
            at = emitted.find(text.strip())
            emitted = emitted[: at + len(text.strip())] if at >= 0 else emitted
        parts.append((_continue(tokenizer, done, head[len(done) :]), False))
        target = _continue(tokenizer, head, emitted)
        if last and finished and emitted.strip() == text.strip() and tokenizer.eos_token_id is not None:
            target = [*target, tokenizer.eos_token_id]  # a template without an end of turn
        parts.append((target, True))
        done = head + emitted
    return _row(parts)


def _render(tokenizer: Any, messages: Sequence[Message], generation: bool) -> str:
    if not tokenizer.chat_template:
        raise ValueError(
            "the data are conversations and the tokenizer has no chat template; set model.chat_template=FILE, "
            "or give prompt, chosen and rejected as plain strings"
        )
    try:
        return tokenizer.apply_chat_template(list(messages), tokenize=False, add_generation_prompt=generation)
    except Exception as error:  # Jinja's own exceptions and what templates raise
        raise BadRow("template", f"the chat template refuses the conversation: {error}") from None


def _ids(tokenizer: Any, text: str) -> list[int]:
    # the template writes BOS itself
    return tokenizer(text, add_special_tokens=False).input_ids


def _continue(tokenizer: Any, before: str, text: str, special: bool = False) -> list[int]:
    """Tokens of `text` standing after `before`, whose tokens are already fixed.

    Tokenised together, so that tokenizers which mark the start of a text see it in its place; where a token
    would reach across the border, the text is tokenised after a character that it does not merge with: generation
    starts from fixed tokens too.
    """
    if not before:
        return _ids(tokenizer, text)
    appended = special and _appends_eos(tokenizer)
    # after these characters no token reaches into most texts, and no tokenizer marks the start of a text any more
    for start, add in ((before, special), ("\n", False), ("a", False)):
        whole = tokenizer(start + text, add_special_tokens=add).input_ids
        head = tokenizer(start, add_special_tokens=add).input_ids
        if add and appended:
            whole, head = whole[:-1], head[:-1]
        if whole[: len(head)] == head:
            return whole[len(head) :]
    return _ids(tokenizer, text)


def _appends_eos(tokenizer: Any) -> bool:
    """Whether the tokenizer ends every text with EOS, which is then no part of a prompt."""
    return tokenizer.eos_token_id is not None and tokenizer("a").input_ids[-1:] == [tokenizer.eos_token_id]


def _beginning(tokenizer: Any) -> list[int]:
    return [tokenizer.bos_token_id] if tokenizer.bos_token_id is not None else []


def _row(parts: list[tuple[list[int], bool]]) -> Row:
    ids = np.array([i for part, _ in parts for i in part], dtype=np.int32)
    targets = np.array([flag for part, flag in parts for _ in part], dtype=bool)
    return Row(ids, targets)


def _tail(text: str) -> str:
    return text if len(text) <= 120 else "..." + text[-117:]
