"""What a check says, and checks run side by side with a deadline each. Standard library only."""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

Level = Literal["ok", "note", "blocker"]


@dataclass(frozen=True)
class Finding:
    """One line of the report. note: works, or only some feature does not. blocker: a run would fail or hang."""

    check: str
    level: Level
    text: str
    cure: str = ""  # what to type or change; "" where nothing is wrong


@dataclass(frozen=True)
class Check:
    """A name, what looks, and the seconds after which it is given up."""

    name: str
    look: Callable[[], list[Finding]]
    seconds: float


def run_checks(checks: Sequence[Check]) -> list[Finding]:
    """Findings of all checks in their order, which run at the same time; a check that hangs or raises is a finding.

    A thread that hangs, in a file system that does not answer for example, is left behind: it ends with the process.
    """
    start = time.monotonic()
    answers: list[queue.Queue[list[Finding]]] = [queue.Queue() for _ in checks]
    for check, answer in zip(checks, answers, strict=True):
        threading.Thread(target=_look, args=(check, answer), daemon=True).start()
    found: list[Finding] = []
    for check, answer in zip(checks, answers, strict=True):
        try:
            found += answer.get(timeout=max(0.01, start + check.seconds - time.monotonic()))
        except queue.Empty:
            cure = "a file system or a device does not answer, or the machine is very busy: try once more"
            found.append(Finding(check.name, "blocker", f"no answer within {check.seconds:g} s", cure))
    return found


def _look(check: Check, answer: queue.Queue[list[Finding]]) -> None:
    try:
        answer.put(check.look())
    except ImportError as error:  # the versions' own lines say what to install
        answer.put([Finding(check.name, "note", f"not checked: {error}")])
    except Exception as error:  # a check that fails is told of in its line, and the others go on
        said = " ".join(f"{type(error).__name__}: {error}".split())
        answer.put([Finding(check.name, "note", f"not checked: {said}")])


def gib(size: float) -> str:
    """Bytes in GiB with two significant digits, from 10 on as a whole number."""
    value = size / (1 << 30)
    return f"{value:.0f} GiB" if value >= 10 else f"{value:.2g} GiB"
