"""`align evaluate run.dir=DIR` on finished tiny runs: its numbers are those of the run, whatever the run left."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.conftest import mostly_slow
from tests.killer import rows_file, settings, shared
from tests.trainers.online_runs import words_of as online_words
from tests.trainers.test_iterate import words as iterate_words

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


def test_another_file_is_read_as_the_words_say_and_not_as_the_runs_own(base, trained):
    """The run's rows had their prompt in a column of another name, and a rule; neither holds of another file."""
    rows = [json.loads(line) for line in (base / "train.jsonl").read_text().splitlines()] if trained("adapter") else []
    renamed = [{"asked": row.pop("prompt")} | row for row in rows]
    heldout = (base / "heldout.jsonl").read_text().splitlines()
    mapped, other = base / "mapped.jsonl", base / "other.jsonl"
    mapped.write_text("".join(json.dumps(row) + "\n" for row in renamed))
    other.write_text("".join(json.dumps({"asked": 1} | json.loads(x)) + "\n" for x in heldout))
    run = base / "mapped"
    words = [f"data.train={mapped}", "data.heldout=", "data.heldout_fraction=0.1", "data.columns.prompt=asked"]
    done = shared().run(settings(base, *SHORT, *RUNS["adapter"], *words, f"run.dir={run}"))
    assert done.code == 0, done.said
    assert evaluated(run)["num_pairs"] == len(rows)
    assert evaluated(run, f"data.train={other}")["num_pairs"] == 6
    refused = shared().run(["evaluate", f"run.dir={run}", f"data.train={other}", "data.columns.prompt=asked"])
    assert "prompt" in refused.said
    assert refused.code == 2
    assert evaluated(run, f"data.train={base / 'heldout.jsonl'}", "data.columns.chosen=chosen")["num_pairs"] == 6
    openai = base / "openai.jsonl"
    openai.write_text(json.dumps({
        "input": {"messages": [{"role": "user", "content": "Name a fish."}]},
        "preferred_output": [{"role": "assistant", "content": "Cod."}],
        "non_preferred_output": [{"role": "assistant", "content": "Oak."}],
    }) + "\n")  # fmt: skip
    assert evaluated(trained("adapter"), f"data.train={openai}", "data.form=openai")["num_pairs"] == 1


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
        .run(settings(base, *SHORT, "recipe=dpo", f"run.dir={run}"), [Hook("align.trainers.trained:write_final", 1)])
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


# ---------------------------------------------------------------------- every kind of run


