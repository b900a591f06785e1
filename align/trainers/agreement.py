"""data.mixture=gradient: a source's share follows how well the gradient of its loss agrees with a target set's."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

from align.composers.gradient import cosines, mirror_step
from align.jsons import Fields, Json
from align.trainers.influence import chosen_parameters, measuring, products
from align.trainers.loop import Cotangents, TrainContext, forward_passes
from align.trainers.mixing import Learnt
from align.types import Example


class Agreement:
    """Before every `every`-th step: shares <- softmax(log shares + rate cos(g_k, g_target)), over all trained weights.

    g is the gradient of the loss of at most `size` examples, drawn by seed and step; each process holds one such
    gradient for each source and one of the target set. Dynamic gradient alignment, Fan et al. 2024, arXiv 2410.02498,
    has the inner product where the cosine stands here, which frees the rate of the size of losses and models.
    """

    def __init__(
        self,
        learnt: Learnt,
        train: Sequence[Example],
        parts: Sequence[tuple[int, int]],
        target: Sequence[Example],
        every: int,
        rate: float,
    ):
        """parts: first and last example of each source in `train`."""
        self.learnt = learnt
        self._sets = [*((train, range(*part)) for part in parts), (target, range(len(target)))]
        self._every = every
        self._rate = rate

    def before(
        self, step: int, context: TrainContext, size: int, seed: int, check: Callable[[], None]
    ) -> dict[str, float]:
        """The step's shares, measured anew where it is time; metrics of it. Weights and their gradients are left as
        they were."""
        shares = self.learnt.at(step)
        told = {}
        if step > 1 and (step - 1) % self._every == 0 and self.learnt.changes[-1][0] < step:
            found = self._cosines(step, context, size, seed, check)
            shares = mirror_step(torch.from_numpy(shares), found, self._rate).numpy()
            self.learnt.changes.append((step, shares.tolist()))
            told = {f"data/agreement_{k}": float(value) for k, value in enumerate(found, 1)}
        return told | {f"data/share_{k}": float(share) for k, share in enumerate(shares, 1)}

    def _cosines(self, step: int, context: TrainContext, size: int, seed: int, check: Callable[[], None]) -> Tensor:
        """Of each source's gradient with the target's [K] float64; 0 for one that is 0."""
        engine = measuring(context.engine)
        names = list(chosen_parameters(engine.parameters, None))
        gradients = []
        for k in range(len(self._sets)):
            gradients.append(_gradient(context, self.drawn(k, step, size, seed), names, check))
        for name in names:  # experts that no token of a set has met have no gradient there
            whole = next((found[name] for found in gradients if name in found), None)
            if whole is not None:
                for found in gradients:
                    found.setdefault(name, torch.zeros_like(whole))
        return cosines(products(engine, gradients, names))[-1, :-1]

    def drawn(self, k: int, step: int, size: int, seed: int) -> list[Example]:
        """The examples by which source k is measured before a step; the last k is the target set's."""
        examples, places = self._sets[k]
        found = np.random.default_rng([seed, step, k]).choice(len(places), min(size, len(places)), replace=False)
        return [examples[places[int(i)]] for i in np.sort(found)]

    def state(self) -> Json:
        """What the next step depends on."""
        return {"shares": self.learnt.changes}

    def restore(self, state: Fields) -> None:
        """The inverse."""
        self.learnt.changes = [(int(first), list(shares)) for first, shares in state["shares"]]


def _gradient(
    context: TrainContext, examples: Sequence[Example], names: Sequence[str], check: Callable[[], None]
) -> dict[str, Tensor]:
    """Of the loss of a step over the examples by the weights of these names; it belongs to no step."""
    gradients = measuring(context.engine).gradients(names, 1)
    derivatives = Cotangents(context, examples, [])
    for forward in forward_passes(context, examples, check, train_mode=False):
        gradients.add(forward.policy.token_logps, [derivatives.of_loss(forward)], forward.own)
    (found,) = gradients.total()
    return found
