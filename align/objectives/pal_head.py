"""The head of PAL and its mathematics, as pure functions."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn

MAX_SCALE = 100.0  # of the cosine: the limit of CLIP's logit scale, which the authors keep


class PALHead(nn.Module):
    """Hidden states [N, H] to the reward of each for each user [N, U].

    Parameters: projector f, prototypes [K, H] ([K, dim] for point=mixture), user_logits [U, K], whose softmax are the
    users' weights, and log_scale for angle. The authors' projector with names of its layers kept; without residuals.
    """

    def __init__(
        self,
        width: int,
        num_users: int,
        num_prototypes: int,
        dim: int,
        num_layers: int,
        point: str,
        comparison: str,
    ):
        super().__init__()
        self.point = point
        self.comparison = comparison
        self.projector = projector(width, dim, num_layers)
        # as large as hidden states are after a norm
        self.prototypes = nn.Parameter(torch.randn(num_prototypes, dim if point == "mixture" else width))
        self.user_logits = nn.Parameter(torch.randn(num_users, num_prototypes))
        self.log_scale = nn.Parameter(torch.tensor(math.log(1 / 0.07))) if comparison == "angle" else None  # CLIP's

    def forward(self, last: Tensor) -> Tensor:
        """Rewards of the states at the last tokens."""
        return self.rewards(last, self.user_logits)

    def rewards(self, hidden: Tensor, logits: Tensor) -> Tensor:
        """Rewards [N, U] of hidden states [N, H] for users with these logits [U, K]."""
        embeddings = self.projector(hidden)
        points = ideal_points(self.projector, self.prototypes, logits, self.point)  # [U, d]
        if self.log_scale is None:
            # not by matrix products, whose differences of squares lose digits when both are close
            return -torch.cdist(embeddings, points, compute_mode="donot_use_mm_for_euclid_dist")
        return F.normalize(embeddings, dim=-1) @ F.normalize(points, dim=-1).T * scale(self.log_scale)

    def add_user(self, logits: Tensor) -> int:
        """Append a user with these logits [K]; returns its number."""
        known = self.user_logits
        added = torch.cat([known.data, logits.detach().to(known)[None]])
        self.user_logits = nn.Parameter(added, requires_grad=known.requires_grad)
        return len(added) - 1


def projector(width: int, dim: int, num_layers: int) -> nn.Sequential:
    """f: linear to `dim`, then num_layers times GELU and a linear layer. An empty place where the authors drop out."""
    layers: list[nn.Module] = [nn.Linear(width, dim)]
    for _ in range(num_layers):
        layers += [nn.GELU(), nn.Identity(), nn.Linear(dim, dim)]
    return nn.Sequential(*layers)


def ideal_points(project: nn.Module, prototypes: Tensor, logits: Tensor, point: str) -> Tensor:
    """Ideal points [U, d] of users with these logits [U, K], w = softmax(logits).

    projected_mixture f(w P), mixture_of_projections w f(P), mixture w P (prototypes then lie among the embeddings).
    """
    weights = logits.softmax(-1)
    if point == "projected_mixture":
        return project(weights @ prototypes)
    return weights @ (project(prototypes) if point == "mixture_of_projections" else prototypes)


def prompt_points(projects: Mapping[str, nn.Module] | nn.ModuleList, hidden: Tensor, logits: Tensor) -> Tensor:
    """Ideal points [B, T, d] of PAL-B, sum_k w_k g_k(hidden): of prompt states [B, T, H] and logits [B, K]."""
    modules = list(projects.values()) if isinstance(projects, Mapping) else list(projects)
    each = torch.stack([g(hidden) for g in modules], 1)  # [B, K, T, d]
    return (logits.softmax(-1)[:, :, None, None] * each).sum(1)


def distances(embeddings: Tensor, points: Tensor) -> Tensor:
    """|f - a| [B, T] of embeddings [B, T, d]; points [B, d], or [B, T, d]."""
    return torch.linalg.vector_norm(embeddings - _by_token(points), dim=-1)


def cosines(embeddings: Tensor, points: Tensor, log_scale: Tensor) -> Tensor:
    """scale cos(f, a) [B, T]; arguments as in distances."""
    return (F.normalize(embeddings, dim=-1) * F.normalize(_by_token(points), dim=-1)).sum(-1) * scale(log_scale)


def scale(log_scale: Tensor) -> Tensor:
    """What cosines are multiplied with, at most 100."""
    return log_scale.exp().clamp(max=MAX_SCALE)


def _by_token(points: Tensor) -> Tensor:
    return points[:, None] if points.ndim == 2 else points
