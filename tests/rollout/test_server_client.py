"""VLLMServerRollout against small HTTP servers that speak as vLLM does, until a test makes them misbehave."""

from __future__ import annotations

import json
import socket
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
import torch

from align.models.policy import Policy, lora
from align.models.pretrained import byte_tokenizer
from align.rollout import serve
from align.rollout.base import EngineFailed, Host, Sampling, seed_of
from align.rollout.server import VLLMServerRollout
from tests.conftest import tiny_model

TOKENIZER = byte_tokenizer()
EOS = TOKENIZER.eos_token_id
LIMIT = 64  # tokens that a server takes
SETTINGS = dict(
    directory=None, concurrency=4, start_seconds=0, connect_seconds=5, request_seconds=5, sync_seconds=5, retries=1,
    allow_untested_version=False,
)  # fmt: skip


class Fake:
    """A server whose completion is the prompt's last token again and again; `faults` come before each right answer.

    A fault is (part of a path, function of handler and right answer); it is used once.
    """

    def __init__(self, **known):
        self.known = {"version": "0.32.0", "vocabulary": len(TOKENIZER), "dev": True, "lora": True} | known
        self.weights, self.adapters, self.paused, self.open = "default", [], False, False
        self.files, self.bodies, self.paths, self.faults, self.in_flight, self.most = [], [], [], [], 0, 0
        self.lock = threading.Lock()
        fake = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self):
                fake.serve(self, {})

            def do_POST(self):
                fake.serve(self, json.loads(self.rfile.read(int(self.headers["Content-Length"]))))

            def log_message(self, *_):
                pass

        self.handler, self.port = Handler, 0
        self.listen()

    def listen(self):
        self.http = ThreadingHTTPServer(("127.0.0.1", self.port), self.handler)
        self.http.daemon_threads = True
        self.port = self.http.server_port
        self.url = f"http://127.0.0.1:{self.port}"
        self.thread = threading.Thread(target=self.http.serve_forever, args=(0.01,))
        self.thread.start()

    def close(self):
        self.http.shutdown()
        self.http.server_close()
        self.thread.join()

    def serve(self, handler, body):
        path = handler.path
        with self.lock:
            self.paths.append(path)
            self.in_flight += 1
            self.most = max(self.most, self.in_flight)
            fault = next((f for f in self.faults if f[0] in path and not is_probe(body)), None)
            if fault:
                self.faults.remove(fault)
            try:
                status, answer = self.answer(path, body)
            finally:
                self.in_flight -= 1
        if fault:
            fault[1](handler, answer)
        else:
            send(handler, status, answer)

    def answer(self, path, body):
        name = path.partition("?")[0]
        if name == "/version":
            return 200, {"version": self.known["version"]}
        if name == "/v1/models":
            cards = [{"id": "served", "parent": None, "max_model_len": LIMIT}]
            return 200, {"data": cards + [{"id": a, "parent": "served"} for a in self.adapters]}
        if name == "/v1/completions":
            return self.complete(body)
        if "lora_adapter" in name:
            if not self.known["lora"]:
                return 404, {"detail": "Not Found"}
            (self.adapters.append if "/load" in name else self.adapters.remove)(body["lora_name"])
            return 200, "Success"
        if not self.known["dev"]:
            return 404, {"detail": "Not Found"}
        if name == "/weight_info":
            return 200, {"weight_version": self.weights}
        if name == "/update_weight_version":
            self.weights = body["new_version"]
        elif name == "/start_weight_update":
            if self.open:
                return 500, {"error": {"message": "a weight update is already active"}}
            self.open, self.files = True, []
        elif name == "/update_weights":
            if not body["update_info"]["path"]:
                self.open = False
                return 500, {"error": {"message": "No such file"}}
            self.files.append(body["update_info"]["path"])
            assert self.paused
        elif name == "/finish_weight_update":
            self.open, self.weights = False, body.get("weight_version", self.weights)
        elif name in ("/pause", "/resume"):
            self.paused = name == "/pause"
        return 200, {"success": True, "is_paused": self.paused}

    def complete(self, body):
        assert not self.open, "a request in the middle of an update ends vLLM"
        prompt = body["prompt"]
        if body["model"] not in ("served", *self.adapters):
            return 404, {"error": {"message": f"The model {body['model']} does not exist."}}
        if max(prompt) >= self.known["vocabulary"]:
            return 400, {"error": {"message": f"Token id {max(prompt)} is out of vocabulary"}}
        choice = {"prompt_token_ids": prompt, "token_ids": [], "finish_reason": "length", "stop_reason": None}
        if body.get("echo"):
            return 200, {"choices": [choice | {"logprobs": {"token_logprobs": [None, *[-0.5] * (len(prompt) - 1)]}}]}
        if not is_probe(body):
            self.bodies.append(body)
        ids = [prompt[-1]] * body["max_tokens"]
        return 200, {"choices": [choice | {"token_ids": ids, "logprobs": {"token_logprobs": [-0.25] * len(ids)}}]}


