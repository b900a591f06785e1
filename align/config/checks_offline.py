"""What training over fixed data refuses: one run of it, a reward model, and the members of WARM."""

from __future__ import annotations

from align.config.schema import Config, WarmConfig
from align.objectives.base import Objective


def check(config: Config, objective: Objective) -> None:
    """Raises ValueError for settings that do not go with trainer=offline."""
    if objective.kind == "rollout":
        raise ValueError(f"objective={config.choices['objective']} learns from rollouts: use trainer=online")
    if config.reward:
        raise ValueError("reward has no effect with trainer.kind=offline; data.gold scores held-out answers")
    if "scores" in objective.needs:
        _check_reward_model(config)


def check_warm(config: Config, objective: Objective) -> None:
    """Raises ValueError for settings that do not go with trainer=warm."""
    t = config.trainer
    assert isinstance(t, WarmConfig)
    if "scores" not in objective.needs:
        raise ValueError(f"objective={config.choices['objective']}: trainer=warm averages reward models only")
    if config.head.path is not None and t.probe_steps:
        raise ValueError("head.path has no effect with trainer.probe_steps above 0; set one of them")
    if config.head.only:
        raise ValueError("head.only has no effect with trainer=warm; the head alone is what trainer.probe_steps trains")
    _check_reward_model(config)
    if t.only is None:
        return
    if t.only > t.members:
        raise ValueError(f"trainer.only={t.only}: there are trainer.members={t.members}")
    if t.only == 0 and not t.probe_steps:
        raise ValueError("trainer.only=0 trains the head, and trainer.probe_steps=0 says that there is none to train")


def _check_reward_model(config: Config) -> None:
    if config.trainer.num_samples:
        raise ValueError(
            f"trainer.num_samples={config.trainer.num_samples} has no effect: a reward model writes no answers; set 0"
        )
    if config.collect is not None:
        raise ValueError("collect has no effect: a reward model writes no trajectories; leave it out")
    if config.head.only and config.lora.rank:
        raise ValueError(f"lora.rank={config.lora.rank} has no effect with head.only=true; set lora.rank=0")
