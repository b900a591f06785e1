"""DPO with several preferences on a pair: values by hand, what must not change them, what is refused, a run."""

from __future__ import annotations

import json
import math
from dataclasses import replace

import pytest
import torch
from hydra.utils import instantiate

from align import build
from align.cli import main
from align.config import compose, options
from align.objectives.losses import Hinge, IpoMean, IpoSum, NcaPair, Sigmoid
from align.objectives.mix import Mix
from align.objectives.multi_objective import MultiObjective
from tests.conftest import plain_dpo
from tests.objectives.build import reduced, rows_of, select, stats_of
from tests.trainers.online_runs import REWARDS, words_of
from tests.trainers.test_train import write_pairs
from tests.variants import node_of

DEFAULT = {
    "beta": 0.5, "loss": Sigmoid(0.0), "names": ["a", "b"], "weights": None, "form": "losses",
    "scale_by_margin": False, "offset": 0.0, "offset_scaling": "identity", "component": None,
}  # fmt: skip


def objective(**changes) -> MultiObjective:
    return MultiObjective(**(DEFAULT | changes))


def pairs(margins, gaps=None, dtype=torch.float64, row_weights=None):
    """Pairs with these margins by name, h the gaps: chosen one token of log-ratio h, rejected one of 0."""
    gaps = [0.0] * len(margins) if gaps is None else gaps
    numbers = columns_of("margin/", margins, dtype) | columns_of("weight/", row_weights or [], dtype)
    values = [[h - 2.0] for h in gaps] + [[-3.0] for _ in gaps]
    policy, batch = rows_of(values, numbers=numbers)
    base = torch.tensor([-2.0] * len(gaps) + [-3.0] * len(gaps), dtype=torch.float64)
    return policy, stats_of(base, batch), batch


def columns_of(prefix, rows, dtype):
    """name -> [P] of rows of numbers for the components a, b, c."""
    columns = zip(*rows, strict=True)
    return {f"{prefix}{'abc'[k]}": torch.tensor(column, dtype=dtype) for k, column in enumerate(columns)}


def losses_of(found, policy, reference, batch):
    (term,) = found(policy, reference, batch).terms
    return term.losses


def gradient(losses, policy):
    return torch.autograd.grad(losses.sum(), policy.token_logps, retain_graph=True)[0]


def log_sigmoid(x: float) -> float:
    return -math.log1p(math.exp(-x))


# --- by hand


def test_losses_are_weighted():
    """beta 0.5, h 2: z = 1. a prefers chosen, b rejected: 0.3 * 0.31326 + 0.7 * 1.31326."""
    found = objective(weights={"a": 0.3, "b": 0.7})
    policy, reference, batch = pairs([(1.0, -4.0)], [2.0])
    losses = losses_of(found, policy, reference, batch)
    assert losses.item() == pytest.approx(-0.3 * log_sigmoid(1) - 0.7 * log_sigmoid(-1), abs=1e-14)
    # the soft label p = 0.3: d loss / d h = beta (s(z) - p)
    slope = 0.5 * (1 / (1 + math.exp(-1)) - 0.3)
    torch.testing.assert_close(
        gradient(losses, policy), torch.tensor([slope, -slope], dtype=torch.float64), rtol=0, atol=1e-14
    )


def test_losses_are_scaled_by_margins():
    found = objective(weights={"a": 0.3, "b": 0.7}, scale_by_margin=True)
    losses = losses_of(found, *pairs([(2.0, -0.5), (-1.0, 0.0)], [2.0, 2.0]))
    first = -0.3 * 2 * log_sigmoid(1) - 0.7 * 0.5 * log_sigmoid(-1)
    assert losses.tolist() == pytest.approx([first, -0.3 * log_sigmoid(-1)], abs=1e-14)


def test_a_pair_counts_for_the_components_it_has():
    """A missing label and a tie add nothing; the weights of the others stay."""
    found = objective(weights={"a": 0.3, "b": 0.7})
    losses = losses_of(found, *pairs([(math.nan, 1.0), (0.0, 1.0), (0.0, 0.0)], [2.0] * 3))
    assert losses.tolist() == pytest.approx([-0.7 * log_sigmoid(1)] * 2 + [0.0], abs=1e-14)


