"""`align generate`: what a line says, that a kill changes nothing, and that its output is read by what comes next."""

from __future__ import annotations

import json
import signal
from pathlib import Path

import numpy as np
import pytest
import torch

from align.cli import main
from align.data.chat import prompt_ids
from align.data.prompts import load_prompts
from align.data.scored import read_scored
from align.evaluate.generate import CHUNK_PROMPTS, summarise
from align.models.pretrained import byte_tokenizer, tiny
from tests.conftest import mostly_slow
from tests.data.helpers import settings
from tests.killer import Hook, shared
from tests.trainers.toy_rewards import plain, wanted

REWARDS = "tests.trainers.toy_rewards."
PROMPTS = 150  # three parts: 64, 64 and 22 prompts
MODEL = ["model=tiny", "model.hidden_size=16", "model.num_layers=1", "trainer.precision=float32"]


def write(path: Path, records: list[dict]) -> Path:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def many(directory: Path) -> Path:
    return write(directory / "many.jsonl", [{"prompt": f"Number {i}", "answer": i} for i in range(PROMPTS)])


def words(prompts: Path | str, out: Path, *more: str) -> list[str]:
    return ["generate", *MODEL, f"data.train={prompts}", f"out={out}", "sampling.max_new_tokens=6", *more]


def lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def generated(directory: Path, prompts: Path | str, *more: str) -> list[dict]:
    out = directory / "out.jsonl"
    assert main(words(prompts, out, *more)) == 0
    assert not out.with_name("out.jsonl.partial").exists()
    return lines(out)


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("generate")


@pytest.fixture(scope="module")
def whole(base) -> bytes:
    """What a command that nobody stopped writes."""
    assert main(words(many(base), base / "whole.jsonl", "n=2")) == 0
    return (base / "whole.jsonl").read_bytes()


def test_a_line_is_a_sample_with_its_prompt_tokens_and_columns(tmp_path):
    chat = [{"role": "user", "content": "Say hi"}]
    row = {"prompt": chat, "answer": "hi", "entry": {"metadata": [1]}, "completion": "hi", "label": True, "logps": 3}
    found = generated(tmp_path, write(tmp_path / "p.jsonl", [row, {"prompt": "2+2="}]), "n=3", "data.text=plain")
    assert [(line["source"][-1], line["sample"]) for line in found] == [(s, k) for s in "12" for k in range(3)]
    tokenizer = byte_tokenizer()
    first, last = found[0], found[-1]
    assert (first["prompt"], first["prompt_ids"]) == (chat, prompt_ids(tokenizer, chat))
    assert (last["prompt"], last["prompt_ids"]) == ("2+2=", prompt_ids(tokenizer, "2+2="))
    assert (first["answer"], first["entry"]) == ("hi", {"metadata": [1]})
    # columns of another answer do not come along, nor one with the name of a number of ours
    assert "label" not in first
    assert first["completion"] == tokenizer.decode(first["token_ids"], skip_special_tokens=True)
    assert not {"rewards", "score"} & first.keys()
    for line in found:
        assert len(line["logps"]) == len(line["token_ids"]) <= 6
        assert line["finished"] == (line["stop"] != "length")
    assert len({tuple(line["token_ids"]) for line in found}) == 6  # draws of their own


def test_logps_are_the_models_own(tmp_path):
    """A forward of the whole conversation by the network: log softmax at each token of the completion."""
    found = generated(tmp_path, write(tmp_path / "p.jsonl", [{"prompt": "Number 1"}, {"prompt": "Two"}]), "n=2")
    model = tiny(0, 16, 1).model().float().eval()
    for line in found:
        ids = torch.tensor([line["prompt_ids"] + line["token_ids"]])
        with torch.no_grad():
            scores = model(ids).logits[0].log_softmax(-1)
        start = len(line["prompt_ids"])
        expected = [scores[start + k - 1, token].item() for k, token in enumerate(line["token_ids"])]
        np.testing.assert_allclose(line["logps"], expected, atol=1e-5)  # float32 sums in another order


def test_greedy_is_the_likeliest_token_each_time(tmp_path):
    found = generated(tmp_path, write(tmp_path / "p.jsonl", [{"prompt": "Number 1"}]), "greedy=true")
    model = tiny(0, 16, 1).model().float().eval()
    (line,) = found
    ids = list(line["prompt_ids"])
    for token in line["token_ids"]:
        with torch.no_grad():
            assert token == int(model(torch.tensor([ids])).logits[0, -1].argmax())
        ids.append(token)


