"""Each kind of bad input is named with file, line and cure; the account of dropped rows adds up."""

from __future__ import annotations

import json

import pytest

from align.data.load import load
from align.data.wanted import Wanted
from align.models.pretrained import byte_tokenizer
from tests.data.helpers import settings

GOOD = {"prompt": "Name a fish.", "chosen": "Cod.", "rejected": "Cow."}
TALK = {
    "prompt": [{"role": "user", "content": "Name a fish."}],
    "chosen": [{"role": "assistant", "content": "Cod."}],
    "rejected": [{"role": "assistant", "content": "Cow."}],
}
USER = {"role": "user", "content": "And?"}
SYSTEM = {"role": "system", "content": "Be brief."}
ANSWER = {"role": "assistant", "content": "Cod."}
CALL = {"role": "assistant", "content": "", "tool_calls": [{"id": "a", "function": {"name": "f", "arguments": "{}"}}]}
RESULT = {"role": "tool", "content": "3"}


def line(row: object) -> bytes:
    return json.dumps(row).encode()


# name -> (the second line of the file, its reason, a part of the cure)
BAD = {
    "not UTF-8": (b'{"prompt": "\xff", "chosen": "b", "rejected": "c"}', "not_utf8", "byte 13 of the line"),
    "UTF-16": (json.dumps(GOOD).encode("utf-16"), "not_utf8", "save the file as UTF-8"),
    "BOM on line 2": (b"\xef\xbb\xbf" + line(GOOD), "invalid_json", "BOM"),
    "truncated": (line(GOOD)[:-5], "invalid_json", "a row must be one JSON object"),
    "trailing comma": (b'{"prompt": "a", "chosen": "b", "rejected": "c",}', "invalid_json", "column 48"),
    "NaN": (b'{"prompt": "a", "chosen": "b", "rejected": "c", "s": NaN}', "invalid_json", "write null"),
    "Infinity": (b'{"prompt": "a", "chosen": "b", "rejected": "c", "s": -Infinity}', "invalid_json", "write null"),
    "array": (b"[1, 2]", "not_an_object", "found list"),
    "null row": (b"null", "not_an_object", "found NoneType"),
    "number row": (b"3", "not_an_object", "found int"),
    "duplicate key": (b'{"prompt": "a", "chosen": "b", "chosen": "d", "rejected": "c"}', "invalid_json", "keep one"),
    "deep": (b"[" * 100_000, "invalid_json", "flat"),
    "huge integer": (b'{"prompt": "a", "n": ' + b"1" * 5000 + b"}", "invalid_json", "leave the field out"),
    "NUL byte": (b'{"prompt": "a\0", "chosen": "b", "rejected": "c"}', "invalid_json", "control character"),
    "no chosen": (line({"prompt": "a", "rejected": "c"}), "missing_field", "'chosen' is missing"),
    "no rejected": (line({"prompt": "a", "chosen": "c"}), "missing_field", "'rejected' is missing"),
    "null chosen": (line(GOOD | {"chosen": None}), "missing_field", "a pair needs chosen and rejected"),
    "number for text": (line(GOOD | {"chosen": 3}), "wrong_type", "found int"),
    "object for text": (line(GOOD | {"prompt": {"a": 1}}), "wrong_type", "found dict"),
    "text against messages": (line(GOOD | {"chosen": TALK["chosen"]}), "wrong_type", "must both be strings"),
    "finished is a text": (line(GOOD | {"chosen_finished": "no"}), "wrong_type", "must be true or false"),
    "origin is a number": (line(GOOD | {"origin": 1}), "wrong_type", "origin must be a string"),
    "identical": (line(GOOD | {"rejected": "Cod."}), "identical", "remove the row"),
    "identical messages": (line(TALK | {"rejected": TALK["chosen"]}), "identical", "remove the row"),
    "identical, implicit prompt": (line({"chosen": [USER, ANSWER], "rejected": [USER, ANSWER]}), "identical", "same"),
    "empty completion": (line(GOOD | {"chosen": " \n"}), "empty_completion", "chosen is empty"),
    "empty answer": (line(TALK | {"rejected": [ANSWER | {"content": ""}]}), "empty_completion", "message 2 is empty"),
    "no message": (line(TALK | {"rejected": []}), "empty_completion", "holds no message"),
    "empty prompt": (line(TALK | {"prompt": []}), "empty_prompt", "holds no message"),
    "answers without a prompt": (
        line({"chosen": TALK["chosen"], "rejected": TALK["rejected"]}),
        "assistant_first",
        "give prompt as a list of messages",
    ),
    "assistant first": (line({"messages": [ANSWER, USER, ANSWER], "label": True}), "assistant_first", "put the user's"),
    "empty trajectory": (line({"messages": [], "label": True}), "empty_completion", "holds no message"),
    "trajectory without an answer": (line({"messages": [USER], "label": True}), "role_order", "must end with"),
    "two system messages": (line(TALK | {"prompt": [SYSTEM, SYSTEM, USER]}), "two_systems", "join them"),
    "label is a number": (line({"messages": [USER, ANSWER], "label": 1}), "wrong_type", "label must be true or false"),
    "label is a text": (line({"prompt": "a", "completion": "b", "label": "yes"}), "wrong_type", "true or false"),
    "different prompts": (
        line({"chosen": [USER, ANSWER], "rejected": [TALK["prompt"][0], ANSWER]}),
        "different_prompts",
        "two answers to one prompt",
    ),
    "other prompt beside": (
        line({"prompt": "Name a tree.", "chosen": [USER, ANSWER], "rejected": [USER, ANSWER | {"content": "Cow."}]}),
        "different_prompts",
        "that the field prompt holds",
    ),
    "tool result without a call": (
        line({"messages": [USER, ANSWER, RESULT, ANSWER], "label": True}),
        "tool_result",
        "put tool_calls into",
    ),
    "result of another call": (
        line({"messages": [USER, CALL, RESULT | {"tool_call_id": "b"}, ANSWER], "label": True}),
        "tool_result",
        "'b'",
    ),
    "two results of one call": (
        line({"messages": [USER, CALL, RESULT, RESULT, ANSWER], "label": True}),
        "tool_result",
        "without a call",
    ),
    "open tool call": (line({"messages": [USER, CALL], "label": True}), "open_tool_call", "data.open_tool_calls=true"),
    "open tool call inside": (
        line({"messages": [USER, CALL, USER, ANSWER], "label": True}),
        "open_tool_call",
        "add the result",
    ),
    "unclosed arguments": (
        line({"messages": [USER, ANSWER | {"tool_calls": [{"function": {"name": "f", "arguments": '{"a": '}}]}]}),
        "tool_call",
        "not closed JSON",
    ),
    "call without a name": (
        line({"messages": [USER, ANSWER | {"tool_calls": [{"arguments": {}}]}]}),
        "tool_call",
        "function.name",
    ),
    "user calls a tool": (line({"messages": [CALL | {"role": "user"}, ANSWER]}), "tool_call", "only the assistant"),
    "negative weight": (line({"messages": [USER, ANSWER | {"weight": -1}]}), "wrong_type", "at least 0"),
    "all weights 0": (line({"messages": [USER, ANSWER | {"weight": 0}]}), "no_target", "a weight above 0"),
    "tools is no list": (line({"messages": [USER, ANSWER], "tools": {"a": 1}}), "wrong_type", "list of objects"),
    "no answer": (line({"prompt": "a"}), "missing_field", "'completion' is missing"),
    "spans with a gap": (
        line({"token_ids": [1, 2, 3], "spans": [["user", 0, 1, False], ["assistant", 2, 3, True]]}),
        "wrong_type",
        "end of",
    ),
    "token that is true": (
        line({"token_ids": [True, 2], "spans": [["user", 0, 1, False], ["assistant", 1, 2, True]]}),
        "wrong_type",
        "token numbers",
    ),
    "token beyond 32 bits": (
        line({"token_ids": [1, 2**40], "spans": [["user", 0, 1, False], ["assistant", 1, 2, True]]}),
        "wrong_type",
        "token numbers",
    ),
    "span with fractions": (
        line({"token_ids": [1, 2], "spans": [["user", 0, 1.0, False], ["assistant", 1.0, 2, True]]}),
        "wrong_type",
        "two numbers",
    ),
    "target is a text": (
        line({"token_ids": [1, 2], "spans": [["user", 0, 1, False], ["assistant", 1, 2, "false"]]}),
        "wrong_type",
        "[role, start, end, target]",
    ),
    "surrogate in a span's role": (
        line({"token_ids": [1, 2], "spans": [["\ud800", 0, 1, False], ["assistant", 1, 2, True]]}),
        "not_utf8",
        "half a surrogate pair",
    ),
    "messages beside tokens are a text": (
        line({"token_ids": [1, 2], "spans": [["user", 0, 1, False], ["assistant", 1, 2, True]], "messages": "a"}),
        "wrong_type",
        "list of messages",
    ),
    "reasoning is a number": (line({"messages": [USER, ANSWER | {"thinking": 5}]}), "wrong_type", "thinking of"),
    "lone surrogate in a call": (
        line({"messages": [USER, {"role": "assistant", "tool_calls": [{"name": "f", "arguments": {"a": "\ud800"}}]}]}),
        "not_utf8",
        "half a surrogate pair",
    ),
    "lone surrogate in tools": (
        line({"messages": [USER, ANSWER], "tools": [{"name": "\ud800"}]}),
        "not_utf8",
        "tools holds half",
    ),
    "spans too short": (line({"token_ids": [1, 2], "spans": [["user", 0, 1, False]]}), "wrong_type", "cover 1 of 2"),
    "token of another model": (
        line({"token_ids": [1, 9999], "spans": [["user", 0, 1, False], ["assistant", 1, 2, True]]}),
        "other_vocabulary",
        "another model",
    ),
    "unknown role": (line(TALK | {"prompt": [{"role": "judge", "content": "a"}]}), "unknown_role", "use system, user"),
    "role is a list": (line(TALK | {"prompt": [{"role": [], "content": "a"}]}), "unknown_role", "use system, user"),
    "message without content": (line(TALK | {"prompt": [{"role": "user"}]}), "wrong_type", "role and content"),
    "message is a text": (line(TALK | {"prompt": ["a"]}), "wrong_type", "role and content"),
    "null content": (line(TALK | {"chosen": [ANSWER | {"content": None}]}), "wrong_type", "found null"),
    "ends in user": (line(TALK | {"chosen": [ANSWER, USER]}), "role_order", "must end with an assistant"),
    "no assistant turn": (line(TALK | {"chosen": [USER]}), "role_order", "must end with an assistant"),
    "prompt ends in assistant": (line(TALK | {"prompt": [USER, ANSWER]}), "role_order", "end with another role"),
    "system message late": (line(TALK | {"prompt": [USER, SYSTEM]}), "role_order", "must be the first"),
    "two answers in a row": (line(TALK | {"chosen": [ANSWER, ANSWER]}), "role_order", "join the two"),
    "lone surrogate": (line(GOOD | {"chosen": "\ud800"}), "not_utf8", "half a surrogate pair"),
    "lone surrogate in a message": (line(TALK | {"chosen": "\udc00"}), "not_utf8", "half a surrogate pair"),
    "lone surrogate in origin": (line(GOOD | {"origin": "\ud800"}), "not_utf8", "half a surrogate pair"),
}


