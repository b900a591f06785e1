"""What `align train` does before any training: here, on processes of its own, one after the other, or on Slurm."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Sequence
from pathlib import Path

from align.config import Config, ConfigError, compose
from align.launch import local, sweep

_MANY = ("-m", "--multirun")
_DRY = "--dry-run"


def train(
    words: Sequence[str], config_dir: Path | None, show: Callable[[str], None], tell: Callable[[str], None]
) -> int:
    """Run, start or submit what the words say; returns the exit code. show: for results, tell: for what goes wrong."""
    if local.is_worker():
        config = compose(words, config_dir)
        local.check_engine(config, int(os.environ["WORLD_SIZE"]), 1)
        _check(sweep.Element("", tuple(words), config))  # another's launcher has checked nothing
        return _here(words, config)
    if local.in_job():
        return _as_node(words, config_dir, tell)
    many, dry = any(w in _MANY for w in words), _DRY in words
    words = [w for w in words if w not in (*_MANY, _DRY)]
    one = [] if many else [sweep.Element("", tuple(words), compose(words, config_dir))]
    found = one or sweep.elements(words, config_dir)
    for element in found:
        _check(element)
    config = found[0].config
    if config.launch.kind == "slurm":
        from align.launch import slurm

        return slurm.submit(found, config_dir, dry, show)
    if dry:
        raise ConfigError("--dry-run shows what launch=slurm would submit; without it `align check` is what to use")
    if many:
        return one_after_the_other(found, config_dir, show, tell)
    if local.processes(config) == 1:
        return _here(words, config)
    return _together(words, config, config_dir, tell)


def _check(element: sweep.Element) -> None:
    """Raises ValueError for settings with which this run would end at once, naming it if there are several."""
    from align.config.validate import validate  # settings that cannot be composed are refused before its imports

    try:
        validate(element.config)
    except ValueError as error:
        raise ConfigError(f"{element.name}: {error}" if element.name else str(error)) from error


def _here(words: Sequence[str], config: Config) -> int:
    from align.build import trainer

    return trainer(config)(config, command="align train " + " ".join(words))


def _together(words: Sequence[str], config: Config, config_dir: Path | None, tell: Callable[[str], None]) -> int:
    with local.Held() as held:
        return _start(words, config, config_dir, held, tell)


def _as_node(words: Sequence[str], config_dir: Path | None, tell: Callable[[str], None]) -> int:
    """The launcher of a node: signals are held from the first moment, since a scheduler tells them once."""
    with local.Held() as held:
        config = compose(words, config_dir)
        _check(sweep.Element("", tuple(words), config))
        code = _start(words, config, config_dir, held, tell)
    # srun ends the other nodes at the first exit code other than 0, and they may still be leaving
    stopped = os.environ.get("ALIGN_STOPPED")
    if code not in (85, 130) or stopped is None:
        return code
    if local.place(config).node == 0:
        Path(stopped).write_text(f"{code}\n")
    return 0


def _start(
    words: Sequence[str], config: Config, config_dir: Path | None, held: local.Held, tell: Callable[[str], None]
) -> int:
    own = [*words, *(["--config-dir", str(config_dir)] if config_dir else [])]
    return local.launch(own, local.processes(config), local.place(config), config.launch.threads, held, tell)


def one_after_the_other(
    found: Sequence[sweep.Element], config_dir: Path | None, show: Callable[[str], None], tell: Callable[[str], None]
) -> int:
    """Each run in processes of its own; a failed one does not keep the others from running, a signal does."""
    for element in found:
        local.processes(element.config)
    worst, ended = 0, []
    with local.Held() as held:
        for number, element in enumerate(found, 1):
            show(f"run {number} of {len(found)}: {element.name}")
            code = _start(element.words, element.config, config_dir, held, tell)
            ended.append((element.name, code))
            if code in (85, 130) or held.received:
                worst = worst or code or local.CODES[signal.Signals(held.received[0])]
                break
            worst = worst or code
    for name, code in ended:
        show(f"{name}: {'done' if code == 0 else f'exit code {code}'}")
    return worst
