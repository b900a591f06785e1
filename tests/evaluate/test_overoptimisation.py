"""Laws, fits and curves of over-optimisation: the vectors, points made by a law, pools small enough to count."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest

from align.evaluate.best_of_n import kl_bound
from align.evaluate.overoptimisation import (
    fit,
    law_rewards,
    lines,
    peak,
    pools,
    read_rows,
    report,
    sequence_kl,
    student,
    write,
)

VECTORS = json.loads((Path(__file__).parents[1] / "vectors" / "reward_public.json").read_text())


def named(algorithm: str) -> list[dict]:
    found = [e for e in VECTORS if e["algorithm"] == algorithm]
    assert found
    return found


@pytest.mark.parametrize("entry", named("overoptimisation_curve"), ids=lambda e: e["name"])
def test_vectors_of_the_laws(entry):
    alpha, beta, wanted = entry["config"]["alpha"], entry["config"]["beta"], entry["expected"]
    d = entry["inputs"]["d"]
    np.testing.assert_allclose(law_rewards("bon", d, alpha, beta), wanted["R_bon"], rtol=0, atol=1e-9)
    np.testing.assert_allclose(law_rewards("rl", d, alpha, beta), wanted["R_rl"], rtol=0, atol=1e-9)
    bon, rl = peak("bon", alpha, beta), peak("rl", alpha, beta)
    assert (bon.distance, bon.reward) == pytest.approx((wanted["d_peak_bon"], wanted["R_peak_bon"]), abs=1e-9)
    assert (rl.distance, rl.reward) == pytest.approx((wanted["d_peak_rl"], wanted["R_peak_rl"]), rel=1e-14)
    kl = kl_bound(np.array(entry["inputs"]["n"]))
    np.testing.assert_allclose(kl, wanted["kl_bon"], rtol=0, atol=1e-9)
    np.testing.assert_allclose(np.sqrt(kl), wanted["d_bon"], rtol=0, atol=1e-9)


@pytest.mark.parametrize("entry", named("kl_estimators"), ids=lambda e: e["name"])
def test_vectors_of_the_kl(entry):
    """The repository's k3 is exp(d) - 1 - d with d = log policy - log initial: ours with the sign of d turned."""
    d, mask = np.array(entry["inputs"]["logp_minus_ref"]), entry["inputs"]["mask"]
    wanted = entry["expected"]
    assert sequence_kl(d, mask, "k1") == pytest.approx(wanted["k1_mean_per_sequence"], abs=1e-9)
    assert sequence_kl(d, mask, "k2") == pytest.approx(wanted["k2_mean_per_sequence"], abs=1e-9)
    assert sequence_kl(-d, mask, "k3") == pytest.approx(wanted["k3_mean_per_sequence"], abs=1e-9)
    assert sequence_kl(d, mask, "k3") != pytest.approx(wanted["k3_mean_per_sequence"], abs=1e-3)


def test_k1_and_k3_are_unbiased_for_the_policy_s_own_samples():
    """Every token of a vocabulary of three as often as the policy draws it: the mean is the KL itself, for the other
    sign of k3 it is not."""
    policy, initial = np.array([0.5, 0.3, 0.2]), np.array([0.2, 0.2, 0.6])
    exact = float((policy * np.log(policy / initial)).sum())
    drawn = np.repeat([0, 1, 2], [5, 3, 2])
    d = np.log(policy / initial)[drawn][:, None]
    mask = np.ones_like(d)
    assert sequence_kl(d, mask, "k1") == pytest.approx(exact, abs=1e-12)
    assert sequence_kl(d, mask, "k3") == pytest.approx(exact, abs=1e-12)
    # of the other sign it is chi squared less the KL
    chi_squared = float((policy**2 / initial).sum()) - 1
    assert sequence_kl(-d, mask, "k3") == pytest.approx(chi_squared - exact, abs=1e-12)
    assert abs(chi_squared - 2 * exact) > 0.04
    with pytest.raises(ValueError, match="estimator=k4: must be one of k1, k2, k3"):
        sequence_kl(d, mask, "k4")


