"""What `align train` does before any training: here, on processes of its own, one after the other, or on Slurm."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from pathlib import Path

from align.config import Config, ConfigError, compose
from align.launch import place, sweep

_MANY = ("-m", "--multirun")
_DRY = "--dry-run"


def train(
    words: Sequence[str], config_dir: Path | None, show: Callable[[str], None], tell: Callable[[str], None]
) -> int:
    """Run, start or submit what the words say; returns the exit code. show: for results, tell: for what goes wrong."""
    if place.is_worker():
        config = compose(words, config_dir)
        place.check_engine(config, int(os.environ["WORLD_SIZE"]), 1)
        return _here(words, checked(config))  # another's launcher has checked nothing
    if place.in_job():
        from align.launch.several import as_node

        return as_node(words, lambda: checked(compose(words, config_dir)), config_dir, tell)
    many, dry = any(w in _MANY for w in words), _DRY in words
    words = [w for w in words if w not in (*_MANY, _DRY)]
    one = [] if many else [sweep.Element("", tuple(words), compose(words, config_dir))]
    found = one or sweep.elements(words, config_dir)
    for element in found:
        checked(element.config, element.name)
    config = found[0].config
    if config.launch.kind == "slurm":
        from align.launch import slurm

        return slurm.submit(found, config_dir, dry, show)
    if dry:
        raise ConfigError("--dry-run shows what launch=slurm would submit; without it `align check` is what to use")
    if not many and place.processes(config) == 1:
        return _here(words, config)
    from align.launch.several import one_after_the_other, together

    if many:
        return one_after_the_other(found, config_dir, show, tell)
    return together(words, config, config_dir, tell)


def checked(config: Config, name: str = "") -> Config:
    """Raises ValueError for settings with which this run would end at once, naming it if there are several."""
    from align.config.validate import validate  # settings that cannot be composed are refused before its imports

    try:
        validate(config)
    except ValueError as error:
        raise ConfigError(f"{name}: {error}" if name else str(error)) from error
    return config


def _here(words: Sequence[str], config: Config) -> int:
    from align.build import trainer

    return trainer(config)(config, command="align train " + " ".join(words))
