"""The command line's words to checked settings: where configs live, composition, refusal of unknown keys.

Imports nothing heavy: a misspelt key is refused before torch is loaded. configs/ holds the values and what they
mean, the dataclasses here hold their types; a test keeps the two equal.
"""

from __future__ import annotations

import difflib
import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from operator import attrgetter
from pathlib import Path
from typing import Any

import yaml
from hydra import compose as hydra_compose
from hydra import initialize_config_dir
from hydra.core.config_store import ConfigStore
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException
from omegaconf import DictConfig, ListConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from align.engine.settings import check_engine

# What may differ when a run is resumed; everything else is part of what the run is.
RESUMABLE = (
    "trainer.max_steps",
    "trainer.only",
    "trainer.save_every",
    "trainer.keep_checkpoints",
    "merge",
    "run.",
    "log.",
    "engine.",
    "launch.",
    "rollout.urls",
)


class ConfigError(ValueError):
    """The user's settings are wrong; the message is one line that says how to cure it."""


@dataclass(frozen=True)
class RunConfig:
    """configs/config.yaml, run"""

    dir: str | None


@dataclass(frozen=True)
class LoraConfig:
    """configs/config.yaml, lora"""

    rank: int
    alpha: float
    dropout: float
    targets: Any  # "all-linear" or a list of names


@dataclass(frozen=True)
class HeadConfig:
    """configs/config.yaml, head"""

    path: str | None
    only: bool
    dropout: float


@dataclass(frozen=True)
class ReferenceConfig:
    """configs/config.yaml, reference"""

    mode: str
    path: str | None
    cache_dir: str | None


@dataclass(frozen=True)
class OptimizerConfig:
    """configs/optimizer"""

    lr: float
    betas: list[float]
    eps: float
    weight_decay: float
    max_grad_norm: float | None
    schedule: str
    warmup_fraction: float
    final_fraction: float


@dataclass(frozen=True)
class DataConfig:
    """configs/data"""

    train: Any  # one source or a list of them
    heldout: Any
    heldout_fraction: float
    repeat: Any  # a number for each source of train
    max_tokens: int
    overlong: str
    targets: str
    target_roles: list[str]
    open_tool_calls: bool
    on_bad_row: str
    max_bad_fraction: float
    gold: str | None
    margins: Any  # name of a component -> dotted path of a function


@dataclass(frozen=True)
class SamplingConfig:
    """configs/config.yaml, sampling"""

    n: int
    max_new_tokens: int
    temperature: float
    top_p: float
    top_k: int
    stop: list[str]


@dataclass(frozen=True)
class TrainerConfig:
    """configs/trainer/offline.yaml, which the other trainers add to"""

    kind: str
    epochs: int
    max_steps: int | None
    schedule_steps: int | None
    batch_size: int
    micro_batch_tokens: int
    layout: str
    recompute: str
    precision: str
    eval_every: int
    save_every: int
    keep_checkpoints: int
    num_samples: int
    sample_tokens: int


@dataclass(frozen=True)
class OnlineConfig(TrainerConfig):
    """configs/trainer/online.yaml"""

    inner_epochs: int
    inner_batches: int
    old_logps: str
    kl_in_reward: float
    kl_target: float | None
    truncated: str
    extra_draws: int
    max_missing_fraction: float
    value_lr_scale: float
    heldout_n: int
    pass_component: str | None
    samples_every: int
    engine_tolerance: float | None


@dataclass(frozen=True)
class IterateConfig(TrainerConfig):
    """configs/trainer/iterate.yaml"""

    rounds: int
    prompts_per_round: int | None
    reference: str
    select: str
    greedy: bool
    min_score: float | None
    max_pairs_per_prompt: int | None
    offline_data: Any  # one source or a list of them
    chunk_prompts: int
    heldout_n: int
    pass_component: str | None


@dataclass(frozen=True)
class WarmConfig(TrainerConfig):
    """configs/trainer/warm.yaml"""

    members: int
    lrs: list[float] | None
    dropouts: list[float] | None
    starts: list[str] | None
    probe_steps: int
    probe_lr: float
    only: int | None


