"""Time and memory of averaging three models of SmolLM2's size: python -m tests.bench.average prints one line."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from tests.bench.measure import ENVIRONMENT, resident_mib, timed

_BYTES = 10**6


def checkpoints(directory: Path, count: int = 3) -> list[Path]:
    """SmolLM2-135M-Instruct, and copies with seeded noise of 1 % of each tensor's standard deviation."""
    import torch
    from safetensors.torch import load_file, save_file

    from align.config import cache_root
    from align.models.smollm2 import smollm2_directory

    source = smollm2_directory(cache_root())
    paths = []
    for seed in range(count):
        paths.append(shutil.copytree(source, directory / f"model-{seed}"))
        if seed:
            generator = torch.Generator().manual_seed(seed)
            tensors = load_file(source / "model.safetensors")
            for value in tensors.values():
                value += torch.randn(value.shape, generator=generator) * (0.01 * float(value.std()))
            save_file(tensors, paths[-1] / "model.safetensors", {"format": "pt"})
    return paths


def measured(words: list[str]) -> dict[str, float]:
    """`align average` in a process of its own: seconds of CPU and of the clock, and peak resident memory in MiB."""
    done = subprocess.run(
        [sys.executable, "-m", "tests.bench.average", *words],
        env=os.environ | ENVIRONMENT,
        capture_output=True,
        text=True,
        check=True,
    )
    return json.loads(done.stdout.splitlines()[-1])


def _child(words: list[str]) -> None:
    from align.averaging.command import run

    cpu, wall, _ = timed(lambda: run(words, lambda _: None))
    # not getrusage's maxrss: a child has that of its parent, whose memory it shared when it was started
    print(json.dumps({"cpu_s": cpu, "wall_s": wall, "peak_mib": resident_mib(peak=True)}))


def main() -> None:
    """Print the line."""
    with tempfile.TemporaryDirectory() as root:
        paths = checkpoints(Path(root))
        megabytes = sum((path / "model.safetensors").stat().st_size for path in paths) / _BYTES
        found = measured([*map(str, paths), f"out={root}/out"])
    print(
        f"align average, 3 x {megabytes / 3:.0f} MB float32: {found['cpu_s']:.1f} s CPU, {found['wall_s']:.1f} s, "
        f"peak RSS {found['peak_mib']:.0f} MiB, {megabytes / found['wall_s']:.0f} MB/s read"
    )


if __name__ == "__main__":
    if sys.argv[1:]:
        _child(sys.argv[1:])
    else:
        main()
