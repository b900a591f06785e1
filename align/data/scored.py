"""Scored samples: what was written for a prompt, by whom, and what a judge made of it.

Reading, checking and grouping only; which two samples make a pair is pairs.py's, what a conversation may look like
is formats.py's.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from align.data.formats import Message, parse
from align.data.shapes import conversation
from align.data.sources import BadRow, Source, content_hash, locate, read
from align.jsons import Fields, Json

_LABELLED = re.compile(r"(.+\.(?:jsonl|json|parquet))@(\w+)")  # FILE@origin


@dataclass(frozen=True)
class Sample:
    """One completion of a prompt and its score; at least one of completion and tokens is given."""

    score: float | None  # higher is better; None: missing, which is not 0
    completion: str | Sequence[Message] | None = None
    tokens: Fields | None = None  # the whole conversation as a rollout left it: token_ids, spans
    origin: str = ""  # how it was made, e.g. on_policy; "": not said
    finished: bool | None = None  # whether the turn was ended; None: not said
    source: str = ""  # "file:line"
    rewards: Mapping[str, float] = field(default_factory=dict)  # by component, where there are several

    def __post_init__(self) -> None:
        if self.completion is None and self.tokens is None:
            raise ValueError("a sample needs a completion, or token_ids with spans")

    @property
    def num_tokens(self) -> int | None:
        """Tokens the policy wrote; None: not known."""
        if self.tokens is None:
            return None
        return sum(end - start for _, start, end, target in self.tokens["spans"] if target)

    @property
    def num_characters(self) -> int:
        """Characters of what the assistant said in all its turns."""
        return sum(len(text) for text in self._said())

    @property
    def empty(self) -> bool:
        """Whether an answer, or a turn of it, says nothing: a preference row cannot hold that."""
        return self.completion is not None and not all(text.strip() for text in self._said())

    @property
    def identity(self) -> str:
        """Equal for equal completions: a single answer is the same as text and as a message."""
        if self.completion is None:
            assert self.tokens is not None
            return json.dumps(self.tokens["token_ids"])
        if isinstance(self.completion, str):
            return json.dumps(self.completion)
        if len(self.completion) == 1 and self.completion[0].keys() == {"role", "content"}:
            return json.dumps(self.completion[0]["content"])
        return json.dumps(list(self.completion), sort_keys=True)

    def _said(self) -> list[str]:
        if self.completion is None or isinstance(self.completion, str):
            return [self.completion or ""]
        turns = [m for m in self.completion if m["role"] == "assistant"]
        return [json.dumps(m["tool_calls"]) if m.get("tool_calls") else m["content"] for m in turns]


@dataclass(frozen=True)
class Scored:
    """A prompt with all its samples, in the order in which they were read."""

    prompt: str | Sequence[Message]
    samples: tuple[Sample, ...]
    tools: Any = None  # descriptions of the tools the policy was offered

    @property
    def key(self) -> str:
        """Equal for equal prompts."""
        prompt = self.prompt if isinstance(self.prompt, str) else list(self.prompt)
        return json.dumps([prompt, self.tools] if self.tools else prompt, sort_keys=True)


@dataclass(frozen=True)
class ScoredFiles:
    """The prompts of all files, one entry for equal prompts, and what was read."""

    prompts: tuple[Scored, ...]
    sources: tuple[str, ...]
    sha256: tuple[str, ...]


def read_scored(names: Sequence[str]) -> ScoredFiles:
    """Read files of scored samples and put the samples of equal prompts together, also across files.

    A row is {"prompt", "completions": [{"text" or "messages", and/or "token_ids" with "spans", "score", ...}]}, or
    {"prompt", "completion", "score", ...} for one sample, such as a line of align generate, whose prompt_ids and
    token_ids take the place of token_ids with spans; each sample may have origin, finished and rewards by component, a
    row tools. A name may be FILE@origin: the origin of the samples of that file that have none.
    Raises ValueError with "file:line" and the cure for the first row that cannot be used.
    """
    if not names:
        raise ValueError("scored: name at least one file of scored samples")
    prompts: dict[str, Scored] = {}
    sources: list[Source] = []
    for name in names:
        file, origin = file_and_origin(name)
        sources.append(locate(file))
        for where, record in read(sources[-1]):
            try:
                if isinstance(record, BadRow):
                    raise record
                found = _scored(record, where, origin)
            except BadRow as bad:
                raise ValueError(f"{where}: {bad}") from None
            if found.key in prompts:
                found = replace(found, samples=prompts[found.key].samples + found.samples)
            prompts[found.key] = found
    if not prompts:
        raise ValueError(f"scored={','.join(names)}: has no rows; give a file with at least one scored sample")
    return ScoredFiles(tuple(prompts.values()), tuple(names), tuple(content_hash(s) for s in sources))


def file_and_origin(name: str) -> tuple[str, str]:
    """FILE@origin taken apart; origin is "" for a plain FILE, and for a hub data set, where @ names a configuration."""
    labelled = _LABELLED.fullmatch(name)
    return (labelled[1], labelled[2]) if labelled else (name, "")


def _scored(record: Json, where: str, origin: str) -> Scored:
    prompt = conversation(record.get("prompt"))
    if not isinstance(prompt, (str, list)):
        found = "nothing" if prompt is None else type(prompt).__name__
        raise BadRow("wrong_type", f"prompt must be a string or a list of messages, found {found}")
    tools = record.get("tools") or None
    return Scored(prompt, tuple(_samples(record, prompt, tools, where, origin)), tools)


def _samples(record: Json, prompt: object, tools: object, where: str, origin: str) -> Iterator[Sample]:
    many, one = record.get("completions"), record.get("completion")
    if (many is None) == (one is None):
        raise BadRow("missing_field", "give either completions, a list, or completion and score, one sample a row")
    one = conversation(one)
    if one is not None:
        many = [{**record, ("text" if isinstance(one, str) else "messages"): one}]
    if not isinstance(many, list):
        raise BadRow("wrong_type", f"completions must be a list, found {type(many).__name__}")
    for number, item in enumerate(many, 1):
        try:
            yield _sample(item, prompt, tools, where, origin)
        except BadRow as bad:
            raise BadRow(bad.reason, f"completion {number}: {bad}" if one is None else str(bad)) from None


def _sample(item: object, prompt: object, tools: object, where: str, origin: str) -> Sample:
    if not isinstance(item, dict):
        raise BadRow("wrong_type", f"must be an object with text and score, found {type(item).__name__}")
    text, messages, ids, spans, finished, own = (
        item.get(key) for key in ("text", "messages", "token_ids", "spans", "finished", "origin")
    )
    if not isinstance(finished, (bool, type(None))):
        raise BadRow("wrong_type", f"finished must be true or false, found {type(finished).__name__}")
    if not isinstance(own, (str, type(None))):
        raise BadRow("wrong_type", f"origin must be a string, found {type(own).__name__}")
    if text is not None and messages is not None:
        raise BadRow("wrong_type", "has both text and messages; keep one")
    if ids is not None and spans is None and "prompt_ids" in item:
        ids, spans = _joined(item["prompt_ids"], ids)
    if (ids is None) != (spans is None):
        raise BadRow("missing_field", "token_ids and spans belong together; one of them is missing")
    completion = conversation(messages if text is None else text)
    if completion is None and ids is None:
        raise BadRow("missing_field", "nothing is written; give text, messages, or token_ids with spans")
    if completion is not None:
        _check({"prompt": prompt, "completion": completion, "tools": tools})
    if ids is not None:
        _check({"token_ids": ids, "spans": spans})
    tokens = None if ids is None else {"token_ids": ids, "spans": spans}
    return Sample(_score(item), completion, tokens, own or origin, finished, where, _rewards(item.get("rewards")))


def _joined(prompt_ids: object, token_ids: object) -> tuple[Any, Any]:
    """The whole conversation of a line of `align generate`, which has the tokens of prompt and completion apart."""
    if not isinstance(prompt_ids, list) or not isinstance(token_ids, list):
        raise BadRow("wrong_type", "prompt_ids and token_ids must be lists of token numbers")
    if not token_ids:  # nothing was written
        return None, None
    end = len(prompt_ids) + len(token_ids)
    return [*prompt_ids, *token_ids], [["prompt", 0, len(prompt_ids), False], ["assistant", len(prompt_ids), end, True]]


def _check(record: Json) -> None:
    """Refuse here, where the line is known, what could not be read as part of a pair."""
    try:
        parse(record, open_tool_calls=True)
    except BadRow as bad:
        if bad.reason != "empty_completion":  # a policy can write nothing; such samples are counted, not refused
            raise


def _rewards(values: object) -> dict[str, float]:
    """By component; those that a completion has none of are left out."""
    if values is None:
        return {}
    known = {k: v for k, v in values.items() if v is not None} if isinstance(values, Mapping) else None
    if known is None or not all(
        isinstance(v, (int, float)) and not isinstance(v, bool) and math.isfinite(v) for v in known.values()
    ):
        raise BadRow("wrong_type", "rewards must be an object of finite numbers, or null where one is missing")
    return {str(name): float(value) for name, value in known.items()}


def _score(item: Json) -> float | None:
    if "score" not in item:
        raise BadRow("missing_field", "the field 'score' is missing; write null if the sample was not scored")
    score = item["score"]
    if score is None:
        return None
    if isinstance(score, bool) or not isinstance(score, (int, float)):
        raise BadRow("wrong_type", f"score must be a number or null, found {type(score).__name__}")
    if not math.isfinite(score):
        raise BadRow("bad_score", f"score is {score}; write null for a missing score, or score the sample again")
    return float(score)
