"""The offline loop: which examples make a step, forward, loss over the global count, backward, step, metrics.

Blind to the algorithm: an objective says what it needs and what it returns.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Protocol

import numpy as np
import torch

from align.config import TrainerConfig
from align.data.stored import Stored
from align.engine.base import Engine
from align.engine.world import World
from align.models.logprobs import cached_stats
from align.objectives.base import Objective
from align.packing import (
    check_budget,
    micro_batches,
    num_tokens,
    pack,
    pack_groups,
    shares,
    to_device,
    token_column,
    with_extras,
)
from align.sums import positive
from align.types import Example, Layout, Losses, PackedBatch, Row, Stats, Term, Unit


class NonFinite(RuntimeError):
    """The loss or its gradient is no number; the message names the rows."""


@dataclass(frozen=True)
class Plan:
    """Which steps a run takes."""

    num_examples: int
    batch_size: int
    num_steps: int  # after which the run is complete
    schedule_steps: int

    def indices(self, step: int, seed: int) -> list[int]:
        """Examples of optimiser step 1, 2, ...: consecutive parts of one permutation per epoch, each example once.

        A function of the step alone: a resumed run needs no position, and no row is skipped or seen twice. With
        the number of epochs fixed the last step has what is left.
        """
        first = (step - 1) * self.batch_size
        last = int(min(first + self.batch_size, self.limit))
        out = []
        for k in range(first, last):
            epoch, position = divmod(k, self.num_examples)
            out.append(int(_permutation(self.num_examples, seed, epoch)[position]))
        return out

    limit: float = math.inf  # examples seen in the whole run


_permutations: dict[tuple[int, int, int], np.ndarray] = {}


def _permutation(n: int, seed: int, epoch: int) -> np.ndarray:
    key = (n, seed, epoch)
    if key not in _permutations:
        while len(_permutations) > 2:
            _permutations.pop(next(iter(_permutations)))
        _permutations[key] = np.random.default_rng([seed, epoch]).permutation(n)
    return _permutations[key]


def plan(config: TrainerConfig, num_examples: int, schedule_steps: int | None) -> Plan:
    """The steps of a run; schedule_steps: the horizon fixed at its first start, None at that start."""
    if config.max_steps is not None:
        steps, limit = config.max_steps, math.inf
    else:
        limit = config.epochs * num_examples
        steps = -(-limit // config.batch_size)
    horizon = schedule_steps or config.schedule_steps or steps
    return Plan(num_examples, config.batch_size, steps, horizon, limit)


@dataclass(frozen=True)
class ReferenceModel:
    """A frozen model whose log-probs the objective reads: cached by row, or computed for each batch."""

    cached: Callable[[Sequence[Row]], list[np.ndarray]] | None
    network: Callable[[PackedBatch], Stats] | None


@dataclass(frozen=True)
class TrainContext:
    """What a step of training or evaluation needs: engine (policy, optimiser), objective, batching, references."""

    engine: Engine
    objective: Objective
    layout: Layout
    max_tokens: int  # of a micro-batch
    reference: ReferenceModel | None
    # by the extra of a batch that holds their log-probs
    extra_references: Mapping[str, ReferenceModel] = field(default_factory=dict)


@dataclass(frozen=True)
class ForwardPass:
    """A micro-batch and its forward pass through the policy, with the autograd graph."""

    part: list[int]  # its examples
    own: bool  # False: another process's, see packing.shares
    batch: PackedBatch
    policy: Stats
    reference: Stats | None


class StepHook(Protocol):
    """Called inside a step at each backward pass and at its end; it must not change the step."""

    def backward(self, forward: ForwardPass, loss: torch.Tensor, last: bool) -> None:
        """In the place of the engine's, which it calls before all else: what is kept of a forward serves the first."""
        ...

    def gathered(self) -> None:
        """The gradient is whole and finite; the weights have not moved."""
        ...


