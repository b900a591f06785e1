"""The two splits: what is kept back, what leaks, and when data count as the same."""

from __future__ import annotations

import json
from dataclasses import replace

import datasets
import numpy as np
import pytest

from align.data import examples
from align.data.chat import render
from align.data.load import fingerprint, load
from align.data.wanted import Wanted
from align.models.pretrained import byte_tokenizer
from align.types import Row
from tests.data.helpers import settings


def rows(numbers, copies: int = 1) -> list[dict]:
    return [
        {"prompt": f"Question {i}", "chosen": f"yes {c}", "rejected": f"no {c}"} for i in numbers for c in range(copies)
    ]


def write(path, records) -> str:
    path.write_text("\n".join(map(json.dumps, records)))
    return str(path)


def split(tmp_path, records, fraction: float, heldout=None):
    name = write(tmp_path / "r.jsonl", records)
    return load(settings(name, heldout=heldout, heldout_fraction=fraction), byte_tokenizer())


def texts(examples) -> set[str]:
    return {e.prompt.text for e in examples}


def test_heldout_is_disjoint_by_prompt_and_the_same_each_time(tmp_path):
    """40 prompts of 3 rows; a tenth is 4 prompts, 12 rows."""
    data = split(tmp_path, rows(range(40), copies=3), 0.1)
    assert (len(data.train), len(data.heldout)) == (108, 12)
    assert len(texts(data.heldout)) == 4
    assert not texts(data.train) & texts(data.heldout)
    assert data.audit.prompts_in_both == 0
    assert (data.audit.train.rows_in, data.audit.heldout.rows_in) == (108, 12)
    assert data.audit.as_dict()["rows_in"] == 120
    again = split(tmp_path, rows(range(40), copies=3)[::-1], 0.1)
    assert texts(again.heldout) == texts(data.heldout)


