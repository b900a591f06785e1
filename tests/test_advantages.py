"""Advantage estimators: the reference implementations' numbers, and what must not change the answer.

The references work on padded arrays [B, T]; they are packed and unpacked here. Tolerances are those of the vectors'
description: 1e-10 relative, 1e-6 where the reference computes in float32.
"""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hydra.utils import instantiate
from omegaconf import OmegaConf

from align.advantages import base
from align.advantages.baselines import GRPO, RLOO, Reinforce, ReinforcePlusPlus, ReMax
from align.advantages.copo import COPO, answer_entropy
from align.advantages.ppo import PPO
from align.advantages.process import PURE, Progress, PUREStrictMin, progress, regret, step_lengths, weighted_steps
from align.composers.invariance import NO_EFFECT, columns_of, probe, refuse_without_effect, rescaling_effect
from align.types import Episodes, Estimate
from tests.experiments import pure_toy, remax_toy

ROOT = Path(__file__).parents[1]
VECTORS = json.loads((Path(__file__).parent / "vectors" / "online_public.json").read_text())
OPTIONS = sorted((ROOT / "configs" / "advantage").glob("*.yaml"))
COPO_SETTINGS = {"midpoint": 0.5, "steepness": 1.0, "consistency": True, "divide_by_std": True, "epsilon": 1e-6}


def entries(*algorithms):
    found = [e for e in VECTORS if e["algorithm"] in algorithms]
    assert found
    return [pytest.param(e, id=e["name"]) for e in found]


def array(values):
    return torch.tensor(np.array(values, dtype=np.float64))


def groups_of(index, num):
    return torch.tensor(np.unique(index, return_inverse=True)[1]) if index is not None else torch.arange(num)


def episodes_of(mask, rewards=None, scores=None, index=None, **columns):
    """Padded arrays [B, T] as Episodes; of token rewards the last valid one is the score, the rest are penalties."""
    mask = array(mask) > 0
    row, column = mask.nonzero(as_tuple=True)
    last = torch.tensor([int(m.nonzero()[-1]) for m in mask])
    penalties = None
    if rewards is not None:
        rewards = array(rewards)
        at = torch.arange(len(mask))
        scores = rewards[at, last].clone()
        rewards = rewards.clone()
        rewards[at, last] = 0
        penalties = rewards[row, column]
    packed = {name: array(v)[row, column] for name, v in columns.items()}
    return Episodes(
        scores=array(scores),
        group=groups_of(index, len(mask)),
        row=row,
        truncated=torch.zeros(len(mask), dtype=torch.bool),
        **({"penalties": penalties} | packed),
    )


def meets(packed, padded, mask, rtol=1e-10, atol=1e-12):
    torch.testing.assert_close(packed, array(padded)[array(mask) > 0], rtol=rtol, atol=atol)


def grpo(divide_by_std=True, epsilon=1e-6, penalty="in_score", score_clip=None):
    return GRPO(divide_by_std, epsilon, penalty, score_clip)


def rloo(penalty="in_score", score_clip=None):
    return RLOO(penalty, score_clip)


def whitened(gamma=1.0, group_baseline=False, penalty="after_baseline", score_clip=None, variance="sample"):
    return ReinforcePlusPlus(gamma, group_baseline, penalty, score_clip, variance)


def ppo(gamma=1.0, lam=0.95, whiten="sample", score_clip=None, bootstrap_truncated=False):
    return PPO(gamma, lam, whiten, score_clip, bootstrap_truncated)


# --- the reference implementations ---


@pytest.mark.parametrize("entry", entries("remax_repo"))
def test_one_step_remax_meets_the_authors_code_with_its_loss_and_gradient(entry):
    given, expected, config = entry["inputs"], entry["expected"], entry["config"]
    mask = array(given["attention_mask"])[:, 1:].clone()
    mask[:, : given["prompt_len"] - 1] = 0
    penalties = config["kl_ctl"] * (array(given["ref_logprobs"]) - array(given["old_logprobs"]))
    episodes = episodes_of(mask, scores=given["reward"], penalties=penalties)
    episodes = replace(episodes, greedy=array(given["baseline_reward"]))
    advantages = ReMax("one_step", config["gamma"], config["reward_clip"])(episodes).columns["advantages"]
    meets(advantages, expected["returns"], mask)

    logps = array(given["new_logprobs"]).requires_grad_()
    loss = -(advantages * logps[mask > 0]).sum() / mask.sum()
    loss.backward()
    assert float(loss.detach()) == pytest.approx(expected["loss"], rel=1e-10)
    torch.testing.assert_close(logps.grad, array(expected["grad_new_logprobs"]), rtol=1e-10, atol=1e-12)


def test_the_clip_of_the_authors_code_is_met_where_it_acts():
    entry = next(e["inputs"] for e in VECTORS if e["name"] == "public_remax_repo_clip")
    differences = array(entry["reward"]) - array(entry["baseline_reward"])
    assert (differences.abs() > 5).tolist() == [False, True, True, False]


