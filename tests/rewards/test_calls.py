"""Functions of users in real worker processes."""

from __future__ import annotations

import math
import os
import re
import signal
import subprocess
import sys
import threading

import numpy as np
import pytest

from align.rewards.base import Conversation
from align.rewards.build import RewardHost, components

HERE = "tests.rewards.sample_functions"


def said(*completions: str, **fields) -> list[Conversation]:
    return [Conversation("ab", c, True, fields=fields) for c in completions]


@pytest.fixture
def make():
    """A function (target, keys) -> Rewards with that component named r; all are closed at the end."""
    made = []

    def build(target: str, check=lambda: None, **keys):
        lines: list[str] = []
        host = RewardHost(check=check, say=lines.append)
        path = target if "." in target else f"{HERE}.{target}"
        rewards = components({"r": {"_target_": path, "seconds": 20.0, **keys}}, host)
        rewards.lines = lines
        made.append(rewards)
        return rewards

    yield build
    for rewards in made:
        rewards.close()


def column(rewards, conversations) -> list[float]:
    scores = rewards.score(conversations)
    assert scores.shape == (len(conversations), 1)
    assert scores.dtype == np.float64
    return scores[:, 0].tolist()


def same(got: list[float], wanted: list[float]) -> None:
    np.testing.assert_array_equal(got, wanted)  # NaN equals NaN


def test_called_for_each_by_the_names_of_its_parameters(make):
    rows = [
        Conversation("ab", "x", True, fields={"answer": "x"}),
        Conversation("ab", "x", False, fields={"answer": "y", "bonus": 3.0, "unused": 1}),
        Conversation("ab", "y", True, fields={"answer": "x", "bonus": 3.0}),
    ]
    # 10 * 2 for the prompt, 1 for the right answer, bonus where it is finished
    same(column(make("with_prompt"), rows), [21.5, 20.0, 23.0])


def test_called_as_trl_calls_with_the_rows_columns(make):
    rows = [
        Conversation("abc", "x", True, fields={"answer": "5"}),
        Conversation("a", "xyz", True, fields={"answer": 7}),
    ]
    same(column(make("trl"), rows), [7.0, 5.0])


def test_named_columns_do_not_come_again_with_the_rest(make):
    rows = [Conversation("a", "xy", True, token_ids=(1, 2, 3), fields={"answer": "5", "level": 4, "other": 0})]
    # 3 tokens, 10 finished, 100 * level 4, one further column
    same(column(make("trl_names"), rows), [414.0])
    rows = [Conversation("a", "xy", True, token_ids=(1, 2, 3), fields={"answer": "5"})]
    same(column(make("trl_names"), rows), [13.0])


def test_one_parameter_of_another_name_gets_the_conversations(make):
    rows = [Conversation("a", "b", True, ({"role": "user", "content": "a"},), (1,), (2, 3)), *said("c")]
    same(column(make("of_conversations"), rows), [3.0, 0.0])


def test_keys_of_a_function_and_a_class_made_once(make):
    same(column(make("with_keys", scale=2.0), said("abc", "")), [6.0, 0.0])
    counter = make("Counter", start=5)
    same(column(counter, said("a", "b")), [6.0, 7.0])
    same(column(counter, said("a")), [8.0])


def test_a_row_without_the_column_has_no_score_and_the_others_have(make):
    rows = [*said("x"), *said("x", answer="x")]
    rewards = make("with_prompt")
    same(column(rewards, rows), [math.nan, 21.5])
    assert rewards.counts == {"r/missing_column": 1}
    assert "no column answer" in rewards.lines[0]


