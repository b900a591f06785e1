"""What settings there are: their types, possible values and what may change when a run is resumed.

configs/ holds the values and what they mean, the dataclasses here hold their types; a test keeps the two equal.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Annotated, Any

from omegaconf import DictConfig

from align.config.limits import Resumable, above, at_least, between, marks, one_of, resumable
from align.config.rollouts import ROLLOUTS
from align.jsons import Json


class ConfigError(ValueError):
    """The user's settings are wrong; the message is one line that says how to cure it."""


@dataclass(frozen=True)
class RunConfig:
    """configs/config.yaml, run"""

    dir: str | None


@dataclass(frozen=True)
class LoraConfig:
    """configs/config.yaml, lora"""

    rank: Annotated[int, at_least(0)]
    alpha: Annotated[float, above(0)]
    dropout: Annotated[float, at_least(0, below=1)]
    targets: Any  # "all-linear" or a list of names


@dataclass(frozen=True)
class HeadConfig:
    """configs/config.yaml, head"""

    path: str | None
    only: bool
    dropout: Annotated[float, at_least(0, below=1)]


@dataclass(frozen=True)
class ReferenceConfig:
    """configs/config.yaml, reference"""

    mode: Annotated[str, one_of("cached", "adapter", "model")]
    path: str | None
    cache_dir: str | None


@dataclass(frozen=True)
class OptimizerConfig:
    """configs/optimizer"""

    lr: Annotated[float, above(0)]
    betas: list[float]
    eps: Annotated[float, above(0)]
    weight_decay: Annotated[float, at_least(0)]
    max_grad_norm: Annotated[float | None, above(0)]
    schedule: Annotated[str, one_of("cosine", "linear", "wsd", "rex", "constant")]
    warmup_ratio: Annotated[float, at_least(0, below=1)]
    min_lr_ratio: Annotated[float, at_least(0, at_most=1)]
    decay_ratio: Annotated[float, above(0, at_most=1)] = 0.2  # runs of before have none


@dataclass(frozen=True, kw_only=True)
class OwnOptimizerConfig(OptimizerConfig):
    """optimizer._target_: a class of the user's own; betas, eps and weight_decay are AdamW's and are not read."""

    target: str
    keys: Json  # what stands beside it


@dataclass(frozen=True)
class DataConfig:
    """configs/data"""

    train: Any  # one source or a list of them
    heldout: Any
    heldout_fraction: Annotated[float, at_least(0, below=1)]
    repeat: Any  # a number for each source of train
    max_tokens: Annotated[int, at_least(2)]
    overlong: Annotated[str, one_of("error", "drop", "truncate_turns")]
    targets: Annotated[str, one_of("all", "divergent")]
    target_roles: list[str]
    open_tool_calls: bool
    on_bad_row: Annotated[str, one_of("error", "drop"), resumable]
    max_bad_fraction: Annotated[float, at_least(0, at_most=1), resumable]
    gold: str | None
    margins: Any  # name of a component -> dotted path of a function
    columns: Any  # name of a field -> a column or a list of them
    form: str | None
    ignore: Annotated[list[str], resumable]
    text: Annotated[str, one_of("auto", "chat", "plain")]
    empty_prompts: Annotated[bool, resumable]
    format: str | None = None
    loader: str | None = None
    workers: Annotated[int | None, at_least(1), resumable] = None
    cache_dir: Annotated[str | None, resumable] = None
    streaming: bool = False
    shuffle_buffer: Annotated[int, at_least(1)] = 10000
    mixture: Annotated[str | None, one_of("temperature", "schedule", "gradient")] = None
    mixture_temperature: Annotated[float, above(0)] = 1.0
    mixture_shares: Any = None  # points [progress, shares]
    mixture_target: Any = None  # one source or a list of them
    mixture_every: Annotated[int, at_least(1)] = 20
    mixture_rate: Annotated[float, above(0)] = 1.0


@dataclass(frozen=True)
class SamplingConfig:
    """configs/config.yaml, sampling"""

    n: Annotated[int, at_least(1)]
    max_new_tokens: Annotated[int, at_least(1)]
    temperature: Annotated[float, at_least(0)]
    top_p: Annotated[float, above(0, at_most=1)]
    top_k: Annotated[int, at_least(0)]
    stop: list[str]


