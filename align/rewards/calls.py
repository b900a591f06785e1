"""A Python function as a reward: called in a process of its own that is killed when it hangs. Other side: worker.py."""

from __future__ import annotations

import contextlib
import json
import math
import os
import select
import signal
import struct
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from align.jsons import Fields, Json
from align.rewards.base import Conversation, Reward

# What this process can import, a reward can.
_BOOT = "import json, sys; sys.path[:] = json.loads(sys.argv.pop(1)); from align.rewards.worker import main; main()"
START_SECONDS = 120.0  # for importing the user's module and what it loads
_LARGEST = 64 << 20  # bytes of an answer; a longer one is none of ours
_TICK = 0.5  # seconds between two looks at signals

Say = Callable[[str, str], None]  # reason, message


class Lost(Exception):
    """A call got no answer: (reason, message)."""

    def __init__(self, reason: str, message: str):
        super().__init__(reason, message)
        self.reason = reason
        self.message = message


class FunctionReward(Reward):
    """A component by the dotted path of a function or class; see align.rewards.worker for how it is called.

    seconds: deadline of a call. A call that raises, hangs, ends its process or returns what is no list of the right
    length is repeated in halves, down to single completions, so that one of them does not cost the others theirs.
    Failed calls may take 2 (1 + log2 N) times a deadline and a start of the process, N the completions of a scoring:
    enough to find two that hang. What has not been tried by then has no score (reason not_tried). Raises ValueError,
    naming the setting, if the path cannot be imported or called.
    """

    def __init__(
        self,
        name: str,
        target: str,
        keys: Fields,
        *,
        seconds: float,
        check: Callable[[], None] = lambda: None,
        say: Callable[[str], None] = lambda line: None,
    ):
        self.name = name
        self.target = target
        self.keys = dict(keys)
        self.seconds = seconds
        self.check = check
        self.say = say
        self.counts: dict[str, int] = Counter()
        self._process: _Process | None = None
        self._start()

    def __call__(self, conversations: Sequence[Conversation]) -> np.ndarray:
        """See Reward."""
        scores = np.full(len(conversations), math.nan)
        lacking = {i: self._missing(c) for i, c in enumerate(conversations)}
        for name in filter(None, lacking.values()):
            self._failed("missing_column", f"the prompt's row has no column {name}")
        order = [i for i in range(len(conversations)) if lacking[i] is None]
        if not order:
            return scores
        patience = 2 * (1 + math.ceil(math.log2(len(order)))) * (self.seconds + self._start_seconds)
        parts = [order]
        while parts:
            part = parts.pop()
            if patience <= 0:
                self._failed("not_tried", "failed calls had taken all the time there is for them", len(part))
                continue
            patience -= self._part(part, conversations, scores, parts)
        return scores

    @property
    def in_process(self) -> bool:
        """Whether the target says that it is to be built in the trainer's process, not here."""
        return self.style == "in_process"

    def close(self) -> None:
        """End the process."""
        if self._process is not None:
            self._process.close()
            self._process = None

    def _part(
        self, part: list[int], conversations: Sequence[Conversation], scores: np.ndarray, parts: list[list[int]]
    ) -> float:
        """Score some; what is to be tried again goes onto `parts`, in order. Returns the seconds of a failed call."""
        done = 0
        start = time.monotonic()
        try:
            process = self._running()
            answers = process.ask([conversations[i] for i in part], self.seconds, self.check)
            for answer in answers:
                if isinstance(answer, float):
                    scores[part[done]] = answer
                else:
                    self._failed(*answer)
                done += 1
                start = time.monotonic()
            return 0.0
        except Lost as lost:
            if lost.reason in ("timeout", "died"):
                self.close()
            rest = part[done:]
            if lost.reason == "not_started":
                self._failed(lost.reason, lost.message, sum(map(len, (rest, *parts))))
                parts.clear()
            elif self.style == "each":  # the one that did not answer; those behind it were not called yet
                self._failed(lost.reason, lost.message)
                if rest[1:]:
                    parts.append(rest[1:])
            elif len(rest) == 1:
                self._failed(lost.reason, lost.message)
            else:
                self._failed("repeated", f"a call for {len(rest)} at once, {lost.reason}: {lost.message}")
                middle = len(rest) // 2
                parts += [rest[middle:], rest[:middle]]
            return time.monotonic() - start
        except BaseException:  # check raised: the process is in the middle of a call
            self.close()
            raise

    def _missing(self, conversation: Conversation) -> str | None:
        return next((name for name in self.required if name not in conversation.fields), None)

    def _failed(self, reason: str, message: str, count: int = 1) -> None:
        if reason not in self.counts:
            said = "was repeated in halves" if reason == "repeated" else "left a completion without a score"
            self.say(f"reward.{self.name} {said} ({reason}: {message}); said once, then counted")
        self.counts[reason] = self.counts.get(reason, 0) + count

    def _start(self) -> None:
        key = f"reward.{self.name}._target_={self.target}"
        start = time.monotonic()
        process = _Process()
        try:
            hello = process.begin(self.target, self.keys, self.check)
        except Lost as lost:
            process.close()
            raise ValueError(f"{key}: {lost.message} while it was imported") from None
        except TypeError as error:
            process.close()
            raise ValueError(f"{key}: its keys must be plain values ({error})") from None
        except BaseException:
            process.close()
            raise
        if "refused" in hello:
            process.close()
            raise ValueError(f"{key}: {hello['refused']}")
        self._process = process
        self._start_seconds = time.monotonic() - start
        self.style: str = hello["style"]
        self.required: list[str] = hello["required"]

    def _running(self) -> _Process:
        if self._process is not None and self._process.ended():
            self.close()
        if self._process is None:
            try:
                self._start()
            except ValueError as error:
                raise Lost("not_started", str(error)) from None
        assert self._process is not None
        return self._process