@pytest.fixture(scope="module")
def tokenizer():
    return byte_tokenizer()


@pytest.mark.parametrize("name", BAD)
def test_bad_row_is_named(tmp_path, tokenizer, name):
    bad, reason, cure = BAD[name]
    path = tmp_path / "rows.jsonl"
    path.write_bytes(line(GOOD) + b"\n" + bad.replace(b"\n", b"") + b"\n" + line(TALK) + b"\n")
    with pytest.raises(ValueError, match="rows.jsonl") as caught:
        load(settings(path), tokenizer, Wanted("single"))
    message = str(caught.value)
    assert message.startswith(f"{path}:2: ")
    assert f"(reason {reason};" in message
    assert cure in message
    assert "\n" not in message


def test_dropped_rows_add_up(tmp_path, tokenizer):
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b"\n".join([line(GOOD), *(bad.replace(b"\n", b"") for bad, _, _ in BAD.values()), line(TALK)]))
    audit = load(settings(path, on_bad_row="drop", max_bad_fraction=1.0), tokenizer, Wanted("single")).audit
    expected: dict[str, int] = {}
    for _, reason, _ in BAD.values():
        expected[reason] = expected.get(reason, 0) + 1
    assert audit.train.rows_in == len(BAD) + 2
    assert audit.train.rows_kept == 2
    assert audit.train.dropped == expected
    assert audit.train.dropped_rows[0]["source"] == f"{path}:2"
    assert audit.train.dropped_rows[0]["reason"] == "not_utf8"
    assert len(audit.train.dropped_rows) == len(BAD)
    totals = audit.as_dict()
    assert totals["rows_in"] == totals["rows_kept"] + sum(totals["dropped"].values())
    assert json.loads(json.dumps(totals)) == totals


