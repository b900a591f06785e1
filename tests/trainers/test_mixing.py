"""Shares of sources and weights of rows, by counting draws."""

from __future__ import annotations

import copy
import json
from collections import Counter

import numpy as np
import pytest
import torch

from align.cli import main
from align.models.policy import own_attention
from align.trainers import agreement
from align.trainers.loop import Plan
from align.trainers.mixing import Learnt, Mixture, Scheduled, by_temperature
from tests.killer import Hook, shared


def mixture(sizes, shares, batch=4, weights=None, limit=float("inf")):
    return Mixture(Plan(sum(sizes), batch, 10**6, 100, limit), sizes, shares, weights)


def constant(*shares):
    return Scheduled([(0.0, shares)], 100)


def counts(plan, sizes, steps, seed=0):
    borders = np.cumsum(sizes)
    return Counter(int(np.searchsorted(borders, i, side="right")) for s in steps for i in plan.indices(s, seed))


def test_temperatures_by_hand():
    assert by_temperature([1, 3], 1.0) == pytest.approx([0.25, 0.75])
    assert by_temperature([1, 4], 2.0) == pytest.approx([1 / 3, 2 / 3])
    assert by_temperature([1, 10**6], 1e9) == pytest.approx([0.5, 0.5])


def test_a_source_has_its_share_of_every_prefix_to_less_than_one_draw():
    sizes, shares = [5, 7, 90], (0.2, 0.5, 0.3)
    plan, seen = mixture(sizes, constant(*shares), batch=3), Counter()
    for step in range(1, 200):
        seen += counts(plan, sizes, [step])
        assert sum(seen.values()) == 3 * step
        for k, share in enumerate(shares):
            assert abs(seen[k] - 3 * step * share) < 1 + 1e-9


def test_within_a_source_each_row_comes_once_before_any_comes_again():
    plan = mixture([4, 8], constant(1, 1), batch=4)  # two of each a step
    first = [i for step in (1, 2) for i in plan.indices(step, 0) if i < 4]
    assert sorted(first) == [0, 1, 2, 3]
    second = [i for step in range(1, 5) for i in plan.indices(step, 0) if i >= 4]
    assert sorted(second) == list(range(4, 12))
    again = [i for step in (3, 4) for i in plan.indices(step, 0) if i < 4]
    assert sorted(again) == [0, 1, 2, 3]


def test_a_step_is_the_same_whenever_it_is_asked_for_and_another_seed_is_another_order():
    sizes, shares = [5, 9], Scheduled([(0.0, (3, 1)), (1.0, (1, 3))], 100)
    straight = mixture(sizes, shares)
    all_steps = [straight.indices(step, 1) for step in range(1, 60)]
    assert mixture(sizes, shares).indices(57, 1) == all_steps[56]
    assert [mixture(sizes, shares).indices(step, 2) for step in range(1, 60)] != all_steps


def test_a_schedule_goes_in_straight_lines_and_stays_at_its_ends():
    shares = Scheduled([(0.5, (1, 0)), (1.0, (1, 3))], 101)
    assert shares.at(1) == pytest.approx([1, 0])
    assert shares.at(51) == pytest.approx([1, 0])
    assert shares.at(76) == pytest.approx([0.625, 0.375])
    assert shares.at(101) == pytest.approx([0.25, 0.75])
    assert shares.at(500) == pytest.approx([0.25, 0.75])


def test_a_source_that_comes_at_the_end_is_not_owed_for_the_time_before():
    shares = Scheduled([(0.0, (1, 0)), (0.5, (1, 0)), (0.50001, (0, 1))], 101)
    plan = mixture([50, 50], shares)
    assert counts(plan, [50, 50], range(1, 52)) == {0: 204}
    assert counts(plan, [50, 50], range(52, 62)) == {1: 40}


