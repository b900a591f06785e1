"""The backend of the group rollout at work in a run: made when it is first needed, ended with the session."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator

from align import build
from align.engine.world import by_lead
from align.models.policy import Policy, is_peft
from align.rollout.base import Host, Rollout
from align.trainers.generation import LeadRollout
from align.trainers.session import Session


class Rollouts:
    """Makes the backend, and shows what it does under the name of what it is done for."""

    def __init__(self, session: Session):
        self.session = session
        self._made: Rollout | None = None
        self._adapted = False
        self._label = ""
        session.closing.callback(self.close)

    def of(self, policy: Policy) -> Rollout:
        """The backend, which `policy` is given to when it is made; another one if the policy has got adapters since."""
        if self._made is not None and self._adapted != is_peft(policy.model):
            self.close()
        if self._made is None:
            self._adapted = is_peft(policy.model)
            self._made = self._make(policy)
        return self._made

    def _make(self, policy: Policy) -> Rollout:
        session, world = self.session, self.session.world
        host = Host(
            policy,
            session.tokenizer,
            session.out.path / ("rollout" if world.size == 1 else f"rollout-{world.rank}"),
            session.precision_name,
            session.autocast,
            session.signals.check,
            self._progress,
            session.log.say,
        )
        if world.size > 1 and build.serves_all(session.config):
            return LeadRollout(by_lead(world, lambda: build.rollout(session.config, host)), world)
        return build.rollout(session.config, host)

    @contextlib.contextmanager
    def showing(self, what: str) -> Iterator[None]:
        """Inside, the rollout's progress is seen under this name."""
        before, self._label = self._label, what
        try:
            yield
        finally:
            self._label = before

    def _progress(self, items: Iterable[int], total: int) -> Iterable[int]:
        return self.session.log.progress(self._label)(items, total) if self._label else items

    def close(self) -> None:
        """End the backend; also after an error, and again."""
        made, self._made = self._made, None
        if made is not None:
            made.close()
