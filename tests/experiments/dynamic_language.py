"""Weights that move against weights that stay, with language: hypervolume and steps to the front, three seeds.

    python -m tests.experiments.dynamic_language [--runs DIR] [--out DIR]

The small model of verses.py is trained by `align front` on warmth and brevity, which conflict, by four composers
from the same weight vectors. Complete runs are read, killed ones go on. Writes docs/experiments/dynamic_language.md,
.json and .png. Nothing is claimed but that the figures are what they are: exits with 1 if a run is not complete.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from align.evaluate.overoptimisation import student
from tests.experiments import verses

PROXIES, GOLD = ("warmth", "brevity"), "pleasing"
FIRST_SEED, SEEDS, STEPS, EVERY = 1, 3, 30, 5
WEIGHTS = ("0.4/0.6", "0.65/0.35")
REFERENCE = {"warmth": 0.0, "brevity": 0.0}  # no warm word, and 20 words
FAMILIES = {
    "fixed": ["normalise=none"],
    # learning rate / mu = 0.1, as the authors'
    "gradient": ["mu=6e-3"],
    "hypervolume": ["spans.warmth=3", *(f"reference.{name}={value}" for name, value in REFERENCE.items())],
    "tchebycheff_smooth": ["mu=0.05"],
}
MEASURE = [
    f"trainer.max_steps={STEPS}", f"trainer.eval_every={EVERY}", "trainer.num_samples=64", "trainer.heldout_n=2",
    "trainer.samples_every=0", "trainer.batch_size=24", "sampling.max_new_tokens=16", "optimizer.lr=6e-4",
    "trainer.kl_in_reward=0.005", "composer.target=reward",
    *(f"reference_point.{name}={value}" for name, value in REFERENCE.items()),
]  # fmt: skip


# what the figures of one set of runs were read as; to be read again after others
NOTES = f"""How this may be read:

- No interval of a difference leaves out 0. Fixed weights alone range over 0.60 from seed to seed, more than any family
  differs from them on average.
- tchebycheff_smooth has the widest fronts: at the end it gives warmth 0.28 and about 0.52 where the vectors say 0.4 and
  0.65. Its hypervolume is above that of fixed in 2 of 3 seeds, its mean over the steps in 3 of 3.
- gradient moves its weights to warmth in every run, as warmth's gradients are the longer ones (norms of 0.07 to 0.9
  against 0.01 to 0.26), so that both vectors end at the warm end of the front: below fixed in 3 of 3. It is the rule's
  own doing: it follows what helps the sum, and nothing in it asks for a spread of points.
- hypervolume: the factor was 0.55 to 0.72 after the first evaluation, and AdamW takes out most of a factor that stays;
  that its points differ from those of fixed weights is mostly chance. By itself it moves no weight against another.
- Steps to front say little here: two vectors leave one other point to be dominated by, which many runs never are.

