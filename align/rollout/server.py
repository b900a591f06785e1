"""Completions by vLLM servers in other processes or on other nodes: the client, by HTTP, token ids in and out.

Weights travel as files in a directory that the servers see under the same name. Each set of weights has a version of
its own, and an answer counts only if its server held ours before and after it. align.rollout.serve starts a server.
"""

from __future__ import annotations

import contextlib
import http.client
import json
import math
import queue
import shutil
import socket
import time
import uuid
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from threading import Lock
from typing import Any, TypeVar
from urllib.parse import urlsplit

import torch

from align.data import chat
from align.jsons import Json
from align.models.policy import Policy, is_peft
from align.rollout.base import GREEDY, Completion, EngineFailed, Host, Rollout, Sampling, Stop
from align.rollout.transfer import write_adapter, write_model
from align.rollout.vllm import TESTED, check_draws

_START = "python -m align.rollout.serve --model DIRECTORY --port"
_PREFIX = "align-"  # of the names of adapters on a server
_INCOMPLETE = "-incomplete"  # end of the version of weights that are being exchanged
_TICK_SECONDS = 0.25  # between two looks at the clock and at Host.check
_WORDS = 600  # characters of a server's own words in a message

T = TypeVar("T")
Request = tuple[int, Json]  # number that chooses the server, body


@dataclass(eq=False)
class _Server:
    """What is known of a server."""

    url: str
    host: str
    port: int
    model: str = ""  # its name for the weights that it was started with
    max_model_len: int = 0
    lost: bool = False  # did not answer when last asked


class _Failed(Exception):
    """A request without a usable answer; status None: no whole answer came."""

    def __init__(self, server: _Server, what: str, words: str, status: int | None = None, refused: bool = False):
        super().__init__(f"{server.url}{what}: {words}")
        self.status = status
        self.refused = refused  # nothing listens there


