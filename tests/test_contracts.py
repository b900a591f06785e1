"""Parts of the user's own: what each kind must say, what it may leave out, and how it is told that it is wrong."""

from __future__ import annotations

import ast
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from align.advantages.base import Advantage
from align.cli import main
from align.composers.base import Composer
from align.contracts import adopt, declared_by
from align.data.pairs import MaxMin, PairRule
from align.objectives.base import Objective, RewardObjective, as_objective
from align.objectives.losses import BaseLoss, Sigmoid, as_loss
from align.objectives.mix import Mix
from align.objectives.preference import DPO
from align.rewards.base import Reward, RewardTarget, StepReward
from align.rollout.base import Rollout
from align.tools import Tool
from align.trainers.callbacks import Callback
from align.types import Extras
from tests.bench.house import asked, asked_of_parts, circles
from tests.conftest import plain_dpo

# For each base: what a plain class of this kind must say, and a default that it then has.
PLAIN = {
    Objective: ({"__call__": lambda self, policy, reference, batch: None}, ("columns", ())),
    RewardObjective: (
        {"__call__": lambda self, policy, reference, batch: None, "reward_kind": "mine", "outputs": ("r",)},
        ("gated", False),
    ),
    Advantage: ({"__call__": lambda self, episodes: None}, ("needs", frozenset())),
    Composer: (
        {"__init__": lambda self: None, "__call__": lambda self, streams, keep=None: None, "names": ("a",)},
        ("apply", "next"),
    ),
    Reward: ({"__call__": lambda self, conversations: np.zeros(len(conversations))}, ("gives_steps", False)),
    StepReward: ({"steps": lambda self, conversations: []}, ("gives_steps", True)),
    PairRule: ({"__call__": lambda self, candidates: []}, None),
    Tool: ({"name": "mine", "find": lambda self, text: None, "run": lambda self, call: None}, None),
    Rollout: (
        {
            "generate": lambda self, prompts, sampling, n=1, greedy=False: [],
            "logps": lambda self, sequences, starts: [],
            "sync": lambda self, policy: None,
        },
        ("max_tokens", None),
    ),
    BaseLoss: ({"__call__": lambda self, ratios, beta: ratios.chosen}, ("difference", False)),
    Callback: ({}, None),
}
MISSPELT = {
    Objective: ("step_row", "step_rows"),
    RewardObjective: ("output", "outputs"),
    Advantage: ("need", "needs"),
    Composer: ("gold_metrics", "gold_metric"),
    Reward: ("count", "counts"),
    StepReward: ("give_steps", "gives_steps"),
    Rollout: ("max_token", "max_tokens"),
    BaseLoss: ("differences", "difference"),
}
MISSPELT_METHODS = {Tool: ("runs", "run"), Callback: ("on_steps", "on_step"), Rollout: ("synch", "sync")}
KINDS = pytest.mark.parametrize("base", PLAIN, ids=lambda base: base.__name__)


def plain(base: type, **more: object) -> object:
    return type("Mine", (), PLAIN[base][0] | more)()


@KINDS
def test_plain_class_is_adopted_with_the_defaults(base):
    part = plain(base)
    before = type(part)
    adopted = adopt(part, base, "key")
    assert adopted is part
    assert isinstance(adopted, (base, before))
    assert type(adopted).__qualname__ == before.__qualname__
    if PLAIN[base][1]:
        name, default = PLAIN[base][1]
        assert getattr(adopted, name) == default
    for name, value in PLAIN[base][0].items():
        assert vars(before)[name] is value
        assert getattr(type(adopted), name) is value


@KINDS
def test_a_second_time_changes_nothing(base):
    part = adopt(plain(base), base, "key")
    kind = type(part)
    assert type(adopt(part, base, "key")) is kind


@pytest.mark.parametrize("base, wrong, right", [(b, *names) for b, names in MISSPELT.items()])
@pytest.mark.parametrize("inherits", [False, True])
@pytest.mark.parametrize("own", [False, True])
def test_nearly_right_attribute_is_refused(base, wrong, right, inherits, own):
    said = {k: v for k, v in PLAIN[base][0].items() if k != right}
    part = type("Mine", (base,) if inherits else (), said if own else said | {wrong: 3})()
    if own:
        setattr(part, wrong, 3)
    with pytest.raises(
        ValueError, match=f"^key .*Mine.*: {wrong} is not an attribute of .*; did you mean {right}"
    ) as e:
        adopt(part, base, "key")
    assert "\n" not in str(e.value)


