"""Completions by a vLLM engine beside the trainer, in a process of its own: this is the trainer's end, see process."""

from __future__ import annotations

import pickle
import shutil
import sys
from base64 import b64encode
from collections.abc import Iterator, Sequence
from typing import Any

import torch

from align.config.rollouts import VLLMSettings, settings
from align.data import chat
from align.jsons import Json
from align.models.policy import Policy, is_peft
from align.rollout import transfer as files
from align.rollout.base import GREEDY, Completion, EngineFailed, Host, Rollout, Sampling, check_request
from align.rollout.process import EngineProcess, environment
from align.rollout.version import check_version

_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)  # what vLLM takes for max_lora_rank


def check_draws(prompts: Sequence[Sequence[int]], sampling: Sampling, n: int, greedy: bool) -> None:
    """Raises ValueError for what vLLM cannot do, or would do otherwise without a word."""
    check_request(prompts, sampling, n, greedy)
    if not sampling.greedy and not 0.01 <= sampling.temperature <= 2:
        raise ValueError(f"temperature={sampling.temperature}: vLLM takes 0 (greedy) and 0.01 to 2")


class VLLMRollout(Rollout):
    """A vLLM engine that gets the policy's weights at each sync; see configs/rollout/vllm.yaml for the keys.

    An engine that fails is started again with the weights of the last sync, and asked again for all that it was asked
    for. counts: restarts, requests sent again ("resent"), syncs.
    """

    def __init__(self, host: Host, **keys: Any):
        given = settings(VLLMSettings, keys)
        on_gpu = host.policy.device.type == "cuda"
        _check_device(given, on_gpu)
        check_version(given.allow_untested_version)
        self.host = host
        self.policy: Policy = host.policy
        self.lora = is_peft(self.policy.model)
        self.dtype = getattr(torch, host.precision if given.dtype == "auto" else given.dtype)
        self.ipc = given.transfer == "ipc" and not self.lora
        self.sleeps = on_gpu if given.sleep == "auto" else given.sleep
        self.threads = given.threads
        self.start_seconds, self.request_seconds, self.sync_seconds = (
            given.start_seconds,
            given.request_seconds,
            given.sync_seconds,
        )
        self.max_restarts = given.max_restarts
        self.counts: dict[str, int] = {"restarts": 0, "resent": 0, "syncs": 0}
        self.stops = chat.stop_ids(host.tokenizer, self.policy.causal_lm.generation_config)
        if not self.stops:
            raise ValueError("neither the tokenizer nor the model names a token that ends a turn; set its eos_token")
        self.vocab_size = self.policy.causal_lm.get_input_embeddings().weight.shape[0]
        self.max_model_len = 0  # told by the engine
        self._engine: EngineProcess | None = None
        self._asleep = False
        self._open = True
        self._scratch: files.Scratch | None = None
        self._model = host.directory / "model"
        self._weights = self._model  # what an engine is started with
        self._adapter: Json | None = None  # and the adapter of the last sync
        self._write_model()
        eager = not on_gpu if given.enforce_eager == "auto" else given.enforce_eager
        self._settings = self._engine_settings(on_gpu, given.cpu_kv_cache_gib) | {
            "max_model_len": given.max_model_len,
            "max_num_seqs": given.max_num_seqs,
            "max_num_batched_tokens": given.max_num_batched_tokens,
            "gpu_memory_utilization": given.gpu_memory_utilization,
            "enforce_eager": eager,
        }
        try:
            self._start()
        except BaseException:
            self.close()
            raise

    def _engine_settings(self, on_gpu: bool, cpu_kv_cache_gib: float) -> Json:
        """Those of vLLM's LLM that are not the user's."""
        found = {
            "tokenizer": str(self._model),
            "dtype": str(self.dtype).removeprefix("torch."),
            "enable_prefix_caching": True,
            "enable_sleep_mode": self.sleeps,
            "generation_config": "vllm",  # none of the model's own settings
            "disable_log_stats": True,
            "weight_transfer_config": {"backend": "ipc" if self.ipc else files.BACKEND},
            **self._lora_settings(),
        }
        if not on_gpu:
            # A prompt in parts takes back a draw from its generator, which generators of the CPU cannot do.
            found |= {"enable_chunked_prefill": False, "kv_cache_memory_bytes": int(cpu_kv_cache_gib * 2**30)}
        return found

    # ---- what Rollout promises ----

    def generate(
        self, prompts: Sequence[Sequence[int]], sampling: Sampling, n: int = 1, greedy: bool = False
    ) -> list[list[Completion]]:
        """See Rollout. Raises EngineFailed when max_restarts are used up."""
        check_draws(prompts, sampling, n, greedy)
        samples = [*range(n), *([GREEDY] if greedy else [])]
        self._check_tokens(prompts, sampling.max_new_tokens, "prompt")
        draws = [
            [i, 0.0, None] if k == GREEDY or sampling.greedy else [i, sampling.temperature, sampling.seed_at(i, k)]
            for i in range(len(prompts))
            for k in samples
        ]
        if not draws:
            return []
        common = {"max_tokens": sampling.max_new_tokens, "top_p": sampling.top_p, "top_k": sampling.top_k}
        common |= {"stop": list(sampling.stop), "stop_token_ids": self.stops}
        message = {"do": "generate", "prompts": _plain(prompts), "draws": draws, "common": common}
        replies = iter(self._ask(message, self.request_seconds, len(draws)))
        return [[_completion(next(replies)) for _ in samples] for _ in prompts]

    def logps(self, sequences: Sequence[Sequence[int]], starts: Sequence[int]) -> list[list[float]]:
        """See Rollout. A sequence may have one token fewer than the engine's limit. The last token's log-prob is read
        through the prefix cache, as generate reads it, the others' without."""
        if len(sequences) != len(starts) or not all(start >= 1 for start in starts):
            raise ValueError("logps takes a start of at least 1 for each sequence")
        if not sequences:
            return []
        self._check_tokens(sequences, 1, "sequence")
        message = {"do": "logps", "sequences": _plain(sequences), "starts": [int(start) for start in starts]}
        return self._ask(message, self.request_seconds, len(sequences))

    def sync(self, policy: Policy) -> None:
        """See Rollout."""
        self._sync(policy, reset=True)

    def close(self) -> None:
        """End the engine and remove the weights that were written for it; its log stays."""
        self._end()
        if not self._open:  # the directory may be another rollout's by now
            return
        self._open = False
        if self._scratch is not None:
            self._scratch.close()
            self._scratch = None
        shutil.rmtree(self._model, ignore_errors=True)
        if self._adapter is not None:
            shutil.rmtree(self._adapter["path"], ignore_errors=True)

    @property
    def max_tokens(self) -> int:
        """The engine's limit."""
        return self.max_model_len

    def sleep(self) -> None:
        """Give the engine's GPU memory to the trainer until the next call of any other kind. Untested on a GPU."""
        if self.sleeps and not self._asleep:
            self._ask({"do": "sleep"}, self.sync_seconds, 0)
            self._asleep = self._engine is not None

    def wake(self) -> None:
        """Undo sleep; other calls do it too."""
        if self._asleep:
            self._asleep = False
            self._ask({"do": "wake"}, self.sync_seconds, 0)

    # ---- weights ----

    def _write_model(self) -> None:
        shutil.rmtree(self._model, ignore_errors=True)
        files.write_model(self.policy, self._model, self.dtype)
        self.host.tokenizer.save_pretrained(self._model)
        for killed in self.host.directory.glob("adapter-*"):  # a trainer that was killed left them
            shutil.rmtree(killed)
        if self.lora:
            self._adapter = self._write_adapter(self.policy)

    def _write_adapter(self, policy: Policy) -> Json:
        version = self.counts["syncs"] + 1
        path = self.host.directory / f"adapter-{version}"
        shutil.rmtree(path, ignore_errors=True)
        files.write_adapter(policy, path)
        return {"path": str(path), "version": version}

    def _lora_settings(self) -> Json:
        if not self.lora:
            return {}
        rank = files.lora_rank(self.policy)
        if rank > _RANKS[-1]:
            raise ValueError(f"lora.rank={rank}: vLLM takes ranks up to {_RANKS[-1]}")
        # by name, without the head: vLLM 0.32 dies in its LoRA head on prompt log-probs of two prompts on a CPU
        layers = {name.split(".lora_A")[0].rpartition(".")[2] for name, _ in self._adapter_weights()}
        return {
            "enable_lora": True,
            "max_loras": 1,
            "max_lora_rank": next(r for r in _RANKS if r >= rank),
            "lora_target_modules": sorted(layers),
        }

    def _adapter_weights(self) -> Iterator[tuple[str, Any]]:
        """Names and weights of the adapter's first factors."""
        return ((name, p) for name, p in self.policy.model.named_parameters() if ".lora_A." in name)

    def _sync(self, policy: Policy, reset: bool) -> None:
        """reset=False leaves the prefix cache as it is: for the test that shows why it may not be left."""
        if is_peft(policy.model) != self.lora:
            raise ValueError("a policy with LoRA cannot take the place of one without, nor the other way round")
        self.policy = policy
        self.counts["syncs"] += 1
        if self.lora:
            old, self._adapter = self._adapter, self._write_adapter(policy)
            self._ask({"do": "adapt", **self._adapter, "reset": reset}, self.sync_seconds, 0)
            shutil.rmtree(old["path"])  # type: ignore[index]
            return
        version = str(self.counts["syncs"])
        if self.ipc:
            held, chunks = _ipc(policy, self.dtype)
            self._update(chunks, version, reset)
            del held  # until here the engine read this memory
            return
        self._update([{"path": path} for path in self._write_weights(policy)], version, reset)

    def _update(self, chunks: list[Json], version: str, reset: bool) -> None:
        self._ask({"do": "update", "chunks": chunks, "version": version, "reset": reset}, self.sync_seconds, 0)

    def _write_weights(self, policy: Policy) -> list[str]:
        """Write them where an engine that fails later finds them again; returns the files."""
        if self._scratch is None:
            size = sum(p.numel() for p in policy.causal_lm.parameters()) * self.dtype.itemsize
            self._scratch = files.Scratch(self.host.directory, size)
        self._weights = self._scratch.path / "model"
        shutil.rmtree(self._weights, ignore_errors=True)
        return files.write_model(policy, self._weights, self.dtype)

    # ---- the process ----

    def _start(self) -> None:
        """Start an engine with the weights of the last sync and wait until it can work. Raises EngineFailed."""
        env = environment(self.host.policy.device, self.ipc, self.threads)
        self._engine = EngineProcess(self._program(), env, self.host.directory / "engine.log", self.host.check)
        self._asleep = False
        message = {"do": "start", "settings": self._settings | {"model": str(self._weights)}, "adapter": self._adapter}
        self.max_model_len = self._exchange(message, self.start_seconds, "start_seconds")["max_model_len"]
        if self.ipc and self.counts["syncs"]:  # nothing was written, so the weights of now are all there is
            held, chunks = _ipc(self.policy, self.dtype)
            message = {"do": "update", "chunks": chunks, "version": str(self.counts["syncs"]), "reset": True}
            self._exchange(message, self.sync_seconds, "sync_seconds")
            del held

    def _program(self) -> list[str]:
        return [sys.executable, "-m", "align.rollout.vllm_engine"]

    def _ask(self, message: Json, seconds: float, num_requests: int) -> Any:
        """The engine's answer; an engine that fails is replaced and asked again. Raises EngineFailed at last."""
        key = "request_seconds" if num_requests else "sync_seconds"
        if message["do"] not in ("sleep", "wake"):
            self.wake()
        sent = False
        while True:
            try:
                if self._engine is None:
                    self._start()
                sent = True
                return self._exchange(message, seconds, key)
            except EngineFailed as error:
                if self.counts["restarts"] >= self.max_restarts:
                    raise EngineFailed(f"{error}\n(rollout.max_restarts={self.max_restarts} are used up)") from error
                self.counts["restarts"] += 1
                self.counts["resent"] += num_requests if sent else 0
                self.host.say(f"vLLM engine: {str(error).splitlines()[0]}; starting another")
                sent = False

    def _exchange(self, message: Json, seconds: float, key: str) -> Any:
        """See EngineProcess. Whatever ends the wait early ends the engine."""
        assert self._engine is not None
        if self._scratch is not None:
            message = {**message, "scratch": str(self._scratch.path)}  # removed by the engine if this process is killed
        try:
            return self._engine.exchange(message, seconds, key)
        except BaseException:
            self._end()
            raise

    def _end(self) -> None:
        if self._engine is not None:
            self._engine.end()
            self._engine = None

    def _check_tokens(self, rows: Sequence[Sequence[int]], new: int, name: str) -> None:
        for i, ids in enumerate(rows):
            if len(ids) + new > self.max_model_len:
                raise ValueError(
                    f"{name} {i} has {len(ids)} tokens and {new} more are to be written: the engine takes "
                    f"{self.max_model_len} in all; raise rollout.max_model_len or lower max_new_tokens"
                )
            if not 0 <= min(ids) <= max(ids) < self.vocab_size:
                wrong = next(int(t) for t in ids if not 0 <= t < self.vocab_size)
                raise ValueError(f"{name} {i} has token {wrong}; the model's tokens are 0 to {self.vocab_size - 1}")


