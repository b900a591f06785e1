"""recipe=multiturn_dpo and multiturn_kto are one command: collecting, training and measuring, killed anywhere."""

from __future__ import annotations

import json
import signal
from pathlib import Path

import pytest
import torch

from tests.conftest import mostly_slow
from tests.killer import Hook, evidence, leftovers, settings, shared

pytestmark = pytest.mark.xdist_group("multiturn")  # all are compared with the same undisturbed runs

CHUNKS = 3
COLLECT = "align.trainers.collect:"
KEPT = "align.trainers.row_cache:"
LOOP = "align.rollout.toolloop:ToolLoop."


def words(base: Path, name: str, run: Path, *more: str) -> list[str]:
    """A random network over bytes that ends an emission with its first digit: now and then it is the right one."""
    return settings(
        base, f"recipe=multiturn_{name}", "data.train=", "data.heldout=", "model.hidden_size=16", "optimizer.lr=3e-2",
        "collect.task_settings={min_terms: 2, max_terms: 2, min_digits: 1, max_digits: 1}", "collect.num_examples=0",
        "collect.num_problems=6", f"collect.chunk_problems={6 // CHUNKS}", "collect.num_heldout=3",
        "collect.samples_per_problem=64", "collect.max_new_tokens=24", "collect.temperature=1.0",
        "collect.stop=['0','1','2','3','4','5','6','7','8','9']", "collect.max_pairs_per_problem=3",
        "collect.tool._target_=tests.killer.Parrot", "data.heldout_fraction=0.4", "trainer.max_steps=6",
        "trainer.save_every=2", "trainer.eval_every=3", "rollout.batch_size=256", f"run.dir={run}", *more,
    )  # fmt: skip


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("multiturn")


@pytest.fixture(scope="module")
def straight(base):
    """A function: dpo or kto -> the directory of the run that nothing happens to."""

    def directory(name: str) -> Path:
        run = base / name
        if not run.exists():
            ended = shared().run(words(base, name, run))
            assert ended.code == 0, ended.said
        return run

    return directory