@pytest.mark.parametrize("base, wrong, right", [(b, *names) for b, names in MISSPELT_METHODS.items()])
def test_nearly_right_method_is_refused(base, wrong, right):
    said = {k: v for k, v in PLAIN[base][0].items() if k != right}
    part = type("Mine", (), said | {wrong: lambda self, *given: None})()
    with pytest.raises(ValueError, match=f"{wrong} is not an attribute of .*; did you mean {right}"):
        adopt(part, base, "key")


def test_settings_and_names_that_stand_beside_the_right_one_are_the_users_own():
    @dataclass
    class Mine:
        column: str  # a setting

        columns = ("second",)
        margin = 0.5  # no setting: nearly margins, which is said too
        margins = ("helpful",)

        def __call__(self, *_):
            return None

    assert adopt(Mine("third"), Objective, "objective").columns == ("second",)


@pytest.mark.parametrize(
    "base, leave_out, text",
    [
        (Objective, "__call__", "must have the method __call__; see align.objectives.base.Objective"),
        (RewardObjective, "reward_kind", "must say its reward_kind; see align.objectives.base.RewardObjective"),
        (RewardObjective, "outputs", "must say its outputs"),
        (Advantage, "__call__", "must have the method __call__; see align.advantages.base.Advantage"),
        (Composer, "names", "must say its names; see align.composers.base.Composer"),
        (Reward, "__call__", "must have the method __call__"),
        (StepReward, "steps", "must have the method steps"),
        (PairRule, "__call__", "must have the method __call__; see align.data.pairs.PairRule"),
        (Tool, "name", "must say its name; see align.tools.Tool"),
        (Tool, "run", "must have the method run"),
        (Rollout, "logps", "must have the method logps; see align.rollout.base.Rollout"),
        (BaseLoss, "__call__", "must have the method __call__; see align.objectives.losses.BaseLoss"),
    ],
)
def test_what_has_no_default_is_required(base, leave_out, text):
    part = type("Mine", (), {k: v for k, v in PLAIN[base][0].items() if k != leave_out})()
    with pytest.raises(ValueError, match=text):
        adopt(part, base, "key")


@pytest.mark.parametrize(
    "base, attribute, value, text",
    [
        (Objective, "kind", "pairs", "kind=pairs: must be pair, "),
        (Objective, "step_rows", "all", "step_rows=all: must be examples, mismatched or None"),
        (Objective, "needs", "reference", r"needs=reference: must be a tuple or a set of names, as in \{'reference'\}"),
        (Objective, "extras", "gates", "extras=gates: must be a tuple or a set of names"),
        (Objective, "columns", "second", "columns=second: must be a tuple or a set of names"),
        (RewardObjective, "outputs", "reward", "outputs=reward: must be a tuple or a set of names"),
        (Composer, "apply", "later", "apply=later: must be now or next"),
        (Composer, "target", "rewards", "target=rewards: must be reward or advantage"),
    ],
)
def test_value_that_is_none_of_those_declared_is_refused(base, attribute, value, text):
    with pytest.raises(ValueError, match=text):
        adopt(plain(base, **{attribute: value}), base, "key")


@KINDS
@pytest.mark.parametrize("part, given", [(lambda *given: None, "function"), (SimpleNamespace, "class")])
def test_function_or_class_in_the_place_of_an_object_is_refused(base, part, given):
    with pytest.raises(ValueError, match=f"^key .*: is a {given}; an? .* is an object of a class that inherits align."):
        adopt(part, base, "key")


def call(self, *_):
    return self.beta


@pytest.mark.parametrize("how", [{}, {"frozen": True}, {"slots": True}, {"frozen": True, "slots": True}])
@pytest.mark.parametrize("inherits", [False, True])
def test_dataclasses_frozen_and_slotted(how, inherits):
    """They stay equal to their like, keep their settings, and a frozen one stays frozen."""
    body = {"__annotations__": {"beta": float}, "__call__": call, "kind": "single"}
    kind = dataclass(**how)(type("Mine", (Objective,) if inherits else (), body))
    part, other = (adopt(kind(0.1), Objective, "objective") for _ in range(2))
    assert part == other
    assert (part.beta, part.kind, part.margins, part(None, None, None)) == (0.1, "single", (), 0.1)
    if how.get("frozen"):
        with pytest.raises(AttributeError):
            part.beta = 0.2