def scored_rows(base: Path) -> Path:
    """Completions with a reward each."""
    path = base / "scored.jsonl"
    rows = [{"prompt": f"question {i}", "completion": "yes", "numbers": {"reward": i % 2}} for i in range(8)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def of_pairs(base: Path, run: Path, *more: str) -> list[str]:
    return settings(base, *SHORT, f"run.dir={run}", *more)


def of_scored(base: Path, run: Path, *more: str) -> list[str]:
    return of_pairs(base, run, f"data.train={scored_rows(base)}", "data.heldout=", *more)


def of_prompts(base: Path, run: Path, *more: str) -> list[str]:
    (base / "online").mkdir(exist_ok=True)
    return ["train", *online_words(base / "online", f"run.dir={run}", "trainer.max_steps=1", *more)]


def of_rounds(base: Path, run: Path, *more: str) -> list[str]:
    (base / "rounds").mkdir(exist_ok=True)
    return iterate_words(base / "rounds", run, "trainer.epochs=1", "pairs=wpo_v2", *more)


ONLINE = ("objective=policy_gradient", "advantage=remax")
WHOLE = ("lora.rank=0", "lora.dropout=")
SCORES = "align evaluate pairs model={run}/final data.train=FILE out=DIR"
NO_REFERENCE = "no reward accuracy: the run was trained without a reference"
PAIRS = "give pairs: align evaluate run.dir={run} data.train=FILE"
# name -> words of the run, what its evaluation on its own data is refused with, and what evaluation on pairs says
# instead of a reward accuracy; None: it is evaluated, and has one
KINDS = {
    "bradley_terry": (of_pairs, ("recipe=reward_model", *WHOLE), SCORES, SCORES),
    "reward_adapter": (of_pairs, ("recipe=reward_model",), SCORES, SCORES),
    "general": (of_pairs, ("recipe=gpm", *WHOLE), SCORES, SCORES),
    "warm": (of_pairs, ("recipe=warm", *WHOLE, "trainer.members=2", "trainer.probe_steps=0", "trainer.max_steps=1",
                        "reference.cache_dir="), SCORES, SCORES),
    "simpo": (of_pairs, ("recipe=simpo",), None, NO_REFERENCE),
    "orpo": (of_pairs, ("recipe=orpo",), None, NO_REFERENCE),
    "sft": (of_pairs, ("recipe=sft",), None, NO_REFERENCE),
    "wpo": (of_pairs, ("recipe=wpo",), None, None),
    "kto": (of_pairs, ("recipe=kto",), None, None),
    "oreo": (of_scored, ("objective=oreo", "recipe=", "trainer.max_steps=1"), PAIRS, None),
    "online_kl": (of_prompts, (*ONLINE, "trainer.kl_in_reward=0.05"), PAIRS, None),
    "online": (of_prompts, ONLINE, PAIRS, NO_REFERENCE),
    "rounds": (of_rounds, (), PAIRS, "align evaluate run.dir={run}/rounds/02/train"),
    "rounds_fixed": (of_rounds, ("trainer.reference=fixed",), PAIRS, None),
}  # fmt: skip


@pytest.mark.parametrize("name", mostly_slow(KINDS, 0, 4, 9, 10))
def test_every_kind_of_run_is_evaluated_by_what_it_learnt_or_refused(base, name):
    make, words, own, instead = KINDS[name]
    run = base / "kinds" / name
    done = shared().run(make(base, run, *words))
    assert done.code == 0, done.said
    pairs = rows_file(base / "pairs.jsonl", 5, 7)
    for more, refused in (([], own), ([f"data.train={pairs}"], own if own == SCORES else None)):
        told = shared().run(["evaluate", f"run.dir={run}", *more])
        said = " ".join(told.said.split())
        if refused is not None:
            assert told.code == 2, told.said
            assert refused.format(run=run) in said
            assert "Traceback" not in said
            continue
        assert told.code == 0, told.said
        assert ("reward accuracy" in said.replace("no reward accuracy", "")) == (instead is None)
        assert instead is None or instead.format(run=run) in said
        assert ("of the model before training" in said) == (instead is not None)


def test_a_round_is_compared_with_its_own_reference(base):
    """As the refusal of the whole run's reward says: what the round before left ranks as the reference."""
    run = base / "two_rounds"
    done = shared().run(of_rounds(base, run))
    assert done.code == 0, done.said
    pairs = rows_file(base / "pairs.jsonl", 5, 7)
    first, second = (evaluated(run / "rounds" / n / "train", f"data.train={pairs}") for n in ("01", "02"))
    for kind in ("ranking", "ranking_normalised"):
        assert first[kind]["mean"] == second[f"reference_{kind}"]["mean"]
    assert first["reward"] is not None
    assert second["reward"] is not None


@pytest.mark.parametrize("name", ["simpo", "orpo"])
def test_without_a_reference_the_ranking_per_token_is_what_the_run_measured(base, name):
    run = base / "measured" / name
    done = shared().run(of_pairs(base, run, f"recipe={name}"))
    assert done.code == 0, done.said
    measured = json.loads((run / "summary.json").read_text())["metrics"]["accuracy/heldout"]
    report = evaluated(run)
    assert report["ranking_normalised"]["mean"] == pytest.approx(measured)
    assert report["ranking_normalised_by_set"][str(base / "heldout.jsonl")]["mean"] == pytest.approx(measured)
    assert (report["reward"], report["reward_minus_ranking"], report["reward_by_set"]) == (None, None, {})
    assert report["ideal"] == []
