"""Examples as they are read: the ones that reading the whole set gives, in an order that a place in it tells."""

from __future__ import annotations

import gzip
import json
from collections import Counter
from functools import partial
from itertools import count

import datasets
import pytest

from align.data.audit import Audit
from align.data.load import load, understanding
from align.data.sources import locate_all
from align.data.splits import Reader
from align.data.streams import Stream, StreamFault, Streams, shuffled
from align.data.wanted import Wanted
from align.models.pretrained import byte_tokenizer
from tests.data.helpers import settings

ROWS = [{"prompt": f"Question {i}?", "chosen": f" good {i}", "rejected": f" bad {i}"} for i in range(23)]
HELPSTEER = [
    {"prompt": f"Q {i // 2}", "response": f"answer {i}", "helpfulness": i % 2, "correctness": 1, "coherence": 1,
     "complexity": 1, "verbosity": 1}
    for i in range(8)
]  # fmt: skip
RANKED = [{"prompt": f"Q {i}", "ranked": ["a", f"b {i}", "c"]} for i in range(9)]


@pytest.fixture(autouse=True)
def private_cache(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "hf")


def streams(config, wanted=Wanted(), seed=0, heldout=()):  # noqa: B008  frozen
    make = partial(understanding, byte_tokenizer(), None, config, wanted, False)
    reader = Reader(config, make, lambda row: row.examples[0].prompt.token_ids)
    audit = Audit()
    sources = locate_all(config.train, "data.train", config.loader)
    found = [Stream(reader, source, "data.train", (seed, k), audit.train) for k, source in enumerate(sources)]
    return Streams(found, audit, heldout, set())


