"""Shipped recipes: each composes into an objective, tells its source, and lists the command that runs it."""

from __future__ import annotations

import json
import re

import pytest
import yaml

from align import build
from align.cli import main
from align.config import compose, recipes
from align.data.sources import locate_all
from align.objectives import imitation, losses, preference, unpaired
from align.rewards.shape import Format
from tests.conftest import mostly_slow, plain_dpo

ALL = sorted(recipes())
# What the recipes that name a loss, or none, mean.
OBJECTIVES = {
    "dpo": plain_dpo(0.1, losses.Sigmoid(0.0)),
    "wpo": preference.WPO(0.1, losses.Sigmoid(0.0), "sampled", 1.0),
    "ipo": plain_dpo(0.1, losses.IpoSum()),
    "ln_dpo": plain_dpo(2.0, losses.SigmoidNorm()),
    "apo": plain_dpo(0.1, losses.ApoZero()),
    "multiturn_dpo": plain_dpo(0.1, losses.Sigmoid(0.0)),
    "kto": unpaired.KTO(0.1, 1.0, 1.0),
    "multiturn_kto": unpaired.KTO(0.1, 1.0, 1.0),
    "sft": imitation.NLL(),
}


@pytest.mark.parametrize("name", ALL)
def test_recipe_builds_the_objective_it_names(name):
    config = compose([f"recipe={name}"])
    objective = build.objective(config)
    written = yaml.safe_load(recipes()[name].read_text()).get("objective", {})
    assert {key: getattr(objective, key) for key in written} == written
    assert objective.kind in ("pair", "labelled", "single", "ranked", "rollout")
    assert (objective.kind == "rollout") == (config.trainer.kind == "online")
    assert name.startswith("paper/") or (config.composer is not None) == (name in COMPOSED)
    if config.trainer.kind == "online":
        estimator = build.advantage(config)
        assert ("values" in estimator.needs) == ("values" in objective.needs)
    if name in OBJECTIVES:
        assert objective == OBJECTIVES[name]
    if config.collect is None:
        for where in filter(None, (config.data.train, config.data.heldout)):
            assert locate_all(where, "data")[0].kind in ("jsonl", "hub", "gym")


@pytest.mark.parametrize("name", ALL)
def test_header_tells_source_command_and_hardware(name):
    text = recipes()[name].read_text()
    header = [line for line in text.split("\n\n")[0].splitlines() if line.startswith("#")]
    assert "arXiv" in " ".join(header)
    assert f"# Command:  align train recipe={name}" in header
    assert any(line.startswith("# Hardware: ") for line in header)


@pytest.mark.parametrize("name", ["paper/dpo_zephyr_7b", "paper/wpo_llama3_8b", "paper/wpo_zephyr_7b"])
def test_paper_recipes_hold_the_papers_batch_and_beta(name):
    """Both papers' released configurations: 128 pairs a step, beta 0.01, a tenth of the steps to warm up."""
    config = compose([f"recipe={name}"])
    assert (config.trainer.batch_size, config.objective.beta) == (128, 0.01)
    assert (config.optimizer.warmup_ratio, config.lora.rank) == (0.1, 0)
    assert config.optimizer.lr == (1e-6 if "llama3" in name else 5e-7)


COMPOSED = [
    name for name in ALL if not name.startswith("paper/") and "override /composer:" in recipes()[name].read_text()
]
SMALL = (
    "model=tiny", "lora.rank=4", "trainer.batch_size=2", "trainer.num_samples=2", "sampling.n=2",
    "sampling.max_new_tokens=8", "data.max_tokens=2048", "trainer.micro_batch_tokens=2048", "log.tensorboard=false",
    "trainer.precision=float32",
)  # fmt: skip


def test_recipes_with_several_rewards():
    assert set(COMPOSED) == {
        *(f"constrained_{how}" for how in ("mu", "xi", "search")),
        *("dynamic_hypervolume", "dynamic_gradient", "tchebycheff", "dpa"),
    }


