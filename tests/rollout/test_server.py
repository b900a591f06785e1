"""A real vLLM server on the CPU against the policy itself. One server for the module; the one that kills it is last."""

from __future__ import annotations

import http.client
import os
import signal
import socket
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from align.models.policy import Policy, lora
from align.models.pretrained import byte_tokenizer
from align.rollout.base import EngineFailed, Host, Sampling
from align.rollout.fleet import WeightFiles
from align.rollout.hf import HFRollout
from align.rollout.http import Calls
from align.rollout.server import VLLMServerRollout

pytestmark = [pytest.mark.vllm, pytest.mark.slow, pytest.mark.xdist_group("vllm_server")]

TOKENIZER = byte_tokenizer()
TOLERANCE = 1e-4  # nats; float32 on both sides, differences measured below 2e-5
LIMIT = 512
LONG = [(7 * k) % 250 for k in range(200)]  # more than a block of the server's cache (128 tokens on a CPU)
PROMPTS = [LONG, [5, 6, 7], [9] * 40]
START_SECONDS = 300


def policy(seed):
    """Attention heads of 32, the smallest that vLLM computes on a CPU; tied: the head has no weight of its own."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=len(TOKENIZER), hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, max_position_embeddings=LIMIT, tie_word_embeddings=True, initializer_range=0.3,
        bos_token_id=TOKENIZER.bos_token_id, eos_token_id=TOKENIZER.eos_token_id, pad_token_id=TOKENIZER.pad_token_id,
    )  # fmt: skip
    torch.manual_seed(seed)
    return Policy(LlamaForCausalLM(config).float(), "shared")


def with_lora(seed):
    """A policy whose adapter says something: PEFT's own start is zero."""
    network = Policy(lora(policy(1).model, rank=4, alpha=8, dropout=0.0, targets="all-linear", seed=0), "shared")
    change(network, seed)
    return network


@torch.no_grad()
def change(network, seed):
    torch.manual_seed(seed)
    for weight in network.parameters():
        if weight.requires_grad:
            weight.normal_(std=0.05)


class Served:
    """A server process and its log."""

    def __init__(self, directory):
        model = directory / "model"
        policy(0).model.save_pretrained(model)
        TOKENIZER.save_pretrained(model)
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}"
        self.log = directory / "log"
        words = f"--model {model} --port {self.port} --dtype float32 --max-model-len {LIMIT} --max-num-seqs 32"
        words += " --enable-lora --max-lora-rank 8 --max-num-batched-tokens 1024"
        env = os.environ | {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind"}
        with self.log.open("wb") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "align.rollout.serve", *words.split()],
                stdout=log, stderr=log, env=env, start_new_session=True,
            )  # fmt: skip

    def wait(self):
        """Until it answers."""
        deadline = time.monotonic() + START_SECONDS
        while True:
            assert self.process.poll() is None, self.log.read_text()[-3000:]
            assert time.monotonic() < deadline, self.log.read_text()[-3000:]
            connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=5)
            try:
                connection.request("GET", "/version")
                if connection.getresponse().status == 200:
                    return
            except OSError:
                self.process.poll()
                time.sleep(0.5)
            finally:
                connection.close()


@pytest.fixture(scope="module")
def served(tmp_path_factory):
    server = Served(tmp_path_factory.mktemp("served"))
    try:
        server.wait()
        yield server
    finally:
        os.killpg(server.process.pid, signal.SIGKILL)
        server.process.wait()


@pytest.fixture
def rollout(served, tmp_path):
    """A function from a policy to a rollout with the server, and the lines that it said."""
    made = []

    def make(network, check=lambda: None, **settings):
        said = []
        host = Host(network, TOKENIZER, tmp_path, "float32", check=check, say=said.append)
        keys = dict(
            urls=[served.url], directory=None, concurrency=16, start_seconds=0, connect_seconds=20,
            request_seconds=60, sync_seconds=60, retries=1, allow_untested_version=False,
        )  # fmt: skip
        made.append(VLLMServerRollout(host, **(keys | settings)))
        made[-1].said = said
        return made[-1]

    yield make
    for r in made:
        r.close()
    assert list(tmp_path.iterdir()) == []