@dataclass(frozen=True)
class CollectConfig:
    """configs/collect"""

    task: str
    task_settings: Any  # null, or what the task takes
    problem_seed: int
    num_problems: int
    num_heldout: int
    num_examples: int
    samples_per_problem: int
    chunk_problems: int
    temperature: float
    top_p: float
    max_turns: int
    max_new_tokens: int
    stop: list[str]
    observation_role: str
    max_pairs_per_problem: int
    max_labelled_per_problem: int
    tool: Any  # open: its keys are those of the class it names


@dataclass(frozen=True)
class LogConfig:
    """configs/log"""

    console_every: int
    tensorboard: bool
    wandb: str
    wandb_project: str


@dataclass(frozen=True)
class EngineConfig:
    """configs/engine"""

    stage: int | None
    offload_optimizer: bool
    offload_parameters: bool
    timeout_s: float
    deepspeed: Any  # open: DeepSpeed's own keys


@dataclass(frozen=True)
class LaunchConfig:
    """configs/launch/local.yaml, which launch=slurm adds to"""

    kind: str
    processes: int | None
    threads: int | None
    port: int | None


@dataclass(frozen=True)
class SlurmConfig(LaunchConfig):
    """configs/launch/slurm.yaml"""

    nodes: int
    server_nodes: int
    server_port: int
    server_words: list[str]
    gpus: int
    cpus: int
    time: str
    save_before_s: int
    max_restarts: int
    partition: str | None
    account: str | None
    name: str
    array_limit: int | None
    preflight: bool
    venv: str | None
    container: list[str]
    setup: list[str]
    options: list[str]
    srun_options: list[str]
    template: str
    log_dir: str


@dataclass(frozen=True)
class Config:
    """All settings of a run. model and objective stay open: their keys are those of the class they name."""

    seed: int
    merge: bool
    run: RunConfig
    lora: LoraConfig
    head: HeadConfig
    reference: ReferenceConfig
    optimizer: OptimizerConfig
    data: DataConfig
    trainer: TrainerConfig
    log: LogConfig
    engine: EngineConfig
    launch: LaunchConfig
    collect: CollectConfig | None  # None: the data are given
    model: DictConfig
    objective: DictConfig
    rollout: DictConfig
    sampling: SamplingConfig
    advantage: DictConfig | None  # how rewards become advantages; online training only
    reward: DictConfig | None  # name of a component -> its _target_, weight and keys
    composer: DictConfig | None  # how several components become one stream; None: the sum of rewards times weights
    pairs: DictConfig | None  # the rule of align data pairs and of collected pairs
    choices: dict[str, str] = field(compare=False)  # group -> option, for names and the model card
    tree: DictConfig = field(compare=False)  # as composed, for config.yaml


_SECTIONS = {
    "run": RunConfig,
    "lora": LoraConfig,
    "head": HeadConfig,
    "reference": ReferenceConfig,
    "optimizer": OptimizerConfig,
    "data": DataConfig,
    "sampling": SamplingConfig,
    "trainer": TrainerConfig,
    "collect": CollectConfig,
    "log": LogConfig,
    "engine": EngineConfig,
    "launch": LaunchConfig,
}

# trainer.kind -> its settings; the loop itself is align.trainers.<kind>.train
_TRAINERS = {"offline": TrainerConfig, "online": OnlineConfig, "iterate": IterateConfig, "warm": WarmConfig}
_LAUNCHERS = {"local": LaunchConfig, "slurm": SlurmConfig}  # launch.kind -> its settings
_KINDS: dict[str, dict[str, Any]] = {"trainer": _TRAINERS, "launch": _LAUNCHERS}

_CHOICES = {
    "reference.mode": ("cached", "adapter", "model"),
    "optimizer.schedule": ("cosine", "linear", "constant"),
    "data.on_bad_row": ("error", "drop"),
    "data.overlong": ("error", "drop", "truncate_turns"),
    "data.targets": ("all", "divergent"),
    "trainer.layout": ("auto", "shared", "packed", "padded"),
    "trainer.recompute": ("auto", "off", "selective", "full"),
    "trainer.precision": ("auto", "float32", "bfloat16"),
    "trainer.old_logps": ("auto", "trainer", "engine"),
    "trainer.truncated": ("keep", "mask"),
    "trainer.reference": ("fixed", "updated"),
    "trainer.select": ("pairs", "best_of_n", "labelled", "collect"),
    "log.wandb": ("off", "offline", "online"),
    "collect.observation_role": ("user", "tool"),
}

