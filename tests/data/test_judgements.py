"""From pairs to judge prompts, and from judgements to rows for warm-up and DPO: by hand, and through the commands."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from align.cli import main
from align.config import compose
from align.data.formats import parse
from align.data.sources import locate_all
from align.prepare.judgements import (
    Quality,
    Template,
    Verdicts,
    preference_rows,
    read_judgements,
    run,
    sft_rows,
    template,
    write_prompts,
)

PLAIN = Template("{prompt}|{answer_a}|{answer_b}")
VERDICTS = Verdicts(r"\[\[([ABC])\]\]")
RIGHT = {"chosen_first": "A", "rejected_first": "B"}
WRONG = {"chosen_first": "B", "rejected_first": "A"}


def write(path: Path, rows: list) -> str:
    path.write_text("".join(f"{row if isinstance(row, str) else json.dumps(row)}\n" for row in rows))
    return str(path)


def lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def prompts(tmp_path, rows, asked=PLAIN):
    account = write_prompts([write(tmp_path / "given.jsonl", rows)], tmp_path / "prompts.jsonl", asked)
    return lines(tmp_path / "prompts.jsonl"), account


def sample(pair: str, order: str, verdict: str, text: str = "because", **more) -> dict:
    """verdict: A, B, C, or "right", "wrong", "none"."""
    verdict = {"right": RIGHT[order], "wrong": WRONG[order]}.get(verdict, verdict)
    words = text if verdict == "none" else f"{text}\n[[{verdict}]]"
    prompt = [{"role": "user", "content": f"{pair} {order}"}]
    return {"prompt": prompt, "completion": words, "pair": pair, "order": order, "verdict": RIGHT[order], **more}


def read(tmp_path, samples):
    return read_judgements([write(tmp_path / "samples.jsonl", samples)], VERDICTS)


# ---- how a judge is asked and read ----


def test_what_is_put_in_is_not_looked_at_again():
    nasty = "{answer_b} {{0}} {} \\1 {prompt}"
    assert PLAIN.fill("{answer_a}", nasty, "b") == f"{{answer_a}}|{nasty}|b"
    assert Template("{x} {prompt}{answer_a}{answer_b} {").fill("1", "2", "3") == "{x} 123 {"


def test_a_template_is_a_text_or_a_file(tmp_path):
    (tmp_path / "mine.txt").write_text("{prompt}?{answer_a}!{answer_b}\n\n")
    assert template(str(tmp_path / "mine.txt")) == Template("{prompt}?{answer_a}!{answer_b}")
    assert template("{answer_a}{answer_b}{prompt}").fill("1", "2", "3") == "231"
    assert template("align:judge_prompt.txt").text.endswith("if they are equally good.")
    with pytest.raises(ValueError, match=r"has no \{answer_b\}"):
        template("{prompt} {answer_a}")
    with pytest.raises(ValueError, match="template=align:no.txt: neither"):
        template("align:no.txt")


@pytest.mark.parametrize(
    "judgement, verdict",
    [
        ("[[A]]", "A"),
        ("I think\nso:\n\n  [[B]]  \n\n", "B"),
        ("[[A]]\n[[C]]", "C"),
        ("Verdict: [[A]]", None),
        ("[[A]] [[B]]", None),
        ("[[A]]\nOr not.", None),
        ("[[a]]", None),
        ("[[AB]]", None),
        ("", None),
        (" \n ", None),
    ],
)
def test_the_last_line_is_the_verdict_or_there_is_none(judgement, verdict):
    assert VERDICTS(judgement) == verdict


def test_a_pattern_of_one_s_own():
    assert Verdicts(r".*\b([ABC])\W*")("The answer is B.") == "B"
    assert Verdicts(r"(\w)")("X") is None  # its group must give a verdict
    assert Verdicts(r"tie|winner (\w)")("tie") is None


# ---- pairs to prompts ----


def test_a_pair_is_asked_about_in_both_orders(tmp_path):
    rows, account = prompts(tmp_path, [{"prompt": "p", "chosen": "good", "rejected": "{bad}", "subset": "maths"}])
    texts = [[{"role": "user", "content": "p|good|{bad}"}], [{"role": "user", "content": "p|{bad}|good"}]]
    assert [row["prompt"] for row in rows] == texts
    assert [(row["order"], row["verdict"], row["subset"]) for row in rows] == [
        ("chosen_first", "A", "maths"),
        ("rejected_first", "B", "maths"),
    ]
    assert rows[0]["pair"] == rows[1]["pair"]
    assert (account.rows_in, account.pairs_out, account.dropped) == (1, 1, {})


def test_conversations_are_written_with_their_roles(tmp_path):
    chat = [
        {"role": "user", "content": "one"},
        {"role": "assistant", "content": "two"},
        {"role": "user", "content": "three"},
    ]
    answers = {name: [{"role": "assistant", "content": name}] for name in ("chosen", "rejected")}
    rows, _ = prompts(tmp_path, [{"prompt": chat, **answers}, {"prompt": chat[:1], "chosen": "x", "rejected": "y"}])
    said = [row["prompt"][0]["content"] for row in rows]
    assert said[0] == "User: one\n\nAssistant: two\n\nUser: three|chosen|rejected"
    assert said[2] == "one|x|y"  # a single message of the user is its text


def test_what_is_dropped_is_counted_with_the_first_place(tmp_path):
    """Nine rows: one pair is left; contradictory ones take their partner with them."""
    tokens = {"token_ids": [1, 2], "spans": [["user", 0, 1, False], ["assistant", 1, 2, True]]}
    rows, account = prompts(
        tmp_path,
        [
            {"prompt": "p", "chosen": "a", "rejected": "b"},
            {"prompt": "p", "chosen": "a", "rejected": "b"},
            {"prompt": "q", "chosen": "a", "rejected": "b"},
            {"prompt": "q", "chosen": "b", "rejected": "a"},
            {"prompt": "q", "chosen": "b", "rejected": "a"},
            {"prompt": "p", "completion": "a"},
            {"chosen": tokens, "rejected": {**tokens, "token_ids": [1, 3]}},
            {"prompt": "p", "chosen": "a", "rejected": "a"},
            "{not json",
        ],
    )
    assert len(rows) == 2
    assert account.dropped == {
        "repeated": 1, "contradicted": 3, "not_a_pair": 1, "no_text": 1, "identical": 1, "invalid_json": 1
    }  # fmt: skip
    told = "\n".join(account.lines())
    assert "9 rows in = 1 pairs, each in both orders, + 8 dropped" in told
    assert "given.jsonl:2: the pair stands there before" in told


def test_no_pair_left_is_an_error_and_writes_nothing(tmp_path):
    with pytest.raises(ValueError, match="no pair is left.*1 not_a_pair"):
        prompts(tmp_path, [{"prompt": "p", "completion": "a"}])
    assert not (tmp_path / "prompts.jsonl").exists()
    source = write(tmp_path / "x.jsonl", [{"prompt": "p", "chosen": "a", "rejected": "b"}])
    with pytest.raises(ValueError, match="is one of the files to read"):
        write_prompts([source], tmp_path / "x.jsonl", PLAIN)


# ---- how well a judge judges ----


def test_quality_by_hand(tmp_path):
    """Four pairs, one sample an order: right twice, always first, always tie, unparsable and right.

    Accuracy 1, 1/2, 0, 1/2: mean 1/2, standard deviation sqrt(1/6), error sqrt(1/24). The same winner after the swap:
    yes, no, yes (a tie), no.
    """
    samples = [
        *(sample("1", order, "right", subset="easy") for order in RIGHT),
        *(sample("2", order, "A", subset="hard") for order in RIGHT),
        *(sample("3", order, "C", subset="hard") for order in RIGHT),
        sample("4", "chosen_first", "none"),
        sample("4", "rejected_first", "right"),
        sample("5", "chosen_first", "right"),  # in one order only
    ]
    quality = Quality.of(read(tmp_path, samples))
    assert (quality.pairs, quality.one_order, quality.samples) == (4, 1, 9)
    assert (quality.unparsable, quality.cut, quality.ties, quality.first) == (1, 0, 2, 4)
    assert quality.accuracy.value == 0.5
    assert quality.accuracy.error == pytest.approx((1 / 24) ** 0.5)
    assert quality.consistency.value == 0.5
    # chosen first: right, A, tie, none; rejected first: right, A, tie, right
    assert quality.by_order == {"chosen_first": 0.5, "rejected_first": 0.5}
    assert quality.by_subset == {"easy": 1.0, "hard": 0.25}
    told = "\n".join(quality.lines())
    assert "9 samples, 11.1% unparsable (0.0% cut), 22.2% ties, 66.7% of the rest for the answer shown first" in told
    assert "1 pairs were judged in one order only" in told


def test_consistency_of_several_samples_is_that_of_two_drawn_ones(tmp_path):
    """chosen_first names chosen in 3 of 4 samples, rejected in 1; rejected_first 1 of 2 and none: 3/4 * 1/2."""
    samples = [
        *(sample("1", "chosen_first", v, f"{i}") for i, v in enumerate(("right", "right", "right", "wrong"))),
        sample("1", "rejected_first", "right"),
        sample("1", "rejected_first", "none"),
    ]
    quality = Quality.of(read(tmp_path, samples))
    assert quality.consistency.value == pytest.approx(3 / 8)
    assert quality.accuracy.value == pytest.approx((3 / 4 + 1 / 2) / 2)


def test_a_cut_judgement_has_no_verdict(tmp_path):
    samples = [sample("1", order, "right", finished=False) for order in RIGHT]
    quality = Quality.of(read(tmp_path, samples))
    assert (quality.accuracy.value, quality.unparsable, quality.cut) == (0.0, 2, 2)


@pytest.mark.parametrize(
    "change, words",
    [
        ({"pair": ...}, "the field 'pair' is missing; make the prompts with align data judgements"),
        ({"completion": ["x"]}, "completion must be a string, found list"),
        ({"order": ["x"]}, "are not as align data judgements wrote them"),
        ({"verdict": "B"}, "are not as align data judgements wrote them"),
        ({"prompt": "another"}, "has another prompt here"),
    ],
)
def test_samples_of_other_prompts_are_refused(tmp_path, change, words):
    good = sample("1", "chosen_first", "right")
    bad = {key: value for key, value in (good | change).items() if value is not ...}
    with pytest.raises(ValueError, match=words) as raised:
        read(tmp_path, [good, bad])
    assert "samples.jsonl:2: " in str(raised.value)


# ---- what is learnt from ----


def test_the_warm_up_takes_judgements_that_are_right_in_both_orders(tmp_path):
    """Pair 1 right in both (3 and 1 samples), pair 2 always says A, pair 3 is right once and else unparsable."""
    samples = [
        *(sample("1", "chosen_first", "right", f"text {i}") for i in range(3)),
        sample("1", "rejected_first", "right", "other"),
        sample("1", "rejected_first", "wrong", "no"),
        *(sample("2", order, "A") for order in RIGHT),
        sample("3", "chosen_first", "right"),
        sample("3", "rejected_first", "none"),
    ]
    made = sft_rows(read(tmp_path, samples), 2, 0)
    assert [row["prompt"][0]["content"] for row in made.rows] == ["1 chosen_first", "1 rejected_first"]
    assert made.rows[1]["completion"] == "other\n[[B]]"
    assert made.rows[0]["completion"] in [f"text {i}\n[[A]]" for i in range(3)]
    # two of pair 1's three have no partner; pair 2's wrong one and pair 1's; pairs 2 and 3 have a right one each
    assert made.dropped == {"unbalanced": 2, "wrong_verdict": 2, "right_in_one_order_only": 2, "unparsable": 1}
    for row in made.rows:
        assert parse(row).kind == "single"


def test_equal_judgements_are_learnt_once_and_the_limit_counts(tmp_path):
    samples = [sample("1", order, "right", text) for order in RIGHT for text in ("x", "x", "y", "z")]
    made = sft_rows(read(tmp_path, samples), 2, 0)
    assert len(made.rows) == 4
    assert made.dropped == {"repeated": 2, "over_max_per_prompt": 2}
    assert made == sft_rows(read(tmp_path, samples), 2, 0)
    others = [sft_rows(read(tmp_path, samples), 2, seed).rows for seed in range(1, 6)]
    assert any(rows != made.rows for rows in others)


def test_pairs_hold_a_right_and_a_wrong_judgement_of_one_prompt(tmp_path):
    """A tie and what is unparsable are wrong; a cut one is not finished."""
    samples = [
        sample("1", "chosen_first", "right", "yes"),
        sample("1", "chosen_first", "C", "a draw"),
        sample("1", "rejected_first", "right", "yes"),
        sample("1", "rejected_first", "right", "no end", finished=False),
        sample("2", "chosen_first", "right"),
        sample("2", "rejected_first", "none"),
    ]
    made = preference_rows(read(tmp_path, samples), 1, 0)
    assert made.rows == [
        {"prompt": samples[0]["prompt"], "chosen": "yes\n[[A]]", "rejected": "a draw\n[[C]]"},
        {
            "prompt": samples[2]["prompt"],
            "chosen": "yes\n[[B]]",
            "rejected": "no end\n[[B]]",
            "rejected_finished": False,
        },
    ]
    assert made.dropped == {"prompts_all_right": 1, "prompts_all_wrong": 1}
    assert [parse(row).kind for row in made.rows] == ["pair", "pair"]


def test_both_orders_are_balanced_and_pairs_that_have_both_stay(tmp_path):
    """Contested with the chosen first: all five pairs; with the rejected first: pairs 3 and 5. Four rows are left."""
    samples = [sample(str(k), "chosen_first", v) for k in range(1, 6) for v in ("right", "wrong")]
    samples += [sample(str(k), "rejected_first", v) for k in range(1, 6) for v in ("right", "wrong")[k not in (3, 5) :]]
    made = preference_rows(read(tmp_path, samples), 1, 0)
    said = sorted(row["prompt"][0]["content"] for row in made.rows)
    assert said == ["3 chosen_first", "3 rejected_first", "5 chosen_first", "5 rejected_first"]
    assert made.dropped == {"prompts_all_wrong": 3, "pairs_unbalanced": 3}


def test_a_judge_that_always_names_the_first_gives_no_row(tmp_path):
    """Or only where B is right: the orders cannot be balanced."""
    samples = [sample("1", "chosen_first", "A", t) for t in "xy"] + [
        sample("1", "rejected_first", v) for v in ("A", "B")
    ]
    asked = read(tmp_path, samples)
    assert preference_rows(asked, 1, 0).rows == []
    assert preference_rows(asked, 1, 0).dropped == {"prompts_all_right": 1, "pairs_unbalanced": 1}


def test_what_cannot_be_learnt_from_is_counted(tmp_path):
    """Said without an end and with one, empty, more right than wrong."""
    samples = [
        sample("1", "chosen_first", "right", "x"),
        sample("1", "chosen_first", "right", "y"),
        sample("1", "chosen_first", "right", "x", finished=False),
        sample("1", "chosen_first", "none", ""),
        sample("1", "rejected_first", "right", "x"),
        sample("1", "rejected_first", "right", "y"),
        sample("1", "rejected_first", "wrong", "x"),
    ]
    made = preference_rows(read(tmp_path, samples), 1, 0)
    assert made.rows == []
    assert made.dropped == {
        "empty": 1, "repeated": 1, "prompts_all_right": 1, "without_partner": 1, "pairs_unbalanced": 1
    }  # fmt: skip


# ---- the commands ----


def command(*words: str) -> tuple[int, list[str]]:
    told: list[str] = []
    return run(words, told.append), told


def test_from_pairs_to_rows_that_training_takes(tmp_path, capsys):
    """Twenty pairs; of the two judgements of each order one is right: accuracy 1/2 exactly, a row of each kind."""
    pairs = [{"prompt": f"Question {k}?", "chosen": f"good {{answer_b}} {k}", "rejected": "bad"} for k in range(20)]
    given = write(tmp_path / "pairs.jsonl", pairs)
    code, told = command(f"pairs={given}", f"out={tmp_path / 'prompts.jsonl'}")
    assert code == 0
    assert told[0] == "judge prompts: 20 rows in = 20 pairs, each in both orders, + 0 dropped"
    asked = lines(tmp_path / "prompts.jsonl")
    assert len(asked) == 40
    # prompts as align data and align generate read them
    assert all(set(row) == {"prompt", "pair", "order", "verdict"} for row in asked)
    samples = []
    for row in asked:
        other = "B" if row["verdict"] == "A" else "A"
        for k, verdict in enumerate((row["verdict"], other)):
            words = f"I compare.\n[[{verdict}]]"
            samples.append({**row, "completion": words, "sample": k, "finished": True, "token_ids": [1]})
    code, told = command(f"samples={write(tmp_path / 'samples.jsonl', samples)}", f"out={tmp_path / 'made'}")
    assert code == 0
    assert "accuracy over 20 pairs, mean of both orders: 0.500 (standard error 0.000)" in "\n".join(told)
    sft, preferences = (lines(tmp_path / "made" / name) for name in ("sft.jsonl", "pairs.jsonl"))
    assert (len(sft), len(preferences)) == (40, 40)
    account = json.loads((tmp_path / "made" / "judgements.account").read_text())
    assert account["quality"]["accuracy"] == {"mean": 0.5, "error": 0.0}
    assert account["pairs.jsonl"] == {"rows": 40, "dropped": {}}
    for recipe, name in (("judge_sft", "sft"), ("judge_dpo", "pairs")):
        words = [f"recipe={recipe}", f"data.train={tmp_path / 'made' / name}.jsonl", "model=tiny"]
        assert main(["check", *words]) == 0
        assert main(["data", "check", *words]) == 0
        assert locate_all(compose(words).data.train, "data.train")[0].kind == "jsonl"
    assert "error" not in capsys.readouterr().err


def test_what_align_generate_writes_can_be_read(tmp_path):
    """A random model has no verdict: all is unparsable, nothing is written, and the exit code says so."""
    given = write(tmp_path / "pairs.jsonl", [{"prompt": "p", "chosen": "a", "rejected": "b", "subset": "s"}])
    command(f"pairs={given}", f"out={tmp_path / 'prompts.jsonl'}")
    words = [f"data.train={tmp_path / 'prompts.jsonl'}", f"out={tmp_path / 'samples.jsonl'}", "n=2", "model=tiny"]
    assert main(["generate", *words, "data.max_tokens=2048", "sampling.max_new_tokens=4"]) == 0
    (tmp_path / "made").mkdir()
    (tmp_path / "made" / "sft.jsonl").write_text("of an earlier command")
    code, told = command(f"samples={tmp_path / 'samples.jsonl'}", f"out={tmp_path / 'made'}")
    assert code == 1
    assert "4 samples, 100.0% unparsable" in told[0]
    assert "accuracy on s: 0.000" in told
    assert [p.name for p in (tmp_path / "made").iterdir()] == ["judgements.account"]


def test_without_out_the_quality_is_told_and_nothing_written(tmp_path):
    source = write(tmp_path / "samples.jsonl", [sample("1", order, "right") for order in RIGHT])
    code, told = command(f"samples={source}")
    assert code == 0
    assert told[1] == "accuracy over 1 pairs, mean of both orders: 1.000 (chosen_first 1.000, rejected_first 1.000)"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["samples.jsonl"]


@pytest.mark.parametrize(
    "words, message",
    [
        ([], "give pairs=FILE .* or samples=FILE"),
        (["pairs=a.jsonl", "samples=b.jsonl"], "give pairs=FILE .* or samples=FILE"),
        (["pairs=a.jsonl"], "give out=FILE.jsonl"),
        (["pairs=a.jsonl", "out=x.txt"], "out=x.txt: must end in .jsonl"),
        (["pairs=a.jsonl", "seed=1", "out=x.jsonl"], "seed=1 has no effect with pairs="),
        (["samples=a.jsonl", "template=t", "out=d"], "template=t has no effect with samples="),
        (["samples=a.jsonl", "max_per_prompt=0"], "max_per_prompt=0: must be at least 1"),
        (["samples=a.jsonl", "max_per_prompt=x"], "max_per_prompt=x: must be a whole number"),
        (["samples=no.jsonl"], "no.jsonl: no such file"),
        (["colour=red"], "align data judgements colour=red: takes pairs="),
    ],
)
def test_words_that_cannot_be(words, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=message):
        run(words, lambda line: None)


def test_out_of_rows_must_be_a_directory(tmp_path):
    source = write(tmp_path / "samples.jsonl", [sample("1", order, "right") for order in RIGHT])
    with pytest.raises(ValueError, match="must be a directory"):
        command(f"samples={source}", f"out={tmp_path / 'rows.jsonl'}")
