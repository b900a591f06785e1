"""Settings and rows for the tests of the data's way."""

from __future__ import annotations

from typing import Any

from align.config import DataConfig
from align.data.examples import loaded
from align.data.formats import parse
from align.data.wanted import Wanted
from align.types import Example


def settings(train: Any = "unused.jsonl", **changes: Any) -> DataConfig:
    """Data settings as configs/data/files.yaml has them, but for a limit of 100 tokens and texts as they stand."""
    default: dict[str, Any] = dict(
        train=str(train) if not isinstance(train, list) else train, heldout=None, heldout_fraction=0.0, repeat=None,
        max_tokens=100, overlong="error", targets="all", target_roles=["assistant"], open_tool_calls=False,
        on_bad_row="error", max_bad_fraction=0.01, gold=None, margins=None, columns=None, form=None,
        ignore=[], text="plain", empty_prompts=False,
    )  # fmt: skip
    return DataConfig(**(default | changes))


def examples(record: dict, tokenizer: Any, wanted: Wanted, **changes: Any) -> tuple[Example, ...]:
    """What an objective gets of a row."""
    return loaded(parse(record), "f:1", tokenizer, settings(**({"max_tokens": 1000} | changes)), wanted, False).examples


def example(record: dict, source: str, tokenizer: Any, max_tokens: int) -> Example:
    """The one pair that a row is."""
    return loaded(parse(record), source, tokenizer, settings(max_tokens=max_tokens), Wanted(), False).examples[0]
