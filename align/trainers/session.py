"""What every run has from its start on, and how it is opened and closed.

`start` opens a session, lets a trainer work in it and turns what can go wrong into exit codes. What a trainer makes
afterwards (the model, the rollout, rewards) is closed with the session.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field, replace

import torch

from align import build, checkpoint
from align.config import Config
from align.data.audit import Audit
from align.data.template import asks_for_date, fix_date
from align.engine.world import World, join, leave
from align.jsons import Tokenizer
from align.models.device import pick_device, pick_precision
from align.models.pretrained import Pretrained
from align.objectives.base import Objective
from align.report.log import Log
from align.rollout.base import EngineFailed
from align.rundir import RunDirectory, environment
from align.trainers.loop import NonFinite
from align.trainers.signals import Signals, Stopped


class SelfCheckError(RuntimeError):
    """Policy, reference, layout or engine do not fit together; training would be on wrong numbers."""


@dataclass(frozen=True)
class Session:
    """One process's work on a run directory."""

    config: Config
    command: str  # as the user gave it
    objective: Objective
    world: World
    out: RunDirectory
    log: Log
    signals: Signals
    pretrained: Pretrained
    tokenizer: Tokenizer
    precision: torch.dtype
    precision_why: str
    started: float  # time.perf_counter
    closing: ExitStack = field(default_factory=ExitStack, repr=False)  # what is ended with it, the newest first

    @property
    def precision_name(self) -> str:
        """float32 or bfloat16."""
        return _name(self.precision)

    def autocast(self) -> torch.autocast:
        """Context in which matrix products run in the run's precision."""
        device = pick_device().type
        return torch.autocast(device, dtype=self.precision, enabled=self.precision != torch.float32)

    def seconds(self) -> float:
        """Since it was opened."""
        return time.perf_counter() - self.started

    def shown(self, what: str) -> Callable[[Iterable[int], int], Iterable[int]]:
        """A progress that is seen under this name, and looks for signals; all processes must ask."""

        def wrap(items: Iterable[int], total: int) -> Iterator[int]:
            for item in self.log.progress(what)(items, total):
                self.signals.agree()
                yield item

        return wrap

    def account(self, audit: Audit) -> None:
        """What the run reads and where it runs, for people and on disk."""
        self.out.write_json("audit.json", audit.as_dict())
        self.out.write_json("environment.json", environment(self.command))
        for line in audit.lines():
            self.log.say(line)

    def part(self, config: Config, compare: bool = True) -> Session:
        """The session of a run that is part of this one, in a directory of its own; to be closed before this one.
        compare: see RunDirectory."""
        closing = ExitStack()
        try:
            return _session(config, self.command, self.objective, self.world, self.signals, closing, compare)
        except BaseException:
            closing.close()
            raise

    def close(self) -> None:
        """End all that was begun in it; also after an error, and again."""
        self.closing.close()


def open_session(config: Config, command: str, objective: Objective) -> Session:
    """The session of a run, which holds its directory. Raises ValueError for what the user can cure."""
    closing = ExitStack()
    try:
        if config.launch.threads is not None:
            torch.set_num_threads(config.launch.threads)
        if not torch.cuda.is_available():  # DeepSpeed, which PEFT imports, warns of what everyone here knows
            os.environ.setdefault("DS_ACCELERATOR", "cpu")
        closing.callback(leave)
        world = join(config.engine.timeout_s)
        signals = closing.enter_context(Signals(world))
        return _session(config, command, objective, world, signals, closing)
    except BaseException:
        closing.close()
        raise


def _session(
    config: Config,
    command: str,
    objective: Objective,
    world: World,
    signals: Signals,
    closing: ExitStack,
    compare: bool = True,
) -> Session:
    out = RunDirectory(config, world, compare)
    closing.callback(out.close)
    log = Log(out.path, config.log, {"recipe": config.choices.get("recipe")}, mute=not world.lead)
    closing.callback(log.close)
    started = time.perf_counter()
    source = build.pretrained(config)
    tokenizer = source.tokenizer()
    if asks_for_date(tokenizer):  # a run that is resumed after midnight goes on with the rows of before
        day = world.share(out.resolved().get("date", time.strftime("%Y-%m-%d")))
        out.resolve(date=day)
        fix_date(tokenizer, day)
    precision, why = _precision(config, out)
    config = _with_text(config, out, tokenizer)
    return Session(
        config, command, objective, world, out, log, signals, source, tokenizer, precision, why, started, closing
    )


def _with_text(config: Config, out: RunDirectory, tokenizer: Tokenizer) -> Config:
    """The settings with data.text as it is in this run, whatever tokenizer or words a later start has."""
    text = config.data.text
    if text == "auto":
        text = out.resolved().get("text") or ("chat" if tokenizer.chat_template else "plain")
    out.resolve(text=text)
    tree = config.tree.copy()
    tree.data.text = text
    return replace(config, data=replace(config.data, text=text), tree=tree)


def start(config: Config, command: str, objective: Objective, work: Callable[[Session], int]) -> int:
    """Run or resume; returns the exit code. Raises ValueError for what the user can cure."""
    session = open_session(config, command, objective)
    say = session.log.say
    try:
        for line in config.remarks:
            say(line)
        return work(session)
    except Stopped as stop:
        say(f"{stop}; everything is saved, the same command goes on (exit code {stop.code})")
        return stop.code
    except (SelfCheckError, checkpoint.WriteFailed, EngineFailed) as error:
        say(f"stopped: {error}")
        return 1
    except NonFinite as error:
        session.out.write_json("nonfinite.json", {"error": str(error)})
        say(f"stopped: {error}; the last checkpoint is intact (see docs/troubleshooting.md)")
        return 1
    finally:
        session.close()


def _precision(config: Config, out: RunDirectory) -> tuple[torch.dtype, str]:
    """The run's precision, and why. What auto found at the first start holds for the whole run: a second measurement
    may come out otherwise."""
    wanted = config.trainer.precision
    found = out.resolved().get("precision", wanted) if wanted == "auto" else wanted
    precision, why = out.world.share(pick_precision(found, pick_device()))
    out.resolve(precision=_name(precision))
    return precision, why


def _name(precision: torch.dtype) -> str:
    return str(precision).removeprefix("torch.")
