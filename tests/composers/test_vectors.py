"""Composers against the numbers of the reference implementations: tests/vectors/online_public.json.

Tolerances are those of the vectors' description: 1e-10 relative.
"""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch

from align.advantages.baselines import GRPO, RLOO, ReinforcePlusPlus
from align.advantages.kl import kl_coefficient
from align.advantages.ppo import PPO
from align.composers.base import Observed, tensor
from align.composers.fixed import Directional, Fixed, Satisficing, direction, direction_weights
from align.composers.gradient import Gradient, influences
from align.composers.hypervolume import Hypervolume
from align.composers.invariance import rescaling_effect
from align.composers.lagrangian import Lagrangian
from align.composers.multipliers import GradientMultipliers, LogMultipliers
from align.composers.search import SimplexMethod
from align.composers.tchebycheff import Tchebycheff, raised, smooth_tchebycheff, tchebycheff
from align.evaluate.dialogue import dialogue_score
from align.types import Episodes

VECTORS = json.loads((Path(__file__).parents[1] / "vectors" / "online_public.json").read_text())


def entries(*algorithms):
    found = [e for e in VECTORS if e["algorithm"] in algorithms]
    assert found
    return [pytest.param(e["config"], e["inputs"], e["expected"], id=e["name"]) for e in found]


def meets(found, expected):
    torch.testing.assert_close(torch.as_tensor(found), tensor(expected), rtol=1e-10, atol=1e-12)


def lagrangian(names, thresholds, rule, **settings):
    given = {
        "ranges": {},
        "relation": "at_least",
        "objective": {"kl": 1.0},
        "mix": "complement",
        "whiten": True,
        "epsilon": 1e-8,
        "search": None,
    }
    return Lagrangian(names, thresholds=dict(zip(names, thresholds, strict=True)), rule=rule, **(given | settings))


def rule_of(config, initial):
    squash = "none" if not config["squash"] else "tanh" if config["equality"] else "sigmoid"
    lr = 0.0 if config.get("fixed") else config["lr"]
    momentum, max_norm = (config.get("momentum", 0.0), config.get("max_grad_norm", 1.0))
    return GradientMultipliers(squash, lr, momentum, max_norm, initial)


@pytest.mark.parametrize("config, given, expected", entries("constrained_multiplier_updates"))
def test_multipliers_and_mixed_advantages(config, given, expected):
    names = ["a", "b"]
    relation = "equal" if config["squash"] and config["equality"] else "at_least"
    mix = "complement" if config["squash"] else "normalised"  # the authors' unsquashed mixing is broken, not compared
    composer = lagrangian(
        names,
        given["thresholds"],
        rule_of(config, given["raw_init"][0]),
        relation=relation,
        mix=mix,
        whiten=config["normalize_advantage"],
    )
    raw, multipliers, mixed = [], [], []
    for _ in range(config["n_epochs"]):
        for batch in given["minibatches"]:
            raw.append(composer.state_dict()["rule"]["raw"])
            multipliers.append([composer.metrics()[f"multiplier/{n}"] for n in names])
            streams = torch.cat([tensor(batch["constraint_advantages"]), tensor(batch["kl_advantages"])[:, None]], 1)
            mixed.append(composer(streams).tolist())
            composer.update(Observed(means=tensor(batch["constraint_togo"]).mean(0)))
    raw.append(composer.state_dict()["rule"]["raw"])
    multipliers.append([composer.metrics()[f"multiplier/{n}"] for n in names])
    meets(tensor(raw), expected["raw_multipliers"])
    meets(tensor(multipliers), expected["multipliers"])
    if expected["mixed_advantages"] is not None:
        meets(tensor(mixed), expected["mixed_advantages"])


