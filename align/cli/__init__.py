"""The command `align`: import-light words, handed over to the part that does the work. The only package that prints."""

from __future__ import annotations

import logging
import sys
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path

from align.cli.parse import parse
from align.cli.show import tell
from align.cli.table import COMMANDS, ELSEWHERE, Command, below, find


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns the process's exit code."""
    words = list(sys.argv[1:] if argv is None else argv)
    if words[:1] == ["--version"]:
        from align import __version__

        print(f"align {__version__}")
        return 0
    wanted = [word for word in words if word not in ("-h", "--help")]
    helped = len(wanted) < len(words) or words[:1] == ["help"]
    wanted = wanted[1:] if wanted[:1] == ["help"] else wanted
    if not wanted:
        return _page("overview")
    found = find(wanted)
    if found is None:
        return _group(wanted, helped)
    command, rest = found
    if helped:
        return _page("page", command)
    return _call(command, rest)


def _page(name: str, *of: object) -> int:
    """Print a page of help, by the function that makes it."""
    print(getattr(import_module("align.cli.pages"), name)(*of), end="")
    return 0


def _call(command: Command, words: Sequence[str]) -> int:
    logging.getLogger("hydra").addHandler(logging.NullHandler())  # its errors reach the user as our one line
    module, _, name = command.run.partition(":")
    try:
        call = parse(command, words)
        _make_importable(call.config_dir)
        return getattr(import_module(module), name)(call)
    except ValueError as error:  # the user can cure it: one line, no traceback
        return _refuse(" ".join(str(error).split()))
    except KeyboardInterrupt:
        return 130


def _make_importable(config_dir: Path | None) -> None:
    """Parts of one's own, by dotted path: in the folder one stands in and beside one's configs.

    Last, so that a file of the user's hides no package. Workers of rewards get sys.path as it is; processes of a run,
    also those that Slurm starts, come by here.
    """
    for folder in (Path.cwd(), *([config_dir.resolve().parent] if config_dir else [])):
        if str(folder) not in sys.path:
            sys.path.append(str(folder))


def _group(words: Sequence[str], helped: bool) -> int:
    """A first word alone, or with a second that is none of its commands; or a word that is no command."""
    inside = below(words[0])
    if inside and helped:
        return _page("group", words[0], inside)
    if inside:
        said = " ".join(words[:2])
        return _refuse(f"align {said}: say {', '.join(f'align {command.name}' for command in inside)}")
    return _refuse(f"{words[0]} is not a command; {_instead(words[0])}")


def _instead(word: str) -> str:
    if word in ELSEWHERE:
        return ELSEWHERE[word]
    from align.vocabulary import recipes

    if word.lower() in recipes():
        return f"did you mean `align train recipe={word.lower()}`?"
    import difflib

    near = difflib.get_close_matches(word, [command.name.split()[0] for command in COMMANDS], 1, 0.5)
    return f"did you mean `align {near[0]}`?" if near else "see `align --help`"


def _refuse(message: str) -> int:
    tell(message)
    return 2
