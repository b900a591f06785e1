"""Rewards of steps in online training: the gradient by hand, a run that learns from them, and what is refused."""

from __future__ import annotations

import math

import numpy as np
import pytest

from align.data.prompts import PromptRow
from align.models.pretrained import byte_tokenizer
from align.rollout.base import Completion, Sampling
from align.trainers.experience import Experience
from tests.killer import shared
from tests.trainers.online_runs import ready, rows_of, samples_of, words_of
from tests.trainers.test_online_exact import PLAIN, equal, gradient, of_loss, policy_logps, reinforced

HERE = "tests.rewards.step_functions."
STEPS = ("reward=steps", f"reward.steps.function={HERE}letters")
PURE = ("objective=policy_gradient", "advantage=pure", "lora.rank=4")
TOKENIZER = byte_tokenizer()

# Two completions of each of two prompts: text, whether it ended, (tokens, number) of each step. A token is a byte.
SCRIPT = [
    [("one\n\ntwo", True, [(5, 0.255), (4, -0.496)]), ("three", True, [(6, 0.756)])],
    [("\n\ntwo\n\n\n\none", False, [(7, -0.493), (5, 0.255)]), ("one\n\n", True, [(6, 0.256)])],
]


class Scripted:
    """A backend that writes what it is told to, once."""

    def __init__(self, script):
        self.script = script
        self.counts = {}

    def generate(self, prompts, *_):
        assert len(prompts) == len(self.script)
        return [[self._completion(text, ended) for text, ended, _ in group] for group in self.script]

    def _completion(self, text, ended):
        ids = TOKENIZER(text, add_special_tokens=False)["input_ids"]
        end = [TOKENIZER.eos_token_id] if ended else []
        return Completion((*ids, *end), "end" if ended else "length")


@pytest.fixture
def training(tmp_path):
    made = []

    def make(*words):
        directory = tmp_path / str(len(made))
        directory.mkdir()
        made.append(ready(directory, *PLAIN, *words))
        return made[-1]

    yield make
    for one in made:
        one.close()


def written(t, script):
    """The script's groups, scored by the rewards of the training."""
    prompts = [PromptRow(f"f:{k}", tuple(TOKENIZER(f"p{k}")["input_ids"]), f"p{k}") for k in range(len(script))]
    experience = Experience(Scripted(script), t.rewards, t.tokenizer, "steps" in t.advantage.needs)
    return experience.draw(prompts, Sampling(32, 1.0, 1.0, 0, (), 0), 2, False)


def to_go(numbers):
    return [sum(numbers[k:]) for k in range(len(numbers))]


def pure(group, scores):
    """Of a prompt's two completions, temperature 0.1 and baseline token: card of PURE's main branch, written out."""
    weighted = []
    for _, _, steps in group:
        raw = [math.exp(-number / 0.1) for _, number in steps]
        weighted.append([w / sum(raw) * number for w, (_, number) in zip(raw, steps, strict=True)])
    out = []
    for k, (_, _, steps) in enumerate(group):
        other = group[1 - k][2]
        per_token = sum(weighted[1 - k]) / sum(tokens for tokens, _ in other)
        rewards = []
        for (tokens, _), reward in zip(steps, weighted[k], strict=True):
            rewards += [0.0] * (tokens - 1) + [reward - per_token * tokens]
        rewards[-1] += scores[k] - scores[1 - k]
        out.append(to_go(rewards))
    return out


def pure_min(group, scores, length):
    """The smallest to go, where tokens without a reward and all that follows the end count as 0; sums as baseline."""
    values = []
    for _, _, steps in group:
        rewards = [r for tokens, number in steps for r in [0.0] * (tokens - 1) + [number]]
        assert len(rewards) < length
        values.append([min(*rewards[k:], 0.0) for k in range(len(rewards))])
    return [
        [v - sum(values[1 - k]) / length + scores[k] - scores[1 - k] for v in values[k]] for k in range(2)
    ]  # fmt: skip


def torches(lists):
    import torch

    return [[torch.tensor(one, dtype=torch.float32) for one in group] for group in lists]


@pytest.mark.parametrize("layout", ["shared", "padded"])
@pytest.mark.parametrize("form", ["pure", "pure_min"])
def test_gradient_by_hand(training, form, layout):
    """Steps of a function, verifiable rewards beside them; the tokens of each step are counted in SCRIPT."""
    more = ("advantage.length=40", "advantage.whiten=none") if form == "pure_min" else ()
    t = training(
        f"advantage={form}", *more, "reward=steps", f"reward.steps.function={HERE}known", f"trainer.layout={layout}",
        "reward.mixed._target_=tests.trainers.online_rewards.mixed", "reward.mixed.weight=0.5", "sampling.n=2",
        "trainer.micro_batch_tokens=100",
    )  # fmt: skip
    groups = written(t, SCRIPT)
    for group, told in zip(groups, SCRIPT, strict=True):
        for row, (_, _, steps) in zip(group.steps, told, strict=True):
            assert np.flatnonzero(~np.isnan(row)).tolist() == list(np.cumsum([n for n, _ in steps]) - 1)
            np.testing.assert_allclose(row[~np.isnan(row)], [number for _, number in steps])
        mixed = group.rewards[:, t.rewards.names.index("mixed")]
        assert len(set(mixed)) == 2
        np.testing.assert_allclose(group.scores, mixed / 2)  # the steps have no weight
    if form == "pure":
        advantages = [pure(told, g.scores) for told, g in zip(SCRIPT, groups, strict=True)]
    else:
        advantages = [pure_min(told, g.scores, 40) for told, g in zip(SCRIPT, groups, strict=True)]
    equal(gradient(t, groups), of_loss(t, reinforced(policy_logps(t, groups), torches(advantages))))


