"""The experiments' data: seeded, disjoint, labelled as told."""

from __future__ import annotations

import json

import numpy as np
import pytest

from align.data.formats import parse
from align.evaluate.overoptimisation import report
from tests.experiments import kjv

SIZES = {"n_train": 400, "n_valid": 100, "n_ood": 80, "n_pool": 300}


@pytest.fixture(scope="module")
def data() -> kjv.Dataset:
    return kjv.pairs(0, **SIZES)


def texts_of(pairs) -> list[str]:
    return [text.text for pair in pairs for text in (pair.chosen, pair.rejected)]


def test_the_same_seed_gives_the_same_data_and_another_one_other_data(data):
    assert kjv.pairs(0, **SIZES) == data
    other = kjv.pairs(1, **SIZES)
    assert len(set(texts_of(other.train)) & set(texts_of(data.train))) < 100  # of 800, by chance about 20
    assert other.flipped.tolist() != data.flipped.tolist()
    assert other.ood != data.ood


def test_no_text_is_in_two_parts_or_two_pairs(data):
    train, valid, pool = texts_of(data.train), texts_of(data.valid), [t.text for t in data.pool]
    taught = [t.text for t in data.texts]
    ood = set(texts_of(data.ood))
    for part in (train, valid, pool, taught):
        assert len(set(part)) == len(part)
    assert not set(train) & set(valid)
    assert not set(pool) & (set(train) | set(valid))
    assert not set(taught) & (set(valid) | set(pool))
    assert set(train) <= set(taught)
    assert len(taught) + len(valid) + len(pool) == len(kjv.verses())
    assert not ood & {t.text for t in kjv.verses()}
    assert len({frozenset((p.chosen, p.rejected)) for p in data.ood}) == SIZES["n_ood"]


def test_labels_follow_gold_but_for_the_flipped_ones(data):
    assert data.flipped.sum() == 100  # a quarter of 400
    for pair in (*data.train, *data.valid, *data.ood):
        gap = pair.chosen.gold - pair.rejected.gold
        assert (gap < -kjv.MIN_GAP) if pair.flipped else (gap > kjv.MIN_GAP)
    assert not any(pair.flipped for pair in (*data.valid, *data.ood))
    # flips are no function of the place or of the gap
    assert 30 < data.flipped[:200].sum() < 70
    assert not kjv.pairs(0, **SIZES, flip=0.0).flipped.any()
    assert kjv.pairs(0, **SIZES, flip=1.0).flipped.all()


def test_more_training_pairs_leave_the_others_as_they_are(data):
    more = kjv.pairs(0, **(SIZES | {"n_train": 800}))
    assert (more.valid, more.ood, more.pool) == (data.valid, data.ood, data.pool)
    plain = [frozenset((p.chosen, p.rejected)) for p in more.train[:400]]
    assert plain == [frozenset((p.chosen, p.rejected)) for p in data.train]


def test_the_story_is_without_its_edition():
    story = [t.text for t in kjv.story()]
    assert 300 < len(story) < 450
    assert story[0].startswith("Little though they seem to think of it")
    assert not [t for t in story if "Gutenberg" in t or "Redactor" in t or "eBook" in t]


def test_gold_tells_kind_words_from_hard_ones():
    def mean_of(word: str) -> float:
        return float(np.mean([t.gold for t in kjv.verses() if word in t.text.lower().split()]))

    assert mean_of("love") > 0.3
    assert mean_of("evil") < -0.2
    gold = [t.gold for t in kjv.verses()]
    assert -1 <= min(gold) < -0.9
    assert 0.9 < max(gold) <= 1


def test_the_files(tmp_path, data):
    kjv.write_pairs(tmp_path / "train.jsonl", data.train)
    rows = [json.loads(line) for line in (tmp_path / "train.jsonl").read_text().splitlines()]
    assert [r["numbers"]["flipped"] == 1 for r in rows] == data.flipped.tolist()
    for row, pair in zip(rows, data.train, strict=True):
        record = parse(row)
        assert record.kind == "pair"
        assert dict(record.numbers)["gold_chosen"] == pair.chosen.gold
    kjv.write_pool(tmp_path / "pool.jsonl", data.pool)
    pool = [json.loads(line) for line in (tmp_path / "pool.jsonl").read_text().splitlines()]
    assert [(r["completion"], r["gold"]) for r in pool] == [(t.text, t.gold) for t in data.pool]
    kjv.write_texts(tmp_path / "texts.jsonl", data.texts)
    assert sum(1 for _ in (tmp_path / "texts.jsonl").open()) == len(data.texts)


def test_the_pool_goes_into_the_curves(data):
    gold = [t.gold for t in data.pool]
    row = kjv.scored(data.pool, {"gold": gold, "length": [len(t.text) for t in data.pool]}, seed=0)
    curves = report([("pool:1", row)])["curves"]
    assert curves["gold"]["gold"][-1]["mean"] > 1
    assert abs(curves["length"]["gold"][3]["mean"]) < 0.5  # best of 8 by length says little of sentiment
    with pytest.raises(ValueError, match="short: 1 scores of 300 texts"):
        kjv.scored(data.pool, {"short": [1.0]}, seed=0)


def test_more_than_there_is_is_refused():
    with pytest.raises(ValueError, match=r"n_train=20000 and n_valid=1: there are \d+ pairs; ask for fewer"):
        kjv.pairs(0, 20_000, 1, 1)
    with pytest.raises(ValueError, match=r"n_ood=100000: there are \d+ pairs of sentences"):
        kjv.pairs(0, 1, 1, 100_000)
    with pytest.raises(ValueError, match=r"n_pool=50000: there are \d+ verses"):
        kjv.pairs(0, 1, 1, 1, n_pool=50_000)
    with pytest.raises(ValueError, match="flip=1.5: must be from 0 to 1"):
        kjv.pairs(0, 1, 1, 1, flip=1.5)
