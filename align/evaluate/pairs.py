"""What a reward model's scores of pairs are worth: a report of accuracies, losses, calibration, biases, and its files.

Works on rows that hold scores already. RewardBench's formulas stand in reward_bench.py, probabilities and intervals in
calibration.py, format and style of the texts in format_bias.py.
"""

from __future__ import annotations

import importlib.util
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from align.checkpoint import MANIFEST, atomic_directory
from align.data.formats import Dialogue, Record, parse
from align.data.sources import BadRow
from align.evaluate import format_bias, reward_bench
from align.evaluate.calibration import (
    as_json,
    calibration,
    interval,
    log_losses,
    mean_draws,
    over_prompts,
)
from align.jsons import Fields, Json

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

KINDS = ("adversarial", "objective", "subjective")  # Wang et al. 2025, WorldPM; arXiv 2505.10527
_NUM_BINS = 10
_QUARTERS = (0.25, 0.5, 0.75)


@dataclass(frozen=True)
class Pairs:
    """Scored pairs as arrays; P of them."""

    rows: tuple[int, ...]  # number of each pair's row in the file, from 1
    ids: tuple[object, ...]  # field id, None without
    scores: np.ndarray  # [P, 2] float64: chosen, rejected
    prompts: tuple[str, ...]  # equal for pairs about the same prompt
    texts: tuple[tuple[str, str] | None, ...]  # the answers; None for a row that holds scores alone, or tokens
    subsets: tuple[str, ...]  # empty: none
    kinds: tuple[str, ...]  # of KINDS, or empty
    splits: tuple[str, ...]  # in or out of distribution in the user's words, or empty
    patterns: tuple[str, ...]  # of a probe: what its answers differ in; empty for a pair with a better answer

    @property
    def differences(self) -> np.ndarray:
        """[P] score of chosen minus score of rejected."""
        return self.scores[:, 0] - self.scores[:, 1]

    def where(self, keep: np.ndarray) -> Pairs:
        """The pairs with keep, [P] bool."""
        picked = np.flatnonzero(keep)
        fields = {name: tuple(value[i] for i in picked) for name, value in vars(self).items() if name != "scores"}
        return Pairs(scores=self.scores[picked], **fields)


# ---------------------------------------------------------------------- rows


def read(rows: Sequence[Fields]) -> tuple[Pairs, list[Fields]]:
    """Rows with score_chosen and score_rejected as pairs, and those with scores (several answers) as they are.

    Raises ValueError naming the row for a score that is missing or not finite, and for a field of the wrong kind.
    """
    columns: list[tuple[object, ...]] = []
    lists = []
    for number, row in enumerate(rows, 1):
        name = _name(number, row)
        if "scores" in row:
            lists.append(_checked_list(name, row))
            continue
        scores = [_number(name, key, row.get(key)) for key in ("score_chosen", "score_rejected")]
        prompt, texts = _texts(name, row)
        words = [_word(name, key, row.get(key)) for key in ("subset", "kind", "split", "pattern")]
        if words[1] and words[1] not in KINDS:
            raise ValueError(f"{name}: kind must be {', '.join(KINDS)}, found {words[1]!r}")
        if words[3] and words[3] not in ("length", *format_bias.PATTERNS):
            known = ", ".join(("length", *format_bias.PATTERNS))
            raise ValueError(f"{name}: pattern must be {known}, found {words[3]!r}")
        columns.append((number, row.get("id"), scores, prompt or f"row {number}", texts, *words))
    if not columns:
        empty: tuple[object, ...] = ()
        return Pairs(empty, empty, np.zeros((0, 2)), empty, empty, empty, empty, empty, empty), lists
    numbers, ids, scored, *rest = zip(*columns, strict=True)
    return Pairs(numbers, ids, np.array(scored, dtype=float), *rest), lists


def _name(number: int, row: Fields) -> str:
    return f"row {number}" if row.get("id") is None else f"row {number} (id {row['id']})"


def _number(name: str, key: str, value: object) -> float:
    if value is None:
        raise ValueError(f"{name}: {key} is missing; write it with align score")
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise ValueError(f"{name}: {key} must be a number, found {json.dumps(value, default=str)}")
    if not math.isfinite(value):
        raise ValueError(f"{name}: {key} is {value}; a score must be finite: find out what the model makes of this row")
    return float(value)


