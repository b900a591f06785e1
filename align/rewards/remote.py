"""A reward by HTTP: conversations posted as JSON, scores back. No proxies, no redirects."""

from __future__ import annotations

import contextlib
import http.client
import json
import math
import os
import threading
import time
from collections import Counter
from collections.abc import Sequence
from typing import Any
from urllib.parse import urlsplit

import numpy as np

from align.jsons import Json
from align.rewards.base import Conversation, RewardHost
from align.rewards.worker import number

TICK = 0.2  # seconds between two looks at signals
_BYTES_PER_SCORE = 64  # of an answer, beside a mebibyte for the rest
TRANSIENT = (408, 425, 429, 500, 502, 503, 504)  # statuses that may be another next time


class _Refused(Exception):
    """A request got no scores: (reason, message, whether to try again)."""


class RemoteReward:
    """Scores from a server, in requests of `batch_size` conversations, one after the other.

    Request: POST {"conversations": [{"prompt", "completion", "messages", "finished", "fields"}, ...]}; messages is the
    prompt as a chat or null, fields are the other columns of the prompt's row. Answer: 200 {"scores": [...]}, one
    number or null each, in order. seconds: deadline of a request, all of its answer included. A request that finds
    nobody, is too late, breaks off or gets one of 408, 425, 429, 500, 502, 503, 504 is repeated `retries` times, after
    backoff_s, 2 backoff_s, 4 backoff_s, ... seconds. token_variable: environment variable with a bearer token, or None.
    """

    in_process = True

    def __init__(
        self,
        host: RewardHost,
        *,
        url: str,
        seconds: float,
        batch_size: int,
        retries: int,
        backoff_s: float,
        token_variable: str | None,
    ):
        self.check_keys(
            url=url, batch_size=batch_size, retries=retries, backoff_s=backoff_s, token_variable=token_variable
        )
        self.host = host
        self.parts = urlsplit(url)
        self.port = self.parts.port
        self.seconds = seconds
        self.batch_size = batch_size
        self.retries = retries
        self.backoff_s = backoff_s
        self.headers = {"Content-Type": "application/json", "Accept": "application/json"}
        if token_variable is not None:
            self.headers["Authorization"] = f"Bearer {os.environ[token_variable]}"
        self.counts: dict[str, int] = Counter()

    @classmethod
    def check_keys(
        cls,
        *,
        url: str,
        batch_size: int,
        retries: int,
        backoff_s: float,
        token_variable: str | None,
        **others: object,  # noqa: ARG003
    ) -> None:
        """See RewardTarget."""
        parts = urlsplit(url)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise ValueError(f"url={url}: must begin with http:// or https:// and name a host")
        if batch_size < 1 or retries < 0 or not 0 <= backoff_s < math.inf:
            raise ValueError(
                f"batch_size={batch_size}, retries={retries}, backoff_s={backoff_s}: must be at least 1, 0 and 0"
            )
        if token_variable is not None and token_variable not in os.environ:
            raise ValueError(f"token_variable={token_variable}: there is no such environment variable")
        _ = parts.port  # raises ValueError for a port that is none

    def __call__(self, conversations: Sequence[Conversation]) -> np.ndarray:
        """See Reward."""
        out = np.full(len(conversations), math.nan)
        for start in range(0, len(conversations), self.batch_size):
            part = conversations[start : start + self.batch_size]
            try:
                values = self._scores(part)
            except _Refused as error:
                reason, message, _ = error.args
                self._failed(reason, message, len(part))
                continue
            for k, value in enumerate(map(number, values)):
                if isinstance(value, tuple):
                    self._failed(*value)
                else:
                    out[start + k] = value
        return out

    def close(self) -> None:
        """Nothing is held."""

    def _scores(self, part: Sequence[Conversation]) -> list[Any]:
        body = json.dumps({"conversations": [_plain(c) for c in part]}, default=_value).encode()
        for attempt in range(self.retries + 1):
            try:
                return self._once(body, len(part))
            except _Refused as error:
                if not error.args[2] or attempt == self.retries:
                    raise
                self._failed("retried", error.args[1], say=False)
            until = time.monotonic() + self.backoff_s * 2**attempt
            while (left := until - time.monotonic()) > 0:
                self.host.check()
                time.sleep(min(left, TICK))
        raise AssertionError("the last attempt returns or raises")

    def _once(self, body: bytes, size: int) -> list[Any]:
        """One request, in a thread of its own: a socket's own time limit starts anew at each byte that drips in."""
        call = Call(self, body, (1 << 20) + size * _BYTES_PER_SCORE)
        call.start()
        deadline = time.monotonic() + self.seconds
        try:
            while call.is_alive() and (left := deadline - time.monotonic()) > 0:
                self.host.check()
                call.join(min(left, TICK))
            if call.is_alive():
                raise _Refused("timeout", f"no answer within {self.seconds:g} s", True)
        finally:
            call.hang_up()
        if call.error is not None:
            raise _Refused("unreachable", f"{type(call.error).__name__}: {call.error}"[:300], True)
        if call.status != 200:
            said = " ".join(call.body[:300].decode(errors="replace").split())
            raise _Refused(f"http_{call.status}", f"status {call.status} {said}".strip(), call.status in TRANSIENT)
        try:
            values = json.loads(call.body)["scores"]
        except (ValueError, TypeError, KeyError, RecursionError):
            raise _Refused("bad_answer", 'the answer is not JSON {"scores": [...]}', False) from None
        if not isinstance(values, list) or len(values) != size:
            given = len(values) if isinstance(values, list) else type(values).__name__
            raise _Refused("wrong_shape", f"{given} scores for {size} conversations", False)
        return values

    def _failed(self, reason: str, message: str, count: int = 1, say: bool = True) -> None:
        if say and reason not in self.counts:
            self.host.say(f"reward at {self.parts.netloc}: no score ({reason}: {message}); said once, then counted")
        self.counts[reason] = self.counts.get(reason, 0) + count


class Call(threading.Thread):
    """One request and what came of it."""

    def __init__(self, reward: RemoteReward, body: bytes, largest: int):
        super().__init__(daemon=True)
        parts = reward.parts
        kind = http.client.HTTPSConnection if parts.scheme == "https" else http.client.HTTPConnection
        self.connection = kind(str(parts.hostname), reward.port, timeout=reward.seconds + 1)
        self.path = (parts.path or "/") + (f"?{parts.query}" if parts.query else "")
        self.sent = body
        self.headers = reward.headers
        self.largest = largest
        self.error: Exception | None = None
        self.status = 0
        self.body = b""

    def run(self) -> None:
        """Send, and read no more than an answer can be."""
        try:
            self.connection.request("POST", self.path, self.sent, self.headers)
            response = self.connection.getresponse()
            self.body = response.read(self.largest)
            self.status = response.status
        except (OSError, http.client.HTTPException, ValueError, AttributeError) as error:  # hung up, it may be
            self.error = error

    def hang_up(self) -> None:
        """Close the connection; whoever reads from it is woken."""
        sock = self.connection.sock
        if sock is not None:
            with contextlib.suppress(OSError):
                sock.shutdown(2)
        self.connection.close()


def _plain(conversation: Conversation) -> Json:
    return {
        "prompt": conversation.prompt,
        "completion": conversation.completion,
        "messages": conversation.messages,
        "finished": conversation.finished,
        "fields": dict(conversation.fields),
    }


def _value(value: Any) -> object:
    if hasattr(value, "tolist"):
        return value.tolist()
    raise TypeError(f"{type(value).__name__} is not a plain value")
