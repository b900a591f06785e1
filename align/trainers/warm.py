"""Weight-averaged reward models: a probed head, members that differ, the average of their weights.

Rame et al. 2024, arXiv 2401.12187. Each part is a run of its own below the run directory and is resumed by itself:
probe/, member-1/, member-2/, ...; final/ is the average and serves like any reward model, one forward whatever M is.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields, replace
from pathlib import Path

import numpy as np
from omegaconf import DictConfig, OmegaConf
from rich.table import Table

from align import build, checkpoint
from align.averaging.command import run as average
from align.config import Config, TrainerConfig, WarmConfig
from align.data.load import fingerprint, load
from align.data.wanted import Wanted
from align.evaluate.samples import paired_bootstrap
from align.jsons import Json
from align.models.device import pick_device
from align.objectives.base import RewardObjective
from align.rewards.combine import mean
from align.rewards.network import RewardNetwork
from align.rewards.network import load as load_network
from align.rollout.base import seed_of
from align.rundir import default_name
from align.trainers import offline, resume
from align.trainers.session import Session, start
from align.types import Example

_MEMBER = 7  # names the stream of the members' seeds


def train(config: Config, command: str) -> int:
    """Run or resume; returns the exit code. Raises ValueError for what the user can cure."""
    trainer = config.trainer
    assert isinstance(trainer, WarmConfig)
    objective = build.objective(config)
    if trainer.only is not None:
        # its own directory is its lock: members can run side by side
        part = settings_of(config, trainer.only)
        _begin(part)
        return start(part, command, objective, offline.run)
    return start(config, command, objective, lambda session: Warm(session).run())


def directory_of(config: Config, number: int) -> Path:
    """Where member 1, 2, ... is trained; 0: the head."""
    root = Path(config.run.dir or default_name(config))
    return root / ("probe" if number == 0 else f"member-{number}")


def settings_of(config: Config, number: int, precision: str | None = None) -> Config:
    """A member's training, or with 0 the head's, as the settings of an offline run; precision: in place of the set one
    if given."""
    t = config.trainer
    assert isinstance(t, WarmConfig)
    own = {f.name: getattr(t, f.name) for f in fields(TrainerConfig)}
    own |= {"kind": "offline", "precision": precision or t.precision}
    tree = OmegaConf.create(OmegaConf.to_container(config.tree, resolve=False))
    assert isinstance(tree, DictConfig)
    turn = max(number - 1, 0)
    if t.starts is not None:
        model = {
            "_target_": "align.models.pretrained.from_hub",
            "path": t.starts[turn % len(t.starts)],
            "revision": None,
        }
        model |= {"trust_remote_code": bool(config.model.get("trust_remote_code", False))}
        model |= {"allow_pickle": False, "chat_template": None, "dtype": "auto"}
        tree.model = model
    lora, head, optimizer = config.lora, config.head, config.optimizer
    if number == 0:
        own |= {"max_steps": t.probe_steps, "schedule_steps": None}
        lora = replace(lora, rank=0, dropout=0.0)
        head = replace(head, only=True)
        optimizer = replace(optimizer, lr=t.probe_lr)
    else:
        if t.probe_steps:
            head = replace(head, path=str(directory_of(config, 0) / "final"))
        if t.lrs is not None:
            optimizer = replace(optimizer, lr=t.lrs[turn % len(t.lrs)])
        if t.dropouts is not None:
            dropout = t.dropouts[turn % len(t.dropouts)]
            lora, head = (replace(lora, dropout=dropout), head) if lora.rank else (lora, replace(head, dropout=dropout))
    seed = config.seed if number == 0 else seed_of(config.seed, _MEMBER, number) % 2**31
    run = replace(config.run, dir=str(directory_of(config, number)))
    merge = lora.rank > 0  # weights are averaged, not factors
    trainer = TrainerConfig(**own)
    tree.optimizer.lr = optimizer.lr
    for name, section in dict(run=run, lora=lora, head=head, trainer=trainer).items():
        tree[name] = {f.name: getattr(section, f.name) for f in fields(section)}
    tree.seed, tree.merge, tree.log.wandb = seed, merge, "off"
    return replace(
        config,
        **dict(run=run, lora=lora, head=head, optimizer=optimizer, trainer=trainer, seed=seed, merge=merge),
        log=replace(config.log, wandb="off"),
        model=tree.model,
        tree=tree,
    )


def _begin(part: Config) -> None:
    Path(str(part.run.dir)).mkdir(parents=True, exist_ok=True)


class Warm:
    """The head, the members one after the other, the average, and what each of them is worth."""

    def __init__(self, session: Session):
        self.session = session
        self.config = session.config
        self.objective = session.objective
        self.out = session.out
        self.log = session.log

    def run(self) -> int:
        """Everything from data to final/."""
        config, log = self.config, self.log
        t = config.trainer
        assert isinstance(t, WarmConfig)
        data = load(config.data, self.session.tokenizer, Wanted.by(self.objective), config.seed)
        self.session.account(data.audit)
        hashes = {"data.train": fingerprint(data.train), "data.heldout": fingerprint(data.heldout)}
        state = resume.restore_point(self.session, hashes)
        done = state.step if state is not None else 0
        if done == t.members and resume.complete(self.session, done):
            log.say(f"{self.out.path} is complete")
            return 0
        for number in range(0 if t.probe_steps else 1, t.members + 1):
            if number > done or number == 0 == done:
                what = "the head alone" if number == 0 else f"member {number} of {t.members}"
                self._part(settings_of(config, number, self.session.precision_name), what)  # one precision for all
            if number > done:
                progress = {"data": hashes, "schedule_steps": None}
                checkpoint.save(self.out.checkpoints, number, progress, lambda _: None)
                checkpoint.retain(self.out.checkpoints, 2)
        members = [directory_of(config, k) / "final" for k in range(1, t.members + 1)]
        if checkpoint.problem(self.out.final):
            log.say(f"average of {t.members} members")
            average([*map(str, members), f"out={self.out.final}", "method=uniform"], log.say)
        summary = self._summary(members, data.heldout)
        self.out.write_json("summary.json", summary)
        if data.heldout:
            log.console.print(_table(summary))
        log.say(f"model {self.out.final}, evidence {self.out.path}")
        return 0

    def _part(self, part: Config, what: str) -> None:
        _begin(part)
        self.log.say(f"{what}: {part.run.dir}")
        session = self.session.part(part)
        try:
            offline.run(session)
        finally:
            session.close()

    def _summary(self, members: Sequence[Path], heldout: Sequence[Example]) -> Json:
        """Held-out accuracy of each member, of the mean of their scores (ENS) and of the mean of their weights."""
        out: Json = {"members": len(members), "step": len(members), "merged": self.config.merge}
        out["seconds"] = self.session.seconds()
        assert isinstance(self.objective, RewardObjective)
        if not heldout or self.objective.kind != "pair" or len(self.objective.outputs) > 1:
            return out
        scores = [self._scores(path, heldout) for path in members]  # M times [P, 2]
        ensemble = np.stack([mean(np.stack([s[:, side] for s in scores])) for side in (0, 1)], axis=1)
        averaged = self._scores(self.out.final, heldout)
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
            self.log.say(
                f"warning: the average is worse than its members by {-gap['mean']:.3f} in accuracy, more than sampling "
                "explains: they are not linearly connected; share the head (trainer.probe_steps), lower the learning "
                "rates, or take starts of one run"
            )
        return out

    def _scores(self, path: Path, heldout: Sequence[Example]) -> np.ndarray:
        """[P, 2] of the pairs' chosen and rejected."""
        network: RewardNetwork = load_network(str(path), device=pick_device())
        sign = -1.0 if network.kind == "cost" else 1.0
        budget, check = self.config.trainer.micro_batch_tokens, self.session.signals.check
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
