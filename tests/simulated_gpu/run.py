"""python -m tests.simulated_gpu.run: each line of stdin, the words of align as JSON, is run on the pretended device; a
line of stdout tells the exit code, what was said and what was counted.

Phases: "step" from the first forward of a step to the read at its end, "read" that one, "evaluation" and "outside".
"""

from __future__ import annotations

import contextlib
import functools
import io
import json
import os
import sys
import traceback
from typing import Any

os.environ.setdefault("DS_ACCELERATOR", "cpu")

import torch

from tests.simulated_gpu import device


def watch() -> None:
    """Tell a step from what is beside it."""
    from align.trainers import loop

    def inside(function: Any, name: str) -> Any:
        @functools.wraps(function)
        def watched(*args, **keys):
            with device.phase(name):
                return function(*args, **keys)

        return watched

    totals: Any = loop._Totals
    totals.read = inside(totals.read, "read")
    loop.train_step = inside(loop.train_step, "step")
    loop.evaluate = inside(loop.evaluate, "evaluation")
    to_device = loop.to_device

    @functools.wraps(to_device)
    def counted(*args, **keys):
        device.OPERATIONS[device._phase[0], "to_device"] += 1
        return to_device(*args, **keys)

    loop.to_device = counted


COUNTERS = {"operations": device.OPERATIONS, "reads": device.READS, "copies": device.COPIES, "mixed": device.MIXED}


def answer(words: list[str]) -> dict[str, Any]:
    """One run of align."""
    from align.cli import main as align

    for counter in COUNTERS.values():
        counter.clear()
    said = io.StringIO()
    with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
        try:
            code = align(words)
        except SystemExit as ended:
            code = ended.code if isinstance(ended.code, int) else 1
        except Exception:
            code = 1
            traceback.print_exc()
    found = {name: [[*key, number] for key, number in counter.items()] for name, counter in COUNTERS.items()}
    return {"code": code, "said": said.getvalue(), **found}


def main() -> None:
    """Until stdin ends."""
    torch.set_num_threads(1)
    out = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what libraries print is no answer
    device.install()
    watch()
    for line in sys.stdin:
        print(json.dumps(answer(json.loads(line))), file=out, flush=True)


if __name__ == "__main__":
    main()
