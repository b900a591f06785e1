"""Margins, scores and weights of a pair by component: what is read, computed and refused."""

from __future__ import annotations

import json
import math

import pytest

from align.data.load import fingerprint, load
from align.data.margins import scoring
from align.data.pairs import MaxMin, pairs_of
from align.data.scored import read_scored
from align.data.sources import BadRow
from align.data.wanted import Wanted
from align.models.pretrained import byte_tokenizer
from align.packing import pack
from tests.data.helpers import examples, settings

TOKENIZER = byte_tokenizer()
PAIR = {
    "prompt": [{"role": "user", "content": "Name a fish and a tree."}],
    "chosen": "A fish.",
    "rejected": "A tree, a fish",
}
WORDS = {"topic": "align.rewards.functions.coverage", "short": "tests.data.test_margins.shortness"}


def shortness(completion: str) -> float:
    """Minus its number of characters."""
    return -float(len(completion))


def ended(completion: str, finished: bool) -> float:
    """1 for one that was finished."""
    return float(finished) if completion else math.nan


def unsure(completion: str) -> float:  # noqa: ARG001
    """Never knows."""
    return math.nan


def stumbling(completion: str) -> float:
    """Raises for a text without a number."""
    return float(completion.split()[-1])


def numbers(row: dict, wanted: Wanted, **changes) -> dict:
    (found,) = examples(PAIR | row, TOKENIZER, wanted, **changes)
    return dict(found.numbers)


BOTH = Wanted(margins=("helpful", "brief"))


def test_margins_of_a_row():
    row = {"margins": {"helpful": 1, "brief": -0.4, "other": 2.0}, "numbers": {"user": 3}}
    assert numbers(row, BOTH) == {"user": 3, "margin/helpful": 1, "margin/brief": -0.4}
    (example,) = examples(PAIR | row, TOKENIZER, BOTH)
    assert pack([example], "shared").numbers["margin/brief"].tolist() == pytest.approx([-0.4])
    assert numbers(row, Wanted()) == {"user": 3}


def test_scores_of_both_answers():
    scores = {"chosen": {"helpful": 4, "brief": 2, "odd": 1}, "rejected": {"helpful": 1.5, "brief": 3}}
    assert numbers({"scores": scores}, BOTH) == {"margin/helpful": 2.5, "margin/brief": -1}
    mixed = {"scores": {"chosen": {"brief": 1}, "rejected": {"brief": 1}}, "margins": {"helpful": 1}}
    assert numbers(mixed, BOTH) == {"margin/helpful": 1, "margin/brief": 0}


def test_data_sets_in_columns_fill_up_with_null():
    some = Wanted(margins=("helpful", "brief"), all_margins=False)
    filled = {"scores": None, "weights": None, "margins": {"helpful": 1, "brief": None}}
    assert numbers(filled, some) == {"margin/helpful": 1}
    with pytest.raises(BadRow, match=r"margins\.helpful is missing"):
        numbers({"margins": None}, some)


def test_functions_compute_what_a_row_lacks():
    wanted = Wanted(margins=("topic", "short"))
    # both answers mention the fish, one the tree too: half of the words against all
    assert numbers({}, wanted, margins=WORDS) == {"margin/topic": -0.5, "margin/short": 7}
    assert numbers({"margins": {"topic": 2}}, wanted, margins=WORDS) == {"margin/topic": 2, "margin/short": 7}
    cut = numbers(
        {"rejected_finished": False}, Wanted(margins=("end",)), margins={"end": "tests.data.test_margins.ended"}
    )
    assert cut == {"margin/end": 1}


