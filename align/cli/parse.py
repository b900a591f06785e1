"""Words after a command, sorted by what the table says of it: options, words of its own, settings."""

from __future__ import annotations

import difflib
import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from align.cli.table import CONFIG_DIR, Command, Option


@dataclass(frozen=True)
class Call:
    """A command as it was typed."""

    command: Command
    words: list[str]  # all but options with a value
    config_dir: Path | None = None
    options: dict[str, str] = field(default_factory=dict)  # name -> value, "" of a flag
    own: dict[str, str] = field(default_factory=dict)  # words of the command's own, the last one of each
    settings: list[str] = field(default_factory=list)  # every other word


def parse(command: Command, words: Sequence[str]) -> Call:
    """Raises ValueError for an option that the command does not have, or one without its value."""
    known = {option.name: option for option in command.all_options()}
    call = Call(command, [])
    waiting = iter(words)
    for word in waiting:
        name, equals, value = word.partition("=")
        if not word.startswith("-"):
            _take(call, word)
        elif name not in known:
            raise ValueError(_unknown(command, word, list(known)))
        elif not known[name].value:
            call.words.append(word)
            call.options[name] = ""
        else:
            call.options[name] = os.path.expanduser(value if equals else next(waiting, ""))
            _check_given(known[name], call.options[name])
    return Call(command, call.words, _directory(call), call.options, call.own, call.settings)


def _take(call: Call, word: str) -> None:
    key, equals, value = word.partition("=")
    own = call.command.takes(key) if equals else None
    if own is None:
        call.settings.append(word)
    else:
        if own.value.partition(".")[0].partition(",")[0] in ("FILE", "DIR", "PATH"):
            value = os.path.expanduser(value)  # a shell leaves the ~ of key=~/x as it is
            word = f"{key}={value}"
        call.own[key] = value
    call.words.append(word)


def _check_given(option: Option, value: str) -> None:
    if not value and option is not CONFIG_DIR:
        raise ValueError(f"{option.name}: give a file to write")


def _directory(call: Call) -> Path | None:
    given = call.options.get(CONFIG_DIR.name)
    if given is not None and not (given and Path(given).is_dir()):
        raise ValueError("--config-dir: give an existing directory with configs in the same folders as ours")
    return None if given is None else Path(given)


def _unknown(command: Command, word: str, known: Sequence[str]) -> str:
    name, equals, value = word.partition("=")
    if name == CONFIG_DIR.name:
        return f"align {command.name} has no configs; leave --config-dir out"
    if name in ("--cfg", "--info", "-c"):
        return f"{word} is an option of Hydra's; here `align show recipe=NAME` prints the composed settings"
    near = difflib.get_close_matches(name, known, 1, 0.7)
    if near:
        return f"{word} is not an option of align {command.name}; did you mean {near[0]}?"
    has = f"it has {', '.join(known)}" if known else "it has none"
    if not command.settings:
        return f"{word} is not an option of align {command.name}; {has}"
    return f"{word} is not an option of align {command.name}; {has}; settings are written key=value{_setting(name)}"


def _setting(name: str) -> str:
    """What `--learning-rate` is here, if other frameworks have it."""
    from align.config.foreign import hint

    return hint(name.lstrip("-").replace("-", "_"))


def refuse_plugs_of_data(call: Call) -> None:
    """Raises ValueError for what reads data in training and not here, where rows are written as they stand."""
    plugs = ("data.format", "data.loader", "data.form", "data.columns")
    keys = [word.partition("=")[0] for word in call.settings]
    given = [key for key in keys if key in plugs or key.startswith("data.columns.")]
    if given:
        raise ValueError(
            f"{min(given)} has no effect in align {call.command.name}: rows are read as they stand; remove it"
        )