def test_account_that_does_not_add_up_is_not_written(tmp_path, tokenizer):
    path = tmp_path / "rows.jsonl"
    path.write_bytes(line(GOOD))
    audit = load(settings(path), tokenizer).audit
    audit.train.rows_in += 1
    with pytest.raises(AssertionError, match="train"):
        audit.as_dict()


@pytest.mark.parametrize("limit, fails", [(0.24, True), (0.25, False)])
def test_more_bad_rows_than_allowed(tmp_path, tokenizer, limit, fails):
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b"\n".join([line(GOOD)] * 3 + [b"null"]))
    config = settings(path, on_bad_row="drop", max_bad_fraction=limit)
    if not fails:
        assert load(config, tokenizer).audit.train.dropped == {"not_an_object": 1}
        return
    with pytest.raises(ValueError, match=r"25.0% of 4 rows are bad \(1 not_an_object\).*rows.jsonl:4: expected"):
        load(config, tokenizer)


def test_no_usable_row(tmp_path, tokenizer):
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b"null\n3\n")
    with pytest.raises(ValueError, match=r"0 usable rows of 2; the first: .*rows.jsonl:1: expected an object"):
        load(settings(path, on_bad_row="drop", max_bad_fraction=1.0), tokenizer)


@pytest.mark.parametrize("content", [b"", b"\n \n\r\n"])
def test_file_without_rows(tmp_path, tokenizer, content):
    path = tmp_path / "rows.jsonl"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"data.train=.*rows.jsonl: has no rows; give a file with"):
        load(settings(path), tokenizer)