@pytest.mark.parametrize("entry", entries("remax_verl"))
def test_remax_to_go_meets_verl(entry):
    given = entry["inputs"]
    episodes = episodes_of(given["response_mask"], given["token_level_rewards"])
    episodes = replace(episodes, greedy=array(given["reward_baselines"]))  # each completion has a prompt of its own
    found = ReMax("to_go", 1.0, None)(episodes).columns["advantages"]
    meets(found, entry["expected"]["advantages"], given["response_mask"])


@pytest.mark.parametrize("entry", entries("grpo", "rloo", "reinforce_pp", "reinforce_pp_baseline"))
def test_group_estimators_meet_verl(entry):
    given, config = entry["inputs"], entry["config"]
    estimator = {
        "grpo": lambda: grpo(config["norm_by_std"], config["epsilon"]),
        "rloo": rloo,
        "reinforce_pp": lambda: whitened(config["gamma"]),
        "reinforce_pp_baseline": lambda: whitened(group_baseline=True, penalty="in_score"),
    }[entry["algorithm"]]()
    episodes = episodes_of(given["response_mask"], given["token_level_rewards"], index=given.get("index"))
    meets(estimator(episodes).columns["advantages"], entry["expected"]["advantages"], given["response_mask"])
    if "returns" in entry["expected"]:
        returns = Reinforce(config["gamma"], None)(episodes).columns["advantages"]
        meets(returns, entry["expected"]["returns"], given["response_mask"])


@pytest.mark.parametrize("entry", entries("gae_verl", "gae_openrlhf"))
def test_ppo_meets_verl_with_holes_and_openrlhf_without(entry):
    """OpenRLHF sets values in holes to 0; packed tokens have no holes, so only its cases without them can be met."""
    given, config, expected = entry["inputs"], entry["config"], entry["expected"]
    verl = entry["algorithm"] == "gae_verl"
    mask = given["response_mask"]
    if not verl:
        assert (np.diff(np.array(mask), axis=1) <= 0).all()
    episodes = episodes_of(mask, given["token_level_rewards"], values=given["values"])
    found = ppo(config["gamma"], config["lam"], "sample" if verl else "none")(episodes).columns
    suffix = "_masked" if verl else ""
    meets(found["advantages"], expected[f"advantages{suffix}"], mask)
    meets(found["returns"], expected[f"returns{suffix}"], mask)
    meets(found["old_values"], given["values"], mask)


@pytest.mark.parametrize("entry", entries("openrlhf_advantage"))
def test_openrlhf_pipeline(entry):
    given, config, expected = entry["inputs"], entry["config"], entry["expected"]
    clip = config["reward_clip_range"]
    estimator = {
        "rloo": lambda: rloo("after_baseline", clip),
        "reinforce_baseline": lambda: whitened(1.0, True, "after_baseline", clip, "population"),
        "group_norm": lambda: grpo(True, 1e-9, "after_baseline", clip),
        "dr_grpo": lambda: grpo(False, 1e-9, "after_baseline", clip),
        "reinforce": lambda: whitened(config["gamma"], False, "after_baseline", clip, "population"),
        "gae": lambda: ppo(config["gamma"], config["lam"], "population", clip),
    }[config["estimator"]]()
    penalties = -config["kl_coef"] * array(given["kl"])
    index = np.arange(len(given["rewards"])) // config["n_samples"]
    columns = {"penalties": penalties, "values": given["values"]}
    episodes = episodes_of(given["action_mask"], scores=given["rewards"], index=index, **columns)
    found = estimator(episodes).columns
    # the reference whitens in float32, whose step at 2 is 2e-7: near 0 its error is not relative
    meets(found["advantages"], expected["advantages"], given["action_mask"], rtol=1e-6, atol=1e-7)
    if "returns" in found:
        meets(found["returns"], expected["returns"], given["action_mask"], rtol=1e-6)


@pytest.mark.parametrize("entry", entries("drw_meta_invariance"))
def test_a_factor_on_all_rewards_is_lost_in_a_normalisation_only(entry):
    given = entry["inputs"]
    factor = entry["config"]["meta_reward"]
    estimators = {
        "grpo_std": grpo(),
        "grpo_nostd": grpo(False),
        "rloo": rloo(),
        "reinforce_pp": whitened(),
    }
    for name, estimator in estimators.items():
        for case, scale in (("one", 1.0), ("meta", factor)):
            rewards = scale * array(given["token_level_rewards"])
            episodes = episodes_of(given["response_mask"], rewards, index=given["index"])
            found = estimator(episodes).columns["advantages"]
            meets(found, entry["expected"][f"{name}_{case}"], given["response_mask"])


