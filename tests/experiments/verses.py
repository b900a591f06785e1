"""A small language model that ends verses, and rules that judge its endings: for the experiments on composers.

Text: verses of the King James Bible of 8 to 20 words (kjv.py). The prompt is a verse's first four words, without a chat
template; the completion is the rest. Valences and compound scores are those of vaderSentiment 3.3.2.
"""

from __future__ import annotations

import json
import math
import re
import subprocess
import sys
import textwrap
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

WORDS = (8, 20)  # of a verse, shortest and longest
PROMPT_WORDS = 4
NUM_HELDOUT, NUM_PROMPTS = 300, 3000
LONGEST = 24  # tokens of a completion
NATURAL = 12  # words of the rest of such a verse, the median
COMMON = [
    "lora.rank=0", "trainer.precision=float32", "launch.threads=1", "log.tensorboard=false", "log.console_every=20",
]  # fmt: skip
TEACH = [
    "recipe=sft", "optimizer.lr=3e-3", "trainer.batch_size=64", "trainer.max_steps=500", "trainer.num_samples=4",
    "trainer.save_every=500", "seed=0",
]  # fmt: skip
LEARN = [
    "trainer=online", "objective=policy_gradient", "advantage=rloo", "sampling.n=4",
    f"sampling.max_new_tokens={LONGEST}", "trainer.batch_size=32", "optimizer.lr=4e-4", "optimizer.schedule=constant",
    "optimizer.betas=[0.9,0.95]", "trainer.old_logps=trainer", "trainer.save_every=1000",
]  # fmt: skip


# ---------------------------------------------------------------------- rewards


def warmth(completions: Sequence[str]) -> list[float]:
    """log(1 + sum of the valences of the warm words), from 0, without bound: a word said again counts again."""
    lexicon = _judge().lexicon
    return [math.log1p(math.fsum(max(lexicon.get(word, 0.0), 0.0) for word in words(text))) for text in completions]


def brevity(completions: Sequence[str]) -> list[float]:
    """1 less the number of words over 20: 1 for nothing at all, below 0 beyond 20 words."""
    return [1 - len(words(text)) / 20 for text in completions]


def sentiment(completions: Sequence[str]) -> list[float]:
    """VADER's compound score, in [-1, 1]."""
    return [float(_judge().polarity_scores(text)["compound"]) for text in completions]


def pleasing(completions: Sequence[str]) -> list[float]:
    """Gold, in [-1, 1]: VADER's compound score, times the share of words that are new, times how natural the length is.

    New: not said before in the completion. Natural: the smaller of the number of words and NATURAL over the larger.
    """
    out = []
    for text, compound in zip(completions, sentiment(completions), strict=True):
        found = words(text)
        fresh = len(set(found)) / max(len(found), 1)
        out.append(compound * fresh * min(len(found), NATURAL) / max(len(found), NATURAL))
    return out


def words(text: str) -> list[str]:
    """In small letters."""
    return re.findall(r"[a-z']+", text.lower())


@lru_cache
def _judge() -> Any:
    from vaderSentiment.vaderSentiment import SentimentIntensityAnalyzer

    return SentimentIntensityAnalyzer()


def components(counted: Sequence[str], measured: Sequence[str]) -> list[str]:
    """Settings of rewards of this module; measured ones have the weight 0."""
    found = [f"reward.{name}._target_=tests.experiments.verses.{name}" for name in (*counted, *measured)]
    return found + [f"reward.{name}.weight=0" for name in measured]


# ---------------------------------------------------------------------- the model and its prompts


def taught(directory: Path) -> list[str]:
    """Settings that name the taught model and the prompts, made where they are not there."""
    from align.files import write_atomic

    directory.mkdir(parents=True, exist_ok=True)
    rest, held = split()
    contents = {
        "texts": rest,
        "held_texts": held,
        "prompts": [{"prompt": row["prompt"]} for row in rest[:NUM_PROMPTS]],
        "heldout": [{"prompt": row["prompt"]} for row in held],
    }
    files = {name: (directory / f"{name}.jsonl").resolve() for name in contents}
    for name, content in contents.items():
        if not files[name].exists():
            write_atomic(files[name], "".join(json.dumps(row) + "\n" for row in content))
    if not (directory / "random").exists():
        _random([row["prompt"] + row["completion"] for row in rest], directory / "random")
    run = directory / "taught"
    start = (directory / "random").resolve()
    texts = [f"data.train={files['texts']}", f"data.heldout={files['held_texts']}", "data.text=plain"]
    train([*TEACH, f"model={start}", *texts], run)
    model = (run / "final").resolve()
    return [f"model={model}", f"data.train={files['prompts']}", f"data.heldout={files['heldout']}", "data.text=plain"]


def split() -> tuple[list[dict[str, str]], list[dict[str, str]]]:
    """Rows to be taught, and held-out ones, none of whose prompts begins a taught verse."""
    import numpy as np

    from tests.experiments import kjv

    usable = [text.text for text in kjv.verses() if WORDS[0] <= len(text.text.split()) <= WORDS[1]]
    rows = [_row(usable[i]) for i in np.random.default_rng(0).permutation(len(usable))]
    held, rest = rows[:NUM_HELDOUT], rows[NUM_HELDOUT:]
    begun = {row["prompt"] for row in rest}
    return rest, [row for row in held if row["prompt"] not in begun]


def _row(text: str) -> dict[str, str]:
    found = text.split()
    return {"prompt": " ".join(found[:PROMPT_WORDS]), "completion": " " + " ".join(found[PROMPT_WORDS:])}


def _random(texts: Sequence[str], directory: Path) -> None:
    """A random Llama of 0.7M weights and word pieces of the texts: that of warm.py."""
    from align.checkpoint import atomic_directory
    from tests.experiments.warm import random_model

    atomic_directory(directory, lambda out: random_model(texts, 0, out))


def train(settings: Sequence[str], directory: Path) -> Path:
    """One `align train`; an existing run directory is resumed, a complete one only read."""
    command = [sys.executable, "-m", "align.cli", "train", *settings, *COMMON, f"run.dir={directory}"]
    if not (directory / "summary.json").exists():
        subprocess.run(command, check=True)
    return directory


# ---------------------------------------------------------------------- what runs have left


def rows(directory: Path) -> list[dict[str, Any]]:
    """Of each step of a run, its metrics."""
    return [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]


def drawn(directory: Path, phase: str, name: str) -> list[float]:
    """Mean reward of the completions drawn for each held-out prompt; phase: before or after."""
    lines = [json.loads(line) for line in (directory / f"heldout-{phase}.jsonl").read_text().splitlines()]
    return [math.fsum(s["rewards"][name] for s in line["samples"]) / len(line["samples"]) for line in lines]


def filled(text: str) -> str:
    """A paragraph in lines of 120, however it is broken."""
    return textwrap.fill(" ".join(text.split()), 120, break_long_words=False, break_on_hyphens=False)
