"""Settings: what composes, what is refused and how the refusal reads."""

from __future__ import annotations

import dataclasses
import inspect
import re
import subprocess
import sys
from importlib import import_module
from pathlib import Path

import pytest
import yaml
from hydra import compose as hydra_compose
from hydra import initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from omegaconf import OmegaConf

from align import build, config
from align.config import ConfigError, compose, compose_run, differences, keys_with_help, leaves, options, recipes
from align.config.rollouts import ROLLOUTS
from align.config.schema import may_change
from align.config.shipped import shipped
from align.rundir import RunDirectory

CONFIGS = config.shipped_root() / "configs"
OPTION_FILES = sorted(CONFIGS.rglob("*.yaml"))
KINDS = config.schema.KINDS  # groups whose options have sections of their own, by their kind
SECTIONS = {
    "optimizer": config.OptimizerConfig,
    "data": config.DataConfig,
    "trainer": config.TrainerConfig,
    "log": config.LogConfig,
    "engine": config.EngineConfig,
    "launch": config.LaunchConfig,
}


def own_keys(path: Path) -> dict:
    """Settings of an option file with those of the options that it extends."""
    found = yaml.safe_load(path.read_text()) or {}
    keys = {}
    for entry in found.pop("defaults", []):
        if isinstance(entry, str) and entry != "_self_":
            keys |= own_keys(path.with_name(f"{entry}.yaml"))
    return keys | found


def refusal(words, config_dir=None) -> str:
    with pytest.raises(ConfigError) as caught:
        compose(words, config_dir)
    message = str(caught.value)
    assert "\n" not in message
    return message


def _in_turn() -> list[tuple[str, ...]]:
    """Every option that builds on others, at most one of a group in each."""
    built = [path for path in OPTION_FILES if path.parent != CONFIGS and "defaults:" in path.read_text()]
    by_group: dict[str, list[str]] = {}
    for path in built:
        by_group.setdefault(path.parent.relative_to(CONFIGS).as_posix(), []).append(path.stem)
    by_group = {group: names for group, names in by_group.items() if "/" not in group}
    longest = max(map(len, by_group.values()))
    return [tuple(f"{g}={names[i]}" for g, names in by_group.items() if i < len(names)) for i in range(longest)]


@pytest.mark.parametrize("words", _in_turn(), ids="-".join)
def test_settings_of_options_are_those_that_hydra_composes(words):
    GlobalHydra.instance().clear()
    with initialize_config_dir(str(CONFIGS.resolve()), version_base="1.3"):
        whole = hydra_compose("config", list(words), return_hydra_config=True)
    choices = {g: o for g, o in whole.hydra.runtime.choices.items() if o and not g.startswith("hydra")}
    assert {key for key, _ in leaves(whole) if not key.startswith("hydra.")} == {
        key for key, _ in leaves(shipped(choices))
    }


# each model with several recipes
@pytest.mark.parametrize(
    ("recipe", "model"),
    [(recipe, options("model")[i % len(options("model"))]) for i, recipe in enumerate(sorted(recipes()))],
)
def test_recipe_composes_with_model(recipe, model):
    """A recipe's choice of objective and its numbers survive the exchange of its model."""
    words = [f"recipe={recipe}", f"model={model}"] + (["model.path=x"] if model == "hub" else [])
    settings = compose(words)
    written = yaml.safe_load(recipes()[recipe].read_text())
    assert settings.choices["model"] == model
    for choice in written.pop("defaults"):
        (group, option), *_ = choice.items()
        group = group.removeprefix("override /")
        if isinstance(option, list):  # of which Hydra tells no choice
            named = [name for one in option for name in yaml.safe_load((CONFIGS / group / f"{one}.yaml").read_text())]
            assert list(settings.tree[group]) == list(dict.fromkeys([*named, *written.get(group, {})]))
            continue
        assert settings.choices[group] == (option if group != "model" else model)
    for key, value in leaves(OmegaConf.create(written)):
        assert OmegaConf.select(settings.tree, key) == value, key


