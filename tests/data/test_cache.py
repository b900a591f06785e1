"""Rendered data on disk: the same examples as rendering gives, made once, never of other data, and a run without it."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace

import numpy as np
import pytest

from align.cli import main
from align.data import cache
from align.data.load import fingerprint, load
from align.data.template import fix_date
from align.data.wanted import Wanted
from align.models.pretrained import CHATML, byte_tokenizer, tiny
from align.types import Example, Row
from tests.data.helpers import settings


def record(i: int) -> dict:
    return {"prompt": f"Question {i % 7}", "chosen": f"yes {i}", "rejected": f"no {i}", "origin": f"o{i % 2}"}


def write(path, records) -> str:
    path.write_text("\n".join(map(json.dumps, records)))
    return str(path)


@pytest.fixture
def set_up(tmp_path):
    """Settings of a file of 30 pairs of 7 prompts, a cache of their own, and what is said."""
    name = write(tmp_path / "r.jsonl", map(record, range(30)))
    said: list[str] = []
    return settings(name, cache_dir=str(tmp_path / "cache"), heldout_fraction=0.2), said


def started(config, said, wanted=Wanted(), tokenizer=None, seed=0):  # noqa: B008  frozen
    """The data of a start; what it says is in `said` alone."""
    said.clear()
    return cache.cached(config, tokenizer or byte_tokenizer(), wanted, seed, said.append, small=0)


def found(said) -> bool:
    return any("from the cache" in line for line in said) and not any("rendered" in line for line in said)


def assert_same(made: Row, known: Row) -> None:
    for one, other in ((made.token_ids, known.token_ids), (made.targets, known.targets)):
        assert one.dtype == other.dtype
        assert np.array_equal(one, other)
    assert (made.weights is None) == (known.weights is None)
    assert made.weights is None or np.array_equal(made.weights, known.weights)


def assert_equal(made, known) -> None:
    assert len(made) == len(known)
    for one, other in zip(made, known, strict=True):
        assert isinstance(one, Example)
        for name in ("source", "prompt", "origin", "label", "numbers"):
            assert getattr(one, name) == getattr(other, name)
        assert len(one.rows) == len(other.rows)
        assert list(one.extras) == list(other.extras)
        for a, b in zip((*one.rows, *one.extras.values()), (*other.rows, *other.extras.values()), strict=True):
            assert_same(a, b)


LABELLED = [
    {"prompt": f"Q {i}", "completion": f" a{i}", "label": i % 3 > 0, "numbers": {"x": i / 7}} for i in range(30)
]
WEIGHED = [
    {
        "messages": [
            {"role": "user", "content": f"Question {i}"},
            {"role": "assistant", "content": "Yes.", "weight": 0.25 if i % 3 else 1},
            {"role": "user", "content": "Sure?"},
            {"role": "assistant", "content": f"No {i}."},
        ]
    }
    for i in range(30)
]


@pytest.mark.parametrize(
    "records, wanted, changes",
    [
        ([record(i) for i in range(30)], Wanted(), {"repeat": [1.5]}),
        ([record(i) for i in range(30)], Wanted("labelled"), {}),
        (LABELLED, Wanted("labelled", mismatched=True), {}),
        (WEIGHED, Wanted("single"), {"max_tokens": 1000, "target_roles": ["user", "assistant"]}),
        (
            [*map(record, range(20)), {"prompt": "x", "chosen": "y" * 200, "rejected": "z"}],
            Wanted(),
            {"overlong": "drop"},
        ),
    ],
)
def test_a_second_start_has_the_examples_of_the_first(tmp_path, records, wanted, changes):
    name = write(tmp_path / "r.jsonl", records)
    config = settings(name, cache_dir=str(tmp_path / "cache"), heldout_fraction=0.2, **changes)
    rendered = load(config, byte_tokenizer(), wanted)
    said: list[str] = []
    first, second = started(config, said, wanted), started(config, said, wanted)
    assert found(said)
    for made in (first, second):
        assert_equal(made.train, rendered.train)
        assert_equal(made.heldout, rendered.heldout)
        assert made.audit == rendered.audit
        assert (made.sizes, made.chats) == (rendered.sizes, rendered.chats)
        assert made.hashes == {"data.train": fingerprint(rendered.train), "data.heldout": fingerprint(rendered.heldout)}
    assert fingerprint(list(second.train)) == second.hashes["data.train"]
    assert second.train[-1].source == rendered.train[-1].source
    assert [e.source for e in second.train[3:9:2]] == [e.source for e in rendered.train[3:9:2]]
    with pytest.raises(IndexError):
        second.train[len(rendered.train)]


def other_template(tokenizer):
    tokenizer.chat_template = tokenizer.chat_template.replace("<|im_end|>", "<|im_end|> ")
    return tokenizer


def more_tokens(tokenizer):
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|more|>"]})
    return tokenizer


@pytest.mark.parametrize(
    "change",
    [{"max_tokens": 99}, {"heldout_fraction": 0.3}, {"overlong": "drop"}, {"targets": "divergent"}, {"repeat": [2]}]
    + [
        {"on_bad_row": "drop"},
        {"target_roles": ["user"]},
        {"max_bad_fraction": 0.5},
        {"format": "tests.data.test_cache.same"},
    ],
)
def test_other_settings_are_another_set(set_up, change):
    config, said = set_up
    started(config, said)
    started(replace(config, **change), said)
    assert not found(said)
    started(config, said)
    assert found(said)


def same(record):
    return record


def test_other_rows_tokenizers_templates_objectives_and_seeds_are_another_set(set_up, tmp_path):
    config, said = set_up
    started(config, said)
    for change in ({"tokenizer": other_template(byte_tokenizer())}, {"tokenizer": more_tokens(byte_tokenizer())}):
        started(config, said, **change)
        assert not found(said)
    for change in ({"wanted": Wanted("labelled")}, {"seed": 1}):
        started(config, said, **change)
        assert not found(said)
    file = tmp_path / "r.jsonl"
    stat = file.stat()
    file.write_text(file.read_text().replace("yes 3", "yea 3", 1))
    os.utime(file, ns=(stat.st_atime_ns, stat.st_mtime_ns))  # neither its size nor its time tell
    started(config, said)
    assert not found(said)


@pytest.mark.parametrize("name", ["train.arrow", "heldout.arrow", "data.json", "manifest.json"])
@pytest.mark.parametrize("how", ["cut", "changed", "gone"])
def test_a_damaged_set_is_made_again(set_up, tmp_path, name, how):
    config, said = set_up
    known = started(config, said)
    (file,) = (tmp_path / "cache").glob(f"*/{name}")
    content = file.read_bytes()
    file.unlink()
    if how != "gone":
        half = len(content) // 2
        changed = bytes([content[half] ^ 1]) + content[half + 1 :] if how == "changed" else b""
        file.write_bytes(content[:half] + changed)
    made = started(config, said)
    assert any("is damaged" in line for line in said)
    assert_equal(made.train, load(config, byte_tokenizer()).train)
    assert made.hashes == known.hashes
    started(config, said)
    assert found(said)


DATED = "{{ strftime_now('%d %b %Y') }}" + CHATML


def test_a_template_takes_the_day_of_the_first_start_for_today(set_up, tmp_path):
    """Another day is another set."""
    asked = [{"prompt": [{"role": "user", "content": f"Q {i}"}], "chosen": "Yes.", "rejected": "No."} for i in range(9)]
    _, said = set_up
    config = settings(write(tmp_path / "dated.jsonl", asked), cache_dir=str(tmp_path / "cache"))
    texts = {}
    for day in ("2024-02-29", "2026-11-30", "2024-02-29"):
        tokenizer = byte_tokenizer()
        tokenizer.chat_template = DATED
        fix_date(tokenizer, day)
        texts[day] = tokenizer.decode(started(config, said, tokenizer=tokenizer).train[0].rows[0].token_ids)
    assert found(said)
    assert texts["2024-02-29"].startswith("29 Feb 2024<|im_start|>user")
    assert texts["2026-11-30"].startswith("30 Nov 2026<|im_start|>user")
    assert byte_tokenizer().chat_template == CHATML


def test_a_run_that_goes_on_after_midnight_goes_on_with_its_day(tmp_path, monkeypatch):
    """Its steps are those of a run that nobody stopped; one that begins on the next day has others."""
    model = tiny(0, 16, 1)
    model.model().save_pretrained(tmp_path / "model")
    tokenizer = model.tokenizer()
    tokenizer.chat_template = DATED
    tokenizer.save_pretrained(tmp_path / "model")
    train = write(tmp_path / "dated.jsonl", map(record, range(12)))
    clock = time.strftime

    def rows(name: str, day: str, steps: int) -> list[dict]:
        monkeypatch.setattr(time, "strftime", lambda form, *at: day if form == "%Y-%m-%d" else clock(form, *at))
        words = ["train", "recipe=dpo", "model=hub", f"model.path={tmp_path / 'model'}", f"data.train={train}",
                 "data.heldout_fraction=0", f"run.dir={tmp_path / name}", f"trainer.max_steps={steps}",
                 "trainer.schedule_steps=4", "trainer.batch_size=4", "trainer.precision=float32",
                 "trainer.num_samples=0",
                 "log.tensorboard=false", f"reference.cache_dir={tmp_path / 'reference'}"]  # fmt: skip
        assert main(words) == 0
        found = map(json.loads, (tmp_path / name / "metrics.jsonl").read_text().splitlines())
        return [{k: v for k, v in row.items() if not k.startswith("time/")} for row in found]

    straight = rows("straight", "2024-02-29", 4)
    assert rows("run", "2024-02-29", 2) == straight[:2]
    assert rows("run", "2024-03-01", 4) == straight
    assert json.loads((tmp_path / "run/resolved.json").read_text())["date"] == "2024-02-29"
    other = rows("other", "2024-03-01", 4)
    assert [row["logps/chosen"] for row in other] != [row["logps/chosen"] for row in straight]


def test_without_a_place_the_run_goes_on(set_up, tmp_path):
    config, said = set_up
    (tmp_path / "cache").write_text("a file")
    made = started(config, said)
    assert any("cannot be written, the run goes on without" in line for line in said)
    assert_equal(made.train, load(config, byte_tokenizer()).train)


READ_ONLY = """
import sys
from align.data import cache
from align.data.wanted import Wanted
from align.models.pretrained import byte_tokenizer
from tests.data.helpers import settings

