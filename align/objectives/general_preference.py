"""The general preference model: answers as embeddings that are compared by a skew-symmetric form, so that a cycle of
preferences can be learnt; and the loss of a policy that learns from such a model.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from align.deferred import F, Tensor
from align.jsons import Json
from align.objectives.base import RewardObjective
from align.objectives.checks import positive_value
from align.objectives.reward_model import margins, pair_scores
from align.types import Losses, PackedBatch, Stats, Term


@dataclass(frozen=True)
class GeneralPreference(RewardObjective):
    """-log s((s - m) / tau), s the skew_score of chosen against rejected: P(chosen beats rejected) = s(s / tau).

    dim: size D of an embedding, even; dim=2 with second entries equal is Bradley-Terry.
    tau > 0. normalise: embeddings have length 1, so |s| <= 1, and tau must be small, such as 0.1.
    gated: the prompt says how much each of the D / 2 blocks counts, by a softmax over the gates at its last token.
    margin: name of the number of a row that is m; None: m = 0.
    Metrics: accuracy (s > 0, a tie is wrong), probability (without the margin), reward/margin (s), and with gates
    gate/max, the largest weight of a block.
    Zhang et al. 2024, arXiv 2410.02197; general-preference-model@a376d95. There the code that trains does not
    normalise and the code that scores does, and its gates are divided by sqrt(H) and multiplied by D / 2: here they are
    those of its example. A pair's gates are those of chosen's row.
    """

    dim: int
    tau: float
    normalise: bool
    gated: bool = field()  # else the base's would be its default
    margin: str | None

    kind = "pair"
    reward_kind = "general_preference"

    def __post_init__(self) -> None:
        if self.dim < 2 or self.dim % 2:
            raise ValueError(f"objective.dim={self.dim}: must be an even number, 2 or more")
        positive_value("objective.tau", self.tau)

    @property
    def extras(self) -> frozenset[str]:
        """Gates if they are on."""
        return frozenset({"gates"} if self.gated else ())

    @property
    def outputs(self) -> tuple[str, ...]:
        """embedding_0, embedding_1, ..."""
        return tuple(f"embedding_{i}" for i in range(self.dim))

    def metadata(self) -> Json:
        """What scoring needs beside kind and outputs."""
        return super().metadata() | {"tau": self.tau, "normalise": self.normalise}

    def __call__(self, policy: Stats, reference: Stats | None, batch: PackedBatch) -> Losses:  # noqa: ARG002
        """Losses [P] of the pairs."""
        chosen, rejected = pair_scores(policy, batch, self.dim).unbind(1)  # [P, D]
        if self.normalise:
            chosen, rejected = F.normalize(chosen, dim=-1), F.normalize(rejected, dim=-1)
        weights = None
        if self.gated:
            weights = policy.extras["gates"][batch.groups[:, 0]].softmax(-1)  # [P, D / 2]
        score = skew_score(chosen, rejected, weights)
        z = (score - margins(batch, self.margin, score, "objective.margin")) / self.tau
        score = score.detach()
        metrics = {
            "accuracy": (score > 0).to(score.dtype),
            "probability": (score / self.tau).sigmoid(),
            "reward/margin": score,
        }
        if weights is not None:
            metrics["gate/max"] = weights.detach().amax(-1)
        return Losses((Term(-F.logsigmoid(z), "example"),), metrics)


def skew_score(first: Tensor, second: Tensor, weights: Tensor | None = None) -> Tensor:
    """How much the first answer beats the second [...]; exactly the negative of the second against the first.

    first, second: embeddings [..., D]; weights: [..., D / 2] of the blocks, None: all 1.
    sum_k weights_k (first_2k second_2k+1 - first_2k+1 second_2k); arXiv 2410.02197.
    """
    a, b = first.unflatten(-1, (-1, 2)), second.unflatten(-1, (-1, 2))
    blocks = a[..., 0] * b[..., 1] - a[..., 1] * b[..., 0]  # [..., D / 2]
    return (blocks if weights is None else blocks * weights).sum(-1)


def score_table(embeddings: Tensor, weights: Tensor | None = None) -> Tensor:
    """Scores [K, K] of each of K answers to a prompt against each; weights: [D / 2] of the prompt's blocks."""
    return skew_score(embeddings[:, None], embeddings[None], weights)


def mean_scores(table: Tensor) -> Tensor:
    """How much each of K answers beats the K on average [K], itself with its 0 among them.

    The authors' ranker subtracts the transposed table first and so has twice this.
    """
    return table.mean(1)


def gpo_loss(log_ratios: Tensor, scores: Tensor, beta: float) -> Tensor:
    """Losses [P] of a policy's answers: (log policy - log start policy - score / beta)^2.

    scores: how much each answer beats those of the start policy on average. No normaliser is subtracted.
    beta > 0: a larger one stays closer to the start policy. General preference optimisation, arXiv 2410.02197.
    """
    return (log_ratios - scores / beta).square()
