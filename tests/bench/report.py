"""Figures to tables and to docs/benchmarks.md. Measures nothing."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from tests.bench.measure import summary
from tests.bench.sides import ALIGN_ABOUT, TRL_VARIANTS


@dataclass(frozen=True)
class Target:
    """A bar set before measuring, and whether it was reached."""

    what: str
    value: float
    bound: float
    at_least: bool

    @property
    def met(self) -> bool:
        """Whether the value is on the right side of the bound."""
        return self.value >= self.bound if self.at_least else self.value <= self.bound

    @property
    def cells(self) -> list[str]:
        """As a row of a table."""
        sign = ">=" if self.at_least else "<="
        verdict = "met" if self.met else "**not met**"
        return [self.what, f"{sign} {self.bound:g}x", f"{self.value:.2f}x", verdict]


def targets(figures: dict[str, Any]) -> list[Target]:
    """The bars that the measured regimes allow to judge."""
    found = []
    for name, regime in figures["regimes"].items():
        if name == "mixed":
            value = speedup(regime, "trl default", "align")["median"]
            found.append(Target("step, mixed, over TRL default", value, 4.2, True))
            value = speedup(regime, "trl best", "align")["median"]
            found.append(Target("step, mixed, over TRL best", value, 1.9, True))
        elif name != "quick":
            value = speedup(regime, "trl best", "align")["median"]
            found.append(Target(f"step, {name}, over TRL best", value, 1.4, True))
    for name, memory in figures["memory"].items():
        value = memory["align"]["dynamic_mib"] / memory["trl default"]["dynamic_mib"]
        found.append(Target(f"dynamic memory, {name}, of TRL default", value, 0.5, False))
    return found


def speedup(regime: dict[str, Any], slow: str, fast: str) -> dict[str, float]:
    """How many times faster, by CPU seconds of the same round."""
    cpu = regime["cpu_s"]
    return summary(a / b for a, b in zip(cpu[slow], cpu[fast], strict=True))


def target_table(figures: dict[str, Any]) -> str:
    """Bars and verdicts."""
    return table(["target", "bar", "measured", ""], [t.cells for t in targets(figures)])


def time_table(regime: dict[str, Any]) -> str:
    """Seconds of a step of each variant and ratios, medians with the range of the rounds."""
    real = regime["tokens"]["real"]
    rows = []
    for variant, seconds in regime["cpu_s"].items():
        cpu = summary(seconds)
        rows.append(
            [
                variant,
                f"{cpu['median']:.3g} [{cpu['min']:.3g}-{cpu['max']:.3g}]",
                f"{summary(regime['wall_s'][variant])['median']:.3g}",
                f"{real / cpu['median']:.0f}",
                _ratio(speedup(regime, "trl default", variant)),
                _ratio(speedup(regime, "trl best", variant)),
                f"{regime['equality'][variant]['loss_apart']:.0e}",
                f"{regime['equality'][variant]['gradient_apart']:.0e}",
            ]
        )
    head = ["variant", "CPU s/step", "wall s", "real tok/CPU s", "x TRL default", "x TRL best"]
    return table([*head, "loss apart", "gradient apart"], rows)


def epoch_table(epoch: dict[str, Any]) -> str:
    """CPU seconds of the first epoch, the pass that fills the cache included."""
    total = {v: epoch["pass_cpu_s"][v] + sum(s) for v, s in epoch["steps_cpu_s"].items()}
    rows = [
        [
            variant,
            f"{epoch['pass_cpu_s'][variant]:.2f}",
            f"{summary(epoch['steps_cpu_s'][variant])['median']:.2f}",
            f"{seconds:.1f}",
            f"{total['trl default'] / seconds:.2f}",
            f"{total['trl best'] / seconds:.2f}",
        ]
        for variant, seconds in total.items()
    ]
    head = [
        "variant",
        "cache pass, CPU s",
        "median step",
        "whole epoch",
        "x TRL default",
        "x TRL best",
    ]
    return table(head, rows)


def memory_table(memory: dict[str, dict[str, float]]) -> str:
    """Resident memory before the first step, at the peak, and the difference."""
    default = memory["trl default"]
    rows = [
        [
            variant,
            f"{m['base_mib']:.0f}",
            f"{m['peak_mib']:.0f}",
            f"{m['dynamic_mib']:.0f}",
            f"{m['dynamic_mib'] / default['dynamic_mib']:.2f}",
            f"{m['peak_mib'] / default['peak_mib']:.2f}",
        ]
        for variant, m in memory.items()
    ]
    head = ["variant", "base MiB", "peak MiB", "dynamic MiB", "dynamic / TRL default"]
    return table([*head, "peak / TRL default"], rows)


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Markdown, aligned for reading in a terminal as well."""
    lines = [list(head), *(list(row) for row in rows)]
    widths = [max(3, *(len(line[k]) for line in lines)) for k in range(len(head))]
    text = [" | ".join(cell.ljust(w) for cell, w in zip(line, widths, strict=True)) for line in lines]
    text.insert(1, " | ".join("-" * w for w in widths))
    return "\n".join(f"| {line} |" for line in text)


