"""Objectives against the reference implementations: every entry of tests/vectors/direct_public.json.

Values and gradients; tolerances are those of the file's description.
"""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from align.data.examples import after_divergence
from align.models.logprobs import Head, token_stats
from align.objectives import losses
from align.objectives.imitation import NLL
from align.objectives.losses import Hinge, IpoSum, Sigmoid
from align.objectives.preference import AOT, INPO, RPO, WPO
from align.objectives.rationale import RDPO, RORPO
from align.objectives.reference_free import ORPO, SimPO
from align.objectives.tree import MCTSDPO
from align.objectives.unpaired import KTO, reversed_partners, rotated_partners
from align.packing import with_extras
from align.prepare.search import label_smoothing
from align.types import Extras, PackedBatch, Row, Stats
from tests.conftest import plain_dpo
from tests.objectives.build import batch_of, reduced, stats_of, with_step

VECTORS = json.loads((Path(__file__).parents[1] / "vectors" / "direct_public.json").read_text())
ELSEWHERE = {"sweet_spot", "ranking_accuracy"}  # the data's and the evaluation's tests hold these

DPO_LOSSES = {
    "sigmoid": lambda _: Sigmoid(0.0),  # TRL ignores label smoothing for this loss
    "hinge": lambda _: Hinge(),
    "ipo": lambda _: losses.IpoMean(),
    "exo_pair": lambda c: losses.ExoPair(c["label_smoothing"]),
    "nca_pair": lambda _: losses.NcaPair(),
    "robust": lambda c: losses.Robust(c["label_smoothing"]),
    "bco_pair": lambda _: losses.BcoPair(),
    "sppo_hard": lambda _: losses.SppoHard(),
    "apo_zero": lambda _: losses.ApoZero(),
    "apo_down": lambda _: losses.ApoDown(),
    "discopop": lambda c: losses.DiscoPop(c["discopop_tau"]),
    "sigmoid_norm": lambda _: losses.SigmoidNorm(),
}
DIVERGENCES = {None: "reverse_kl", "forward_kl": "forward_kl", "js_divergence": "js"}
RPO_NORMALISATIONS = {"cumulative": "sum", "mean_of_sequence_means": "sequence_mean", "token_mean": "token_mean"}


def dpo(c):
    if c["loss_type"].startswith("aot"):
        return AOT(c["beta"], Sigmoid(c.get("label_smoothing", 0.0)), c["loss_type"] == "aot")
    loss = DPO_LOSSES[c["loss_type"]](c)
    return plain_dpo(c["beta"], loss, DIVERGENCES[c.get("f_divergence_type")], None, c.get("ld_alpha"))


def rpo(c):
    weight = c["eta"] if c["variant"] == "cumulative" else c["alpha"]
    return RPO(c["beta"], Sigmoid(0.0), RPO_NORMALISATIONS[c["variant"]], weight)


def simpo(c):
    loss = Hinge() if c["loss_type"] == "hinge" else Sigmoid(c["label_smoothing"])
    return SimPO(c["beta"], c["gamma_beta_ratio"], loss)


OBJECTIVES = {
    "dpo": dpo,
    "cdpo": lambda c: plain_dpo(c["beta"], Sigmoid(c["label_smoothing"])),
    "ipo_sum": lambda c: plain_dpo(c["beta"], IpoSum()),
    "wpo": lambda c: WPO(c["beta"], Sigmoid(c["label_smoothing"]), c["alignment"], c["clamp_max"]),
    "kto": lambda c: KTO(c["beta"], c["desirable_weight"], c["undesirable_weight"]),
    "mkto": lambda c: KTO(c["beta"], c["desirable_weight"], c["undesirable_weight"]),
    "mdpo": lambda c: RPO(c["beta"], Sigmoid(0.0), "token_mean", c["nll_coefficient"]),
    "rpo": rpo,
    "simpo": simpo,
    "orpo": lambda c: ORPO(c["lambda"], "completion"),
    "rdpo": lambda c: RDPO(c["beta"], Sigmoid(0.0), c["gamma"], c["variant"]),
    "rorpo": lambda c: RORPO(c["beta"], "completion", c["gamma"], c["variant"]),
    "inpo": lambda c: INPO(c["eta"], c["tau"]),
    "mcts_dpo": lambda c: MCTSDPO(c["beta"], float(c["length_normalised"]), False),
}
ENTRIES = [e for e in VECTORS if e["algorithm"] in OBJECTIVES]


def named(algorithm: str) -> list[dict]:
    return [e for e in VECTORS if e["algorithm"] == algorithm]


