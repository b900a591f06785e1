"""Step time and memory of engine=zero0 to zero3 on two processes against engine=local, the same work.

    python -m tests.bench.zero_stages              everything; writes docs/benchmarks_scale.md and .json
    python -m tests.bench.zero_stages --memory     one more run each for memory alone, beside the figures that are there
    python -m tests.bench.zero_stages --quick      does it run at all; writes nothing
    python -m tests.bench.zero_stages --render     the document again from the figures beside it

Everything goes through `align train`; seconds and memory of its processes are read from the system while they run.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import random
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

import psutil

from tests.bench import measure
from tests.bench.report import table

ROOT = Path(__file__).resolve().parents[2]
DOCUMENT = ROOT / "docs" / "benchmarks_scale.md"
FIGURES = ROOT / "docs" / "benchmarks_scale.json"

# what `align train` is told, in the order in which they take turns
ENGINES = {
    "local": ["engine=local"],
    **{f"zero{stage}": [f"engine=zero{stage}", "launch.processes=2"] for stage in range(4)},
}
_ZERO = "engine.deepspeed.zero_optimization"
# for memory also with pieces that are small beside this model, as DeepSpeed's 5e8 and 1e9 numbers beside a large one
SMALL = [f"{_ZERO}.reduce_bucket_size=1000000", f"{_ZERO}.stage3_prefetch_bucket_size=1000000"]
SMALL += [f"{_ZERO}.stage3_max_live_parameters=2000000", f"{_ZERO}.stage3_max_reuse_distance=2000000"]
MEMORY_RUNS = {engine: (engine, words) for engine, words in ENGINES.items()}
MEMORY_RUNS["zero3, small pieces"] = ("zero3", ENGINES["zero3"] + SMALL)
# the C library's allocator gives blocks of more than 256 KiB back at once
GIVEN_BACK = {"MALLOC_MMAP_THRESHOLD_": "262144", "MALLOC_TRIM_THRESHOLD_": "262144"}
STEPS = 6  # of a run; the first fills memory and is not timed
BASE_STEPS = 20  # of the model without size: many enough to be seen
ROUNDS = 3
PAIRS = 8  # of a step, over all processes
MICRO_BATCH_TOKENS = 192
LIMIT_S = 400.0  # of a run
TOLERANCE = 1e-4  # relative, of losses and gradient norms between engines: these runs are to do the same work
SHAPE = dict(
    hidden_size=512, intermediate_size=1408, num_hidden_layers=8, num_attention_heads=8, num_key_value_heads=4,
    head_dim=64, max_position_embeddings=1024, tie_word_embeddings=True,
)  # fmt: skip


@dataclass
class Worker:
    """What the system told of one process of a run."""

    rank: int
    cpu_s: dict[int, float] = field(default_factory=dict)  # after so many steps
    part: str = "start"  # of the run: start until the first step is done, steps until the last is, then end
    peak_mib: dict[str, float] = field(default_factory=dict)  # highest resident memory in each part


def write_model(directory: Path) -> int:
    """A random Llama of SHAPE with a byte tokenizer in Hugging Face format; the number of its weights."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    from align.models.pretrained import byte_tokenizer

    tokenizer = byte_tokenizer()
    torch.manual_seed(0)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer),
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
            **SHAPE,
        )
    )
    model.save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    return sum(p.numel() for p in model.parameters())


def write_pairs(file: Path, num_pairs: int) -> None:
    """Pairs of random letters, prompts of 20 to 40 and completions of 20 to 60, the same at each call."""
    rng = random.Random(0)

    def text(low: int, high: int) -> str:
        return "".join(rng.choices("abcdefghijklmnopqrstuvwxyz ", k=rng.randint(low, high)))

    rows = [{"prompt": text(20, 40), "chosen": text(20, 60), "rejected": text(20, 60)} for _ in range(num_pairs)]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))


