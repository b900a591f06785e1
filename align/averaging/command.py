"""`align average`: words to a directory. Loads torch only after the words have been read."""

from __future__ import annotations

from collections.abc import Callable

from align.averaging.arguments import parse


def run(words: list[str], say: Callable[[str], None]) -> int:
    """Do what stands after `align average`. Raises ValueError, one line, for all that the user can cure."""
    request = parse(words)
    from align.averaging.engine import average

    average(request, say)
    return 0