def test_dataclass_with_a_setting_that_is_declared():
    @dataclass(frozen=True)
    class Mine:
        names: tuple[str, ...]
        max_norm: float

        def __call__(self, streams, *_):
            return streams.sum(1)

    composer = adopt(Mine(("a", "b"), 2.0), Composer, "composer")
    assert (composer.names, composer.max_norm, composer.streams) == (("a", "b"), 2.0, ("a", "b"))


def test_slots_without_a_dictionary_and_properties():
    class Mine:
        __slots__ = ("_columns",)

        def __init__(self):
            self._columns = ("second",)

        @property
        def columns(self):
            return self._columns

        def __call__(self, *_):
            return None

    assert adopt(Mine(), Objective, "objective").columns == ("second",)


def test_attributes_by_getattr_are_refused():
    """The base's default would hide them."""

    class Wrapper:
        def __init__(self, inner):
            self.inner = inner

        def __getattr__(self, name):
            return getattr(self.inner, name)

        def __call__(self, policy, reference, batch):
            return self.inner(policy, reference, batch)

    with pytest.raises(ValueError, match="hands .* on by __getattr__; say it in the class, as a property"):
        adopt(Wrapper(DPO(0.1, torch.nn.Identity(), "reverse_kl", None, None)), Objective, "objective")


def test_what_cannot_become_a_part_is_refused_in_one_line():
    with pytest.raises(ValueError, match="is not an objective; make it of a class that inherits") as error:
        adopt(3, Objective, "objective")
    assert "\n" not in str(error.value)

    class Meta(type):
        pass

    with pytest.raises(ValueError, match="is not a reward target; make it a class that inherits"):
        declared_by(Meta("Mine", (), {}), RewardTarget, "reward.mine")


def test_scores_make_a_reward_objective():
    said = PLAIN[RewardObjective][0]
    made = as_objective(type("Mine", (), said | {"needs": frozenset({"scores"})})(), "objective")
    assert isinstance(made, RewardObjective)
    assert made.metadata() == {"tau": 1.0, "normalise": False, "gated": False}
    assert made.make_head(8) is None
    with pytest.raises(ValueError, match="must say its reward_kind"):
        as_objective(type("Mine", (), PLAIN[Objective][0] | {"needs": frozenset({"scores"})})(), "objective")


def test_parts_of_parts_are_adopted():
    first = type("Mine", (), PLAIN[Objective][0] | {"columns": ("second",)})()
    mixed = Mix(first, plain(Objective), 1.0, 1.0)
    assert mixed.columns == ("second",)
    with pytest.raises(ValueError, match=r"^objective.second .*: column is not an attribute of an objective"):
        Mix(first, plain(Objective, column=("second",)), 1.0, 1.0)


def test_any_callable_is_a_loss():
    ratios = SimpleNamespace(chosen=torch.ones(2))
    assert as_loss(lambda r, beta: beta * r.chosen)(ratios, 0.5).tolist() == [0.5, 0.5]
    mine = type("Mine", (), {"__call__": lambda self, r, beta: beta * r.chosen})()
    assert as_loss(mine) is mine
    DPO(0.1, lambda r, beta: beta * r.chosen, "reverse_kl", None, None)
    with pytest.raises(ValueError, match="objective.loss .*: differences is not an attribute of a base loss"):
        DPO(0.1, plain(BaseLoss, differences=True), "reverse_kl", None, None)


def test_class_before_it_is_made():
    class Mine:
        in_process = True

    declared = declared_by(Mine, RewardTarget, "reward.mine")
    assert (declared.in_process, declared.gives_steps) == (True, False)
    assert declared_by(len, RewardTarget, "reward.mine").in_process is False
    assert declared_by(MaxMin, PairRule, "pairs") is MaxMin
    with pytest.raises(ValueError, match="in_proces is not an attribute of a reward target; did you mean in_process"):
        declared_by(type("Mine", (), {"in_proces": True}), RewardTarget, "reward.mine")


def test_no_modules_import_each_other():
    """Inside functions either: a seam has two sides, and one of them knows the other."""
    assert circles() == []


def test_no_part_is_asked_by_name():
    assert asked("x", ast.parse("f(getattr(self.objective, 'kind', 'pair'))")) != []
    assert asked_of_parts() == []


def test_step_rows_without_step_values_are_refused_before_a_step():
    class Lacking:
        kind, needs, step_rows = "pair", frozenset(), "examples"

        def __call__(self, *_):
            """Never called."""

    with pytest.raises(ValueError, match="step_rows=examples needs the method step_values"):
        as_objective(Lacking(), "objective")
    Lacking.step_values = lambda *_: None
    assert as_objective(Lacking(), "objective").step_rows == "examples"


