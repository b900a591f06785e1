"""LocalEngine: clipping, decay, restoring, and the learning rate by hand."""

from __future__ import annotations

import math

import pytest
import torch

from align.config import OptimizerConfig, OwnOptimizerConfig
from align.engine.local import LocalEngine, learning_rate
from align.models.policy import Policy, lora
from align.packing import pack
from tests.conftest import tiny_model

NORMS = ("norm.weight", "layernorm.weight")


def optimizer(**changes) -> OptimizerConfig:
    values = dict(
        lr=1e-3, betas=[0.9, 0.999], eps=1e-8, weight_decay=0.0, max_grad_norm=1.0, schedule="cosine",
        warmup_ratio=0.0, min_lr_ratio=0.1, decay_ratio=0.2,
    )  # fmt: skip
    return OptimizerConfig(**(values | changes))


def engine(rank=0, dropout=0.0, precision=torch.float32, **changes) -> LocalEngine:
    model = tiny_model("llama", torch.float32)
    if rank:
        model = lora(model, rank=rank, alpha=2.0 * rank, dropout=dropout, targets="all-linear", seed=0)
    return LocalEngine(Policy(model, "packed"), optimizer(**changes), precision)


def backward(own: LocalEngine, pairs, scale=1.0) -> None:
    stats = own.forward(pack(pairs, "packed"), frozenset())
    own.backward(-scale * stats.logps.mean())


def gradient(own: LocalEngine) -> torch.Tensor:
    return torch.cat([p.grad.flatten() for p in own.parameters.values() if p.grad is not None])


@pytest.mark.parametrize("rank", [0, 4])
def test_clipping(make_pairs, rank):
    pairs = make_pairs(4)
    free, clipped = engine(rank, max_grad_norm=None), engine(rank, max_grad_norm=0.25)
    for own in (free, clipped):
        backward(own, pairs)
    before = gradient(free)
    norm = float(before.double().norm())
    assert norm > 1
    assert float(free.gradient_norm()) == pytest.approx(norm, rel=1e-5)
    assert torch.equal(gradient(free), before)
    assert float(clipped.gradient_norm()) == pytest.approx(norm, rel=1e-5)  # as it was
    torch.testing.assert_close(gradient(clipped), before * (0.25 / norm), rtol=1e-4, atol=1e-7)


def test_small_gradients_are_not_blown_up(make_pairs):
    own = engine(max_grad_norm=1e6)
    backward(own, make_pairs(2))
    before = gradient(own)
    own.gradient_norm()
    assert torch.equal(gradient(own), before)


@pytest.mark.parametrize("limit", [None, 1.0])
def test_infinite_norm_is_told_and_not_spread(make_pairs, limit):
    own = engine(max_grad_norm=limit)
    backward(own, make_pairs(2))
    first, second = list(own.parameters.values())[:2]
    first.grad[0] = float("inf")
    kept = second.grad.clone()
    assert float(own.gradient_norm()) == math.inf
    assert torch.equal(second.grad, kept)


def test_decay_is_on_matrices_only():
    own = engine(weight_decay=0.5)
    before = {n: p.detach().clone() for n, p in own.parameters.items()}
    for p in own.parameters.values():
        p.grad = torch.zeros_like(p)
    own.step(0.1)
    for name, p in own.parameters.items():
        factor = 1.0 if name.endswith(NORMS) else 1 - 0.1 * 0.5
        torch.testing.assert_close(p.detach(), before[name] * factor, msg=name)
        assert p.grad is None
    assert sum(n.endswith(NORMS) for n in before) == 5  # two a layer and the last


def test_step_is_adam_by_hand(make_pairs):
    own = engine(max_grad_norm=None)
    backward(own, make_pairs(2))
    name, p = next(iter(own.parameters.items()))
    start, g = p.detach().double().clone(), p.grad.double().clone()
    own.step(0.01)
    # the first step: both moments are corrected to g and g^2
    torch.testing.assert_close(p.detach().double(), start - 0.01 * g / (g.abs() + 1e-8), rtol=1e-4, atol=1e-6, msg=name)


