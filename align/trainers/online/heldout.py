"""The held-out prompts of an online run, answered before training, at each evaluation and after it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from align.config import OnlineConfig
from align.data.prompts import PromptRow
from align.evaluate.heldout import heldout_metrics
from align.jsons import Json
from align.rollout.base import Sampling
from align.trainers.experience import Experience, Group
from align.trainers.transcripts import Transcripts

if TYPE_CHECKING:
    from align.trainers.composing import Composing

_EVALUATION = 1 << 40  # the seed's key of held-out completions, which no step has


class Heldout:
    """Asks them, and writes what was answered."""

    def __init__(
        self,
        trainer: OnlineConfig,
        prompts: Sequence[PromptRow],
        sampling: Sampling,
        experience: Experience,
        transcripts: Transcripts,
        composing: Composing | None,
    ):
        self.trainer = trainer
        self.prompts = prompts
        self.sampling = Sampling(
            trainer.sample_tokens, sampling.temperature, sampling.top_p, sampling.top_k, sampling.stop, sampling.seed
        ).at(_EVALUATION)
        self.experience = experience
        self.transcripts = transcripts
        self.composing = composing

    def answers(self) -> list[Group]:
        """Of the policy that the rollout has."""
        groups = self.experience.draw(self.prompts, self.sampling, self.trainer.heldout_n, greedy=True)
        self.experience.generate_seconds = self.experience.score_seconds = 0.0  # they are the evaluation's
        return groups

    def metrics(self, groups: list[Group]) -> dict[str, float]:
        """See heldout_metrics."""
        lines = self.transcripts.lines(0, groups)
        greedy, samples = [line["greedy"] for line in lines], [line["samples"] for line in lines]
        return heldout_metrics(greedy, samples, self.transcripts.names, self.trainer.pass_component)

    def before(self) -> None:
        """Answers of the untrained policy; a start that was killed before its first checkpoint writes them anew."""
        self.transcripts.forget_heldout("before")
        if not self.prompts:
            return
        groups = self.answers()
        self.transcripts.heldout("before", 0, groups)
        if self.composing is not None and self.composing.due:
            self.composing.evaluated(self.metrics(groups))

    def evaluate(self, step: int, last: bool) -> Json:
        """Metrics of the policy as it is; the composer is told of them."""
        groups = self.answers()
        found = self.metrics(groups)
        if last:
            self.transcripts.heldout("after", step, groups)
        return found if self.composing is None else found | self.composing.evaluated(found)

    def after(self, step: int) -> dict[str, float]:
        """Metrics of the last step's answers where they are another step's: trainer.max_steps was lowered to where the
        run is, or it was stopped early."""
        if not self.prompts or self.transcripts.heldout_step("after") == step:
            return {}
        groups = self.answers()
        self.transcripts.heldout("after", step, groups)
        return self.metrics(groups)