@pytest.mark.parametrize("law", ["bon", "rl"])
def test_a_peak_is_where_the_law_is_highest(law):
    found = peak(law, 1.2, 0.5)
    d = np.linspace(0, 20, 200_001)
    rewards = law_rewards(law, d, 1.2, 0.5)
    assert found.distance == pytest.approx(d[rewards.argmax()], abs=1e-3)
    assert found.reward == pytest.approx(rewards.max(), abs=1e-6)


def test_laws_without_a_peak():
    assert peak("bon", 1.0, 0.0) is None
    assert peak("bon", 1.0, -0.1) is None
    assert peak("bon", -1.0, 0.1) is None
    assert peak("rl", 1.0, -0.1) is None
    assert peak("rl", 1.0, 1e-4) is None  # at exp(9999)
    assert peak("rl", -1.0, 1.0).distance == pytest.approx(math.exp(-2))
    with pytest.raises(ValueError, match="law=ppo: must be one of bon, rl"):
        law_rewards("ppo", [1.0], 1.0, 1.0)


@pytest.mark.parametrize("law", ["bon", "rl"])
def test_a_fit_finds_the_law_that_made_the_points(law):
    d = np.array([0.0, 0.05, 0.44, 0.8, 1.35, 1.8, 2.4])
    rewards = law_rewards(law, d, 0.7, 0.25)
    rewards[:2] += 0.3  # too near: not read
    found = fit(law, d, rewards)
    assert (found.alpha, found.beta, found.rms) == pytest.approx((0.7, 0.25, 0.0), abs=1e-12)
    assert (found.num_points, found.num_dropped) == (5, 2)
    assert found.peak.distance == pytest.approx(peak(law, 0.7, 0.25).distance)
    all_of_them = fit(law, d[1:], rewards[1:], min_distance=0.01)
    assert abs(all_of_them.alpha - 0.7) > 0.3  # what the point at 0.05 would do


def test_a_fit_is_the_regression_of_reward_over_distance():
    """Three points by hand: d 1, 2, 3 and R / d 1, 1, 0: the slope is -1/2, the intercept 5/3."""
    found = fit("bon", [1.0, 2.0, 3.0], [1.0, 2.0, 0.0])
    assert (found.alpha, found.beta) == pytest.approx((5 / 3, 1 / 2))
    # R of the law: 7/6, 4/3, 1/2
    assert found.rms == pytest.approx(math.sqrt(((1 / 6) ** 2 + (2 / 3) ** 2 + (1 / 2) ** 2) / 3))


def test_points_that_cannot_be_fitted():
    with pytest.raises(ValueError, match="two distances of at least 0.1"):
        fit("bon", [0.0, 1.0], [0.0, 1.0])
    with pytest.raises(ValueError, match="finite numbers of the same length"):
        fit("bon", [1.0, 2.0], [0.0, math.nan])
    with pytest.raises(ValueError, match="min_distance=0: must be greater than 0"):
        fit("rl", [1.0, 2.0], [0.0, 1.0], min_distance=0)


def test_the_interval_over_seeds():
    """1, 2, 3: mean 2, standard error 1 / sqrt 3, 4.3027 of them each way."""
    found = student([1.0, 2.0, 3.0])
    assert (found.mean, found.high - found.mean) == pytest.approx((2.0, 4.3027 / math.sqrt(3)))
    many = student(np.tile([0.0, 2.0], 16))  # 31 degrees of freedom: 2.0395
    assert many.high - many.mean == pytest.approx(2.0395 / math.sqrt(31), rel=1e-4)  # deviation sqrt(32 / 31)
    with pytest.raises(ValueError, match="at least two"):
        student([1.0])


def row(proxy: dict[str, list], gold: list, **more) -> dict:
    completions = [
        {"text": str(i), "proxy": {name: values[i] for name, values in proxy.items()}, "gold": g}
        for i, g in enumerate(gold)
    ]
    return {"prompt": "Write.", "completions": completions} | more


def placed(rows: list[dict]) -> list[tuple[str, dict]]:
    return [(f"f.jsonl:{k}", r) for k, r in enumerate(rows, 1)]