def test_a_change_of_learnt_shares_leaves_the_steps_before_it_alone():
    learnt = Learnt([6, 6])
    plan = mixture([6, 6], learnt)
    before = [plan.indices(step, 0) for step in range(1, 5)]
    learnt.changes.append((5, [0.0, 1.0]))
    assert counts(plan, [6, 6], range(5, 9)) == {1: 16}
    fresh = mixture([6, 6], learnt)
    assert fresh.indices(8, 0) == plan.indices(8, 0)
    assert [fresh.indices(step, 0) for step in range(1, 5)] == before


def test_weights_say_how_often_a_row_comes():
    weights = np.array([0.0, 1.0, 2.0, 5.0])
    plan = mixture([4], constant(1), batch=4, weights=weights)
    seen = Counter(i for step in range(1, 401) for i in plan.indices(step, 0))
    assert seen[0] == 0
    for row in (1, 2, 3):  # every epoch gives n w / sum(w), rounded up or down: 0.5, 1, 2.5
        assert seen[row] == pytest.approx(1600 * weights[row] / 8, abs=60)
        each = [plan.indices(step, 0).count(row) for step in range(1, 401)]
        assert set(each) <= {int(4 * weights[row] / 8), int(np.ceil(4 * weights[row] / 8))}
    assert mixture([4], constant(1), batch=4, weights=np.full(4, 7.0)).indices(1, 0) != [0, 1, 2, 3]
    assert sorted(mixture([4], constant(1), batch=4, weights=np.full(4, 7.0)).indices(1, 0)) == [0, 1, 2, 3]


def test_the_last_step_has_what_the_epochs_leave():
    plan = mixture([3, 3], constant(1, 1), limit=6)
    assert [len(plan.indices(step, 0)) for step in (1, 2)] == [4, 2]


# ---------------------------------------------------------------------- in runs


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    """Two sources to imitate and a target set like the first of them; the second says the opposite."""
    folder = tmp_path_factory.mktemp("sources")
    ask = [f"{a} is" for a in ("fire", "ice", "snow", "coal", "tea", "rain", "wind", "sun")]
    good = [{"prompt": p, "completion": " aaaa"} for p in ask]
    bad = [{"prompt": p, "completion": " zzzzzzz"} for p in ask[:6]]
    target = [{"prompt": f"{a} is", "completion": " aaaa"} for a in ("milk", "wool")]
    return [write(folder / f"{n}.jsonl", rows) for n, rows in (("good", good), ("bad", bad), ("target", target))]


def trained(path, sources, *words):
    settings = [
        *(() if "recipe=dpo" in words else ["recipe=sft"]), "model=tiny", "data.text=plain",
        "model.hidden_size=16", "model.num_layers=1",
        "data.heldout_fraction=0",
        *(() if any(w.startswith("data.train=") for w in words) else [f"data.train=[{sources[0]},{sources[1]}]"]),
        "trainer.batch_size=4", "trainer.eval_every=0",
        "log.tensorboard=false", "optimizer.lr=1e-3", "trainer.precision=float32", f"run.dir={path}",
    ]  # fmt: skip
    assert main(["train", *settings, *words]) == 0
    return [json.loads(line) for line in (path / "metrics.jsonl").read_text().splitlines()]


GRADIENT = ["data.mixture=gradient", "data.mixture_every=2", "data.mixture_rate=2", "trainer.schedule_steps=12"]


@pytest.fixture(scope="module")
def learnt(sources, tmp_path_factory):
    path = tmp_path_factory.mktemp("learnt") / "run"
    return trained(path, sources, *GRADIENT, f"data.mixture_target={sources[2]}", "trainer.max_steps=12")


def test_the_source_that_hinders_the_target_set_loses_its_share(learnt):
    assert learnt[0]["data/share_1"] == pytest.approx(8 / 14)
    assert all("data/agreement_1" in row for row in learnt[2::2])
    assert "data/agreement_1" not in learnt[1]
    assert all(row["data/agreement_1"] > row["data/agreement_2"] for row in learnt[2::2])
    assert learnt[-1]["data/share_2"] < 0.05
    for row in learnt:
        assert row["data/share_1"] + row["data/share_2"] == pytest.approx(1)


