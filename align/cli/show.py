"""Where lines go: results to standard output, what goes wrong to standard error."""

from __future__ import annotations

import sys

show = print


def tell(message: str) -> None:
    """One line for people."""
    print(f"align: {message}", file=sys.stderr, flush=True)
