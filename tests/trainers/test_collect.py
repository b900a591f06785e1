"""A round of trajectories: what is kept, resumption, and files that the trainer's reader takes."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch

from align.data.formats import parse
from align.models.pretrained import byte_tokenizer, tiny
from align.tools.python import PythonTool
from align.trainers.collect import Collector, select
from tests.rollout.scripted import END, Scripted

TOKENIZER = byte_tokenizer()


@dataclass(frozen=True)
class Settings:
    task: str = "chain_sum"
    task_settings: dict[str, Any] = field(
        default_factory=lambda: {"min_terms": 2, "max_terms": 3, "min_digits": 1, "max_digits": 2}
    )
    problem_seed: int = 0
    num_problems: int = 5
    num_heldout: int = 3
    num_examples: int = 0
    samples_per_problem: int = 4
    chunk_problems: int = 2
    temperature: float = 1.0
    top_p: float = 1.0
    max_turns: int = 3
    max_new_tokens: int = 60
    stop: list[str] = field(default_factory=lambda: ["```output"])
    observation_role: str = "user"
    max_pairs_per_problem: int = 1
    max_labelled_per_problem: int = 4


def solve(prompt, k):
    """Sample 0 is right with the tool, 1 wrong with it, 2 right without it, 3 never stops."""
    prompt = prompt[prompt.rindex("problem: ") :]  # after the worked examples
    question = re.search(r"problem: ([-+ \d]+) =", prompt)[1]
    if "```output" in prompt:
        return f"The answer is \\boxed{{{prompt.rsplit('```output', 1)[1].split()[0]}}}.{END}"
    if k == 3:
        return "x" * 200
    if k == 2:
        return f"{eval(question)}{END}"
    return f"```python\nprint({question}{' + 1' * k})\n```{END}"


def collector(directory, settings=None, say=solve, key=None, bound=False, **more):
    more = {"seed": 0, "max_tokens": 4000} | more
    tool = PythonTool(10.0, 512, 1000)
    it = Collector(settings or Settings(), Scripted(say), TOKENIZER, tool, directory, **more)
    it.begin(key or {"model": "a"}, bound)
    return it


def files(directory):
    return {p.relative_to(directory).as_posix(): p.read_bytes() for p in sorted(directory.rglob("*")) if p.is_file()}


def rows(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_a_round(tmp_path):
    made = collector(tmp_path).collect()
    r = json.loads((tmp_path / "collect" / "collect.json").read_text())
    assert (r["problems"], r["trajectories"], r["right"], r["wrong"]) == (5, 20, 5, 5)
    assert r["dropped"] == {"right_without_call": 5, "unfinished": 5}
    assert r["accuracy"] == 10 / 20
    assert (r["problems_with_both"], r["pairs"], r["labelled"]) == (5, 5, 10)
    assert r["re_encoded_differently"] == 0
    assert r == made.report
    for pair in rows(made.file("pair")):
        for side, plus in (("chosen", 0), ("rejected", 1)):
            answer = pair[side]["messages"][-1]["content"]
            question = re.search(r"problem: ([-+ \d]+) =", pair[side]["messages"][0]["content"])[1]
            assert answer == f"The answer is \\boxed{{{eval(question) + plus}}}."
    assert [row["label"] for row in rows(made.file("labelled"))] == [True, False] * 5
    assert made.file("pair") == tmp_path / "collect" / "pairs.jsonl"
    assert made.file("labelled") == tmp_path / "collect" / "labelled.jsonl"
    assert "5 pairs" in made.lines()[1]


def test_the_reader_takes_the_files_and_only_emissions_are_targets(tmp_path):
    made = collector(tmp_path, Settings(num_examples=1)).collect()
    for row in rows(made.file("pair")):
        record = parse(row)
        assert (record.kind, record.origin) == ("pair", "on_policy")
        for side in record.sides.values():
            spoken = [TOKENIZER.decode(side.token_ids[a:b]) for _, a, b, target in side.spans if target]
            assert [s.startswith(("```python", "The answer")) for s in spoken] == [True, True]
            assert all(s.endswith(END) for s in spoken)
            assert side.question.startswith("State the final answer")
    labels = [parse(row) for row in rows(made.file("labelled"))]
    assert {(r.kind, r.label) for r in labels} == {("labelled", True), ("labelled", False)}


@pytest.mark.parametrize("killed_at", [0, 1, 2])
def test_a_killed_round_goes_on_and_comes_out_the_same(tmp_path, killed_at):
    """The rollout dies in the middle of a chunk; a second start does only what is missing."""
    whole = collector(tmp_path / "whole")
    whole.collect()
    calls_of_a_chunk = 2  # a turn with programs, a turn with answers

    broken = collector(tmp_path / "killed")
    inner = broken.loop.rollout.generate

    def generate(*arguments):
        if len(broken.loop.rollout.calls) == calls_of_a_chunk * killed_at + 1:
            raise KeyboardInterrupt
        return inner(*arguments)

    broken.loop.rollout.generate = generate
    with pytest.raises(KeyboardInterrupt):
        broken.collect()
    (tmp_path / "killed" / "collect" / ".trajectories-001.jsonl.tmp").write_text('{"half')
    resumed = collector(tmp_path / "killed")
    resumed.collect()
    assert len(resumed.loop.rollout.calls) == calls_of_a_chunk * (3 - killed_at)
    (tmp_path / "killed" / "collect" / ".trajectories-001.jsonl.tmp").unlink(missing_ok=True)
    assert files(tmp_path / "killed") == files(tmp_path / "whole")
    again = collector(tmp_path / "killed")
    again.collect()
    assert again.loop.rollout.calls == []


@pytest.mark.parametrize("change", [{"seed": 1}, {"key": {"model": "b"}}, {"settings": Settings(temperature=0.9)}])
def test_another_key_begins_anew(tmp_path, change):
    first = collector(tmp_path)
    first.before()
    first.collect()
    other = collector(tmp_path, **change)
    assert not list(tmp_path.rglob("*.jsonl"))
    other.collect()
    assert len(other.loop.rollout.calls) == 6
    same = collector(tmp_path, **change)
    assert list(tmp_path.rglob("*.jsonl"))
    same.collect()
    assert same.loop.rollout.calls == []


def test_other_problems_under_the_same_settings_begin_anew_unless_they_were_learnt_from(tmp_path):
    """As after an update that draws other problems from the same seed: a key that names other questions, or none."""
    collector(tmp_path).collect()
    path = tmp_path / "collect" / "key.json"
    key = json.loads(path.read_text())
    for old in ({**key, "questions": "0" * 64}, {k: v for k, v in key.items() if k != "questions"}):
        path.write_text(json.dumps(old))
        kept = files(tmp_path)
        with pytest.raises(ValueError, match="with other questions than now.*give another run.dir"):
            collector(tmp_path, bound=True)
        assert files(tmp_path) == kept
    collector(tmp_path)
    assert json.loads(path.read_text()) == key
    assert not list(tmp_path.rglob("*.jsonl"))


def test_progress_may_stop_between_chunks(tmp_path):
    def progress(items, total):
        assert total == 3
        for item in items:
            if item == 2:
                raise InterruptedError
            yield item

    with pytest.raises(InterruptedError):
        collector(tmp_path, progress=progress).collect()
    assert len(list((tmp_path / "collect").glob("trajectories-*.jsonl"))) == 2


def test_before_and_after(tmp_path):
    it = collector(tmp_path, say=lambda p, k: f"0{END}")
    assert it.before() == [0.0, 0.0, 0.0]
    calls = len(it.loop.rollout.calls)
    better = collector(tmp_path)
    assert better.before() == [0.0, 0.0, 0.0]  # read
    assert better.loop.rollout.calls == []
    assert better.after() == [1.0, 1.0, 1.0]
    assert calls == 1
    before, after = (rows(tmp_path / f"problems-{phase}.jsonl") for phase in ("before", "after"))
    assert [row["problem"] for row in before] == [row["problem"] for row in after]
    assert {row["phase"] for row in after} == {"after"}
    assert all(s.greedy and n == 1 for _, n, s in better.loop.rollout.calls)
    assert collector(tmp_path, say=lambda p, k: f"0{END}").after() == [0.0, 0.0, 0.0]  # asked again


# ---------------------------------------------------------------------- selection


def row(problem, label, ids, **more):
    spans = [["user", 0, 1, False], ["assistant", 1, 2, True], ["tool", 2, 3, False], ["assistant", 3, len(ids), True]]
    base = {
        "problem": problem, "label": label, "token_ids": ids, "spans": spans, "finished": True, "num_turns": 2,
        "tool_errors": 0, "last_call_failed": False, "re_encodes": True, "prompt_messages": [{"role": "user"}],
        "messages": [],
    }  # fmt: skip
    return base | more


def ids(n):
    return [1, 2, 3, 4, n]


def test_every_trajectory_is_used_or_counted_under_one_reason():
    given = [
        row("a", True, ids(0)),
        row("a", True, ids(0)),  # repeated
        row("a", True, ids(1), last_call_failed=True),
        row("a", False, ids(2), last_call_failed=True),  # a wrong one may fail
        row("a", True, ids(3), spans=[["user", 0, 1, False], ["assistant", 1, 5, True]]),
        row("a", False, ids(4), finished=False),
        row("b", True, ids(0)),  # the same tokens for another problem
        row("c", False, ids(0)),
        row("d", False, ids(0), finished=False),
    ]
    pairs, labelled, r = select(given, Settings(), 0)
    assert r["dropped"] == {"repeated": 1, "right_after_failed_call": 1, "right_without_call": 1, "unfinished": 2}
    assert (r["right"], r["wrong"], r["trajectories"]) == (2, 2, 9)
    counts = [r[f"problems_{k}"] for k in ("with_both", "only_right", "only_wrong", "with_neither")]
    assert counts == [1, 1, 1, 1]
    assert [(p["problem"], p["chosen"]["token_ids"], p["rejected"]["token_ids"]) for p in pairs] == [
        ("a", ids(0), ids(2))
    ]
    assert [(x["problem"], x["label"]) for x in labelled] == [("a", True), ("a", False), ("b", True), ("c", False)]


def test_caps_and_draws():
    given = [row("a", n < 6, ids(n)) for n in range(16)] + [row("b", n < 6, ids(n)) for n in range(16)]
    pairs, labelled, _ = select(given, Settings(max_pairs_per_problem=20, max_labelled_per_problem=3), 0)
    of_a = [p for p in pairs if p["problem"] == "a"]
    assert len(of_a) == 6
    for side in ("chosen", "rejected"):
        assert len({tuple(p[side]["token_ids"]) for p in of_a}) == 6  # each trajectory in one pair at most
    assert len(labelled) == 2 * 2 * 3
    # a problem's draw depends on seed and problem, not on the company
    alone, _, _ = select([r for r in given if r["problem"] == "b"], Settings(max_pairs_per_problem=20), 0)
    assert alone == [p for p in pairs if p["problem"] == "b"]
    one = {s: select(given, Settings(), s)[0][0]["chosen"]["token_ids"][-1] for s in range(20)}
    assert len(set(one.values())) > 3
    assert select(given, Settings(), 5)[0] == select(given, Settings(), 5)[0]


def test_nothing_to_learn_from_is_an_error_with_a_cure(tmp_path):
    made = collector(tmp_path / "wrong", say=lambda p, k: f"{k}{END}" if k else f"0.5{END}").collect()
    assert made.report["pairs"] == 0
    with pytest.raises(
        ValueError, match=r"0 right and .*raise collect.samples_per_problem .* easier in collect.task_set"
    ):
        made.file("pair")
    with pytest.raises(ValueError, match="0 right"):
        made.file("labelled")


# ---------------------------------------------------------------------- real networks


def real(pretrained, directory, settings, **more):
    from align.models.policy import Policy, choose_layout
    from align.rollout.base import Host
    from align.rollout.hf import HFRollout

    lm, tokenizer = pretrained.model(), pretrained.tokenizer()
    policy = Policy(lm, choose_layout(lm, "auto", 0.0)[0])
    rollout = HFRollout(Host(policy, tokenizer, directory, "float32"), batch_size=8)
    tool = PythonTool(10.0, 512, 1000)
    it = Collector(settings, rollout, tokenizer, tool, directory, seed=0, max_tokens=1024, **more)
    it.begin({})
    return it, policy


def test_a_resumed_round_of_a_random_network_has_the_same_bytes(tmp_path):
    settings = Settings(num_problems=3, num_heldout=1, chunk_problems=1, max_new_tokens=8, samples_per_problem=2)

    def stop_at_one(items, _):
        for item in items:
            if item == 1:
                raise InterruptedError
            yield item

    network = tiny(0, 32, 2)
    real(network, tmp_path / "whole", settings)[0].collect()
    with pytest.raises(InterruptedError):
        real(network, tmp_path / "halved", settings, progress=stop_at_one)[0].collect()
    torch.manual_seed(99)
    real(network, tmp_path / "halved", settings)[0].collect()
    assert files(tmp_path / "halved") == files(tmp_path / "whole")