def test_learnt_shares_go_on_where_a_run_was_left(sources, learnt, tmp_path):
    words = [*GRADIENT, f"data.mixture_target={sources[2]}"]
    trained(tmp_path / "run", sources, *words, "trainer.max_steps=5")
    again = trained(tmp_path / "run", sources, *words, "trainer.max_steps=12")
    names = ("loss/total", "data/share_1", "data/agreement_2", "optimizer/gradient_norm")
    assert [[row.get(n) for n in names] for row in again] == [[row.get(n) for n in names] for row in learnt]


def test_a_measurement_leaves_the_step_as_it_is(sources, learnt, tmp_path):
    """Until the first change both take the sources by their sizes, and the measurement is before step 3."""
    plain = trained(
        tmp_path / "run", sources, "data.mixture=temperature", "trainer.max_steps=2", "trainer.schedule_steps=12"
    )
    assert [row["loss/total"] for row in plain] == [row["loss/total"] for row in learnt[:2]]


def test_agreement_is_the_cosine_of_whole_gradients(sources, tmp_path, monkeypatch):
    """Against plain autograd on the same rows."""
    seen, last = {}, []
    real = agreement.Agreement._cosines

    def watched(self, step, context, size, seed, check):
        found = real(self, step, context, size, seed, check)
        vectors = []
        for k in range(3):
            model = context.engine.policy.model
            loss, count = 0.0, 0
            for example in self.drawn(k, step, size, seed):
                (row,) = example.rows
                ids = torch.as_tensor(np.asarray(row.token_ids), dtype=torch.long)[None]
                with own_attention(model):
                    logps = torch.log_softmax(model(input_ids=ids).logits[0, :-1].float(), -1)
                targets = np.flatnonzero(row.targets)
                loss = loss - sum(logps[t - 1, int(ids[0, t])] for t in targets)
                count += len(targets)
            gradients = torch.autograd.grad(loss / count, [p for p in model.parameters() if p.requires_grad])
            vectors.append(torch.cat([g.flatten() for g in gradients]).double())
        last[:] = [self.drawn(k, step, size, seed) for k in range(3)]
        seen[step] = (found, [torch.cosine_similarity(v, vectors[-1], 0) for v in vectors[:-1]])
        return found

    monkeypatch.setattr(agreement.Agreement, "_cosines", watched)
    trained(tmp_path / "run", sources, *GRADIENT, f"data.mixture_target={sources[2]}", "trainer.max_steps=5")
    assert sorted(seen) == [3, 5]
    assert {e.source.rpartition(":")[0] for e in last[0]} == {sources[0]}
    assert {e.source.rpartition(":")[0] for e in last[1]} == {sources[1]}
    for found, wanted in seen.values():
        assert found.tolist() == pytest.approx([float(w) for w in wanted], abs=1e-5)


