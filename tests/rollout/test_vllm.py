"""A real vLLM engine on the CPU against the policy itself. Engines are slow to start: tests of a module share them,
and those that end one come last."""

from __future__ import annotations

import contextlib
import copy
import os
import signal
import subprocess
import sys
import textwrap
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from align.models.policy import Policy, lora, own_attention
from align.models.pretrained import byte_tokenizer
from align.rollout.base import Host, Sampling
from align.rollout.hf import HFRollout
from align.rollout.vllm import EngineFailed, VLLMRollout
from tests.rollout.test_vllm_client import settings

pytestmark = [pytest.mark.vllm, pytest.mark.xdist_group("vllm")]  # one engine for all

TOKENIZER = byte_tokenizer()
TOLERANCE = 1e-4  # nats; float32 on both sides, differences measured below 2e-5
LONG = [(7 * k) % 250 for k in range(200)]  # more than a block of the engine's cache (128 tokens on a CPU)


def tiny_policy():
    """Heads of 32, the smallest that vLLM computes on a CPU; tied, so that the head has no weight of its own."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=len(TOKENIZER), hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, max_position_embeddings=1024, tie_word_embeddings=True, initializer_range=0.3,
        bos_token_id=TOKENIZER.bos_token_id, eos_token_id=TOKENIZER.eos_token_id, pad_token_id=TOKENIZER.pad_token_id,
    )  # fmt: skip
    torch.manual_seed(0)
    return Policy(LlamaForCausalLM(config).float(), "shared")


class Side:
    """A policy with both of its backends, and a hook that runs whenever the trainer waits."""

    def __init__(self, policy, directory):
        self.hook = lambda: None
        host = Host(policy, TOKENIZER, directory, "float32", check=lambda: self.hook())
        self.policy = policy
        self.hf = HFRollout(host, batch_size=16)
        keys = settings(cpu_kv_cache_gib=0.25, max_num_seqs=64, threads=1, max_model_len=768)
        self.vllm = VLLMRollout(host, **keys)


@pytest.fixture(scope="module")
def full(tmp_path_factory):
    side = Side(tiny_policy(), tmp_path_factory.mktemp("full"))
    yield side
    side.vllm.close()


def prompts(rng, n):
    return [rng.integers(0, 256, rng.integers(3, 40)).tolist() for _ in range(n)]


def tokens(told):
    return [[c.token_ids for c in row] for row in told]


def train(policy, seed, scale=0.05, only=""):
    """Move the weights, as an optimiser would."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in policy.named_parameters():
            if only in name:
                p += scale * torch.randn(p.shape, generator=generator)


def largest_difference(side, asked, told):
    """Between the log-probs that the engine told of what it drew and those of the policy, nats per token."""
    pairs = [(list(p) + list(c.token_ids), len(p), c.logps) for p, row in zip(asked, told, strict=True) for c in row]
    expected = side.hf.logps([s for s, _, _ in pairs], [n for _, n, _ in pairs])
    return max(float(np.abs(np.subtract(logps, e)).max()) for (_, _, logps), e in zip(pairs, expected, strict=True))


def test_greedy_tokens_are_the_policys(full, rng):
    asked = [*prompts(rng, 6), LONG]
    sampling = Sampling(24, temperature=0.0)
    told = full.vllm.generate(asked, sampling)
    expected = full.hf.generate(asked, sampling)
    assert tokens(told) == tokens(expected)
    assert [[c.stop for c in row] for row in told] == [[c.stop for c in row] for row in expected]
    assert largest_difference(full, asked, told) < TOLERANCE


def test_log_probs_are_the_policys_at_temperature_one(full, rng):
    asked = prompts(rng, 5)
    told = full.vllm.generate(asked, Sampling(20, temperature=0.7, top_p=0.9, top_k=50, seed=3), 3)
    assert largest_difference(full, asked, told) < TOLERANCE
    sequences = [*(p + list(c.token_ids) for p, row in zip(asked, told, strict=True) for c in row), LONG]
    starts = [1 + k % 3 for k in range(len(sequences))]
    for a, b in zip(full.vllm.logps(sequences, starts), full.hf.logps(sequences, starts), strict=True):
        np.testing.assert_allclose(a, b, atol=TOLERANCE)
    assert full.vllm.logps([[1, 2, 3]], [3]) == [[]]


def test_draws_depend_on_seed_place_and_number_alone(full, rng):
    asked = prompts(rng, 6)
    sampling = Sampling(20, temperature=1.3, top_p=0.95, seed=5)
    together = full.vllm.generate(asked, sampling, 3, greedy=True)
    assert tokens(full.vllm.generate(asked, sampling, 3, greedy=True)) == tokens(together)
    alone = full.vllm.generate(asked[:1], sampling, 2)
    assert tokens(alone)[0] == tokens(together)[0][:2]
    drawn = {c.token_ids for row in together for c in row[:3]}
    assert len(drawn) == 18
    assert tokens(full.vllm.generate(asked[:1], replace(sampling, seed=6)))[0][0] not in drawn
    # the same prompt at another place is another draw
    assert len({row[0].token_ids for row in full.vllm.generate([asked[0]] * 4, sampling)}) == 4
    # and the twin is greedy
    likeliest = full.hf.generate(asked, replace(sampling, temperature=0.0))
    assert [row[3].token_ids for row in together] == [row[0].token_ids for row in likeliest]