def test_functions_read_tokens_too():
    """What a rollout left is decoded: the answer, without the end of its turn."""
    (text,) = examples(PAIR, TOKENIZER, Wanted())
    sides = {}
    for name, row in zip(("chosen", "rejected"), text.rows[:2], strict=True):
        start = len(text.prompt.token_ids)
        spans = [["prompt", 0, start, False], ["assistant", start, len(row.token_ids), True]]
        sides[name] = {"token_ids": row.token_ids.tolist(), "spans": spans, "messages": PAIR["prompt"]}
    (found,) = examples(sides, TOKENIZER, Wanted(margins=("topic", "short")), margins=WORDS)
    assert dict(found.numbers) == {"margin/topic": -0.5, "margin/short": 7}


def test_some_or_all_components():
    row = {"margins": {"brief": 1}}
    assert numbers(row, Wanted(margins=("helpful", "brief"), all_margins=False)) == {"margin/brief": 1}
    with pytest.raises(BadRow, match=r"margins\.helpful is missing: the objective reads helpful, brief; add"):
        numbers(row, BOTH)
    with pytest.raises(BadRow, match=r"margins\.helpful is missing"):
        numbers({}, Wanted(margins=("helpful", "brief"), all_margins=False))


def test_weights_of_a_row():
    row = {"margins": {"helpful": 1, "brief": 1}, "weights": {"brief": 0.25, "helpful": 0.75}}
    wanted = Wanted(margins=("helpful", "brief"), row_weights=True)
    assert numbers(row, wanted)["weight/brief"] == 0.25
    for weights, message in (
        ({"brief": None}, r"weights is missing: objective\.weights=row"),
        (None, r"weights is missing: objective\.weights=row reads a weight of each component"),
        ({"brief": 0.25, "other": 0.75}, r"weights\.other: no component has this name; there are helpful, brief"),
        ({"brief": 1.0}, r"weights\.helpful is missing"),
        ({"brief": 0.5, "helpful": 0.6}, r"weights: 0\.6, 0\.5 sum to 1\.1; they must sum to 1"),
        ({"brief": -0.5, "helpful": 1.5}, r"weights\.brief=-0\.5: must be at least 0"),
    ):
        with pytest.raises(BadRow, match=message):
            numbers(row | {"weights": weights}, wanted)


@pytest.mark.parametrize(
    "row, message",
    [
        ({"margins": 1}, "margins must be an object of finite numbers"),
        ({"margins": []}, "margins must be an object of finite numbers"),
        ({"margins": {"helpful": "1"}}, "margins must be an object of finite numbers"),
        ({"margins": {"helpful": True}}, "margins must be"),
        ({"margins": {"helpful": math.nan}}, "margins must be"),
        ({"margins": {"helpful": -math.inf}}, "margins must be"),
        ({"scores": {"chosen": {"helpful": 1}}}, "scores must hold chosen and rejected"),
        ({"scores": [1, 2]}, "scores must hold chosen and rejected"),
        ({"scores": {"chosen": {"a": math.nan}, "rejected": {"a": 1}}}, r"scores\.chosen must be an object of finite"),
        (
            {"margins": {"brief": 1}, "scores": {"chosen": {"brief": 2}, "rejected": {"brief": 1}}},
            r"margins\.brief is given and scores\.chosen\.brief too; keep one",
        ),
        ({"margins": {"helpful": 1, "brief": 1}, "weights": [0.5, 0.5]}, "weights must be an object of finite numbers"),
    ],
)
def test_bad_rows(row, message):
    with pytest.raises(BadRow, match=message) as error:
        numbers(row, Wanted(margins=("helpful", "brief"), row_weights=True))
    assert error.value.reason == "wrong_type"


@pytest.mark.parametrize("kind", ["pair", "labelled", "single"])
def test_other_objectives_leave_the_fields_alone(kind):
    """Columns of these names with something else in them are none of theirs."""
    row = {"margins": "wide", "scores": [1, 2], "weights": 3}
    assert all(not e.numbers for e in examples(PAIR | row, TOKENIZER, Wanted(kind)))


def test_ranked_rows_have_none():
    row = {"prompt": [{"role": "user", "content": "F"}], "ranked": ["Cod", "Cow", "Oak"]}
    with pytest.raises(BadRow, match="without further columns or margins"):
        examples(row, TOKENIZER, BOTH, margins=WORDS)


