"""The loop: which rows make a step, and that loss, gradient and metrics are those of the global batch."""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
import torch

from align.config import compose
from align.engine.local import LocalEngine
from align.models.logprobs import cached_stats
from align.models.policy import Policy
from align.objectives.losses import Sigmoid
from align.objectives.preference import WPO
from align.packing import num_tokens
from align.trainers.loop import NonFinite, ReferenceModel, TrainContext, evaluate, plan, token_plan, train_step
from align.types import Example
from tests.conftest import plain_dpo, tiny_model
from tests.engine.test_local import optimizer


def trainer(*words: str):
    return compose(["data.train=x.jsonl", *(f"trainer.{w}" for w in words)]).trainer


# ---------------------------------------------------------------------- which pairs


@pytest.mark.parametrize(
    "pairs,batch,epochs", [(10, 3, 2), (7, 7, 3), (5, 8, 4), (1, 4, 3), (16, 4, 1), (1000, 128, 2)]
)
def test_each_epoch_sees_each_pair_once(pairs, batch, epochs):
    p = plan(trainer(f"epochs={epochs}", f"batch_size={batch}"), pairs, None)
    parts = [p.indices(step, seed=3) for step in range(1, p.num_steps + 1)]
    assert [len(part) for part in parts[:-1]] == [batch] * (p.num_steps - 1)
    assert len(parts[-1]) == (epochs * pairs) % batch or batch
    stream = [i for part in parts for i in part]
    assert len(stream) == epochs * pairs
    for epoch in range(epochs):
        assert sorted(stream[epoch * pairs : (epoch + 1) * pairs]) == list(range(pairs))
    assert p.schedule_steps == p.num_steps
    assert p.indices(p.num_steps + 1, seed=3) == []


def test_epochs_and_seeds_have_orders_of_their_own():
    p = plan(trainer("max_steps=8", "batch_size=10"), 40, None)
    epochs = [[i for s in range(a, a + 4) for i in p.indices(s, 0)] for a in (1, 5)]
    assert epochs[0] != epochs[1]
    assert sorted(epochs[0]) == sorted(epochs[1])
    assert [p.indices(s, 1) for s in range(1, 5)] != [p.indices(s, 0) for s in range(1, 5)]