def is_probe(body):
    return body.get("max_tokens") == 1 and "seed" not in body


def send(handler, status, answer, length=None):
    data = json.dumps(answer).encode()
    handler.send_response(status)
    handler.send_header("Content-Length", str(length or len(data)))
    handler.end_headers()
    handler.wfile.write(data)


@pytest.fixture
def fakes():
    """A function that starts servers; they end with the test."""
    started = []

    def start(n=1, **known):
        started.extend(Fake(**known) for _ in range(n))
        return started[-n:]

    yield start
    for fake in started:
        fake.close()


def policy(seed=0):
    ids = {"bos_token_id": TOKENIZER.bos_token_id, "eos_token_id": EOS, "pad_token_id": TOKENIZER.pad_token_id}
    return Policy(tiny_model("llama", torch.float32, seed, vocab_size=len(TOKENIZER), **ids), "shared")


def rollout(tmp_path, servers, network=None, check=lambda: None, **settings):
    said = []
    host = Host(network or policy(), TOKENIZER, tmp_path, "float32", check=check, say=said.append)
    urls = [s if isinstance(s, str) else s.url for s in servers]
    r = VLLMServerRollout(host, **(SETTINGS | {"urls": urls} | settings))
    r.said = said
    return r


def with_change(**change):
    """A fault: the right answer with other values in its choice."""
    return lambda h, a: send(h, 200, {"choices": [a["choices"][0] | change]})


def drop(handler, _):
    handler.close_connection = True


def test_what_is_asked(tmp_path, fakes):
    """Each sample has the seed that HFRollout draws it with, the twin none; nothing is left to the server."""
    (fake,) = fakes()
    r = rollout(tmp_path, [fake])
    sampling = Sampling(3, temperature=0.7, top_p=0.9, top_k=5, stop=("x",), seed=11)
    out = r.generate([[1, 2], [3]], sampling, 2, greedy=True)
    assert [[c.token_ids for c in row] for row in out] == [[(2, 2, 2)] * 3, [(3, 3, 3)] * 3]
    assert {c.stop for row in out for c in row} == {"length"}
    assert out[0][0].logps == (-0.25,) * 3
    drawn = {(tuple(b["prompt"]), b["seed"]) for b in fake.bodies if "seed" in b}
    assert drawn == {(p, seed_of(11, i, k)) for i, p in enumerate([(1, 2), (3,)]) for k in (0, 1)}
    twins = [b for b in fake.bodies if "seed" not in b]
    assert [(b["temperature"], b["top_p"], b["top_k"]) for b in twins] == [(0.0, 1.0, 0)] * 2
    for b in fake.bodies:
        assert b["ignore_eos"]
        assert b["stop"] == ["x"]
        assert EOS in b["stop_token_ids"]
        assert b["repetition_penalty"] == 1.0
        assert b["return_token_ids"]
    assert r.logps([[1, 2, 3], [4, 5]], [2, 1]) == [[-0.5], [-0.5]]


