"""The pages of help, made from the table of commands."""

from __future__ import annotations

from collections.abc import Sequence

from align.cli.table import COMMANDS, Command, below

_HEAD = "align: align language models to human preferences\n"
_TAIL = """
  --version, --help; `align COMMAND --help` says more of one

Settings are written key=value, options of a group group=option, as in Hydra: docs/command_line.md.
`align check --keys` lists them. model=PATH_OR_NAME stands for model=hub model.path=PATH_OR_NAME.

Examples
  align train recipe=wpo
  align train recipe=dpo data.train=pairs.jsonl model=hub model.path=Qwen/Qwen2.5-0.5B-Instruct
  align data check data.train=pairs.jsonl model=Qwen/Qwen2.5-0.5B-Instruct --html pairs.html

Exit codes: 0 done, 1 failed or data with errors, 2 wrong settings or data, 85 stopped by SIGTERM or SIGUSR1 with
everything saved, 130 stopped by SIGINT with everything saved.
"""
_EXITS = "0 done, 1 failed, 2 wrong settings or data"


def overview() -> str:
    """`align --help`"""
    return "\n".join([_HEAD, *_listed(COMMANDS), _TAIL])


def group(first: str, commands: Sequence[Command]) -> str:
    """`align data --help`: the commands that begin with a word."""
    more = f"\n  `align {commands[0].name} --help` says more of one\n"
    return "\n".join([f"align {first}: one of\n", *_listed(commands), more])


def page(command: Command) -> str:
    """`align COMMAND --help`"""
    out = [f"align {command.name} {command.usage}".rstrip(), "", f"  {command.text}", ""]
    if command.arguments:
        out += ["Words", *_table([(f"{w.key}={w.value}", w.text) for w in command.arguments]), ""]
    if command.settings:
        out += ["Settings", "  key=value and group=option: `align check --keys`, docs/command_line.md", ""]
    if command.all_options():
        out += ["Options", *_table([(f"{o.name} {o.value}", o.text) for o in command.all_options()]), ""]
    out += [command.notes] if command.notes else []
    if below(command.name):
        out += ["Beside it", *_listed(below(command.name)), ""]
    out += ["Examples", *(f"  {line}" for line in command.examples), ""]
    out += ["Exit codes", f"  {command.exits or _EXITS}", ""]
    return "\n".join(out)


def _listed(commands: Sequence[Command]) -> list[str]:
    out = []
    for command in commands:
        usage = f"  align {command.name} {command.usage}".rstrip()
        if len(usage) < 44:
            out.append(f"{usage:44s} {command.text}")
        else:
            out += [usage, f"{'':44s} {command.text}"]
    return out


def _table(rows: Sequence[tuple[str, str]]) -> list[str]:
    width = max(len(head) for head, _ in rows)
    return [f"  {head:{width}s}  {text}".rstrip() for head, text in rows]
