"""align train, align front."""

from __future__ import annotations

from align.cli.parse import Call
from align.cli.show import show, tell


def train(call: Call) -> int:
    """See align.launch.command."""
    from align.launch.command import train

    return train(call.words, call.config_dir, show, tell)


def front(call: Call) -> int:
    """See align.pareto.command."""
    from align.pareto.command import run

    return run(call.words, call.config_dir, show, tell)
