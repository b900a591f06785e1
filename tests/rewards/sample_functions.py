"""Rewards as users write them, good and bad; imported in worker processes only."""

# The names of the parameters are what is tested:
# ruff: noqa: ARG001, ARG002

from __future__ import annotations

import os
import signal
import sys
import time

import numpy as np


def length(completion):
    return len(completion)


def with_prompt(prompt, completion, finished, answer, bonus=0.5):
    return (completion == answer) + bonus * finished + 10 * len(prompt)


def trl(prompts, completions, **columns):
    return [float(a) - len(c) + len(p) for p, c, a in zip(prompts, completions, columns["answer"], strict=True)]


def trl_names(completions, answer, finished, completion_ids, level=None, **kwargs):
    assert "answer" not in kwargs
    assert "level" not in kwargs
    return [
        len(ids) + 10 * f + 100 * (level or [0])[0] + len(kwargs)
        for ids, f in zip(completion_ids, finished, strict=True)
    ]


def of_conversations(conversations):
    return np.array([len(c.token_ids) + len(c.messages or ()) for c in conversations], dtype=np.float32)


def with_keys(completion, scale, shift=0.0):
    return len(completion) * scale + shift


class Counter:
    """Counts its calls: made once."""

    def __init__(self, start=0):
        self.calls = start

    def __call__(self, completion):
        self.calls += 1
        return self.calls


class Here:
    """Runs in the trainer's process."""

    in_process = True

    def __init__(self, host, factor):
        self.factor = factor
        self.pid = os.getpid()
        self.counts = {}

    def __call__(self, conversations):
        return np.array([float(self.pid * self.factor)] * len(conversations))

    def close(self):
        pass


def act(completion):
    """What the completion says."""
    if completion == "raise":
        raise RuntimeError("no\nidea " + "x" * 10_000_000)
    if completion == "spin":
        while True:
            pass
    if completion == "sleep":
        time.sleep(1000)
    if completion == "die":
        os.kill(os.getpid(), signal.SIGKILL)
    if completion == "exit":
        os._exit(3)
    if completion == "sysexit":
        sys.exit(3)
    if completion == "print":
        print("printed", flush=True)
        os.write(1, b'{"value": 7}\n' * 100_000)
        return 1.0
    values = {
        "none": None, "text": "1.0", "list": [1.0], "huge": 10**400, "inf": float("inf"), "nan": float("nan"),
        "numpy": np.float32(0.5), "true": True, "string": "y" * 10_000_000, "array": np.array([1.0, 2.0]),
    }  # fmt: skip
    return values.get(completion, float(len(completion)))


def act_all(completions):
    return [act(c) for c in completions]


def too_few(completions):
    return [1.0] * (len(completions) - 1)


def too_many(completions):
    return list(range(1_000_000))


def single(completions):
    return 1.0


def column(completions):
    return np.zeros((len(completions), 1))


def reads_input(completion):
    return float(input())


def both(completion, completions):
    return 0.0


def neither(finished, answer):
    return 0.0


async def later(completion):
    return 0.0


not_callable = 3