def test_ends(full, rng, monkeypatch):
    asked = prompts(rng, 6)
    sampling = Sampling(40, temperature=0.0)

    def ending_at(*ids):
        for rollout in (full.hf, full.vllm):
            monkeypatch.setattr(rollout, "stops", sorted(ids))

    ending_at(TOKENIZER.pad_token_id)  # never written
    free = full.vllm.generate(asked, sampling)
    assert {(len(row[0].token_ids), row[0].stop) for row in free} == {(40, "length")}
    stop = free[0][0].token_ids[5]
    text = next(  # of two tokens, so that it is complete at the second only
        t for row in free[1:] for k in range(8, 30)
        if "\ufffd" not in (t := TOKENIZER.decode(row[0].token_ids[k : k + 2])) and len(t) == 2
    )  # fmt: skip
    ending_at(TOKENIZER.pad_token_id, stop)
    sampling = replace(sampling, stop=("never there", text))
    told = full.vllm.generate(asked, sampling)
    expected = full.hf.generate(asked, sampling)
    assert tokens(told) == tokens(expected)
    assert [row[0].stop for row in told] == [row[0].stop for row in expected]
    assert {"end", "string"} <= {row[0].stop for row in told}
    assert told[0][0].token_ids[-1] == stop
    assert all(len(row[0].logps) == len(row[0].token_ids) for row in told)


def test_an_over_long_prompt_is_refused_and_the_engine_lives_on(full):
    longest = [5] * (768 - 4)
    assert len(full.vllm.generate([longest], Sampling(4, temperature=0.0))[0][0].token_ids) == 4
    with pytest.raises(ValueError, match="prompt 0 has 765 tokens and 4 more .* takes 768 in all"):
        full.vllm.generate([[*longest, 5]], Sampling(4))
    assert full.vllm.counts["restarts"] == 0


def test_many_long_prompts_with_seeds_of_their_own(full):
    """Together more tokens than a step of the engine takes: split prompts would crash its generators on a CPU."""
    asked = [[k % 250, *LONG, *LONG, *LONG] for k in range(12)]
    told = full.vllm.generate(asked, Sampling(3, seed=1), 2)
    assert largest_difference(full, asked, told) < TOLERANCE


def test_after_each_sync_the_weights_are_the_policys_and_no_prefix_is_old(full):
    sampling = Sampling(12, temperature=0.0)
    for update in range(3):
        stale = tokens(full.vllm.generate([LONG], sampling))  # twice: the second from the cache
        assert tokens(full.vllm.generate([LONG], sampling)) == stale
        train(full.policy, seed=update)
        full.vllm.sync(full.policy)
        for _ in range(2):
            told = full.vllm.generate([LONG], sampling)
            assert tokens(told) == tokens(full.hf.generate([LONG], sampling))
            assert largest_difference(full, [LONG], told) < TOLERANCE
    assert full.vllm.counts["syncs"] == 3


def test_a_prefix_cache_that_is_not_emptied_would_be_seen(full):
    """What the test above is worth: the same without emptying the cache is off by far more than it allows."""
    sampling = Sampling(12, temperature=0.0)
    full.vllm.generate([LONG], sampling)
    train(full.policy, seed=10)
    full.vllm._sync(full.policy, reset=False)
    assert largest_difference(full, [LONG], full.vllm.generate([LONG], sampling)) > 0.1
    full.vllm.sync(full.policy)
    assert largest_difference(full, [LONG], full.vllm.generate([LONG], sampling)) < TOLERANCE


def test_a_killed_engine_is_replaced_by_one_that_draws_the_same(full, rng):
    """The new engine was started on the files of the last sync: what it draws shows that an update of a living engine
    leaves the weights that a fresh one has."""
    asked = [LONG, *prompts(rng, 7)]
    sampling = Sampling(300, temperature=1.0, seed=4)
    before = full.vllm.generate(asked, sampling, 2)
    process = full.vllm._engine.process
    train(full.policy, seed=20)  # the policy goes on; the engine has not been told
    waits = 0

    def kill():
        nonlocal waits
        waits += 1
        if waits == 2:  # the request is sent
            os.kill(process.pid, signal.SIGKILL)

    full.hook = kill
    after = full.vllm.generate(asked, sampling, 2)
    full.hook = lambda: None
    assert waits > 2
    assert process.poll() == -signal.SIGKILL
    assert tokens(after) == tokens(before)
    for a, b in zip(before, after, strict=True):
        np.testing.assert_allclose(a[0].logps, b[0].logps, atol=TOLERANCE)
    assert full.vllm.counts["restarts"] == 1
    assert full.vllm.counts["resent"] == 16
    full.vllm.sync(full.policy)
    assert largest_difference(full, asked[:1], full.vllm.generate(asked[:1], Sampling(8))) < TOLERANCE


