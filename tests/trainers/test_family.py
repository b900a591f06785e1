"""Every objective through the loop: the loss of a step is that of its examples, however they are split or laid out."""

from __future__ import annotations

import functools
from dataclasses import replace

import numpy as np
import pytest
import torch
from hydra.utils import get_class

from align import build
from align.config import Config, compose, options
from align.data.examples import assign_mismatched
from align.data.wanted import Wanted
from align.engine.local import LocalEngine
from align.models.policy import Policy
from align.models.pretrained import byte_tokenizer
from align.objectives.base import RewardObjective
from align.packing import pack
from align.trainers.loop import ReferenceModel, TrainContext, train_step
from align.types import Extras
from tests.conftest import tiny_model
from tests.data.helpers import examples
from tests.engine.test_local import optimizer
from tests.variants import node_of

TOKENIZER = byte_tokenizer()
WORDS = ["Cod.", "A cow", "Oak, elm and ash", "No", "It is four.", "Seven or eight", "Ü", "Paris please"]
# those of reward models need a score head: tests/objectives/test_reward_model_steps.py
OBJECTIVES = [
    word
    for word in (f"objective={name}" for name in options("objective"))
    if not issubclass(get_class(node_of("objective", word.partition("=")[2])["_target_"]), RewardObjective)
]
LOSSES = [f"objective=dpo objective/loss={name}" for name in options("objective/loss")]
AGGREGATIONS = ["sequence_mean_token_mean", "sequence_mean_token_sum", "sequence_sum_over_length"]
ONLINE = [
    "objective=clipped objective.kl_coefficient=0.1 objective.entropy_coefficient=0.01",
    "objective=clipped objective.value_coefficient=0.5 objective.value_clip=0.2 objective/correction=truncate",
    *(f"objective=clipped objective.aggregation={name} objective.max_length=" + ("40" if "over" in name else "null")
      for name in AGGREGATIONS),
]  # fmt: skip
CASES = [
    *OBJECTIVES,
    *(pytest.param(case, marks=pytest.mark.slow) for case in LOSSES),  # each takes the pairs one by one
    *ONLINE,
    "objective=wpo objective/loss=ipo_sum",
    "objective=mix objective@objective.first=aot",
]


def turns(i: int, answer: str, late: bool) -> list[dict]:
    said = [{"role": "assistant", "content": answer}]
    if late:
        said = [
            {
                "role": "assistant",
                "content": "let me see",
                "tool_calls": [{"function": {"name": "f", "arguments": {}}}],
            },
            {"role": "tool", "content": f"{i} and {i + 1}"},
            *said,
        ]
    return said


def data(kind: str, columns: tuple[str, ...], n: int = 9, margins: tuple[str, ...] = ()) -> list:
    """Pairs of which some branch late, after a tool's turn; labelled and single rows come of the same."""
    out = []
    online, kind = kind == "rollout", "pair" if kind == "rollout" else kind
    for i in range(n):
        late = i % 3 == 0
        prompt = [{"role": "user", "content": f"Question {i}, {WORDS[i % 8]}"}]
        record = {
            "prompt": prompt, "chosen": turns(i, WORDS[i % 8], late), "rejected": turns(i, WORDS[(i + 3) % 8], late),
            "rationale": "Because.", "origin": "ab"[i % 2],
            "numbers": {"mapl_kind": i % 3, "satisfied_gap": 1, "label_smoothing": 0.1, "reward": i % 2},
            "margins": {"helpful": 1.0 - i % 3, "harmless": (0.5, -2.0)[i % 2]},
        }  # fmt: skip
        out += examples(record, TOKENIZER, Wanted(kind, columns, margins=margins))
    if online:  # two completions of a prompt, with what an online step knows of their tokens
        out = [replace(e, rows=tuple(drawn(row, 2 * i + k) for k, row in enumerate(e.rows))) for i, e in enumerate(out)]
    return [replace(e, source=f"rows:{i}") for i, e in enumerate(out)]


def drawn(row, seed: int):
    rng = np.random.default_rng(seed)
    count = int(row.targets.sum())
    old = rng.normal(-5.0, 0.5, count)
    columns = {"old_logps": old, "rollout_logps": old + rng.normal(0, 0.1, count)}
    columns |= {name: rng.normal(0, 1, count) for name in ("advantages", "returns", "old_values")}
    return replace(row, columns={name: c.astype(np.float32) for name, c in columns.items()})


