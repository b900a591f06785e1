"""What a composer of rewards refuses in online training."""

from __future__ import annotations

import re

from align import build
from align.advantages.base import Advantage
from align.composers.base import Composer
from align.composers.invariance import columns_of
from align.config.schema import Config, OnlineConfig
from align.rewards.build import counted


def check(config: Config, advantage: Advantage) -> None:
    """Raises ValueError for a composer that does not go with the other settings, before a model is loaded."""
    assert config.composer is not None
    weights = counted(build.reward_node(config))
    composer = build.composer(config.composer, tuple(weights))
    t, choice, name = config.trainer, config.choices["advantage"], config.choices["composer"]
    assert isinstance(t, OnlineConfig)
    for component, weight in weights.items():
        if weight != 1:
            raise ValueError(
                f"reward.{component}.weight={weight:g} has no effect with composer={name}, which has weights of its "
                f"own; use 1, or 0 to measure {component} only"
            )
    if t.dynamic_sampling > 0 and "kl_stream" in composer.needs:
        raise ValueError(
            f"trainer.dynamic_sampling={t.dynamic_sampling}: with composer={name} every prompt teaches the KL, none "
            "is replaced; use 0"
        )
    if t.kl_target is not None and "kl_stream" in composer.needs and composer.whiten:
        raise ValueError(
            f"trainer.kl_target={t.kl_target:g} has no effect with composer={name}, which whitens the KL's stream; use "
            "null, or composer.whiten=false"
        )
    if "kl_stream" in composer.needs and t.kl_in_reward == 0:
        raise ValueError(
            f"composer={name} has the KL as a stream of its own, which trainer.kl_in_reward=0 leaves empty; set "
            "trainer.kl_in_reward=0.05, or composer.objective.kl=0 with another composer.objective.NAME=1"
        )
    if composer.target == "advantage":
        odd = sorted(columns_of(advantage) - {"advantages", "returns", "old_values"})
        if "steps" in advantage.needs or odd:
            raise ValueError(
                f"composer.target=advantage: advantage={choice} gives more than one advantage for a reward; use "
                "composer.target=reward, or advantage=rloo, grpo, remax, reinforce_pp or ppo"
            )
    _check_evaluations(config, t, composer, name)
    if "uncertainty" in composer.needs and config.sampling.n == 1:
        raise ValueError(f"composer={name} compares the completions of a prompt: use sampling.n=2 or more")
    if "influence" in composer.needs and "steps" in advantage.needs:
        raise ValueError(f"composer={name}: advantage={choice} learns from steps, which no component has alone")
    if "influence" in composer.needs and "values" in advantage.needs and composer.target == "reward":
        raise ValueError(
            f"composer.target=reward: advantage={choice} has one value for the composed reward, and none for that of a "
            "component alone; use composer.target=advantage, or an estimator without values"
        )
    if "influence" in composer.needs and composer.measure == "exact" and config.engine.stage == 3:
        raise ValueError(
            "composer.measure=exact needs whole gradients, which engine.stage=3 never holds; use "
            "composer.measure=directional composer.max_norm=null, or engine=zero2"
        )
    pattern = composer.parameters
    if pattern is not None:
        try:
            re.compile(pattern)
        except re.error as error:
            raise ValueError(f"composer.parameters={pattern}: is no regular expression ({error})") from error
    composer.check(advantage, choice, t.kl_in_reward > 0)


def _check_evaluations(config: Config, t: OnlineConfig, composer: Composer, name: str) -> None:
    if not composer.needs & {"validation", "gold"}:
        return
    if t.num_samples == 0 or (config.data.heldout is None and config.data.heldout_fraction == 0):
        raise ValueError(
            f"composer={name} learns from held-out prompts: set data.heldout, and trainer.num_samples above 0"
        )
    if "validation" in composer.needs and t.eval_every == 0:
        raise ValueError(f"composer={name} learns from evaluations: set trainer.eval_every, for example to 5")
    if composer.gold_metric is not None:
        assert config.reward is not None
        known = [f"{part}_greedy" for part in ("total", *map(str, config.reward))]
        if t.heldout_n > 0:
            known += [*map(str, config.reward), "pass@1"]
        metric = composer.gold_metric
        if metric not in known and not (t.heldout_n > 0 and metric.startswith("pass@")):
            raise ValueError(f"composer.search.metric={metric}: there are {', '.join(known)}")
