"""Every command in one table, from which come the parser, the pages of help, the completion and the refusals.

Imports nothing: `align --help` and a press of the tab key wait for it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Argument:
    """A word `key=value` of one command that is no setting of configs/. A value named FILE, DIR or PATH may begin
    with ~."""

    key: str
    value: str
    text: str


@dataclass(frozen=True)
class Option:
    """A word that begins with a dash. value: the name of what follows it; "": nothing does."""

    name: str
    value: str
    text: str


CONFIG_DIR = Option("--config-dir", "DIR", "your own configs (same folders) and recipes (DIR/recipes)")


@dataclass(frozen=True)
class Command:
    """One command. run: dotted path of a function (align.cli.parse.Call) -> exit code."""

    name: str
    usage: str
    text: str
    run: str
    arguments: tuple[Argument, ...] = ()
    options: tuple[Option, ...] = ()
    examples: tuple[str, ...] = ()
    exits: str = ""
    settings: bool = True  # takes key=value of configs/, and --config-dir
    notes: str = ""

    def takes(self, key: str) -> Argument | None:
        """The word of its own with this key; of `thresholds.NAME` the key is what stands before the dot."""
        return next((w for w in self.arguments if w.key in (key, f"{key.partition('.')[0]}.NAME")), None)

    def all_options(self) -> tuple[Option, ...]:
        return (*self.options, CONFIG_DIR) if self.settings else self.options


_DRY = Option("--dry-run", "", "with launch=slurm: show what would be submitted")
_JSON = Option("--json", "FILE", "the same as JSON")
_OUT_ROWS = Argument("out", "FILE.jsonl", "where the rows are written")
_TRAINING = (
    "0 done, 1 failed, 2 wrong settings or data, 85 stopped by SIGTERM or SIGUSR1 with everything saved,\n"
    "  130 stopped by SIGINT with everything saved: the same command goes on"
)
_AVERAGING = """\
Methods
  method=uniform                                 the mean (of reward models: WARM)
  method=weighted weights=[0.2,0.8]              a weighted mean; outside [0, 1] with extrapolate=true
  method=loss|steps penalty=P [values=[..]]      weights from held-out losses or steps
  method=stock base=DIR [filter_wise=true] [clamp=false]      Model Stock
  method=interpolate base=DIR alpha=A | sweep=[0,0.5,1] | blocks=[10,20] alphas=[a,b,c] other=d
                                                 A * base + (1 - A) * model, the same or by block of layers
  method=localize base=DIR density=D             each model's largest changes, stitched into the base