class _Process:
    """The worker's process and the two pipes to it."""

    def __init__(self) -> None:
        requests, self._requests = os.pipe()
        self._answers, answers = os.pipe()
        try:
            self._process = subprocess.Popen(
                [
                    sys.executable,
                    "-P",
                    "-c",
                    _BOOT,
                    json.dumps(sys.path),
                    str(requests),
                    str(answers),
                    str(os.getpid()),
                ],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                pass_fds=(requests, answers),
                start_new_session=True,
            )
        finally:
            os.close(requests)
            os.close(answers)
        os.set_blocking(self._requests, False)
        self._open = True
        self._busy = True  # until an answer is complete
        self._buffer = bytearray()

    def ended(self) -> bool:
        """Whether the process is gone: then nobody holds the other end of its answers."""
        ready = select.poll()
        ready.register(self._answers, 0)
        return bool(ready.poll(0))

    def begin(self, target: str, keys: Fields, check: Callable[[], None]) -> Json:
        """Have it import the function; its answer. Raises Lost."""
        self._send({"target": target, "keys": dict(keys)})
        hello = self._receive(START_SECONDS, check)
        self._busy = False
        return hello

    def ask(self, conversations: Sequence[Conversation], seconds: float, check: Callable[[], None]) -> Any:
        """Answers in order: a score or (reason, message) each. Raises Lost where one did not come."""
        self._send({"conversations": [_plain(c) for c in conversations]})
        self._receive(START_SECONDS, check)
        got = 0
        while got < len(conversations):
            said = self._receive(seconds, check)
            if "failed" in said:
                self._busy = False
                raise Lost(*said["failed"])
            for value in said.get("values", [said.get("value")]):
                got += 1
                self._busy = got < len(conversations)
                yield value if isinstance(value, float) else (str(value[0]), str(value[1]))

    def close(self) -> None:
        """The end of its requests; if it does not end by itself at once it is killed, with what it started."""
        if self._open:
            self._open = False
            os.close(self._requests)
            if not self._busy:
                ready = select.poll()
                ready.register(self._answers, 0)
                ready.poll(1000 * _TICK)
            self._kill()
            os.close(self._answers)

    def _kill(self) -> None:
        if self._process.returncode is None:
            # The group that it leads. Not collected yet, so that the number still belongs to it and to no other.
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()

    def _send(self, message: object) -> None:
        body = json.dumps(message, default=_value).encode()
        self._outgoing = memoryview(struct.pack("!I", len(body)) + body)
        self._busy = True

    def _receive(self, seconds: float, check: Callable[[], None]) -> Json:
        """The next message, while what is to be sent is sent. Raises Lost."""
        deadline = time.monotonic() + seconds
        while (message := self._message()) is None:
            left = deadline - time.monotonic()
            if left <= 0:
                raise Lost("timeout", f"no answer within {seconds:g} s")
            check()
            ready = select.poll()
            ready.register(self._answers, select.POLLIN)
            if self._outgoing:
                ready.register(self._requests, select.POLLOUT)
            for file, _ in ready.poll(1000 * min(left, _TICK)):
                if file == self._requests:
                    try:
                        self._outgoing = self._outgoing[os.write(file, self._outgoing[:65536]) :]
                    except BlockingIOError:
                        continue
                    except BrokenPipeError:
                        self._outgoing = memoryview(b"")  # what it said before its end is still to be read
                else:
                    part = os.read(file, 1 << 16)
                    if not part:
                        raise Lost("died", self._end())
                    self._buffer += part
        return message

    def _message(self) -> Json | None:
        if len(self._buffer) < 4:
            return None
        size = struct.unpack("!I", self._buffer[:4])[0]
        if size > _LARGEST:
            raise Lost("died", "its process wrote into the pipe of the answers")
        if len(self._buffer) < 4 + size:
            return None
        body = bytes(self._buffer[4 : 4 + size])
        del self._buffer[: 4 + size]
        try:
            message = json.loads(body)
        except ValueError:
            message = None
        if not isinstance(message, dict):
            raise Lost("died", "its process wrote into the pipe of the answers")
        return message

    def _end(self) -> str:
        """How the process ended, in words."""
        self._kill()
        code = self._process.returncode
        return (
            f"its process ended by {signal.Signals(-code).name}" if code < 0 else f"its process ended with code {code}"
        )


def _plain(conversation: Conversation) -> Json:
    return {**vars(conversation), "fields": dict(conversation.fields)}


def _value(value: Any) -> object:
    """What JSON does not know: arrays and their numbers, mappings."""
    if hasattr(value, "tolist"):
        return value.tolist()
    if isinstance(value, Mapping):
        return dict(value)
    raise TypeError(f"{type(value).__name__} is not a plain value")
