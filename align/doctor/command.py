"""`align doctor`: words to a report on one screen and an exit code. Heavy packages are imported in children only."""

from __future__ import annotations

import io
import json
import math
import shutil
import sys
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

from align import __version__
from align.doctor.findings import Check, Finding, run_checks
from align.doctor.machine import check_compiler, check_sandbox, check_threads
from align.doctor.peers import check_processes, check_vllm
from align.doctor.storage import (
    check_align_cache,
    check_extension_locks,
    check_hub_cache,
    check_run_directory,
    check_temporary,
)
from align.doctor.versions import check_versions, check_vllm_version, installed_vllm
from align.files import write_atomic

# Two checkpoints of SmolLM2-135M with its optimiser, the one being written, and final/; larger models need more.
_FREE_GIB = 6.0
_QUICK_SECONDS = 12.0  # for what takes milliseconds where nothing hangs
_PING_SECONDS = 20.0
_LAST_SECONDS = 27.0  # nothing is waited for after that


def run(words: list[str], json_file: str | None, say: Callable[[str], None]) -> int:
    """Look, tell, return the exit code: 1 if a run would fail here. Raises ValueError for words it does not know."""
    directory, free_gib = _words(words)
    start = time.monotonic()
    findings = run_checks(
        [
            Check("versions", check_versions, _QUICK_SECONDS),
            Check("processes", lambda: check_processes(_PING_SECONDS), _PING_SECONDS + 2),
            Check("vLLM", lambda: _vllm(start + _LAST_SECONDS - 1), _LAST_SECONDS),
            Check("threads", check_threads, _QUICK_SECONDS),
            Check("run directory", lambda: check_run_directory(directory, free_gib), _QUICK_SECONDS),
            Check("cache", lambda: check_align_cache(free_gib), _QUICK_SECONDS),
            Check("hub cache", lambda: check_hub_cache(free_gib), _QUICK_SECONDS),
            Check("temp", check_temporary, _QUICK_SECONDS),
            Check("extension locks", check_extension_locks, _QUICK_SECONDS),
            Check("compiler", check_compiler, _QUICK_SECONDS),
            Check("sandbox", check_sandbox, _QUICK_SECONDS),
        ]
    )
    code = 1 if any(finding.level == "blocker" for finding in findings) else 0
    seconds = time.monotonic() - start
    say(report(findings, shutil.get_terminal_size((120, 40)).columns, sys.stdout.isatty()))
    counts = {level: sum(finding.level == level for finding in findings) for level in ("blocker", "note")}
    say(f"blockers: {counts['blocker']}, notes: {counts['note']}, {seconds:.0f} s")
    if json_file is not None:
        result = {
            "align": __version__,
            "exit_code": code,
            "seconds": seconds,
            "findings": [asdict(f) for f in findings],
        }
        try:
            write_atomic(Path(json_file), json.dumps(result, indent=1) + "\n")
        except OSError as error:
            raise ValueError(f"--json {json_file}: cannot be written ({error.strerror}); give another") from error
        say(f"written {json_file}")
    return code


def _vllm(end: float) -> list[Finding]:
    """The version, then the import in the time that is left; an import is no use where the version is missing."""
    version = check_vllm_version()
    if installed_vllm() is None:
        return [version]
    imported = check_vllm(end - time.monotonic())
    if version.level == "ok":
        return [imported]
    return [version] if imported.level == "ok" else [version, imported]


def report(findings: list[Finding], width: int, colours: bool) -> str:
    """A line per finding, cures after an arrow; plain text where rich is missing."""
    try:
        from rich.console import Console
        from rich.table import Table
        from rich.text import Text
    except ImportError:
        return "\n".join(f"{f.level:7s}  {f.check:15s}  {_told(f)}" for f in findings)
    table = Table(box=None, padding=(0, 2, 0, 0), show_header=False)
    table.add_column(no_wrap=True)
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    styles = {"ok": "green", "note": "yellow", "blocker": "bold red"}
    for finding in findings:
        table.add_row(Text(finding.level, styles[finding.level]), finding.check, Text(_told(finding)))
    stream = io.StringIO()
    Console(file=stream, width=max(width, 60), force_terminal=colours, highlight=False).print(table)
    return "\n".join(line.rstrip() for line in stream.getvalue().splitlines())


def _told(finding: Finding) -> str:
    return f"{finding.text} -> {finding.cure}" if finding.cure else finding.text


def _words(words: list[str]) -> tuple[Path, float]:
    """The run directory and the least room wanted there, in GiB."""
    directory, free_gib = Path("runs"), _FREE_GIB
    for word in words:
        key, _, value = word.partition("=")
        if key == "run.dir" and value:
            directory = Path(value)
        elif key == "free_gib":
            try:
                free_gib = float(value)
            except ValueError:
                free_gib = math.nan
            if not 0 <= free_gib < math.inf:
                raise ValueError(f"free_gib={value}: must be a number of GiB, at least 0")
        else:
            raise ValueError(f"align doctor {word}: it takes run.dir=DIR, free_gib=N and --json FILE")
    return directory, free_gib
