"""The process of a colocated vLLM engine: settings, then requests, over a socket; vLLM's own output goes to a log.

Started by align.rollout.vllm; see process for the messages. Ends itself when the other end of the socket is gone.
"""

from __future__ import annotations

import contextlib
import os
import queue
import shutil
import socket
import sys
import threading
import time
import traceback
from collections.abc import Callable
from typing import Any

from align.jsons import Json
from align.rollout.process import Messages, encode

_BEAT_SECONDS = 0.5


def main(descriptor: int) -> None:
    """Serve the socket that was inherited as this file descriptor."""
    connection = socket.socket(fileno=descriptor)
    messages: queue.Queue[Json] = queue.Queue()
    threading.Thread(target=_listen, args=(connection, messages), daemon=True).start()

    def send(message: Json) -> None:
        with contextlib.suppress(BrokenPipeError):  # the listener ends the process
            connection.sendall(encode(message))

    engine = None
    while True:
        message = messages.get()
        try:
            if message["do"] == "start":
                engine = Engine(message["settings"], message["adapter"])
                send({"done": {"max_model_len": engine.max_model_len}})
            else:
                assert engine is not None
                send({"done": getattr(engine, message.pop("do"))(_beats(send), **message)})
        except Exception as error:  # told to the trainer, which decides; the engine may be in any state
            traceback.print_exc()
            send({"error": f"{type(error).__name__}: {' '.join(str(error).split())[:1000]}"})


def _listen(connection: socket.socket, out: queue.Queue[Json]) -> None:
    """Hand over what arrives; when the trainer is gone, however it ended, so is this process and what it left."""
    messages = Messages()
    scratch = None
    with contextlib.suppress(OSError):
        while data := connection.recv(1 << 20):
            for message in messages.feed(data):
                scratch = message.pop("scratch", None) or scratch
                out.put(message)
    if scratch is not None:
        shutil.rmtree(scratch, ignore_errors=True)
    os._exit(0)


def _beats(send: Callable[[Json], None]) -> Callable[[int], None]:
    """A function to call after each step of the engine: now and then it tells that there was one."""
    last = time.monotonic()

    def beat(tokens: int) -> None:
        nonlocal last
        if time.monotonic() - last >= _BEAT_SECONDS:
            last = time.monotonic()
            send({"beat": tokens})

    return beat