def command(engine: Sequence[str], model: Sequence[str], pairs: Path, run: Path, steps: int) -> list[str]:
    """`align train` with the settings of one engine."""
    settings = [
        "recipe=dpo",
        "lora.rank=0",
        *model,
        f"data.train={pairs}",
        "data.heldout_fraction=0",
        "data.text=plain",
        f"trainer.max_steps={steps}",
        f"trainer.batch_size={PAIRS}",
        f"trainer.micro_batch_tokens={MICRO_BATCH_TOKENS}",
        f"trainer.save_every={steps}",
        "trainer.num_samples=0",
        "trainer.precision=float32",
        "trainer.activation_checkpointing=off",
        "optimizer.lr=1e-5",
        "log.tensorboard=false",
        f"reference.cache_dir={run}/reference",
        f"run.dir={run}",
        *engine,
    ]
    return [sys.executable, "-m", "align.cli", "train", *settings]


class Watch:
    """Reads CPU seconds and peak memory of the processes of a run: of the command itself, or of those that carry a
    RANK."""

    def __init__(self, pid: int, num_processes: int):
        self.root = psutil.Process(pid)
        self.num_processes = num_processes
        self.workers: dict[int, Worker] = {}  # by process id

    def look(self, done: int, steps: int) -> None:
        """Note what the processes have used until now, `done` of `steps` steps done."""
        part = "start" if done < 1 else "steps" if done < steps else "end"
        for process in self._processes():
            try:
                rank = 0 if self.num_processes == 1 else int(process.environ().get("RANK", -1))
                cpu, peak = process.cpu_times(), _peak_mib(process.pid)
                if rank < 0 or peak is None:
                    continue
                worker = self.workers.setdefault(process.pid, Worker(rank, part=part))
                worker.cpu_s.setdefault(done, cpu.user + cpu.system)
                worker.peak_mib[worker.part] = max(peak, worker.peak_mib.get(worker.part, 0.0))
                if part != worker.part:
                    worker.part = part
                    Path(f"/proc/{process.pid}/clear_refs").write_text("5")  # the peak starts anew: proc(5)
            except (psutil.Error, OSError):  # it has just ended
                continue

    def ranks(self) -> list[Worker]:
        """One worker for each rank: the process that needed most; its helpers are not counted."""
        out = []
        for rank in range(self.num_processes):
            found = [w for w in self.workers.values() if w.rank == rank]
            if not found:
                raise RuntimeError(f"no process of the run had RANK={rank}")
            out.append(max(found, key=lambda w: max(w.peak_mib.values())))
        return out

    def _processes(self) -> list[psutil.Process]:
        if self.num_processes == 1:
            return [self.root]
        try:
            return self.root.children(recursive=True)
        except psutil.Error:
            return []


def _peak_mib(pid: int) -> float | None:
    """Largest resident memory that a process has had (Linux: proc(5), status); None of one that has ended."""
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) / 1024
    return None


def run(
    engine: Sequence[str],
    model: Sequence[str],
    pairs: Path,
    directory: Path,
    steps: int,
    environment: dict[str, str] | None = None,
) -> dict[str, Any]:
    """One run: seconds of a step and peak memory of each process, losses and gradient norms of its steps.

    RuntimeError when it fails or takes longer than LIMIT_S.
    """
    words = command(engine, model, pairs, directory, steps)
    metrics = directory / "metrics.jsonl"
    with tempfile.TemporaryFile() as told:
        process = subprocess.Popen(
            words,
            cwd=ROOT,
            env=os.environ | measure.ENVIRONMENT | {"PYTHONPATH": str(ROOT)} | (environment or {}),
            stdout=told,
            stderr=subprocess.STDOUT,
        )
        watch = Watch(process.pid, 1 if engine == ENGINES["local"] else 2)
        end, late = time.monotonic() + LIMIT_S, False
        while process.poll() is None:
            watch.look(metrics.read_bytes().count(b"\n") if metrics.exists() else 0, steps)
            if time.monotonic() > end:
                late = True
                _end(process)
            time.sleep(0.05)
        told.seek(0)
        said = told.read().decode(errors="replace")
    if late or process.returncode:
        why = f"took longer than {LIMIT_S:.0f} s" if late else "failed"
        raise RuntimeError(f"{' '.join(words[3:])} {why}:\n{said[-3000:]}")
    rows = [json.loads(line) for line in metrics.read_text().splitlines()]
    shutil.rmtree(directory)  # checkpoints
    workers = watch.ranks()
    return {
        "cpu_s": [_cpu_of_step(w, steps) for w in workers],
        "wall_s": median(row["time/step_s"] for row in rows[1:]),
        "peak_mib": [w.peak_mib for w in workers],
        "loss": [row["loss/total"] for row in rows],
        "gradient_norm": [row["optimizer/gradient_norm"] for row in rows],
        "tokens": rows[-1]["tokens/real"],
    }


