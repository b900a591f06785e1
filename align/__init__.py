"""align: aligning language models to human preferences. Importing this package loads nothing heavy."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from align.api import Run as Run
    from align.api import RunFailed as RunFailed
    from align.api import compose as compose
    from align.api import load as load
    from align.api import train as train
    from align.api import validate as validate

__version__ = "0.1.0"
__all__ = ["Run", "RunFailed", "compose", "load", "train", "validate"]


def __getattr__(name: str) -> Any:
    """The Python API, imported when it is first asked for."""
    if name not in __all__:
        raise AttributeError(f"module 'align' has no attribute {name!r}")
    from align import api

    return getattr(api, name)


def __dir__() -> list[str]:
    return [*globals(), *__all__]
