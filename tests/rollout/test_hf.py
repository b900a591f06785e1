"""HFRollout against the network itself: what it draws, with what probability, and what it may not depend on."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from align.models.policy import Policy, lora, own_attention
from align.models.pretrained import byte_tokenizer, smollm2
from align.rollout.base import Host, Sampling
from align.rollout.hf import HFRollout, _common, _cuts, _draw, _StopTexts, _uniform
from tests.conftest import gpt_oss, tiny_model

TOKENIZER = byte_tokenizer()
EOS = TOKENIZER.eos_token_id


def policy(family="llama", **overrides):
    # stock Gemma 2 rounds its mask to -inf in float64, and rows that start with padding to nan
    dtype = torch.float32 if family == "gemma2" else torch.float64
    ids = {"bos_token_id": TOKENIZER.bos_token_id, "eos_token_id": EOS, "pad_token_id": TOKENIZER.pad_token_id}
    lm = tiny_model(family, dtype=dtype, vocab_size=len(TOKENIZER), **ids, **overrides)
    return Policy(lm, "shared")


def host(network, **more):
    return Host(network, TOKENIZER, Path("unused"), "float32", **more)


def rollout(family="llama", batch_size=8, **overrides):
    return HFRollout(host(policy(family, **overrides)), batch_size=batch_size)


def prompts(rng, n, shared=5):
    head = rng.integers(0, 256, shared).tolist()
    return [head + rng.integers(0, 256, rng.integers(1, 12)).tolist() for _ in range(n)]


@torch.no_grad()
def logits(r, ids):
    with own_attention(r.policy.causal_lm):
        return r.policy.causal_lm(torch.tensor([list(ids)])).logits[0]


@pytest.mark.parametrize("family", ["llama", "mistral", "gemma2", "qwen2"])
@pytest.mark.parametrize("shared", [0, 7])
def test_greedy_is_the_argmax_of_full_forwards(family, shared, rng):
    r = rollout(family)
    asked = prompts(rng, 5, shared)
    for prompt, (c,) in zip(asked, r.generate(asked, Sampling(20, temperature=0.0)), strict=True):
        whole = logits(r, prompt + list(c.token_ids))[len(prompt) - 1 : -1]
        assert whole.argmax(-1).tolist() == list(c.token_ids)
        expected = whole.log_softmax(-1).gather(1, torch.tensor(c.token_ids)[:, None])[:, 0]
        # the picker sees logits in float32
        np.testing.assert_allclose(c.logps, expected, atol=1e-5)
        assert c.stop == ("end" if c.token_ids[-1] == EOS else "length")
        assert EOS not in c.token_ids[:-1]


@pytest.mark.parametrize("family", ["llama", "mistral"])
def test_a_row_does_not_depend_on_its_batch(family, rng):
    asked = prompts(rng, 9)
    sampling = Sampling(24, temperature=0.9, top_p=0.9, top_k=40, seed=3)
    together = rollout(family, batch_size=64).generate(asked, sampling, 3)
    alone = rollout(family, batch_size=1).generate(asked, sampling, 3)
    assert [[c.token_ids for c in row] for row in together] == [[c.token_ids for c in row] for row in alone]
    # the first prompts of a longer call are the same draws; so are fewer samples of each
    fewer = rollout(family, batch_size=5).generate(asked[:4], sampling, 2)
    assert [[c.token_ids for c in row] for row in fewer] == [[c.token_ids for c in row[:2]] for row in together[:4]]
    # and a smaller limit is a beginning
    shorter = rollout(family, batch_size=5).generate(asked, Sampling(9, 0.9, 0.9, 40, seed=3), 3)
    assert [c.token_ids for row in shorter for c in row] == [c.token_ids[:9] for row in together for c in row]


def test_samples_differ_by_seed_prompt_and_number():
    keys = [(i, k) for i in range(3) for k in range(3)]
    numbers = torch.cat([_uniform(Sampling(12, seed=seed), keys) for seed in (0, 1)])
    assert len(numbers.flatten().unique()) == 2 * 9 * 12
    drawn = rollout().generate([[5, 6, 7]] * 3, Sampling(12, seed=0), 3)
    assert len({c.token_ids for row in drawn for c in row}) > 6  # a few may end at once


def test_global_generators_mode_and_settings_are_left_alone():
    r = rollout()
    lm = r.policy.causal_lm
    lm.generation_config.repetition_penalty = 5.0
    before, attention = lm.generation_config, lm.config._attn_implementation
    r.policy.train()
    torch.manual_seed(0)
    np.random.seed(0)
    state = torch.get_rng_state()
    r.generate([[5, 6]], Sampling(4), 2)
    assert torch.equal(torch.get_rng_state(), state)
    assert r.policy.training
    assert lm.generation_config is before
    assert lm.config._attn_implementation == attention


def test_the_models_own_generation_settings_do_not_bend_what_is_drawn(rng):
    """Instruct models ship a repetition penalty: with it, greedy would not be the policy's argmax."""
    asked = prompts(rng, 3)
    plain, bent = rollout(), rollout()
    lm = bent.policy.causal_lm
    lm.generation_config.update(repetition_penalty=5.0, do_sample=True, temperature=0.1, top_k=1, min_new_tokens=5)
    sampling = Sampling(16, seed=1)
    assert plain.generate(asked, sampling) == bent.generate(asked, sampling)


