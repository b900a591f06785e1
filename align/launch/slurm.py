"""Runs as jobs of Slurm: a template of launch/ filled in, and sbatch.

Values meet three readers: sbatch's own lines take only what cannot be misread, the shell gets every word quoted, and
lines of shell (launch.setup) are the user's.
"""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from align.config import Config, ConfigError, SlurmConfig, WarmConfig, compose, shipped_root
from align.launch.place import VARIABLES, check_engine
from align.launch.sweep import Element

_PLACEHOLDER = re.compile(r"(?:# )?__([A-Z]+(?:_[A-Z]+)*)__")
_NAME = re.compile(r"[A-Za-z0-9._-]+")
_PLAIN = re.compile(r"[A-Za-z0-9._,:@+/=-]+")
_TIME = re.compile(r"(?:(\d+)-)?(\d+)(?::(\d+))?(?::(\d+))?")
# Options of sbatch that the template or a setting decides; what they are said with here.
_OURS = {
    "--job-name": "launch.name", "-J": "launch.name", "--nodes": "launch.nodes", "-N": "launch.nodes",
    "--time": "launch.time", "-t": "launch.time", "--partition": "launch.partition", "-p": "launch.partition",
    "--account": "launch.account", "-A": "launch.account", "--cpus-per-task": "launch.cpus", "-c": "launch.cpus",
    "--gpus-per-node": "launch.gpus", "--signal": "launch.save_before_s", "--array": "-m", "-a": "-m",
    "--output": "launch.log_dir", "-o": "launch.log_dir", "--ntasks": "launch.processes", "-n": "launch.processes",
    "--ntasks-per-node": "launch.processes", "--requeue": "launch.max_restarts", "--no-requeue": "launch.max_restarts",
    "--open-mode": "launch.log_dir", "--chdir": "launch.setup", "-D": "launch.setup",
}  # fmt: skip


@dataclass(frozen=True)
class Job:
    """What one call of sbatch submits: one run, or several as an array."""

    name: str  # of its files: job, or a part of WARM
    runs: tuple[tuple[str, ...], ...]  # words of each
    array: bool


def submit(found: Sequence[Element], config_dir: Path | None, dry: bool, show: Callable[[str], None]) -> int:
    """Submit the runs, or with `dry` show what would be; returns the exit code. Raises ConfigError if it cannot be."""
    settings = found[0].config.launch
    assert isinstance(settings, SlurmConfig)
    for element in found:  # errors are told here, not in a log after hours in a queue
        check(element.config)
    jobs = _jobs(found)
    if settings.server_nodes and any(job.array for job in jobs):
        raise ConfigError(
            f"launch.server_nodes={settings.server_nodes} is for one run; name servers of another job as rollout.urls"
        )
    lines = [[_command(settings, _node_words(settings, run), config_dir) for run in job.runs] for job in jobs]
    compose(_node_words(settings, found[0].words), config_dir)
    directory = _directory(settings)
    scripts = [render(settings, job, own, directory) for job, own in zip(jobs, lines, strict=True)]
    if dry:
        for job, own, script in zip(jobs, lines, scripts, strict=True):
            if len(jobs) > 1:
                show(f"# ---- {job.name}.sbatch" + ("" if job is jobs[0] else ", when the one before has succeeded"))
            show(script.rstrip("\n"))
            if job.array:
                show(f"# ---- {job.name}.commands, one line for each element")
                show("\n".join(own))
        return 0
    try:
        directory.mkdir(parents=True)
    except OSError as error:
        raise ConfigError(
            f"launch.log_dir={settings.log_dir}: cannot be made ({error.strerror}); give another"
        ) from None
    before: list[str] = []
    for job, own, script in zip(jobs, lines, scripts, strict=True):
        (directory / f"{job.name}.sbatch").write_text(script)
        if job.array:
            (directory / f"{job.name}.commands").write_text("\n".join(own) + "\n")
        number = _sbatch(directory, f"{job.name}.sbatch", before)
        before.append(number)
        log = directory / (f"{job.name}-{number}_*.log" if job.array else f"{job.name}-{number}.log")
        what = f"array of {len(job.runs)} runs" if job.array else "job"
        show(f"submitted {what} {number} ({settings.name}{'' if len(jobs) == 1 else ', ' + job.name}); log {log}")
    return 0


