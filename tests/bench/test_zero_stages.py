"""What the benchmark of engines reads from the system and makes of it. Starts no training."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

from tests.bench import zero_stages

# takes 64 MiB, gives them back, spends 0.3 s of CPU, and waits to be ended
GREEDY = """
import time
block = b"x" * (64 << 20)
del block
while time.process_time() < 0.3: pass
print("ready", flush=True)
input()
"""


def started(program: str, rank: str | None) -> subprocess.Popen[str]:
    """A Python process that has said a word."""
    env = {k: v for k, v in os.environ.items() if k != "RANK"} | ({"RANK": rank} if rank else {})
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    process = subprocess.Popen([sys.executable, "-c", program], env=env, **pipes)
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    return process


def test_peak_and_cpu_of_a_process_are_what_it_used():
    process = started(GREEDY, None)
    try:
        watch = zero_stages.Watch(process.pid, 1)
        watch.look(1, 5)
    finally:
        process.communicate("\n", timeout=10)
    (worker,) = watch.ranks()
    assert worker.cpu_s[1] >= 0.28  # user and system time, each cut off to a tick of 10 ms
    assert 64 < worker.peak_mib["steps"] < 200  # the interpreter itself has about 10


def test_the_peak_of_a_part_is_not_that_of_the_part_before():
    process = started(GREEDY, None)
    try:
        watch = zero_stages.Watch(process.pid, 1)
        for done in (0, 1, 1, 5):
            watch.look(done, 5)
    finally:
        process.communicate("\n", timeout=10)
    (worker,) = watch.ranks()
    assert worker.peak_mib["start"] > worker.peak_mib["steps"] + 50  # it had its block before


def test_of_a_launchers_children_those_with_a_rank_count():
    # this process is the launcher: it has a child without a rank as well
    children = [started(GREEDY, "0"), started("print('ready', flush=True)\ninput()", "1"), started(GREEDY, None)]
    try:
        watch = zero_stages.Watch(os.getpid(), 2)
        watch.look(0, 5)
    finally:
        for child in children:
            child.communicate("\n", timeout=10)
    first, second = watch.ranks()
    assert first.rank == 0
    assert second.rank == 1
    assert first.peak_mib["start"] > second.peak_mib["start"] + 50


def test_a_rank_that_never_came_is_named():
    with pytest.raises(RuntimeError, match="RANK=0"):
        zero_stages.Watch(os.getpid(), 2).ranks()


def test_cpu_of_a_step_leaves_out_the_first():
    # 5 s up to the first step, 2 s for each of the next three; what follows the last, at 5, is not a step's
    worker = zero_stages.Worker(0, cpu_s={0: 3.0, 1: 5.0, 2: 7.0, 4: 11.0, 5: 30.0})
    assert zero_stages._cpu_of_step(worker, 4) == 2.0


def one(cpu: list[float], wall: float, peak: list[float], loss: float) -> dict:
    """A run of one step."""
    return {
        "cpu_s": cpu, "wall_s": wall, "peak_mib": [{"start": p + 20, "steps": p, "end": p + 10} for p in peak],
        "loss": [loss], "gradient_norm": [2.0], "tokens": 100.0,
    }  # fmt: skip


def test_figures_are_medians_of_rounds_and_ratios_are_formed_within_a_round():
    figures = {
        "weights": 2**20,
        "base_mib": {"local": 100.0, "zero2": 110.0},
        "runs": {
            "local": [one([4.0], 4.0, [200.0], 0.5), one([8.0], 8.0, [204.0], 0.5), one([4.0], 4.0, [202.0], 0.5)],
            "zero2": [
                one([2.0, 3.0], 2.5, [150.0, 140.0], 0.5),
                one([6.0, 6.0], 6.0, [150.0, 160.0], 0.5 * (1 + 1e-6)),
                one([3.0, 3.0], 3.0, [150.0, 140.0], 0.5),
            ],
        },
    }
    got = zero_stages.summary(figures)["zero2"]
    # sums 5, 12, 6; ratios 1.25, 1.5, 1.5; wall 0.625, 0.75, 0.75; larger process 150, 160, 150
    assert got["cpu_s"] == 6.0
    assert got["cpu_ratio"] == 1.5
    assert got["wall_ratio"] == 0.75
    assert (got["start_mib"], got["steps_mib"], got["end_mib"]) == (170.0, 150.0, 160.0)
    assert got["loss_apart"] == pytest.approx(1e-6)
    # 150 - 110 MiB above the base over 2^20 weights
    assert "| 40 " in zero_stages.memory_table(figures)


def test_the_document_is_that_of_the_figures_beside_it():
    figures = json.loads(zero_stages.FIGURES.read_text())
    assert zero_stages.DOCUMENT.read_text() == zero_stages.document(figures)


def test_engines_that_do_other_work_are_not_compared():
    runs = {"local": one([1.0], 1.0, [1.0], 0.5), "zero1": one([1.0], 1.0, [1.0], 0.5002)}
    with pytest.raises(ValueError, match="engine=zero1: loss of step 1 is 0.5002, local's 0.5"):
        zero_stages.check(runs)
    zero_stages.check({"local": runs["local"], "zero1": one([1.0], 1.0, [1.0], 0.50001)})


def test_the_model_is_of_the_size_that_the_document_says(tmp_path):
    # 256 bytes and 3 marks; 8 layers of 2 * 512^2 + 2 * 512 * 256 + 3 * 512 * 1408 + 2 * 512 = 2950144 weights
    weights = zero_stages.write_model(tmp_path / "model")
    assert weights == 8 * 2_950_144 + 512 + 259 * 512
    zero_stages.write_pairs(tmp_path / "pairs.jsonl", 3)
    lines = (tmp_path / "pairs.jsonl").read_text()
    zero_stages.write_pairs(tmp_path / "again.jsonl", 3)
    assert lines == (tmp_path / "again.jsonl").read_text()
    assert len(lines.splitlines()) == 3