@pytest.mark.parametrize("rank,dropout", [(0, 0.0), (4, 0.0), (4, 0.3)])
def test_restore_gives_the_same_next_steps(make_pairs, rank, dropout):
    pairs = make_pairs(6)

    def steps(own: LocalEngine, numbers) -> None:
        own.policy.train()
        for number in numbers:
            backward(own, pairs[number : number + 3])
            own.gradient_norm()
            own.step(0.01)

    torch.manual_seed(1)
    straight = engine(rank, dropout, weight_decay=0.1)
    steps(straight, (0, 1))
    model = {k: v.clone() for k, v in straight.model_state().items()}
    states = {k: v.clone() for k, v in straight.optimizer_state().items()}
    steps(straight, (2, 3))

    torch.manual_seed(77)
    resumed = engine(rank, dropout, weight_decay=0.1)
    steps(resumed, (3,))  # whatever it was before
    resumed.restore(model, states)
    assert all(torch.equal(v, model[k]) for k, v in resumed.model_state().items())
    assert all(torch.equal(v, states[k]) for k, v in resumed.optimizer_state().items())
    steps(resumed, (2, 3))
    assert all(torch.equal(v, straight.model_state()[k]) for k, v in resumed.model_state().items())
    assert all(torch.equal(v, straight.optimizer_state()[k]) for k, v in resumed.optimizer_state().items())
    # what was handed over is not what training writes to
    assert not all(torch.equal(v, model[k]) for k, v in resumed.model_state().items())
    assert all(float(v) == 2 for k, v in states.items() if k.endswith("|step"))


def test_another_model_is_refused():
    own = engine(rank=4)
    full, other_rank = engine(), engine(rank=2)
    before = {k: v.clone() for k, v in own.model_state().items()}
    with pytest.raises(ValueError, match="another model: it differs in"):
        own.restore(full.model_state(), full.optimizer_state())
    with pytest.raises(ValueError, match=r"another model: .*lora_A.* is \[2, 32\] there and \[4, 32\] here"):
        own.restore(other_rank.model_state(), other_rank.optimizer_state())
    # a shape that would broadcast
    thin = {k: v[:1] if v.ndim > 1 else v for k, v in own.model_state().items()}
    with pytest.raises(ValueError, match="another model"):
        own.restore(thin, own.optimizer_state())
    assert all(torch.equal(v, before[k]) for k, v in own.model_state().items())


def test_precision_is_of_products_not_of_weights(make_pairs):
    batch = pack(make_pairs(2), "packed")
    own, rough = engine(), engine(precision=torch.bfloat16)
    a, b = own.forward(batch, frozenset()), rough.forward(batch, frozenset())
    assert not torch.equal(a.logps, b.logps)
    torch.testing.assert_close(a.logps, b.logps, rtol=0.05, atol=0.5)
    assert b.token_logps.dtype == torch.float32
    assert {p.dtype for p in rough.parameters.values()} == {torch.float32}


RATES = [
    # schedule, warm-up share, steps, final share, {step: share of lr}
    ("cosine", 0.2, 10, 0.1, {1: 0.5, 2: 1.0, 6: 0.55, 10: 0.1, 11: 0.1, 50: 0.1}),
    ("cosine", 0.0, 4, 0.0, {1: 0.5 * (1 + math.sqrt(0.5)), 2: 0.5, 4: 0.0, 5: 0.0}),
    ("linear", 0.2, 10, 0.0, {1: 0.5, 2: 1.0, 4: 0.75, 6: 0.5, 10: 0.0, 12: 0.0}),
    ("linear", 0.0, 4, 0.5, {1: 0.875, 2: 0.75, 4: 0.5, 9: 0.5}),
    ("constant", 0.4, 10, 0.1, {1: 0.25, 3: 0.75, 4: 1.0, 7: 1.0, 10: 1.0, 99: 1.0}),
    ("constant", 0.0, 3, 0.1, {1: 1.0, 3: 1.0}),
    ("rex", 0.2, 10, 0.1, {1: 0.5, 2: 1.0, 6: 0.1 + 0.9 * 2 / 3, 10: 0.1, 11: 0.1}),
    ("wsd", 0.2, 10, 0.1, {1: 0.5, 2: 1.0, 5: 1.0, 8: 1.0, 9: 0.55, 10: 0.1, 12: 0.1}),
    ("wsd", 0.9, 3, 0.0, {1: 0.5, 2: 1.0, 3: 0.0}),
    ("cosine", 0.1, 3, 0.1, {3: 0.1}),  # a warm-up of less than half a step is none
    ("cosine", 0.9, 3, 0.1, {1: 0.5, 2: 1.0, 3: 0.1}),  # the last step ends the schedule whatever the warm-up
    ("cosine", 0.5, 1, 0.1, {1: 0.1}),
]


