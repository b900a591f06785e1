"""Verifiers on answers checked by hand."""

from __future__ import annotations

import json
import math
from fractions import Fraction

import pytest

from align.rewards.base import Conversation
from align.rewards.build import RewardHost, components
from align.rewards.verifiers import ExactMatch, NumericAnswer, ReasoningGym, RegexMatch, UnitTests, number

ENTRY = {"question": "State the final answer to: 3 + 4 =", "answer": "7", "metadata": {}}


@pytest.mark.parametrize(
    "completion, extract, score",
    [
        ("So it is \\boxed{7}.", True, 1.0),
        ("3 + 4 is 7", True, 1.0),
        ("3 + 4 is 8", True, 0.0),
        ("I do not know.", True, 0.0),
        ("7", False, 1.0),
        ("It is 7", False, 0.0),
    ],
)
def test_reasoning_gym(completion, extract, score):
    pytest.importorskip("reasoning_gym")
    verifier = ReasoningGym(extract=extract, partial=False)
    assert verifier(completion, task="chain_sum", entry=json.dumps(ENTRY)) == score
    assert verifier(completion, task="chain_sum", entry=ENTRY) == score


def test_reasoning_gym_gives_part_of_a_score_only_when_asked():
    reasoning_gym = pytest.importorskip("reasoning_gym")
    entry = reasoning_gym.create_dataset("chain_sum", size=1, seed=0)[0]
    said = f"the answer is {entry['answer']} apples"  # contains the answer: nearly right for this task's scorer
    own = reasoning_gym.get_score_answer_fn("chain_sum")(said, entry)
    assert 0 < own < 1
    assert ReasoningGym(extract=False, partial=True)(said, "chain_sum", dict(entry)) == own
    assert ReasoningGym(extract=False, partial=False)(said, "chain_sum", dict(entry)) == 0.0


def test_reasoning_gym_in_its_process():
    pytest.importorskip("reasoning_gym")
    node = {"_target_": "align.rewards.verifiers.ReasoningGym", "extract": True, "partial": False, "seconds": 20.0}
    rewards = components({"correct": node}, RewardHost())
    rows = [
        Conversation("", "It is 7.", True, fields={"task": "chain_sum", "entry": json.dumps(ENTRY)}),
        Conversation("", "It is 7.", True, fields={"task": "no_such_task", "entry": json.dumps(ENTRY)}),
        Conversation("", "It is 7.", True, fields={"task": "chain_sum"}),
        Conversation("", "It is 6.", True, fields={"task": "chain_sum", "entry": json.dumps(ENTRY)}),
    ]
    scores = rewards.score(rows)[:, 0].tolist()
    rewards.close()
    assert [scores[0], scores[3]] == [1.0, 0.0]
    assert math.isnan(scores[1])
    assert math.isnan(scores[2])
    assert rewards.counts == {"correct/raised": 1, "correct/missing_column": 1}


@pytest.mark.parametrize(
    "completion, answer, extract, ignore_case, score",
    [
        (" Paris\n", "Paris", False, False, 1.0),
        ("paris", "Paris", False, False, 0.0),
        ("paris", "Paris", False, True, 1.0),
        ("It is Paris.", "Paris", False, True, 0.0),
        ("It is \\boxed{Paris}.", "Paris", True, False, 1.0),
        ("Answer: Paris", "Paris", True, False, 1.0),
        ("no idea", "Paris", True, False, 0.0),
        ("\\boxed{42}", 42, True, False, 1.0),
        ("420", 42, False, False, 0.0),
    ],
)
def test_exact_match(completion, answer, extract, ignore_case, score):
    assert ExactMatch(extract=extract, ignore_case=ignore_case)(completion, answer) == score


@pytest.mark.parametrize(
    "completion, answer, extract, whole, score",
    [
        ("x is 12 now", r"\b1\d\b", False, False, 1.0),
        ("x is 12 now", r"\b1\d\b", False, True, 0.0),
        ("x is \\boxed{12}", r"1\d", True, True, 1.0),
        ("nothing", r".*", True, True, 0.0),
    ],
)
def test_regex_match(completion, answer, extract, whole, score):
    assert RegexMatch(extract=extract, whole=whole)(completion, answer) == score


