"""Several rewards in online runs: what reaches the update, what is watched, what is refused, and kills."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch

from align.advantages.baselines import GRPO, RLOO, ReinforcePlusPlus, ReMax
from align.cli import main
from align.composers.base import weighted, whitened
from align.rollout.base import EngineFailed
from align.rollout.hf import HFRollout
from align.trainers.experience import episodes
from tests.conftest import mostly_slow
from tests.killer import Hook, shared
from tests.trainers.online_runs import REWARDS, assert_survives, left, prompts_file, ready, rows_of, words_of

pytestmark = pytest.mark.xdist_group("composing")  # all are compared with the same undisturbed runs

TWO = (f"reward.mixed._target_={REWARDS}mixed", f"reward.coin._target_={REWARDS}coin")
RLOO_WORDS = ("objective=policy_gradient", "advantage=rloo", *TWO)
MU = ("composer=lagrangian_mu", "composer.thresholds.mixed=0.9", "composer.thresholds.coin=0.1")
KL = ("trainer.kl_in_reward=0.05", "trainer.old_logps=trainer")
SEARCH = (
    "composer=lagrangian_search", "composer.search.low.mixed=0.2", "composer.search.high.mixed=0.6",
    "composer.search.low.coin=0.3", "composer.search.high.coin=0.7", "composer.search.metric=total_greedy",
    "composer.search.steps=1",
)  # fmt: skip
# name -> words
FAMILY = {
    "mu": (*RLOO_WORDS, *KL, *MU, "lora.rank=4"),
    "search": (*RLOO_WORDS, *KL, *SEARCH, "lora.rank=4"),
    "hypervolume": (*RLOO_WORDS, "composer=hypervolume", "composer.reference.mixed=0", "composer.reference.coin=-1"),
    "gradient": (
        *RLOO_WORDS, "composer=gradient", "optimizer.lr=1e-3", "composer.mu=1e-2", "composer.accumulate=2",
        "lora.rank=4",
    ),
    "directional": (
        *RLOO_WORDS, "composer=gradient", "optimizer.lr=1e-3", "composer.mu=1e-2", "composer.apply=next",
        "composer.measure=directional", "composer.max_norm=null", "composer.target=advantage", "lora.rank=4",
    ),
    "tchebycheff": (*RLOO_WORDS[:1], "advantage=remax", *TWO, "composer=tchebycheff_smooth", "lora.rank=4"),
    "ppo": (
        "objective=clipped", "advantage=ppo", *TWO, *KL, *MU, "objective.value_coefficient=0.5",
        "objective.value_clip=0.2", "trainer.num_minibatches=2", "lora.rank=4",
    ),
}  # fmt: skip


@pytest.fixture(scope="module")
def straight(tmp_path_factory):
    """A function name -> what the run of FAMILY that nothing happens to leaves."""
    base = tmp_path_factory.mktemp("composing")
    done = {}

    def evidence_of(name):
        if name not in done:
            run = base / name
            ended = shared().run(["train", *words_of(base, f"run.dir={run}", *FAMILY[name])])
            assert ended.code == 0, ended.said
            done[name] = left(run)
        return base, done[name]

    return evidence_of


# --- what reaches the update


def weights_of(run):
    return (run / "final" / "model.safetensors").read_bytes()


def test_a_composed_reward_that_is_the_reward_trains_the_same_bits(tmp_path):
    """Half of a number twice is the number: composed or alone, the run is the same."""
    same = (f"reward.a._target_={REWARDS}mixed", f"reward.b._target_={REWARDS}mixed")
    half = ("composer=fixed", "composer.normalise=none", "composer.target=reward")
    base = ("objective=policy_gradient", "advantage=rloo", "trainer.max_steps=2")
    assert main(["train", *words_of(tmp_path, *base, *same, *half, f"run.dir={tmp_path / 'two'}")]) == 0
    assert main(["train", *words_of(tmp_path, *base, same[0], f"run.dir={tmp_path / 'one'}")]) == 0
    assert weights_of(tmp_path / "two") == weights_of(tmp_path / "one")
    two, one = rows_of(tmp_path / "two"), rows_of(tmp_path / "one")
    assert [row["loss/total"] for row in two] == [row["loss/total"] for row in one]
    assert two[0]["reward/composed"] == one[0]["reward/total"]


ESTIMATORS = {
    "rloo": RLOO("after_baseline", None),
    "grpo": GRPO(True, 1e-6, "after_baseline", None),
    "reinforce_pp": ReinforcePlusPlus(1.0, False, "after_baseline", None, "sample"),
    "remax": ReMax("to_go", 1.0, None),
}


@pytest.mark.parametrize("name", ESTIMATORS)
def test_advantages_are_estimated_alone_whitened_and_mixed(tmp_path, name):
    """By the formula, from the rewards of a real step: each stream's estimate, the KL's with scores of 0."""
    words = (*RLOO_WORDS, *KL, *MU, f"advantage={name}", "lora.rank=4")
    training = ready(tmp_path, *words)
    try:
        training.composing.advantage = ESTIMATORS[name]
        greedy = name == "remax"
        training.sampler.greedy = greedy
        groups, _ = training.sampler.of(1)
        rewards = torch.from_numpy(np.concatenate([g.rewards for g in groups]))
        counts = torch.tensor([len(c.token_ids) for g in groups for c in g.completions])
        penalties = torch.randn(int(counts.sum()), dtype=torch.float64)
        rows = _rows(groups)
        told = episodes(groups, rows, ESTIMATORS[name].needs, [penalties.numpy()], None)
        found, metrics = training.composing.estimate(groups, told)
        streams = []
        for k in (0, 1, None):
            scores = torch.zeros(len(rewards), dtype=torch.float64) if k is None else rewards[:, k]
            twins = torch.tensor([0.0 if k is None else g.greedy_rewards[k] for g in groups]) if greedy else None
            alone = _replace(told, scores=scores, greedy=twins, penalties=penalties if k is None else None)
            streams.append(ESTIMATORS[name](alone).columns["advantages"])
        streams = torch.stack(streams, 1)
        keep = torch.ones(len(streams), dtype=torch.bool)
        # N - sum of multipliers for the KL; both start at sigmoid(0)
        weights = torch.tensor([0.5, 0.5, 1.0], dtype=torch.float64)
        expected = weighted(whitened(streams, keep, 1e-8), weights, keep)
        torch.testing.assert_close(found.columns["advantages"], expected, rtol=1e-12, atol=1e-12)
        assert metrics["advantage/std_kl"] > 0
    finally:
        training.close()


def _rows(groups):
    from align.trainers.experience import examples

    return [row for e in examples(groups, "keep", "packed", 256) for row in e.rows]


def _replace(told, **fields):
    from dataclasses import replace

    return replace(told, **fields)


# --- what is watched


def test_multipliers_follow_constant_violations(tmp_path):
    """0.9 is out of mixed's reach and 0.1 below all that coin can miss for long: one rises, one falls."""
    words = words_of(tmp_path, f"run.dir={tmp_path / 'run'}", *FAMILY["mu"], "trainer.max_steps=6")
    assert main(["train", *words]) == 0
    rows = rows_of(tmp_path / "run")
    rising = [row["multiplier/mixed"] for row in rows]
    assert rising == sorted(rising)
    assert rising[0] > 0.5
    assert all(row["violation/mixed"] == pytest.approx(0.9 - row["reward/mixed"]) for row in rows)
    assert all(row["weight/kl"] == pytest.approx(2 - row["multiplier/mixed"] - row["multiplier/coin"]) for row in rows)
    assert rows[-1]["multiplier/coin"] < 0.5