_EVALUATION = ("trainer.micro_batch_tokens", "trainer.layout", "trainer.precision")

# key -> (low, high, low itself allowed, high itself allowed); None: no bound
_RANGES: dict[str, tuple[float | None, float | None, bool, bool]] = {
    "seed": (0, 2**31, True, False),
    "lora.rank": (0, None, True, True),
    "lora.alpha": (0, None, False, True),
    "lora.dropout": (0, 1, True, False),
    "head.dropout": (0, 1, True, False),
    "optimizer.lr": (0, None, False, True),
    "optimizer.eps": (0, None, False, True),
    "optimizer.weight_decay": (0, None, True, True),
    "optimizer.max_grad_norm": (0, None, False, True),
    "optimizer.warmup_fraction": (0, 1, True, False),
    "optimizer.final_fraction": (0, 1, True, True),
    "data.heldout_fraction": (0, 1, True, False),
    "data.max_tokens": (2, None, True, True),
    "data.max_bad_fraction": (0, 1, True, True),
    "sampling.n": (1, None, True, True),
    "sampling.max_new_tokens": (1, None, True, True),
    "sampling.temperature": (0, None, True, True),
    "sampling.top_p": (0, 1, False, True),
    "sampling.top_k": (0, None, True, True),
    "trainer.inner_epochs": (1, None, True, True),
    "trainer.inner_batches": (1, None, True, True),
    "trainer.kl_in_reward": (0, None, True, True),
    "trainer.kl_target": (0, None, False, True),
    "trainer.extra_draws": (0, None, True, True),
    "trainer.max_missing_fraction": (0, 1, True, True),
    "trainer.value_lr_scale": (0, None, False, True),
    "trainer.heldout_n": (0, None, True, True),
    "trainer.samples_every": (0, None, True, True),
    "trainer.engine_tolerance": (0, None, False, True),
    "trainer.rounds": (1, None, True, True),
    "trainer.prompts_per_round": (1, None, True, True),
    "trainer.chunk_prompts": (1, None, True, True),
    "trainer.max_pairs_per_prompt": (1, None, True, True),
    "trainer.members": (1, None, True, True),
    "trainer.probe_steps": (0, None, True, True),
    "trainer.probe_lr": (0, None, False, True),
    "trainer.only": (0, None, True, True),
    "trainer.epochs": (1, None, True, True),
    "trainer.max_steps": (1, None, True, True),
    "trainer.schedule_steps": (1, None, True, True),
    "trainer.batch_size": (1, None, True, True),
    "trainer.micro_batch_tokens": (2, None, True, True),
    "trainer.eval_every": (0, None, True, True),
    "trainer.save_every": (1, None, True, True),
    "trainer.keep_checkpoints": (1, None, True, True),
    "trainer.num_samples": (0, None, True, True),
    "trainer.sample_tokens": (1, None, True, True),
    "collect.problem_seed": (0, 2**31, True, False),
    "collect.num_problems": (1, None, True, True),
    "collect.num_heldout": (1, None, True, True),
    "collect.num_examples": (0, 3, True, True),
    "collect.samples_per_problem": (2, None, True, True),
    "collect.chunk_problems": (1, None, True, True),
    "collect.temperature": (0, None, False, True),
    "collect.top_p": (0, 1, False, True),
    "collect.max_turns": (2, None, True, True),
    "collect.max_new_tokens": (1, None, True, True),
    "collect.max_pairs_per_problem": (1, None, True, True),
    "collect.max_labelled_per_problem": (1, None, True, True),
    "log.console_every": (1, None, True, True),
    "engine.stage": (0, 3, True, True),
    "engine.timeout_s": (0, None, False, True),
    "launch.processes": (1, None, True, True),
    "launch.threads": (1, None, True, True),
    "launch.port": (1024, 65535, True, True),
    "launch.nodes": (1, None, True, True),
    "launch.server_nodes": (0, None, True, True),
    "launch.server_port": (1024, 65535, True, True),
    "launch.gpus": (0, None, True, True),
    "launch.cpus": (1, None, True, True),
    "launch.save_before_s": (1, None, True, True),
    "launch.max_restarts": (0, None, True, True),
    "launch.array_limit": (1, None, True, True),
}