def test_every_row_is_a_prompt_and_the_seed_decides(tmp_path, whole):
    """Nothing is held out; another seed draws others; equal prompts at other places draw their own."""
    first = [json.loads(line) for line in whole.splitlines()]
    assert len(first) == 2 * PROMPTS
    other = generated(tmp_path, many(tmp_path), "n=2", "seed=1")
    assert [line["prompt"] for line in other] == [line["prompt"] for line in first]
    same = sum(a["token_ids"] == b["token_ids"] for a, b in zip(first, other, strict=True))
    assert same < 3
    again = write(tmp_path / "again.jsonl", [{"prompt": "Number 1"}] * (CHUNK_PROMPTS + 1))
    drawn = [line["token_ids"] for line in generated(tmp_path, again, "n=1")]
    assert drawn[0] != drawn[CHUNK_PROMPTS]  # the first of two parts


KILLS = [
    Hook("align.rollout.hf:HFRollout.generate", 2),
    Hook("align.rollout.hf:HFRollout.generate", 3, when="after"),
    Hook("os:replace", 1),
    Hook("os:replace", 3),
    Hook("os:replace", 5),  # the file itself
    Hook("os:replace", 5, when="after"),
    Hook("align.evaluate.generate:_Work.summary", 1),
]


@pytest.mark.parametrize("hook", mostly_slow(KILLS, 1, 4), ids=str)
def test_a_killed_command_goes_on_and_writes_the_same_bytes(base, tmp_path, whole, hook):
    out = tmp_path / "out.jsonl"
    command = words(base / "many.jsonl", out, "n=2")
    ended = shared().run(command, [hook])
    assert ended.code == -signal.SIGKILL, ended.said
    before = len(list(out.with_name("out.jsonl.partial").glob("0*.jsonl")))
    again = shared().run(command)
    assert again.code == 0, again.said
    assert ("going on" in again.said) == (before > 0)
    assert out.read_bytes() == whole
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out.jsonl"]


def test_a_signal_stops_between_batches_and_the_command_goes_on(base, tmp_path, whole):
    out = tmp_path / "out.jsonl"
    command = words(base / "many.jsonl", out, "n=2")
    ended = shared().run(command, [Hook("align.rollout.hf:HFRollout.generate", 2, signal.SIGTERM)])
    assert ended.code == 85, ended.said
    assert "the same command goes on" in ended.said
    assert not out.exists()
    assert len(list(out.with_name("out.jsonl.partial").glob("0*.jsonl"))) == 1
    assert shared().run(command).code == 0
    assert out.read_bytes() == whole


CHANGES = ["seed=5", "sampling.temperature=0.5", "model.seed=3", "rollout.batch_size=16", ""]


@pytest.mark.parametrize("change", mostly_slow(CHANGES, 0, 4))
def test_other_settings_weights_or_prompts_begin_anew(tmp_path, change):
    """Left behind by one command, found by another: what comes out is what the second alone writes."""
    out, prompts = tmp_path / "out.jsonl", many(tmp_path)
    shared().run(words(prompts, out, "n=2"), [Hook("align.rollout.hf:HFRollout.generate", 3)])
    assert len(list(out.with_name("out.jsonl.partial").glob("0*.jsonl"))) == 2
    if not change:  # a column of one row
        prompts.write_text(prompts.read_text().replace('"answer": 7}', '"answer": 8}'))
    ended = shared().run(words(prompts, out, "n=2", *filter(None, [change])))
    assert ended.code == 0
    assert "begun anew" in ended.said
    alone = tmp_path / "alone.jsonl"
    assert shared().run(words(prompts, alone, "n=2", *filter(None, [change]))).code == 0
    assert out.read_bytes() == alone.read_bytes()


def scored_by_two(directory: Path, *more: str) -> list[dict]:
    rows = [{"prompt": f"Number {i}", "answer": "z" if i == 3 else "e"} for i in range(8)]
    return generated(
        directory,
        write(directory / "p.jsonl", rows),
        "n=4",
        "sampling.max_new_tokens=12",
        f"reward.plain._target_={REWARDS}plain",
        "reward.plain.weight=2",
        f"reward.letter._target_={REWARDS}wanted",
        *more,
    )


def test_rewards_and_their_weighted_sum_stand_beside_each_sample(tmp_path, capsys):
    found = scored_by_two(tmp_path)
    for line in found:
        text, letter = plain(line["completion"]), wanted(line["completion"], line["answer"])
        assert line["rewards"] == {"plain": pytest.approx(text), "letter": letter}
        assert line["score"] == (None if letter is None else pytest.approx(2 * text + letter))
    assert {line["rewards"]["letter"] for line in found} >= {0.0, None}
    said = capsys.readouterr().out
    assert "generated 32 samples of 8 prompts" in said
    assert "reward letter: mean " in said
    assert "4 of 32 missing" in said