def _word(name: str, key: str, value: object) -> str:
    if value is not None and not isinstance(value, str):
        raise ValueError(f"{name}: {key} must be a text, found {json.dumps(value, default=str)}")
    return value or ""


def _checked_list(name: str, row: Fields) -> Fields:
    scores, num_correct = row["scores"], row.get("num_correct")
    if not isinstance(scores, list) or not scores:
        raise ValueError(f"{name}: scores must be a list of numbers, those of correct answers first")
    if isinstance(num_correct, bool) or not isinstance(num_correct, int) or not 1 <= num_correct < len(scores):
        raise ValueError(
            f"{name}: num_correct must be a whole number from 1 to {len(scores) - 1}, the answers being {len(scores)}; "
            f"found {json.dumps(num_correct, default=str)}"
        )
    checked = [_number(name, f"scores[{i}]", score) for i, score in enumerate(scores)]
    return {**row, "scores": checked, "subset": _word(name, "subset", row.get("subset"))}


def _texts(name: str, row: Fields) -> tuple[str, tuple[str, str] | None]:
    """What pairs of one prompt share, empty if the row does not tell; and both answers as texts."""
    prompt = row.get("prompt")
    if not {"chosen", "rejected"} & row.keys() and "prompt_chosen" not in row:
        return (json.dumps(prompt, default=str) if prompt else ""), None
    try:
        record: Record = parse(dict(row))
    except BadRow as error:
        raise ValueError(f"{name}: {error}") from None
    chosen, rejected = record.sides["chosen"], record.sides["rejected"]
    if not isinstance(chosen, Dialogue) or not isinstance(rejected, Dialogue):
        return (json.dumps(prompt, default=str) if prompt else ""), None
    shared = json.dumps(chosen.prompt, default=str) if chosen.prompt else ""
    return shared, (_said(chosen), _said(rejected))


def _said(side: Dialogue) -> str:
    if isinstance(side.completion, str):
        return side.completion
    return "\n".join(m.get("content") or "" for m in side.completion if m["role"] == "assistant")


# ---------------------------------------------------------------------- the report


def report(rows: Sequence[Fields], *, tau: float = 1.0, fit_temperature: bool = False, seed: int = 0) -> Json:
    """All numbers that the rows allow, each {mean, low, high} with its 95 % interval over prompts; for JSON.

    A pair is right if score_chosen > score_rejected; ties are wrong. What no row is about is absent. Rows with a field
    pattern are probes, of which neither answer is better: they count under format_bias.probes alone. tau: what the
    model's loss divided differences by; it changes probabilities and nothing else. "pairs" lists the pairs, for
    pairs.jsonl.
    Raises ValueError without rows, and as `read` does.
    """
    if not rows:
        raise ValueError("there are no rows to report on; give a file with scored pairs")
    if not (math.isfinite(tau) and tau > 0):
        raise ValueError(f"tau={tau}: must be above 0")
    everything, lists = read(rows)
    probe = np.array([bool(p) for p in everything.patterns], dtype=bool)
    pairs, probes = everything.where(~probe), everything.where(probe)
    out: Json = {"tau": tau, "seed": seed}
    if pairs.rows:
        out |= _accuracies(pairs, tau, seed)
        out["calibration"] = calibration(
            pairs.differences / tau, pairs.prompts, _NUM_BINS, fit_temperature=fit_temperature, seed=seed
        )
        out |= _of_texts(pairs, seed)
    if probes.rows:
        out.setdefault("format_bias", {})["probes"] = {
            name: format_bias.win_rate(part.differences, part.prompts, seed, name)
            for name, part in _by(probes, "patterns")
        }
    if lists:
        out["reward_bench_2"] = reward_bench.list_report(lists, seed)
    return out | {"pairs": _lines(everything, tau)}


def _by(pairs: Pairs, field: str) -> list[tuple[str, Pairs]]:
    """Pairs by the values of a field, in order of appearance; pairs without one are left out."""
    values = np.array(getattr(pairs, field), dtype=object)
    return [(name, pairs.where(values == name)) for name in dict.fromkeys(getattr(pairs, field)) if name]


