"""What the documents tell people to type is what works."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest

from align.config import compose
from align.launch.sweep import elements

ROOT = Path(__file__).parents[1]
PAGES = [
    ROOT / "README.md",
    *sorted(ROOT.glob("docs/*.md")),
    *sorted(ROOT.glob("docs/design/*.md")),
    ROOT / "recipes" / "README.md",
]
COMMAND = re.compile(r"(?:^    |^|`)(align (?:train|check|data check|data pairs|generate|score) [^`\n]*)", re.MULTILINE)
COMMANDS = sorted(
    {
        re.split(r"\s+#|\s{2,}", line)[0]
        for page in PAGES
        for line in COMMAND.findall(re.sub(r"\\\n\s*", "", page.read_text()))
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
    own = ("scored=", "trees=", "out=", "max_per_prompt=", "n=", "greedy=")  # not the settings'
    words = [w for w in shlex.split(command) if not w.startswith(own)]
    placed = [w.replace("model=PATH", "model=some/model") for w in words]
    settings = placed[3 if words[1] == "data" else 2 :]
    if "-m" in settings:
        assert len(elements([w for w in settings if w != "-m"], None)) > 1
    else:
        compose(settings)


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_links_to_files_and_headings_exist(page):
    for target, heading in re.findall(r"\]\(([^)#\s]*)#?([^)\s]*)\)", page.read_text()):
        if "://" not in target:
            linked = page.parent / target if target else page
            assert linked.exists(), target
            assert not heading or heading in headings(linked), f"{target}#{heading}"


def headings(page):
    """Anchors of a page as GitHub makes them."""
    titles = re.findall(r"^#+ (.*)$", page.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


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
    for key in json.loads((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()[-1]):
        known = key in documented() or key.startswith("heldout/") or re.match(r"wpo/weight_\w+$", key)
        assert known, f"{key} is not in docs/metrics.md"


def documented():
    """Names in docs/metrics.md."""
    return set(re.findall(r"`([a-z_<>@]+(?:/[a-z_<>@]+){0,2})`", (ROOT / "docs" / "metrics.md").read_text()))


ONLINE = {
    "remax": ["recipe=remax"],
    "ppo": [
        *("recipe=ppo", "objective.kl_coefficient=0.1", "objective/correction=truncate", "trainer.dynamic_sampling=1"),
        *("objective.off_policy_threshold=0.5", "trainer.heldout_n=3"),
    ],
    "copo": ["recipe=grpo", "advantage=copo", "reward.bad._target_=tests.trainers.online_rewards.flaky"],
}


@pytest.mark.parametrize("name", ONLINE)
def test_every_metric_an_online_run_writes_is_documented(tmp_path, name):
    import json

    from align.trainers.online import train

    words = [
        *ONLINE[name],
        *("model=tiny", f"run.dir={tmp_path / 'run'}", "trainer.max_steps=1", "trainer.batch_size=4"),
        *("trainer.num_samples=2", "sampling.max_new_tokens=8", "trainer.max_missing_fraction=1"),
        *("log.tensorboard=false", "trainer.precision=float32"),
    ]
    assert train(compose(words), "test") == 0
    row = json.loads((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()[-1])
    assert len(row) > 30
    for key in row:
        general = re.sub(r"(?<=[/_])(everyday_gold|bad)(?=_greedy(?:_low|_high)?$|/|$)", "<component>", key)
        general = re.sub(r"(?<=@)\d+", "<k>", re.sub(r"(<component>/)\w+$", r"\1<reason>", general))
        assert general in documented(), f"{key} is not in docs/metrics.md"
