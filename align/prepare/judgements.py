"""Pairs to prompts for a judge, and judgements to what a judge learns from: rows to imitate and preference pairs.

How a judge is asked and how its verdict is read is here; who is asked is align.rewards.judge's.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from align.data.formats import Dialogue, Message, parse
from align.data.pairs import write_lines
from align.data.sources import BadRow, locate, read
from align.jsons import Fields, Json

TEMPLATE = "align:judge_prompt.txt"  # beside this file
PATTERN = r"\[\[([ABC])\]\]"
# Which answer is A, and the verdict that is right then.
ORDERS = {"chosen_first": "A", "rejected_first": "B"}
_PLACE = re.compile(r"\{(prompt|answer_a|answer_b)\}")
_VERDICTS = ("A", "B", "C")  # C: a tie


@dataclass(frozen=True)
class Template:
    """What a judge is asked: a text with {prompt}, {answer_a} and {answer_b}; other braces are text."""

    text: str

    def __post_init__(self) -> None:
        missing = {"prompt", "answer_a", "answer_b"} - set(_PLACE.findall(self.text))
        if missing:
            raise ValueError(f"template: has no {{{min(missing)}}}; it needs {{prompt}}, {{answer_a}} and {{answer_b}}")

    def fill(self, prompt: str, answer_a: str, answer_b: str) -> str:
        """The question. What is put in is never looked at again, so that braces in an answer stay what they are."""
        parts = {"prompt": prompt, "answer_a": answer_a, "answer_b": answer_b}
        return _PLACE.sub(lambda place: parts[place[1]], self.text)


def template(value: str) -> Template:
    """Of a setting: a text with {answer_a} in it, else the name of a file.

    align:NAME ships with the package. White space at the end of a file is left out. Raises ValueError.
    """
    if "{answer_a}" in value:
        return Template(value)
    shipped = value.startswith("align:")
    path = Path(__file__).parent / value.removeprefix("align:") if shipped else Path(value).expanduser()
    try:
        return Template(path.read_text(encoding="utf-8").rstrip())
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"template={value}: neither a text with {{answer_a}} nor a file that can be read") from error


class Verdicts:
    """Reads the verdict of a judgement: its last line, as a whole, must match the pattern.

    pattern: a regular expression with one group, which gives A, B or C (a tie).
    """

    def __init__(self, pattern: str):
        try:
            self._pattern = re.compile(pattern)
        except re.error as error:
            raise ValueError(f"pattern={pattern}: is no regular expression ({error})") from error
        if self._pattern.groups != 1:
            raise ValueError(f"pattern={pattern}: has {self._pattern.groups} groups; one must give A, B or C")

    def __call__(self, judgement: str) -> str | None:
        """A, B, C, or None for what is no verdict."""
        lines = judgement.split("\n") if (judgement := judgement.strip()) else [""]
        found = self._pattern.fullmatch(lines[-1].strip())
        return found[1] if found and found[1] in _VERDICTS else None


def prompt_text(prompt: str | Sequence[Message]) -> str:
    """A prompt as a judge reads it: a text, a single user message's text, or all messages behind their roles."""
    if isinstance(prompt, str):
        return prompt
    if len(prompt) == 1 and prompt[0]["role"] == "user":
        return prompt[0]["content"]
    return "\n\n".join(f"{message['role'].capitalize()}: {_said(message)}" for message in prompt)


def answer_text(answer: str | Sequence[Message]) -> str:
    """An answer as a judge reads it: a text, or what the assistant says in the messages."""
    if isinstance(answer, str):
        return answer
    return "\n\n".join(_said(message) for message in answer if message["role"] == "assistant")


def _said(message: Message) -> str:
    return message.get("content") or json.dumps(message.get("tool_calls") or "", ensure_ascii=False)


# ---- pairs to prompts ----