def shipped_root() -> Path:
    """The directory that holds configs, recipes and launch: inside a wheel, or the checkout."""
    package = Path(__file__).parent
    shipped = package / "_shipped"
    return shipped if shipped.is_dir() else package.parent


def cache_root() -> Path:
    """Where converted models and cached reference log-probs are kept: $ALIGN_CACHE, or ~/.cache/align."""
    return Path(os.environ.get("ALIGN_CACHE") or Path.home() / ".cache" / "align")


def recipes(config_dir: Path | None = None) -> dict[str, Path]:
    """Name -> file of every shipped recipe and of those in <config_dir>/recipes."""
    found = {}
    for root in [shipped_root() / "recipes"] + ([config_dir / "recipes"] if config_dir else []):
        for path in sorted(root.rglob("*.yaml")):
            found[path.relative_to(root).with_suffix("").as_posix()] = path
    return found


def options(group: str, config_dir: Path | None = None) -> list[str]:
    """Names of the options of a group such as model or objective/loss: the shipped ones and those in <config_dir>."""
    roots = [shipped_root() / "configs"] + ([config_dir] if config_dir else [])
    return sorted({p.stem for root in roots for p in (root / group).glob("*.yaml")})


def compose(overrides: Sequence[str], config_dir: Path | None = None) -> Config:
    """Checked settings from `key=value` and `group=option` words, in Hydra's syntax.

    config_dir: a directory of your own with configs in the same groups and recipes in recipes/.
    Raises ConfigError, one line, for anything that is not a setting or not a possible value.
    """
    words = list(overrides)
    for word in words:
        key, equals, _ = word.lstrip("+~").partition("=")
        if word.startswith("-") or not equals or not key:
            raise ConfigError(f"{word}: settings are written key=value, for example optimizer.lr=1e-6")
        if key.split(".")[0] == "hydra":
            raise ConfigError(f"{key} is not a setting; `align check --keys` lists them all")
    # Your own training data never meet the shipped held-out set or its gold rule.
    if any(w.startswith("data.train=") for w in words) and not any(w.startswith("data=") for w in words):
        words.append("data=files")
    known_models = options("model", config_dir)
    for i, word in enumerate(words):
        name = word.removeprefix("model=")
        if name != word and name not in known_models and ("/" in name or Path(name).is_dir()):
            words[i : i + 1] = ["model=hub", f"model.path={name}"]
            break
    # A composer has numbers by component of the reward: new keys.
    words = [f"++{word}" if word.startswith("composer.") else word for word in words]
    # So have the weights of an objective over several, also as a part of another, and the functions of data.margins.
    words = [
        f"++{word}" if re.match(r"objective\.([^=]+\.)?weights\.|data\.margins\.", word) else word for word in words
    ]
    # Your own reward replaces the recipe's; reward=OPTION beside it keeps that one as well.
    if any(w.startswith("reward.") and "._target_=" in w for w in words) and not any(
        w.startswith("reward=") for w in words
    ):
        words.append("reward=[]")
    # a component of the reward has a name of the user's own, and DeepSpeed's settings are not listed: new keys
    words = [f"++{word}" if word.startswith(("reward.", "engine.deepspeed.")) else word for word in words]
    _register_recipes(config_dir)
    GlobalHydra.instance().clear()
    with initialize_config_dir(str((shipped_root() / "configs").resolve()), version_base="1.3"):
        if config_dir is not None:
            quoted = str(config_dir.resolve()).replace("\\", "\\\\").replace("'", "\\'")
            words.append(f"hydra.searchpath=['file://{quoted}']")
        try:
            full = hydra_compose("config", words, return_hydra_config=True)
        except (HydraException, OmegaConfBaseException, yaml.YAMLError, ValueError) as error:
            raise ConfigError(_explain(words, error, config_dir)) from None
        choices = {g: o for g, o in full.hydra.runtime.choices.items() if o and not g.startswith("hydra")}
        groups = [f"{g}={o}" for g, o in choices.items() if g != "recipe"]
        own = [w for w in words if w.startswith("hydra.")]
        known = hydra_compose("config", groups + own) if own else _shipped(tuple(groups))
    OmegaConf.set_struct(full, False)
    del full["hydra"]
    _refuse_unknown(full, known, choices)
    return _typed(full, choices)