class VLLMServerRollout(Rollout):
    """One or more vLLM servers that get the policy's weights at each sync; see configs/rollout/vllm_server.yaml.

    Prompt i goes to server i modulo their number with all its samples. Servers that die or restart are left out or
    given the weights again. counts: requests sent again ("resent"), servers "lost", servers that had to be given the
    weights once more ("resynced"), "syncs".
    """

    serves_all = True  # one client for all processes of a run: servers take weights from one, and divide prompts

    def __init__(
        self,
        host: Host,
        *,
        urls: Sequence[str],
        directory: str | None,
        concurrency: int,
        start_seconds: float,
        connect_seconds: float,
        request_seconds: float,
        sync_seconds: float,
        retries: int,
        allow_untested_version: bool,
    ):
        self.servers = _servers(urls)
        for name, seconds in dict(connect=connect_seconds, request=request_seconds, sync=sync_seconds).items():
            if not seconds > 0:
                raise ValueError(f"rollout.{name}_seconds={seconds}: must be greater than 0")
        if start_seconds < 0 or retries < 0 or concurrency < 1:
            raise ValueError(
                f"rollout.start_seconds={start_seconds}, rollout.retries={retries}, rollout.concurrency={concurrency}: "
                "must be at least 0, 0 and 1"
            )
        self.host = host
        self.concurrency = concurrency
        self.start_seconds = start_seconds
        self.limits = {
            "connect_seconds": connect_seconds,
            "request_seconds": request_seconds,
            "sync_seconds": sync_seconds,
        }
        self.retries = retries
        self.allow_untested_version = allow_untested_version
        self.counts: dict[str, int] = {"resent": 0, "lost": 0, "resynced": 0, "syncs": 0}
        self.policy: Policy = host.policy
        self.lora = is_peft(self.policy.model)
        self.dtype = getattr(torch, host.precision)
        self.stops = chat.stop_ids(host.tokenizer, self.policy.causal_lm.generation_config)
        if not self.stops:
            raise ValueError("neither the tokenizer nor the model names a token that ends a turn; set its eos_token")
        self.vocab_size: int = self.policy.causal_lm.get_input_embeddings().weight.shape[0]
        self._calls: set[_Call] = set()
        self._lock = Lock()
        self._cut: str | None = None  # why nothing is to be asked any more
        self._news: list[str] = []  # lines of threads, for the main one to say
        self._watched = 0.0
        self._run = uuid.uuid4().hex[:12]  # versions of another run of the trainer are not ours
        self._base = ""  # version of the weights, without LoRA
        self._adapter = ""  # version of the adapter
        parent = Path(directory) if directory is not None else host.directory
        self.directory = parent.resolve() / f"weights-{self._run}"
        self._greet_all()
        try:
            self._write(self.policy)
            self._give(self.servers, "the weights to start from")
        except BaseException:
            self.close()
            raise

    # ---- what Rollout promises ----

    def generate(
        self, prompts: Sequence[Sequence[int]], sampling: Sampling, n: int = 1, greedy: bool = False
    ) -> list[list[Completion]]:
        """See Rollout. Raises EngineFailed when requests have no answer after `retries` more attempts."""
        check_draws(prompts, sampling, n, greedy)
        rows = [[int(token) for token in prompt] for prompt in prompts]
        self._check_tokens(rows, sampling.max_new_tokens, "prompt")
        samples = [*range(n), *([GREEDY] if greedy else [])]
        requests = [(i, self._body(row, sampling, i, k)) for i, row in enumerate(rows) for k in samples]
        told = iter(self._answers(requests, self._completion))
        return [[next(told) for _ in samples] for _ in rows]

    def logps(self, sequences: Sequence[Sequence[int]], starts: Sequence[int]) -> list[list[float]]:
        """See Rollout. A sequence may have one token fewer than the servers' limit."""
        if len(sequences) != len(starts) or not all(start >= 1 for start in starts):
            raise ValueError("logps takes a start of at least 1 for each sequence")
        rows = [[int(token) for token in sequence] for sequence in sequences]
        self._check_tokens(rows, 1, "sequence")
        requests = [(i, {"prompt": row, "echo": True, "max_tokens": 0, "logprobs": 0}) for i, row in enumerate(rows)]
        told = self._answers(requests, _scores)
        return [logps[start:] for logps, start in zip(told, starts, strict=True)]

    def sync(self, policy: Policy) -> None:
        """See Rollout. Servers that cannot be had now get them when they can be. Raises EngineFailed if none can."""
        if is_peft(policy.model) != self.lora:
            raise ValueError("a policy with LoRA cannot take the place of one without, nor the other way round")
        self.policy = policy
        self.counts["syncs"] += 1
        self._write(policy)
        self._give(self.servers, "new weights")

    @property
    def max_tokens(self) -> int:
        """The smallest limit among the servers."""
        return min(server.max_model_len for server in self.servers)

    def sleep(self) -> None:
        """Servers have memory of their own."""

    def close(self) -> None:
        """Remove the files that were written for the servers; they themselves go on."""
        shutil.rmtree(self.directory, ignore_errors=True)

    # ---- requests and answers ----

    def _body(self, prompt: list[int], sampling: Sampling, i: int, k: int) -> Json:
        """The request for sample k of prompt i, with nothing left to the server's own settings."""
        how: Json = {"temperature": 0.0, "top_p": 1.0, "top_k": 0}
        if k != GREEDY and not sampling.greedy:
            how = {"temperature": sampling.temperature, "top_p": sampling.top_p, "top_k": sampling.top_k}
            how["seed"] = sampling.seed_at(i, k)
        return how | {
            "prompt": prompt,
            "max_tokens": sampling.max_new_tokens,
            "logprobs": 0,  # of the token that was drawn, no others
            "stop": list(sampling.stop),
            "stop_token_ids": self.stops,
            "ignore_eos": True,  # the stop tokens are ours, all of them
            "skip_special_tokens": False,  # stop texts are looked for in the text with them, as HFRollout does
            "spaces_between_special_tokens": False,
            "min_p": 0.0,
            "repetition_penalty": 1.0,
            "presence_penalty": 0.0,
            "frequency_penalty": 0.0,
        }

    def _answers(self, requests: Sequence[Request], read: Callable[[Json, Json], T]) -> list[T]:
        """What `read` makes of the answer to each request, in order; it raises ValueError for an impossible one."""
        out: dict[int, T] = {}
        missing = list(range(len(requests)))
        failure: _Failed | None = None
        for attempt in range(self.retries + 1):
            if not missing:
                break
            live = self._ready()
            self.counts["resent"] += len(missing) if attempt else 0
            # the next server is asked when one has failed
            places = [live[(requests[m][0] + attempt) % len(live)] for m in missing]
            jobs = [(s, partial(self._complete, s, requests[m][1], read)) for s, m in zip(places, missing, strict=True)]
            results = self._each(jobs, show=True)
            current = self._with_our_weights(list(dict.fromkeys(places)))
            for server, m, result in zip(places, missing, results, strict=True):
                if isinstance(result, _Failed):
                    failure = result
                elif server not in current:
                    failure = _Failed(server, "", "it was started again, or left, while it answered")
                else:
                    out[m] = result
            missing = [m for m in missing if m not in out]
        if missing:
            raise EngineFailed(
                f"{len(missing)} of {len(requests)} requests have no answer after rollout.retries={self.retries} more "
                f"attempts; the last failure: {failure}"
            )
        return [out[m] for m in range(len(requests))]

    def _complete(self, server: _Server, body: Json, read: Callable[[Json, Json], T]) -> T:
        """One request to one server. Raises ValueError for one that no server would take."""
        if server.lost:
            raise _Failed(server, "", "lost while others of its requests were waiting")
        model = f"{_PREFIX}{self._adapter}" if self.lora else server.model
        body = {"model": model, "n": 1, "return_token_ids": True, **body}
        try:
            answer = self._ask(server, "/v1/completions", body, "request_seconds")
        except _Failed as failure:
            if failure.status is None and self._cut is None and not self._reachable(server):
                self._lose(server, failure)
            # 404: the adapter is gone with the server that had it
            if failure.status is not None and 400 <= failure.status < 500 and failure.status not in (404, 408, 429):
                raise ValueError(f"vLLM refuses a request: {failure}") from failure
            raise
        try:
            return read(body, answer)
        except (ValueError, KeyError, TypeError, IndexError, AttributeError) as error:
            words = f"{type(error).__name__}: {error}"[:_WORDS]
            raise _Failed(server, "/v1/completions", f"an answer that cannot be ({words})", 200) from error

    def _completion(self, body: Json, answer: Json) -> Completion:
        """Raises ValueError for an answer that contradicts itself or the request."""
        choice, ids, logps = _choice(body, answer, "token_ids")
        reason, what = choice["finish_reason"], choice["stop_reason"]
        if reason not in ("stop", "length"):
            raise ValueError(f"it ended for the reason {reason!r}")
        if not 1 <= len(ids) <= body["max_tokens"] or not all(0 <= token < self.vocab_size for token in ids):
            raise ValueError(f"{len(ids)} tokens, or tokens that the model does not have")
        stop: Stop = "length" if reason == "length" else "string" if isinstance(what, str) else "end"
        if stop == "length" and len(ids) != body["max_tokens"]:
            raise ValueError(f"cut after {len(ids)} tokens, not at max_new_tokens={body['max_tokens']}")
        if stop == "end" and ids[-1] not in self.stops:
            raise ValueError(f"it ended with token {ids[-1]}, which ends no turn")
        if any(token in self.stops for token in ids[:-1]):
            raise ValueError("it goes on after the end of its turn")
        return Completion(tuple(ids), stop, tuple(_finite(logps)))

    def _check_tokens(self, rows: Sequence[list[int]], new: int, name: str) -> None:
        smallest = min(self.servers, key=lambda server: server.max_model_len)
        for i, ids in enumerate(rows):
            if len(ids) + new > smallest.max_model_len:
                raise ValueError(
                    f"{name} {i} has {len(ids)} tokens and {new} more are to be written: {smallest.url} takes "
                    f"{smallest.max_model_len} in all; start it with a larger --max-model-len or lower max_new_tokens"
                )
            if not ids or not 0 <= min(ids) <= max(ids) < self.vocab_size:
                raise ValueError(f"{name} {i}: no tokens, or others than the model's 0 to {self.vocab_size - 1}")

    # ---- servers ----

    def _greet_all(self) -> None:
        """Wait until every server is there and is one that can be used. Raises ValueError if not."""
        deadline = time.monotonic() + self.start_seconds
        while True:
            results = self._each([(server, partial(self._greet, server)) for server in self.servers])
            failures = [result for result in results if isinstance(result, _Failed)]
            if not failures:
                return
            if not all(failure.refused for failure in failures) or time.monotonic() >= deadline:
                raise ValueError(_cure(failures[0], self.start_seconds))
            self._pause()

    def _greet(self, server: _Server) -> None:
        """Learn what a server is. Raises ValueError for one that is not fit for the policy."""
        ask = partial(self._ask, server, key="connect_seconds")
        try:
            version = str(ask("/version")["version"])
            cards = ask("/v1/models")["data"]
            card = next(card for card in cards if not card.get("parent"))
            server.model, server.max_model_len = str(card["id"]), int(card["max_model_len"])
        except _Failed as failure:
            if failure.status is None or failure.status >= 500:
                raise
            raise ValueError(f"{_no_vllm(server)} ({failure})") from failure
        except (KeyError, TypeError, ValueError, AttributeError, StopIteration) as error:
            raise ValueError(f"{_no_vllm(server)} ({type(error).__name__}: {error})") from error
        if not version.startswith(f"{TESTED}.") and not self.allow_untested_version:
            raise ValueError(
                f"{server.url} is vLLM {version} and rollout=vllm_server was tested with {TESTED}.*: start it from "
                f'pip install "vllm=={TESTED}.0", or set rollout.allow_untested_version=true'
            )
        try:
            held = str(ask("/weight_info")["weight_version"])
        except _Failed as failure:
            if failure.status != 404:
                raise
            raise ValueError(
                f"{server.url} takes no weights: it runs without VLLM_SERVER_DEV_MODE=1; start it with: "
                f"{_START} {server.port}"
            ) from failure
        # A trainer that was killed may have left it waiting, with half of the weights: a request would end it. The
        # weights that it is given will show what model it is.
        if not held.endswith(_INCOMPLETE) and not ask("/is_paused")["is_paused"]:
            self._check_vocabulary(server)

    def _check_vocabulary(self, server: _Server) -> None:
        """Raises ValueError unless the server's last token is the policy's: it takes that one, and not the next."""
        size = max(self.vocab_size, len(self.host.tokenizer))
        for token, known in ((size - 1, True), (size, False)):
            body = {"model": server.model, "prompt": [token], "max_tokens": 1, "temperature": 0.0}
            try:
                self._ask(server, "/v1/completions", body, "request_seconds")
                taken = True
            except _Failed as failure:
                if failure.status != 400:
                    raise
                taken = False
            if taken != known:
                raise ValueError(
                    f"{server.url} serves {server.model}, a model of another vocabulary: it "
                    f"{'takes' if taken else 'refuses'} token {token}, and the policy's tokens are 0 to {size - 1}; "
                    "serve the model of model.path"
                )

    def _version(self, server: _Server) -> tuple[str, str]:
        """Versions of the weights and of the adapter that a server holds. Raises _Failed."""
        ask = partial(self._ask, server, key="connect_seconds")
        try:
            base = str(ask("/weight_info")["weight_version"])
            if not self.lora:
                return base, ""
            ours = f"{_PREFIX}{self._adapter}" in [card["id"] for card in ask("/v1/models")["data"]]
        except (KeyError, TypeError) as error:
            raise _Failed(server, "/weight_info", f"no version ({type(error).__name__}: {error})", 200) from error
        return base, self._adapter if ours else ""

    def _reachable(self, server: _Server) -> bool:
        """Whether a server tells what it holds."""
        try:
            self._version(server)
        except _Failed:
            return False
        return True

    def _with_our_weights(self, servers: Sequence[_Server]) -> list[_Server]:
        """Those that hold what they are to hold; one that does not answer is lost, which is told."""
        versions = self._each([(server, partial(self._version, server)) for server in servers])
        for server, version in zip(servers, versions, strict=True):
            if isinstance(version, _Failed):
                self._lose(server, version)
            else:
                server.lost = False
        self._tell()
        return [s for s, version in zip(servers, versions, strict=True) if version == (self._base, self._adapter)]

    def _ready(self) -> list[_Server]:
        """Servers that hold the weights of the last sync, after those that do not were given them.

        When none is there, waits for one to come back. Raises EngineFailed.
        """
        deadline = time.monotonic() + self.start_seconds
        while True:
            current = self._with_our_weights(self.servers)
            stale = [server for server in self.servers if not server.lost and server not in current]
            if stale:
                self.host.say(f"{', '.join(s.url for s in stale)}: other weights than ours, started again? Giving them")
                self.counts["resynced"] += len(stale)
                current += self._give(stale, "the weights again", needed=not current)
            if current:
                return [server for server in self.servers if server in current]
            if time.monotonic() >= deadline:
                raise EngineFailed(
                    f"no vLLM server is left of {', '.join(s.url for s in self.servers)} "
                    f"(rollout.start_seconds={self.start_seconds:g}); start one with: {_START} {self.servers[0].port}"
                )
            self._pause()

    def _lose(self, server: _Server, failure: _Failed) -> None:
        with self._lock:
            if server.lost:
                return
            server.lost = True
            self.counts["lost"] += 1
            self._news.append(f"vLLM server lost: {failure}")

    # ---- weights ----

    def _write(self, policy: Policy) -> None:
        """Files of the weights under a new version; with LoRA those of the adapter, and of the rest once."""
        version = f"{self._run}-{self.counts['syncs']}"
        if not self.lora or not self._base:
            write_model(policy, self.directory / f"model-{version}", self.dtype)
            self._base = version
        if self.lora:
            write_adapter(policy, self.directory / f"adapter-{version}")
            self._adapter = version

    def _give(self, servers: Sequence[_Server], what: str, needed: bool = True) -> list[_Server]:
        """Give servers the weights that were written last; returns those that have them now.

        Raises EngineFailed if `needed` and none has.
        """
        results = self._each([(server, partial(self._update, server)) for server in servers])
        failures = [result for result in results if isinstance(result, _Failed)]
        given = [server for server, result in zip(servers, results, strict=True) if not isinstance(result, _Failed)]
        for server, result in zip(servers, results, strict=True):
            if isinstance(result, _Failed):
                self._lose(server, result)
            else:
                server.lost = False
        self._tell()
        if needed and not given:
            raise EngineFailed(
                f"no vLLM server took {what}: {failures[0]} (each must see {self.directory} under this name; "
                "rollout.directory sets another)"
            )
        keep = {f"model-{self._base}", f"adapter-{self._adapter}"}
        for path in self.directory.glob("*-*"):
            if path.name not in keep:
                shutil.rmtree(path, ignore_errors=True)
        return given

    def _update(self, server: _Server) -> None:
        """Bring a server to our versions. From the first change on until all is well it has no version of ours."""
        ask = partial(self._ask, server, key="sync_seconds")
        held = str(ask("/weight_info")["weight_version"])
        if not held.startswith(self._run):  # it may have been started again with other options
            self._greet(server)
        ask("/pause?mode=wait", {})
        if held != self._base:
            ask("/update_weight_version", {"new_version": f"{self._run}{_INCOMPLETE}"})
            self._begin(ask)
            for file in sorted((self.directory / f"model-{self._base}").glob("*.safetensors")):
                ask("/update_weights", {"update_info": {"path": str(file)}})
            ask("/finish_weight_update", {"weight_version": self._base})
        if self.lora:
            self._adapt(server, ask)
        # vLLM keeps prefixes computed with the old weights unless it is told
        if not ask("/reset_prefix_cache", {})["success"]:
            ask("/update_weight_version", {"new_version": f"{self._run}{_INCOMPLETE}"})
            raise _Failed(
                server, "/reset_prefix_cache", "requests are still running; is another trainer using it?", 200
            )
        ask("/resume", {})
        told = self._version(server)
        if told != (self._base, self._adapter):
            raise _Failed(
                server, "/weight_info", f"it holds {told} after it was given {(self._base, self._adapter)}", 200
            )

    @staticmethod
    def _begin(ask: Callable[..., object]) -> None:
        """Begin an update; one that a killed trainer left open is given up first."""
        try:
            ask("/start_weight_update", {})
        except _Failed as failure:
            if failure.status is None:
                raise
            with contextlib.suppress(_Failed):  # vLLM gives an update up when a part of it fails
                ask("/update_weights", {"update_info": {"path": ""}})
            ask("/start_weight_update", {})

    def _adapt(self, server: _Server, ask: Callable[..., Any]) -> None:
        """Load the adapter under a name of its own, and drop older ones: a name that is used again may mean either."""
        name = f"{_PREFIX}{self._adapter}"
        loaded = [card["id"] for card in ask("/v1/models")["data"]]
        for old in loaded:
            if old.startswith(_PREFIX) and old != name:
                ask("/v1/unload_lora_adapter", {"lora_name": old})
        if name in loaded:
            return
        path = self.directory / f"adapter-{self._adapter}"
        try:
            ask("/v1/load_lora_adapter", {"lora_name": name, "lora_path": str(path)})
        except _Failed as failure:
            if failure.status != 404:
                raise
            rank = max(config.r for config in self.policy.model.peft_config.values())  # type: ignore[union-attr]
            words = f"it takes no adapters; start it with --enable-lora --max-lora-rank {rank} ({failure})"
            raise _Failed(server, "", words, 404) from failure

    # ---- HTTP ----

    def _ask(self, server: _Server, path: str, body: Json | None = None, key: str = "") -> Any:
        """The JSON that a server answers; POST with a body, else GET. Raises _Failed. key: which limit of time."""
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

    def _each(self, jobs: Sequence[tuple[_Server, Callable[[], Any]]], show: bool = False) -> list[Any]:
        """Results of jobs, `concurrency` of each server at a time; a job that raises _Failed has that as its result.

        Whatever else is raised, by a job or by the host, ends all of them at once.
        """
        out: list[Any] = [None] * len(jobs)
        finished: queue.SimpleQueue[tuple[int, Any]] = queue.SimpleQueue()

        def work(number: int, job: Callable[[], Any]) -> None:
            try:
                result = job()
            except BaseException as error:  # raised again where they are waited for
                result = error
            finished.put((number, result))

        steps: Iterable[int] = range(len(jobs))
        pools = {server: ThreadPoolExecutor(self.concurrency) for server, _ in jobs}
        try:
            for number, (server, job) in enumerate(jobs):
                pools[server].submit(work, number, job)
            for _ in self.host.progress(steps, len(jobs)) if show else steps:
                number, out[number] = self._next(finished)
                if isinstance(out[number], BaseException) and not isinstance(out[number], _Failed):
                    raise out[number]
        finally:
            self._end_calls()
            for pool in pools.values():
                pool.shutdown(wait=True, cancel_futures=True)
            self._cut = None
        self._tell()
        return out

    def _next(self, finished: queue.SimpleQueue[tuple[int, object]]) -> tuple[int, Any]:
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

    def _tell(self) -> None:
        while self._news:
            self.host.say(self._news.pop(0))

    def _pause(self) -> None:
        self.host.check()
        time.sleep(_TICK_SECONDS)


