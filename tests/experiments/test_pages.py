"""Pages under docs/experiments are what their scripts write of the committed figures."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.experiments import (
    constrained_language,
    dynamic_language,
    multiturn,
    overoptimisation,
    warm,
    wpo_everyday,
)

PAGES = Path(__file__).parents[2] / "docs" / "experiments"


def with_seeds(figures: Any) -> Any:
    """JSON has no whole numbers for keys."""
    if isinstance(figures, dict):
        return {int(key) if key.isdigit() else key: with_seeds(value) for key, value in figures.items()}
    return figures


def warm_page(figures: dict[str, Any]) -> str:
    probed, unprobed = with_seeds(figures["probed"]), with_seeds(figures["unprobed"])
    return warm.page(probed, unprobed, sum(f["seconds"] for f in [*probed.values(), *unprobed.values()]) / 60)


WRITTEN = {
    "constrained_language": lambda figures: constrained_language.page(with_seeds(figures)),
    "dynamic_language": dynamic_language.page,
    "multiturn": lambda figures: multiturn.page(figures, "multiturn_dpo,multiturn_kto", 2),
    "overoptimisation": overoptimisation.page,
    "warm": warm_page,
    "wpo_everyday": lambda figures: wpo_everyday.page(figures, "wpo", 2, 16),
}


@pytest.mark.parametrize("name", WRITTEN)
def test_a_page_is_what_its_script_writes(name):
    """What is mended in one of the two alone would be undone by the next run."""
    page = PAGES / f"{name}.md"
    assert WRITTEN[name](json.loads(page.with_suffix(".json").read_text())) == page.read_text()
