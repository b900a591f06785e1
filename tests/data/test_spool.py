"""Examples that lie in a temporary file are those that were put there."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from align.data.load import fingerprint, load
from align.data.spool import Spool
from align.data.wanted import Wanted
from align.models.pretrained import byte_tokenizer
from align.types import Example, Prompt, Row
from tests.data.helpers import settings


def examples(count: int) -> list[Example]:
    rng = np.random.default_rng(0)
    out = []
    for i in range(count):
        rows = []
        for _ in range(2):
            ids = rng.integers(0, 300, rng.integers(2, 9)).astype(np.int32)
            weights = rng.random(len(ids)).astype(np.float32) if i % 3 == 0 else None
            rows.append(Row(ids, np.arange(len(ids)) > 0, weights))
        extras = {"mismatched": rows[1]} if i % 5 == 0 else {}
        own = Prompt(tuple(rows[0].token_ids[:1].tolist()), f"q{i}")
        out.append(Example(tuple(rows), f"f:{i}", own, "o" * (i % 2), i % 2 == 0, extras, {"a": i / 7}))
    return out


def told(example: Example) -> object:
    rows = [
        (r.token_ids.tolist(), r.targets.tolist(), None if r.weights is None else r.weights.tolist())
        for r in (*example.rows, *example.extras.values())
    ]
    return rows, list(example.extras), replace(example, rows=(), extras={})


@pytest.mark.parametrize("full", [False, True])
def test_examples_come_back_as_they_were(full, monkeypatch):
    monkeypatch.setattr("align.data.spool._HELD", 1000)
    if full:  # no room for a temporary file

        def refuse(*_):
            raise OSError(28, "No space left on device")

        monkeypatch.setattr("align.data.spool.tempfile.TemporaryFile", refuse)
    all_of_them, spool = examples(3200), Spool()
    assert [spool.add(example) for example in all_of_them] == list(range(3200))
    assert len(spool._last) == 200
    order = np.random.default_rng(1).permutation(3200).tolist()
    found = spool.examples(order)
    assert len(found) == 3200
    assert [told(example) for example in found] == [told(all_of_them[i]) for i in order]
    assert fingerprint(found) == fingerprint([all_of_them[i] for i in order])


def test_few_examples_stay_in_memory():
    all_of_them, spool = examples(1500), Spool(all_in_memory=True)
    for example in all_of_them:
        spool.add(example)
    assert spool.examples([3, 3, 1499]) == [all_of_them[3], all_of_them[3], all_of_them[1499]]


@pytest.mark.parametrize("wanted", [Wanted(), Wanted(kind="labelled", mismatched=True)])
def test_many_rows_are_loaded_as_few_are(wanted, tmp_path, monkeypatch):
    file = tmp_path / "pairs.jsonl"
    rows = [{"prompt": f"q{i % 1700}", "chosen": f" a{i}", "rejected": " b"} for i in range(2600)]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = settings(file, heldout_fraction=0.1, repeat=[1.5], empty_prompts=True)

    def loaded():
        data = load(config, byte_tokenizer(), wanted, seed=3)
        return [told(e) for part in (data.train, data.heldout) for e in part], data.audit.as_dict(), data.sizes

    in_memory = loaded()
    monkeypatch.setattr("align.data.spool._HELD", 1000)
    assert loaded() == in_memory


_PEAK = """
import resource, sys
from align.data.load import load
from align.models.pretrained import byte_tokenizer
from tests.data.helpers import settings
from pathlib import Path
load(settings(Path(sys.argv[1]), max_tokens=4000), byte_tokenizer())
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
"""


@pytest.mark.slow
def test_memory_does_not_grow_with_the_rows(tmp_path):
    """Peaks of 3 000 and 12 000 pairs of some 600 bytes, each of which would take 10 kB."""
    peaks = []
    for count in (3_000, 12_000):
        file = tmp_path / f"{count}.jsonl"
        with file.open("w") as out:
            for i in range(count):
                said = f"{i:06d} " * 90
                out.write(json.dumps({"prompt": said[:180], "chosen": said[180:], "rejected": said[200:]}) + "\n")
        done = subprocess.run(
            [sys.executable, "-c", _PEAK, str(file)], stdout=subprocess.PIPE, check=True, text=True, cwd=Path.cwd()
        )
        peaks.append(int(done.stdout))
    assert peaks[1] - peaks[0] < 9_000 * 1.5  # kB