@pytest.mark.parametrize("entry", entries("pure_prm_weighting"))
def test_weights_of_steps_meet_pure(entry):
    given, config = entry["inputs"], entry["config"]
    probabilities = array(given["logits"]).softmax(-1)
    rho = probabilities[..., 1] - probabilities[..., 0]
    episodes = episodes_of(given["step_mask"], scores=np.zeros(len(rho)), steps=rho)
    found = weighted_steps(episodes, math.inf if config["disable_weighted"] else config["temperature"])
    meets(found, entry["expected"]["process_reward"], given["step_mask"])
    torch.testing.assert_close(
        base.row_sums(found, episodes.row, len(rho)), array(entry["expected"]["outcome"]), rtol=1e-10, atol=1e-12
    )


@pytest.mark.parametrize("entry", entries("pure_openrlhf"))
def test_pure_meets_its_main_branch(entry):
    """The vectors' process rewards are weighted already: temperature null leaves them as they are."""
    given, config = entry["inputs"], entry["config"]
    steps = torch.where(array(given["reward_mask"]) > 0, array(given["process_reward"]), math.nan)
    scores = array(given["solved"]) - 1
    episodes = episodes_of(given["action_mask"], scores=scores, index=np.zeros(len(scores)), steps=steps)
    lengths = step_lengths(episodes)
    assert lengths[lengths > 0].tolist() == [n for r in given["num_tokens_per_step"] for n in r if n]
    outcome = config["vr_coef"] if config["reward_mode"] == "PRMVR" else 0.0
    found = PURE(None, config["baseline"], outcome)(episodes).columns["advantages"]
    meets(found, entry["expected"]["returns"], given["action_mask"])


@pytest.mark.parametrize("entry", entries("pure_verl"))
def test_pure_strict_min_meets_its_verl_branch(entry):
    given, config = entry["inputs"], entry["config"]
    mask = given["response_mask"]
    episodes = episodes_of(mask, scores=np.zeros(len(mask)), index=given["index"], steps=given["token_level_rewards"])
    whiten = "sample" if config["adv_norm"] else "none"
    estimator = PUREStrictMin(config["aggregate"], len(mask[0]), whiten, 0.0)
    meets(estimator(episodes).columns["advantages"], entry["expected"]["advantages"], mask)


def copo_episodes(given, rewards, answers):
    episodes = episodes_of(given["response_mask"], scores=np.array(rewards).sum(1), index=given["index"])
    return replace(episodes, answers=tuple(answers))


@pytest.mark.parametrize("entry", entries("copo_advantage"))
def test_copo_meets_the_authors_advantages(entry):
    given, config, expected = entry["inputs"], entry["config"], entry["expected"]
    episodes = copo_episodes(given, given["token_level_rewards"], given["answers"])
    settings = COPO_SETTINGS | {"consistency": config["use_consistency"], "divide_by_std": config["norm_by_std"]}
    found = COPO("soft", **settings)(episodes).columns
    meets(found["advantages"], expected["local_advantages"], given["response_mask"], 1e-6)
    meets(found["global_advantages"], expected["global_advantages"], given["response_mask"], 1e-6)
    entropy = answer_entropy(episodes, torch.ones(len(episodes.scores), dtype=torch.bool))
    torch.testing.assert_close(entropy[episodes.group], array(expected["entropy"]), rtol=1e-6, atol=1e-7)


# the authors' name of a mode -> our blend; "no global" and "only global" fix the weight in the loss itself
COPO_MODES = {
    "no global": "local",
    "only global": "global",
    "only soft": "soft",
    "only forced": "forced",
    "soft with forced": "soft_forced",
    "only zero": "nonzero",
    "soft with zero": "soft_nonzero",
}