def compose_run(overrides: Sequence[str]) -> Config:
    """The settings of an existing run, run.dir=DIR, with other data or sizes of forwards.

    Raises ConfigError as compose does, and for a setting that is part of what the run is.
    """
    given = dict(word.partition("=")[::2] for word in overrides)
    path = Path(given.pop("run.dir", "nowhere")) / "config.yaml"
    if not path.is_file():
        raise ConfigError("run.dir=DIR is needed: the directory of a run")
    tree = OmegaConf.load(path)
    assert isinstance(tree, DictConfig)
    # an older run has none, or fewer of their keys
    for group, option in (("engine", "local"), ("launch", "local"), ("data", "files")):
        shipped = OmegaConf.load(shipped_root() / "configs" / group / f"{option}.yaml")
        tree[group] = OmegaConf.merge(shipped, tree.get(group) or {})
    allowed = {key for key, _ in leaves(tree) if key.split(".")[0] in ("data", "launch") or key in _EVALUATION}
    for key, value in given.items():
        if key not in allowed:
            raise ConfigError(f"{key} cannot be set for a finished run{_nearest(key, allowed)}")
        OmegaConf.update(tree, key, yaml.safe_load(value))
    tree.run.dir = str(path.parent)
    return _typed(tree, {"objective": str(tree.objective.get("_target_", "")).rpartition(".")[2]})


def differences(old: DictConfig, new: DictConfig) -> dict[str, tuple[Any, Any]]:
    """Settings that differ between a run's config.yaml and now and that may not: key -> (there, now)."""
    a, b = dict(leaves(old)), dict(leaves(new))
    changed = {k: (a.get(k), b.get(k)) for k in sorted(a.keys() | b.keys()) if a.get(k) != b.get(k)}
    return {
        k: v
        for k, v in changed.items()
        if not any(k == allowed or (allowed.endswith(".") and k.startswith(allowed)) for allowed in RESUMABLE)
    }


def leaves(node: DictConfig, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Dotted key and value of every setting; a list is one value. Interpolations are not resolved."""
    for key in node:
        raw = node._get_node(key)
        name = f"{prefix}{key}"
        if isinstance(raw, DictConfig) and not raw._is_none() and not raw._is_missing():
            yield from leaves(raw, name + ".")
        elif isinstance(raw, ListConfig):
            yield name, OmegaConf.to_container(raw, resolve=False)
        else:
            yield name, None if raw is None else raw._value()


@lru_cache
def _shipped(groups: tuple[str, ...]) -> DictConfig:
    """What these options of the shipped groups hold, for reading; a sweep, a plan or a test asks for them again."""
    return hydra_compose("config", list(groups))


def _register_recipes(config_dir: Path | None) -> None:
    found = []
    for name, path in recipes(config_dir).items():
        try:
            changed = path.stat().st_mtime_ns
            node = _recipe(path, changed)
        except (yaml.YAMLError, OmegaConfBaseException, OSError, UnicodeDecodeError) as error:
            raise ConfigError(f"{path}: is not YAML: {_one_line(error)}") from None
        if not isinstance(node, DictConfig):
            raise ConfigError(f"{path}: must hold settings, `key: value` a line")
        found.append((name, path, changed))
    _store_recipes(tuple(found))


@lru_cache(maxsize=1)
def _store_recipes(found: tuple[tuple[str, Path, int], ...]) -> None:
    """Hand them to Hydra, unless they are those that it was handed last: that takes a quarter of compose."""
    store = ConfigStore.instance()
    store.repo.pop("recipe", None)
    for name, path, changed in found:
        group, _, option = f"recipe/{name}".rpartition("/")
        store.store(group=group, name=option, node=_recipe(path, changed), package="_global_")


@lru_cache
def _recipe(path: Path, _changed: int) -> DictConfig | ListConfig:
    return OmegaConf.load(path)


def _refuse_unknown(full: DictConfig, known: DictConfig, choices: dict[str, str]) -> None:
    """Hydra adds what a recipe invents; here it is an error, as on the command line."""
    allowed = {key for key, _ in leaves(known)}
    for key, _ in leaves(full):
        if key.startswith("composer.") and _by_component(known, key.rpartition(".")[0]):
            continue
        if key.startswith("reward.") and key.count(".") > 1:  # its keys are those of what it names
            continue
        if key.startswith("engine.deepspeed."):  # the engine knows them
            continue
        if key not in allowed and not any(key.startswith(f"{a}.") for a in allowed):
            if key.replace(".", "/") in _groups():
                raise ConfigError(f"{key} is a group of settings: choose one with {key.replace('.', '/')}=...")
            group = key.split(".")[0]
            hint = f"; {group}={choices[group]} has no such key" if group in choices else ""
            raise ConfigError(f"{key} is not a setting{hint}{_nearest(key, allowed)}")


def _by_component(known: DictConfig, section: str) -> bool:
    """Whether the names below a section are the reward's components."""
    if "." not in section:
        return False
    node = OmegaConf.select(known, section)
    return isinstance(node, DictConfig) and "_target_" not in node


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())