@pytest.mark.parametrize(
    "path", [p for p in OPTION_FILES if p.parent.name in SECTIONS], ids=lambda p: f"{p.parent.name}-{p.stem}"
)
def test_fields_are_keys_of_option(path):
    keys = own_keys(path)
    group = path.parent.name
    cls = KINDS[group][keys["kind"]] if group in KINDS else SECTIONS[group]
    assert [f.name for f in dataclasses.fields(cls)] == list(keys)


@pytest.mark.parametrize(
    "name, cls", [("run", config.RunConfig), ("lora", config.LoraConfig), ("reference", config.ReferenceConfig)]
)
def test_fields_are_keys_of_root_section(name, cls):
    root = yaml.safe_load((CONFIGS / "config.yaml").read_text())
    assert [f.name for f in dataclasses.fields(cls)] == list(root[name])


def test_root_holds_nothing_without_a_type():
    root = yaml.safe_load((CONFIGS / "config.yaml").read_text())
    assert set(root) - {"defaults"} == {"seed", "run", "callbacks", "lora", "head", "reference", "sampling", "merge"}


@pytest.mark.parametrize(
    "path", [p for p in OPTION_FILES if "_target_" in own_keys(p)], ids=lambda p: f"{p.parent.name}-{p.stem}"
)
def test_target_takes_the_option_keys(path):
    keys = own_keys(path)
    if keys["_target_"] in ROLLOUTS:
        fields = dataclasses.fields(ROLLOUTS[keys["_target_"]])
        assert [f.name for f in fields] == [key for key in keys if key not in ("_target_", "_partial_")]
        return
    module, _, name = keys.pop("_target_").rpartition(".")
    target = getattr(import_module(module), name)
    groups = set()  # the option of objective/loss is the key loss of an objective
    for choice in yaml.safe_load(path.read_text()).get("defaults", []):
        if not isinstance(choice, str):
            groups.add(next(iter(choice)).rpartition("@")[2])
    wanted = set(inspect.signature(target).parameters) - ({"names"} if path.parent.name == "composer" else set())
    if keys.pop("_partial_", False):  # the rest is given by the code
        assert set(keys) < wanted
    else:
        assert wanted == set(keys) | groups


@pytest.mark.parametrize("path", OPTION_FILES, ids=lambda p: f"{p.parent.name}-{p.stem}")
def test_each_key_has_a_comment_above(path):
    lines = path.read_text().splitlines()
    assert lines[0].startswith("# ")
    for before, line in zip(lines, lines[1:], strict=False):
        key = re.match(r" *([a-z_0-9]+):(.*)", line)
        inherited = "- hub" in path.read_text() or "- files" in path.read_text()  # the meaning stands there
        if key and key[2] and key[1] not in ("_target_", "_partial_") and not inherited:
            assert before.strip().startswith("# "), line


def empty_mappings(node: dict, prefix: str = "") -> list[str]:
    """Dotted keys whose value is {}, which have no leaves."""
    found = []
    for key, value in node.items():
        if isinstance(value, dict):
            found += empty_mappings(value, f"{prefix}{key}.") if value else [f"{prefix}{key}"]
    return found


def test_keys_with_help_has_every_key_of_every_option():
    told = [line.split("=")[0].strip() for line in keys_with_help() if line.startswith("  ")]
    expected = []
    for path in OPTION_FILES:
        group = path.parent.relative_to(CONFIGS).as_posix().replace("/", ".")
        found = {k: v for k, v in yaml.safe_load(path.read_text()).items() if k != "defaults"}
        for key in [*dict(leaves(OmegaConf.create(found))), *empty_mappings(found)]:
            expected.append(key if group == "." else f"{group}.{key}")
    assert sorted(expected) == sorted(k for k in told)


