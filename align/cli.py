"""The command `align`: import-light words, handed over to the part that does the work. The only file that prints."""

from __future__ import annotations

import logging
import sys
from collections.abc import Sequence
from pathlib import Path

USAGE = """\
align: align language models to human preferences

  align train recipe=NAME [key=value ...]    train; an existing run directory is resumed
  align check recipe=NAME [key=value ...]    compose and validate settings, without a model
  align check --keys                         every setting with its default and meaning
  align recipes                              the shipped recipes
  align data KEY=VALUE ...                   read the data of a recipe and report what would be used

  --config-dir DIR    your own configs (same folders) and recipes (DIR/recipes)
  --version, --help

Examples
  align train recipe=wpo
  align train recipe=dpo data.train=pairs.jsonl model=hub model.path=Qwen/Qwen2.5-0.5B-Instruct
  align train recipe=wpo objective.beta=0.05 optimizer.lr=1e-4 run.dir=runs/mine

Exit codes: 0 done, 1 failed, 2 wrong settings or data, 85 stopped by SIGTERM or SIGUSR1 with everything saved,
130 stopped by SIGINT with everything saved.
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
    from align.config import compose

    config = compose(words, config_dir)
    from align.trainers.offline import train

    return train(config, command="align train " + " ".join(words))


def _check(words: list[str], config_dir: Path | None) -> int:
    from align.config import compose, keys_with_help

    if words == ["--keys"]:
        print("\n".join(keys_with_help()))
        return 0
    config = compose(words, config_dir)
    from align.build import function, objective, pretrained
    from align.data.sources import locate_all

    objective(config)
    pretrained(config)
    locate_all(config.data.train, "data.train")
    if config.data.heldout is not None:
        locate_all(config.data.heldout, "data.heldout")
    if config.data.gold is not None:
        function(config.data.gold, "data.gold")
    choices = ", ".join(f"{g}={o}" for g, o in sorted(config.choices.items()))
    print(f"ok: {choices}")
    return 0


def _recipes(words: list[str], config_dir: Path | None) -> int:
    from align.config import recipes

    if words:
        raise ValueError("align recipes takes no settings")
    for name, path in recipes(config_dir).items():
        head = path.read_text().partition("\n")[0].lstrip("# ")
        print(f"{name:24s} {head}".rstrip())
    return 0


def _data(words: list[str], config_dir: Path | None) -> int:
    from align.config import compose

    config = compose(words, config_dir)
    from align.build import tokenizer
    from align.data.load import load

    data = load(config.data, tokenizer(config))
    for line in data.audit.lines():
        print(line)
    return 0


_COMMANDS = {"train": _train, "check": _check, "recipes": _recipes, "data": _data}


def _config_dir(words: list[str]) -> tuple[Path | None, list[str]]:
    if "--config-dir" not in words:
        return None, words
    at = words.index("--config-dir")
    if at + 1 == len(words) or not Path(words[at + 1]).is_dir():
        raise ValueError("--config-dir: give an existing directory with configs in the same folders as ours")
    return Path(words[at + 1]), words[:at] + words[at + 2 :]


def _refuse(message: str) -> int:
    print(f"align: {message}", file=sys.stderr)
    return 2


if __name__ == "__main__":
    sys.exit(main())
