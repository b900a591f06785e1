"""The two splits: what is kept back, what leaks, and when data count as the same."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest

from align.data.load import fingerprint, load
from align.pretrained import byte_tokenizer
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
