"""Forms of several answers with ranks or scores, best first: Nectar, UltraFeedback, HelpSteer, RewardBench 2."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from align.data.audit import LEFT_OUT, TIE
from align.data.forms.base import PROMPT_COLUMNS, Form, given, listed, number, opened, prompt_of, single, string
from align.data.sources import BadRow, NotUsed
from align.jsons import Json

_LISTS = ("completions", "answers", "responses", "generations", "outputs", "candidates")
_TEXTS = ("response", "answer", "text", "completion", "content", "output")  # of an answer that is an object
_SCORES = ("overall_score", "score", "rating", "reward")
_PARALLEL = ("scores", "ratings", "rewards")  # lists beside a list of texts
ATTRIBUTES = ("helpfulness", "correctness", "coherence", "complexity", "verbosity")

Scored = tuple[str, float | None]  # an answer and how good it is, higher is better; None: not said


def answers_of(row: Json) -> tuple[str, list[Any]]:
    """The column with the list of answers, and the list. Raises BadRow."""
    name = next((name for name in _LISTS if row.get(name) is not None), None)
    if name is None:
        raise BadRow(
            "missing_field", f"no column holds a list of answers ({', '.join(_LISTS)}); it has {', '.join(row)}"
        )
    return name, listed(row[name], name)


def text_of(answer: object, name: str) -> str:
    """What an answer says that is a text or an object with one. Raises BadRow."""
    if isinstance(answer, dict):
        key = next((key for key in _TEXTS if isinstance(answer.get(key), str)), None)
        if key is None:
            raise BadRow("missing_field", f"{name} has no text ({', '.join(_TEXTS)}); it has {', '.join(answer)}")
        return answer[key]
    return string(answer, name)


def _best_first(prompt: object, answers: Sequence[Scored]) -> Iterator[Json | BadRow]:
    """One ranked row. Of answers that nothing tells apart the first is kept, the others are left out and counted."""
    kept: list[tuple[str, float]] = []
    for place, (text, score) in enumerate(answers, 1):
        if score is None:
            yield NotUsed(LEFT_OUT, f"answer {place} has no score")
        elif any(score == known or text == said for said, known in kept):
            yield NotUsed(TIE, f"answer {place} says or scores the same as one before it")
        else:
            kept.append((text, score))
    if len(kept) < 2:
        yield NotUsed(TIE, "no two of the answers differ in score")
        return
    kept.sort(key=lambda item: -item[1])
    yield {"prompt": prompt, "ranked": [text for text, _ in kept]}


def _ranked(rows: Sequence[Json]) -> Iterator[Json | BadRow]:
    for row in rows:
        name, answers = answers_of(row)
        beside = row.get("ranks")
        listing = beside if isinstance(beside, list) and len(beside) == len(answers) else answers
        ranks = [number(each.get("rank") if isinstance(each, dict) else each) for each in listing]
        if None in ranks:
            raise BadRow("missing_field", f"answer {ranks.index(None) + 1} of {name} has no number 'rank'")
        texts = [text_of(answer, f"answer {i} of {name}") for i, answer in enumerate(answers, 1)]
        yield from _best_first(prompt_of(row), [(t, -r) for t, r in zip(texts, ranks, strict=True) if r is not None])


def _scored(rows: Sequence[Json]) -> Iterator[Json | BadRow]:
    for row in rows:
        name, answers = answers_of(row)
        texts = [text_of(answer, f"answer {i} of {name}") for i, answer in enumerate(answers, 1)]
        yield from _best_first(prompt_of(row), list(zip(texts, _scores(row, name, answers), strict=True)))


def _scores(row: Json, name: str, answers: Sequence[object]) -> list[float | None]:
    """A score of each answer, from the answers themselves or a list beside them. Raises BadRow."""
    beside = next((key for key in _PARALLEL if row.get(key) is not None), None)
    if beside is not None:
        values = listed(row[beside], beside)
        if len(values) != len(answers):
            raise BadRow("wrong_type", f"{beside} has {len(values)} numbers for {len(answers)} answers in {name}")
        return [number(value) for value in values]
    keys = [key for key in _SCORES if any(isinstance(a, dict) and key in a for a in answers)]
    if not keys:
        raise BadRow("missing_field", f"the answers in {name} have no score ({', '.join(_SCORES)}), nor has the row")
    return [number(answer.get(keys[0])) if isinstance(answer, dict) else None for answer in answers]


def _rated(rows: Sequence[Json]) -> Iterator[Json | BadRow]:
    for row in rows:
        name, answers = answers_of(row)
        found: list[Scored] = []
        for place, answer in enumerate(answers, 1):
            aspects = answer.get("annotations") if isinstance(answer, dict) else None
            if not isinstance(aspects, dict):
                raise BadRow("missing_field", f"answer {place} of {name} has no object 'annotations'")
            ratings = [number(a.get("Rating")) for a in aspects.values() if isinstance(a, dict)]
            known = [rating for rating in ratings if rating is not None]  # GPT-4 gave some none: "N/A"
            found.append((text_of(answer, f"answer {place} of {name}"), sum(known) / len(known) if known else None))
        yield from _best_first(prompt_of(row), found)


def _helpsteer(rows: Sequence[Json]) -> Iterator[Json | BadRow]:
    """Two answers to a prompt as a pair with the scores of its attributes, more of them as a ranked list."""
    scores = [_attributes_of(row) for row in rows]
    texts = [string(given(row, "response"), "response") for row in rows]
    if len(rows) == 1:
        yield NotUsed(LEFT_OUT, "the only answer to its prompt: `data.form=attributes` reads answers one by one")
        return
    if len(rows) > 2:
        yield from _best_first(_asked(rows[0]), [(t, s.get("helpfulness")) for t, s in zip(texts, scores, strict=True)])
        return
    one, other = (score.get("helpfulness") for score in scores)
    if one is None or other is None:
        raise BadRow("missing_field", "the column 'helpfulness', by which one answer is better, holds no number")
    if one == other:
        yield NotUsed(TIE, f"both answers have helpfulness {one:g}")
        return
    best, worst = (0, 1) if one > other else (1, 0)
    yield {
        "prompt": _asked(rows[0]),
        "chosen": texts[best],
        "rejected": texts[worst],
        "scores": {"chosen": scores[best], "rejected": scores[worst]},
        "numbers": {"margin": abs(one - other)},
    }


def _attributes(row: Json) -> Json:
    text = string(given(row, "response"), "response")
    return {"prompt": _asked(row), "completion": text, "numbers": _attributes_of(row)}


def _attributes_of(row: Json) -> dict[str, float]:
    found = {name: number(row.get(name)) for name in ATTRIBUTES}
    known = {name: value for name, value in found.items() if value is not None}
    if not known:
        raise BadRow("missing_field", f"none of the columns {', '.join(ATTRIBUTES)} holds a number")
    return known


def _asked(row: Json) -> str | list[Json]:
    return opened(string(given(row, "prompt"), "prompt"))


def _rewardbench2(rows: Sequence[Json]) -> Iterator[Json | BadRow]:
    """Each right answer beside each wrong one: the set tells right from wrong, not right from better."""
    for row in rows:
        right, wrong = (listed(given(row, name), name) for name in ("chosen", "rejected"))
        for chosen in right:
            for rejected in wrong:
                pair = {
                    "chosen": string(chosen, "an answer in chosen"),
                    "rejected": string(rejected, "one in rejected"),
                }
                yield {"prompt": prompt_of(row), **pair, "origin": string(given(row, "subset"), "subset")}


_TWO = [{"response": "Cod.", "overall_score": 8.5}, {"response": "Oak.", "overall_score": 2.0}]
_RATED = [
    {"response": text, "annotations": {"helpfulness": {"Rating": one}, "honesty": {"Rating": two}}}
    for text, one, two in (("Cod.", "5", "4"), ("Oak.", "1", "N/A"))
]
_STEER = [
    {"prompt": "Name a fish.", "response": text, **dict(zip(ATTRIBUTES, values, strict=True))}
    for text, values in (("Cod.", (4, 4, 4, 1, 1)), ("Oak.", (0, 0, 4, 1, 1)))
]

FORMS = (
    Form(
        "ranked",
        "a prompt and a list of answers with their ranks, 1 the best: Nectar",
        (
            {
                "prompt": "\n\nHuman: Name a fish.\n\nAssistant: ",
                "answers": [{"answer": "Cod.", "rank": 1.0}, {"answer": "Oak.", "rank": 2.0}],
            },
        ),
        (*PROMPT_COLUMNS, *_LISTS, "ranks"),
        _ranked,
    ),
    Form(
        "scored",
        "a prompt and a list of answers with a score each, higher is better: UltraFeedback by overall_score",
        ({"instruction": "Name a fish.", "completions": _TWO},),
        (*PROMPT_COLUMNS, *_LISTS, *_PARALLEL),
        _scored,
    ),
    Form(
        "rated",
        "the same by the mean of each answer's ratings in annotations: UltraFeedback's fine-grained ratings",
        ({"instruction": "Name a fish.", "completions": _RATED},),
        (*PROMPT_COLUMNS, *_LISTS),
        _rated,
    ),
    Form(
        "helpsteer",
        "an answer a row with its attributes; those of one prompt in succession by helpfulness: HelpSteer 1, 2",
        tuple(_STEER),
        ("prompt", "response", *ATTRIBUTES),
        _helpsteer,
        lambda row: str(row.get("prompt")),
    ),
    Form(
        "attributes",
        "the same rows one by one, for objective=attributes: HelpSteer 1, 2",
        (_STEER[0],),
        ("prompt", "response", *ATTRIBUTES),
        single(_attributes),
    ),
    Form(
        "rewardbench2",
        "a prompt, a list of right answers and one of wrong answers; a pair of each two: RewardBench 2",
        ({"prompt": "Name a fish.", "chosen": ["Cod."], "rejected": ["Oak.", "Elm."], "subset": "Factuality"},),
        (*PROMPT_COLUMNS, "chosen", "rejected", "subset"),
        _rewardbench2,
    ),
)
