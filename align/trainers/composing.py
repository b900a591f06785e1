"""Between rewards of several components and the advantages of a step: a composer, its observations, its refusals.

The online loop asks: check before a model is loaded, estimate instead of the estimator, learnt after the weights have
moved, evaluated after an evaluation. All of a step's completions are known here, whatever process drew them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from omegaconf import DictConfig
from torch import Tensor

from align import build
from align.advantages.base import Advantage
from align.advantages.base import estimate as with_metrics
from align.composers.base import Composer, Observed
from align.composers.fixed import disagreement
from align.config import Config
from align.data.prompts import PromptRow
from align.data.reasoning import final_answer
from align.jsons import Fields, Json, Tokenizer
from align.report import composed_plots
from align.rewards.build import counted
from align.trainers.directions import directed, direction_of
from align.trainers.experience import Group
from align.trainers.influence import Influences, Measurements, chosen_parameters
from align.trainers.loop import TrainContext
from align.types import Episodes, Estimate

# From the advantages of objectives [C, K] and their estimator's other columns; see Measurements.before
Measure = Callable[[Tensor, dict[str, Tensor]], Influences | None]


class Composing:
    """A composer at work in an online run. names: all components of the reward, those without weight among them."""

    def __init__(self, composer: Composer, advantage: Advantage, names: Sequence[str], say: Callable[[str], None]):
        self.composer = composer
        self.advantage = advantage
        self.say = say
        self.names = tuple(names)
        self.index = [list(names).index(name) for name in composer.names]
        self.learning_rate = 0.0  # of the step that is estimated; the loop sets it
        self._observed: Observed | None = None
        self._said: set[str] = set()

    # ------------------------------------------------------------------ what the loop asks

    @property
    def num_values(self) -> int:
        """Outputs that a value head needs: one for each stream whose advantages are estimated."""
        if "values" not in self.advantage.needs:
            return 0
        return len(self.composer.streams) if self.composer.target == "advantage" else 1

    @property
    def due(self) -> bool:
        """Whether the composer waits for an evaluation."""
        return self.composer.due

    def prompts(self, rows: list[PromptRow], tokenizer: Tokenizer, seed: int) -> list[PromptRow]:
        """The prompts as the composer wants them. Raises ValueError for one without the direction that it needs."""
        return directed(rows, self.composer, tokenizer, seed) if "direction" in self.composer.needs else rows

    def zero_variance(self, group: Group) -> bool:
        """Whether each composed component has zero variance over the completions (and equals that of the greedy one),
        or the baseline is missing; see Group.zero_variance. Equal sums are not enough: weights may change."""
        table = group.rewards[:, self.index]
        known = table[~np.isnan(table).any(1)]
        if group.greedy_rewards is None:
            first = known[:1]
        else:
            first = group.greedy_rewards[self.index]
            if np.isnan(first).any():
                return True
        return len(known) == 0 or (group.steps is None and bool((known == first).all()))

    def check_parameters(self, parameters: Mapping[str, Tensor]) -> None:
        """Raises ValueError if the composer wants gradients of weights that are not trained."""
        if "influence" in self.composer.needs:
            chosen_parameters(parameters, self.composer.parameters)

    def measuring(self, context: TrainContext, beside: bool, check: Callable[[], None]) -> Measurements:
        """Measures the influences of its objectives. beside: whether the forward passes of the update may serve."""
        return Measurements(context, self.composer, beside, check)

    def estimate(
        self, groups: Sequence[Group], episodes: Episodes, measure: Measure | None = None
    ) -> tuple[Estimate, dict[str, float]]:
        """What the estimator says of the composed streams, and metrics. episodes: of the groups' weighted sums.

        A completion that misses one of the components counts for none of them.
        """
        raw = np.concatenate([g.rewards for g in groups])[:, self.index]
        known = np.where(np.isnan(raw).any(1, keepdims=True), math.nan, raw)
        rewards = torch.from_numpy(known).double()
        greedy = None if episodes.greedy is None else self._greedy(groups)
        context = self._context(groups)
        influences, metrics = None, {}
        if "influence" in self.composer.needs:
            assert measure is not None
            # the KL belongs to all objectives alike and to none of them
            streams, others = self._streams(replace(episodes, penalties=None), rewards, greedy, {})
            found = measure(streams, others)
            if found is not None:
                influences, metrics = found.influences, dict(found.metrics)
        self._observed = replace(_moments(raw), influences=influences, learning_rate=self.learning_rate)
        if self.composer.apply == "now":
            self.composer.update(self._observed)
        if self.composer.target == "reward":
            estimate, more = self._by_reward(episodes, rewards, greedy, context)
            return estimate, metrics | more
        advantages, values = self._streams(episodes, rewards, greedy, metrics)
        scored = ~rewards.isnan().any(1)
        if context is not None:
            context = context[episodes.row]
        mixed = self.composer(advantages, scored[episodes.row], context)
        return with_metrics(mixed, episodes, scored, None, **values), metrics

    def learnt(self, influences: Tensor | None = None) -> dict[str, float]:
        """The weights have moved: tell the composer; returns its metrics. influences: that the update has measured."""
        if self._observed is not None and self.composer.apply == "next":
            if influences is not None:
                self._observed = replace(self._observed, influences=influences)
            self.composer.update(self._observed)
        self._observed = None
        return self._metrics()

    def evaluated(self, row: Mapping[str, float]) -> dict[str, float]:
        """Held-out metrics are there: tell the composer; returns its metrics. Raises ValueError if it needs one that
        is not among them."""
        needs, composer = self.composer.needs, self.composer
        validation = gold = None
        if "validation" in needs:
            validation = torch.tensor([_heldout_mean(row, name) for name in composer.names], dtype=torch.float64)
        if "gold" in needs:
            gold = row.get(f"heldout/{composer.gold_metric}", math.nan)
        if validation is not None or gold is not None:
            composer.update(Observed(validation=validation, gold=gold))
        return self._metrics()

    def draw(self, run: Path) -> None:
        """Pictures of the run, below plots/; says why there are none."""
        measured = [name for name in self.names if name not in self.composer.names]
        try:
            composed_plots.draw(run, self.composer.names, measured[0] if measured else None)
        except (ImportError, OSError) as error:  # what was trained is not to be lost for a picture
            self.say(f"no plots: {error}")

    def state_dict(self) -> Json:
        """The composer's, between two steps."""
        return self.composer.state_dict()

    def load_state_dict(self, state: Fields) -> None:
        """The inverse."""
        self.composer.load_state_dict(state)

    # ------------------------------------------------------------------ inside

    def _metrics(self) -> dict[str, float]:
        for line in self.composer.remarks():
            if line not in self._said:
                self._said.add(line)
                self.say(line)
        return self.composer.metrics()

    def _greedy(self, groups: Sequence[Group]) -> Tensor:
        table = np.stack([g.greedy_rewards for g in groups])[:, self.index]  # type: ignore[call-overload]
        return torch.from_numpy(np.where(np.isnan(table).any(1, keepdims=True), math.nan, table)).double()

    def _context(self, groups: Sequence[Group]) -> Tensor | None:
        """What the composer asks of each completion [N] or [N, K]."""
        if "uncertainty" in self.composer.needs:
            spread = [disagreement([final_answer(text) for text in g.texts])[1] for g in groups]
            sizes = torch.tensor([len(g.completions) for g in groups])
            return torch.tensor(spread, dtype=torch.float64).repeat_interleave(sizes)
        if "direction" in self.composer.needs:
            rows = [direction_of(g.prompt, len(self.index)) for g in groups for _ in g.completions]
            return torch.tensor(rows, dtype=torch.float64)
        return None

    def _streams(
        self, episodes: Episodes, rewards: Tensor, greedy: Tensor | None, metrics: dict[str, float]
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Advantages [C, K] of each stream alone, and the other columns [C, K] of the estimator; adds to the metrics.

        The KL's own stream has scores of 0 and the penalties; the others have those that the composer gives them.
        """
        composer = self.composer
        found: dict[str, list[Tensor]] = {}
        for k, (name, sign) in enumerate(zip(composer.streams, composer.penalty_signs, strict=True)):
            own = k < rewards.shape[1]
            values = episodes.values if episodes.values is None or episodes.values.ndim == 1 else episodes.values[:, k]
            estimate = self.advantage(
                replace(
                    episodes,
                    scores=rewards[:, k] if own else torch.where(rewards.isnan().any(1), math.nan, 0.0).double(),
                    greedy=None if greedy is None else greedy[:, k] if own else greedy[:, 0] * 0.0,
                    penalties=None if episodes.penalties is None or sign == 0 else sign * episodes.penalties,
                    values=values,
                )
            )
            for column, value in estimate.columns.items():
                found.setdefault(column, []).append(value)
            for key in ("advantage/std", "advantage/explained_variance"):
                if key in estimate.metrics:
                    metrics[f"{key}_{name}"] = estimate.metrics[key]
        stacked = {column: torch.stack(values, 1) for column, values in found.items()}
        return stacked.pop("advantages"), stacked

    def _by_reward(
        self, episodes: Episodes, rewards: Tensor, greedy: Tensor | None, context: Tensor | None
    ) -> tuple[Estimate, dict[str, float]]:
        """Rewards composed first. Greedy completions are composed in the same call: a normalisation is over both."""
        together = rewards if greedy is None else torch.cat([rewards, greedy])
        if context is not None and greedy is not None:
            first = torch.searchsorted(episodes.group, torch.arange(len(greedy)))  # a completion of each prompt
            context = torch.cat([context, context[first]])
        composed = self.composer(together, None, context)
        scores = composed[: len(rewards)]
        greedy_scores = None if greedy is None else composed[len(rewards) :]
        estimate = self.advantage(replace(episodes, scores=scores, greedy=greedy_scores))
        known = scores[~scores.isnan()]
        return estimate, {"reward/composed": float(known.mean())} if len(known) else {}


def composing(config: Config, composer: DictConfig, advantage: Advantage, say: Callable[[str], None]) -> Composing:
    """Of the node `composer` and the other settings. Raises ValueError for what the user can cure."""
    node = build.reward_node(config)
    return Composing(build.composer(composer, tuple(counted(node))), advantage, list(map(str, node)), say)


def _moments(raw: np.ndarray) -> Observed:
    """means, lowest, highest [K] of rewards [N, K] over what is known; NaN where nothing is."""
    out: dict[str, list[float]] = {"means": [], "lowest": [], "highest": []}
    for column in raw.T:
        known = column[~np.isnan(column)]
        for key, function in (("means", np.mean), ("lowest", np.min), ("highest", np.max)):
            out[key].append(float(function(known)) if len(known) else math.nan)
    means, lowest, highest = (torch.tensor(values, dtype=torch.float64) for values in out.values())
    return Observed(means, lowest, highest)


def _heldout_mean(row: Mapping[str, float], name: str) -> float:
    """The mean over drawn completions of the held-out prompts, or else over their greedy ones."""
    return row.get(f"heldout/{name}", row.get(f"heldout/{name}_greedy", math.nan))
