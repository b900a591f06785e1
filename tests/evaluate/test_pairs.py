"""The report on scored pairs: counted by hand, what is missing is absent, bad rows are named, files are whole."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest

from align.evaluate.format_bias import probes
from align.evaluate.pairs import lines, read, report, write
from align.evaluate.reward_bench import COUNTS, PRIOR_SETS

VECTORS = json.loads((Path(__file__).parents[1] / "vectors" / "reward_public.json").read_text())
TIE = next(v for v in VECTORS if v["name"] == "pairwise_accuracy_tie")


def row(chosen: float, rejected: float, number: int = 0, **more) -> dict:
    return {
        "prompt": f"question {number}?",
        "chosen": "a good answer",
        "rejected": "a bad answer",
        "score_chosen": chosen,
        "score_rejected": rejected,
    } | more


def test_a_tie_is_wrong_and_counted():
    scores = zip(TIE["inputs"]["chosen"], TIE["inputs"]["rejected"], strict=True)
    found = report([row(c, r, i) for i, (c, r) in enumerate(scores)])
    assert found["accuracy"]["mean"] == pytest.approx(TIE["expected"]["accuracy"], abs=1e-12)
    assert [int(line["right"]) for line in found["pairs"]] == TIE["expected"]["results"]
    assert found["ties"] == 1


def test_by_subset_kind_and_split_by_hand():
    """Subset a: 1 of 1 right, b: 1 of 3. A kind is the mean over its subsets, (1 + 1/3) / 2, not 2 of 4."""
    rows = [
        row(1, 0, 0, subset="a", kind="objective", split="in"),
        row(1, 0, 1, subset="b", kind="objective", split="in"),
        row(0, 1, 2, subset="b", kind="objective", split="out"),
        row(0, 1, 3, subset="b", kind="objective", split="out"),
        row(0, 0, 4, subset="c", kind="adversarial"),
    ]
    found = report(rows)
    assert found["accuracy"]["mean"] == pytest.approx(2 / 5)
    assert {n: v["accuracy"]["mean"] for n, v in found["by_subset"].items()} == pytest.approx(
        {"a": 1, "b": 1 / 3, "c": 0}
    )
    kind = found["by_kind"]["objective"]
    assert kind["accuracy"]["mean"] == pytest.approx(2 / 3)
    right, wrong = math.log1p(math.exp(-1)), math.log1p(math.exp(1))
    assert kind["log_loss"]["mean"] == pytest.approx((right + (right + 2 * wrong) / 3) / 2)
    assert (kind["count"], kind["subsets"]) == (4, ["a", "b"])
    assert kind["by_split"]["in"]["accuracy"]["mean"] == 1.0
    assert kind["by_split"]["out"]["accuracy"]["mean"] == 0.0
    assert found["by_kind"]["adversarial"]["log_loss"]["mean"] == pytest.approx(math.log(2))
    assert found["by_kind"].keys() == {"objective", "adversarial"}
    assert found["by_split"]["in"]["subsets"] == ["a", "b"]


def test_what_no_row_is_about_is_absent():
    found = report([{"score_chosen": 1.0, "score_rejected": 0.0}])
    assert found.keys() == {"tau", "seed", "count", "prompts", "ties", "accuracy", "log_loss", "calibration", "pairs"}
    assert found["accuracy"] == {"mean": 1.0, "low": 1.0, "high": 1.0}
    json.dumps(found, allow_nan=False)


def test_one_row_works_with_everything_in_it():
    found = report([row(0.3, -0.2, subset="hep-go", kind="objective", split="in")], fit_temperature=True)
    assert found["reward_bench"]["sections"] == {"Reasoning": {"mean": 1.0, "low": 1.0, "high": 1.0}}
    assert "overall_mean_of_4" not in found["reward_bench"]
    assert len(found["by_length_difference"]) == 1
    json.dumps(found, allow_nan=False)
    assert any("100.0%" in line for line in lines(found))


def test_reward_bench_weighs_by_count():
    """hep-go has 164, math-prm 984, whatever the file holds of them: (1 * 164 + 0.5 * 984) / 1148."""
    rows = [
        row(1, 0, 0, subset="hep-go"),
        row(1, 0, 1, subset="math-prm"),
        row(0, 1, 2, subset="math-prm"),
        row(0, 1, 3, subset="my own"),
    ]
    found = report(rows)["reward_bench"]
    assert found["sections"].keys() == {"Reasoning"}
    assert found["sections"]["Reasoning"]["mean"] == pytest.approx((164 + 492) / 1148)
    assert "mt-bench-easy" in found["missing"]
    assert "reward_bench" not in report(rows[3:])


def test_the_whole_reward_bench_has_both_overall_scores_with_intervals():
    names = [*COUNTS, *PRIOR_SETS]
    rows = [row(float(i % 3 > 0), 0.5, 10 * k + i, subset=n) for k, n in enumerate(names) for i in range(6)]
    found = report(rows)["reward_bench"]
    assert found["missing"] == []
    for name in ("prior", "overall_with_prior", "overall_mean_of_4"):
        assert found[name]["mean"] == pytest.approx(2 / 3)
        assert found[name]["low"] < 2 / 3 < found[name]["high"]
    # 27 subsets tell more than one section of them
    width = found["overall_mean_of_4"]["high"] - found["overall_mean_of_4"]["low"]
    chat = found["sections"]["Chat"]
    assert width < chat["high"] - chat["low"]


def test_pairs_of_one_prompt_are_one_observation():
    """20 pairs of 2 prompts, all right in one and all wrong in the other: nothing is known about the mean."""
    rows = [row(float(i < 10), 0.5, i // 10) for i in range(20)]
    found = report(rows)
    assert found["prompts"] == 2
    assert (found["accuracy"]["low"], found["accuracy"]["high"]) == (0.0, 1.0)
    apart = report([r | {"prompt": f"other {i}"} for i, r in enumerate(rows)])
    assert apart["accuracy"]["low"] > 0.2


def test_tau_divides_differences_and_changes_no_accuracy():
    rows = [row(2.0, 0.0, 0), row(0.0, 4.0, 1)]
    one, two = report(rows), report(rows, tau=2.0)
    assert one["accuracy"] == two["accuracy"]
    assert two["log_loss"]["mean"] == pytest.approx((math.log1p(math.exp(-1)) + math.log1p(math.exp(2))) / 2)
    assert two["calibration"]["log_loss"] == two["log_loss"]


def test_messages_and_texts_are_the_same_answers():
    """Whole conversations, a prompt of messages, and texts: prompt and words are told alike."""
    question = {"role": "user", "content": "What is it?"}
    said = [{"role": "assistant", "content": "**a** tree"}, {"role": "assistant", "content": "a stone"}]
    scores = {"score_chosen": 1.0, "score_rejected": 0.0}
    forms = [
        {"chosen": [question, said[0]], "rejected": [question, said[1]]},
        {"prompt": [question], "chosen": [said[0]], "rejected": [said[1]]},
        {"prompt": [question], "chosen": said[0]["content"], "rejected": said[1]["content"]},
        {"prompt": "What is it?", "chosen": "**a** tree", "rejected": "a stone"},
    ]
    pairs, _ = read([form | scores for form in forms])
    assert set(pairs.texts) == {("**a** tree", "a stone")}
    assert len(set(pairs.prompts[:3])) == 1


def test_quarters_of_length_difference():
    """Differences -3, -1, 1, 3 in words: one pair in each quarter; of four equal ones all are in the first."""
    texts = [("a", "a b c d"), ("a", "a b"), ("a b", "a"), ("a b c d", "a")]
    rows = [row(float(i > 1), 0.5, i) | {"chosen": c, "rejected": r} for i, (c, r) in enumerate(texts)]
    found = report(rows)["by_length_difference"]
    assert [(q["quarter"], q["low"], q["high"], q["accuracy"]["mean"]) for q in found] == [
        (1, -3, -3, 0.0),
        (2, -1, -1, 0.0),
        (3, 1, 1, 1.0),
        (4, 3, 3, 1.0),
    ]
    same = report([row(1, 0, i) for i in range(4)])["by_length_difference"]
    assert [(q["quarter"], q["count"]) for q in same] == [(1, 4)]


def test_probes_are_no_pairs_with_an_answer():
    """They are counted under their pattern; accuracy stays that of the pair."""
    made = [p | {"score_chosen": 1.0, "score_rejected": 2.0} for p in probes(["One thing. Another thing."], seed=0)]
    found = report([row(1, 0), *made])
    assert found["count"] == 1
    assert found["accuracy"]["mean"] == 1.0
    assert "by_subset" not in found
    assert {n: v["win_rate"]["mean"] for n, v in found["format_bias"]["probes"].items()} == {
        p["pattern"]: 0.0 for p in made
    }
    assert len(found["pairs"]) == 1 + len(made)
    assert report(made).keys() == {"tau", "seed", "format_bias", "pairs"}


def test_probes_without_prompts_are_each_an_observation():
    made = probes([f"Sentence number {i} is here." for i in range(40)], seed=0)
    scored = [p | {"score_chosen": float(i % 2), "score_rejected": 0.5} for i, p in enumerate(made)]
    found = report(scored)["format_bias"]["probes"]["bold"]["win_rate"]
    assert 0 < found["low"] < found["high"] < 1


def test_lists_stand_beside_pairs():
    rows = [{"id": "7", "scores": [2, 1, 0, 1], "num_correct": 1, "subset": "Focus", "prompt": "p", "chosen": ["a"]}]
    found = report([row(1, 0), *rows])
    assert found["count"] == 1
    assert found["reward_bench_2"]["by_subset"]["Focus"]["accuracy"]["mean"] == 1.0
    assert report(rows).keys() == {"tau", "seed", "reward_bench_2", "pairs"}


def test_intervals_of_the_report_cover():
    """150 files of 60 pairs with 75 % right ones: about 95 % of the intervals hold 0.75."""
    rng = np.random.default_rng(0)
    hits = 0
    for _ in range(150):
        right = rng.random(60) < 0.75
        rows = [{"score_chosen": float(r), "score_rejected": 0.5} for r in right]
        found = report(rows)["accuracy"]
        hits += found["low"] <= 0.75 <= found["high"]
    assert 0.89 <= hits / 150 <= 1.0
    assert hits < 150


# ---------------------------------------------------------------------- bad rows


@pytest.mark.parametrize(
    "change, message",
    [
        ({"score_rejected": None}, r"^row 2 \(id q7\): score_rejected is missing; write it with align score"),
        ({"score_chosen": math.nan}, r"^row 2 \(id q7\): score_chosen is nan; a score must be finite"),
        ({"score_chosen": -math.inf}, "score_chosen is -inf"),
        ({"score_chosen": "3"}, 'score_chosen must be a number, found "3"'),
        ({"score_chosen": True}, "score_chosen must be a number, found true"),
        ({"kind": "hard"}, "kind must be adversarial, objective, subjective, found 'hard'"),
        ({"pattern": "colour"}, "pattern must be length, emoji, .* found 'colour'"),
        ({"subset": 3}, "subset must be a text, found 3"),
        ({"chosen": "a bad answer"}, r"row 2 \(id q7\): chosen and rejected are the same"),
        ({"scores": [1.0, math.nan], "num_correct": 1}, r"scores\[1\] is nan"),
        ({"scores": [1.0, 2.0], "num_correct": 2}, "num_correct must be a whole number from 1 to 1"),
        ({"scores": [], "num_correct": 1}, "scores must be a list of numbers"),
    ],
)
def test_a_bad_row_is_named(change, message):
    with pytest.raises(ValueError, match=message):
        report([row(1, 0), row(1, 0, 1, id="q7") | change])


def test_a_missing_score_without_an_id():
    bad = row(1, 0)
    del bad["score_chosen"]
    with pytest.raises(ValueError, match="^row 1: score_chosen is missing"):
        report([bad])


def test_no_rows_and_bad_tau():
    with pytest.raises(ValueError, match="no rows"):
        report([])
    for tau in (0.0, -1.0, math.nan):
        with pytest.raises(ValueError, match="tau=.*must be above 0"):
            report([row(1, 0)], tau=tau)


# ---------------------------------------------------------------------- files


def test_the_directory_is_the_report(tmp_path):
    made = [p | {"score_chosen": 1.0, "score_rejected": 2.0} for p in probes(["One thing. Another thing."], seed=0)]
    found = report([row(1, 0, 0, subset="a"), row(0, 1, 1, subset="ü"), *made], fit_temperature=True)
    write(found, tmp_path / "out")
    names = {p.name for p in (tmp_path / "out").iterdir()}
    plots = {"accuracy.png", "format_bias.png", "reliability.png"}
    assert names == {"results.json", "pairs.jsonl", "manifest.json"} | plots
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    assert results == {key: value for key, value in found.items() if key != "pairs"}
    written = [json.loads(line) for line in (tmp_path / "out" / "pairs.jsonl").read_text().splitlines()]
    assert written == found["pairs"]
    assert all((tmp_path / "out" / name).read_bytes()[:4] == b"\x89PNG" for name in plots)


def test_a_report_is_replaced_and_other_files_are_not(tmp_path):
    out = tmp_path / "out"
    write(report([row(1, 0)]), out)
    write(report([row(0, 1)]), out)
    assert json.loads((out / "results.json").read_text())["accuracy"]["mean"] == 0.0
    mine = tmp_path / "mine"
    mine.mkdir()
    (mine / "thesis.txt").write_text("x")
    with pytest.raises(ValueError, match="holds other files"):
        write(report([row(1, 0)]), mine)
    with pytest.raises(ValueError, match="is a file"):
        write(report([row(1, 0)]), mine / "thesis.txt")
    assert (mine / "thesis.txt").read_text() == "x"


def test_nothing_is_left_of_a_report_that_cannot_be_written(tmp_path):
    """A number that JSON has no word for stops the writing; the report of before stays."""
    out = tmp_path / "out"
    with pytest.raises(ValueError, match="not JSON compliant"):
        write(report([row(1, 0)]) | {"tau": math.nan}, out)
    assert list(tmp_path.iterdir()) == []
    write(report([row(1, 0)]), out)
    with pytest.raises(ValueError, match="not JSON compliant"):
        write(report([row(0, 1)]) | {"tau": math.nan}, out)
    assert json.loads((out / "results.json").read_text())["accuracy"]["mean"] == 1.0
    assert [p.name for p in tmp_path.iterdir()] == ["out"]
