"""All that a command refuses without a model: it calls this first; training in the launcher and on the login node.

It makes the objective, the estimator, the composer and the pair rule, whose own refusals stand in their classes, and
leaves what a trainer or a group of settings forbids to checks_*.py. Nothing is read but names of files.
"""

from __future__ import annotations

import inspect
from collections.abc import Container

from align import build
from align.config.schema import Config, WarmConfig
from align.data.mapping import check_names
from align.data.sources import locate_all
from align.installed import check_installed
from align.launch import place
from align.models.pretrained import check_place
from align.objectives.base import Objective

_ANSWERED = {"prompt", "completion", "finished"}  # what each answer has


def validate(config: Config) -> None:
    """Raises ValueError, one line, for settings with which `align train` would not run."""
    objective = build.objective(config)
    _check_trained(config)
    _check_data(config)
    build.check_optimizer(config)
    build.check_rollout(config)
    _check_trainer(config, objective)
    _check_mixture(config, objective)
    if config.data.streaming:
        from align.config.checks_streaming import check

        check(config, objective)
    _check_head(config, objective)
    build.check_margins(config, objective)
    _check_launch(config)
    _check_packages(config)
    _check_observers(config)


def _check_trainer(config: Config, objective: Objective) -> None:
    """Of each kind alone: the others' parts are not imported."""
    if config.trainer.kind == "online":
        from align.config.checks_online import check
    elif config.trainer.kind == "iterate":
        from align.config.checks_iterate import check
    elif config.trainer.kind == "warm":
        from align.config.checks_offline import check_warm as check
    else:
        from align.config.checks_offline import check
    check(config, objective)


def _check_mixture(config: Config, objective: Objective) -> None:
    """Raises ValueError for sources that cannot be mixed so; the target set is a source as the others are."""
    data = config.data
    mixes = (data.mixture, data.mixture_shares, data.mixture_target, (data.columns or {}).get("weight"))
    if any(setting is not None for setting in mixes):
        from align.config.checks_mixture import check

        check(config, objective)
    if data.mixture_target is not None:
        _check_sources("data.mixture_target", data.mixture_target, data.loader)


def check_inputs(config: Config, heldout: bool = False) -> None:
    """Raises ValueError, in the same words, for a model, rows or rewards with which a command that does not train would
    not run. Nothing that only training reads is asked for. heldout: it reads data.heldout too."""
    _check_model(config)
    _check_sources("data.train", config.data.train, config.data.loader)
    if heldout and config.data.heldout is not None:
        _check_sources("data.heldout", config.data.heldout, config.data.loader)
    _check_functions(config)
    if config.reward:
        from align.config.checks_rewards import examine

        examine(config, lora=False)


def check_drawing(config: Config) -> None:
    """The same of how a model that does not learn is to be asked."""
    build.sampling(config)
    build.check_rollout(config)


def check_run(config: Config, given: Container[str]) -> None:
    """The same of a finished run that is evaluated. given: settings that are not the run's own."""
    _check_model(config)
    _check_reading(config)
    for key, names in (("data.train", config.data.train), ("data.heldout", config.data.heldout)):
        if key in given:
            _check_sources(key, names, config.data.loader)


def _check_trained(config: Config) -> None:
    """Raises ValueError for a model that cannot be, or cannot be trained in this form."""
    if config.model.get("four_bit"):
        _check_four_bit(config)
    _check_model(config)
    check_place("reference.path", config.reference.path)
    if isinstance(config.trainer, WarmConfig):
        for i, path in enumerate(config.trainer.starts or ()):
            check_place(f"trainer.starts[{i}]", path)


def _check_model(config: Config) -> None:
    build.pretrained(config)
    check_place("model.path", config.model.get("path"))


def _check_data(config: Config) -> None:
    """Raises ValueError for sources that are not there, problems that cannot be drawn and functions that cannot be
    imported."""
    data, collect = config.data, config.collect
    if collect is None:
        _check_sources("data.train", data.train, data.loader)
    if data.heldout is not None:
        _check_sources("data.heldout", data.heldout, data.loader)
    if collect is not None:
        from align.data import gym

        gym.check_task(collect.task, collect.task_settings, f"collect.task={collect.task}")
        build.tool(config)
        given = {"format": data.format, "loader": data.loader, "form": data.form, "columns": data.columns}
        for key, value in given.items():
            if value:
                raise ValueError(f"data.{key} has no effect: collect=... writes its rows itself; remove it")
    if data.gold is not None and _asks_more(build.function(data.gold, "data.gold")):
        from align.config.checks_rewards import check_gold

        check_gold(data)
    _check_functions(config)