def train_step(
    context: TrainContext, examples: Sequence[Example], lr: float, hook: StepHook | None = None
) -> dict[str, float]:
    """One optimiser step over all of `examples`; returns its metrics.

    Raises NonFinite before the weights are touched.
    """
    engine = context.engine
    values = _step_values(context, examples)
    engine.policy.train()
    totals = _Totals(examples)
    parts = _parts(context, examples)
    for number, (part, own) in enumerate(parts, 1):
        forward = _forward_pass(context, examples, part, own, values, _needed_outputs(context.objective))
        out = context.objective(forward.policy, forward.reference, forward.batch)
        loss = totals.add(forward.batch, out) if own else totals.zero_loss(out)
        if hook is None:
            engine.backward(loss, last=number == len(parts))
        else:
            hook.backward(forward, loss, last=number == len(parts))
    # The device is not asked for anything before this: until here the host is ahead of it.
    (norm,) = totals.read(engine.gradient_norm())
    nonfinite = [source for found in engine.world.gather(totals.nonfinite()) for source in found]
    if nonfinite:
        raise NonFinite(f"the loss is not a number for {', '.join(nonfinite[:8])}")
    if not math.isfinite(norm):
        rows = ", ".join(e.source for e in examples[:8])
        raise NonFinite(f"the gradient is not a number; its batch holds {rows}")
    if hook is not None:
        hook.gathered()
    engine.step(lr)
    return totals.metrics("train", engine.world) | {"optimizer/gradient_norm": norm, "optimizer/lr": lr}


@torch.no_grad()
def evaluate(
    context: TrainContext, examples: Sequence[Example], check: Callable[[], None] = lambda: None
) -> dict[str, float]:
    """Metrics over held-out examples, taken as one step. check is called between micro-batches and may raise."""
    context.engine.policy.eval()
    values = _step_values(context, examples, check)
    totals = _Totals(examples)
    for part, own in _parts(context, examples):
        check()
        forward = _forward_pass(context, examples, part, own, values, _needed_outputs(context.objective))
        found = context.objective(forward.policy, forward.reference, forward.batch)
        if own:
            totals.add(forward.batch, found)
    totals.read()
    metrics = totals.metrics("heldout", context.engine.world)
    return {k: v for k, v in metrics.items() if not k.startswith("tokens/")}


@torch.no_grad()
def reference_gap(context: TrainContext, examples: Sequence[Example]) -> float:
    """Largest difference between policy and reference over the rows of the examples, nats per target token."""
    context.engine.policy.eval()
    gap = 0.0
    for part, _ in _parts(context, examples):
        chosen = [examples[i] for i in part]
        batch = _on_device(context, pack(chosen, context.layout), [row for e in chosen for row in e.rows])
        policy, reference = context.engine.forward(batch, frozenset()), _reference(context, batch)
        assert reference is not None
        gap = max(gap, float(((policy.logps - reference.logps).abs() / positive(policy.lengths)).max()))
    return max(context.engine.world.gather(gap))


@torch.no_grad()
def token_values(
    network: Callable[[PackedBatch], Stats],
    examples: Sequence[Example],
    layout: Layout,
    max_tokens: int,
    device: torch.device,
    names: Sequence[str] = ("token_logps",),
    check: Callable[[], None] = lambda: None,
    world: World | None = None,
) -> dict[str, list[list[np.ndarray]]]:
    """Token statistics of a network by name: for each example, for each of its rows, an array [targets of the row].

    world: the processes that share the work; all of them get all values.
    """
    world = world or World()
    sources = [e.source for e in examples]
    found: dict[int, dict[str, list[np.ndarray]]] = {}
    parts = micro_batches([e.rows for e in examples], sources, layout, max_tokens, world.size)
    for part, own in shares(parts, world.rank, world.size):
        check()
        batch = to_device(pack_groups([examples[i].rows for i in part], layout, [sources[i] for i in part]), device)
        stats = network(batch)
        if not own:
            continue
        borders = np.cumsum([int(row.targets.sum()) for i in part for row in examples[i].rows])[:-1]
        pieces = {name: iter(np.split(getattr(stats, name).float().cpu().numpy(), borders)) for name in names}
        for i in part:
            found[i] = {name: [next(pieces[name]) for _ in examples[i].rows] for name in names}
    everything = {i: values for part in world.gather(found) for i, values in part.items()}
    return {name: [everything[i][name] for i in range(len(examples))] for name in names}


@torch.no_grad()
def score_rows(context: TrainContext, examples: Sequence[Example], check: Callable[[], None]) -> np.ndarray | None:
    """A reward model's outputs [N, D] float64 of all rows of the examples; None without examples."""
    context.engine.policy.eval()
    out = []
    for part, own in _parts(context, examples):
        check()
        batch = to_device(pack([examples[i] for i in part], context.layout), context.engine.policy.device)
        scores = context.engine.forward(batch, frozenset()).scores
        assert scores is not None
        if own:
            out.append(scores.double().cpu().numpy())
    out = [scores for found in context.engine.world.gather(out) for scores in found]
    return np.concatenate(out) if out else None