def test_every_stop_token_of_the_generation_config_ends_a_row(rng):
    r = rollout()
    asked = prompts(rng, 4)
    free = r.generate(asked, Sampling(20, temperature=0.0))
    other = free[0][0].token_ids[2]
    lm = r.policy.causal_lm
    lm.generation_config.eos_token_id = [EOS, other]
    ended = HFRollout(host(r.policy), batch_size=8).generate(asked, Sampling(20, temperature=0.0))
    for a, b in zip(free, ended, strict=True):
        ids = list(a[0].token_ids)
        cut = ids[: ids.index(other) + 1] if other in ids else ids
        assert list(b[0].token_ids) == cut
        assert b[0].finished == (cut[-1] in (EOS, other))


def test_stop_texts(rng):
    r = rollout()
    asked = prompts(rng, 6)
    free = r.generate(asked, Sampling(40, temperature=1.0, seed=2))
    text = TOKENIZER.decode(free[1][0].token_ids[18:21])
    assert "\ufffd" not in text, "the test needs a seed whose bytes are text"
    stopped = r.generate(asked, Sampling(40, temperature=1.0, seed=2, stop=("never there", text)))
    assert stopped[1][0].stop == "string"
    for a, b in zip(free, stopped, strict=True):
        whole, cut = TOKENIZER.decode(a[0].token_ids), TOKENIZER.decode(b[0].token_ids)
        assert a[0].token_ids[: len(b[0].token_ids)] == b[0].token_ids
        if text in whole:
            assert cut.endswith(text)
            assert cut.count(text) == 1
            assert len(b[0].logps) == len(b[0].token_ids)
        else:
            assert a == b


def test_the_token_that_completes_a_stop_text_is_kept_whole():
    tokenizer = smollm2().tokenizer()
    ids = tokenizer("say this: ````python", add_special_tokens=False).input_ids
    at = _StopTexts(tokenizer, ("```p",), 0, {0})
    done = [bool(at(torch.tensor([ids[: n + 1]]), None)[0]) for n in range(len(ids))]
    assert done.index(True) == len(ids) - 1
    assert at.lengths == {0: len(ids)}


def test_a_model_answers_in_the_attention_that_it_was_loaded_with(rng):
    """Transformers' SDPA would drop these sinks without a word."""
    ids = dict(vocab_size=len(TOKENIZER), eos_token_id=EOS, pad_token_id=EOS)
    lm = gpt_oss(**ids)
    asked = prompts(rng, 1)
    tokens = torch.tensor(asked)
    with torch.no_grad():
        expected = lm(tokens).logits[0, :-1].log_softmax(-1).gather(1, tokens[0, 1:, None])[:, 0]
        following = lm(tokens).logits[0, -1].log_softmax(-1).max()
    r = HFRollout(host(Policy(lm, "padded")), batch_size=2)
    np.testing.assert_allclose(r.logps(asked, [1])[0], expected, rtol=0, atol=1e-5)
    drawn = r.generate(asked, Sampling(1, temperature=0.0))[0][0]
    assert drawn.logps[0] == pytest.approx(float(following), abs=1e-5)


def test_lora_is_part_of_what_generates(rng):
    lm = policy().causal_lm.float()
    plain = HFRollout(host(Policy(lm, "shared")), batch_size=4)
    asked = prompts(rng, 3)
    before = plain.generate(asked, Sampling(10, temperature=0.0))
    adapted = Policy(lora(lm, rank=4, alpha=64.0, dropout=0.0, targets="all-linear", seed=0), "shared")
    r = HFRollout(host(adapted), batch_size=4)
    same = r.generate(asked, Sampling(10, temperature=0.0))  # B is 0
    assert [[c.token_ids for c in row] for row in same] == [[c.token_ids for c in row] for row in before]
    for (a,), (b,) in zip(same, before, strict=True):  # products round by how their operands lie in memory
        np.testing.assert_allclose(a.logps, b.logps, rtol=0, atol=1e-5)
    for name, p in adapted.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(p.data, std=0.5, generator=torch.Generator().manual_seed(0))
    assert r.generate(asked, Sampling(10, temperature=0.0)) != before