config = settings(sys.argv[1], cache_dir=sys.argv[2], heldout_fraction=0.2)
print(len(cache.cached(config, byte_tokenizer(), Wanted(), 0, print, small=0).train))
"""


@pytest.mark.parametrize("filled", [True, False])
def test_a_place_that_can_only_be_read_is_read_or_done_without(set_up, tmp_path, filled):
    """A mount: permissions do not bind everybody."""
    config, said = set_up
    place = tmp_path / "cache"
    place.mkdir()
    size = len(started(config, said).train) if filled else len(load(config, byte_tokenizer()).train)
    mount = 'mount --bind "$1" "$1" && mount -o remount,ro,bind "$1" && shift && exec "$@"'
    inside = ["unshare", "-rm", "sh", "-c", mount, "sh", str(place)]
    if subprocess.run([*inside, "true"], capture_output=True).returncode:
        pytest.skip("mounts of a user's own are not allowed here")
    assert subprocess.run([*inside, "touch", str(place / "x")], capture_output=True).returncode
    done = subprocess.run(
        [*inside, sys.executable, "-c", READ_ONLY, config.train, str(place)], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    *told, count = done.stdout.splitlines()
    assert int(count) == size
    wanted = "examples from the cache" if filled else "cannot be written, the run goes on without"
    assert sum(wanted in line for line in told) == len(told) == 1


def test_a_full_disk_leaves_nothing_and_the_run_goes_on(set_up, tmp_path):
    import resource

    config, said = set_up
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    ignored = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2000, limits[1]))  # no file can be larger
    try:
        made = started(config, said)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, ignored)
    assert any("cannot be written, the run goes on without" in line for line in said)
    assert_equal(made.train, load(config, byte_tokenizer()).train)
    assert not [path for path in (tmp_path / "cache").iterdir() if path.is_dir()]
    assert not found(said)


def test_nothing_is_kept_of_little_and_of_a_loader(set_up, tmp_path):
    config, said = set_up
    cache.cached(config, byte_tokenizer(), Wanted(), 0, said.append)
    loader = replace(config, loader="tests.data.test_cache.thirty", heldout_fraction=0.0)
    started(loader, said)
    assert said == []
    assert not (tmp_path / "cache").exists()


def thirty(name):  # noqa: ARG001
    return map(record, range(30))


CHILD = """
import sys
from align.data import cache
from align.data.wanted import Wanted
from align.models.pretrained import byte_tokenizer
from tests.data.helpers import settings
from tests.data.test_cache import slow
data = cache.cached(
    settings(sys.argv[1], cache_dir=sys.argv[2], format="tests.data.test_cache.slow"),
    byte_tokenizer(), Wanted(), 0, lambda line: print(line, flush=True), small=0,
)
print(data.hashes["data.train"], flush=True)
"""


def slow(record):
    time.sleep(0.1)
    return record


def child(config):
    return subprocess.Popen(
        [sys.executable, "-c", CHILD, config.train, config.cache_dir], stdout=subprocess.PIPE, text=True
    )


@pytest.mark.slow
def test_two_processes_render_once(set_up):
    config, _ = set_up
    told = [process.communicate()[0] for process in [child(config), child(config)]]
    assert sorted("rendered" in one for one in told) == [False, True]
    assert len({one.splitlines()[-1] for one in told}) == 1
    waited = next(one for one in told if "rendered" not in one)
    assert "which renders the same rows" in waited or "from the cache" in waited.splitlines()[0]


@pytest.mark.slow
def test_killed_while_rendering_the_next_start_is_right(set_up, tmp_path):
    config, said = set_up
    first = child(config)
    while not list((tmp_path / "cache").glob("*.lock")):
        time.sleep(0.05)
    time.sleep(0.5)
    first.send_signal(signal.SIGKILL)
    first.wait()
    (tmp_path / "cache" / f".incomplete-{'0' * 32}").mkdir()  # of one that was killed while writing
    slowly = replace(config, format="tests.data.test_cache.slow", heldout_fraction=0.0)
    made = started(slowly, said)
    assert any("rendered" in line for line in said)
    assert not any("waits" in line for line in said)
    assert_equal(made.train, load(slowly, byte_tokenizer()).train)
    assert cache.clear(tmp_path / "cache")[0] == 1
    assert [path.suffix for path in (tmp_path / "cache").iterdir()] == [".lock"]


def test_the_list_tells_what_lies_there(set_up, tmp_path):
    config, said = set_up
    started(config, said)
    started(replace(config, max_tokens=99), said)
    first, second = cache.listed(tmp_path / "cache")
    assert first.used >= second.used
    assert (first.examples, first.sources, first.fault) == (25, config.train, "") or first.examples < 30
    os.utime(second.path / "data.json", (0, 0))
    assert cache.clear(tmp_path / "cache", unused_s=1000) == (1, second.bytes)
    assert [kept.path for kept in cache.listed(tmp_path / "cache")] == [first.path]


@pytest.mark.slow
def test_rows_of_several_processes_are_those_of_one(tmp_path):
    """2500 rows, so that others than the first process have some; every ninth is bad."""
    rows = [record(i) | ({"chosen": ""} if i % 9 == 0 else {}) for i in range(2500)]
    config = settings(write(tmp_path / "r.jsonl", rows), on_bad_row="drop", max_bad_fraction=1.0, workers=2)
    several = load(config, byte_tokenizer())
    alone = load(replace(config, workers=1), byte_tokenizer())
    assert several.audit == alone.audit
    assert several.hashes == alone.hashes