def test_a_curve_by_hand():
    """Gold 0 1 2 3 with mean 1.5 and deviation sqrt 1.25. A proxy that knows it takes (0+1*0 .. )/6: best of 2 is
    (1 + 2*2 + 3*3) / 6 = 7/3, best of 4 is 3; one that has it the wrong way round (2 + 2*1 + 3*0) / 6 = 2/3, and 0."""
    gold = [0.0, 1.0, 2.0, 3.0]
    data = report(placed([row({"right": [5.0, 6.0, 7.0, 8.0], "wrong": [4.0, 3.0, 2.0, 1.0]}, gold)]))
    scale = math.sqrt(1.25)
    assert data["n"] == [1, 2, 4]
    assert data["gold_scale"] == {"mean": 1.5, "std": pytest.approx(scale)}
    right, wrong = data["curves"]["right"], data["curves"]["wrong"]
    assert [v["mean"] for v in right["gold"]] == pytest.approx([0, (7 / 3 - 1.5) / scale, 1.5 / scale])
    assert [v["mean"] for v in wrong["gold"]] == pytest.approx([0, (2 / 3 - 1.5) / scale, -1.5 / scale])
    # both proxies think the same of their own choice: each is in its own deviations
    assert [v["mean"] for v in wrong["proxy"]] == pytest.approx([v["mean"] for v in right["gold"]])
    assert [v["mean"] for v in wrong["gold_minus_first"]] == pytest.approx([0, -5 / 3 / scale, -3 / scale])
    assert "gold_minus_first" not in right
    assert right["measured_peak"]["n"] == 4
    assert wrong["measured_peak"] == {"n": 1, "distance": 0.0, "gold": 0.0}
    assert wrong["lost_after_peak"] == pytest.approx(1.5 / scale)
    assert data["distance"] == pytest.approx([0, math.sqrt(math.log(2) - 1 / 2), math.sqrt(math.log(4) - 3 / 4)])
    assert data["intervals"] is None
    assert right["gold"][1]["low"] is None
    assert data["first"] == "right"


def hacked(rng: np.random.Generator, count: int = 400) -> tuple[dict[str, list[float]], list[float]]:
    """A proxy that follows gold, but for some completions that it loves and gold hates."""
    gold = rng.normal(size=count)
    proxy = gold + 0.3 * rng.normal(size=count)
    traps = rng.choice(count, 4, replace=False)
    gold[traps], proxy[traps] = -3.0, 6.0
    return {"single": proxy.tolist(), "oracle": gold.tolist()}, gold.tolist()


def test_an_exploitable_proxy_peaks_and_falls_while_it_thinks_well_of_itself(rng):
    rows = [row(*hacked(rng), seed=seed) for seed in range(5)]
    data = report(placed(rows))
    single, oracle = data["curves"]["single"], data["curves"]["oracle"]
    assert data["num_seeds"] == 5
    assert data["intervals"] == "seeds"
    assert 1 < single["measured_peak"]["n"] < 256
    assert single["lost_after_peak"] > 1
    assert (np.diff([v["mean"] for v in single["proxy"]]) > 0).all()
    assert oracle["measured_peak"]["n"] == 256
    assert oracle["lost_after_peak"] == 0
    last = oracle["gold_minus_first"][-1]
    assert 0 < last["low"] < last["mean"] < last["high"]
    assert single["fits"]["bon"]["beta"] > oracle["fits"]["bon"]["beta"]
    assert len(single["fits"]["bon"]["beta_by_seed"]) == 5
    fitted = single["fits"]["bon"]["peak"]["distance"]
    assert 0 < fitted < data["distance"][-1]


def test_what_must_change_nothing(rng):
    rows = [row(*hacked(rng, 60)) for _ in range(4)]
    before = report(placed(rows), ns=[2, 8, 32])
    assert before["n"] == [1, 2, 8, 32]
    assert before["intervals"] == "prompts"
    changed = []
    for r in rows:
        completions = [
            c | {"proxy": c["proxy"] | {"single": 10 * c["proxy"]["single"] - 3}, "gold": 5 * c["gold"]}
            for c in r["completions"]
        ]
        changed.append(r | {"completions": [completions[i] for i in rng.permutation(60)]})
    after = report(placed(changed), ns=[32, 8, 2])
    for name, curve in before["curves"].items():
        for kind in ("gold", "proxy"):
            for a, b in zip(curve[kind], after["curves"][name][kind], strict=True):
                assert [a["mean"], a["low"], a["high"]] == pytest.approx([b["mean"], b["low"], b["high"]], abs=1e-9)


