"""docs/vectors.md names every option, the vectors it is compared with, and says where these are only a formula's."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
VECTORS = [entry for path in sorted((ROOT / "tests/vectors").glob("*.json")) for entry in json.loads(path.read_text())]
GROUPS = ("objective", "advantage", "composer")


def rows() -> list[tuple[str, list[str], str, list[str]]]:
    """Of each line of the page's tables: group, options, what it says of their numbers, entries."""
    found, group = [], ""
    for line in (ROOT / "docs/vectors.md").read_text().splitlines():
        if head := re.match(r"\| `(\w+)=` \|", line):
            group = head[1]
        elif line.startswith("| `"):
            options, numbers, entries = (cell.strip() for cell in line.strip("|").split("|"))
            found.append((group, re.findall(r"`(\w+)`", options), numbers, re.findall(r"`(\w+)`", entries)))
    return found


@pytest.mark.parametrize("group", GROUPS)
def test_every_option_stands_there_once(group):
    named = [option for of, options, *_ in rows() if of == group for option in options]
    assert sorted(named) == sorted(path.stem for path in (ROOT / "configs" / group).glob("*.yaml"))


def test_what_it_says_of_the_entries_is_what_they_say_of_themselves():
    sources: dict[str, list[str]] = {}
    for entry in VECTORS:
        sources.setdefault(entry["algorithm"], []).append(entry["source"])
    for _, options, numbers, entries in rows():
        assert set(entries) <= sources.keys(), options
        formulas = [source.startswith("formula") for entry in entries for source in sources[entry]]
        assert numbers.startswith("none") == all(formulas), options  # all() of none is true
        assert any(formulas) <= bool(re.search("formula|definition", numbers)), options
        transcribed = any("transcri" in source for entry in entries for source in sources[entry])
        assert transcribed == ("transcribed" in numbers), options
