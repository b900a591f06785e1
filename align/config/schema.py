"""What settings there are: their types, possible values and what may change when a run is resumed.

configs/ holds the values and what they mean, the dataclasses here hold their types; a test keeps the two equal.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from omegaconf import DictConfig

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
KINDS: dict[str, dict[str, Any]] = {"trainer": _TRAINERS, "launch": _LAUNCHERS}

CHOICES = {
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

EVALUATION = ("trainer.micro_batch_tokens", "trainer.layout", "trainer.precision")

# key -> (low, high, low itself allowed, high itself allowed); None: no bound
RANGES: dict[str, tuple[float | None, float | None, bool, bool]] = {
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
