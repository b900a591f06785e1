"""Reward models through the offline loop: what final/ holds, how it is read again, killed runs, averaged runs."""

from __future__ import annotations

import json
import signal
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForSequenceClassification

from align.cli import main
from align.models.pretrained import tiny
from align.rewards.base import Conversation
from align.rewards.build import RewardHost, components
from align.rewards.network import load
from tests.killer import Hook, shared

WORDS = ["Cod.", "A cow", "Oak, elm and ash", "No", "It is four.", "Seven or eight", "Paris please", "Why not"]
STEP = "align.engine.local:LocalEngine.step"


def pairs(n: int, first: int = 0) -> list[dict]:
    """Pairs of which the longer answer is chosen; one in three is cut off."""
    out = []
    for i in range(first, first + n):
        word = WORDS[i % len(WORDS)]
        chosen, rejected = f"{word} and more of it, {i}", f"{word}"
        row = {"prompt": [{"role": "user", "content": f"question {i}?"}]}
        row |= {"chosen": [{"role": "assistant", "content": chosen}]}
        row |= {"rejected": [{"role": "assistant", "content": rejected}], "chosen_finished": i % 3 != 0}
        out.append(row | {"subset": "even" if i % 2 == 0 else "odd"})
    return out


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    base = tmp_path_factory.mktemp("rm")
    write(base / "train.jsonl", pairs(24))
    write(base / "heldout.jsonl", pairs(8, 100))
    return base


