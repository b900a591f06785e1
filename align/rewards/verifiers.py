"""Rewards that check an answer against what the prompt's row knows: 1 for right, 0 for wrong. Run in a worker process.

A completion without an answer is wrong, not unscored; a row that the verifier cannot use (an answer that is no number,
say) raises, so that its completions have no score.
"""

from __future__ import annotations

import json
import re
import secrets
import warnings
from collections.abc import Callable, Sequence
from fractions import Fraction
from functools import lru_cache
from importlib.util import find_spec

from align.data.reasoning import final_answer
from align.jsons import Fields
from align.rewards.base import RewardTarget
from align.tools.python import Limits, run_python

_FENCE = re.compile(r"^[ \t]*```(?:python|py)?[ \t]*\n(.*?)^[ \t]*```", re.DOTALL | re.MULTILINE)
_FRACTION = re.compile(r"\\[dt]?frac\s*\{\s*(\d+)\s*\}\s*\{\s*(\d+)\s*\}")
_THOUSANDS = re.compile(r"[-+]?\d{1,3}(?:,\d{3})+(?:\.\d*)?")
_NUMBER = re.compile(r"[-+]?(?:\d+(?:\.\d*)?|\.\d+)(?:[eE][-+]?\d{1,3})?|[-+]?\d+/\d+")
_LONGEST = 200  # characters of a number; exact arithmetic on what is longer would cost more than it says


class ReasoningGym(RewardTarget):
    """reasoning-gym's own verifier of the row's task, in [0, 1]. Columns: task, entry (JSON or a mapping).

    entry: what reasoning-gym made: question, answer, metadata. extract: score the final answer in the completion
    (align.data.reasoning.final_answer) where it has one, boxed, announced or a number, else all of it. partial: keep
    what the verifier gives for an answer that is nearly right; without, only its full score counts.
    """

    def __init__(self, *, extract: bool, partial: bool):
        _scorer("chain_sum")  # its import takes seconds, which no completion's deadline is to pay
        self.extract = extract
        self.partial = partial

    @classmethod
    def check_keys(cls, **keys: object) -> None:  # noqa: ARG003
        """See RewardTarget."""
        if find_spec("reasoning_gym") is None:
            raise ValueError("needs the package reasoning-gym; type: pip install reasoning-gym")

    def __call__(self, completion: str, task: str, entry: str | Fields) -> float:
        """The score of a completion."""
        known = json.loads(entry) if isinstance(entry, str) else dict(entry)
        # the answer of many a task is a word: nothing marks it
        answer = (final_answer(completion) if self.extract else None) or completion
        score = float(_scorer(task)(answer, known))
        return score if self.partial else float(score == 1.0)


@lru_cache(maxsize=256)
def _scorer(task: str) -> Callable[..., float]:
    with warnings.catch_warnings():  # its dependencies are not clean on newer Pythons
        warnings.simplefilter("ignore")
        try:
            from reasoning_gym import get_score_answer_fn
        except ImportError as error:
            raise ValueError(f"needs the package reasoning-gym ({error}); type: pip install reasoning-gym") from error
        return get_score_answer_fn(task)


class ExactMatch:
    """1 if the completion is the row's answer, white space at both ends aside. Column: answer.

    extract: compare the final answer in the completion. ignore_case: "Yes" is "yes".
    """

    def __init__(self, *, extract: bool, ignore_case: bool):
        self.extract = extract
        self.ignore_case = ignore_case

    def __call__(self, completion: str, answer: object) -> float:
        """1 or 0."""
        given = (final_answer(completion) or "") if self.extract else completion
        wanted = _text(answer)
        if self.ignore_case:
            given, wanted = given.casefold(), wanted.casefold()
        return float(given.strip() == wanted.strip())


