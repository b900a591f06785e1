"""Training over examples that come as they are read: data.streaming=true. What comes and in which order is
data/streams.py's.

The lead reads and renders, the others get what a step takes, so that a run of several processes has the steps of one.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial

import numpy as np

from align.data.audit import Audit
from align.data.cache import cached
from align.data.examples import Loaded
from align.data.load import Data, understanding
from align.data.sources import locate_all
from align.data.splits import Reader, prompt_hash
from align.data.stored import largest_tokens
from align.data.streams import Stream, StreamFault, Streams
from align.data.template import date_of
from align.data.wanted import Wanted
from align.data.workers import num_workers
from align.engine.world import by_lead
from align.jsons import Fields
from align.trainers import selfcheck
from align.trainers.loop import Plan, TrainContext, token_plan
from align.trainers.mixing import Draws, Scheduled, constant
from align.trainers.session import Session
from align.trainers.steploop import Metrics
from align.types import Example


def beginning(session: Session) -> Data:
    """The held-out rows, and in the place of those to train on the ones of the first step.

    Raises ValueError as data.load does, for what the first step meets.
    """
    world, config = session.world, session.config
    heldout, audit = _heldout(session)
    draws = _draws(session, schedule_steps=1)  # a schedule begins with its first point, however long it is

    def read() -> tuple[list[Example], Audit]:
        streams = _opened(session, audit, heldout, set())
        try:
            return streams.take(draws.until(1)), streams.audit
        finally:
            streams.close()

    first, audit = world.share(by_lead(world, read))
    session.log.say(
        f"data.streaming=true: of data.train the first step was read; the others come as the run goes, by a buffer of "
        f"{config.data.shuffle_buffer} rows"
    )
    return Data(first, heldout, audit, [], [], chats=set())


def _heldout(session: Session) -> tuple[Sequence[Example], Audit]:
    """The rows of data.heldout, and an account of them alone."""
    config, audit = session.config, Audit()
    if config.data.heldout is None:
        return [], audit
    alone = replace(config.data, train=config.data.heldout, heldout=None, heldout_fraction=0.0, mixture=None)
    data = cached(alone, session.tokenizer, Wanted.by(session.objective), config.seed, session.log.say)
    audit.heldout = data.audit.train
    return data.train, audit


def _draws(session: Session, schedule_steps: int) -> Draws:
    settings = session.config.data
    points = settings.mixture_shares
    shares = constant([1], 1.0) if points is None else Scheduled(points, schedule_steps)
    num_sources = len(settings.train) if isinstance(settings.train, list) else 1
    return Draws(shares, num_sources, session.config.trainer.batch_size)


def _opened(session: Session, account: Audit, heldout: Sequence[Example], chats: set[bool]) -> Streams:
    """The sources at their beginning. account: of what is held out. chats: see Streams."""
    settings, tokenizer = session.config.data, session.tokenizer
    wanted = Wanted.by(session.objective)
    make = partial(understanding, tokenizer, date_of(tokenizer), settings, wanted, False)
    reader = Reader(settings, make, _key, workers=num_workers(settings.workers))
    audit = Audit(heldout=account.heldout)
    streams = []
    for number, source in enumerate(locate_all(settings.train, "data.train", settings.loader)):
        seed = (session.config.seed, number)
        streams.append(Stream(reader, source, f"data.train={settings.train}", seed, audit.train))
    return Streams(streams, audit, heldout, chats)


def _key(row: Loaded) -> bytes:
    return prompt_hash(row.examples[0].prompt.token_ids)


class Streamed:
    """Examples as they come, see offline.Feed: how many of each source is a function of the step."""

    redone: tuple[type[Exception], ...] = (StreamFault,)

    def __init__(self, session: Session, context: TrainContext, plan: Plan, data: Data):
        self._session = session
        self._context = context
        self._draws = _draws(session, plan.schedule_steps)
        # of the lead; those of others stay where they are
        self._streams = _opened(session, data.audit, data.heldout, data.chats)
        session.closing.callback(self._streams.close)
        self._unread = set(data.audit.train.unread)  # columns that were told of

    def examples(self, number: int) -> tuple[list[Example], Metrics]:
        """See Feed. Raises StreamFault."""
        before, after = self._draws.until(number - 1), self._draws.until(number)
        world, streams = self._session.world, self._streams

        def read() -> tuple[list[Example], Metrics]:
            found = streams.take([b - a for a, b in zip(before, after, strict=True)])
            return found, {"data/epoch": streams.passes, "data/rows": streams.audit.train.rows_in}

        found, told = world.share(by_lead(world, read))
        self._tell_unread(number)
        try:
            token_plan(found, self._context.layout, self._context.max_tokens)
            model = self._context.engine.policy.causal_lm
            selfcheck.check_tokens_of(self._session, model, [np.array(largest_tokens(found))])
        except ValueError as error:
            raise StreamFault(str(error)) from error
        return found, told

    def _tell_unread(self, number: int) -> None:
        new = [name for name in self._streams.audit.train.unread if name not in self._unread]
        if new:
            said = f"data train: step {number} is the first with columns that nothing reads: {', '.join(new)}"
            self._session.log.say(f"{said}; data.ignore=[{','.join(new)}] hides them")
            self._unread.update(new)

    def state(self) -> Fields:
        """See Task."""
        return {"streams": self._streams.state()} if self._session.world.lead else {}

    def restore(self, progress: Fields) -> None:
        """See Task. Raises ValueError for sources that have other rows."""
        by_lead(self._session.world, lambda: self._streams.restore(progress["streams"]))
        self._unread.update(self._streams.audit.train.unread)

    def told(self) -> None:
        """See Feed."""
        self._session.account(self._session.world.share(self._streams.audit))