def test_missing_heldout_file_is_found_before_rows_are_read(tmp_path, tokenizer):
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b"null")
    with pytest.raises(ValueError, match=r"absent.jsonl: no such file; give an existing file"):
        load(settings(path, heldout=str(tmp_path / "absent.jsonl")), tokenizer)


def test_bom_crlf_and_blank_lines_are_no_fault(tmp_path, tokenizer):
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b"\xef\xbb\xbf" + line(GOOD) + b"\r\n\r\n  \r\n" + line(TALK) + b"\r\n")
    data = load(settings(path), tokenizer)
    assert [e.source for e in data.train] == [f"{path}:1", f"{path}:4"]
    assert data.audit.train.rows_in == 2
    assert data.train[0].prompt.text == "Name a fish."


def test_ten_megabytes_in_a_row(tmp_path, tokenizer):
    """Unknown fields cost nothing; 1 MB of text is told with its length, not with itself."""
    path = tmp_path / "rows.jsonl"
    path.write_bytes(line(GOOD | {"note": "x" * 10_000_000}) + b"\n" + line(GOOD | {"chosen": "x " * 500_000}))
    data = load(settings(path, overlong="drop"), tokenizer)
    assert (data.audit.train.rows_kept, data.audit.train.dropped) == (1, {"too_long": 1})
    told = r"The first: .*rows.jsonl:2: a sequence of 10000\d\d characters has \d{5,6} tokens or many"
    with pytest.raises(ValueError, match=told) as caught:
        load(settings(path), tokenizer)
    assert len(str(caught.value)) < 700
