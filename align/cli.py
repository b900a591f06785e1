"""The command `align`: import-light words, handed over to the part that does the work. The only file that prints."""

from __future__ import annotations

import logging
import sys
from collections.abc import Sequence
from pathlib import Path

USAGE = """\
align: align language models to human preferences

  align train recipe=NAME [key=value ...]    train; an existing run directory is resumed
  align train -m recipe=NAME key=A,B ...     a run for each combination of values, one after the other
  align train [-m] ... launch=slurm [--dry-run]
                                             submit to Slurm, several runs as a job array, or show what would be
  align front recipe=NAME composers=A,B points=N out=DIR [seeds=S] [key=value ...]
                                             runs over weights (thresholds.NAME=A,B: thresholds) of several composers,
                                             their Pareto fronts and hypervolume per compute; out=DIR report_only=true
  align launch check [dir=DIR] [seconds=N]   on each node of a job, by srun: can they run together?
  align check recipe=NAME [key=value ...]    compose and validate settings, without a model
  align check --keys                         every setting with its default and meaning
  align recipes                              the shipped recipes
  align data check [key=value ...] [--json OUT.json] [--html OUT.html]
                                             every row's tokens, what is learnt of them and what is wrong with the data
  align data pairs scored=FILE out=FILE pairs=RULE [max_per_prompt=N] [seed=N]
                                             preference pairs from scored samples; trees=FILE for a search tree's steps
  align generate model=PATH data.train=PROMPTS out=FILE.jsonl [n=N] [greedy=true] [reward=...] [rollout=vllm]
                                             a model's completions, one a line, with rewards if some are named
  align data judgements pairs=FILE|samples=FILE out=PATH
                                             prompts for a judge, and what it learns from its samples
  align average MODEL_DIR... out=DIR [method=NAME] [--check]
                                             one model from the weights of several; align average --help
  align score model=DIR data.train=FILE out=FILE.jsonl
                                             the rows of a file with a reward model's scores added
  align evaluate pairs [model=DIR] data.train=FILE out=DIR
                                             accuracy, calibration and biases of a reward model on pairs
  align evaluate overoptimisation data.train=FILE out=DIR
                                             best-of-n curves of gold against proxies
  align evaluate run.dir=DIR [data.train=FILE ...] [--json OUT.json]
                                             how a finished run ranks pairs; of a reward model: align evaluate pairs
  align doctor [run.dir=DIR] [free_gib=N] [--json OUT.json]
                                             what of this machine and environment would stop a run; exit code 1 if so

  --config-dir DIR    your own configs (same folders) and recipes (DIR/recipes)
  --version, --help

Examples
  align train recipe=wpo
  align train recipe=dpo data.train=pairs.jsonl model=hub model.path=Qwen/Qwen2.5-0.5B-Instruct
  align data check data.train=pairs.jsonl model=Qwen/Qwen2.5-0.5B-Instruct --html pairs.html
  align train recipe=wpo objective.beta=0.05 optimizer.lr=1e-4 run.dir=runs/mine

model=PATH_OR_NAME stands for model=hub model.path=PATH_OR_NAME.

Exit codes: 0 done, 1 failed or data with errors, 2 wrong settings or data, 85 stopped by SIGTERM or SIGUSR1 with
everything saved, 130 stopped by SIGINT with everything saved.
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns the process's exit code."""
    words = list(sys.argv[1:] if argv is None else argv)
    if not words or words[0] in ("-h", "--help", "help"):
        print(USAGE, end="")
        return 0
    if words[0] == "--version":
        from align import __version__

        print(f"align {__version__}")
        return 0
    command, rest = words[0], words[1:]
    if command not in _COMMANDS:
        import difflib

        near = difflib.get_close_matches(command, list(_COMMANDS), 1, 0.5)
        tip = f"; did you mean `align {near[0]}`?" if near else "; see `align --help`"
        return _refuse(f"{command} is not a command{tip}")
    if any(w in ("-h", "--help") for w in rest):
        if command == "average":
            from align.averaging.command import USAGE as own

            print(own, end="")
            return 0
        print(USAGE, end="")
        return 0
    logging.getLogger("hydra").addHandler(logging.NullHandler())  # its errors reach the user as our one line
    try:
        config_dir, rest = _config_dir(rest)
        return _COMMANDS[command](rest, config_dir)
    except ValueError as error:  # the user can cure it: one line, no traceback
        return _refuse(" ".join(str(error).split()))
    except KeyboardInterrupt:
        return 130


def _train(words: list[str], config_dir: Path | None) -> int:
    from align.launch.command import train

    return train(words, config_dir, print, _tell)


def _launch(words: list[str], config_dir: Path | None) -> int:
    if config_dir is not None:
        raise ValueError("align launch has no configs; leave --config-dir out")
    if words[:1] != ["check"]:
        raise ValueError(f"align launch {words[0] if words else ''}: say align launch check")
    from align.launch.preflight import run

    return run(words[1:], print, _tell)


