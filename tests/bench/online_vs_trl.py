"""The online update by align and by TRL 1.16.0 side by side, and where the time of a whole online step goes.

    python -m tests.bench.online_vs_trl                       everything; writes docs/benchmarks_online.md and .json
    python -m tests.bench.online_vs_trl --regimes rloo,engine     some regimes, no whole steps; writes nothing
    python -m tests.bench.online_vs_trl --steps hf                whole steps with that rollout only; writes nothing
    python -m tests.bench.online_vs_trl --quick                   does it run at all
    python -m tests.bench.online_vs_trl --render                  the document again from the figures beside it

With --write parts of the document are measured again. Needs requirements/bench.txt. Each regime has its own process;
gradients are compared before anything is timed, and the command fails where they differ.
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

from tests.bench import measure, online_report
from tests.bench.online_data import QUICK, REGIMES, Regime
from tests.bench.online_report import ROLLOUTS
from tests.bench.report import time_table

ROOT = Path(__file__).resolve().parents[2]
DOCUMENT = ROOT / "docs" / "benchmarks_online.md"
FIGURES = ROOT / "docs" / "benchmarks_online.json"
STEPS = 5  # of a run whose time is split; the first warms up


def update(regime: Regime, rounds: int) -> dict[str, Any]:
    """What tests.bench.online_worker measures, in a fresh process. RuntimeError when it fails."""
    with tempfile.TemporaryDirectory() as scratch:
        out = Path(scratch) / "result.json"
        _run(
            [sys.executable, "-m", "tests.bench.online_worker", regime.name]
            + ["--rounds", str(rounds), "--out", str(out)]
        )
        return {"about": regime.about, "rounds": rounds} | json.loads(out.read_text())


def whole_steps(rollout: str) -> dict[str, Any]:
    """Seconds of the parts of each step of `align train recipe=remax`, without those of the first step."""
    with tempfile.TemporaryDirectory() as scratch:
        settings = [f"trainer.max_steps={STEPS}", f"trainer.save_every={STEPS}", "trainer.num_samples=0"]
        settings += ["trainer.precision=float32", "sampling.max_new_tokens=48", f"run.dir={scratch}/run"]
        settings += ROLLOUTS[rollout]
        _run([sys.executable, "-m", "align.cli", "train", "recipe=remax", *settings])
        lines = (Path(scratch) / "run" / "metrics.jsonl").read_text().splitlines()
    rows = [json.loads(line) for line in lines][1:]
    parts = {name: [row[f"time/{name}_s"] for row in rows] for name in (*online_report.PARTS, "step")}
    return {"settings": settings, "seconds": parts}


def _run(command: list[str]) -> None:
    done = subprocess.run(
        command,
        cwd=ROOT,
        env=os.environ | measure.ENVIRONMENT | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        raise RuntimeError(f"{' '.join(command[2:])} failed:\n{(done.stdout + done.stderr)[-3000:]}")


def run(regimes: list[Regime], rollouts: list[str], rounds: int | None) -> dict[str, Any]:
    """All measurements, one after the other."""
    figures: dict[str, Any] = {
        "machine": measure.machine(),
        "versions": measure.versions(),
        "regimes": {},
        "steps": {},
    }
    for regime in regimes:
        _say(f"{regime.name}: {regime.about}")
        figures["regimes"][regime.name] = update(regime, rounds or regime.rounds)
        _say(time_table(figures["regimes"][regime.name]))
    for rollout in rollouts:
        _say(f"whole steps, rollout={rollout}")
        figures["steps"][rollout] = whole_steps(rollout)
        _say(online_report.steps_table(figures["steps"]))
    return figures


def merged(old: dict[str, Any], new: dict[str, Any]) -> dict[str, Any]:
    """Figures with some parts measured again. Raises ValueError if machine or versions differ."""
    for key in ("machine", "versions"):
        if old[key] != new[key]:
            raise ValueError(f"--write: {key} changed since the other parts; measure all of them")
    return new | {key: old[key] | new[key] for key in ("regimes", "steps")}


def _say(text: str) -> None:
    print(text, end="\n\n", flush=True)


def main() -> int:
    """Measure, print, and write the document when everything was measured."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--regimes", help=f"comma-separated, of {', '.join(REGIMES)}")
    parser.add_argument("--steps", help=f"comma-separated, of {', '.join(ROLLOUTS)}")
    parser.add_argument("--rounds", type=int, help="alternations of each regime; default 2 or 3")
    parser.add_argument("--quick", action="store_true", help="a tiny model, one round, no whole steps")
    parser.add_argument("--write", action="store_true", help="update docs/ with some parts")
    parser.add_argument("--render", action="store_true", help="write the document, measure nothing")
    arguments = parser.parse_args()
    if arguments.render:
        DOCUMENT.write_text(online_report.document(json.loads(FIGURES.read_text())))
        return 0
    everything = arguments.regimes is None and arguments.steps is None and not arguments.quick
    names = list(REGIMES) if everything else (arguments.regimes or "").split(",")
    rollouts = list(ROLLOUTS) if everything else (arguments.steps or "").split(",")
    for option, given, known in (("regimes", names, REGIMES), ("steps", rollouts, ROLLOUTS)):
        for name in given:
            if name and name not in known:
                parser.error(f"--{option}: {name} is not one of {', '.join(known)}")
    regimes = [QUICK] if arguments.quick else [REGIMES[name] for name in names if name]
    figures = run(regimes, [name for name in rollouts if name], arguments.rounds)
    _say(online_report.target_table(figures))
    if everything or (arguments.write and not arguments.quick):
        if not everything and FIGURES.exists():
            figures = merged(json.loads(FIGURES.read_text()), figures)
        FIGURES.write_text(json.dumps(figures, indent=1) + "\n")
        DOCUMENT.write_text(online_report.document(figures))
        _say(f"wrote {DOCUMENT.relative_to(ROOT)} and {FIGURES.relative_to(ROOT)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
