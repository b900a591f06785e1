"""align completion SHELL, and `align complete LINE`, which its scripts call at a press of the tab key."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path

from align.cli.parse import Call
from align.cli.show import show
from align.cli.table import COMMANDS, CONFIG_DIR, Command, below, find
from align.vocabulary import groups, options, recipes, settings_of, shipped_root

# Bash takes = and : as ends of words (COMP_WORDBREAKS): it replaces only what stands behind the last of them. Where
# nothing is offered, bash offers files.
_BASH = """\
_align() {
    local line=${COMP_LINE:0:COMP_POINT} typed kept
    typed=${line##* }
    mapfile -t COMPREPLY < <(align complete "$line" 2>/dev/null)
    kept=${typed%"${typed##*[=:]}"}
    COMPREPLY=("${COMPREPLY[@]#"$kept"}")
    if [[ ${#COMPREPLY[@]} -eq 1 && ${COMPREPLY[0]} == *[=.] ]]; then compopt -o nospace 2>/dev/null; fi
}
complete -o default -F _align align
"""
_ZSH = """\
#compdef align
_align() {
    local -a found
    found=("${(@f)$(align complete "$LBUFFER" 2>/dev/null)}")
    found=(${found:#})
    if (( ${#found} )); then
        compadd -Q -S '' -- ${(M)found:#*[=.]}
        compadd -Q -- ${found:#*[=.]}
    else
        compset -P '*='
        _files
    fi
}
if [[ $funcstack[1] == _align ]]; then _align "$@"; else compdef _align align; fi
"""
_FISH = """\
complete -c align -a '(align complete (commandline -cp) 2>/dev/null)'
"""
_SCRIPTS = {"bash": _BASH, "zsh": _ZSH, "fish": _FISH}


def script(call: Call) -> int:
    """Print the script of a shell."""
    if len(call.words) != 1 or call.words[0] not in _SCRIPTS:
        raise ValueError(f"align completion {' '.join(call.words)}: say align completion bash, zsh or fish")
    show(_SCRIPTS[call.words[0]], end="")
    return 0


def run(call: Call) -> int:
    """Print what the last word of a line could be, one a line."""
    for candidate in candidates(" ".join(call.words)):
        show(candidate)
    return 0


def candidates(line: str) -> list[str]:
    """Words that begin with the last one of a line such as `align train rec`."""
    *before, last = line.split(" ")
    words = [word for word in before if word][1:]
    return sorted({word for word in _offered(words, last) if word.startswith(last)})


def _offered(words: Sequence[str], last: str) -> Iterable[str]:
    if not words:
        return [*(command.name.split()[0] for command in COMMANDS), "--help", "--version"]
    found = find(words)
    seconds = [command.name.split()[1] for command in below(words[0])] if len(words) == 1 else []
    if found is None:
        return seconds
    command, rest = found
    if last.startswith("-"):
        return ["--help", *(option.name for option in command.all_options())]
    if command.name == "completion":
        return _SCRIPTS
    return [*seconds, *_values(command, _config_dir(rest), last)]


def _config_dir(words: Sequence[str]) -> Path | None:
    at = words.index(CONFIG_DIR.name) + 1 if CONFIG_DIR.name in words else len(words)
    return Path(words[at]) if at < len(words) and Path(words[at]).is_dir() else None


def _values(command: Command, config_dir: Path | None, last: str) -> Iterable[str]:
    """Words `key=` and, of the options of a group and the recipes, whole words."""
    own = [f"{word.key.removesuffix('NAME')}{'' if word.key.endswith('NAME') else '='}" for word in command.arguments]
    if not command.settings:
        return own
    key, equals, _ = last.partition("=")
    if key == "recipe" and equals:
        return [f"recipe={name}" for name in recipes(config_dir)]
    if key == "data.form" and equals:
        from align.data.forms import FORMS

        return [f"data.form={name}" for name in FORMS]
    if equals:
        return [f"{key}={option}" for option in options(key, config_dir)] if key in groups() else []
    return [*own, *_shortened(_keys(config_dir), last), "recipe=", *(f"{group}=" for group in groups())]


def _keys(config_dir: Path | None) -> Iterable[str]:
    """Every setting of every option."""
    for root in [shipped_root() / "configs"] + ([config_dir] if config_dir else []):
        for path in root.rglob("*.yaml"):
            group = path.parent.relative_to(root).as_posix().replace("/", ".")
            if group.split(".")[0] != "recipes":
                yield from (key if group == "." else f"{group}.{key}" for key, _, _ in settings_of(path))


def _shortened(keys: Iterable[str], last: str) -> Iterable[str]:
    """Keys up to the next dot behind what is typed: `trainer.` before its twenty settings."""
    for key in keys:
        if key.startswith(last) and not key.rpartition(".")[2].startswith("_"):
            head, dot, _ = key[len(last) :].partition(".")
            yield f"{last}{head}{dot or '='}"
