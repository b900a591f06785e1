"""Completions by vLLM servers in other processes or on other nodes: the client, by HTTP, token ids in and out.

An answer counts only if its server held our weights before and after it, see fleet; align.rollout.serve starts one.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import torch

from align.config.rollouts import ServerSettings, settings
from align.data import chat
from align.jsons import Json
from align.models.policy import Policy, is_peft
from align.rollout.base import GREEDY, Completion, EngineFailed, Host, Rollout, Sampling, Stop
from align.rollout.fleet import Fleet, WeightFiles
from align.rollout.http import WORDS, Calls, RequestFailed, Server, servers
from align.rollout.vllm import check_draws

T = TypeVar("T")
Request = tuple[int, Json]  # number that chooses the server, body


class VLLMServerRollout(Rollout):
    """One or more vLLM servers that get the policy's weights at each sync; see configs/rollout/vllm_server.yaml.

    Prompt i goes to server i modulo their number with all its samples. Servers that die or restart are left out or
    given the weights again. counts: requests sent again ("resent"), servers "lost", servers that had to be given the
    weights once more ("resynced"), "syncs".
    """

    serves_all = True  # one client for all processes of a run: servers take weights from one, and divide prompts

    def __init__(self, host: Host, **keys: Any):
        given = settings(ServerSettings, keys)
        known = servers(given.urls)
        self.retries = given.retries
        self._resent = self._syncs = 0
        policy: Policy = host.policy
        self.stops = chat.stop_ids(host.tokenizer, policy.causal_lm.generation_config)
        if not self.stops:
            raise ValueError("neither the tokenizer nor the model names a token that ends a turn; set its eos_token")
        self.vocab_size: int = policy.causal_lm.get_input_embeddings().weight.shape[0]
        limits = {
            "connect_seconds": given.connect_seconds,
            "request_seconds": given.request_seconds,
            "sync_seconds": given.sync_seconds,
        }
        self.calls = Calls(host, given.concurrency, limits)
        parent = Path(given.directory) if given.directory is not None else host.directory
        self.weights = WeightFiles(policy, parent, getattr(torch, host.precision))
        self.fleet = Fleet(
            host,
            known,
            self.calls,
            self.weights,
            vocab_size=self.vocab_size,
            start_seconds=given.start_seconds,
            allow_untested_version=given.allow_untested_version,
        )
        self.fleet.greet_all()
        try:
            self.weights.write(policy)
            self.fleet.give(known, "the weights to start from")
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
        replies = iter(self._answers(requests, self._completion))
        return [[next(replies) for _ in samples] for _ in rows]

    def logps(self, sequences: Sequence[Sequence[int]], starts: Sequence[int]) -> list[list[float]]:
        """See Rollout. A sequence may have one token fewer than the servers' limit."""
        if len(sequences) != len(starts) or not all(start >= 1 for start in starts):
            raise ValueError("logps takes a start of at least 1 for each sequence")
        rows = [[int(token) for token in sequence] for sequence in sequences]
        self._check_tokens(rows, 1, "sequence")
        requests = [(i, {"prompt": row, "echo": True, "max_tokens": 0, "logprobs": 0}) for i, row in enumerate(rows)]
        replies = self._answers(requests, _scores)
        return [logps[start:] for logps, start in zip(replies, starts, strict=True)]

    def sync(self, policy: Policy) -> None:
        """See Rollout. Servers that cannot be had now get them when they can be. Raises EngineFailed if none can."""
        if is_peft(policy.model) != self.weights.lora:
            raise ValueError("a policy with LoRA cannot take the place of one without, nor the other way round")
        self._syncs += 1
        self.weights.write(policy)
        self.fleet.give(self.fleet.servers, "new weights")

    @property
    def counts(self) -> dict[str, int]:
        """See Rollout."""
        return {"resent": self._resent, "syncs": self._syncs} | self.fleet.counts

    @property
    def max_tokens(self) -> int:
        """The smallest limit among the servers."""
        return min(server.max_model_len for server in self.fleet.servers)

    def sleep(self) -> None:
        """Servers have memory of their own."""

    def close(self) -> None:
        """Remove the files that were written for the servers; they themselves go on."""
        self.weights.close()

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
        failure: RequestFailed | None = None
        for attempt in range(self.retries + 1):
            if not missing:
                break
            live = self.fleet.ready()
            self._resent += len(missing) if attempt else 0
            # the next server is asked when one has failed
            places = [live[(requests[m][0] + attempt) % len(live)] for m in missing]
            jobs = [(s, partial(self._complete, s, requests[m][1], read)) for s, m in zip(places, missing, strict=True)]
            results = self.calls.each(jobs, show=True)
            current = self.fleet.with_our_weights(list(dict.fromkeys(places)))
            for server, m, result in zip(places, missing, results, strict=True):
                if isinstance(result, RequestFailed):
                    failure = result
                elif server not in current:
                    failure = RequestFailed(server, "", "it was started again, or left, while it answered")
                else:
                    out[m] = result
            missing = [m for m in missing if m not in out]
        if missing:
            raise EngineFailed(
                f"{len(missing)} of {len(requests)} requests have no answer after rollout.retries={self.retries} more "
                f"attempts; the last failure: {failure}"
            )
        return [out[m] for m in range(len(requests))]

    def _complete(self, server: Server, body: Json, read: Callable[[Json, Json], T]) -> T:
        """One request to one server. Raises ValueError for one that no server would take."""
        if server.lost:
            raise RequestFailed(server, "", "lost while others of its requests were waiting")
        model = self.weights.adapter_name if self.weights.lora else server.model
        body = {"model": model, "n": 1, "return_token_ids": True, **body}
        try:
            answer = self.calls.ask(server, "/v1/completions", body, "request_seconds")
        except RequestFailed as failure:
            if failure.status is None and not self.calls.ended and not self.fleet.reachable(server):
                self.fleet.lose(server, failure)
            # 404: the adapter is gone with the server that had it
            if failure.status is not None and 400 <= failure.status < 500 and failure.status not in (404, 408, 429):
                raise ValueError(f"vLLM refuses a request: {failure}") from failure
            raise
        try:
            return read(body, answer)
        except (ValueError, KeyError, TypeError, IndexError, AttributeError) as error:
            words = f"{type(error).__name__}: {error}"[:WORDS]
            raise RequestFailed(server, "/v1/completions", f"an answer that cannot be ({words})", 200) from error

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
        smallest = min(self.fleet.servers, key=lambda server: server.max_model_len)
        for i, ids in enumerate(rows):
            if len(ids) + new > smallest.max_model_len:
                raise ValueError(
                    f"{name} {i} has {len(ids)} tokens and {new} more are to be written: {smallest.url} takes "
                    f"{smallest.max_model_len} in all; start it with a larger --max-model-len or lower max_new_tokens"
                )
            if not ids or not 0 <= min(ids) <= max(ids) < self.vocab_size:
                raise ValueError(f"{name} {i}: no tokens, or others than the model's 0 to {self.vocab_size - 1}")


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