def test_an_update_that_lacks_a_weight_is_refused(full, tmp_path):
    """vLLM itself would keep the old values, with a warning in its log."""
    from safetensors.torch import load_file, save_file

    state = load_file(full.vllm._weights / "model.safetensors")
    del state["model.norm.weight"]
    save_file(state, tmp_path / "part.safetensors")
    message = {"do": "update", "version": "9", "reset": True, "chunks": [{"path": str(tmp_path / "part.safetensors")}]}
    with pytest.raises(EngineFailed, match="1 weights were not in the update, the first is model.norm.weight"):
        full.vllm._exchange(message, 60, "sync_seconds")


@torch.no_grad()
def exact_logps(policy: Policy, asked: list[list[int]]) -> list[list[float]]:
    """Log-probs of all tokens but the first, by the model's own attention in float64."""
    wide = copy.deepcopy(policy.causal_lm).double()
    out = []
    with own_attention(wide):
        for ids in asked:
            told = wide(torch.tensor([list(ids)])).logits[0, :-1].log_softmax(-1)
            out.append(told.gather(1, torch.tensor(ids)[1:, None])[:, 0].tolist())
    return out


def test_adapters_are_swapped_and_a_hung_engine_is_replaced(tmp_path, rng):
    policy = tiny_policy()
    adapted = Policy(lora(policy.causal_lm, rank=4, alpha=16.0, dropout=0.0, targets="all-linear", seed=0), "shared")
    side = Side(adapted, tmp_path)
    try:
        asked = [LONG, *prompts(rng, 3)]
        sampling = Sampling(12, temperature=0.0)
        seen = [tokens(side.vllm.generate(asked, sampling))]
        assert seen[0] == tokens(side.hf.generate(asked, sampling))
        for update in range(3):
            train(adapted, seed=update, scale=0.1, only="lora_")
            side.vllm.sync(adapted)
            told = side.vllm.generate(asked, sampling)
            assert tokens(told) == tokens(side.hf.generate(asked, sampling))
            assert largest_difference(side, asked, told) < TOLERANCE
            ones = [1] * len(asked)  # several at once: vLLM's LoRA head cannot do that, ours is left out of it
            # against float64: with random adapters the two float32 results lie on either side of it; their rounding
            # grows with the log-prob, and is another one on another processor: up to 1.3e-4 at 10.6 nats was seen
            for ours, exact in zip(side.vllm.logps(asked, ones), exact_logps(adapted, asked), strict=True):
                np.testing.assert_allclose(ours, exact, rtol=2e-5, atol=TOLERANCE)
            seen.append(tokens(told))
        assert all(a != b for a, b in zip(seen, seen[1:], strict=False))

        process = side.vllm._engine.process
        side.vllm.request_seconds = 5.0
        os.kill(process.pid, signal.SIGSTOP)
        told = side.vllm.generate(asked, sampling)
        assert process.poll() == -signal.SIGKILL
        assert tokens(told) == seen[-1]
        assert largest_difference(side, asked, told) < TOLERANCE
        assert side.vllm.counts == {"restarts": 1, "resent": 4, "syncs": 3}
    finally:
        side.vllm.close()


TRAINER = textwrap.dedent("""
    import sys
    from pathlib import Path
    from align.rollout.base import Sampling
    from tests.rollout.test_vllm import LONG, Side, tiny_policy

    side = Side(tiny_policy(), Path(sys.argv[1]))
    side.vllm.sync(side.policy)
    print("engine", side.vllm._engine.process.pid, side.vllm._scratch.path, flush=True)
    side.hook = lambda: print("engine works", flush=True)
    while True:
        side.vllm.generate([LONG] * 64, Sampling(500))
""")


def test_the_engine_does_not_outlive_a_killed_trainer(tmp_path):
    root = Path(__file__).parents[2]
    trainer = subprocess.Popen(
        [sys.executable, "-c", TRAINER, str(tmp_path)], cwd=root, stdout=subprocess.PIPE, text=True
    )
    try:
        told = (line for line in trainer.stdout if line.startswith("engine"))  # libraries print too
        _, pid, scratch = next(told).split()
        for _ in range(3):
            assert next(told) == "engine works\n"  # in the middle of a batch
        assert Path(scratch, "model").is_dir()
        os.kill(int(pid), 0)
        trainer.kill()
        deadline = time.monotonic() + 30
        with contextlib.suppress(ProcessLookupError, FileNotFoundError):
            while time.monotonic() < deadline and not _is_zombie(int(pid)):
                os.kill(int(pid), 0)
                time.sleep(0.05)
        assert time.monotonic() < deadline, "the engine lives on"
        assert not Path(scratch).exists()
    finally:
        trainer.kill()
        trainer.wait()


def _is_zombie(pid):
    """Whether it has ended and nobody took note: its parent is dead, and not every container's first process reaps."""
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
