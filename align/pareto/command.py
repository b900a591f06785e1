"""`align front`: words to runs of several composers over weights or thresholds, one directory, and its report.

DIR/plan.json says which runs there are; each is an ordinary run in DIR/NAME.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from pathlib import Path

from omegaconf import OmegaConf

from align.config import Config, ConfigError, differences, saved_settings
from align.files import write_atomic
from align.launch import place, slurm
from align.launch.command import checked
from align.launch.several import one_after_the_other
from align.pareto.arguments import parse
from align.pareto.plan import check_reading, planned, read_plan, write_plan


def run(
    words: Sequence[str],
    config_dir: Path | None,
    show: Callable[[str], None],
    tell: Callable[[str], None],
) -> int:
    """Train what is not complete, then report; returns the exit code.

    Raises ValueError for what is wrong in any run before the first starts.
    """
    if place.is_worker() or place.in_job():
        raise ConfigError("align front starts runs itself; call it outside a job, with launch=slurm for an array")
    arguments = parse(words)
    before = read_plan(arguments.out)
    if arguments.report_only:
        if before is None:
            raise ConfigError(f"out={arguments.out}: holds no front, there is nothing to report")
        plan = replace(before, reading={**before.reading, **arguments.reading})
        check_reading(plan)
        write_plan(arguments.out, plan)
        return _report(arguments.out, show, tell)
    plan, found = planned(arguments, before, config_dir, show)
    for element in found:
        _compare(arguments.out / element.name, checked(element.config, element.name))
    todo = [element for element in found if not complete(arguments.out / element.name, element.config)]
    if arguments.dry and found[0].config.launch.kind != "slurm":
        raise ConfigError("--dry-run shows what launch=slurm would submit; here it has no effect")
    if not arguments.dry:
        write_plan(arguments.out, plan)
    if len(todo) < len(found):
        show(f"{len(found) - len(todo)} of {len(found)} runs are complete")
    if todo and found[0].config.launch.kind == "slurm":
        code = slurm.submit(todo, config_dir, arguments.dry, show)
        if not arguments.dry:
            show(f"when they have ended: align front out={arguments.out} report_only=true")
        return code
    code = one_after_the_other(todo, config_dir, show, tell) if todo else 0
    if code in (85, 130):
        tell(f"stopped; the same words go on, and align front out={arguments.out} report_only=true tells what is there")
        return code
    reported = _report(arguments.out, show, tell)
    return code or reported


def _report(out: Path, show: Callable[[str], None], tell: Callable[[str], None]) -> int:
    """Writes what is known; 1 if a run of the plan has not ended, else 0."""
    from align.pareto import plot, report

    plan = read_plan(out)
    assert plan is not None
    data = report.report(out, asdict(plan))
    if all(entry["state"] != "done" for entry in data["runs"]):
        tell(f"no run in {out} has ended, of {len(data['runs'])} that are planned: there is nothing to report yet")
        return 1
    text = report.markdown(data)
    write_atomic(out / "front.json", json.dumps(data, indent=1, allow_nan=False) + "\n")
    write_atomic(out / "front.md", "\n".join(["# Fronts", "", "![fronts](front.png)", "", *text]) + "\n")
    show("\n".join(text))
    picture = "front.md, front.png"
    try:
        plot.draw(data, out / "front.png")
    except (ImportError, OSError) as error:  # numbers are not to be lost for a picture
        picture = f"front.md; no picture: {error}"
    show(f"written {out / 'front.json'}, {picture}")
    return int(any(entry["state"] != "done" for entry in data["runs"]))


def _compare(directory: Path, config: Config) -> None:
    """Raises ConfigError if a run is there that has other settings."""
    saved = directory / "config.yaml"
    if not saved.exists() or not ((directory / "summary.json").exists() or (directory / "checkpoints").exists()):
        return
    changed = differences(saved_settings(saved), config.tree)
    if changed:
        key, (there, now) = next(iter(changed.items()))
        raise ConfigError(f"{directory} holds a run with {key}={there}, now it is {key}={now}; give another out=DIR")


def complete(directory: Path, config: Config) -> bool:
    """Whether a run has ended with as many steps as it is to have."""
    summary, saved = directory / "summary.json", directory / "config.yaml"
    if not summary.exists() or not saved.exists():
        return False
    steps = config.trainer.max_steps
    if steps is not None:
        return bool(json.loads(summary.read_text())["step"] == steps)
    # a start rewrites the settings and the end the summary: of epochs it alone tells that the last start has ended
    same = OmegaConf.select(OmegaConf.load(saved), "trainer.max_steps") is None
    return bool(same and summary.stat().st_mtime_ns >= saved.stat().st_mtime_ns)