def tensor(values) -> Tensor:
    return torch.tensor(_finite(values), dtype=torch.float64)


def _finite(v):
    return [_finite(x) for x in v] if isinstance(v, list) else float(v)


def close(actual: Tensor | float, expected, tolerance: float = 1e-9) -> None:
    expected = tensor(expected)
    actual = torch.as_tensor(actual, dtype=torch.float64).detach()
    scale = max(1.0, float(expected.abs().max())) if expected.numel() else 1.0
    torch.testing.assert_close(actual, expected, rtol=tolerance, atol=tolerance * scale * 1e-3)


# ---------------------------------------------------------------------- the layouts of the file


def targets_of(entry) -> Tensor:
    """Which of the positions 1, 2, ... are targets [N, L - 1]."""
    inputs = entry["inputs"]
    if entry["algorithm"] != "mcts_dpo":
        return tensor(inputs.get("completion_mask", inputs.get("action_mask"))).bool()[:, 1:]
    # the suffix in which two continuations of a path differ
    ids, attended = np.array(inputs["input_ids"]), np.array(inputs["attention_mask"], dtype=bool)
    assert (attended[:, :-1] >= attended[:, 1:]).all()
    rows = [Row(i[a], np.arange(a.sum()) > 0) for i, a in zip(ids, attended, strict=True)]
    half = len(rows) // 2
    partners = rows[half:] + rows[:half]
    out = torch.zeros(ids.shape, dtype=torch.bool)
    for k, (row, other) in enumerate(zip(rows, partners, strict=True)):
        targets = after_divergence(row, other).targets
        out[k, : len(targets)] = torch.from_numpy(targets)
    return out[:, 1:]


def opinion(logits: Tensor, ids: Tensor, mask: Tensor, batch: PackedBatch, needs=frozenset()) -> Stats:
    """Position t is scored by the logits at t - 1."""
    identity = Head(torch.eye(logits.shape[-1], dtype=torch.float64))
    extras = tuple(sorted(needs - {"reference"}))
    values = token_stats(logits[:, :-1][mask], identity, ids[:, 1:][mask], extras, chunk=3)
    return stats_of(values[0], batch, **dict(zip(extras, values[1:], strict=True)))