def _check(words: list[str], config_dir: Path | None) -> int:
    from align.config import compose, keys_with_help

    if words == ["--keys"]:
        print("\n".join(keys_with_help()))
        return 0
    config = compose(words, config_dir)
    from align.config.validate import validate

    validate(config)
    choices = ", ".join(f"{g}={o}" for g, o in sorted(config.choices.items()))
    print(f"ok: {choices}")
    return 0


def _front(words: list[str], config_dir: Path | None) -> int:
    from align.front.command import run

    return run(words, config_dir, print, _tell)


def _recipes(words: list[str], config_dir: Path | None) -> int:
    from align.config import recipes

    if words:
        raise ValueError("align recipes takes no settings")
    for name, path in recipes(config_dir).items():
        head = path.read_text().partition("\n")[0].lstrip("# ")
        print(f"{name:24s} {head}".rstrip())
    return 0


def _data(words: list[str], config_dir: Path | None) -> int:
    if words and words[0] == "pairs":
        return _data_pairs(words[1:], config_dir)
    if words and words[0] == "check":
        return _data_check(words[1:], config_dir)
    if words and words[0] == "judgements":
        from align.data.judgements import run

        return run(words[1:], print)
    raise ValueError(f"align data {words[0] if words else ''}: say align data check, pairs or judgements")


def _data_check(words: list[str], config_dir: Path | None) -> int:
    from align.config import compose

    files, words = _files(words, "--json", "--html")
    config = compose(words, config_dir)
    from align.build import check_margins, objective, tokenizer
    from align.data.check import check, failed, lines
    from align.data.examples import Wanted
    from align.data.load import load
    from align.data.report import write_html, write_json

    # rows are shown as an objective gets them if one is chosen, else as what they are
    chosen = any(word.split("=")[0] in ("recipe", "objective") for word in words)
    wanted = Wanted(kind=None)
    if chosen:
        reader = objective(config)
        check_margins(config, reader)
        wanted = Wanted.by(reader)
    tokens = tokenizer(config)
    data = load(config.data, tokens, wanted, config.seed, keep=True, to_the_end=True)
    findings = check(data, tokens, config.data, wanted.mismatched)
    for line in lines(findings, data.audit):
        print(line)
    for option, write in (("--json", write_json), ("--html", write_html)):
        if option in files:
            write(files[option], data, findings, tokens)
            print(f"written {files[option]}")
    return 1 if failed(findings) else 0


def _data_pairs(words: list[str], config_dir: Path | None) -> int:
    own = {"scored": "", "trees": "", "out": "", "max_per_prompt": ""}
    rest = []
    for word in words:
        key, _, value = word.partition("=")
        if key in own:
            own[key] = value
        else:
            rest.append(word)
    if bool(own["scored"]) == bool(own["trees"]) or not own["out"]:
        raise ValueError("give scored=FILE (or trees=FILE) and out=FILE; several files as scored=A.jsonl,B.jsonl")
    if own["trees"]:
        from align.data.search import build_step_pairs

        if rest or own["max_per_prompt"]:
            raise ValueError("trees=FILE takes out=FILE only: its pairs are the steps of each tree")
        account = build_step_pairs(_names(own["trees"]), Path(own["out"]))
        print(
            f"pairs: {account['pairs_out']} steps from {account['trees_in']} trees, skipped {account['steps_skipped']}"
        )
        return 0
    if not any(word.startswith("pairs=") for word in rest):
        rest.append("pairs=max_min")
    limit = own["max_per_prompt"]
    if limit and not limit.isdecimal():
        raise ValueError(f"max_per_prompt={limit}: must be a whole number")
    from align.config import compose

    config = compose(rest, config_dir)
    from align.build import pair_rule
    from align.data.pairs import build_pairs

    account = build_pairs(
        _names(own["scored"]), pair_rule(config), Path(own["out"]), int(limit) if limit else None, config.seed
    )
    for line in account.lines():
        print(line)
    return 0


def _names(value: str) -> list[str]:
    """A.jsonl, A.jsonl,B.jsonl or [A.jsonl,B.jsonl]"""
    return [name.strip() for name in value.removeprefix("[").removesuffix("]").split(",")]


def _average(words: list[str], config_dir: Path | None) -> int:
    if config_dir is not None:
        raise ValueError("align average has no configs; leave --config-dir out")
    from align.averaging.command import run

    return run(words, print)


def _evaluate(words: list[str], config_dir: Path | None) -> int:
    if words and words[0] in ("pairs", "overoptimisation"):
        return _evaluate_scores(words[0], words[1:], config_dir)
    from align.config import compose_run

    files, words = _files(words, "--json")
    if config_dir is not None:
        raise ValueError("align evaluate takes its settings from run.dir")
    config = compose_run(words)
    from align.trainers.ranking import evaluate_run

    for line in evaluate_run(config, files.get("--json")):
        print(line)
    return 0


