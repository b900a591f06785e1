"""vLLM backends that tell what they started, and some that fail or lie: values of rollout._target_."""

from __future__ import annotations

import contextlib
from dataclasses import replace
from pathlib import Path
from typing import Any

from align.rollout.base import Host
from align.rollout.vllm import VLLMRollout


class Watched(VLLMRollout):
    """Writes the ids of its engines to rollout/engines and where its weights lie to rollout/scratch; calls
    waiting_for_generate, waiting_for_update, ... once for each such message, when it is sent and the engine works."""

    def __init__(self, host: Host, **keys: Any):
        self._doing, self._checks = "start", 0

        def check() -> None:
            self._checks += 1
            if self._checks == 2:  # the first check is before the message is sent
                getattr(self, f"waiting_for_{self._doing}")()
            host.check()

        super().__init__(replace(host, check=check), **keys)

    def _exchange(self, message: dict[str, Any], seconds: float, key: str) -> Any:
        self._doing, self._checks = message["do"], 0
        if self._doing == "start":
            assert self._engine is not None
            with (self.host.directory / "engines").open("a") as file:
                file.write(f"{self._engine.process.pid}\n")
        return super()._exchange(message, seconds, key)

    def _write_weights(self, policy: Any) -> list[str]:
        written = super()._write_weights(policy)
        (self.host.directory / "scratch").write_text(str(self._weights.parent))
        return written

    def waiting_for_start(self) -> None:
        """The engine starts."""

    def waiting_for_generate(self) -> None:
        """The engine writes completions."""

    def waiting_for_logps(self) -> None:
        """The engine computes log-probs."""

    def waiting_for_update(self) -> None:
        """The engine loads weights."""

    def waiting_for_adapt(self) -> None:
        """The engine loads an adapter."""


class Mortal(Watched):
    """Kills its engine in the middle of the third call of generate and of the third update of weights, before it has
    answered."""

    def __init__(self, host: Host, **keys: Any):
        self.left = {"generate": 3, "update": 3}
        super().__init__(host, **keys)

    def _die(self, what: str) -> None:
        self.left[what] -= 1
        if self.left[what] == 0:
            assert self._engine is not None
            process, link = self._engine.process, self._engine.socket
            process.kill()
            process.wait()
            link.setblocking(True)
            with contextlib.suppress(ConnectionResetError):
                while link.recv(1 << 16):  # a fast engine may have answered while this process did not run
                    pass
            link.setblocking(False)

    def waiting_for_generate(self) -> None:
        """See Watched."""
        self._die("generate")

    def waiting_for_update(self) -> None:
        """See Watched."""
        self._die("update")


class Deaf(Watched):
    """Gives the engine the weights of the first sync only."""

    def sync(self, policy: Any) -> None:
        """See Rollout, which this breaks."""
        if self.counts["syncs"] == 0:
            super().sync(policy)


class Hoarding(Watched):
    """Keeps what the engine computed with older weights."""

    def sync(self, policy: Any) -> None:
        """See Rollout, which this breaks."""
        self._sync(policy, reset=False)


def engines_of(run: Path) -> list[int]:
    """Process ids of all engines that a run started."""
    return [int(line) for line in (run / "rollout" / "engines").read_text().split()]