def _accuracies(pairs: Pairs, tau: float, seed: int) -> Json:
    """Overall, by subset, by section of RewardBench, by kind and split."""
    out = _share(pairs, tau, seed)
    subsets = _by(pairs, "subsets")
    if subsets:
        out["by_subset"] = {name: _share(part, tau, seed, name) for name, part in subsets}
        means = {name: out["by_subset"][name]["accuracy"]["mean"] for name, _ in subsets}
        draws = {name: mean_draws(_right(part), part.prompts, seed, name) for name, part in subsets}
        bench = reward_bench.section_report(means, draws)
        out |= {"reward_bench": bench} if bench else {}
    for name, part in _by(pairs, "splits"):
        out.setdefault("by_split", {})[name] = _over_subsets(part, tau, seed, name)
    for name, part in _by(pairs, "kinds"):
        out.setdefault("by_kind", {})[name] = _over_subsets(part, tau, seed, name)
        for split, members in _by(part, "splits"):
            by_split = out["by_kind"][name].setdefault("by_split", {})
            by_split[split] = _over_subsets(members, tau, seed, f"{name} {split}")
    return out


def _right(pairs: Pairs) -> np.ndarray:
    return (pairs.differences > 0).astype(float)


def _share(pairs: Pairs, tau: float, seed: int, stream: str = "") -> Json:
    return {
        "count": len(pairs.rows),
        "prompts": len(set(pairs.prompts)),
        "ties": int((pairs.differences == 0).sum()),
        "accuracy": as_json(over_prompts(_right(pairs), pairs.prompts, seed, stream)),
        "log_loss": as_json(over_prompts(log_losses(pairs.differences / tau), pairs.prompts, seed, stream)),
    }


def _over_subsets(pairs: Pairs, tau: float, seed: int, stream: str) -> Json:
    """Plain mean over subsets of their accuracies and of their mean losses, whatever their sizes.

    Prompts are resampled within each subset. Pairs without a subset are one subset.
    """
    subsets = _by(pairs, "subsets")
    nameless = pairs.where(np.array([not name for name in pairs.subsets]))
    subsets += [("", nameless)] if nameless.rows else []
    out: Json = {"count": len(pairs.rows), "subsets": [name for name, _ in subsets]}
    for key in ("accuracy", "log_loss"):
        values = [_right(part) if key == "accuracy" else log_losses(part.differences / tau) for _, part in subsets]
        draws = [
            mean_draws(v, part.prompts, seed, f"{stream} {name}")
            for v, (name, part) in zip(values, subsets, strict=True)
        ]
        value = float(np.mean([v.mean() for v in values]))
        out[key] = as_json(interval(value, np.mean(draws, axis=0)))
    return out


def _of_texts(pairs: Pairs, seed: int) -> Json:
    """What needs the answers: length, style, format. Pairs without texts are left out and the others counted."""
    known = pairs.where(np.array([texts is not None for texts in pairs.texts]))
    if not known.rows:
        return {}
    chosen, rejected = (list(side) for side in zip(*(t for t in known.texts if t is not None), strict=True))
    bias = {
        "count": len(known.rows),
        "data": format_bias.data_bias(chosen, rejected, known.prompts, seed),
        "model": format_bias.model_bias(chosen, rejected, known.differences, known.prompts, seed),
    }
    return {
        "by_length_difference": _by_length(known, chosen, rejected, seed),
        "style": format_bias.style(known.differences, chosen, rejected, known.prompts, seed),
        "format_bias": bias,
    }


def _by_length(pairs: Pairs, chosen: Sequence[str], rejected: Sequence[str], seed: int) -> list[Json]:
    """Accuracy by quarter of words(chosen) - words(rejected); a quarter that ties leave empty is absent."""
    longer = np.array([format_bias.words(c) - format_bias.words(r) for c, r in zip(chosen, rejected, strict=True)])
    quarter = np.searchsorted(np.quantile(longer, _QUARTERS), longer, side="left")
    out = []
    for i in range(len(_QUARTERS) + 1):
        here = quarter == i
        if here.any():
            part = pairs.where(here)
            row = {"quarter": i + 1, "low": int(longer[here].min()), "high": int(longer[here].max())}
            right = over_prompts(_right(part), part.prompts, seed, f"length {i}")
            out.append(row | {"count": len(part.rows), "accuracy": as_json(right)})
    return out


