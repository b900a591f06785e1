"""The process of a vLLM engine beside the trainer, and what is said over the socket between the two.

Messages are JSON behind their length in 8 bytes. To the engine: {"do": "start" | "generate" | "logps" | "update" |
"adapt" | "sleep" | "wake", ...}; from it: {"beat": steps} while it works, then {"done": result} or {"error": text}.
"""

from __future__ import annotations

import json
import os
import select
import socket
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

import torch

from align.jsons import Json
from align.rollout.base import EngineFailed

_TAIL_LINES = 15
_TICK_SECONDS = 0.5  # between two calls of Host.check while waiting
# A launcher's words to the trainer's processes; an engine that read them would wait for others to join it.
_LAUNCHER = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "GROUP_RANK", "MASTER_ADDR", "MASTER_PORT")


class EngineProcess:
    """An engine from its start to its end. program: is given a file descriptor of the socket as its last argument.

    log: what the process writes is added to it. check: Host.check, called while an answer is waited for.
    """

    def __init__(self, program: Sequence[str], environment: Mapping[str, str], log: Path, check: Callable[[], None]):
        self._log = log
        self._check = check
        log.parent.mkdir(parents=True, exist_ok=True)
        self.socket, theirs = socket.socketpair()
        with log.open("ab") as out:
            self._log_start = out.tell()
            self.process = subprocess.Popen(
                [*program, str(theirs.fileno())],
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=out,
                env=environment,
                pass_fds=[theirs.fileno()],
                start_new_session=True,  # a Ctrl-C at the terminal is for the trainer, which decides
            )
        theirs.close()
        self.socket.setblocking(False)
        self._messages = Messages()

    def exchange(self, message: Json, seconds: float, key: str) -> Any:
        """Send a message and wait for its answer, at most `seconds` from one sign of life to the next. key: of
        rollout, which sets them.

        An answer that is not waited for to the end would be taken for the next one: end the process then. Raises
        EngineFailed.
        """
        return self._wait(encode(message), seconds, f"{message['do']} (rollout.{key}={seconds:g})")

    def end(self) -> None:
        """Kill it."""
        self.process.kill()
        self.process.wait()
        self.socket.close()

    def _wait(self, data: bytes, seconds: float, what: str) -> Any:
        left = memoryview(data)
        deadline = time.monotonic() + seconds
        while True:
            self._check()
            now = time.monotonic()
            if now > deadline:
                self._fail(f"no sign of life for {seconds:g} s during {what}")
            tick = min(_TICK_SECONDS, deadline - now)
            readable, writable, _ = select.select([self.socket], [self.socket] if left else [], [], tick)
            try:
                if writable:
                    left = left[self.socket.send(left) :]
                    deadline = time.monotonic() + seconds
                received = self.socket.recv(1 << 20) if readable else None
            except OSError:
                received = b""
            if received == b"":
                self._fail(f"it {self._how_it_ended()} during {what}")
            for answer in self._messages.feed(received or b""):
                deadline = time.monotonic() + seconds
                if "done" in answer:
                    return answer["done"]
                if "error" in answer:
                    self._fail(f"{answer['error']} during {what}")

    def _how_it_ended(self) -> str:
        """Asked when the engine's end of the socket is closed."""
        try:
            return f"ended with exit code {self.process.wait(_TICK_SECONDS)}"
        except subprocess.TimeoutExpired:
            return "closed its socket"

    def _fail(self, text: str) -> NoReturn:
        raise EngineFailed(f"{text}; the last lines of {self._log}:\n{self._log_tail()}")

    def _log_tail(self) -> str:
        with self._log.open("rb") as log:
            end = log.seek(0, os.SEEK_END)
            log.seek(max(self._log_start, end - (1 << 16)))
            lines = log.read().decode(errors="replace").splitlines()
        return "\n".join(lines[-_TAIL_LINES:])


def environment(device: torch.device, ipc: bool, threads: int | None) -> dict[str, str]:
    """Variables of an engine beside a policy on this device. ipc: weights travel as handles of GPU memory."""
    env = {k: v for k, v in os.environ.items() if k not in _LAUNCHER and not k.startswith("TORCHELASTIC_")}
    # the engine's steps are taken in the process itself, so that a step that hangs is seen and ends with it
    env |= {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_NO_USAGE_STATS": "1", "TOKENIZERS_PARALLELISM": "false"}
    if device.type == "cuda":
        # the engine sees the trainer's own GPU only
        visible = env.get("CUDA_VISIBLE_DEVICES")
        names = visible.split(",") if visible else [str(k) for k in range(torch.cuda.device_count())]
        env["CUDA_VISIBLE_DEVICES"] = names[device.index or 0]
    else:
        # torch.compile would build a few of vLLM's helpers with g++ at the first request
        env |= {"TORCHDYNAMO_DISABLE": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind"}
    if ipc:
        env["VLLM_ALLOW_INSECURE_SERIALIZATION"] = "1"  # handles of GPU memory travel pickled, from us to our child
    if threads is not None:
        env["OMP_NUM_THREADS"] = str(threads)
    return env


class Messages:
    """Messages out of a stream of bytes."""

    def __init__(self) -> None:
        self._data = bytearray()

    def feed(self, data: bytes) -> Iterator[Json]:
        """Those that these bytes complete. Raises EngineFailed for bytes that are no message."""
        self._data += data
        while len(self._data) >= 8:
            end = 8 + int.from_bytes(self._data[:8], "big")
            if end > 1 << 40:
                raise EngineFailed("what came over the engine's socket is no message")
            if len(self._data) < end:
                return
            try:
                message = json.loads(self._data[8:end])
            except ValueError as error:
                raise EngineFailed("what came over the engine's socket is no message") from error
            del self._data[:end]
            yield message


def encode(message: Json) -> bytes:
    """A message as it travels."""
    body = json.dumps(message, separators=(",", ":")).encode()
    return len(body).to_bytes(8, "big") + body
