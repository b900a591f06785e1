"""Completions for several processes: each draws its part, or the lead asks servers that are there for all of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from align.engine.world import World, divided, together
from align.rollout.base import Completion, Rollout, Sampling


def generate_distributed(
    world: World,
    rollout: Rollout,
    prompts: Sequence[Sequence[int]],
    sampling: Sampling,
    n: int = 1,
    greedy: bool = False,
) -> list[list[Completion]]:
    """Rollout.generate divided among the processes, which must all call; the completions are those of one process."""
    if isinstance(rollout, LeadRollout):
        return rollout.generate(prompts, sampling, n, greedy)

    def own(part: Sequence[Sequence[int]], first: int) -> list[list[Completion]]:
        return rollout.generate(part, replace(sampling, first=sampling.first + first), n, greedy)

    return divided(world, prompts, own)


class LeadRollout(Rollout):
    """The rollout of the lead process, whose results all processes get; each call is made by all of them.

    For servers: they take weights from one client, and divide the prompts themselves. inner: None except in the lead.
    """

    def __init__(self, inner: Rollout | None, world: World):
        self.inner = inner
        self.world = world
        self.max_tokens = world.share(inner.max_tokens if inner else None)

    @property
    def counts(self) -> Mapping[str, int]:
        """The lead's; elsewhere nothing is counted."""
        return self.inner.counts if self.inner else {}

    def generate(
        self, prompts: Sequence[Sequence[int]], sampling: Sampling, n: int = 1, greedy: bool = False
    ) -> list[list[Completion]]:
        """See Rollout."""
        return self._on_lead("generate", prompts, sampling, n, greedy)

    def logps(self, sequences: Sequence[Sequence[int]], starts: Sequence[int]) -> list[list[float]]:
        """See Rollout."""
        return self._on_lead("logps", sequences, starts)

    def sync(self, policy: object) -> None:
        """See Rollout."""
        self._on_lead("sync", policy)

    def sleep(self) -> None:
        """See Rollout."""
        self._on_lead("sleep")

    def close(self) -> None:
        """See Rollout; the lead closes alone, also after an error."""
        if self.inner:
            self.inner.close()

    def _on_lead(self, name: str, *arguments: object) -> Any:
        done = together(self.world, lambda: getattr(self.inner, name)(*arguments) if self.inner else None)
        return self.world.share(done)
