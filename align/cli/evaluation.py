"""align evaluate: of a run, of a reward model on pairs, of proxies against gold."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from align.cli.parse import Call, refuse_plugs_of_data
from align.cli.show import show

if TYPE_CHECKING:
    from align.config import Config


def run(call: Call) -> int:
    """How a finished run ranks pairs."""
    from align.config import compose_run
    from align.config.validate import check_run

    config = compose_run(call.words)
    check_run(config, {word.partition("=")[0] for word in call.words})
    from align.evaluate.finished import evaluate_run

    for line in evaluate_run(config, call.options.get("--json")):
        show(line)
    return 0


def pairs(call: Call) -> int:
    """A reward model, or scores that the rows hold, on pairs."""
    config, out = _asked(call)
    from align.evaluate.score import evaluate_pairs

    return evaluate_pairs(config, not _with_model(call), out, show)


def overoptimisation(call: Call) -> int:
    """Best-of-n curves."""
    config, out = _asked(call)
    if _with_model(call):
        raise ValueError("model has no effect here: the rows hold the scores of their proxies; remove it")
    from align.evaluate import overoptimisation

    data = overoptimisation.report(overoptimisation.read_rows(config.data.train))
    for path in overoptimisation.write(data, str(out)):
        show(f"written {path}")
    show("\n".join(overoptimisation.lines(data)))
    return 0


def _asked(call: Call) -> tuple[Config, Path]:
    if not call.own.get("out"):
        raise ValueError(f"align {call.command.name}: give out=DIR, where the report is written")
    if not any(word.startswith("data.train=") for word in call.settings):
        raise ValueError(f"align {call.command.name}: give data.train=FILE")
    refuse_plugs_of_data(call)
    from align.config import compose
    from align.config.validate import check_inputs

    config = compose(call.settings, call.config_dir)
    check_inputs(config)
    return config, Path(call.own["out"])


def _with_model(call: Call) -> bool:
    return any(word.startswith("model=") for word in call.settings)
