"""`align train` over fixed data: builds the parts, checks that they fit, runs the loop, writes the results."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence, Set
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Protocol

from align import build, checkpoint
from align.config import Config
from align.data.cache import cached
from align.data.load import Data, fingerprint, load
from align.data.stored import View, largest_tokens
from align.data.wanted import Wanted
from align.engine.build import make_engine
from align.engine.local import learning_rate
from align.engine.world import by_lead, together
from align.jsons import Fields, Json
from align.models.policy import Network, Policy, Scorer, base_model, choose_layout, weights_hash
from align.models.pretrained import Pretrained
from align.objectives.base import RewardObjective
from align.rollout.base import Rollout
from align.trainers import resume, selfcheck, trained
from align.trainers.final import summarise
from align.trainers.heldout_samples import HeldoutSamples
from align.trainers.loop import Plan, TrainContext, evaluate, reference_gap, score_rows, token_plan, train_step
from align.trainers.observing import observers_of
from align.trainers.references import ReferenceModels
from align.trainers.rollouts import Rollouts
from align.trainers.session import SelfCheckError, Session, start
from align.trainers.steploop import Metrics, StepLoop, Task, size_of
from align.trainers.trained import FullModel
from align.types import Example, Layout

if TYPE_CHECKING:
    from align.trainers.agreement import Agreement
    from align.trainers.collect import Collector

# of the last step of a run that is part of another
_TOLD = ("loss/", "accuracy/", "reward/margin", "wpo/", "nll/", "kl/")
_NOUNS = {"pair": "pairs", "labelled": "labelled rows", "single": "rows", "ranked": "ranked lists"}


def train(config: Config, command: str) -> int:
    """Run or resume; returns the exit code. Raises ValueError for what the user can cure."""
    objective = build.objective(config)
    return start(config, command, objective, run)


@dataclass(frozen=True)
class LoadedModel:
    """A model that is loaded already, and is what the settings name; foreign: a reference that they cannot name."""

    model: Any
    foreign: Pretrained | None = None


@dataclass(frozen=True)
class _Parts:
    """What is made before the first step, of the model as the run found it."""

    full_model: FullModel
    model_hash: str
    references: ReferenceModels
    context: TrainContext
    heldout_samples: HeldoutSamples
    form: RewardModelInfo | None  # of a reward model


def run(session: Session, loaded: LoadedModel | None = None) -> int:
    """Everything from data to final/; returns the exit code."""
    config = session.config
    model = loaded.model if loaded is not None else None
    rollouts = Rollouts(session)
    settings = config.data
    if config.collect is not None:
        file, model = _collected(session, rollouts)
        settings = replace(settings, train=file, heldout=None)
    if settings.streaming:
        from align.trainers import streaming

        data = streaming.beginning(session)
    else:
        data = cached(settings, session.tokenizer, Wanted.by(session.objective), config.seed, session.log.say)
    session.account(data.audit)
    hashes = dict(data.hashes)
    target = _target(session)
    if target:
        hashes["data.mixture_target"] = fingerprint(target)
    state = resume.restore_point(session, hashes)
    plan = resume.planned(session, state, len(data.train))
    if resume.nothing_left(session, state, plan.num_steps):
        return 0
    plan, agreement = mixed(session, plan, data, target)
    parts = _parts(session, model or trained.load(session), data, plan, state, rollouts, loaded, target)
    context, engine = parts.context, parts.context.engine
    parts.heldout_samples.before()
    _loss_before(session, context, data.heldout)
    resume.restore(session, engine, state, plan)
    fixed = {"schedule_steps": plan.schedule_steps, "data": hashes, "model": parts.model_hash}
    observers = observers_of(session, parts.full_model, plan.num_steps, parts.form)
    loop = StepLoop(session, plan.num_steps, state, fixed, observers, engine.write, size_of(engine))
    feed: Feed = Planned(plan, data.train, config.seed)
    if settings.streaming:
        feed = streaming.Streamed(session, context, plan, data)
    step = loop.run(Offline(session, context, plan, feed, data.heldout, agreement))
    session.signals.agree_again()
    feed.told()
    rollout = _sync(session, parts, rollouts)
    summary = _summary(session, parts, data, step)
    if config.collect is not None and rollout is not None:
        from align.trainers.collect import solved_summary

        _collector(session, rollout).after()
        out = session.out.path
        summary["problems"] = session.world.share(by_lead(session.world, lambda: solved_summary(out, out)))
    summary |= loop.summary()
    parts.full_model.write(session.out.final, summary, None if parts.form is None else parts.form())
    loop.end(summary)
    return 0


def train_part(session: Session, settings: Config, loaded: LoadedModel | None = None, compare: bool = True) -> Metrics:
    """A run that is part of this one, in a directory of its own, from where it was; returns its steps and its last
    metrics, train/ before their names. compare: see RunDirectory."""
    part = session.part(settings, compare)
    try:
        run(part, loaded)
        rows = part.out.read("metrics.jsonl")
    finally:
        part.close()
    assert rows is not None
    last = json.loads(rows.splitlines()[-1])
    metrics = {name: value for name, value in last.items() if name.startswith(_TOLD) and value is not None}
    return {"train/steps": last["step"]} | {f"train/{name.replace('/', '_')}": v for name, v in metrics.items()}


# ---------------------------------------------------------------------- the loop


class Feed(Protocol):
    """Where the examples of a step come from; the same calls in all processes."""

    @property
    def redone(self) -> tuple[type[Exception], ...]:
        """See Task."""
        ...

    def examples(self, number: int) -> tuple[list[Example], Metrics]:
        """What step 1, 2, ... learns from, and metrics of that; the same in all processes."""
        ...

    def state(self) -> Fields:
        """See Task."""
        ...

    def restore(self, progress: Fields) -> None:
        """See Task."""
        ...

    def told(self) -> None:
        """Tell people and the disk what is known of the data when the last step is done."""
        ...


@dataclass(frozen=True)
class Planned:
    """Examples that are there: which ones is a function of the step."""

    plan: Plan
    train: Sequence[Example]
    seed: int
    redone: tuple[type[Exception], ...] = ()

    def examples(self, number: int) -> tuple[list[Example], Metrics]:
        """See Feed."""
        plan = self.plan
        epoch = min(number * plan.batch_size, plan.limit) / plan.num_examples
        return [self.train[i] for i in plan.indices(number, self.seed)], {"data/epoch": epoch}

    def state(self) -> Fields:
        """Nothing but the step."""
        return {}

    def restore(self, progress: Fields) -> None:
        """Nothing but the step."""

    def told(self) -> None:
        """It was told before the first."""


class Offline(Task):
    """Steps over examples that are given."""

    def __init__(
        self,
        session: Session,
        context: TrainContext,
        plan: Plan,
        feed: Feed,
        heldout: Sequence[Example],
        agreement: Agreement | None = None,
    ):
        self.session = session
        self.config = session.config
        self.context = context
        self.plan = plan
        self.feed = feed
        self.redone = feed.redone
        self.heldout = heldout
        self.agreement = agreement

    def step(self, number: int) -> Metrics:
        """See Task."""
        start = time.perf_counter()
        plan, seed, metrics = self.plan, self.config.seed, {}
        if self.agreement is not None:
            metrics = self.agreement.before(number, self.context, plan.batch_size, seed, self.session.signals.check)
        examples, told = self.feed.examples(number)
        lr = learning_rate(self.config.optimizer, number, plan.schedule_steps)
        row: Metrics = dict(train_step(self.context, examples, lr)) | metrics | told
        row["time/step_s"] = time.perf_counter() - start
        return row

    def evaluate(self, number: int, last: bool) -> Metrics:  # noqa: ARG002
        """See Task."""
        if not self.heldout:
            return {}
        return dict(evaluate(self.context, self.heldout, self.session.signals.check))

    def state(self) -> Fields:
        """See Task."""
        learnt = {} if self.agreement is None else {"mixture": self.agreement.state()}
        return {**self.feed.state(), **learnt}

    def restore(self, progress: Fields) -> None:
        """See Task."""
        self.feed.restore(progress)
        if self.agreement is not None:
            self.agreement.restore(progress["mixture"])

    def console(self, number: int, row: Metrics) -> str:
        """See Task."""
        left = (self.plan.num_steps - number) * row["time/step_s"]
        parts = [f"step {number}/{self.plan.num_steps}", f"loss {row['loss/total']:.4f}"]
        names = {
            "accuracy/train": "accuracy",
            "reward/margin": "margin",
            "wpo/weight": "weight",
            "accuracy/heldout": "held-out",
        }
        parts += [f"{short} {row[key]:.3f}" for key, short in names.items() if key in row]
        parts += [f"{row['tokens/real'] / row['time/step_s']:.0f} tokens/s", f"{left:.0f} s left"]
        return "  ".join(parts)


# ---------------------------------------------------------------------- building


def _target(session: Session) -> Sequence[Example]:
    """The rows of data.mixture_target."""
    data = session.config.data
    if data.mixture_target is None:
        return []
    alone = replace(data, train=data.mixture_target, heldout=None, heldout_fraction=0.0, repeat=None)
    return load(alone, session.tokenizer, Wanted.by(session.objective), session.config.seed).train


def mixed(session: Session, plan: Plan, data: Data, target: Sequence[Example]) -> tuple[Plan, Agreement | None]:
    """The plan with the sources' shares and the rows' weights, and what learns the shares. A plan without either is
    left as it is."""
    settings = session.config.data
    weights = [e.numbers.get("weight", 1.0) for e in data.train] if "weight" in (settings.columns or {}) else None
    if settings.mixture is None and weights is None:
        return plan, None
    from align.trainers import mixing

    sizes = data.sizes
    if 0 in sizes:
        raise ValueError(
            f"data.train={settings.train}: source {sizes.index(0) + 1} has no rows left to be mixed; take it out, mend "
            "its rows, or lower data.heldout_fraction"
        )
    shares: mixing.Shares
    if settings.mixture == "schedule":
        shares = mixing.Scheduled(settings.mixture_shares, plan.schedule_steps)
    elif settings.mixture == "gradient":
        shares = mixing.Learnt(sizes)
    else:
        shares = mixing.constant(sizes, settings.mixture_temperature if settings.mixture else 1.0)
    found = mixing.Mixture(plan, sizes, shares, weights)
    if weights is not None:
        for first, last in found.parts:
            if not sum(weights[first:last]) > 0:
                where, column = data.train[first].source.rpartition(":")[0], settings.columns["weight"]
                raise ValueError(f"data.columns.weight={column}: all rows of {where} have weight 0")
    if not isinstance(shares, mixing.Learnt):
        return found, None
    from align.trainers.agreement import Agreement

    return found, Agreement(shares, data.train, found.parts, target, settings.mixture_every, settings.mixture_rate)


def _collected(session: Session, rollouts: Rollouts) -> tuple[str, Any]:
    """The data file of what the untrained policy collects, now or in an earlier start; and its model, to be trained in
    place, None where an engine reads its shards from the files again."""
    from align.trainers.collect import collected

    model = trained.load_unsharded(session)
    selfcheck.check_tokens_of(session, model, [])
    key = {"model": weights_hash(model), "precision": str(session.precision)}
    collector = _collector(session, rollouts.of(Policy(model, "padded")))
    found = collected(session, collector, key, session.out.resumed)
    file = str(found.file(session.objective.kind))
    if session.config.engine.stage != 3:
        return file, model
    rollouts.close()
    return file, None


def _collector(session: Session, rollout: Rollout) -> Collector:
    from align.trainers.collect import collector_of

    return collector_of(session, rollout, session.out.path, session.config.seed, "collect")


def _parts(
    session: Session,
    model: object,
    data: Data,
    plan: Plan,
    state: checkpoint.State | None,
    rollouts: Rollouts,
    loaded: LoadedModel | None,
    target: Sequence[Example],
) -> _Parts:
    selfcheck.check_tokens_of(session, model, map(largest_tokens, (data.train, data.heldout, target)))
    made = _prepared(session, model, data, plan, target)
    engine = make_engine(session.config, made.network, session.precision, session.world)
    full_model = FullModel(made, engine)
    model_hash = full_model.hash(from_files=loaded is None)
    resume.check_weights(session, state, model_hash)
    references = _references(session, engine, data, plan, model_hash, loaded, target)
    reference, extra_references = references.of(session.objective)
    budget = session.config.trainer.micro_batch_tokens
    context = TrainContext(engine, session.objective, made.layout, budget, reference, extra_references)
    _self_check(session, context, data.train[:2], references.foreign is None)
    form = None
    if "scores" in session.objective.needs:
        form = RewardModelInfo(session, context, data.chats, data.heldout)
    heldout_samples = HeldoutSamples(session, engine, full_model, rollouts, data.heldout)
    return _Parts(full_model, model_hash, references, context, heldout_samples, form)


def _prepared(session: Session, model: object, data: Data, plan: Plan, target: Sequence[Example]) -> trained.Trained:
    config = session.config
    layout, _ = choose_layout(model, config.trainer.layout, config.lora.dropout)
    budget = config.trainer.micro_batch_tokens
    stream, plain = token_plan(data.train, layout, budget)
    rows, most = (plan.num_examples, stream) if not config.data.streaming else ("a stream", budget)
    token_plan(data.heldout, layout, budget)
    token_plan(target, layout, budget)
    made = trained.prepare(session, model, most, lambda model, layout: _network(session, model, layout))
    noun = _NOUNS[session.objective.kind]
    first, second, third = made.lines
    for line in (
        first,
        f"plan {plan.num_steps} steps of {plan.batch_size} {noun} from {rows}, "
        f"schedule over {plan.schedule_steps}; at most {budget} tokens at once",
        f"{second}: {stream} tokens a pass for {plain} real ones",
        third,
    ):
        session.log.say(line)
    return made


def _network(session: Session, model: Any, layout: Layout) -> Network:
    """What the objective trains: a policy, or a reward model."""
    objective, config = session.objective, session.config
    if "scores" not in objective.needs:
        return Policy(model, layout, "values" in objective.needs)
    from align.rewards import network

    causal_lm = base_model(model)
    network.check_classes(causal_lm.config, session.pretrained.name)
    if config.head.only:
        model.requires_grad_(False)
    width = causal_lm.config.get_text_config().hidden_size
    return Scorer(model, layout, network.new_head(objective, width, config.head, config.seed))


def _references(
    session: Session,
    engine: Any,
    data: Data,
    plan: Plan,
    model_hash: str,
    loaded: LoadedModel | None,
    target: Sequence[Example],
) -> ReferenceModels:
    # A run of few steps over many rows pays for the rows it will see; the first two are the self-check's. Where shares
    # are learnt, which rows these are is not known.
    visited = set(range(len(data.train))) if target else {0, min(1, len(data.train) - 1)}
    streaming = session.config.data.streaming
    for step in range(1, 0 if streaming else plan.num_steps + 1):
        visited |= set(plan.indices(step, session.config.seed))
        if len(visited) == len(data.train):
            break
    return ReferenceModels(
        session.config,
        engine,
        session.pretrained,
        model_hash,
        None if streaming else View.of((data.train, sorted(visited)), (data.heldout, None), (target, None)),
        session.log,
        session.signals.agree,
        lambda network: selfcheck.check_layout(session, network, data.train[:2]),
        loaded.foreign if loaded is not None else None,
    )


def _self_check(session: Session, context: TrainContext, first: Sequence[Example], own_reference: bool) -> None:
    """The policy must be its own reference before training, and its layout the model's own attention."""
    own = selfcheck.check_layout(session, context.engine.policy, first)
    if context.reference is None or not own_reference:
        session.log.say(f"self-check passed: {own}")
        return
    ratio = reference_gap(context, first)
    if not ratio <= selfcheck.TOLERANCE[session.precision]:
        raise SelfCheckError(
            f"self-check: policy and reference differ by {ratio:.2g} nats per token before training; "
            "the reference is miswired (stale cache? remove reference.cache_dir, or use reference.mode=model)"
        )
    session.log.say(f"self-check passed: {own}; policy = reference to {ratio:.1e}")