def _parts(context: TrainContext, examples: Sequence[Example]) -> list[tuple[list[int], bool]]:
    """This process's micro-batches, see packing.shares."""
    return _shared(context, [e.rows for e in examples], [e.source for e in examples])


def _shared(
    context: TrainContext, groups: Sequence[Sequence[Row]], sources: Sequence[str]
) -> list[tuple[list[int], bool]]:
    world = context.engine.world
    parts = micro_batches(groups, sources, context.layout, context.max_tokens, world.size)
    return shares(parts, world.rank, world.size)


@torch.no_grad()
def _step_values(
    context: TrainContext, examples: Sequence[Example], check: Callable[[], None] = lambda: None
) -> torch.Tensor | None:
    """What the objective must know of the whole step before its first loss [B, K], or None.

    A point that all losses of a step share (KTO's) or an order among them (AOT's) would depend on the split into
    micro-batches if each of these made its own.
    """
    objective = context.objective
    which = objective.step_rows
    if which is None:
        return None
    own = which == "examples"
    groups = [e.rows if own else (e.extras[which],) for e in examples]
    sources = [e.source for e in examples]
    engine = context.engine
    engine.policy.eval()
    found: list[tuple[torch.Tensor, torch.Tensor]] = []
    for part, mine in _shared(context, groups, sources):
        check()
        rows = [row for i in part for row in groups[i]]
        if own:
            packed = pack([examples[i] for i in part], context.layout)
        else:
            packed = pack_groups([groups[i] for i in part], context.layout, [sources[i] for i in part])
        batch = _on_device(context, with_extras(packed, {"step_index": torch.tensor(part)}), rows)
        policy = engine.forward(batch, _needed_outputs(objective))
        values = objective.step_values(policy, _reference(context, batch), batch)
        if mine:
            found.append((batch.extras["step_index"], values))
    if engine.world.size > 1:
        everyone = engine.world.gather([(index.cpu(), values.cpu()) for index, values in found])
        found = [(index, values) for part in everyone for index, values in part]
    index, values = (torch.cat(parts).to(engine.policy.device) for parts in zip(*found, strict=True))
    return torch.empty_like(values).index_copy_(0, index, values)


def _needed_outputs(objective: Objective) -> frozenset[str]:
    """Of the network, beside log-probs; names that it does not know are others'."""
    return frozenset((*objective.needs, *objective.extras))


def _forward_pass(
    context: TrainContext,
    examples: Sequence[Example],
    part: list[int],
    own: bool,
    step_values: torch.Tensor | None,
    needs: frozenset[str],
) -> ForwardPass:
    chosen = [examples[i] for i in part]
    packed = pack(chosen, context.layout)
    if step_values is not None:
        packed = with_extras(packed, {"step_index": torch.tensor(part)})
    batch = _on_device(context, packed, [row for e in chosen for row in e.rows])
    if step_values is not None:
        batch = with_extras(batch, {"step_values": step_values})
    reference = _reference(context, batch)
    return ForwardPass(part, own, batch, context.engine.forward(batch, needs), reference)


def _on_device(context: TrainContext, batch: PackedBatch, rows: Sequence[Row]) -> PackedBatch:
    """A packed batch where the policy is, with the references' log-probs of its targets: those that are cached cross
    with it, those that only a network of its own can give are made there."""
    if context.reference is not None and context.reference.cached is not None:
        batch = replace(batch, reference_token_logps=token_column(context.reference.cached(rows), batch))
    models = context.extra_references
    cached = {k: token_column(m.cached(rows), batch) for k, m in models.items() if m.cached is not None}
    batch = to_device(with_extras(batch, cached), context.engine.policy.device)
    with torch.no_grad():
        return with_extras(batch, {k: m.network(batch).token_logps for k, m in models.items() if m.network is not None})


def _reference(context: TrainContext, batch: PackedBatch) -> Stats | None:
    if context.reference is None:
        return None
    if batch.reference_token_logps is not None:
        return cached_stats(batch.reference_token_logps, batch)
    assert context.reference.network is not None
    with torch.no_grad():
        return context.reference.network(batch)


