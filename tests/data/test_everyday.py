"""The shipped everyday pairs keep the contract that their data card states."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

import align
from align.build import tokenizer
from align.config import compose
from align.data.load import load
from align.prepare import everyday as make
from align.prepare.everyday import (
    HELDOUT_PROMPTS,
    MIN_CHOSEN,
    MIN_MARGIN,
    OFF_POLICY_SAMPLES,
    UNFIT,
    Sample,
    make_pairs,
    plan_requests,
    read_prompts,
    read_samples,
    write_jsonl,
)
from align.rewards.functions import FLOOR, SHORTEST, everyday_gold, words

FOLDER = Path(align.__file__).parent / "data" / "everyday"
KEYS = {
    "prompt",
    "chosen",
    "rejected",
    "chosen_finished",
    "rejected_finished",
    "origin",
    "gold_chosen",
    "gold_rejected",
    "id",
}
GOOD = "Birds sing to attract mates and defend home areas."


def rows_of(name: str) -> list[dict]:
    with (FOLDER / name).open(encoding="utf-8") as file:
        return [json.loads(line) for line in file]


TRAIN, HELDOUT = rows_of("train.jsonl"), rows_of("heldout.jsonl")
BOTH = TRAIN + HELDOUT


def text(row: dict, side: str) -> str:
    return row[side][0]["content"]


def made(completion: str, finished: bool, origin: str = "on_policy") -> Sample:
    return Sample("Why do birds sing?", origin, completion, finished, 20)


def test_counts():
    assert len(read_prompts(FOLDER / "prompts.txt")) >= 420
    assert len({text(row, "prompt") for row in TRAIN}) >= 300
    assert 500 <= len(TRAIN) <= 700
    assert len({text(row, "prompt") for row in HELDOUT}) == len(HELDOUT) == HELDOUT_PROMPTS >= 60
    assert sum((FOLDER / f"{name}.jsonl").stat().st_size for name in ("train", "heldout")) < 1.4e6


def test_rows_have_exactly_the_documented_fields():
    for row in BOTH:
        assert set(row) == KEYS
        for side, role in (("prompt", "user"), ("chosen", "assistant"), ("rejected", "assistant")):
            assert [set(message) for message in row[side]] == [{"role", "content"}]
            assert row[side][0]["role"] == role
        assert type(row["chosen_finished"]) is type(row["rejected_finished"]) is bool
        assert row["origin"] in ("on_policy", "hot", "system_prompt")


def test_ids_are_distinct_and_name_the_line_of_the_prompt():
    prompts = read_prompts(FOLDER / "prompts.txt")
    assert len({row["id"] for row in BOTH}) == len(BOTH)
    for row in BOTH:
        word, number, letter = row["id"].split("-")
        assert word == "everyday"
        assert letter in "ab"
        assert prompts[int(number) - 1] == text(row, "prompt")


@pytest.mark.parametrize("model", ["tiny", "smollm2_135m"])
def test_every_pair_fits_every_shipped_model(model):
    """Tiny's tokens are bytes: no tokenizer of the others makes more of a text."""
    config = compose(["recipe=dpo", f"model={model}"])
    audit = load(config.data, tokenizer(config)).audit
    assert (audit.train.rows_kept, audit.heldout.rows_kept) == (522, 72)
    assert audit.as_dict()["dropped"] == {}


def test_no_prompt_is_in_both_splits():
    assert not {text(row, "prompt") for row in TRAIN} & {text(row, "prompt") for row in HELDOUT}


def test_gold_is_the_gold_rule():
    for row in BOTH:
        for side in ("chosen", "rejected"):
            gold = everyday_gold(text(row, "prompt"), text(row, side), row[f"{side}_finished"])
            assert row[f"gold_{side}"] == gold, row["id"]


def test_chosen_wins_by_the_margin():
    assert all(row["gold_chosen"] - row["gold_rejected"] >= MIN_MARGIN for row in BOTH)


def test_chosen_finished_and_on_topic_and_no_side_is_empty():
    for row in BOTH:
        assert row["chosen_finished"]
        assert row["gold_chosen"] >= MIN_CHOSEN > FLOOR
        assert len(words(text(row, "chosen"))) >= SHORTEST
        assert words(text(row, "rejected"))


def test_some_rejected_are_cut_and_some_finished_by_themselves():
    cut = sum(not row["rejected_finished"] for row in TRAIN)
    assert 0.5 * len(TRAIN) < cut < len(TRAIN)


