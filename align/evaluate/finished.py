"""`align evaluate`: how a finished run ranks pairs, its own held-out ones or others. Reward models: evaluate.score."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from align import build
from align.config import Config, IterateConfig, OnlineConfig, saved_settings
from align.data.load import load
from align.data.wanted import Wanted
from align.evaluate.ranking import as_dict, lines, ranking_report
from align.jsons import Tokenizer
from align.models.device import pick_device, pick_precision
from align.models.policy import Policy, choose_layout, with_adapter
from align.models.pretrained import Pretrained, from_hub
from align.objectives.base import Objective
from align.packing import micro_batches, pack, to_device
from align.types import Example, Layout


def evaluate_run(config: Config, out: str | None) -> list[str]:
    """Ranking accuracy of the run's final model and, if it was trained against one reference, reward accuracy; of each
    set of pairs: those of data.train and data.heldout that are not the run's own, else the run's held-out sets, else
    what it was trained on.

    Returns lines for the terminal; `out` names a JSON file. Raises ValueError, also for a reward model.
    """
    assert config.run.dir is not None
    final = Path(config.run.dir) / "final"
    objective = build.objective(config)
    _check_policy(objective, final)
    if not (final / "README.md").is_file():
        raise ValueError(f"run.dir={config.run.dir}: holds no final model; let the run finish first")
    base = build.pretrained(config)
    tokenizer = base.tokenizer()
    sets = _sets(config, tokenizer)
    unrewarded = _unrewarded(config, objective)
    device = pick_device()
    precision, _ = pick_precision(_precision(config), device)
    policy = final_model(base, final).to(device)
    layout, _ = choose_layout(policy, config.trainer.layout, 0.0)
    policy = Policy(policy, layout).eval()
    reference = (
        base if config.reference.path is None else from_hub(config.reference.path, None, False, False, None, "auto")
    )
    fixed = Policy(reference.model().float().to(device), layout).eval()
    examples = [e for part in sets.values() for e in part]
    names = [name for name, part in sets.items() for _ in part]
    columns = []
    for network in (policy, fixed):
        with torch.autocast(device.type, dtype=precision, enabled=precision != torch.float32):
            columns.append(_logps(network, examples, layout, config.trainer.micro_batch_tokens))
    lengths = np.array([[int(row.targets.sum()) for row in e.rows[:2]] for e in examples])
    agreement = np.array([e.numbers.get("agreement", np.nan) for e in examples])
    report = ranking_report(columns[0], columns[1], lengths, agreement, names, rewarded_by_reference=unrewarded is None)
    if out is not None:
        Path(out).write_text(json.dumps(as_dict(report), indent=1) + "\n")
    return lines(report) + ([] if unrewarded is None else [f"no reward accuracy: {unrewarded}"])


def _check_policy(objective: Objective, final: Path) -> None:
    """Raises ValueError for a reward model, whose head scores and whose log-probs mean nothing."""
    if "scores" in objective.needs:
        raise ValueError(
            f"run.dir={final.parent}: the run trained a reward model, which has no log-probs to rank pairs by; use "
            f"align evaluate pairs model={final} data.train=FILE out=DIR"
        )


def _unrewarded(config: Config, objective: Objective) -> str | None:
    """Why log policy - log reference is no reward that the run has learnt; None: it is one."""
    trainer = config.trainer
    if isinstance(trainer, IterateConfig) and trainer.reference == "updated" and trainer.rounds > 1:
        last = f"{config.run.dir}/rounds/{trainer.rounds:02d}/train"
        return f"each round had a reference of its own; of the last round: align evaluate run.dir={last}"
    if "reference" in objective.needs or (isinstance(trainer, OnlineConfig) and trainer.kl_in_reward > 0):
        return None
    return "the run was trained without a reference"


def _sets(config: Config, tokenizer: Tokenizer) -> dict[str, Sequence[Example]]:
    """The pairs of each file. Raises ValueError for a run whose own data are none, if no others are given."""
    assert config.run.dir is not None
    run, data = Path(config.run.dir), config.data
    own = saved_settings(run / "config.yaml").data
    given = [_listed(now) for now, then in ((data.train, own.train), (data.heldout, own.heldout)) if now != then]
    if any(given):
        return _pairs_of(config, dict.fromkeys(name for part in given for name in part), tokenizer)
    give = f"give pairs: align evaluate run.dir={run} data.train=FILE"
    if config.trainer.kind in ("online", "iterate"):
        raise ValueError(f"run.dir={run}: the run drew its answers itself, its data hold no pairs to rank; {give}")
    trained = data.train if config.collect is None else str(run / "collect" / "pairs.jsonl")
    try:
        return _pairs_of(config, _listed(data.heldout) or _listed(trained), tokenizer)
    except ValueError as error:
        raise ValueError(f"{error}. If the run's own rows are no pairs, {give}") from error


def _listed(names: Any) -> list[str]:
    return [] if names is None else names if isinstance(names, list) else [names]


def _precision(config: Config) -> str:
    """What the run found for auto holds here too: a second measurement may come out otherwise."""
    assert config.run.dir is not None
    found = Path(config.run.dir) / "resolved.json"
    if config.trainer.precision == "auto" and found.is_file():
        return json.loads(found.read_text())["precision"]
    return config.trainer.precision


def _pairs_of(config: Config, names: Iterable[str], tokenizer: Tokenizer) -> dict[str, Sequence[Example]]:
    alone = replace(config.data, heldout=None, heldout_fraction=0.0, repeat=None)
    return {name: load(replace(alone, train=name), tokenizer, Wanted()).train for name in names}


def final_model(base: Pretrained, final: Path) -> Any:
    """The model in a run's final/, in float32; base: the model that the run started from."""
    if (final / "adapter_config.json").is_file():
        return with_adapter(base.model().float(), str(final))
    return from_hub(str(final), None, False, False, None, "float32").model()


@torch.no_grad()
def _logps(network: Policy, examples: Sequence[Example], layout: Layout, max_tokens: int) -> np.ndarray:
    """Summed log-probs of chosen and rejected [P, 2]."""
    out = np.zeros((len(examples), 2))
    groups = [e.rows[:2] for e in examples]
    for part in micro_batches(groups, [e.source for e in examples], layout, max_tokens):
        batch = to_device(pack([examples[i] for i in part], layout), network.device)
        out[part] = network(batch).logps[batch.groups[:, :2]].double().cpu().numpy()
    return out