def _lines(pairs: Pairs, tau: float) -> list[Json]:
    """A line of pairs.jsonl for each pair, probes among them."""
    out = []
    losses = log_losses(pairs.differences / tau)
    for i, (number, scores, texts) in enumerate(zip(pairs.rows, pairs.scores, pairs.texts, strict=True)):
        line: Json = {"row": number}
        line |= {"id": pairs.ids[i]} if pairs.ids[i] is not None else {}
        for key, values in (("subset", pairs.subsets), ("kind", pairs.kinds), ("split", pairs.splits)):
            line |= {key: values[i]} if values[i] else {}
        line |= {"pattern": pairs.patterns[i]} if pairs.patterns[i] else {}
        line |= {"score_chosen": float(scores[0]), "score_rejected": float(scores[1])}
        line |= {"difference": float(scores[0] - scores[1]), "right": bool(scores[0] > scores[1])}
        line |= {"tie": bool(scores[0] == scores[1]), "log_loss": float(losses[i])}
        if texts is not None:
            line |= {"words_chosen": format_bias.words(texts[0]), "words_rejected": format_bias.words(texts[1])}
        out.append(line)
    return out


# ---------------------------------------------------------------------- files


def write(results: Fields, out: Path) -> None:
    """results.json, pairs.jsonl and plots of a report as the directory `out`, complete or not at all.

    A report that stands there is replaced; a directory with other files is refused. Raises ValueError, WriteFailed, and
    RuntimeError without matplotlib.
    """
    if out.exists() and not out.is_dir():
        raise ValueError(f"out={out} is a file; name a directory")
    if out.is_dir() and any(out.iterdir()) and not {"results.json", MANIFEST} <= {p.name for p in out.iterdir()}:
        raise ValueError(f"out={out} holds other files, and a report takes the whole directory; name a new one")
    numbers = {key: value for key, value in results.items() if key != "pairs"}

    def fill(directory: Path) -> None:
        text = json.dumps(numbers, indent=2, ensure_ascii=False, allow_nan=False)
        (directory / "results.json").write_text(f"{text}\n", encoding="utf-8")
        with (directory / "pairs.jsonl").open("w", encoding="utf-8") as stream:
            for line in results["pairs"]:
                stream.write(json.dumps(line, ensure_ascii=False, allow_nan=False) + "\n")
        _plots(numbers, directory)

    if importlib.util.find_spec("matplotlib") is None:
        raise RuntimeError("plots of the report need matplotlib: pip install matplotlib")
    atomic_directory(out, fill)


def lines(results: Fields) -> list[str]:
    """The report for the terminal."""
    out = []
    if "accuracy" in results:
        out.append(
            f"{results['count']} pairs of {results['prompts']} prompts, {results['ties']} ties (wrong); 95 % intervals "
            "over prompts"
        )
        out.append(f"accuracy {_percent(results['accuracy'])}, log loss {_plain(results['log_loss'])} nats")
        out += [
            f"  {name}: {_percent(s['accuracy'])} of {s['count']}" for name, s in results.get("by_subset", {}).items()
        ]
    bench = results.get("reward_bench", {})
    out += [f"RewardBench {name}: {_percent(value)}" for name, value in bench.get("sections", {}).items()]
    out += [
        f"RewardBench {name.replace('_', ' ')}: {_percent(bench[name])}"
        for name in ("prior", "overall_with_prior", "overall_mean_of_4")
        if name in bench
    ]
    second = results.get("reward_bench_2", {})
    for name, value in second.get("by_subset", {}).items():
        shown = value.get("credit", value.get("overall"))
        out += [f"RewardBench 2 {name or 'lists'}: {_percent(shown)} of {value['count']}"] if shown else []
    out += [f"RewardBench 2 overall: {_percent(second['overall'])}"] if "overall" in second else []
    for group in ("by_split", "by_kind"):
        out += [
            f"{name}, mean of {len(value['subsets'])} subsets: accuracy {_percent(value['accuracy'])}, log loss "
            f"{_plain(value['log_loss'])}"
            for name, value in results.get(group, {}).items()
        ]
    if "calibration" in results:
        fitted = results["calibration"].get("temperature")
        out.append(
            f"calibration error {_percent(results['calibration']['ece'])}, Brier score "
            f"{_plain(results['calibration']['brier'])}" + (f", temperature {fitted:.3g}" if fitted else "")
        )
    coefficient = results.get("style", {}).get("coefficients", {}).get("score")
    out += [f"coefficient of the score with style held equal {_plain(coefficient)}"] if coefficient else []
    for group in ("model", "probes"):
        for name, value in results.get("format_bias", {}).get(group, {}).items():
            line = (
                f"{'probe ' if group == 'probes' else ''}{name} wins {_percent(value['win_rate'])} of {value['count']}"
            )
            if value["ties"]:
                line += f", {value['ties']} ties as half: {_percent(value['win_rate_ties_half'])}"
            out.append(line + (f", labels {_percent(value['chosen_rate'])}" if "chosen_rate" in value else ""))
    return out


