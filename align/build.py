"""Settings to parts: the objective, the tokenizer, the pretrained model. A dotted _target_ is the registry.

The base of a kind is imported where a part of it is made: a run imports what it has.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from hydra.errors import InstantiationException
from hydra.utils import get_class, get_method, instantiate
from omegaconf import DictConfig, OmegaConf

from align.config import Config, OwnOptimizerConfig
from align.contracts import adopt, declared_by
from align.jsons import Json, Tokenizer
from align.models.pretrained import Pretrained
from align.objectives.base import Objective, as_objective

if TYPE_CHECKING:
    from align.advantages.base import Advantage
    from align.composers.base import Composer
    from align.data.pairs import PairRule
    from align.rollout.base import Host, Rollout, Sampling
    from align.tools import Tool
    from align.trainers.callbacks import Callback


def objective(config: Config) -> Objective:
    """The objective of a run. Raises ValueError for impossible values and for keys its class does not know."""
    return as_objective(_instantiate(_with_functions(config.objective), "objective"), "objective")


def _with_functions(node: DictConfig) -> DictConfig:
    """A loss that is a plain function (ratios, beta) -> losses is not called when it is made."""
    out = copy.deepcopy(node)
    for key, part in out.items():
        if isinstance(part, DictConfig) and "_target_" in part:
            if key == "loss" and inspect.isfunction(function(str(part["_target_"]), f"objective.{key}._target_")):
                part["_partial_"] = True
            out[key] = _with_functions(part)
    return out


def check_optimizer(config: Config) -> None:
    """Raises ValueError for an optimiser of one's own that cannot be imported or does not take its keys."""
    if not isinstance(config.optimizer, OwnOptimizerConfig):
        return
    _check_call("optimizer", config.optimizer.target, [], lr=config.optimizer.lr, **config.optimizer.keys)


def check_rollout(config: Config) -> None:
    """Raises ValueError for a rollout with keys that it does not take, and one of the user's own that cannot be
    imported. Ours are not: they import what only drawing needs."""
    from align.config.rollouts import ROLLOUTS, ServerSettings, VLLMSettings, settings

    given = OmegaConf.to_container(config.rollout, resolve=True)
    assert isinstance(given, dict)
    keys = {str(key): value for key, value in given.items() if key != "_partial_"}
    target = str(keys.pop("_target_"))
    if target not in ROLLOUTS:
        _check_call("rollout", target, None, **keys)
        return
    made = settings(ROLLOUTS[target], keys)
    if isinstance(made, ServerSettings):
        from align.rollout.http import servers

        servers(made.urls)
    elif isinstance(made, VLLMSettings) and config.launch.kind == "local":  # else other machines are to have it
        from align.rollout.version import check_version

        check_version(made.allow_untested_version)


def _check_call(key: str, target: str, /, *given: object, **keys: object) -> None:
    made = function(target, f"{key}._target_")
    try:
        inspect.signature(made).bind(*given, **keys)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{key} ({target}): {error}") from error


def sampling(config: Config) -> Sampling:
    """How completions are drawn. Raises ValueError for impossible values."""
    from align.rollout.base import Sampling

    s = config.sampling
    return Sampling(s.max_new_tokens, s.temperature, s.top_p, s.top_k, tuple(s.stop), config.seed)


def check_margins(config: Config, objective: Objective) -> None:
    """Raises ValueError for functions of data.margins that cannot be called, or that the objective does not read."""
    names = objective.margins
    for name, path in (config.data.margins or {}).items():
        if name not in names:
            reads = f"reads margins of {', '.join(names)}" if names else "reads no margins"
            raise ValueError(
                f"data.margins.{name} has no effect: objective={config.choices['objective']} {reads}; take it out, or "
                "use data.margins=null"
            )
        from align.data.margins import scoring

        scoring(path, f"data.margins.{name}")


def pair_rule(config: Config) -> PairRule:
    """The rule of the group `pairs`. Raises ValueError for impossible values."""
    if config.pairs is None:
        raise ValueError("pairs=... is missing: choose a rule, for example pairs=max_min")
    from align.data.pairs import PairRule

    return adopt(_instantiate(config.pairs, "pairs"), PairRule, "pairs")  # type: ignore[type-abstract]


def advantage(config: Config) -> Advantage:
    """How rewards become advantages. Raises ValueError for impossible values."""
    from align.advantages.base import Advantage

    return adopt(_instantiate(config.advantage, "advantage"), Advantage, "advantage")  # type: ignore[type-abstract]


def composer(node: DictConfig, names: Sequence[str]) -> Composer:
    """What makes one stream of rewards or advantages of those of several components. Raises ValueError for impossible
    values."""
    from align.composers.base import Composer

    made = _instantiate(node, "composer", names=tuple(names))
    return adopt(made, Composer, "composer")  # type: ignore[type-abstract]


def reward_node(config: Config) -> Json:
    """The node `reward`, resolved."""
    node = OmegaConf.to_container(config.reward, resolve=True)  # type: ignore[arg-type]
    assert isinstance(node, dict)
    return {str(name): part for name, part in node.items()}


def trainer(config: Config) -> Any:
    """The function train(config, command) of the loop that trainer.kind names."""
    return function(f"align.trainers.{config.trainer.kind}.train", "trainer.kind")


def callbacks(config: Config) -> list[Callback]:
    """What is told of steps and evaluations. Raises ValueError for what cannot be made, or would be told nothing."""
    if not config.callbacks:
        return []
    from align.trainers.callbacks import as_callback

    nodes = {f"callbacks.{name}": node for name, node in config.callbacks.items()}
    return [as_callback(_instantiate(node, key), key) for key, node in nodes.items()]


def rollout(config: Config, host: Host) -> Rollout:
    """The backend of the group `rollout` for a policy. Raises ValueError for impossible values."""
    from align.rollout.base import Rollout

    try:
        made = instantiate(config.rollout)(host)
    except InstantiationException as error:
        cause = error.__cause__ or error
        raise ValueError(f"rollout ({config.rollout.get('_target_')}): {' '.join(str(cause).split())}") from error
    return adopt(made, Rollout, "rollout")  # type: ignore[type-abstract]


def serves_all(config: Config) -> bool:
    """Whether one rollout of the group `rollout` is there for all processes of a run."""
    from align.rollout.base import Rollout

    return declared_by(get_class(str(config.rollout.get("_target_"))), Rollout, "rollout").serves_all


def tool(config: Config) -> Tool:
    """The tool that a policy may call while trajectories are collected. Raises ValueError for impossible values."""
    from align.tools import Tool

    return adopt(_instantiate(config.tree.collect.tool, "collect.tool"), Tool, "collect.tool")  # type: ignore[type-abstract]


def pretrained(config: Config) -> Pretrained:
    """The model of a run, not loaded yet."""
    return _instantiate(config.model, "model")


def tokenizer(config: Config) -> Tokenizer:
    """The tokenizer of a run's model."""
    return pretrained(config).tokenizer()


def function(path: str, key: str) -> Any:
    """A Python function by its dotted path. Raises ValueError, naming the setting, if there is none."""
    try:
        return get_method(path)
    except Exception as error:  # Hydra wraps import errors in several kinds
        raise ValueError(f"{key}={path}: cannot be imported ({' '.join(str(error).split())[:200]})") from error


def _instantiate(node: DictConfig, key: str, **more: object) -> Any:
    try:
        return instantiate(node, **more)
    except InstantiationException as error:
        cause = error.__cause__ or error
        raise ValueError(f"{key} ({node.get('_target_')}): {' '.join(str(cause).split())}") from error
