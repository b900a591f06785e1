"""Reward objectives through the loop with a real trunk and head: splits, order, layouts, loss, saved models."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from align import build
from align.config import compose
from align.engine.local import LocalEngine
from align.models.policy import ScoreHead, Scorer
from align.models.pretrained import byte_tokenizer
from align.packing import pack
from align.rewards import network
from align.trainers.loop import TrainContext, train_step
from align.types import Example, Row
from tests.conftest import VOCABULARY, pair_of, tiny_model
from tests.engine.test_local import optimizer

NUMBERS = ("lead", "user", "chosen_safe", "rejected_safe", "helpfulness", "verbosity")
CASES = {
    "bradley_terry": ["objective.center=0.01", "objective.l2=0.001", "objective.margin=lead"],
    "ranked_list": [],
    "general_preference": ["objective.dim=4", "objective.gated=true"],
    "attributes": ["objective.names=[helpfulness,correctness,verbosity]"],
    "cost": ["objective.l2=0.01"],
    "pal": ["objective.num_users=3", "objective.dim=8", "objective.num_layers=1"],
}


def objective_of(name: str):
    return build.objective(compose(["data.train=x.jsonl", f"objective={name}", *CASES[name]]))


def rows_of(kind: str, num: int) -> list[Example]:
    """Examples whose better answers hold more small token ids, so that there is something to learn."""
    rng = np.random.default_rng(0)
    out = []
    for i in range(num):
        prompt = rng.integers(0, VOCABULARY, 5)
        answers = []
        for place in range({"pair": 2, "single": 1, "ranked": 2 + i % 3}[kind]):
            low = 10 * place
            ids = np.concatenate([prompt, rng.integers(low, VOCABULARY - 40 + low, 3 + int(rng.integers(8)))])
            answers.append(Row(ids.astype(np.int32), np.arange(len(ids)) >= len(prompt)))
        values = (0.1, i % 3, 1, i % 2, i % 5, -0.5)
        numbers = {n: float(v) for n, v in zip(NUMBERS, values, strict=True) if not (n == "verbosity" and i % 2)}
        one = pair_of(answers[0], answers[-1], f"rows:{i}")
        out.append(replace(one, rows=tuple(answers), numbers=numbers))
    return out


def head_of(objective, width: int) -> torch.nn.Module:
    torch.manual_seed(3)
    own = objective.make_head(width)
    if own is not None:
        return own
    head = ScoreHead(width, len(objective.outputs), objective.gated)
    torch.nn.init.normal_(head.score.weight, std=0.2)  # large enough to learn within a few steps
    return head


def context(objective, layout: str, max_tokens: int, limit: float | None = None) -> TrainContext:
    lm = tiny_model("llama")
    width = lm.config.hidden_size
    head = head_of(objective, width)
    engine = LocalEngine(Scorer(lm, layout, head), optimizer(max_grad_norm=limit), torch.float32)
    return TrainContext(engine, objective, layout, max_tokens, None)


@pytest.mark.parametrize("name", CASES)
def test_a_saved_model_scores_the_same(name, tmp_path):
    """Its head with all of its parts, from what the objective says is needed to score."""
    objective = objective_of(name)
    tokenizer = byte_tokenizer()
    lm = tiny_model("llama", torch.float32, vocab_size=len(tokenizer), max_position_embeddings=256)
    trained = Scorer(lm, "shared", head_of(objective, lm.config.hidden_size)).eval()
    form = {"kind": objective.reward_kind, "outputs": list(objective.outputs)} | objective.metadata()
    network.write(trained, form, tokenizer, True, tmp_path)
    tokenizer.save_pretrained(tmp_path)
    loaded = network.load(str(tmp_path)).network
    batch = pack(rows_of(objective.kind, 3), loaded.layout)
    with torch.no_grad():
        before, after = (scorer(batch, objective.needs | objective.extras) for scorer in (trained, loaded))
    assert torch.equal(before.scores, after.scores)
    assert before.extras.keys() == after.extras.keys() == objective.extras
    assert all(torch.equal(before.extras[name], after.extras[name]) for name in objective.extras)


def step(objective, layout: str = "shared", max_tokens: int = 10_000, shuffled: bool = False):
    """Metrics and gradient of one step."""
    own = context(objective, layout, max_tokens)
    rows = rows_of(objective.kind, 12)
    if shuffled:
        rows = [rows[i] for i in np.random.default_rng(1).permutation(len(rows))]
    taken = {}
    # a language model's own head is no part of a reward model
    parameters = [p for n, p in own.engine.parameters.items() if "lm_head" not in n]
    own.engine.step = lambda lr: taken.update(g=torch.cat([p.grad.flatten() for p in parameters]))  # noqa: ARG005
    return train_step(own, rows, 0.0), taken["g"]


@pytest.mark.parametrize("name", CASES)
def test_split_order_and_layout_do_not_change_the_step(name):
    objective = objective_of(name)
    whole, gradient = step(objective)
    assert float(gradient.abs().max()) > 1e-6
    for layout, max_tokens, shuffled in (("shared", 60, False), ("packed", 10_000, True), ("padded", 80, True)):
        metrics, g = step(objective, layout, max_tokens, shuffled)
        assert (metrics["tokens/micro_batches"] > 1) == (max_tokens < 100)
        # the trunk is in float64, but head and loss round to float32
        torch.testing.assert_close(g, gradient, rtol=1e-4, atol=1e-6 * float(gradient.abs().max()))
        for key in whole.keys() - {"tokens/micro_batches", "tokens/processed"}:
            assert metrics[key] == pytest.approx(whole[key], rel=1e-5, abs=1e-6), key


@pytest.mark.parametrize("name", CASES)
def test_the_loss_falls(name):
    objective = objective_of(name)
    own = context(objective, "shared", 10_000, limit=1.0)
    rows = rows_of(objective.kind, 12)
    losses = [train_step(own, rows, 3e-3)["loss/total"] for _ in range(40)]
    assert losses[-1] < 0.5 * losses[0]
