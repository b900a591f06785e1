"""align from Python: the same runs as the command line's, and parts that are objects."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pytest
from torch.nn.functional import softplus

import align
from align.rewards.base import Conversation, Reward
from align.types import Losses, Term
from tests.killer import shared

TINY = ("model=tiny", "lora.rank=2", "trainer.precision=float32", "trainer.num_samples=0")


@pytest.fixture(scope="module")
def pairs(tmp_path_factory):
    path = tmp_path_factory.mktemp("api") / "pairs.jsonl"
    rows = [{"prompt": f"Say {n}.", "chosen": f"{n}", "rejected": f"No, {n + 1}."} for n in range(8)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture(scope="module")
def words(pairs):
    return ("recipe=dpo", *TINY, f"data.train={pairs}", "data.heldout_fraction=0.25", "trainer.max_steps=2",
            "trainer.batch_size=3")  # fmt: skip


@dataclass(frozen=True)
class Doubled:
    """DPO's loss, twice; of no module that another process could import by its path."""

    beta: float = 0.1
    unit: str = "example"
    needs: frozenset[str] = field(default=frozenset({"reference"}), init=False)
    kind: str = field(default="pair", init=False)

    def __call__(self, policy, reference, _):
        ratios = (policy.logps - reference.logps).view(-1, 2)
        return Losses((Term(2 * softplus(-self.beta * (ratios[:, 0] - ratios[:, 1])), self.unit),), {})


def test_importing_it_loads_nothing_heavy():
    code = "import sys, align; align.train; print(*sys.modules)"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert not set(found.stdout.split()) & {"torch", "transformers", "datasets"}


def test_it_trains_what_the_command_line_trains(words, tmp_path):
    run = align.train(*words, f"run.dir={tmp_path / 'python'}")
    ended = shared().run(["train", *words, f"run.dir={tmp_path / 'command'}"])
    assert ended.code == 0, ended.said
    other = align.load(tmp_path / "command")
    timed = ("time/", "memory/")
    bare = [[{k: v for k, v in row.items() if not k.startswith(timed)} for row in r.metrics] for r in (run, other)]
    assert bare[0] == bare[1]
    assert [row["step"] for row in run.metrics] == [1, 2]
    assert run.summary["step"] == 2
    assert run.config.optimizer == align.compose(*words).optimizer
    states = [r.model().state_dict() for r in (run, other)]
    assert states[0].keys() == states[1].keys()
    assert all((states[0][name] == states[1][name]).all() for name in states[0])


def test_an_objective_is_an_object(words, tmp_path):
    run = align.train(*words, f"run.dir={tmp_path / 'run'}", objective=Doubled(beta=0.2))
    assert run.metrics[0]["loss/total"] == pytest.approx(2 * np.log(2), rel=1e-5)
    again = align.train(*words, f"run.dir={tmp_path / 'run'}", objective=Doubled(beta=0.2))
    assert again.metrics == run.metrics
    with pytest.raises(ValueError, match="was given to align.train as an object of tests.test_api.Doubled"):
        align.validate(run.config)


class Length(Reward):
    """A component that is an object."""

    def __call__(self, conversations: list[Conversation]) -> np.ndarray:
        return np.array([float(len(c.completion)) for c in conversations])


def test_rewards_are_functions_and_objects(tmp_path):
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text("".join(json.dumps({"prompt": f"Say {n}.", "limit": n}) + "\n" for n in range(6)))
    seen = []

    def counted(completion: str, limit: int) -> float:
        seen.append(limit)
        return float(len(completion) > limit)

    run = align.train(
        "recipe=grpo", *TINY, f"data.train={prompts}", "sampling.max_new_tokens=4", "sampling.n=2", "rollout=hf",
        "trainer.batch_size=3", "trainer.max_steps=1", f"run.dir={tmp_path / 'run'}",
        rewards={"counted": counted, "length": Length()},
    )  # fmt: skip
    row = run.metrics[0]
    assert len(seen) >= 6
    assert {"reward/counted", "reward/length"} <= {key.removesuffix("_mean") for key in row}


@pytest.mark.parametrize(
    "more, said",
    [
        (["optimizer.lr=-1"], "optimizer.lr=-1.0: must be greater than 0"),
        (["launch=slurm"], "launch=slurm: align.train waits for a run here"),
        (["engine=zero2", "launch.processes=2"], "launch.processes=2: objective was given as an object"),
    ],
)
def test_refused_in_a_line(words, tmp_path, more, said):
    with pytest.raises(ValueError, match=said) as found:
        align.train(*words, f"run.dir={tmp_path / 'run'}", *more, objective=Doubled())
    assert "\n" not in str(found.value)


def test_a_loss_that_counts_by_nothing_known_is_refused(words, tmp_path):
    """It would be divided by the number of tokens."""
    with pytest.raises(ValueError, match="unit='examples': must be example, row, token"):
        align.train(*words, f"run.dir={tmp_path / 'run'}", objective=Doubled(unit="examples"))


def test_a_misspelt_attribute_is_refused(words, tmp_path):
    class Odd(Doubled):
        step_row = "examples"

    with pytest.raises(ValueError, match="step_row is not an attribute of an objective; did you mean step_rows"):
        align.train(*words, f"run.dir={tmp_path / 'run'}", objective=Odd())


def test_a_run_that_is_not_there_or_not_over(tmp_path):
    with pytest.raises(ValueError, match="is no run's directory"):
        align.load(tmp_path)
    (tmp_path / "config.yaml").write_text("seed: 0\n")
    run = align.load(tmp_path)
    assert run.metrics == []
    with pytest.raises(ValueError, match="holds no finished run"):
        run.model()


def test_nothing_else_is_in_it():
    assert {"Run", "RunFailed", "compose", "load", "train", "validate"} <= set(dir(align))
    with pytest.raises(AttributeError, match="no attribute 'chat'"):
        align.chat  # noqa: B018


def test_the_script_of_the_page_runs(tmp_path):
    page = (Path(__file__).parents[1] / "docs" / "api.md").read_text()
    (script,) = re.findall(r"```python\n(.*?)```", page, re.S)
    (tmp_path / "script.py").write_text(script)
    done = subprocess.run([sys.executable, "script.py"], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "step 3: loss" in done.stdout
    assert done.stdout.splitlines()[-1].startswith("runs/hinge 3 [1.0, ")
