"""What online training refuses, but for its composer, which is checks_composer.py's."""

from __future__ import annotations

from collections.abc import Mapping

from align import build
from align.advantages.base import Advantage
from align.config import checks_rewards
from align.config.schema import Config, OnlineConfig
from align.objectives.base import Objective
from align.rewards.build import Part


def check(config: Config, objective: Objective) -> None:
    """Raises ValueError for settings that do not go with trainer=online."""
    if objective.kind != "rollout":
        raise ValueError(
            f"objective={config.choices['objective']} learns from data: use trainer=offline, or another objective"
        )
    if config.lora.dropout > 0:
        raise ValueError("lora.dropout must be 0 with trainer=online: the policy that learns is the one that drew")
    if config.data.gold is not None and "everyday" not in config.choices["data"]:
        raise ValueError("data.gold has no effect with trainer=online: name it as a component of the reward")
    build.sampling(config)
    advantage = build.advantage(config)
    _check_values(config, objective, advantage)
    _check_draws(config, advantage)
    _check_kl(config, objective)
    parts = checks_rewards.examine(config, config.lora.rank > 0)
    if config.composer is not None:
        from align.config import checks_composer

        checks_composer.check(config, advantage)
    _check_steps(config, advantage, parts)


def _check_values(config: Config, objective: Objective, advantage: Advantage) -> None:
    if "values" in advantage.needs and "values" not in objective.needs:
        raise ValueError(f"advantage={config.choices['advantage']} needs a value head: set objective.value_coefficient")
    if "values" in objective.needs and "values" not in advantage.needs:
        raise ValueError(
            f"objective.value_coefficient has no effect: advantage={config.choices['advantage']} uses no values"
        )


def _check_draws(config: Config, advantage: Advantage) -> None:
    t, n = config.trainer, config.sampling.n
    assert isinstance(t, OnlineConfig)
    assert config.reward is not None
    names = [str(name) for name in config.reward]
    if config.sampling.temperature == 0:
        raise ValueError("sampling.temperature=0: all completions of a prompt would be the same; use 1.0")
    if n == 1 and "group" in advantage.needs:
        raise ValueError(
            f"sampling.n=1: advantage={config.choices['advantage']} compares the completions of a prompt and would "
            "have no baseline; use sampling.n=2 or more, or advantage=remax"
        )
    if n == 1 and t.dynamic_sampling > 0 and "greedy" not in advantage.needs:
        raise ValueError(
            f"trainer.dynamic_sampling={t.dynamic_sampling}: all completions of a prompt are the same one with "
            "sampling.n=1; use sampling.n=2 or more"
        )
    if t.num_minibatches > t.batch_size:
        raise ValueError(
            f"trainer.num_minibatches={t.num_minibatches}: the trainer.batch_size={t.batch_size} prompts of a step "
            "cannot be divided among so many; use at most as many"
        )
    if t.pass_component not in (None, *names):
        raise ValueError(f"trainer.pass_component={t.pass_component}: must be one of {', '.join(names)}")
    if t.pass_component is not None and t.heldout_n == 0:
        raise ValueError(f"trainer.pass_component={t.pass_component} has no effect with trainer.heldout_n=0")


def _check_kl(config: Config, objective: Objective) -> None:
    t = config.trainer
    assert isinstance(t, OnlineConfig)
    if t.kl_target is not None and t.kl_in_reward == 0:
        raise ValueError(
            f"trainer.kl_target={t.kl_target:g} has no effect with trainer.kl_in_reward=0; set trainer.kl_in_reward, "
            "for example to 0.05"
        )
    if config.reference.path is not None and "reference" not in objective.needs and t.kl_in_reward == 0:
        raise ValueError(
            f"reference.path={config.reference.path} has no effect: nothing here has a reference; set "
            "trainer.kl_in_reward or objective.kl_coefficient"
        )


def _check_steps(config: Config, advantage: Advantage, parts: Mapping[str, Part]) -> None:
    """Raises ValueError for components from which this estimator cannot learn."""
    choice = config.choices["advantage"]
    name = next((name for name, part in parts.items() if part.steps), None)
    if "steps" in advantage.needs:
        if name is None:
            raise ValueError(
                f"advantage={choice} needs rewards of steps, which no component of reward gives; add "
                "reward.steps._target_=align.rewards.process.StepFunction, or use reward=[steps,...] or "
                "reward=[process,...]"
            )
        return
    if name is not None and parts[name].weight == 0:
        raise ValueError(
            f"reward.{name} has no effect: advantage={choice} reads no steps; use advantage=pure or pure_min, "
            f"or set reward.{name}.weight, by which the smallest step counts"
        )
    if not any(part.weight for part in parts.values()):
        raise ValueError("reward: no component has a weight, so nothing can be learnt; set reward.NAME.weight")