def lines(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def told(examples):
    """All that is learnt of each example."""
    return Counter(
        (e.prompt.text, e.label, e.origin, *((row.token_ids.tobytes(), row.targets.tobytes()) for row in e.rows))
        for e in examples
    )


# ---------------------------------------------------------------------- the order


def test_every_row_comes_once_and_none_before_the_buffer_has_read_it():
    for size in (1, 5, 100):
        order = list(shuffled(range(60), size, [0]))
        assert sorted(order) == list(range(60))
        assert all(row < place + size for place, row in enumerate(order))
    assert list(shuffled(range(60), 1, [0])) == list(range(60))
    assert list(shuffled(range(60), 5, [0])) == list(shuffled(range(60), 5, [0])) != list(shuffled(range(60), 5, [1]))


def test_a_buffer_of_the_whole_set_gives_every_order_alike():
    """Three rows, 6000 seeds: each of the six orders 1000 times, four deviations (29 each) at most from it."""
    orders = Counter(tuple(shuffled("abc", 3, [seed])) for seed in range(6000))
    assert len(orders) == 6
    assert all(abs(times - 1000) < 116 for times in orders.values())


def test_the_next_pass_has_the_same_rows_in_another_order(tmp_path):
    found = streams(settings(lines(tmp_path / "r.jsonl", ROWS), shuffle_buffer=10))
    first, second = found.take([23]), found.take([23])
    assert told(first) == told(second)
    assert [e.source for e in first] != [e.source for e in second]
    assert found.passes == 1  # the second is over when a row of the third is asked for
    assert found.audit.train.rows_in == 46


# ---------------------------------------------------------------------- the same examples as reading all


def _files(path, kind, rows):
    if kind == "gz":
        (path / "r.jsonl.gz").write_bytes(gzip.compress("".join(json.dumps(r) + "\n" for r in rows).encode()))
        return path / "r.jsonl.gz"
    if kind == "csv":
        datasets.Dataset.from_list(rows).to_csv(path / "r.csv", index=False)
        return path / "r.csv"
    if kind == "json":
        (path / "r.json").write_text(json.dumps(rows))
        return path / "r.json"
    if kind == "parquet":
        datasets.Dataset.from_list(rows).to_parquet(path / "r.parquet")
        return path / "r.parquet"
    if kind == "saved":
        datasets.Dataset.from_list(rows).save_to_disk(path / "saved")
        return path / "saved"
    folder = path / "folder"
    folder.mkdir()
    for part, some in enumerate((rows[:9], rows[9:11], rows[11:])):
        if kind == "folder":
            lines(folder / f"train-{part}.jsonl", some)
        else:
            datasets.Dataset.from_list(some).to_parquet(folder / f"train-{part:05}-of-00003.parquet")
    return folder


@pytest.mark.parametrize("kind", ["gz", "csv", "json", "parquet", "saved", "folder", "folder of parquet"])
def test_a_pass_gives_what_reading_the_whole_source_gives(tmp_path, kind):
    config = settings(_files(tmp_path, kind, ROWS), shuffle_buffer=4)
    whole = load(config, byte_tokenizer())
    found = streams(config)
    assert told(found.take([len(ROWS)])) == told(whole.train)
    read, kept = vars(found.audit.train), vars(whole.audit.train)
    assert {k: v for k, v in read.items() if k != "sha256"} == {k: v for k, v in kept.items() if k != "sha256"}


@pytest.mark.parametrize(
    ("rows", "wanted", "more"),
    [
        (ROWS, Wanted("labelled"), {}),
        (ROWS, Wanted("single"), {"columns": {"completion": "chosen"}, "ignore": ["rejected"]}),
        (RANKED, Wanted("pair"), {}),
        (RANKED, Wanted("ranked"), {}),
        (HELPSTEER, Wanted("pair"), {"form": "helpsteer"}),
        ([{**row, "source": "x", "note": "n" * (i % 2)} for i, row in enumerate(ROWS)], Wanted(), {}),
    ],
)
def test_a_pass_gives_it_for_every_kind_of_row(tmp_path, rows, wanted, more):
    config = settings(lines(tmp_path / "r.jsonl", rows), shuffle_buffer=3, **more)
    whole = load(config, byte_tokenizer(), wanted)
    found = streams(config, wanted)
    assert told(found.take([len(whole.train)])) == told(whole.train)
    read, kept = vars(found.audit.train), vars(whole.audit.train)
    assert {k: v for k, v in read.items() if k != "sha256"} == {k: v for k, v in kept.items() if k != "sha256"}


def test_files_of_a_folder_come_in_another_order_in_each_pass(tmp_path):
    folder = _files(tmp_path, "folder", ROWS)
    found = streams(settings(folder, shuffle_buffer=1))
    passes = [[e.source.rpartition(":")[0][-7] for e in found.take([23])] for _ in range(4)]
    assert {"".join(sorted(p)) for p in passes} == {"0" * 9 + "1" * 2 + "2" * 12}
    assert len({"".join(p) for p in passes}) > 1


def forever(name):
    assert name == "numbers"
    return (ROWS[i % 23] | {"prompt": f"Question {i}?"} for i in count())


def test_a_source_without_an_end_is_read_as_far_as_it_is_asked_for():
    found = streams(settings("numbers", loader=f"{__name__}.forever", shuffle_buffer=50))
    assert len(told(found.take([200]))) == 200
    assert found.audit.train.rows_in == 200


def test_held_out_prompts_that_come_are_counted(tmp_path):
    config = settings(lines(tmp_path / "r.jsonl", ROWS), shuffle_buffer=1)
    heldout = load(settings(lines(tmp_path / "h.jsonl", [*ROWS[2:4], ROWS[9]])), byte_tokenizer()).train
    found = streams(config, heldout=heldout)
    found.take([3])
    assert found.audit.prompts_in_both == 1
    found.take([23])
    assert found.audit.prompts_in_both == 3


# ---------------------------------------------------------------------- to go on


@pytest.mark.parametrize("rows", [ROWS, RANKED], ids=["pairs", "three of a row"])
def test_it_goes_on_from_every_place(tmp_path, rows):
    config = settings([str(lines(tmp_path / f"{name}.jsonl", rows)) for name in "ab"], shuffle_buffer=6)
    straight = streams(config)
    states, taken = [], []
    for _ in range(20):
        states.append(json.loads(json.dumps(straight.state())))
        taken.append(straight.take([4, 1]))
    account = straight.state()
    for at in (0, 1, 3, 7, 12, 19):
        again = streams(config)
        again.restore(states[at])
        assert again.state() == states[at]
        for there in taken[at:]:
            here = again.take([4, 1])
            assert [e.source for e in here] == [e.source for e in there]
            assert told(here) == told(there)
        assert again.state() == account


@pytest.mark.parametrize("change", ["changed", "gone"])
def test_other_rows_before_the_place_are_refused(tmp_path, change):
    path = lines(tmp_path / "r.jsonl", ROWS)
    config = settings(path, shuffle_buffer=3)
    found = streams(config)
    found.take([8])
    state = found.state()
    lines(path, [ROWS[0] | {"chosen": "other"}, *ROWS[1:]] if change == "changed" else ROWS[:7])
    with pytest.raises(ValueError, match=r"r\.jsonl: has other rows than when the run was started"):
        streams(config).restore(state)


# ---------------------------------------------------------------------- what cannot be used


def test_a_bad_row_ends_it_where_it_comes_and_can_be_mended(tmp_path):
    path = tmp_path / "r.jsonl"
    bad = [*ROWS[:5], {"prompt": "Q", "chosen": "a"}, *ROWS[5:]]
    config = settings(lines(path, bad), shuffle_buffer=2)
    found = streams(config)
    seen = found.take([3])
    state = json.loads(json.dumps(found.state()))
    with pytest.raises(StreamFault, match=r"r\.jsonl:6: .*data\.on_bad_row=drop leaves such rows out"):
        found.take([10])
    lines(path, [*bad[:5], {"prompt": "Q", "chosen": "a", "rejected": "b"}, *bad[6:]])
    mended = streams(config)
    mended.restore(state)
    assert len(told([*seen, *mended.take([21])])) == 24


def _with_bad(every, total):
    return [{"prompt": "Q"} if i % every == 0 else ROWS[i % 23] | {"prompt": f"Q {i}"} for i in range(1, total + 1)]


def test_a_share_of_bad_rows_is_judged_as_they_come_and_at_the_end_of_a_source(tmp_path):
    """1 % of the first thousand are 10; of a source of fewer rows the share is known at its end."""
    path = lines(tmp_path / "r.jsonl", _with_bad(20, 2000))
    config = settings(path, shuffle_buffer=1, on_bad_row="drop", max_bad_fraction=0.01)
    found = streams(config)
    assert len(found.take([209])) == 209  # the eleventh bad row is row 220
    with pytest.raises(StreamFault, match=r"5\.0% of 220 rows are bad \(11 missing_field\)"):
        found.take([1])
    enough = streams(settings(path, shuffle_buffer=1, on_bad_row="drop", max_bad_fraction=0.05))
    assert len(enough.take([1900])) == 1900
    assert enough.audit.train.dropped == {"missing_field": 99}
    few = streams(settings(lines(path, _with_bad(20, 100)), shuffle_buffer=1, on_bad_row="drop"))
    few.take([95])
    with pytest.raises(StreamFault, match=r"5\.0% of 100 rows are bad"):
        few.take([1])


def test_overlong_rows_and_doubts_are_judged_too(tmp_path):
    long = [row | {"chosen": "x" * 200} if i == 4 else row for i, row in enumerate(ROWS)]
    found = streams(settings(lines(tmp_path / "r.jsonl", long), shuffle_buffer=1, max_bad_fraction=0.0))
    with pytest.raises(StreamFault, match=r"1 of 5 rows are longer than data\.max_tokens=100 .*r\.jsonl:5"):
        found.take([5])
    doubtful = [row | {"chosen": "Assistant: yes"} if i == 4 else row for i, row in enumerate(ROWS)]
    found = streams(settings(lines(tmp_path / "r.jsonl", doubtful), shuffle_buffer=1, max_bad_fraction=0.01))
    found.take([23])
    with pytest.raises(StreamFault, match=r"r\.jsonl:5: .* 1 of 23 rows do, more than data\.max_bad_fraction=0\.01"):
        found.take([1])


def once(name, rows=iter(ROWS)):  # noqa: ARG001, B008  what a careless loader does
    return rows


def test_a_source_that_has_rows_only_once_is_told(tmp_path):
    found = streams(settings("numbers", loader=f"{__name__}.once", shuffle_buffer=4))
    found.take([23])
    with pytest.raises(StreamFault, match="numbers: has no rows when it is read again"):
        found.take([1])
    with pytest.raises(StreamFault, match=r"empty\.jsonl: has no rows; give a source with at least one"):
        streams(settings(lines(tmp_path / "empty.jsonl", []))).take([1])


def test_a_column_that_no_row_has_is_told_at_the_end_of_the_first_pass(tmp_path):
    rows = [{k: v for k, v in row.items() if k != "prompt"} | {"question": row["prompt"]} for row in ROWS]
    path = lines(tmp_path / "r.jsonl", rows)
    config = settings(path, columns={"prompt": ["question", "context"]}, shuffle_buffer=1)
    found = streams(config)
    found.take([23])
    with pytest.raises(StreamFault, match="the rows have no column 'context'"):
        found.take([1])


def test_the_account_names_a_hundred_rows_of_a_kind_and_counts_all(tmp_path):
    config = settings(
        lines(tmp_path / "r.jsonl", _with_bad(2, 400)), shuffle_buffer=1, on_bad_row="drop", max_bad_fraction=0.6
    )
    found = streams(config)
    found.take([199])
    assert found.audit.train.dropped == {"missing_field": 198}
    assert len(found.audit.train.dropped_rows) == 100


def test_what_cannot_be_read_further_is_told_with_its_place(tmp_path):
    path = tmp_path / "r.jsonl.gz"
    packed = gzip.compress("".join(json.dumps(ROWS[i % 23]) + "\n" for i in range(20000)).encode(), 1)
    path.write_bytes(packed[: len(packed) // 2])
    found = streams(settings(path, shuffle_buffer=1))
    with pytest.raises(StreamFault, match=r"r\.jsonl\.gz: cannot be unpacked"):
        found.take([20000])
    path = tmp_path / "r.parquet"
    datasets.Dataset.from_list(ROWS).to_parquet(path)
    whole = path.read_bytes()
    path.write_bytes(whole[:8] + bytes(len(whole) - 600) + whole[-592:])
    with pytest.raises(StreamFault, match=r"r\.parquet.*cannot be (read|loaded)"):
        streams(settings(path)).take([1])
