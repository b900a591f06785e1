"""Runs `align` many times, each in a process of its own that may be made to die or be signalled at a chosen moment.

python -m tests.killer is a server: it imports everything and composes settings once, reads one JSON request a line
from stdin, forks a child that runs align.cli.main on its words, and answers with one JSON line. Nothing of align is
replaced: a hook counts the calls of a function and sends the signal before or after the n-th.
"""

from __future__ import annotations

import atexit
import contextlib
import functools
import gc
import importlib
import json
import os
import resource
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import warnings
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from safetensors import safe_open

from align.tools import Observation


@dataclass(frozen=True)
class Hook:
    """Send `number` to the own process at the n-th call of `target` (module:attribute.attribute)."""

    target: str
    n: int
    number: int = signal.SIGKILL
    when: str = "before"  # or after
    rank: int | None = None  # of the process it holds for; None: every one


@dataclass(frozen=True)
class Ended:
    """How a child ended: its exit code, or minus the signal that killed it; and all it said.

    Of several processes: the lead's code, what all said, and every code by rank.
    """

    code: int
    said: str
    seconds: float
    codes: tuple[int, ...] = ()


class Killer:
    """The client's side of the server."""

    def __init__(self) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-m", "tests.killer"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=os.environ | {"OMP_NUM_THREADS": "1"},
        )

    def run(
        self,
        words: Sequence[str],
        hooks: Sequence[Hook] = (),
        after_seconds: float | None = None,
        file_limit: int | None = None,
        processes: int = 1,
        directory: Path | None = None,
    ) -> Ended:
        """`align <words>`. after_seconds: SIGKILL from outside; file_limit: no file may grow beyond these bytes;
        processes: of the run, started as a launcher would; directory: to stand in, this one without."""
        request = {
            "words": list(words),
            "hooks": [asdict(h) for h in hooks],
            "after": after_seconds,
            "file_limit": file_limit,
            "processes": processes,
            "directory": str(directory or ""),
        }
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write(json.dumps(request) + "\n")
        self.process.stdin.flush()
        told = json.loads(self.process.stdout.readline())
        return Ended(**told | {"codes": tuple(told["codes"])})

    def close(self) -> None:
        """End the server."""
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait(30)


@functools.cache
def shared() -> Killer:
    """One server per test process: the imports cost seconds, a run tenths of one."""
    killer = Killer()
    atexit.register(killer.close)
    return killer


def settings(directory: Path, *more: str) -> list[str]:
    """The words of a 30-step WPO run on random rows below `directory`; the last word for a key wins, key= unsets."""
    train, heldout = directory / "train.jsonl", directory / "heldout.jsonl"
    if not train.exists():
        rows_file(train, 0, 70)  # more than one chunk of the reference cache, no multiple of the batch
        rows_file(heldout, 1, 6)
    words = {
        "recipe": "wpo", "model": "tiny", "model.hidden_size": 16, "model.num_layers": 1,
        "data.train": train, "data.heldout": heldout, "seed": 0, "optimizer.lr": 1e-3, "lora.dropout": 0.1,
        "trainer.max_steps": 30, "trainer.batch_size": 8, "trainer.micro_batch_tokens": 1024, "trainer.save_every": 3,
        "trainer.eval_every": 5, "trainer.num_samples": 0, "trainer.precision": "float32", "log.tensorboard": "false",
        "reference.cache_dir": directory / "cache",
    } | dict(word.split("=", 1) for word in more)  # fmt: skip
    return ["train", *(f"{key}={value}" for key, value in words.items() if value != "")]


def evidence(run: Path) -> dict[str, Any]:
    """What must be bit-equal between a run that was killed and one that was not."""
    last = max((run / "checkpoints").glob("step-*"))
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    out: dict[str, Any] = {
        "last": last.name,
        "steps": [row["step"] for row in rows],
        "rows": [{k: v for k, v in row.items() if not k.startswith("time/")} for row in rows],
    }
    summary = run / "summary.json"
    if summary.exists():
        out["summary"] = {k: v for k, v in json.loads(summary.read_text()).items() if k != "seconds"}
    for path in sorted([*run.glob("*.jsonl"), *run.glob("collect/*")]):
        if path.name != "metrics.jsonl":  # it tells times too
            out[path.relative_to(run).as_posix()] = path.read_bytes()
    for path in [*sorted(last.glob("*.safetensors")), *sorted((run / "final").glob("*.safetensors"))]:
        with safe_open(path, "np") as file:
            out[path.name if path.parent == last else f"final/{path.name}"] = {
                k: file.get_tensor(k).tobytes() for k in sorted(file.keys())
            }
    return out


class Parrot:
    """A tool for a policy that knows nothing: an emission whose last character is an odd digit calls it."""

    name = "parrot"

    def __init__(self, **_: Any) -> None:
        """Takes the settings of the tool whose place it takes."""

    def find(self, text: str) -> str | None:
        """The digit."""
        return text[-1:] if text[-1:] in tuple("13579") else None

    def run(self, call: str) -> Observation:
        """The digit again; a call of 1 fails."""
        return Observation(call, call == "1")