@dataclass
class PromptAccount:
    """Rows in = pairs asked about, each in both orders, + rows dropped by reason."""

    rows_in: int = 0
    pairs_out: int = 0
    dropped: dict[str, int] = field(default_factory=dict)
    first: dict[str, str] = field(default_factory=dict)  # reason -> file, line and words of the first row

    def lines(self) -> list[str]:
        """For people. Fails if a row is unaccounted for."""
        assert self.rows_in == self.pairs_out + sum(self.dropped.values())
        out = [
            f"judge prompts: {self.rows_in} rows in = {self.pairs_out} pairs, each in both orders, "
            f"+ {sum(self.dropped.values())} dropped"
        ]
        return out + [f"dropped {n} {reason}, first {self.first[reason]}" for reason, n in sorted(self.dropped.items())]

    def drop(self, where: str, reason: str, words: str) -> None:
        """Count a row."""
        self.dropped[reason] = self.dropped.get(reason, 0) + 1
        self.first.setdefault(reason, f"{where}: {words}")


def write_prompts(sources: Sequence[str], out: Path, asked: Template) -> PromptAccount:
    """Read pairs and write a judge's prompts, two a pair, for align generate; whole or not at all.

    A row is {"prompt": [a user message], "pair", "order", "verdict"}: pair is the same for both orders, verdict what is
    right, A or B; `subset` is kept. Rows that are no pair of texts are dropped and counted, a pair that stands there
    again, and pairs whose answers stand there the other way round as well. Raises ValueError if none is left.
    """
    _check_out(out, sources)
    account = PromptAccount()
    pairs: dict[str, tuple[str, tuple[str, str, str], Json]] = {}  # id -> place, texts, subset
    contradicted: set[str] = set()
    for name in sources:
        for where, record in read(locate(name)):
            account.rows_in += 1
            try:
                texts = _pair_texts(record)
            except BadRow as bad:
                account.drop(where, bad.reason, str(bad))
                continue
            prompt, chosen, rejected = texts
            # of the two answers in any order, so that contradictions meet
            digest = hashlib.sha256(json.dumps([prompt, *sorted((chosen, rejected))]).encode())
            key = digest.hexdigest()[:16]
            if key in contradicted:
                account.drop(where, "contradicted", "the same answers are chosen and rejected the other way round")
            elif key not in pairs:
                subset = record.get("subset")  # type: ignore[union-attr]
                pairs[key] = where, texts, {} if subset is None else {"subset": subset}
            elif pairs[key][1] == texts:
                account.drop(where, "repeated", "the pair stands there before")
            else:
                for place in (pairs.pop(key)[0], where):
                    account.drop(place, "contradicted", "the same answers are chosen and rejected the other way round")
                contradicted.add(key)
    account.pairs_out = len(pairs)
    if not pairs:
        raise ValueError(f"pairs={','.join(sources)}: no pair is left; {'; '.join(account.lines())}")
    write_lines(out, (json.dumps(row, ensure_ascii=False) for row in _prompt_rows(pairs, asked)))
    return account


def _prompt_rows(pairs: Fields, asked: Template) -> Iterator[Json]:
    for key, (_, (prompt, chosen, rejected), subset) in pairs.items():
        for order, verdict in ORDERS.items():
            answers = (chosen, rejected) if order == "chosen_first" else (rejected, chosen)
            question = [{"role": "user", "content": asked.fill(prompt, *answers)}]
            yield {"prompt": question, "pair": key, "order": order, "verdict": verdict, **subset}


def _pair_texts(record: Json | BadRow) -> tuple[str, str, str]:
    """Prompt, chosen and rejected as a judge reads them. Raises BadRow."""
    if isinstance(record, BadRow):
        raise record
    understood = parse(record)
    if understood.kind != "pair":
        raise BadRow("not_a_pair", f"is a row of kind {understood.kind}; a judge is asked about chosen and rejected")
    sides = [understood.sides[name] for name in ("chosen", "rejected")]
    if not all(isinstance(side, Dialogue) for side in sides):
        raise BadRow("no_text", "the answers are tokens; a judge needs texts or messages")
    chosen, rejected = sides
    if chosen.prompt != rejected.prompt:  # type: ignore[union-attr]
        raise BadRow("different_prompts", "chosen and rejected answer other prompts; a judge compares two to one")
    answers = [answer_text(side.completion) for side in sides]  # type: ignore[union-attr]
    if answers[0] == answers[1]:
        raise BadRow("identical", "the assistant says the same in both answers")
    return prompt_text(chosen.prompt), answers[0], answers[1]  # type: ignore[union-attr]


