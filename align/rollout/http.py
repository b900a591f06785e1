"""HTTP exchanges with servers, many at a time: each has a deadline, and the host can end all of them."""

from __future__ import annotations

import contextlib
import http.client
import json
import queue
import socket
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from threading import Lock
from typing import Any, TypeVar
from urllib.parse import urlsplit

from align.jsons import Json
from align.rollout.base import Host

T = TypeVar("T")

WORDS = 600  # characters of a server's own words in a message
_TICK_SECONDS = 0.25  # between two looks at the clock and at Host.check
_PLAIN = ("/v1/load_lora_adapter", "/v1/unload_lora_adapter")  # answer with a sentence


@dataclass(eq=False)
class Server:
    """What is known of a server."""

    url: str
    host: str
    port: int
    model: str = ""  # its name for the weights that it was started with
    max_model_len: int = 0
    lost: bool = False  # did not answer when last asked


class RequestFailed(Exception):
    """A request without a usable answer; status None: no whole answer came."""

    def __init__(self, server: Server, what: str, words: str, status: int | None = None, refused: bool = False):
        super().__init__(f"{server.url}{what}: {words}")
        self.status = status
        self.refused = refused  # nothing listens there


class Calls:
    """Asks servers. limits: seconds by the keys of configs/rollout/vllm_server.yaml, connect_seconds among them."""

    def __init__(self, host: Host, concurrency: int, limits: Mapping[str, float]):
        self.host = host
        self.concurrency = concurrency
        self.limits = limits
        self._calls: set[_Call] = set()
        self._lock = Lock()
        self._cut: str | None = None  # why nothing is to be asked any more
        self.news: list[str] = []  # lines of threads, for the main one to say
        self._watched = 0.0

    @property
    def ended(self) -> bool:
        """Whether what is being asked is cut."""
        return self._cut is not None

    def ask(self, server: Server, path: str, body: Json | None = None, key: str = "") -> Any:
        """The JSON that a server answers; POST with a body, else GET. Raises Failed. key: which limit of time."""
        call = _Call(server, path, body, key, self.limits[key], self.limits["connect_seconds"])
        with self._lock:
            self._calls.add(call)
            if self._cut is not None:
                call.cut(self._cut)
        try:
            return call.run()
        finally:
            with self._lock:
                self._calls.discard(call)

    def each(self, jobs: Sequence[tuple[Server, Callable[[], T]]], show: bool = False) -> list[T | RequestFailed]:
        """Results of jobs, `concurrency` of each server at a time; a job that raises Failed has that as its result.

        Whatever else is raised, by a job or by the host, ends all of them at once.
        """
        out: dict[int, T | RequestFailed] = {}
        finished: queue.SimpleQueue[tuple[int, T | BaseException]] = queue.SimpleQueue()

        def work(number: int, job: Callable[[], T]) -> None:
            try:
                finished.put((number, job()))
            except BaseException as error:  # raised again where they are waited for
                finished.put((number, error))

        steps: Iterable[int] = range(len(jobs))
        pools = {server: ThreadPoolExecutor(self.concurrency) for server, _ in jobs}
        try:
            for number, (server, job) in enumerate(jobs):
                pools[server].submit(work, number, job)
            for _ in self.host.progress(steps, len(jobs)) if show else steps:
                number, result = self._next(finished)
                if isinstance(result, BaseException) and not isinstance(result, RequestFailed):
                    raise result
                out[number] = result
        finally:
            self._end_calls()
            for pool in pools.values():
                pool.shutdown(wait=True, cancel_futures=True)
            self._cut = None
        self.tell()
        return [out[number] for number in range(len(jobs))]

    def _next(self, finished: queue.SimpleQueue[T]) -> T:
        """The next job that ends; meanwhile the host is asked whether to go on, and late calls are cut."""
        while True:
            if time.monotonic() - self._watched >= _TICK_SECONDS:
                self.host.check()
                with self._lock:
                    for call in self._calls:
                        call.cut_if_late()
                self._watched = time.monotonic()
            with contextlib.suppress(queue.Empty):
                return finished.get(timeout=_TICK_SECONDS)

    def _end_calls(self) -> None:
        """A server ends the work on a request whose connection is closed."""
        with self._lock:
            self._cut = "given up"
            for call in self._calls:
                call.cut(self._cut)

    def tell(self) -> None:
        """Say the news."""
        while self.news:
            self.host.say(self.news.pop(0))

    def pause(self) -> None:
        """Before another look at a server that is not there."""
        self.host.check()
        time.sleep(_TICK_SECONDS)


