"""Packages that only some runs need, and what to type where one of them is missing."""

from __future__ import annotations

from importlib.util import find_spec

# On the package index, where `align` is another project's name; the import and the command are `align`.
DISTRIBUTION = "align-rlhf"


def install(extra: str) -> str:
    """The words that install what an extra of pyproject.toml names."""
    return f'pip install "{DISTRIBUTION}[{extra}]"'


def check_installed(key: str, module: str, extra: str) -> None:
    """Raises ValueError for a setting whose package is not installed. Nothing is imported."""
    if find_spec(module) is None:
        raise ValueError(f"{key} needs the package {module}, which is not installed: {install(extra)}")