def test_margins_are_mixed_and_turn_the_pair():
    """M = 0.3 m_a + 0.7 m_b: 0.6 - 0.35 = 0.25 keeps chosen, 0.6 - 2.8 = -2.2 turns it."""
    weights = {"a": 0.3, "b": 0.7}
    policy, reference, batch = pairs([(2.0, -0.5), (2.0, -4.0)], [2.0, 2.0])
    plain = losses_of(objective(form="margin", weights=weights), policy, reference, batch)
    assert plain.tolist() == pytest.approx([-log_sigmoid(1), -log_sigmoid(-1)], abs=1e-14)
    odpo = losses_of(objective(form="margin", weights=weights, offset=2.0), policy, reference, batch)
    assert odpo.tolist() == pytest.approx([-log_sigmoid(1 - 0.5), -log_sigmoid(-1 - 4.4)], abs=1e-14)
    log = objective(form="margin", weights=weights, offset=2.0, offset_scaling="log")
    expected = [-log_sigmoid(1 - 2 * math.log(0.25)), -log_sigmoid(-1 - 2 * math.log(2.2))]
    assert losses_of(log, policy, reference, batch).tolist() == pytest.approx(expected, abs=1e-13)


@pytest.mark.parametrize("scaling", ["identity", "log"])
def test_margins_that_cancel_teach_nothing(scaling):
    """0.1 + 0.2 - 0.3 in float32 is 7e-9: rounding, no preference."""
    found = objective(form="margin", names=list("abc"), offset=1.0, offset_scaling=scaling)
    policy, reference, batch = pairs([(0.1, 0.2, -0.3), (1.0, 1.0, 1.0)], [2.0, 2.0], torch.float32)
    out = found(policy, reference, batch)
    losses = out.terms[0].losses
    assert losses[0] == 0
    assert losses[1] > 0
    slopes = gradient(losses, policy)
    assert slopes[[0, 2]].tolist() == [0, 0]  # chosen and rejected of the first pair
    assert slopes[1] < 0
    assert out.metrics["preference/undecided"].tolist() == [1, 0]
    assert out.metrics["accuracy"][0].isnan()


def test_modpo():
    """-log s((beta h - w_b m_b) / w_a), as the authors compute it from rewards of either answer."""
    found = objective(form="modpo", component="a", weights={"a": 0.4, "b": 0.6})
    policy, reference, batch = pairs([(1.0, -0.5), (-2.0, -0.5)], [2.0, 2.0])
    losses = losses_of(found, policy, reference, batch)
    # the second pair's label prefers rejected: all signs change
    expected = [-log_sigmoid((1 + 0.3) / 0.4), -log_sigmoid((-1 - 0.3) / 0.4)]
    assert losses.tolist() == pytest.approx(expected, abs=1e-14)
    chosen, rejected = (1 / 0.4) * (0.5 * 2.0 - 0.6 * 1.5), (1 / 0.4) * (0.5 * 0.0 - 0.6 * 2.0)
    assert losses[0].item() == pytest.approx(-log_sigmoid(chosen - rejected), abs=1e-14)
    hinge = objective(form="modpo", component="a", weights={"a": 0.4, "b": 0.6}, loss=Hinge())
    assert losses_of(hinge, policy, reference, batch).tolist() == pytest.approx([0, 1 + 1.3 / 0.4], abs=1e-14)
    slopes = gradient(losses, policy)[:2]
    sizes = [0.5 / 0.4 * math.exp(log_sigmoid(-1.3 / 0.4)), 0.5 / 0.4 * math.exp(log_sigmoid(1.3 / 0.4))]
    assert slopes.tolist() == pytest.approx([-sizes[0], sizes[1]], abs=1e-14)


def test_a_label_of_the_component_is_needed():
    found = objective(form="modpo", component="b")
    out = found(*pairs([(1.0, 0.0), (1.0, 1.0)], [1.0, 1.0]))
    assert out.terms[0].losses[0] == 0
    assert out.metrics["preference/undecided"].tolist() == [1, 0]


# --- what must not change


MIXED = [(1.0, -0.4, 0.2), (-0.3, -2.0, 0.1), (0.5, 0.25, -3.0), (2.0, 1.0, 1.0)]
GAPS = [0.7, -1.2, 0.4, 2.5]
FORMS = {
    "losses": {"form": "losses"},
    "scaled": {"form": "losses", "scale_by_margin": True},
    "margin": {"form": "margin"},
    "odpo": {"form": "margin", "offset": 0.7},
    "log": {"form": "margin", "offset": 0.7, "offset_scaling": "log"},
    "modpo": {"form": "modpo", "component": "a"},
}
WEIGHTS = {"a": 0.25, "b": 0.45, "c": 0.3}


