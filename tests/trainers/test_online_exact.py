"""The gradient of an online step against one by hand: a dense forward of each completion and a loss written out."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from align.models.policy import own_attention
from align.trainers.experience import episodes, examples
from tests.trainers.online_runs import REMAX, REWARDS, ready

LETTERS = "sampling.stop=[a,b,c,d,e,f,g,h,i,k,l,m,n,o,p,q,r,s,t,u]"  # so that a random network ends some completions
PLAIN = ("objective=policy_gradient", "lora.rank=4", "optimizer.max_grad_norm=null", "sampling.n=4")
# of a gradient that is computed in another order
NEAR = {"rtol": 1e-4, "atol": 1e-6}


@pytest.fixture
def training(tmp_path):
    """A function words -> a training before its first step, whose policy is no longer its reference."""
    made = []

    def make(*words, moved=True):
        directory = tmp_path / str(len(made))
        directory.mkdir()
        made.append(ready(directory, *words))
        if moved:
            move(made[-1], 0.05)
        return made[-1]

    yield make
    for one in made:
        one.close()


@torch.no_grad()
def move(t, size):
    generator = torch.Generator().manual_seed(3)
    for p in t.engine.parameters.values():
        p.add_(size * torch.randn(p.shape, generator=generator))


def drawn(t):
    """The groups of the first step."""
    return t.sampler.of(1)[0]


def prepared(t, groups):
    """The examples of the groups with all their columns."""
    parts = examples(groups, t.learner.trainer.truncated, t.engine.policy.layout, t.learner.context.max_tokens)
    return t.learner.prepared(groups, parts)[0]


def updated(t, groups, parts, at=1):
    """Gradients by name that the at-th optimiser step of an update is given; the steps before it are taken."""
    found, taken, step = {}, 0, t.engine.step

    def caught(lr):
        nonlocal taken
        taken += 1
        if taken == at:
            found.update({n: torch.zeros_like(p) if p.grad is None else p.grad.clone() for n, p in named(t)})
        if taken < at:
            step(lr)
        else:
            t.engine.optimizer.zero_grad(set_to_none=True)

    t.engine.step = caught
    try:
        t.learner.update(1, parts, len(groups))
    finally:
        t.engine.step = step
    return found


def named(t):
    return t.engine.parameters.items()


def gradient(t, groups):
    """Of the loop's own step."""
    return updated(t, groups, prepared(t, groups))


def logps(model, lm, group, completion):
    """Of each token of a completion, by a plain forward of this one sequence."""
    ids = torch.tensor([[*group.prompt.token_ids, *completion.token_ids]])
    with own_attention(lm):
        scores = model(ids, use_cache=False).logits[0].log_softmax(-1)
    start = len(group.prompt.token_ids)
    return scores[start - 1 : -1].gather(1, ids[0, start:, None])[:, 0]


def policy_logps(t, groups):
    """[completions of each group] of token log-probs with their gradient."""
    policy = t.engine.policy
    return [[logps(policy.model, policy.causal_lm, g, c) for c in g.completions] for g in groups]


@torch.no_grad()
def reference_logps(t, groups):
    with t.engine.policy.model.disable_adapter():
        return policy_logps(t, groups)


def of_loss(t, loss):
    """Gradients by name."""
    values = torch.autograd.grad(loss, [p for _, p in named(t)], allow_unused=True)
    return {n: torch.zeros_like(p) if g is None else g for (n, p), g in zip(named(t), values, strict=True)}


def equal(ours, theirs):
    assert ours.keys() == theirs.keys()
    assert max(float(g.abs().max()) for g in theirs.values()) > 1e-3
    for name, value in theirs.items():
        torch.testing.assert_close(ours[name], value, **NEAR, msg=lambda m, name=name: f"{name}: {m}")


def leave_one_out(scores):
    return [s - np.mean([*scores[:k], *scores[k + 1 :]]) for k, s in enumerate(scores)]


def reinforced(tokens, advantages):
    """- sum A log p / number of tokens, of those completions that have an advantage."""
    pairs = [(lp, a) for lps, row in zip(tokens, advantages, strict=True) for lp, a in zip(lps, row, strict=True)]
    pairs = [(lp, a) for lp, a in pairs if a is not None]
    return -sum((a * lp).sum() for lp, a in pairs) / sum(len(lp) for lp, _ in pairs)