# ---- judgements to rows ----


@dataclass(frozen=True)
class Judgement:
    """A sample of a judge."""

    text: str
    finished: bool
    verdict: str | None  # None: unparsable


@dataclass
class Asked:
    """A prompt of a judge with its samples, in the order in which they were read."""

    prompt: Any
    pair: str
    order: str
    subset: str
    samples: list[Judgement] = field(default_factory=list)

    @property
    def right(self) -> str:
        """The verdict that names the chosen answer."""
        return ORDERS[self.order]

    @property
    def accuracy(self) -> float:
        """Part of the samples with the right verdict; a tie and what is unparsable are wrong."""
        return sum(s.verdict == self.right for s in self.samples) / len(self.samples)

    @property
    def winners(self) -> dict[str, float]:
        """Part of the samples that name chosen, rejected, tie; what is unparsable names none."""
        other = "B" if self.right == "A" else "A"
        names = {self.right: "chosen", other: "rejected", "C": "tie"}
        found = Counter(names[s.verdict] for s in self.samples if s.verdict is not None)
        return {name: n / len(self.samples) for name, n in found.items()}


def read_judgements(sources: Sequence[str], verdicts: Verdicts) -> list[Asked]:
    """Read lines of align generate on the prompts of write_prompts: prompt, completion, finished, pair, order, verdict.

    A judgement that was cut has no verdict: its last line is not the judge's last. Raises ValueError with "file:line".
    """
    asked: dict[tuple[str, str], Asked] = {}
    for name in sources:
        for where, record in read(locate(name)):
            try:
                _add(record, asked, verdicts)
            except BadRow as bad:
                raise ValueError(f"{where}: {bad}") from None
    if not asked:
        raise ValueError(f"samples={','.join(sources)}: has no rows; give what align generate wrote for judge prompts")
    return list(asked.values())


def _add(record: Json | BadRow, asked: dict[tuple[str, str], Asked], verdicts: Verdicts) -> None:
    if isinstance(record, BadRow):
        raise record
    for key in ("prompt", "completion", "pair", "order", "verdict"):
        if key not in record:
            raise BadRow(
                "missing_field",
                f"the field {key!r} is missing; make the prompts with align data judgements pairs=FILE, and the "
                "samples of them with align generate",
            )
    prompt, text, pair, order = (record[key] for key in ("prompt", "completion", "pair", "order"))
    if not isinstance(text, str):
        raise BadRow("wrong_type", f"completion must be a string, found {type(text).__name__}")
    if not isinstance(pair, str) or order not in list(ORDERS) or record["verdict"] != ORDERS[order]:
        raise BadRow("wrong_type", "pair, order and verdict are not as align data judgements wrote them")
    finished = record.get("finished", True) is not False
    entry = asked.setdefault((pair, order), Asked(prompt, pair, order, str(record.get("subset") or "")))
    if entry.prompt != prompt:
        raise BadRow("different_prompts", f"pair {pair} has another prompt here; give files of one set of prompts")
    entry.samples.append(Judgement(text, finished, verdicts(text) if finished else None))


@dataclass(frozen=True)
class Mean:
    """Over pairs, with its standard error; nan for a single pair."""

    value: float
    error: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Mean:
        """Of at least one value."""
        n = len(values)
        return cls(float(np.mean(values)), float(np.std(values, ddof=1) / n**0.5) if n > 1 else math.nan)

    def __str__(self) -> str:
        return f"{self.value:.3f}" + ("" if math.isnan(self.error) else f" (standard error {self.error:.3f})")


