"""Completions of prompts with their rewards, and how they become training rows with advantages.

Nothing here has a gradient or a state. The online loop calls these functions in this order.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch

from align.data.prompts import PromptRow
from align.data.reasoning import final_answer
from align.engine.world import World, divided
from align.jsons import Tokenizer
from align.packing import num_tokens
from align.rewards.base import Conversation
from align.rewards.build import Rewards
from align.rollout.base import Completion, Rollout, Sampling
from align.trainers.generation import generate_distributed
from align.types import Episodes, Estimate, Example, Layout, Prompt, Row


@dataclass(frozen=True)
class Group:
    """The completions of one prompt, scored."""

    prompt: PromptRow
    completions: tuple[Completion, ...]  # [n]
    texts: tuple[str, ...]  # [n], without special tokens
    rewards: np.ndarray  # [n, K]; NaN where a component has none
    scores: np.ndarray  # [n], the weighted sum; NaN where a component has none
    greedy: Completion | None = None
    greedy_text: str = ""
    greedy_rewards: np.ndarray | None = None  # [K]
    greedy_score: float = math.nan
    steps: tuple[np.ndarray, ...] | None = None  # [n], rewards of steps [tokens]: align.rewards.build.StepReward

    @property
    def zero_variance(self) -> bool:
        """Whether all known rewards of the group are equal (to that of the greedy completion too), or the greedy
        baseline has none: every advantage from a baseline within the prompt is then 0. Never with rewards of steps."""
        known = self.scores[~np.isnan(self.scores)]
        if self.steps is not None:
            return len(known) == 0 or self.baseline_missing
        if self.greedy is None:
            return len(known) == 0 or bool((known == known[0]).all())
        return self.baseline_missing or bool((known == self.greedy_score).all())

    @property
    def baseline_missing(self) -> bool:
        """Whether there is a greedy completion, the baseline, and it has no reward."""
        return self.greedy is not None and math.isnan(self.greedy_score)

    @property
    def missing(self) -> int:
        """Completions without a score, the greedy one among them."""
        return int(np.isnan(self.scores).sum()) + self.baseline_missing


class Experience:
    """Generates completions and scores them. *_seconds: spent in each since they were last reset.

    steps: rewards of steps are needed; a completion without them has no score. world: the processes that divide the
    prompts among them. scorer: what makes scores of rewards instead of their weighted sum: align.trainers.directions.
    """

    def __init__(
        self,
        rollout: Rollout,
        rewards: Rewards,
        tokenizer: Tokenizer,
        steps: bool = False,
        world: World | None = None,
        scorer: Any = None,
    ):
        self.rollout = rollout
        self.rewards = rewards
        self.tokenizer = tokenizer
        self.steps = steps
        self.world = world or World()
        self.scorer = scorer
        self.generate_seconds = 0.0
        self.score_seconds = 0.0

    def draw(self, prompts: Sequence[PromptRow], sampling: Sampling, n: int, greedy: bool) -> list[Group]:
        """n completions of each prompt, and its greedy one where asked for; a process's are scored in one call."""
        start = time.perf_counter()
        completions = generate_distributed(
            self.world, self.rollout, [p.token_ids for p in prompts], sampling, n, greedy
        )
        middle = time.perf_counter()
        asked = list(zip(prompts, completions, strict=True))
        groups = divided(self.world, asked, lambda part, _: self._scored(part, n, greedy))
        self.generate_seconds += middle - start
        self.score_seconds += time.perf_counter() - middle
        return groups

    def _scored(self, answered: Sequence[tuple[PromptRow, Sequence[Completion]]], n: int, greedy: bool) -> list[Group]:
        prompts, completions = zip(*answered, strict=True)
        texts = [[self.text(c) for c in group] for group in completions]
        asked = [
            conversation(prompt, c, text)
            for prompt, group, written in zip(prompts, completions, texts, strict=True)
            for c, text in zip(group, written, strict=True)
        ]
        size = n + greedy
        columns, rows = self.rewards.score_with_steps(asked)
        rewards = columns.reshape(len(prompts), size, -1)
        # a component without weight is measured, and may be missing
        counted = self.rewards.weights != 0
        scores = rewards[..., counted] @ self.rewards.weights[counted]
        if self.scorer is not None:
            scores = self.scorer(prompts, rewards)
        if self.steps:
            assert rows is not None
            scores[np.array([np.isnan(row).all() for row in rows]).reshape(scores.shape)] = math.nan
        return [
            Group(
                prompt,
                tuple(group[:n]),
                tuple(written[:n]),
                r[:n],
                s[:n],
                greedy=group[n] if greedy else None,
                greedy_text=written[n] if greedy else "",
                greedy_rewards=r[n] if greedy else None,
                greedy_score=float(s[n]) if greedy else math.nan,
                steps=tuple(rows[i * size : i * size + n]) if self.steps and rows is not None else None,
            )
            for i, (prompt, group, written, r, s) in enumerate(
                zip(prompts, completions, texts, rewards, scores, strict=True)
            )
        ]

    def text(self, completion: Completion) -> str:
        """What a completion says, without the end of its turn."""
        return self.tokenizer.decode(completion.token_ids, skip_special_tokens=True)


def conversation(prompt: PromptRow, completion: Completion, text: str) -> Conversation:
    """What a reward sees."""
    return Conversation(
        prompt.text,
        text,
        completion.finished,
        prompt.messages,
        prompt.token_ids,
        completion.token_ids,
        prompt.fields,
    )


