"""The HTTP component against a real server on this machine."""

from __future__ import annotations

import json
import math
import socket
import threading
import time
from http.server import BaseHTTPRequestHandler

import numpy as np
import pytest

from align.rewards.base import Conversation
from align.rewards.build import RewardHost, components
from tests.rewards.http_server import serving


@pytest.fixture
def server():
    """A server that answers by `server.replies` in turn, the last one for good; requests stand in `server.seen`."""
    done = threading.Event()

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self):
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            http.seen.append((self.path, dict(self.headers), body))
            reply = http.replies.pop(0) if len(http.replies) > 1 else http.replies[0]
            status, out = reply(body["conversations"]) if callable(reply) else reply
            if out == "hang":
                done.wait(30)
                return
            self.send_response(status)
            if out == "drip":  # a byte now and then, for ever
                self.end_headers()
                while not done.wait(0.05):
                    self.wfile.write(b" ")
                    self.wfile.flush()
                return
            self.end_headers()
            self.wfile.write(out if isinstance(out, bytes) else json.dumps(out).encode())

        def log_message(self, *_):
            pass

    with serving(Handler) as http:
        http.seen = []
        http.replies = [lambda c: (200, {"scores": [len(x["completion"]) for x in c]})]
        yield http
        done.set()


def make(server, check=lambda: None, lines=None, **keys):
    node = {
        "_target_": "align.rewards.remote.RemoteReward",
        "url": f"http://127.0.0.1:{server.server_port}/score?v=1",
        "seconds": 5.0,
        "batch_size": 2,
        "retries": 0,
        "backoff_s": 0.0,
        "token_variable": None,
    }
    say = (lambda line: None) if lines is None else lines.append
    return components({"r": node | keys}, RewardHost(check=check, say=say))


def said(*completions: str) -> list[Conversation]:
    return [Conversation("p", c, True, fields={"answer": 3}) for c in completions]


def test_posts_in_batches_and_keeps_the_order(server, monkeypatch):
    monkeypatch.setenv("MY_TOKEN", "abc")
    messages = ({"role": "user", "content": "p"},)
    rows = [Conversation("p", "xyz", False, messages, fields={"answer": 3}), *said("a", "")]
    scores = make(server, token_variable="MY_TOKEN").score(rows)
    assert scores[:, 0].tolist() == [3.0, 1.0, 0.0]
    assert [len(body["conversations"]) for _, _, body in server.seen] == [2, 1]
    path, headers, body = server.seen[0]
    assert (path, headers["Authorization"]) == ("/score?v=1", "Bearer abc")
    assert body["conversations"][0] == {
        "prompt": "p", "completion": "xyz", "messages": list(messages), "finished": False, "fields": {"answer": 3}
    }  # fmt: skip


@pytest.mark.parametrize(
    "reply, reason",
    [
        ((500, {"error": "broken"}), "http_500"),
        ((404, {}), "http_404"),
        ((302, {}), "http_302"),
        ((200, b"no json"), "bad_answer"),
        ((200, [1.0, 2.0]), "bad_answer"),
        ((200, {"score": [1.0, 2.0]}), "bad_answer"),
        ((200, {"scores": [1.0]}), "wrong_shape"),
        ((200, {"scores": 1.0}), "wrong_shape"),
        ((200, {"scores": [[1.0], [2.0]]}), "wrong_shape"),
        ((200, {"scores": [None, None]}), "none"),
        ((200, {"scores": ["1", "2"]}), "not_a_number"),
        ((200, b'{"scores": [Infinity, 1e999]}'), "inf"),
        ((200, b'{"scores": [NaN, NaN]}'), "nan"),
        ((200, b'{"scores": [1, 2], "x": "' + b"y" * (2 << 20) + b'"}'), "bad_answer"),
    ],
)
def test_what_is_no_score_is_nan_and_counted(server, reply, reason):
    server.replies = [reply]
    lines: list[str] = []
    rewards = make(server, lines=lines)
    assert np.isnan(rewards.score(said("a", "b"))).all()
    assert rewards.counts == {f"r/{reason}": 2}
    assert len(lines) == 1
    assert "\n" not in lines[0]
    server.replies = [(200, {"scores": [1.0, 2.0]})]
    assert rewards.score(said("a", "b"))[:, 0].tolist() == [1.0, 2.0]


def test_one_bad_number_costs_its_own_completion_only(server):
    server.replies = [(200, {"scores": [None, 2.5]})]
    scores = make(server).score(said("a", "b"))[:, 0].tolist()
    assert math.isnan(scores[0])
    assert scores[1] == 2.5


def test_repeats_what_may_succeed_the_next_time_and_counts_it(server):
    server.replies = [(503, {}), (429, {}), (200, {"scores": [1.0]})]
    rewards = make(server, retries=2)
    assert rewards.score(said("a"))[:, 0].tolist() == [1.0]
    assert rewards.counts == {"r/retried": 2}
    server.replies = [(400, {})]
    server.seen.clear()
    assert np.isnan(rewards.score(said("a"))).all()
    assert len(server.seen) == 1  # a wrong request is not sent again
    server.replies = [(500, {})]
    server.seen.clear()
    assert np.isnan(rewards.score(said("a"))).all()
    assert len(server.seen) == 3
    assert rewards.counts == {"r/retried": 4, "r/http_400": 1, "r/http_500": 1}


@pytest.mark.parametrize("how", ["hang", "drip"])
def test_a_server_that_does_not_come_to_an_end_meets_the_deadline(server, how):
    server.replies = [(200, how)]
    ticks: list[float] = []
    rewards = make(server, check=lambda: ticks.append(time.monotonic()), seconds=0.5)
    start = time.monotonic()
    assert np.isnan(rewards.score(said("a"))).all()
    assert 0.5 <= time.monotonic() - start < 5
    assert rewards.counts == {"r/timeout": 1}
    assert len(ticks) >= 2
    assert max(np.diff(ticks)) < 1.0


def test_a_signal_ends_the_wait(server):
    server.replies = [(200, "hang")]

    def check():
        if server.seen:
            raise InterruptedError("a signal came")

    with pytest.raises(InterruptedError):
        make(server, check=check).score(said("a"))


def test_nobody_there():
    with socket.socket() as taken:  # a port that nobody listens on
        taken.bind(("127.0.0.1", 0))
        node = {"_target_": "align.rewards.remote.RemoteReward", "url": f"http://127.0.0.1:{taken.getsockname()[1]}",
                "batch_size": 8, "retries": 1, "backoff_s": 0.01, "token_variable": None}  # fmt: skip
        rewards = components({"r": node}, RewardHost())
        assert np.isnan(rewards.score(said("a", "b"))).all()
    assert rewards.counts == {"r/retried": 1, "r/unreachable": 2}


@pytest.mark.parametrize(
    "keys, message",
    [
        ({"url": "127.0.0.1:80"}, "must begin with http"),
        ({"url": "http://a:port"}, "Port could not be cast"),
        ({"batch_size": 0}, "must be at least 1"),
        ({"token_variable": "NO_SUCH_VARIABLE_HERE"}, "no such environment variable"),
        ({"wrong": 1}, "unexpected keyword argument 'wrong'"),
    ],
)
def test_wrong_settings(server, keys, message):
    with pytest.raises(ValueError, match=message) as raised:
        make(server, **keys)
    assert str(raised.value).startswith("reward.r: ")
