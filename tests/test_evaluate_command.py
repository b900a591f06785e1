"""`align evaluate run.dir=DIR` on finished tiny runs: its numbers are those of the run, whatever the run left."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.killer import rows_file, settings, shared

SHORT = ["trainer.max_steps=6", "trainer.eval_every=0", "trainer.save_every=6", "optimizer.lr=1e-2", "lora.dropout=0"]
RUNS = {
    "adapter": ["recipe=dpo"],
    "merged": ["recipe=dpo", "merge=true"],
    "weights": ["recipe=dpo", "lora.rank=0"],
    "labelled": ["recipe=kto"],
}


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("evaluate")


@pytest.fixture(scope="module")
def trained(base):
    """A function name -> directory of the finished run of RUNS."""

    def directory(name: str) -> Path:
        run = base / name
        if not run.exists():
            done = shared().run(settings(base, *SHORT, *RUNS[name], f"run.dir={run}"))
            assert done.code == 0, done.said
        return run

    return directory


def evaluated(run: Path, *more: str) -> dict:
    out = run.parent / "report.json"
    out.unlink(missing_ok=True)
    done = shared().run(["evaluate", f"run.dir={run}", *more, "--json", str(out)])
    assert done.code == 0, done.said
    report = json.loads(out.read_text())
    assert f"ranking: {report['num_pairs']} pairs" in done.said
    for name, share in report["reward_by_set"].items():
        assert f"reward accuracy on {name} {share['mean']:.1%}" in done.said
    return report


@pytest.mark.parametrize("name", ["adapter", "merged", "weights"])
def test_reward_accuracy_is_what_the_run_measured(base, trained, name):
    run = trained(name)
    measured = json.loads((run / "summary.json").read_text())["metrics"]["accuracy/heldout"]
    report = evaluated(run)
    assert report["num_pairs"] == 6
    assert report["reward"]["mean"] == pytest.approx(measured)
    assert list(report["reward_by_set"]) == [str(base / "heldout.jsonl")]
    before = {p: p.read_bytes() for p in run.rglob("*") if p.is_file()}
    assert evaluated(run) == report
    assert {p: p.read_bytes() for p in run.rglob("*") if p.is_file()} == before  # a finished run is only read


def test_adapter_and_merged_weights_rank_alike(trained):
    a, b = (evaluated(trained(name)) for name in ("adapter", "merged"))
    assert a == b


def test_two_sets_are_told_apart(base, trained):
    """The rows that were trained on and those that were not, each with its share; the whole is their mean."""
    sets = [str(base / "train.jsonl"), str(base / "heldout.jsonl")]
    report = evaluated(trained("adapter"), f"data.heldout=[{','.join(sets)}]")
    assert list(report["reward_by_set"]) == sets
    assert report["num_pairs"] == 76
    shares = [report["reward_by_set"][name]["mean"] for name in sets]
    assert report["reward"]["mean"] == pytest.approx((70 * shares[0] + 6 * shares[1]) / 76)
    assert evaluated(trained("adapter"))["reward"]["mean"] == shares[1]


def test_data_that_are_given_are_what_is_evaluated(base, trained):
    """data.train=FILE beside a run with held-out data of its own: the setting has an effect."""
    other = rows_file(base / "other.jsonl", 9, 11)
    report = evaluated(trained("adapter"), f"data.train={other}")
    assert (report["num_pairs"], list(report["reward_by_set"])) == (11, [str(other)])
    own = base / "heldout.jsonl"
    both = evaluated(trained("adapter"), f"data.train={other}", f"data.heldout=[{own},{other}]")
    assert list(both["reward_by_set"]) == [str(other), str(own)]


def test_the_start_is_the_reference(base, trained):
    """A policy that is its own reference earns no reward, and the reference's ranking is the policy's."""
    run = base / "untouched"
    done = shared().run(
        settings(base, *SHORT, "recipe=dpo", "trainer.max_steps=1", "optimizer.lr=1e-30", f"run.dir={run}")
    )
    assert done.code == 0, done.said
    report = evaluated(run)
    assert report["ranking"] == pytest.approx(report["reference_ranking"], abs=0.2)
    assert report["reward"]["mean"] < 1
    learnt = evaluated(trained("adapter"), f"data.heldout={base / 'train.jsonl'}")
    assert learnt["reward"]["low"] > 0.9  # good and bad stand at the end of every answer
    assert learnt["reference_ranking"]["mean"] < 0.9


def test_a_run_on_labels_is_evaluated_on_pairs(base, trained):
    refused = shared().run(
        ["evaluate", f"run.dir={trained('labelled')}", f"data.heldout={rows_file(base / 'l.jsonl', 3, 5, 'labelled')}"]
    )
    assert refused.code == 2
    assert "the row is labelled" in refused.said
    assert evaluated(trained("labelled"))["num_pairs"] == 6


def test_agreement_makes_the_ideal_known(base, trained):
    run = trained("adapter")  # which writes the pairs
    lines = [
        json.loads(x) | {"numbers": {"agreement": 0.75}} for x in (base / "heldout.jsonl").read_text().splitlines()
    ]
    rated = base / "rated.jsonl"
    rated.write_text("".join(json.dumps(x) + "\n" for x in lines))
    report = evaluated(run, f"data.heldout={rated}")
    assert report["num_agreement"] == 6
    assert [entry["beta"] for entry in report["ideal"]] == [0.01, 0.1, 1.0, 5.0, 10.0]
    assert report["ideal"][0]["mean"] == 1.0  # ln 3 / 0.01 = 110 nats outweigh what a random network says


@pytest.mark.parametrize(
    "words,said",
    [
        (["data.heldout=nowhere.jsonl"], "nowhere.jsonl"),
        (["optimizer.lr=1"], "optimizer.lr cannot be set for a finished run"),
        (["run.dir=nowhere"], "run.dir=DIR is needed"),
    ],
)
def test_refusals(trained, words, said):
    refused = shared().run(["evaluate", f"run.dir={trained('adapter')}", *words])
    assert refused.code == 2, refused.said
    assert said in refused.said
    assert "Traceback" not in refused.said


def test_a_run_that_is_not_finished_is_refused(base, tmp_path):
    from tests.killer import Hook

    run = tmp_path / "run"
    assert (
        shared()
        .run(settings(base, *SHORT, "recipe=dpo", f"run.dir={run}"), [Hook("align.trainers.run:write_final", 1)])
        .code
        == -9
    )
    refused = shared().run(["evaluate", f"run.dir={run}"])
    assert refused.code == 2
    assert "let the run finish first" in refused.said


def test_a_run_that_collected_is_evaluated_on_its_pairs(base):
    from tests.trainers.test_multiturn import words

    run = base / "collected"
    done = shared().run(words(base, "dpo", run))
    assert done.code == 0, done.said
    report = evaluated(run)
    assert list(report["reward_by_set"]) == [str(run / "collect" / "pairs.jsonl")]
    assert report["num_pairs"] == json.loads((run / "collect" / "collect.json").read_text())["pairs"]