def test_a_completion_without_steps_is_as_if_it_had_not_been_drawn(training):
    """The function knows no "four": that completion is in no baseline and teaches nothing; nor does its twin have a
    baseline."""
    t = training("advantage=pure", "reward=steps", f"reward.steps.function={HERE}known", "sampling.n=2")
    script = [[SCRIPT[0][0], ("one\n\nfour", True, [])], SCRIPT[1]]
    groups = written(t, script)
    assert np.isnan(groups[0].scores).tolist() == [False, True]
    assert groups[1].scores.tolist() == [0.0, 0.0]
    raw = [math.exp(-number / 0.1) for _, number in SCRIPT[0][0][2]]
    first, second = (w / sum(raw) * number for w, (_, number) in zip(raw, SCRIPT[0][0][2], strict=True))
    alone = to_go([0.0] * 4 + [first] + [0.0] * 3 + [second])
    other = torches([pure(SCRIPT[1], [0.0, 0.0])])[0]
    advantages = [[torches([[alone]])[0][0], None], other]
    equal(gradient(t, groups), of_loss(t, reinforced(policy_logps(t, groups), advantages)))


def test_what_was_cut_has_no_tokens_and_no_part_in_the_baseline_per_token(training):
    t = training(
        "advantage=pure", "reward=steps", f"reward.steps.function={HERE}known", "sampling.n=2", "trainer.truncated=mask"
    )
    groups = written(t, SCRIPT)
    alone = [0.0] * 5 + [0.256]
    kept = torches([pure(SCRIPT[0], [0.0, 0.0]), [to_go(alone)]])
    advantages = [kept[0], [None, kept[1][0]]]
    equal(gradient(t, groups), of_loss(t, reinforced(policy_logps(t, groups), advantages)))


def test_equal_scores_do_not_settle_a_prompt_with_steps(training):
    t = training("advantage=pure", "reward=steps", f"reward.steps.function={HERE}known", "sampling.n=2")
    lost = [("four", True, []), ("five", True, [])]
    assert [g.zero_variance for g in written(t, [*SCRIPT, lost])] == [False, False, True]


def trained(directory, *more):
    return shared().run(["train", *words_of(directory, f"run.dir={directory / 'run'}", *more)], ())


@pytest.mark.parametrize(
    "words",
    [
        (*PURE, "trainer.truncated=mask"),
        (
            *PURE,
            "advantage.baseline=step",
            "trainer.num_minibatches=2",
            "objective=clipped",
            "trainer.dynamic_sampling=1",
        ),
        ("objective=policy_gradient", "advantage=pure_min", "advantage.length=8", "trainer.kl_in_reward=0.05"),
    ],
)
def test_a_run_leaves_the_steps_as_evidence(tmp_path, words):
    ended = trained(tmp_path, *words, *STEPS, "trainer.max_steps=2", "sampling.stop=[a,b,c,d,e]")
    assert ended.code == 0, ended.said
    run = tmp_path / "run"
    for row in rows_of(run):
        assert ("advantage/steps" in row) == (row["tokens/targets"] > 0)  # all may have been cut
        assert row["reward/total"] == row["reward/missing"] == 0
        lines = samples_of(run, row["step"])
        made = [s for line in lines for s in line["samples"]]
        assert all(s["rewards"]["steps"] == min(s["steps"]) for s in made)
        assert row["reward/steps"] == pytest.approx(np.mean([min(s["steps"]) for s in made]))


def test_the_policy_learns_what_earns_its_steps(tmp_path):
    """Lower-case letters, a tenth of the bytes at first."""
    ended = trained(
        tmp_path, *PURE, *STEPS, "lora.rank=0", "optimizer.lr=2e-2", "sampling.n=8", "trainer.max_steps=30",
        "trainer.eval_every=0", "trainer.save_every=30", "trainer.num_samples=0", "trainer.micro_batch_tokens=2048",
    )  # fmt: skip
    assert ended.code == 0, ended.said
    found = [row["reward/steps"] for row in rows_of(tmp_path / "run")]
    assert np.mean(found[:3]) < 0.25
    assert np.mean(found[-3:]) > np.mean(found[:3]) + 0.3


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (
            (*PURE, "reward.mixed._target_=tests.trainers.online_rewards.mixed"),
            "add reward.steps._target_=align.rewards",
        ),
        (
            ("objective=policy_gradient", "advantage=rloo", *STEPS),
            "reward.steps has no effect: advantage=rloo reads no",
        ),
        (
            (*PURE, "reward=steps", "reward.steps.function=nowhere.at_all"),
            "reward.steps: function=nowhere.at_all: cannot",
        ),
        ((*PURE, "reward=steps"), "reward.steps.function"),
    ],
)
def test_what_does_not_go_together_is_refused(tmp_path, words, told):
    ended = trained(tmp_path, *words)
    assert ended.code == 2, ended.said
    assert told in " ".join(ended.said.split())
    assert "Traceback" not in ended.said


def test_with_a_weight_the_smallest_step_is_a_reward_as_any_other(tmp_path):
    words = ("objective=policy_gradient", "advantage=rloo", *STEPS, "reward.steps.weight=2", "trainer.max_steps=1")
    ended = trained(tmp_path, *words)
    assert ended.code == 0, ended.said
    (row,) = rows_of(tmp_path / "run")
    assert row["reward/total"] == pytest.approx(2 * row["reward/steps"])
    assert "steps" not in samples_of(tmp_path / "run", 1)[0]["samples"][0]