def test_missing_scores_are_left_out_of_every_curve():
    whole = row({"a": [1.0, 2.0, 3.0], "b": [3.0, 1.0, 2.0]}, [1.0, 2.0, 4.0])
    holed = row({"a": [1.0, 2.0, 9.0, 3.0], "b": [3.0, 1.0, None, 2.0]}, [1.0, 2.0, 9.0, 4.0])
    with_gold_missing = row({"a": [1.0, 2.0, 3.0, 7.0], "b": [3.0, 1.0, 2.0, 7.0]}, [1.0, 2.0, 4.0, None])
    assert pools(placed([whole]))[1] == 0
    plain = report(placed([whole]))
    for other in (holed, with_gold_missing):
        data = report(placed([other]))
        assert data["left_out"] == 1
        assert data["curves"] == plain["curves"]


@pytest.mark.parametrize(
    "bad, message",
    [
        ({"prompt": "a"}, "f.jsonl:2: completions must be a list"),
        ({"prompt": "a", "completions": []}, "f.jsonl:2: completions must be a list with at least one"),
        ({"completions": ["x"]}, 'f.jsonl:2: completion 1 must hold "proxy"'),
        ({"completions": [{"proxy": {"a": 1.0}}]}, 'f.jsonl:2: completion 1 must hold "proxy".* and "gold"'),
        (row({"b": [1.0]}, [1.0]), r"f.jsonl:2: completion 1 has the proxies \['b'\], the first one has \['a'\]"),
        (row({"a": [1.0, "2"]}, [1.0, 2.0]), "f.jsonl:2: completion 2: a is '2', must be a finite number or null"),
        (row({"a": [1.0, 2.0]}, [1.0, math.inf]), "f.jsonl:2: completion 2: gold is inf"),
        (row({"a": [True]}, [1.0]), "f.jsonl:2: completion 1: a is True"),
        (row({"a": [None]}, [1.0]), "f.jsonl:2: no completion has all of its scores"),
    ],
)
def test_rows_that_cannot_be_used(bad, message):
    with pytest.raises(ValueError, match=message):
        report(placed([row({"a": [1.0, 2.0]}, [1.0, 2.0]), bad]))


def test_reports_that_cannot_be_made():
    with pytest.raises(ValueError, match="no rows"):
        report([])
    with pytest.raises(ValueError, match="n=4: must be from 1 to 2, the fewest completions"):
        report(placed([row({"a": [1.0, 2.0]}, [1.0, 2.0])]), ns=[4])
    with pytest.raises(ValueError, match="gold is the same for all completions"):
        report(placed([row({"a": [1.0, 2.0, 3.0]}, [0.1, 0.1, 0.1])]))


def test_a_file_is_read(tmp_path, rng):
    path = tmp_path / "scored.jsonl"
    rows = [row(*hacked(rng, 40), seed=seed) for seed in range(2)]
    path.write_text("".join(json.dumps(r) + "\n" for r in rows))
    data = report(read_rows([str(path)]))
    assert data == report(placed(rows))
    told = lines(data)
    assert told[0] == "80 completions of 2 prompts, 2 seeds, 0 without all scores left out; 95 % intervals over seeds"
    assert [line.split(":")[0] for line in told[1:]] == ["single", "oracle"]
    assert "; less single +" in told[2]
    path.write_text(json.dumps(rows[0]) + "\n{\n")
    with pytest.raises(ValueError, match=r"scored\.jsonl:2: "):
        report(read_rows(str(path)))
    with pytest.raises(ValueError, match=r"no such file"):
        report(read_rows(str(tmp_path / "nothing.jsonl")))


def test_the_files(tmp_path, rng):
    data = report(placed([row(*hacked(rng), seed=seed) for seed in range(3)]))
    text, picture = write(data, tmp_path / "out")
    assert json.loads(text.read_text()) == data
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert picture.stat().st_size > 10_000
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == ["overoptimisation.json", "overoptimisation.png"]
    first = picture.read_bytes()
    write(data, tmp_path / "out")
    assert picture.read_bytes() == first
    # one prompt, one completion: a point, without fits or intervals
    write(report(placed([row({"a": [1.0, 2.0]}, [1.0, 2.0])]), ns=[1]), tmp_path / "small")
    assert (tmp_path / "small" / "overoptimisation.png").exists()
