"""Every place that rows can come from, and the sentence for those that cannot be read."""

from __future__ import annotations

import json
import time
from pathlib import Path

import datasets
import pytest

from align.data.load import load
from align.data.sources import BadRow, content_hash, locate, locate_all, read
from align.models.pretrained import byte_tokenizer
from tests.data.helpers import settings

ROWS = [{"prompt": f"Q{i}", "chosen": f"good {i}", "rejected": f"bad {i}"} for i in range(3)]


@pytest.fixture(autouse=True)
def private_cache(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "hf")


def make(kind: str, directory: Path) -> Path:
    path = directory / {"json": "r.json", "jsonl": "r.jsonl", "parquet": "r.parquet"}.get(kind, kind)
    if kind == "jsonl":
        path.write_text("\n".join(map(json.dumps, ROWS)))
    elif kind == "json":
        path.write_text(json.dumps(ROWS, indent=1))
    elif kind == "json-lines-in-json":
        path = directory / "lines.json"
        path.write_text("\n".join(map(json.dumps, ROWS)))
    elif kind == "json-bom":
        path = directory / "bom.json"
        path.write_bytes(b"\xef\xbb\xbf" + json.dumps(ROWS).encode())
    elif kind == "parquet":
        datasets.Dataset.from_list(ROWS).to_parquet(path)
    elif kind == "saved":
        datasets.Dataset.from_list(ROWS).save_to_disk(path)
    elif kind == "saved-dict":
        datasets.DatasetDict({"train": datasets.Dataset.from_list(ROWS)}).save_to_disk(path)
    else:
        (path / "data").mkdir(parents=True)
        datasets.Dataset.from_list(ROWS).to_parquet(path / "data" / "train-00000-of-00001.parquet")
    return path


@pytest.mark.parametrize(
    "kind", ["jsonl", "json", "json-lines-in-json", "json-bom", "parquet", "saved", "saved-dict", "hub-layout"]
)
def test_rows_are_the_same_from_everywhere(tmp_path, kind):
    path = make(kind, tmp_path)
    assert list(read(locate(str(path)))) == [(f"{path}:{i}", row) for i, row in enumerate(ROWS, 1)]


def test_list_of_sources_in_order(tmp_path):
    names = [str(make("jsonl", tmp_path)), str(make("parquet", tmp_path))]
    config = settings(names, max_bad_fraction=0.0)
    data = load(config, byte_tokenizer())
    assert [e.source for e in data.train] == [f"{n}:{i}" for n in names for i in (1, 2, 3)]
    assert data.audit.train.sources == names
    assert len(set(data.audit.train.sha256)) == 2


def test_nulls_of_a_table_are_absent_fields(tmp_path):
    path = tmp_path / "r.parquet"
    rows = [ROWS[0] | {"origin": "a", "chosen_finished": False}, ROWS[1] | {"origin": None, "chosen_finished": None}]
    datasets.Dataset.from_list(rows).to_parquet(path)
    data = load(settings(path, max_bad_fraction=0.0), byte_tokenizer())
    assert [e.origin for e in data.train] == ["a", ""]
    eos = byte_tokenizer().eos_token_id
    assert [int(e.rows[0].token_ids[-1]) == eos for e in data.train] == [False, True]
    assert data.audit.train.origins == {"a": 1}


@pytest.mark.parametrize("name", ["no_such_owner/no_such_set", "nosuchset:test_prefs", "nosuchset@config:train"])
def test_hub_without_network_is_one_line_and_fast(name):
    start = time.process_time()
    with pytest.raises(ValueError, match="cannot be loaded") as caught:
        list(read(locate(name)))
    assert time.process_time() - start < 5
    assert "\n" not in str(caught.value)
    assert str(caught.value).startswith(f"{name}: ")
    assert "check the name, the split and the network" in str(caught.value)


@pytest.mark.parametrize(
    "name", ["align:everyday/prompts.txt", "align:everyday", "align:nosuch.jsonl", "align:../../README.md"]
)
def test_align_names_only_shipped_data(name):
    with pytest.raises(ValueError, match="no such data file ships with the package"):
        locate(name)


def test_align_name_does_not_leave_the_package(tmp_path):
    path = make("jsonl", tmp_path)
    climb = "../" * 20 + str(path).lstrip("/")
    with pytest.raises(ValueError, match="no such data file ships"):
        locate(f"align:{climb}")


def test_shipped_everyday_is_located():
    source = locate("align:everyday/heldout.jsonl")
    where, row = next(read(source))
    assert where == "align:everyday/heldout.jsonl:1"
    assert {"prompt", "chosen", "rejected"} <= row.keys()


@pytest.mark.parametrize("names", [5, [], [""], "", None, ["a.jsonl", 3]])
def test_setting_that_names_nothing(names):
    with pytest.raises(ValueError, match=r"^data.heldout=.*: must be a file, a directory or a hub data set"):
        locate_all(names, "data.heldout")


@pytest.mark.parametrize("name", ["absent.jsonl", "./absent", "/absent", "~absent", "a/b/c", "absent.parquet"])
def test_absent_path_is_not_taken_for_a_hub_name(name):
    with pytest.raises(ValueError, match="no such file; give an existing file"):
        locate(name)


def test_unknown_suffix(tmp_path):
    (tmp_path / "rows.txt").write_text("a")
    with pytest.raises(ValueError, match="unknown kind of file; use .jsonl, .json, .csv"):
        locate(str(tmp_path / "rows.txt"))


@pytest.mark.parametrize(
    "text, part",
    [
        ('[{"a": 1},', "line 1 column"),
        ('[{"a": NaN}]', "NaN is not JSON"),
        ('[{"a": 1, "a": 2}]', "'a' stands twice"),
        ("[" * 100_000, "nested too deeply"),
        ("[" + "1" * 5000 + "]", "thousands of digits"),
        ("[\n1,\n]", "line 3 column 1"),
    ],
)
def test_broken_json_array(tmp_path, text, part):
    path = tmp_path / "r.json"
    path.write_text(text)
    with pytest.raises(ValueError, match=r"r.json: ") as caught:
        list(read(locate(str(path))))
    assert part.removeprefix("line 1 ") in str(caught.value)
    assert "one object a line" in str(caught.value)


def test_array_with_a_number_in_it(tmp_path):
    path = tmp_path / "r.json"
    path.write_text('[{"a": 1}, 2]')
    (_, first), (where, second) = read(locate(str(path)))
    assert first == {"a": 1}
    assert where == f"{path}:2"
    assert isinstance(second, BadRow)
    assert second.reason == "not_an_object"


def test_broken_parquet_and_missing_split(tmp_path):
    (tmp_path / "r.parquet").write_text("garbage")
    with pytest.raises(ValueError, match="r.parquet: cannot be loaded"):
        list(read(locate(str(tmp_path / "r.parquet"))))
    saved = tmp_path / "s"
    datasets.DatasetDict({"test": datasets.Dataset.from_list(ROWS)}).save_to_disk(saved)
    with pytest.raises(ValueError, match="holds the splits test"):
        list(read(locate(str(saved))))


def test_hash_follows_the_bytes(tmp_path):
    path = make("jsonl", tmp_path)
    before = content_hash(locate(str(path)))
    path.write_text(path.read_text().replace("good 1", "good 9"))
    assert content_hash(locate(str(path))) != before
    # sha256 of no bytes, as in FIPS 180
    path.write_text("")
    assert content_hash(locate(str(path))) == "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855"
