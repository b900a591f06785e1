"""Prompts of every format, what travels with them, and the rules that they share with training data."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest

from align.data.chat import prompt_ids
from align.data.load import load
from align.data.prompts import PromptRow, load_prompts, prompts_fingerprint
from align.models.pretrained import byte_tokenizer
from tests.data.helpers import settings
from tests.data.test_load import counting

USER = {"role": "user", "content": "Add 2 and 3."}
ANSWER = {"role": "assistant", "content": "5"}
TOOL = {"type": "function", "function": {"name": "add", "parameters": {"type": "object", "properties": {}}}}


@pytest.fixture(scope="module")
def tokenizer():
    return byte_tokenizer()


def write(path, records) -> str:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return str(path)


def prompts(tmp_path, tokenizer, records, max_new_tokens=10, **changes):
    name = write(tmp_path / "p.jsonl", records)
    return load_prompts(settings(name, **({"max_tokens": 300} | changes)), tokenizer, max_new_tokens)


def one(tmp_path, tokenizer, record) -> PromptRow:
    (row,) = prompts(tmp_path, tokenizer, [record]).train
    return row


def test_a_text_is_tokenised_as_it_is(tmp_path, tokenizer):
    """The byte tokenizer: one token a byte, no chat template, nothing before or after."""
    row = one(tmp_path, tokenizer, {"prompt": "2 + 3 =", "answer": "5", "entry": {"metadata": {"terms": [2, 3]}}})
    assert tokenizer.decode(row.token_ids) == "2 + 3 ="
    assert (row.text, row.messages) == ("2 + 3 =", None)
    assert row.fields == {"answer": "5", "entry": {"metadata": {"terms": [2, 3]}}}
    assert row.source.endswith("p.jsonl:1")


@pytest.mark.parametrize(
    "record",
    [
        {"prompt": [USER]},
        {"messages": [USER]},
        {"messages": [USER, ANSWER]},
        {"messages": [USER, {"role": "assistant", "content": ""}]},  # an answer that training would refuse
        {"conversations": [{"from": "human", "value": USER["content"]}, {"from": "gpt", "value": "5"}]},
        {"prompt": [USER], "completion": [ANSWER]},
        {"prompt": [USER], "chosen": [ANSWER], "rejected": "6"},
        {"chosen": [USER, ANSWER], "rejected": [USER, {"role": "assistant", "content": "6"}]},
        {"prompt": [USER], "completion": "5", "label": False},
        {"prompt_chosen": [USER], "prompt_rejected": [{"role": "user", "content": "Say 4."}], "completion": "5"},
    ],
)
def test_every_format_gives_the_prompt_that_training_has(tmp_path, tokenizer, record):
    row = one(tmp_path, tokenizer, record)
    assert row.token_ids == tuple(prompt_ids(tokenizer, [USER]))
    assert (row.text, row.messages) == ("Add 2 and 3.", (USER,))


def test_only_the_last_answer_of_a_conversation_is_left_out(tmp_path, tokenizer):
    more = {"role": "user", "content": "And 4?"}
    row = one(tmp_path, tokenizer, {"messages": [USER, ANSWER, more, {"role": "assistant", "content": "9"}]})
    assert row.messages == (USER, ANSWER, more)
    assert row.text == "And 4?"
    assert row.token_ids == tuple(prompt_ids(tokenizer, [USER, ANSWER, more]))


def test_the_shipped_pairs_serve_as_prompts(tokenizer):
    config = settings("align:everyday/train.jsonl", heldout="align:everyday/heldout.jsonl", max_tokens=4000)
    found = load_prompts(config, tokenizer, 1)
    pairs = load(config, tokenizer)
    assert [row.token_ids for row in found.train] == [e.prompt.token_ids for e in pairs.train]
    assert [row.text for row in found.heldout] == [e.prompt.text for e in pairs.heldout]
    assert [row.source for row in found.train] == [e.source for e in pairs.train]
    assert found.audit.prompts_in_both == pairs.audit.prompts_in_both == 0


def test_a_conversation_in_tokens_is_cut_before_the_first_target(tmp_path, tokenizer):
    ids = tokenizer("ask answer").input_ids
    spans = [["user", 0, 4, False], ["assistant", 4, len(ids), True]]
    row = one(tmp_path, tokenizer, {"token_ids": ids, "spans": spans, "task": "t"})
    assert (row.token_ids, row.messages, row.fields) == (tuple(ids[:4]), None, {"task": "t"})
    with pytest.raises(ValueError, match="p.jsonl:1: token 99999 is not in the vocabulary"):
        prompts(tmp_path, tokenizer, [{"token_ids": [99999, *ids[1:]], "spans": spans}])


def test_tools_are_part_of_the_prompt_and_travel_with_it(tmp_path, tokenizer):
    row = one(tmp_path, tokenizer, {"prompt": [USER], "tools": [TOOL]})
    assert row.token_ids == tuple(prompt_ids(tokenizer, [USER], tools=[TOOL]))
    assert row.fields == {"tools": [TOOL]}


def test_columns_that_training_would_refuse_are_nothing_to_a_prompt(tmp_path, tokenizer):
    """label, numbers, origin and text are columns of the row here, whatever they hold."""
    extra = {"label": "maths", "numbers": "12", "origin": 3, "text": 5, "token_ids": [1], "finished": "yes"}
    assert one(tmp_path, tokenizer, {"prompt": "2 + 3 =", **extra}).fields == extra


@pytest.mark.parametrize(
    "record, said",
    [
        ({"question": "2 + 3"}, "the field 'prompt' is missing"),
        ({"text": "2 + 3"}, "the field 'prompt' is missing"),
        ({"prompt": " "}, "the prompt is empty"),
        ({"prompt": []}, "prompt holds no message"),
        ({"prompt": None}, "the field 'prompt' is missing"),
        ({"prompt": [USER, ANSWER]}, "the prompt ends with an assistant message"),
        ({"prompt": [{"role": "system", "content": "Be brief."}]}, "no user message"),
        ({"messages": "2 + 3"}, "messages must be a list of messages, found str"),
        ({"messages": [ANSWER]}, "prompt holds no message"),
        ({"messages": [{"role": "robot", "content": "x"}]}, "has role 'robot'"),
        ({"chosen": "a", "prompt": "b"}, "the field 'rejected' is missing"),
    ],
)
def test_bad_rows_are_named_by_line(tmp_path, tokenizer, record, said):
    with pytest.raises(ValueError, match=r"p\.jsonl:2: ") as raised:
        prompts(tmp_path, tokenizer, [{"prompt": "fine"}, record])
    assert said in str(raised.value)


def test_bad_rows_are_dropped_and_counted(tmp_path, tokenizer):
    records = [*({"prompt": f"Number {i}"} for i in range(9)), {"question": "none"}]
    found = prompts(tmp_path, tokenizer, records, on_bad_row="drop", max_bad_fraction=0.1)
    assert len(found.train) == 9
    assert found.audit.train.dropped == {"missing_field": 1}
    assert found.audit.as_dict()["rows_in"] == 10
    with pytest.raises(ValueError, match=r"10\.0% of 10 rows are bad"):
        prompts(tmp_path, tokenizer, records, on_bad_row="drop", max_bad_fraction=0.05)


def test_a_prompt_is_too_long_when_no_room_is_left_for_the_answer(tmp_path, tokenizer):
    """Texts of 90 and 91 bytes, an answer of 10 tokens, a limit of 100."""
    records = [{"prompt": "x" * 90}, {"prompt": "y" * 91}]
    for overlong in ("drop", "truncate_turns"):
        found = prompts(tmp_path, tokenizer, records, max_tokens=100, overlong=overlong)
        assert [row.text[0] for row in found.train] == ["x"]
        assert found.audit.train.dropped == {"prompt_too_long": 1}
    with pytest.raises(ValueError, match="p.jsonl:2: the prompt has 91 tokens, with max_new_tokens=10 .*=101 or more"):
        prompts(tmp_path, tokenizer, records, max_tokens=100)


@pytest.mark.parametrize("chat", [False, True])
def test_a_prompt_of_megabytes_is_left_out_before_it_is_tokenised(tmp_path, chat):
    tokenizer, calls = counting(byte_tokenizer())
    long = "again and again; " * 100_000
    record = {"prompt": [{"role": "user", "content": long}] if chat else long}
    found = prompts(tmp_path, tokenizer, [record, {"prompt": "2 + 3?"}], overlong="drop")
    assert found.audit.train.dropped == {"prompt_too_long": 1}
    assert "of 1700000 characters has more tokens than data.max_tokens=" in found.audit.train.dropped_rows[0]["detail"]
    assert max(len(text) for call in calls for text in call) < 1000


def test_repeated_prompts_are_kept_and_counted(tmp_path, tokenizer):
    found = prompts(tmp_path, tokenizer, [{"prompt": "a", "answer": i} for i in range(3)] + [{"prompt": "b"}])
    assert [row.fields.get("answer") for row in found.train] == [0, 1, 2, None]
    assert found.audit.train.repeated_prompts == 2
    assert found.audit.as_dict()["train"]["repeated_prompts"] == 2
    assert found.audit.lines()[0] == (
        "data train: 4 rows in = 4 kept + 0 dropped (none); 2 repeated prompts; 4 prompt tokens"
    )


def test_the_same_prompts_are_held_out_as_in_training(tmp_path, tokenizer):
    records = [{"prompt": f"Question {i}", "chosen": "yes", "rejected": "no"} for i in range(40)]
    config = settings(write(tmp_path / "r.jsonl", records), heldout_fraction=0.1)
    found, pairs = load_prompts(config, tokenizer, 10), load(config, tokenizer)
    assert [row.source for row in found.heldout] == [e.source for e in pairs.heldout]
    assert len(found.heldout) == 4
    assert (found.audit.train.rows_in, found.audit.heldout.rows_in) == (36, 4)


def test_sources_are_repeated_as_in_training(tmp_path, tokenizer):
    """Two sources of 2 and 4 rows, twice and a half: the first in full two times, then a fixed half of the other."""
    a = write(tmp_path / "a.jsonl", [{"prompt": f"a{i}"} for i in range(2)])
    b = write(tmp_path / "b.jsonl", [{"prompt": f"b{i}"} for i in range(4)])
    found = load_prompts(settings([a, b], repeat=[2, 0.5]), tokenizer, 10)
    assert [row.text for row in found.train[:4]] == ["a0", "a1", "a0", "a1"]
    assert len(found.train) == 6
    assert found.audit.train.repeated_prompts == 0  # rows that a file repeats, not those asked for
    with pytest.raises(ValueError, match="give one number for each of the 2 sources"):
        load_prompts(settings([a, b], repeat=[2]), tokenizer, 10)


def test_the_fingerprint_tells_tokens_fields_and_order(tmp_path, tokenizer):
    rows = prompts(tmp_path, tokenizer, [{"prompt": "a", "answer": "1"}, {"prompt": "b", "answer": "2"}]).train
    moved = [replace(row, source="elsewhere:1") for row in rows]
    assert prompts_fingerprint(rows) == prompts_fingerprint(moved)
    others = [
        rows[::-1],
        rows[:1],
        [rows[0], replace(rows[1], fields={"answer": "3"})],
        [rows[0], replace(rows[1], token_ids=(*rows[1].token_ids, 7))],
    ]
    assert len({prompts_fingerprint(rows), *map(prompts_fingerprint, others)}) == 5
