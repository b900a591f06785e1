"""What docs/design/007-trunk.md counts of the library: contracts, sizes, circles, what a recipe imports and costs.

python -m tests.bench.house            # counts from the sources: seconds
python -m tests.bench.house --run      # what recipes import, and CPU seconds of three commands: minutes
"""

from __future__ import annotations

import argparse
import ast
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import align

ROOT = Path(align.__file__).parent
FILES = {p.relative_to(ROOT.parent).with_suffix("").as_posix().replace("/", "."): p for p in ROOT.rglob("*.py")}
TREES = {name.removesuffix(".__init__"): ast.parse(p.read_text()) for name, p in sorted(FILES.items())}
# What a loop or a builder may hold of a user's parts.
PARTS = {"objective", "advantage", "composer", "reward", "part", "rule", "tool", "environment", "reader", "found"}
FUNCTION = (ast.FunctionDef, ast.AsyncFunctionDef)


def lines_of(name: str) -> int:
    """Lines of a module's file."""
    path = FILES.get(name) or FILES[f"{name}.__init__"]
    return len(path.read_text().splitlines())


def asked_of_parts() -> list[str]:
    """Places where an attribute of a part is asked for by name with a default; contracts.py is there for it."""
    return [place for name, tree in TREES.items() if name != "align.contracts" for place in asked(name, tree)]


def asked(name: str, tree: ast.AST) -> list[str]:
    """Such places in one module."""
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and getattr(node.func, "id", "") == "getattr" and len(node.args) == 3:
            of = ast.unparse(node.args[0]).split(".")[-1]
            if of in PARTS or of.startswith("resolve("):
                found.append(f"{name}:{node.lineno} {ast.unparse(node)}")
    return found


def count_any() -> int:
    """Uses of Any, imports left out."""
    return sum(isinstance(n, ast.Name) and n.id == "Any" for tree in TREES.values() for n in ast.walk(tree))


def sizes(kind: type | tuple[type, ...]) -> list[tuple[int, str]]:
    """Lines of every class or function, the longest first."""
    return sorted(
        (
            (node.end_lineno - node.lineno + 1, f"{name}.{node.name}")
            for name, tree in TREES.items()
            for node in ast.walk(tree)
            if isinstance(node, kind)
        ),
        reverse=True,
    )


def born_late() -> dict[str, list[str]]:
    """Attributes of the classes in trainers that are first assigned outside of __init__."""
    out = {}
    for name, tree in TREES.items():
        if not name.startswith("align.trainers"):
            continue
        for node in ast.walk(tree):
            if isinstance(node, ast.ClassDef):
                early = {a for f in node.body if isinstance(f, FUNCTION) and f.name == "__init__" for a in _assigned(f)}
                early |= {
                    t.id for s in node.body if isinstance(s, ast.AnnAssign) and isinstance(t := s.target, ast.Name)
                }
                late = {a for f in node.body if isinstance(f, FUNCTION) and f.name != "__init__" for a in _assigned(f)}
                if late - early:
                    out[f"{name}.{node.name}"] = sorted(late - early)
    return out


def _assigned(function: ast.AST) -> Iterator[str]:
    for node in ast.walk(function):
        targets = node.targets if isinstance(node, ast.Assign) else [getattr(node, "target", None)]
        for target in (t for group in targets for t in (group.elts if isinstance(group, ast.Tuple) else [group])):
            if isinstance(target, ast.Attribute) and isinstance(target.value, ast.Name) and target.value.id == "self":
                yield target.attr


def arrows() -> dict[str, set[str]]:
    """Module -> modules of ours that it imports, inside functions too."""
    out: dict[str, set[str]] = {}
    for name, tree in TREES.items():
        found = set()
        for node in ast.walk(tree):
            if isinstance(node, ast.Import):
                found |= {a.name for a in node.names}
            elif isinstance(node, ast.ImportFrom) and node.module:
                found |= {node.module, *(f"{node.module}.{a.name}" for a in node.names)}
        out[name] = {f for f in found if f in TREES and f not in ("align", name)}
    return out