@dataclass(eq=False)
class _Call:
    """One HTTP exchange on a connection of its own, which another thread can cut."""

    server: _Server
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
        """What the server answers, as JSON. Raises _Failed."""
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
            raise _Failed(self.server, self.path, words[:_WORDS], refused=refused) from error
        finally:
            with self._lock:
                self._socket = None
            connection.close()
        if self._why is not None:
            raise _Failed(self.server, self.path, self._why)
        if status != 200:
            raise _Failed(self.server, self.path, f"HTTP {status}: {_words(text)}", status)
        try:
            return json.loads(text) if self.path not in _PLAIN else None
        except ValueError as error:
            raise _Failed(self.server, self.path, f"no JSON: {_words(text)!r}") from error

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


_PLAIN = ("/v1/load_lora_adapter", "/v1/unload_lora_adapter")  # answer with a sentence


def _servers(urls: Sequence[str]) -> list[_Server]:
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
        servers.append(_Server(f"http://{parts.netloc}", parts.hostname, port))
    if len({server.url for server in servers}) < len(servers):
        raise ValueError(f"rollout.urls={list(urls)}: a server stands there twice")
    return servers


def _choice(body: Json, answer: Json, key: str) -> tuple[Json, list[int], list[float]]:
    """The one choice of an answer, its tokens by `key` and their log-probs. Raises ValueError for half answers."""
    (choice,) = answer["choices"]
    if choice["prompt_token_ids"] != body["prompt"]:
        raise ValueError("the server changed the tokens of the prompt")
    ids, logps = choice[key], choice["logprobs"]["token_logprobs"]
    if not all(type(token) is int for token in ids):
        raise ValueError("tokens that are no numbers")
    if len(ids) != len(logps):
        raise ValueError(f"{len(ids)} tokens with {len(logps)} log-probs")
    return choice, ids, logps


