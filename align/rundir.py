"""A run directory: its lock, its settings and what makes a second start a resumption.

config.yaml  hashes.json  environment.json  audit.json  metrics.jsonl  samples.jsonl  summary.json  checkpoints/  final/
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import platform
import socket
import sys
import time
from importlib import metadata
from pathlib import Path
from typing import Any, TextIO

from omegaconf import OmegaConf

from align import checkpoint
from align.config import Config, differences, former, leaves, saved_settings
from align.config.moved import settled_text
from align.config.schema import may_change
from align.engine.world import World, by_lead, together
from align.files import write_atomic
from align.installed import DISTRIBUTION
from align.jsons import Json

_ATTEMPTS = 50
_PACKAGES = ("torch", "transformers", "peft", "datasets", "safetensors", "hydra-core", "numpy", "vllm", "deepspeed")
_HASHES = "hashes.json"  # of settings that come from the environment
_OF_A_START = ("resolved.json", "before.json", "samples.jsonl", "nonfinite.json", "metrics.jsonl")


class RunDirectory:
    """Opens or makes a run's directory and holds its lock until closed.

    world: the processes of the run. The lead alone holds the lock and writes, all others see what it sees. compare:
    whether the settings of a resumed run must equal the saved ones; False for a part of a run, which was compared as a
    whole, and whose paths may have moved with it.
    """

    def __init__(self, config: Config, world: World | None = None, compare: bool = True):
        self.world = world or World()
        self.compare = compare
        self.path = Path(config.run.dir or default_name(config))
        self.checkpoints = self.path / "checkpoints"
        self.final = self.path / "final"
        self._lock: TextIO | None = None
        self.resumed = self.world.share(by_lead(self.world, lambda: self._open(config)))
        together(self.world, lambda: None if self.world.lead else self._see_it())

    def _open(self, config: Config) -> bool:
        try:
            self.path.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ValueError(f"run.dir={self.path}: cannot be made ({error.strerror}); give another") from error
        self._lock = self._take_lock()
        try:
            return self._prepared(config)
        except BaseException:
            self.close()
            raise

    def _see_it(self) -> None:
        """Raises ValueError if this process does not see what the lead has made."""
        for _ in range(_ATTEMPTS):
            if (self.path / "config.yaml").is_file():
                return
            time.sleep(0.2)  # a network's file system may tell of it later
        raise ValueError(
            f"run.dir={self.path.absolute()}: {socket.gethostname()} does not see what process 0 has written there; "
            "give a directory that all nodes share"
        )

    def _prepared(self, config: Config) -> bool:
        """The directory clean and its settings written; whether there are checkpoints to go on from."""
        checkpoint.clean(self.checkpoints)
        checkpoint.clean(self.path)
        saved = self.path / "config.yaml"
        # without a checkpoint there is nothing to resume: settings may differ, and the files of that start are removed
        resumed = bool(checkpoint.steps(self.checkpoints))
        if resumed:
            if not saved.exists():
                raise ValueError(f"{self.checkpoints} has checkpoints but {saved} is gone; give another run.dir")
            if self.compare:
                self._compare(config)
                self._compare_hashes(config)
            self._keep_text(saved)
        elif (self.path / "summary.json").exists():
            raise ValueError(
                f"{self.path} holds a finished run without its checkpoints; give another run.dir, or remove it to "
                "start at step 0"
            )
        else:
            # what auto found holds for the same settings: trajectories may have been collected with it
            same = saved.exists() and not differences(saved_settings(saved), config.tree)
            for name in _OF_A_START:
                if not (same and name == "resolved.json"):
                    (self.path / name).unlink(missing_ok=True)
        write_atomic(saved, OmegaConf.to_yaml(config.tree, resolve=False))
        hashes = {key: _digest(key, value) for key, value in _from_environment(config).items()}
        write_atomic(self.path / _HASHES, json.dumps(hashes, indent=1) + "\n")
        return resumed

    def write(self, name: str, text: str) -> None:
        """A text file of the run, whole or not at all."""
        if self.world.lead:
            write_atomic(self.path / name, text)

    def write_json(self, name: str, value: object) -> None:
        """A small JSON file of the run, whole or not at all."""
        self.write(name, json.dumps(value, indent=1) + "\n")

    def read(self, name: str) -> str | None:
        """A text file of the run, or None: as the lead sees it, for all processes, which must all ask."""
        path = self.path / name
        return self.world.share(path.read_text() if self.world.lead and path.exists() else None)

    def read_json(self, name: str) -> Any:
        """A small JSON file of the run, or None; see read."""
        text = self.read(name)
        return None if text is None else json.loads(text)

    def resolved(self) -> Json:
        """What the settings that are auto came out as; all processes must ask."""
        return self.read_json("resolved.json") or {}

    def resolve(self, **found: str) -> None:
        """Keep what they came out as, for the next start."""
        self.write_json("resolved.json", self.resolved() | found)

    def close(self) -> None:
        """Give the directory to the next start."""
        if self._lock is not None:
            self._lock.close()

    def _take_lock(self) -> TextIO:
        try:
            stream = (self.path / ".lock").open("a+")
            fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            stream.seek(0)
            owner = stream.read().strip() or "another process"
            stream.close()
            raise ValueError(f"run.dir={self.path} is in use by {owner}; wait for it or give another run.dir") from None
        except OSError as error:  # read-only, or a file system without locks
            raise ValueError(f"run.dir={self.path}: cannot be locked ({error.strerror}); give another") from error
        stream.truncate(0)
        stream.write(f"process {os.getpid()} on {socket.gethostname()}")
        stream.flush()
        return stream

    def _keep_text(self, saved: Path) -> None:
        """What data.text came out as, of a run of before, whose settings are written anew."""
        path, text = self.path / "resolved.json", settled_text(saved)
        known = json.loads(path.read_text()) if path.exists() else {}
        if text is not None and "text" not in known:
            write_atomic(path, json.dumps(known | {"text": text}, indent=1) + "\n")

    def _compare(self, config: Config) -> None:
        changed = differences(saved_settings(self.path / "config.yaml"), config.tree)
        if changed:
            key, (there, now) = next(iter(changed.items()))
            more = f" (and {len(changed) - 1} more)" if len(changed) > 1 else ""
            raise ValueError(
                f"{self.path} holds a run with {key}={there}, now it is {key}={now}{more}; give another run.dir, or "
                "the same setting to resume"
            )

    def _compare_hashes(self, config: Config) -> None:
        """Raises ValueError if an environment variable now says something else; a run of before kept no hashes."""
        saved = self.path / _HASHES
        there = json.loads(saved.read_text()) if saved.exists() else {}
        for key, value in _from_environment(config).items():
            old = former(key)
            name = old if old is not None and old in there else key
            if name in there and there[name] != _digest(name, value) and not may_change(key):
                raise ValueError(
                    f"{self.path} holds a run in which {key} had another value: its environment variable has changed; "
                    "give another run.dir, or the same value to resume"
                )


def _from_environment(config: Config) -> dict[str, object]:
    """The values of the settings that config.yaml names by an environment variable."""
    found = {}
    for key, value in leaves(config.tree):
        if "${oc.env:" in str(value):
            now = OmegaConf.select(config.tree, key)
            found[key] = OmegaConf.to_container(now, resolve=True) if OmegaConf.is_config(now) else now
    return found


def _digest(key: str, value: object) -> str:
    """What is kept of such a value, which may be secret."""
    return hashlib.sha256(json.dumps([key, value]).encode()).hexdigest()


def default_name(config: Config) -> Path:
    """runs/<recipe>-<model>-seed<seed>: the same words go on with the same run."""
    recipe = config.choices.get("recipe", config.choices["objective"]).replace("/", "-")
    return Path("runs") / f"{recipe}-{config.choices['model']}-seed{config.seed}"


def environment(command: str) -> Json:
    """What the numbers of a run depend on besides its settings."""
    import torch

    versions = {}
    for name in (DISTRIBUTION, *_PACKAGES):
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return {
        "command": command,
        "python": sys.version.split()[0],
        "platform": platform.platform(),
        "packages": versions,
        "threads": torch.get_num_threads(),
        "devices": [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())],
    }
