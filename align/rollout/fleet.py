"""Which vLLM servers are there, and which weights they hold.

Weights travel as files in a directory that the servers see under the same name. Each set of weights has a version of
its own, and an answer counts only if its server held ours before and after it.
"""

from __future__ import annotations

import contextlib
import shutil
import time
import uuid
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from threading import Lock
from typing import Any

import torch

from align.models.policy import Policy, is_peft
from align.rollout.base import EngineFailed, Host
from align.rollout.http import Calls, RequestFailed, Server
from align.rollout.transfer import lora_rank, write_adapter, write_model
from align.rollout.version import TESTED

_START = "python -m align.rollout.serve --model DIRECTORY --port"
_PREFIX = "align-"  # of the names of adapters on a server
_INCOMPLETE = "-incomplete"  # end of the version of weights that are being exchanged


class WeightFiles:
    """Files of the weights that servers are to hold, by versions: of the whole or, with LoRA, of base and adapter."""

    def __init__(self, policy: Policy, parent: Path, dtype: torch.dtype):
        self.run = uuid.uuid4().hex[:12]  # versions of another run of the trainer are not ours
        self.directory = parent.resolve() / f"weights-{self.run}"
        self.dtype = dtype
        self.lora = is_peft(policy.model)
        self.base = ""  # version of the weights, without LoRA
        self.adapter = ""  # version of the adapter
        self.rank = lora_rank(policy)
        self._written = 0

    @property
    def versions(self) -> tuple[str, str]:
        """What a server holds that has them."""
        return self.base, self.adapter

    @property
    def adapter_name(self) -> str:
        """The adapter's name on a server: of its own, as a name that is used again may mean either."""
        return f"{_PREFIX}{self.adapter}"

    @property
    def incomplete(self) -> str:
        """The version of a server while it is given new ones."""
        return f"{self.run}{_INCOMPLETE}"

    def write(self, policy: Policy) -> None:
        """Files of the weights under a new version; with LoRA those of the adapter, and of the rest once."""
        version = f"{self.run}-{self._written}"
        self._written += 1
        if not self.lora or not self.base:
            write_model(policy, self.directory / f"model-{version}", self.dtype)
            self.base = version
        if self.lora:
            write_adapter(policy, self.directory / f"adapter-{version}")
            self.adapter = version

    def model_files(self) -> list[Path]:
        """Of the whole weights."""
        return sorted((self.directory / f"model-{self.base}").glob("*.safetensors"))

    def adapter_directory(self) -> Path:
        """Of the adapter."""
        return self.directory / f"adapter-{self.adapter}"

    def drop_old(self) -> None:
        """Remove the files of other versions."""
        keep = {f"model-{self.base}", f"adapter-{self.adapter}"}
        for path in self.directory.glob("*-*"):
            if path.name not in keep:
                shutil.rmtree(path, ignore_errors=True)

    def close(self) -> None:
        """Remove all of them."""
        shutil.rmtree(self.directory, ignore_errors=True)