@dataclass(frozen=True)
class Quality:
    """How well a judge judges. Means over pairs that were judged in both orders."""

    pairs: int  # judged in both orders
    one_order: int  # pairs that are left out
    samples: int
    unparsable: int  # samples without a verdict, cut ones among them
    cut: int
    ties: int
    first: int  # samples with verdict A
    accuracy: Mean | None  # mean of both orders; None: no pair has both
    by_order: Mapping[str, float]
    by_subset: Mapping[str, float]
    consistency: Mean | None  # probability that two samples, one of each order, name the same winner

    @classmethod
    def of(cls, asked: Sequence[Asked]) -> Quality:
        """Of all samples."""
        both, one_order = _both(asked)
        verdicts = [s.verdict for a in asked for s in a.samples]
        accuracy = {pair: (a.accuracy + b.accuracy) / 2 for pair, (a, b) in both.items()}
        subsets: dict[str, list[float]] = {}
        for pair, (a, _) in both.items():
            subsets.setdefault(a.subset, []).append(accuracy[pair])
        agreeing = [sum(part * b.winners.get(who, 0.0) for who, part in a.winners.items()) for a, b in both.values()]
        return cls(
            len(both),
            one_order,
            len(verdicts),
            verdicts.count(None),
            sum(not s.finished for a in asked for s in a.samples),
            verdicts.count("C"),
            verdicts.count("A"),
            Mean.of(list(accuracy.values())) if both else None,
            {order: float(np.mean([ab[i].accuracy for ab in both.values()])) for i, order in enumerate(ORDERS) if both},
            {name: float(np.mean(values)) for name, values in sorted(subsets.items()) if name},
            Mean.of(agreeing) if both else None,
        )

    def as_dict(self) -> Json:
        """For JSON."""
        means = {"accuracy": self.accuracy, "consistency": self.consistency}
        plain = {name: mean and {"mean": mean.value, "error": _finite(mean.error)} for name, mean in means.items()}
        return dict(vars(self)) | plain

    def lines(self) -> list[str]:
        """For people."""
        decided = self.samples - self.unparsable - self.ties
        out = [
            f"judgements: {self.samples} samples, {self.unparsable / self.samples:.1%} unparsable "
            f"({self.cut / self.samples:.1%} cut), {self.ties / self.samples:.1%} ties"
            + (f", {self.first / decided:.1%} of the rest for the answer shown first" if decided else "")
        ]
        if self.accuracy is None:
            return [*out, f"no pair was judged in both orders, {self.one_order} in one: no accuracy"]
        orders = ", ".join(f"{name} {value:.3f}" for name, value in self.by_order.items())
        out.append(f"accuracy over {self.pairs} pairs, mean of both orders: {self.accuracy} ({orders})")
        out += [f"accuracy on {name}: {value:.3f}" for name, value in self.by_subset.items()]
        out.append(f"position consistency: {self.consistency}")
        if self.one_order:
            out.append(f"{self.one_order} pairs were judged in one order only and are left out of both")
        return out


def _both(asked: Sequence[Asked]) -> tuple[dict[str, tuple[Asked, Asked]], int]:
    """Pairs with both orders, chosen_first before rejected_first; and the number of the others."""
    found: dict[str, dict[str, Asked]] = {}
    for entry in asked:
        found.setdefault(entry.pair, {})[entry.order] = entry
    both = {pair: (e["chosen_first"], e["rejected_first"]) for pair, e in found.items() if len(e) == len(ORDERS)}
    return both, len(found) - len(both)


@dataclass(frozen=True)
class Rows:
    """What is learnt from, and what became of the rest by reason."""

    rows: list[Json]
    dropped: dict[str, int]

    def line(self, name: str) -> str:
        """For people."""
        reasons = ", ".join(f"{n} {reason}" for reason, n in sorted(self.dropped.items()))
        return f"{name}: {len(self.rows)} rows" + (f"; dropped {reasons}" if reasons else "")