def leftovers(run: Path) -> list[str]:
    """Names of unfinished files and directories."""
    return [p.name for p in run.rglob(".*") if p.name != ".lock"]


def _install(hook: Hook) -> None:
    module, _, dotted = hook.target.partition(":")
    *path, name = dotted.split(".")
    owner: Any = importlib.import_module(module)
    for part in path:
        owner = getattr(owner, part)
    inner = getattr(owner, name)
    calls = 0

    def counted(*args: Any, **kwargs: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == hook.n and hook.when == "before":
            os.kill(os.getpid(), hook.number)
        out = inner(*args, **kwargs)
        if calls == hook.n and hook.when == "after":
            os.kill(os.getpid(), hook.number)
        return out

    setattr(owner, name, counted)


def _child(request: dict[str, Any], said: int, rank: int, port: int) -> int:
    from align.cli import main

    if port:
        names = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": request["processes"], "MASTER_PORT": port}
        os.environ.update({key: str(value) for key, value in names.items()})
        os.environ.update(MASTER_ADDR="127.0.0.1", GLOO_SOCKET_IFNAME="lo")

    null = os.open(os.devnull, os.O_RDWR)
    os.dup2(null, 0)
    os.dup2(said, 1)
    os.dup2(said, 2)
    if request["file_limit"] is not None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (request["file_limit"], resource.RLIM_INFINITY))
    if request["directory"]:
        os.environ["PYTHONPATH"] = os.getcwd()  # for the processes of rewards
        os.chdir(request["directory"])
    for hook in request["hooks"]:
        if hook["rank"] in (None, rank):
            _install(Hook(**hook))
    return main(request["words"])


def _serve() -> None:
    import time
    import traceback

    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what packages print is no answer

    import transformers.models.llama.modeling_llama  # noqa: F401
    from peft import LoraConfig, get_peft_model  # noqa: F401

    import align.trainers.iterate
    import align.trainers.online  # noqa: F401
    from align.config import compose

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import deepspeed  # noqa: F401

        with contextlib.suppress(ImportError):
            import reasoning_gym  # noqa: F401
    compose(["recipe=wpo"])  # Hydra reads its plugins, and each recipe is parsed, here and not in every child
    _adapted()

    gc.collect()
    gc.freeze()  # no child looks through all that was imported
    for line in sys.stdin:
        request = json.loads(line)
        if request["processes"] > 1:
            import deepspeed.runtime.zero.muon.muon_optimizer  # noqa: F401  its engine does, with torch's compiler: a second
        start = time.monotonic()
        port = _free_port() if request["processes"] > 1 else 0
        with tempfile.TemporaryFile("a+b") as said:
            pids = []
            for rank in range(request["processes"]):
                pid = os.fork()
                if pid == 0:
                    code = 1
                    try:
                        code = _child(request, said.fileno(), rank, port)
                    except SystemExit as error:
                        code = error.code if isinstance(error.code, int) else 1
                    except BaseException:
                        traceback.print_exc()
                    sys.stdout.flush()
                    sys.stderr.flush()
                    os._exit(code)
                pids.append(pid)
            timer = None
            if request["after"] is not None:
                timer = threading.Timer(request["after"], os.kill, (pids[0], signal.SIGKILL))
                timer.start()
            # not reaped before the timer is off: its number cannot belong to another process
            os.waitid(os.P_PID, pids[0], os.WEXITED | os.WNOWAIT)
            if timer is not None:
                timer.cancel()
                timer.join()
            codes = [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in pids]
            said.seek(0)
            text = said.read().decode(errors="replace")
        ended = Ended(codes[0], text, time.monotonic() - start, tuple(codes))
        print(json.dumps(asdict(ended)), file=answers, flush=True)


def _adapted() -> None:
    """A network with adapters: the tables and expressions that transformers and PEFT make once in a process."""
    from align.models.policy import lora
    from align.models.pretrained import tiny

    lora(tiny(0, 16, 1).model(), rank=1, alpha=1.0, dropout=0.0, targets="all-linear", seed=0)


def _free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


def rows_file(path: Path, seed: int, count: int, kind: str = "pair") -> Path:
    """A small file of nonsense words: pairs, labelled or single rows."""
    import random

    words = ["rain", "snow", "tree", "dog", "fish", "bird", "run", "jump", "red", "blue", "moon", "star"]
    generator = random.Random(seed)

    def text() -> str:
        return " ".join(generator.choices(words, k=generator.randint(2, 6)))

    def turn(role: str, content: str) -> list[dict[str, str]]:
        return [{"role": role, "content": content}]

    def row(i: int) -> dict[str, Any]:
        prompt = turn("user", f"question {i} {text()}")
        good, bad = turn("assistant", f"{text()} good"), turn("assistant", f"{text()} bad")
        if kind == "pair":
            return {"prompt": prompt, "chosen": good, "rejected": bad}
        if kind == "labelled":
            return {"prompt": prompt, "completion": bad if i % 3 else good, "label": i % 3 == 0}
        return {"messages": prompt + good}

    path.write_text("".join(json.dumps(row(i)) + "\n" for i in range(count)))
    return path


if __name__ == "__main__":
    _serve()