@pytest.mark.parametrize("name", mostly_slow(COMPOSED, 0))
def test_recipe_with_several_rewards_runs(name, tmp_path):
    """As it is, on a random model and for two steps or rounds."""
    rounds = ("trainer.rounds=1", "trainer.prompts_per_round=4")
    more = rounds if name == "dpa" else ("trainer.max_steps=2", "trainer.eval_every=1")
    assert main(["train", f"recipe={name}", f"run.dir={tmp_path / name}", *SMALL, *more]) == 0
    row = json.loads((tmp_path / name / "metrics.jsonl").read_text().splitlines()[-1])
    assert name == "dpa" or any(key.startswith("weight/") for key in row)
    assert name == "dpa" or (tmp_path / name / "plots" / "multipliers.png").exists()


def test_recipes_of_several_rewards_hold_the_authors_numbers():
    """tedmoskovitz/ConstrainedRL4LMs@11ac8fe and yining610/dynamic-reward-weighting@238fe65."""
    mu, gradient, volume = (
        compose([f"recipe={name}"]) for name in ("constrained_mu", "dynamic_gradient", "dynamic_hypervolume")
    )
    rule = mu.composer.rule
    assert (rule.lr, rule.momentum, rule.max_grad_norm, rule.squash) == (0.1, 0.1, 0.5, "sigmoid")
    assert (mu.advantage.gamma, mu.advantage.lam, mu.objective.clip_low) == (0.99, 0.95, 0.2)
    assert gradient.optimizer.lr / gradient.composer.mu == pytest.approx(0.1)
    assert (gradient.composer.max_norm, gradient.composer.target, gradient.composer.apply) == (1.0, "reward", "now")
    assert list(volume.composer.weights.values()) == [0.5, 0.25, 0.25]
    assert (volume.composer.lowest, volume.composer.gain) == (0.5, 1.5)
    whole, factor = (compose([f"recipe=paper/dynamic_{how}_qwen3_8b"]) for how in ("gradient", "hypervolume"))
    assert (whole.optimizer.lr, whole.composer.mu, whole.composer.max_norm) == (1e-6, 1e-5, 1.0)
    layers = [k for k in range(36) if re.search(whole.composer.parameters, f"model.layers.{k}.mlp.up_proj.weight")]
    assert layers == list(range(10, 26))
    assert (factor.trainer.eval_every, list(factor.composer.weights.values())) == (1, [0.5, 0.25, 0.25])


@pytest.mark.parametrize("name", ["gradient", "hypervolume"])
@pytest.mark.parametrize(
    "completion, score",
    [
        ("1. Add.\n2. Divide: \\boxed{3}", 1.0),
        ("First add, second divide: \\boxed{3}", 1.0),
        ("1. Add.\n2. Divide: 3", 0.0),
        ("1. Add: \\boxed{3}", 0.0),
        ("First add: \\boxed{3.5}", 0.0),
        ("add 1. and 2. \\boxed{3}", 0.0),
    ],
)
def test_clarity_wants_a_box_and_two_enumerators_or_ordinals(name, completion, score):
    pattern = compose([f"recipe=paper/dynamic_{name}_qwen3_8b"]).reward["clarity"].pattern
    assert Format(pattern=pattern)(completion) == score


def test_online_paper_recipes_hold_the_scripts_numbers():
    """The numbers of liziniu/ReMax@536ba49 and yining610/dynamic-reward-weighting@238fe65."""
    remax, grpo = (compose([f"recipe=paper/{name}"]) for name in ("remax_llama2_7b", "grpo_qwen3_8b"))
    assert (remax.advantage.gamma, remax.advantage.clip, remax.advantage.form) == (0.99, 5.0, "one_step")
    assert (remax.trainer.kl_in_reward, remax.optimizer.lr, remax.optimizer.weight_decay) == (0.05, 1e-6, 0.1)
    assert (remax.sampling.top_p, remax.sampling.temperature, remax.sampling.max_new_tokens) == (0.9, 1.0, 256)
    assert (grpo.trainer.batch_size, grpo.sampling.n, grpo.trainer.num_minibatches) == (64, 8, 2)
    assert (grpo.objective.kl_coefficient, grpo.optimizer.lr, grpo.optimizer.schedule) == (0.001, 1e-6, "constant")