@pytest.mark.parametrize(
    "word, nearest",
    [
        ("optimizer.learing_rate=1", "optimizer.lr"),
        ("zzzzzzzz=1", None),
        ("optimizer.weight_decai=1", "optimizer.weight_decay"),
        ("trainer.batchsize=3", "trainer.batch_size"),
        ("+trainer.batchsize=3", "trainer.batch_size"),
        ("objective.bta=1", "objective.beta"),
        ("lora.rnak=1", "lora.rank"),
        ("beta=1", "objective.beta"),
        ("sead=1", "seed"),
        ("optimiser=adamw", "optimizer"),
        ("modle=tiny", "model"),
    ],
)
def test_unknown_key_names_the_nearest(word, nearest):
    message = refusal([word])
    assert message.startswith(word.lstrip("+").split("=")[0] + " is not a setting")
    assert (f"did you mean {nearest}?" if nearest else "`align check --keys`") in message


@pytest.mark.parametrize(
    "group, wrong, nearest",
    [
        ("model", "tinny", "tiny"),
        ("objective", "wpoo", "wpo"),
        ("objective/loss", "sigmod", "sigmoid"),
        ("optimizer", "adam", "adamw"),
        ("data", "everday", "everyday"),
        ("composer", "gradiant", "gradient"),
        ("trainer", "ofline", "offline"),
        ("log", "defalt", "default"),
        ("pairs", "max_mn", "max_min"),
        ("collect", "chainsum", "chain_sum"),
        ("rollout", "hff", "hf"),
        ("advantage", "remaxx", "remax"),
        ("reward", "verifyer", "verifier"),
        ("objective/correction", "truncat", "truncate"),
        ("engine", "zer3", "zero3"),
        ("launch", "locl", "local"),
        ("recipe", "paper/wpo_zephyr", "paper/wpo_zephyr_7b"),
    ],
)
def test_misspelt_option_names_the_nearest(group, wrong, nearest):
    message = refusal([f"{group}={wrong}"])
    assert message.startswith(f"{group}={wrong}: no such option; did you mean {nearest}?")


def test_every_group_has_a_misspelling_above():
    mark = next(m for m in test_misspelt_option_names_the_nearest.pytestmark if m.name == "parametrize")
    groups = {p.parent.relative_to(CONFIGS).as_posix() for p in OPTION_FILES} - {"."}
    assert {row[0] for row in mark.args[1]} == groups | {"recipe"}


def own_recipe(directory: Path, text: str, name: str = "bad") -> Path:
    (directory / "recipes").mkdir(exist_ok=True)
    (directory / "recipes" / f"{name}.yaml").write_text(text)
    return directory


def test_unknown_key_in_own_recipe(tmp_path):
    message = refusal(["recipe=bad"], own_recipe(tmp_path, "objective:\n  betta: 1\n"))
    assert message == "objective.betta is not a setting; objective=dpo has no such key; did you mean objective.beta?"


@pytest.mark.parametrize("text", ["a: [\n", "- a\n", "!!python/object:os.system {}\n"])
def test_recipe_that_is_no_mapping_names_its_file(tmp_path, text):
    assert "recipes/bad.yaml" in refusal(["recipe=bad"], own_recipe(tmp_path, text))


def test_recipes_are_those_of_the_call(tmp_path):
    """Whatever was composed before: other files, another directory, a recipe that cannot be read."""
    home = own_recipe(tmp_path, "optimizer:\n  lr: 1e-2\n")
    assert compose(["recipe=bad"], home).optimizer.lr == 0.01
    own_recipe(tmp_path, "optimizer:\n  lr: 2e-2\n")
    assert compose(["recipe=bad"], home).optimizer.lr == 0.02
    assert "no such option" in refusal(["recipe=bad"])
    own_recipe(tmp_path, "a: [\n")
    assert "recipes/bad.yaml" in refusal(["recipe=bad"], home)
    assert compose(["recipe=wpo"]).choices["recipe"] == "wpo"


