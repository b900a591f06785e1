"""What the launcher's tests start: processes that do one thing.

python -m tests.launch.parts MODE DIR               one process of a run
python -m tests.launch.parts launch N MODE DIR      N of them, by align.launch.local
"""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from pathlib import Path

from align.launch.local import DeferredSignals, launch
from align.launch.place import CODES, VARIABLES, Place
from align.launch.worker import run

_PATIENCE_S = 60.0


class PeerLost(RuntimeError):
    """What align.engine.world raises, by its name."""


def appears(path: Path) -> None:
    """Wait for a file."""
    end = time.monotonic() + _PATIENCE_S
    while not path.exists():
        if time.monotonic() > end:
            raise TimeoutError(path)
        time.sleep(0.02)


def work(mode: str, out: Path) -> int:
    """One process; rank 1 is the one with the trouble."""
    rank = int(os.environ["RANK"])
    told = {k: os.environ.get(k) for k in (*VARIABLES, "OMP_NUM_THREADS", "ALIGN_NODES")} | {"pid": os.getpid()}
    (out / f"{rank}.tmp").write_text(json.dumps(told))
    (out / f"{rank}.tmp").rename(out / f"{rank}.json")
    print(f"rank {rank} speaks", flush=True)
    if mode == "report":
        return 0
    if mode in ("raise", "lost", "code"):
        if rank == 1:
            if mode == "code":
                print("align: the row is wrong", file=sys.stderr)
                return 2
            appears(out / "0.json")
            raise LookupError("the cause")
        if mode == "lost":  # notices it as a process does whose connection is closed
            process = Path(f"/proc/{json.loads((out / '1.json').read_text())['pid']}/stat") if _up(out, 1) else None
            while process is not None and process.exists() and process.read_text().split()[2] != "Z":
                time.sleep(0.001)
            raise PeerLost("at gather: another process of the run died or did not come")
        appears(out / "never")
    if mode == "kill" and rank == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    if mode == "listen":
        heard: list[int] = []
        appears(out / "listen")
        for number in CODES:
            signal.signal(number, lambda n, _: heard.append(n))
        (out / f"{rank}.listens").touch()
        end = time.monotonic() + _PATIENCE_S
        while not heard and time.monotonic() < end:
            time.sleep(0.02)
        (out / f"{rank}.heard").write_text(json.dumps(heard))
        return CODES[signal.Signals(heard[0])]
    appears(out / "never")
    return 0


def _up(out: Path, rank: int) -> bool:
    appears(out / f"{rank}.json")
    return True


def main(words: list[str]) -> int:
    """A process, or those of a launcher."""
    if words[0] == "launch":
        with DeferredSignals() as held:
            where = Place(1, 0, "127.0.0.1", None)
            tell = lambda text: print(f"align: {text}", file=sys.stderr, flush=True)  # noqa: E731
            return launch(words[2:], int(words[1]), where, None, held, tell, "tests.launch.parts")
    return run(lambda: work(words[0], Path(words[1])))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