@pytest.mark.parametrize(
    "completion, reason",
    [
        ("raise", "raised"), ("none", "none"), ("text", "not_a_number"), ("list", "wrong_shape"), ("huge", "inf"),
        ("inf", "inf"), ("nan", "nan"), ("string", "not_a_number"), ("array", "wrong_shape"),
        ("die", "died"), ("exit", "died"), ("sysexit", "died"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("target", ["act", "act_all"])
def test_only_the_bad_completion_is_lost(make, target, completion, reason):
    rewards = make(target)
    same(column(rewards, said("a", "bb", completion, "cccc", "")), [1.0, 2.0, math.nan, 4.0, 0.0])
    counts = rewards.counts
    repeated = counts.pop("r/repeated", 0)
    assert counts == {f"r/{reason}": 1}
    # in a call for all: 5, then 3 of 2 + 3, then 1 of 1 + 2 where the whole call failed
    whole = target == "act_all" and reason in ("raised", "died")
    assert repeated == (2 if whole else 0)
    told = [line for line in rewards.lines if "repeated" not in line]
    assert len(told) == 1
    assert told[0].startswith("reward.r ")
    assert len(told[0]) < 500
    assert "\n" not in told[0]
    same(column(rewards, said("again")), [5.0])
    column(rewards, said(completion))
    assert rewards.counts[f"r/{reason}"] == 2
    assert len(rewards.lines) == len(told) + bool(repeated)  # said once


@pytest.mark.parametrize("completion", ["spin", "sleep"])
@pytest.mark.parametrize("target", ["act", "act_all"])
def test_a_hanging_call_is_ended_and_costs_only_its_completion(make, target, completion):
    rewards = make(target, seconds=0.5)
    first = rewards._parts["r"]._process._process
    same(column(rewards, said("a", completion, "bb")), [1.0, math.nan, 2.0])
    assert rewards.counts["r/timeout"] == 1
    assert first.returncode == -signal.SIGKILL
    same(column(rewards, said("ccc")), [3.0])


def test_time_for_failed_calls_is_bounded(make):
    rewards = make("act", seconds=0.1)
    # 2 (1 + log2 48) = 14 deadlines and starts: each failure costs one of both, the first has its start for nothing. On
    # a busy machine a start takes up to three times as long as the one that was measured, or a third
    scores = column(rewards, said(*["sleep"] * 48))
    assert all(map(math.isnan, scores))
    assert rewards.counts["r/timeout"] + rewards.counts["r/not_tried"] == 48
    assert 5 <= rewards.counts["r/timeout"] <= 44


@pytest.mark.parametrize("target", ["too_few", "too_many", "single", "column"])
def test_a_wrong_shape_is_no_score(make, target):
    rewards = make(target)
    scores = column(rewards, said("a", "b", "c"))
    assert all(map(math.isnan, scores))
    assert rewards.counts["r/wrong_shape"] == 3


def test_numbers_of_other_kinds_are_numbers(make):
    same(column(make("act"), said("numpy", "true")), [0.5, 1.0])


def test_prints_do_not_reach_the_answers(make, capfd):
    same(column(make("act"), said("print", "a")), [1.0, 1.0])
    out, err = capfd.readouterr()
    assert out == ""
    assert err.startswith("printed\n")


def test_input_is_at_its_end(make):
    rewards = make("reads_input")
    assert math.isnan(column(rewards, said("a"))[0])
    assert "EOFError" in rewards.lines[0]


def test_a_worker_that_is_killed_during_a_call_and_between_calls(make):
    ticks = []
    rewards = make("act", check=lambda: ticks.append(0))
    process = rewards._parts["r"]._process._process
    timer = threading.Timer(0.3, os.kill, (process.pid, signal.SIGKILL))
    timer.start()
    same(column(rewards, said("a", "sleep", "bb")), [1.0, math.nan, 2.0])
    timer.join()
    assert rewards.counts == {"r/died": 1}
    assert "SIGKILL" in rewards.lines[0]
    assert ticks
    process = rewards._parts["r"]._process._process
    os.kill(process.pid, signal.SIGKILL)
    os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)
    same(column(rewards, said("a")), [1.0])
    assert rewards.counts == {"r/died": 1}


def test_a_signal_ends_the_wait_and_the_call(make):
    class Stop(Exception):
        pass

    waiting = []

    def check():
        waiting.append(0)
        if stop and len(waiting) > 1:
            raise Stop

    stop = False
    rewards = make("act", check=check)
    stop = True
    process = rewards._parts["r"]._process._process
    with pytest.raises(Stop):
        rewards.score(said("sleep"))
    assert process.returncode == -signal.SIGKILL
    stop = False
    same(column(rewards, said("a")), [1.0])


@pytest.mark.parametrize("completion", ["a", "spin"])
def test_the_worker_ends_with_its_parent(tmp_path, completion):
    script = tmp_path / "parent.py"
    script.write_text(
        "import os, signal, sys, threading\n"
        "from align.rewards.base import Conversation\n"
        "from align.rewards.build import RewardHost, components\n"
        f"r = components({{'r': {{'_target_': '{HERE}.act', 'seconds': 60.0}}}}, RewardHost())\n"
        "threading.Timer(0.3, os.kill, (os.getpid(), signal.SIGKILL)).start()\n"
        f"r.score([Conversation('a', {completion!r}, True)])\n"
        "signal.pause()\n"
    )
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(p for p in sys.path if p)}
    # The worker holds the parent's standard error, whose end run() waits for: it comes when both are gone.
    parent = subprocess.run(
        [sys.executable, script], capture_output=True, text=True, env=environment, timeout=30, cwd=os.getcwd()
    )
    assert parent.returncode == -signal.SIGKILL


def test_a_module_that_only_pythonpath_knows(tmp_path):
    (tmp_path / "mine.py").write_text("import helper_of_mine\ndef score(completion): return helper_of_mine.VALUE\n")
    (tmp_path / "helper_of_mine.py").write_text("VALUE = 4.5\n")
    script = (
        "from align.rewards.base import Conversation\n"
        "from align.rewards.build import RewardHost, components\n"
        "import sys\n"
        "r = components({'r': {'_target_': 'mine.score'}}, RewardHost())\n"
        "print(r.score([Conversation('a', 'b', True)]).tolist(), r.weights, 'mine' in sys.modules)\n"
        "r.close()\n"
    )
    environment = os.environ | {"PYTHONPATH": f"{tmp_path}{os.pathsep}{os.getcwd()}"}
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, env=environment, timeout=30, cwd=tmp_path
    )
    assert done.stdout == "[[4.5]] [1.] False\n", done.stderr


