"""Prompts on which layout, reference and engine are compared with the trainer, at the start and after each sync."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from align.config import OnlineConfig
from align.data.prompts import PromptRow
from align.engine.world import together
from align.rollout.base import Rollout
from align.trainers import selfcheck
from align.trainers.loop import TrainContext
from align.trainers.online.values import Forward, own, values
from align.trainers.session import SelfCheckError, Session
from align.types import Example, Prompt, Row

PROBE_PROMPTS = 4  # on which engine and trainer are compared after each sync
ROLLOUT_LOGP_TOLERANCE = {"float32": 1e-3, "bfloat16": 1.0}  # nats per token, see trainer.rollout_logp_tolerance


def probe_of(train: Sequence[PromptRow], max_tokens: int) -> list[Example]:
    """The longest prompts, as many as fit a micro-batch: a prefix cache keeps whole blocks of tokens, so that it may
    hold nothing of the others."""
    rows = sorted((p for p in train if len(p.token_ids) > 1), key=lambda p: -len(p.token_ids))
    rows = rows[: min(PROBE_PROMPTS, max_tokens // len(rows[0].token_ids))] if rows else []
    return [
        Example(
            (Row(np.array(p.token_ids, dtype=np.int32), np.arange(len(p.token_ids)) > 0),),
            p.source,
            Prompt(p.token_ids, p.text),
        )
        for p in rows
    ]


def branching(probe: Sequence[Example]) -> list[Example]:
    """Two of them, each beside one that branches off half-way: what a layout shares must be shared here too."""
    return [replace(e, rows=(e.rows[0], _branched(e.rows[0]))) for e in probe[:2]]


def _branched(row: Row) -> Row:
    """A row that begins as this one and goes on with its tokens in reverse."""
    half = len(row.token_ids) // 2
    return Row(np.concatenate([row.token_ids[:half], row.token_ids[half:][::-1]]), row.targets)


def self_check(session: Session, context: TrainContext, probe: Sequence[Example], reference: Forward | None) -> None:
    """The policy's layout must compute what the model means, and the reference must be the untrained policy."""
    if not probe:
        session.log.say("self-check left out: no prompt has two tokens")
        return
    said = f"self-check passed: {selfcheck.check_layout(session, context.engine.policy, branching(probe))}"
    if reference is not None and session.config.reference.path is None:
        ours, theirs = (
            values(session, context, network, probe)["token_logps"] for network in (own(context), reference)
        )
        ratio = max(float(np.abs(a - b).max()) for (a,), (b,) in zip(ours, theirs, strict=True))
        if not ratio <= selfcheck.TOLERANCE[session.precision]:
            raise SelfCheckError(
                f"self-check: policy and reference differ by {ratio:.2g} nats per token before training; the "
                "reference is miswired"
            )
        said += f"; policy = reference to {ratio:.1e}"
    session.log.say(said)


def check_sync(
    session: Session, probe: Sequence[Example], rollout: Rollout, here: list[list[np.ndarray]], unit: str, number: int
) -> dict[str, float]:
    """What the engine gives the probe's prompts against what the trainer gives them.

    here: the trainer's log-probs after this step or round, as unit says, of which 0 is the untrained policy. Raises
    SelfCheckError.
    """
    sequences = [e.prompt.token_ids for e in probe]
    there = together(session.world, lambda: rollout.logps(sequences, [1] * len(probe)))
    differences = np.concatenate([np.abs(np.array(a) - b) for a, (b,) in zip(there, here, strict=True)])
    largest = max(session.world.gather(float(differences.max())))
    t, tolerance = session.config.trainer, ROLLOUT_LOGP_TOLERANCE[session.precision_name]
    if isinstance(t, OnlineConfig):
        tolerance = t.rollout_logp_tolerance or tolerance
    if not largest <= tolerance:
        name = "trainer.rollout_logp_tolerance" if isinstance(t, OnlineConfig) else "tolerance"
        cause = (
            "the weights did not reach the engine whole, or it kept what it had computed with older ones"
            if number
            else "the engine has other weights, another precision or another attention than the trainer"
        )
        raise SelfCheckError(
            f"{unit} {number}: the engine's log-probs differ from the trainer's by up to {largest:.2g} nats "
            f"({name} {tolerance:g}); likely {cause}"
        )
    return {
        "rollout/engine_logp_diff_max": largest,
        "rollout/engine_logp_diff_mean": float(differences.mean()),
    }
