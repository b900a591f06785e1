"""What a run tells: metrics.jsonl always; the terminal, TensorBoard and wandb as mirrors that can never stop it."""

from __future__ import annotations

import hashlib
import json
import math
import os
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from importlib.util import find_spec
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from align.checkpoint import WriteFailed
from align.config import LogConfig
from align.files import write_atomic
from align.installed import install
from align.jsons import Json


class Log:
    """The log of one run directory. mute: of a process that is not the lead of its run, which tells nothing."""

    def __init__(self, directory: Path, config: LogConfig, run_config: Json, mute: bool = False):
        self.path = directory / "metrics.jsonl"
        self.config = config
        self.mute = mute
        self.console = _Console(file=sys.stderr, highlight=False, soft_wrap=True, quiet=mute)
        self.mirrors: list[tuple[str, Callable[[Json], None], Callable[[], None]]] = []
        if mute:
            return
        if config.tensorboard and find_spec("tensorboard") is None:
            self.say(f"no TensorBoard files: {install('track')}, or set log.tensorboard=false")
        elif config.tensorboard:
            self._add("tensorboard", lambda: _tensorboard(directory))
        if config.wandb != "off":
            self._add("wandb", lambda: _wandb(directory, config, run_config))

    def say(self, line: str) -> None:
        """One line for people."""
        try:
            self.console.print(line, markup=False)
        except OSError:  # the terminal is gone; the run goes on
            self.console.quiet = True

    def row(self, row: Json) -> None:
        """One optimiser step: a line of metrics.jsonl, and the mirrors. What is no number is null in the line.

        Raises WriteFailed when the disk is full.
        """
        if self.mute:
            return
        line = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in row.items()}
        lost = [k for k, v in line.items() if v is None]
        if lost:
            self.say(f"step {row['step']}: {', '.join(lost)} not finite; null in {self.path.name}")
        try:
            with self.path.open("a") as stream:
                stream.write(json.dumps(line, allow_nan=False) + "\n")
        except OSError as error:
            raise WriteFailed(self.path, error) from error
        for name, write, close in list(self.mirrors):
            try:
                write(row)
            except Exception as error:  # whatever a tracker raises, the run goes on
                self.say(f"{name} failed ({error}) and is off from here; metrics.jsonl goes on")
                self.mirrors.remove((name, write, close))

    def keep(self, last_step: int) -> None:
        """Forget rows after `last_step`: they were written after the checkpoint that a run goes on from."""
        if self.mute or not self.path.exists():
            return
        rows = []
        for line in self.path.read_text(errors="replace").splitlines():
            try:
                row = json.loads(line)
            except ValueError:  # cut short by the kill
                continue
            if row["step"] <= last_step:
                rows.append(line)
        write_atomic(self.path, "".join(line + "\n" for line in rows))

    def flush(self) -> None:
        """metrics.jsonl is on the disk before the checkpoint that follows it."""
        if not self.mute and self.path.exists():
            descriptor = os.open(self.path, os.O_RDONLY)
            os.fsync(descriptor)
            os.close(descriptor)

    def progress(self, what: str) -> Callable[[Iterable[int], int], Iterable[int]]:
        """Wraps a loop: a bar with its remaining time on a terminal, a line every ten seconds elsewhere."""

        def wrap(items: Iterable[int], total: int) -> Iterator[int]:
            if total == 0:
                return
            if self.console.is_terminal:
                columns = (TextColumn(what), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
                with Progress(*columns, console=self.console, transient=True) as bar:
                    yield from bar.track(items, total=total)
                return
            start = shown = time.monotonic()
            for done, item in enumerate(items):
                now = time.monotonic()
                if done and now - shown > 10:
                    shown = now
                    left = (now - start) / done * (total - done)
                    self.say(f"{what} {done}/{total}, {left:.0f} s left")
                yield item

        return wrap

    def close(self) -> None:
        """Finish the mirrors."""
        mirrors, self.mirrors = self.mirrors, []  # a tracker need not bear to be finished twice
        for name, _, close in mirrors:
            try:
                close()
            except Exception as error:  # as in row
                self.say(f"{name} failed while closing ({error})")

    def _add(self, name: str, make: Callable[[], tuple[Callable[[Json], None], Callable[[], None]]]) -> None:
        try:
            write, close = make()
        except Exception as error:  # no network, no account, no disk: not the run's business
            self.say(f"{name} cannot start ({error}); metrics.jsonl has everything")
            return
        self.mirrors.append((name, write, close))


class _Console(Console):
    """A console whose closed pipe ends nothing but its own output."""

    def on_broken_pipe(self) -> None:
        self.quiet = True


def _tensorboard(directory: Path) -> tuple[Callable[[Json], None], Callable[[], None]]:
    from torch.utils.tensorboard import SummaryWriter

    # made at the first row, so that what an interrupted run wrote from there on is void
    writers: list[SummaryWriter] = []

    def write(row: Json) -> None:
        if not writers:
            writers.append(SummaryWriter(str(directory / "tensorboard"), purge_step=row["step"]))
        for key, value in row.items():
            if key != "step":
                writers[0].add_scalar(key, value, row["step"])

    def close() -> None:
        for writer in writers:
            writer.close()

    return write, close


def _wandb(directory: Path, config: LogConfig, run_config: Json) -> tuple[Callable[[Json], None], Callable[[], None]]:
    import wandb

    run = wandb.init(
        project=config.wandb_project,
        name=directory.name,
        dir=str(directory),
        mode=config.wandb,  # type: ignore[arg-type]
        config=run_config,
        resume="allow" if config.wandb == "online" else None,
        # the same run directory is the same wandb run when it is resumed
        id=hashlib.sha256(str(directory.resolve()).encode()).hexdigest()[:16] if config.wandb == "online" else None,
        settings=wandb.Settings(console="off", silent=True),
    )
    return lambda row: run.log(row, step=row["step"]), run.finish
