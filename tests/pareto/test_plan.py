"""Words of `align front` to runs: weights on the simplex, thresholds, families, and what is refused before a run."""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import pytest

from align.cli import main
from align.config import ConfigError, compose
from align.pareto.arguments import parse
from align.pareto.plan import Plan, check_reading, lattice, planned, read_plan, write_plan
from tests.trainers.online_runs import REWARDS, words_of
from tests.trainers.test_composing import KL, RLOO_WORDS, TWO

FIXED = ("composers=fixed,tchebycheff_smooth",)
NOTHING = {"reference_point": {}, "spans": {}, "minimise": []}
ONE_EACH = ("composers=fixed", "weights=0.5/0.5")


def words(tmp_path, *more, base=RLOO_WORDS):
    """Of a front of runs of two steps; the last word for a key wins."""
    settings = [w for w in more if not w.startswith(("composers", "points", "weights", "thresholds", "seeds", "out="))]
    own = [w for w in more if w not in settings]
    own = own if any(w.startswith("out=") for w in own) else [*own, f"out={tmp_path / 'out'}"]
    return [*words_of(tmp_path, *base, "lora.rank=4", "trainer.max_steps=2", "trainer.eval_every=1", *settings), *own]


def plan(tmp_path, *more, before=None, **keys):
    return planned(parse(words(tmp_path, *more, **keys)), before, None, lambda line: None)


# --- weights


def test_two_components_are_the_middles_of_equal_parts():
    expected = [[0.1, 0.9], [0.3, 0.7], [0.5, 0.5], [0.7, 0.3], [0.9, 0.1]]
    np.testing.assert_allclose(lattice(2, 5), expected, rtol=1e-14)
    assert lattice(2, 2) == [(0.25, 0.75), (0.75, 0.25)]


def test_three_components_are_a_lattice_without_its_edges():
    """C(n + 1, 2) vectors; with n = 2 the three that lean towards a corner: 1 + 1/3 of 2 parts, and 1/3 of 2."""
    expected = [[1 / 6, 1 / 6, 2 / 3], [1 / 6, 2 / 3, 1 / 6], [2 / 3, 1 / 6, 1 / 6]]
    np.testing.assert_allclose(lattice(3, 2), expected, rtol=1e-14)
    found = lattice(3, 4)
    assert len(set(found)) == 10
    assert all(sum(vector) == pytest.approx(1) and min(vector) > 0 for vector in found)
    assert len(lattice(4, 3)) == 10  # C(3 + 2, 3)


def test_runs_are_seed_by_seed_and_family_by_family(tmp_path):
    found, elements = plan(tmp_path, *FIXED, "points=2", "seeds=2", "seed=7")
    assert [entry.name for entry in found.runs] == [
        f"{family}_mixed-{a}_coin-{b}_seed-{seed}"
        for seed in (7, 8)
        for family in ("fixed", "tchebycheff_smooth")
        for a, b in ((0.25, 0.75), (0.75, 0.25))
    ]
    one = elements[5]
    assert one.config.seed == 8
    assert dict(one.config.composer.weights) == {"mixed": 0.75, "coin": 0.25}
    assert one.config.composer._target_.endswith("Fixed")
    assert one.config.run.dir == str(tmp_path / "out" / one.name)


def test_weights_can_be_named_and_families_have_settings_of_their_own(tmp_path):
    found, elements = plan(
        tmp_path, "composers=fixed,raw:fixed,quick:gradient", "weights=0.2/0.8", "composers.raw.normalise=none",
        "composers.quick.mu=0.01", "composer.target=reward",
    )  # fmt: skip
    assert [entry.weights for entry in found.runs] == [{"mixed": 0.2, "coin": 0.8}] * 3
    assert [e.config.composer.get("normalise") for e in elements] == ["whiten", "none", None]
    assert elements[2].config.composer.mu == 0.01
    assert {e.config.composer.target for e in elements} == {"reward"}


def test_thresholds_are_multiplied_and_others_stay_as_set(tmp_path):
    found, elements = plan(
        tmp_path, *KL, "composers=lagrangian_mu,fixed", "weights=0.5/0.5", "thresholds.mixed=0.4,0.6",
        "thresholds.coin=-0.1,0.2",
    )  # fmt: skip
    names = [entry.name for entry in found.runs]
    assert len(names) == 2 * 2 + 1
    assert names[0] == "lagrangian_mu_mixed-0.4_coin--0.1_seed-0"
    assert dict(elements[0].config.composer.thresholds) == {"mixed": 0.4, "coin": -0.1}
    found, elements = plan(
        tmp_path, *KL, "composers=lagrangian_mu", "thresholds.mixed=0.4,0.6", "composer.thresholds.coin=0.1"
    )
    assert [dict(e.config.composer.thresholds) for e in elements] == [
        {"coin": 0.1, "mixed": 0.4}, {"coin": 0.1, "mixed": 0.6},
    ]  # fmt: skip