def _generate(words: list[str], config_dir: Path | None) -> int:
    own = {"out": "", "n": "", "greedy": "false"}
    rest = []
    for word in words:
        key, _, value = word.partition("=")
        if key in own:
            own[key] = value
        else:
            rest.append(word)
    if not own["out"]:
        raise ValueError("give out=FILE.jsonl: where the completions are written")
    if own["greedy"] not in ("true", "false"):
        raise ValueError(f"greedy={own['greedy']}: must be true or false")
    given = {word.partition("=")[0] for word in rest}
    without_effect = given & {"data.heldout", "data.heldout_fraction"}
    if without_effect:
        raise ValueError(f"{min(without_effect)} has no effect here: every row of data.train is a prompt; remove it")
    if own["n"]:
        rest.append(f"sampling.n={own['n']}")
    if own["greedy"] == "true":
        if own["n"] not in ("", "1") or given & {"sampling.n", "sampling.temperature"}:
            raise ValueError("greedy=true is n=1 and sampling.temperature=0; remove the other")
        rest += ["sampling.n=1", "sampling.temperature=0"]
    from align.config import compose

    config = compose(rest, config_dir)
    from align.trainers.generate import generate

    return generate(config, Path(own["out"]), print)


def _score(words: list[str], config_dir: Path | None) -> int:
    out, rest = _own_word(words, "out")
    if not out:
        raise ValueError("give out=FILE.jsonl: where the rows with their scores are written")
    given = {word.partition("=")[0] for word in rest}
    if "data.train" not in given:
        raise ValueError("give data.train=FILE: the rows to be scored")
    from align.config import compose

    config = compose(rest, config_dir)
    from align.evaluate.score import score

    return score(config, Path(out), print)


def _evaluate_scores(what: str, words: list[str], config_dir: Path | None) -> int:
    out, rest = _own_word(words, "out")
    if not out:
        raise ValueError(f"align evaluate {what}: give out=DIR, where the report is written")
    if not any(word.startswith("data.train=") for word in rest):
        raise ValueError(f"align evaluate {what}: give data.train=FILE")
    from align.config import compose

    scored = not any(word.startswith("model=") for word in rest)
    config = compose(rest, config_dir)
    if what == "pairs":
        from align.evaluate.score import evaluate_pairs

        return evaluate_pairs(config, scored, Path(out), print)
    if not scored:
        raise ValueError("model has no effect here: the rows hold the scores of their proxies; remove it")
    from align.evaluate import overoptimisation

    data = overoptimisation.report(overoptimisation.read_rows(config.data.train))
    for path in overoptimisation.write(data, out):
        print(f"written {path}")
    print("\n".join(overoptimisation.lines(data)))
    return 0


def _doctor(words: list[str], config_dir: Path | None) -> int:
    if config_dir is not None:
        raise ValueError("align doctor has no configs; leave --config-dir out")
    files, words = _files(words, "--json")
    from align.doctor.command import run

    return run(words, files.get("--json"), print)


def _own_word(words: list[str], key: str) -> tuple[str, list[str]]:
    """The value of a word that is no setting, "" if it is not there, and the other words."""
    values = [word.partition("=")[2] for word in words if word.partition("=")[0] == key]
    return values[-1] if values else "", [word for word in words if word.partition("=")[0] != key]


_COMMANDS = {
    "train": _train,
    "check": _check,
    "front": _front,
    "recipes": _recipes,
    "data": _data,
    "generate": _generate,
    "average": _average,
    "score": _score,
    "evaluate": _evaluate,
    "doctor": _doctor,
    "launch": _launch,
}


def _files(words: list[str], *options: str) -> tuple[dict[str, str], list[str]]:
    """The values of options that name files, and the other words."""
    found = {}
    rest = []
    waiting = iter(words)
    for word in waiting:
        option, equals, value = word.partition("=")
        if option not in options:
            rest.append(word)
            continue
        found[option] = value if equals else next(waiting, "")
        if not found[option]:
            raise ValueError(f"{option}: give a file to write")
    return found, rest


def _config_dir(words: list[str]) -> tuple[Path | None, list[str]]:
    if "--config-dir" not in words:
        return None, words
    at = words.index("--config-dir")
    if at + 1 == len(words) or not Path(words[at + 1]).is_dir():
        raise ValueError("--config-dir: give an existing directory with configs in the same folders as ours")
    return Path(words[at + 1]), words[:at] + words[at + 2 :]


def _refuse(message: str) -> int:
    _tell(message)
    return 2


def _tell(message: str) -> None:
    print(f"align: {message}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
