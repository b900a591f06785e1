"""Words as users type them: what works, and that what is refused says what to type, in a shell."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest
from omegaconf import OmegaConf

from align.cli import main
from align.config import ConfigError, compose, keys_with_help, leaves, options, recipes
from align.config.foreign import NAMES, hint
from align.config.overrides import alternatives
from align.launch.sweep import elements

PAGE = (Path(__file__).parents[1] / "docs" / "command_line.md").read_text()
TABLE = re.findall(r"^\| `(.+?)` \| (works|with -m|refused) \|", PAGE, re.MULTILINE)


def refusal(*words) -> str:
    with pytest.raises(ConfigError) as caught:
        compose(["recipe=dpo", "model=tiny", *words])
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("word, verdict", TABLE, ids=[word for word, _ in TABLE])
def test_the_page_is_right_about_a_word(word, verdict):
    words = ["recipe=dpo", "model=tiny", word]
    if verdict == "works":
        compose(words)
    elif verdict == "with -m":
        refusal(word)
        assert len(elements(words, None)) > 1
    else:
        refusal(word)
        with pytest.raises(ConfigError):
            elements([*words, "seed=1,2"], None)


def test_the_page_has_every_verdict():
    assert len(TABLE) > 20
    assert {verdict for _, verdict in TABLE} == {"works", "with -m", "refused"}


@pytest.mark.parametrize(
    "word, key, value",
    [
        ("sampling.stop=[</answer>]", "sampling.stop", ["</answer>"]),
        ("sampling.stop=[a b, <c>,'d,e',it's]", "sampling.stop", ["a b", "<c>", "d,e", "it's"]),
        ("sampling.stop=[a's,b]", "sampling.stop", ["a's", "b"]),
        ("sampling.stop=[é,#,(x)]", "sampling.stop", ["é", "#", "(x)"]),
        ("data.train=[[a,<b>]]", "data.train", [["a", "<b>"]]),
        ("data.train=a=b.jsonl", "data.train", "a=b.jsonl"),
        ("data.train=it's.jsonl", "data.train", "it's.jsonl"),
        ("data.train=<x>;y", "data.train", "<x>;y"),
        ("run.dir=runs/a (1)", "run.dir", "runs/a (1)"),
        ("+seed=3", "seed", 3),
        ("++optimizer.lr=1", "optimizer.lr", 1),
        ("data.repeat=[1,0.5]", "data.repeat", [1, 0.5]),
    ],
)
def test_a_value_is_what_it_looks_like(word, key, value):
    assert dict(leaves(compose(["recipe=dpo", "model=tiny", word]).tree))[key] == value


def test_options_of_slurm_need_no_quotes():
    config = compose(["launch=slurm", "launch.options=[--mem=64G,--constraint=a&b]"])
    assert config.tree.launch.options == ["--mem=64G", "--constraint=a&b"]


@pytest.mark.parametrize("value", ["a,b.jsonl", "it's,b.jsonl", 'say "x",y', "glob(*)", "a,${seed}"])
def test_what_is_told_to_type_works_in_a_shell(value):
    """The advice is read as a shell would, and is the value."""
    message = refusal(f"data.train={value}")
    assert "`align train -m`" in message
    (typed,) = shlex.split(message.rpartition("one text is typed ")[2])
    found = compose(["recipe=dpo", "model=tiny", typed]).data.train
    assert found == value.replace("${seed}", "0")
    listed = re.search(r"a list is typed ('.*?'), one", message)
    if listed and "'" not in value and "{" not in value and "say" not in value:
        (typed,) = shlex.split(listed[1])
        assert compose(["recipe=dpo", "model=tiny", typed]).data.train == value.split(",")


@pytest.mark.parametrize(
    "word, key, value",
    [
        ("data.train=~/x.jsonl", "data.train", "HOME/x.jsonl"),
        ("data.train=[~/x.jsonl,y.jsonl]", "data.train", ["HOME/x.jsonl", "y.jsonl"]),
        ("run.dir=~/runs", "run.dir", "HOME/runs"),
        ("model=~/model", "model.path", "HOME/model"),
        ("model=hub", "sampling.stop", ["~/x"]),
    ],
)
def test_a_tilde_is_the_home_in_places_only(word, key, value, monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    config = compose(["recipe=dpo", "model=tiny", "model.path=m" if word == "model=hub" else "seed=0", word,
                      "sampling.stop=[~/x]"] if word != "model=~/model" else ["recipe=dpo", word])  # fmt: skip
    expected = [v.replace("HOME", str(tmp_path)) for v in value] if isinstance(value, list) else value
    expected = expected.replace("HOME", str(tmp_path)) if isinstance(expected, str) else expected
    assert dict(leaves(config.tree))[key] == expected


def test_a_tilde_in_a_recipe_of_ones_own(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", "/home/someone")
    (tmp_path / "recipes").mkdir()
    (tmp_path / "recipes" / "mine.yaml").write_text("run:\n  dir: ~/runs\n")
    assert compose(["recipe=mine"], tmp_path).run.dir == "/home/someone/runs"


@pytest.mark.parametrize(
    "word, text",
    [
        ("dpo", "dpo: settings are written key=value; did you mean recipe=dpo?"),
        ("recipe=DPO", "recipe=DPO: no such option; did you mean dpo?"),
        ("trainer.learning_rate=1e-5", "trainer.learning_rate is not a setting; here it is optimizer.lr"),
        ("learning_rate=1e-5", "learning_rate is not a setting; here it is optimizer.lr"),
        ("trainer.push_to_hub=true", "trainer.push_to_hub is not a setting; nothing is uploaded"),
        ("actor.optim.lr=1", "here it is optimizer.lr"),
        ("algorithm.adv_estimator=grpo", "here it is advantage=grpo"),
        ("report_to=wandb", "here it is log.wandb=online"),
        ("reward._target_=mine.f", "a component has a name: reward.NAME._target_=..."),
        ("objetive._target_=mine.f", "objetive._target_ is not a setting; did you mean objective?"),
        ("trainer._target_=mine.T", "trainer takes no class, only options: trainer=NAME"),
        ("hydra.run.dir=x", "hydra.run.dir is not a setting; run.dir says where"),
    ],
)
def test_a_refusal_says_what_to_type(word, text):
    assert text in refusal(word)


def test_what_other_frameworks_say_is_answered_with_keys_that_there_are():
    """Each setting and option in the table of other names is one of ours."""
    keys = {line.split("=")[0].strip() for line in keys_with_help() if line.startswith("  ")} | {"reward.NAME", "model"}
    groups = {"engine", "advantage", "rollout", "reward", "recipe", "objective", "trainer", "launch", "objective/loss"}
    for name, meaning in NAMES.items():
        said = meaning.lstrip(":")
        for key in re.findall(r"(?<![\w`.])((?:[a-z]+\.)+[A-Za-z_]+)", said):
            assert key in keys or key in ("metrics.jsonl", "module.function"), (name, key)
        for group, option in re.findall(r"([a-z/]+)=([a-z0-9_]+)", said):
            if group in groups:
                assert option in (recipes() if group == "recipe" else options(group)), (name, group, option)
        assert hint(f"other.{name}")


# ---------------------------------------------------------------------- sweeps


def test_glob_is_the_options_of_a_group():
    assert alternatives("recipe=glob(paper/wpo*)") == ["recipe=paper/wpo_llama3_8b", "recipe=paper/wpo_zephyr_7b"]
    assert alternatives("objective/loss=glob([ipo*,hinge],exclude=ipo_sum)") == [
        "objective/loss=hinge", "objective/loss=ipo_mean",
    ]  # fmt: skip
    with pytest.raises(ConfigError, match="glob.*is for groups"):
        alternatives("seed=glob(*)")
    with pytest.raises(ConfigError, match="no option is called so"):
        alternatives("recipe=glob(nothing*)")


def test_glob_over_recipes_is_refused_in_one_line_or_runs(capfd):
    """Some recipes need data: the first of them is named, without a traceback."""
    assert main(["train", "-m", "recipe=glob(*)", "model=tiny", "--dry-run"]) == 2
    error = capfd.readouterr().err
    assert error.startswith("align: ")
    assert error.count("\n") == 1


def test_several_values_that_hydra_cannot_read_are_several_values(monkeypatch):
    monkeypatch.setenv("HOME", "/home/me")
    found = elements(["recipe=dpo", "model=tiny", "data.train=~/a.jsonl,b's.jsonl"], None)
    assert [element.config.data.train for element in found] == ["/home/me/a.jsonl", "b's.jsonl"]


def test_folders_of_a_sweep_keep_the_sign_of_a_number():
    words = ["recipe=dpo", "model=tiny", "objective.f_divergence=alpha", "objective.f_alpha=-2,2", "seed=0,1"]
    names = [element.name for element in elements(words, None)]
    assert names == ["f_alpha--2_seed-0", "f_alpha--2_seed-1", "f_alpha-2_seed-0", "f_alpha-2_seed-1"]


# ---------------------------------------------------------------------- parts of one's own


@pytest.mark.parametrize(
    "words, key, expected",
    [
        (["objective._target_=mine.Loss", "objective.x=3"], "objective", {"_target_": "mine.Loss", "x": 3}),
        (
            ["objective._target_=mine.L", "objective/loss=hinge"],
            "objective",
            {"_target_": "mine.L", "loss": {"_target_": "align.objectives.losses.Hinge"}},
        ),
        (["objective/loss=robust", "objective.loss._target_=mine.f"], "objective.loss", {"_target_": "mine.f"}),
        (["pairs._target_=mine.Rule"], "pairs", {"_target_": "mine.Rule"}),
        (["recipe=grpo", "advantage._target_=mine.A", "advantage.k=[1,2]"], "advantage",
         {"_target_": "mine.A", "k": [1, 2]}),
        (["recipe=dynamic_gradient", "composer._target_=mine.C"], "composer", {"_target_": "mine.C"}),
        (["recipe=grpo", "rollout._target_=mine.R"], "rollout", {"_partial_": True, "_target_": "mine.R"}),
        (["model._target_=mine.model"], "model", {"_target_": "mine.model"}),
        (["recipe=grpo", "reward.mine=mine.f", "reward.mine.k=2"], "reward", {"mine": {"_target_": "mine.f", "k": 2}}),
        (["collect=reasoning_python", "data=collected", "collect.task=x", "collect.tool._target_=mine.Tool"],
         "collect.tool", {"_target_": "mine.Tool"}),
        (["objective=mix", "objective.first._target_=mine.F"], "objective.first", {"_target_": "mine.F"}),
    ],
)  # fmt: skip
def test_a_part_of_ones_own_takes_the_place_of_the_option(words, key, expected):
    config = compose(["model=tiny", *words])
    assert OmegaConf.to_container(OmegaConf.select(config.tree, key)) == expected


def test_a_part_of_ones_own_is_named_as_such():
    choices = compose(["recipe=dpo", "model=tiny", "objective._target_=mine.Loss"]).choices
    assert choices["objective"] == "mine.Loss"
    assert "objective/loss" not in choices


def test_a_group_may_be_left_without_an_option():
    config = compose(["recipe=dynamic_gradient", "composer=null"])
    assert config.composer is None
    assert "composer" not in config.choices
