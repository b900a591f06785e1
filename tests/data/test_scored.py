"""Files of scored samples: the two forms, grouping, and the sentence for each row that cannot be used."""

from __future__ import annotations

import json
from pathlib import Path

import datasets
import pytest

from align.data.scored import Sample, Scored, file_and_origin, read_scored


@pytest.fixture(autouse=True)
def private_cache(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "hf")


def write(path: Path, rows: list) -> str:
    path.write_text("\n".join(r if isinstance(r, str) else json.dumps(r) for r in rows))
    return str(path)


def brief(prompts) -> list:
    return [(p.prompt, [(s.completion, s.score, s.origin) for s in p.samples]) for p in prompts]


def test_list_form_and_flat_form_are_one(tmp_path):
    listed = [
        {"prompt": "A", "completions": [{"text": "a", "score": 1}, {"text": "b", "score": None, "origin": "x"}]},
        {"prompt": "B", "completions": [{"text": "c", "score": -2.5}]},
    ]
    flat = [
        {"prompt": "A", "completion": "a", "score": 1},
        {"prompt": "B", "completion": "c", "score": -2.5},
        {"prompt": "A", "completion": "b", "score": None, "origin": "x"},
    ]
    expected = [("A", [("a", 1.0, ""), ("b", None, "x")]), ("B", [("c", -2.5, "")])]
    assert brief(read_scored([write(tmp_path / "l.jsonl", listed)]).prompts) == expected
    assert brief(read_scored([write(tmp_path / "f.jsonl", flat)]).prompts) == expected


def test_parquet_where_each_row_has_every_column(tmp_path):
    """Columns that a row lacks are null there."""
    rows = [
        {"prompt": "A", "completions": [{"text": "a", "score": 1.0, "origin": None},
                                        {"text": "b", "score": None, "origin": "x"}]},
        {"prompt": "B", "completions": [{"text": "c", "score": 2.0, "origin": None}]},
    ]  # fmt: skip
    path = tmp_path / "s.parquet"
    datasets.Dataset.from_list(rows).to_parquet(path)
    assert brief(read_scored([str(path)]).prompts) == [
        ("A", [("a", 1.0, ""), ("b", None, "x")]), ("B", [("c", 2.0, "")])
    ]  # fmt: skip


def test_equal_prompts_meet_across_files_and_own_origin_wins(tmp_path):
    chat = [{"role": "user", "content": "A"}]
    first = write(tmp_path / "1.jsonl", [{"prompt": chat, "completion": "a", "score": 1}])
    second = write(
        tmp_path / "2.jsonl",
        [
            {"prompt": [{"content": "A", "role": "user"}], "completion": "b", "score": 2},
            {"prompt": chat, "completion": "c", "score": 3, "origin": "human"},
            {"prompt": "A", "completion": "d", "score": 4},  # a text is another prompt than a conversation
            {"prompt": chat, "tools": [{"name": "f"}], "completion": "e", "score": 5},  # and so is one with tools
        ],
    )
    files = read_scored([f"{first}@on_policy", f"{second}@off_policy"])
    assert brief(files.prompts) == [
        (chat, [("a", 1.0, "on_policy"), ("b", 2.0, "off_policy"), ("c", 3.0, "human")]),
        ("A", [("d", 4.0, "off_policy")]),
        (chat, [("e", 5.0, "off_policy")]),
    ]
    assert [s.source for s in files.prompts[0].samples] == [f"{first}:1", f"{second}:1", f"{second}:2"]
    assert len(set(files.sha256)) == 2


@pytest.mark.parametrize(
    "name, expected",
    [
        ("a.jsonl@on_policy", ("a.jsonl", "on_policy")),
        ("d@b/a.parquet@x", ("d@b/a.parquet", "x")),
        ("a@b.jsonl", ("a@b.jsonl", "")),
        ("owner/name@config", ("owner/name@config", "")),
    ],
)
def test_file_and_origin(name, expected):
    assert file_and_origin(name) == expected


SPANS = [["user", 0, 1, False], ["assistant", 1, 3, True]]