def set_up(entry, objective) -> tuple[Stats, Stats | None, PackedBatch, dict[str, Tensor]]:
    """Policy, reference, batch, and the inputs by which the loss is differentiated."""
    inputs = entry["inputs"]
    layout = inputs["layout"]
    if layout == "pair_tokens":
        leaves = {"policy_token_logps": tensor(inputs["policy_token_logps"]).requires_grad_()}
        mask = tensor(inputs["token_mask"]).bool()
        batch = batch_of(mask.nonzero()[:, 0], len(mask))
        policy = stats_of(leaves["policy_token_logps"][mask], batch)
        return policy, stats_of(tensor(inputs["ref_token_logps"])[mask], batch), batch, leaves
    if layout in ("pair_logits", "kto_logits"):
        leaves = {"policy_logits": tensor(inputs["policy_logits"]).requires_grad_()}
        ids, mask = torch.tensor(inputs["input_ids"]), targets_of(entry)
        fields = {}
        if layout == "kto_logits":
            fields = {"labels": torch.tensor(inputs["labels"]).bool()}
            fields |= {"extras": Extras(step_values=kl_rows(entry, objective))}
        batch = batch_of(mask.nonzero()[:, 0], len(mask), 2 - len(fields) // 2, **fields)
        policy = opinion(leaves["policy_logits"], ids, mask, batch, objective.needs)
        return policy, opinion(tensor(inputs["ref_logits"]), ids, mask, batch), batch, leaves
    if layout == "mkto_seq":
        leaves = {"policy_logps": tensor(inputs["policy_logps"]).requires_grad_()}
        num = len(inputs["labels"])
        ratios = tensor(inputs["kl_policy_logps"]) - tensor(inputs["kl_ref_logps"])
        labels = torch.tensor(inputs["labels"]).bool()
        batch = batch_of(torch.arange(num), num, 1, labels=labels, extras=Extras(step_values=ratios[:, None]))
        reference = stats_of(tensor(inputs["ref_logps"]), batch)
        return stats_of(leaves["policy_logps"], batch), reference, batch, leaves
    # sequence values, one token each, which sums and means over tokens leave alone
    middle = "_avg_logps" if "avg" in layout else "_logps"
    columns = ["chosen", "rejected", *(["rationale"] if "rat" in layout else [])]
    leaves = {f"policy_{c}{middle}": tensor(inputs[f"policy_{c}{middle}"]).requires_grad_() for c in columns}
    num = len(next(iter(leaves.values())))
    batch = batch_of(torch.arange(num * len(columns)), num * len(columns), len(columns))
    policy = stats_of(torch.cat(list(leaves.values())), batch)
    if "avg" in layout:
        return policy, None, batch, leaves

    def frozen(who: str) -> Tensor:  # the reference of a rationale is computed by the loop and read by nobody
        return torch.cat([tensor(inputs.get(f"{who}_{c}_logps", [0.0] * num)) for c in columns])

    if layout == "pair_seq_t":
        batch = with_extras(batch, {"start_token_logps": frozen("prev")})
    return policy, stats_of(frozen("ref"), batch), batch, leaves


def kl_rows(entry, objective) -> Tensor:
    inputs = entry["inputs"]
    ids, mask = torch.tensor(inputs["kl_input_ids"]), tensor(inputs["kl_completion_mask"]).bool()[:, 1:]
    batch = batch_of(mask.nonzero()[:, 0], len(mask), 1)
    logits = tensor(inputs["kl_policy_logits"]).requires_grad_()
    values = objective.step_values(
        opinion(logits, ids, mask, batch), opinion(tensor(inputs["kl_ref_logits"]), ids, mask, batch), batch
    )
    assert not values.requires_grad
    return values


# ---------------------------------------------------------------------- objectives


@pytest.mark.parametrize("entry", ENTRIES, ids=lambda e: e["name"])
def test_vector(entry):
    expected = entry["expected"]
    tolerance = 1e-5 if "FLOAT32" in entry["source"] else 1e-6 if "exo_pair" in entry["name"] else 1e-9
    objective = OBJECTIVES[entry["algorithm"]](entry["config"])
    policy, reference, batch, leaves = set_up(entry, objective)
    if isinstance(objective, AOT):
        batch = with_step(objective, policy, reference, batch)
    out = objective(policy, reference, batch)
    if {"or_loss", "aux_loss"} & set(expected):  # everything but the likelihood of chosen, the last term
        out = replace(out, terms=out.terms[:-1])
    loss = reduced(out, batch)
    loss.backward()
    over_tokens = reduced(replace(out, terms=tuple(t for t in out.terms if t.unit == "token")), batch)
    per_example = over_tokens + sum(t.weight * t.losses for t in out.terms if t.unit == "example")

    close(loss, next(expected[k] for k in ("loss", "or_loss", "aux_loss") if k in expected), tolerance)
    for name, leaf in leaves.items():
        close(leaf.grad, expected[f"grad_{name}"], tolerance)
    for name in ("per_example_loss", "per_example_or_loss", "per_example_aux_loss"):
        if expected.get(name) is not None:
            close(per_example, expected[name], tolerance)
    check_rest(expected, objective, policy, reference, batch, out, tolerance)


def check_rest(expected, objective, policy, reference, batch, out, tolerance) -> None:
    """Whatever else an entry tells: weights, rewards, log-probs, the KL point."""
    metrics = out.metrics
    if "pair_weight" in expected:
        close(metrics["wpo/weight"], expected["pair_weight"], tolerance)
    if "seq_weights" in expected:
        close(objective.row_log_weights(policy, batch).exp(), expected["seq_weights"], tolerance)
    for side in ("chosen", "rejected"):
        if f"{side}_rewards" in expected:
            close(metrics[f"reward/{side}"], expected[f"{side}_rewards"], tolerance)
        if f"rewards/{side}" in expected.get("metrics", {}):
            close(metrics[f"reward/{side}"].mean(), expected["metrics"][f"rewards/{side}"], tolerance)
    if "metrics" in expected:
        close(metrics["reward/margin"].mean(), expected["metrics"]["rewards/margins"], tolerance)
        close(metrics["accuracy"].mean(), expected["metrics"]["rewards/accuracies"], 1e-6)  # TRL's is float32
    if "rewards_margin" in expected:
        close(metrics["reward/margin"].mean(), expected["rewards_margin"], tolerance)
        close(metrics["accuracy"].mean(), expected["rewards_accuracy"], tolerance)
    if "policy_logps" in expected:
        close(policy.logps, expected["policy_logps"], tolerance)
    if "ref_logps" in expected:
        close(reference.logps, expected["ref_logps"], tolerance)
    if "kl" in expected:
        close(metrics["kl"], [expected["kl"]] * len(batch.groups), tolerance)
    if "kl_unclamped" in expected:
        close(batch.extras["step_values"].mean(), expected["kl_unclamped"], tolerance)
    if "dpo_loss" in expected:
        close(out.terms[0].losses.mean(), expected["dpo_loss"], tolerance)
    if "nll" in expected:
        close(reduced(replace(out, terms=(replace(out.terms[1], weight=1.0),)), batch), expected["nll"], tolerance)
    if "h" in expected:
        close(metrics["reward/margin"] / objective.eta, expected["h"], tolerance)


# ---------------------------------------------------------------------- rules


@pytest.mark.parametrize("entry", named("kto_kl_pairs"), ids=lambda e: e["name"])
def test_partners(entry):
    completions = entry["inputs"]["completions"]
    for rule, key in ((rotated_partners, "trl_rotate"), (reversed_partners, "repo_reverse")):
        order = rule(len(completions), entry["config"]["batch"])
        assert [completions[i] for i in order] == entry["expected"][key]


@pytest.mark.parametrize("entry", named("mcts_label_smoothing"), ids=lambda e: e["name"])
def test_label_smoothing_from_visits(entry):
    smoothing = label_smoothing(entry["inputs"]["visits_better"], entry["inputs"]["visits_worse"])
    close(smoothing, entry["expected"]["label_smoothing"])
    close(min(1 - entry["expected"]["confidence"], 0.5), smoothing)


@pytest.mark.parametrize("entry", named("mdpo_mask"), ids=lambda e: e["name"])
def test_loss_of_a_trajectory_reads_what_the_model_wrote(entry):
    """Log-probs of tool text, headers and padding do not change a bit of the loss, those of the model's words do."""
    required = torch.tensor(entry["expected"]["model_generated_mask"]).bool()
    assert not required[: entry["inputs"]["prompt_length"]].any()
    logps = -torch.arange(1.0, len(required) + 1, dtype=torch.float64) / 7

    def loss(values: Tensor) -> float:
        row = torch.cat([torch.zeros(int(required.sum()), dtype=torch.long), torch.ones(1, dtype=torch.long)])
        batch = batch_of(row, 2)
        policy = stats_of(torch.cat([values[required], torch.tensor([-2.0]).double()]), batch)
        reference = stats_of(torch.zeros_like(policy.token_logps), batch)
        return plain_dpo(0.1, Sigmoid(0.0))(policy, reference, batch).terms[0].losses.item()

    own = loss(logps)
    assert own == pytest.approx(torch.log1p((-0.1 * (logps[required].sum() + 2)).exp()).item(), abs=1e-12)
    assert loss(torch.where(required, logps, torch.tensor(-99.0).double())) == own
    repo = torch.tensor(entry["expected"]["repo_label_mask"]).bool()
    assert (required & ~repo).sum() == 0
    assert (repo & ~required).sum() > 0  # template tokens that the authors' mask leaves in the loss
    for position in required.nonzero()[:, 0].tolist():
        assert loss(logps.index_fill(0, torch.tensor(position), -99.0)) != own


@pytest.mark.parametrize("entry", named("negative_gradient"), ids=lambda e: e["name"])
def test_gradients_on_a_softmax_policy(entry):
    """Imitating chosen moves every action; DPO moves mass between the two and leaves third actions alone."""
    c, inputs, expected = entry["config"], entry["inputs"], entry["expected"]
    pair = [c["chosen"], c["rejected"]]
    batch = batch_of(torch.arange(2), 2)
    reference = stats_of(tensor(inputs["ref_logps"])[pair], batch)

    def gradient(objective, actions) -> Tensor:
        logits = tensor(inputs["policy_logits"]).requires_grad_()
        policy = stats_of(logits.log_softmax(0)[actions], batch)
        reduced(objective(policy, reference, batch), batch).backward()
        return logits.grad

    close(gradient(NLL(), pair), expected["grad_sft_chosen"])
    close(-gradient(NLL(), pair[::-1]), expected["grad_unlikelihood_rejected"])
    of_dpo = gradient(plain_dpo(c["beta"], Sigmoid(0.0)), pair)
    close(of_dpo, expected["grad_dpo"])
    others = [i for i in range(len(of_dpo)) if i not in pair]
    assert of_dpo[others].abs().max() < 1e-15


def test_every_entry_is_used():
    rules = {"kto_kl_pairs", "mcts_label_smoothing", "mdpo_mask", "negative_gradient"}
    assert {e["algorithm"] for e in VECTORS} == set(OBJECTIVES) | rules | ELSEWHERE
    assert len(VECTORS) == 93
