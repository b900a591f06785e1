"""OREO: policy and value function learnt from scored completions of any origin, by the soft Bellman equation.

V(s_t) = R - beta * sum over the tokens from t on of log(policy / reference), R the reward at the end.
"""

from __future__ import annotations

from dataclasses import dataclass

from align.deferred import Tensor, torch
from align.objectives.base import Objective
from align.objectives.checks import needed_number, positive_value
from align.sums import positive, row_sums
from align.types import Losses, PackedBatch, Stats, Term


@dataclass(frozen=True)
class States:
    """Where the value function is asked: before each token, or before each step of several tokens.

    C targets of N sequences, those of a sequence one after the other. Tokens before the first step of a sequence are
    part of no step and no state.
    """

    row: Tensor  # [C] int64, ascending
    at: Tensor  # [C] bool, a token or a step begins here
    part: Tensor  # [C] int64, which of the parts that begin at `at`, or before the first of them, a token is in
    num_rows: int

    def sums_from(self, values: Tensor) -> Tensor:
        """Sums [C] of token values [C] from each token to the end of its sequence."""
        wide = values.double()  # one running sum over all sequences: float32 would lose the digits of the last ones
        through = wide.cumsum(0)
        counts = torch.bincount(self.row, minlength=self.num_rows)
        last = counts.cumsum(0) - 1  # [N]; of a sequence without targets it is not read
        return (through[last[self.row]] - through + wide).to(values.dtype)

    def part_sums(self, values: Tensor) -> Tensor:
        """Sums [C] of token values [C] over the part that each token is in."""
        return row_sums(values, self.part, len(self.part))[self.part]

    def means(self, values: Tensor) -> Tensor:
        """Means [N] of values [C] over the states of each sequence; 0 for one without states."""
        at = self.at.to(values.dtype)
        counts = row_sums(at, self.row, self.num_rows)
        return row_sums(values * at, self.row, self.num_rows) / positive(counts)

    def next_values(self, values: Tensor, after: Tensor) -> Tensor:
        """At each state the value [C] of the next state of its sequence, at the last one `after` [N]."""
        places = self.at.nonzero()[:, 0]
        out = after[self.row]
        if len(places) > 1:
            here, there = places[:-1], places[1:]
            follows = self.row[here] == self.row[there]
            out = out.index_put((here[follows],), values[there[follows]])
        return out


def states_of(row: Tensor, num_rows: int, starts: Tensor | None = None) -> States:
    """Each of C targets as a state, or with `starts` [C] bool those at which a step begins."""
    first = torch.ones_like(row, dtype=torch.bool)
    first[1:] = row[1:] != row[:-1]
    at = torch.ones_like(first) if starts is None else starts
    return States(row, at, (at | first).cumsum(0) - 1, num_rows)


def value_losses(
    log_ratio: Tensor, values: Tensor, rewards: Tensor, states: States, beta: float, clip_log: float | None
) -> Tensor:
    """(beta D_t + V_t - R)^2, mean over the states of each sequence [N]; gradient to the values only.

    log_ratio: policy - reference log-prob [C]. D_t: its sum from t to the end, moved into +-clip_log if that is given.
    values: V_t [C], before each token. rewards: [N].
    """
    future = _limited(states.sums_from(log_ratio.detach()), clip_log)
    return states.means((beta * future + values - rewards[states.row]).square())


def policy_losses(
    log_ratio: Tensor, values: Tensor, rewards: Tensor, states: States, beta: float, clip_log: float | None
) -> Tensor:
    """(beta (e_t + D_t') + V_t - R)^2, mean over the states of each sequence [N]; gradient to e_t only.

    e_t: log-ratio of the token or step that begins at t; D_t': sum of what comes after it, moved into +-clip_log.
    The values are constants: trained together with value_losses, each has the gradient of the published order, the
    value function's step first, the policy's with the values from before it.
    """
    own = states.part_sums(log_ratio)
    future = _limited(states.sums_from(log_ratio.detach()) - own.detach(), clip_log)
    return states.means((beta * (own + future) + values.detach() - rewards[states.row]).square())


