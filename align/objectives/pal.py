"""PAL, experimental: reward models for raters that want different things, as distances to ideal points.

An answer has an embedding f(y); a user's ideal point a_u is a mixture of K prototypes that all users share, with the
user's own weights; the reward is minus their distance, or the cosine. The head holds all parameters and gives a reward
for every user, so what the loop and scoring know of it is a score head with one output per user.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, get_args

from align.deferred import F, Tensor, torch
from align.jsons import Fields, Json
from align.objectives.base import RewardObjective
from align.objectives.checks import needed_number, one_of, positive_value
from align.objectives.reward_model import pair_metrics, pair_scores
from align.types import Losses, PackedBatch, Stats, Term

if TYPE_CHECKING:
    from align.objectives.pal_head import PALHead

Point = Literal["projected_mixture", "mixture_of_projections", "mixture"]
Comparison = Literal["distance", "angle"]
Weighting = Literal["mean", "only_last", "cumulative"]

_SHAPE = ("num_prototypes", "dim", "num_layers", "point", "comparison")  # of a head, beside the number of users


@dataclass(frozen=True)
class PAL(RewardObjective):
    """A loss of the reward difference for the pair's own user: PAL-A at the last token.

    A row's number `user` is 0 to num_users - 1.
    comparison, with its loss, d = r_u(chosen) - r_u(rejected):
      distance  r_u(y) = -|f(y) - a_u|; max(0, hinge_margin - d)
      angle     r_u(y) = scale * cos(f(y), a_u), scale learnt, at most 100; -log s(d). hinge_margin is None.
    num_prototypes: K. dim: size of f(y). num_layers: hidden layers of f, 0: linear. point: see ideal_points.
    Metrics: pair_metrics with tau 1.
    Chen et al. 2024, PAL, arXiv 2406.08469; pluralistic-alignment@fcfc03c.
    """

    num_users: int
    num_prototypes: int
    dim: int
    num_layers: int
    point: Point
    comparison: Comparison
    hinge_margin: float | None

    kind = "pair"
    reward_kind = "pal"

    def __post_init__(self) -> None:
        for name in ("num_users", "num_prototypes", "dim"):
            positive_value(f"objective.{name}", getattr(self, name))
        if self.num_layers < 0:
            raise ValueError(f"objective.num_layers={self.num_layers}: must be at least 0")
        one_of("objective.point", self.point, get_args(Point))
        one_of("objective.comparison", self.comparison, get_args(Comparison))
        if (self.comparison == "distance") != (self.hinge_margin is not None):
            raise ValueError(
                f"objective.hinge_margin={self.hinge_margin}: objective.comparison=distance needs a number above 0, "
                "angle needs null"
            )
        if self.hinge_margin is not None:
            positive_value("objective.hinge_margin", self.hinge_margin)

    @property
    def outputs(self) -> tuple[str, ...]:
        """An output of the head for each user."""
        return tuple(f"user_{u}" for u in range(self.num_users))

    def metadata(self) -> Json:
        """What scoring needs beside kind and outputs: who makes the head, and its shape."""
        shape = {name: getattr(self, name) for name in _SHAPE}
        return super().metadata() | {"head": "align.objectives.pal.head_of"} | shape

    def make_head(self, width: int) -> PALHead:
        """A new head for hidden states of this width."""
        from align.objectives.pal_head import PALHead  # a module of torch, which checking settings does without

        return PALHead(
            width, self.num_users, self.num_prototypes, self.dim, self.num_layers, self.point, self.comparison
        )

    def __call__(self, policy: Stats, reference: Stats | None, batch: PackedBatch) -> Losses:  # noqa: ARG002
        """Losses [P] of the pairs. Raises ValueError for a row without a user, or with one out of range."""
        users = self._users(batch)
        scores = pair_scores(policy, batch, self.num_users)  # [P, 2, U]
        chosen, rejected = scores.gather(2, users[:, None, None].expand(-1, 2, 1))[..., 0].unbind(1)
        return Losses((Term(self.losses(chosen - rejected), "example"),), pair_metrics(chosen, rejected, 1.0))

    def losses(self, gaps: Tensor) -> Tensor:
        """Losses [...] of reward differences chosen - rejected."""
        return -F.logsigmoid(gaps) if self.hinge_margin is None else hinge(gaps, self.hinge_margin)

    def _users(self, batch: PackedBatch) -> Tensor:
        users = needed_number(batch, "user", "objective=pal")
        wrong = (users != users.floor()) | (users < 0) | (users >= self.num_users)
        if wrong.any():
            i = int(wrong.int().argmax())
            raise ValueError(
                f"{batch.sources[i]}: user {float(users[i]):g} is none of 0 to {self.num_users - 1}; "
                "number the users from 0, or raise objective.num_users"
            )
        return users.long()


def head_of(form: Fields, width: int) -> PALHead:
    """The head, its weights not yet read, of a saved model; form: reward_model.json."""
    from align.objectives.pal_head import PALHead

    return PALHead(width, len(form["outputs"]), **{name: form[name] for name in _SHAPE})


def fit_user(
    head: PALHead, objective: PAL, chosen: Tensor, rejected: Tensor, *, lr: float, steps: int, weight_decay: float
) -> Tensor:
    """Logits [K] of a new user from a few pairs; everything else stays as it is, see PALHead.add_user.

    chosen, rejected: hidden states [n, H] at the last tokens, n from 1 to 100. Starts from equal weights, so that the
    result is a function of the pairs; AdamW over all pairs at once, as many steps as asked for.
    """
    logits = torch.zeros_like(head.user_logits[:1]).requires_grad_()
    optimizer = torch.optim.AdamW([logits], lr=lr, weight_decay=weight_decay)
    both = torch.cat([chosen, rejected]).detach()
    for _ in range(steps):
        rewards = head.rewards(both, logits)[:, 0]
        loss = objective.losses(rewards[: len(chosen)] - rewards[len(chosen) :]).mean()
        (logits.grad,) = torch.autograd.grad(loss, (logits,))
        optimizer.step()
    return logits.detach()[0]


# ---------------------------------------------------------------------- parts, as pure functions


def hinge(gaps: Tensor, margin: float) -> Tensor:
    """max(0, margin - gap)."""
    return (margin - gaps).clamp(min=0)


def smooth_hinge(gaps: Tensor, margin: float, gamma: float) -> Tensor:
    """A hinge whose corner is a parabola of width gamma: its slope below margin - gamma is -1."""
    short = (margin - gaps).clamp(min=0)
    return torch.where(gaps >= margin - gamma, short.square() / (2 * gamma), short - gamma / 2)


def span_losses(losses: Tensor, divergence: Tensor, end: Tensor, weighting: Weighting) -> Tensor:
    """One loss [B] of those at each token [B, T], over the span [divergence, end) of each row.

    divergence: the first token at which the two answers differ; end: behind the last real token.
    weighting: mean, only_last (token end - 1), or cumulative, in which the i-th of n tokens weighs 2 i / (n (n + 1)).
    Raises ValueError for an empty span.
    """
    one_of("weighting", weighting, get_args(Weighting))
    place = torch.arange(losses.shape[1], device=losses.device)[None]
    inside = (place >= divergence[:, None]) & (place < end[:, None])
    counts = inside.sum(1, keepdim=True)
    if (counts == 0).any():
        raise ValueError("a span without tokens: the two answers are equal, or its end lies before their divergence")
    if weighting == "mean":
        weights = torch.ones_like(losses) / counts
    elif weighting == "only_last":
        weights = (place == end[:, None] - 1).to(losses.dtype)
    else:
        weights = 2 * (place - divergence[:, None] + 1).to(losses.dtype) / (counts * (counts + 1))
    return (losses * weights).masked_fill(~inside, 0.0).sum(1)