@dataclass(frozen=True)
class TrainerConfig:
    """configs/trainer/offline.yaml, which the other trainers add to"""

    kind: str
    epochs: Annotated[int, at_least(1)]
    max_steps: Annotated[int | None, at_least(1), resumable]
    schedule_steps: Annotated[int | None, at_least(1)]
    batch_size: Annotated[int, at_least(1)]
    micro_batch_tokens: Annotated[int, at_least(2)]
    layout: Annotated[str, one_of("auto", "shared", "packed", "padded")]
    activation_checkpointing: Annotated[str, one_of("auto", "off", "selective", "full")]
    precision: Annotated[str, one_of("auto", "float32", "bfloat16")]
    eval_every: Annotated[int, at_least(0)]
    save_every: Annotated[int, at_least(1), resumable]
    keep_checkpoints: Annotated[int, at_least(1), resumable]
    keep_best: str | None
    early_stopping_patience: Annotated[int | None, at_least(1)]
    export_every: Annotated[int | None, at_least(1), resumable]
    export_at: Annotated[list[int] | None, resumable]
    ema: Annotated[float | None, between(0, 1)]
    num_samples: Annotated[int, at_least(0)]
    sample_tokens: Annotated[int, at_least(1)]


@dataclass(frozen=True)
class OnlineConfig(TrainerConfig):
    """configs/trainer/online.yaml"""

    ppo_epochs: Annotated[int, at_least(1)]
    num_minibatches: Annotated[int, at_least(1)]
    old_logps: Annotated[str, one_of("auto", "trainer", "engine")]
    kl_in_reward: Annotated[float, at_least(0)]
    kl_target: Annotated[float | None, above(0)]
    truncated: Annotated[str, one_of("keep", "mask")]
    dynamic_sampling: Annotated[int, at_least(0)]
    max_missing_fraction: Annotated[float, at_least(0, at_most=1)]
    value_lr_scale: Annotated[float, above(0)]
    heldout_n: Annotated[int, at_least(0)]
    pass_component: str | None
    samples_every: Annotated[int, at_least(0)]
    rollout_logp_tolerance: Annotated[float | None, above(0)]


@dataclass(frozen=True)
class IterateConfig(TrainerConfig):
    """configs/trainer/iterate.yaml"""

    rounds: Annotated[int, at_least(1)]
    prompts_per_round: Annotated[int | None, at_least(1)]
    reference: Annotated[str, one_of("fixed", "updated")]
    select: Annotated[str, one_of("pairs", "best_of_n", "labelled", "collect")]
    greedy: bool
    min_score: float | None
    max_pairs_per_prompt: Annotated[int | None, at_least(1)]
    offline_data: Any  # one source or a list of them
    chunk_prompts: Annotated[int, at_least(1)]
    heldout_n: Annotated[int, at_least(0)]
    pass_component: str | None


@dataclass(frozen=True)
class WarmConfig(TrainerConfig):
    """configs/trainer/warm.yaml"""

    members: Annotated[int, at_least(1)]
    lrs: list[float] | None
    dropouts: list[float] | None
    starts: list[str] | None
    probe_steps: Annotated[int, at_least(0)]
    probe_lr: Annotated[float, above(0)]
    only: Annotated[int | None, at_least(0), resumable]


@dataclass(frozen=True)
class CollectConfig:
    """configs/collect"""

    task: str
    task_settings: Any  # null, or what the task takes
    problem_seed: Annotated[int, at_least(0, below=2**31)]
    num_problems: Annotated[int, at_least(1)]
    num_heldout: Annotated[int, at_least(1)]
    num_examples: Annotated[int, at_least(0, at_most=3)]
    samples_per_problem: Annotated[int, at_least(2)]
    chunk_problems: Annotated[int, at_least(1)]
    temperature: Annotated[float, above(0)]
    top_p: Annotated[float, above(0, at_most=1)]
    max_turns: Annotated[int, at_least(2)]
    max_new_tokens: Annotated[int, at_least(1)]
    stop: list[str]
    observation_role: Annotated[str, one_of("user", "tool")]
    max_pairs_per_problem: Annotated[int, at_least(1)]
    max_labelled_per_problem: Annotated[int, at_least(1)]
    tool: Any  # open: its keys are those of the class it names