@pytest.mark.parametrize("added", [1, 7, 20, 60])
def test_appended_rows_move_the_border_only(tmp_path, added):
    """Prompts are ordered by hash, so the old held-out prompts before and after contain one another."""
    before = texts(split(tmp_path, rows(range(40)), 0.1).heldout)
    whole = split(tmp_path, rows(range(40 + added)), 0.1)
    old = texts(whole.heldout) & {f"Question {i}" for i in range(40)}
    assert old <= before or before <= old
    assert len(texts(whole.heldout)) == -(-(40 + added) // 10)


def test_more_rows_of_known_prompts_change_nothing(tmp_path):
    before = texts(split(tmp_path, rows(range(40)), 0.1).heldout)
    assert texts(split(tmp_path, rows(range(40)) + rows(range(20), copies=2), 0.1).heldout) == before


@pytest.mark.parametrize("prompts, fraction, held", [(1, 0.5, 0), (2, 0.01, 1), (2, 0.9, 1), (3, 0.99, 2), (5, 0.0, 0)])
def test_each_side_gets_a_prompt_if_there_are_two(tmp_path, prompts, fraction, held):
    data = split(tmp_path, rows(range(prompts)), fraction)
    assert (len(data.train), len(data.heldout)) == (prompts - held, held)


def test_leak_is_counted_by_prompt(tmp_path):
    """Held out: prompts 8, 9, 10, 11, twice each; 8 and 9 stand in the training data too."""
    heldout = write(tmp_path / "h.jsonl", rows(range(8, 12), copies=2))
    data = split(tmp_path, rows(range(10)), 0.5, heldout)
    assert (len(data.train), len(data.heldout)) == (10, 8)
    assert data.audit.prompts_in_both == 2
    assert "2 held-out prompts also stand in the training data" in data.audit.lines()[-1]


def test_token_counts(tmp_path):
    """'Question 0' 10 tokens twice; 'yes 0' and 'no 0' with EOS: 6 and 5 targets."""
    audit = split(tmp_path, rows([0]), 0.0).audit
    assert (audit.train.tokens, audit.train.target_tokens) == (31, 11)


def test_fingerprint_sees_each_token_and_each_target(tmp_path):
    examples = split(tmp_path, rows(range(3)), 0.0).train
    seen = {fingerprint(examples), fingerprint(examples[::-1]), fingerprint(examples[:-1])}
    assert fingerprint(list(examples)) in seen
    changes = 3
    for side in (0, 1):
        row = examples[1].rows[side]
        for i in range(len(row.token_ids)):
            ids, targets = row.token_ids.copy(), row.targets.copy()
            ids[i] += 1
            targets[i] = ~targets[i]
            for other in (Row(ids, row.targets), Row(row.token_ids, targets)):
                both = (other, examples[1].rows[1]) if side == 0 else (examples[1].rows[0], other)
                seen.add(fingerprint([examples[0], replace(examples[1], rows=both), examples[2]]))
                changes += 1
    assert len(seen) == changes


def test_fingerprint_sees_the_border_between_rows(tmp_path):
    """The same stream of tokens, cut elsewhere."""
    example = split(tmp_path, rows([0]), 0.0).train[0]

    def cut(at: int) -> str:
        ids, targets = np.arange(8, dtype=np.int32), np.zeros(8, dtype=bool)
        return fingerprint([replace(example, rows=(Row(ids[:at], targets[:at]), Row(ids[at:], targets[at:])))])

    assert len({cut(at) for at in range(1, 8)}) == 7


def labelled(prompt: str, label: bool = True) -> dict:
    return {"prompt": prompt, "completion": f" {label}", "label": label}


def test_one_heldout_prompt_takes_its_mismatched_answer_from_the_training_data(tmp_path):
    """KTO on a small file: 5 % of 10 prompts is one, which has no other held-out prompt to be swapped with."""
    train = write(tmp_path / "r.jsonl", [labelled(f"Question {i}", i % 2 == 0) for i in range(10)])
    data = load(settings(train, heldout_fraction=0.05), byte_tokenizer(), Wanted("labelled", mismatched=True))
    (held,) = data.heldout
    assert byte_tokenizer().decode(held.extras["mismatched"].token_ids).startswith(held.prompt.text + " ")
    assert all("mismatched" in e.extras for e in data.train)


def test_the_check_holds_out_the_rows_that_training_does(tmp_path):
    """Whatever is asked of the renderings, also where the first target is a user's or comes after a weight of 0."""
    turns = [
        {
            "messages": [
                {"role": "user", "content": f"Question {i}"},
                {"role": "assistant", "content": "Yes.", "weight": i % 2},
                {"role": "user", "content": "Sure?"},
                {"role": "assistant", "content": "No."},
            ]
        }
        for i in range(20)
    ]
    name = write(tmp_path / "r.jsonl", turns)
    for roles in (["assistant"], ["user", "assistant"]):
        config = settings(name, heldout_fraction=0.3, target_roles=roles, max_tokens=1000)
        kept, bare = (load(config, byte_tokenizer(), Wanted("single"), keep=keep) for keep in (True, False))
        assert [e.source for e in kept.heldout] == [e.source for e in bare.heldout]
        assert len(bare.heldout) == 6
        assert [e.prompt for e in kept.train] == [e.prompt for e in bare.train]


def test_divergent_targets_that_leave_nothing_are_refused(tmp_path):
    """Cut off, "It is" is the beginning of the other answer: its sequence would have no target."""
    row = {"prompt": "A fish?", "chosen": " It is", "rejected": " It is Oak.", "chosen_finished": False}
    with pytest.raises(ValueError, match=r"r.jsonl:1: .* data.targets=all \(reason no_target"):
        load(settings(write(tmp_path / "r.jsonl", [row]), targets="divergent"), byte_tokenizer())


def test_columns_do_not_put_the_arguments_of_one_tool_into_another(tmp_path):
    """Parquet gives each object the keys of all, and null where it has none: neither are they said nor compared."""

    def pair(name: str, arguments: dict) -> dict:
        call = {"id": "a", "type": "function", "function": {"name": name, "arguments": arguments}}
        question = {"role": "user", "content": "1 + 1?"}
        calls = {"role": "assistant", "content": "", "tool_calls": [call]}
        result = {"role": "tool", "content": "2", "tool_call_id": "a"}
        answer = {"role": "assistant", "content": "Two."}
        return {"chosen": [question, calls, result, answer], "rejected": [question, answer]}

    path = tmp_path / "r.parquet"
    datasets.Dataset.from_list([pair("add", {"a": 1}), pair("double", {"x": 1})]).to_parquet(path)
    tokenizer = byte_tokenizer()
    said = [tokenizer.decode(e.rows[0].token_ids) for e in load(settings(path, max_tokens=1000), tokenizer).train]
    assert '"arguments": {"a": 1}}' in said[0]
    assert '"arguments": {"x": 1}}' in said[1]


def test_a_long_conversation_is_shortened_in_few_renderings(tmp_path, monkeypatch):
    """The first rendering tells which answers are too far; each of the others would cost a rendering of its own."""
    turns = [{"role": r, "content": f"{r} {i}"} for i in range(100) for r in ("user", "assistant")]
    rendered = []
    monkeypatch.setattr(examples, "render", lambda *a, **k: rendered.append(1) or render(*a, **k))
    name = write(tmp_path / "r.jsonl", [{"messages": turns}])
    data = load(settings(name, max_tokens=1000, overlong="truncate_turns"), byte_tokenizer(), Wanted("single"))
    assert 900 < len(data.train[0].rows[0].token_ids) <= 1000
    assert len(rendered) <= 3


def counting(tokenizer):
    """The tokenizer, and the texts of each of its calls."""
    calls: list[list[str]] = []

    class Counting(type(tokenizer)):
        def __call__(self, text, **how):
            calls.append([text] if isinstance(text, str) else list(text))
            return super().__call__(text, **how)

    tokenizer.__class__ = Counting
    return tokenizer, calls


def test_a_pair_of_texts_costs_a_call_for_each_answer(tmp_path):
    """Each with its prompt before it; the prompt alone once, and once for all rows whether texts end in EOS."""
    tokenizer, calls = counting(byte_tokenizer())
    load(settings(write(tmp_path / "r.jsonl", rows(range(10)))), tokenizer)
    assert [text for call in calls for text in call].count("a") == 1
    assert len(calls) == 1 + 2 * 10
    assert sum(map(len, calls)) == 1 + 3 * 10


def test_answers_to_one_conversation_tokenise_it_once(tmp_path):
    asked = [{"role": "user", "content": "Which of them, and why? " * 10}]  # longer than the context of an answer
    sides = {
        name: [{"role": "assistant", "content": said}] for name, said in (("chosen", "This."), ("rejected", "No."))
    }
    tokenizer, calls = counting(byte_tokenizer())
    load(settings(write(tmp_path / "r.jsonl", [{"prompt": asked} | sides]), max_tokens=1000), tokenizer)
    texts = [text for call in calls for text in call]
    assert len([text for text in texts if "<|im_start|>user" in text]) == 1
    assert len(texts) == len(set(texts))


@pytest.mark.parametrize("long", ["a word or two, again and again; ", "这句话一遍又一遍。", "\x04"])
@pytest.mark.parametrize("side", ["prompt", "chosen"])
def test_a_text_of_megabytes_is_refused_before_it_is_tokenised(tmp_path, side, long):
    """Tokens of 50 MB took 7 GB and a minute."""
    record = rows([0])[0] | {side: long * 100_000}
    for chat in (False, True):
        if chat:
            record = {
                "prompt": [{"role": "user", "content": record["prompt"]}],
                **{name: [{"role": "assistant", "content": record[name]}] for name in ("chosen", "rejected")},
            }
        tokenizer, calls = counting(byte_tokenizer())
        name = write(tmp_path / "r.jsonl", [record, *rows([1])])
        audit = load(settings(name, on_bad_row="drop", max_bad_fraction=1.0, overlong="drop"), tokenizer).audit
        assert audit.train.dropped == {"too_long": 1}
        assert f"{len(long) * 100_000}"[:3] in audit.train.dropped_rows[0]["detail"]
        assert max(len(text) for call in calls for text in call) < 1000


def test_people_are_told_how_far_a_long_reading_is(tmp_path, monkeypatch):
    file = tmp_path / "pairs.jsonl"
    file.write_text("".join(json.dumps({"prompt": f"q{i}", "chosen": " a", "rejected": " b"}) + "\n" for i in range(3)))
    lines: list[str] = []
    load(settings(file), byte_tokenizer(), say=lines.append)
    assert lines == []  # it took no time
    monkeypatch.setattr("align.data.load._PATIENCE_S", -1.0)
    load(settings(file), byte_tokenizer(), say=lines.append)
    assert [line.split(",")[0] for line in lines] == ["data: 1 rows read"]  # the next after some seconds