def render(settings: SlurmConfig, job: Job, commands: Sequence[str], directory: Path) -> str:
    """The script of a job. Raises ConfigError for a template that is not there or asks for what nobody knows."""
    where, text = _template(settings.template)
    command = commands[0]
    if job.array:
        chosen = f'sed -n "$((SLURM_ARRAY_TASK_ID + 1))p" {_shell(str(directory / f"{job.name}.commands"))}'
        command = f'bash -c "exec $({chosen})"'
    served = ['"rollout.urls=[$urls]"'] if settings.server_nodes else []
    values = {
        "OPTIONS": "\n".join(f"#SBATCH {option}" for option in _options(settings, job)),
        "DIRECTORY": _shell(str(Path.cwd())),
        "SETUP": "\n".join(settings.setup),
        "PORT": _port(settings),
        "SERVERS": _servers(settings),
        "PREFLIGHT": _preflight(settings, directory),
        "COMMAND": " ".join([*_step(settings), command, *served]),
        "MAX_RESTARTS": str(settings.max_restarts),
    }

    def fill(match: re.Match[str]) -> str:
        if match[1] not in values:
            raise ConfigError(f"{where}: __{match[1]}__ is not known; known are {', '.join(sorted(values))}")
        return values[match[1]]

    return _PLACEHOLDER.sub(fill, text)  # at once: what is filled in is not looked at again


def processes(settings: SlurmConfig) -> int:
    """Processes of each node."""
    return settings.processes or max(1, settings.gpus)


def seconds(text: str) -> int:
    """Slurm's notation of a time: M, M:S, H:M:S, D-H, D-H:M, D-H:M:S. Raises ConfigError for another."""
    match = _TIME.fullmatch(text)
    if match is None:
        raise ConfigError(f"launch.time={text}: must be minutes, HH:MM:SS or D-HH:MM:SS")
    days, *rest = match.groups()
    numbers = [int(n) for n in rest if n is not None]
    if days is not None:
        hours, minutes, secs = (*numbers, 0, 0)[:3]
        return ((int(days) * 24 + hours) * 60 + minutes) * 60 + secs
    if len(numbers) == 3:
        return (numbers[0] * 60 + numbers[1]) * 60 + numbers[2]
    return numbers[0] * 60 + (numbers[1] if len(numbers) == 2 else 0)


def check(config: Config) -> None:
    """Raises ConfigError for settings of launch=slurm that cannot be."""
    s = config.launch
    assert isinstance(s, SlurmConfig)
    if not _NAME.fullmatch(s.name):
        raise ConfigError(f"launch.name={s.name!r}: letters, digits and . _ - only")
    for key in ("partition", "account"):
        value = getattr(s, key)
        if value is not None and not _PLAIN.fullmatch(value):
            raise ConfigError(f"launch.{key}={value!r}: letters, digits and . _ , : @ + / = - only")
    if seconds(s.time) <= s.save_before_s:
        raise ConfigError(
            f"launch.time={s.time} is no longer than launch.save_before_s={s.save_before_s}: the run would be asked to "
            "stop before it begins"
        )
    if s.server_nodes and config.choices.get("rollout") != "vllm_server":
        raise ConfigError(f"launch.server_nodes={s.server_nodes} has no effect without rollout=vllm_server")
    if s.server_args and not s.server_nodes:
        raise ConfigError("launch.server_args has no effect without launch.server_nodes")
    if s.server_nodes and "--model" not in s.server_args:
        raise ConfigError("launch.server_args: say which model is served, as [--model,DIR]")
    for word in s.server_args:
        if word.partition("=")[0] in ("--host", "--port"):
            raise ConfigError(f"launch.server_args: {word} is set here; use launch.server_port")
    for option in s.options:
        name = option.split("=")[0].split()[0] if option.strip() else ""
        if not name.startswith("-") or not option.isprintable() or "'" in option:
            raise ConfigError(f"launch.options={option!r}: each is one option of sbatch, such as --mem=64G, without '")
        if name in _OURS:
            raise ConfigError(f"launch.options={option!r}: the template sets {name}; its setting is {_OURS[name]}")
    check_engine(config, processes(s), s.nodes)