def test_a_family_without_either_is_one_run(tmp_path):
    search = [
        f"composers.lagrangian_search.search.{word}"
        for word in ("low.mixed=0.2", "high.mixed=0.6", "low.coin=0.3", "high.coin=0.7", "metric=total_greedy")
    ]
    found, _ = plan(tmp_path, *KL, "composers=fixed,lagrangian_search", "points=2", *search)
    assert [entry.name for entry in found.runs][2:] == ["lagrangian_search_seed-0"]


def test_three_components_have_a_front_too(tmp_path):
    third = f"reward.third._target_={REWARDS}same"
    found, _ = plan(tmp_path, "composers=fixed", "points=2", third)
    assert len(found.runs) == 3
    assert found.components == ["mixed", "coin", "third"]
    found, _ = plan(tmp_path, *ONE_EACH, third, "reward.third.weight=0")
    assert (found.components, found.measured) == (["mixed", "coin"], ["third"])


# --- the same directory again


def test_more_points_are_added_to_what_is_there(tmp_path):
    first, _ = plan(tmp_path, *ONE_EACH)
    write_plan(tmp_path / "out", first)
    before = read_plan(tmp_path / "out")
    assert before == first
    more, elements = plan(tmp_path, "composers=gradient,fixed", "weights=0.2/0.8", before=before)
    assert list(more.families) == ["gradient", "fixed"]
    assert [entry.name for entry in more.runs] == [e.name for e in elements] == [
        "gradient_mixed-0.2_coin-0.8_seed-0", "fixed_mixed-0.5_coin-0.5_seed-0", "fixed_mixed-0.2_coin-0.8_seed-0",
    ]  # fmt: skip


@pytest.mark.parametrize(
    "more, message",
    [
        (
            ("optimizer.lr=1e-4",),
            "holds a front with optimizer.lr=0.003, now it is optimizer.lr=0.0001; give another out",
        ),
        (
            ("composers.fixed.epsilon=0.1",),
            "has fixed with composer.epsilon=1e-08, now it is 0.1; give it",
        ),
        ((f"reward.coin._target_={REWARDS}flaky",), "holds a front with reward.coin._target_="),
    ],
)
def test_other_settings_are_another_front(tmp_path, more, message):
    first, _ = plan(tmp_path, *ONE_EACH)
    with pytest.raises(ConfigError) as told:
        plan(tmp_path, *ONE_EACH, *more, before=first)
    assert message in " ".join(str(told.value).split())


def test_evaluations_are_a_fifth_of_the_run_where_none_are_asked_for(tmp_path):
    _, elements = plan(tmp_path, *ONE_EACH, "trainer.eval_every=", "trainer.max_steps=11")
    assert {e.config.trainer.eval_every for e in elements} == {2}


def test_a_larger_number_of_steps_keeps_the_evaluations(tmp_path):
    """The fifth of a run that goes on is not the fifth it had."""
    few = (*ONE_EACH, "trainer.eval_every=", "trainer.max_steps=10")
    first, _ = plan(tmp_path, *few)
    _, elements = plan(tmp_path, *few, "trainer.max_steps=20", before=first)
    assert [(e.config.trainer.max_steps, e.config.trainer.eval_every) for e in elements] == [(20, 2)]


def test_families_that_are_there_keep_the_settings_of_their_composer(tmp_path):
    """Words for the composers of one call are not those of the next one's."""
    first, _ = plan(tmp_path, "composers=quick:gradient", "weights=0.5/0.5", "composer.mu=0.5")
    _, elements = plan(tmp_path, "composers=fixed", "weights=0.5/0.5", "composer.epsilon=0.1", before=first)
    found = {e.name.partition("_")[0]: e.config.composer for e in elements}
    assert (found["quick"].mu, found["fixed"].epsilon) == (0.5, 0.1)


# --- what is refused


