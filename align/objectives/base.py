"""What an objective and a base loss are: every attribute that a loop reads, its default and its meaning.

A dataclass that inherits one of these bases and has a setting of the same name as a declared attribute writes
`name: type = field()`: without it the declared default would become the setting's.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Literal

from align.contracts import adopt
from align.deferred import Tensor, nn
from align.jsons import Json
from align.types import Kind, Losses, PackedBatch, Stats

NEEDS = ("reference", "values", "scores", "log_collision", "log_max", "entropy", "entropy_bonus")
EXTRAS = ("start_token_logps", "gates")


class Objective(ABC):
    """A pure function from a network's log-probs or scores to losses that nothing has reduced yet."""

    __slots__ = ()

    kind: Kind = "pair"  # of examples that it reads
    # Of NEEDS, reference or fields of Stats: what it reads beside token_logps and logps. With scores it is a
    # RewardObjective.
    needs: frozenset[str] = frozenset()
    # Of EXTRAS. In batch.extras: start_token_logps [C], of the policy that the run began with. In policy.extras: gates
    # [N, D / 2], of a gated reward model's second head at the last token before the first target
    extras: frozenset[str] = frozenset()
    columns: tuple[str, ...] = ()  # further rows of each pair, by the data's field or a dotted path
    # examples, mismatched: step_values is asked of the rows of all examples of a step, or of each prompt with the
    # completion of another one, before its first loss
    step_rows: Literal["examples", "mismatched"] | None = None
    margins: tuple[str, ...] = ()  # components whose margins of chosen over rejected a pair must have
    all_margins: bool = True  # all of them; False: one at least
    row_weights: bool = False  # and a weight of each of them

    @abstractmethod
    def __call__(self, policy: Stats, reference: Stats | None, batch: PackedBatch) -> Losses:
        """Losses of a micro-batch. reference: None unless it is needed; nothing of it has a gradient."""

    def step_values(self, policy: Stats, reference: Stats | None, batch: PackedBatch) -> Tensor:
        """With step_rows: numbers of each example of a batch [P, K], without gradient. A loss then finds those of the
        whole step in batch.extras["step_values"] [B, K], its examples' places among them in "step_index" [P]."""
        raise NotImplementedError(f"{type(self).__name__} has step_rows={self.step_rows} and no step_values")


class RewardObjective(Objective):
    """An objective that trains a reward model: it reads Stats.scores [N, D] of the last token of each sequence."""

    __slots__ = ()

    needs: frozenset[str] = frozenset({"scores"})
    reward_kind: str  # how scores become rewards, for who reads the trained model: align.rewards
    outputs: tuple[str, ...]  # [D], a name for each output of the head
    gated: bool = False  # the head also gives gates [N, D / 2] at the last token before the first target

    def make_head(self, width: int) -> nn.Module | None:  # noqa: ARG002
        """A new head from hidden states [N, width] to scores [N, D]; None: a linear one."""
        return None

    def metadata(self) -> Json:
        """What scoring needs beside reward_kind and outputs."""
        return {"tau": 1.0, "normalise": False, "gated": self.gated}


def as_objective(part: object, key: str) -> Objective:
    """A part as an objective, or a RewardObjective where it needs scores, see contracts.adopt.

    Raises ValueError also for names that no loop knows and for step_rows without step_values: a run would find out at
    its first step.
    """
    objective = adopt(part, Objective, key)
    for attribute, given, known in (("needs", objective.needs, NEEDS), ("extras", objective.extras, EXTRAS)):
        for name in sorted(set(given).difference(known)):
            raise ValueError(f"{key}: {attribute} names {name}: must be of {', '.join(known)}")
    scores = "scores" in objective.needs
    if "start_token_logps" in objective.extras and (scores or objective.kind == "rollout"):
        raise ValueError(f"{key}: extras names start_token_logps, which no reward model and no online step has")
    if "gates" in objective.extras and not (scores and adopt(part, RewardObjective, key).gated):
        raise ValueError(f"{key}: extras names gates, which only a RewardObjective with gated=true has")
    if objective.step_rows is not None and type(objective).step_values is Objective.step_values:
        raise ValueError(
            f"{key}: step_rows={objective.step_rows} needs the method step_values; see {__name__}.Objective"
        )
    return adopt(part, RewardObjective, key) if scores else objective