def _explain(words: Sequence[str], error: Exception, config_dir: Path | None) -> str:
    """One line for what Hydra refuses, with the nearest name that it would accept."""
    text = _one_line(error)
    for word in words:
        if not _readable(word):
            word = word.removeprefix("++")  # ours, see compose
            key, _, value = word.partition("=")
            return f'{word}: cannot be read; with commas, = or quotes in it the value itself is quoted: {key}="{value}"'
    found = {g: options(g, config_dir) for g in _groups()} | {"recipe": sorted(recipes(config_dir))}
    for word in words:
        key, _, value = word.lstrip("+~").partition("=")
        key = key.split("@")[0]
        named = value == "null" or re.search(rf"\b{re.escape(key)}\b", text)
        if key in found and value not in found[key] and named:
            near = difflib.get_close_matches(value, found[key], 1, 0.5)
            tip = f"did you mean {near[0]}? " if near else ""
            return f"{key}={value}: no such option; {tip}Options: {', '.join(found[key])}"
    with_groups = [w for w in words if w.partition("=")[0] in found or w.startswith("hydra.")]
    try:
        base = hydra_compose("config", with_groups)
    except Exception:  # the groups themselves do not compose: Hydra's own words are the best there are
        return text
    allowed = {key for key, _ in leaves(base)}
    sections = {key.rsplit(".", 1)[0] for key in allowed if "." in key}
    for word in words:
        key = word.lstrip("+~").partition("=")[0]
        if word not in with_groups and key not in allowed | sections:
            return f"{key} is not a setting{_elsewhere(key, config_dir) or _nearest(key, allowed | set(found))}"
    return text


def _elsewhere(key: str, config_dir: Path | None) -> str:
    """Whether another option of a group has a key, as a hint: "" if none has."""
    group, _, name = key.partition(".")
    roots = [shipped_root() / "configs"] + ([config_dir] if config_dir else [])
    having = [
        option
        for option in options(group, config_dir)
        for root in roots
        if (root / group / f"{option}.yaml").is_file()
        and name in (yaml.safe_load((root / group / f"{option}.yaml").read_text()) or {})
    ]
    if not 0 < len(having) < 4:  # of many the nearest name says more
        return ""
    return f" here; {' and '.join(f'{group}={option}' for option in having)} {'have' if len(having) > 1 else 'has'} it"


def _readable(word: str) -> bool:
    """Whether Hydra's grammar takes a word as one value."""
    try:
        return not OverridesParser.create().parse_override(word).is_sweep_override()
    except HydraException:
        return False


def alternatives(word: str) -> list[str]:
    """The words that a word with several values stands for, `seed=1,2` or `seed=range(0,3)`; itself if it has one."""
    key = word.partition("=")[0]
    try:
        override = OverridesParser.create().parse_override(word)
    except HydraException:  # compose says what is wrong with it
        return [word]
    if not override.is_sweep_override():
        return [word]
    return [f"{key}={value}" for value in override.sweep_string_iterator()]


def quoted(value: str) -> str:
    """A text as the value of a word, whatever its characters."""
    if re.fullmatch(r"[A-Za-z0-9_./+-]+", value):
        return value
    # a backslash is one except before a quote
    return "'" + re.sub(r"(\\*)('|$)", lambda m: m[1] * 2 + ("\\'" if m[2] else ""), value) + "'"


