"""align from Python: the functions that the command line calls, and a finished run to look at."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from align import config as settings
from align.config import Config
from align.given import given
from align.jsons import Json

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class RunFailed(RuntimeError):
    """A run ended before its last step. code: the exit code of the command line, 85 and 130 after a signal that left
    everything saved, 1 else; the run's own words have been printed."""

    def __init__(self, path: Path, code: int):
        self.path = path
        self.code = code
        what = "stopped by a signal, the same call goes on" if code in (85, 130) else "failed; see what it printed"
        super().__init__(f"{path}: the run {what} (exit code {code})")


@dataclass(frozen=True)
class Run:
    """A run's directory."""

    path: Path

    @property
    def metrics(self) -> list[Json]:
        """A row for each step so far, as docs/metrics.md explains them; without a line that is still being written."""
        file = self.path / "metrics.jsonl"
        lines = file.read_text().splitlines(keepends=True) if file.exists() else []
        return [json.loads(line) for line in lines if line.endswith("\n")]

    @property
    def summary(self) -> Json:
        """summary.json: held-out figures before and after, seconds, steps. Raises ValueError for a run that is not
        over."""
        return json.loads(self._file("summary.json").read_text())

    @property
    def config(self) -> Config:
        """Its settings. Raises ValueError if this version does not know them."""
        return settings.compose_run([f"run.dir={self.path}"])

    def model(self) -> PreTrainedModel | Any:
        """The trained model on the CPU in float32, ready to generate; a LoRA run's with its adapter (peft.PeftModel).

        Of a reward model the align.rewards.network.RewardNetwork. Raises ValueError for a run that is not over.
        """
        from align import build
        from align.evaluate.finished import final_model

        self._file("summary.json")
        final = self.path / "final"
        if (final / "reward_model.json").is_file():
            from align.rewards.network import load as load_reward

            return load_reward(str(final))
        return final_model(build.pretrained(self.config), final).eval()

    def _file(self, name: str) -> Path:
        if not (self.path / name).is_file():
            raise ValueError(f"{self.path}: holds no finished run ({name} is missing); the same call to train goes on")
        return self.path / name


def train(
    *overrides: str,
    config_dir: str | Path | None = None,
    objective: object = None,
    advantage: object = None,
    rewards: Mapping[str, object] | None = None,
    callbacks: Mapping[str, object] | None = None,
) -> Run:
    """What `align train` does with these words; a run whose directory exists is resumed.

    Parts may be given as objects and take the place of their group: an objective, an estimator of advantages, and by
    name rewards and callbacks. A reward is a function, called by the names of its parameters, or a Reward of
    align.rewards.base. They live in this process, so that the run must be one process; dotted paths
    (objective._target_=mine.Loss) have no such limit. Raises ValueError in one line for what the user can cure,
    RunFailed for a run that does not end well.
    """
    from align.launch import command, place
    from align.rundir import default_name

    parts = {"objective": objective, "advantage": advantage}
    parts |= {f"reward.{name}": part for name, part in (rewards or {}).items()}
    parts |= {f"callbacks.{name}": part for name, part in (callbacks or {}).items()}
    parts = {key: part for key, part in parts.items() if part is not None}
    where = None if config_dir is None else Path(config_dir)
    with given(parts) as more:
        words = [*overrides, *more]
        config = settings.compose(words, where)
        if config.launch.kind != "local":
            raise ValueError(
                f"launch={config.launch.kind}: align.train waits for a run here; type align train to submit"
            )
        if more and place.processes(config) > 1:
            raise ValueError(
                f"launch.processes={place.processes(config)}: {min(parts)} was given as an object, which lives in one "
                "process; give its dotted path"
            )
        code = command.train(words, where, print, _tell)
    path = Path(config.run.dir or default_name(config))
    if code:
        raise RunFailed(path, code)
    return Run(path)


def load(path: str | Path) -> Run:
    """A run that is on disk. Raises ValueError if there is none."""
    if not (Path(path) / "config.yaml").is_file():
        raise ValueError(f"{path}: is no run's directory (config.yaml is missing)")
    return Run(Path(path))


def compose(*overrides: str, config_dir: str | Path | None = None) -> Config:
    """Settings from the command line's words. Raises ValueError, one line, for what is no setting or no value."""
    return settings.compose(overrides, None if config_dir is None else Path(config_dir))


def validate(config: Config) -> None:
    """Raises ValueError, one line, for settings with which no run could start."""
    from align.config.validate import validate as check

    check(config)


def _tell(message: str) -> None:
    sys.stderr.write(f"align: {message}\n")
    sys.stderr.flush()