@functools.cache
def composed(case: str) -> Config:
    return compose(["data=everyday", *case.split()])


def gradient_of(case: str, split: int, layout: str = "shared", shuffled: bool = False):
    """Metrics and gradient of one step of the objective, with a perturbed policy, so that it is not its reference."""
    objective = build.objective(composed(case))
    wanted = Wanted.by(objective)
    rows = data(wanted.kind, wanted.columns, margins=wanted.margins)
    if wanted.mismatched:
        rows = assign_mismatched(rows, 0, 1000)
    if shuffled:
        rows = [rows[i] for i in np.random.default_rng(1).permutation(len(rows))]
    settings = dict(vocab_size=len(TOKENIZER), max_position_embeddings=1024)
    reference = Policy(tiny_model("llama", torch.float64, **settings), layout)
    policy = Policy(
        tiny_model("llama", torch.float64, seed=1, **settings), layout, value_head="values" in objective.needs
    )
    engine = LocalEngine(policy, optimizer(max_grad_norm=None), torch.float32)
    network = ReferenceModel(None, torch.no_grad()(lambda batch: reference(batch)))
    taken = {}
    engine.step = lambda lr: taken.update(g=torch.cat([p.grad.flatten() for p in policy.parameters()]).clone())  # noqa: ARG005
    own = TrainContext(
        engine, objective, layout, split, network if "reference" in objective.needs else None,
        {name: network for name in objective.extras},
    )  # fmt: skip
    return train_step(own, rows, 0.0), taken["g"]


@pytest.mark.parametrize("case", CASES)
def test_split_order_and_layout_do_not_change_the_step(case):
    whole, gradient = gradient_of(case, 100_000)
    assert float(gradient.abs().max()) > 1e-6
    for split, layout, shuffled in ((700, "shared", False), (100_000, "packed", True), (900, "padded", True)):
        metrics, g = gradient_of(case, split, layout, shuffled)
        assert (metrics["tokens/micro_batches"] > 1) == (split < 100_000)
        torch.testing.assert_close(g, gradient, rtol=1e-5, atol=1e-7 * float(gradient.abs().max()))
        for key in whole.keys() - {"tokens/micro_batches", "tokens/processed"}:
            assert metrics[key] == pytest.approx(whole[key], rel=1e-5, abs=1e-8), key


@pytest.mark.parametrize(
    "case",
    [
        "objective=dpo",
        "objective=kto",
        "objective=nll",
        "objective=simpo",
        "objective=orpo objective.nll_scope=completion",
    ],
)
def test_loss_does_not_depend_on_what_tools_and_users_said(case):
    """At fixed context: hidden states of the original text, the ids of user and tool tokens changed everywhere else."""
    objective = build.objective(compose(["data=everyday", *case.split()]))
    rows = data(objective.kind, tuple(getattr(objective, "columns", ())), 6)
    if Wanted.by(objective).mismatched:
        rows = assign_mismatched(rows, 0, 1000)
    policy = Policy(
        tiny_model("llama", torch.float64, vocab_size=len(TOKENIZER), max_position_embeddings=1024), "shared"
    )
    original = pack(rows, "shared")
    changed_rows = [replace(e, rows=tuple(replace(r, token_ids=_changed(r)) for r in e.rows)) for e in rows]
    changed = pack(changed_rows, "shared")
    assert not torch.equal(changed.input_ids, original.input_ids)
    batches = [original, replace(changed, input_ids=original.input_ids)]
    totals = []
    for batch in batches:
        stats = policy(batch)
        step = Extras(step_values=torch.ones(len(rows), 1), step_index=torch.arange(len(rows)))
        reference = replace(stats, logps=stats.logps.detach() * 0.9)
        out = objective(stats, reference, replace(batch, extras=step) if Wanted.by(objective).mismatched else batch)
        totals.append(torch.stack([t.losses.sum() for t in out.terms]))
    assert torch.equal(totals[0], totals[1])


def _changed(row) -> np.ndarray:
    ids = row.token_ids.copy()
    context = ~row.targets
    context[0] = False  # rows of a pair go on sharing their beginning
    ids[context] = (ids[context] + 7) % 200
    return ids