def test_prompts_are_spread_and_requests_are_few_at_a_time(tmp_path, fakes):
    servers = fakes(3)
    r = rollout(tmp_path, servers, concurrency=2)
    out = r.generate([[10 + i] for i in range(7)], Sampling(2), 3)
    assert [row[0].token_ids[0] for row in out] == [10 + i for i in range(7)]
    for k, fake in enumerate(servers):
        assert {b["prompt"][0] - 10 for b in fake.bodies} == set(range(k, 7, 3))
        assert len(fake.bodies) == 3 * len(range(k, 7, 3))
        assert fake.most <= 2


def test_sync_gives_files_to_every_server_and_removes_the_old(tmp_path, fakes):
    servers = fakes(2)
    r = rollout(tmp_path, servers)
    first = servers[0].files
    r.sync(policy(1))
    for fake in servers:
        assert fake.files != first
        assert fake.weights == servers[0].weights
        order = [
            p for p in fake.paths if p.startswith(("/pause", "/start", "/update_weights", "/fin", "/reset", "/res"))
        ]
        assert order[-6:] == [
            "/pause?mode=wait", "/start_weight_update", "/update_weights", "/finish_weight_update",
            "/reset_prefix_cache", "/resume",
        ]  # fmt: skip
    assert [str(p) for p in r.weights.directory.glob("*/*.safetensors")] == servers[0].files
    assert r.counts == {"resent": 0, "lost": 0, "resynced": 0, "syncs": 1}
    for _ in range(2):  # a second time there is nothing left to do
        r.close()
        assert not r.weights.directory.exists()


def test_adapters_have_a_name_of_their_own_each(tmp_path, fakes):
    (fake,) = fakes()
    network = Policy(lora(policy().model, rank=2, alpha=4, dropout=0.0, targets="all-linear", seed=0), "shared")
    r = rollout(tmp_path, [fake], network)
    (first,), files = fake.adapters, fake.files
    r.sync(network)
    (second,) = fake.adapters
    assert second != first
    assert fake.files is files  # the rest of the weights went once
    assert fake.paths.count("/reset_prefix_cache") == 2
    r.generate([[1]], Sampling(2))
    assert fake.bodies[-1]["model"] == second
    with pytest.raises(ValueError, match="LoRA"):
        r.sync(policy())
    fake.adapters.clear()  # restarted, but for the version of the weights
    r.generate([[1]], Sampling(2))
    assert fake.adapters == [second]
    assert r.counts["resynced"] == 1


def test_server_without_adapters(tmp_path, fakes):
    network = Policy(lora(policy().model, rank=2, alpha=4, dropout=0.0, targets="all-linear", seed=0), "shared")
    with pytest.raises(EngineFailed, match="--enable-lora --max-lora-rank 2"):
        rollout(tmp_path, fakes(lora=False), network)
    assert list(tmp_path.iterdir()) == []


def test_restarted_server_gets_the_weights_again(tmp_path, fakes):
    servers = fakes(2)
    r = rollout(tmp_path, servers)
    ours = servers[1].weights
    servers[1].weights = "default"
    r.generate([[1], [2]], Sampling(2))
    assert servers[1].weights == ours
    assert r.counts == {"resent": 0, "lost": 0, "resynced": 1, "syncs": 0}
    assert servers[1].url in r.said[0]


def test_answers_of_other_weights_do_not_count(tmp_path, fakes):
    """A server that starts again between the look before and the look after has answered with its own weights."""
    (fake,) = fakes()
    r = rollout(tmp_path, [fake])
    ours = fake.weights

    def restart(handler, answer):
        fake.weights = "default"
        send(handler, 200, answer)

    fake.faults.append(("/v1/completions", restart))
    r.generate([[1], [2]], Sampling(2))
    assert fake.weights == ours
    assert len(fake.bodies) == 4
    assert (r.counts["resent"], r.counts["resynced"]) == (2, 1)


