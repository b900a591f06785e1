"""What an online run writes of its completions: held-out answers before and after training, and samples of steps."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from align import checkpoint
from align.evaluate.heldout import changes
from align.files import write_atomic
from align.jsons import Json
from align.rundir import RunDirectory
from align.trainers.experience import Group


class Transcripts:
    """heldout-before.jsonl, heldout-after.jsonl and samples/ of a run, which the lead writes.

    names: components of the reward. samples_every: steps between those whose completions are kept; 0: none.
    """

    def __init__(self, out: RunDirectory, names: Sequence[str], samples_every: int):
        self.out = out
        self.names = names
        self.samples_every = samples_every

    def heldout(self, phase: str, step: int, groups: Sequence[Group]) -> None:
        """Answers to the held-out prompts; phase: before or after. Raises WriteFailed."""
        self._write(self.out.path / _name(phase), step, groups)

    def samples(self, step: int, groups: Sequence[Group]) -> None:
        """What a step has drawn, if it is one of those that are kept. Raises WriteFailed."""
        if self.samples_every == 0 or step % self.samples_every:
            return
        folder = self.out.path / "samples"
        if self.out.world.lead:
            folder.mkdir(exist_ok=True)
        self._write(folder / f"step-{step:06d}.jsonl", step, groups)

    def lines(self, step: int, groups: Sequence[Group]) -> list[Json]:
        """What is written of each prompt with its completions."""
        return [_line(step, group, self.names) for group in groups]

    def forget(self, step: int) -> None:
        """Remove what was written after `step`, from which the run goes on."""
        if not self.out.world.lead:
            return
        for path in (self.out.path / "samples").glob("step-*.jsonl"):
            if int(path.stem.removeprefix("step-")) > step:
                path.unlink()
        if step == 0:
            (self.out.path / _name("after")).unlink(missing_ok=True)

    def forget_heldout(self, phase: str) -> None:
        """Remove the answers of a phase."""
        if self.out.world.lead:
            (self.out.path / _name(phase)).unlink(missing_ok=True)

    def heldout_step(self, phase: str) -> int | None:
        """The step whose answers are there; all processes must ask."""
        text = self.out.read(_name(phase))
        return None if text is None else json.loads(text.partition("\n")[0])["step"]

    def changes(self) -> Json:
        """Greedy rewards before and after, see align.evaluate.heldout; all processes must ask."""
        texts = (self.out.read(_name(phase)) or "" for phase in ("before", "after"))
        before, after = ([json.loads(line)["greedy"] for line in text.splitlines()] for text in texts)
        return changes(before, after, self.names)

    def _write(self, path: Path, step: int, groups: Sequence[Group]) -> None:
        if not self.out.world.lead:
            return
        text = "".join(json.dumps(line) + "\n" for line in self.lines(step, groups))
        try:
            write_atomic(path, text)
        except OSError as error:
            raise checkpoint.WriteFailed(path, error, len(text)) from error


def _name(phase: str) -> str:
    return f"heldout-{phase}.jsonl"


def _line(step: int, group: Group, names: Sequence[str]) -> Json:
    """A prompt with its completions, for people and for JSON."""

    def one(text: str, completion: Any, rewards: np.ndarray, score: float) -> Json:
        known = {name: None if math.isnan(r) else float(r) for name, r in zip(names, rewards, strict=True)}
        return {
            "completion": text,
            "tokens": len(completion.token_ids),
            "stop": completion.stop,
            "rewards": known,
            "score": None if math.isnan(score) else float(score),
        }

    samples = zip(group.texts, group.completions, group.rewards, group.scores, strict=True)
    made = [one(*sample) for sample in samples]
    if group.steps is not None:
        made = [{**m, "steps": row[~np.isnan(row)].tolist()} for m, row in zip(made, group.steps, strict=True)]
    out: Json = {
        "step": step,
        "source": group.prompt.source,
        "prompt": group.prompt.text,
        "samples": made,
    }
    if group.greedy is not None:
        assert group.greedy_rewards is not None
        out["greedy"] = one(group.greedy_text, group.greedy, group.greedy_rewards, group.greedy_score)
    return out
