"""DPO by align and by TRL 1.16.0 side by side: seconds and memory of a step, on one CPU thread.

    python -m tests.bench.dpo_vs_trl                      everything; writes docs/benchmarks.md and
    .json python -m tests.bench.dpo_vs_trl --regimes mixed      some regimes; writes nothing python
    -m tests.bench.dpo_vs_trl --quick              does it run at all python -m
    tests.bench.dpo_vs_trl --render             the document again from the figures beside it

Needs requirements/bench.txt. Each measurement has its own process; losses and gradients are
compared before anything is timed, and the command fails where they differ.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from tests.bench import data, measure, report

ROOT = Path(__file__).resolve().parents[2]
DOCUMENT = ROOT / "docs" / "benchmarks.md"
FIGURES = ROOT / "docs" / "benchmarks.json"
EPOCH_STEPS = 8
MEMORY = {  # regime -> variants, each in its own process
    "mixed": ("trl default", "trl no recompute", "trl best", "align shared", "align"),
    "smollm2": ("trl default", "trl best", "align"),
}


def worker(kind: str, regime: data.Regime, *options: str) -> dict[str, Any]:
    """What tests.bench.worker measures, in a fresh process. RuntimeError when it fails."""
    with tempfile.TemporaryDirectory() as scratch:
        out = Path(scratch) / "result.json"
        done = subprocess.run(
            [
                sys.executable,
                "-m",
                "tests.bench.worker",
                kind,
                regime.name,
                "--out",
                str(out),
                *options,
            ],
            cwd=ROOT,
            env=os.environ | measure.ENVIRONMENT | {"PYTHONPATH": str(ROOT)},
            capture_output=True,
            text=True,
            check=False,
        )
        if done.returncode:
            raise RuntimeError(f"{kind} {regime.name} failed:\n{done.stderr[-3000:]}")
        return json.loads(out.read_text())


def run(regimes: list[data.Regime], rounds: int | None, memory: bool, epoch: bool) -> dict[str, Any]:
    """All measurements, one after the other."""
    figures: dict[str, Any] = {
        "machine": measure.machine(),
        "versions": measure.versions(),
        "regimes": {},
        "epoch": {},
        "memory": {},
    }
    for regime in regimes:
        _say(f"{regime.name}: {regime.about}")
        num_rounds = rounds or regime.rounds
        result = worker("time", regime, "--rounds", str(num_rounds))
        about = {"about": regime.about, "pairs": regime.num_pairs, "rounds": num_rounds}
        figures["regimes"][regime.name] = about | result
        _say(report.time_table(figures["regimes"][regime.name]))
    for regime in regimes:
        if epoch and regime.name in ("mixed", data.QUICK.name):
            _say(f"{regime.name}: an epoch with the passes that fill the caches")
            figures["epoch"][regime.name] = worker("epoch", regime, "--steps", str(EPOCH_STEPS))
            _say(report.epoch_table(figures["epoch"][regime.name]))
        if memory and regime.name in MEMORY:
            _say(f"{regime.name}: memory")
            figures["memory"][regime.name] = {
                variant: worker("memory", regime, "--variant", variant) for variant in MEMORY[regime.name]
            }
            _say(report.memory_table(figures["memory"][regime.name]))
    return figures


def merged(old: dict[str, Any], new: dict[str, Any]) -> dict[str, Any]:
    """Figures with some regimes measured again. Raises ValueError if machine or versions differ."""
    for key in ("machine", "versions"):
        if old[key] != new[key]:
            raise ValueError(f"--write: {key} changed since the other regimes; measure all of them")
    parts = {key: old[key] | new[key] for key in ("regimes", "epoch", "memory")}
    return new | parts


def _say(text: str) -> None:
    print(text, end="\n\n", flush=True)


def main() -> int:
    """Measure, print, and write the document when everything was measured."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--regimes", default=",".join(data.REGIMES), help="comma-separated")
    parser.add_argument("--rounds", type=int, help="alternations of each regime; default 3, slow ones 2")
    parser.add_argument("--quick", action="store_true", help="a tiny model, one round, no memory")
    parser.add_argument("--write", action="store_true", help="update docs/ with some regimes")
    parser.add_argument("--render", action="store_true", help="write the document, measure nothing")
    arguments = parser.parse_args()
    if arguments.render:
        DOCUMENT.write_text(report.document(json.loads(FIGURES.read_text())))
        return 0
    names = arguments.regimes.split(",")
    unknown = sorted(set(names) - set(data.REGIMES))
    if unknown:
        parser.error(f"--regimes: {unknown[0]} is not one of {', '.join(data.REGIMES)}")
    if arguments.quick:
        figures = run([data.QUICK], 1, memory=False, epoch=True)
    else:
        regimes = [data.REGIMES[name] for name in names]
        figures = run(regimes, arguments.rounds, memory=True, epoch=True)
    _say(report.target_table(figures))
    complete = not arguments.quick and set(names) == set(data.REGIMES)
    if arguments.write or complete:
        if not complete and FIGURES.exists():
            figures = merged(json.loads(FIGURES.read_text()), figures)
        FIGURES.write_text(json.dumps(figures, indent=1) + "\n")
        DOCUMENT.write_text(report.document(figures))
        _say(f"wrote {DOCUMENT.relative_to(ROOT)} and {FIGURES.relative_to(ROOT)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