class _Totals:
    """Sums over the micro-batches of a step, divided by counts known before the first of them.

    What is summed stays on the device until read() gets all of it at once.
    """

    def __init__(self, examples: Sequence[Example]):
        self.examples = examples
        self.counts: dict[tuple[Unit, int | None], float] = {}
        rows = [row for e in examples for row in e.rows]
        self.real = sum(len(row.token_ids) for row in rows)
        self.targets = sum(int(row.targets.sum()) for row in rows)
        self.named = any(e.origin for e in examples)  # of the whole step, not of a micro-batch
        self.processed = 0
        self.num_parts = 0
        self.loss = 0.0
        # sum and number of the values that apply, by metric
        self.means: dict[str, tuple[float, int]] = {}
        self._parts: list[_Part] = []
        self._nonfinite: list[_Part] = []

    def add(self, batch: PackedBatch, out: Losses) -> torch.Tensor:
        """The share of a micro-batch in the loss of the step."""
        loss = sum(term.weight * term.losses.sum() / self._count(term) for term in out.terms)
        assert isinstance(loss, torch.Tensor)
        self.processed += len(batch.input_ids)
        self.num_parts += 1
        each = tuple(term.losses.detach() for term in out.terms if term.unit == "example")
        self._parts.append(_Part(batch, loss.detach(), dict(out.metrics), out.by_origin, each))
        return loss

    def read(self, *more: torch.Tensor) -> list[float]:
        """Wait for the device, once: for what was added, and for these single numbers, which are returned."""
        tensors = [*more, *(t for part in self._parts for t in (part.loss, *part.metrics.values()))]
        numbers = iter(_on_host(tensors))
        first = [next(numbers)[0] for _ in more]
        for part in self._parts:
            (loss,) = next(numbers)
            self.loss += loss
            if not math.isfinite(loss):
                self._nonfinite.append(part)
            for name in part.metrics:
                listed = next(numbers)
                self._mean(name, listed)
                if name in part.by_origin and self.named:
                    for origin, value in zip(part.batch.origins, listed, strict=True):
                        self._mean(f"{name}_{origin or 'unnamed'}", [value])
        self._parts = []
        return first

    def nonfinite(self) -> list[str]:
        """The rows whose own loss is not finite, of what was read; all of a micro-batch where none is singled out."""
        return [source for part in self._nonfinite for source in part.nonfinite_rows()]

    def zero_loss(self, out: Losses) -> torch.Tensor:
        """The loss of a micro-batch that is another process's: 0, with a graph, as every process must have one."""
        loss = sum(torch.nan_to_num(term.losses).sum() * 0.0 for term in out.terms)
        assert isinstance(loss, torch.Tensor)
        return loss

    def _mean(self, name: str, values: Sequence[float]) -> None:
        total, count = self.means.get(name, (0.0, 0))
        present = [v for v in values if not math.isnan(v)]
        self.means[name] = (total + sum(present), count + len(present))

    def _count(self, term: Term) -> float:
        key = (term.unit, term.column)
        if key not in self.counts:
            if term.unit == "example":
                count: float = len(self.examples)
            else:
                rows = [row for e in self.examples for row in _column_of(e.rows, term.column)]
                # a sequence without targets is in no mean over sequences
                with_targets = [row for row in rows if row.targets.any()]
                count = len(with_targets) if term.unit == "row" else sum(_target_weight(row) for row in with_targets)
            self.counts[key] = count or 1.0
        return self.counts[key]

    def metrics(self, split: str, world: World) -> dict[str, float]:
        """Means over the examples they apply to, of all processes; left out where they apply to none. A name without a
        group gets the split as its second part; in held-out metrics the other names go into the group heldout."""
        self._join(world)
        means = {name: total / count for name, (total, count) in self.means.items() if count}
        out = {"loss/total" if split == "train" else "loss/heldout": self.loss}
        for name, value in sorted(means.items()):
            if "/" not in name:
                out[f"{name}/{split}"] = value
            elif split == "train":
                out[name] = value
            else:
                out[f"heldout/{name.replace('/', '_')}"] = value
        out |= {
            "tokens/real": self.real,
            "tokens/processed": self.processed,
            "tokens/targets": self.targets,
            "tokens/micro_batches": self.num_parts,
        }
        return out

    def _join(self, world: World) -> None:
        """Add up the processes' sums."""
        if world.size == 1:
            return
        everyone = world.gather((self.loss, self.processed, self.num_parts, self.means))
        self.loss = sum(loss for loss, *_ in everyone)
        self.processed = sum(processed for _, processed, *_ in everyone)
        self.num_parts = sum(num_parts for _, _, num_parts, _ in everyone)
        self.means = {}
        for *_, means in everyone:
            for name, (total, count) in means.items():
                before, number = self.means.get(name, (0.0, 0))
                self.means[name] = (before + total, number + count)


def _column_of(rows: Sequence[Row], column: int | None) -> Sequence[Row]:
    return rows if column is None else (rows[column],)


