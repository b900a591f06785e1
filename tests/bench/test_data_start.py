"""The benchmark of a start's data: pairs of the size that is asked for, all of them read by both ways."""

from __future__ import annotations

import json

import pytest

from tests.bench.data_start import align_start, datasets_map, write_pairs


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["text", "chat"])
def test_both_ways_read_all_pairs_of_the_size_asked_for(tmp_path, monkeypatch, kind):
    monkeypatch.setenv("HF_HOME", str(tmp_path))
    file = tmp_path / "pairs.jsonl"
    write_pairs(file, 200, 600, kind)
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    sizes = [len(json.dumps(list(row.values()))) - (0 if kind == "text" else 100) for row in rows]
    assert 500 < sum(sizes) / len(sizes) < 750
    assert len({json.dumps(row) for row in rows}) == 200
    assert align_start(file, kind, 1) == 200
    assert datasets_map(file, kind, 1) == 200
