"""Every option of configs/reward names a component that can be built with its own keys, and scores."""

from __future__ import annotations

import inspect
from pathlib import Path

import numpy as np
import pytest
import yaml

from align.config import shipped_root
from align.rewards.base import Conversation
from align.rewards.build import RewardHost, components
from align.rewards.worker import resolve

FILES = sorted((shipped_root() / "configs" / "reward").glob("*.yaml"))
NEEDED = {"function": "a.b", "max_tokens": 100, "buffer_tokens": 50, "path": "nowhere", "url": "http://127.0.0.1:9"}
NEEDED |= {"members": ["nowhere", "elsewhere"]}
ROW = Conversation(
    "Why do birds sing?",
    "Birds sing to attract mates. The answer is 7.\n```python\nx = 7\n```\n",
    True,
    token_ids=tuple(range(75)),
    fields={"answer": "7", "tests": "assert x == 7", "task": "chain_sum", "entry": {"answer": "7", "metadata": {}}},
)
# by hand: 75 of 100 tokens with 50 of buffer is half way; the rest is right
SCORES = {"exact": 1.0, "numeric": 1.0, "regex": 1.0, "unit_tests": 1.0, "verifier": 1.0, "overlong": -0.5}


def test_there_are_options():
    assert {path.stem for path in FILES} >= set(SCORES)


@pytest.mark.parametrize("path", FILES, ids=lambda p: p.stem)
def test_option(path: Path):
    node = yaml.safe_load(path.read_text())
    assert len(node) == 1
    (part,) = node.values()
    target = resolve(part["_target_"])
    if inspect.isclass(target):
        parameters = set(inspect.signature(target).parameters) - {"host"}
        assert parameters - {"seconds"} == set(part) - {"_target_", "weight", "seconds"}
        assert ("seconds" in part) == ("seconds" in parameters or not getattr(target, "in_process", False))
    part |= {key: NEEDED[key] for key, value in part.items() if value == "???"}
    if path.stem in SCORES:
        if path.stem == "verifier":
            pytest.importorskip("reasoning_gym")
        rewards = components(node, RewardHost())
        assert rewards.score([ROW])[:, 0].tolist() == [SCORES[path.stem]]
        assert rewards.weights.tolist() == [1.0]
        rewards.close()


def test_the_gold_rule_by_its_option_is_the_function():
    from align.rewards.functions import everyday_gold

    rewards = components(yaml.safe_load((FILES[0].parent / "everyday_gold.yaml").read_text()), RewardHost())
    rows = [ROW, Conversation(ROW.prompt, "Birds want mates.", False)]
    wanted = [everyday_gold(r.prompt, r.completion, r.finished) for r in rows]
    np.testing.assert_array_equal(rewards.score(rows)[:, 0], wanted)
    rewards.close()
