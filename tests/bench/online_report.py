"""Figures of the online update to tables and to docs/benchmarks_online.md. Measures nothing."""

from __future__ import annotations

from statistics import median
from typing import Any

from tests.bench.online_data import ALGORITHMS, REGIMES
from tests.bench.online_sides import ALIGN, TRL
from tests.bench.report import speedup, table, time_table

# rollout -> what `align train` is told
ROLLOUTS = {"hf": ["rollout=hf"], "vllm": ["rollout=vllm", "rollout.threads=1"]}
PARTS = ("generate", "score", "reference", "update", "sync", "other")
# Over TRL best. Set after one trial of "long prompt" had been seen (5.6x), before the other regimes.
BARS = {"long prompt": 3.0, "rloo": 1.8, "smollm2 lora": 1.8, "engine": 1.8}
BAR = 1.4  # of the other regimes
OTHER = 0.05  # of a whole step


def target_table(figures: dict[str, Any]) -> str:
    """Bars and verdicts."""
    rows = []
    for name, regime in figures["regimes"].items():
        value, bound = speedup(regime, "trl best", "align")["median"], BARS.get(name, BAR)
        rows.append([f"update, {name}, over TRL best", f">= {bound:g}x", f"{value:.2f}x", _verdict(value >= bound)])
    for rollout, steps in figures["steps"].items():
        value = shares(steps["seconds"])["other"]
        rows.append([f"other, rollout={rollout}", f"<= {OTHER:.0%}", f"{value:.2%}", _verdict(value <= OTHER)])
    return table(["target", "bar", "measured", ""], rows)


def _verdict(met: bool) -> str:
    return "met" if met else "**not met**"


def shares(seconds: dict[str, list[float]]) -> dict[str, float]:
    """Median share of each part in its step."""
    return {part: median(a / b for a, b in zip(seconds[part], seconds["step"], strict=True)) for part in PARTS}


def steps_table(steps: dict[str, Any]) -> str:
    """Median seconds and share of each part, a column for each rollout."""
    rows = []
    for part in (*PARTS, "step"):
        cells = [part]
        for one in steps.values():
            share = 1.0 if part == "step" else shares(one["seconds"])[part]
            cells.append(f"{median(one['seconds'][part]):.3f} s ({share:.1%})")
        rows.append(cells)
    return table(["part", *(f"rollout={rollout}" for rollout in steps)], rows)


def summary_table(regimes: dict[str, Any]) -> str:
    """align's default against TRL's two settings, beside the ratio of the tokens that go through the model."""
    rows = []
    for name, regime in regimes.items():
        tokens = regime["tokens"]
        rows.append(
            [
                name,
                f"{tokens['padded']} / {tokens['real']} / {tokens['shared']}",
                f"{tokens['padded'] / tokens['shared']:.2f}",
                f"{speedup(regime, 'trl best', 'align')['median']:.2f}",
                f"{speedup(regime, 'trl default', 'align')['median']:.2f}",
            ]
        )
    head = ["regime", "tokens padded / real / shared", "padded / shared", "x TRL best", "x TRL default"]
    return table(head, rows)


def document(figures: dict[str, Any]) -> str:
    """docs/benchmarks_online.md."""
    variants = {name: variant.about for name, variant in (TRL | ALIGN).items()}
    parts = [
        _INTRODUCTION,
        _missing(figures),
        _TARGETS,
        target_table(figures),
        "\n## Summary\n",
        summary_table(figures["regimes"]),
        _SUMMARY,
        "## What is compared\n",
        table(["algorithm", "meaning"], [[name, algorithm.about] for name, algorithm in ALGORITHMS.items()]),
        "",
        table(["variant", "meaning"], [[k, v] for k, v in variants.items()]),
        _METHOD,
        "## Time of an update\n",
    ]
    for name, regime in figures["regimes"].items():
        t = regime["tokens"]
        parts += [
            f"### {name}\n\n{regime['about']}. {regime['rounds']} rounds. Tokens of a step: {t['real']} real, "
            f"{t['padded']} with padding, {t['shared']} with shared prompts, {t['completion']} of completions.\n",
            time_table(regime) + "\n",
        ]
    parts += [_STEPS, steps_table(figures["steps"]) + "\n"]
    for rollout, one in figures["steps"].items():
        command = f"`align train recipe=remax {' '.join(_shown(one['settings']))}`"
        parts.append(f"rollout={rollout}: {len(one['seconds']['step'])} steps of {command}. {one.get('note', '')}\n")
    parts += [
        _OTHER,
        "## Machine\n",
        table(["", ""], [[k, v] for k, v in (figures["machine"] | figures["versions"]).items()]),
    ]
    return "\n".join(parts) + "\n"


