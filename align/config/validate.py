"""All that `align train` refuses without a model: every command calls it first, also where it submits."""

from __future__ import annotations

from align.config.deferred import deferred
from align.config.schema import Config


def validate(config: Config) -> None:
    """Raises ValueError, one line, for settings with which `align train` would not run.

    Parts are made to be checked; torch, which their modules name, is not imported for that.
    """
    with deferred():
        from align.config.checks import check

        check(config)
