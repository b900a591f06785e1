"""Problems with a verifier from reasoning-gym, and the words in which a policy is asked to solve them.

Which answers a policy gives and what is learnt from them is the trainers' business.
"""

from __future__ import annotations

import hashlib
import json
import re
from dataclasses import dataclass
from typing import Any

from align.jsons import Fields, Json

Message = Json

INSTRUCTION = "Write a Python program that prints the answer."

# Worked examples: question, program, what it printed, final answer. Small policies learn the form from them alone.
_EXAMPLES = (
    ("What is 17 + 25 - 8?", "print(17 + 25 - 8)", "34"),
    ("A box holds 12 rows of 15 eggs. How many eggs are in the box?", "print(12 * 15)", "180"),
    ("Which is the smallest number above 20 that 7 divides?", "n = 21\nwhile n % 7:\n    n += 1\nprint(n)", "21"),
)
MAX_EXAMPLES = len(_EXAMPLES)

_LINE = re.compile(r"^\W*(?:final\s+)?answer\W*[:=]\s*(.+?)\s*$", re.IGNORECASE | re.MULTILINE)
_HASHED = re.compile(r"^[ \t]*####[ \t]*\$?([-+]?(?:\d[\d,]*(?:\.\d+)?|\.\d+)(?:/\d+)?)\.?[ \t]*$", re.MULTILINE)
_BOX = re.compile(r"\\(?:boxed|fbox)(?:\s*\{|\s+(?P<bare>[-+]?[\w./]+)(?=[\s$]|$))")
_NUMBER = re.compile(r"(?<![\w.])[-+]?(?:\d{1,3}(?:,\d{3})+|\d+)(?:\.\d+)?(?:/\d+)?(?![\w/])")


@dataclass(frozen=True)
class Problem:
    """A question and what its verifier needs."""

    id: str  # task, seed and number: the same words name the same problem
    question: str
    answer: str
    entry: Fields  # reasoning-gym's own, with metadata


@dataclass(frozen=True)
class ProblemSet:
    """Problems to learn from and problems to be measured on, none in both."""

    train: tuple[Problem, ...]
    heldout: tuple[Problem, ...]
    num_repeated: int  # problems that were drawn and left out because their question had come before
    dataset: Any  # reasoning-gym's, for its verifier

    def fingerprint(self) -> str:
        """Of all questions and which are held out. Ids do not tell: what a seed draws is up to a version."""
        questions = [[p.question for p in part] for part in (self.heldout, self.train)]
        return hashlib.sha256(json.dumps(questions).encode()).hexdigest()

    def correct(self, problem: Problem, text: str) -> bool:
        """Whether the final answer in `text` is right: the verifier's full score, not part of it."""
        answer = final_answer(text)
        return answer is not None and float(self.dataset.score_answer(answer, dict(problem.entry))) == 1.0


def problems(task: str, settings: Fields, num_train: int, num_heldout: int, seed: int) -> ProblemSet:
    """Problems of one reasoning-gym task with the task's own settings, the held-out ones first drawn.

    With tasks that draw each problem by its number, as most do, the held-out ones do not depend on num_train.
    Raises ValueError for an unknown task or setting, and when the task has too few different questions.
    """
    key = f"collect.task={task}"
    try:
        found, drawn, dataset = draw(task, settings, num_train + num_heldout, seed, key)
    except TooFew as error:
        raise ValueError(
            f"{error} (num_problems + num_heldout); ask for fewer, or for harder ones in collect.task_settings"
        ) from None
    heldout, train = tuple(found[:num_heldout]), tuple(found[num_heldout:])
    assert not {p.question for p in heldout} & {p.question for p in train}
    return ProblemSet(train, heldout, drawn - len(found), dataset)


class TooFew(ValueError):
    """A task has fewer different questions than are wanted."""


