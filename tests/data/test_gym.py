"""Generated problems as rows: which ones a name means, what travels with them, and that none is in both splits."""

from __future__ import annotations

import json
import re

import pytest

from align.cli import main
from align.config import compose
from align.data import gym
from align.data.load import load
from align.data.prompts import load_prompts, prompts_fingerprint
from align.data.reasoning import problems
from align.data.sources import content_hash, locate, read
from align.data.wanted import Wanted
from align.models.pretrained import byte_tokenizer
from tests.data.helpers import settings

# sums of two terms of one digit: 200 different questions at most, so that two seeds soon meet
SMALL = "min_terms:2/max_terms:2/min_digits:1/max_digits:1"
EASY = "min_terms:2/max_terms:3/min_digits:1/max_digits:2"


def rows(name: str) -> list[dict]:
    return [row for _, row in read(locate(name))]  # type: ignore[misc]


def questions(name: str) -> list[str]:
    return [row["prompt"][0]["content"] for row in rows(name)]


def test_a_name_is_task_numbers_and_settings():
    found = gym.parse_name("gym:chain_sum/size:8/skip:2/min_terms:3/p:0.5/allow_negation:true/style:plain/w:[1,2]")
    assert (found.task, found.size, found.seed, found.skip) == ("chain_sum", 8, 0, 2)
    assert found.settings == {"min_terms": 3, "p": 0.5, "allow_negation": True, "style": "plain", "w": [1, 2]}


@pytest.mark.parametrize(
    "name, said",
    [
        ("gym:chain_sum", "how many problems"),
        ("gym:", "names no task"),
        ("gym:size:8", "names no task"),
        ("gym:chain_sum/8", "8 is not KEY:VALUE"),
        ("gym:chain_sum/size:8/", "an empty word is not KEY:VALUE"),
        ("gym:chain_sum/size:", "size: is not KEY:VALUE"),
        ("gym:chain_sum/size:8/size:9", "size stands twice"),
        ("gym:chain_sum/size:0", "size:0 must be a whole number of at least 1"),
        ("gym:chain_sum/size:8/seed:x", "seed:x must be a whole number of at least 0"),
        ("gym:chain_sum/size:8/skip:-1", "skip:-1 must be a whole number of at least 0"),
        ("gym:chain_sum/size:true", "size:True must be a whole number"),
    ],
)
def test_impossible_names_are_refused_before_anything_is_drawn(name, said):
    with pytest.raises(ValueError, match=f"^{re.escape(name)}: .*{said}"):
        locate(name)


@pytest.mark.parametrize(
    "name, said",
    [
        ("gym:no_such_task/size:2", "not registered"),
        ("gym:chain_sum/size:2/no_such:1", "no_such"),
        (f"gym:chain_sum/size:1990/skip:10/{SMALL}", r"different questions, 2000 are wanted \(size \+ skip\)"),
    ],
)
def test_impossible_problems_are_refused_by_name(name, said):
    with pytest.raises(ValueError, match=said) as raised:
        rows(name)
    assert str(raised.value).startswith(name)


@pytest.mark.parametrize(
    "words", ["chain_sum/size:4/min_terms:9", "chain_sum/size:4/foo:1", "gcd/size:4/min_numbers:x"]
)
def test_settings_are_refused_from_the_sources_as_they_are_when_problems_are_drawn(words):
    asked = gym.parse_name(f"gym:{words}")
    with pytest.raises(ValueError) as drawn:  # noqa: PT011
        gym.rows(asked)
    with pytest.raises(ValueError) as checked:  # noqa: PT011
        gym.check_task(asked.task, asked.settings, asked.name)
    assert str(checked.value) == str(drawn.value)


def test_no_task_is_refused_with_the_settings_that_it_has():
    from reasoning_gym.factory import DATASETS

    for task in set(DATASETS) - {"composite"}:  # which must be told of what
        gym.check_task(task, None, task)


def test_a_row_can_be_imitated_asked_and_scored():
    """The first sum of the task with these settings, from reasoning-gym itself.

    Its seed is the upper 31 bits of the first word of numpy's SeedSequence(3), the same on every machine.
    """
    import reasoning_gym

    dataset = reasoning_gym.create_dataset(
        "chain_sum", size=1, seed=788445325, min_terms=2, max_terms=3, min_digits=1, max_digits=2
    )
    entry = dataset[0]
    (row,) = rows(f"gym:chain_sum/size:1/seed:3/{EASY}")
    assert row["prompt"] == [{"role": "user", "content": entry["question"]}]
    assert row["completion"] == [{"role": "assistant", "content": entry["answer"]}]
    assert (row["answer"], row["task"]) == (entry["answer"], "chain_sum")
    assert row["entry"].keys() == {"question", "answer", "metadata"}
    assert row["entry"]["metadata"]["expression"] == entry["metadata"]["expression"]
    assert dataset.score_answer(row["answer"], row["entry"]) == 1.0
    assert eval(entry["metadata"]["expression"]) == int(row["answer"])  # noqa: S307