def test_agreement_of_pairs_is_that_of_their_losses(tmp_path, monkeypatch):
    """DPO's loss is one of sums over rows: against autograd through the network, from the network before training."""
    files = []
    for n, (good, bad) in {"a": (" aaaa", " zz"), "b": (" zzz", " aaa"), "c": (" aa", " zzzz")}.items():
        rows = [{"prompt": f"{n} {i} is", "chosen": good, "rejected": bad} for i in range(5)]
        files.append(write(tmp_path / f"{n}.jsonl", rows))
    kept, seen = {}, {}
    real, before = agreement.Agreement._cosines, agreement.Agreement.before

    def logp(model, row):
        ids = torch.as_tensor(np.asarray(row.token_ids), dtype=torch.long)[None]
        with own_attention(model):
            logps = torch.log_softmax(model(input_ids=ids).logits[0, :-1].float(), -1)
        return sum(logps[t - 1, int(ids[0, t])] for t in np.flatnonzero(row.targets))

    def first(self, step, context, *args):
        kept.setdefault("model", copy.deepcopy(context.engine.policy.model))
        return before(self, step, context, *args)

    def watched(self, step, context, size, seed, check):
        found, vectors, model = real(self, step, context, size, seed, check), [], context.engine.policy.model
        for k in range(3):
            examples = self.drawn(k, step, size, seed)
            ratios = [[logp(model, row) - logp(kept["model"], row).detach() for row in e.rows] for e in examples]
            loss = -sum(torch.nn.functional.logsigmoid(0.1 * (c - r)) for c, r in ratios) / len(ratios)
            gradients = torch.autograd.grad(loss, [p for p in model.parameters() if p.requires_grad])
            vectors.append(torch.cat([g.flatten() for g in gradients]).double())
        seen[step] = (found, [float(torch.cosine_similarity(v, vectors[-1], 0)) for v in vectors[:-1]])
        return found

    monkeypatch.setattr(agreement.Agreement, "before", first)
    monkeypatch.setattr(agreement.Agreement, "_cosines", watched)
    words = [*GRADIENT, f"data.train=[{files[0]},{files[1]}]", f"data.mixture_target={files[2]}", "trainer.max_steps=5"]
    trained(tmp_path / "run", files, *words, "recipe=dpo", "objective.beta=0.1", "lora.rank=0")
    assert sorted(seen) == [3, 5]
    for found, wanted in seen.values():
        assert found.tolist() == pytest.approx(wanted, abs=1e-4)
        assert found[0] > 0 > found[1]


@pytest.mark.distributed
@pytest.mark.parametrize("stage", ["zero1", "zero3"])
def test_two_processes_learn_the_shares_of_one(sources, learnt, tmp_path, stage):
    """Killed after the first measurement, too: the shares are in the checkpoint of both."""
    words = [
        "train", "recipe=sft", "model=tiny", "data.text=plain", "model.hidden_size=16", "model.num_layers=1",
        "data.heldout_fraction=0", f"data.train=[{sources[0]},{sources[1]}]", "trainer.batch_size=4",
        "trainer.eval_every=0", "log.tensorboard=false", "optimizer.lr=1e-3", "trainer.precision=float32", *GRADIENT,
        f"data.mixture_target={sources[2]}", "trainer.max_steps=7", f"engine={stage}", "engine.timeout_s=60",
        "trainer.save_every=2", f"run.dir={tmp_path / 'run'}",
    ]  # fmt: skip
    step = Hook("align.engine.deepspeed:DeepSpeedEngine.step", 5, when="after")
    killed = shared().run(words, [step], processes=2)
    assert -9 in killed.codes, killed.said
    done = shared().run(words, processes=2)
    assert set(done.codes) == {0}, done.said
    rows = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    assert len(rows) == 7
    for two, one in zip(rows, learnt, strict=False):
        told = [name for name in one if name.startswith(("data/", "loss/"))]
        assert {name: two[name] for name in told} == pytest.approx({name: one[name] for name in told}, abs=1e-4)


def test_a_schedule_in_a_run_takes_the_second_source_at_the_end(sources, tmp_path):
    points = "[[0,[1,0]],[0.5,[1,0]],[0.51,[0,1]]]"
    words = ["data.mixture=schedule", f"data.mixture_shares={points}", "trainer.max_steps=5"]
    rows = trained(tmp_path / "run", sources, *words)
    targets = [row["tokens/targets"] for row in rows]
    assert targets == [4 * 6] * 3 + [4 * 9] * 2  # with the end of the text; the first half includes its border