def sft_rows(asked: Sequence[Asked], max_per_prompt: int, seed: int) -> Rows:
    """Rows to imitate: judge prompt and a judgement with the right verdict, as many of either order of a pair.

    A pair whose judgements are right in one order only gives none: position may have decided. Dropped are judgements
    by reason. After RISE, Yu et al. 2025, arXiv 2502.11689, whose code is not published.
    """
    dropped: Counter[str] = Counter()
    rows: list[Json] = []
    right = {(a.pair, a.order): _drawn(a, True, seed, dropped) for a in asked}
    for entry in asked:
        texts = right[entry.pair, entry.order]
        other = next(order for order in ORDERS if order != entry.order)
        partners = right.get((entry.pair, other), [])
        taken = texts[: min(len(partners), max_per_prompt)]
        rows += [{"prompt": entry.prompt, "completion": s.text} for s in taken]
        dropped["wrong_verdict"] += sum(s.verdict is not None and s.verdict != entry.right for s in entry.samples)
        dropped["unparsable"] += sum(s.verdict is None for s in entry.samples)
        over = "over_max_per_prompt" if len(taken) == max_per_prompt else "unbalanced"
        dropped[over if partners else "right_in_one_order_only"] += len(texts) - len(taken)
    return Rows(rows, {reason: n for reason, n in dropped.items() if n})


def preference_rows(asked: Sequence[Asked], max_per_prompt: int, seed: int) -> Rows:
    """Pairs of judgements of one judge prompt: the verdict of chosen is right, that of rejected wrong or unparsable.

    As many whose right verdict is A as B: of the order with more, those of pairs that have both orders are kept first,
    then a random choice. Dropped are prompts (prompts_...), pairs (pairs_...) and judgements. After RISE, arXiv
    2502.11689.
    """
    dropped: Counter[str] = Counter()
    found: list[tuple[Asked, list[Json]]] = []
    for entry in asked:
        right = _drawn(entry, True, seed, dropped)
        said = {sample.text for sample in right}
        others = _drawn(entry, False, seed, dropped)
        wrong = [sample for sample in others if sample.text not in said]  # cut where a right one ends
        dropped["repeated"] += len(others) - len(wrong)
        if not right or not wrong:
            dropped["prompts_all_wrong" if not right else "prompts_all_right"] += 1
            continue
        pairs = list(zip(right, wrong, strict=False))
        dropped["without_partner"] += abs(len(right) - len(wrong))
        dropped["pairs_over_max_per_prompt"] += max(0, len(pairs) - max_per_prompt)
        found.append((entry, [_preference(entry, c, r) for c, r in pairs[:max_per_prompt]]))
    counts = {order: sum(len(rows) for entry, rows in found if entry.order == order) for order in ORDERS}
    left = dict.fromkeys(ORDERS, min(counts.values()))
    twice = Counter(entry.pair for entry, _ in found)
    kept: dict[tuple[str, str], list[Json]] = {}
    for entry, rows in sorted(found, key=lambda e: (-twice[e[0].pair], _seed(seed, e[0].pair))):
        kept[entry.pair, entry.order] = taken = rows[: left[entry.order]]
        left[entry.order] -= len(taken)
        dropped["pairs_unbalanced"] += len(rows) - len(taken)
    return Rows(
        [row for entry, _ in found for row in kept[entry.pair, entry.order]],
        {reason: n for reason, n in dropped.items() if n},
    )


def _preference(entry: Asked, chosen: Judgement, rejected: Judgement) -> Json:
    row = {"prompt": entry.prompt, "chosen": chosen.text, "rejected": rejected.text}
    return row if rejected.finished else row | {"rejected_finished": False}


def _drawn(entry: Asked, right: bool, seed: int, dropped: Counter[str]) -> list[Judgement]:
    """The samples with a right, or with no right, verdict, each text once, in a random order that depends on the seed
    and the prompt alone."""
    unique: dict[str, Judgement] = {}
    for sample in entry.samples:
        if (sample.verdict == entry.right) != right:
            continue
        reason = "" if sample.text.strip() else "empty"
        reason = reason or ("repeated" if sample.text in unique else "")
        if reason:
            dropped[reason] += 1
        else:
            unique[sample.text] = sample
    texts = list(unique.values())
    rng = np.random.default_rng((_seed(seed, entry.pair), list(ORDERS).index(entry.order), right))
    return [texts[i] for i in rng.permutation(len(texts))]


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


def _seed(seed: int, pair: str) -> int:
    return int.from_bytes(hashlib.sha256(f"{seed} {pair}".encode()).digest()[:8], "big")


