"""Prompts that say in which direction of the space of rewards their completion is wanted: directional preference
alignment (arXiv 2402.18571)."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch

from align import build
from align.composers.base import Composer
from align.composers.fixed import Directional, direction, direction_weights, drawn_degrees
from align.config import Config
from align.data.chat import prompt_ids
from align.data.prompts import PromptRow
from align.jsons import Fields, Tokenizer
from align.rewards.build import counted
from align.rollout.base import seed_of

COLUMN = "direction"  # of a prompt's row

# The completions' scores [G, n] of prompts and rewards [G, n, K]
Scorer = Callable[[Sequence[PromptRow], np.ndarray], np.ndarray]


def direction_of(prompt: PromptRow, num: int) -> list[float]:
    """The unit vector of a prompt. Raises ValueError without one."""
    found = prompt.fields.get(COLUMN)
    if not isinstance(found, Sequence) or len(found) != num or not all(isinstance(v, (int, float)) for v in found):
        raise ValueError(
            f"{prompt.source}: a list of {num} numbers is needed in the column {COLUMN}, found {found}; or set "
            "composer.degrees, to draw them"
        )
    length = math.hypot(*found)
    if not abs(length - 1) < 1e-6:
        raise ValueError(f"{prompt.source}: the direction {list(found)} has length {length:g}; it must be 1")
    return [float(v) for v in found]


def directed(rows: Sequence[PromptRow], composer: Composer, tokenizer: Tokenizer, seed: int) -> list[PromptRow]:
    """The prompts, each with a direction and a system message that tells it in hundredths, rounded.

    With composer.degrees null rows must have a column `direction` already, and stay as they are. Raises ValueError for
    a prompt that is not made of messages.
    """
    if composer.degrees is None:
        for row in rows:
            direction_of(row, len(composer.names))
        return list(rows)
    low, high = composer.degrees
    directions = direction(drawn_degrees(len(rows), low, high, seed))
    out = []
    for row, vector, told in zip(rows, directions.tolist(), direction_weights(directions), strict=True):
        if row.messages is None:
            raise ValueError(f"{row.source}: composer.degrees needs prompts of messages, to tell the direction in one")
        said = ", ".join(f"{name} {weight}" for name, weight in zip(composer.names, told, strict=True))
        messages = _with_system(row.messages, composer.message.replace("{weights}", said))
        fields = {**row.fields, COLUMN: vector}
        ids = tuple(prompt_ids(tokenizer, messages, tools=row.fields.get("tools")))
        out.append(replace(row, messages=messages, token_ids=ids, fields=fields))
    return out


def directed_rounds(
    rows: Sequence[PromptRow], slices: Sequence[range], composer: Composer, tokenizer: Tokenizer, seed: int
) -> list[PromptRow]:
    """The prompts of each round with directions of that round, drawn by the seed, its number and the place in it."""
    out = list(rows)
    for number, part in enumerate(slices, 1):
        found = directed([rows[i] for i in part], composer, tokenizer, seed_of(seed, number))
        for place, row in zip(part, found, strict=True):
            out[place] = row
    return out


def _with_system(messages: Sequence[Fields], text: str) -> tuple[Any, ...]:
    if messages[0].get("role") == "system":
        first = {**messages[0], "content": f"{messages[0]['content']}\n{text}"}
        return (first, *messages[1:])
    return ({"role": "system", "content": text}, *messages)


def directional(config: Config) -> Directional | None:
    """The composer of a run that keeps the best completions; None without one."""
    if config.composer is None:
        return None
    composer = build.composer(config.composer, tuple(counted(build.reward_node(config))))
    assert isinstance(composer, Directional)  # validate has seen to it
    return composer


def scorer(composer: Directional, names: Sequence[str]) -> Scorer:
    """v . r of each completion; names: all components of the reward."""
    index = [list(names).index(name) for name in composer.names]

    def score(prompts: Sequence[PromptRow], rewards: np.ndarray) -> np.ndarray:
        vectors = torch.tensor([direction_of(row, len(index)) for row in prompts], dtype=torch.float64)
        known = torch.from_numpy(rewards[..., index]).double()
        flat = composer(known.flatten(0, 1), None, vectors.repeat_interleave(known.shape[1], 0))
        return flat.view(known.shape[:2]).numpy()

    return score
