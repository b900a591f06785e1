"""align generate, align average, align score."""

from __future__ import annotations

from pathlib import Path

from align.cli.parse import Call, refuse_plugs_of_data
from align.cli.show import show


def generate(call: Call) -> int:
    """See align.evaluate.generate."""
    out, number, greedy = (call.own.get(key, usual) for key, usual in (("out", ""), ("n", ""), ("greedy", "false")))
    if not out:
        raise ValueError("give out=FILE.jsonl: where the completions are written")
    if greedy not in ("true", "false"):
        raise ValueError(f"greedy={greedy}: must be true or false")
    given = {word.partition("=")[0] for word in call.settings}
    without_effect = given & {"data.heldout", "data.heldout_fraction"}
    if without_effect:
        raise ValueError(f"{min(without_effect)} has no effect here: every row of data.train is a prompt; remove it")
    more = [f"sampling.n={number}"] if number else []
    if greedy == "true":
        if number not in ("", "1") or given & {"sampling.n", "sampling.temperature"}:
            raise ValueError("greedy=true is n=1 and sampling.temperature=0; remove the other")
        more = ["sampling.n=1", "sampling.temperature=0"]
    from align.config import compose
    from align.config.validate import check_drawing, check_inputs

    config = compose([*call.settings, *more], call.config_dir)
    check_inputs(config)
    check_drawing(config)
    from align.evaluate.generate import generate

    return generate(config, Path(out), show)


def average(call: Call) -> int:
    """See align.averaging.command."""
    from align.averaging.command import run

    return run(call.words, show)


def score(call: Call) -> int:
    """See align.evaluate.score."""
    if not call.own.get("out"):
        raise ValueError("give out=FILE.jsonl: where the rows with their scores are written")
    if not any(word.startswith("data.train=") for word in call.settings):
        raise ValueError("give data.train=FILE: the rows to be scored")
    refuse_plugs_of_data(call)
    from align.config import compose
    from align.config.validate import check_inputs

    config = compose(call.settings, call.config_dir)
    check_inputs(config)
    from align.evaluate.score import score

    return score(config, Path(call.own["out"]), show)