def reference(network, tmp_path):
    return HFRollout(Host(network, TOKENIZER, tmp_path, "float32"), batch_size=16)


def difference(r, network, tmp_path, prompts=PROMPTS):
    """Largest difference of log-probs, of drawn tokens and of given ones; the greedy twins must be the policy's own."""
    hf = reference(network, tmp_path)
    drawn = r.generate(prompts, Sampling(12, temperature=0.8, top_p=0.9, top_k=50, seed=3), 2, greedy=True)
    expected = hf.generate(prompts, Sampling(12, temperature=0.0))
    same = [a[-1].token_ids == b[0].token_ids and a[-1].stop == b[0].stop for a, b in zip(drawn, expected, strict=True)]
    rows = [(p, c) for p, row in zip(prompts, drawn, strict=True) for c in row]
    sequences, starts = [[*p, *c.token_ids] for p, c in rows], [len(p) for p, _ in rows]
    told = hf.logps(sequences, starts)
    given = r.logps(sequences, starts)
    gaps = [np.abs(np.subtract(c.logps, t)).max() for (_, c), t in zip(rows, told, strict=True)]
    gaps += [np.abs(np.subtract(g, t)).max() for g, t in zip(given, told, strict=True)]
    return max(gaps), all(same)


def test_server_is_the_policy_before_and_after_syncs(rollout, tmp_path):
    """The server was started with other weights than the policy's, so that the first ones were given too."""
    r = rollout(policy(1))
    for seed in (1, 2, 3):
        network = policy(seed)
        if seed > 1:
            r.sync(network)
        gap, same = difference(r, network, tmp_path)
        assert gap < TOLERANCE
        assert same
    assert r.counts == {"resent": 0, "lost": 0, "resynced": 0, "syncs": 2}


def test_without_reset_old_prefixes_would_stay(rollout, tmp_path, monkeypatch):
    """What the reset is for; a test of syncs with the long prompt could not fail otherwise."""
    r = rollout(policy(1))
    r.generate([LONG], Sampling(4, temperature=0.0))
    ask = Calls.ask

    def forgetful(self, server, path, body=None, key=""):
        if path == "/reset_prefix_cache":
            return {"success": True}
        return ask(self, server, path.replace("mode=wait", "mode=wait&clear_cache=false"), body, key)

    monkeypatch.setattr(Calls, "ask", forgetful)
    network = policy(2)
    r.sync(network)
    (c,) = r.generate([LONG], Sampling(4, temperature=0.0))[0]
    told = reference(network, tmp_path).logps([[*LONG, *c.token_ids]], [len(LONG)])
    assert np.abs(np.subtract(c.logps, told[0])).max() > 0.1


def test_draws_and_stops(rollout):
    """A draw depends on its seed and place; a stop text ends it with the token that completes it."""
    r = rollout(policy(1))
    sampling = Sampling(30, temperature=1.0, seed=7)
    many = r.generate(PROMPTS * 8, sampling, 2)  # more tokens than one step takes: no prompt may be split
    again = r.generate(PROMPTS, sampling, 1)
    assert [row[0].token_ids for row in again] == [row[0].token_ids for row in many[:3]]
    assert many[0][0].token_ids != many[3][0].token_ids
    place, whole, text = next(
        (i, row[0].token_ids, text)
        for i, row in enumerate(many)
        for text in map(TOKENIZER.decode, row[0].token_ids[1:])
        if len(text) == 1 and text in "ABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789"
    )
    (cut,) = r.generate((PROMPTS * 8)[: place + 1], Sampling(30, temperature=1.0, seed=7, stop=(text,)))[place]
    assert cut.token_ids == whole[: 1 + [TOKENIZER.decode(t) for t in whole].index(text)]
    assert cut.stop == "string"
    ended = [c for row in many for c in row if c.stop == "end"]
    assert ended
    assert all(c.token_ids[-1] == TOKENIZER.eos_token_id for c in ended)
    with pytest.raises(ValueError, match=f"takes {LIMIT} in all"):
        r.generate([[1] * (LIMIT - 29)], sampling)
    assert len(r.logps([[1] * (LIMIT - 1)], [1])[0]) == LIMIT - 2