def test_remax(training):
    """-[0.05 (ref - old) + 0.99^(L - k) clip(r - greedy, -0.3, 0.3)] log p_k, mean over all tokens (Li et al. 2023)."""
    t = training(*REMAX, "optimizer.max_grad_norm=null", "advantage.clip=0.3", LETTERS)
    groups = drawn(t)
    assert len({len(c.token_ids) for g in groups for c in g.completions}) > 3
    tokens, reference = policy_logps(t, groups), reference_logps(t, groups)
    gaps = [abs(r - g.greedy_score) for g in groups for r in g.scores]
    assert min(gaps) < 0.3 < max(gaps)
    advantages = []
    for g, lps, refs in zip(groups, tokens, reference, strict=True):
        row = []
        for r, lp, ref in zip(g.scores, lps, refs, strict=True):
            left = torch.arange(len(lp), 0, -1)
            row.append(0.05 * (ref - lp.detach()) + 0.99**left * float(np.clip(r - g.greedy_score, -0.3, 0.3)))
        advantages.append(row)
    equal(gradient(t, groups), of_loss(t, reinforced(tokens, advantages)))


def clipped_loss(tokens, old, groups, low=0.2, high=0.2):
    """Mean over all tokens of -min(r A, clip(r) A), A = (score - mean) / (std + 1e-6) of the prompt."""
    total, count = 0.0, 0
    for g, lps, olds in zip(groups, tokens, old, strict=True):
        scores = torch.tensor(g.scores)
        for a, lp, o in zip((scores - scores.mean()) / (scores.std() + 1e-6), lps, olds, strict=True):
            ratio = (lp - o).exp()
            total = total - torch.minimum(ratio * a, ratio.clamp(1 - low, 1 + high) * a).sum()
            count += len(lp)
    return total / count


GRPO = ("objective=clipped", "advantage=grpo", *PLAIN[1:], "objective.dual_clip=null")


def detached(tokens):
    return [[lp.detach() for lp in lps] for lps in tokens]


def test_clipped_grpo_away_from_the_policy_that_drew(training):
    t = training(*GRPO, "trainer.old_logps=trainer", LETTERS, "objective.clip_low=0.1", "objective.clip_high=0.15")
    groups = drawn(t)
    parts = prepared(t, groups)
    old = detached(policy_logps(t, groups))
    move(t, 0.05)
    tokens = policy_logps(t, groups)
    ratios = torch.cat([(lp - o).exp() for a, b in zip(tokens, old, strict=True) for lp, o in zip(a, b, strict=True)])
    assert float(ratios.detach().min()) < 0.9
    assert float(ratios.detach().max()) > 1.15
    equal(updated(t, groups, parts), of_loss(t, clipped_loss(tokens, old, groups, 0.1, 0.15)))


def test_later_inner_epochs_compare_with_the_policy_before_the_first(training):
    t = training(*GRPO, "trainer.ppo_epochs=2", LETTERS, "optimizer.lr=1e-2")
    groups = drawn(t)
    parts = prepared(t, groups)
    old = detached(policy_logps(t, groups))
    ours = updated(t, groups, parts, at=2)
    tokens = policy_logps(t, groups)  # one step was taken
    assert max(float((lp - o).detach().abs().max()) for lp, o in zip(tokens[0], old[0], strict=True)) > 0.01
    equal(ours, of_loss(t, clipped_loss(tokens, old, groups)))


@pytest.mark.parametrize("old", ["auto", "trainer"])
def test_ratio_is_1_at_the_first_inner_step(training, old):
    t = training(*GRPO, f"trainer.old_logps={old}", LETTERS)
    groups = drawn(t)
    parts = prepared(t, groups)
    assert ("old_logps" in parts[0].rows[0].columns) == (old == "trainer")
    row = t.learner.update(1, parts, len(groups))
    assert row["policy/kl_old"] == 0.0
    assert row["policy/clip_low"] == row["policy/clip_high"] == 0.0


def test_auto_and_trainer_give_the_same_step(training):
    ours, theirs = (training(*GRPO, f"trainer.old_logps={old}", LETTERS) for old in ("auto", "trainer"))
    equal(gradient(ours, drawn(ours)), gradient(theirs, drawn(theirs)))


