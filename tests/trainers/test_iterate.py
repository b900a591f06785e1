"""trainer=iterate: what each round draws, learns from and compares with; killed anywhere it comes out the same."""

from __future__ import annotations

import json
import shutil
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from align import checkpoint
from align.config.values import check_enough
from align.data.scored import read_scored
from align.evaluate.passk import pass_at_k
from align.trainers.iterate.samples import slices
from align.trainers.iterate.select import best_of_n, labelled
from tests.conftest import mostly_slow
from tests.killer import Hook, evidence, leftovers, rows_file, shared
from tests.trainers.toy_rewards import plain

pytestmark = pytest.mark.xdist_group("iterate")  # all are compared with the same undisturbed runs

ITERATE = "align.trainers.iterate."
ROUNDS = ITERATE + "run:Rounds."
KEPT = "align.trainers.row_cache:"
BIND = "align.trainers.steploop:StepLoop.bind"
ENGINE = "align.engine.local:LocalEngine."
HF = "align.rollout.hf:HFRollout."
PROMPTS, HELDOUT, CHUNKS = 14, 4, 2  # 7 prompts a round in chunks of 4 and 3


def words(base: Path, run: Path, *more: str) -> list[str]:
    """Two rounds of DPO on a random network over bytes; the last word for a key wins, key= unsets."""
    train, heldout = base / "prompts.jsonl", base / "heldout.jsonl"
    if not train.exists():
        for path, name, count in ((train, "Number", PROMPTS), (heldout, "Held", HELDOUT)):
            path.write_text("".join(json.dumps({"prompt": f"{name} {i}"}) + "\n" for i in range(count)))
    settings = {
        "trainer": "iterate", "objective": "dpo", "objective.beta": 0.1, "model": "tiny", "model.hidden_size": 16,
        "model.num_layers": 1, "data.train": train, "data.heldout": heldout, "data.text": "plain", "seed": 0,
        "lora.rank": 4, "optimizer.lr": 1e-2, "sampling.n": 4, "sampling.max_new_tokens": 10, "trainer.rounds": 2,
        "trainer.chunk_prompts": 4, "trainer.batch_size": 2, "trainer.epochs": 2, "trainer.save_every": 2,
        "trainer.precision": "float32", "log.tensorboard": "false", "reference.cache_dir": base / "cache",
        "reward.plain._target_": "tests.trainers.toy_rewards.plain", "run.dir": run,
    } | dict(word.split("=", 1) for word in more)  # fmt: skip
    return ["train", *(f"{key}={value}" for key, value in settings.items() if value != "")]


# What each kind of run adds.
KINDS = {
    "pairs": ["trainer.greedy=true", "pairs=wpo_v2"],
    "best_of_n": ["trainer.select=best_of_n", "objective=nll", "objective.beta=", "lora.rank=0"],
    "labelled": ["trainer.select=labelled", "objective=kto", "trainer.min_score=0.5", "trainer.heldout_n=2"],
    "sides": ["trainer.select=labelled", "objective=kto", "lora.rank=0", "trainer.reference=fixed"],
    "collect": [
        "trainer.select=collect", "collect=chain_sum", "data=collected", "data.train=", "data.heldout=",
        "reward.plain._target_=", "sampling.n=", "sampling.max_new_tokens=", "optimizer.lr=3e-2",
        "collect.task_settings={min_terms: 2, max_terms: 2, min_digits: 1, max_digits: 1}", "collect.num_examples=0",
        "collect.num_problems=8", "collect.chunk_problems=2", "collect.num_heldout=3",
        "collect.samples_per_problem=64", "collect.max_new_tokens=24", "collect.temperature=1.0",
        "collect.stop=['0','1','2','3','4','5','6','7','8','9']", "collect.max_pairs_per_problem=3",
        "collect.tool._target_=tests.killer.Parrot", "rollout.batch_size=256",
        "collect.problem_seed=2",  # both rounds have problems whose answer is one digit, odd and not 1
    ],
}  # fmt: skip


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("iterate")


@pytest.fixture(scope="module")
def straight(base):
    """A function: kind -> the directory of the run that nothing happens to."""

    def directory(kind: str) -> Path:
        run = base / kind
        if not run.exists():
            done = shared().run(words(base, run, *KINDS[kind]))
            assert done.code == 0, done.said
        return run

    return directory


