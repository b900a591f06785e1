"""Prompts with directions, and what is kept of their completions."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest

from align.cli import main
from align.data.prompts import PromptRow
from align.models.pretrained import byte_tokenizer
from align.trainers.directions import directed, direction_of, scorer
from tests.composers.parts import option
from tests.trainers.online_runs import REWARDS, words_of

TOKENIZER = byte_tokenizer()
TWO = ("topic", "brief")


def prompt(text="why?", system=None, **fields):
    messages = ({"role": "user", "content": text},)
    if system:
        messages = ({"role": "system", "content": system}, *messages)
    return PromptRow("rows:1", (1, 2), text, messages, fields)


def test_drawn_directions_are_told_and_kept():
    composer = option("directional", names=TWO, degrees=[-45, 0])
    rows = directed([prompt(f"{i}?") for i in range(50)], composer, TOKENIZER, seed=3)
    assert rows == directed([prompt(f"{i}?") for i in range(50)], composer, TOKENIZER, seed=3)
    assert rows != directed([prompt(f"{i}?") for i in range(50)], composer, TOKENIZER, seed=4)
    for row in rows:
        a, b = row.fields["direction"]
        assert math.hypot(a, b) == pytest.approx(1)
        assert a >= 0.7
        assert b <= 0
        told = f"Weights of this answer: topic {round(100 * a)}, brief {round(100 * b)}."
        assert row.messages[0] == {"role": "system", "content": told}
        assert told in TOKENIZER.decode(row.token_ids)
    (row,) = directed([prompt(system="Be kind.")], composer, TOKENIZER, seed=3)
    assert row.messages[0]["content"].startswith("Be kind.\nWeights of this answer: topic ")


def test_directions_of_the_data_stay():
    composer = option("directional", names=TWO)
    rows = [prompt(direction=[0.6, 0.8])]
    assert directed(rows, composer, TOKENIZER, 0) == rows
    for bad, message in (
        ({}, "a list of 2 numbers is needed in the column direction, found None"),
        ({"direction": [1.0]}, "a list of 2 numbers"),
        ({"direction": [1.0, 1.0]}, "has length 1.41421; it must be 1"),
    ):
        with pytest.raises(ValueError, match=message):
            direction_of(prompt(**bad), 2)
    plain = PromptRow("rows:1", (1, 2), "once upon")
    with pytest.raises(ValueError, match="composer.degrees needs prompts of messages"):
        directed([plain], option("directional", names=TWO, degrees=[0, 1]), TOKENIZER, 0)


@pytest.mark.parametrize(
    "names, settings, message",
    [
        (("a", "b", "c"), {"degrees": [0, 1]}, "an angle is between two components, there are 3"),
        (TWO, {"degrees": [45, -45]}, r"must be \[low, high\], ascending"),
        (TWO, {"degrees": [0, 1], "message": "Be good."}, r"composer.message: has no \{weights\}"),
    ],
)
def test_settings(names, settings, message):
    with pytest.raises(ValueError, match=message):
        option("directional", names=names, **settings)


def test_scores_are_products_with_the_direction_and_missing_where_a_part_is():
    score = scorer(option("directional", names=TWO), ["other", "topic", "brief"])
    rewards = np.array([[[9, 1, 2], [9, 3, np.nan]], [[9, 1, 2], [9, 3, 4]]], dtype=float)
    found = score([prompt(direction=[0.6, 0.8]), prompt(direction=[0, -1])], rewards)
    np.testing.assert_allclose(found, [[2.2, np.nan], [-2, -4]])


def test_the_best_in_its_direction_is_imitated(tmp_path):
    """A round with two components: of each prompt's completions the one with the largest product is learnt from."""
    rows = [
        {"prompt": [{"role": "user", "content": f"{i}?"}], "direction": [[0.6, 0.8], [-1.0, 0.0]][i % 2]}
        for i in range(6)
    ]
    path = tmp_path / "prompts.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "heldout.jsonl").write_text(json.dumps(rows[0] | {"prompt": "what now?"}) + "\n")
    words = words_of(
        tmp_path, f"run.dir={tmp_path / 'run'}", "trainer=iterate", "objective=nll", "trainer.select=best_of_n",
        f"reward.mixed._target_={REWARDS}mixed", f"reward.coin._target_={REWARDS}coin", "composer=directional",
        "trainer.rounds=1", "trainer.batch_size=2", "sampling.n=4", "trainer.max_steps=", "trainer.save_every=",
        "trainer.max_missing_fraction=", "trainer.eval_every=", "trainer.micro_batch_tokens=512",
    )  # fmt: skip
    assert main(["train", *words]) == 0
    drawn = {}
    for file in (tmp_path / "run/rounds/01").glob("samples-*.jsonl"):
        for line in map(json.loads, file.read_text().splitlines()):
            v = rows[int(line["source"].rsplit(":", 1)[1]) - 1]["direction"]
            told = [v[0] * c["rewards"]["mixed"] + v[1] * c["rewards"]["coin"] for c in line["completions"]]
            assert [c["score"] for c in line["completions"]] == pytest.approx(told)
            drawn[line["source"]] = line["completions"][int(np.argmax(told))]["token_ids"]
    kept = [json.loads(line) for line in (tmp_path / "run/rounds/01/data.jsonl").read_text().splitlines()]
    assert len(kept) == len(drawn) == 6
    assert sorted(row["token_ids"] for row in kept) == sorted(drawn.values())


def dpa_run(base, name, *words):
    """Rounds of drawn directions on six prompts, twice each; -> source -> round -> what the prompt tells."""
    path = base / "prompts.jsonl"
    rows = [{"prompt": [{"role": "user", "content": f"{i}?"}]} for i in range(6)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    (base / "heldout.jsonl").write_text(json.dumps({"prompt": [{"role": "user", "content": "what now?"}]}) + "\n")
    run = base / name
    given = words_of(
        base, f"run.dir={run}", "trainer=iterate", "objective=nll", "trainer.select=best_of_n",
        f"reward.mixed._target_={REWARDS}mixed", f"reward.coin._target_={REWARDS}coin", "composer=directional",
        "composer.degrees=[-45,45]", "trainer.rounds=2", "trainer.batch_size=2", "data.repeat=[2]",
        "trainer.max_steps=", "trainer.save_every=", "trainer.max_missing_fraction=", "trainer.eval_every=",
        "trainer.micro_batch_tokens=1024", *words,
    )  # fmt: skip
    assert main(["train", *given]) == 0
    told: dict[int, list] = {1: [], 2: []}
    for number, lines in told.items():
        for file in sorted((run / f"rounds/{number:02d}").glob("samples-*.jsonl")):
            for line in map(json.loads, file.read_text().splitlines()):
                lines.append((line["source"], line["prompt"][0]["content"]))
    return told


def test_angles_are_drawn_anew_in_each_round(tmp_path):
    """By the seed, the round and the place in it: how many prompts other rounds have does not matter."""
    small = dpa_run(tmp_path, "small", "trainer.prompts_per_round=4")
    large = dpa_run(tmp_path, "large", "trainer.prompts_per_round=6")
    for number in (1, 2):
        assert [said for _, said in small[number]] == [said for _, said in large[number]][:4]
    angles = [said for lines in large.values() for _, said in lines]
    assert len(set(angles)) == 12  # a prompt that comes again is asked for something else
    other = dpa_run(tmp_path, "other", "trainer.prompts_per_round=4", "seed=1")
    assert not {said for _, said in other[1]} & {said for _, said in small[1]}
