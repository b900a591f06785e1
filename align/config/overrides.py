"""Words as a user types them, to words that Hydra's grammar reads in the one way in which they can be meant."""

from __future__ import annotations

import fnmatch
import re
import shlex
from collections.abc import Sequence
from pathlib import Path

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Glob, Override
from hydra.errors import HydraException

from align.config.schema import ConfigError
from align.vocabulary import groups, options, recipes


def read(words: Sequence[str], config_dir: Path | None) -> list[str]:
    """The words with values quoted where Hydra would stumble, and short forms written out.

    Raises ConfigError, one line, for what is no setting by its form and for several values.
    """
    out = [_word(word, config_dir) for word in words]
    # Your own training data never meet the shipped held-out set or its gold rule.
    if any(w.startswith("data.train=") for w in out) and not any(w.startswith("data=") for w in out):
        out.append("data=files")
    return [part for word in out for part in _long(word, config_dir)]


def alternatives(word: str, config_dir: Path | None = None) -> list[str]:
    """The words that a word with several values stands for, `seed=1,2` or `seed=range(0,3)`; itself if it has one."""
    key, _, value = word.partition("=")
    override = _override(word)
    if override is None:
        parts = _split(value)
        return [f"{key}={part}" for part in parts] if len(parts) > 1 else [word]
    if not override.is_sweep_override():
        return [word]
    found = override.value()
    if isinstance(found, Glob):
        if key != "recipe" and key not in groups():
            raise ConfigError(f"{word}: glob(...) is for groups and recipe; write the values, {key}=A,B")
        known = list(recipes(config_dir)) if key == "recipe" else options(key, config_dir)
        names = [name for name in known if _matches(name, found.include) and not _matches(name, found.exclude)]
        if not names:
            raise ConfigError(f"{word}: no option is called so; Options: {', '.join(known)}")
        return [f"{key}={name}" for name in names]
    try:
        return [f"{key}={one}" for one in override.sweep_string_iterator()]
    except HydraException:
        raise ConfigError(f"{word}: has no values to try one after the other; use {key}=A,B or range(...)") from None


def value_of(word: str) -> object:
    """The value of a word that `read` returned."""
    found = _override(word)
    assert found is not None
    return found.value()


def quoted(value: str) -> str:
    """A text as the value of a word, whatever its characters."""
    if re.fullmatch(r"[A-Za-z0-9_./+-]+", value):
        return value
    # a backslash is one except before a quote
    return "'" + re.sub(r"(\\*)('|$)", lambda m: m[1] * 2 + ("\\'" if m[2] else ""), value) + "'"


def typed(key: str, value: str) -> str:
    """A word with a text for its value, as it is typed in a shell."""
    if re.search(r"['\"\\]", value):
        return shlex.quote(f"{key}={quoted(value)}")
    return f"'{key}=\"{value}\"'"


def _word(word: str, config_dir: Path | None) -> str:
    """key=value in Hydra's grammar; a + before it says nothing here, where a key is either known or refused."""
    bare = word.lstrip("+")
    key, equals, value = bare.partition("=")
    if not equals and key.lower() in recipes(config_dir):
        raise ConfigError(f"{word}: settings are written key=value; did you mean recipe={key.lower()}?")
    if key.startswith("~") and len(key) > 1:
        raise ConfigError(f"{word}: nothing can be taken away; settings are written key=value, a group group=option")
    if word.startswith("-") or not equals or not key:
        raise ConfigError(f"{word}: settings are written key=value, for example optimizer.lr=1e-6")
    if key.split(".")[0] == "hydra":
        raise ConfigError(
            f"{key} is not a setting; run.dir says where a run is written, `align check --keys` lists all"
        )
    override = _override(bare)
    if override is not None and not override.is_sweep_override():
        return bare
    if override is not None or len(_split(value)) > 1:
        raise ConfigError(_several(key, value))
    return f"{key}={_readable(value)}"


def _several(key: str, value: str) -> str:
    """What to say of several values where one is asked for."""
    text = f"one text is typed {typed(key, value)}"
    if re.match(r"[a-z_]+\(", value):
        return f"{key}={value}: cannot be read as one value; `align train -m` runs each of several; {text}"
    return (
        f"{key}={value}: cannot be read as one value; `align train -m` runs each of several, a list is typed "
        f"'{key}=[{value}]', {text}"
    )


def _long(word: str, config_dir: Path | None) -> list[str]:
    """model=PATH, reward.NAME=module.function and callbacks.NAME=module.Class written out."""
    key, _, value = word.partition("=")
    path = value.strip("'")
    if key == "model" and value not in options("model", config_dir) and ("/" in path or Path(path).is_dir()):
        return ["model=hub", f"model.path={value}"]
    if re.fullmatch(r"(reward|callbacks)\.[^._][^.]*", key) and re.fullmatch(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)+", value):
        return [f"{key}._target_={value}"]
    return [word]


def _override(word: str) -> Override | None:
    """None: Hydra's grammar does not take it."""
    try:
        return OverridesParser.create().parse_override(word)
    except HydraException:
        return None


def _readable(value: str) -> str:
    """A value that Hydra stumbles over, quoted; of a list the members are."""
    if value.startswith("[") and value.endswith("]"):
        return "[" + ",".join(map(_member, _split(value[1:-1]))) + "]"
    return quoted(value)


def _member(value: str) -> str:
    override = _override(f"k={value}")
    return value if override is not None and not override.is_sweep_override() else _readable(value)


# A member in quotes as a whole, else what stands before a comma outside brackets: an apostrophe opens no quotes.
_MEMBER = re.compile(
    r"""\s*'(?:\\.|[^'\\])*'\s*(?=,|$)|\s*"(?:\\.|[^"\\])*"\s*(?=,|$)|(?:\[[^\]]*\]|\{[^}]*\}|\([^)]*\)|[^,])+"""
)


def _split(text: str) -> list[str]:
    """The parts between commas."""
    return [part.strip() for part in _MEMBER.findall(text)]


def _matches(name: str, patterns: Sequence[str]) -> bool:
    return any(fnmatch.fnmatch(name, pattern) for pattern in patterns)