def test_a_recipe_may_begin_with_another_and_a_broken_one_beside_it_is_not_read(tmp_path):
    folder = tmp_path / "recipes"
    folder.mkdir()
    (folder / "mine.yaml").write_text("# @package _global_\ndefaults:\n  - /recipe/dpo\n  - _self_\nseed: 7\n")
    (folder / "broken.yaml").write_text("a: [")
    assert compose(["recipe=dpo"], tmp_path).seed == 0
    assert "broken.yaml: is not YAML" in refusal(["recipe=broken"], tmp_path)
    (folder / "broken.yaml").unlink()
    config = compose(["recipe=mine"], tmp_path)
    assert (config.seed, config.objective._target_) == (7, "align.objectives.preference.DPO")


def test_number_with_exponent_in_a_recipe_is_a_number(tmp_path):
    """YAML 1.1 reads 1e-2 as a text; a beta that is a text would fail only when the objective is built."""
    beta = compose(["recipe=bad"], own_recipe(tmp_path, "objective:\n  beta: 1e-2\n")).objective.beta
    assert beta == 0.01
    assert isinstance(beta, float)


def test_own_option_and_directory_with_odd_name(tmp_path):
    home = tmp_path / "my, [own] configs"
    (home / "optimizer").mkdir(parents=True)
    (home / "optimizer" / "fast.yaml").write_text("defaults:\n  - adamw\n  - _self_\nlr: 1e-3\n")
    assert compose(["optimizer=fast"], home).optimizer.lr == 1e-3
    assert "did you mean fast?" in refusal(["optimizer=fats"], home)
    assert refusal(["optimizer=fast", "seed=x"], home).startswith("seed=x: must be an integer")


def test_required_values():
    assert refusal(["model=hub"]) == "model.path is required: add model.path=..."
    assert refusal(["data=files"]) == "data.train is required: add data.train=..."


@pytest.mark.parametrize(
    "word, text",
    [
        ("optimizer.lr=fast", "optimizer.lr=fast: Value 'fast' of type 'str' could not be converted to Float"),
        ("optimizer.lr=null", "optimizer.lr=null: "),
        ("optimizer.lr=0", "must be greater than 0"),
        ("optimizer.lr=nan", "must be greater than 0"),
        ("optimizer.lr=inf", "must be greater than 0"),
        ("optimizer.betas=[0.9]", "must be two numbers in [0, 1)"),
        ("optimizer.betas=[0.9,1.0]", "must be two numbers in [0, 1)"),
        ("optimizer.warmup_ratio=1", "must be at least 0 and below 1"),
        ("optimizer.schedule=cosin", "did you mean cosine?"),
        ("lora.rank=1.5", "lora.rank=1.5: "),
        ("lora.rank=-1", "must be at least 0"),
        ("lora.targets=5", "lora.targets=5: must be all-linear or a list"),
        ("lora.targets=[]", "lora.targets=[]: must be all-linear or a list"),
        ("seed=true", "seed=true: must be an integer"),
        ("seed=1.0", "seed=1.0: must be an integer"),
        ("seed=-1", "must be at least 0"),
        ("seed=2147483648", "below 2147483648"),
        ("merge=1", "merge=1: must be true or false"),
        ("merge=true", "lora.rank=0"),
        ("reference.mode=adapter", "set lora.rank"),
        ("lora.dropout=0.1", "no effect with lora.rank=0"),
        ("trainer.batch_size=0", "must be at least 1"),
        ("trainer.layout=share", "did you mean shared?"),
        ("data.max_bad_fraction=1.1", "must be at least 0 and at most 1"),
        ("data.on_bad_row=skip", "must be one of error, drop"),
        ("log.wandb=offlin", "did you mean offline?"),
        ("optimizer=null", "optimizer=null: no such option"),
        ("objective.loss=hinge", "choose one with objective/loss=..."),
        ("hydra.run.dir=x", "hydra.run.dir is not a setting"),
        ("--batch-size=3", "settings are written key=value"),
        ("=3", "settings are written key=value"),
        ("~optimizer.lr", "settings are written key=value"),
        ("seed=${oc.env:ALIGN_TEST_ABSENT}", "ALIGN_TEST_ABSENT"),
        ("optimizer.lr=${oc.env:ALIGN_TEST_ABSENT}", "ALIGN_TEST_ABSENT"),
        ("objective.beta=${oc.env:ALIGN_TEST_ABSENT}", "ALIGN_TEST_ABSENT"),
    ],
)
def test_impossible_value(word, text):
    assert text in refusal([word])


