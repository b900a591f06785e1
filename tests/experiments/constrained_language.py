"""Constraints against a plain sum with language: a small model that ends verses, two proxies, three seeds.

    python -m tests.experiments.constrained_language [--runs DIR] [--out DIR]

Trained by `align train` on warmth and brevity (verses.py); gold is measured on held-out prompts and not learnt from.
Thresholds are the proxies' means where gold was highest on the sum's run of seed 0, which is no part of the result.
Complete runs are read, killed ones go on. Writes docs/experiments/constrained_language.md, .json and .png; exits with 1
unless the sum falls as claimed in every seed.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from align.evaluate.overoptimisation import student
from align.evaluate.samples import paired_bootstrap
from tests.experiments import verses

PROXIES, GOLD = ("warmth", "brevity"), "pleasing"
SEEDS = (1, 2, 3)  # 0: where settings and thresholds were chosen
STEPS, EVERY, LAST = 100, 10, 3  # LAST: evaluations whose mean is the end of a run
THRESHOLDS = {"warmth": 2.6, "brevity": 0.42}
BANDS = {"warmth": 0.3, "brevity": 0.1}
FALL = 0.1  # of gold, what the claims call far from its peak
SUM_KL, CONSTRAINED_KL = 0.005, 0.03
# the KL's weight where the multipliers of xi came to rest on seed 1, over theirs: about (2 - 1.28) 0.03 / 1.28
RESTING_KL = 0.017
METHODS = {
    "sum": [
        "composer=fixed", "composer.normalise=none", "composer.target=reward", f"trainer.kl_in_reward={SUM_KL}",
    ],
    "sum_kl": [
        "composer=fixed", "composer.normalise=none", "composer.target=reward", f"trainer.kl_in_reward={RESTING_KL}",
    ],
    "mu": ["composer=lagrangian_mu", "composer.rule.lr=1"],
    # tanh(0.55) is 0.5, where the sigmoids of mu start
    "xi": ["composer=lagrangian_xi", "composer.rule.lr=0.25", "composer.rule.initial=0.55"],
}  # fmt: skip
CONSTRAINED = [
    *(f"composer.thresholds.{name}={value}" for name, value in THRESHOLDS.items()),
    "composer.whiten=false", "composer.rule.max_grad_norm=0.05", f"trainer.kl_in_reward={CONSTRAINED_KL}",
]  # fmt: skip
MEASURE = [
    f"trainer.max_steps={STEPS}", f"trainer.eval_every={EVERY}", "trainer.num_samples=100", "trainer.heldout_n=2",
    "trainer.samples_every=50",
]  # fmt: skip
COLOURS = {"sum": "tab:red", "sum_kl": "tab:orange", "mu": "tab:blue", "xi": "tab:green"}


# what the figures of one set of runs were read as; to be read again after others
NOTES = f"""What the claims leave out:

- `sum_kl` is the same sum with the KL coefficient that xi's multipliers came to rest at on seed 1 ({RESTING_KL}), added
  after xi's first run was seen. It holds gold as well as xi does. So at rest the constraints are a plain sum with a KL
  that is chosen well; what multipliers bring is that thresholds choose it, and the way there is not smoother.
- mu keeps its constraints and loses gold all the same: they are one-sided, and it ends at 8.9 words where xi has 10.1
  and 12 are natural, which is about two thirds of the difference by gold's own formula. mu and xi differ in the
  learning rate of their multipliers too, so this is not the paper's order of the two shown again.
- Multipliers are still moving at the end. On the way warmth goes up to 0.4 (mu) and 0.2 (xi) above its threshold, and
  brevity 0.3 and 0.2 below its own.

Tried on seed 0 first, and part of no figure above:

- Warmth as the plain sum of valences: the sum ended at 24 times `heart` (gold 0.02 after 0.47, lr 5e-4). Both
  constrained forms passed their thresholds with multipliers still near 1, as these had grown while the thresholds were
  far; the policy was soon at one word (`God`, gold 0.04), where the completions of a prompt do not differ, and
  stayed there. The logarithm is kinder to multipliers: the farther, the less warmth a nat of KL buys.
- The authors' whitening of the streams (`composer.whiten=true`, over REINFORCE++): the KL's stream, as loud as any
  other from the first step, weighed 0.8 (mu) to 1.9 (xi); warmth stayed at 0.3, where the threshold was 2.5, for 110
  steps. Here `whiten=false`, so that the KL counts by its coefficient.
- Multipliers at lr 0.5 and 1 with the authors' `max_grad_norm=0.5`: they grew to 0.94 to 0.99 on the way and swung
  past both thresholds (xi: gold 0.28 at step 44). With `max_grad_norm=0.05` a threshold that is far moves them no
  faster than one that is near. xi at lr 0.5 still passed 3.0 of warmth (gold 0.43 at step 76), hence 0.25, which was
  not run on seed 0 itself; mu as it is here had a gold of 0.64 there at step 76.

What it does not show: that constraints need less knowledge than the sum. Their thresholds are where gold was highest
in a run, which someone had to measure; stopping the sum there uses the same knowledge and was not compared. One size of
model, one taught model, {len(SEEDS)} seeds; gold is a rule that shares its lexicon with a proxy. The highest gold is
the highest of {STEPS // EVERY} noisy means and so too high.
"""


def settings(method: str, seed: int) -> list[str]:
    """Of one run, besides the model and its prompts."""
    own = METHODS[method] + (CONSTRAINED if method in ("mu", "xi") else [])
    return [*verses.LEARN, *MEASURE, *verses.components(PROXIES, (GOLD,)), *own, f"seed={seed}"]


# ---------------------------------------------------------------------- measuring


def course(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Of a run's metrics: held-out means of each evaluation, and multipliers of each step."""
    evaluated = [row for row in rows if f"heldout/{GOLD}" in row]
    multipliers = {n: [row[f"multiplier/{n}"] for row in rows] for n in PROXIES if f"multiplier/{n}" in rows[0]}
    return {
        "steps": [row["step"] for row in evaluated],
        **{name: [row[f"heldout/{name}"] for row in evaluated] for name in (*PROXIES, GOLD)},
        "kl": [row["kl/reference"] for row in evaluated],
        "multipliers": multipliers,
        "minutes": sum(row["time/step_s"] + row.get("time/eval_s", 0.0) for row in rows) / 60,
    }


def figures(found: Mapping[str, Any]) -> dict[str, float]:
    """Of a course: the highest gold and the step it was at, and the end: means over its last evaluations."""
    peak = int(np.argmax(found[GOLD]))
    ends = {name: float(np.mean(found[name][-LAST:])) for name in (*PROXIES, GOLD, "kl")}
    return {"peak": found[GOLD][peak], "peak_step": found["steps"][peak], **ends}


def held(method: str, ends: Mapping[str, float]) -> dict[str, bool]:
    """Whether each proxy ends where the method is to keep it, within its band."""
    over = {name: ends[name] - THRESHOLDS[name] for name in PROXIES}
    if method == "mu":
        return {name: over[name] >= -BANDS[name] for name in PROXIES}
    return {name: abs(over[name]) <= BANDS[name] for name in PROXIES}


def claims(found: Mapping[str, Mapping[int, Mapping[str, float]]]) -> dict[str, dict[int, bool]]:
    """Stated before the runs, each by seed. found: figures by method and seed."""
    out: dict[str, dict[int, bool]] = {}
    seeds = list(found["sum"])
    out[f"sum: gold ends more than {FALL} below its highest"] = {
        s: found["sum"][s][GOLD] < found["sum"][s]["peak"] - FALL for s in seeds
    }
    for method, what in (
        ("mu", "at or above its threshold, less its band"),
        ("xi", "within its band of its threshold"),
    ):
        for name in PROXIES:
            out[f"{method}: {name} ends {what}"] = {s: held(method, found[method][s])[name] for s in seeds}
        out[f"{method}: gold ends above the sum's"] = {s: found[method][s][GOLD] > found["sum"][s][GOLD] for s in seeds}
        out[f"{method}: gold ends less than {FALL} below the sum's highest"] = {
            s: found[method][s][GOLD] > found["sum"][s]["peak"] - FALL for s in seeds
        }
    return out


# ---------------------------------------------------------------------- the page


def _each(values: list[float], form: str = ".2f") -> str:
    return ", ".join(f"{v:{form}}" for v in values)


def _interval(values: list[float]) -> str:
    x = student(values)
    return f"{x.mean:+.3f} [{x.low:+.3f}, {x.high:+.3f}]"


def draw(courses: Mapping[str, Mapping[int, Mapping[str, Any]]], path: Path) -> None:
    """Gold over steps and over warmth, brevity and multipliers over steps; thresholds dashed."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 7), layout="constrained")
    (by_step, by_proxy), (brief, moving) = figure.subplots(2, 2)
    for method, seeds in courses.items():
        for k, found in enumerate(seeds.values()):
            how = {"color": COLOURS[method], "alpha": 0.8, "label": method if k == 0 else None}
            by_step.plot(found["steps"], found[GOLD], **how)
            by_proxy.plot(found["warmth"], found[GOLD], marker=".", **how)
            brief.plot(found["steps"], found["brevity"], **how)
            for name, style in zip(PROXIES, ("-", ":"), strict=True):
                if name in found["multipliers"]:
                    label = f"{method}, {name}" if k == 0 else None
                    values = found["multipliers"][name]
                    moving.plot(range(1, len(values) + 1), values, style, color=COLOURS[method], label=label)
    by_proxy.axvline(THRESHOLDS["warmth"], color="grey", linestyle="--")
    brief.axhline(THRESHOLDS["brevity"], color="grey", linestyle="--")
    labels = (("step", "gold"), ("warmth", "gold"), ("step", "brevity"), ("step", "multiplier"))
    for axes, (x, y) in zip((by_step, by_proxy, brief, moving), labels, strict=True):
        axes.set_xlabel(x)
        axes.set_ylabel(y)
        axes.legend(fontsize=8)
    figure.savefig(path, dpi=80)


def page(data: Mapping[str, Any]) -> str:
    """docs/experiments/constrained_language.md."""
    found, claimed, minutes = data["figures"], data["claims"], data["minutes"]
    seeds = list(found["sum"])
    count = len(seeds)
    table = []
    for method in METHODS:
        of = {key: [found[method][s][key] for s in seeds] for key in ("peak", "peak_step", GOLD, *PROXIES, "kl")}
        cells = [method, _each(of["peak"]), _each(of["peak_step"], "d"), _each(of[GOLD]), _each(of["warmth"])]
        cells += [_each(of["brevity"]), _each(of["kl"], ".0f")]
        table.append("| " + " | ".join(cells) + " |")
    gaps = [
        f"| {m} - sum | {_each([found[m][s][GOLD] - found['sum'][s][GOLD] for s in seeds], '+.2f')} | "
        f"{_interval([found[m][s][GOLD] - found['sum'][s][GOLD] for s in seeds])} | "
        + ", ".join("{mean:+.2f} [{low:+.2f}, {high:+.2f}]".format(**data["prompts"][m][s]) for s in seeds)
        + " |"
        for m in METHODS
        if m != "sum"
    ]
    verdicts = [f"| {claim} | {sum(by.values())} of {count} |" for claim, by in claimed.items()]
    limits = ", ".join(f"{name} {THRESHOLDS[name]} (band {BANDS[name]})" for name in PROXIES)
    setting = verses.filled(
        f"""`sum`: `composer=fixed` (halves of both); `mu`: `composer=lagrangian_mu`; `xi`: `composer=lagrangian_xi`;
        all over RLOO, {STEPS} steps of 32 prompts x 4 completions of at most {verses.LONGEST} tokens, lr 4e-4.
        Thresholds:
        {limits}, the means where gold was highest on the sum's run of seed 0, which is not reported. Multipliers by SGD
        with max_grad_norm 0.05, lr 1 (mu) and 0.25 (xi), both starting at 0.5; kl_in_reward {CONSTRAINED_KL} for them,
        {SUM_KL} for the sum. Held-out: 100 prompts that begin no taught verse, 2 completions each, every {EVERY} steps;
        the end of a run is the mean of its last {LAST} evaluations. Made by `python -m
        tests.experiments.constrained_language`; {minutes:.0f} min of training in all, one thread each, on a loaded
        machine of 2 cores. One number for each of the seeds {_each(seeds, "d")}, which all start from the same taught
        model."""
    )
    return f"""# Constraints against a plain sum, with language

A Llama of 0.7M weights, taught 500 steps on 11297 short verses of the King James Bible to end a verse from its first
four words, is trained by `align train` on two proxies: warmth, log(1 + sum of VADER's valences of its warm words),
which saying them again raises without bound, and brevity, 1 - words / 20. They conflict: a warm word is a word. Gold,
measured only: VADER's compound score x share of words that are new x closeness to the natural length of 12 words. It
shares the lexicon with warmth, so it rises with it at first; repetition and odd lengths are what it does not like.

{setting}

![gold, brevity and multipliers](constrained_language.png)

| | highest gold | at step | gold at the end | warmth | brevity | KL, nats |
|---|---|---|---|---|---|---|
{chr(10).join(table)}

| gold at the end | each seed | mean, 95 % over seeds (Student's t) | each seed, 95 % over prompts, last step alone |
|---|---|---|---|
{chr(10).join(gaps)}

Claimed before these runs, and in how many of the seeds it holds:

| | |
|---|---|
{chr(10).join(verdicts)}

{NOTES}"""


def main() -> int:
    """Run all methods and seeds and write the page."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--runs", type=Path, default=Path("runs/experiments"))
    parser.add_argument("--out", type=Path, default=Path("docs/experiments"))
    parser.add_argument("--only", nargs="*", default=[], help="train these alone, METHOD-SEED, and write nothing")
    args = parser.parse_args()
    start = verses.taught(args.runs / "verses")
    names = args.only or [f"{method}-{seed}" for seed in SEEDS for method in METHODS]
    runs = {}
    for name in names:
        method, seed = name.split("-")
        directory = args.runs / f"constrained-language-{name}"
        runs[method, int(seed)] = verses.train([*settings(method, int(seed)), *start], directory)
    if args.only:
        return 0
    courses = {m: {s: course(verses.rows(runs[m, s])) for s in SEEDS} for m in METHODS}
    found = {m: {s: figures(c) for s, c in by.items()} for m, by in courses.items()}
    gold = {key: verses.drawn(directory, "after", GOLD) for key, directory in runs.items()}
    prompts = {
        m: {s: asdict(paired_bootstrap(gold["sum", s], gold[m, s])) for s in SEEDS} for m in METHODS if m != "sum"
    }
    minutes = sum(c["minutes"] for by in courses.values() for c in by.values())
    data = {"figures": found, "claims": claims(found), "prompts": prompts, "minutes": minutes, "courses": courses}
    args.out.mkdir(parents=True, exist_ok=True)
    (args.out / "constrained_language.json").write_text(json.dumps(data) + "\n")
    (args.out / "constrained_language.md").write_text(page(data))
    draw(courses, args.out / "constrained_language.png")
    return 0 if all(next(iter(data["claims"].values())).values()) else 1


if __name__ == "__main__":
    sys.exit(main())
