"""What the documents tell people to type is what works."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest

from align.config import compose

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted(ROOT.glob("docs/*.md")), ROOT / "recipes" / "README.md"]
COMMAND = re.compile(r"(?:^    |^|`)(align (?:train|check|data check|data pairs) [^`\n]*)", re.MULTILINE)
COMMANDS = sorted(
    {
        re.split(r"\s+#|\s{2,}", line)[0]
        for page in PAGES
        for line in COMMAND.findall(page.read_text())
        if "..." not in line and "NAME" not in line and "--" not in line
    }
    | {
        re.search(r"# Command:\s+(align train .*)", path.read_text()).group(1)
        for path in (ROOT / "recipes").rglob("*.yaml")
    }
)


def test_there_are_commands_to_check():
    assert any(c.startswith("align train recipe=wpo") for c in COMMANDS)


@pytest.mark.parametrize("command", COMMANDS)
def test_command_composes(command):
    words = [w for w in shlex.split(command) if not w.startswith(("scored=", "trees=", "out=", "max_per_prompt="))]
    compose(words[3 if words[1] == "data" else 2 :])


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_links_to_files_exist(page):
    for target in re.findall(r"\]\(([^)#]+)\)", page.read_text()):
        if "://" not in target:
            assert (page.parent / target).exists(), target


def test_readme_names_the_make_targets_that_exist():
    targets = set(re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    named = set(re.findall(r"make ([a-z]+)", (ROOT / "README.md").read_text()))
    assert {"demo", "test"} <= named <= targets


def test_every_metric_a_run_writes_is_documented(tmp_path):
    import json

    from align.trainers.offline import train
    from tests.trainers.test_train import write_pairs

    words = [
        "recipe=wpo",
        "model=tiny",
        f"data.train={write_pairs(tmp_path / 'a.jsonl', 8, 0, origins=True)}",
        f"data.heldout={write_pairs(tmp_path / 'b.jsonl', 4, 1)}",
        f"run.dir={tmp_path / 'run'}",
        f"reference.cache_dir={tmp_path / 'cache'}",
        "trainer.max_steps=1",
        "trainer.num_samples=0",
        "log.tensorboard=false",
    ]
    assert train(compose(words), "test") == 0
    page = (ROOT / "docs" / "metrics.md").read_text()
    documented = set(re.findall(r"`([a-z_<>]+(?:/[a-z_<>]+)?)`", page))
    for key in json.loads((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()[-1]):
        known = key in documented or key.startswith("heldout/") or re.match(r"wpo/weight_\w+$", key)
        assert known, f"{key} is not in docs/metrics.md"
