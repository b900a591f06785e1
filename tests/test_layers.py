"""Who may import whom, read from the sources; and that every module can be imported."""

from __future__ import annotations

import ast
import importlib
import pkgutil
from pathlib import Path

import pytest

import align

ROOT = Path(align.__file__).parent
FILES = {p.relative_to(ROOT).as_posix(): ast.parse(p.read_text()) for p in sorted(ROOT.rglob("*.py"))}
MAKE = "prepare/everyday.py"
CHECKS = {f for f in FILES if f.startswith(("config/validate", "config/checks_"))}
PURE = ("align.types", "align.contracts", "align.deferred")


def imports(file: str) -> set[str]:
    """Dotted names that a file imports, inside functions too; `from align import x` counts as align.x."""
    found = set()
    for node in ast.walk(FILES[file]):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file}: relative import"
            assert node.module
            found |= {f"align.{a.name}" for a in node.names} if node.module == "align" else {node.module}
    return found


def ours(file: str) -> set[str]:
    return {name for name in imports(file) if name.split(".")[0] == "align"}


def packages(file: str) -> set[str]:
    return {name.split(".")[0] for name in imports(file)}


def below(folder: str) -> list[str]:
    return [f for f in FILES if f.startswith(f"{folder}/")]


@pytest.mark.parametrize(
    "file, allowed",
    [
        ("types.py", set()),
        ("packing.py", {"align.types", "align.deferred"}),
        ("models/attention.py", {"align.types"}),
        ("models/logprobs.py", {"align.types", "align.sums"}),
        ("deferred.py", set()),
        ("sums.py", {"align.types", "align.deferred"}),
        *(
            (file, {"align.config", "align.engine.settings", "align.vocabulary"})
            for file in below("config")
            if file not in CHECKS
        ),
        ("vocabulary.py", set()),
        ("jsons.py", set()),
        ("contracts.py", set()),
        ("files.py", set()),
        ("tensor_files.py", set()),
        ("simplex.py", set()),
        *((file, {*PURE, "align.sums", "align.simplex", "align.objectives"}) for file in below("objectives")),
        *((file, {*PURE, "align.advantages"}) for file in below("advantages")),
        *((file, {*PURE, "align.simplex", "align.composers"}) for file in below("composers")),
    ],
)
def test_lower_layers(file, allowed):
    needed = ours(file) - {"align.jsons"}  # names of types, which all may use
    assert {name if name in allowed else name.rpartition(".")[0] for name in needed} <= allowed


def test_what_is_refused_without_a_model_is_asked_by_commands_alone():
    """It knows every part by its contract, and no part knows it."""
    asking = {file for file in FILES if any(f"align.{c[:-3].replace('/', '.')}" in ours(file) for c in CHECKS)}
    commands = {"api.py", "launch/command.py"}
    assert asking - CHECKS == commands | {f"cli/{name}.py" for name in ("settings", "models", "evaluation", "data")}
    above = ("align.trainers", "align.models.policy", "align.engine.", "align.rollout")
    assert not any(name.startswith(above) for file in CHECKS for name in ours(file))


@pytest.mark.parametrize("file", below("objectives") + below("advantages") + below("composers"))
def test_objectives_advantages_and_composers_need_torch_only(file):
    assert packages(file) <= {
        "__future__",
        "abc",
        "collections",
        "dataclasses",
        "functools",
        "typing",
        "math",
        "torch",
        "align",
    }


@pytest.mark.parametrize(
    "package, allowed",
    [
        ("hydra", {"config/compose.py", "config/explain.py", "config/overrides.py", "build.py"}),
        ("deepspeed", {"engine/deepspeed.py"}),
        ("vllm", {"rollout/vllm_engine.py", "rollout/file_transfer.py", "rollout/serve.py", MAKE}),
        ("wandb", {"report/log.py"}),
        ("peft", {"models/policy.py"}),
    ],
)
def test_owner_of_a_heavy_package(package, allowed):
    assert {file for file in FILES if package in packages(file)} <= allowed


@pytest.mark.parametrize("file", below("rollout") + below("rewards"))
def test_rollouts_and_rewards_know_no_loop(file):
    assert not any(name.startswith(("align.trainers", "align.engine", "align.objectives")) for name in ours(file))


@pytest.mark.parametrize("file", below("data"))
def test_data_knows_no_model(file):
    assert not any(
        name.startswith(("align.models", "align.prepare", "align.trainers", "align.engine")) for name in ours(file)
    )
    assert "torch" not in packages(file)


def test_only_the_command_line_prints():
    printing = {
        file
        for file, tree in FILES.items()
        for node in ast.walk(tree)
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "print"
    }
    assert "cli/__init__.py" in printing
    assert printing <= {*below("cli"), MAKE}


def token_comparisons(tree: ast.AST) -> list[str]:
    """Comparisons with a special token's id, as in `ids != pad_token_id`; with None is a question about its being."""
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Compare):
            operands = [node.left, *node.comparators]
            if any(isinstance(o, ast.Constant) and o.value is None for o in operands):
                continue
            names = {n.attr if isinstance(n, ast.Attribute) else n.id for o in operands for n in ast.walk(o)
                     if isinstance(n, (ast.Attribute, ast.Name))}  # fmt: skip
            if names & {"pad_token_id", "pad_id", "pad_token", "pad"}:
                found.append(ast.unparse(node))
    return found


def test_no_mask_from_token_identity():
    assert token_comparisons(ast.parse("mask = ids != tok.pad_token_id")) == ["ids != tok.pad_token_id"]
    assert {file: found for file, tree in FILES.items() if (found := token_comparisons(tree))} == {}


@pytest.mark.parametrize("name", [m.name for m in pkgutil.walk_packages([str(ROOT)], "align.")])
def test_every_module_can_be_imported(name):
    try:
        importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name not in ("vllm", "deepspeed"):  # optional or absent on this platform
            raise