def _loss_before(session: Session, context: TrainContext, heldout: Sequence[Example]) -> None:
    """Where the loss before training is not known beforehand, as it is (ln 2) with policy = reference."""
    if heldout and context.reference is None and session.out.read_json("before.json") is None:
        metrics = evaluate(context, heldout, session.signals.check)
        session.out.write_json("before.json", {"loss/heldout": metrics["loss/heldout"]})


# ---------------------------------------------------------------------- the end


def _sync(session: Session, parts: _Parts, rollouts: Rollouts) -> Rollout | None:
    """Give the trained weights to whatever answers, which is returned."""
    if not parts.heldout_samples.prompts and session.config.collect is None:
        return None
    policy = parts.full_model()
    rollout = rollouts.of(policy)
    together(session.world, lambda: rollout.sync(policy))
    return rollout


def _summary(session: Session, parts: _Parts, data: Data, step: int) -> Json:
    samples = parts.heldout_samples.after(step)
    kl = parts.heldout_samples.kl(parts.references.network(parts.context.reference)) if samples else None
    last = json.loads((session.out.read("metrics.jsonl") or "").splitlines()[-1])
    summary = {
        "step": step,
        "merged": session.config.merge,
        "seconds": session.seconds(),
        "heldout": f"{len(data.heldout)} {_NOUNS[session.objective.kind]}",
        **summarise(last, samples, kl),
    }
    before = session.out.read_json("before.json")
    return summary if before is None else summary | {"before": before}


class RewardModelInfo:
    """What reward_model.json says. Mean and deviation are of raw scores of held-out answers, for information."""

    def __init__(self, session: Session, context: TrainContext, chat: Set[bool], heldout: Sequence[Example]):
        self.session = session
        self.context = context
        self.chat = chat  # as it is then: whether prompts were conversations, of those there are
        self.heldout = heldout

    def __call__(self) -> Json:
        """Of the weights as they are; all processes must ask."""
        objective = self.session.objective
        assert isinstance(objective, RewardObjective)
        form: Json = {
            "kind": objective.reward_kind,
            "outputs": list(objective.outputs),
            "ends": "end_of_turn",
        }
        # how a prompt that comes as a text is to be written when it is scored
        form["prompts"] = "both" if len(self.chat) > 1 else "chat" if True in self.chat else "text"
        form |= objective.metadata()
        scores = score_rows(self.context, self.heldout, self.session.signals.check)
        if scores is not None and len(scores) > 1:
            form |= {"mean": scores.mean(0).tolist(), "std": scores.std(0, ddof=1).tolist(), "count": len(scores)}
        return form