def single_step_losses(
    log_ratio: Tensor, values: Tensor, rewards: Tensor, states: States, beta: float, after: Tensor | None = None
) -> Tensor:
    """(beta e_t + V_t - V_next)^2, mean over the states of each sequence [N]; gradient to policy and values.

    V_next of the last state is R + after, `after` [N] being what the value head says behind the last token: the
    authors' code adds it for tokens and not for steps. None: 0, as it should be where nothing comes after.
    """
    own = states.part_sums(log_ratio)
    end = rewards if after is None else rewards + after
    return states.means((beta * own + values - states.next_values(values, end)).square())


def trajectory_losses(log_ratio: Tensor, values: Tensor, rewards: Tensor, states: States, beta: float) -> Tensor:
    """(beta D_0 + V_0 - R)^2 of the first state of each sequence [N]; gradient to policy and values."""
    residuals = beta * states.sums_from(log_ratio) + values - rewards[states.row]
    places = torch.arange(len(states.row), device=states.row.device)
    begin = places.new_full((states.num_rows,), len(places)).scatter_reduce(
        0, states.row[states.at], places[states.at], "amin"
    )
    return row_sums(residuals.square() * (places == begin[states.row]), states.row, states.num_rows)


@dataclass(frozen=True)
class OREO(Objective):
    """policy_losses + value_coefficient * value_losses on completions with a reward, each token a state.

    The rewards are the numbers "reward" of the rows, usually 0 or 1. beta: temperature, > 0; the policy aims at
    reference * exp((R - V) / beta). clip_log: see value_losses; null: off. value_coefficient > 0: weight of the value
    head's loss, whose gradient is its own where the head has weights of its own.
    Wang et al. 2024, OREO, arXiv 2412.16145; jwhj/OREO@6f7403b. Not here: states at steps only (the functions of this
    file take them) and the authors' 0.01 * KL over the whole vocabulary (models.logprobs.full_kl; the loop has
    no place for the hidden states of the reference).

    Metrics: reward; oreo/value, of the first state; oreo/log_ratio, log(policy / reference) of the completion;
    oreo/policy_loss and oreo/value_loss. All [P], NaN for a row without targets.
    """

    beta: float
    clip_log: float | None
    value_coefficient: float

    kind = "single"
    needs = frozenset({"reference", "values"})

    def __post_init__(self) -> None:
        positive_value("objective.beta", self.beta)
        positive_value("objective.value_coefficient", self.value_coefficient)
        if self.clip_log is not None:
            positive_value("objective.clip_log", self.clip_log)

    def __call__(self, policy: Stats, reference: Stats, batch: PackedBatch) -> Losses:
        """Two terms by row; rows without targets count in neither."""
        assert policy.values is not None
        log_ratio = policy.token_logps - reference.token_logps.detach()
        given = needed_number(batch, "reward", "objective oreo")
        rows = batch.groups[:, 0]
        rewards = log_ratio.new_zeros(len(batch.lengths)).index_copy(0, rows, given.to(log_ratio.dtype))
        states = states_of(batch.row, len(batch.lengths))
        of_policy = policy_losses(log_ratio, policy.values, rewards, states, self.beta, self.clip_log)
        of_values = value_losses(log_ratio, policy.values, rewards, states, self.beta, self.clip_log)
        first = torch.ones_like(batch.row, dtype=torch.bool)
        first[1:] = batch.row[1:] != batch.row[:-1]
        measured = {
            "reward": rewards,
            "oreo/value": row_sums(policy.values.detach() * first, batch.row, states.num_rows),
            "oreo/log_ratio": row_sums(log_ratio.detach(), batch.row, states.num_rows),
            "oreo/policy_loss": of_policy.detach(),
            "oreo/value_loss": of_values.detach(),
        }
        written = torch.bincount(batch.row, minlength=states.num_rows) > 0
        return Losses(
            (Term(of_policy, "row"), Term(of_values, "row", self.value_coefficient)),
            {name: torch.where(written, values, torch.nan)[rows] for name, values in measured.items()},
        )


def _limited(values: Tensor, limit: float | None) -> Tensor:
    return values if limit is None else values.clamp(-limit, limit)