class Fleet:
    """The servers of a policy. counts: servers "lost", and "resynced", those that were given the weights once more.

    vocab_size: of the policy, without the tokenizer's tokens beyond it.
    """

    def __init__(
        self,
        host: Host,
        servers: Sequence[Server],
        calls: Calls,
        weights: WeightFiles,
        *,
        vocab_size: int,
        start_seconds: float,
        allow_untested_version: bool,
    ):
        self.host = host
        self.servers = servers
        self.calls = calls
        self.weights = weights
        self.vocab_size = vocab_size
        self.start_seconds = start_seconds
        self.allow_untested_version = allow_untested_version
        self.counts: dict[str, int] = {"lost": 0, "resynced": 0}
        self._lock = Lock()

    def greet_all(self) -> None:
        """Wait until every server is there and is one that can be used. Raises ValueError if not."""
        deadline = time.monotonic() + self.start_seconds
        while True:
            results = self.calls.each([(server, partial(self._greet, server)) for server in self.servers])
            failures = [result for result in results if isinstance(result, RequestFailed)]
            if not failures:
                return
            if not all(failure.refused for failure in failures) or time.monotonic() >= deadline:
                raise ValueError(_cure(failures[0], self.start_seconds))
            self.calls.pause()

    def _greet(self, server: Server) -> None:
        """Learn what a server is. Raises ValueError for one that is not fit for the policy."""
        ask = partial(self.calls.ask, server, key="connect_seconds")
        try:
            version = str(ask("/version")["version"])
            cards = ask("/v1/models")["data"]
            card = next(card for card in cards if not card.get("parent"))
            server.model, server.max_model_len = str(card["id"]), int(card["max_model_len"])
        except RequestFailed as failure:
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
        except RequestFailed as failure:
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

    def _check_vocabulary(self, server: Server) -> None:
        """Raises ValueError unless the server's last token is the policy's: it takes that one, and not the next."""
        size = max(self.vocab_size, len(self.host.tokenizer))
        for token, known in ((size - 1, True), (size, False)):
            body = {"model": server.model, "prompt": [token], "max_tokens": 1, "temperature": 0.0}
            try:
                self.calls.ask(server, "/v1/completions", body, "request_seconds")
                taken = True
            except RequestFailed as failure:
                if failure.status != 400:
                    raise
                taken = False
            if taken != known:
                raise ValueError(
                    f"{server.url} serves {server.model}, a model of another vocabulary: it "
                    f"{'takes' if taken else 'refuses'} token {token}, and the policy's tokens are 0 to {size - 1}; "
                    "serve the model of model.path"
                )

    def _version(self, server: Server) -> tuple[str, str]:
        """Versions of the weights and of the adapter that a server holds. Raises Failed."""
        ask = partial(self.calls.ask, server, key="connect_seconds")
        try:
            base = str(ask("/weight_info")["weight_version"])
            if not self.weights.lora:
                return base, ""
            ours = self.weights.adapter_name in [card["id"] for card in ask("/v1/models")["data"]]
        except (KeyError, TypeError) as error:
            raise RequestFailed(server, "/weight_info", f"no version ({type(error).__name__}: {error})", 200) from error
        return base, self.weights.adapter if ours else ""

    def reachable(self, server: Server) -> bool:
        """Whether a server tells what it holds."""
        try:
            self._version(server)
        except RequestFailed:
            return False
        return True

    def with_our_weights(self, servers: Sequence[Server]) -> list[Server]:
        """Those that hold what they are to hold; one that does not answer is lost, which is told."""
        versions = self.calls.each([(server, partial(self._version, server)) for server in servers])
        self._heard(servers, versions)
        return [s for s, version in zip(servers, versions, strict=True) if version == self.weights.versions]

    def ready(self) -> list[Server]:
        """Servers that hold the weights of the last sync, after those that do not were given them.

        When none is there, waits for one to come back. Raises EngineFailed.
        """
        deadline = time.monotonic() + self.start_seconds
        while True:
            current = self.with_our_weights(self.servers)
            stale = [server for server in self.servers if not server.lost and server not in current]
            if stale:
                self.host.say(f"{', '.join(s.url for s in stale)}: other weights than ours, started again? Giving them")
                self.counts["resynced"] += len(stale)
                current += self.give(stale, "the weights again", needed=not current)
            if current:
                return [server for server in self.servers if server in current]
            if time.monotonic() >= deadline:
                raise EngineFailed(
                    f"no vLLM server is left of {', '.join(s.url for s in self.servers)} "
                    f"(rollout.start_seconds={self.start_seconds:g}); start one with: {_START} {self.servers[0].port}"
                )
            self.calls.pause()

    def _heard(self, servers: Sequence[Server], results: Sequence[object]) -> None:
        """What servers answered says which of them are lost."""
        for server, result in zip(servers, results, strict=True):
            if isinstance(result, RequestFailed):
                self.lose(server, result)
            else:
                server.lost = False
        self.calls.tell()

    def lose(self, server: Server, failure: RequestFailed) -> None:
        """It is not asked again before it has answered; told once."""
        with self._lock:
            if server.lost:
                return
            server.lost = True
            self.counts["lost"] += 1
            self.calls.news.append(f"vLLM server lost: {failure}")

    def give(self, servers: Sequence[Server], what: str, needed: bool = True) -> list[Server]:
        """Give servers the weights that were written last; returns those that have them now.

        Raises EngineFailed if `needed` and none has.
        """
        results = self.calls.each([(server, partial(self._update, server)) for server in servers])
        failures = [result for result in results if isinstance(result, RequestFailed)]
        given = [
            server for server, result in zip(servers, results, strict=True) if not isinstance(result, RequestFailed)
        ]
        self._heard(servers, results)
        if needed and not given:
            raise EngineFailed(
                f"no vLLM server took {what}: {failures[0]} (each must see {self.weights.directory} under this name; "
                "rollout.directory sets another)"
            )
        self.weights.drop_old()
        return given

    def _update(self, server: Server) -> None:
        """Bring a server to our versions. From the first change on until all is well it has no version of ours."""
        ask = partial(self.calls.ask, server, key="sync_seconds")
        held = str(ask("/weight_info")["weight_version"])
        if not held.startswith(self.weights.run):  # it may have been started again with other options
            self._greet(server)
        ask("/pause?mode=wait", {})
        if held != self.weights.base:
            ask("/update_weight_version", {"new_version": self.weights.incomplete})
            self._begin(ask)
            for file in self.weights.model_files():
                ask("/update_weights", {"update_info": {"path": str(file)}})
            ask("/finish_weight_update", {"weight_version": self.weights.base})
        if self.weights.lora:
            self._adapt(server, ask)
        # vLLM keeps prefixes computed with the old weights unless it is told
        if not ask("/reset_prefix_cache", {})["success"]:
            ask("/update_weight_version", {"new_version": self.weights.incomplete})
            raise RequestFailed(
                server, "/reset_prefix_cache", "requests are still running; is another trainer using it?", 200
            )
        ask("/resume", {})
        reported = self._version(server)
        if reported != self.weights.versions:
            raise RequestFailed(
                server, "/weight_info", f"it holds {reported} after it was given {self.weights.versions}", 200
            )

    @staticmethod
    def _begin(ask: Callable[..., object]) -> None:
        """Begin an update; one that a killed trainer left open is given up first."""
        try:
            ask("/start_weight_update", {})
        except RequestFailed as failure:
            if failure.status is None:
                raise
            with contextlib.suppress(RequestFailed):  # vLLM gives an update up when a part of it fails
                ask("/update_weights", {"update_info": {"path": ""}})
            ask("/start_weight_update", {})

    def _adapt(self, server: Server, ask: Callable[..., Any]) -> None:
        """Load the adapter, and drop older ones."""
        name = self.weights.adapter_name
        loaded = [card["id"] for card in ask("/v1/models")["data"]]
        for old in loaded:
            if old.startswith(_PREFIX) and old != name:
                ask("/v1/unload_lora_adapter", {"lora_name": old})
        if name in loaded:
            return
        path = str(self.weights.adapter_directory())
        try:
            ask("/v1/load_lora_adapter", {"lora_name": name, "lora_path": path})
        except RequestFailed as failure:
            if failure.status != 404:
                raise
            start = f"start it with --enable-lora --max-lora-rank {self.weights.rank}"
            words = f"it takes no adapters; {start} ({failure})"
            raise RequestFailed(server, "", words, 404) from failure


def _no_vllm(server: Server) -> str:
    return f"what answers at {server.url} is no vLLM server; give another port to rollout.urls and --port"


def _cure(failure: RequestFailed, seconds: float) -> str:
    if failure.refused:
        port = str(failure).split("/")[2].rpartition(":")[2]
        return f"{failure} after rollout.start_seconds={seconds:g}: no server there; start one with: {_START} {port}"
    return f"{failure}: no usable answer; is it a vLLM server, and not another program?"