def test_the_search_tries_points_and_is_measured_when_it_asks(straight):
    rows = straight("search")[1]["rows"]
    assert [row["search/points"] for row in rows] == [1, 2, 3, 4, 5]
    assert all("heldout/total_greedy" in row for row in rows)  # every step, beside eval_every=2
    assert len({row["threshold/mixed"] for row in rows}) == 5
    assert max(-row["search/best_score"] for row in rows) == -rows[0]["heldout/total_greedy"]


def test_the_front_grows_with_evaluations_only(straight):
    rows = straight("hypervolume")[1]["rows"]
    assert rows[0]["pareto/factor"] == 1
    assert rows[0]["pareto/hypervolume"] == 0
    seen = [row for row in rows if "heldout/mixed" in row]
    assert [row["step"] for row in seen] == [2, 4, 5]
    first = seen[0]
    box = first["heldout/mixed"] * (first["heldout/coin"] + 1)
    assert first["pareto/hypervolume"] == pytest.approx(box)
    assert first["pareto/factor"] == pytest.approx(0.5 + 1.5 * np.tanh(box))
    volumes = [row["pareto/hypervolume"] for row in seen]
    assert volumes == sorted(volumes)
    assert rows[2]["pareto/factor"] == first["pareto/factor"]


def test_the_reference_point_is_the_untrained_policy(tmp_path):
    words = [w for w in FAMILY["hypervolume"] if "reference" not in w]
    run = tmp_path / "run"
    assert main(["train", *words_of(tmp_path, f"run.dir={run}", *words, "trainer.max_steps=1")]) == 0
    state = json.loads((run / "checkpoints" / "step-000001" / "state.json").read_text())
    before = [json.loads(line) for line in (run / "heldout-before.jsonl").read_text().splitlines()]
    drawn = [s["rewards"] for line in before for s in line["samples"]]
    expected = [float(np.mean([r[name] for r in drawn])) for name in ("mixed", "coin")]
    assert _find(state, "composer")["reference"] == pytest.approx(expected)