@pytest.mark.parametrize(
    "row, text",
    [
        ('{"prompt": "A", "completion": "a", "score": NaN}', "NaN is not JSON"),
        ('{"prompt": "A", "completion": "a", "score": 1e999}', "score is inf; write null"),
        ({"prompt": "A", "completion": "a"}, "'score' is missing; write null"),
        ({"prompt": "A", "completion": "a", "score": "9"}, "score must be a number or null, found str"),
        ({"prompt": "A", "completion": "a", "score": True}, "score must be a number or null, found bool"),
        ({"prompt": "A", "score": 1}, "give either completions, a list, or completion and score"),
        ({"prompt": "A", "completion": "a", "completions": [], "score": 1}, "give either"),
        ({"prompt": "A", "completions": {"text": "a"}}, "completions must be a list, found dict"),
        ({"prompt": "A", "completions": ["a"]}, "completion 1: must be an object with text and score"),
        ({"prompt": "A", "completions": [{"text": "a", "score": 1}, {"text": "b"}]}, "completion 2: the field 'score'"),
        ({"prompt": "A", "completions": [{"score": 1}]}, "nothing is written; give text, messages, or token_ids"),
        ({"prompt": "A", "completions": [{"text": 3, "score": 1}]}, "completion must be a string or a list"),
        ({"prompt": "A", "completions": [{"text": "a", "messages": [], "score": 1}]}, "both text and messages"),
        ({"prompt": "A", "completions": [{"token_ids": [1], "score": 1}]}, "belong together"),
        ({"prompt": "A", "completions": [{"token_ids": [1, 2], "spans": SPANS, "score": 1}]}, "must tile them"),
        ({"prompt": "A", "completion": "a", "score": 1, "finished": 1}, "finished must be true or false, found int"),
        ({"prompt": "A", "completion": "a", "score": 1, "origin": 1}, "origin must be a string, found int"),
        ({"completion": "a", "score": 1}, "prompt must be a string or a list of messages, found nothing"),
        ({"prompt": "A", "completion": [{"role": "user", "content": "a"}], "score": 1}, "must both be strings"),
        ({"prompt": [{"role": "judge", "content": "A"}], "completion": "a", "score": 1}, "role 'judge'"),
        ({"prompt": "A", "completion": "a", "score": 1, "tools": "add"}, "tools is a string and no JSON"),
        ("[1]", "expected an object"),
    ],
)
def test_refused_with_file_and_line(tmp_path, row, text):
    name = write(tmp_path / "s.jsonl", [{"prompt": "A", "completion": "fine", "score": 0}, row])
    with pytest.raises(ValueError) as caught:  # noqa: PT011
        read_scored([name])
    assert str(caught.value).startswith(f"{name}:2: ")
    assert text in str(caught.value)


def test_nan_from_a_table_is_refused(tmp_path):
    path = tmp_path / "s.parquet"
    datasets.Dataset.from_list([{"prompt": "A", "completion": "a", "score": float("nan")}]).to_parquet(path)
    with pytest.raises(ValueError, match=r"s.parquet:1: score is nan; write null for a missing score"):
        read_scored([str(path)])


def test_nothing_to_read(tmp_path):
    with pytest.raises(ValueError, match="at least one file"):
        read_scored([])
    with pytest.raises(ValueError, match="no such file"):
        read_scored([str(tmp_path / "absent.jsonl")])
    with pytest.raises(ValueError, match="has no rows"):
        read_scored([write(tmp_path / "empty.jsonl", [])])


def test_what_counts_as_empty():
    answer = {"role": "assistant", "content": "a"}
    call = {"role": "assistant", "content": None, "tool_calls": [{"function": {"name": "f", "arguments": {}}}]}
    blank = {"role": "assistant", "content": " "}
    assert [Sample(0, c).empty for c in ("a", "", " \n", [answer], [blank], [blank, answer], [call, answer])] == [
        False, True, True, False, True, True, False
    ]  # fmt: skip


def test_an_empty_completion_is_read_not_refused(tmp_path):
    name = write(tmp_path / "s.jsonl", [{"prompt": "A", "completion": "", "score": -3}])
    assert read_scored([name]).prompts[0].samples[0].empty


def test_length_is_of_what_the_policy_wrote():
    turns = [{"role": "assistant", "content": "ab"}, {"role": "tool", "content": "zzzz"},
             {"role": "assistant", "content": "c"}]  # fmt: skip
    tokens = {"token_ids": [1] * 9, "spans": [["user", 0, 2, False], ["assistant", 2, 4, True], ["tool", 4, 8, False],
                                             ["assistant", 8, 9, True]]}  # fmt: skip
    assert Sample(0, turns).num_characters == 3
    assert Sample(0, turns).num_tokens is None
    assert Sample(0, tokens=tokens).num_tokens == 3
    assert not Sample(0, tokens=tokens).empty


def test_a_sample_must_say_something():
    with pytest.raises(ValueError, match="needs a completion"):
        Scored("A", (Sample(1.0),))