def _cpu_of_step(worker: Worker, steps: int) -> float:
    """CPU seconds of a step after the first; nan where steps went by unseen."""
    seen = [step for step in worker.cpu_s if 1 <= step <= steps]
    if len(seen) < 2:
        return math.nan
    return (worker.cpu_s[max(seen)] - worker.cpu_s[min(seen)]) / (max(seen) - min(seen))


def _end(process: subprocess.Popen[bytes]) -> None:
    """End a run and the processes that it started."""
    started = psutil.Process(process.pid).children(recursive=True)
    process.terminate()
    _, alive = psutil.wait_procs([psutil.Process(process.pid), *started], timeout=20)
    for one in alive:
        one.kill()


def check(runs: dict[str, dict[str, Any]]) -> None:
    """Raises ValueError where an engine's losses or gradient norms are not those of engine=local."""
    for engine, one in runs.items():
        for name in ("loss", "gradient_norm"):
            for step, (value, wanted) in enumerate(zip(one[name], runs["local"][name], strict=True), 1):
                if not math.isclose(value, wanted, rel_tol=TOLERANCE):
                    raise ValueError(f"engine={engine}: {name} of step {step} is {value:.7g}, local's {wanted:.7g}")


def measured(rounds: int, steps: int, keep: Callable[[dict[str, Any]], None]) -> dict[str, Any]:
    """All runs, the engines taking turns; and one short run each of a model without size, for the memory of the
    libraries alone. keep: called with the figures after each round."""
    figures: dict[str, Any] = {"machine": measure.machine(), "versions": versions(), "steps": steps, "load": []}
    with tempfile.TemporaryDirectory() as name:
        scratch = Path(name)
        figures["weights"] = write_model(scratch / "model")
        write_pairs(scratch / "pairs.jsonl", PAIRS * max(steps, BASE_STEPS))
        small, large = ["model=tiny"], ["model=hub", f"model.path={scratch}/model"]
        figures["base_mib"] = {}
        for engine, words in ENGINES.items():
            base = run(words, small, scratch / "pairs.jsonl", scratch / f"base-{engine}", BASE_STEPS)
            figures["base_mib"][engine] = max(parts["steps"] for parts in base["peak_mib"])
        shown = command(["ENGINE"], large, scratch / "pairs.jsonl", scratch / "run", steps)
        figures["command"] = [_public(word, name) for word in shown]
        figures["runs"] = {engine: [] for engine in ENGINES}
        for number in range(rounds):
            now = {}
            for engine, words in ENGINES.items():
                now[engine] = run(words, large, scratch / "pairs.jsonl", scratch / f"{engine}-{number}", steps)
                figures["runs"][engine].append(now[engine])
                print(f"round {number + 1}, {engine}: {_short(now[engine])}", flush=True)
            check(now)
            figures["rounds"] = number + 1
            figures["load"].append(os.getloadavg()[0])
            keep(figures)
    return figures


def memory(steps: int) -> dict[str, dict[str, Any]]:
    """One run each with an allocator that keeps nothing: its larger process's peaks, by part of the run."""
    out = {}
    with tempfile.TemporaryDirectory() as name:
        scratch = Path(name)
        write_model(scratch / "model")
        write_pairs(scratch / "pairs.jsonl", PAIRS * steps)
        for label, (_, words) in MEMORY_RUNS.items():
            model = ["model=hub", f"model.path={scratch}/model"]
            one = run(words, model, scratch / "pairs.jsonl", scratch / "run", steps, GIVEN_BACK)
            out[label] = {part: _peak(one, part) for part in ("start", "steps", "end")} | {"cpu_s": sum(one["cpu_s"])}
            print(f"{label}: {out[label]}", flush=True)
    return out