def _groups() -> list[str]:
    root = shipped_root() / "configs"
    return sorted({p.parent.relative_to(root).as_posix() for p in root.rglob("*.yaml")} - {"."})


def _nearest(key: str, allowed: set[str]) -> str:
    """A suggestion: the nearest full name, or the nearest by the last part alone."""
    near = difflib.get_close_matches(key, sorted(allowed), 1, 0.6)
    if not near:
        last = {a.rsplit(".", 1)[-1]: a for a in sorted(allowed)}
        near = [last[m] for m in difflib.get_close_matches(key.rsplit(".", 1)[-1], list(last), 1, 0.6)]
    return f"; did you mean {near[0]}?" if near else "; `align check --keys` lists them all"


def _typed(tree: DictConfig, choices: dict[str, str]) -> Config:
    missing = [key for key, value in leaves(tree) if value == "???"]
    if missing:
        raise ConfigError(f"{missing[0]} is required: add {missing[0]}=...")
    try:  # the tree itself keeps its interpolations: an environment variable's value is not for config.yaml
        values = OmegaConf.to_container(tree, resolve=True)
    except OmegaConfBaseException as error:
        key = f"{error.full_key}: " if error.full_key else ""
        raise ConfigError(f"{key}{_first_line(error)}") from None
    assert isinstance(values, dict)
    sections = {}
    for name, cls in _SECTIONS.items():
        if values.get(name) is None and name == "collect":
            sections[name] = None
            continue
        if name in _KINDS:
            kind = (values[name] or {}).get("kind")
            if kind not in _KINDS[name]:
                raise ConfigError(f"{name}.kind={kind}: must be one of {', '.join(_KINDS[name])}")
            cls = _KINDS[name][kind]
        schema = OmegaConf.structured(cls)
        OmegaConf.set_readonly(schema, False)
        try:
            sections[name] = OmegaConf.to_object(OmegaConf.merge(schema, values[name]))
        except OmegaConfBaseException as error:
            key = f"{name}.{error.full_key}" if error.full_key else name
            raise ConfigError(f"{key}={_written(OmegaConf.select(tree, key))}: {_first_line(error)}") from None
    for key, kind in (("seed", int), ("merge", bool)):
        if not isinstance(values[key], kind) or (kind is int and isinstance(values[key], bool)):
            given = _written(values[key])
            raise ConfigError(f"{key}={given}: must be {'true or false' if kind is bool else 'an integer'}")
    config = Config(
        seed=values["seed"],
        merge=values["merge"],
        model=tree.model,
        objective=tree.objective,
        rollout=tree.rollout,
        advantage=tree.get("advantage"),
        reward=tree.get("reward"),
        composer=tree.get("composer"),
        pairs=tree.get("pairs"),
        choices=choices,
        tree=tree,
        **sections,
    )
    _check_values(config)
    return config


def _first_line(error: OmegaConfBaseException) -> str:
    """OmegaConf's message without the key and type that it appends."""
    return str(error.msg or error).splitlines()[0]


def _written(value: Any) -> str:
    """A value as the user types it."""
    if value is None or isinstance(value, bool):
        return "null" if value is None else str(value).lower()
    return str(value)


