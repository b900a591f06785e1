"""What training in rounds refuses."""

from __future__ import annotations

from align import build
from align.config.checks_rewards import examine
from align.config.schema import Config, IterateConfig
from align.config.values import check_enough
from align.data.sources import locate_all
from align.objectives.base import Objective
from align.rewards.build import counted

# Which kinds of objective learn from what is selected.
_KINDS = {
    "pairs": ("pair", "labelled"),
    "best_of_n": ("single",),
    "labelled": ("labelled",),
    "collect": ("pair", "labelled"),
}


def check(config: Config, objective: Objective) -> None:
    """Raises ValueError for settings that do not go with trainer=iterate."""
    t = config.trainer
    assert isinstance(t, IterateConfig)
    name, kind = config.choices["objective"], objective.kind
    if kind == "rollout":
        raise ValueError(f"objective={name} learns from rollouts: use trainer=online")
    if kind not in _KINDS[t.select]:
        fitting = [select for select, kinds in _KINDS.items() if kind in kinds]
        raise ValueError(
            f"trainer.select={t.select} gives no rows for objective={name}: use trainer.select={' or '.join(fitting)}"
        )
    collects = t.select == "collect"
    if collects != (config.collect is not None):
        raise ValueError("trainer.select=collect and collect=... belong together, with data=collected")
    if collects and config.reward:
        raise ValueError("reward has no effect with trainer.select=collect: the task's verifier says what is right")
    if not collects and not config.reward:
        raise ValueError("trainer=iterate needs a reward: add reward.NAME._target_=module.function, or reward=...")
    _check_unused(config, t)
    _check_reference(config, t, objective)
    if t.offline_data is not None:
        locate_all(t.offline_data, "trainer.offline_data")
    if collects and config.composer is not None:
        raise ValueError("composer has no effect with trainer.select=collect: there are no rewards; remove it")
    if config.collect is None:
        _check_draws(config, t)
    else:
        check_enough(config.collect.num_problems, t.rounds, t.prompts_per_round, "collect.num_problems")


def _check_draws(config: Config, t: IterateConfig) -> None:
    if config.sampling.temperature == 0:
        raise ValueError("sampling.temperature=0: all completions of a prompt would be the same; use 1.0")
    if t.select != "best_of_n" and config.sampling.n + t.greedy < 2:
        raise ValueError(
            f"sampling.n={config.sampling.n}: trainer.select={t.select} compares completions; use at least 2"
        )
    build.sampling(config)
    if config.pairs is not None:
        build.pair_rule(config)
    parts = examine(config, config.lora.rank > 0)
    if not any(part.weight for part in parts.values()):
        raise ValueError("reward: no component has a weight, so nothing tells completions apart; set one")
    if t.pass_component not in (None, *parts):
        raise ValueError(f"trainer.pass_component={t.pass_component}: must be one of {', '.join(parts)}")
    if config.composer is not None:
        _check_composer(config)


def _check_unused(config: Config, t: IterateConfig) -> None:
    limited = t.select == "best_of_n" or (t.select == "labelled" and t.min_score is not None)
    for key, unused in (
        ("trainer.eval_every", t.eval_every != 0),
        ("trainer.min_score", t.min_score is not None and t.select in ("pairs", "collect")),
        ("trainer.max_pairs_per_prompt", t.max_pairs_per_prompt is not None and (limited or t.select == "collect")),
        ("pairs", config.pairs is not None and (limited or t.select == "collect")),
        ("trainer.greedy", t.greedy and t.select == "collect"),
        ("trainer.heldout_n", t.heldout_n > 0 and t.select == "collect"),
        ("trainer.pass_component", t.pass_component is not None and t.heldout_n == 0),
        ("data.gold", config.data.gold is not None and "everyday" not in config.choices["data"]),
    ):
        if unused:
            cure = {"trainer.eval_every": "rounds are evaluated at their end", "data.gold": "name it as a reward"}
            why = cure.get(key, f"it does nothing for trainer.select={t.select}")
            if key == "trainer.pass_component":
                why = "pass@k needs trainer.heldout_n"
            raise ValueError(f"{key} has no effect with trainer=iterate: {why}; remove it")


def _check_reference(config: Config, t: IterateConfig, objective: Objective) -> None:
    name, path = config.choices["objective"], config.reference.path
    if "reference" not in objective.needs:
        if t.reference == "fixed" or path is not None:
            key = "reference.path" if path is not None else "trainer.reference=fixed"
            raise ValueError(f"{key} has no effect: {name} has no reference; remove it")
        return
    if t.reference == "updated":
        if path is not None:
            raise ValueError(
                f"reference.path={path} has no effect with trainer.reference=updated; use trainer.reference=fixed"
            )
        if "start_token_logps" in objective.extras:
            raise ValueError(
                f"objective={name} needs trainer.reference=fixed: with updated its reference models are one policy"
            )
    elif config.reference.mode == "adapter":
        raise ValueError(
            "reference.mode=adapter with trainer.reference=fixed: the adapter switched off is the policy that the "
            "round starts from; use reference.mode=cached or model"
        )


def _check_composer(config: Config) -> None:
    assert config.composer is not None
    composer = build.composer(config.composer, tuple(counted(build.reward_node(config))))
    if "direction" not in composer.needs:
        raise ValueError(
            f"composer={config.choices['composer']} composes what an online step learns from: use trainer=online, or "
            "composer=directional"
        )
