"""data.gold: a function that may ask for what the row of a held-out prompt knows."""

from __future__ import annotations

import json
import re

import pytest

from align.cli import main
from align.rewards.gold import Gold

HERE = "tests.rewards.test_gold."


def of_row(completion: str, answer: str, level: int = 7) -> float:
    """What the row says, whatever was answered."""
    assert isinstance(completion, str)
    return float(answer) + level / 10


def all_at_once(completions: list[str], prompts: list[str], finished: list[bool]) -> list[float]:
    """The number in the prompt."""
    assert len(completions) == len(finished)
    return [float(prompt.split()[0]) for prompt in prompts]


def failing(prompt: str, completion: str) -> float:  # noqa: ARG001
    raise KeyError("x")


def rows(first: int, count: int) -> list[dict]:
    return [{"question": f"{i} + 0?", "answer": f"I add.\n#### {i}"} for i in range(first, first + count)]


def words(tmp_path, *more: str) -> list[str]:
    for name, made in (("train", rows(0, 20)), ("heldout", rows(100, 3))):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in made))
    return [
        "train", "objective=nll", "model=tiny", "model.hidden_size=16", "model.num_layers=1", "data=files",
        f"data.train={tmp_path / 'train.jsonl'}", "data.form=gsm8k", "trainer.max_steps=1", "trainer.num_samples=3",
        "trainer.sample_tokens=4", f"run.dir={tmp_path / 'run'}", "log.tensorboard=false", *more,
    ]  # fmt: skip


def samples(tmp_path) -> dict[str, float]:
    return {s["prompt"]: s["gold"] for s in map(json.loads, (tmp_path / "run/samples.jsonl").read_text().splitlines())}


def test_it_gets_the_columns_of_held_out_rows(tmp_path):
    gold = f"data.gold={HERE}of_row"
    assert main(words(tmp_path, f"data.heldout={tmp_path / 'heldout.jsonl'}", gold)) == 0
    assert samples(tmp_path) == {f"{i} + 0?": i + 0.7 for i in (100, 101, 102)}


def test_it_gets_them_of_a_part_that_is_kept_back_too(tmp_path):
    assert main(words(tmp_path, "data.heldout_fraction=0.1", f"data.gold={HERE}of_row")) == 0
    found = samples(tmp_path)
    assert len(found) == 2
    assert found == {prompt: int(prompt.split()[0]) + 0.7 for prompt in found}


@pytest.mark.parametrize(
    "gold", ["align.rewards.mathematics.math_answer", "align.rewards.verifiers.NumericAnswer", f"{HERE}all_at_once"]
)
def test_shipped_verifiers_and_functions_of_all_answers_serve(tmp_path, gold):
    assert main(words(tmp_path, f"data.heldout={tmp_path / 'heldout.jsonl'}", f"data.gold={gold}")) == 0
    wanted = {100.0, 101.0, 102.0} if gold.endswith("at_once") else {0.0}  # nobody taught it to add
    assert set(samples(tmp_path).values()) == wanted


def test_a_verifier_scores_a_right_answer():
    gold = Gold("align.rewards.verifiers.NumericAnswer")
    assert (gold.columns, gold.asks_rows) == (("answer",), True)
    row = type("Row", (), {"messages": None, "fields": {"answer": "5"}})()
    asked = [((1,), "2 + 3?", "It is 5.", True), ((1,), "2 + 3?", "It is 6.", True)]
    assert gold(asked, {(1,): row}) == [1.0, 0.0]
    assert not Gold("align.rewards.functions.everyday_gold").asks_rows


@pytest.mark.parametrize(
    ("gold", "said"),
    [
        (f"{HERE}failing", f"data.gold={HERE}failing: no score for .*raised: KeyError.*; mend it"),
        (f"{HERE}nowhere", f"data.gold={HERE}nowhere: cannot be imported"),
        ("align.rewards.verifiers.ExactMatch", "takes other keys"),
    ],
)
def test_what_gives_no_score_is_told(tmp_path, capsys, gold, said):
    assert main(words(tmp_path, f"data.heldout={tmp_path / 'heldout.jsonl'}", f"data.gold={gold}")) == 2
    assert re.search(said, capsys.readouterr().err)


def test_a_column_that_no_row_has_is_refused_before_the_run(tmp_path, capsys):
    (tmp_path / "plain.jsonl").write_text('{"prompt": "2 + 3?", "completion": "5"}\n')
    plain = tmp_path / "plain.jsonl"
    more = (f"data.train={plain}", "data.form=null", "data.gold=align.rewards.mathematics.math_answer")
    assert main(words(tmp_path, *more)) == 2
    said = capsys.readouterr()
    assert "asks for the column answer, which no row of data.train has; there are completion, prompt" in said.err
    assert not (tmp_path / "run").exists()