What it does not show: fronts at rest. After {STEPS} steps all runs still move, and hypervolume at one step mixes where
a rule leads with how fast it goes there (gradient's is highest at step 20 or 25 and falls after it). Two components,
two vectors, one taught model, settings of the papers or guessed.
"""


def words(out: Path) -> list[str]:
    """Of `align front`, besides the model and its prompts."""
    given = {word.partition("=")[0] for word in MEASURE}
    learn = [word for word in verses.LEARN if word.partition("=")[0] not in given]
    own = [f"composers.{name}.{setting}" for name, settings in FAMILIES.items() for setting in settings]
    return [
        "composers=" + ",".join(FAMILIES), "weights=" + ",".join(WEIGHTS), f"seeds={SEEDS}", f"seed={FIRST_SEED}",
        f"out={out}", *own, *learn, *MEASURE, *verses.COMMON, *verses.components(PROXIES, (GOLD,)),
    ]  # fmt: skip


# ---------------------------------------------------------------------- measuring


def paired(front: Mapping[str, Any], key: str) -> dict[str, list[float]]:
    """Of each family the figure of each seed less that of the first family."""
    by = {
        name: {seed: found[key] for seed, found in family["by_seed"].items() if found["done"] == found["runs"]}
        for name, family in front["families"].items()
    }
    first = by[front["first"]]
    return {
        name: [value - first[seed] for seed, value in of.items() if seed in first]
        for name, of in by.items()
        if name != front["first"]
    }


def mean_area(curve: list[Mapping[str, float]]) -> float:
    """Mean hypervolume over the steps of a run: the area under the curve by trapezoids, over its length."""
    area = sum(
        (b["step"] - a["step"]) * (a["hypervolume"] + b["hypervolume"]) / 2
        for a, b in zip(curve[:-1], curve[1:], strict=True)
    )
    return area / (curve[-1]["step"] - curve[0]["step"])


def moved(runs: Path, front: Mapping[str, Any]) -> dict[str, list[float]]:
    """Of each family the weight of the first component at the end of each run."""
    out: dict[str, list[float]] = {}
    for entry in front["runs"]:
        last = verses.rows(runs / entry["name"])[-1]
        share = [last[f"weight/{name}"] for name in front["components"]]
        out.setdefault(entry["family"], []).append(share[0] / sum(share))
    return out


# ---------------------------------------------------------------------- the page


def _spread(values: list[float], sign: str = "") -> str:
    x = student(values)
    return f"{x.mean:{sign}.4f} [{x.low:{sign}.4f}, {x.high:{sign}.4f}]"


def _each(values: list[float], form: str) -> str:
    return ", ".join(f"{v:{form}}" for v in values)


def _family(name: str, data: Mapping[str, Any]) -> str:
    """A line of the first table."""
    front = data["front"]
    family = front["families"][name]
    by = list(family["by_seed"].values())
    steps = [entry["steps_to_front"] for entry in front["runs"] if entry["family"] == name]
    cells = [
        name,
        _spread([found["hypervolume"] for found in by]),
        _each([found["hypervolume"] for found in by], ".4f"),
    ]
    cells += [_spread(data["area"][name]), _spread([found["gain_per_million_tokens"] for found in by])]
    cells += [", ".join("never" if step is None else str(step) for step in steps)]
    return "| " + " | ".join(cells) + " |"


def _difference(name: str, data: Mapping[str, Any]) -> str:
    """A line of the second table."""
    cells = [f"{name} - {data['front']['first']}"]
    for key in ("hypervolume", "area", "gain_per_million_tokens"):
        values = data["paired"][key][name]
        cells += [_spread(values, "+"), _each(values, "+.4f")]
    return "| " + " | ".join(cells) + " |"


def _verdict(name: str, data: Mapping[str, Any]) -> str:
    """What the interval of the difference in hypervolume says, in words."""
    x = student(data["paired"]["hypervolume"][name])
    word = "above" if x.low > 0 else "below" if x.high < 0 else "not told apart from"
    return f"- {name}: hypervolume {word} that of {data['front']['first']} by the 95 % interval over {SEEDS} seeds."


def page(data: Mapping[str, Any]) -> str:
    """docs/experiments/dynamic_language.md."""
    front = data["front"]
    names = list(front["families"])
    others = [name for name in names if name != front["first"]]
    first = front["runs"][0]["start"]
    starts = f"{first['warmth']:.2f} and {first['brevity']:.2f}"
    finals = [
        f"| {entry['name']} | {entry['final']['warmth']:.3f} | {entry['final']['brevity']:.3f} | "
        f"{entry['final'][GOLD]:.3f} | {'yes' if entry['on_front'] else 'no'} |"
        for entry in front["runs"]
    ]
    minutes = sum(entry["seconds"] + entry["evaluation_seconds"] for entry in front["runs"]) / 60
    weights = [f"| {name} | {_each(values, '.2f')} |" for name, values in data["weights"].items()]
    setting = verses.filled(
        f"""The small model of [constrained_language.md](constrained_language.md) is trained on the same two
        components, warmth and brevity, which conflict. `align front` trains {len(WEIGHTS)} weight vectors
        ({" and ".join(WEIGHTS)} of warmth / brevity) by each of {len(names)} composers, seeds {FIRST_SEED} to
        {FIRST_SEED + SEEDS - 1}: RLOO, {STEPS} steps of 24 prompts x 4 completions of at most 16 tokens, lr 6e-4,
        kl_in_reward 0.005; an evaluation every {EVERY} steps on 64 held-out prompts, 2 completions each. All runs start
        from the same taught model. gradient: measure=exact, lr / mu = 0.1, weights start at the vectors. hypervolume:
        span 3 of warmth, the reference point below. tchebycheff_smooth: mu 0.05. None of the moving ones was tuned;
        weights, steps and lr were chosen on fixed weights of seed 0, where a bounded sentiment with weight 0.25 ended
        at completions without words. Hypervolume: of the two final points of a family and seed beyond warmth 0 and
        brevity 0 (no warm word, and 20 words), in the components' own units; the untrained policy has {starts}. Made by
        `python -m tests.experiments.dynamic_language`; {minutes:.0f} min of training on a shared, loaded machine of 2
        cores, whose seconds are not compared. Intervals: 95 %, Student's t over {SEEDS} seeds; differences are paired
        by seed; the values of the seeds stand beside."""
    )
    return f"""# Weights that move against weights that stay, with language

{setting}

![fronts](dynamic_language.png)

| | hypervolume | each seed | mean hypervolume over the steps | gain per million tokens | steps to front, each run |
|---|---|---|---|---|---|
{chr(10).join(_family(name, data) for name in names)}

| | hypervolume | each seed | mean over the steps | each seed | gain per million tokens | each seed |
|---|---|---|---|---|---|---|
{chr(10).join(_difference(name, data) for name in others)}

{chr(10).join(_verdict(name, data) for name in others)}

Steps to front: the step from whose evaluation on the run is no longer dominated by a final point of
{front["first"]}'s other runs of its seed; never: it ends dominated.

Share of warmth in the weights at the end of each run, seed by seed, {" then ".join(WEIGHTS)}:

| | |
|---|---|
{chr(10).join(weights)}

| run | warmth | brevity | ({GOLD}) | on its family's front |
|---|---|---|---|---|
{chr(10).join(finals)}

{NOTES}"""


def main() -> int:
    """Run all families and write the page."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--runs", type=Path, default=Path("runs/experiments"))
    parser.add_argument("--out", type=Path, default=Path("docs/experiments"))
    args = parser.parse_args()
    runs = args.runs / "dynamic-language"
    start = verses.taught(args.runs / "verses")
    code = subprocess.run([sys.executable, "-m", "align.cli", "front", *words(runs), *start], check=False).returncode
    if code:
        return code
    front = json.loads((runs / "front.json").read_text())
    for family in front["families"].values():
        for found in family["by_seed"].values():
            found["area"] = mean_area(found["curve"])
    keys = ("hypervolume", "area", "gain_per_million_tokens")
    data = {
        "front": front,
        "area": {n: [f["area"] for f in family["by_seed"].values()] for n, family in front["families"].items()},
        "paired": {key: paired(front, key) for key in keys},
        "weights": moved(runs, front),
    }
    args.out.mkdir(parents=True, exist_ok=True)
    (args.out / "dynamic_language.json").write_text(json.dumps(data) + "\n")
    (args.out / "dynamic_language.md").write_text(page(data))
    shutil.copyfile(runs / "front.png", args.out / "dynamic_language.png")
    return 0


if __name__ == "__main__":
    sys.exit(main())
