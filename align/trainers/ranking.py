"""`align evaluate`: how a finished run ranks pairs, its own held-out ones or others."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

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
    """Ranking and reward accuracy of the run's final model on data.train (each source a set of its own), which stands
    for data.heldout if it was not changed; lines for the terminal, and a JSON file. Raises ValueError."""
    assert config.run.dir is not None
    final = Path(config.run.dir) / "final"
    if not (final / "README.md").is_file():
        raise ValueError(f"run.dir={config.run.dir}: holds no final model; let the run finish first")
    base = build.pretrained(config)
    tokenizer = base.tokenizer()
    sets = {name: _pairs(config, name, tokenizer) for name in _sets(config)}
    device = pick_device()
    precision, _ = pick_precision(config.trainer.precision, device)
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
    """Held-out sources if the run has them, else those it was trained on."""
    named = config.data.heldout if config.data.heldout is not None else config.data.train
    return named if isinstance(named, list) else [named]


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
