"""The settings of a run: what there is, where it is found, how it is composed and what is refused. Torch-free."""

from align.config.compose import compose, compose_run, derived, differences, saved_model
from align.config.explain import keys_with_help, leaves
from align.config.moved import saved_settings
from align.config.overrides import alternatives, quoted
from align.config.schema import (
    CollectConfig,
    Config,
    ConfigError,
    DataConfig,
    EngineConfig,
    HeadConfig,
    IterateConfig,
    LaunchConfig,
    LogConfig,
    LoraConfig,
    OnlineConfig,
    OptimizerConfig,
    OwnOptimizerConfig,
    ReferenceConfig,
    RunConfig,
    SamplingConfig,
    SlurmConfig,
    TrainerConfig,
    WarmConfig,
)
from align.vocabulary import cache_root, options, recipes, shipped_root

__all__ = [
    "CollectConfig",
    "Config",
    "ConfigError",
    "DataConfig",
    "EngineConfig",
    "HeadConfig",
    "IterateConfig",
    "LaunchConfig",
    "LogConfig",
    "LoraConfig",
    "OnlineConfig",
    "OptimizerConfig",
    "OwnOptimizerConfig",
    "ReferenceConfig",
    "RunConfig",
    "SamplingConfig",
    "SlurmConfig",
    "TrainerConfig",
    "WarmConfig",
    "alternatives",
    "cache_root",
    "compose",
    "compose_run",
    "derived",
    "differences",
    "keys_with_help",
    "leaves",
    "options",
    "quoted",
    "recipes",
    "saved_model",
    "saved_settings",
    "shipped_root",
]
