"""What a finished run leaves: final/ in Hugging Face format with a model card, and the closing table."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import TYPE_CHECKING, Any

from omegaconf import OmegaConf
from rich.table import Table

from align.checkpoint import atomic_directory
from align.config import Config
from align.jsons import Json, Tokenizer
from align.models.policy import Network, Scorer, is_peft, own_attention

if TYPE_CHECKING:
    from align.evaluate.samples import Sample


def write_final(
    target: Path,
    policy: Network,
    tokenizer: Tokenizer,
    generation_config: object,
    config: Config,
    base: str,
    command: str,
    summary: Json,
    form: Json | None = None,
) -> None:
    """Save weights (PEFT adapter, or plain with merge=true or without LoRA), tokenizer and card to `target`.

    form: of a reward model, what network.write wants to know of it.
    """
    from transformers.utils import logging

    logging.disable_progress_bar()  # a run tells its own progress

    def write(directory: Path) -> None:
        with own_attention(policy.causal_lm):  # the packed attention exists only inside align
            if isinstance(policy, Scorer):
                assert form is not None
                from align.rewards import network

                network.write(policy, form, tokenizer, config.merge, directory)
            else:
                _write_policy(policy, generation_config, config.merge, directory)
        tokenizer.save_pretrained(directory)
        (directory / "README.md").write_text(model_card(config, base, command, summary))

    atomic_directory(target, write)


def _write_policy(policy: Network, generation_config: Any, merge: bool, directory: Path) -> None:
    model: Any = policy.model
    if is_peft(model) and merge:
        # merging changes the weights in place; the run's own stay as they are
        model = copy.deepcopy(model).merge_and_unload()
    if generation_config is not None:
        generation_config.save_pretrained(directory)
    if is_peft(model):  # and not what a reward has put beside it
        model.save_pretrained(str(directory), selected_adapters=["default"])
    else:
        model.save_pretrained(str(directory))


def model_card(config: Config, base: str, command: str, summary: Json) -> str:
    """What the model is, from which words it was made, and what was measured."""
    recipe = config.choices.get("recipe", "none")
    kind = "LoRA adapter" if config.lora.rank and not config.merge else "full weights"
    measured = "\n".join(f"| {name} | {before} | {after} |" for name, before, after in rows(summary))
    return f"""\
---
base_model: {base}
library_name: {"peft" if config.lora.rank and not config.merge else "transformers"}
tags: [align, {config.choices["objective"]}]
---
# {base}, aligned with {config.choices["objective"]}

{kind} after {summary["step"]} optimiser steps. Made by

    {command}

with recipe {recipe} and seed {config.seed}; all settings stand below.

| held-out | before | after |
|---|---|---|
{measured}

```yaml
{OmegaConf.to_yaml(config.tree, resolve=False)}```
"""


def rows(summary: Json) -> list[tuple[str, str, str]]:
    """What was measured on held-out data: name, before training, after it."""
    metrics = summary["metrics"]
    out = []
    if "accuracy/heldout" in metrics:
        out.append(
            (f"preference accuracy ({summary['heldout']})", "0.5 (chance)", f"{metrics['accuracy/heldout']:.3f}")
        )
    if "heldout/reward_margin" in metrics:
        unit = " (nats x beta)" if summary["kl"] is not None else ""
        out.append((f"reward margin{unit}", "0", f"{metrics['heldout/reward_margin']:+.3f}"))
    if summary["kl"] is not None:
        out.append(("KL to the reference (nats per sampled answer)", "0", f"{summary['kl']:.2f}"))
    if "before" in summary:
        loss = (f"{where['loss/heldout']:.4f}" for where in (summary["before"], metrics))
        out.insert(0, (f"loss ({summary['heldout']})", *loss))
    if "problems" in summary:
        solved = summary["problems"]
        change = solved["change"]
        out.append((f"{solved['count']} held-out problems solved", f"{solved['before']:.1%}", f"{solved['after']:.1%}"))
        interval = f"{change['mean']:+.1%} [{change['low']:+.1%}, {change['high']:+.1%}]"
        out.append(("  change, 95 % paired bootstrap", "", interval))
    for name, found in summary.get("rewards", {}).items():
        change = found["change"]
        out.append(
            (f"{name}: reward of {found['count']} greedy answers", f"{found['before']:+.3f}", f"{found['after']:+.3f}")
        )
        interval = f"{change['mean']:+.3f} [{change['low']:+.3f}, {change['high']:+.3f}]"
        out.append(("  change, 95 % paired bootstrap", "", interval))
    if "best" in summary:
        best = summary["best"]
        out.append((f"best {best['metric']}, after step {best['step']}", "", f"{best['value']:.4g}"))
    if "nothing_learnt" in summary:
        idle = summary["nothing_learnt"]
        out.append((f"steps that taught nothing: {idle['why']}", "", f"{idle['steps']} of {idle['of']}"))
    samples = summary.get("samples")
    if samples:
        before, after = samples["before"], samples["after"]
        out.append(("answer length (tokens, greedy)", f"{before['tokens']:.1f}", f"{after['tokens']:.1f}"))
        shares = [f"{p['finished_fraction']:.0%}" for p in (before, after)]
        out.append(("answers that finish", *shares))  # type: ignore[arg-type]
        if "gold_change" in summary:
            change = summary["gold_change"]
            out.append(
                (f"gold score of {after['count']} greedy answers", f"{before['gold']:+.3f}", f"{after['gold']:+.3f}")
            )
            interval = f"{change['mean']:+.3f} [{change['low']:+.3f}, {change['high']:+.3f}]"
            out.append(("  change, 95 % paired bootstrap", "", interval))
    return out


def summarise(last: Json, samples: list[Sample], kl: float | None) -> Json:
    """What was measured, for summary.json: the last line of metrics.jsonl, the answers, the KL."""
    keep = ("loss/", "accuracy/", "heldout/")
    out: Json = {"metrics": {k: v for k, v in last.items() if k.startswith(keep) and v is not None}, "kl": kl}
    phases = {phase: [s for s in samples if s.phase == phase] for phase in ("before", "after")}
    if not all(phases.values()):
        return out
    gold = {phase: [s.gold for s in part if s.gold is not None] for phase, part in phases.items()}
    out["samples"] = {
        phase: {
            "count": len(part),
            "tokens": sum(s.tokens for s in part) / len(part),
            "finished_fraction": sum(s.finished for s in part) / len(part),
            "gold": sum(gold[phase]) / len(part) if gold[phase] else None,
        }
        for phase, part in phases.items()
    }
    if gold["before"]:
        from align.evaluate.samples import paired_bootstrap

        change = paired_bootstrap(gold["before"], gold["after"])
        out["gold_change"] = {"mean": change.mean, "low": change.low, "high": change.high}
    return out


def final_table(summary: Json) -> Table:
    """The closing table of a run."""
    table = Table(title=f"held-out, after {summary['step']} steps in {summary['seconds']:.0f} s")
    for name in ("", "before", "after"):
        table.add_column(name, justify="left" if not name else "right")
    for row in rows(summary):
        table.add_row(*row)
    return table