@pytest.mark.parametrize("layout", ["shared", "packed", "padded"])
def test_not_the_layout_nor_the_micro_batch_nor_the_order(training, layout):
    words = (*GRPO, LETTERS, "trainer.ppo_epochs=2", f"trainer.layout={layout}", "objective.kl_coefficient=0.1")
    t = training(*words, "trainer.micro_batch_tokens=100000")
    groups = drawn(t)
    tokens, reference = policy_logps(t, groups), reference_logps(t, groups)
    d = [lp - ref for lps, refs in zip(tokens, reference, strict=True) for lp, ref in zip(lps, refs, strict=True)]
    kl = sum(((-x).exp() + x - 1).sum() for x in d) / sum(map(len, d))
    expected = of_loss(t, clipped_loss(tokens, detached(tokens), groups) + 0.1 * kl)
    one = max(len(g.prompt.token_ids) + len(c.token_ids) for g in groups for c in g.completions)
    sizes = set()
    for budget in (100000, 4 * one, 2 * one + 3, one):
        t.budget(budget)
        parts = prepared(t, groups)
        sizes.add(len(parts[0].rows))
        equal(updated(t, groups, parts), expected)
    assert {1, 4} <= sizes  # from all completions of a prompt together to each for itself
    equal(gradient(t, groups[::-1]), expected)