def draw(task: str, settings: Fields, wanted: int, seed: int, key: str) -> tuple[list[Problem], int, Any]:
    """The first problems with different questions, how many were drawn for them, and the data set that scores them.

    key: how the user named them, for messages. Raises TooFew, and ValueError for an unknown task or setting.
    """
    dataset = _dataset(task, settings, 4 * wanted, seed, key)
    seen: set[str] = set()
    found: list[Problem] = []
    for drawn in range(1, 4 * wanted + 1):
        entry = dataset[drawn - 1]
        question = entry["question"].strip()
        if question not in seen:
            seen.add(question)
            found.append(Problem(f"{task}-{seed}-{drawn - 1}", question, str(entry["answer"]), entry))
        if len(found) == wanted:
            return found, drawn, dataset
    raise TooFew(f"{key}: {4 * wanted} draws have {len(found)} different questions, {wanted} are wanted")


def prompt_messages(problem: Problem, num_examples: int) -> list[Message]:
    """The conversation that the policy continues: worked examples with the tool, then the question.

    num_examples: 0 to MAX_EXAMPLES.
    """
    if not 0 <= num_examples <= MAX_EXAMPLES:
        raise ValueError(f"collect.num_examples={num_examples}: must be from 0 to {MAX_EXAMPLES}")
    messages: list[Message] = []
    for question, program, output in _EXAMPLES[:num_examples]:
        messages += [
            {"role": "user", "content": f"{question}\n{INSTRUCTION}"},
            {"role": "assistant", "content": f"```python\n{program}\n```"},
            {"role": "user", "content": f"```output\n{output}\n```"},
            {"role": "assistant", "content": f"The answer is \\boxed{{{output}}}."},
        ]
    return [*messages, {"role": "user", "content": f"{problem.question}\n{INSTRUCTION}"}]


def final_answer(text: str) -> str | None:
    r"""The final answer in a text: the last non-empty \boxed{...}; else the last line `#### NUMBER`; else the last line
    `Answer: ...`; else the last number; None without any. Without surrounding white space, dollar signs, full stop and
    thousands commas.
    """
    found = boxed(text)
    if found:
        return _tidy(found[-1])
    for pattern in (_HASHED, _LINE, _NUMBER):
        found = pattern.findall(text)
        if found and _tidy(found[-1]):
            return _tidy(found[-1])
    return None


def boxed(text: str) -> list[str]:
    r"""The insides of every closed \boxed{...} or \fbox{...}, braces in them balanced, and of \boxed 5; none empty."""
    out = []
    for match in _BOX.finditer(text):
        if match["bare"]:
            out.append(match["bare"])
            continue
        depth, end = 1, match.end()
        while end < len(text) and depth:
            depth += {"{": 1, "}": -1}.get(text[end], 0)
            end += 1
        if depth == 0:
            out.append(text[match.end() : end - 1])
    return [inside for inside in out if inside.strip()]


def hashed(text: str) -> str | None:
    """The number of the last line `#### NUMBER`, as solutions of GSM8K end; without thousands commas. None without."""
    found = _HASHED.findall(text)
    return _tidy(found[-1]) if found else None


def _tidy(answer: str) -> str:
    answer = answer.strip("$*` \t\n").removesuffix(".").strip("$*` \t\n")
    return answer.replace(",", "") if _NUMBER.fullmatch(answer) else answer


def _dataset(task: str, settings: Fields, size: int, seed: int, key: str) -> Any:
    try:
        import warnings

        with warnings.catch_warnings():  # its dependencies are not clean on newer Pythons
            warnings.simplefilter("ignore")
            import reasoning_gym
    except ImportError as error:
        raise ValueError(f"{key} needs the package reasoning-gym ({error}); type: pip install reasoning-gym") from error
    try:
        return reasoning_gym.create_dataset(task, size=size, seed=_mixed(seed), **settings)
    except Exception as error:  # its factories raise ValueError, TypeError and AssertionError for wrong settings
        raise ValueError(unfit(key, settings, error)) from error


def unfit(key: str, settings: Fields | None, error: Exception) -> str:
    """Of settings that a task refuses."""
    return f"{key} with task_settings={dict(settings or {})}: {' '.join(str(error).split())[:300]}"


def _mixed(seed: int) -> int:
    """31 bits of a seed: reasoning-gym draws problem k from seed + k, so that neighbours would share problems."""
    import numpy as np

    return int(np.random.SeedSequence(seed).generate_state(1, np.uint32)[0] >> np.uint32(1))