def _number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _check_values(config: Config) -> None:
    def absent(key: str) -> bool:
        if key.startswith("collect."):
            return config.collect is None
        group, _, name = key.partition(".")
        return group in _KINDS and not hasattr(getattr(config, group), name)

    for key, allowed in _CHOICES.items():
        if absent(key):
            continue
        value = attrgetter(key)(config)
        if value not in allowed:
            near = difflib.get_close_matches(str(value), allowed, 1)
            tip = f"; did you mean {near[0]}?" if near else ""
            raise ConfigError(f"{key}={value}: must be one of {', '.join(allowed)}{tip}")
    for key, (low, high, low_in, high_in) in _RANGES.items():
        value = None if absent(key) else attrgetter(key)(config)
        if value is None:
            continue
        below = low is not None and (value < low or (value == low and not low_in))
        above = high is not None and (value > high or (value == high and not high_in))
        if below or above or value != value or value in (float("inf"), float("-inf")):
            bounds = []
            if low is not None:
                bounds.append(f"{'at least' if low_in else 'greater than'} {low:g}")
            if high is not None:
                bounds.append(f"{'at most' if high_in else 'below'} {high:g}")
            raise ConfigError(f"{key}={value}: must be {' and '.join(bounds)}")
    betas = config.optimizer.betas
    if len(betas) != 2 or not all(0 <= b < 1 for b in betas):
        raise ConfigError(f"optimizer.betas={betas}: must be two numbers in [0, 1)")
    lora, targets = config.lora, config.lora.targets
    names = isinstance(targets, list) and targets and all(isinstance(t, str) for t in targets)
    if targets != "all-linear" and not names:
        raise ConfigError(f"lora.targets={targets}: must be all-linear or a list of names such as [q_proj, v_proj]")
    if config.reference.mode == "adapter" and lora.rank == 0:
        raise ConfigError("reference.mode=adapter needs LoRA: set lora.rank, or use reference.mode=cached")
    if config.reference.mode == "adapter" and config.reference.path is not None:
        raise ConfigError("reference.path needs reference.mode=cached or model: the adapter switched off is the policy")
    repeat, roles = config.data.repeat, config.data.target_roles
    if repeat is not None and not (isinstance(repeat, list) and all(_number(r) and 0 <= r <= 1000 for r in repeat)):
        raise ConfigError(f"data.repeat={_written(repeat)}: must be a list of numbers from 0 to 1000, or null")
    margins = config.data.margins
    if margins is not None and not (isinstance(margins, dict) and all(isinstance(v, str) for v in margins.values())):
        raise ConfigError(
            f"data.margins={_written(margins)}: must be names of components, each with the dotted path of a function, "
            "or null"
        )
    if not roles or any(role not in ("system", "user", "assistant", "tool") for role in roles):
        raise ConfigError(f"data.target_roles={roles}: must be a list of system, user, assistant, tool")
    if lora.dropout > 0 and config.trainer.layout == "shared":
        raise ConfigError("lora.dropout above 0 and trainer.layout=shared: use trainer.layout=packed")
    if lora.dropout > 0 and lora.rank == 0:
        raise ConfigError("lora.dropout has no effect with lora.rank=0; remove it or set lora.rank")
    if (config.collect is None) == (config.data.train == "collected"):
        raise ConfigError(
            "data.train=collected and collect=... belong together: choose data=collected with collect=chain_sum"
        )
    if config.composer is not None and config.trainer.kind not in ("online", "iterate"):
        raise ConfigError(f"composer has no effect with trainer.kind={config.trainer.kind}; remove it")
    online = config.trainer.kind == "online"
    if online and config.advantage is None:
        raise ConfigError("trainer=online needs an estimator of advantages: add advantage=remax or another")
    if online and not config.reward:
        raise ConfigError("trainer=online needs a reward: add reward.NAME._target_=module.function")
    if not online and config.advantage is not None:
        raise ConfigError(f"advantage has no effect with trainer.kind={config.trainer.kind}; remove it")
    engine = config.engine
    try:
        check_engine(engine.stage, engine.offload_optimizer, engine.offload_parameters, engine.deepspeed)
    except ValueError as error:
        raise ConfigError(str(error)) from None
    if config.merge and lora.rank == 0:
        raise ConfigError("merge=true has no effect with lora.rank=0; remove it or set lora.rank")


def keys_with_help() -> list[str]:
    """A line per setting of every option: key, default, and the comment above it in configs/."""
    root = shipped_root() / "configs"
    lines = []
    for path in sorted(root.rglob("*.yaml")):
        group = path.parent.relative_to(root).as_posix().replace("/", ".")
        lines.append(f"[{path.relative_to(root).with_suffix('').as_posix()}]")
        comment: list[str] = []
        sections: list[str] = []
        for line in path.read_text().splitlines():
            stripped = line.strip()
            if stripped.startswith("#"):
                comment.append(stripped.lstrip("# "))
            elif match := re.match(r"^((?:  )*)([a-z_0-9]+):\s*(.*)$", line):
                indent, key, value = match.groups()
                sections = sections[: len(indent) // 2]
                if value:
                    prefix = "" if group == "." else f"{group}."
                    lines.append(f"  {prefix}{'.'.join([*sections, key])}={value}  {' '.join(comment)}")
                else:
                    sections.append(key)
                comment = []
            else:
                comment = []
    return lines