def _percent(value: Mapping[str, float]) -> str:
    return f"{value['mean']:.1%} [{value['low']:.1%}, {value['high']:.1%}]"


def _plain(value: Mapping[str, float]) -> str:
    return f"{value['mean']:.3f} [{value['low']:.3f}, {value['high']:.3f}]"


# ---------------------------------------------------------------------- plots


def _plots(numbers: Fields, directory: Path) -> None:
    bars = {"all": numbers["accuracy"]} if "accuracy" in numbers else {}
    bars |= {name: value["accuracy"] for name, value in numbers.get("by_subset", {}).items()}
    bars |= {f"{name} (section)": v for name, v in numbers.get("reward_bench", {}).get("sections", {}).items()}
    bars |= {f"{name} (kind)": value["accuracy"] for name, value in numbers.get("by_kind", {}).items()}
    bars |= {
        name or "lists": value.get("credit", value.get("overall"))
        for name, value in numbers.get("reward_bench_2", {}).get("by_subset", {}).items()
        if "credit" in value or "overall" in value
    }
    _bar_plot(directory / "accuracy.png", bars, "share of pairs ranked rightly")
    rates = {}
    for group in ("model", "probes"):
        for name, value in numbers.get("format_bias", {}).get(group, {}).items():
            rates[name if group == "model" else f"{name} (probe)"] = value["win_rate_ties_half"]
    _bar_plot(directory / "format_bias.png", rates, "answer with the pattern scores higher (ties: half)")
    if "calibration" in numbers:
        _reliability_plot(directory / "reliability.png", numbers["calibration"])


def _bar_plot(path: Path, bars: Mapping[str, Mapping[str, float]], label: str) -> None:
    if not bars:
        return
    figure, axes = _figure(height=1.2 + 0.3 * len(bars))
    for at, value in enumerate(bars.values()):
        axes.plot([value["low"], value["high"]], [at, at], color="#4477aa", linewidth=2)
        axes.plot([value["mean"]], [at], "o", color="#4477aa")
    axes.axvline(0.5, color="grey", linestyle=":")
    axes.set_yticks(range(len(bars)), list(bars))
    axes.set_ylim(len(bars) - 0.5, -0.5)
    axes.set_xlim(-0.02, 1.03)
    axes.set_xlabel(f"{label}; 95 % interval over prompts")
    figure.savefig(path, dpi=120)


def _reliability_plot(path: Path, numbers: Fields) -> None:
    figure, axes = _figure(height=4.5)
    axes.plot([0.5, 1], [0.5, 1], color="grey", linestyle=":", label="calibrated")
    series = {"scores": numbers, f"temperature {numbers.get('temperature') or 0:.3g}": numbers.get("fitted")}
    for (name, part), color in zip(series.items(), ("#4477aa", "#cc6677"), strict=True):
        if part:
            x, y = [b["confidence"] for b in part["bins"]], [b["accuracy"] for b in part["bins"]]
            axes.vlines(x, [v["low"] for v in y], [v["high"] for v in y], color=color)
            axes.plot(x, [v["mean"] for v in y], "o-", color=color, label=name)
    axes.set_xlabel("probability of the side with the higher score")
    axes.set_ylabel("share of pairs where that side is chosen")
    axes.legend(loc="upper left")
    figure.savefig(path, dpi=120)


def _figure(height: float) -> tuple[Figure, Axes]:
    # the figure alone draws with Agg whatever the user's backend is; pyplot would keep state
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, height), layout="constrained")
    return figure, figure.subplots()