@pytest.mark.parametrize("config, given, expected", entries("constrained_gae"))
def test_advantages_of_each_stream_are_those_of_ppo(config, given, expected):
    """Whole episodes of the flat buffer. One that the buffer cuts goes on with a value after it, which this project has
    no token for: left out."""
    starts = tensor(given["episode_starts"])
    starts[0] = 1
    row = (starts.cumsum(0) - 1).long()
    whole = torch.ones(len(row), dtype=torch.bool) if given["last_done"] else row < row.max()
    assert bool(whole.any())
    estimator = PPO(config["gamma"], config["lam"], "none", None, False)
    streams = [(tensor(given["kl_rewards"]), tensor(given["kl_values"]), tensor(expected["kl_advantages"]))]
    for k in range(2):
        parts = (given["constraint_rewards"], given["constraint_values"], expected["constraint_advantages"])
        streams.append(tuple(tensor(part)[:, k] for part in parts))
    for rewards, values, advantages in streams:
        num = int(row.max()) + 1
        found = estimator(
            Episodes(
                scores=torch.zeros(num, dtype=torch.float64),
                group=torch.arange(num),
                row=row,
                truncated=torch.zeros(num, dtype=torch.bool),
                penalties=rewards,
                values=values,
            )
        ).columns["advantages"]
        meets(found[whole], advantages[whole].tolist())


@pytest.mark.parametrize("config, given, expected", entries("kl_controller_rl4lms"))
def test_adaptive_kl_coefficient(config, given, expected):
    coefficient, found = config["kl_coeff"], []
    for kl in given["kl"]:
        coefficient = kl_coefficient(coefficient, kl, config["target_kl"])
        found.append(coefficient)
    meets(tensor(found), expected["kl_coeff"])


@pytest.mark.parametrize("config, given, expected", entries("constrained_eval_score"))
def test_heldout_score_of_the_paper(config, given, expected):  # noqa: ARG001
    assert dialogue_score(given) == pytest.approx(expected["score"], rel=1e-10)


@pytest.mark.parametrize("config, given, expected", entries("ppo_sat_reward"))
def test_satisficing_reward_at_the_end_of_episodes(config, given, expected):  # noqa: ARG001
    composer = Satisficing(["a", "b"], thresholds=dict(zip("ab", given["thresholds"], strict=True)))
    done = tensor(given["done"]) > 0
    meets(composer(tensor(given["component_rewards"]), done), expected["reward"])


@pytest.mark.parametrize("config, given, expected", entries("nelder_mead_thresholds"))
def test_simplex_method_in_the_order_of_its_questions(config, given, expected):
    method = SimplexMethod(
        config["alpha"], config["gamma"], config["rho"], config["sigma"], config["tol"], cache_tolerance=5e-3
    )
    simplex = [tuple(p) for p in given["initial_simplex"]]
    points, values = [], []
    while True:
        point, history = method.replay(simplex, points, values, 100)
        if point is None:
            break
        points.append(point)
        parts = zip(point, given["quad_a"], given["quad_c"], strict=True)
        values.append(sum(a * (x - c) ** 2 for x, a, c in parts))
    meets(tensor(points), expected["evaluated_points"])
    meets(tensor(values), expected["evaluated_values"])
    meets(tensor(history), expected["simplex_log"])


@pytest.mark.parametrize("config, given, expected", entries("safe_rlhf_lambda"))
def test_multiplier_of_safe_rlhf(config, given, expected):
    rule = LogMultipliers(config["lambda_init"], config["lambda_max"], config["lambda_lr"], window=1, delay=0)
    composer = lagrangian(["cost"], [config["threshold"]], rule, relation="at_most", mix="normalised", whiten=False)
    found = []
    for cost in given["episode_costs"]:
        composer.update(Observed(means=tensor([cost])))
        found.append(composer.state_dict()["rule"]["log"][0])
    meets(tensor(found), expected["log_lambda"])


