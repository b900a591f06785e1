"""A real Slurm of two nodes on this machine: munged, slurmctld and two slurmd of Debian's packages, on loopback.

Everything is below one directory; nothing of the system's own Slurm is read or written. Ended by process id.
"""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "srun", "scontrol", "squeue", "scancel")
SEARCH = f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin"
FIRST = socket.gethostname().split(".")[0]
SECOND = f"{FIRST}-other"  # sorts after the first, and resolves nowhere: only the first is connected to by its name


class NotHere(Exception):
    """What this machine lacks for a Slurm."""


def free_ports(number: int) -> list[int]:
    """Ports of loopback that nobody uses now."""
    held = [socket.socket() for _ in range(number)]
    try:
        for one in held:
            one.bind(("127.0.0.1", 0))
        return [one.getsockname()[1] for one in held]
    finally:
        for one in held:
            one.close()


def wait_for(what: Callable[[], bool], seconds: float) -> bool:
    """Whether something becomes true in time."""
    end = time.monotonic() + seconds
    while not what():
        if time.monotonic() > end:
            return False
        time.sleep(0.1)
    return True


class Cluster:
    """Slurm of two nodes that are both this machine. Raises NotHere; RuntimeError if what is here does not start."""

    def __init__(self, directory: Path):
        missing = [name for name in PROGRAMS if shutil.which(name, path=SEARCH) is None]
        if missing:
            raise NotHere(f"{', '.join(missing)} not found: apt-get install slurm-wlm munge")
        if os.geteuid() != 0:
            raise NotHere("slurmd starts as root only")
        self.directory = directory
        self.environment = os.environ | {"SLURM_CONF": str(directory / "slurm.conf"), "PATH": SEARCH}
        for name in [k for k in self.environment if k.startswith(("SLURM_", "SBATCH_")) and k != "SLURM_CONF"]:
            del self.environment[name]
        try:
            self._start()
        except BaseException:
            self.close()
            raise

    def _start(self) -> None:
        root = self.directory
        root.chmod(0o755)
        for name in ("munge", "state", "log", f"spool/{FIRST}", f"spool/{SECOND}"):
            (root / name).mkdir(parents=True)
        (root / "munge").chmod(0o700)
        key = root / "munge" / "key"
        key.write_bytes(os.urandom(1024))
        key.chmod(0o400)
        (root / "slurm.conf").write_text(self._conf())
        at = root / "munge"
        self._daemon(
            "munged", "--force", f"--key-file={key}", f"--socket={at}/socket", f"--pid-file={root}/munged.pid",
            f"--log-file={root}/log/munged.log", f"--seed-file={at}/seed",
        )  # fmt: skip
        self._daemon("slurmctld", "-i")
        for node in (FIRST, SECOND):
            self._daemon("slurmd", "-N", node)
        if not wait_for(lambda: self.say("sinfo", "-h", "-o", "%T").split() == ["idle"], 20):
            logs = "\n".join(p.read_text()[-1500:] for p in sorted((root / "log").glob("*.log")))
            raise RuntimeError(f"Slurm did not come up within 20 s:\n{logs}")

    def _conf(self) -> str:
        root, ports = self.directory, free_ports(3)
        memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2**20 * 8 // 10
        node = f"CPUs={max(2, os.cpu_count() or 1)} RealMemory={memory} State=UNKNOWN"
        return f"""\
ClusterName=aligntest
SlurmctldHost={FIRST}(127.0.0.1)
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
# shorter than the default of 120 s, since a requeued job waits for it; of 5 s a busy machine let launches fail
AuthInfo=socket={root}/munge/socket,cred_expire=30
CredType=cred/munge
CommunicationParameters=NoInAddrAny,NoCtldInAddrAny
SlurmctldPort={ports[0]}
SlurmctldPidFile={root}/slurmctld.pid
SlurmdPidFile={root}/slurmd.%n.pid
SlurmctldLogFile={root}/log/slurmctld.log
SlurmdLogFile={root}/log/slurmd.%n.log
StateSaveLocation={root}/state
SlurmdSpoolDir={root}/spool/%n
MailProg=/bin/true
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
MpiDefault=none
SwitchType=switch/none
SchedulerType=sched/builtin
SchedulerParameters=sched_interval=1,batch_sched_delay=0,sched_min_interval=0
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
# two nodes on one machine: what the machine has is not what both have
SlurmdParameters=config_overrides
ReturnToService=2
KillWait=5
MinJobAge=600
InactiveLimit=0
JobRequeue=1
AccountingStorageType=accounting_storage/none
NodeName={FIRST} NodeAddr=127.0.0.1 Port={ports[1]} {node}
NodeName={SECOND} NodeAddr=127.0.0.1 Port={ports[2]} {node}
PartitionName=debug Nodes={FIRST},{SECOND} Default=YES MaxTime=INFINITE State=UP
"""

    def _daemon(self, *command: str) -> None:
        done = subprocess.run(
            command, env=self.environment, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=30
        )
        if done.returncode != 0:
            raise RuntimeError(f"{command[0]} does not start: {(done.stderr or done.stdout).strip()[-500:]}")

    def say(self, *command: str) -> str:
        """The output of one of Slurm's commands, with what it complains of."""
        done = subprocess.run(command, env=self.environment, capture_output=True, text=True, timeout=30)
        return done.stdout + done.stderr

    def job(self, number: str) -> dict[str, str]:
        """What the controller knows of a job or an element of an array."""
        words = self.say("scontrol", "show", "job", number, "--oneliner").split()
        return dict(word.split("=", 1) for word in words if "=" in word)

    def state(self, number: str) -> str:
        """PENDING, RUNNING, COMPLETED, FAILED, ..."""
        return self.job(number).get("JobState", "UNKNOWN")

    def ended(self, number: str, seconds: float) -> str:
        """The state in which a job has ended; the one it is in if it does not in time."""
        wait_for(lambda: self.state(number) not in ("PENDING", "RUNNING", "COMPLETING", "REQUEUED"), seconds)
        return self.state(number)

    def shorten(self, number: str) -> None:
        """Let the limit of a running job come within two minutes, however long it took to start."""
        hours, minutes, _ = self.job(number)["RunTime"].split(":")
        self.say("scontrol", "update", f"JobId={number}", f"TimeLimit={60 * int(hours) + int(minutes) + 2}")

    def close(self) -> None:
        """End the jobs and the daemons, by their ids."""
        if (self.directory / "slurmctld.pid").exists():
            self.say("scancel", "--partition=debug")
            wait_for(lambda: not self.say("squeue", "-h").strip(), 10)
        for name in (f"slurmd.{SECOND}", f"slurmd.{FIRST}", "slurmctld", "munged"):
            path = self.directory / f"{name}.pid"
            try:
                pid = int(path.read_text())
                os.kill(pid, signal.SIGTERM)
            except (OSError, ValueError):
                continue
            wait_for(lambda pid=pid: not Path(f"/proc/{pid}").exists(), 10)
