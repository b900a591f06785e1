"""DPO on pairs with a preference for each of several components: their losses weighted, or their margins."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

from align.deferred import Tensor, torch
from align.objectives.base import Objective
from align.objectives.checks import not_negative, one_of, positive_value
from align.objectives.losses import BaseLoss, Ratios, as_loss
from align.objectives.preference import needs_difference, pair_ratios, preference_metrics
from align.simplex import simplex
from align.types import MARGIN, WEIGHT, Losses, PackedBatch, Stats, Term

Form = Literal["losses", "margin", "modpo"]
Scaling = Literal["identity", "log"]

_TIE = 1e-6  # relative: margins are float32, sums that close to 0 are rounding
_TAKEN = ("train", "heldout")  # accuracy/train is the accuracy of all


@dataclass(frozen=True)
class MultiObjective(Objective):
    """A base loss on pairs with margins m_k of chosen over rejected, one for each component k; a tie is 0.

    z = beta h, h the difference of log-ratios; w: `weights` on the simplex, None: equal, row: those of each pair.
    form:
      losses  sum_k w_k c_k loss(sign(m_k) z), c = |m_k| with scale_by_margin, else 1; 0 for a tie. A pair counts for
              the components that it has. For the logistic loss with labels of all components it is DPO with the soft
              label p = sum of w_k over those that prefer chosen.
      margin  loss(sign(M) z - offset f(|M|)), M = sum_k w_k m_k, f: offset_scaling.
      modpo   loss((sign(m_i) / w_i) (z - sum over k != i of w_k m_k)), i = component, whose label is learnt.
    A pair whose M, or m_i, is 0 has no loss. beta, loss: as in DPO; a loss of the difference only where offset > 0 and
    in modpo. Metrics are DPO's on pairs turned to the side that their loss prefers.
    losses: loss weighting (DPO LW) in Zhou et al. 2023, arXiv 2310.03708. margin: an offset is ODPO, Amini et al. 2024,
    arXiv 2402.10571; log as in rycolab/odpo@c4a01be. modpo: Zhou et al. as above, as in ZHZisZZ/modpo@56c52a9.
    """

    beta: float
    loss: BaseLoss
    names: Sequence[str]
    weights: Mapping[str, float] | str | None
    form: Form
    scale_by_margin: bool
    offset: float
    offset_scaling: Scaling
    component: str | None

    kind = "pair"
    needs = frozenset({"reference"})

    def __post_init__(self) -> None:
        positive_value("objective.beta", self.beta)
        as_loss(self.loss)
        one_of("objective.form", self.form, ("losses", "margin", "modpo"))
        one_of("objective.offset_scaling", self.offset_scaling, ("identity", "log"))
        not_negative("objective.offset", self.offset)
        listed = isinstance(self.names, Sequence) and not isinstance(self.names, str)
        if not listed or not all(isinstance(name, str) for name in self.names):
            raise ValueError(f"objective.names={self.names}: must be a list of names, as in [helpful,harmless]")
        names = list(self.names)
        if len(names) < 2 or len(set(names)) < len(names):
            raise ValueError(
                f"objective.names={names}: must be two or more components, each once; with one use objective=dpo"
            )
        for name in names:
            if name in _TAKEN:
                raise ValueError(f"objective.names={names}: accuracy/{name} is another metric; call {name} otherwise")
        if isinstance(self.weights, str):
            one_of("objective.weights", self.weights, ("row",))
        else:
            simplex(self.weights, names, "objective.weights")
        self._check_form(names)

    def _check_form(self, names: list[str]) -> None:
        """Raises ValueError for a setting that has no effect on the form, or that it lacks."""
        if self.form != "losses" and self.scale_by_margin:
            raise ValueError(f"objective.scale_by_margin=true has no effect with objective.form={self.form}; use false")
        if self.form != "margin" and self.offset:
            raise ValueError(f"objective.offset={self.offset:g} has no effect with objective.form={self.form}; use 0")
        if self.offset_scaling != "identity" and not self.offset:
            raise ValueError(
                f"objective.offset_scaling={self.offset_scaling} has no effect with objective.offset=0; use identity"
            )
        if self.offset:
            needs_difference(self.loss, "objective.offset above 0")
        if self.form != "modpo":
            if self.component is not None:
                raise ValueError(
                    f"objective.component={self.component} has no effect with objective.form={self.form}; use null"
                )
            return
        if self.component not in names:
            raise ValueError(f"objective.component={self.component}: must be one of {', '.join(names)}")
        needs_difference(self.loss, "objective.form=modpo")
        if not isinstance(self.weights, str) and self._fixed_weights()[names.index(self.component)] == 0:
            raise ValueError(
                f"objective.weights.{self.component}=0: the component whose label is learnt needs a weight"
            )

    @property
    def margins(self) -> tuple[str, ...]:
        """Components whose margins a pair must have."""
        return tuple(self.names)

    @property
    def all_margins(self) -> bool:
        """Whether it must have all of them, or one at least."""
        return self.form != "losses"

    @property
    def row_weights(self) -> bool:
        """Whether each pair has weights of its own."""
        return self.weights == "row"

    def __call__(self, policy: Stats, reference: Stats, batch: PackedBatch) -> Losses:
        """Losses [P]; metrics are DPO's, accuracy by component, and the shares of pairs turned, in conflict, undecided.

        Raises ValueError, with the place of the row, for margins or weights that are missing.
        """
        dtype = policy.logps.dtype
        margins = self._margins(batch).to(dtype)  # [P, K], 0: tie or missing
        weights = self._weights(batch).to(dtype)  # [P, K]
        lean, decided = self._lean(margins, weights)  # [P]
        turned = decided & (lean < 0)
        side = torch.where(turned, -1.0, 1.0).to(dtype)
        facing = replace(batch, groups=torch.where(turned[:, None], batch.groups[:, :2].flip(1), batch.groups[:, :2]))
        ratios = pair_ratios(policy, reference, facing)
        losses = self._losses(ratios, margins * side[:, None], weights, lean.abs())
        if self.form != "losses":
            losses = torch.where(decided, losses, torch.zeros_like(losses))
        metrics = preference_metrics(policy, ratios, facing, self.beta)
        metrics |= self._component_metrics(metrics["reward/margin"] * side, margins, weights)
        for name in ("accuracy", "reward/margin"):
            metrics[name] = metrics[name].masked_fill(~decided, math.nan)
        metrics["preference/turned"] = turned.to(dtype)
        metrics["preference/undecided"] = (~decided).to(dtype)
        return Losses((Term(losses, "example"),), metrics)

    def _lean(self, margins: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
        """How much each pair prefers chosen [P], below 0 rejected, and whether it prefers one at all [P] bool."""
        if self.form == "modpo":
            own = margins[:, self.margins.index(str(self.component))]
            return own, own != 0
        parts = weights * (margins if self.form == "margin" or self.scale_by_margin else margins.sign())
        lean = parts.sum(1)
        return lean, lean.abs() > _TIE * parts.abs().sum(1)

    def _losses(self, ratios: Ratios, margins: Tensor, weights: Tensor, lean: Tensor) -> Tensor:
        """Losses [P] of pairs and margins turned to the side preferred by `lean` >= 0."""
        if self.form == "losses":
            parts = weights * (margins if self.scale_by_margin else margins.sign())
            agree, against = parts.clamp(min=0).sum(1), (-parts).clamp(min=0).sum(1)
            return agree * self.loss(ratios, self.beta) + against * self.loss(_exchanged(ratios), self.beta)
        if self.form == "margin":
            if not self.offset:
                return self.loss(ratios, self.beta)
            # the logarithm of a tie, whose loss is left out, must not be infinite
            scaled = lean if self.offset_scaling == "identity" else torch.where(lean > 0, lean, 1.0).log()
            return self.loss(replace(ratios, chosen=ratios.chosen - self.offset * scaled / self.beta), self.beta)
        place = self.margins.index(str(self.component))
        own = weights[:, place]
        others = (weights * margins).index_fill(1, torch.tensor([place], device=margins.device), 0.0).sum(1)
        chosen = (ratios.chosen - others / self.beta) / own
        return self.loss(replace(ratios, chosen=chosen, rejected=ratios.rejected / own), self.beta)

    def _component_metrics(self, rewards: Tensor, margins: Tensor, weights: Tensor) -> dict[str, Tensor]:
        """accuracy/NAME: whether the policy's margin [P] has the sign of the component's, NaN without one; conflict."""
        found = {}
        for k, name in enumerate(self.names):
            agrees = (rewards * margins[:, k] > 0).to(rewards.dtype)
            found[f"accuracy/{name}"] = agrees.masked_fill(margins[:, k] == 0, math.nan)
        counted = margins * (weights > 0)
        found["preference/conflict"] = ((counted > 0).any(1) & (counted < 0).any(1)).to(rewards.dtype)
        return found

    def _margins(self, batch: PackedBatch) -> Tensor:
        """Margins [P, K], 0 for one that is missing and need not be there."""
        margins = _columns(batch, MARGIN, self.margins)
        missing = margins.isnan()
        lacking = missing.any(1) if self.all_margins else missing.all(1)
        if lacking.any():
            row = int(lacking.int().argmax())
            name = self.margins[int(missing[row].int().argmax())]
            raise ValueError(
                f'{batch.sources[row]}: objective.form={self.form} needs a margin of {name}: add "margins": '
                f'{{"{name}": NUMBER}} to the row'
            )
        return margins.nan_to_num(0.0)

    def _weights(self, batch: PackedBatch) -> Tensor:
        """Weights [P, K]."""
        if not self.row_weights:
            fixed = torch.tensor(self._fixed_weights(), dtype=torch.float64, device=batch.groups.device)
            return fixed.expand(len(batch.groups), -1)
        weights = _columns(batch, WEIGHT, self.margins)
        odd = weights.isnan().any(1)
        if self.form == "modpo":
            odd |= weights[:, self.margins.index(str(self.component))] == 0
        if odd.any():
            raise ValueError(
                f"{batch.sources[int(odd.int().argmax())]}: objective.weights=row needs weights of the row, one for "
                f"each of {', '.join(self.margins)}" + (", above 0 for objective.component" if self.component else "")
            )
        return weights

    def _fixed_weights(self) -> list[float]:
        assert not isinstance(self.weights, str)
        return simplex(self.weights, self.margins, "objective.weights")


def _columns(batch: PackedBatch, prefix: str, names: Sequence[str]) -> Tensor:
    """The numbers of these names [P, K]; NaN where a row has none."""
    absent = torch.full((len(batch.groups),), math.nan, device=batch.groups.device)
    return torch.stack([batch.numbers.get(prefix + name, absent) for name in names], 1)


def _exchanged(ratios: Ratios) -> Ratios:
    """Chosen as rejected."""
    return Ratios(ratios.rejected, ratios.chosen, ratios.rejected_lengths, ratios.chosen_lengths)