@pytest.mark.parametrize("config, given, expected", entries("safe_rlhf_step"))
def test_step_of_safe_rlhf_from_rewards_to_the_gradient(config, given, expected):
    mask = tensor(given["mask"]) > 0
    row, column = mask.nonzero(as_tuple=True)
    multiplier = math.exp(config["log_lambda"])
    composer = Lagrangian(
        ["reward", "cost"],
        thresholds={"cost": 0.0},
        ranges={},
        relation="at_most",
        objective={"reward": 1.0},
        rule=LogMultipliers(multiplier, 2 * multiplier, 0.1, 1, 0),
        mix="normalised",
        whiten=False,
        epsilon=1e-8,
        search=None,
    )
    assert composer.penalty_signs == (1.0, -1.0)
    penalties = -config["kl_coeff"] * (tensor(given["old_log_prob"]) - tensor(given["ref_log_prob"]))[mask]
    estimator = PPO(config["gamma"], config["lam"], "none", None, False)
    columns = []
    for k, name in enumerate(("reward", "cost")):
        episodes = Episodes(
            scores=tensor(given[name]),
            group=torch.arange(len(mask)),
            row=row,
            truncated=torch.zeros(len(mask), dtype=torch.bool),
            penalties=composer.penalty_signs[k] * penalties,
            values=tensor(given[f"{name}_values"])[mask],
        )
        columns.append(estimator(episodes).columns["advantages"])
        meets(columns[-1], tensor(expected[f"{name}_advantages"])[mask].tolist())
    advantages = torch.zeros(mask.shape, dtype=torch.float64)
    advantages[row, column] = composer(torch.stack(columns, 1))

    logps = tensor(given["log_prob"]).requires_grad_()
    ratio = (logps - tensor(given["old_log_prob"])).exp()
    clip = config["clip_range_ratio"]
    losses = -torch.minimum(ratio * advantages, ratio.clamp(1 - clip, 1 + clip) * advantages) * mask
    loss = (losses.sum(1) / mask.sum(1)).mean()
    loss.backward()
    meets(loss.detach(), expected["loss"])
    meets(logps.grad, expected["grad_log_prob"])


@pytest.mark.parametrize("config, given, expected", entries("drw_hv_meta"))
def test_hypervolume_factor_and_buffer(config, given, expected):
    names = [f"c{i}" for i in range(len(config["maximize"]))]
    composer = Hypervolume(
        names,
        weights=None,
        target="advantage",
        allow_no_effect=False,
        reference=dict(zip(names, given["reference_point"], strict=True)),
        spans={},
        minimise=[n for n, up in zip(names, config["maximize"], strict=True) if not up],
        lowest=0.5,
        gain=1.5,
    )
    told = []
    for point in given["points"]:
        composer.update(Observed(validation=tensor(point)))
        m = composer.metrics()
        told.append((m["pareto/factor"], m["pareto/contribution"], m["pareto/accepted"] + 1))
    factors, volumes, sizes = zip(*told, strict=True)
    meets(tensor(factors), expected["meta_reward"])
    meets(tensor(volumes), expected["hv_contribution"])
    assert list(sizes) == expected["buffer_size"]
    # contributions of all points together make up the volume
    assert composer.metrics()["pareto/hypervolume"] == pytest.approx(sum(expected["hv_contribution"]), rel=1e-10)


@pytest.mark.parametrize("config, given, expected", entries("drw_weights"))
def test_weights_from_gradients(config, given, expected):
    names = ["a", "b", "c"]
    composer = Gradient(
        names,
        weights=dict(zip(names, given["w0"], strict=True)),
        target="reward",
        apply="now",
        measure="exact",
        mu=config["mu"],
        accumulate=config["accumulation_steps"],
        min_weight=None,
        max_weight=None,
        max_norm=1.0,
        parameters=None,
    )
    found, weights = [], []
    for gradients, lr in zip(given["gradients"], config["lr"], strict=True):
        gram = tensor(gradients) @ tensor(gradients).T
        found.append(influences(gram, None, None).tolist())
        composer.update(Observed(influences=influences(gram, None, None), learning_rate=lr))
        weights.append(composer.weights.tolist())
    meets(tensor(found), expected["influence"])
    meets(tensor(weights), expected["weights"])