def _asks_more(gold: object) -> bool:
    """Whether a function of answers is called by other names than the usual three: what it wants is then looked at."""
    return not (inspect.isfunction(gold) and inspect.signature(gold).parameters.keys() <= _ANSWERED)


def _check_sources(key: str, names: object, loader: str | None) -> None:
    for source in locate_all(names, key, loader):
        if source.kind == "gym":
            from align.data import gym

            asked = gym.parse_name(source.name)
            gym.check_task(asked.task, asked.settings, source.name)


def _check_functions(config: Config) -> None:
    _check_reading(config)
    for key, path in (("data.format", config.data.format), ("data.loader", config.data.loader)):
        if path is not None:
            build.function(path, key)


def _check_reading(config: Config) -> None:
    """Raises ValueError for columns and forms that are none."""
    data = config.data
    check_names(data.columns)
    if data.form is not None:
        from align.data.forms import named

        named(data.form, f"data.form={data.form}")


def _check_head(config: Config, objective: Objective) -> None:
    head = config.head
    if "scores" not in objective.needs and (head.path is not None or head.only or head.dropout):
        raise ValueError(
            f"head has no effect: objective={config.choices['objective']} trains no reward model; leave it"
        )


def _check_four_bit(config: Config) -> None:
    if config.lora.rank == 0:
        raise ValueError("model.four_bit=true: weights of 4 bits cannot be trained; set lora.rank=16")
    if config.merge:
        raise ValueError("model.four_bit=true: merge=true would round the adapter to 4 bits; leave merge out")
    if config.engine.stage == 3:
        raise ValueError("model.four_bit=true: engine=zero3 cannot shard weights of 4 bits; use engine=zero2")
    if config.reference.mode == "model":
        raise ValueError("model.four_bit=true: reference.mode=model would hold the model twice; use adapter")
    if "vllm" in str(config.rollout.get("_target_")) and config.trainer.kind != "offline":
        raise ValueError("model.four_bit=true: vLLM would draw from weights that are not these; use rollout=hf")


def _check_launch(config: Config) -> None:
    """Raises ValueError for a launch that its scheduler or the engine would not take."""
    if config.launch.kind == "slurm":
        from align.launch import slurm

        slurm.check(config)
    elif not place.in_job():
        place.check_engine(config, config.launch.processes or 1, 1)
        one = config.choices.get("engine", "local") == "local" or config.launch.processes == 1
        if one and config.launch.port is not None:
            raise ValueError("launch.port has no effect on one process; leave it out")


def _check_packages(config: Config) -> None:
    """Raises ValueError for what needs a package that this machine lacks, if it is the one that trains."""
    if config.launch.kind != "local":
        return
    if config.engine.stage is not None:
        check_installed(f"engine={config.choices.get('engine', 'zero')}", "deepspeed", "deepspeed")
    if config.log.wandb != "off":
        check_installed(f"log.wandb={config.log.wandb}", "wandb", "track")


def _check_observers(config: Config) -> None:
    """Raises ValueError for a best model that nothing tells, and callbacks that cannot be made."""
    t = config.trainer
    if t.early_stopping_patience is not None and t.keep_best is None:
        raise ValueError(
            f"trainer.early_stopping_patience={t.early_stopping_patience} has no effect without "
            "trainer.keep_best; use keep_best=loss/heldout"
        )
    if t.keep_best is not None:
        heldout = config.data.heldout is not None or config.data.heldout_fraction > 0
        # rounds are evaluated at their end, on prompts or on problems of the task
        rounds = t.kind == "iterate"
        key, enough = ("num_samples", t.num_samples > 0) if rounds else ("eval_every", t.eval_every > 0)
        if not (heldout and enough) and not (rounds and config.collect is not None):
            raise ValueError(
                f"trainer.keep_best={t.keep_best} needs evaluations: set data.heldout, and trainer.{key} above 0"
            )
    if t.export_at is not None and any(step < 1 for step in t.export_at):
        raise ValueError(f"trainer.export_at={t.export_at}: must be steps from 1 on")
    build.callbacks(config)
