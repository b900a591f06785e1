"""Small real parts that many tests share: no mocks, no network."""

from __future__ import annotations

import gc
import os
from collections.abc import Iterable
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import numpy as np
import pytest
import torch

from align.objectives.preference import DPO
from align.types import Example, Prompt, Row

torch.set_num_threads(1)

VOCABULARY = 96


def pytest_collection_modifyitems(config, items) -> None:
    """With workers: what waits for Slurm, groups, what is slow; the many small tests fill up what is left."""

    def turn(item) -> int:
        if item.get_closest_marker("slurm"):
            return -1
        return 0 if item.get_closest_marker("xdist_group") else 1 if item.get_closest_marker("slow") else 2

    if getattr(config.option, "loadgroup", False):
        items.sort(key=turn)


def pytest_collection_finish() -> None:
    """All that was imported stays: the garbage collector need not look through it again and again."""
    gc.collect()
    gc.freeze()


def mostly_slow(cases: Iterable[Any], *fast: int) -> list[Any]:
    """Parameters of one test: those at these places are among the fast ones, the others only in the whole suite."""
    rows = [case if isinstance(case, tuple) else (case,) for case in cases]
    return [pytest.param(*row, marks=[] if k in fast else pytest.mark.slow) for k, row in enumerate(rows)]


def plain_dpo(beta, loss, f_divergence="reverse_kl", f_alpha=None, ld_alpha=None) -> DPO:
    """DPO without its variants, as configs/objective/dpo.yaml has it, but for what a test asks for."""
    return DPO(beta, loss, f_divergence, f_alpha, ld_alpha)


@pytest.fixture
def rng() -> np.random.Generator:
    """A seeded generator: the same data in each run."""
    return np.random.default_rng(0)


def pair_of(chosen: Row, rejected: Row, source: str = "random:1", origin: str = "") -> Example:
    """A pair whose prompt ends before the first target of chosen."""
    ids = chosen.token_ids[: int(np.argmax(chosen.targets))].tolist()
    return Example((chosen, rejected), source, Prompt(tuple(ids), ""), origin)


def random_pair(rng: np.random.Generator, prompt=(1, 12), completion=(1, 15), shared_answer=0) -> Example:
    """A pair of random tokens; `shared_answer` completion tokens are common to both sequences."""
    p = rng.integers(0, VOCABULARY, rng.integers(*prompt) + 1)
    common = rng.integers(0, VOCABULARY, shared_answer)

    def row() -> Row:
        own = rng.integers(0, VOCABULARY, rng.integers(*completion))
        ids = np.concatenate([p, common, own]).astype(np.int32)
        targets = np.arange(len(ids)) >= len(p)
        return Row(ids, targets)

    return pair_of(row(), row(), source="random:1", origin="random")


@pytest.fixture
def make_pairs(rng):
    """A function n -> n random pairs of different lengths, some branching late, some with observation holes."""

    def make(n: int) -> list[Example]:
        pairs = []
        for i in range(n):
            pair = random_pair(rng, shared_answer=int(rng.integers(0, 4)) if i % 2 else 0)
            if i % 3 == 2:  # a hole: a token the policy did not write
                holes = [row.targets.copy() for row in (pair.rows[0], pair.rows[1])]
                for hole in holes:
                    hole[len(hole) // 2] = False
                pair = pair_of(
                    Row(pair.rows[0].token_ids, holes[0]), Row(pair.rows[1].token_ids, holes[1]), f"random:{i}", "holes"
                )
            pairs.append(pair)
        return pairs

    return make


def gpt_oss(**more):
    """A model with attention sinks, of the size of a trained model's."""
    more = {"head_dim": 8, "num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": 8} | more
    model = tiny_model("gpt_oss", torch.float32, **more)  # its experts know no float64
    with torch.no_grad():
        for layer in model.model.layers:
            layer.self_attn.sinks.fill_(2.0)
    return model


def tiny_model(family: str, dtype=torch.float64, seed: int = 0, **overrides):
    """A random two-layer model of a real transformers class."""
    from transformers import CONFIG_MAPPING, AutoModelForCausalLM

    common = dict(
        vocab_size=VOCABULARY, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=256, tie_word_embeddings=True,
        bos_token_id=1, eos_token_id=2, pad_token_id=0, initializer_range=0.3,
    )  # fmt: skip
    common |= {"gemma2": dict(head_dim=8, sliding_window=8), "mistral": dict(sliding_window=8)}.get(family, {})
    config = CONFIG_MAPPING[family](**(common | overrides))
    torch.manual_seed(seed)
    # transformers would take SDPA for Gemma 2, which ignores its cap of scores
    own = {"attn_implementation": "eager"} if family == "gemma2" else {}
    if "attn_implementation" in overrides:
        own = {"attn_implementation": overrides["attn_implementation"]}
    return AutoModelForCausalLM.from_config(config, dtype=dtype, **own).eval()