def circles() -> list[list[str]]:
    """Modules that import each other, directly or through others (Tarjan's strong components)."""
    graph, index, low, stack, out = arrows(), {}, {}, [], []

    def visit(v: str) -> None:
        index[v] = low[v] = len(index)
        stack.append(v)
        for w in graph[v]:
            if w not in index:
                visit(w)
                low[v] = min(low[v], low[w])
            elif w in stack:
                low[v] = min(low[v], index[w])
        if low[v] == index[v]:
            part = stack[stack.index(v) :]
            del stack[stack.index(v) :]
            if len(part) > 1:
                out.append(sorted(part))

    for v in graph:
        if v not in index:
            visit(v)
    return out


def imported_by(*words: str) -> tuple[int, int]:
    """Modules of ours, and their lines, that one step of a recipe imports."""
    script = (
        "import sys, json\nfrom align.cli import main\ncode = main(sys.argv[1:])\n"
        "print(json.dumps([code, [m for m in sys.modules if m.split('.')[0] == 'align']]))"
    )
    with tempfile.TemporaryDirectory() as folder:
        done = subprocess.run(
            [sys.executable, "-c", script, *_step(folder, *words)], capture_output=True, text=True, check=True
        )
    code, modules = json.loads(done.stdout.splitlines()[-1])
    assert code == 0, done.stderr
    return len(modules), sum(lines_of(m) for m in modules)


def _step(folder: str, *words: str) -> list[str]:
    return [
        "train", *words, "model=tiny", "trainer.max_steps=1", f"run.dir={folder}/run",
        f"reference.cache_dir={folder}/cache", "log.tensorboard=false", "trainer.num_samples=0",
        "trainer.precision=float32", "data.overlong=drop",
    ]  # fmt: skip


def cpu_seconds(*words: str, times: int = 3) -> float:
    """The median of user and system seconds of a command, its children's too."""
    found = []
    for _ in range(times):
        with tempfile.TemporaryDirectory() as folder:
            before = resource.getrusage(resource.RUSAGE_CHILDREN)
            command = _step(folder, *words[1:]) if words[0] == "train" else list(words)
            subprocess.run([sys.executable, "-m", "align.cli", *command], capture_output=True, check=True)
            after = resource.getrusage(resource.RUSAGE_CHILDREN)
        found.append(after.ru_utime - before.ru_utime + after.ru_stime - before.ru_stime)
    return statistics.median(found)


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--run", action="store_true")
    args = parser.parse_args()
    asked, classes, functions, late = asked_of_parts(), sizes(ast.ClassDef), sizes(FUNCTION), born_late()
    rows = {
        "lines of the library": sum(map(lines_of, TREES)),
        "modules": len(TREES),
        "getattr with a default on a part": len(asked),
        "uses of Any": count_any(),
        "classes over 300 lines": sum(n > 300 for n, _ in classes),
        "largest class": f"{classes[0][0]} {classes[0][1]}",
        "functions over 60 lines": sum(n > 60 for n, _ in functions),
        "longest function": f"{functions[0][0]} {functions[0][1]}",
        "attributes born late, trainers": sum(map(len, late.values())),
        "circles": circles() or 0,
    }
    if args.run:
        os.environ |= {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
        for name, words in (
            ("dpo", ["recipe=dpo"]),
            ("grpo", ["recipe=grpo", "sampling.max_new_tokens=8"]),
        ):
            rows[f"modules and lines imported by recipe={name}"] = "{} {}".format(*imported_by(*words))
        rows["CPU s, align --help"] = round(cpu_seconds("--help"), 2)
        rows["CPU s, align check recipe=wpo"] = round(cpu_seconds("check", "recipe=wpo"), 2)
        rows["CPU s, align train recipe=wpo, one step"] = round(cpu_seconds("train", "recipe=wpo"), 2)
    for name, value in rows.items():
        print(f"| {name} | {value} |")
    for place in asked:
        print(f"  {place}")


if __name__ == "__main__":
    main()