ALL_LOSSES = {name: instantiate(node_of("objective/loss", name)) for name in options("objective/loss")}


@pytest.mark.parametrize(
    "form, loss",
    [
        pytest.param(form, loss, id=f"{form}-{name}")
        for form in ("losses", "margin", "modpo")
        for name, loss in ALL_LOSSES.items()
        if loss.difference or form != "modpo"
    ],
)
def test_one_component_with_all_the_weight_is_dpo(form, loss):
    """Bit for bit, values and gradients, for every base loss that the form takes."""
    found = objective(**FORMS[form], loss=loss, weights={"a": 1.0, "b": 0.0})
    policy, reference, batch = pairs([(1.0, -9.0), (0.5, 3.0), (2.0, 0.0)], GAPS[:3])
    losses = losses_of(found, policy, reference, batch)
    (term,) = plain_dpo(0.5, loss)(policy, reference, batch).terms
    assert torch.equal(losses, term.losses)
    assert torch.equal(gradient(losses, policy), gradient(term.losses, policy))


@pytest.mark.parametrize("form", FORMS)
def test_the_order_of_components_does_not_matter(form):
    policy, reference, batch = pairs(MIXED, GAPS)
    there = objective(**FORMS[form], names=list("abc"), weights=WEIGHTS)(policy, reference, batch)
    other = objective(**FORMS[form], names=list("cab"), weights=WEIGHTS)(policy, reference, batch)
    torch.testing.assert_close(other.terms[0].losses, there.terms[0].losses, rtol=1e-14, atol=1e-14)
    assert other.metrics.keys() == there.metrics.keys()
    for key, values in there.metrics.items():
        assert torch.equal(other.metrics[key].nan_to_num(9), values.nan_to_num(9)), key


@pytest.mark.parametrize(
    "form, loss",
    [
        pytest.param(form, loss, id=f"{form}-{type(loss).__name__}")
        for form in FORMS
        for loss in (Sigmoid(0.1), IpoSum(), IpoMean(), NcaPair())
        if loss.difference or form in ("losses", "scaled", "margin")
    ],
)
def test_exchanged_answers_with_negated_margins_are_the_same_pair(form, loss):
    found = objective(**FORMS[form], names=list("abc"), weights=WEIGHTS, loss=loss)
    policy, reference, batch = pairs(MIXED, GAPS)
    turned = replace(batch, groups=batch.groups.flip(1), numbers={k: -v for k, v in batch.numbers.items()})
    there, other = found(policy, reference, batch), found(policy, reference, turned)
    torch.testing.assert_close(other.terms[0].losses, there.terms[0].losses, rtol=1e-14, atol=1e-14)
    slopes = [gradient(out.terms[0].losses, policy) for out in (there, other)]
    torch.testing.assert_close(*slopes, rtol=1e-13, atol=1e-14)
    for key in ("accuracy", "reward/margin", "logps/chosen", "accuracy/b", "preference/conflict"):
        torch.testing.assert_close(other.metrics[key], there.metrics[key], equal_nan=True)
    assert torch.equal(other.metrics["preference/turned"], 1 - there.metrics["preference/turned"])


def test_opposite_labels_of_equal_weight_leave_the_reference():
    """p = 1/2: no gradient where policy = reference, and one back to it elsewhere."""
    policy, reference, batch = pairs([(1.0, -1.0), (1.0, -1.0)], [0.0, 3.0])
    losses = losses_of(objective(), policy, reference, batch)
    slopes = gradient(losses, policy)
    assert slopes[[0, 2]].tolist() == [0, 0]
    assert slopes[1] > 0 > slopes[3]


@pytest.mark.parametrize("form", FORMS)
def test_rows_of_a_step_may_be_split(form):
    found = objective(**FORMS[form], names=list("abc"), weights=WEIGHTS)
    policy, reference, batch = pairs(MIXED, GAPS)
    whole = reduced(found(policy, reference, batch), batch)
    total = 0.0
    for part in ([0, 2], [1, 3]):
        own, rows = select(policy, batch, part)
        total += reduced(found(own, select(reference, batch, part)[0], rows), batch).item()
    assert total == pytest.approx(whole.item(), abs=1e-14)