"""

COMMANDS: tuple[Command, ...] = (
    Command(
        "train",
        "recipe=NAME [key=value ...]",
        "train; an existing run directory is resumed",
        "align.cli.runs:train",
        options=(
            Option("-m", "", "a run for each combination of values, key=A,B, one after the other; also --multirun"),
            Option("--multirun", "", "the same as -m"),
            _DRY,
        ),
        examples=(
            "align train recipe=wpo",
            "align train recipe=dpo data.train=pairs.jsonl model=Qwen/Qwen2.5-0.5B-Instruct",
            "align train recipe=wpo objective.beta=0.05 optimizer.lr=1e-4 run.dir=runs/mine",
            "align train -m recipe=wpo optimizer.lr=1e-6,1e-7 launch=slurm --dry-run",
        ),
        exits=_TRAINING,
    ),
    Command(
        "front",
        "recipe=NAME composers=A,B points=N out=DIR [seeds=S] [key=value ...]",
        "runs over weights of several composers, and their Pareto fronts",
        "align.cli.runs:front",
        arguments=(
            Argument("composers", "A,B", "options of composer, or NAME:OPTION"),
            Argument("composers.NAME", "...", "composers.NAME.key=value: a setting of one of them alone"),
            Argument("points", "N", "weights spread evenly"),
            Argument("weights", "[..],[..]", "or weights by hand"),
            Argument("thresholds.NAME", "A,B", "thresholds of a component instead of weights"),
            Argument("seeds", "N", "runs of each point; 1"),
            Argument("out", "DIR", "where the runs and the report are written"),
            Argument("report_only", "true", "train nothing, report what is there"),
            Argument("reference_point.NAME", "X", "the corner from which hypervolume is measured"),
            Argument("spans.NAME", "X", "what counts as 1 of a component"),
            Argument("minimise", "NAME,..", "components of which less is better"),
        ),
        options=(_DRY,),
        examples=(
            "align front recipe=dynamic_gradient composers=fixed,gradient points=5 out=runs/front",
            "align front out=runs/front report_only=true",
        ),
        exits=_TRAINING,
    ),
    Command(
        "check",
        "recipe=NAME [key=value ...]",
        "compose and validate settings, without a model",
        "align.cli.settings:check",
        options=(Option("--keys", "", "every setting with its default and meaning instead"),),
        examples=("align check recipe=wpo optimizer.lr=1e-4", "align check --keys | grep '^  data'"),
        exits="0 possible, 2 wrong settings",
    ),
    Command(
        "show",
        "recipe=NAME [key=value ...]",
        "the composed settings as YAML",
        "align.cli.settings:show",
        examples=("align show recipe=wpo", "align show recipe=grpo model=tiny sampling.n=8"),
        exits="0 possible, 2 wrong settings",
    ),
    Command(
        "recipes",
        "",
        "the shipped recipes and those of --config-dir",
        "align.cli.settings:recipes",
        examples=("align recipes", "align recipes --config-dir mine"),
    ),
    Command(
        "data check",
        "[key=value ...]",
        "every row's tokens, what is learnt of them and what is wrong with the data",
        "align.cli.data:check",
        options=(_JSON, Option("--html", "FILE", "every row as a page: what is learnt is marked")),
        examples=(
            "align data check data.train=pairs.jsonl model=Qwen/Qwen2.5-0.5B-Instruct --html pairs.html",
            "align data check recipe=kto data.train=labelled.jsonl",
        ),
        exits="0 good, 1 rows with errors, 2 wrong settings or data",
    ),
    Command(
        "data forms",
        "[NAME ...]",
        "shapes of rows that data.form=NAME reads, with an example of each",
        "align.cli.data:forms",
        options=(_JSON,),
        settings=False,
        examples=("align data forms", "align data forms scored arena"),
        exits="0 done, 2 no such form",
    ),
    Command(
        "data cache",
        "[clear=all|DAYS] [dir=DIR]",
        "rendered data that runs keep for their next start: list, remove",
        "align.cli.data:cache",
        arguments=(
            Argument("clear", "all|DAYS", "remove all sets, or those that no run has read for so many days"),
            Argument("dir", "DIR", "where they lie, as data.cache_dir; <cache>/data"),
        ),
        settings=False,
        examples=("align data cache", "align data cache clear=30"),
    ),
    Command(
        "data pairs",
        "scored=FILE out=FILE pairs=RULE [max_per_prompt=N] [seed=N]",
        "preference pairs from scored samples, or from the steps of search trees",
        "align.cli.data:pairs",
        arguments=(
            Argument("scored", "FILE,..", "scored samples: docs/pairs.md"),
            Argument("trees", "FILE,..", "instead: search trees, of whose steps pairs are made"),
            Argument("out", "FILE.jsonl", "where the pairs are written"),
            Argument("max_per_prompt", "N", "at most so many pairs of one prompt"),
        ),
        examples=(
            "align data pairs scored=samples.jsonl out=pairs.jsonl pairs=max_min",
            "align data pairs trees=trees.jsonl out=steps.jsonl",
        ),
    ),
    Command(
        "data judgements",
        "pairs=FILE|samples=FILE out=PATH",
        "prompts for a judge, and what it learns from its samples",
        "align.cli.data:judgements",
        arguments=(
            Argument("pairs", "FILE,..", "pairs of which prompts are made"),
            Argument("samples", "FILE,..", "or a judge's answers to them"),
            Argument("out", "PATH", "a file of prompts, or a directory for what is learnt"),
            Argument("template", "FILE", "of the prompts"),
            Argument("pattern", "REGEX", "by which a verdict is read"),
            Argument("max_per_prompt", "N", "judgements of one pair; 1"),
            Argument("seed", "N", "of their choice; 0"),
        ),
        settings=False,
        examples=(
            "align data judgements pairs=pairs.jsonl out=prompts.jsonl",
            "align data judgements samples=answers.jsonl out=learnt",
        ),
    ),
    Command(
        "generate",
        "model=PATH data.train=PROMPTS out=FILE.jsonl [n=N] [greedy=true] [reward=...] [rollout=vllm]",
        "a model's completions, one a line, with rewards if some are named",
        "align.cli.models:generate",
        arguments=(
            _OUT_ROWS,
            Argument("n", "N", "completions of each prompt: sampling.n"),
            Argument("greedy", "true", "n=1 and sampling.temperature=0"),
        ),
        examples=(
            "align generate model=runs/mine/final data.train=prompts.jsonl out=samples.jsonl n=4",
            "align generate model=tiny data.train=prompts.jsonl out=greedy.jsonl greedy=true",
        ),
    ),
    Command(
        "average",
        "MODEL_DIR... out=DIR [method=NAME] [key=value ...]",
        "one model from the weights of several",
        "align.cli.models:average",
        arguments=(
            Argument("out", "DIR", "where the average is written"),
            Argument("method", "NAME", "as below; uniform"),
            Argument("weights", "[A,B]", ""),
            Argument("penalty", "P", ""),
            Argument("values", "[A,B]", ""),
            Argument("base", "DIR", ""),
            Argument("alpha", "A", ""),
            Argument("sweep", "[A,B]", ""),
            Argument("blocks", "[A,B]", ""),
            Argument("alphas", "[A,B]", ""),
            Argument("other", "A", ""),
            Argument("density", "D", ""),
            Argument("filter_wise", "true", ""),
            Argument("clamp", "false", ""),
            Argument("extrapolate", "true", ""),
            Argument("merge", "DIR", "LoRA adapters: into this base, not as an adapter"),
            Argument("dtype", "NAME", "float32, bfloat16, float16 or float64; that of the first model"),
            Argument("shard_gib", "N", "largest weight file; 5"),
            Argument("max_memory_mib", "N", "for tensors; 256"),
        ),
        options=(Option("--check", "", "only compare the models"),),
        settings=False,
        examples=(
            "align average runs/a/final runs/b/final out=mean",
            "align average runs/a/final out=half method=interpolate base=start alpha=0.5",
        ),
        notes=_AVERAGING,
    ),
    Command(
        "score",
        "model=DIR data.train=FILE out=FILE.jsonl",
        "the rows of a file with a reward model's scores added",
        "align.cli.models:score",
        arguments=(_OUT_ROWS,),
        examples=("align score model=runs/reward/final data.train=samples.jsonl out=scored.jsonl",),
    ),
    Command(
        "evaluate",
        "run.dir=DIR [data.train=FILE ...] [--json OUT.json]",
        "how a finished run ranks pairs; of a reward model: align evaluate pairs",
        "align.cli.evaluation:run",
        arguments=(Argument("run.dir", "DIR", "the run"), Argument("data.train", "FILE", "other pairs than its own")),
        options=(_JSON,),
        settings=False,
        examples=("align evaluate run.dir=runs/mine", "align evaluate run.dir=runs/mine data.train=other.jsonl"),
    ),
    Command(
        "evaluate pairs",
        "[model=DIR] data.train=FILE out=DIR",
        "accuracy, calibration and biases of a reward model on pairs",
        "align.cli.evaluation:pairs",
        arguments=(Argument("out", "DIR", "where the report is written"),),
        examples=(
            "align evaluate pairs model=runs/reward/final data.train=pairs.jsonl out=report",
            "align evaluate pairs data.train=scored.jsonl out=report",
        ),
    ),
    Command(
        "evaluate overoptimisation",
        "data.train=FILE out=DIR",
        "best-of-n curves of gold against proxies",
        "align.cli.evaluation:overoptimisation",
        arguments=(Argument("out", "DIR", "where the report is written"),),
        examples=("align evaluate overoptimisation data.train=scored.jsonl out=report",),
    ),
    Command(
        "doctor",
        "[run.dir=DIR] [free_gib=N] [--json OUT.json]",
        "what of this machine and environment would stop a run",
        "align.cli.machine:doctor",
        arguments=(
            Argument("run.dir", "DIR", "where runs are written; runs"),
            Argument("free_gib", "N", "the least room wanted there; 6"),
        ),
        options=(_JSON,),
        settings=False,
        examples=("align doctor", "align doctor run.dir=/data/runs free_gib=100"),
        exits="0 nothing would, 1 something would, 2 wrong words",
    ),
    Command(
        "launch check",
        "[dir=DIR] [seconds=N]",
        "on each node of a job, by srun: can they run together?",
        "align.cli.machine:launch_check",
        arguments=(
            Argument("dir", "DIR", "a directory that all nodes share; ."),
            Argument("seconds", "N", "how long they may take, 10 to 3600; 60"),
        ),
        settings=False,
        examples=("srun align launch check dir=runs",),
        exits="0 they can, 1 they cannot, 2 wrong words",
    ),
    Command(
        "completion",
        "bash|zsh|fish",
        "a script by which the shell completes commands, options, recipes and keys",
        "align.cli.complete:script",
        settings=False,
        examples=(
            'eval "$(align completion bash)"  # in ~/.bashrc',
            "align completion zsh > ~/.zfunc/_align",
            "align completion fish > ~/.config/fish/completions/align.fish",
        ),
    ),
)

# What the scripts of `align completion` call; no page of help shows it.
COMPLETE = Command(
    "complete", "LINE", "what could stand at the end of a line", "align.cli.complete:run", settings=False
)

# A command of other programs, or what one might expect -> what does it here
ELSEWHERE = {
    "chat": "completions of prompts are written by `align generate`, and DIR/final of a run opens with transformers",
    "serve": "DIR/final of a run opens with any server of Hugging Face models, such as vllm serve",
    "config": "use `align show recipe=NAME`, or `align check --keys`",
    "eval": "use `align evaluate`, see `align evaluate --help`",
    "export": "DIR/final of a run is a Hugging Face model; merge=true merges its adapter",
    "merge": "merge=true merges a run's adapter into DIR/final; `align average` makes one model of several",
    "sample": "use `align generate`",
    "resume": "the same `align train` as before goes on where the run stopped",
    "sweep": "use `align train -m key=A,B`",
    "env": "use `align doctor`",
    "list": "use `align recipes`, or `align check --keys`",
}


def find(words: Sequence[str]) -> tuple[Command, list[str]] | None:
    """The command that the first words name, and the words after it."""
    for count in (2, 1):
        name = " ".join(words[:count])
        for command in (*COMMANDS, COMPLETE):
            if command.name == name:
                return command, list(words[count:])
    return None


def below(first: str) -> list[Command]:
    """The commands of two words of which this is the first."""
    return [command for command in COMMANDS if command.name.startswith(f"{first} ")]
