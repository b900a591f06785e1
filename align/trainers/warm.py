"""Weight-averaged reward models: a probed head, members that differ, the average of their weights.

Rame et al. 2024, arXiv 2401.12187. Each part is a run of its own below the run directory and is resumed by itself:
probe/, member-1/, member-2/, ...; final/ is the average and serves like any reward model, one forward whatever M is.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from rich.table import Table

from align import build, checkpoint
from align.averaging.command import run as average
from align.config import Config, WarmConfig, derived, saved_model
from align.data.cache import cached
from align.data.wanted import Wanted
from align.engine.world import by_lead
from align.evaluate.samples import paired_bootstrap
from align.jsons import Json
from align.models.device import pick_device
from align.objectives.base import RewardObjective
from align.rewards.combine import mean
from align.rewards.network import load as load_network
from align.rollout.base import seed_of
from align.rundir import default_name
from align.trainers import offline, resume
from align.trainers.observers import Retention
from align.trainers.session import Session, start
from align.trainers.steploop import Metrics, StepLoop, Task
from align.types import Example

_MEMBER = 7  # names the stream of the members' seeds


def train(config: Config, command: str) -> int:
    """Run or resume; returns the exit code. Raises ValueError for what the user can cure."""
    trainer = config.trainer
    assert isinstance(trainer, WarmConfig)
    objective = build.objective(config)
    if trainer.only is not None:
        # its own directory is its lock: members can run side by side
        return start(settings_of(config, trainer.only), command, objective, offline.run)
    return start(config, command, objective, run)


def run(session: Session) -> int:
    """The head, the members, their average and what each of them is worth; returns the exit code."""
    config, log, t = session.config, session.log, session.config.trainer
    assert isinstance(t, WarmConfig)
    data = cached(config.data, session.tokenizer, Wanted.by(session.objective), config.seed, session.log.say)
    session.account(data.audit)
    hashes = data.hashes
    state = resume.restore_point(session, hashes)
    if resume.nothing_left(session, state, t.members, "member"):
        return 0
    loop = StepLoop(session, t.members, state, {"data": hashes}, [Retention(session)])
    loop.run(Members(session))
    members = [directory_of(config, k) / "final" for k in range(1, t.members + 1)]
    if session.world.share(checkpoint.problem(session.out.final)):
        log.say(f"average of {t.members} members")
        words = [*map(str, members), f"out={session.out.final}", "method=uniform"]
        by_lead(session.world, lambda: average(words, log.say))
    summary = session.world.share(by_lead(session.world, lambda: _summary(session, members, data.heldout)))
    loop.end(summary, _table(summary))
    return 0


class Members(Task):
    """A step trains a member, the first one the head before it."""

    long = True

    def __init__(self, session: Session):
        assert isinstance(session.config.trainer, WarmConfig)
        self.session = session
        self.trainer = session.config.trainer

    def step(self, number: int) -> Metrics:
        """See Task."""
        begun = time.perf_counter()
        if number == 1 and self.trainer.probe_steps:
            self._train(0, "the head alone")
        row = self._train(number, f"member {number} of {self.trainer.members}")
        return row | {"time/step_s": time.perf_counter() - begun}

    def _train(self, number: int, what: str) -> Metrics:
        settings = settings_of(self.session.config, number, self.session.precision_name)  # one precision for all
        self.session.log.say(f"{what}: {settings.run.dir}")
        return offline.train_part(self.session, settings)

    def console(self, number: int, row: Metrics) -> str:
        """See Task."""
        accuracy = f", held-out {row['train/accuracy_heldout']:.3f}" if "train/accuracy_heldout" in row else ""
        return (
            f"member {number}/{self.trainer.members}  {row['train/steps']} steps{accuracy}  {row['time/step_s']:.0f} s"
        )


def directory_of(config: Config, number: int) -> Path:
    """Where member 1, 2, ... is trained; 0: the head."""
    root = Path(config.run.dir or default_name(config))
    return root / ("probe" if number == 0 else f"member-{number}")


def settings_of(config: Config, number: int, precision: str | None = None) -> Config:
    """A member's training, or with 0 the head's, as the settings of an offline run; precision: in place of the set one
    if given."""
    t = config.trainer
    assert isinstance(t, WarmConfig)
    turn = max(number - 1, 0)
    changed: Json = {
        "run.dir": str(directory_of(config, number)),
        "trainer.precision": precision or t.precision,
        "log.wandb": "off",
        "merge": number > 0 and config.lora.rank > 0,  # weights are averaged, not factors
    }
    if t.starts is not None:
        changed["model"] = saved_model(config, t.starts[turn % len(t.starts)])
    if number == 0:
        changed |= {"trainer.max_steps": t.probe_steps, "trainer.schedule_steps": None, "optimizer.lr": t.probe_lr}
        changed |= {"lora.rank": 0, "lora.dropout": 0.0, "head.only": True}
        return derived(config, changed)
    changed["seed"] = seed_of(config.seed, _MEMBER, number) % 2**31
    if t.probe_steps:
        changed["head.path"] = str(directory_of(config, 0) / "final")
    if t.lrs is not None:
        changed["optimizer.lr"] = t.lrs[turn % len(t.lrs)]
    if t.dropouts is not None:
        changed["lora.dropout" if config.lora.rank else "head.dropout"] = t.dropouts[turn % len(t.dropouts)]
    return derived(config, changed)


def _summary(session: Session, members: Sequence[Path], heldout: Sequence[Example]) -> Json:
    """Held-out accuracy of each member, of the mean of their scores (ENS) and of the mean of their weights."""
    objective, config = session.objective, session.config
    out: Json = {"members": len(members), "step": len(members), "merged": config.merge}
    out["seconds"] = session.seconds()
    assert isinstance(objective, RewardObjective)
    if not heldout or objective.kind != "pair" or len(objective.outputs) > 1:
        return out
    scores = [_scores(session, path, heldout) for path in members]  # M times [P, 2]
    ensemble = np.stack([mean(np.stack([s[:, side] for s in scores])) for side in (0, 1)], axis=1)
    averaged = _scores(session, session.out.final, heldout)
    right = {name: _right(s) for name, s in (("ensemble", ensemble), ("average", averaged))}
    each = [_right(s) for s in scores]
    out["heldout"] = {
        "pairs": len(heldout),
        "members": [float(r.mean()) for r in each],
        **{name: float(r.mean()) for name, r in right.items()},
    }
    for name, other in (("ensemble", right["ensemble"]), ("members", np.mean(each, axis=0))):
        change = paired_bootstrap(other.tolist(), right["average"].tolist())
        out["heldout"][f"average_minus_{name}"] = {"mean": change.mean, "low": change.low, "high": change.high}
    # linear mode connectivity at the centre: the average is to be no worse than its members are on the mean
    gap = out["heldout"]["average_minus_members"]
    out["heldout"]["connected"] = gap["high"] >= 0
    if gap["high"] < 0:
        session.log.say(
            f"warning: the average is worse than its members by {-gap['mean']:.3f} in accuracy, more than sampling "
            "explains: they are not linearly connected; share the head (trainer.probe_steps), lower the learning "
            "rates, or take starts of one run"
        )
    return out


def _scores(session: Session, path: Path, heldout: Sequence[Example]) -> np.ndarray:
    """[P, 2] of the pairs' chosen and rejected."""
    network = load_network(str(path), device=pick_device())
    sign = -1.0 if network.kind == "cost" else 1.0
    budget, check = session.config.trainer.micro_batch_tokens, session.signals.check
    found, _ = network.scores([e.rows for e in heldout], budget, check)
    return sign * np.stack([values[:2, 0] for values in found])


def _right(scores: np.ndarray) -> np.ndarray:
    return (scores[:, 0] > scores[:, 1]).astype(float)


def _table(summary: Json) -> Table:
    table = Table(title=f"{summary['members']} reward models in {summary['seconds']:.0f} s")
    table.add_column("")
    table.add_column("held-out accuracy", justify="right")
    found = summary.get("heldout")
    if found is None:
        return table
    listed = ", ".join(f"{a:.3f}" for a in found["members"])
    table.add_row(f"members ({listed})", f"{np.mean(found['members']):.3f}")
    table.add_row("mean of their scores", f"{found['ensemble']:.3f}")
    table.add_row("mean of their weights", f"{found['average']:.3f}")
    gap = found["average_minus_members"]
    table.add_row("  minus members, 95 %", f"{gap['mean']:+.3f} [{gap['low']:+.3f}, {gap['high']:+.3f}]")
    return table
