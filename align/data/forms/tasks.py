"""Forms of a question and its solution: Alpaca, GSM8K, MATH, and RewardBench's pairs."""

from __future__ import annotations

from align.data.forms.base import PROMPT_COLUMNS, Form, given, prompt_of, single, string
from align.data.reasoning import boxed, hashed
from align.data.sources import BadRow
from align.jsons import Json


def _alpaca(row: Json) -> Json:
    given(row, "instruction")
    asked = {key: row[key] for key in ("instruction", "input") if row.get(key) is not None}
    return {"prompt": prompt_of(asked), "completion": string(given(row, "output"), "output")}


def _gsm8k(row: Json) -> Json:
    solution = string(given(row, "answer"), "answer")
    found = hashed(solution)
    if found is None:
        raise BadRow("wrong_type", "answer must end in a line '#### NUMBER'")
    return {"prompt": string(given(row, "question"), "question"), "completion": solution, "answer": found}


def _math(row: Json) -> Json:
    made: Json = {"prompt": prompt_of(row)}
    solution = row.get("solution")
    if solution is not None:
        made["completion"] = string(solution, "solution")
    if row.get("answer") is not None:
        return made | {"answer": str(row["answer"])}
    found = boxed(made.get("completion", ""))
    if not found:
        raise BadRow("wrong_type", r"solution must hold the answer as \boxed{...}, or the column answer it alone")
    return made | {"answer": found[-1]}


def _rewardbench(row: Json) -> Json:
    made = {name: given(row, name) for name in ("chosen", "rejected")}
    return {"prompt": prompt_of(row), **made, "origin": string(given(row, "subset"), "subset")}


FORMS = (
    Form(
        "alpaca",
        "instruction, input, which may be empty, and output, to imitate: Alpaca",
        ({"instruction": "Name the odd one out.", "input": "cod, oak, eel", "output": "Oak."},),
        ("instruction", "input", "output", "text"),  # the set's text says all of it again
        single(_alpaca),
    ),
    Form(
        "rewardbench",
        "a pair of strings and its subset, which becomes the origin: RewardBench",
        ({"prompt": "Name a fish.", "chosen": "Cod.", "rejected": "Oak.", "subset": "alpacaeval-easy"},),
        ("prompt", "chosen", "rejected", "subset"),
        single(_rewardbench),
    ),
    Form(
        "gsm8k",
        "question and a solution that ends in #### and the number, which becomes answer: GSM8K",
        ({"question": "2 cod and 3 eels are how many fish?", "answer": "2 + 3 = <<2+3=5>>5\n#### 5"},),
        ("question", "answer"),
        single(_gsm8k),
    ),
    Form(
        "math",
        r"problem and a solution with its answer in \boxed{}, which becomes answer: MATH",
        ({"problem": "What is half of 1?", "solution": r"It is $\boxed{\frac{1}{2}}$."},),
        (*PROMPT_COLUMNS, "solution", "answer"),
        single(_math),
    ),
)