def _missing(figures: dict[str, Any]) -> str:
    """What the benchmark defines and the figures lack, in words."""
    names = [name for name in REGIMES if name not in figures["regimes"]]
    names += [f"whole steps with rollout={rollout}" for rollout in ROLLOUTS if rollout not in figures["steps"]]
    return f"**Not measured so far:** {', '.join(names)}.\n" if names else ""


def _shown(settings: list[str]) -> list[str]:
    return [s for s in settings if not s.startswith("run.dir")]


_INTRODUCTION = """\
# The online update side by side with TRL 1.16.0

Generated with its figures (`benchmarks_online.json`) by

    make bench        # python -m tests.bench.online_vs_trl, after installing requirements/bench.txt

Everything runs on one CPU thread in float32. Nothing here was measured on a GPU. Sampling is not part of the update:
both sides learn from the same scored completions.
"""

_TARGETS = """\
## Targets

Medians over the rounds. The bars were set when a first trial of "long prompt" had been seen (5.6x), before the other
regimes. After a trial of mixed lengths "trl best" was given batches of 4 samples in place of whole steps, which had
cost it more (there: 4.1x; a quarter of its time went into asking the system for memory).
"""

_SUMMARY = """
The ratio of tokens is what sharing prompts and leaving padding out can win where both sides make as many passes. TRL
makes one more in the regime engine and two more in those of RLOO, of which align makes the reference's.
"""

_METHOD = """
An update is everything that follows the scoring of a step's completions: batches, log-probs of the reference and of
the policy that drew where the framework computes them, advantages, policy, loss, backward, clipping of the gradient
at norm 1, fused AdamW (rate 0, so that every step is the same step), gradients set to none. TRL's part is the
trainer's own `_prepare_inputs`, with the one method that samples (`_generate`) returning the given completions, and
its `compute_loss`, in parts of as many samples as the variant says. align's part is what `align.trainers.online`
calls: `examples`, `token_values`, the estimator, `with_columns`, `train_step`, in micro-batches of 4096 tokens. Both
compute the entropy of the policy for their metrics.

**Old log-probs.** TRL leaves their forward out where its own generate drew and one step follows (regimes of grpo), as
align does. With vLLM its GRPO always makes it, to weight sequences by the ratio of policy to engine; align takes that
ratio from the one forward that it makes anyway. TRL's RLOO always makes it; align takes the ratio as 1 where one
optimiser step follows, and the engine's log-probs for the KL in the reward (`trainer.old_logps=auto`). "align old
pass" shows what the forward would cost.

**Equality.** Before timing, the gradient (1e-3 of its norm, before clipping) of every variant is compared with TRL's
default, and the loss (1e-4) where both frameworks write the same one; the command fails where they differ. "loss
apart" is an absolute difference of means of advantages, whose spread is 1. It is "nan" for RLOO: TRL's number is minus
the mean of ratio times advantage over sequences, 0 at ratio 1, align's the mean of advantage times log-prob; the
gradients are the same. `tests/bench/test_online_bench.py` compares more on a small model: loss types, a KL in the
loss, ratios away from 1 that are clipped, an engine's sequence beyond the limit, LoRA.

**One difference of the defaults.** Where TRL's GRPO has a KL in the loss (beta > 0, here 0), it multiplies the k3
estimate by the ratio, gradient included (`use_bias_correction_kl=True`). At ratio 1 that is the gradient of
`objective.kl_estimator=k2`, not of k3, which is align's default. Off ratio 1 align has no such setting.

Variants take turns in one process; the seconds are those the process spent on the CPU, because wall time on a shared
machine says who else is busy. Brackets hold the least and the largest round, ratios are formed within a round.

**TRL best is not a setting TRL offers on a CPU.** Its fused head scores only completion positions on a GPU, but every
position, prompt and padding included, on a CPU. The bench patches the one function that decides
(`trl.trainer.utils._use_triton`). Against TRL as it installs, read the column "x TRL default". TRL's default data type,
bfloat16, is switched off as well.

The figures are of one run on a machine that other work kept busy (load 2 to 12 on two cores).

"proxy" is the random Llama of [the DPO benchmark](benchmarks.md): 8 layers x 384, vocabulary 10240.
"""

_STEPS = """\
## Where the time of a whole step goes

SmolLM2-135M with LoRA of rank 16, ReMax: 8 prompts, 2 sampled completions and a greedy one each, at most 48 tokens.
Seconds by the clock, from metrics.jsonl (`time/*_s`), medians over the steps after the first.
"""

_OTHER = """\
generate: the rollout draws. score: texts and rewards. reference: the reference's log-probs, advantages, and the file of
samples. update: batches, forward, backward, optimiser. sync: the new weights to the rollout, and the proof on four
prompts that it has them, a forward on each side; with rollout=hf there is nothing to sync and the proof is all of it.
other: what is left of the step. Not in the step: checkpoints (trainer.save_every), evaluations (time/eval_s), the row
of metrics itself.
"""
