"""Which settings go together, and which values are possible."""

from __future__ import annotations

from align.config.explain import written
from align.config.limits import refuse
from align.config.schema import Config, ConfigError, OwnOptimizerConfig
from align.engine.settings import check_engine


def _number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def check_values(config: Config) -> None:
    """Raises ConfigError for the first value that is not possible, or that does not go with another one."""
    try:
        refuse(config)
    except ValueError as error:
        raise ConfigError(str(error)) from None
    _check_shapes(config)
    _check_together(config)


def _check_shapes(config: Config) -> None:
    betas = config.optimizer.betas
    if len(betas) != 2 or not all(0 <= b < 1 for b in betas):
        raise ConfigError(f"optimizer.betas={betas}: must be two numbers in [0, 1)")
    targets = config.lora.targets
    names = isinstance(targets, list) and targets and all(isinstance(t, str) for t in targets)
    if targets != "all-linear" and not names:
        raise ConfigError(f"lora.targets={targets}: must be all-linear or a list of names such as [q_proj, v_proj]")
    repeat, roles = config.data.repeat, config.data.target_roles
    if repeat is not None and not (isinstance(repeat, list) and all(_number(r) and 0 <= r <= 1000 for r in repeat)):
        raise ConfigError(f"data.repeat={written(repeat)}: must be a list of numbers from 0 to 1000, or null")
    margins = config.data.margins
    if margins is not None and not (isinstance(margins, dict) and all(isinstance(v, str) for v in margins.values())):
        raise ConfigError(
            f"data.margins={written(margins)}: must be names of components, each with the dotted path of a function, "
            "or null"
        )
    if not roles or any(role not in ("system", "user", "assistant", "tool") for role in roles):
        raise ConfigError(f"data.target_roles={roles}: must be a list of system, user, assistant, tool")


def _check_together(config: Config) -> None:
    lora = config.lora
    if config.reference.mode == "adapter" and lora.rank == 0:
        raise ConfigError("reference.mode=adapter needs LoRA: set lora.rank, or use reference.mode=cached")
    if config.reference.mode == "adapter" and config.reference.path is not None:
        raise ConfigError("reference.path needs reference.mode=cached or model: the adapter switched off is the policy")
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
    if isinstance(config.optimizer, OwnOptimizerConfig) and engine.stage is not None:
        raise ConfigError(
            f"optimizer._target_={config.optimizer.target}: the checkpoints of engine=zero0 to zero3 hold AdamW's "
            "moments; use engine=local"
        )
    if config.merge and lora.rank == 0:
        raise ConfigError("merge=true has no effect with lora.rank=0; remove it or set lora.rank")


def check_enough(count: int, rounds: int, per_round: int | None, setting: str, more: str = "") -> None:
    """Raises ValueError if `count` prompts are too few for the rounds. setting: where they come from; more: a further
    cure, for the message."""
    needed = rounds * (per_round or 1)
    if needed > count:
        raise ValueError(
            f"trainer.rounds={rounds} with trainer.prompts_per_round={per_round or 'null'} need {needed} prompts, "
            f"{setting} has {count}; lower one of them or give more{more}"
        )