@pytest.mark.parametrize("form", FORMS)
def test_weights_of_rows_that_are_equal_are_the_settings(form):
    names = list("abc")
    shares = [WEIGHTS[name] for name in names]
    fixed = losses_of(objective(**FORMS[form], names=names, weights=WEIGHTS), *pairs(MIXED, GAPS))
    rows = pairs(MIXED, GAPS, row_weights=[shares] * 4)
    assert torch.equal(losses_of(objective(**FORMS[form], names=names, weights="row"), *rows), fixed)


def test_weights_of_rows_differ():
    """The same labels, wanted in other shares: one pair follows a, the other b."""
    rows = pairs([(1.0, -1.0), (1.0, -1.0)], [2.0, 2.0], row_weights=[(1.0, 0.0), (0.25, 0.75)])
    losses = losses_of(objective(weights="row"), *rows)
    expected = [-log_sigmoid(1), -0.25 * log_sigmoid(1) - 0.75 * log_sigmoid(-1)]
    assert losses.tolist() == pytest.approx(expected, abs=1e-14)
    turned = objective(weights="row", form="margin")(*rows).metrics["preference/turned"]
    assert turned.tolist() == [0, 1]


def test_metrics():
    """The policy prefers chosen of 1 and 2, rejected of 3; b is missing from 3 and weighs nothing in conflicts of c."""
    margins = [(1.0, -1.0), (-1.0, -2.0), (1.0, math.nan), (0.0, 0.0)]
    out = objective(weights={"a": 0.3, "b": 0.7})(*pairs(margins, [1.0, 2.0, -1.0, 1.0]))
    m = {key: values.tolist() for key, values in out.metrics.items()}
    assert m["accuracy/a"][:3] == [1, 0, 0]
    assert math.isnan(m["accuracy/a"][3])
    assert m["accuracy/b"][:2] == [0, 0]
    assert all(math.isnan(v) for v in m["accuracy/b"][2:])
    assert m["preference/turned"] == [1, 1, 0, 0]  # 0.3 - 0.7 < 0
    assert m["preference/conflict"] == [1, 0, 0, 0]
    assert m["preference/undecided"] == [0, 0, 0, 1]
    assert m["reward/margin"][:3] == pytest.approx([-0.5, -1.0, -0.5])
    assert math.isnan(m["reward/margin"][3])
    assert m["accuracy"][:3] == [0, 0, 0]
    assert m["logps/chosen"][:2] == [-3, -3]  # what the weights prefer stands in chosen's place
    only_a = objective(weights={"a": 1.0, "b": 0.0})(*pairs([(1.0, -1.0)], [1.0]))
    assert only_a.metrics["preference/conflict"].tolist() == [0]


def test_mixed_with_a_likelihood():
    """Margins of a part are wanted of the rows of the mix."""
    words = ["objective=mix", "objective@objective.first=multi_objective", "objective.first.names=[a,b]"]
    mix = build.objective(compose(words))
    assert isinstance(mix, Mix)
    assert (mix.margins, mix.all_margins, mix.row_weights) == (("a", "b"), False, False)
    words += ["objective.first.weights.a=0.3", "objective.first.weights.b=0.7"]
    assert dict(build.objective(compose(words)).first.weights) == {"a": 0.3, "b": 0.7}
    policy, reference, batch = pairs([(1.0, -1.0)], [0.0])
    assert mix(policy, reference, batch).terms[0].losses.item() == pytest.approx(math.log(2))