@dataclass(eq=False)
class _Call:
    """One HTTP exchange on a connection of its own, which another thread can cut."""

    server: Server
    path: str
    body: Json | None
    key: str
    seconds: float
    connect_seconds: float
    _lock: Lock = field(default_factory=Lock)
    _socket: socket.socket | None = None
    _why: str | None = None

    def __post_init__(self) -> None:
        self._deadline = time.monotonic() + self.seconds

    def run(self) -> Any:
        """What the server answers, as JSON. Raises Failed."""
        connection = http.client.HTTPConnection(self.server.host, self.server.port, timeout=self.connect_seconds)
        try:
            connection.connect()
            with self._lock:
                self._socket = connection.sock
                if self._why is not None:
                    raise OSError(self._why)
            connection.sock.settimeout(None)  # from here on the deadline counts
            data = None if self.body is None else json.dumps(self.body, separators=(",", ":")).encode()
            headers = {"Content-Type": "application/json", "Connection": "close"}
            connection.request("GET" if data is None else "POST", self.path, data, headers)
            response = connection.getresponse()
            status, text = response.status, response.read()
        except (OSError, http.client.HTTPException) as error:
            words = self._why or f"{type(error).__name__}: {error}"
            refused = isinstance(error, ConnectionRefusedError)
            raise RequestFailed(self.server, self.path, words[:WORDS], refused=refused) from error
        finally:
            with self._lock:
                self._socket = None
            connection.close()
        if self._why is not None:
            raise RequestFailed(self.server, self.path, self._why)
        if status != 200:
            raise RequestFailed(self.server, self.path, f"HTTP {status}: {_words(text)}", status)
        try:
            return json.loads(text) if self.path not in _PLAIN else None
        except ValueError as error:
            raise RequestFailed(self.server, self.path, f"no JSON: {_words(text)!r}") from error

    def cut(self, why: str) -> None:
        """End the exchange now."""
        with self._lock:
            self._why = self._why or why
            if self._socket is not None:
                with contextlib.suppress(OSError):
                    self._socket.shutdown(socket.SHUT_RDWR)

    def cut_if_late(self) -> None:
        """End the exchange if its time is over."""
        if time.monotonic() > self._deadline:
            self.cut(f"no whole answer within rollout.{self.key}={self.seconds:g}")


def servers(urls: Sequence[str]) -> list[Server]:
    """Servers by their addresses. Raises ValueError."""
    if isinstance(urls, str) or not urls:
        raise ValueError(f"rollout.urls={urls}: give a list of servers, such as ['http://127.0.0.1:8000']")
    servers = []
    for url in map(str, urls):
        parts = urlsplit(url)
        try:
            port = parts.port
        except ValueError:
            port = None
        plain = parts.path in ("", "/") and not parts.query and not parts.fragment and parts.username is None
        if parts.scheme != "http" or not parts.hostname or port is None or not plain:
            raise ValueError(f"rollout.urls: {url} is not of the form http://HOST:PORT")
        servers.append(Server(f"http://{parts.netloc}", parts.hostname, port))
    if len({server.url for server in servers}) < len(servers):
        raise ValueError(f"rollout.urls={list(urls)}: a server stands there twice")
    return servers


def _words(text: bytes) -> str:
    """What a server says of an error, in one line."""
    said: Any = text.decode(errors="replace")
    with contextlib.suppress(ValueError):
        said = json.loads(said)
        for key in ("error", "detail", "message"):
            said = said.get(key, said) if isinstance(said, dict) else said
    return " ".join(str(said).split())[:WORDS]