def _jobs(found: Sequence[Element]) -> list[Job]:
    """One job, one array for a sweep, or for WARM the head, an array of its members, and the average."""
    trainer = found[0].config.trainer
    if len(found) > 1:
        return [Job("sweep", tuple(element.words for element in found), True)]
    words = found[0].words
    if not isinstance(trainer, WarmConfig) or trainer.only is not None:
        return [Job("job", (words,), False)]
    words = tuple(w for w in words if w.partition("=")[0] != "trainer.only")
    head = [Job("head", ((*words, "trainer.only=0"),), False)] if trainer.probe_steps else []
    members = tuple((*words, f"trainer.only={number}") for number in range(1, trainer.members + 1))
    return [*head, Job("members", members, True), Job("average", (words,), False)]


def _node_words(settings: SlurmConfig, words: Sequence[str]) -> list[str]:
    """What each node's launcher is told: the same settings with launch=local."""

    def ours(word: str) -> bool:
        key = word.lstrip("+").partition("=")[0]
        return key == "launch" or key.startswith("launch.")

    threads = [] if settings.threads is None else [f"launch.threads={settings.threads}"]
    own = ["launch=local", f"launch.processes={processes(settings)}", *threads]
    return [*(w for w in words if not ours(w)), *own]


def _python(settings: SlurmConfig) -> list[str]:
    if settings.venv is not None:
        return [*settings.container, str(Path(settings.venv).absolute() / "bin" / "python")]
    return [*settings.container, "python" if settings.container else sys.executable]


def _command(settings: SlurmConfig, words: Sequence[str], config_dir: Path | None) -> str:
    own = ["--config-dir", str(config_dir.absolute())] if config_dir else []
    return " ".join(map(_shell, [*_python(settings), "-m", "align.cli", "train", *words, *own]))


def _preflight(settings: SlurmConfig, directory: Path) -> str:
    if settings.nodes == 1 or not settings.preflight:
        return ""
    check = " ".join(map(_shell, [*_python(settings), "-m", "align.cli", "launch", "check", f"dir={directory}"]))
    options = " ".join(["--kill-on-bad-exit=0", *_step(settings)])
    return f"srun {options} {check} || return"


def _port(settings: SlurmConfig) -> str:
    """Where the nodes meet. Nothing for one node: its launcher takes a port that is free."""
    if settings.port is not None:
        return str(settings.port)
    return "" if settings.nodes == 1 else "$((12000 + SLURM_JOB_ID % 20000))"


def _step(settings: SlurmConfig) -> list[str]:
    """Options of srun for the nodes that train."""
    own = [f"--nodes={settings.nodes}", f"--ntasks={settings.nodes}", "--relative=0"] if settings.server_nodes else []
    return [*own, *map(_shell, settings.srun_options)]