def _ratio(values: dict[str, float]) -> str:
    return f"{values['median']:.2f} [{values['min']:.2f}-{values['max']:.2f}]"


def document(figures: dict[str, Any]) -> str:
    """docs/benchmarks.md."""
    variants = TRL_VARIANTS | ALIGN_ABOUT
    parts = [
        _INTRODUCTION,
        "## Targets\n\nSet before measuring. Ratios are medians over the rounds.\n",
        target_table(figures),
        "\n## What is compared\n",
        table(["variant", "meaning"], [[k, v] for k, v in variants.items()]),
        _METHOD,
        "## Time of a step\n",
    ]
    for name, regime in figures["regimes"].items():
        t = regime["tokens"]
        parts += [
            f"### {name}\n\n{regime['about']}; {regime['pairs']} pair(s) a step, "
            f"{regime['rounds']} rounds. Tokens of a step: {t['real']} real, {t['padded']} with "
            f"padding, {t['shared']} with shared prompts, {t['completion']} of completions.\n",
            time_table(regime) + "\n",
        ]
        if "note" in regime:  # by hand, for figures kept from before a change; measuring again drops it
            parts.append(regime["note"] + "\n")
    parts.append(_EPOCH)
    for name, epoch in figures["epoch"].items():
        parts += [
            f"{name}, {epoch['steps']} steps of {epoch['pairs']} pairs:\n",
            epoch_table(epoch) + "\n",
        ]
    parts.append(_MEMORY)
    for name, memory in figures["memory"].items():
        parts += [f"### Memory, {name}\n", memory_table(memory) + "\n"]
    parts += [
        "## Machine\n",
        table(["", ""], [[k, v] for k, v in (figures["machine"] | figures["versions"]).items()]),
    ]
    return "\n".join(parts) + "\n"


_INTRODUCTION = """\
# DPO side by side with TRL 1.16.0

Generated with its figures (`benchmarks.json`) by

    make bench        # python -m tests.bench.dpo_vs_trl, after installing requirements/bench.txt

Everything runs on one CPU thread in float32. Nothing here was measured on a GPU. Online training has
[a document of its own](benchmarks_online.md).
"""

_METHOD = """
A step is everything between two weights: batch from token ids, reference, policy, loss, backward,
fused AdamW (learning rate 0, so that every step is the same step), gradients set to none. Both
sides have equal weights, equal pairs of random tokens, no gradient clipping, and log-ratios that
are not zero. TRL's part is `DPOTrainer.compute_loss` on its own collator's batch; align's is
`pack`, `Policy` and the `DPO` objective. Before timing, loss (1e-4 relative) and whole gradient
(1e-3 of its norm) of every variant are compared with TRL's default; the command fails where they
differ. The columns "apart" hold what was found: float32 noise.

Variants of both sides take turns in one process; the seconds are those the process spent on the
CPU, because wall time on a shared machine says who else is busy. Brackets hold the least and the
largest round, ratios are formed within a round.

**TRL best is not a setting TRL offers on a CPU.** Its fused head scores only completion positions
on a GPU, but every position, prompt and padding included, on a CPU. The bench patches the one
function that decides (`trl.trainer.utils._use_triton`), so that the comparison says something about
the algorithm rather than about that difference. Against TRL as it installs, read the column "x TRL
default". TRL's default data type, bfloat16, is switched off as well.

"proxy" is a random Llama of 8 layers x 384 with a vocabulary of 10240: its head has the
share of the arithmetic that it has in Llama-3.2-1B and SmolLM2-135M.
"""

_EPOCH = """\
## An epoch, the cache pass included

The cached variants need the reference once per pair. align packs these forwards; TRL pads
them in the order of the data, in batches of the training batch's size. align's
seconds include the hashing of pairs and the cache's files, TRL's only its forwards. Each batch of
this epoch is another one, its losses are compared as well.
"""

_MEMORY = """\
## Memory

Resident memory of a fresh process that runs one variant. Base: interpreter, libraries, policy,
reference where the variant keeps one, AdamW's states, after freed memory was given back; read right
before the first step. Peak: the highest value during two steps (Linux `VmHWM`, started anew at the
base). Dynamic: peak minus base, hence activations, gradients, and what the allocator keeps.
Gradients are the same on both sides, 4 bytes for each parameter: 63 MiB for the proxy, 513 MiB for
SmolLM2, whose step of one pair is small beside them.
"""