def examples(groups: Sequence[Group], truncated: str, layout: Layout, max_tokens: int) -> list[Example]:
    """A row for each completion, an example for as many completions of a prompt as fit a micro-batch.

    A completion without a reward has no targets, nor has one whose prompt's greedy completion has none; with
    truncated="mask" neither has one that was cut. The engine's log-probs stand in the column rollout_logps. Examples
    hold the same number of rows: a batch wants it so.
    """
    made = [[_row(group, k, truncated) for k in range(len(group.completions))] for group in groups]
    n = len(groups[0].completions)

    def fits(size: int) -> bool:
        parts = (rows[i : i + size] for rows in made for i in range(0, n, size))
        return size == 1 or all(_cost(part, layout) <= max_tokens for part in parts)

    size = next(d for d in range(n, 0, -1) if n % d == 0 and fits(d))
    return [
        Example(tuple(rows[i : i + size]), group.prompt.source, Prompt(group.prompt.token_ids, group.prompt.text))
        for group, rows in zip(groups, made, strict=True)
        for i in range(0, n, size)
    ]


def _cost(rows: Sequence[Row], layout: Layout) -> int:
    """Tokens of the rows in a micro-batch, padding included."""
    if layout == "padded":
        return len(rows) * max(len(row.token_ids) for row in rows)
    return num_tokens(rows, layout)


def _row(group: Group, k: int, truncated: str) -> Row:
    completion = group.completions[k]
    ids = np.array([*group.prompt.token_ids, *completion.token_ids], dtype=np.int32)
    scored = not math.isnan(group.scores[k]) and not group.baseline_missing
    learnt = scored and (completion.finished or truncated == "keep")
    targets = (np.arange(len(ids)) >= len(group.prompt.token_ids)) & learnt
    if completion.logps is None:
        return Row(ids, targets)
    logps = completion.logps if learnt else ()
    return Row(ids, targets, columns={"rollout_logps": np.array(logps, dtype=np.float32)})


def episodes(
    groups: Sequence[Group],
    rows: Sequence[Row],
    needs: frozenset[str],
    penalties: Sequence[np.ndarray] | None,
    values: Sequence[np.ndarray] | None,
) -> Episodes:
    """What an estimator sees. rows: of all completions in order, of whose targets the tokens are."""
    counts = torch.tensor([int(row.targets.sum()) for row in rows])
    greedy = torch.tensor([g.greedy_score for g in groups], dtype=torch.float64) if "greedy" in needs else None
    steps = None
    if "steps" in needs:
        stepped = [row for g in groups for row in g.steps]  # type: ignore[union-attr]
        kept = [s for s, count in zip(stepped, counts.tolist(), strict=True) if count]
        steps = torch.from_numpy(np.concatenate([np.empty(0), *kept]))
    texts = [text for g in groups for text in g.texts]
    return Episodes(
        scores=torch.from_numpy(np.concatenate([g.scores for g in groups])).double(),
        group=torch.arange(len(groups)).repeat_interleave(torch.tensor([len(g.completions) for g in groups])),
        row=torch.arange(len(rows)).repeat_interleave(counts),
        truncated=torch.tensor([not c.finished for g in groups for c in g.completions]),
        greedy=greedy,
        penalties=None if penalties is None else torch.from_numpy(np.concatenate(penalties)).double(),
        values=None if values is None else torch.from_numpy(np.concatenate(values)).double(),
        steps=steps,
        answers=tuple(final_answer(text) for text in texts) if "answers" in needs else None,
    )


def with_columns(parts: Sequence[Example], estimate: Estimate, more: dict[str, Sequence[np.ndarray]]) -> list[Example]:
    """The examples whose rows carry the estimate's columns, and `more`: name -> one array for each row."""
    rows = [row for e in parts for row in e.rows]
    borders = np.cumsum([int(row.targets.sum()) for row in rows])[:-1]
    columns = {name: np.split(c.float().numpy(), borders) for name, c in estimate.columns.items()} | more
    filled = iter(
        replace(row, columns={**row.columns, **{name: c[i] for name, c in columns.items()}})
        for i, row in enumerate(rows)
    )
    return [replace(e, rows=tuple(next(filled) for _ in e.rows)) for e in parts]


def reward_metrics(
    groups: Sequence[Group], rewards: Rewards, zero_variance: Callable[[Group], bool]
) -> dict[str, float]:
    """Means over what is known, by component, left out where nothing is; reward/missing counts completions without a
    score, greedy ones among them. zero_variance: of a group, see Group.zero_variance."""
    table = np.concatenate([g.rewards for g in groups])
    scores = np.concatenate([g.scores for g in groups])
    out = component_means(table, rewards.names, "reward/{}") | means({"reward/total": scores})
    if groups[0].greedy_rewards is not None:
        greedy_rewards = np.stack([g.greedy_rewards for g in groups])  # type: ignore[misc]
        out |= component_means(greedy_rewards, rewards.names, "reward/{}_greedy")
    known = scores[~np.isnan(scores)]
    if len(known):
        out["reward/total_std"] = float(known.std())
    lengths = [len(c.token_ids) for g in groups for c in g.completions]
    return out | {
        "reward/missing": sum(g.missing for g in groups),
        "rollout/settled_prompts": float(np.mean([zero_variance(g) for g in groups])),
        "rollout/tokens": float(np.mean(lengths)),
        "rollout/truncated": float(np.mean([not c.finished for g in groups for c in g.completions])),
    }


def component_means(table: np.ndarray, names: Sequence[str], form: str) -> dict[str, float]:
    """Means of the columns of rewards [..., K], a name in `form` for each; as means."""
    return means({form.format(name): table[..., k] for k, name in enumerate(names)})


def means(values: dict[str, np.ndarray]) -> dict[str, float]:
    """Means over what is no NaN; a name of which nothing is known is left out."""
    known = {name: v[~np.isnan(v)] for name, v in values.items()}
    return {name: float(v.mean()) for name, v in known.items() if v.size}
