"""WPO that takes its time in the first start of a job, so that Slurm's warning finds it at work; WPO that fails."""

from __future__ import annotations

import os
import time
from dataclasses import dataclass

from align.models.logprobs import Stats
from align.objectives.preference import WPO
from align.types import Losses, PackedBatch

STEP_S = 2.0


@dataclass(frozen=True)
class SlowStart(WPO):
    """The same numbers, later."""

    def __call__(self, policy: Stats, reference: Stats, batch: PackedBatch) -> Losses:
        """As WPO."""
        if "SLURM_JOB_ID" in os.environ and os.environ.get("SLURM_RESTART_COUNT", "0") == "0":
            time.sleep(STEP_S)
        return super().__call__(policy, reference, batch)


@dataclass(frozen=True)
class FailsInOne(WPO):
    """WPO whose second process comes upon an error."""

    def __call__(self, policy: Stats, reference: Stats, batch: PackedBatch) -> Losses:
        """As WPO in the first process."""
        if os.environ["RANK"] == "1":
            raise LookupError("the cause")
        return super().__call__(policy, reference, batch)