@dataclass(frozen=True)
class LogConfig:
    """configs/log"""

    console_every: Annotated[int, at_least(1)]
    tensorboard: bool
    wandb: Annotated[str, one_of("off", "offline", "online")]
    wandb_project: str


@dataclass(frozen=True)
class EngineConfig:
    """configs/engine"""

    stage: Annotated[int | None, at_least(0, at_most=3)]
    offload_optimizer: bool
    offload_parameters: bool
    timeout_s: Annotated[float, above(0)]
    deepspeed: Any  # open: DeepSpeed's own keys


@dataclass(frozen=True)
class LaunchConfig:
    """configs/launch/local.yaml, which launch=slurm adds to"""

    kind: str
    processes: Annotated[int | None, at_least(1)]
    threads: Annotated[int | None, at_least(1)]
    port: Annotated[int | None, at_least(1024, at_most=65535)]


@dataclass(frozen=True)
class SlurmConfig(LaunchConfig):
    """configs/launch/slurm.yaml"""

    nodes: Annotated[int, at_least(1)]
    server_nodes: Annotated[int, at_least(0)]
    server_port: Annotated[int, at_least(1024, at_most=65535)]
    server_args: list[str]
    gpus: Annotated[int, at_least(0)]
    cpus: Annotated[int, at_least(1)]
    time: str
    save_before_s: Annotated[int, at_least(1)]
    max_restarts: Annotated[int, at_least(0)]
    partition: str | None
    account: str | None
    name: str
    array_limit: Annotated[int | None, at_least(1)]
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

    seed: Annotated[int, at_least(0, below=2**31)]
    merge: Annotated[bool, resumable]
    run: Annotated[RunConfig, resumable]
    lora: LoraConfig
    head: HeadConfig
    reference: ReferenceConfig
    optimizer: OptimizerConfig
    data: DataConfig
    trainer: TrainerConfig
    log: Annotated[LogConfig, resumable]
    engine: Annotated[EngineConfig, resumable]
    launch: Annotated[LaunchConfig, resumable]
    collect: CollectConfig | None  # None: the data are given
    model: DictConfig
    objective: DictConfig
    rollout: Annotated[DictConfig, Resumable(("urls",))]
    callbacks: Annotated[DictConfig | None, resumable]  # called after steps and evaluations, by name
    sampling: SamplingConfig
    advantage: DictConfig | None  # how rewards become advantages; online training only
    reward: DictConfig | None  # name of a component -> its _target_, weight and keys
    composer: DictConfig | None  # how several components become one stream; None: the sum of rewards times weights
    pairs: DictConfig | None  # the rule of align data pairs and of collected pairs
    choices: dict[str, str] = field(compare=False)  # group -> option, for names and the model card
    tree: DictConfig = field(compare=False)  # as composed, for config.yaml
    remarks: tuple[str, ...] = field(default=(), compare=False)  # what the user is told of how it was composed


SECTIONS = {
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
KINDS: dict[str, Json] = {"trainer": _TRAINERS, "launch": _LAUNCHERS}

EVALUATION = ("trainer.micro_batch_tokens", "trainer.layout", "trainer.precision")


def limits() -> dict[str, str]:
    """Dotted key -> its range or choices in words, of every setting that has one."""
    found = {}
    for prefix, cls in _classes():
        for name, beside in marks(cls):
            said = [str(mark) for mark in beside if not isinstance(mark, Resumable)]
            if said:
                found[prefix + name] = "; ".join(said)
    return found


def may_change(key: str) -> bool:
    """Whether a setting may differ when a run is resumed; every other one is part of what the run is."""
    for prefix, cls in _classes():
        for name, beside in marks(cls):
            for mark in beside:
                if isinstance(mark, Resumable) and _covers(prefix + name, mark.keys, key):
                    return True
    return False


def _covers(name: str, keys: tuple[str, ...], key: str) -> bool:
    if keys:
        return key in {f"{name}.{inner}" for inner in keys}
    return key == name or key.startswith(f"{name}.")


def _classes() -> Iterator[tuple[str, type]]:
    yield "", Config
    for cls in ROLLOUTS.values():
        yield "rollout.", cls
    for name, cls in SECTIONS.items():
        for kind in KINDS.get(name, {"": cls}).values():
            yield f"{name}.", kind