ONE = ("objective=policy_gradient", "advantage=rloo", TWO[0])
BAD_WORDS = [
    (("points=2",), "give composers=A,B: options of composer"),
    (("composers=fixed,fixed", "points=2"), "fixed is there twice; give one another name, as in other:fixed"),
    (("composers=a/b:fixed", "points=2"), "composers=a/b:fixed: a name is letters, digits"),
    (("composers=fixed", "points=1"), "points=1 is no front"),
    (("composers=fixed", "points=two"), "points=two: must be a whole number of at least 1"),
    (("composers=fixed", "points=2", "weights=0.5/0.5"), "points= spreads vectors evenly and weights= names them"),
    (("composers=fixed", "weights=0.5/0.6"), "weights=0.5/0.6: sum to 1.1; they must sum to 1"),
    (("composers=fixed", "weights=0.5/x"), "weights=x: must be a finite number"),
    (("composers=lagrangian_mu", "thresholds.mixed="), "thresholds.mixed=: give one number or more"),
    (("composers=lagrangian_mu", "thresholds.mixed=a"), "thresholds.mixed=a: must be a finite number"),
    (("composers=fixed", "composer=fixed"), "composer is what this command gives to each run; use composers"),
    (("composers=fixed", "run.dir=x"), "run.dir is what this command gives to each run; use out=DIR"),
    (("composers=fixed", "points=2", "composers.raw.mu=1"), "composers.raw: composers= names no raw; there are fixed"),
    (("composers=fixed", "points=2", "composers.raw=1"), "say composers.raw.KEY=VALUE"),
    (("composers=fixed", "points=2", "seeds=0"), "seeds=0: must be a whole number of at least 1"),
    (("composers=fixed", "points=2", "report_only=1"), "report_only=1: must be true or false"),
    (("report_only=true", "composers=fixed"), "composers= has no effect with report_only=true"),
    (("report_only=true", "thresholds.mixed=1"), "thresholds.mixed= has no effect with report_only=true"),
    (("report_only=true", "optimizer.lr=1"), "optimizer.lr=1 has no effect with report_only=true"),
]


@pytest.mark.parametrize("more, message", BAD_WORDS, ids=[message[:50] for _, message in BAD_WORDS])
def test_refused_words(more, message):
    with pytest.raises(ConfigError) as told:
        parse(["out=somewhere", *more])
    assert message in str(told.value)


BAD = [
    (("composers=fixd", "points=2"), "composers=fixd: no such composer; did you mean fixed? Options: directional, "),
    (("composers=fixed",), "composers=fixed has weights: give points=5, or weights=0.5/0.5,0.2/0.8"),
    (("composers=fixed", "weights=0.5/0.3/0.2"), "weights=0.5/0.3/0.2: 3 numbers for the 2 components mixed, coin"),
    (("composers=gradient", "weights=0/1"), "composer.weights.mixed=0: must be greater than 0"),
    (
        ("composers=lagrangian_mu", "points=3", "thresholds.mixed=1,2"),
        "points has no effect: none of composers=lagrangian_mu has weights; remove it",
    ),
    ((*ONE_EACH, "thresholds.mixed=1"), "thresholds has no effect: none of composers=fixed has thresholds"),
    (("composers=lagrangian_mu", *KL, "thresholds.odd=1,2"), "composer.thresholds.odd: no component with a weight"),
    (("composers=lagrangian_mu", "thresholds.mixed=1,2", "thresholds.coin=1"), "trainer.kl_in_reward=0 leaves empty"),
    (("composers=directional",), "composers=directional: one policy for all directions is no point; leave it out"),
    ((*ONE_EACH, "composer.weights.mixed=1"), "composer.weights.mixed: this command gives weights to each run; remove"),
    ((*ONE_EACH, "trainer.eval_every=0"), "curves need evaluations along the run"),
    ((*ONE_EACH, "trainer.num_samples=0"), "set data.heldout, and trainer.num_samples above 0"),
    ((*ONE_EACH, "data.train=nowhere.jsonl"), "nowhere.jsonl: no such file"),
    ((*ONE_EACH, "composers.fixed.mu=1"), "composer.mu is not a setting; composer=fixed has no such key"),
    (("composers=fixed", "weights=0.50001/0.49999,0.50002/0.49998"), "two runs would both be called fixed_mixed-0.5_"),
    ((*ONE_EACH, "--dry-run"), "--dry-run shows what launch=slurm would submit"),
]


