"""Settings are checked without what only training needs, and torch is whole afterwards."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch

from align import deferred
from align.deferred import F, nn, no_grad

HEAVY = {"torch", "transformers", "deepspeed", "peft", "datasets", "vllm", "wandb", "reasoning_gym"}

CHECKED = f"""
import re, sys
from align.cli import main
from align.config import recipes, shipped_root
from align.rewards.worker import resolve
for group in ("objective", "advantage", "composer", "reward", "pairs", "collect", "model"):
    for option in (shipped_root() / "configs" / group).rglob("*.yaml"):
        for target in re.findall(r"_target_: (align[.]\\S+)", option.read_text()):
            resolve(target)
            assert not {HEAVY} & set(sys.modules), target
for name in recipes():
    assert main(["check", f"recipe={{name}}"]) == 0, name
    assert not {HEAVY} & set(sys.modules), name
from align.objectives import losses
import torch
assert losses.torch.Tensor is torch.Tensor and losses.F.logsigmoid is torch.nn.functional.logsigmoid
"""


def test_checking_every_shipped_recipe_imports_nothing_that_only_training_needs():
    """And no class of any option does, so that none of them is checked with more than that."""
    done = subprocess.run([sys.executable, "-c", CHECKED], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_checking_offline_training_imports_no_part_of_online_training():
    parts = ("align.rewards.build", "align.advantages", "align.composers", "align.rollout", "align.tools", "numpy")
    code = f"""
import sys
from align.cli import main
assert main(["check", "recipe=dpo"]) == 0
assert not [name for name in sys.modules if name.startswith({parts})]
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_what_is_deferred_is_torchs_own():
    assert deferred.torch.Tensor is torch.Tensor
    assert nn.Module is torch.nn.Module
    assert F.relu is torch.nn.functional.relu
    with pytest.raises(AttributeError, match="no_such_thing"):
        _ = deferred.torch.no_such_thing
    with pytest.raises(TypeError, match="isinstance"):  # instead of False for every tensor
        isinstance(torch.ones(1), deferred.Tensor)


def test_a_function_without_gradient_leaves_the_mode_as_it_was():
    @no_grad
    def twice(x: torch.Tensor) -> torch.Tensor:
        """Doubled."""
        assert not torch.is_grad_enabled()
        if len(x) == 0:
            raise ValueError("empty")
        return 2 * x

    x = torch.ones(2, requires_grad=True)
    assert not twice(x).requires_grad
    assert torch.is_grad_enabled()
    with pytest.raises(ValueError, match="empty"):
        twice(x[:0])
    assert torch.is_grad_enabled()
    assert (twice.__name__, twice.__doc__) == ("twice", "Doubled.")
