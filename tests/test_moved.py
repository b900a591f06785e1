"""A setting by its former name: refused with the present one, in words and files; a run of before goes on with it."""

from __future__ import annotations

import hashlib
import json

import pytest
from omegaconf import OmegaConf

from align.cli import main
from align.config import ConfigError, compose, compose_run, differences, keys_with_help, leaves, saved_settings
from align.config.moved import RENAMED
from align.rundir import RunDirectory

# another value than the shipped one for each, of a run that has them all
VALUES = {
    "trainer.recompute": "full",
    "trainer.inner_epochs": 3,
    "trainer.inner_batches": 4,
    "trainer.extra_draws": 2,
    "trainer.engine_tolerance": 0.5,
    "trainer.stop_after": 5,
    "optimizer.warmup_fraction": 0.25,
    "optimizer.final_fraction": 0.5,
    "launch.server_words": ["--model", "m"],
}
GROUPS = ("recipe=grpo", "model=tiny", "launch=slurm")


def words(values: dict[str, object]) -> list[str]:
    return [
        f"{key}={json.dumps(value)}" if isinstance(value, list) else f"{key}={value}" for key, value in values.items()
    ]


def test_each_name_of_today_is_a_setting_and_no_former_one_is():
    keys = {line.split("=")[0].strip() for line in keys_with_help() if line.startswith("  ")}
    assert set(RENAMED) == set(VALUES)
    assert set(RENAMED.values()) <= keys
    assert not set(RENAMED) & keys


@pytest.mark.parametrize("command", ["check", "train"])
@pytest.mark.parametrize("word", words(VALUES))
def test_a_word_with_a_former_name_is_refused(capsys, command, word):
    key, _, value = word.partition("=")
    assert main([command, *GROUPS, word]) == 2
    assert capsys.readouterr().err == f"align: {word} has another name; use {RENAMED[key]}={value}\n"


@pytest.mark.parametrize("form", ["+{}", "++{}", "~{}"])
def test_however_it_is_typed(form):
    with pytest.raises(ConfigError, match=r"^trainer.inner_epochs=2 has another name; use trainer.ppo_epochs=2$"):
        compose([*GROUPS, form.format("trainer.inner_epochs=2")])


@pytest.mark.parametrize("name", ["recipes/mine.yaml", "trainer/mine.yaml"])
def test_a_file_with_a_former_name_is_refused(tmp_path, name):
    recipe = name.startswith("recipes")
    text = "trainer:\n  stop_after: 3\n" if recipe else "defaults: [offline]\nstop_after: 3\n"
    (tmp_path / name).parent.mkdir()
    (tmp_path / name).write_text(text)
    said = r"^trainer.stop_after=3 has another name; use trainer.early_stopping_patience=3$"
    with pytest.raises(ConfigError, match=said):
        compose(["recipe=mine"] if recipe else ["recipe=dpo", "trainer=mine"], tmp_path)


def test_a_file_that_refers_to_a_former_name_is_refused(tmp_path):
    (tmp_path / "recipes").mkdir()
    (tmp_path / "recipes" / "mine.yaml").write_text("sampling:\n  n: ${trainer.inner_batches}\n")
    with pytest.raises(ConfigError, match=r"^sampling.n=\$\{trainer.inner_batches\} .*; use .*trainer.num_minibatches"):
        compose(["recipe=mine"], tmp_path)


def test_settings_of_a_run_of_before_are_todays(tmp_path):
    """With values of its own, and one that refers to another."""
    present = {RENAMED[key]: value for key, value in VALUES.items()}
    now = compose([*GROUPS, *words(present), "trainer.epochs=${trainer.ppo_epochs}"]).tree
    before = OmegaConf.create(OmegaConf.to_container(now, resolve=False))
    for old, new in RENAMED.items():
        section, _, last = new.rpartition(".")
        del before[section][last]
        OmegaConf.update(before, old, VALUES[old])
    before.trainer.epochs = "${trainer.inner_epochs}"
    path = tmp_path / "config.yaml"
    path.write_text(OmegaConf.to_yaml(before))
    assert "trainer.ppo_epochs" not in dict(leaves(before))
    assert dict(leaves(saved_settings(path))) == dict(leaves(now))
    changed = compose([*GROUPS, *words({**present, "trainer.ppo_epochs": 2}), "trainer.epochs=3"]).tree
    assert differences(saved_settings(path), changed)["trainer.ppo_epochs"] == (3, 2)


def test_a_setting_that_came_later_had_its_default(tmp_path):
    """A run of before has no such key, and goes on if the setting is what it was without it."""
    now = compose(GROUPS).tree
    before = OmegaConf.create(OmegaConf.to_container(now, resolve=False))
    del before.data["mixture_every"]
    path = tmp_path / "config.yaml"
    path.write_text(OmegaConf.to_yaml(before))
    assert differences(saved_settings(path), now) == {}
    changed = compose([*GROUPS, "data.mixture_every=3"]).tree
    assert differences(saved_settings(path), changed) == {"data.mixture_every": (20, 3)}


def test_a_finished_run_takes_no_former_name(tmp_path):
    config = compose([*GROUPS, f"run.dir={tmp_path}"])
    (tmp_path / "config.yaml").write_text(OmegaConf.to_yaml(config.tree))
    with pytest.raises(
        ConfigError, match=r"^launch.server_words=\[a\] has another name; use launch.server_args=\[a\]$"
    ):
        compose_run([f"run.dir={tmp_path}", "launch.server_words=[a]"])


@pytest.mark.parametrize(("value", "same"), [("2", True), ("3", False)])
def test_a_value_from_the_environment_is_compared_under_its_former_name(tmp_path, monkeypatch, value, same):
    """What a run of before kept of a changed variable still refuses it."""
    monkeypatch.setenv("EPOCHS", "2")
    command = [*GROUPS, "trainer.ppo_epochs=${oc.env:EPOCHS}", f"run.dir={tmp_path / 'run'}"]
    RunDirectory(compose(command)).close()
    hashes = tmp_path / "run" / "hashes.json"
    assert list(json.loads(hashes.read_text())) == ["trainer.ppo_epochs"]
    former = hashlib.sha256(json.dumps(["trainer.inner_epochs", "2"]).encode()).hexdigest()
    hashes.write_text(json.dumps({"trainer.inner_epochs": former}))
    (tmp_path / "run" / "checkpoints" / "step-000001").mkdir(parents=True)
    monkeypatch.setenv("EPOCHS", value)
    if same:
        RunDirectory(compose(command)).close()
        return
    with pytest.raises(ValueError, match="a run in which trainer.ppo_epochs had another value"):
        RunDirectory(compose(command))