# ---- the command ----


def run(words: Sequence[str], say: Callable[[str], None]) -> int:
    """align data judgements: pairs=FILE out=FILE.jsonl writes prompts, samples=FILE out=DIR what is learnt from them.

    Without out= samples are only told about. Returns the exit code. Raises ValueError.
    """
    given = {"pairs": "", "samples": "", "out": "", "template": "", "pattern": "", "max_per_prompt": "", "seed": ""}
    for word in words:
        key, equals, value = word.partition("=")
        if key not in given or not equals:
            raise ValueError(f"align data judgements {word}: takes {', '.join(f'{name}=' for name in given)}")
        given[key] = value
    if bool(given["pairs"]) == bool(given["samples"]):
        raise ValueError("give pairs=FILE to write judge prompts, or samples=FILE to make rows of judgements")
    idle = ("pattern", "max_per_prompt", "seed") if given["pairs"] else ("template",)
    without_effect = [f"{key}={given[key]}" for key in idle if given[key]]
    if without_effect:
        step = "pairs" if given["pairs"] else "samples"
        raise ValueError(f"{without_effect[0]} has no effect with {step}=; remove it")
    sources = _names(given["pairs"] or given["samples"])
    if given["pairs"]:
        if not given["out"]:
            raise ValueError("give out=FILE.jsonl: where the judge prompts are written")
        for line in write_prompts(sources, Path(given["out"]), template(given["template"] or TEMPLATE)).lines():
            say(line)
        say(f"written {given['out']}")
        return 0
    limit, seed = (_number(key, given[key] or default) for key, default in (("max_per_prompt", "1"), ("seed", "0")))
    if limit < 1:
        raise ValueError("max_per_prompt=0: must be at least 1")
    asked = read_judgements(sources, Verdicts(given["pattern"] or PATTERN))
    quality = Quality.of(asked)
    for line in quality.lines():
        say(line)
    return _write(asked, quality, Path(given["out"]), limit, seed, say) if given["out"] else 0


def _write(
    asked: Sequence[Asked], quality: Quality, out: Path, limit: int, seed: int, say: Callable[[str], None]
) -> int:
    """sft.jsonl, pairs.jsonl and the account in the directory; 1 if there is nothing to learn from."""
    if out.is_file() or out.suffix:
        raise ValueError(f"out={out}: must be a directory; sft.jsonl and pairs.jsonl are written into it")
    made = {"sft.jsonl": sft_rows(asked, limit, seed), "pairs.jsonl": preference_rows(asked, limit, seed)}
    account = {
        "quality": quality.as_dict(),
        "max_per_prompt": limit,
        "seed": seed,
        **{name: {"rows": len(rows.rows), "dropped": rows.dropped} for name, rows in made.items()},
    }
    # not .json: in a directory that is read as a data set it would be taken for rows
    write_lines(out / "judgements.account", [json.dumps(account, indent=1)])
    for name, rows in made.items():
        say(rows.line(name))
        if rows.rows:
            write_lines(out / name, (json.dumps(row, ensure_ascii=False) for row in rows.rows))
            say(f"written {out / name}")
        else:
            (out / name).unlink(missing_ok=True)  # of an earlier command: it would be taken for this one's
            say(f"{name} is not written: nothing to learn from is left")
    return 0 if any(rows.rows for rows in made.values()) else 1


def _check_out(out: Path, sources: Sequence[str]) -> None:
    if out.suffix != ".jsonl":
        raise ValueError(f"out={out}: must end in .jsonl")
    if any(Path(name).expanduser().resolve() == out.resolve() for name in sources):
        raise ValueError(f"out={out}: is one of the files to read; give another name")


def _names(value: str) -> list[str]:
    """A.jsonl, A.jsonl,B.jsonl or [A.jsonl,B.jsonl]"""
    return [name.strip() for name in value.removeprefix("[").removesuffix("]").split(",")]


def _number(key: str, value: str) -> int:
    if not value.isdecimal():
        raise ValueError(f"{key}={value}: must be a whole number")
    return int(value)