@pytest.mark.parametrize("more, message", BAD, ids=[message[:50] for _, message in BAD])
def test_refused_before_any_run(tmp_path, capsys, more, message):
    dry = [w for w in more if w == "--dry-run"]
    assert main(["front", *words(tmp_path, *(w for w in more if w not in dry)), *dry]) == 2
    said = capsys.readouterr().err
    assert message in " ".join(said.split())
    assert said.count("\n") == 1
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "reading, message",
    [
        ({"spans": {"coin": 0.0}}, "spans.coin=0: must be greater than 0"),
        ({"spans": {"odd": 1.0}}, "spans.odd: no composed component has this name; there are mixed, coin"),
        ({"reference_point": {"coin": 0.0}}, "reference_point.mixed is missing: give a number for each of mixed, coin"),
        ({"reference_point": {"gold": 0.0}}, "reference_point.gold: no composed component has this name"),
        ({"minimise": ["odd"]}, "minimise=odd: no composed component has this name"),
    ],
)
def test_refused_reading(reading, message):
    with pytest.raises(ConfigError) as told:
        check_reading(Plan(["mixed", "coin"], ["gold"], {}, [], {}, {**NOTHING, **reading}))
    assert message in str(told.value)


@pytest.mark.parametrize(
    "base, message",
    [
        (ONE, "reward: 1 component with a weight; a front needs two"),
        (
            (*RLOO_WORDS, *(f"reward.{c}._target_={REWARDS}same" for c in "xyz")),
            "reward: 5 components with a weight; volumes are exact and quick up to 4",
        ),
    ],
)
def test_refused_numbers_of_components(tmp_path, capsys, base, message):
    assert main(["front", *words(tmp_path, *ONE_EACH, base=base)]) == 2
    assert message in " ".join(capsys.readouterr().err.split())


def test_refused_directories(tmp_path, capsys):
    assert main(["front", *words(tmp_path, *FIXED, "points=2", "out=")]) == 2
    assert "give out=DIR: where the runs and the report are written" in capsys.readouterr().err
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "mine.txt").write_text("mine")
    assert main(["front", *words(tmp_path, *FIXED, "points=2", f"out={tmp_path / 'taken'}")]) == 2
    assert "is there and holds no front; give another directory" in capsys.readouterr().err
    assert main(["front", f"out={tmp_path / 'nowhere'}", "report_only=true"]) == 2
    assert "holds no front, there is nothing to report" in capsys.readouterr().err


def test_a_run_with_other_settings_is_refused(tmp_path, capsys):
    """As a directory that was moved here, or whose composer's thresholds were others."""
    found, elements = plan(tmp_path, *ONE_EACH)
    write_plan(tmp_path / "out", found)
    from omegaconf import OmegaConf

    run = tmp_path / "out" / elements[0].name
    (run / "checkpoints").mkdir(parents=True)
    tree = OmegaConf.create(OmegaConf.to_container(elements[0].config.tree, resolve=False))
    tree.composer.weights.mixed = 0.3
    (run / "config.yaml").write_text(OmegaConf.to_yaml(tree))
    assert main(["front", *words(tmp_path, *ONE_EACH)]) == 2
    assert "holds a run with composer.weights.mixed=0.3, now it is" in " ".join(capsys.readouterr().err.split())


def test_offline_training_has_no_front(tmp_path, capsys):
    assert main(["front", "recipe=dpo", *ONE_EACH, f"out={tmp_path / 'out'}"]) == 2
    assert "align front compares online runs" in capsys.readouterr().err


def test_an_array_of_jobs_is_shown(tmp_path, capsys):
    more = ("launch=slurm", "launch.cpus=1", "launch.time=10")
    assert main(["front", *words(tmp_path, *FIXED, "points=2", *more), "--dry-run"]) == 0
    said = capsys.readouterr().out
    commands = [line for line in said.partition(".commands, one line for each element\n")[2].splitlines() if line]
    assert len(commands) == 4
    assert "composer=tchebycheff_smooth" in commands[2]
    assert "#SBATCH --array=0-3" in said
    assert not (tmp_path / "out").exists()


def test_nothing_to_report_yet(tmp_path, capsys):
    found, _ = plan(tmp_path, *ONE_EACH)
    write_plan(tmp_path / "out", found)
    assert main(["front", f"out={tmp_path / 'out'}", "report_only=true", "spans.coin=2"]) == 1
    assert "has ended, of 1 that are planned" in capsys.readouterr().err
    assert json.loads((tmp_path / "out" / "plan.json").read_text())["reading"]["spans"] == {"coin": 2}


def test_commands_of_the_page_can_be_read():
    page = (Path(__file__).parents[2] / "docs" / "front.md").read_text()
    commands = re.findall(r"^    align front (.*)$", page, re.MULTILINE)
    assert len(commands) == 3
    for command in commands:
        asked = parse(command.split())
        if not asked.report_only:
            option = next(iter(asked.composers.values()))
            compose([*asked.settings, f"composer={option}"])
