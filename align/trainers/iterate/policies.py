"""The policy of each round, from the files of the round before: what was trained in this process and what another one
reads again must be the same."""

from __future__ import annotations

import gc
import shutil
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from align import build, checkpoint
from align.engine.world import by_lead, together
from align.jsons import Json
from align.models.device import pick_device
from align.models.policy import Policy, weights_hash
from align.models.pretrained import Pretrained, from_hub
from align.rollout.base import Rollout
from align.trainers import selfcheck
from align.trainers.final import model_card
from align.trainers.loop import token_values
from align.trainers.online.probe import check_sync
from align.trainers.rollouts import Rollouts
from align.trainers.session import Session
from align.types import Example


@dataclass(frozen=True)
class LoadedPolicy:
    """A policy in memory and in the rollout. number: of the round that left it; 0: what the run starts from."""

    number: int
    policy: Policy
    hash: str
    rollout: Rollout


class Policies:
    """At most one in memory of each process, with all its weights.

    rows: token ids that it must be able to read. probe: prompts on which it is compared with the rollout. newest: the
    last round that has left one.
    """

    def __init__(self, session: Session, rows: Sequence[Sequence[int]], probe: Sequence[Example], newest: int):
        self.session = session
        self.rollouts = Rollouts(session)
        self.rows = rows
        self.probe = probe
        self.held: LoadedPolicy | None = None
        self.newest = newest

    def directory(self, number: int) -> Path:
        """Of a round."""
        return self.session.out.path / "rounds" / f"{number:02d}"

    def final(self, number: int) -> Path:
        """The model that a round left."""
        return self.directory(number) / "train" / "final"

    def of(self, number: int) -> LoadedPolicy:
        """What round `number` left."""
        if self.held is not None and self.held.number == number:
            return self.held
        self.release()
        model = self._source(number).model().to(pick_device())
        if number == 0:
            selfcheck.check_tokens_of(self.session, model, self.rows)
        if self.session.precision == torch.float32:
            model = model.float()  # weights kept in bfloat16 would be computed with in bfloat16
        policy = Policy(model, "padded").eval()

        def given() -> Rollout:
            rollout = self.rollouts.of(policy)
            rollout.sync(policy)
            return rollout

        self.held = LoadedPolicy(number, policy, weights_hash(model), together(self.session.world, given))
        self._check_sync(self.held)
        return self.held

    def _source(self, number: int) -> Pretrained:
        if number == 0:
            return self.session.pretrained
        path, world = self.final(number), self.session.world
        fault = world.share(by_lead(world, lambda: checkpoint.problem(path)))
        if fault:
            raise ValueError(f"{path} is damaged ({fault}); restore it from a copy, or give another run.dir")
        trust = bool(self.session.config.model.get("trust_remote_code", False))
        return from_hub(str(path), None, trust, False, None, "auto")

    @torch.no_grad()
    def _check_sync(self, held: LoadedPolicy) -> None:
        """The engine must give the probe's prompts what the policy gives them. Raises SelfCheckError."""
        if not self.probe:
            return

        def network(batch: object) -> Any:
            with self.session.autocast():
                return held.policy(batch)

        budget = max(self.session.config.trainer.micro_batch_tokens, *(len(e.rows[0].token_ids) for e in self.probe))
        here = token_values(network, self.probe, "padded", budget, held.policy.device, world=self.session.world)
        check_sync(self.session, self.probe, held.rollout, here["token_logps"], "round", held.number)

    def to_train(self) -> Any:
        """The model in memory, to be trained in place; None where an engine reads its shards from the files: then
        nothing of it stays."""
        assert self.held is not None
        if self.session.config.engine.stage != 3:
            return self.held.policy.model
        self.release()
        if not build.serves_all(self.session.config):
            self.rollouts.close()
        return None

    def trained(self, number: int) -> None:
        """A round has left one."""
        self.newest = number
        self.release()

    def release(self) -> None:
        """Forget the policy: the next one takes its memory."""
        self.held = None
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()

    def write(self, target: Path, summary: Json, form: Json | None = None) -> None:  # noqa: ARG002
        """The newest one, with a card of the whole run."""
        plain = replace(self.session.config, merge=self.session.config.lora.rank > 0)
        card = model_card(plain, self.session.pretrained.name, self.session.command, summary)
        by_lead(self.session.world, lambda: checkpoint.atomic_directory(target, partial(self._copy, card)))

    def _copy(self, card: str, directory: Path) -> None:
        for path in self.final(self.newest).iterdir():
            if path.name not in (checkpoint.MANIFEST, "README.md"):
                shutil.copy2(path, directory / path.name)
        (directory / "README.md").write_text(card)