def test_a_step_depends_on_its_number_alone():
    """Also where an epoch ends inside the batch: no position is carried over."""
    p = plan(trainer("max_steps=40", "batch_size=8"), 21, None)
    forwards = {s: p.indices(s, 5) for s in range(1, 41)}
    backwards = {s: p.indices(s, 5) for s in range(40, 0, -1)}
    assert forwards == backwards
    assert all(len(part) == 8 for part in forwards.values())
    counts = Counter(i for part in forwards.values() for i in part)
    assert set(counts.values()) <= {320 // 21, 320 // 21 + 1}
    # step 3 holds the last 5 of the first epoch and the first 3 of the second
    assert sorted(forwards[1] + forwards[2] + forwards[3][:5]) == list(range(21))


def test_steps_and_horizon():
    assert plan(trainer("epochs=2", "batch_size=16"), 33, None).num_steps == 5
    p = plan(trainer("max_steps=7"), 33, None)
    assert (p.num_steps, p.schedule_steps) == (7, 7)
    p = plan(trainer("max_steps=7", "schedule_steps=9"), 33, None)
    assert (p.num_steps, p.schedule_steps) == (7, 9)
    p = plan(trainer("max_steps=20"), 33, 7)  # resumed with more steps
    assert (p.num_steps, p.schedule_steps) == (20, 7)


def test_pair_over_the_budget_is_named_before_the_run(make_pairs):
    pairs = make_pairs(3)
    most = max(num_tokens(p.rows, "packed") for p in pairs)
    assert token_plan(pairs, "packed", most)[0] == sum(num_tokens(p.rows, "packed") for p in pairs)
    with pytest.raises(ValueError, match=r"trainer\.micro_batch_tokens"):
        token_plan(pairs, "packed", most - 1)


# ---------------------------------------------------------------------- one step


class FixedReference:
    """Log-probs by source as a cache gives them, which asks by row."""

    def __init__(self, pairs, seed=5):
        rng = np.random.default_rng(seed)
        self.values = {}
        for p in pairs:
            count = int(p.rows[0].targets.sum() + p.rows[1].targets.sum())
            self.values[p.source] = -rng.random(count).astype(np.float32) * 3

        self.owners = {id(row): (p.source, k, p) for p in pairs for k, row in enumerate(p.rows)}

    def __call__(self, rows):
        out = []
        for row in rows:
            source, k, p = self.owners[id(row)]
            first = int(p.rows[0].targets.sum())
            out.append(self.values[source][:first] if k == 0 else self.values[source][first:])
        return out


def named(pairs: list[Example]) -> list[Example]:
    """The pairs with sources of their own and origins a, b and none."""
    return [replace(p, source=f"rows:{i}", origin=("a", "b", "")[i % 3]) for i, p in enumerate(pairs)]


def context(reference, max_tokens=10_000, layout="shared", objective=None, dtype=torch.float64) -> TrainContext:
    policy = Policy(tiny_model("llama", dtype), layout)
    engine = LocalEngine(policy, optimizer(max_grad_norm=None), torch.float32)
    objective = objective or WPO(0.1, Sigmoid(0.0), "sampled", 1.0)
    return TrainContext(engine, objective, layout, max_tokens, ReferenceModel(reference, None))


def gradients_of_step(own: TrainContext, pairs, lr=0.0):
    """Metrics and the gradient that reached the optimiser."""
    taken = {}
    step = own.engine.step

    def remember(lr: float) -> None:
        taken["g"] = torch.cat([p.grad.flatten() for p in own.engine.parameters.values()]).clone()
        step(lr)

    own.engine.step = remember
    metrics = train_step(own, pairs, lr)
    own.engine.step = step
    return metrics, taken["g"]


@pytest.mark.parametrize("layout", ["shared", "packed", "padded"])
def test_micro_batches_do_not_change_the_step(make_pairs, layout):
    pairs = named(make_pairs(11))
    reference = FixedReference(pairs)
    whole, gradient = gradients_of_step(context(reference, layout=layout), pairs)
    assert whole["tokens/micro_batches"] == 1
    for budget in (60, 90, 200):
        parts, g = gradients_of_step(context(reference, budget, layout), pairs)
        assert parts["tokens/micro_batches"] > 1
        torch.testing.assert_close(g, gradient, rtol=1e-5, atol=1e-8)
        for key in whole.keys() - {"tokens/micro_batches", "tokens/processed"}:
            assert parts[key] == pytest.approx(whole[key], rel=1e-5, abs=1e-8), key


def by_hand(own: TrainContext, pairs, name: str) -> list[float]:
    """A metric of the objective, each pair on its own."""
    from align.packing import pack, token_column

    out = []
    for p in pairs:
        batch = pack([p], own.layout)
        batch = replace(batch, reference_token_logps=token_column(own.reference.cached(p.rows), batch))
        with torch.no_grad():
            reference = cached_stats(batch.reference_token_logps, batch)
            losses = own.objective(own.engine.forward(batch, own.objective.needs), reference, batch)
        out.append(float(losses.terms[0].losses.sum()) if name == "loss" else float(losses.metrics[name][0]))
    return out


def test_metrics_are_means_over_the_global_batch(make_pairs):
    pairs = named(make_pairs(11))
    own = context(FixedReference(pairs), 60)
    expected = {name: by_hand(own, pairs, name) for name in ("loss", "accuracy", "reward/margin", "wpo/weight")}
    metrics = train_step(own, pairs, 0.0)
    assert metrics["tokens/micro_batches"] > 2
    assert metrics["loss/total"] == pytest.approx(np.mean(expected["loss"]), rel=1e-6)
    assert metrics["accuracy/train"] == pytest.approx(np.mean(expected["accuracy"]))
    assert metrics["reward/margin"] == pytest.approx(np.mean(expected["reward/margin"]), rel=1e-5)
    assert metrics["wpo/weight"] == pytest.approx(np.mean(expected["wpo/weight"]), rel=1e-6)
    assert metrics["tokens/real"] == sum(len(r.token_ids) for p in pairs for r in (p.rows[0], p.rows[1]))
    assert metrics["tokens/targets"] == sum(int(r.targets.sum()) for p in pairs for r in (p.rows[0], p.rows[1]))
    held = evaluate(own, pairs)
    assert held["loss/heldout"] == pytest.approx(metrics["loss/total"])
    assert held["accuracy/heldout"] == pytest.approx(metrics["accuracy/train"])
    assert held["heldout/reward_margin"] == pytest.approx(metrics["reward/margin"])


def test_means_by_origin(make_pairs):
    pairs = named(make_pairs(11))
    own = context(FixedReference(pairs), 60)
    weights = by_hand(own, pairs, "wpo/weight")
    metrics = train_step(own, pairs, 0.0)
    for k, name in enumerate(("a", "b", "unnamed")):
        assert metrics[f"wpo/weight_{name}"] == pytest.approx(np.mean(weights[k::3]), rel=1e-6)


@pytest.mark.parametrize("budget", [60, 10_000])
def test_nonfinite_names_its_rows_and_touches_nothing(make_pairs, budget):
    pairs = named(make_pairs(9))
    reference = FixedReference(pairs)
    for bad, value in (("rows:4", np.nan), ("rows:7", np.inf)):
        reference.values[bad] = np.full_like(reference.values[bad], value)
    own = context(reference, budget, objective=plain_dpo(0.1, Sigmoid(0.0)))
    before = {k: v.clone() for k, v in own.engine.model_state().items()}
    with pytest.raises(NonFinite) as caught:
        train_step(own, pairs, 1e-3)
    assert set(str(caught.value).partition(" for ")[2].split(", ")) == {"rows:4", "rows:7"}
    assert all(torch.equal(v, before[k]) for k, v in own.engine.model_state().items())
    assert own.engine.optimizer_state().keys() == {"rng|cpu"}  # not a step taken


def test_nonfinite_gradient_of_a_finite_loss(make_pairs):
    pairs = named(make_pairs(3))
    own = context(FixedReference(pairs))
    weight = next(iter(own.engine.parameters.values()))
    weight.register_hook(lambda g: g * math.inf)
    before = {k: v.clone() for k, v in own.engine.model_state().items()}
    with pytest.raises(NonFinite, match=r"gradient is not a number.*rows:0, rows:1, rows:2"):
        train_step(own, pairs, 1e-3)
    assert all(torch.equal(v, before[k]) for k, v in own.engine.model_state().items())


def test_training_prefers_the_chosen(make_pairs):
    pairs = named(make_pairs(8))
    own = context(FixedReference(pairs), objective=plain_dpo(0.1, Sigmoid(0.0)))
    first = train_step(own, pairs, 1e-3)
    for _ in range(15):
        last = train_step(own, pairs, 1e-3)
    assert last["loss/total"] < 0.7 * first["loss/total"]
    assert last["optimizer/lr"] == 1e-3
    assert last["optimizer/gradient_norm"] > 0


def test_evaluation_can_be_stopped_and_leaves_no_gradient(make_pairs):
    pairs = named(make_pairs(9))
    own = context(FixedReference(pairs), 60)
    calls = []

    def check() -> None:
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        evaluate(own, pairs, check)
    assert all(p.grad is None for p in own.engine.parameters.values())
