"""Runs in processes of their own on this machine: one that has several, a node's part of one, one after the other."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Sequence
from pathlib import Path

from align.config import Config
from align.launch import local, place
from align.launch.sweep import Element


def together(words: Sequence[str], config: Config, config_dir: Path | None, tell: Callable[[str], None]) -> int:
    """A run of several processes; returns the exit code."""
    with local.DeferredSignals() as held:
        return _start(words, config, config_dir, held, tell)


def as_node(
    words: Sequence[str], composed: Callable[[], Config], config_dir: Path | None, tell: Callable[[str], None]
) -> int:
    """The launcher of a node: signals are held from the first moment, since a scheduler tells them once."""
    with local.DeferredSignals() as held:
        config = composed()
        code = _start(words, config, config_dir, held, tell)
    # srun ends the other nodes at the first exit code other than 0, and they may still be leaving
    stopped = os.environ.get("ALIGN_STOPPED")
    if code not in (85, 130) or stopped is None:
        return code
    if place.place(config).node == 0:
        Path(stopped).write_text(f"{code}\n")
    return 0


def _start(
    words: Sequence[str],
    config: Config,
    config_dir: Path | None,
    held: local.DeferredSignals,
    tell: Callable[[str], None],
) -> int:
    own = [*words, *(["--config-dir", str(config_dir)] if config_dir else [])]
    return local.launch(own, place.processes(config), place.place(config), config.launch.threads, held, tell)


def one_after_the_other(
    found: Sequence[Element], config_dir: Path | None, show: Callable[[str], None], tell: Callable[[str], None]
) -> int:
    """Each run in processes of its own; a failed one does not keep the others from running, a signal does."""
    for element in found:
        place.processes(element.config)
    worst, ended = 0, []
    with local.DeferredSignals() as held:
        for number, element in enumerate(found, 1):
            show(f"run {number} of {len(found)}: {element.name}")
            code = _start(element.words, element.config, config_dir, held, tell)
            ended.append((element.name, code))
            if code in (85, 130) or held.received:
                worst = worst or code or place.CODES[signal.Signals(held.received[0])]
                break
            worst = worst or code
    for name, code in ended:
        show(f"{name}: {'done' if code == 0 else f'exit code {code}'}")
    return worst