@pytest.mark.parametrize(
    "said, text",
    [
        ({"needs": {"start"}}, "^objective.first: needs names start: must be of reference, values, scores, log_coll"),
        (
            {"extras": {"start_logps"}},
            "^objective.first: extras names start_logps: must be of start_token_logps, gates$",
        ),
        ({"extras": {"start_token_logps"}, "kind": "rollout"}, "which no reward model and no online step has"),
        ({"extras": {"start_token_logps"}, "needs": {"scores"}}, "which no reward model and no online step has"),
        ({"extras": {"gates"}}, "extras names gates, which only a RewardObjective with gated=true has"),
        (
            {"extras": {"gates"}, "needs": {"scores"}},
            "extras names gates, which only a RewardObjective with gated=true",
        ),
        ({"step_rows": "mismatched"}, "^objective.first: step_rows=mismatched needs the method step_values"),
    ],
)
@pytest.mark.parametrize("mixed", [False, True])
def test_names_that_no_loop_gives_are_refused_when_the_objective_is_made(said, text, mixed):
    part = plain(RewardObjective, **said)
    with pytest.raises(ValueError, match=text):
        Mix(part, plain_dpo(0.1, Sigmoid(0.0)), 1.0, 1.0) if mixed else as_objective(part, "objective.first")


def test_extra_that_is_not_declared_is_told_in_a_sentence():
    text = r"start_token_logps is not among the extras \(step_values\): an objective names in its extras what it reads"
    with pytest.raises(ValueError, match=text):
        Extras(step_values=torch.zeros(1))["start_token_logps"]


MODULE = """
from dataclasses import dataclass

@dataclass
class Right:
    needs = frozenset({"reference"})

    def __call__(self, policy, reference, batch):
        raise NotImplementedError

class Wrong(Right):
    colums = ("second",)

class Silent(Right):
    needs = frozenset({"scores"})

def loss(ratios, beta):
    return -beta * (ratios.chosen - ratios.rejected)

class Loss:
    differences = True

    def __call__(self, ratios, beta):
        return loss(ratios, beta)
"""
OPTIONS = {
    "objective/right.yaml": "_target_: mine_parts.Right\n",
    "objective/wrong.yaml": "_target_: mine_parts.Wrong\n",
    "objective/silent.yaml": "_target_: mine_parts.Silent\n",
    "objective/loss/function.yaml": "_target_: mine_parts.loss\n_partial_: true\n",
    "objective/loss/wrong.yaml": "_target_: mine_parts.Loss\n",
}


@pytest.fixture
def own(tmp_path: Path) -> Path:
    """A folder with a module and options of the user's own."""
    (tmp_path / "mine_parts.py").write_text(MODULE)
    for name, text in OPTIONS.items():
        (tmp_path / name).parent.mkdir(exist_ok=True, parents=True)
        (tmp_path / name).write_text(text)
    return tmp_path


@pytest.mark.parametrize(
    "words, message",
    [
        (["objective=right"], None),
        (["objective=dpo", "objective/loss=function"], None),
        (
            ["objective=wrong"],
            "objective (mine_parts.Wrong): colums is not an attribute of an objective; did you mean columns?",
        ),
        (
            ["objective=silent"],
            "objective (mine_parts.Silent): must say its reward_kind; see align.objectives.base.RewardObjective",
        ),
        (
            ["objective=dpo", "objective/loss=wrong"],
            "differences is not an attribute of a base loss; did you mean difference?",
        ),
    ],
)
def test_through_the_command(own: Path, words: list[str], message: str | None, monkeypatch, capfd):
    monkeypatch.syspath_prepend(str(own))
    code = main(["check", "model=tiny", *words, "--config-dir", str(own)])
    error = capfd.readouterr().err
    assert (code, error.count("\n")) == ((0, 0) if message is None else (2, 1))
    assert (message or "") in error


def test_module_on_the_path_of_the_command(own: Path):
    done = subprocess.run(
        [sys.executable, "-m", "align.cli", "check", "model=tiny", "objective=wrong", "--config-dir", str(own)],
        env=os.environ | {"PYTHONPATH": os.pathsep.join([str(own), *sys.path])},
        capture_output=True,
        text=True,
    )
    assert (done.returncode, done.stderr.count("\n")) == (2, 1)
    assert "did you mean columns?" in done.stderr
