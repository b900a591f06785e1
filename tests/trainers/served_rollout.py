"""A rollout that says it serves all processes of a run, as servers do; each one made leaves a file."""

from __future__ import annotations

import os
from typing import Any

from align.rollout.base import Host
from align.rollout.hf import HFRollout


class Served(HFRollout):
    """In the process that made it."""

    serves_all = True

    def __init__(self, host: Host, **settings: Any):
        super().__init__(host, **settings)
        (host.directory.parent / f"served-{os.getpid()}").write_text("made")
