"""What reading rows as the run goes refuses: whatever needs the whole set before the first step."""

from __future__ import annotations

from align.config.schema import Config
from align.objectives.base import Objective

_SEQUENCES = {"pair": 2, "labelled": 1, "single": 1}


def check(config: Config, objective: Objective) -> None:
    """Raises ValueError for settings that do not go with data.streaming=true."""
    data, trainer = config.data, config.trainer
    if trainer.kind != "offline" or config.collect is not None:
        other = f"trainer.kind={trainer.kind}" if config.collect is None else "collect=..."
        raise ValueError(f"data.streaming=true: must be false with {other}, which asks for rows by their number")
    if trainer.max_steps is None:
        raise ValueError("trainer.max_steps=null: must be given with data.streaming=true, which knows no end; set it")
    if data.heldout is None and data.heldout_fraction > 0:
        raise ValueError(
            f"data.heldout_fraction={data.heldout_fraction}: must be 0 with data.streaming=true, of which "
            "no part can be kept back; use data.heldout=FILE, or data.heldout_fraction=0"
        )
    if objective.step_rows == "mismatched":
        raise ValueError(
            f"data.streaming=true: must be false with objective={config.choices['objective']}, which pairs each row "
            "with another of the whole set"
        )
    if data.repeat is not None:
        raise ValueError("data.repeat has no effect with data.streaming=true; use data.mixture=schedule")
    if "weight" in (data.columns or {}):
        raise ValueError("data.columns.weight has no effect with data.streaming=true, which knows no sum of weights")
    _check_shares(config)
    _check_budget(config, objective)


def _check_shares(config: Config) -> None:
    data = config.data
    num_sources = len(data.train) if isinstance(data.train, list) else 1
    if data.mixture == "schedule" or (data.mixture is None and num_sources == 1):
        return
    points = f"[[0,[{','.join(['1'] * num_sources)}]]]"
    raise ValueError(
        f"data.mixture={data.mixture or 'null'}: must be schedule with data.streaming=true, which does not know how "
        f"many rows a source has; use data.mixture=schedule data.mixture_shares={points}"
    )


def _check_budget(config: Config, objective: Objective) -> None:
    """Raises ValueError where an example might come that does not fit: better now than in the middle of the run."""
    sequences = _SEQUENCES.get(objective.kind, 1) + len(objective.columns)
    needed, budget = sequences * config.data.max_tokens, config.trainer.micro_batch_tokens
    if needed > budget:
        raise ValueError(
            f"trainer.micro_batch_tokens={budget}: must be at least {needed} with data.streaming=true, where an "
            f"example of {sequences} sequences of data.max_tokens={config.data.max_tokens} may come; use {needed}, or "
            "a smaller data.max_tokens"
        )