def test_progress_counts_batches_and_may_stop(rng):
    seen = []

    def progress(items, total):
        for item in items:
            seen.append((item, total))
            if item == 1:
                raise KeyboardInterrupt
            yield item

    r = HFRollout(host(policy(), progress=progress), batch_size=2)
    r.policy.train()
    with pytest.raises(KeyboardInterrupt):
        r.generate(prompts(rng, 6), Sampling(2))
    assert seen == [(0, 3), (1, 3)]
    assert r.policy.training


def test_refusals():
    r = rollout()
    with pytest.raises(ValueError, match="greedy completions of a prompt are all the same"):
        r.generate([[5]], Sampling(2, temperature=0.0), 2)
    with pytest.raises(ValueError, match="without tokens"):
        r.generate([[]], Sampling(2))
    with pytest.raises(ValueError, match="rollout.batch_size=0"):
        rollout(batch_size=0)
    assert r.generate([], Sampling(2)) == []


@pytest.mark.parametrize("temperature, top_k, top_p", [(1.0, 0, 1.0), (0.5, 0, 1.0), (1.0, 3, 1.0), (2.0, 0, 0.7)])
def test_draws_have_the_probabilities_asked_for(temperature, top_k, top_p):
    """With a fine grid of uniform numbers, counts are the probabilities up to a grid cell for each border."""
    logits = torch.tensor([1.0, -0.5, 2.0, 0.0, 1.5, -3.0])
    weights = np.exp(logits.double().numpy() / temperature)
    order = np.argsort(-weights)
    keep = np.ones(6, bool)
    if top_k:
        keep[order[top_k:]] = False
    if top_p < 1:
        share = np.cumsum(weights[order]) / weights.sum()
        keep[order[1:]] = share[:-1] < top_p
    expected = weights * keep / (weights * keep).sum()
    assert keep.all() == (not top_k and top_p == 1)
    n = 10_000
    grid = (torch.arange(n, dtype=torch.float64)[:, None] + 0.5) / n
    sampling = Sampling(1, temperature, top_p, top_k)
    counts = torch.bincount(_draw(logits.expand(n, 6), sampling, grid)[:, 0], minlength=6).numpy() / n
    np.testing.assert_allclose(counts, expected, atol=2 / n)
    assert (counts[~keep] == 0).all()


def test_batches_are_full_but_for_rows_that_would_be_padding():
    assert _cuts([], 4) == [0]
    assert _cuts([5] * 9, 4) == [0, 4, 8, 9]
    assert _cuts([100, 120, 157, 158, 600, 601], 8) == [0, 3, 4, 6]  # 1.25 * 100 + 32 = 157


def test_common_beginning_leaves_each_prompt_a_token():
    assert _common([[1, 2, 3], [1, 2, 4]]) == 2
    assert _common([[1, 2, 3], (1, 2, 3)]) == 2
    assert _common([[1], [1, 2]]) == 0
    assert _common([[1, 2, 3]]) == 0
    assert _common([[2, 3], [1, 3]]) == 0


def test_the_greedy_twin_of_a_prompt_comes_last_and_changes_nothing_else(rng):
    r = rollout(batch_size=5)
    asked = prompts(rng, 4)
    sampling = Sampling(16, temperature=1.0, seed=5)
    both = r.generate(asked, sampling, n=3, greedy=True)
    alone = r.generate(asked, sampling, n=3)
    twins = r.generate(asked, Sampling(16, temperature=0.0))
    for group, sampled, (twin,) in zip(both, alone, twins, strict=True):
        assert [c.token_ids for c in group] == [*(c.token_ids for c in sampled), twin.token_ids]
        np.testing.assert_allclose(group[-1].logps, twin.logps, atol=1e-6)
    assert [g[0].token_ids for g in r.generate(asked, sampling, n=0, greedy=True)] == [t.token_ids for (t,) in twins]


def test_log_probs_of_given_tokens(rng):
    r = rollout()
    asked = prompts(rng, 3)
    drawn = r.generate(asked, Sampling(9, seed=1))
    given = r.logps([[*p, *c.token_ids] for p, (c,) in zip(asked, drawn, strict=True)], [len(p) for p in asked])
    for got, (c,) in zip(given, drawn, strict=True):
        np.testing.assert_allclose(got, c.logps, atol=1e-5)