def test_update_left_open_by_a_killed_trainer(tmp_path, fakes):
    (fake,) = fakes()
    fake.open, fake.paused = True, True
    rollout(tmp_path, [fake]).generate([[1]], Sampling(2))
    assert not fake.open
    assert not fake.paused


@pytest.mark.parametrize(
    "fault, words",
    [
        (
            lambda h, _: send(h, 500, {"error": {"message": "EngineCore\nis out of   memory"}}),
            "EngineCore is out of mem",
        ),
        (lambda h, _: send(h, 200, {"choices": []}), "an answer that cannot be"),
        (lambda h, _: send(h, 200, [1]), "an answer that cannot be"),
        (lambda h, a: send(h, 200, a, length=10_000), "IncompleteRead"),
        (drop, "RemoteDisconnected"),
        (with_change(token_ids=[1]), "1 tokens with 3 log-probs"),
        (with_change(token_ids=[7, 7], logprobs={"token_logprobs": [-1.0, -1.0]}), "cut after 2 tokens"),
        (with_change(token_ids=[7, 7, 9999]), "tokens that the model does not have"),
        (with_change(token_ids=[7, EOS, 7]), "goes on after the end of its turn"),
        (with_change(finish_reason="stop", stop_reason=5), "which ends no turn"),
        (with_change(finish_reason="abort"), "'abort'"),
        (with_change(prompt_token_ids=[1]), "changed the tokens of the prompt"),
        (with_change(logprobs={"token_logprobs": [None, -1.0, -1.0]}), "log-probs that are none"),
        (with_change(logprobs=None), "an answer that cannot be"),
    ],
)
def test_bad_answer_is_asked_for_again(tmp_path, fakes, fault, words):
    """Once is mended and counted; as often as it is tried ends the call with the server's words."""
    (fake,) = fakes()
    r = rollout(tmp_path, [fake])
    fake.faults += [("/v1/completions", fault)]
    ((c,),) = r.generate([[7]], Sampling(3))
    assert c.token_ids == (7, 7, 7)
    assert r.counts["resent"] == 1
    fake.faults += [("/v1/completions", fault)] * 2
    with pytest.raises(EngineFailed, match=words) as caught:
        r.generate([[7]], Sampling(3))
    assert fake.url in str(caught.value)
    assert "\n" not in str(caught.value)


def test_hang(tmp_path, fakes):
    (fake,) = fakes()
    r = rollout(tmp_path, [fake], request_seconds=0.3, retries=0)
    release = threading.Event()
    fake.faults.append(("/v1/completions", lambda *_: release.wait(20)))
    started = time.monotonic()
    try:
        with pytest.raises(EngineFailed, match=r"rollout.request_seconds=0.3"):
            r.generate([[7]], Sampling(3))
        assert time.monotonic() - started < 5
    finally:
        release.set()


def test_host_stops_a_call_that_waits(tmp_path, fakes):
    """What check raises comes out at once, and the server sees the connection close."""
    (fake,) = fakes()
    release, waiting = threading.Event(), threading.Event()

    def check():
        if waiting.is_set():
            raise KeyboardInterrupt

    def hang(*_):
        waiting.set()
        release.wait(20)

    r = rollout(tmp_path, [fake], check=check, request_seconds=60)
    fake.faults.append(("/v1/completions", hang))
    started = time.monotonic()
    try:
        with pytest.raises(KeyboardInterrupt):
            r.generate([[7], [8]], Sampling(3))
        assert time.monotonic() - started < 5
    finally:
        release.set()
    assert r.counts["lost"] == 0
    waiting.clear()
    assert len(r.generate([[7]], Sampling(3))) == 1


