"""One process of a run: `align train` whose launcher wants to know why it fails.

python -m align.launch.worker WORDS
"""

from __future__ import annotations

import json
import os
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path


def run(work: Callable[[], int]) -> int:
    """The work's exit code; what it raises goes into the file $ALIGN_FAILURE, for the launcher to tell."""
    try:
        return work()
    except Exception as error:
        failure_report = {"elsewhere": elsewhere(error), "time": time.time(), "traceback": traceback.format_exc()}
        path = Path(os.environ["ALIGN_FAILURE"])
        scratch = path.with_suffix(".tmp")
        scratch.write_text(json.dumps(failure_report))
        scratch.replace(path)
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(1)  # threads of a broken process group would keep the interpreter


def elsewhere(error: Exception) -> bool:
    """Whether another process of the run is what failed: it is gone, or has told all of its error."""
    frames = traceback.extract_tb(error.__traceback__)
    handed_on = bool(frames) and frames[-1].name == "together" and frames[-1].filename.endswith("engine/world.py")
    return type(error).__name__ == "PeerLost" or handed_on


def main(words: Sequence[str]) -> int:
    """`align train` with these words."""
    from align.cli import main as align

    return run(lambda: align(["train", *words]))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
