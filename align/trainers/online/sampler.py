"""The prompts of a step with dynamic sampling, and counts of failed rollouts and rewards."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence

from align.config import Config, OnlineConfig
from align.data.prompts import PromptRow
from align.engine.world import World
from align.jsons import Json
from align.rewards.build import Rewards
from align.rollout.base import Rollout, Sampling
from align.trainers.experience import Experience, Group
from align.trainers.loop import Plan


class GroupSampler:
    """Groups of completions for the prompts in the order of the epochs. zero_variance: see Group.zero_variance."""

    def __init__(
        self,
        config: Config,
        train: Sequence[PromptRow],
        plan: Plan,
        sampling: Sampling,
        experience: Experience,
        zero_variance: Callable[[Group], bool],
        greedy: bool,
    ):
        assert isinstance(config.trainer, OnlineConfig)
        self.trainer = config.trainer
        self.seed = config.seed
        self.n = config.sampling.n
        self.train = train
        self.plan = plan
        self.sampling = sampling
        self.experience = experience
        self.zero_variance = zero_variance
        self.greedy = greedy  # whether each prompt has a greedy completion too
        self.position = 0  # prompts that were drawn since step 0

    def of(self, step: int) -> tuple[list[Group], list[Group]]:
        """The groups that a step learns from, and all that were drawn; with dynamic_sampling zero-variance groups are
        replaced by those of further prompts, from the next epoch where this one has no more."""
        # the last step of the epochs has what is left
        size = int(min(self.trainer.batch_size, self.plan.limit - (step - 1) * self.trainer.batch_size))
        kept: list[Group] = []
        sampled: list[Group] = []
        for draw in range(1 + self.trainer.dynamic_sampling):
            prompts = self._next(size - len(kept))
            groups = self.experience.draw(prompts, self.sampling.at(step, draw), self.n, self.greedy)
            if self.trainer.dynamic_sampling == 0:
                return groups, groups
            sampled += groups
            kept += [g for g in groups if not self.zero_variance(g)]
            if len(kept) == size:
                break
        return kept or sampled[:size], sampled

    def _next(self, count: int) -> list[PromptRow]:
        """The next prompts in the order of the epochs; advances the position."""
        places = Plan(len(self.train), 1, 0, 0)
        first, self.position = self.position, self.position + count
        return [self.train[places.indices(k + 1, self.seed)[0]] for k in range(first, self.position)]


class FailureCounts:
    """Failures of rollout and rewards since step 0, of all processes, by metric."""

    def __init__(self, world: World, rollout: Rollout, rewards: Rewards):
        self.world = world
        self.rollout = rollout
        self.rewards = rewards
        self.failures: Counter[str] = Counter()
        self._counted: Counter[str] = Counter()  # by this process's parts, so far

    def take(self) -> Json:
        """Add what failed since the last call. A step that was stopped is not counted until it is repeated."""
        now = Counter({f"rollout/{name}": n for name, n in self.everyone(self.rollout.counts).items()})
        now.update({f"reward/failed_{name}": n for name, n in self.everyone(self.rewards.counts).items()})
        for name, n in now.items():
            self.failures[name] += n - self._counted[name]
        self._counted = now
        return dict(self.failures)

    def everyone(self, counts: Mapping[str, int]) -> Counter[str]:
        """Counts of all processes together."""
        total: Counter[str] = Counter()
        for own in self.world.gather(dict(counts)):
            total.update(own)
        return total