def test_values_at_the_borders_are_allowed():
    words = ["seed=2147483647", "optimizer.betas=[0,0.99]", "optimizer.min_lr_ratio=1", "data.max_bad_fraction=0"]
    settings = compose(words)
    assert (settings.seed, settings.optimizer.min_lr_ratio, settings.data.max_bad_fraction) == (2147483647, 1.0, 0.0)
    assert settings.optimizer.betas == [0.0, 0.99]


def test_quoted_numbers_are_checked_as_numbers():
    assert compose(["optimizer.betas=['0.9','0.95']"]).optimizer.betas == [0.9, 0.95]
    assert "lora.rank=0" in refusal(["lora.rank='0'", "merge=true"])


def test_own_file_switches_to_files():
    settings = compose(["data.train=mine.jsonl"])
    assert settings.choices["data"] == "files"
    assert (settings.data.train, settings.data.heldout, settings.data.gold) == ("mine.jsonl", None, None)
    assert compose(["data.train=mine.jsonl", "data=everyday"]).data.heldout == "align:everyday/heldout.jsonl"
    assert compose(["recipe=wpo", "data.train=[a.jsonl,b.jsonl]"]).data.train == ["a.jsonl", "b.jsonl"]


def test_differences_allow_exactly_the_resumable_keys():
    """Each setting of a run is changed alone; those below may differ."""
    here = compose(["recipe=wpo"]).tree
    free = set()
    for key, _ in leaves(here):
        other = here.copy()
        OmegaConf.update(other, key, "changed", force_add=True)
        if not differences(here, other):
            free.add(key)
        else:
            assert list(differences(here, other)) == [key]
    assert free == {
        "trainer.max_steps", "trainer.save_every", "trainer.keep_checkpoints", "merge", "run.dir",
        "trainer.export_every", "trainer.export_at", "callbacks", "data.ignore", "data.empty_prompts",
            "data.workers", "data.cache_dir", "data.on_bad_row", "data.max_bad_fraction",
        "engine.stage", "engine.offload_optimizer", "engine.offload_parameters", "engine.timeout_s",
        "launch.kind", "launch.processes", "launch.threads", "launch.port",
        "log.console_every", "log.tensorboard", "log.wandb", "log.wandb_project",
    }  # fmt: skip


def test_environment_value_is_not_saved(tmp_path, monkeypatch):
    monkeypatch.setenv("ALIGN_TEST_SECRET", "hunter2")
    word = "log.wandb_project=${oc.env:ALIGN_TEST_SECRET}"
    settings = compose(["model=tiny", word, f"run.dir={tmp_path / 'run'}"])
    assert settings.log.wandb_project == "hunter2"
    RunDirectory(settings).close()
    files = [p for p in (tmp_path / "run").rglob("*") if p.is_file()]
    assert "${oc.env:ALIGN_TEST_SECRET}" in (tmp_path / "run" / "config.yaml").read_text()
    assert all(b"hunter2" not in p.read_bytes() for p in files)


def test_interpolation_reaches_other_sections():
    assert compose(["seed=7", "lora.alpha=${seed}"]).lora.alpha == 7.0