def test_a_column_of_weights_says_which_rows_a_run_sees(sources, tmp_path, capsys):
    rows = [{"prompt": f"{k} is", "completion": " a" * (k + 1), "quality": float(k == 2)} for k in range(4)]
    file = write(tmp_path / "weighted.jsonl", rows)
    words = [f"data.train={file}", "data.columns.weight=quality", "trainer.max_steps=2"]
    seen = trained(tmp_path / "run", sources, *words)
    assert [row["tokens/targets"] for row in seen] == [4 * 7] * 2
    nothing = write(tmp_path / "nothing.jsonl", [{**row, "quality": 0} for row in rows])
    base = ["recipe=sft", "model=tiny", "data.heldout_fraction=0", "data.columns.weight=quality"]
    assert main(["train", *base, f"data.train={nothing}", f"run.dir={tmp_path / 'none'}"]) == 2
    assert "have weight 0" in capsys.readouterr().err
    below = write(tmp_path / "below.jsonl", [{**row, "quality": -1} for row in rows])
    assert main(["train", *base, f"data.train={below}", f"run.dir={tmp_path / 'below'}"]) == 2
    assert "below.jsonl:1: the weight must be at least 0, found -1" in capsys.readouterr().err


def test_a_source_of_which_no_row_is_left_is_refused(sources, tmp_path, capsys):
    empty = write(tmp_path / "empty.jsonl", [{"prompt": 3, "completion": "a"}])
    words = [f"data.train=[{sources[0]},{empty}]", "data.on_bad_row=drop", "data.max_bad_fraction=1"]
    more = ["data.mixture=schedule", "data.mixture_shares=[[0,[1,1]]]", f"run.dir={tmp_path / 'run'}"]
    assert main(["train", "recipe=sft", "model=tiny", "data.heldout_fraction=0", *words, *more]) == 2
    assert "source 2 has no rows left to be mixed" in capsys.readouterr().err


REFUSED = [
    (["data.mixture=temperature", "data.train=[{0}]"], "needs two sources or more"),
    (["data.mixture=temperature", "data.repeat=[1,2]"], "data.repeat has no effect with data.mixture=temperature"),
    (["data.mixture=schedule"], "needs data.mixture_shares"),
    (["data.mixture_shares=[[0,[1,1]]]"], "has no effect without data.mixture=schedule"),
    (["data.mixture=schedule", "data.mixture_shares=[[0,[1,1,1]]]"], "a share for each of the 2 sources"),
    (["data.mixture=schedule", "data.mixture_shares=[[0.5,[1,1]],[0.5,[1,1]]]"], "progress must be in [0, 1] and rise"),
    (["data.mixture=schedule", "data.mixture_shares=[[0,[0,0]]]"], "one of them above 0"),
    (["data.mixture=schedule", "data.mixture_shares=[1,1]"], "must be points"),
    (["data.mixture=gradient"], "needs data.mixture_target"),
    (["data.mixture=gradient", "data.mixture_target=nosuch.jsonl"], "nosuch.jsonl: no such file"),
    (["data.mixture=gradient", "data.mixture_target={0}", "objective=oreo"], "learns from"),
    (["data.mixture=gradient", "data.mixture_target={0}", "lora.rank=4", "lora.dropout=0.1"], "set lora.dropout=0"),
]  # fmt: skip


@pytest.mark.parametrize(("words", "sentence"), REFUSED, ids=[" ".join(words) for words, _ in REFUSED])
def test_refused_without_a_model(sources, capsys, words, sentence):
    given = [word.format(*sources) for word in words]
    data = [] if any(w.startswith("data.train=") for w in given) else [f"data.train=[{sources[0]},{sources[1]}]"]
    assert main(["check", "recipe=sft", "model=tiny", *data, *given]) == 2
    assert sentence in capsys.readouterr().err


def test_prompts_are_mixed_by_repeat_alone(sources, capsys):
    words = [f"data.train=[{sources[0]},{sources[1]}]", "data.mixture=temperature"]
    assert main(["check", "recipe=remax", "model=tiny", *words]) == 2
    assert "with prompts or collect=... use data.repeat" in capsys.readouterr().err
    assert main(["check", "recipe=remax", "model=tiny", words[0], "data.columns.weight=quality"]) == 2
    assert "data.columns.weight draws rows that are given" in capsys.readouterr().err
