"""SIGTERM, SIGUSR1 and SIGINT ask the loop to save and stop; a second SIGINT stops at once."""

from __future__ import annotations

import signal
from types import FrameType

from align.engine.world import World
from align.launch.place import CODES


class Stopped(Exception):
    """Raised at a safe point after a signal; `code` is the process's exit code."""

    def __init__(self, number: int):
        super().__init__(f"{signal.Signals(number).name} received")
        self.code = CODES[signal.Signals(number)]


class Signals:
    """Remembers the first signal while inside; asks nothing of the code that runs.

    world: the processes of the run. Where they are several none may stop alone: they stop where all of them `agree`.
    """

    def __init__(self, world: World | None = None) -> None:
        self.world = world or World()
        self.received: int | None = None
        self.interrupts = 0
        self.before: dict[signal.Signals, object] = {}

    def __enter__(self) -> Signals:
        for number in CODES:
            self.before[number] = signal.signal(number, self._handle)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self.before.items():
            signal.signal(number, handler)  # type: ignore[arg-type]

    def check(self) -> None:
        """Raises Stopped if a signal has come: call where stopping loses nothing. No effect with several processes."""
        if self.received is not None and self.world.size == 1:
            raise Stopped(self.received)

    def agree(self) -> None:
        """Raises Stopped on all processes if a signal has come to one: call where all of them come by."""
        found = next((number for number in self.world.gather(self.received) if number is not None), None)
        if found is not None:
            raise Stopped(found)

    def agree_again(self) -> None:
        """As agree, where a process alone looks by itself, with check, in what follows."""
        if self.world.size > 1:
            self.agree()

    def _handle(self, number: int, _: FrameType | None) -> None:
        self.interrupts += number == signal.SIGINT
        if self.interrupts > 1:
            raise KeyboardInterrupt
        if self.received is None:
            self.received = number