def _find(node, key):
    if key in node:
        return node[key]
    return next(found for v in node.values() if isinstance(v, dict) and (found := _find(v, key)))


def test_weights_move_with_influences(straight):
    """accumulate=2: they move after every second step."""
    rows = straight("gradient")[1]["rows"]
    weights = [row["weight/mixed"] for row in rows]
    assert weights[0] == 0.5 != weights[1] == weights[2] != weights[3] == weights[4]
    for row in rows:
        assert abs(row["influence/mixed"]) <= 2
        assert -1 <= row["gradient/cos_mixed_coin"] <= 1
    other = straight("directional")[1]["rows"]
    assert {"influence/mixed", "weight/coin"} <= other[0].keys()
    assert other[0]["weight/mixed"] != 0.5


def test_a_value_for_each_stream(straight):
    told = straight("ppo")[1]
    rows = told["rows"]
    assert {"advantage/explained_variance_mixed", "advantage/explained_variance_kl"} <= rows[-1].keys()
    assert told["model.safetensors"]


@pytest.mark.slow
def test_influences_of_an_update_with_a_value_head(tmp_path):
    """Measured exactly or by a difference before it, or beside it: the same but for the difference's error."""
    words = (
        "objective=clipped", "advantage=ppo", *TWO, *KL, "objective.value_coefficient=0.5", "objective.value_clip=0.2",
        "composer=gradient", "composer.target=advantage", "composer.max_norm=null", "trainer.max_steps=1",
    )  # fmt: skip
    found = {}
    for measure, moment in (("exact", "now"), ("directional", "now"), ("directional", "next")):
        run = tmp_path / f"{measure}-{moment}"
        more = (f"composer.measure={measure}", f"composer.apply={moment}", f"run.dir={run}")
        assert main(["train", *words_of(tmp_path, *words, *more)]) == 0
        row = rows_of(run)[0]
        found[measure, moment] = [row[f"influence/{name}"] for name in ("mixed", "coin")]
    truth = found.pop(("exact", "now"))
    for near in found.values():
        assert near == pytest.approx(truth, rel=0, abs=1e-3 * max(map(abs, truth)))


def test_pictures_are_in_the_run(straight):
    base, _ = straight("mu")
    assert (base / "mu" / "plots" / "multipliers.png").stat().st_size > 5000
    assert (base / "mu" / "plots" / "front.png").exists()


@pytest.mark.slow
def test_runs_differ_by_their_composer(straight):
    last = {name: straight(name)[1]["rows"][-1]["loss/total"] for name in FAMILY}
    assert len(set(last.values())) == len(FAMILY)