def test_the_same_name_gives_the_same_rows_and_hash():
    name = f"gym:chain_sum/size:20/seed:1/{EASY}"
    first, digest = rows(name), content_hash(locate(name))
    gym._lines.cache_clear()
    assert (rows(name), content_hash(locate(name))) == (first, digest)
    assert content_hash(locate(name.replace("seed:1", "seed:2"))) != digest
    assert [where for where, _ in read(locate(name))][:2] == [f"{name}:1", f"{name}:2"]
    first[0]["answer"] = "spoilt"
    assert rows(name)[0]["answer"] != "spoilt"


def test_skip_takes_the_following_problems():
    """The first 30 questions in two parts; they are those that collecting draws."""
    whole = questions(f"gym:chain_sum/size:30/{SMALL}")
    assert questions(f"gym:chain_sum/size:20/{SMALL}") == whole[:20]
    assert questions(f"gym:chain_sum/size:10/skip:20/{SMALL}") == whole[20:]
    assert len(set(whole)) == 30
    tiny = {"min_terms": 2, "max_terms": 2, "min_digits": 1, "max_digits": 1}
    assert [p.question for p in problems("chain_sum", tiny, 30, 0, 0).train] == whole


def test_a_heldout_question_that_training_has_is_left_out():
    """Two seeds of a small task share questions: 60 of about 200 each."""
    train, heldout = f"gym:chain_sum/size:60/seed:0/{SMALL}", f"gym:chain_sum/size:60/seed:1/{SMALL}"
    shared = set(questions(train)) & set(questions(heldout))
    assert 0 < len(shared) < 60
    config = settings(train, heldout=heldout, max_tokens=400)
    tokenizer = byte_tokenizer()
    asked = load_prompts(config, tokenizer, 20)
    imitated = load(config, tokenizer, Wanted(kind="single"))
    left = [q for q in questions(heldout) if q not in shared]
    assert [row.text for row in asked.heldout] == [e.prompt.text for e in imitated.heldout] == left
    assert [row.text for row in asked.train] == questions(train)
    for audit in (asked.audit, imitated.audit):
        assert audit.heldout.dropped == {"also_in_train": len(shared)}
        assert audit.prompts_in_both == 0
        assert audit.as_dict()["heldout"]["rows_in"] == 60


def test_heldout_problems_that_are_all_in_training_are_refused():
    name = f"gym:chain_sum/size:5/{SMALL}"
    with pytest.raises(ValueError, match=f"data.heldout={name}: every question also stands in data.train"):
        load_prompts(settings(name, heldout=name, max_tokens=400), byte_tokenizer(), 20)


def test_prompts_carry_what_a_verifier_needs():
    name = f"gym:chain_sum/size:3/{EASY}"
    found = load_prompts(settings(name, max_tokens=400), byte_tokenizer(), 20).train
    assert [dict(row.fields) for row in found] == [
        {key: value for key, value in row.items() if key != "prompt"} for row in rows(name)
    ]
    json.dumps([dict(row.fields) for row in found])
    assert prompts_fingerprint(found) == prompts_fingerprint(
        load_prompts(settings(name, max_tokens=400), byte_tokenizer(), 20).train
    )


def test_tasks_without_an_answer_cannot_be_imitated_but_asked():
    (row,) = rows("gym:rubiks_cube/size:1")
    assert row["answer"] is None
    assert "completion" not in row
    config = settings("gym:rubiks_cube/size:1", max_tokens=4000)
    assert len(load_prompts(config, byte_tokenizer(), 20).train) == 1
    with pytest.raises(ValueError, match="'completion' is missing"):
        load(config, byte_tokenizer(), Wanted(kind="single"))


def test_the_command_line_takes_a_name_without_quotes(capsys):
    name = f"gym:chain_sum/size:8/seed:0/{EASY}"
    assert compose(["model=tiny", f"data.train={name}"]).data.train == name
    both = compose(["model=tiny", f"data.train=[{name},{name}]"]).data.train
    assert both == [name, name]
    assert main(["check", "model=tiny", "objective=nll", f"data.train={name}"]) == 0
    heldout = f"data.heldout=gym:chain_sum/size:60/seed:1/{SMALL}"
    both = ["model=tiny", "objective=nll", f"data.train=gym:chain_sum/size:60/seed:0/{SMALL}", heldout]
    assert main(["data", "check", *both]) == 0  # a question of both is no fault
    assert "also_in_train" in capsys.readouterr().out
    assert main(["check", "model=tiny", "objective=nll", "data.train=gym:chain_sum"]) == 2
    assert "how many problems" in capsys.readouterr().err