def versions() -> dict[str, str]:
    """Versions of what the figures depend on."""
    from importlib.metadata import version

    return {"python": sys.version.split()[0]} | {n: version(n) for n in ("torch", "transformers", "deepspeed")}


def summary(figures: dict[str, Any]) -> dict[str, dict[str, float]]:
    """Medians over the rounds of each engine. Ratios are formed within a round."""
    local = figures["runs"]["local"]
    out = {}
    for engine, runs in figures["runs"].items():
        cpu = [sum(one["cpu_s"]) for one in runs]
        out[engine] = {
            "cpu_s": median(cpu),
            "cpu_ratio": median(a / sum(b["cpu_s"]) for a, b in zip(cpu, local, strict=True)),
            "wall_s": median(one["wall_s"] for one in runs),
            "wall_ratio": median(one["wall_s"] / b["wall_s"] for one, b in zip(runs, local, strict=True)),
            **{f"{part}_mib": median(_peak(one, part) for one in runs) for part in ("start", "steps", "end")},
            "base_mib": figures["base_mib"][engine],
            "loss_apart": _apart(runs, local, "loss"),
            "norm_apart": _apart(runs, local, "gradient_norm"),
        }
    return out


def _peak(one: dict[str, Any], part: str) -> float:
    return max(parts[part] for parts in one["peak_mib"])


def _apart(runs: list[dict[str, Any]], local: list[dict[str, Any]], name: str) -> float:
    pairs = [p for one, b in zip(runs, local, strict=True) for p in zip(one[name], b[name], strict=True)]
    return max(abs(value - wanted) / abs(wanted) for value, wanted in pairs)


def time_table(figures: dict[str, Any]) -> str:
    """Seconds of a step."""
    rows = [
        [
            engine,
            str(len(figures["runs"][engine][0]["cpu_s"])),
            f"{one['cpu_s']:.2f}",
            f"{one['cpu_ratio']:.2f}",
            f"{one['wall_s']:.2f}",
            f"{one['wall_ratio']:.2f}",
            f"{one['loss_apart']:.0e}",
            f"{one['norm_apart']:.0e}",
        ]
        for engine, one in summary(figures).items()
    ]
    head = ["engine", "processes", "CPU s, all processes", "x local", "wall s", "x local", "loss apart", "norm apart"]
    return table(head, rows)


def memory_table(figures: dict[str, Any]) -> str:
    """Resident memory of the larger process."""
    rows = []
    for engine, one in summary(figures).items():
        rows.append([engine, *_memory_cells(figures, engine, {p: one[f"{p}_mib"] for p in ("start", "steps", "end")})])
    return table(_MEMORY_HEAD, rows)


def given_back_table(figures: dict[str, Any]) -> str:
    """The same of the runs whose allocator keeps nothing."""
    found = figures["given_back"]
    return table(_MEMORY_HEAD, [[k, *_memory_cells(figures, MEMORY_RUNS[k][0], one)] for k, one in found.items()])


_MEMORY_HEAD = ["engine", "base MiB", "start", "steps", "end", "steps above base", "bytes a weight"]


def _memory_cells(figures: dict[str, Any], engine: str, peaks: dict[str, float]) -> list[str]:
    base = figures["base_mib"][engine]
    above = peaks["steps"] - base
    return [f"{v:.0f}" for v in (base, peaks["start"], peaks["steps"], peaks["end"], above)] + [
        f"{above * 2**20 / figures['weights']:.0f}"
    ]


def document(figures: dict[str, Any]) -> str:
    """docs/benchmarks_scale.md."""
    runs = figures["runs"]["local"]
    return "\n".join(
        [
            _INTRODUCTION,
            f"The model: a random Llama of {figures['weights'] / 1e6:.1f} M weights, {SHAPE['num_hidden_layers']} "
            f"layers x {SHAPE['hidden_size']}. The work: DPO, float32, all weights, {PAIRS} pairs of random letters a "
            f"step ({runs[0]['tokens']:.0f} tokens in the last), micro-batches of at most {MICRO_BATCH_TOKENS} tokens. "
            f"{figures['steps']} steps a run, {figures['rounds']} rounds, the engines taking turns, medians. Load "
            f"average of the machine's {figures['machine']['cores']} cores meanwhile: "
            f"{', '.join(f'{load:.0f}' for load in figures['load'])}.\n",
            "## Time of a step\n",
            time_table(figures),
            _TIME,
            "## Memory of a process\n",
            memory_table(figures),
            _MEMORY,
            *([_GIVEN_BACK, given_back_table(figures), ""] if "given_back" in figures else []),
            *([figures["note"] + "\n"] if "note" in figures else []),  # by hand; measuring again drops it
            "## Command\n",
            "ENGINE stands for " + ", ".join(f"`{' '.join(words)}`" for words in ENGINES.values()) + ".\n",
            "    " + " ".join(figures["command"]) + "\n",
            "## Machine\n",
            table(["", ""], [[k, v] for k, v in (figures["machine"] | figures["versions"]).items()]),
            "",
        ]
    )