class RegexMatch:
    """1 if the row's regular expression matches. Column: answer, a pattern in Python's syntax.

    extract: match the final answer in the completion. whole: all of it must match, not a part.
    """

    def __init__(self, *, extract: bool, whole: bool):
        self.extract = extract
        self.whole = whole

    def __call__(self, completion: str, answer: str) -> float:
        """1 or 0."""
        pattern = re.compile(_text(answer))
        given = final_answer(completion) if self.extract else completion
        if given is None:
            return 0.0
        return float(bool(pattern.fullmatch(given) if self.whole else pattern.search(given)))


class NumericAnswer:
    """1 if the completion's final answer is the row's number: |given - answer| <= tolerance + relative * |answer|.

    Column: answer, a number or a text with one. Read exactly: 1,234.5 and 3/4 and \\frac{3}{4} and 1e-3. tolerance: in
    the unit of the answer, >= 0; relative: a part of it, >= 0; both 0: equal.
    """

    def __init__(self, *, tolerance: float = 0.0, relative: float = 0.0):
        if not (0 <= tolerance < float("inf") and 0 <= relative < float("inf")):
            raise ValueError(f"tolerance={tolerance}, relative={relative}: must be 0 or greater")
        self.tolerance = Fraction(tolerance)
        self.relative = Fraction(relative)

    def __call__(self, completion: str, answer: object) -> float:
        """1 or 0."""
        wanted = number(_text(answer))
        if wanted is None:
            raise ValueError(f"the row's answer {str(answer)[:80]!r} holds no number")
        text = final_answer(completion)
        given = None if text is None else number(text)
        return float(given is not None and abs(given - wanted) <= self.tolerance + self.relative * abs(wanted))


def number(text: str) -> Fraction | None:
    """The number that a text is, exactly; else the last number in it; None without one."""
    text = _FRACTION.sub(r"\1/\2", text.strip().strip("$").strip().replace("\u2212", "-"))
    for part in (text, final_answer(text) or ""):
        part = part.strip()
        if _THOUSANDS.fullmatch(part):
            part = part.replace(",", "")
        if len(part) <= _LONGEST and _NUMBER.fullmatch(part):
            try:
                return Fraction(part)
            except ZeroDivisionError:
                return None
    return None


class UnitTests:
    """The part of the row's tests that the code in the completion passes. Column: tests, Python code or a list of it.

    The code is the last closed fenced block (```python, ```py or ```); each test runs after it in a fresh sandboxed
    process (align.tools.python) and passes if it comes to its end without an error. partial: the part that passes;
    without, 1 only if all do. program_seconds, memory_mib: limits of one such process. Whoever writes the code can
    look at the test that runs behind it in the same process: no wall against a policy that learns to.
    """

    def __init__(self, *, partial: bool, program_seconds: float, memory_mib: int):
        self.partial = partial
        self.limits = Limits(seconds=program_seconds, memory_mib=memory_mib, output_bytes=1 << 16)

    def __call__(self, completion: str, tests: str | Sequence[str]) -> float:
        """In [0, 1]."""
        cases = [tests] if isinstance(tests, str) else list(tests)
        if not cases or not all(isinstance(case, str) and case.strip() for case in cases):
            raise ValueError("the row's tests must be Python code, or a list of it that is not empty")
        blocks = _FENCE.findall(completion)
        if not blocks:
            return 0.0
        passed = 0
        for case in cases:
            if self._passes(blocks[-1], case):
                passed += 1
            elif not self.partial:
                return 0.0
        return passed / len(cases)

    def _passes(self, code: str, case: str) -> bool:
        # A program that ends itself before the test has exit code 0 too; only one that came through says the word.
        word = secrets.token_hex(16)
        last = f"__import__('sys').__stdout__.write({word!r}) and None"
        result = run_python(f"{code}\n{case}\n{last}\n", self.limits)
        return not result.error and result.output.endswith(word)


def _text(answer: object) -> str:
    if answer is None:
        raise ValueError("the row's answer is null")
    return str(answer)