def test_directions_of_prompts_reach_the_scores(tmp_path):
    train = prompts_file(tmp_path / "prompts.jsonl")
    rows = [json.loads(line) for line in train.read_text().splitlines()]
    for i, row in enumerate(rows):
        row["direction"] = [[1, 0], [0.6, 0.8]][i % 2]
    train.write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "heldout.jsonl").write_text('{"prompt": "what now?", "direction": [0, 1]}\n')
    words = (*RLOO_WORDS, "composer=directional", "trainer.max_steps=1", "trainer.batch_size=11")
    assert main(["train", *words_of(tmp_path, f"run.dir={tmp_path / 'run'}", *words)]) == 0
    found = rows_of(tmp_path / "run")[0]["reward/composed"]
    samples = [json.loads(line) for line in (tmp_path / "run/samples/step-000001.jsonl").read_text().splitlines()]
    given = {row["prompt"][0]["content"]: row["direction"] for row in rows}
    told = [
        given[s["prompt"]][0] * c["rewards"]["mixed"] + given[s["prompt"]][1] * c["rewards"]["coin"]
        for s in samples
        for c in s["samples"]
    ]
    assert found == pytest.approx(np.mean(told))


# --- what is refused


BAD_SETTINGS = [
    (
        (*RLOO_WORDS, "composer=gradient", "advantage=ppo", "objective=clipped", "objective.value_coefficient=0.1"),
        "composer.target=reward: advantage=ppo has one value for the composed reward",
    ),
    ((*RLOO_WORDS, *MU), "trainer.kl_in_reward=0 leaves empty; set trainer.kl_in_reward=0.05"),
    ((*RLOO_WORDS[:2], TWO[0], "composer=fixed"), "composer: 1 component with a weight, nothing to compose"),
    ((*RLOO_WORDS, "composer=fixed", "reward.coin.weight=0.5"), "reward.coin.weight=0.5 has no effect with composer="),
    ((*RLOO_WORDS, "composer=fixed", "composer.weights.mixed=1"), "composer.weights.coin is missing"),
    ((*RLOO_WORDS, *KL, *MU, "trainer.dynamic_sampling=1"), "with composer=lagrangian_mu every prompt teaches the KL"),
    ((*RLOO_WORDS, "composer=hypervolume", "trainer.eval_every=0"), "set trainer.eval_every, for example to 5"),
    ((*RLOO_WORDS, "composer=hypervolume", "trainer.num_samples=0"), "set data.heldout, and trainer.num_samples above"),
    (
        (*RLOO_WORDS, "composer=hypervolume", "composer.target=reward", "advantage=grpo"),
        "composer.target=reward: has no effect with advantage=grpo",
    ),
    (
        (*RLOO_WORDS, "composer=fixed", "advantage=copo"),
        "composer.target=advantage: advantage=copo gives more than one",
    ),
    ((*RLOO_WORDS, *KL, *SEARCH, "composer.search.metric=bleu"), "composer.search.metric=bleu: there are total_greedy"),
    (
        (*RLOO_WORDS, "composer=gradient", "composer.parameters='(['"),
        "composer.parameters=([: is no regular expression",
    ),
]
BAD_IN_A_RUN = [  # seen when a model, a composer or rewards are there
    ((*RLOO_WORDS, "composer=gradient", "composer.parameters=nothing"), "composer.parameters=nothing: matches no trai"),
    (
        (*RLOO_WORDS, *KL, *MU, "composer.thresholds.odd=1"),
        "composer.thresholds.odd: no component with a weight has th",
    ),
    ((*RLOO_WORDS, "composer=directional"), "a list of 2 numbers is needed in the column direction, found None"),
    (
        (*RLOO_WORDS, *KL, *MU, f"reward.coin._target_={REWARDS}never"),
        "the mean reward of coin is no number: no completion of the step has a finite one",
    ),
]


def refused(tmp_path, capsys, words) -> str:
    assert main(["train", *words_of(tmp_path, f"run.dir={tmp_path / 'run'}", *words)]) == 2
    return " ".join(capsys.readouterr().err.split())


@pytest.mark.parametrize("words, message", BAD_IN_A_RUN, ids=[message[:50] for _, message in BAD_IN_A_RUN])
def test_refused(tmp_path, capsys, words, message):
    assert message in refused(tmp_path, capsys, words)