_INTRODUCTION = """\
# ZeRO on two processes

Generated with its figures (`benchmarks_scale.json`) by

    python -m tests.bench.zero_stages

Two processes of one machine that speak gloo over loopback, one CPU thread each. Nothing here was measured on a GPU or
on several machines; what memory and traffic come to there is [computed](scale.md).
"""

_TIME = """
CPU seconds are those of all processes of the run together, so that a ratio above 1 is what dividing costs. Wall
seconds are those of the step by the run's own clock: local has one core, the others have two, which they share with
whatever else runs on the machine. Apart: the largest relative difference to local's losses and gradient norms, over all
steps and rounds; the command fails above 1e-4.
"""

_MEMORY = """
The larger of the two processes; the highest resident memory (Linux `VmHWM`) of each part of a run. Start: loading, the
reference's pass and the first step. Steps: the further steps. End: checkpoint and final model. Base: the steps of a
model of 0.1 M weights, hence interpreter and libraries. Above base: weights, gradients, AdamW's moments, activations,
buffers and what the allocator keeps; in bytes for each of the model's weights beside it.
"""


_GIVEN_BACK = """\
This model is small beside what DeepSpeed gathers and reduces at a time, and the allocator keeps what was freed between.
Below, one run each (`--memory`) with an allocator that gives every block above 256 KiB back at once
(`MALLOC_MMAP_THRESHOLD_` and `MALLOC_TRIM_THRESHOLD_` at 262144); and zero3 with pieces of 1 M numbers and at most 2 M
weights whole at a time, in the place of DeepSpeed's 500 M, 50 M and 1 000 M (`reduce_bucket_size`,
`stage3_prefetch_bucket_size`, `stage3_max_live_parameters` and `stage3_max_reuse_distance`).
"""


def _short(one: dict[str, Any]) -> str:
    return f"{sum(one['cpu_s']):.2f} CPU s, {one['wall_s']:.2f} s, {_peak(one, 'steps'):.0f} MiB"


def _public(word: str, scratch: str) -> str:
    """A word of the command without the paths of this machine."""
    return word.replace(scratch, "DIR").replace(sys.executable, "python")


def main() -> int:
    """Measure, print, and write the document when everything was measured."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="one round of three steps; writes nothing")
    parser.add_argument("--memory", action="store_true", help="one more run each for memory, beside the figures")
    parser.add_argument("--render", action="store_true", help="write the document, measure nothing")
    arguments = parser.parse_args()
    if arguments.render:
        DOCUMENT.write_text(document(json.loads(FIGURES.read_text())))
        return 0
    if arguments.memory:
        figures = json.loads(FIGURES.read_text())
        figures["given_back"] = memory(STEPS)
        _kept(figures)
        return 0
    quick = arguments.quick
    measured(1 if quick else ROUNDS, 3 if quick else STEPS, _told if quick else _kept)
    return 0


def _told(figures: dict[str, Any]) -> None:
    print(f"\n{time_table(figures)}\n\n{memory_table(figures)}\n", flush=True)


def _kept(figures: dict[str, Any]) -> None:
    _told(figures)
    FIGURES.write_text(json.dumps(figures, indent=1) + "\n")
    DOCUMENT.write_text(document(figures))
    print(f"wrote {DOCUMENT.relative_to(ROOT)} and {FIGURES.relative_to(ROOT)}, {figures['rounds']} round(s)\n")


if __name__ == "__main__":
    sys.exit(main())