def _servers(settings: SlurmConfig) -> str:
    """The last nodes serve, the others train; `urls` says where."""
    number, port = settings.server_nodes, settings.server_port
    if number == 0:
        return ""
    serve = [*_python(settings), "-m", "align.rollout.serve", "--host", "0.0.0.0", "--port", str(port)]
    command = " ".join([*map(_shell, settings.srun_options), *map(_shell, [*serve, *settings.server_args])])
    place = f"--overlap --nodes={number} --ntasks={number} --relative={settings.nodes} --kill-on-bad-exit=0"
    return f"""\
# The last {number} of the nodes serve completions until the run ends.
ALIGN_NODES={settings.nodes}
urls=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | tail -n {number} | sed 's|.*|http://&:{port}|' | paste -sd , -)
srun {place} --cpus-per-task="$SLURM_CPUS_PER_TASK" {command} &
servers=$!
trap 'kill "$servers" 2>/dev/null' EXIT"""


def _options(settings: SlurmConfig, job: Job) -> list[str]:
    out = [f"--job-name={settings.name}", f"--nodes={settings.nodes + settings.server_nodes}"]
    out += [f"--cpus-per-task={settings.cpus * processes(settings)}", f"--time={settings.time}"]
    out += [f"--signal=USR1@{settings.save_before_s}"]
    # relative to the directory of the submission: no path has to pass sbatch's reader
    out += [f"--output={job.name}-{'%A_%a' if job.array else '%j'}.log"]
    if settings.gpus:
        out.append(f"--gpus-per-node={settings.gpus}")
    if settings.partition is not None:
        out.append(f"--partition={settings.partition}")
    if settings.account is not None:
        out.append(f"--account={settings.account}")
    if job.array:
        limit = f"%{settings.array_limit}" if settings.array_limit else ""
        out.append(f"--array=0-{len(job.runs) - 1}{limit}")
    return out + [option if _PLAIN.fullmatch(option) else f"'{option}'" for option in settings.options]


def _template(name: str) -> tuple[Path, str]:
    root = shipped_root() / "launch"
    own = Path(name)
    path = own if own.suffix or "/" in name else root / f"{name}.sbatch"
    try:
        return path, path.read_text()
    except (OSError, UnicodeDecodeError) as error:
        shipped = ", ".join(sorted(p.stem for p in root.glob("*.sbatch")))
        why = error.strerror if isinstance(error, OSError) else "no text"
        raise ConfigError(f"launch.template={name}: {why}; shipped are: {shipped}, or give a file") from None


def _directory(settings: SlurmConfig) -> Path:
    """A new directory for what is submitted; nothing is made yet."""
    base = Path(settings.log_dir).absolute() / f"{time.strftime('%Y%m%d-%H%M%S')}-{settings.name}"
    found, number = base, 1
    while found.exists():
        number += 1
        found = base.with_name(f"{base.name}-{number}")
    return found


def _sbatch(directory: Path, script: str, before: Sequence[str]) -> str:
    """Submit a script of the directory, after the last of those before it; returns the job's number."""
    after = [f"--dependency=afterok:{before[-1]}", "--kill-on-invalid-dep=yes"] if before else []
    environment: Mapping[str, str] = {k: v for k, v in os.environ.items() if k not in VARIABLES}
    so_far = f" (submitted already: {', '.join(before)}; scancel ends them)" if before else ""
    try:
        done = subprocess.run(
            ["sbatch", "--parsable", *after, script], cwd=directory, env=environment, capture_output=True, text=True
        )
    except FileNotFoundError:
        raise ConfigError(
            "sbatch is not found: submit where Slurm is installed; --dry-run shows the script without it"
        ) from None
    if done.returncode != 0:
        raise ConfigError(f"sbatch refuses {directory / script}: {done.stderr.strip() or done.stdout.strip()}{so_far}")
    return done.stdout.strip().splitlines()[-1].split(";")[0]


def _shell(word: str) -> str:
    """A word that the shell takes as it is, on one line."""
    if any(ord(c) < 32 or ord(c) == 127 for c in word):
        escaped = "".join(f"\\x{ord(c):02x}" if ord(c) < 32 or ord(c) == 127 or c in "\\'" else c for c in word)
        return f"$'{escaped}'"
    return shlex.quote(word)