def rows(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def check_account(run: Path) -> dict:
    """Every trajectory is used or left out under one reason; a pair's sides share the prompt; targets are emissions."""
    report = json.loads((run / "collect" / "collect.json").read_text())
    drawn = [row for path in sorted((run / "collect").glob("trajectories-*.jsonl")) for row in rows(path)]
    assert len(drawn) == report["trajectories"]
    assert report["right"] + report["wrong"] + sum(report["dropped"].values()) == report["trajectories"]
    kinds = [report[f"problems_{k}"] for k in ("with_both", "only_right", "only_wrong", "with_neither")]
    assert sum(kinds) == report["problems"] == len({row["problem"] for row in drawn})
    assert report["accuracy"] == sum(row["label"] for row in drawn) / len(drawn)
    pairs, labelled = rows(run / "collect" / "pairs.jsonl"), rows(run / "collect" / "labelled.jsonl")
    assert (len(pairs), len(labelled)) == (report["pairs"], report["labelled"])
    label = {(row["problem"], tuple(row["token_ids"])): row["label"] for row in drawn}
    for pair in pairs:
        sides = [pair["chosen"], pair["rejected"]]
        assert [label[pair["problem"], tuple(side["token_ids"])] for side in sides] == [True, False]
        starts = [min(a for _, a, _, target in side["spans"] if target) for side in sides]
        assert starts[0] == starts[1]
        assert sides[0]["token_ids"][: starts[0]] == sides[1]["token_ids"][: starts[0]]
    for row in (*labelled, *(side for pair in pairs for side in (pair["chosen"], pair["rejected"]))):
        edges = [edge for _, start, end, _ in row["spans"] for edge in (start, end)]
        assert (edges[0], edges[-1]) == (0, len(row["token_ids"]))
        assert edges[1:-1:2] == edges[2::2]
        assert {role for role, *_, target in row["spans"] if target} == {"assistant"}
    for side in (pair["chosen"] for pair in pairs):
        assert any(role == "tool" for role, *_ in side["spans"])  # the answer was read from the tool
    return report


def check_summary(run: Path, count: int) -> None:
    """Before and after are what the two files of held-out problems say."""
    solved = json.loads((run / "summary.json").read_text())["problems"]
    before, after = (rows(run / f"problems-{phase}.jsonl") for phase in ("before", "after"))
    assert [row["problem"] for row in before] == [row["problem"] for row in after]
    assert not {row["problem"] for row in before} & {
        row["problem"] for path in (run / "collect").glob("trajectories-*") for row in rows(path)
    }
    assert (solved["count"], len(before)) == (count, count)
    assert solved["before"] == sum(row["reward"] for row in before) / count
    assert solved["after"] == sum(row["reward"] for row in after) / count
    change = solved["change"]
    assert change["mean"] == pytest.approx(solved["after"] - solved["before"])
    assert change["low"] <= change["mean"] <= change["high"]


@pytest.mark.parametrize("name", ["dpo", "kto"])
def test_one_command(straight, name):
    run = straight(name)
    report = check_account(run)
    assert report["pairs"] >= 3
    assert report["dropped"].keys() >= {"unfinished", "right_without_call"}
    check_summary(run, 3)
    assert len(list((run / "collect").glob("trajectories-*"))) == CHUNKS
    audit = json.loads((run / "audit.json").read_text())
    assert audit["rows_in"] == report["pairs" if name == "dpo" else "labelled"]
    assert audit["prompts_in_both"] == 0
    before, after = (rows(run / f"problems-{phase}.jsonl") for phase in ("before", "after"))
    # the policy that was trained answers afterwards, not the one that the run began with
    assert [row["token_ids"] for row in before] != [row["token_ids"] for row in after]


def test_both_collect_the_same(straight):
    """What is collected depends on the policy and the seed, not on what is learnt from it."""
    files = [{k: v for k, v in evidence(straight(n)).items() if k.startswith("collect/")} for n in ("dpo", "kto")]
    assert len(files[0]) == CHUNKS + 4
    assert files[0] == files[1]


# Where a run dies. LOOP.run is called before training, once a chunk, and after training.
DEATHS = {
    "in the evaluation before": Hook(LOOP + "_turn", 1),
    "after the evaluation before": Hook(COLLECT + "Collector.before", 1, when="after"),
    "between chunks": Hook(COLLECT + "Collector._chunk", 3),
    "inside a chunk": Hook("align.rollout.hf:HFRollout.generate", 6),
    "inside a batch": Hook("align.rollout.hf:HFRollout._batch", 5),
    "before a chunk has its name": Hook("os:replace", 6),
    "before the pairs": Hook(COLLECT + "select", 1, when="after"),
    "between pairs and labelled rows": Hook(KEPT + "write_rows", 1 + CHUNKS + 2),
    "before the first step": Hook("align.engine.local:LocalEngine.step", 1),
    "in training": Hook("align.engine.local:LocalEngine.step", 4, when="after"),
    "in a save": Hook("align.engine.local:save_file", 4),
    "in the evaluation after": Hook(LOOP + "run", 1 + CHUNKS + 1, when="after"),
    "after the evaluation after": Hook(COLLECT + "Collector.after", 1, when="after"),
    "before the summary": Hook("align.trainers.trained:write_final", 1, when="after"),
}


# KTO's runs differ from DPO's from the first step on
KILLED = [("dpo", where) for where in DEATHS] + [("kto", "in training"), ("kto", "in the evaluation after")]


# of what it collects, of its training, of what follows
@pytest.mark.parametrize("name,where", mostly_slow(KILLED, 3, 15))
def test_killed_anywhere(base, straight, tmp_path, name, where):
    whole = evidence(straight(name))
    command = words(base, name, tmp_path / "run", f"reference.cache_dir={tmp_path / 'cache'}")
    killed = shared().run(command, [DEATHS[where]])
    assert killed.code == -9, killed.said
    kept = {p: p.stat().st_mtime_ns for p in (tmp_path / "run" / "collect").glob("trajectories-*")}
    done = shared().run(command)
    assert done.code == 0, done.said
    assert evidence(tmp_path / "run") == whole
    assert leftovers(tmp_path / "run") == []
    assert {p: p.stat().st_mtime_ns for p in kept} == kept  # nothing is collected twice


STOPS = {
    "evaluation before": (Hook("align.rollout.hf:HFRollout._batch", 1), 0),
    "inside a chunk": (Hook("align.rollout.hf:HFRollout.generate", 6), None),
    "between chunks": (Hook(KEPT + "write_rows", 1 + 2, when="after"), 2),
    "evaluation after": (Hook(LOOP + "run", 1 + CHUNKS + 1), CHUNKS),
}


@pytest.mark.parametrize("where", mostly_slow(STOPS, 2))
def test_stopped_and_goes_on(base, straight, tmp_path, where):
    hook, chunks = STOPS[where]
    number = signal.SIGINT if where == "between chunks" else signal.SIGTERM
    command = words(base, "dpo", tmp_path / "run")
    stopped = shared().run(command, [Hook(hook.target, hook.n, int(number), hook.when)])
    assert stopped.code == (85 if number == signal.SIGTERM else 130), stopped.said
    assert f"{number.name} received" in stopped.said
    there = len(list((tmp_path / "run" / "collect").glob("trajectories-*")))
    assert there < CHUNKS if chunks is None else there == chunks
    assert leftovers(tmp_path / "run") == []
    done = shared().run(command)
    assert done.code == 0, done.said
    assert evidence(tmp_path / "run") == evidence(straight("dpo"))


def test_complete_run_asks_nothing_again(base, straight):
    run = straight("dpo")
    before = evidence(run)
    again = shared().run(words(base, "dpo", run), [Hook("align.rollout.hf:HFRollout.generate", 1)])
    assert again.code == 0, again.said
    assert "complete at step 6" in again.said
    assert evidence(run) == before


def test_other_settings_of_the_round_are_refused_once_training_began(base, straight):
    refused = shared().run(words(base, "dpo", straight("dpo"), "collect.temperature=0.9"))
    assert refused.code == 2
    assert "collect.temperature" in refused.said


@pytest.mark.slow
def test_other_settings_before_training_begin_the_round_anew(base, straight, tmp_path):
    """A first start that died while it collected binds nobody."""
    killed = shared().run(
        words(base, "dpo", tmp_path / "run", "collect.temperature=0.5"), [Hook(COLLECT + "Collector._chunk", 3)]
    )
    assert killed.code == -9, killed.said
    done = shared().run(words(base, "dpo", tmp_path / "run"))
    assert done.code == 0, done.said
    assert evidence(tmp_path / "run") == evidence(straight("dpo"))


@pytest.mark.slow
def test_a_run_that_learnt_from_other_problems_is_refused_and_kept(base, tmp_path):
    """A version that drew other problems from the same seed left a key without the questions' hash."""
    run = tmp_path / "run"
    killed = shared().run(words(base, "dpo", run), [Hook("align.engine.local:LocalEngine.step", 4)])
    assert killed.code == -9, killed.said
    path = run / "collect" / "key.json"
    key = json.loads(path.read_text())
    del key["questions"]
    path.write_text(json.dumps(key))
    kept = {p: p.read_bytes() for p in run.rglob("*.jsonl")}
    refused = shared().run(words(base, "dpo", run))
    assert refused.code == 2
    assert "was collected with other questions" in refused.said
    assert {p: p.read_bytes() for p in run.rglob("*.jsonl")} == kept


@pytest.mark.slow
def test_the_recipe_in_small(tmp_path):
    """The real model and the real tool: SmolLM2-135M writes programs for sums, and learns a step from them."""
    from align.models.pretrained import smollm2

    tokenizer, model, run = smollm2().tokenizer(), smollm2().model(), tmp_path / "run"
    small = [
        "collect.num_problems=4", "collect.samples_per_problem=4", "collect.num_heldout=2", "trainer.max_steps=1",
        "collect.max_pairs_per_problem=1", "collect.max_labelled_per_problem=1", "trainer.batch_size=2",
        "collect.max_new_tokens=48", "trainer.precision=float32", "data.heldout_fraction=0.3", f"run.dir={run}",
        "log.tensorboard=false", f"reference.cache_dir={tmp_path / 'cache'}",
    ]  # fmt: skip
    done = shared().run(["train", "recipe=multiturn_dpo", *small])
    assert done.code == 0, done.said
    report = check_account(run)
    assert report["trajectories"] == 16
    assert report["right"] > 0
    assert report["wrong"] > 0
    assert report["called_tool"] > 8
    assert report["pairs"] >= 2
    assert report["re_encoded_differently"] < report["trajectories"]
    check_summary(run, 2)
    for line in ("2 held-out problems solved", "change, 95 % paired bootstrap"):
        assert line in done.said
        assert line in (run / "final" / "README.md").read_text()
    assert [row["step"] for row in rows(run / "metrics.jsonl")] == [1]
    drawn, printed = rows(run / "collect" / "trajectories-000.jsonl"), 0
    for row in drawn:
        for role, a, b, target in row["spans"]:
            text = tokenizer.decode(row["token_ids"][a:b])
            if role == "tool":
                printed += 1
                assert text.startswith("```output\n"), text
                assert not target
            # a policy that begins to make up an output is stopped at its fence
            assert not target or "```output\n" not in text, text
    assert printed > 3
    for row in drawn[:3]:
        with torch.no_grad():
            logps = model(torch.tensor([row["token_ids"]])).logits[0].log_softmax(-1)
        at = [n for _, a, b, target in row["spans"] if target for n in range(a, b)]
        expected = torch.stack([logps[n - 1, row["token_ids"][n]] for n in at])
        # float32 with a cache and padding against one pass
        torch.testing.assert_close(torch.tensor(row["logps"]), expected, atol=2e-3, rtol=0)


def test_what_a_tool_printed_is_no_target(straight):
    """The parrot's digit between two emissions, token for token."""
    from align.models.pretrained import byte_tokenizer

    tokenizer, seen = byte_tokenizer(), 0
    for row in rows(straight("dpo") / "collect" / "labelled.jsonl"):
        for role, a, b, target in row["spans"]:
            if role == "tool":
                seen += 1
                assert not target
                assert tokenizer.decode(row["token_ids"][a:b]).startswith("```output\n")
    assert seen > 5