@pytest.mark.parametrize("words, message", BAD_SETTINGS, ids=[message[:50] for _, message in BAD_SETTINGS])
def test_refused_without_a_model(tmp_path, capsys, monkeypatch, words, message):
    """What settings alone show is told before anything heavy."""
    monkeypatch.setattr("align.trainers.online.run.start", lambda *_: pytest.fail("a run was started"))
    assert message in refused(tmp_path, capsys, words)


def test_offline_training_has_no_composer(capsys):
    assert main(["check", "recipe=dpo", "composer=fixed"]) == 2
    assert "composer has no effect with trainer.kind=offline; remove it" in " ".join(capsys.readouterr().err.split())


def test_what_is_remarked_on_is_said_once(tmp_path):
    words = (*FAMILY["mu"], "composer.thresholds.mixed=40", "trainer.max_steps=13", "trainer.eval_every=0")
    ended = shared().run(["train", *words_of(tmp_path, f"run.dir={tmp_path / 'run'}", *words)])
    assert ended.code == 0, ended.said
    assert ended.said.count("composer.thresholds.mixed=40: completions of the first 10 steps") == 1


# --- kills

ENGINE = "align.engine.local:LocalEngine."
HELDOUT = "align.trainers.online.heldout:Heldout."
TOLD = "align.trainers.composing:Composing."
ESTIMATED, LEARNT = (Hook(f"{TOLD}{name}", 3, when="after") for name in ("estimate", "learnt"))
EVALUATED = Hook(f"{TOLD}evaluated", 1, when="after")
# Each composer dies where it has been told something, the search at every place where it may be; where else a run can
# die is proved without composers, in test_online_kills.py.
CASES = [
    *(("search", hook) for hook in (ESTIMATED, LEARNT, EVALUATED)),
    ("search", Hook(f"{HELDOUT}answers", 3, when="after")),
    ("search", Hook("align.engine.local:save_file", 3)),
    ("mu", LEARNT),
    ("hypervolume", EVALUATED),
    ("gradient", ESTIMATED),
    ("directional", Hook(f"{ENGINE}step", 4)),
    ("tchebycheff", ESTIMATED),
    ("ppo", LEARNT),
]


def _name(value):
    return f"{value.target.split(':')[1]}-{value.when}-{value.n}" if isinstance(value, Hook) else value


@pytest.mark.parametrize("name,hook", mostly_slow(CASES, 2, 7), ids=_name)
def test_killed_anywhere(straight, tmp_path, name, hook):
    base, whole = straight(name)
    words = ["train", *words_of(base, f"run.dir={tmp_path / 'run'}", *FAMILY[name])]
    assert_survives(hook, words, tmp_path / "run", whole)


STOPS = [
    ("search", Hook(f"{HELDOUT}answers", 2)),  # between the step and its evaluation
    ("gradient", Hook("align.trainers.influence:measure", 2)),
    ("directional", Hook(f"{ENGINE}gradient_norm", 2)),  # heeded while the weights are moved for the difference
    ("hypervolume", Hook("align.rollout.hf:HFRollout.generate", 2)),  # the reference point is there, no step is
    ("mu", Hook(f"{ENGINE}backward", 3)),
]


@pytest.mark.parametrize("name,hook", mostly_slow(STOPS, 0, 2), ids=_name)
def test_stopped_and_gone_on(straight, tmp_path, name, hook):
    base, whole = straight(name)
    words = ["train", *words_of(base, f"run.dir={tmp_path / 'run'}", *FAMILY[name])]
    stopped = shared().run(words, [Hook(hook.target, hook.n, 15, hook.when)])
    assert stopped.code == 85, stopped.said
    assert shared().run(words).code == 0
    assert left(tmp_path / "run") == whole


def test_an_engine_that_fails_before_the_update_undoes_the_step(straight, tmp_path, monkeypatch):
    """The weights that the step's influences have moved are not in the checkpoint: the step is done again."""
    base, whole = straight("gradient")
    words = ["train", *words_of(base, f"run.dir={tmp_path / 'run'}", *FAMILY["gradient"])]
    calls = iter(range(1, 100))

    def sleep(_):
        if next(calls) == 4:
            raise EngineFailed("the engine died")

    with monkeypatch.context() as patched:
        patched.setattr(HFRollout, "sleep", sleep)
        assert main(words) == 1
    assert main(words) == 0
    assert left(tmp_path / "run") == whole