def test_dead_server_leaves_its_requests_to_the_others(tmp_path, fakes):
    servers = fakes(2)
    r = rollout(tmp_path, servers)
    servers[1].close()
    servers[1].close = lambda: None
    out = r.generate([[1], [2], [3]], Sampling(2))
    assert [row[0].token_ids[0] for row in out] == [1, 2, 3]
    assert len(servers[0].bodies) == 3
    assert r.counts["lost"] == 1
    assert servers[1].url in r.said[0]
    assert "refused" in r.said[0]
    r.sync(policy(1))
    assert servers[0].files
    servers[0].close()
    servers[0].close = lambda: None
    with pytest.raises(EngineFailed, match=r"no vLLM server is left .* align.rollout.serve"):
        r.generate([[1]], Sampling(2))
    assert servers[0].url in r.said[-1]
    assert "refused" in r.said[-1]


def test_server_that_tells_no_version_is_lost(tmp_path, fakes):
    (fake,) = fakes()
    r = rollout(tmp_path, [fake])
    fake.faults.append(("/weight_info", lambda h, _: send(h, 200, {"other": 1})))
    with pytest.raises(EngineFailed, match="no vLLM server is left"):
        r.generate([[1]], Sampling(2))
    assert r.said == [f"vLLM server lost: {fake.url}/weight_info: no version (KeyError: 'weight_version')"]


def test_update_that_fails_is_told_and_its_server_not_used(tmp_path, fakes):
    servers = fakes(2)
    r = rollout(tmp_path, servers)
    servers[1].faults.append(("/update_weights", lambda h, _: send(h, 500, {"error": "No such file"})))
    r.sync(policy(1))
    assert servers[1].weights.endswith("-incomplete")
    assert "No such file" in r.said[0]
    r.generate([[1], [2]], Sampling(2))  # it is given them again first
    assert servers[1].weights == servers[0].weights
    assert servers[1].bodies
    for fake in servers:
        fake.faults.append(("/update_weights", lambda h, _: send(h, 500, {"error": "No such file"})))
    with pytest.raises(EngineFailed, match=r"No such file.*must see .*weights-"):
        r.sync(policy(2))


def test_version_that_is_not_taken(tmp_path, fakes):
    (fake,) = fakes()
    r = rollout(tmp_path, [fake])
    fake.faults.append(("/finish_weight_update", lambda h, a: (setattr(fake, "weights", "other"), send(h, 200, a))))
    with pytest.raises(EngineFailed, match="it holds"):
        r.sync(policy(1))
    fake.faults.append(("/reset_prefix_cache", lambda h, _: send(h, 200, {"success": False})))
    with pytest.raises(EngineFailed, match="another trainer"):
        r.sync(policy(1))
    assert fake.weights.endswith("-incomplete")


def test_refused_request(tmp_path, fakes):
    (fake,) = fakes()
    r = rollout(tmp_path, [fake])
    fake.faults.append(("/v1/completions", lambda h, _: send(h, 400, {"error": {"message": "top_p is odd"}})))
    with pytest.raises(ValueError, match=r"top_p is odd"):
        r.generate([[1]], Sampling(2))


def test_too_long(tmp_path, fakes):
    r = rollout(tmp_path, fakes())
    with pytest.raises(ValueError, match=f"prompt 1 has 60 tokens and 5 .* takes {LIMIT} in all.*--max-model-len"):
        r.generate([[1], [1] * 60], Sampling(5))
    r.generate([[1] * 59], Sampling(5))
    with pytest.raises(ValueError, match="without tokens"):
        r.generate([[]], Sampling(5))


@pytest.mark.parametrize(
    "known, words",
    [
        ({"version": "0.33.1"}, "is vLLM 0.33.1 and .* tested with 0.32.*allow_untested_version=true"),
        ({"dev": False}, "VLLM_SERVER_DEV_MODE=1"),
        ({"vocabulary": len(TOKENIZER) - 1}, f"another vocabulary: it refuses token {len(TOKENIZER) - 1}"),
        ({"vocabulary": len(TOKENIZER) + 1}, f"another vocabulary: it takes token {len(TOKENIZER)}"),
    ],
)
def test_unfit_server(tmp_path, fakes, known, words):
    with pytest.raises(ValueError, match=words):
        rollout(tmp_path, fakes(**known))
    assert list(tmp_path.iterdir()) == []