class Engine:
    """A vLLM engine in this process, and the adapter that it generates with."""

    def __init__(self, settings: Json, adapter: Json | None):
        from vllm import LLM

        from align.rollout.file_transfer import register

        register()
        self.llm = LLM(**settings)
        self.core = self.llm.llm_engine
        self.max_model_len: int = self.core.model_config.max_model_len
        self.lora: Any = None
        self.number = 0  # of the last request
        backend = settings["weight_transfer_config"]["backend"]
        self.llm.init_weight_transfer_engine({"init_info": {"packed": False} if backend == "ipc" else {}})
        if adapter is not None:
            self.adapt(lambda _: None, reset=True, **adapter)

    def generate(
        self, beat: Callable[[int], None], prompts: list[list[int]], draws: list[list[Any]], common: Json
    ) -> list[list[Any]]:
        """[token ids, log-probs, stop] of each draw, which is (number of its prompt, temperature, seed)."""
        from vllm import SamplingParams

        base = {"n": 1, "logprobs": 0, "ignore_eos": True, "detokenize": bool(common["stop"])}
        base |= {"skip_special_tokens": False, "spaces_between_special_tokens": False, **common}
        params = [
            SamplingParams(**base, temperature=temperature, seed=seed)
            if temperature
            else SamplingParams(**base | {"top_p": 1.0, "top_k": 0}, temperature=0.0)
            for _, temperature, seed in draws
        ]
        outputs = self._run(beat, [prompts[i] for i, _, _ in draws], params)
        results = []
        for output in outputs:
            (written,) = output.outputs
            ids = list(written.token_ids)
            logps = [told[token].logprob for told, token in zip(written.logprobs, ids, strict=True)]
            results.append([ids, logps, _stop(written.finish_reason, written.stop_reason)])
        return results

    def logps(self, beat: Callable[[int], None], sequences: list[list[int]], starts: list[int]) -> list[list[float]]:
        """Log-probs of the tokens of each sequence from its start on.

        vLLM computes those of a prompt without its prefix cache. The last one is drawn as generate would draw it, from
        what the cache holds of the tokens before it: if an older policy left that, it shows.
        """
        from vllm import SamplingParams

        told = [k for k, (ids, start) in enumerate(zip(sequences, starts, strict=True)) if start < len(ids)]
        common: Json = {"max_tokens": 1, "temperature": 0.0, "detokenize": False}
        # the log-prob is that of the whole vocabulary all the same
        forced = [SamplingParams(**common, logprobs=0, allowed_token_ids=[sequences[k][-1]]) for k in told]
        # first: prompt log-probs do not read the cache, but fill it
        drawn = self._run(beat, [sequences[k][:-1] for k in told], forced)
        lasts = {k: o.outputs[0].logprobs[0][sequences[k][-1]].logprob for k, o in zip(told, drawn, strict=True)}
        # vLLM does not take a request without a token to write
        params = SamplingParams(**common, prompt_logprobs=0)
        outputs = dict(zip(told, self._run(beat, [sequences[k] for k in told], [params] * len(told)), strict=True))
        return [
            [*(outputs[k].prompt_logprobs[i][ids[i]].logprob for i in range(start, len(ids) - 1)), lasts[k]]
            if k in lasts
            else []
            for k, (ids, start) in enumerate(zip(sequences, starts, strict=True))
        ]

    def update(self, _: Callable[[int], None], chunks: list[Json], version: str, reset: bool) -> None:
        """New weights, each chunk as the weight-transfer backend takes it."""
        self.llm.start_weight_update()
        for chunk in chunks:
            self.llm.update_weights({"update_info": chunk})
        self.llm.finish_weight_update(version)
        self._forget(reset)

    def adapt(self, _: Callable[[int], None], path: str, version: int, reset: bool) -> None:
        """A new adapter. Under a number of its own: one that is used again may still mean the adapter it named."""
        from vllm.lora.request import LoRARequest

        before = self.lora
        self.lora = LoRARequest(f"policy-{version}", version, path)
        if before is not None:
            self.core.remove_lora(before.lora_int_id)
        if not self.core.add_lora(self.lora):
            raise RuntimeError(f"the adapter in {path} was not loaded")
        self._forget(reset)

    def sleep(self, _: Callable[[int], None]) -> None:
        """Weights to the host, cache away."""
        self.llm.sleep(level=1)

    def wake(self, _: Callable[[int], None]) -> None:
        """Undo sleep."""
        self.llm.wake_up()

    def _forget(self, reset: bool) -> None:
        # vLLM keeps prefixes computed with the old weights unless it is told; reset=False is for the test that shows it
        if reset and not self.llm.reset_prefix_cache():
            raise RuntimeError("the prefix cache could not be emptied: requests are still running")

    def _run(self, beat: Callable[[int], None], prompts: list[list[int]], params: list[Any]) -> list[Any]:
        """The finished outputs of all requests, in order. Raises if an engine changed a prompt."""
        first = self.number
        for ids, one in zip(prompts, params, strict=True):
            self.core.add_request(str(self.number), {"prompt_token_ids": ids}, one, lora_request=self.lora)
            self.number += 1
        outputs: dict[int, Any] = {}
        steps = 0
        while self.core.has_unfinished_requests():
            outputs |= {int(o.request_id) - first: o for o in self.core.step() if o.finished}
            steps += 1
            beat(steps)
        for k, ids in enumerate(prompts):
            if list(outputs[k].prompt_token_ids) != ids:
                raise RuntimeError(f"the engine changed the tokens of prompt {k}")
        return [outputs[k] for k in range(len(prompts))]


def _stop(reason: str, what: int | str | None) -> str:
    if reason == "length":
        return "length"
    if reason != "stop":
        raise RuntimeError(f"a request ended for the reason {reason!r}")
    return "string" if isinstance(what, str) else "end"


if __name__ == "__main__":
    main(int(sys.argv[1]))
