"""`align evaluate`: how a finished run ranks pairs, its own held-out ones or others."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from omegaconf import OmegaConf

from align import build
from align.config import Config
from align.data.examples import Wanted
from align.data.load import load
from align.device import pick_device, pick_precision
from align.evaluate.ranking import as_dict, lines, ranking_report
from align.models import Policy, choose_layout, with_adapter
from align.packing import micro_batches, pack, to_device
from align.pretrained import Pretrained, from_hub
from align.types import Example, Layout


def evaluate_run(config: Config, out: str | None) -> list[str]:
    """Ranking and reward accuracy of the run's final model, and of each set of pairs: those of data.train and
    data.heldout that are not the run's own, else the run's held-out sets, else what it was trained on.

    Returns lines for the terminal; `out` names a JSON file. Raises ValueError.
    """
    assert config.run.dir is not None
    final = Path(config.run.dir) / "final"
    if not (final / "README.md").is_file():
        raise ValueError(f"run.dir={config.run.dir}: holds no final model; let the run finish first")
    base = build.pretrained(config)
    tokenizer = base.tokenizer()
    sets = {name: _pairs(config, name, tokenizer) for name in _sets(config)}
    device = pick_device()
    precision, _ = pick_precision(_precision(config), device)
    policy = _with_final(base, final).to(device)
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
    report = ranking_report(columns[0], columns[1], lengths, agreement, names)
    if out is not None:
        Path(out).write_text(json.dumps(as_dict(report), indent=1) + "\n")
    return lines(report)


def _sets(config: Config) -> list[str]:
    assert config.run.dir is not None
    run = Path(config.run.dir)
    own = OmegaConf.load(run / "config.yaml").data
    data = config.data
    named = [_listed(now) for now, then in ((data.train, own.train), (data.heldout, own.heldout)) if now != then]
    if not any(named):
        trained = data.train if config.collect is None else str(run / "collect" / "pairs.jsonl")
        named = [_listed(data.heldout) or _listed(trained)]
    return list(dict.fromkeys(name for part in named for name in part))


def _listed(names: Any) -> list[str]:
    return [] if names is None else names if isinstance(names, list) else [names]


def _precision(config: Config) -> str:
    """What the run found for auto holds here too: a second measurement may come out otherwise."""
    assert config.run.dir is not None
    found = Path(config.run.dir) / "resolved.json"
    if config.trainer.precision == "auto" and found.is_file():
        return json.loads(found.read_text())["precision"]
    return config.trainer.precision


def _pairs(config: Config, name: str, tokenizer: Any) -> list[Example]:
    data = load(replace(config.data, train=name, heldout=None, heldout_fraction=0.0, repeat=None), tokenizer, Wanted())
    return data.train


def _with_final(base: Pretrained, final: Path) -> Any:
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