def rows(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def samples(run: Path, number: int) -> list[dict[str, Any]]:
    return [row for path in sorted((run / f"rounds/{number:02d}").glob("samples-*.jsonl")) for row in rows(path)]


def everything(run: Path) -> dict[str, Any]:
    """What must be bit-equal, of the run and of each round."""
    out = evidence(run)
    for directory in sorted((run / "rounds").iterdir()):
        if (directory / "train").exists():
            out[f"{directory.name}/train"] = evidence(directory / "train")
        for path in sorted([*directory.glob("*.jsonl"), *directory.glob("heldout/*"), *directory.glob("collect/*")]):
            out[path.relative_to(run).as_posix()] = path.read_bytes()
    return out


# ---------------------------------------------------------------------- a whole run


@pytest.mark.parametrize("kind", [k for k in KINDS if k != "collect"])
def test_two_rounds(straight, kind):
    run = straight(kind)
    told = rows(run / "metrics.jsonl")
    assert [row["round"] for row in told] == [row["step"] for row in told] == [1, 2]
    asked = []
    for number, row in enumerate(told, 1):
        lines = samples(run, number)
        asked.append([line["prompt"] for line in lines])
        drawn = [c for line in lines for c in line["completions"] if not c.get("greedy")]
        assert len(drawn) == 4 * len(lines)
        for c in drawn:  # rewards are those of the texts, told by the function itself
            assert c["score"] == c["rewards"]["plain"] == plain(c["text"])
        assert row["reward/plain"] == pytest.approx(np.mean([c["score"] for c in drawn]))
        assert row["data/prompts"] == row["data/used"] + sum(v for k, v in row.items() if k.startswith("data/dropped_"))
        train = run / f"rounds/{number:02d}/train"
        assert row["data/rows"] == json.loads((train / "audit.json").read_text())["rows_kept"]
        assert row["train/steps"] == rows(train / "metrics.jsonl")[-1]["step"] == -(-2 * row["data/rows"] // 2)
        answers = rows(run / f"rounds/{number:02d}/heldout/answers.jsonl")
        greedy = [plain(a["completions"][-1]["text"]) for a in answers]
        assert row["heldout/plain_greedy"] == pytest.approx(np.mean(greedy))
        assert row["heldout/plain_greedy_low"] <= row["heldout/plain_greedy"] <= row["heldout/plain_greedy_high"]
    # consecutive slices in the order of the file, none in two rounds
    assert asked == [[f"Number {i}" for i in range(7)], [f"Number {i}" for i in range(7, 14)]]
    assert {p.name for p in (run / "rounds/01").glob("samples-*")} == {"samples-000.jsonl", "samples-001.jsonl"}
    # the last round's model is the run's, and its card tells the whole run
    last = run / "rounds/02/train/final"
    assert (run / "final/model.safetensors").read_bytes() == (last / "model.safetensors").read_bytes()
    card = (run / "final/README.md").read_text()
    assert f"full weights after {sum(row['train/steps'] for row in told)} optimiser steps" in card
    assert "plain: reward of 4 greedy answers" in card
    assert leftovers(run) == []


def test_draws_of_the_rounds_and_chunks_differ(straight):
    run = straight("pairs")
    texts = [
        [c["text"] for c in line["completions"] if not c.get("greedy")] for n in (1, 2) for line in samples(run, n)
    ]
    assert len({tuple(group) for group in texts}) == PROMPTS


def test_each_round_draws_from_what_the_last_one_left(straight):
    """The greedy completions, by a plain loop over a transformers model read from the last round's final/."""
    from transformers import AutoModelForCausalLM

    run = straight("pairs")
    for number, path in ((2, "samples-000.jsonl"), (3, "heldout/answers.jsonl")):
        network = AutoModelForCausalLM.from_pretrained(run / f"rounds/{number - 1:02d}/train/final").float().eval()
        where = run / f"rounds/{number:02d}" if path.startswith("samples") else run / f"rounds/{number - 1:02d}"
        for line in rows(where / path):
            twin = line["completions"][-1]
            assert twin["greedy"]
            ids, start = twin["token_ids"], twin["spans"][-1][1]
            with torch.no_grad():
                likeliest = network(torch.tensor([ids])).logits[0].argmax(-1).tolist()
            assert likeliest[start - 1 : -1] == ids[start:]


def test_pairs_are_the_rules(straight):
    """WPO's second rule over five candidates, the greedy completion among them: the best against the worst."""
    run = straight("pairs")
    for number in (1, 2):
        lines = {line["prompt"]: line for line in samples(run, number)}
        data = rows(run / f"rounds/{number:02d}/data.jsonl")
        assert len(data) >= 6
        for row in data:
            group = lines[row["prompt"]]["completions"]
            assert [c.get("greedy", False) for c in group] == [False] * 4 + [True]
            scores = [c["score"] for c in group]
            assert (row["chosen_score"], row["rejected_score"]) == (max(scores), min(scores))
            ids = [c["token_ids"] for c in group]
            assert row["chosen"]["token_ids"] == min(
                (i for i, s in zip(ids, scores, strict=True) if s == max(scores)), key=len
            )
            assert row["rejected"]["token_ids"] in ids
            assert row["origin"] == "on_policy"


def test_best_of_n_imitates_the_first_best(straight):
    run = straight("best_of_n")
    lines, data = samples(run, 1), rows(run / "rounds/01/data.jsonl")
    assert len(data) == len(lines) == 7
    for line, row in zip(lines, data, strict=True):
        scores = [c["score"] for c in line["completions"]]
        assert row["token_ids"] == line["completions"][scores.index(max(scores))]["token_ids"]
        start = row["spans"][0][2]
        assert row["spans"] == [["prompt", 0, start, False], ["assistant", start, len(row["token_ids"]), True]]


def test_labels_are_the_limits_and_pass_at_k_the_files(straight):
    run = straight("labelled")
    for number in (1, 2):
        drawn = [c for line in samples(run, number) for c in line["completions"] if c["text"].strip()]
        data = rows(run / f"rounds/{number:02d}/data.jsonl")
        assert [row["label"] for row in data] == [c["score"] >= 0.5 for c in drawn]
        assert [row["token_ids"] for row in data] == [c["token_ids"] for c in drawn]
        assert len({row["label"] for row in data}) == 2
    row = rows(run / "metrics.jsonl")[-1]
    answers = rows(run / "rounds/02/heldout/answers.jsonl")
    right = [[c["rewards"]["plain"] >= 1 for c in a["completions"][:-1]] for a in answers]
    assert [len(group) for group in right] == [2] * HELDOUT
    for k in (1, 2):
        assert row[f"heldout/pass@{k}"] == pytest.approx(np.mean([pass_at_k(sum(g), 2, k) for g in right]))


def test_sides_of_pairs_as_labelled_rows(straight):
    run = straight("sides")
    lines, data = samples(run, 2), rows(run / "rounds/02/data.jsonl")
    assert sum(row["label"] for row in data) == len(data) / 2
    scores = {tuple(c["token_ids"]): c["score"] for line in lines for c in line["completions"]}
    groups = {tuple(c["token_ids"]): [d["score"] for d in line["completions"]] for line in lines
              for c in line["completions"]}  # fmt: skip
    for row in data:
        ids = tuple(row["token_ids"])
        assert scores[ids] == (max if row["label"] else min)(groups[ids])


def test_collect(straight):
    run = straight("collect")
    told = rows(run / "metrics.jsonl")
    seen = []
    for number, row in enumerate(told, 1):
        directory = run / f"rounds/{number:02d}"
        drawn = [t for path in sorted((directory / "collect").glob("trajectories-*")) for t in rows(path)]
        seen.append({t["problem"] for t in drawn})
        assert len(drawn) == row["collect/trajectories"] == 4 * 64
        assert row["collect/accuracy"] == np.mean([t["label"] for t in drawn])
        assert row["data/rows"] == len(rows(directory / "collect/pairs.jsonl")) > 0
        solved = rows(directory / "problems-after.jsonl")
        assert row["heldout/solved"] == np.mean([t["reward"] for t in solved])
        assert any(role == "tool" for t in drawn for role, *_ in t["spans"])
        assert not {t["problem"] for t in solved} & seen[-1]
    assert len(seen[0]) == len(seen[1]) == 4
    assert not seen[0] & seen[1]
    assert not (run / "rounds/02/problems-before.jsonl").exists()  # it is the first round's after
    summary = json.loads((run / "summary.json").read_text())["problems"]
    assert summary["before"] == np.mean([t["reward"] for t in rows(run / "rounds/01/problems-before.jsonl")])
    assert summary["after"] == told[-1]["heldout/solved"]


def test_the_samples_are_files_of_scored_samples(straight):
    """align data pairs reads them: another rule can be tried on what a run drew."""
    run = straight("pairs")
    paths = [str(path) for path in sorted((run / "rounds/01").glob("samples-*.jsonl"))]
    found = read_scored(paths)
    assert [len(scored.samples) for scored in found.prompts] == [5] * 7
    assert {s.origin for scored in found.prompts for s in scored.samples} == {"on_policy"}


# ---------------------------------------------------------------------- what a round is compared with


def logps(model: Path | None, conversations: list[dict[str, Any]]) -> np.ndarray:
    """Summed log-probs of completions under a model of transformers, one forward each; None: the starting model."""
    from transformers import AutoModelForCausalLM

    from align.models.pretrained import tiny

    network = tiny(0, 16, 1).model() if model is None else AutoModelForCausalLM.from_pretrained(model)
    out = []
    for row in conversations:
        ids = torch.tensor([row["token_ids"]])
        with torch.no_grad():
            scores = network.float().eval()(ids).logits[0].log_softmax(-1)
        start = row["spans"][-1][1]
        out.append(sum(float(scores[k - 1, ids[0, k]]) for k in range(start, ids.shape[1])))
    return np.array(out)


def of_second_round(base: Path, run: Path, *more: str) -> tuple[dict[str, Any], list[np.ndarray], list[np.ndarray]]:
    """The first step of round 2, whose batch is all of its pairs; the log-probs of chosen and rejected under the
    starting model and under what round 1 left."""
    ended = shared().run(words(base, run, "trainer.batch_size=7", "trainer.epochs=1", *more))
    assert ended.code == 0, ended.said
    directory = run / "rounds/02"
    pairs = rows(directory / "data.jsonl")
    sides = [[pair[name] for pair in pairs] for name in ("chosen", "rejected")]
    of_start, of_first = ([logps(m, s) for s in sides] for m in (None, run / "rounds/01/train/final"))
    assert np.abs(of_start[0] - of_first[0]).max() > 0.01  # else nothing is told apart
    return rows(directory / "train/metrics.jsonl")[0], of_start, of_first


REFERENCES = [(reference, 4, mode) for reference in ("updated", "fixed") for mode in ("cached", "model", "adapter")]
REFERENCES += [
    (reference, 0, mode) for reference, mode in (("updated", "cached"), ("fixed", "model"), ("fixed", "adapter"))
]


@pytest.mark.parametrize("reference, rank, mode", mostly_slow(REFERENCES, 0, 5, 7))
def test_reference_is_what_the_setting_says(base, tmp_path, reference, rank, mode):
    more = [f"trainer.reference={reference}", f"lora.rank={rank}", f"reference.mode={mode}"]
    if mode == "adapter" and (rank == 0 or reference == "fixed"):
        refused = shared().run(words(base, tmp_path / "run", *more))
        assert refused.code == 2
        assert "reference.mode=adapter" in refused.said
        return
    row, of_start, of_first = of_second_round(base, tmp_path / "run", *more)
    # before its first update the policy of round 2 is what round 1 left
    assert row["logps/chosen"] == pytest.approx(of_first[0].mean(), abs=1e-3)
    theirs = of_start if reference == "fixed" else of_first
    for k, name in enumerate(("chosen", "rejected")):
        assert row[f"reward/{name}"] == pytest.approx(0.1 * (of_first[k] - theirs[k]).mean(), abs=2e-4)
    if reference == "updated":
        assert row["loss/total"] == pytest.approx(np.log(2), abs=1e-5)


def test_inpo_has_both_reference_models(base, tmp_path):
    """With policy = start at the first step h = tau/eta (d(start policy) - d(first model)), d chosen - rejected."""
    inpo = ["objective=inpo", "objective.beta=", "objective.eta=0.1", "objective.tau=0.025", "trainer.reference=fixed"]
    row, of_start, of_first = of_second_round(base, tmp_path / "run", *inpo)
    h = 0.25 * ((of_first[0] - of_first[1]) - (of_start[0] - of_start[1]))
    assert row["loss/total"] == pytest.approx(np.square(h - 5).mean(), abs=1e-3)
    assert np.abs(h).max() > 1e-3


def test_given_rows_are_learnt_from_beside_the_rounds_own(base, tmp_path):
    """WPO on both kinds of pairs: each round sees all given ones; weights are told by origin."""
    given = rows_file(base / "given.jsonl", 5, 3)
    marked = [{**row, "origin": "off_policy"} for row in rows(given)]
    given.write_text("".join(json.dumps(row) + "\n" for row in marked))
    run = tmp_path / "run"
    more = [f"trainer.offline_data={given}", "objective=wpo", "trainer.batch_size=10", "trainer.epochs=1"]
    done = shared().run(words(base, run, *more))
    assert done.code == 0, done.said
    for number, own in ((1, 7), (2, 7)):
        directory = run / f"rounds/{number:02d}"
        assert len(rows(directory / "data.jsonl")) == own
        audit = json.loads((directory / "train/audit.json").read_text())
        assert audit["train"]["origins"] == {"off_policy": 3, "on_policy": own}
        row = rows(directory / "train/metrics.jsonl")[0]
        assert {"wpo/weight_off_policy", "wpo/weight_on_policy"} <= row.keys()


# ---------------------------------------------------------------------- killed and stopped

# Where a run of pairs dies. One call of HFRollout.generate: held-out, chunk, chunk, (training) held-out, chunk, ...
DEATHS = {
    "in the first evaluation": Hook(HF + "_batch", 1),
    "before the first answers have their name": Hook(KEPT + "write_rows", 1),
    "in a chunk": Hook(HF + "generate", 3),
    "while scoring": Hook("align.trainers.experience:conversation", 40),
    "between chunks": Hook(KEPT + "write_rows", 2, when="after"),
    "before the data": Hook(KEPT + "write_rows", 4),
    "after the data": Hook(KEPT + "write_rows", 4, when="after"),
    "before the run is bound": Hook(BIND, 1),
    "before training has a directory": Hook("align.trainers.session:RunDirectory", 2),
    "in the pass over the reference": Hook("align.models.reference:ReferenceCache._write", 1, when="after"),
    "before the first step": Hook(ENGINE + "step", 1),
    "in training": Hook(ENGINE + "step", 5, when="after"),
    "in a save": Hook("align.engine.local:save_file", 4),
    "before the round's model": Hook("align.trainers.trained:write_final", 1),
    "after the round's model": Hook("align.trainers.trained:write_final", 1, when="after"),
    "before the round's evaluation": Hook(ROUNDS + "evaluate", 1),
    "after the round's evaluation": Hook(ROUNDS + "evaluate", 1, when="after"),
    "after the round's line": Hook(ROUNDS + "console", 1, when="after"),
    "between the rounds": Hook(ROUNDS + "step", 2),
    "while the second round draws": Hook(HF + "generate", 6),
    "in the second training": Hook(ENGINE + "step", 10, when="after"),
    "before final": Hook(ITERATE + "policies:Policies.write", 1),
    "while final is written": Hook(ITERATE + "policies:Policies._copy", 1, when="after"),
    "before the summary": Hook(ITERATE + "run:final_table", 1),
}
# Each of these leaves other files behind; the rest is for the slow run.
FAST = ("in a chunk", "after the round's model", "in the second training", "while final is written")
# other kinds where they are not like pairs
KILLED = [pytest.param("pairs", where, marks=[] if where in FAST else pytest.mark.slow) for where in DEATHS] + [
    pytest.param(kind, where, marks=pytest.mark.slow)
    for kind in ("best_of_n", "labelled", "sides")
    for where in ("while the second round draws", "in the second training")
]
OF_COLLECT = {
    "in the evaluation before": Hook("align.rollout.toolloop:ToolLoop._turn", 1),
    "between chunks": Hook("align.trainers.collect:Collector._chunk", 2),
    "in training": Hook(ENGINE + "step", 2, when="after"),
    "in the evaluation after": Hook("align.trainers.collect:Collector.after", 1),
    "while the second round collects": Hook("align.trainers.collect:Collector._chunk", 4),
    "in the second evaluation": Hook("align.trainers.collect:Collector.after", 2, when="after"),
    "before final": Hook(ITERATE + "policies:Policies.write", 1),
}


def killed_and_resumed(base: Path, run: Path, kind: str, hook: Hook, whole: dict[str, Any]) -> None:
    command = words(base, run, *KINDS[kind], f"reference.cache_dir={run.parent / 'cache'}")
    killed = shared().run(command, [hook])
    assert killed.code == -9, killed.said
    parts = {p: p.stat().st_mtime_ns for pattern in ("samples-*", "collect/trajectories-*", "heldout/answers.jsonl")
             for p in run.glob(f"rounds/*/{pattern}")}  # fmt: skip
    done = shared().run(command)
    assert done.code == 0, done.said
    assert everything(run) == whole
    assert leftovers(run) == []
    assert {p: p.stat().st_mtime_ns for p in parts} == parts  # nothing is drawn twice


@pytest.mark.parametrize("kind,where", KILLED)
def test_killed_anywhere(base, straight, tmp_path, kind, where):
    killed_and_resumed(base, tmp_path / "run", kind, DEATHS[where], everything(straight(kind)))


@pytest.mark.parametrize("where", mostly_slow(OF_COLLECT, 3))
def test_collecting_killed_anywhere(base, straight, tmp_path, where):
    killed_and_resumed(base, tmp_path / "run", "collect", OF_COLLECT[where], everything(straight("collect")))


STOPS = {
    "drawing": Hook(HF + "generate", 2, int(signal.SIGTERM)),
    "training": Hook(ENGINE + "step", 3, int(signal.SIGINT)),
    "second training": Hook(ENGINE + "step", 10, int(signal.SIGUSR1)),
    "after training": Hook("align.trainers.trained:write_final", 1, int(signal.SIGTERM)),
}


@pytest.mark.parametrize("where", mostly_slow(STOPS, 0, 2))
def test_stopped_and_goes_on(base, straight, tmp_path, where):
    hook = STOPS[where]
    command = words(base, tmp_path / "run", *KINDS["pairs"])
    stopped = shared().run(command, [hook])
    assert stopped.code == (130 if hook.number == signal.SIGINT else 85), stopped.said
    assert "received; everything is saved" in stopped.said
    done = shared().run(command)
    assert done.code == 0, done.said
    assert everything(tmp_path / "run") == everything(straight("pairs"))


def test_a_run_that_was_moved_goes_on(base, straight, tmp_path):
    command = words(base, tmp_path / "here", *KINDS["pairs"])
    assert shared().run(command, [Hook(ENGINE + "step", 10)]).code == -9
    shutil.move(tmp_path / "here", tmp_path / "there")
    done = shared().run(words(base, tmp_path / "there", *KINDS["pairs"]))
    assert done.code == 0, done.said
    assert "begun anew" not in done.said
    assert everything(tmp_path / "there") == everything(straight("pairs"))


def test_complete_run_does_nothing_again(base, straight):
    run = straight("pairs")
    before = everything(run)
    again = shared().run(words(base, run, *KINDS["pairs"]), [Hook(HF + "generate", 1)])
    assert again.code == 0, again.said
    assert "is complete at round 2" in again.said
    assert everything(run) == before


@pytest.mark.slow
def test_what_binds_and_what_does_not(base, straight, tmp_path):
    """Until the first training nobody is bound: another rule learns from the same completions, other settings of
    drawing begin anew; afterwards other settings are refused."""
    run = tmp_path / "run"
    killed = shared().run(words(base, run, "trainer.greedy=true", "pairs=max_min"), [Hook(BIND, 1)])
    assert killed.code == -9, killed.said
    chunks = {p: p.stat().st_mtime_ns for p in run.glob("rounds/01/samples-*")}
    assert len(chunks) == CHUNKS
    other = shared().run(words(base, run, *KINDS["pairs"]), [Hook(ENGINE + "step", 1)])
    assert other.code == -9, other.said
    assert "begun anew" not in other.said
    assert {p: p.stat().st_mtime_ns for p in chunks} == chunks
    refused = shared().run(words(base, run, *KINDS["pairs"], "optimizer.lr=1e-3"))
    assert refused.code == 2
    assert "optimizer.lr" in refused.said
    done = shared().run(words(base, run, *KINDS["pairs"]))
    assert done.code == 0, done.said
    assert everything(run) == everything(straight("pairs"))
    first = tmp_path / "first"
    hot = words(base, first, *KINDS["pairs"], "sampling.temperature=0.5")
    assert shared().run(hot, [Hook(KEPT + "write_rows", 3)]).code == -9
    anew = shared().run(words(base, first, *KINDS["pairs"]))
    assert anew.code == 0, anew.said
    assert "begun anew" in anew.said
    assert everything(first) == everything(straight("pairs"))


def test_a_damaged_model_of_a_round_is_refused(base, tmp_path):
    run = tmp_path / "run"
    command = words(base, run, *KINDS["pairs"])
    assert shared().run(command, [Hook(ROUNDS + "step", 2)]).code == -9
    weights = run / "rounds/01/train/final/model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"x")
    refused = shared().run(command)
    assert refused.code == 2
    assert "rounds/01/train/final is damaged (model.safetensors has other content" in refused.said


def test_rounds_on_other_problems_are_refused(base, tmp_path):
    """The checkpoint of a version that drew other problems from the same settings names these, not the questions."""
    run = tmp_path / "run"
    command = words(base, run, *KINDS["collect"])
    assert shared().run(command, [Hook(ROUNDS + "step", 2)]).code == -9
    state = checkpoint.load(checkpoint.steps(run / "checkpoints")[-1])
    settings = {"min_terms": 2, "max_terms": 2, "min_digits": 1, "max_digits": 1}
    old = json.dumps(["chain_sum", settings, 2])
    progress = {**state.progress, "data": {"collect": old}}
    checkpoint.save(run / "checkpoints", state.step, progress, lambda _: None, 2)
    refused = shared().run(command)
    assert refused.code == 2
    assert "collect has other rows than when" in refused.said


@pytest.mark.slow
def test_the_best_round_is_kept_and_no_further_one_done(base, tmp_path):
    """At this rate no round changes the policy, so that the second is no better than the first."""
    whole, run = tmp_path / "whole", tmp_path / "run"
    more = (
        "trainer.keep_best=heldout/total_greedy",
        "trainer.early_stopping_patience=1",
        "trainer.rounds=3",
        "optimizer.lr=1e-30",
    )
    assert shared().run(words(base, whole, *KINDS["pairs"], *more)).code == 0
    told = rows(whole / "metrics.jsonl")
    assert [row["round"] for row in told] == [1, 2]
    summary = json.loads((whole / "summary.json").read_text())
    assert summary["best"] == {
        "metric": "heldout/total_greedy", "value": told[0]["heldout/total_greedy"], "step": 1, "stopped_early": True,
        "path": "best/step-000001",
    }  # fmt: skip
    for name, number in (("best/step-000001", 1), ("final", 2)):
        left = whole / f"rounds/{number:02d}/train/final/model.safetensors"
        assert (whole / name / "model.safetensors").read_bytes() == left.read_bytes()
    command = words(base, run, *KINDS["pairs"], *more)
    killed = shared().run(command, [Hook("align.trainers.snapshots:BestModel.evaluated", 2)])
    assert killed.code == -9, killed.said
    assert shared().run(command).code == 0
    assert everything(run) == everything(whole)
    again = shared().run(command, [Hook(HF + "generate", 1)])
    assert "is complete at round 2; trainer.early_stopping_patience ended it" in again.said


# ---------------------------------------------------------------------- rounds that cannot be


def test_a_round_that_teaches_nothing_is_refused_before_training(base, tmp_path):
    run = tmp_path / "run"
    more = ["reward.plain._target_=tests.trainers.toy_rewards.constant"]
    refused = shared().run(words(base, run, *more))
    assert refused.code == 2
    for part in ("round 1", "0 rows from 0 of 7 prompts", "7 all_equal", "raise sampling.n"):
        assert part in refused.said
    assert not (run / "rounds/01/train").exists()
    assert not (run / "checkpoints").exists()


def test_prompts_without_rewards_are_counted(base, tmp_path):
    run = tmp_path / "run"
    done = shared().run(words(base, run, "reward.plain._target_=tests.trainers.toy_rewards.odd", "data.heldout=",
                              "data.heldout_fraction=0"))  # fmt: skip
    assert done.code == 0, done.said
    told = rows(run / "metrics.jsonl")
    assert [row["data/dropped_missing_reward"] for row in told] == [4, 3]  # 0 2 4 6 and 8 10 12
    assert [row["reward/missing"] for row in told] == [16, 12]
    assert [row["data/rows"] for row in told] == [3, 4]
    assert not any(key.startswith("heldout/") for row in told for key in row)


REFUSED = {
    "objective=policy_gradient objective.beta=": "learns from rollouts: use trainer=online",
    "trainer.select=best_of_n": "trainer.select=best_of_n gives no rows for objective=dpo: use trainer.select=pairs",
    "trainer.select=labelled": "trainer.select=labelled gives no rows",
    "objective=nll objective.beta=": "use trainer.select=best_of_n",
    "trainer.select=collect": "trainer.select=collect and collect=... belong together",
    "reward.plain._target_=": "needs a reward",
    "trainer.min_score=1": "trainer.min_score has no effect",
    "trainer.eval_every=5": "trainer.eval_every has no effect",
    "trainer.pass_component=plain": "needs trainer.heldout_n",
    "trainer.pass_component=other trainer.heldout_n=2": "trainer.pass_component=other: must be one of plain",
    "sampling.n=1": "use at least 2",
    "sampling.temperature=0": "use 1.0",
    "trainer.rounds=20": "need 20 prompts",
    "trainer.prompts_per_round=8": "need 16 prompts",
    "trainer.micro_batch_tokens=20": "use at least",
    "trainer.offline_data=nowhere.jsonl": "nowhere.jsonl",
    "reference.path=somewhere": "use trainer.reference=fixed",
    "objective=inpo objective.beta=": "objective=inpo needs trainer.reference=fixed",
    "objective=simpo objective.beta=2.0 trainer.reference=fixed": "trainer.reference=fixed has no effect",
    "trainer.rounds=0": "trainer.rounds=0: must be at least 1",
    "trainer.select=all": "trainer.select=all: must be one of",
    "pairs=max_min trainer.select=best_of_n objective=nll objective.beta=": "pairs has no effect",
    "advantage=rloo": "advantage has no effect",
}


@pytest.mark.parametrize("more", REFUSED)
def test_refused_before_anything_is_drawn(base, tmp_path, more):
    ended = shared().run(words(base, tmp_path / "run", *more.split()), [Hook(HF + "generate", 1)])
    assert ended.code == 2, ended.said
    assert REFUSED[more] in ended.said
    assert "Traceback" not in ended.said


def test_slices():
    assert [list(s) for s in slices(7, 3, None)] == [[0, 1], [2, 3], [4, 5, 6]]
    assert [list(s) for s in slices(7, 3, 2)] == [[0, 1], [2, 3], [4, 5]]
    with pytest.raises(ValueError, match="need 9 prompts, x has 7"):
        check_enough(7, 3, 3, "x")


def test_least_score_of_what_is_imitated():
    """Ties go to the first; a missing score is no score; what scores less than the limit is left out."""

    def line(*scores: float | None) -> dict[str, Any]:
        spans = [["prompt", 0, 1, False], ["assistant", 1, 2, True]]
        made = [{"text": f"a{k}", "token_ids": [0, k + 1], "spans": spans, "finished": True, "origin": "on_policy",
                 "score": s} for k, s in enumerate(scores)]  # fmt: skip
        return {"source": "f:1", "prompt": "p", "completions": made}

    lines = [line(0.5, 2.0, 2.0), line(None, 1.0), line(None, None), line(0.9, 0.2)]
    chosen = best_of_n(lines, 1.0)
    assert [row["token_ids"] for row in chosen.rows] == [[0, 2], [0, 2]]
    assert (chosen.used, chosen.dropped) == (2, {"missing_reward": 1, "below_min_score": 1})
    assert len(best_of_n(lines, None).rows) == 3
    desirable = labelled(lines, 1.0)
    assert [row["label"] for row in desirable.rows] == [False, True, True, True, False, False]
    assert desirable.dropped == {"missing_reward": 1}


def test_the_reward_rises_over_rounds(base, tmp_path):
    """Online DPO on the share of plain characters: a random network writes half of them, a trained one more."""
    run = tmp_path / "run"
    prompts = base / "more.jsonl"
    prompts.write_text("".join(json.dumps({"prompt": f"Number {i}"}) + "\n" for i in range(128)))
    done = shared().run(
        words(base, run, f"data.train={prompts}", "trainer.rounds=4", "sampling.n=8", "lora.rank=0",
              "trainer.batch_size=8", "trainer.chunk_prompts=32")
    )  # fmt: skip
    assert done.code == 0, done.said
    reward = [row["reward/plain"] for row in rows(run / "metrics.jsonl")]
    # the mean of 256 completions with a standard deviation of 0.16 each is known to 0.01
    assert reward[1] < reward[2] < reward[3]
    assert reward[3] > reward[0] + 0.1