@pytest.mark.parametrize("target", ["os.system", "subprocess.Popen", "builtins.exec", "builtins.eval"])
@pytest.mark.parametrize("key", ["objective", "objective.loss"])
def test_dangerous_targets_are_refused(tmp_path, key, target):
    canary = tmp_path / "canary"
    settings = compose([f"{key}._target_={target}", f"objective.beta='touch {canary}'"])
    with pytest.raises(ValueError, match="blocklist"):
        build.objective(settings)
    assert not canary.exists()


def test_config_imports_nothing_heavy():
    code = "import sys, align.config; print(*sys.modules)"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert not set(found.stdout.split()) & {"torch", "numpy", "transformers", "datasets", "deepspeed"}


def test_the_settings_of_an_older_run_are_read(tmp_path):
    """It has no engine, and a launch of fewer keys."""
    config = compose(["recipe=wpo", "model=tiny", "launch.threads=1"])
    del config.tree.engine
    config.tree.launch = {"threads": 1}
    (tmp_path / "config.yaml").write_text(OmegaConf.to_yaml(config.tree))
    read = compose_run([f"run.dir={tmp_path}"])
    assert (read.engine.stage, read.launch.kind, read.launch.threads) == (None, "local", 1)


def test_a_field_says_what_its_setting_may_be():
    lines = {line.split("=")[0].strip(): line for line in keys_with_help() if "=" in line}
    assert lines["optimizer.schedule"].endswith(" [one of cosine, linear, wsd, rex, constant]")
    assert lines["optimizer.lr"].endswith(" [greater than 0]")
    assert lines["lora.dropout"].endswith(" [at least 0 and below 1]")
    assert lines["seed"].endswith(" [at least 0 and below 2147483648]")
    assert not lines["trainer.kind"].endswith("]")


@pytest.mark.parametrize("key", ["trainer.max_steps", "trainer.only", "trainer.save_every", "merge", "run.dir",
                                 "engine.stage", "launch.nodes", "log.wandb", "rollout.urls"])  # fmt: skip
def test_what_a_resumed_run_may_change(key):
    assert may_change(key)


@pytest.mark.parametrize("key", ["trainer.epochs", "optimizer.lr", "seed", "rollout._target_", "mergex", "runs.dir"])
def test_what_a_resumed_run_is(key):
    assert not may_change(key)


def test_epochs_of_the_command_line_take_the_place_of_the_recipes_steps():
    written = {name: yaml.safe_load(path.read_text()).get("trainer", {}) for name, path in recipes().items()}
    with_steps = [name for name, trainer in written.items() if trainer.get("max_steps")]
    assert len(with_steps) >= 10
    settings = compose([f"recipe={with_steps[0]}", "model=tiny", "trainer.epochs=2"])
    assert (settings.trainer.epochs, settings.trainer.max_steps) == (2, None)
    assert settings.remarks[0].startswith("trainer.epochs=2 takes the place of the recipe's trainer.max_steps=")
    assert settings.tree.trainer.max_steps is None
    assert compose([f"recipe={with_steps[0]}", "model=tiny"]).remarks == ()
    both = compose(["recipe=dpo", "model=tiny", "trainer.epochs=2", "trainer.max_steps=5"])
    assert both.trainer.max_steps == 5
    assert both.remarks == ("trainer.epochs=2 has no effect beside trainer.max_steps=5",)


def test_a_finished_run_needs_no_variable(tmp_path, monkeypatch):
    monkeypatch.setenv("ALIGN_TEST_PLACE", "mine.jsonl")
    RunDirectory(compose(["model=tiny", "data.train=${oc.env:ALIGN_TEST_PLACE}", f"run.dir={tmp_path}"])).close()
    assert compose_run([f"run.dir={tmp_path}"]).data.train == "mine.jsonl"
    monkeypatch.delenv("ALIGN_TEST_PLACE")
    assert compose_run([f"run.dir={tmp_path}"]).data.train == "$ALIGN_TEST_PLACE"
    assert compose_run([f"run.dir={tmp_path}", "data.train=other.jsonl"]).data.train == "other.jsonl"