def _target_weight(row: Row) -> float:
    if row.weights is None:
        return int(row.targets.sum())
    return float(row.weights[row.targets].sum(dtype=np.float64))


@dataclass(frozen=True)
class _Part:
    """What is kept of a micro-batch until its step is read, on the device."""

    batch: PackedBatch
    loss: torch.Tensor
    metrics: dict[str, torch.Tensor]
    by_origin: Collection[str]
    example_losses: tuple[torch.Tensor, ...]  # [P] each

    def nonfinite_rows(self) -> list[str]:
        """The rows whose own loss is not finite, or all of them if none is singled out."""
        sources = self.batch.sources
        flags = [torch.isfinite(losses).tolist() for losses in self.example_losses]
        return [s for part in flags for s, ok in zip(sources, part, strict=True) if not ok] or list(sources)


def _on_host(tensors: Sequence[torch.Tensor]) -> list[list[float]]:
    """The numbers of tensors of any shape, by one copy of those that are on a device."""
    flat = [t.detach().reshape(-1) for t in tensors]
    there = [t if t.dtype == torch.float32 else t.double() for t in flat if t.device.type != "cpu"]
    copied = iter(torch.cat(there).cpu().split([len(t) for t in there]) if there else ())
    return [(t if t.device.type == "cpu" else next(copied)).tolist() for t in flat]


def token_plan(examples: Sequence[Example], layout: Layout, max_tokens: int) -> tuple[int, int]:
    """Tokens of a pass over the examples in this layout, and with every sequence on its own.

    Raises ValueError if an example does not fit a micro-batch: better now than in the middle of the run.
    """
    if isinstance(examples, Stored):
        costs, extra = examples.costs(layout)
        over = np.flatnonzero((costs > max_tokens) | (extra > max_tokens))
        if len(over):
            token_plan([examples[int(over[0])]], layout, max_tokens)
        streams, plain = ("packed" if layout == "padded" else layout), examples.costs("packed")[0]
        return int(examples.costs(streams)[0].sum()), int(plain.sum())
    sources = [e.source for e in examples]
    check_budget((e.rows for e in examples), sources, layout, max_tokens)
    for name in examples[0].extras if examples else ():
        check_budget(((e.extras[name],) for e in examples), sources, layout, max_tokens)
    stream = sum(num_tokens(e.rows, layout) for e in examples)
    return stream, sum(num_tokens(e.rows, "packed") for e in examples)


def forward_passes(
    context: TrainContext, examples: Sequence[Example], check: Callable[[], None], train_mode: bool
) -> Iterator[ForwardPass]:
    """The forward passes of a step, without its backward. check is called between them and may raise.

    train_mode: with activation checkpointing, as in the step; a graph then serves for one backward only. There must be
    no dropout.
    """
    values = _step_values(context, examples, check)
    context.engine.policy.train(train_mode)
    needs = _needed_outputs(context.objective) - {"entropy"}  # which is only watched
    for part, own in _parts(context, examples):
        check()
        yield _forward_pass(context, examples, part, own, values, needs)


class Cotangents:
    """Of the loss of a step that has other columns in the place of advantages: its derivatives by log-probs.

    What a loss has beside functions of log-probs, entropy and values, is the same for all of them and left out.
    """

    def __init__(self, context: TrainContext, examples: Sequence[Example], columns: Sequence[str]):
        self._objective = context.objective
        self._columns = columns
        self._totals = _Totals(examples)

    def __call__(self, forward: ForwardPass) -> torch.Tensor:
        """Of each token of a micro-batch, one for each column [C, K]."""
        policy, batch = forward.policy, forward.batch
        leaf = policy.token_logps.detach().requires_grad_()
        still = {name: v.detach() for name, v in vars(policy).items() if isinstance(v, torch.Tensor)}
        stats = replace(policy, **{**still, "token_logps": leaf})
        found = []
        for column in self._columns:
            own = replace(batch, columns={**batch.columns, "advantages": batch.columns[column]})
            with torch.enable_grad():
                loss = self._totals.add(own, self._objective(stats, forward.reference, own))
            found.append(torch.autograd.grad(loss, leaf)[0])
        return torch.stack(found, 1)

    def of_loss(self, forward: ForwardPass) -> torch.Tensor:
        """The same of the loss as it is [C], by way of what the network sums over rows from the log-probs, too."""
        with torch.enable_grad():
            loss = self._totals.add(forward.batch, self._objective(forward.policy, forward.reference, forward.batch))
        return torch.autograd.grad(loss, forward.policy.token_logps)[0]