def _check_device(given: VLLMSettings, on_gpu: bool) -> None:
    """Raises ValueError for settings that no engine beside a policy on such a device can have."""
    if given.transfer == "ipc" and not on_gpu:
        raise ValueError("rollout.transfer=ipc hands over GPU memory and the policy is on the CPU; use file")
    if given.sleep is True and not on_gpu:
        raise ValueError("rollout.sleep=true frees GPU memory and the policy is on the CPU; use auto or false")


def _plain(rows: Sequence[Sequence[int]]) -> list[list[int]]:
    """Token ids as JSON takes them: arrays and tensors hold numbers of their own kinds."""
    return [[int(token) for token in row] for row in rows]


def _completion(reply: list[Any]) -> Completion:
    ids, logps, stop = reply
    return Completion(tuple(ids), stop, tuple(logps))


def _ipc(policy: Policy, dtype: torch.dtype) -> tuple[list[torch.Tensor], list[Json]]:
    """Weights to keep alive, and the update that lets vLLM's own backend "ipc" read them where they are."""
    from torch.multiprocessing.reductions import reduce_tensor

    tensors = {name: t.detach().contiguous() for name, t in files.named_tensors(policy, dtype).items()}
    gpu = str(torch.cuda.get_device_properties(policy.device).uuid)
    handles = [{gpu: reduce_tensor(t)[1]} for t in tensors.values()]
    update = {
        "names": list(tensors),
        "dtype_names": [str(t.dtype).removeprefix("torch.") for t in tensors.values()],
        "shapes": [list(t.shape) for t in tensors.values()],
        "ipc_handles_pickled": b64encode(pickle.dumps(handles)).decode(),
    }
    return list(tensors.values()), [update]