@pytest.mark.parametrize("schedule,warmup,steps,final,expected", RATES)
def test_learning_rate_by_hand(schedule, warmup, steps, final, expected):
    config = optimizer(lr=2e-3, schedule=schedule, warmup_ratio=warmup, min_lr_ratio=final)
    for step, share in expected.items():
        assert learning_rate(config, step, steps) == pytest.approx(2e-3 * share, abs=1e-15), step


class Counting(torch.optim.SGD):
    """SGD that keeps numbers beside its tensors, by weight and by group."""

    def step(self, closure=None):
        for group in self.param_groups:
            group["scale_seen"] = group.get("scale_seen", 0.0) + 0.1
            for p in group["params"]:
                self.state[p]["count"] = self.state[p].get("count", 0) + 1
                self.state[p]["odd"] = bool(self.state[p]["count"] % 2)
        return super().step(closure)


def no_optimizer(groups, lr):
    return groups, lr


def own_engine(target, **keys) -> LocalEngine:
    config = OwnOptimizerConfig(**vars(optimizer()), target=target, keys=keys)
    return LocalEngine(Policy(tiny_model("llama", torch.float32), "packed"), config, torch.float32)


@pytest.mark.parametrize(
    "target, keys",
    [
        ("torch.optim.SGD", {"momentum": 0.9, "weight_decay": 0.1}),
        ("torch.optim.RMSprop", {"centered": True}),
        ("torch.optim.Adagrad", {}),
        ("torch.optim.AdamW", {"amsgrad": True}),
        ("tests.engine.test_local.Counting", {"momentum": 0.9}),
    ],
)
def test_an_optimiser_of_ones_own_comes_back_bit_for_bit(make_pairs, tmp_path, target, keys):
    pairs = make_pairs(4)
    whole, halves = own_engine(target, **keys), own_engine(target, **keys)
    for own in (whole, halves):
        for _ in range(2):
            backward(own, pairs)
            own.step(1e-2)
    halves.write(tmp_path)
    again = own_engine(target, **keys)
    again.read(tmp_path)
    for own in (whole, again):
        backward(own, pairs)
        own.step(1e-2)
    for name, p in whole.parameters.items():
        assert torch.equal(p, again.parameters[name]), name
        one, two = whole.optimizer.state[p], again.optimizer.state[again.parameters[name]]
        assert {k: type(v) for k, v in one.items() if v is not None} == {k: type(v) for k, v in two.items()}
    for one, two in zip(whole.optimizer.param_groups, again.optimizer.param_groups, strict=True):
        assert {k: v for k, v in one.items() if k != "params"} == {k: v for k, v in two.items() if k != "params"}


def test_what_cannot_be_saved_or_stepped_is_refused(make_pairs):
    with pytest.raises(ValueError, match="must make a torch.optim.Optimizer"):
        own_engine("tests.engine.test_local.no_optimizer")
    with pytest.raises(ValueError, match="optimizer .torch.optim.SGD.: .*momentun"):
        own_engine("torch.optim.SGD", momentun=0.9)
    own = own_engine("torch.optim.SGD")
    backward(own, make_pairs(2))
    own.step(1e-2)
    own.optimizer.state[next(iter(own.parameters.values()))]["history"] = [1, 2]
    with pytest.raises(ValueError, match="is of type list; keep tensors and numbers only"):
        own.optimizer_state()


def test_norms_of_ones_own_optimiser_do_not_decay():
    groups = own_engine("torch.optim.SGD", weight_decay=0.1).optimizer.param_groups
    assert [group["weight_decay"] for group in groups] == [0.1, 0.0]