@pytest.mark.parametrize(
    "text, value",
    [
        ("1,234.5", Fraction(2469, 2)),
        ("-12", Fraction(-12)),
        ("\u22123", Fraction(-3)),
        ("3/4", Fraction(3, 4)),
        ("\\frac{3}{4}", Fraction(3, 4)),
        ("1e-3", Fraction(1, 1000)),
        (".5", Fraction(1, 2)),
        ("$18$", Fraction(18)),
        ("18 apples", Fraction(18)),
        ("x = 18", Fraction(18)),
        ("1,23", Fraction(23)),  # no thousands: the last number in it
        ("1/0", None),
        ("none", None),
        ("", None),
        ("1e999999999", None),  # as an integer this would fill the memory
        ("9" * 5000, None),
        ("inf", None),
        ("nan", None),
    ],
)
def test_number(text, value):
    assert number(text) == value


@pytest.mark.parametrize(
    "completion, answer, tolerance, relative, score",
    [
        ("The answer is 1,250 in all.", 1250, 0, 0, 1.0),
        ("\\boxed{0.75}", "3/4", 0, 0, 1.0),
        ("\\boxed{\\frac{3}{4}}", "0.75", 0, 0, 1.0),
        ("0.1", 0.1, 0, 0, 1.0),  # as written, not as the nearest binary fraction
        ("3.14", "3.14159", 0, 0, 0.0),
        ("3.14", "3.14159", 0.002, 0, 1.0),
        ("99", "100", 0, 0.01, 1.0),
        ("98.9", "100", 0, 0.01, 0.0),
        ("no number", "100", 0, 0.01, 0.0),
        ("-101", "-100", 0.5, 0.005, 1.0),
    ],
)
def test_numeric_answer(completion, answer, tolerance, relative, score):
    assert NumericAnswer(tolerance=tolerance, relative=relative)(completion, answer) == score


@pytest.mark.parametrize("answer", [None, "many", ""])
def test_a_row_that_cannot_be_used_is_no_wrong_answer(answer):
    with pytest.raises(ValueError, match="answer"):
        NumericAnswer(tolerance=0, relative=0)("7", answer)


ADD = "Here:\n```python\ndef add(a, b):\n    return a + b\n```\nDone."
TESTS = ["assert add(1, 2) == 3", "assert add(-1, 1) == 0", "assert add(2, 2) == 5"]


@pytest.mark.parametrize(
    "completion, tests, partial, score",
    [
        (ADD, TESTS[:2], False, 1.0),
        (ADD, TESTS, False, 0.0),
        (ADD, TESTS, True, 2 / 3),
        (ADD, "\n".join(TESTS[:2]), False, 1.0),
        (ADD.replace("```python", "```"), TESTS[:1], False, 1.0),
        (ADD.replace("```python\n", "").replace("```", ""), TESTS[:1], False, 0.0),
        ("```python\ndef add(a, b): return 0\n```\n" + ADD, TESTS[:1], False, 1.0),  # the last block counts
        ("```python\nimport sys\nsys.exit(0)\n```", TESTS[:1], False, 0.0),  # it ends well, but not after the tests
        ("```python\nimport os\nos._exit(0)\n```", TESTS[:1], False, 0.0),
        ("```python\ndef add(a, b): return 3\nprint = None\n```", TESTS[:1], False, 1.0),
        ("```python\nwhile True: pass\n```", TESTS[:1], False, 0.0),
        ("```python\ndef add(:\n```", TESTS, True, 0.0),
        ("```python\nfrom __future__ import annotations\ndef add(a, b): return a + b\n```", TESTS[:1], False, 1.0),
    ],
)
def test_unit_tests(completion, tests, partial, score):
    assert UnitTests(partial=partial, program_seconds=1.0, memory_mib=256)(completion, tests) == score


@pytest.mark.parametrize("tests", [[], "", [""], [3]])
def test_no_tests_are_no_wrong_answer(tests):
    with pytest.raises(ValueError, match="tests must be Python code"):
        UnitTests(partial=False, program_seconds=1.0, memory_mib=256)(ADD, tests)