# --- what is refused


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"names": ["a"]}, r"must be two or more components, each once; with one use objective=dpo"),
        ({"names": ["a", "a"]}, "each once"),
        ({"names": "ab"}, r"objective\.names=ab: must be a list of names, as in \[helpful,harmless\]"),
        ({"names": None}, r"objective\.names=None: must be a list of names"),
        ({"names": [1, 2]}, r"objective\.names=\[1, 2\]: must be a list of names"),
        ({"weights": 0}, r"objective\.weights=0: must be numbers by name, as in objective\.weights\.a=1"),
        ({"weights": [0.5, 0.5]}, r"objective\.weights=\[0\.5, 0\.5\]: must be numbers by name"),
        ({"names": ["a", "train"]}, "accuracy/train is another metric"),
        ({"weights": {"a": 0.5, "b": 0.6}}, r"objective\.weights: 0\.5, 0\.6 sum to 1\.1; they must sum to 1"),
        ({"weights": {"a": 1.5, "b": -0.5}}, r"objective\.weights\.b=-0\.5: must be at least 0"),
        ({"weights": {"a": 0.5, "c": 0.5}}, r"objective\.weights\.c: no component has this name; there are a, b"),
        ({"weights": {"a": 1.0}}, r"objective\.weights\.b is missing"),
        ({"weights": {"a": math.nan, "b": 0.5}}, r"objective\.weights\.a=nan: must be a finite number"),
        ({"weights": "rows"}, r"objective\.weights=rows: must be one of row"),
        ({"beta": 0.0}, r"objective\.beta=0\.0"),
        ({"form": "mean"}, r"objective\.form=mean: must be one of losses, margin, modpo"),
        ({"offset": -1.0, "form": "margin"}, r"objective\.offset=-1\.0: must be at least 0"),
        ({"offset": 1.0}, r"objective\.offset=1 has no effect with objective\.form=losses"),
        (
            {"form": "margin", "offset_scaling": "log"},
            r"objective\.offset_scaling=log has no effect with objective\.off",
        ),
        (
            {"form": "margin", "scale_by_margin": True},
            r"scale_by_margin=true has no effect with objective\.form=margin",
        ),
        ({"component": "a"}, r"objective\.component=a has no effect with objective\.form=losses; use null"),
        ({"form": "modpo"}, r"objective\.component=None: must be one of a, b"),
        ({"form": "modpo", "component": "c"}, r"objective\.component=c: must be one of a, b"),
        ({"form": "modpo", "component": "b", "weights": {"a": 1.0, "b": 0.0}}, r"objective\.weights\.b=0"),
        ({"form": "modpo", "component": "b", "loss": NcaPair()}, r"objective\.form=modpo cannot be combined"),
        ({"form": "margin", "offset": 1.0, "loss": IpoMean()}, r"objective\.offset above 0 cannot be combined"),
    ],
)
def test_settings_that_cannot_be(changes, message):
    with pytest.raises(ValueError, match=message):
        objective(**changes)


@pytest.mark.parametrize(
    "changes, margins, weights, message",
    [
        (
            {"form": "margin"},
            [(1.0, 1.0), (1.0, math.nan)],
            None,
            r"file:2: objective\.form=margin needs a margin of b: ",
        ),
        ({"form": "modpo", "component": "a"}, [(1.0, math.nan)], None, "needs a margin of b"),
        ({}, [(math.nan, math.nan)], None, "objective.form=losses needs a margin of a"),
        (
            {"weights": "row"},
            [(1.0, 1.0)],
            None,
            "file:1: objective.weights=row needs weights of the row, one for each",
        ),
        (
            {"weights": "row", "form": "modpo", "component": "a"},
            [(1.0, 1.0)],
            [(0.0, 1.0)],
            "above 0 for objective.component",
        ),
    ],
)
def test_rows_without_what_they_need(changes, margins, weights, message):
    with pytest.raises(ValueError, match=message):
        objective(**changes)(*pairs(margins, row_weights=weights))


# --- a run


def margins_file(path, count: int, seed: int) -> str:
    """Pairs of test_train whose short, good chosen answers are liked by brief, and by rich only in every third pair."""
    write_pairs(path, count, seed)
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    for i, row in enumerate(rows):
        row["margins"] = {"brief": 1.0, "rich": 0.5 if i % 3 == 0 else -0.25}
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def run(base, name, *words):
    train, heldout = margins_file(base / "train.jsonl", 24, 0), margins_file(base / "heldout.jsonl", 6, 1)
    common = (
        "recipe=multi_objective", "data.margins=null", "objective.names=[brief,rich]", "model=tiny",
        f"data.train={train}", f"data.heldout={heldout}", f"run.dir={base / name}",
        f"reference.cache_dir={base / 'cache'}", "trainer.max_steps=8", "trainer.num_samples=0", "optimizer.lr=3e-3",
        "trainer.precision=float32", "log.tensorboard=false", "trainer.micro_batch_tokens=2048",
    )  # fmt: skip
    return main(["train", *common, *words])


