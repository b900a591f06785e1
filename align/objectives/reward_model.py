"""Objectives that train reward models whose head gives one score, or one per attribute: on pairs, lists and labels.

They read Stats.scores [N, D] of the last token of each sequence and nothing else of the network; the general
preference model and PAL have files of their own.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from align.deferred import F, Tensor, torch
from align.jsons import Json
from align.objectives.base import RewardObjective
from align.objectives.checks import needed_number, not_negative, positive_value
from align.types import Losses, PackedBatch, Stats, Term


@dataclass(frozen=True)
class BradleyTerry(RewardObjective):
    """-log s(z), z = (r(chosen) - r(rejected) - m) / tau, and two regularisers: P(chosen beats rejected) = s(z).

    tau > 0: the temperature of that probability.
    margin: name of the number of a row that is m, how far chosen is to lead, in units of the reward; None: m = 0.
    center >= 0: adds center * (r(chosen) + r(rejected))^2, which pulls their mean to 0 and leaves their gap alone.
    l2 >= 0: adds l2 * (r(chosen)^2 + r(rejected)^2) / 2, which shrinks the gap as well.
    Metrics: pair_metrics.
    Ouyang et al. 2022, arXiv 2203.02155, eq. 1; margin: Touvron et al. 2023, arXiv 2307.09288, eq. 2; center:
    Eisenstein et al. 2023, arXiv 2312.09244, as trl@f2cd577 has it; l2: Open-Assistant's RMLoss.
    """

    tau: float
    margin: str | None
    center: float
    l2: float

    kind = "pair"
    outputs = ("reward",)
    reward_kind = "bradley_terry"

    def __post_init__(self) -> None:
        positive_value("objective.tau", self.tau)
        not_negative("objective.center", self.center)
        not_negative("objective.l2", self.l2)

    def metadata(self) -> Json:
        """What scoring needs beside kind and outputs."""
        return super().metadata() | {"tau": self.tau}

    def __call__(self, policy: Stats, reference: Stats | None, batch: PackedBatch) -> Losses:  # noqa: ARG002
        """Losses [P] of the pairs, a term for each regulariser that is on."""
        chosen, rejected = pair_scores(policy, batch, 1)[..., 0].unbind(1)
        z = (chosen - rejected - margins(batch, self.margin, chosen, "objective.margin")) / self.tau
        terms = [Term(-F.logsigmoid(z), "example")]
        if self.center:
            terms.append(Term((chosen + rejected).square(), "example", self.center))
        if self.l2:
            terms.append(Term(_half_squares(chosen, rejected), "example", self.l2))
        return Losses(tuple(terms), pair_metrics(chosen, rejected, self.tau))


@dataclass(frozen=True)
class RankedList(RewardObjective):
    """Bradley-Terry over every two answers of a ranked list: mean over its pairs, then over lists.

    l2 >= 0: adds l2 / 2 times the squares of both rewards of a pair, which is l2 times the mean square of the list.
    Metrics of a list are means over its pairs: accuracy (a tie is wrong), probability, reward/margin; reward/first and
    reward/last are the rewards of its best and its worst answer.
    Ouyang et al. 2022, arXiv 2203.02155, eq. 1; Open-Assistant's RMLoss, whose beta is l2.
    """

    l2: float

    kind = "ranked"
    outputs = ("reward",)
    reward_kind = "ranked_list"

    def __post_init__(self) -> None:
        not_negative("objective.l2", self.l2)

    def __call__(self, policy: Stats, reference: Stats | None, batch: PackedBatch) -> Losses:  # noqa: ARG002
        """Losses [P] of the lists. Raises ValueError for a list of one answer."""
        given = batch.groups >= 0  # [P, R]
        short = given.sum(1) < 2
        if short.any():
            raise ValueError(f"{batch.sources[int(short.int().argmax())]}: a ranked list needs two or more answers")
        rewards = _scores(policy, batch, 1)[batch.groups.clamp(min=0), 0].masked_fill(~given, 0.0)
        size = rewards.shape[1]
        before = torch.ones(size, size, dtype=torch.bool, device=rewards.device).triu(1)
        pairs = given[:, :, None] & given[:, None, :] & before  # [P, R, R]
        gaps = rewards[:, :, None] - rewards[:, None, :]
        counts = pairs.sum((1, 2))

        def mean(values: Tensor) -> Tensor:
            return values.masked_fill(~pairs, 0.0).sum((1, 2)) / counts

        terms = [Term(mean(-F.logsigmoid(gaps)), "example")]
        if self.l2:
            terms.append(Term(rewards.square().sum(1) / given.sum(1), "example", self.l2))
        with torch.no_grad():
            last = rewards.gather(1, given.sum(1, keepdim=True) - 1)[:, 0]
            metrics = {
                "accuracy": mean((gaps > 0).to(gaps.dtype)),
                "probability": mean(gaps.sigmoid()),
                "reward/margin": mean(gaps),
                "reward/first": rewards[:, 0],
                "reward/last": last,
            }
        return Losses(tuple(terms), {name: values.detach() for name, values in metrics.items()})


@dataclass(frozen=True)
class Attributes(RewardObjective):
    """Regression on several attributes of an answer, one output each: mean squared error over those that a row has.

    names: of the numbers of a row and of the head's outputs. A row may lack some of them, not all.
    Metrics: mse, and for each name mse_<name> and reward/<name> (the prediction) of the rows that have it.
    Wang et al. 2024, arXiv 2406.08673 (HelpSteer2); absent attributes: Wang et al. 2024, arXiv 2406.12845 (ArmoRM).
    """

    names: Sequence[str]

    kind = "single"
    reward_kind = "attributes"

    def __post_init__(self) -> None:
        if len(self.names) == 0 or len(set(self.names)) < len(self.names):
            raise ValueError(f"objective.names={list(self.names)}: must be one or more names, each once")

    @property
    def outputs(self) -> tuple[str, ...]:
        """An output of the head for each attribute."""
        return tuple(self.names)

    def __call__(self, policy: Stats, reference: Stats | None, batch: PackedBatch) -> Losses:  # noqa: ARG002
        """Losses [P] of the rows. Raises ValueError for a row without any of the attributes."""
        predicted = _scores(policy, batch, len(self.names))[batch.groups[:, 0]]  # [P, D]
        absent = torch.full_like(predicted[:, 0], torch.nan)
        wanted = torch.stack([batch.numbers.get(name, absent).to(predicted.dtype) for name in self.names], 1)
        missing = wanted.isnan()
        empty = missing.all(1)
        if empty.any():
            raise ValueError(
                f"{batch.sources[int(empty.int().argmax())]}: objective.names needs at least one number of the row: "
                f'add "numbers": {{"{self.names[0]}": ...}} to it'
            )
        errors = (predicted - wanted.masked_fill(missing, 0.0)).square().masked_fill(missing, 0.0)
        losses = errors.sum(1) / (~missing).sum(1)
        metrics = {"mse": losses.detach()}
        for i, name in enumerate(self.names):
            metrics[f"mse_{name}"] = errors[:, i].detach().masked_fill(missing[:, i], torch.nan)
            metrics[f"reward/{name}"] = predicted[:, i].detach().masked_fill(missing[:, i], torch.nan)
        return Losses((Term(losses, "example"),), metrics)


@dataclass(frozen=True)
class Cost(RewardObjective):
    """A cost model: cost above 0 is harmful, below 0 harmless, and of a pair chosen is the LESS harmful answer.

    With c the cost and h = 1 for a harmful answer, -1 for a harmless one:
      pair_weight * -log s(c(rejected) - c(chosen)) + sign_weight * (-log s(h c(chosen)) - log s(h c(rejected)))
    and l2 * (c(chosen)^2 + c(rejected)^2) / 2. The signs are the numbers chosen_safe and rejected_safe of the row, 1
    safe and 0 unsafe; sign_weight = 0 does without them. A pair whose chosen is unsafe and rejected safe is refused.
    Metrics: accuracy (cost of rejected strictly above that of chosen), accuracy_sign_safe and accuracy_sign_unsafe
    (share of the pair's safe, or unsafe, answers with the right sign, NaN without any; 0 is no sign), cost/chosen,
    cost/rejected, cost/margin.
    Dai et al. 2023, Safe RLHF, arXiv 2310.12773, eq. 6; the `sequence-wise` loss of the authors' code, whose
    regularization is l2 and whose weights are 1.
    """

    pair_weight: float
    sign_weight: float
    l2: float

    kind = "pair"
    outputs = ("cost",)
    reward_kind = "cost"

    def __post_init__(self) -> None:
        for name in ("pair_weight", "sign_weight", "l2"):
            not_negative(f"objective.{name}", getattr(self, name))
        if not self.pair_weight and not self.sign_weight:
            raise ValueError("objective.pair_weight=0 and objective.sign_weight=0: one must be greater than 0")

    def __call__(self, policy: Stats, reference: Stats | None, batch: PackedBatch) -> Losses:  # noqa: ARG002
        """Losses [P] of the pairs, a term for each part that is on."""
        costs = pair_scores(policy, batch, 1)[..., 0]  # [P, 2]
        chosen, rejected = costs.unbind(1)
        terms, metrics = [], {}
        if self.pair_weight:
            terms.append(Term(-F.logsigmoid(rejected - chosen), "example", self.pair_weight))
        if self.sign_weight:
            safe = _safe(batch)  # [P, 2]
            signed = torch.where(safe, -costs, costs)
            terms.append(Term(-F.logsigmoid(signed).sum(1), "example", self.sign_weight))
            right = (signed.detach() > 0).to(costs.dtype)
            metrics["accuracy_sign_safe"] = (right * safe).sum(1) / safe.sum(1)  # 0 / 0: the pair has none
            metrics["accuracy_sign_unsafe"] = (right * ~safe).sum(1) / (~safe).sum(1)
        if self.l2:
            terms.append(Term(_half_squares(chosen, rejected), "example", self.l2))
        chosen, rejected = chosen.detach(), rejected.detach()
        metrics["accuracy"] = (rejected > chosen).to(costs.dtype)
        metrics |= {"cost/chosen": chosen, "cost/rejected": rejected, "cost/margin": rejected - chosen}
        return Losses(tuple(terms), metrics)


def pair_scores(policy: Stats, batch: PackedBatch, num_outputs: int) -> Tensor:
    """Scores [P, 2, D] of chosen and rejected. Raises ValueError without pairs or for another number of outputs."""
    if len(batch.groups) == 0 or batch.groups.shape[1] < 2:
        raise ValueError("the batch has no pairs")
    return _scores(policy, batch, num_outputs)[batch.groups[:, :2]]


def margins(batch: PackedBatch, name: str | None, like: Tensor, who: str) -> Tensor:
    """Margins [P] of the pairs: the number of that name of each, 0 if the name is None."""
    if name is None:
        return torch.zeros_like(like)
    return needed_number(batch, name, f"{who}={name}").to(like.dtype)


def pair_metrics(chosen: Tensor, rejected: Tensor, tau: float) -> dict[str, Tensor]:
    """Metrics [P] of rewards: accuracy (a tie is wrong), probability that chosen wins, both rewards and their gap.

    The probability leaves a margin out: over pairs of one quality its mean is to equal the accuracy.
    """
    chosen, rejected = chosen.detach(), rejected.detach()
    return {
        "accuracy": (chosen > rejected).to(chosen.dtype),
        "probability": ((chosen - rejected) / tau).sigmoid(),
        "reward/chosen": chosen,
        "reward/rejected": rejected,
        "reward/margin": chosen - rejected,
    }


def _scores(policy: Stats, batch: PackedBatch, num_outputs: int) -> Tensor:
    scores = policy.scores
    if scores is None:
        raise ValueError("the objective trains a reward model and the network has no score head")
    if scores.shape != (len(batch.lengths), num_outputs):
        raise ValueError(f"the score head gives {list(scores.shape)}, wanted [{len(batch.lengths)}, {num_outputs}]")
    return scores


def _half_squares(chosen: Tensor, rejected: Tensor) -> Tensor:
    return 0.5 * (chosen.square() + rejected.square())


def _safe(batch: PackedBatch) -> Tensor:
    """Whether chosen and rejected are safe [P, 2] bool."""
    names = ("chosen_safe", "rejected_safe")
    values = torch.stack([needed_number(batch, name, "objective.sign_weight") for name in names], 1)
    odd = ((values != 0) & (values != 1)).any(1)
    if odd.any():
        where = batch.sources[int(odd.int().argmax())]
        raise ValueError(f"{where}: the numbers chosen_safe and rejected_safe must be 1 (safe) or 0 (unsafe)")
    wrong = values[:, 0] < values[:, 1]
    if wrong.any():
        raise ValueError(
            f"{batch.sources[int(wrong.int().argmax())]}: chosen is unsafe and rejected is safe, but chosen must be "
            "the less harmful answer; exchange the two, or mend chosen_safe and rejected_safe"
        )
    return values == 1