@pytest.mark.parametrize("config, given, expected", entries("drw_combined_reward"))
def test_combined_reward_of_tokens(config, given, expected):  # noqa: ARG001
    names = list(given["reward_tensors"])
    composer = Fixed(
        names,
        weights=dict(zip(names, given["weights"], strict=True)),
        normalise="none",
        epsilon=1e-8,
        target="reward",
    )
    streams = torch.stack([tensor(t) for t in given["reward_tensors"].values()], -1)
    meets(composer(streams.flatten(0, 1)), tensor(expected["token_level_scores"]).flatten().tolist())


@pytest.mark.parametrize("config, given, expected", entries("drw_meta_invariance"))
def test_a_factor_on_rewards_acts_where_the_reference_says(config, given, expected):  # noqa: ARG001
    """The probe tells from an estimator what the reference's numbers show."""
    ours = {
        "grpo_std": GRPO(True, 1e-6, "in_score", None),
        "grpo_nostd": GRPO(False, 1e-6, "in_score", None),
        "rloo": RLOO("in_score", None),
        "reinforce_pp": ReinforcePlusPlus(1.0, False, "after_baseline", None, "sample"),
    }
    for name, estimator in ours.items():
        moved = (tensor(expected[f"{name}_meta"]) - tensor(expected[f"{name}_one"])).abs().max() > 1e-3
        assert (rescaling_effect(estimator, penalties=False) > 1e-3) == bool(moved), name


@pytest.mark.parametrize("config, given, expected", entries("tchebycheff"))
def test_plain_and_smooth_tchebycheff(config, given, expected):
    """Values are minimised there: minus them are maximised here."""
    weights, ideal = tensor(given["weights"]), -tensor(given["ideal"])
    values = (-tensor(given["values"])).requires_grad_()
    meets(tchebycheff(weights, values, ideal).detach(), expected["tch"])
    smooth = smooth_tchebycheff(weights, values, ideal, config["mu"])
    meets(smooth.detach(), expected["stch"])
    smooth.sum().backward()
    meets(-values.grad, expected["stch_grad_values"])
    # the composer's weights are that gradient
    names = [f"c{i}" for i in range(weights.shape[1])]
    for w, v, gradient in zip(weights, values.detach(), tensor(expected["stch_grad_values"]), strict=True):
        composer = Tchebycheff(
            names,
            weights=dict(zip(names, (w / w.sum()).tolist(), strict=True)),
            target="reward",
            form="smooth",
            mu=config["mu"],
            eta=None,
            ideal=dict.fromkeys(names, 0.0),
            tau=0.0,
            decay=0.0,
        )
        composer.update(Observed(means=v))
        torch.testing.assert_close(composer.weights, gradient, rtol=1e-8, atol=1e-12)  # w sums to 1 but for rounding


@pytest.mark.parametrize("config, given, expected", entries("tchebycheff_running_ideal"))
def test_tchebycheff_with_the_best_so_far(config, given, expected):
    weights, best, found = tensor(given["weights"]), tensor([-math.inf] * 2), []
    for reward in map(tensor, given["rewards"]):
        best = raised(best, reward)
        found.append(-float(tchebycheff(weights, reward, best + config["tau"])))
    meets(tensor(found), expected["values"])


@pytest.mark.parametrize("config, given, expected", entries("dpa_direction"))
def test_directions_of_prompts(config, given, expected):  # noqa: ARG001
    directions = direction(tensor(given["degrees"]))
    assert [list(w) for w in direction_weights(directions)] == expected["prompt_weights"]
    rewards, composer = tensor(given["rewards"]), Directional(["helpfulness", "verbosity"], degrees=None, message="")
    found = [composer(rewards, None, v.expand(len(rewards), 2)).tolist() for v in directions]
    meets(tensor(found), expected["scalar"])