def rows_of_run(base, name):
    return [json.loads(line) for line in (base / name / "metrics.jsonl").read_text().splitlines()]


def test_weights_decide_what_is_learnt(tmp_path):
    """The same pairs: with the weight on brief its preferences are met, with the weight on rich those of rich."""
    assert run(tmp_path, "brief", "objective.weights.brief=0.9", "objective.weights.rich=0.1") == 0
    assert run(tmp_path, "rich", "objective.weights.brief=0.1", "objective.weights.rich=0.9") == 0
    brief, rich = rows_of_run(tmp_path, "brief"), rows_of_run(tmp_path, "rich")
    assert brief[0]["loss/total"] == rich[0]["loss/total"] == pytest.approx(math.log(2), abs=1e-5)
    assert brief[-1]["accuracy/brief"] > 0.9 > rich[-1]["accuracy/brief"]
    assert rich[-1]["accuracy/rich"] > brief[-1]["accuracy/rich"]
    assert rich[-1]["preference/conflict"] == pytest.approx(2 / 3, abs=0.15)
    assert brief[-1]["preference/turned"] == 0 < rich[-1]["preference/turned"]
    assert {"heldout/accuracy_brief", "heldout/preference_conflict", "accuracy/heldout"} <= brief[-1].keys()


@pytest.mark.parametrize(
    "words",
    [
        ("objective.form=margin", "objective.offset=0.5"),
        ("objective.form=modpo", "objective.component=brief"),
    ],
    ids=["margin", "modpo"],
)
def test_other_forms_run(tmp_path, words):
    assert run(tmp_path, "run", *words) == 0
    rows = rows_of_run(tmp_path, "run")
    assert rows[-1]["loss/total"] < rows[0]["loss/total"]


def test_rounds_learn_from_rewards_by_component(tmp_path):
    """Pairs of a round's completions carry the rewards of both sides."""
    words = words_of(
        tmp_path, f"run.dir={tmp_path / 'run'}", "trainer=iterate", "objective=multi_objective",
        "objective.names=[mixed,coin]", "objective.form=margin", f"reward.mixed._target_={REWARDS}mixed",
        f"reward.coin._target_={REWARDS}coin", "pairs=all_pairs", "trainer.rounds=1", "trainer.batch_size=4",
        "sampling.n=3", "trainer.max_steps=", "trainer.save_every=", "trainer.max_missing_fraction=",
        "trainer.eval_every=", "trainer.micro_batch_tokens=1024",
    )  # fmt: skip
    assert main(["train", *words]) == 0
    pairs_of_round = [json.loads(line) for line in (tmp_path / "run/rounds/01/data.jsonl").read_text().splitlines()]
    differ = [
        [row["scores"]["chosen"][name] - row["scores"]["rejected"][name] for name in ("mixed", "coin")]
        for row in pairs_of_round
    ]
    assert len(differ) > 4
    assert all(sum(row) > 0 for row in differ)  # the score is their sum
    rows = [json.loads(line) for line in (tmp_path / "run/rounds/01/train/metrics.jsonl").read_text().splitlines()]
    seen = sum(row["preference/conflict"] for row in rows) > 0
    assert seen == any(min(row) < 0 for row in differ)
    assert {row["preference/turned"] for row in rows} == {0}


def test_margins_that_are_missing_stop_before_training(tmp_path, capsys):
    assert run(tmp_path, "run", "objective.names=[brief,polite]", "objective.form=margin") == 2
    said = " ".join(capsys.readouterr().err.split())
    assert "train.jsonl:1: margins.polite is missing: the objective reads brief, polite" in said


def test_functions_nobody_reads_are_refused(tmp_path, capsys):
    words = [f"data.margins.{name}=align.rewards.functions.coverage" for name in ("polite",)]
    assert run(tmp_path, "run", *words) == 2
    assert "data.margins.polite has no effect: objective=multi_objective reads margins of brief, rich" in " ".join(
        capsys.readouterr().err.split()
    )
    for command in (["check"], ["data", "check"]):
        assert main([*command, "recipe=dpo", "data.margins.topic=align.rewards.functions.coverage"]) == 2
        assert "data.margins.topic has no effect: objective=dpo reads no margins" in " ".join(
            capsys.readouterr().err.split()
        )