def test_untested_version_on_request(tmp_path, fakes):
    rollout(tmp_path, fakes(version="0.33.1"), allow_untested_version=True).generate([[1]], Sampling(2))


@pytest.mark.parametrize("path", ["/version", "/v1/models"])
def test_another_program_at_the_port(tmp_path, fakes, path):
    (fake,) = fakes()
    fake.faults.append((path, lambda h, _: send(h, 404, {"detail": "Not Found"})))
    with pytest.raises(ValueError, match="is no vLLM server"):
        rollout(tmp_path, [fake])
    fake.faults.append((path, lambda h, _: h.wfile.write(b"SSH-2.0-OpenSSH_9.6\r\n")))
    with pytest.raises(ValueError, match="is it a vLLM server"):
        rollout(tmp_path, [fake])


def test_nobody_at_the_port(tmp_path):
    with socket.socket() as taken:  # bound, so that nobody else listens there meanwhile
        taken.bind(("127.0.0.1", 0))
        port = taken.getsockname()[1]
        with pytest.raises(
            ValueError, match=rf"refused.*python -m align.rollout.serve --model DIRECTORY --port {port}$"
        ):
            rollout(tmp_path, [f"http://127.0.0.1:{port}"])


def test_waits_for_a_server_that_is_starting(tmp_path):
    """Nothing listens at the port at first: what accepts there stands up when the host has been asked twice."""
    fake = Fake()
    fake.close()
    looks = []

    def check():
        looks.append(0)
        if len(looks) == 2:
            fake.listen()

    try:
        r = rollout(tmp_path, [fake], check=check, start_seconds=20)
        assert len(r.generate([[1]], Sampling(2))) == 1
    finally:
        fake.close()


@pytest.mark.parametrize(
    "bad",
    [
        {"urls": []},
        {"urls": "http://127.0.0.1:1"},
        {"urls": ["127.0.0.1:8000"]},
        {"urls": ["https://127.0.0.1:8000"]},
        {"urls": ["http://127.0.0.1"]},
        {"urls": ["http://127.0.0.1:99999"]},
        {"urls": ["http://127.0.0.1:8000/v1"]},
        {"urls": ["http://127.0.0.1:8000", "http://127.0.0.1:8000/"]},
        {"concurrency": 0},
        {"request_seconds": 0},
        {"retries": -1},
    ],
)
def test_impossible_settings(tmp_path, bad):
    with pytest.raises(ValueError, match=rf"rollout\.{next(iter(bad))}"):
        rollout(tmp_path, ["http://127.0.0.1:1"], **bad)


def test_arguments_of_serve():
    words = ["--model", "m", "--port", "1"]
    on_cpu = serve.arguments(words, on_cpu=True)
    assert on_cpu[:4] == words
    assert on_cpu[on_cpu.index("--host") + 1] == "127.0.0.1"
    assert {"--no-enable-chunked-prefill", "--enforce-eager"} <= set(on_cpu)
    on_gpu = serve.arguments([*words, "--host=10.0.0.1", "--enable-lora"], on_cpu=False)
    assert not {"--host", "--no-enable-chunked-prefill", "--enforce-eager"} & set(on_gpu)
    assert "lm_head" not in on_gpu[on_gpu.index("--lora-target-modules") :]
    assert json.loads(on_gpu[on_gpu.index("--weight-transfer-config") + 1]) == {"backend": "align_file"}
    with pytest.raises(ValueError, match="--port is missing"):
        serve.arguments(words[:2], on_cpu=True)
    with pytest.raises(ValueError, match="--generation_config|--generation-config"):
        serve.arguments([*words, "--generation_config=auto"], on_cpu=True)
    assert serve.environment(["--enable-lora"], on_cpu=False)["VLLM_ALLOW_RUNTIME_LORA_UPDATING"] == "True"
    assert serve.environment([], on_cpu=False)["VLLM_SERVER_DEV_MODE"] == "1"