def test_a_user_s_class_that_asks_for_the_trainer_s_process(make):
    rewards = components({"r": {"_target_": f"{HERE}.Here", "factor": 2}}, RewardHost())
    same(column(rewards, said("a")), [2.0 * os.getpid()])
    with pytest.raises(ValueError, match=r"reward\.r\.seconds has no effect"):
        make("Here", factor=2)
    with pytest.raises(ValueError, match=r"reward\.r: missing a required argument: 'factor'"):
        components({"r": {"_target_": f"{HERE}.Here"}}, RewardHost())


def test_components_side_by_side_in_the_order_of_the_settings():
    node = {
        "b": {"_target_": f"{HERE}.length", "weight": -2},
        "a": {"_target_": f"{HERE}.act"},
    }
    rewards = components(node, RewardHost())
    scores = rewards.score(said("four", "none"))
    assert rewards.names == ("b", "a")
    assert rewards.weights.tolist() == [-2.0, 1.0]
    same(scores.tolist(), [[4.0, 4.0], [4.0, math.nan]])
    assert rewards.counts == {"a/none": 1}
    assert rewards.score([]).shape == (0, 2)
    processes = [part._process._process for part in rewards._parts.values()]
    rewards.close()
    assert [p.returncode for p in processes] == [0, 0]