def write(path: Path, rows: list[dict]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def words(base: Path, run: Path, *more: str) -> list[str]:
    return ["train", "recipe=reward_model", "model=tiny", f"data.train={base}/train.jsonl", "lora.rank=0",
            f"data.heldout={base}/heldout.jsonl", f"run.dir={run}", "trainer.max_steps=6", "trainer.batch_size=4",
            "trainer.precision=float32", "trainer.save_every=2", "optimizer.lr=0.003", *more]  # fmt: skip


def trained(base: Path, run: Path, *more: str) -> Path:
    assert main(words(base, run, *more)) == 0
    return run / "final"


def scored(model: Path, data: str, out: Path) -> list[dict]:
    assert main(["score", f"model={model}", f"data.train={data}", f"out={out}"]) == 0
    return [json.loads(line) for line in out.read_text().splitlines()]


@pytest.fixture(scope="module")
def full(base) -> Path:
    return trained(base, base / "full")


@pytest.fixture(scope="module")
def adapted(base, small) -> Path:
    """The adapter and its head, as they are without merge=true."""
    return trained(base, base / "adapted", f"model={small}", "lora.rank=4")


@pytest.fixture(scope="module")
def small(base) -> Path:
    """A language model in Hugging Face format, to which an adapter can name its way."""
    found = tiny(0, 64, 2)
    found.model().save_pretrained(base / "small")
    found.tokenizer().save_pretrained(base / "small")
    return base / "small"


def ended(row: dict, side: str, tokenizer) -> list[int]:
    """Token ids up to the end of turn, written by hand."""
    text = "".join(f"<|im_start|>{m['role']}\n{m['content']}<|im_end|>\n" for m in [*row["prompt"], *row[side]])
    return tokenizer(text.removesuffix("\n"), add_special_tokens=False)["input_ids"]


def test_final_is_a_sequence_classification_model_with_the_same_scores(base, full, tmp_path):
    network = load(str(full))
    model = AutoModelForSequenceClassification.from_pretrained(full).eval()
    assert model.config.num_labels == 1
    rows = scored(full, f"{base}/heldout.jsonl", tmp_path / "s.jsonl")
    for row in rows:
        for side in ("chosen", "rejected"):  # cut off or not, they are read at their end of turn
            with torch.no_grad():
                wanted = float(model(torch.tensor([ended(row, side, network.tokenizer)])).logits[0, 0])
            assert row[f"score_{side}"] == pytest.approx(wanted, abs=1e-5)
    assert {k: rows[0][k] for k in pairs(1, 100)[0]} == pairs(1, 100)[0]
    summary = json.loads((full.parent / "summary.json").read_text())
    right = [row["score_chosen"] > row["score_rejected"] for row in rows]
    assert np.mean(right) == summary["metrics"]["accuracy/heldout"] == 1.0  # the longer one, learnt in six steps
    form = json.loads((full / "reward_model.json").read_text())
    values = [row[f"score_{side}"] for row in rows for side in ("chosen", "rejected")]
    assert (form["kind"], form["outputs"], form["count"]) == ("bradley_terry", ["reward"], 16)
    assert form["mean"] == pytest.approx([np.mean(values)], abs=1e-5)
    assert form["std"] == pytest.approx([np.std(values, ddof=1)], abs=1e-5)


def test_transformers_pools_one_token_early_where_padding_is_the_end(full):
    """Its own forward looks for the padding's id; ours knows where a sequence ends."""
    network = load(str(full))
    ids = ended(pairs(1)[0], "chosen", network.tokenizer)
    model = AutoModelForSequenceClassification.from_pretrained(full).eval()
    with torch.no_grad():
        ours = float(model(torch.tensor([ids])).logits[0, 0])
        model.config.pad_token_id = network.tokenizer.eos_token_id
        theirs = float(model(torch.tensor([ids])).logits[0, 0])
        early = float(model.score(model.model(torch.tensor([ids])).last_hidden_state)[0, -2, 0])
    assert theirs == pytest.approx(early, abs=1e-6)
    assert abs(theirs - ours) > 1e-3
    network.tokenizer.pad_token = network.tokenizer.eos_token
    row = network.row(pairs(1)[0]["prompt"], pairs(1)[0]["chosen"])
    assert network.scores([[row]], 100)[0][0][0, 0] == pytest.approx(ours, abs=1e-5)


@pytest.mark.parametrize("pad", [None, "<|im_end|>"])
def test_no_padding_is_written_that_ends_a_turn(base, tmp_path, pad):
    """With eos in the place of a padding that the tokenizer lacks, transformers would read another token than align."""
    found = tiny(0, 64, 2)
    tokenizer = found.tokenizer()
    tokenizer.pad_token = pad
    found.model().save_pretrained(tmp_path / "small")
    tokenizer.save_pretrained(tmp_path / "small")
    final = trained(base, tmp_path / "run", "model=hub", f"model.path={tmp_path / 'small'}")
    model = AutoModelForSequenceClassification.from_pretrained(final).eval()
    assert model.config.pad_token_id is None
    for row in scored(final, f"{base}/heldout.jsonl", tmp_path / "scores.jsonl"):
        ids = torch.tensor([ended(row, "chosen", tokenizer)])
        with torch.no_grad():
            assert row["score_chosen"] == pytest.approx(float(model(ids).logits[0, 0]), abs=1e-5)
    with pytest.raises(ValueError, match="no padding token"):
        model(ids.repeat(2, 1))


def test_an_adapter_with_its_head_merged_and_not_scores_the_same(base, adapted, small, tmp_path):
    assert {"adapter_model.safetensors", "score.safetensors", "reward_model.json"} <= set(
        path.name for path in adapted.iterdir()
    )
    merged = trained(base, tmp_path / "merged", f"model={small}", "lora.rank=4", "merge=true")
    one, other = (
        scored(model, f"{base}/heldout.jsonl", tmp_path / f"{k}.jsonl") for k, model in enumerate((adapted, merged))
    )
    for a, b in zip(one, other, strict=True):
        assert a["score_chosen"] == pytest.approx(b["score_chosen"], abs=1e-5)
    assert len({row["score_chosen"] for row in one}) == len(one)


@pytest.mark.parametrize("more", [("objective=general_preference", "objective.gated=true"),
                                  ("objective=pal", "objective.num_users=2")], ids=lambda v: v[0])  # fmt: skip
def test_heads_of_several_layers_beside_an_adapter_are_read_again(base, small, tmp_path, more):
    data = write(tmp_path / "t.jsonl", RATERS)
    runs = []
    for merge in ("true", "false"):
        final = trained(
            base, tmp_path / merge, f"model={small}", "lora.rank=4", f"merge={merge}", *more,
            f"data.train={data}", f"data.heldout={data}",
        )  # fmt: skip
        runs.append([row["score_chosen"] for row in scored(final, data, tmp_path / f"{merge}.jsonl")])
    np.testing.assert_allclose(*runs, atol=1e-4)
    assert len(set(runs[0])) == len(runs[0])


def test_in_the_loop_and_in_a_file_a_model_gives_the_same_score(base, full, adapted, tmp_path):
    for model in (full, adapted):
        rows = scored(model, f"{base}/heldout.jsonl", tmp_path / "s.jsonl")
        node = {"r": {"_target_": "align.rewards.model.RewardModel", "path": str(model), "revision": None,
                      "dtype": "float32", "max_tokens": 500}}  # fmt: skip
        asked = [Conversation(r["prompt"][0]["content"], r["chosen"][0]["content"], False) for r in rows]
        rewards = components(node, RewardHost(micro_batch_tokens=200))
        np.testing.assert_allclose(rewards.score(asked)[:, 0], [r["score_chosen"] for r in rows], atol=1e-5)
        assert rewards.counts == {}


def test_a_forward_s_size_and_company_do_not_change_a_score(full):
    network = load(str(full))
    rows = [[network.row(r["prompt"], r[side]) for side in ("chosen", "rejected")] for r in pairs(6)]
    apart = [[network.scores([[row]], 10)[0][0][0, 0] for row in group] for group in rows]
    for budget in (60, 200, 10_000):
        found, gates = network.scores(rows, budget)
        assert gates is None
        np.testing.assert_allclose([f[:, 0] for f in found], apart, atol=1e-5)


def test_probing_trains_the_head_alone_and_the_next_run_begins_with_it(base, small, tmp_path):
    probed = trained(base, tmp_path / "probe", f"model={small}", "head.only=true")
    before, after = (load_file(path / "model.safetensors") for path in (small, probed))
    assert all(torch.equal(before[k], v) for k, v in after.items() if k != "score.weight")
    assert main(words(base, tmp_path / "next", f"head.path={probed}", "optimizer.lr=1e-12")) == 0
    begun = load_file(tmp_path / "next" / "final" / "model.safetensors")["score.weight"]
    torch.testing.assert_close(begun, after["score.weight"], rtol=0, atol=1e-9)


def test_shared_prefixes_and_padding_train_the_same_model(base, tmp_path):
    found = [
        load_file(
            trained(base, tmp_path / layout, f"trainer.layout={layout}", "trainer.max_steps=2") / "model.safetensors"
        )
        for layout in ("shared", "packed", "padded")
    ]
    for other in found[1:]:
        for name, value in found[0].items():
            torch.testing.assert_close(value, other[name], rtol=0, atol=2e-4)  # lr 0.003: Adam's first steps


@pytest.mark.parametrize("at", [1, 4, 6])
def test_a_killed_run_goes_on_bit_for_bit(base, full, tmp_path, at):
    run = tmp_path / "run"
    killed = shared().run(words(base, run), [Hook(STEP, at)])
    assert killed.code == -signal.SIGKILL, killed.said
    done = shared().run(words(base, run))
    assert done.code == 0, done.said
    one, other = (load_file(path / "model.safetensors") for path in (full, run / "final"))
    assert all(torch.equal(value, other[name]) for name, value in one.items())


RANKED = [{"prompt": r["prompt"], "ranked": [r["chosen"], r["rejected"], [{"role": "assistant", "content": "?"}]]}
          for r in pairs(8)]  # fmt: skip
RATED = [{"prompt": r["prompt"], "completion": r["chosen"], "numbers": {"length": i / 8, "tone": i % 2}}
         for i, r in enumerate(pairs(8))]  # fmt: skip
SAFE = [r | {"numbers": {"chosen_safe": 1, "rejected_safe": i % 2}} for i, r in enumerate(pairs(8))]
RATERS = [r | {"numbers": {"user": i % 2}} for i, r in enumerate(pairs(8))]
KINDS = {
    "ranked_list": (["objective=ranked_list"], RANKED, {"score_ranked"}),
    "ranked as pairs": ([], RANKED, {"score_ranked"}),
    "pairs as lists": (["objective=ranked_list"], pairs(8), {"score_chosen", "score_rejected"}),
    "attributes": (["objective=attributes", "objective.names=[length,tone]"], RATED, {"score", "scores"}),
    "cost": (["objective=cost"], SAFE, {"score_chosen", "score_rejected", "cost_chosen", "cost_rejected"}),
    "gpm": (["objective=general_preference", "objective.gated=true"], pairs(8), {"score_chosen", "score_rejected"}),
    "pal": (["objective=pal", "objective.num_users=2"], RATERS, {"score_chosen", "score_rejected"}),
}


@pytest.mark.parametrize("name", KINDS)
def test_every_kind_trains_and_scores(base, tmp_path, name):
    more, rows, added = KINDS[name]
    data = write(tmp_path / "data.jsonl", rows)
    run = tmp_path / "run"
    assert main([*words(base, run, *more), f"data.train={data}", f"data.heldout={data}"]) == 0
    told = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert told[-1]["loss/heldout"] < json.loads((run / "before.json").read_text())["loss/heldout"]
    found = scored(run / "final", data, tmp_path / "s.jsonl")
    assert {*found[0]} - {*rows[0]} == added
    numbers = np.array([row[key] for row in found for key in added - {"scores", "score_ranked"}], dtype=float)
    assert np.isfinite(numbers).all()
    if name == "gpm":
        assert all(row["score_chosen"] == pytest.approx(-row["score_rejected"]) for row in found)
        logits = [row["score_chosen"] - row["score_rejected"] for row in found]
        probability = 1 / (1 + np.exp(-np.array(logits)))
        assert np.mean(probability) == pytest.approx(told[-1]["probability/heldout"], abs=1e-5)
    if name == "cost":
        assert all(row["score_chosen"] == -row["cost_chosen"] for row in found)


def test_evaluate_pairs_scores_and_reports(base, full, tmp_path):
    out = tmp_path / "report"
    assert main(["evaluate", "pairs", f"model={full}", f"data.train={base}/heldout.jsonl", f"out={out}"]) == 0
    results = json.loads((out / "results.json").read_text())
    assert results["count"] == 8
    assert {name: part["accuracy"]["mean"] for name, part in results["by_subset"].items()} == {"even": 1, "odd": 1}
    data = tmp_path / "s.jsonl"
    scored(full, f"{base}/heldout.jsonl", data)
    again = tmp_path / "again"
    assert main(["evaluate", "pairs", f"data.train={data}", f"out={again}"]) == 0
    assert json.loads((again / "results.json").read_text())["by_subset"] == results["by_subset"]


def test_texts_are_written_as_the_model_was_trained_to_read_them(full, base, tmp_path):
    """RewardBench's files hold texts: a message to a model of chats, and what they are to a model of texts."""
    row = pairs(1)[0]
    text = {"prompt": row["prompt"][0]["content"], **{k: row[k][0]["content"] for k in ("chosen", "rejected")}}
    data = write(tmp_path / "both.jsonl", [row, text])
    one, other = scored(full, data, tmp_path / "s.jsonl")
    assert one["score_chosen"] == pytest.approx(other["score_chosen"], abs=1e-5)
    texts = write(tmp_path / "texts.jsonl", [text, text | {"prompt": "another"}])
    plain = trained(base, tmp_path / "plain", f"data.train={texts}", f"data.heldout={texts}", "data.text=plain")
    assert json.loads((plain / "reward_model.json").read_text())["prompts"] == "text"
    one, other = scored(plain, data, tmp_path / "p.jsonl")
    assert abs(one["score_chosen"] - other["score_chosen"]) > 1e-3
    network = load(str(plain))
    ids = network.tokenizer(text["prompt"] + text["chosen"]).input_ids + [network.tokenizer.eos_token_id]
    model = AutoModelForSequenceClassification.from_pretrained(plain).eval()
    with torch.no_grad():
        assert other["score_chosen"] == pytest.approx(float(model(torch.tensor([ids])).logits[0, 0]), abs=1e-5)


def test_rewardbench_2_rows_get_a_score_for_each_answer(full, tmp_path):
    row = {"id": "a", "prompt": "why?", "chosen": ["Cod. and more of it, 3"], "rejected": ["No", "Cod."],
           "num_correct": 1, "subset": "Math"}  # fmt: skip
    (found,) = scored(full, write(tmp_path / "rb2.jsonl", [row]), tmp_path / "s.jsonl")
    assert len(found["scores"]) == 3
    assert found["scores"][0] > max(found["scores"][1:])


def test_rows_that_cannot_be_scored_are_named_or_counted(full, tmp_path, capsys):
    data = write(tmp_path / "bad.jsonl", [pairs(1)[0], {"prompt": "a", "chosen": "b"}, pairs(2)[1]])
    out = tmp_path / "s.jsonl"
    assert main(["score", f"model={full}", f"data.train={data}", f"out={out}"]) == 2
    assert "bad.jsonl:2: the field 'rejected' is missing" in capsys.readouterr().err
    assert not out.exists()
    assert main(["score", f"model={full}", f"data.train={data}", f"out={out}", "data.on_bad_row=drop"]) == 0
    assert "3 rows, 1 without scores (missing_field)" in capsys.readouterr().out
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    assert [row.get("score", 1) for row in rows] == [1, None, 1]
    report = tmp_path / "report"
    words = ["evaluate", "pairs", f"model={full}", f"data.train={data}", f"out={report}", "data.on_bad_row=drop"]
    assert main(words) == 0
    assert json.loads((report / "results.json").read_text())["without_scores"] == {"missing_field": 1}


REFUSED = [
    (["recipe=reward_model", "trainer.num_samples=4"], "trainer.num_samples=4 has no effect: a reward model writes no"),
    (["recipe=dpo", "head.dropout=0.1"], "head has no effect: objective=dpo trains no reward model"),
    (["recipe=dpo", "head.only=true"], "head has no effect"),
    (["recipe=reward_model", "head.only=true"], "lora.rank=16 has no effect with head.only=true"),
    (["recipe=reward_model", "head.path=nowhere"], "nowhere: holds no head of a reward model"),
    (["recipe=warm", "trainer.only=4"], "trainer.only=4: there are trainer.members=3"),
    (["recipe=warm", "trainer.only=0", "trainer.probe_steps=0"], "trainer.only=0 trains the head"),
    (["recipe=warm", "head.only=true"], "head.only has no effect with trainer=warm"),
    (["recipe=warm", "objective=dpo"], "trainer=warm averages reward models only"),
    (["recipe=online_dpo", "objective=bradley_terry", "pairs=max_min"], "bradley_terry"),
]


@pytest.mark.parametrize("settings, said", REFUSED, ids=lambda v: " ".join(v) if isinstance(v, list) else None)
def test_settings_without_effect_are_refused(tmp_path, capsys, settings, said):
    data = write(tmp_path / "t.jsonl", pairs(4))
    assert main(["train", *settings, "model=tiny", f"data.train={data}", f"run.dir={tmp_path}/run"]) == 2
    err = capsys.readouterr().err
    assert said in err
    assert "Traceback" not in err


@pytest.mark.parametrize("objective, said", [
    ("ranked_list", "the row is single, the objective needs prompt and ranked"),
    ("bradley_terry", "the row is single, the objective needs chosen and rejected"),
])  # fmt: skip
def test_data_of_another_kind_are_refused(base, tmp_path, capsys, objective, said):
    data = write(tmp_path / "t.jsonl", RATED)
    assert main([*words(base, tmp_path / "run", f"objective={objective}"), f"data.train={data}"]) == 2
    assert said in capsys.readouterr().err