def test_minibatches_hold_whole_prompts_whatever_the_micro_batch(training):
    """Two steps on the completions of 4 prompts end at the same weights if a prompt's completions were several
    examples; the first of them sees the completions of two prompts."""
    t = training(*GRPO, "trainer.num_minibatches=2", LETTERS, "trainer.layout=packed", "optimizer.lr=1e-2")
    groups = drawn(t)
    start = {n: p.detach().clone() for n, p in named(t)}
    order = np.random.default_rng([0, 1, 0]).permutation(4)[:2]
    chosen = [groups[i] for i in order]
    tokens = policy_logps(t, chosen)
    first = of_loss(t, clipped_loss(tokens, detached(tokens), chosen))
    ends = []
    one = max(len(g.prompt.token_ids) + len(c.token_ids) for g in groups for c in g.completions)
    for budget in (100000, 2 * one, one):
        t.budget(budget)
        parts = prepared(t, groups)
        equal(updated(t, groups, parts), first)
        row = t.learner.update(1, parts, len(groups))
        assert row["tokens/targets"] == sum(len(c.token_ids) for g in groups for c in g.completions) / 2
        ends.append({n: p.detach().clone() for n, p in named(t)})
        t.engine.optimizer.state.clear()
        with torch.no_grad():
            for n, p in named(t):
                p.copy_(start[n])
    for other in ends[1:]:
        for n, p in ends[0].items():
            torch.testing.assert_close(other[n], p, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("advantage", ["grpo", "rloo", "dr_grpo", "remax", "reinforce_pp_baseline"])
def test_equal_rewards_teach_nothing(training, advantage):
    t = training(*PLAIN, f"advantage={advantage}", f"reward.same._target_={REWARDS}same", "optimizer.weight_decay=0")
    before = {n: p.detach().clone() for n, p in named(t)}
    row = t.task.step(1)
    assert all(np.isfinite(v) for v in row.values())
    assert row["optimizer/gradient_norm"] == 0
    assert row["rollout/settled_prompts"] == 1
    for n, p in named(t):
        assert torch.equal(p, before[n])


def test_what_was_cut_counts_for_the_baseline_only(training):
    t = training(*PLAIN, "advantage=rloo", "trainer.truncated=mask", LETTERS)
    groups = drawn(t)
    ended = [[c.finished for c in g.completions] for g in groups]
    assert 0 < np.mean(ended) < 1
    advantages = [
        [a if keep else None for a, keep in zip(leave_one_out(g.scores), kept, strict=True)]
        for g, kept in zip(groups, ended, strict=True)
    ]
    equal(gradient(t, groups), of_loss(t, reinforced(policy_logps(t, groups), advantages)))


def test_step_in_which_all_was_cut(training):
    t = training(*PLAIN, "advantage=rloo", "trainer.truncated=mask", "trainer.kl_in_reward=0.1")
    groups = [replace(g, completions=tuple(replace(c, stop="length") for c in g.completions)) for g in drawn(t)]
    t.sampler.of = lambda _: (groups, groups)
    row = t.task.step(1)
    assert row["optimizer/gradient_norm"] == 0
    assert row["tokens/targets"] == 0
    assert "kl/reference" not in row  # of what was learnt from, which is nothing
    assert all(np.isfinite(v) for v in row.values())


@pytest.mark.parametrize("advantage", ["rloo", "grpo", "dr_grpo"])
def test_without_a_reward_as_if_it_had_not_been_drawn(training, advantage):
    t = training(*PLAIN, f"advantage={advantage}", LETTERS, f"reward.patchy._target_={REWARDS}patchy")
    groups = drawn(t)
    known = [[k for k, s in enumerate(g.scores) if not np.isnan(s)] for g in groups]
    assert sum(map(len, known)) < 16
    assert all(len(k) > 1 for k in known)
    advantages = []
    for g, at in zip(groups, known, strict=True):
        scores = g.scores[at]
        if advantage == "rloo":
            values = leave_one_out(scores)
        else:
            values = (scores - scores.mean()) / (scores.std(ddof=1) + 1e-6 if advantage == "grpo" else 1)
        advantages.append([dict(zip(at, values, strict=True)).get(k) for k in range(4)])
    equal(gradient(t, groups), of_loss(t, reinforced(policy_logps(t, groups), advantages)))


def test_prompt_without_a_greedy_reward_is_left_out(training):
    """ReMax has nothing to compare its completions with: they are not in the mean either."""
    t = training(*PLAIN, "advantage=remax", "advantage.gamma=1", LETTERS)
    first, *others = drawn(t)
    groups = [replace(first, greedy_score=np.nan), *others]
    advantages = [[None if np.isnan(s - g.greedy_score) else s - g.greedy_score for s in g.scores] for g in groups]
    equal(gradient(t, groups), of_loss(t, reinforced(policy_logps(t, groups), advantages)))


def test_first_completion_without_reward_from_an_engine_that_tells_no_log_probs(training):
    t = training(*PLAIN, "advantage=rloo", f"reward.patchy._target_={REWARDS}patchy")
    groups = [replace(g, completions=tuple(replace(c, logps=None) for c in g.completions)) for g in drawn(t)]
    first = replace(groups[0], scores=np.array([np.nan, *groups[0].scores[1:]]))
    parts = prepared(t, [first, *groups[1:]])
    assert "rollout_logps" not in parts[0].rows[0].columns
    assert updated(t, groups, parts)


def test_the_same_prompt_twice_is_two_groups(training):
    t = training(*PLAIN, "advantage=rloo", LETTERS)
    row = t.train[0]
    groups = t.experience.draw([row, row], t.sampling.at(1, 0), 4, False)
    assert [c.token_ids for c in groups[0].completions] != [c.token_ids for c in groups[1].completions]
    expected = [leave_one_out(g.scores) for g in groups]
    assert float(np.abs(np.concatenate(expected)).max()) > 0
    equal(gradient(t, groups), of_loss(t, reinforced(policy_logps(t, groups), expected)))


def test_value_head_learns_the_returns(training):
    """Half of the mean squared error to the returns: gradient -(A + V - V) h of the head's weight at the start, V = 0,
    with gamma 1, lam 1 the score at every token."""
    t = training(
        *("objective=clipped", "advantage=ppo", "objective.value_coefficient=1", "advantage.lam=1", "lora.rank=4"),
        *("optimizer.max_grad_norm=null", LETTERS),
        moved=False,
    )
    groups = drawn(t)
    found = gradient(t, groups)
    scores = [float(s) for g in groups for s in g.scores]
    lengths = [len(c.token_ids) for g in groups for c in g.completions]
    expected = -sum(s * n for s, n in zip(scores, lengths, strict=True)) / sum(lengths)
    assert float(found["value_head.bias"]) == pytest.approx(expected, rel=1e-5)


def test_component_without_weight_is_measured_only(training):
    t = training(
        *PLAIN, "advantage=rloo", f"reward.mixed._target_={REWARDS}mixed", "reward.mixed.weight=2",
        f"reward.answered._target_={REWARDS}answered", "reward.answered.weight=-0.5",
        f"reward.never._target_={REWARDS}never", "reward.never.weight=0",
    )  # fmt: skip
    groups = drawn(t)
    for g in groups:
        np.testing.assert_allclose(g.scores, 2 * g.rewards[:, 0] - 0.5 * g.rewards[:, 1])
        np.testing.assert_allclose(g.rewards[:, 1], g.rewards[:, 0] + g.prompt.fields["answer"], atol=1e-12)
        assert np.isnan(g.rewards[:, 2]).all()
    equal(
        gradient(t, groups), of_loss(t, reinforced(policy_logps(t, groups), [leave_one_out(g.scores) for g in groups]))
    )


def test_episodes_of_rows_without_targets(training):
    t = training(*PLAIN, "advantage=rloo", "trainer.truncated=mask", LETTERS)
    groups = drawn(t)
    rows = [row for e in examples(groups, "mask", "packed", 10**6) for row in e.rows]
    seen = episodes(groups, rows, frozenset(), None, None)
    lengths = torch.bincount(seen.row, minlength=len(rows)).tolist()
    assert lengths == [len(c.token_ids) if c.finished else 0 for g in groups for c in g.completions]
    assert seen.truncated.tolist() == [not c.finished for g in groups for c in g.completions]
    assert seen.group.tolist() == [i for i in range(len(groups)) for _ in range(4)]