@pytest.mark.parametrize(
    "node, message",
    [
        ({}, "no reward: choose reward="),
        ({"x": {"weight": 1.0}}, "reward.x._target_ is missing"),
        ({"x": 3}, "reward.x._target_ is missing"),
        ({"x": {"_target_": 3}}, "reward.x._target_=3: must be a dotted path"),
        ({"x": {"_target_": "nodots"}}, "reward.x._target_=nodots: is not a dotted path"),
        ({"x": {"_target_": "no.such.fn"}}, "No module named 'no'); is its directory on PYTHONPATH?"),
        ({"x": {"_target_": f"{HERE}.lenght"}}, f"reward.x._target_={HERE}.lenght: cannot be found"),
        ({"x": {"_target_": f"{HERE}.not_callable"}}, "is no function or class but int"),
        ({"x": {"_target_": f"{HERE}.both"}}, "asks for both completion and completions"),
        ({"x": {"_target_": f"{HERE}.neither"}}, "cannot be called with parameters (finished, answer)"),
        ({"x": {"_target_": f"{HERE}.later"}}, "is async"),
        ({"x": {"_target_": f"{HERE}.length", "scale": 2}}, "scale cannot be set; its parameters are completion"),
        ({"x": {"_target_": f"{HERE}.Counter", "first": 2}}, "takes other keys"),
        ({"x": {"_target_": f"{HERE}.length", "weight": math.nan}}, "reward.x.weight=nan: must be a finite number"),
        ({"x": {"_target_": f"{HERE}.length", "weight": "1"}}, "reward.x.weight=1: must be a finite number"),
        ({"x": {"_target_": f"{HERE}.length", "seconds": 0}}, "reward.x.seconds=0: must be a finite number greater"),
        ({"x": {"_target_": f"{HERE}.length", "_partial_": True}}, "reward.x._partial_ is not a setting"),
        ({"a/b": {"_target_": f"{HERE}.length"}}, "reward.a/b: a name of letters"),
        ({"x": {"_target_": "align.rewards.shape.Format"}}, "takes other keys: TypeError: missing a required argument"),
        ({"x": {"_target_": "align.rewards.shape.Format", "pattern": "("}}, "pattern=(: is no regular expression"),
        ({"x": {"_target_": "align.rewards.remote.RemoteReward"}}, "reward.x: missing a required argument: 'url'"),
    ],
)  # fmt: skip
def test_wrong_settings_are_told_in_one_line(node, message):
    with pytest.raises(ValueError, match=re.escape(message)) as raised:
        components(node, RewardHost())
    assert str(raised.value).count("\n") == 0


@pytest.mark.parametrize(
    "source, message",
    [
        ("import no_such_package", "cannot be imported (ModuleNotFoundError: No module named 'no_such_package')"),
        ("raise RuntimeError('not today')", "cannot be imported (RuntimeError: not today)"),
        ("def f(:", "cannot be imported (SyntaxError"),
        ("import os\nos._exit(4)", "its process ended with code 4 while it was imported"),
    ],
)
def test_what_fails_at_import_is_told_at_the_start(tmp_path, monkeypatch, source, message):
    (tmp_path / "broken_reward.py").write_text(source + "\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.raises(ValueError, match=re.escape(message)) as raised:
        components({"x": {"_target_": "broken_reward.f"}}, RewardHost())
    assert str(raised.value).startswith("reward.x._target_=broken_reward.f: ")


def test_a_module_that_is_gone_at_a_restart_costs_scores_and_no_crash(tmp_path, monkeypatch):
    module = tmp_path / "fleeting_reward.py"
    module.write_text("import os\ndef f(completion):\n    os._exit(1)\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    rewards = components({"x": {"_target_": "fleeting_reward.f"}}, RewardHost())
    module.unlink()
    assert np.isnan(rewards.score(said("a", "b", "c"))).all()
    assert rewards.counts == {"x/died": 1, "x/not_started": 2}
    rewards.close()
