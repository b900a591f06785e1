"""align doctor, align launch check."""

from __future__ import annotations

from align.cli.parse import Call
from align.cli.show import show, tell


def doctor(call: Call) -> int:
    """See align.doctor.command."""
    from align.doctor.command import run

    return run(call.words, call.options.get("--json"), show)


def launch_check(call: Call) -> int:
    """See align.launch.preflight."""
    from align.launch.preflight import run

    return run(call.words, show, tell)