@pytest.mark.parametrize(
    "path, message",
    [
        ("no.such.module", r"data\.margins\.a=no\.such\.module: cannot be imported"),
        ("align.rewards.functions.nothing", "cannot be imported"),
        ("coverage", "cannot be imported"),
        ("align.rewards.functions.brevity", "must be a function of completion, and of prompt and finished if it asks"),
        ("math.hypot", r"data\.margins\.a=math\.hypot: must be a function of completion"),  # it tells no parameters
        ("align.rewards.functions.FLOOR", "must be a function of completion"),
    ],
)
def test_functions_that_cannot_be(path, message):
    with pytest.raises(ValueError, match=message):
        scoring(path, "data.margins.a")


def test_a_function_that_knows_nothing_makes_a_bad_row():
    with pytest.raises(BadRow, match=r"data\.margins\.a=tests\.data\.test_margins\.unsure returned nan"):
        numbers({}, Wanted(margins=("a",)), margins={"a": "tests.data.test_margins.unsure"})


def test_a_function_that_raises_makes_a_bad_row():
    with pytest.raises(BadRow, match=r"test_margins\.stumbling raised ValueError: could not convert"):
        numbers({}, Wanted(margins=("a",)), margins={"a": "tests.data.test_margins.stumbling"})


def test_rows_without_a_margin_are_counted(tmp_path):
    """on_bad_row=error names the first, drop leaves them out and says why; other margins are other data."""
    path = tmp_path / "rows.jsonl"
    rows = [PAIR | {"margins": {"helpful": 1, "brief": 1}}, PAIR | {"margins": {"helpful": 1}, "rejected": "No"}]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(ValueError, match=r"rows\.jsonl:2: margins\.brief is missing"):
        load(settings(path), TOKENIZER, BOTH)
    found = load(settings(path, on_bad_row="drop", max_bad_fraction=1.0), TOKENIZER, BOTH)
    assert found.audit.train.dropped == {"missing_field": 1}
    assert len(found.train) == 1
    path.write_text(json.dumps(PAIR | {"margins": {"helpful": 1, "brief": 2}}) + "\n")
    assert fingerprint(load(settings(path), TOKENIZER, BOTH).train) != fingerprint(found.train)


def test_rewards_of_samples_become_scores_of_pairs(tmp_path):
    """From align generate with two rewards, or a round of iterated training, to margins."""
    completions = [
        {"text": "Cod.", "score": 3.0, "rewards": {"helpful": 1.0, "brief": 2.0, "polite": None}},
        {"text": "A whale", "score": 1.0, "rewards": {"helpful": 1.5, "brief": -0.5, "polite": 1.0}},
    ]
    path = tmp_path / "scored.jsonl"
    path.write_text(json.dumps({"prompt": "Name a fish.", "completions": completions}) + "\n")
    rows, _ = pairs_of(read_scored([str(path)]).prompts, MaxMin(), None, 0)
    assert rows[0]["chosen"] == "Cod."
    (found,) = examples(rows[0], TOKENIZER, BOTH)
    assert dict(found.numbers) == {"margin/helpful": -0.5, "margin/brief": 2.5}
    completions[0]["rewards"]["brief"] = "much"
    path.write_text(json.dumps({"prompt": "Name a fish.", "completions": completions}) + "\n")
    with pytest.raises(ValueError, match=r"scored\.jsonl:1: completion 1: rewards must be an object of finite numbers"):
        read_scored([str(path)])
    one = {
        "prompt": "F",
        "completions": [{"text": t, "score": s, "rewards": {"a": s}} for t, s in (("x", 1), ("y", 2))],
    }
    path.write_text(json.dumps(one) + "\n")
    assert "scores" not in pairs_of(read_scored([str(path)]).prompts, MaxMin(), None, 0)[0][0]
