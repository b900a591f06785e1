"""From where a run goes on: its newest whole checkpoint, whether it is of the same run, and whether nothing is left."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from align import checkpoint
from align.engine.base import Engine
from align.engine.world import together
from align.rollout.base import seed_of
from align.trainers.loop import Plan, plan
from align.trainers.observers import OBSERVERS
from align.trainers.session import Session


def restore_point(session: Session, data: Mapping[str, str]) -> checkpoint.State | None:
    """The newest whole checkpoint, if there is one. data: fingerprints by setting.

    Raises ValueError if it was made with other data.
    """
    out, world = session.out, session.world
    for rank, other in enumerate(world.gather(dict(data))):
        odd = [key for key in data if other[key] != data[key]]
        if odd:
            raise ValueError(
                f"{odd[0]} has other rows in process {rank} than in process {world.rank}; all nodes must see "
                "the same files"
            )
    saved = checkpoint.latest(out.checkpoints, session.log.say, world)
    state = checkpoint.load(saved) if saved is not None else None
    for key, digest in data.items():
        if state is not None and state.progress["data"][key] != digest:
            raise ValueError(
                f"{key} has other rows than when {out.path} was started; give another run.dir or the same data"
            )
    return state


def planned(session: Session, state: checkpoint.State | None, num_examples: int) -> Plan:
    """The steps of the run. Raises ValueError for fewer than are done."""
    trainer = session.config.trainer
    found = plan(trainer, num_examples, state.progress["schedule_steps"] if state else None)
    if state is not None and state.step > found.num_steps:
        raise ValueError(
            f"trainer.max_steps={trainer.max_steps}: {session.out.path} already has {state.step} steps; give at least "
            "as many, or another run.dir"
        )
    return found


def nothing_left(session: Session, state: checkpoint.State | None, num_steps: int, unit: str = "step") -> bool:
    """Whether the run is complete, which is said. unit: what a step of its loop is to people."""
    if state is None or state.step < num_steps and not stopped(state) or not complete(session, state.step):
        return False
    why = "; a larger trainer.max_steps goes on" if unit == "step" else ""
    why = "; trainer.early_stopping_patience ended it" if state.step < num_steps else why
    session.log.say(f"{session.out.path} is complete at {unit} {state.step}{why}")
    return True


def stopped(state: checkpoint.State) -> bool:
    """Whether an observer ended the run at this checkpoint."""
    return any(seen.get("stopped") for seen in state.progress.get(OBSERVERS, {}).values())


def complete(session: Session, step: int) -> bool:
    """Whether final/ and summary.json of this step are there and whole; all processes must ask."""
    summary = session.out.read_json("summary.json")
    if summary is None or summary["step"] != step or summary["merged"] != session.config.merge:
        return False
    return session.world.share(not checkpoint.problem(session.out.final))


def check_weights(session: Session, state: checkpoint.State | None, model_hash: str) -> None:
    """Raises ValueError if the run was started from other weights."""
    if state is not None and state.progress["model"] != model_hash:
        raise ValueError(
            f"model {session.pretrained.name} has other weights than when {session.out.path} was started; give another "
            "run.dir or the same weights"
        )


def restore(session: Session, engine: Engine, state: checkpoint.State | None, steps: Plan) -> None:
    """The engine as it was at the checkpoint, and torch's generator; at the start, the generator seeded."""
    seed, world = session.config.seed, session.world
    # dropout draws from it: each process another mask
    torch.manual_seed(seed if world.size == 1 else seed_of(seed, world.rank))
    if state is None:
        return
    together(world, lambda: engine.read(state.path))
    session.log.say(f"resumed {session.out.path} at step {state.step}")
    if steps.num_steps > steps.schedule_steps:
        session.log.say(f"steps after {steps.schedule_steps} keep the schedule's last learning rate")
