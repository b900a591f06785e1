"""Problems, their split, and what counts as a final answer."""

from __future__ import annotations

import sys

import pytest

from align.data.reasoning import MAX_EXAMPLES, final_answer, problems, prompt_messages
from align.tools.python import Limits, PythonTool, run_python

EASY = {"min_terms": 2, "max_terms": 3, "min_digits": 1, "max_digits": 2}


def test_train_and_heldout_are_disjoint_and_the_same_each_time():
    first, again = (problems("chain_sum", EASY, 20, 10, 3) for _ in range(2))
    assert (len(first.train), len(first.heldout)) == (20, 10)
    questions = [p.question for p in (*first.train, *first.heldout)]
    assert len(set(questions)) == 30
    assert (first.train, first.heldout) == (again.train, again.heldout)
    assert len({p.id for p in (*first.train, *first.heldout)}) == 30
    assert {p.question for p in problems("chain_sum", EASY, 20, 10, 4).train} != {p.question for p in first.train}
    assert problems("chain_sum", EASY, 40, 10, 3).heldout == first.heldout


def test_repeated_questions_are_left_out_and_counted():
    tiny = {"min_terms": 2, "max_terms": 2, "min_digits": 1, "max_digits": 1}
    found = problems("chain_sum", tiny, 60, 20, 0)
    assert found.num_repeated > 0
    last = max(int(p.id.rpartition("-")[2]) for p in found.train)
    assert last + 1 == 80 + found.num_repeated
    with pytest.raises(ValueError, match=r"different questions, 2000 are wanted \(num_problems \+ num_heldout\)"):
        problems("chain_sum", tiny, 1990, 10, 0)


@pytest.mark.parametrize("task", ["chain_sum", "gsm_symbolic", "pool_matrix"])
def test_seeds_next_to_each_other_have_other_problems(task):
    """reasoning-gym draws problem k from seed + k, or hands that to numpy, which takes 32 bits (pool_matrix)."""
    drawn = [{p.question for p in problems(task, {}, 64, 0, seed).train} for seed in range(4)]
    assert [len(questions) for questions in drawn] == [64] * 4
    # large tasks: a question that two seeds share is a rare accident, 63 of 64 are not
    assert sum(map(len, drawn)) - len(set.union(*drawn)) <= 2


def test_any_seed_of_ours_can_be_drawn_from():
    for seed in (2**31, 2**32 + 1, 2**80):
        assert len(problems("pool_matrix", {}, 2, 1, seed).train) == 2


def test_a_fingerprint_is_of_the_questions():
    first = problems("chain_sum", EASY, 3, 2, 0)
    assert first.fingerprint() == problems("chain_sum", EASY, 3, 2, 0).fingerprint()
    others = [(EASY, 3, 2, 1), (EASY, 2, 2, 0), (EASY, 2, 3, 0), ({**EASY, "max_terms": 4}, 3, 2, 0)]
    assert first.fingerprint() not in {problems("chain_sum", *other).fingerprint() for other in others}


def test_the_verifier_wants_its_full_score():
    found = problems("chain_sum", EASY, 2, 0, 0)
    problem, other = found.train
    assert found.correct(problem, f"The answer is \\boxed{{{problem.answer}}}.")
    assert found.correct(problem, f"First {other.answer}, then:\nAnswer: {problem.answer}")
    assert not found.correct(problem, f"\\boxed{{{int(problem.answer) + 1}}}")
    assert not found.correct(problem, "I do not know.")
    # reasoning-gym gives part of its score to an answer that merely holds the right one
    assert 0 < found.dataset.score_answer(f"x {problem.answer}", dict(problem.entry)) < 1
    assert not found.correct(problem, f"\\boxed{{x {problem.answer}}}")


@pytest.mark.parametrize(
    "text, answer",
    [
        (r"The answer is \boxed{34}.", "34"),
        (r"\boxed{1} or rather \boxed{2}, not 3", "2"),
        (r"\boxed {7}", "7"),
        (r"\boxed{\frac{1}{2}}", r"\frac{1}{2}"),
        (r"\boxed{$1,234$}", "1234"),
        (r"\boxed{a, b}", "a, b"),
        (r"\boxed{}  7", "7"),  # an empty box is no answer
        (r"\boxed{3", "3"),  # never closed: the last number
        ("Answer: 5.", "5"),
        ("answer = 5\nAnswer: 6 apples\nGoodbye 7", "6 apples"),
        ("**Final Answer:** `x + 1`", "x + 1"),
        ("The answer is 34.", "34"),
        ("It costs $1,234.50 today", "1234.50"),
        ("17 + 25 - 8 = 34", "34"),
        ("-7", "-7"),
        ("from 5-3", "3"),  # a difference, not a negative number
        ("1/2", "1/2"),
        ("3 cod and 2 eels: 3 + 2 = <<3+2=5>>5\n#### 5", "5"),  # GSM8K
        ("#### 1,250\nthat is all 7 of them", "1250"),
        ("#### Step 2\n\nAnswer: 8", "8"),  # a heading of markdown
        (r"#### 4, so \boxed{5}", "5"),
        (r"\fbox{6} and \boxed 7.", "7"),
        ("version v2", None),
        ("none", None),
        ("", None),
    ],
)
def test_final_answer(text, answer):
    assert final_answer(text) == answer


@pytest.mark.parametrize("num_examples", range(MAX_EXAMPLES + 1))
def test_the_prompt_ends_with_the_question(num_examples):
    problem = problems("chain_sum", EASY, 1, 0, 0).train[0]
    messages = prompt_messages(problem, num_examples)
    assert len(messages) == 4 * num_examples + 1
    assert messages[-1]["role"] == "user"
    assert messages[-1]["content"].startswith(problem.question)
    assert [m["role"] for m in messages[:-1]] == ["user", "assistant"] * (2 * num_examples)


def test_the_worked_examples_are_true():
    """Each program, run by the tool, prints the output that the example shows and the answer that it gives."""
    problem = problems("chain_sum", EASY, 1, 0, 0).train[0]
    messages = prompt_messages(problem, MAX_EXAMPLES)
    for start in range(0, 4 * MAX_EXAMPLES, 4):
        _, program, output, answer = (m["content"] for m in messages[start : start + 4])
        call = PythonTool(5.0, 512, 100).find(program)
        shown = run_python(call, Limits()).output.strip()
        assert output == f"```output\n{shown}\n```"
        assert final_answer(answer) == shown


@pytest.mark.parametrize(
    "task, settings, words",
    [("no_such", {}, "collect.task=no_such.*not registered"), ("chain_sum", {"foo": 1}, "task_settings=.*'foo'")],
)
def test_wrong_tasks_are_named(task, settings, words):
    with pytest.raises(ValueError, match=words):
        problems(task, settings, 1, 1, 0)


def test_a_missing_package_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "reasoning_gym", None)
    with pytest.raises(ValueError, match="pip install reasoning-gym"):
        problems("chain_sum", EASY, 1, 1, 0)


def test_impossible_number_of_examples():
    problem = problems("chain_sum", EASY, 1, 0, 0).train[0]
    with pytest.raises(ValueError, match="num_examples=9"):
        prompt_messages(problem, 9)