def test_the_summary_counts_by_prompt():
    """Two prompts of two samples: right ones 1 of 2 and 0 of 2, so pass@1 is (1/2 + 0) / 2 and pass@2 (1 + 0) / 2."""
    told = [
        {"sample": k, "finished": k == 0, "token_ids": [1] * (k + 1), "rewards": {"r": right}, "score": right}
        for right, k in ((1.0, 0), (0.0, 1), (0.0, 0), (0.0, 1))
    ]
    found = summarise(iter(told))
    assert (found.num_prompts, found.num_samples, found.num_finished, found.num_tokens) == (2, 4, 2, 6)
    assert found.rewards == {"reward r": [[1.0, 0.0], [0.0, 0.0]], "score": [[1.0, 0.0], [0.0, 0.0]]}
    first, second, _ = found.lines()
    assert first == "generated 4 samples of 2 prompts: 50.0% finished, 1.5 tokens each"
    assert second == (
        "reward r: mean +0.250 [+0.000, +0.500], pass@1 +0.250 [+0.000, +0.500], pass@2 +0.500 [+0.000, +1.000]"
    )


def test_what_is_generated_makes_pairs_that_train(tmp_path):
    """generate -> data pairs -> train; the tokens that are learnt are those that were drawn."""
    found = scored_by_two(tmp_path)
    scored, pairs, run = tmp_path / "out.jsonl", tmp_path / "pairs.jsonl", tmp_path / "run"
    groups = read_scored([str(scored)]).prompts
    assert [len(group.samples) for group in groups] == [4] * 8
    assert main(["data", "pairs", f"scored={scored}", f"out={pairs}", "pairs=max_min"]) == 0
    rows = lines(pairs)
    assert 4 <= len(rows) <= 7  # the prompt whose scores are missing makes none
    drawn = {tuple(line["prompt_ids"] + line["token_ids"]): line["score"] for line in found}
    for row in rows:
        chosen, rejected = (drawn[tuple(row[name]["token_ids"])] for name in ("chosen", "rejected"))
        assert chosen > rejected
        assert [span[-1] for span in row["chosen"]["spans"]] == [False, True]
    train = ["train", "recipe=dpo", *MODEL, f"data.train={pairs}", f"run.dir={run}", "trainer.max_steps=2"]
    assert main([*train, "trainer.batch_size=2", "trainer.num_samples=0", f"reference.cache_dir={tmp_path}"]) == 0
    assert json.loads((run / "summary.json").read_text())["step"] == 2


def test_what_is_generated_can_be_imitated_and_asked_again(tmp_path):
    """A line is a row with prompt and completion too, and a prompt with columns."""
    found = generated(tmp_path, write(tmp_path / "p.jsonl", [{"prompt": "a b", "answer": "c"}]), "n=2")
    config = settings(str(tmp_path / "out.jsonl"), max_tokens=400)
    again = load_prompts(config, byte_tokenizer(), 20)
    assert [row.token_ids for row in again.train] == [tuple(line["prompt_ids"]) for line in found]
    assert again.audit.train.repeated_prompts == 1
    assert again.train[0].fields["answer"] == "c"


def test_a_prompt_in_tokens_is_written_as_their_text(tmp_path):
    tokenizer = byte_tokenizer()
    ids = prompt_ids(tokenizer, [{"role": "user", "content": "Hi"}])
    row = {
        "token_ids": [*ids, 7, 8],
        "spans": [["user", 0, len(ids), False], ["assistant", len(ids), len(ids) + 2, True]],
    }
    (line,) = generated(tmp_path, write(tmp_path / "p.jsonl", [row]), "n=1")
    assert line["prompt_ids"] == ids
    assert line["prompt"] == tokenizer.decode(ids)
    assert len(line["token_ids"]) <= 6


@pytest.mark.parametrize(
    "change, said",
    [
        (["out="], "give out=FILE.jsonl"),
        (["out=x.json"], "out=x.json: must end in .jsonl"),
        (["greedy=yes"], "greedy=yes: must be true or false"),
        (["greedy=true", "n=4"], "greedy=true is n=1"),
        (["greedy=true", "sampling.temperature=1"], "greedy=true is n=1"),
        (["sampling.temperature=0"], "n=4: greedy completions of a prompt are all the same"),
        (["n=0"], "sampling.n=0: must be at least 1"),
        (["data.heldout=h.jsonl"], "data.heldout has no effect here"),
        (["data.train=nowhere.jsonl"], "nowhere.jsonl: no such file"),
        (["reward.r._target_=no.such"], "reward.r"),
    ],
)
def test_wrong_words_are_refused_in_one_line(tmp_path, capsys, change, said):
    prompts = write(tmp_path / "p.jsonl", [{"prompt": "a"}])
    given = words(prompts, tmp_path / "out.jsonl")
    kept = [w for w in given if w.partition("=")[0] not in {c.partition("=")[0] for c in change}]
    assert main([*kept, *change]) == 2
    err = capsys.readouterr().err
    assert said in err
    assert err.count("\n") == 1