def test_part_of_the_pairs_has_an_off_policy_completion():
    assert {row["origin"] for row in TRAIN} == {"on_policy", "hot", "system_prompt"}
    for rows in (TRAIN, HELDOUT):
        off = sum(row["origin"] != "on_policy" for row in rows)
        assert 0.2 <= off / len(rows) <= 0.35


def test_no_completion_holds_an_address_or_a_word_of_the_list():
    for row in BOTH:
        assert not UNFIT.search(text(row, "chosen") + "\n" + text(row, "rejected")), row["id"]


def test_no_completion_joins_two_pairs():
    for side in ("chosen", "rejected"):
        assert len({(row["id"][:13], text(row, side)) for row in BOTH}) == len(BOTH)


def test_the_script_needs_no_vllm_to_be_imported():
    assert "sample" in vars(make)
    assert "vllm" not in {name.split(".")[0] for name in vars(make)}
    assert make.__name__ in sys.modules


def test_every_third_prompt_gets_off_policy_requests_and_no_two_seeds_agree():
    requests = plan_requests(["a", "b", "c", "d"], samples=3, seed=0)
    off = [request for request in requests if request.origin != "on_policy"]
    assert len(requests) == 4 * 3 + len(off)
    assert [request.prompt for request in off] == ["a"] * 6 + ["d"] * 6
    assert len(off) == 2 * 3 * OFF_POLICY_SAMPLES
    assert len({request.seed for request in requests}) == len(requests)
    assert requests == plan_requests(["a", "b", "c", "d"], samples=3, seed=0)


def test_best_against_the_worst_on_topic_one_then_the_next_best_against_the_next_worst():
    second = "Many birds sing to attract mates and defend home areas, gently, yes gently, gently."
    samples = [
        made("Cats sleep most of the day.", True),
        made(GOOD, True),
        made(GOOD, False),
        made("Birds sing while cats sleep during", False),
        made("Cats sleep all day, and dogs", False),
        made(second, True),
        made("", True),
    ]
    first, other = make_pairs(["Why do birds sing?"], samples[:2] + samples[3:])
    assert first.row()["id"] == "everyday-0001-a"
    assert first.chosen.sample.completion == GOOD
    assert first.rejected.sample.completion == "Birds sing while cats sleep during"
    assert other.chosen.sample.completion == second
    assert other.rejected.gold == FLOOR  # nothing else on topic is left
    assert first.origin == other.origin == "on_policy"


def test_a_pair_with_an_off_policy_completion_has_its_origin():
    samples = [made(GOOD, True), made("Cats sleep all day, and dogs", False, "hot")]
    (pair,) = make_pairs(["Why do birds sing?"], samples)
    assert pair.origin == "hot"
    assert pair.row()["rejected_finished"] is False


@pytest.mark.parametrize(
    "completion, finished",
    [(GOOD, False), ("Birds sing gladly.", True), ("", True), ("Cats sleep.", True)],
)
def test_nothing_cut_short_empty_or_off_topic_is_chosen(completion, finished):
    samples = [made(completion, finished), made("Dogs bark at night because", False)]
    assert make_pairs(["Why do birds sing?"], samples) == []


def test_a_repeated_prompt_is_refused(tmp_path):
    (tmp_path / "prompts.txt").write_text("One?\nTwo?\n\nOne?\n", encoding="utf-8")
    with pytest.raises(ValueError, match="repeats a prompt"):
        read_prompts(tmp_path / "prompts.txt")


def test_kept_samples_pair_to_the_same_rows_without_sampling(tmp_path, monkeypatch):
    monkeypatch.setattr(make, "HELDOUT_PROMPTS", 1)
    asked = read_prompts(FOLDER / "prompts.txt")[1:3]
    kept = [
        {"prompt": prompt, "origin": origin, "completion": completion, "finished": end, "tokens": 9}
        for prompt in asked
        for origin in ("on_policy", "hot", "system_prompt")
        for completion, end in (
            (f"{prompt} Warm food, brown bread, green salad and olive oil {origin}.", True),
            (f"Dogs bark at night because {origin}", False),
        )
    ]
    write_jsonl(tmp_path / "samples.jsonl", kept)
    assert len(read_samples(tmp_path / "samples.jsonl")) == 12
    for _ in range(2):
        make.main(["--from-samples", str(tmp_path / "samples.jsonl"), "--out", str(tmp_path)])
    ids = [
        json.loads(line)["id"]
        for name in ("train", "heldout")
        for line in (tmp_path / f"{name}.jsonl").read_text(encoding="utf-8").splitlines()
    ]
    assert {name[:13] for name in ids} == {"everyday-0002", "everyday-0003"}
    assert len(ids) == 3