def _scores(body: Json, answer: Json) -> list[float]:
    """Log-probs of all tokens of a prompt; nan for the first, which has none."""
    _, _, logps = _choice(body, answer, "prompt_token_ids")
    return [math.nan, *_finite(logps[1:])]


def _finite(logps: Sequence[Any]) -> list[float]:
    if not all(isinstance(value, (int, float)) and math.isfinite(value) and value < 1e-3 for value in logps):
        raise ValueError("log-probs that are none")
    return [float(value) for value in logps]


def _words(text: bytes) -> str:
    """What a server says of an error, in one line."""
    said: Any = text.decode(errors="replace")
    with contextlib.suppress(ValueError):
        said = json.loads(said)
        for key in ("error", "detail", "message"):
            said = said.get(key, said) if isinstance(said, dict) else said
    return " ".join(str(said).split())[:_WORDS]


def _no_vllm(server: _Server) -> str:
    return f"what answers at {server.url} is no vLLM server; give another port to rollout.urls and --port"


def _cure(failure: _Failed, seconds: float) -> str:
    if failure.refused:
        port = str(failure).split("/")[2].rpartition(":")[2]
        return f"{failure} after rollout.start_seconds={seconds:g}: no server there; start one with: {_START} {port}"
    return f"{failure}: no usable answer; is it a vLLM server, and not another program?"