def test_weights_of_another_are_found_and_replaced(rollout, tmp_path):
    network = policy(1)
    r = rollout(network)
    rollout(policy(2))  # has the server for itself now
    gap, same = difference(r, network, tmp_path)
    assert gap < TOLERANCE
    assert same
    assert r.counts["resynced"] == 1


def test_broken_file_is_told_in_the_servers_words(rollout, tmp_path, monkeypatch):
    network = policy(1)
    r = rollout(network)
    write = WeightFiles.write

    def half(self, policy):
        write(self, policy)
        for file in self.directory.glob("model-*/*.safetensors"):
            file.write_bytes(file.read_bytes()[:1000])

    monkeypatch.setattr(WeightFiles, "write", half)
    with pytest.raises(EngineFailed, match=r"HTTP 500: .*deserializing"):
        r.sync(network)
    monkeypatch.setattr(WeightFiles, "write", write)
    r.sync(network)
    gap, same = difference(r, network, tmp_path)
    assert gap < TOLERANCE
    assert same


def test_update_left_open_by_a_killed_trainer(rollout, tmp_path):
    r = rollout(policy(1))
    some = {"model.layers.0.self_attn.q_proj.weight": torch.ones(64, 64), "model.norm.weight": torch.ones(64)}
    save_file(some, r.weights.directory / "some.safetensors")
    steps = {"/pause?mode=wait": {}, "/start_weight_update": {}}
    steps["/update_weights"] = {"update_info": {"path": str(r.weights.directory / "some.safetensors")}}
    for path, body in steps.items():
        r.calls.ask(r.fleet.servers[0], path, body, "sync_seconds")
    network = policy(2)
    gap, same = difference(rollout(network), network, tmp_path)
    assert gap < TOLERANCE
    assert same


def test_adapters(rollout, tmp_path):
    network = with_lora(1)
    r = rollout(network)
    for seed in (1, 2, 3):
        if seed > 1:
            change(network, seed)
            r.sync(network)
        gap, same = difference(r, network, tmp_path)
        assert gap < TOLERANCE
        assert same
    assert (
        len([c for c in r.calls.ask(r.fleet.servers[0], "/v1/models", None, "sync_seconds")["data"] if c["parent"]])
        == 1
    )
    r.sync(network)
    plain = policy(3)
    assert difference(rollout(plain), plain, tmp_path)[0] < TOLERANCE  # the adapter is not in the way


def test_stopped_call_leaves_the_server_free(rollout):
    stop = []

    def check():
        if stop:
            raise KeyboardInterrupt

    r = rollout(policy(1), check)
    stop.append(0)
    with pytest.raises(KeyboardInterrupt):
        r.generate([[k] for k in range(200)], Sampling(400, temperature=1.0), 1)
    stop.clear()
    started = time.monotonic()
    assert len(r.generate([[1]], Sampling(4))) == 1
    assert time.monotonic() - started < 20


def test_killed_server(rollout, served):
    """A server that dies while it answers, and one that is not there any more."""
    killed = []

    def check():
        if r_ready and not killed:
            os.kill(served.process.pid, signal.SIGKILL)
            killed.append(served.process.wait())

    r_ready = []
    r = rollout(policy(1), check)
    r_ready.append(0)
    with pytest.raises(EngineFailed, match=r"no vLLM server is left .*python -m align.rollout.serve"):
        r.generate([[k] for k in range(64)], Sampling(300, temperature=1.0))
    assert r.counts["lost"] == 1
    said = " ".join(r.said)  # by when it died
    assert any(word in said for word in ("refused", "RemoteDisconnected", "reset")), said
    with pytest.raises(ValueError, match="refused"):
        rollout(policy(1))
