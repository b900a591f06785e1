"""Rendered jobs on a real Slurm: warned, requeued, resumed; arrays, WARM, failures, several nodes."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from align.launch import place
from tests.killer import evidence, settings, shared
from tests.launch.cluster import FIRST, SECOND, Cluster, wait_for
from tests.variants import variant

ROOT = Path(__file__).parents[2]
pytestmark = [pytest.mark.slurm, pytest.mark.slow, pytest.mark.xdist_group("slurm")]


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("jobs")


def submit(slurm: Cluster, base: Path, words: list[str], *flags: str) -> list[tuple[str, Path]]:
    """`align train` with launch=slurm: number and log of each job."""
    own = ["launch=slurm", "launch.threads=1", f"launch.log_dir={base}/logs", 'launch.options=["--comment=a test"]']
    given = {word.partition("=")[0] for word in words}
    own = [word for word in own if word.partition("=")[0] not in given]
    environment = {k: v for k, v in slurm.environment.items() if k not in place.VARIABLES}
    command = [sys.executable, "-m", "align.cli", words[0], *flags, *words[1:], *own]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    found = re.findall(r"^submitted .*?(\d+) \(.*?\); log (.*)$", done.stdout, re.M)
    assert found, done.stdout
    return [(number, Path(log)) for number, log in found]


def text(log: Path) -> str:
    """What a job has said so far; of an array, each of its elements."""
    found = sorted(log.parent.glob(log.name))
    return "\n".join(path.read_text() for path in found) if found else f"{log} is not there"


def slow_start(base: Path, run: Path, *more: str) -> list[str]:
    words = settings(base, f"run.dir={run}", "trainer.max_steps=25", "trainer.eval_every=0", "launch.threads=1", *more)
    return [*words, *variant("objective", "wpo", "tests.launch.slow.SlowStart")]


def numbers(run: Path) -> tuple[list[dict], dict[str, bytes]]:
    """What the run measured at each step, but for times, and the weights that it ended with."""
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    weights = {p.name: p.read_bytes() for p in (run / "final").glob("*.safetensors")}
    assert weights
    return [{k: v for k, v in row.items() if not k.startswith("time/")} for row in rows], weights


def test_the_time_limit_saves_requeues_and_resumes_two_tasks(slurm, base):
    """Two nodes are checked, train as one run, and are warned by Slurm itself before their limit; the numbers are
    those of a run of two processes here that nobody stopped.

    The limit is shortened when training has begun, however long a busy machine took to start, and lengthened when the
    job is in the queue again. Slurm looks at limits twice a minute: 25 slow steps are not done by then.
    """
    run = base / "limited"
    own = ["launch.nodes=2", "launch.time=30", "launch.save_before_s=90"]
    ((number, log),) = submit(slurm, base, [*slow_start(base, run, "engine=zero0"), *own])
    assert wait_for(lambda: '"step": 1' in text(run / "metrics.jsonl"), 120), text(log)
    slurm.shorten(number)
    assert wait_for(lambda: slurm.job(number)["Restarts"] == "1", 60), text(log)
    slurm.say("scontrol", "update", f"JobId={number}", "TimeLimit=30")
    whole = slow_start(base, base / "whole", "engine=zero0", "launch.processes=2")
    done = subprocess.run(  # meanwhile
        [sys.executable, "-m", "align.cli", *whole], cwd=ROOT, capture_output=True, text=True, timeout=240
    )
    assert done.returncode == 0, done.stderr
    assert slurm.ended(number, 240) == "COMPLETED", text(log)
    said = text(log)
    assert f"check: 2 nodes fit together ({FIRST}, {SECOND}): gloo adds up" in said
    assert f"align: job {number}, start 1, on " in said
    assert "SIGUSR1 received; everything is saved" in said
    assert f"align: saved; job {number} goes on" in said
    assert f"align: job {number}, start 2, on " in said
    step = int(re.search(r"resumed .* at step (\d+)", said)[1])
    assert 0 < step < 25
    assert numbers(run) == numbers(base / "whole")


def test_an_array_has_a_run_for_each_element(slurm, base):
    words = settings(base, "optimizer.lr=1e-3,1e-4", f"run.dir={base}/sweep", "trainer.max_steps=2")
    ((number, log),) = submit(slurm, base, [*words, "launch.array_limit=1"], "-m")
    assert slurm.job(f"{number}_1")["ArrayTaskThrottle"] == "1"
    assert [slurm.ended(f"{number}_{i}", 120) for i in (0, 1)] == ["COMPLETED"] * 2, text(log)
    alone = base / "alone"
    assert shared().run(settings(base, "optimizer.lr=1e-4", f"run.dir={alone}", "trainer.max_steps=2")).code == 0
    assert evidence(base / "sweep" / "lr-0.0001") == evidence(alone) != evidence(base / "sweep" / "lr-0.001")
    logs = sorted(p.name for p in log.parent.glob("*.log"))
    assert logs == [f"sweep-{number}_0.log", f"sweep-{number}_1.log"]


def test_an_element_that_saves_and_requeues_leaves_the_others_alone(slurm, base):
    """The second element, whose number is the array's, is warned when the first has ended, which is not run again.

    That Slurm warns before a limit is the test above; here its signal is sent as Slurm sends it.
    """
    run = base / "uneven"
    words = slow_start(base, run, "trainer.max_steps=1,20")
    ((number, log),) = submit(slurm, base, words, "-m")
    assert slurm.ended(f"{number}_0", 120) == "COMPLETED", text(log)
    assert wait_for(lambda: '"step": 1' in text(run / "max_steps-20" / "metrics.jsonl"), 120), text(log)
    slurm.say("scancel", "--signal=USR1", f"{number}_1")
    assert wait_for(lambda: slurm.job(f"{number}_1")["Restarts"] == "1", 60), text(log)
    assert slurm.ended(f"{number}_1", 240) == "COMPLETED", text(log)
    assert [slurm.job(f"{number}_{i}")["Restarts"] for i in (0, 1)] == ["0", "1"]
    first, second = (text(log.with_name(f"sweep-{number}_{i}.log")) for i in (0, 1))
    assert "start 2, on" not in first
    assert f"align: saved; job {number}_1 goes on" in second
    assert f"align: job {number}_1, start 2, on " in second
    assert re.search(r"resumed .* at step \d+", second)


def test_members_of_warm_are_an_array_and_the_average_follows(slurm, base):
    run = base / "warm"
    words = settings(
        base, "recipe=warm", f"run.dir={run}", "trainer.max_steps=1", "trainer.members=2", "trainer.probe_steps=0",
        "lora.dropout=", "lora.rank=0", "trainer.eval_every=0", "reference.cache_dir=",
    )  # fmt: skip
    (members, _), (average, log) = submit(slurm, base, words)
    assert slurm.ended(average, 180) == "COMPLETED", text(log)
    assert [slurm.state(f"{members}_{i}") for i in (0, 1)] == ["COMPLETED"] * 2
    assert "average of 2 members" in text(log)
    assert json.loads((run / "summary.json").read_text())["members"] == 2


def test_a_failing_job_names_rank_and_host_and_fails(slurm, base):
    """The second of two nodes fails; the first only loses its peer."""
    words = [*settings(base, f"run.dir={base}/failing", "engine=zero0"), "launch.nodes=2", "launch.preflight=false"]
    ((number, log),) = submit(slurm, base, [*words, *variant("objective", "wpo", "tests.launch.slow.FailsInOne")])
    assert slurm.ended(number, 120) == "FAILED"
    assert slurm.job(number)["ExitCode"] == "1:0"
    assert "Comment=a test " in slurm.say("scontrol", "show", "job", number, "--oneliner")
    said = text(log)
    assert f"rank 1 on {SECOND} failed first:" in said
    assert "LookupError: the cause" in said
    assert "rank 0" not in said.partition("failed first:")[0]


def test_a_cancelled_job_saves_and_stays_cancelled(slurm, base):
    run = base / "cancelled"
    ((number, log),) = submit(slurm, base, slow_start(base, run))
    assert wait_for(lambda: '"step": 2' in text(run / "metrics.jsonl"), 60), text(log)
    slurm.say("scancel", number)
    assert slurm.ended(number, 30) == "CANCELLED"
    assert wait_for(lambda: "SIGTERM received; everything is saved" in text(log), 20), text(log)
    assert slurm.job(number)["Restarts"] == "0"
    assert "goes on when Slurm starts it again" not in text(log)


def check(slurm: Cluster, nodes: int, script: str) -> subprocess.CompletedProcess:
    """`align launch check` on each node of an allocation."""
    environment = slurm.environment | {"PYTHON": sys.executable}
    command = ["srun", f"--nodes={nodes}", "--ntasks-per-node=1", "--kill-on-bad-exit=0", "bash", "-c", script]
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=100)


def test_the_check_names_the_node_without_the_directory(slurm, tmp_path):
    other = tmp_path / "only-here"
    other.mkdir()
    script = f'[ "$SLURM_NODEID" = 1 ] && cd / && dir=/no/such || dir={other}; '
    script += 'exec "$PYTHON" -m align.cli launch check "dir=$dir" seconds=20'
    done = check(slurm, 2, f"export PYTHONPATH={ROOT} MASTER_ADDR=127.0.0.1; {script}")
    assert done.returncode == 1
    assert f"check: {SECOND} does not see the directory /no/such" in done.stderr
    assert f"check: {SECOND} has not reported: it does not see the directory, or could not start" in done.stderr


def test_the_check_names_the_node_with_another_version(slurm, tmp_path):
    odd = tmp_path / "odd" / "numpy-9.9.9.dist-info"
    odd.mkdir(parents=True)
    (odd / "METADATA").write_text("Metadata-Version: 2.1\nName: numpy\nVersion: 9.9.9\n")
    script = f'[ "$SLURM_NODEID" = 1 ] && export PYTHONPATH={odd.parent}:{ROOT}; '
    script += f'exec "$PYTHON" -m align.cli launch check dir={tmp_path} seconds=40'
    done = check(slurm, 2, f"export PYTHONPATH={ROOT} MASTER_ADDR=127.0.0.1; {script}")
    assert done.returncode == 1
    assert re.search(rf"check: {SECOND} has numpy 9\.9\.9, {FIRST} has numpy|{FIRST} has \d", done.stderr), done.stderr


def test_sbatch_refuses_in_its_own_words(slurm, base):
    words = [*settings(base), "launch=slurm", "launch.partition=nosuch", f"launch.log_dir={base}/refused"]
    done = subprocess.run(
        [sys.executable, "-m", "align.cli", *words], cwd=ROOT, env=slurm.environment, capture_output=True, text=True
    )
    assert done.returncode == 2
    assert "sbatch refuses" in done.stderr
    assert "invalid partition specified: nosuch" in done.stderr.lower()
    assert os.environ.get("SLURM_CONF") is None
