"""Problems of reasoning-gym as a source of rows: gym:TASK/size:256/seed:0, no file behind it.

What a task is and how its answers are scored is reasoning-gym's (github.com/open-thought/reasoning-gym).
"""

from __future__ import annotations

import ast
import difflib
import json
import re
import sys
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from functools import lru_cache
from importlib.util import find_spec
from pathlib import Path
from types import MappingProxyType
from typing import Any

from align.data import GYM
from align.data.reasoning import TooFew, draw, unfit
from align.jsons import Fields, Json

COLUMNS: tuple[str, ...] = ("prompt", "completion", "answer", "task", "entry")
_TASK = re.compile(r'(?:DATASET_NAME\s*=|register_dataset\()\s*"(\w+)"')
_CURE = "write gym:TASK/size:256/seed:0, and settings of the task in the same way"


@dataclass(frozen=True)
class Gym:
    """Which problems of a task."""

    name: str  # as the user wrote it
    task: str
    size: int
    seed: int
    skip: int  # different questions that are left to another source
    settings: Fields  # the task's own


def parse_name(name: str) -> Gym:
    """The problems that a name means. Raises ValueError; draws nothing.

    gym:TASK/KEY:VALUE/..., without characters that a shell or Hydra would want quoted. size is needed; seed and skip
    are 0 unless given; other keys go to the task. A value is JSON (12, 0.5, true, [1,2]) or else a text.
    """
    task, *words = name.removeprefix(GYM).split("/")
    given: Json = {}
    for word in words:
        key, colon, value = word.partition(":")
        if not key or not colon or not value:
            raise ValueError(f"{name}: {word or 'an empty word'} is not KEY:VALUE; {_CURE}")
        if key in given:
            raise ValueError(f"{name}: {key} stands twice; keep one")
        given[key] = _value(value)
    if not task or ":" in task:
        raise ValueError(f"{name}: names no task; {_CURE}")
    if "size" not in given:
        raise ValueError(f"{name}: how many problems? {_CURE}")
    whole = {key: given.pop(key, 0) for key in ("size", "seed", "skip")}
    for key, value in whole.items():
        low = 1 if key == "size" else 0
        if type(value) is not int or value < low:
            raise ValueError(f"{name}: {key}:{value} must be a whole number of at least {low}")
    return Gym(name, task, settings=MappingProxyType(given), **whole)


def check_task(task: str, settings: Any, key: str) -> None:
    """Raises ValueError for a task that reasoning-gym has not, and for settings that the task refuses.

    Both are read from its sources, since its import takes seconds. key: how the user named the task. Of a package that
    is not there, and of a task whose settings need more of it than that, the one who draws says so.
    """
    known = _tasks()
    if not known:
        return
    if task not in known:
        near = difflib.get_close_matches(task, known, 1)
        tip = f"; did you mean {near[0]}?" if near else ""
        raise ValueError(f"{key}: reasoning-gym has no task {task}{tip}")
    if not isinstance(settings or {}, Mapping):
        raise ValueError(f"{key} with task_settings={settings}: must be settings of the task, or null")
    form = _form(known[task], task)
    if form is None:
        return
    try:
        made = form(**(settings or {}))
        if hasattr(made, "validate"):
            made.validate()
    except NameError:  # of what another file of the package holds
        return
    except (TypeError, ValueError, AssertionError) as error:
        raise ValueError(unfit(key, settings, error)) from error


@lru_cache
def _tasks() -> dict[str, Path]:
    """Name of each task -> the file that registers it."""
    spec = find_spec("reasoning_gym")
    if spec is None or spec.origin is None:
        return {}
    files = sorted(Path(spec.origin).parent.rglob("*.py"))
    return {name: path for path in files for name in _TASK.findall(path.read_text())}


@lru_cache
def _form(path: Path, task: str) -> Callable[..., Any] | None:
    """The dataclass of a task's settings, made of the statements of its file that need nothing of the package."""
    tree = ast.parse(path.read_text())
    names: Json = {"__name__": path.stem}
    for node in tree.body:
        if not isinstance(node, ast.Expr) and not _imports_others(node):
            with suppress(Exception):  # the data set itself, which inherits from the package's
                exec(compile(ast.Module([node], []), str(path), "exec", dont_inherit=True), names)
    for call in ast.walk(tree):
        if isinstance(call, ast.Call) and ast.unparse(call.func) == "register_dataset":
            name, _, form, *_ = (ast.unparse(word) for word in call.args)
            if task in (name.strip("'"), names.get(name)):
                return names.get(form)
    return None


def _imports_others(node: ast.stmt) -> bool:
    if isinstance(node, ast.Import):
        modules = [alias.name for alias in node.names]
    elif isinstance(node, ast.ImportFrom):
        modules = ["" if node.level or node.module is None else node.module]
    else:
        return False
    return any(module.partition(".")[0] not in sys.stdlib_module_names for module in modules)


def rows(gym: Gym) -> list[Json]:
    """The problems, the same ones each time; a question that came before, among the skipped ones too, is left out.

    prompt and completion are messages, so that the row can be imitated and asked; answer, task and entry, which is
    reasoning-gym's with its metadata, are for rewards. Without an answer in the entry there is no completion.
    Raises ValueError for an unknown task or setting, and when the task has too few different questions.
    """
    return [json.loads(line) for line in lines(gym)]


def lines(gym: Gym) -> tuple[str, ...]:
    """The rows as JSON."""
    return _lines(gym.name)


@lru_cache(maxsize=8)  # for the hash of the rows and the rows
def _lines(name: str) -> tuple[str, ...]:
    gym = parse_name(name)
    try:
        found, _, _ = draw(gym.task, gym.settings, gym.skip + gym.size, gym.seed, name)
    except TooFew as error:
        raise ValueError(f"{error} (size + skip); ask for fewer, or for other settings of the task") from None
    out = []
    for problem in found[gym.skip :]:
        entry = dict(problem.entry)
        row: Json = {"prompt": [{"role": "user", "content": problem.question}]}
        if entry["answer"] is not None:
            row["completion"] = [{"role": "assistant", "content": problem.answer}]
        row |= {"answer": entry["answer"], "task": gym.task, "entry": entry}
        out.append(json.dumps(row, default=_plain))
    return tuple(out)


def _value(text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError:
        return text


def _plain(value: Any) -> Any:
    """Metadata that JSON has no form for: numpy's numbers and arrays, sets, dates."""
    if hasattr(value, "tolist"):
        return value.tolist()
    return sorted(value, key=str) if isinstance(value, (set, frozenset)) else str(value)
