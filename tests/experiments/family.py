"""One short run of each recipe of the direct family on the everyday pairs: that it learns, not which is best.

    python -m tests.experiments.family [--recipes sft,kto,...] [--steps 16] [--samples 32] [--runs DIR]

Each run is a real `align train` with the recipe's own numbers; the figures are read from its summary.json. Writes
docs/experiments/family.md and .json.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

RECIPES = "dpo,ipo,ln_dpo,apo,aot,rpo,kto,simpo,orpo,inpo_offline,sft"


def run(recipe: str, steps: int, samples: int, runs: Path) -> dict[str, Any]:
    """One training; a complete run directory is only read."""
    directory = runs / f"{recipe}-{steps}"
    words = [f"recipe={recipe}", f"trainer.max_steps={steps}", f"trainer.num_samples={samples}", f"run.dir={directory}"]
    if not (directory / "summary.json").exists():
        subprocess.run([sys.executable, "-m", "align.cli", "train", *words, "log.tensorboard=false"], check=True)
    return json.loads((directory / "summary.json").read_text())


def row(recipe: str, summary: dict[str, Any]) -> str:
    """A line of the table."""
    samples, change, metrics = summary["samples"], summary["gold_change"], summary["metrics"]
    accuracy = f"{metrics['accuracy/heldout']:.3f}" if "accuracy/heldout" in metrics else ""
    before = f"{summary['before']['loss/heldout']:.4f}" if "before" in summary else ""
    return (
        f"| {recipe} | {before} | {metrics['loss/heldout']:.4f} | {accuracy} | {summary['kl']:.2f} "
        f"| {change['mean']:+.3f} [{change['low']:+.3f}, {change['high']:+.3f}] "
        f"| {samples['before']['tokens']:.0f} | {samples['after']['tokens']:.0f} |"
    )


def main() -> None:
    """Run all recipes and write the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--recipes", default=RECIPES)
    parser.add_argument("--steps", type=int, default=16)
    parser.add_argument("--samples", type=int, default=32)
    parser.add_argument("--runs", type=Path, default=Path("runs/experiments"))
    parser.add_argument("--out", type=Path, default=Path("docs/experiments"))
    args = parser.parse_args()
    found = {recipe: run(recipe, args.steps, args.samples, args.runs) for recipe in args.recipes.split(",")}
    args.out.mkdir(parents=True, exist_ok=True)
    (args.out / "family.json").write_text(json.dumps(found, indent=1) + "\n")
    (args.out / "family.md").write_text(
        f"""# The direct family on the everyday pairs

One run of each recipe, {args.steps} steps, seed 0, SmolLM2-135M-Instruct with LoRA. Nothing was tuned, so the lines say
that an objective learns here, not which is better. Made by
`python -m tests.experiments.family --recipes {args.recipes} --steps {args.steps} --samples {args.samples}`.
Held out: 72 pairs (144 labelled rows for kto), {args.samples} greedy answers; the change of their gold score has a 95 %
paired bootstrap interval over prompts. Loss before: where it is not known beforehand. KL in nats per sampled answer.

| recipe | loss before | after | accuracy | KL | change of gold | tokens before | after |
|---|---|---|---|---|---|---|---|
"""
        + "\n".join(row(recipe, summary) for recipe, summary in found.items())
        + "\n"
    )


if __name__ == "__main__":
    main()