@pytest.mark.parametrize("entry", entries("copo_loss"))
def test_copo_weights_and_blended_loss_meet_the_authors(entry):
    """The clipped loss is written out here; the objective's own has its tests elsewhere."""
    given, config, expected = entry["inputs"], entry["config"], entry["expected"]
    made = next(e for e in VECTORS if e["name"] == "public_copo_adv_coef1")["inputs"]
    episodes = copo_episodes(made, made["token_level_rewards"], made["answers"])
    assert episodes.scores.tolist() == given["local_reward"]
    columns = COPO(COPO_MODES[config["mode"]], **COPO_SETTINGS | {"midpoint": config["b"], "steepness": config["k"]})(
        episodes
    ).columns
    mask = array(given["response_mask"]) > 0
    if config["mode"] not in ("no global", "only global"):
        weight = array(expected["local_weight"])
        weight = weight if weight.dim() == 2 else weight[:, None].expand(mask.shape)
        meets(columns["local_weight"], weight, mask)

    logps = array(given["log_prob"]).requires_grad_()
    ratio = (logps - array(given["old_log_prob"]))[mask].exp()

    def clipped(advantages):
        low, high, c = 1 - config["clip_low"], 1 + config["clip_high"], config["clip_c"]
        losses = torch.maximum(-advantages * ratio, -advantages * ratio.clamp(low, high))
        return torch.where(advantages < 0, torch.minimum(-advantages * c, losses), losses)

    local, other = clipped(columns["advantages"]), clipped(columns["global_advantages"])
    loss = (columns["local_weight"] * local + (1 - columns["local_weight"]) * other).mean()
    loss.backward()
    assert float(loss.detach()) == pytest.approx(expected["loss"], rel=1e-6)
    torch.testing.assert_close(logps.grad, array(expected["grad_log_prob"]), rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("entry", entries("mrt_progress"))
def test_progress_bonus(entry):
    given, expected = entry["inputs"], entry["expected"]
    success = array(given["success_prob"])
    torch.testing.assert_close(progress(success), array(expected["progress"]), rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(
        regret(success, array(given["oracle"])), array(expected["regret"]), rtol=1e-10, atol=1e-12
    )
    mask = np.ones(progress(success).shape)
    episodes = episodes_of(mask, scores=given["outcome"], steps=progress(success))
    found = Progress(entry["config"]["alpha"], Reinforce(1.0, None))(episodes).columns["advantages"]
    meets(found, array(expected["total"])[:, None].expand(mask.shape), mask)


# --- what must not change the answer ---

ESTIMATORS = {
    "remax_one_step": ReMax("one_step", 0.9, 5.0),
    "remax_to_go": ReMax("to_go", 1.0, None),
    "reinforce": Reinforce(0.9, None),
    "rloo": rloo(),
    "rloo_after": rloo("after_baseline"),
    "grpo": grpo(),
    "dr_grpo": grpo(False),
    "reinforce_pp": whitened(0.9),
    "reinforce_pp_baseline": whitened(group_baseline=True, penalty="in_score"),
    "reinforce_pp_population": whitened(group_baseline=True, variance="population"),
    "ppo": ppo(),
    "ppo_bootstrap": ppo(0.99, 0.9, "none", None, True),
    "pure": PURE(0.1, "token", 1.0),
    "pure_step": PURE(0.1, "step", 1.0),
    "pure_min": PUREStrictMin("min", 9, "sample", 1.0),
    "copo": COPO("soft_forced", **COPO_SETTINGS),
    "copo_nonzero": COPO("soft_nonzero", **COPO_SETTINGS),
    "progress": Progress(0.5, grpo()),
}
GROUPED = ("rloo", "rloo_after", "grpo", "dr_grpo")


def rollout(seed=0, groups=(0, 0, 0, 0, 1, 1, 2, 2, 2), penalised=True):
    """Random episodes of prompts with several numbers of completions."""
    draw = torch.Generator().manual_seed(seed)
    num = len(groups)
    lengths = torch.randint(1, 8, (num,), generator=draw)
    row = torch.arange(num).repeat_interleave(lengths)
    rand = lambda *shape: torch.randn(*shape, generator=draw, dtype=torch.float64)  # noqa: E731
    steps = rand(len(row)).tanh()
    steps[torch.rand(len(row), generator=draw) < 0.5] = math.nan
    return Episodes(
        scores=rand(num),
        group=torch.tensor(groups),
        row=row,
        truncated=torch.rand(num, generator=draw) < 0.5,
        greedy=rand(max(groups) + 1),
        penalties=0.1 * rand(len(row)) if penalised else None,
        values=rand(len(row)),
        steps=steps,
        answers=tuple(str(int(k)) for k in torch.randint(3, (num,), generator=draw)),
    )


def chosen(episodes, rows):
    """The same with these completions only, in this order; prompts are renumbered in the order they appear."""
    tokens = torch.cat([(episodes.row == r).nonzero()[:, 0] for r in rows])
    lengths = torch.bincount(episodes.row, minlength=len(episodes.scores))[rows]
    old = list(dict.fromkeys(episodes.group[rows].tolist()))
    return replace(
        episodes,
        scores=episodes.scores[rows],
        group=torch.tensor([old.index(g) for g in episodes.group[rows].tolist()]),
        row=torch.arange(len(rows)).repeat_interleave(lengths),
        truncated=episodes.truncated[rows],
        greedy=episodes.greedy[old],
        penalties=None if episodes.penalties is None else episodes.penalties[tokens],
        values=episodes.values[tokens],
        steps=episodes.steps[tokens],
        answers=tuple(episodes.answers[r] for r in rows),
    ), tokens


def same(a, b, **tolerance):
    torch.testing.assert_close(a, b, **({"rtol": 1e-9, "atol": 1e-10} | tolerance))


@pytest.mark.parametrize("name", ESTIMATORS)
def test_a_completion_without_a_score_gets_nothing_and_changes_nothing(name):
    """Rows 1 and 4 lose their score: the others' columns equal those of a rollout that never had the two."""
    episodes = rollout()
    lost = [1, 4]
    scores = episodes.scores.clone()
    scores[lost] = math.nan
    found = ESTIMATORS[name](replace(episodes, scores=scores))
    rest, tokens = chosen(episodes, [r for r in range(9) if r not in lost])
    expected = ESTIMATORS[name](rest)
    for column, values in expected.columns.items():
        same(found.columns[column][tokens], values)
    for r in lost:
        for column in found.columns.keys() & {"advantages", "global_advantages"}:
            assert (found.columns[column][episodes.row == r] == 0).all()
    assert all(torch.isfinite(v).all() for v in found.columns.values())
    assert expected.metrics.keys() == found.metrics.keys()
    for key in expected.metrics.keys() - {"advantage/scored_fraction", "advantage/progress"}:
        assert found.metrics[key] == pytest.approx(expected.metrics[key], rel=1e-9, abs=1e-10), key
    assert found.metrics["advantage/scored_fraction"] == pytest.approx(7 / 9)


@pytest.mark.parametrize("name", ESTIMATORS)
def test_a_rollout_without_any_score_gives_zeros(name):
    episodes = rollout()
    found = ESTIMATORS[name](replace(episodes, scores=torch.full_like(episodes.scores, math.nan)))
    assert (found.columns["advantages"] == 0).all()
    assert all(torch.isfinite(v).all() for v in found.columns.values())
    assert all(math.isfinite(v) for v in found.metrics.values())


@pytest.mark.parametrize("name", ESTIMATORS)
def test_the_order_of_prompts_does_not_matter(name):
    episodes = rollout(1)
    rows = [6, 7, 8, 0, 1, 2, 3, 4, 5]
    moved, tokens = chosen(episodes, rows)
    found, expected = ESTIMATORS[name](moved), ESTIMATORS[name](episodes)
    for column, values in expected.columns.items():
        same(found.columns[column], values[tokens])


@pytest.mark.parametrize("name", ESTIMATORS)
def test_columns_are_float64_without_gradient(name):
    episodes = rollout(2)
    episodes = replace(episodes, scores=episodes.scores.requires_grad_())
    for values in ESTIMATORS[name](episodes).columns.values():
        assert values.dtype == torch.float64
        assert values.shape == episodes.row.shape
        assert not values.requires_grad


@pytest.mark.parametrize("score", [0.0, 0.1, -1e6, 1e6 + 0.1])
@pytest.mark.parametrize("name", [*GROUPED, "reinforce_pp_baseline", "reinforce_pp_population", "copo"])
def test_equal_scores_teach_nothing(name, score):
    """Exactly 0, also where a mean of equal numbers rounds: 0.1 three times."""
    episodes = rollout(penalised=False)
    episodes = replace(episodes, scores=torch.full_like(episodes.scores, score))
    found = ESTIMATORS[name](episodes)
    assert (found.columns["advantages"] == 0).all()
    if name in GROUPED:
        assert found.metrics["advantage/degenerate_fraction"] == 1


@pytest.mark.parametrize("score", [1.0, 0.1, 1e6])
def test_equal_rewards_of_all_tokens_whiten_to_zero(score):
    episodes = rollout(penalised=False)
    episodes = replace(episodes, scores=torch.full_like(episodes.scores, score))
    for variance in ("sample", "population"):
        assert (whitened(variance=variance)(episodes).columns["advantages"] == 0).all()


@pytest.mark.parametrize("size", [2, 3])
def test_doubling_every_sample_leaves_dr_grpo_alone_and_not_rloo(size):
    episodes = rollout(groups=[g for g in range(3) for _ in range(size)])
    num = len(episodes.scores)
    twice = [r for start in range(0, num, size) for r in 2 * list(range(start, start + size))]
    doubled, tokens = chosen(episodes, twice)
    same(grpo(False)(doubled).columns["advantages"], grpo(False)(episodes).columns["advantages"][tokens])
    changed = rloo()(doubled).columns["advantages"] - rloo()(episodes).columns["advantages"][tokens]
    assert changed.abs().max() > 0.01


@pytest.mark.parametrize("shift", [3.0, 1e6])
def test_a_shift_of_a_prompts_rewards_is_the_baselines_matter(shift):
    """RLOO, GRPO and ReMax, whose greedy score moves too, take it off; REINFORCE++ without a group does not."""
    episodes = rollout()
    shifts = shift * torch.tensor([1.0, -2.0, 0.5], dtype=torch.float64)
    moved = replace(episodes, scores=episodes.scores + shifts[episodes.group], greedy=episodes.greedy + shifts)
    # of a score of 2e6 float64 holds 2e-10
    for name in (*GROUPED, "remax_one_step", "remax_to_go"):
        same(
            ESTIMATORS[name](moved).columns["advantages"],
            ESTIMATORS[name](episodes).columns["advantages"],
            atol=1e-9 * max(1.0, shift / 1e5),
        )
    for name in ("reinforce", "reinforce_pp"):
        changed = ESTIMATORS[name](moved).columns["advantages"] - ESTIMATORS[name](episodes).columns["advantages"]
        assert changed.abs().max() > 0.1


def test_groups_of_several_sizes_by_hand():
    """Scores 1, 2, 6 | 5 | 0, 4. RLOO: 1 - 4, 2 - 3.5, 6 - 1.5 | 5 | -4, 4. GRPO: mean 3, std sqrt(7) | alone | 2, std
    2 sqrt(2)."""
    episodes = Episodes(
        scores=array([1, 2, 6, 5, 0, 4]),
        group=torch.tensor([0, 0, 0, 1, 2, 2]),
        row=torch.arange(6),
        truncated=torch.zeros(6, dtype=torch.bool),
    )
    same(rloo()(episodes).columns["advantages"], array([-3, -1.5, 4.5, 5, -4, 4]))
    same(grpo(False)(episodes).columns["advantages"], array([-2, -1, 3, 5, -2, 2]))
    found = grpo(epsilon=1e-12)(episodes).columns["advantages"]
    half = 1 / math.sqrt(2)
    same(found, array([-2 / math.sqrt(7), -1 / math.sqrt(7), 3 / math.sqrt(7), 5, -half, half]))


def test_remax_by_hand():
    """Two completions of 2 and 1 tokens, scores 9 and 2, greedy 1, clip 5: d = 5, 1. gamma 0.5, penalties 1, 2 | 3.

    one_step: 1 + 0.25 * 5, 2 + 0.5 * 5 | 3 + 0.5. to_go: 1 + 0.5 * (2 + 5), 2 + 5 | 3 + 1.
    """
    episodes = Episodes(
        scores=array([9, 2]),
        group=torch.tensor([0, 0]),
        row=torch.tensor([0, 0, 1]),
        truncated=torch.zeros(2, dtype=torch.bool),
        greedy=array([1]),
        penalties=array([1, 2, 3]),
    )
    found = ReMax("one_step", 0.5, 5.0)(episodes)
    same(found.columns["advantages"], array([2.25, 4.5, 3.5]))
    assert found.metrics["advantage/difference_mean"] == 4.5  # before the clip
    assert found.metrics["advantage/difference_std"] == 3.5
    assert found.metrics["advantage/clip_fraction"] == 0.5
    assert found.metrics["advantage/positive_fraction"] == 1
    same(ReMax("to_go", 0.5, 5.0)(episodes).columns["advantages"], array([4.5, 7, 4]))


def test_a_greedy_completion_without_a_score_silences_its_prompt():
    episodes = rollout()
    greedy = episodes.greedy.clone()
    greedy[0] = math.nan
    advantages = ESTIMATORS["remax_to_go"](replace(episodes, greedy=greedy)).columns["advantages"]
    before = ESTIMATORS["remax_to_go"](episodes).columns["advantages"]
    silent = (episodes.group == 0)[episodes.row]
    assert (advantages[silent] == 0).all()
    same(advantages[~silent], before[~silent])


def test_the_score_clip_bounds_what_the_baseline_leaves():
    """Scores 0, 30: RLOO gives -30, 30, clipped to -10, 10 before the penalties 1 | 2 are added."""
    episodes = episodes_of(np.ones((2, 1)), scores=[0, 30], index=[0, 0], penalties=[[1.0], [2.0]])
    same(rloo("after_baseline", [-10, 10])(episodes).columns["advantages"], array([-9, 12]))


def test_a_truncated_completion_goes_on_with_its_last_value():
    """One token, score 1, V = 0.5, gamma 0.9: delta = 1 - 0.5, or with the bootstrap 1 + 0.9 * 0.5 - 0.5."""
    episodes = episodes_of(np.ones((2, 1)), scores=[1, 1], values=[[0.5], [0.5]])
    episodes = replace(episodes, truncated=torch.tensor([True, False]))
    same(ppo(0.9, 1.0, "none")(episodes).columns["advantages"], array([0.5, 0.5]))
    found = ppo(0.9, 1.0, "none", None, True)(episodes).columns
    same(found["advantages"], array([0.95, 0.5]))
    same(found["returns"], array([1.45, 1.0]))


def test_whitened_advantages_have_mean_0_and_variance_1_over_tokens():
    episodes = rollout(3)
    for name in ("reinforce_pp", "reinforce_pp_baseline", "ppo", "pure_min"):
        advantages = ESTIMATORS[name](episodes).columns["advantages"]
        assert float(advantages.mean()) == pytest.approx(0, abs=1e-8), name
        assert float(advantages.var()) == pytest.approx(1, rel=1e-6), name


def test_weighted_steps_go_to_the_smallest_as_the_temperature_falls():
    """Steps 0.5, -0.2, 0.3: nothing overflows at a temperature of 1e-6, and at a large one all weigh a third."""
    episodes = episodes_of(np.ones((1, 3)), scores=[0], steps=[[0.5, -0.2, 0.3]])
    same(weighted_steps(episodes, 1e-6), array([0, -0.2, 0]))
    same(weighted_steps(episodes, 1e9), array([0.5, -0.2, 0.3]) / 3, rtol=1e-8)


def test_pure_of_one_completion_has_no_baseline():
    """Steps -0.5 at token 1 and 0.25 at token 2, sum-form, score 2 with weight 0.5: to go 0.75, 0.75, 1.25."""
    episodes = episodes_of(np.ones((1, 3)), scores=[2], steps=[[math.nan, -0.5, 0.25]])
    for baseline in ("token", "step"):
        same(PURE(None, baseline, 0.5)(episodes).columns["advantages"], array([0.75, 0.75, 1.25]))
    # strict: 0 counts after the end, so the minimum from token 2 on is 0
    found = PUREStrictMin("min", 4, "none", 0.0)(episodes).columns["advantages"]
    same(found, array([-0.5, -0.5, 0]))
    full = PUREStrictMin("min", 3, "none", 0.0)(episodes).columns["advantages"]
    same(full, array([-0.5, -0.5, 0.25]))


def test_a_completion_without_steps_is_in_no_mean_per_step():
    """Steps 0.4 | none | 0.2: each of the two is compared with the other alone, the one without gets nothing."""
    steps = [[0.4], [math.nan], [0.2]]
    episodes = episodes_of(np.ones((3, 1)), scores=[0, 0, 0], index=[0, 0, 0], steps=steps)
    same(PURE(None, "step", 1.0)(episodes).columns["advantages"], array([0.2, 0, -0.2]))


def test_equal_scores_leave_pure_to_the_process_rewards():
    episodes = rollout()
    episodes = replace(episodes, scores=torch.zeros_like(episodes.scores))
    same(
        PURE(0.1, "token", 1.0)(episodes).columns["advantages"], PURE(0.1, "token", 0.0)(episodes).columns["advantages"]
    )


def test_a_completion_longer_than_the_length_is_refused():
    episodes = episodes_of(np.ones((1, 3)), scores=[0], steps=[[0.5, -0.2, 0.3]])
    with pytest.raises(ValueError, match=r"advantage\.length=2: a completion has 3 tokens"):
        PUREStrictMin("min", 2, "none", 0.0)(episodes)


def copo_of(scores, answers, group, blend):
    episodes = episodes_of(np.ones((len(scores), 1)), scores=scores, index=group)
    return COPO(blend, **COPO_SETTINGS)(replace(episodes, answers=tuple(answers))).columns


def test_copo_by_hand_with_groups_of_one():
    """Prompts a: scores 1, 0 with two answers; b: one completion of score 1. H = 1, 0; lambda of two = 1/2;
    R = 0.5 (1 - 1/2) = 0.25 and 1: +-0.375 of std 0.375 sqrt(2)."""
    columns = copo_of([1, 0, 1], ["x", "y", "z"], [0, 0, 1], "soft_forced")
    half = 1 / math.sqrt(2)
    same(columns["global_advantages"], array([-half, -half, half]), rtol=1e-5)
    soft = 1 / (1 + math.exp(-0.5))
    same(columns["local_weight"], array([soft, soft, 0]))


def test_copo_of_one_prompt_is_finite():
    columns = copo_of([1, 0], ["x", None], [0, 0], "soft")
    assert (columns["global_advantages"] == 0).all()
    assert all(torch.isfinite(v).all() for v in columns.values())
    columns = copo_of([1], [None], [0], "soft")
    assert all(torch.isfinite(v).all() for v in columns.values())


def test_copo_forces_the_global_loss_on_equal_scores_only():
    """A score at the mean of its group has local advantage 0 and still belongs to a group that differs."""
    columns = copo_of([0, 1, 2, 1, 1], ["a"] * 5, [0, 0, 0, 1, 1], "forced")
    assert columns["local_weight"].tolist() == [1, 1, 1, 0, 0]


# --- settings ---


@pytest.mark.parametrize("path", OPTIONS, ids=lambda p: p.stem)
def test_every_option_builds_and_runs(path):
    config = OmegaConf.load(path)
    if "length" in config.keys():  # noqa: SIM118 - a missing value is not "in"
        config.length = 9
    estimator = instantiate(config)
    assert estimator.needs <= {"greedy", "values", "steps", "answers", "group"}
    episodes = rollout(4)
    unneeded = {"greedy", "values", "steps", "answers"} - estimator.needs
    found = estimator(replace(episodes, **dict.fromkeys(unneeded)))
    assert found.columns["advantages"].abs().max() > 0
    assert all(name.startswith("advantage/") for name in found.metrics)


@pytest.mark.parametrize(
    "option, key, value, message",
    [
        ("remax", "form", "cumulated", "advantage.form=cumulated: must be one of one_step, to_go"),
        ("remax", "gamma", 1.5, "advantage.gamma=1.5: must be between 0 and 1"),
        ("remax", "clip", 0.0, "advantage.clip=0.0: must be greater than 0"),
        ("reinforce", "gamma", -0.1, "advantage.gamma=-0.1: must be between 0 and 1"),
        ("reinforce", "score_clip", [1, -1], "advantage.score_clip=[1, -1]: must be null or [low, high]"),
        ("rloo", "penalty", "after", "advantage.penalty=after: must be one of in_score, after_baseline"),
        ("grpo", "epsilon", 0.0, "advantage.epsilon=0.0: must be greater than 0"),
        ("reinforce_pp", "variance", "verl", "advantage.variance=verl: must be one of sample, population"),
        ("reinforce_pp", "penalty", "in_score", "advantage.penalty=in_score: without a group baseline"),
        ("reinforce_pp_baseline", "gamma", 0.9, "advantage.gamma=0.9: a group baseline is one number"),
        ("ppo", "lam", 2.0, "advantage.lam=2.0: must be between 0 and 1"),
        ("ppo", "whiten", "global", "advantage.whiten=global: must be one of none, sample, population"),
        ("pure", "temperature", 0.0, "advantage.temperature=0.0: must be greater than 0, or null"),
        ("pure", "baseline", "mean", "advantage.baseline=mean: must be one of token, step"),
        ("pure", "outcome_weight", -1.0, "advantage.outcome_weight=-1.0: must be at least 0"),
        ("pure_min", "length", 0, "advantage.length=0: must be at least 1"),
        ("copo", "blend", "none", "advantage.blend=none: must be one of local, global"),
        ("copo", "steepness", math.inf, "advantage.steepness=inf: must be greater than 0"),
        ("mrt", "alpha", math.nan, "advantage.alpha=nan: must be at least 0"),
    ],
)
def test_impossible_settings_are_refused_by_name(option, key, value, message):
    config = OmegaConf.load(ROOT / "configs" / "advantage" / f"{option}.yaml")
    if "length" in config.keys():  # noqa: SIM118 - a missing value is not "in"
        config.length = 9
    config[key] = value
    with pytest.raises(Exception, match="advantage") as error:
        instantiate(config)
    assert message in str(error.value.__cause__ or error.value)
    assert isinstance(error.value.__cause__ or error.value, ValueError)


def test_progress_refuses_an_estimator_that_reads_the_steps():
    with pytest.raises(ValueError, match=r"advantage\.inner"):
        Progress(1.0, PURE(0.1, "token", 1.0))


# --- the toys of docs/experiments/remax_toy.md and pure_toy.md ---


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_remax_has_a_fifth_of_the_variance_of_reinforce_at_most(seed):
    ratio = remax_toy.variance(remax_toy.SIDES["ReMax"], seed) / remax_toy.variance(remax_toy.SIDES["REINFORCE"], seed)
    assert ratio < remax_toy.VARIANCE_RATIO


def test_the_sum_of_process_rewards_breeds_fillers_and_their_minimum_does_not():
    fillers = {
        aggregate: pure_toy.learned(PUREStrictMin(aggregate, pure_toy.LIMIT, "none", 1.0), seed=0, steps=150)["fillers"]
        for aggregate in ("sum", "min")
    }
    assert fillers["sum"] > 6
    assert fillers["min"] < 0.6


@pytest.mark.parametrize("path", OPTIONS, ids=lambda path: path.stem)
def test_estimators_say_of_themselves_what_probing_finds(path):
    """Whoever checks settings reads it instead of computing."""
    node = OmegaConf.load(path)
    if OmegaConf.is_missing(node, "length"):
        node.length = 8
    estimator = instantiate(node)
    assert estimator.columns == set(estimator(probe(1.0, False)).columns)
    if estimator.scale_free is False:
        assert rescaling_effect(estimator, penalties=False) > NO_EFFECT


@pytest.mark.parametrize("estimator", [RLOO("in_score", (-1e-9, 1e-9)), Reinforce(1.0, (-1e-9, 1e-9))])
def test_a_clip_may_hide_a_factor_on_the_rewards(estimator):
    with pytest.raises(ValueError, match="has no effect with advantage=mine"):
        refuse_without_effect(estimator, "mine", penalties=False)


def test_what_a_subclass_computes_itself_is_not_taken_from_its_parent():
    class Whitened(RLOO):
        def __call__(self, episodes: Episodes) -> Estimate:
            found = super().__call__(episodes)
            advantages = found.columns["advantages"]
            return Estimate({"advantages": advantages / advantages.std(), "more": advantages}, found.metrics)

    class Renamed(RLOO):
        pass

    assert columns_of(Whitened("in_score", None)) == {"advantages", "more"}
    assert columns_of(Renamed("in_score", None)) == {"advantages"}
    refuse_without_effect(Renamed("in_score", None), "mine", penalties=False)
    with pytest.raises(ValueError, match="has no effect with advantage=mine"):
        refuse_without_effect(Whitened("in_score", None), "mine", penalties=False)
