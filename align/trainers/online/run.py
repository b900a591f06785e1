"""`align train` with a policy that learns from what it writes itself: builds the parts, runs the loop, tells what came
of it.

Blind to the algorithm: the estimator of advantages and the objective say what they need.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

from align import build, checkpoint
from align.advantages.base import Advantage
from align.config import Config, OnlineConfig
from align.data.audit import Audit
from align.data.prompts import PromptRow, load_prompts, prompts_fingerprint
from align.engine.base import Engine
from align.engine.build import make_engine
from align.engine.world import together
from align.jsons import Json
from align.models.policy import Policy
from align.rewards.build import RewardHost, Rewards, components
from align.trainers import resume, selfcheck, trained
from align.trainers.experience import Experience
from align.trainers.loop import Plan, ReferenceModel, TrainContext
from align.trainers.observing import observers_of
from align.trainers.online.heldout import Heldout
from align.trainers.online.learner import Learner
from align.trainers.online.probe import branching, probe_of, self_check
from align.trainers.online.sampler import FailureCounts, GroupSampler
from align.trainers.online.task import Online
from align.trainers.online.values import Forward
from align.trainers.references import ReferenceModels
from align.trainers.rollouts import Rollouts
from align.trainers.session import Session, start
from align.trainers.steploop import StepLoop, size_of
from align.trainers.trained import FullModel, Trained
from align.trainers.transcripts import Transcripts
from align.types import Example

if TYPE_CHECKING:
    from align.trainers.composing import Composing


def train(config: Config, command: str) -> int:
    """Run or resume; returns the exit code. Raises ValueError for what the user can cure."""
    objective = build.objective(config)
    advantage = build.advantage(config)
    return start(config, command, objective, partial(run, advantage=advantage))


@dataclass(frozen=True)
class PromptData:
    """The prompts of a run as they are given to the policy, and the fingerprints of all prompts of its data."""

    train: list[PromptRow]
    heldout: list[PromptRow]
    hashes: dict[str, str]
    audit: Audit


@dataclass(frozen=True)
class Parts:
    """What is made before the first step."""

    task: Online
    full_model: FullModel
    model_hash: str


def run(session: Session, advantage: Advantage) -> int:
    """Everything from prompts to final/; returns the exit code."""
    composer = composer_of(session.config, advantage, session.log.say)
    data = prompts_of(session, composer)
    session.account(data.audit)
    state = resume.restore_point(session, data.hashes)
    plan = resume.planned(session, state, len(data.train))
    if resume.nothing_left(session, state, plan.num_steps):
        return 0
    parts = prepared(session, advantage, composer, data, plan, state)
    fixed = {"schedule_steps": plan.schedule_steps, "data": data.hashes, "model": parts.model_hash}
    engine, observers = parts.full_model.engine, observers_of(session, parts.full_model, plan.num_steps)
    loop = StepLoop(session, plan.num_steps, state, fixed, observers, engine.write, size_of(engine))
    step = loop.run(parts.task)
    summary = _summary(session, parts.task, step) | loop.summary()
    parts.full_model.write(session.out.final, summary)
    loop.end(summary)
    return 0


def composer_of(config: Config, advantage: Advantage, say: Callable[[str], None]) -> Composing | None:
    """Of the settings; None without a composer. Raises ValueError for what the user can cure."""
    if config.composer is None:
        return None
    from align.trainers.composing import composing  # with it come measuring and pictures

    return composing(config, config.composer, advantage, say)


def prepared(
    session: Session,
    advantage: Advantage,
    composer: Composing | None,
    data: PromptData,
    plan: Plan,
    state: checkpoint.State | None,
) -> Parts:
    """Everything up to the first step: built, checked, restored, and the untrained policy's answers written."""
    config, t = session.config, session.config.trainer
    assert isinstance(t, OnlineConfig)
    model = trained.load(session)
    selfcheck.check_tokens_of(session, model, (p.token_ids for p in (*data.train, *data.heldout)))
    made = _policy(session, model, advantage, composer, data.train, plan)
    engine = make_engine(config, made.network, session.precision, session.world, t.value_lr_scale)
    full_model = FullModel(made, engine)
    model_hash = full_model.hash()
    resume.check_weights(session, state, model_hash)
    probe = probe_of(data.train, t.micro_batch_tokens)
    reference = _reference(session, engine, model_hash, probe)
    cached = None
    if "reference" in session.objective.needs:
        cached = ReferenceModel(lambda rows: [row.columns["reference_logps"] for row in rows], None)
    context = TrainContext(engine, session.objective, made.layout, t.micro_batch_tokens, cached)
    if composer is not None:
        composer.check_parameters(engine.parameters)
    # the lead's value for all: on a network's file system others may not see resolved.json yet
    selective = session.world.share(made.activation_checkpointing) == "selective"
    learner = Learner(session, context, advantage, reference, composer, plan.schedule_steps, selective)
    self_check(session, context, probe, reference)
    resume.restore(session, engine, state, plan)
    rewards = _rewards(session, full_model)
    task = _task(session, data, plan, learner, rewards, full_model, probe)
    task.transcripts.forget(state.step if state else 0)
    task.check_sync(state.step if state else 0)
    if state is None:
        task.heldout.before()
        task.failure_counts.take()
    return Parts(task, full_model, model_hash)


def prompts_of(session: Session, composer: Composing | None) -> PromptData:
    """What the data hold, and what is asked of it."""
    config = session.config
    prompts = load_prompts(config.data, session.tokenizer, config.sampling.max_new_tokens, config.seed)
    train, heldout = prompts.train, prompts.heldout[: config.trainer.num_samples]
    if composer is not None:
        train = composer.prompts(train, session.tokenizer, config.seed)
        heldout = composer.prompts(heldout, session.tokenizer, config.seed + 1)
    hashes = {
        "data.train": prompts_fingerprint(prompts.train),
        "data.heldout": prompts_fingerprint(prompts.heldout),
    }
    return PromptData(train, heldout, hashes, prompts.audit)


def _policy(
    session: Session,
    model: object,
    advantage: Advantage,
    composer: Composing | None,
    train: Sequence[PromptRow],
    plan: Plan,
) -> Trained:
    t, s = session.config.trainer, session.config.sampling
    assert isinstance(t, OnlineConfig)
    longest = max(len(p.token_ids) for p in train) + s.max_new_tokens
    if longest > t.micro_batch_tokens:
        raise ValueError(
            f"trainer.micro_batch_tokens={t.micro_batch_tokens}: a prompt with its completion can have {longest} "
            f"tokens; use at least {longest}"
        )
    value_head = int("values" in advantage.needs) if composer is None else composer.num_values
    made = trained.prepare(
        session, model, longest * t.batch_size * s.n, lambda model, layout: Policy(model, layout, value_head)
    )
    steps = t.ppo_epochs * t.num_minibatches
    each = "" if steps == 1 else f", {steps} optimiser steps on each"
    first, *others = made.lines
    plan_line = (
        f"plan {plan.num_steps} steps of {t.batch_size} prompts from {len(train)}, {s.n} completions of "
        f"each{' and a greedy one' if 'greedy' in advantage.needs else ''}{each}; at most "
        f"{t.micro_batch_tokens} tokens at once"
    )
    for line in (first, plan_line, *others):
        session.log.say(line)
    if s.temperature != 1 or s.top_p != 1 or s.top_k != 0:
        session.log.say(
            f"completions are drawn with temperature {s.temperature:g}, top_p {s.top_p:g}, top_k {s.top_k}, not "
            "from the policy itself, whose log-probs are those of temperature 1: a small bias"
        )
    return made


def _reference(session: Session, engine: Engine, model_hash: str, probe: Sequence[Example]) -> Forward | None:
    """What the KL is to, where one is asked for."""
    t = session.config.trainer
    assert isinstance(t, OnlineConfig)
    if "reference" not in session.objective.needs and t.kl_in_reward == 0:
        return None
    return ReferenceModels(
        session.config,
        engine,
        session.pretrained,
        model_hash,
        [],
        session.log,
        session.signals.agree,
        lambda network: selfcheck.check_layout(session, network, branching(probe)),
    ).fresh()


def _rewards(session: Session, full_model: FullModel) -> Rewards:
    node = build.reward_node(session.config)
    policy = full_model()
    host = RewardHost(
        policy,
        session.tokenizer,
        policy.device,
        session.autocast,
        session.config.trainer.micro_batch_tokens,
        session.signals.check,
        session.log.say,
    )
    rewards = together(session.world, lambda: components(node, host))
    session.closing.callback(rewards.close)
    return rewards


def _task(
    session: Session,
    data: PromptData,
    plan: Plan,
    learner: Learner,
    rewards: Rewards,
    full_model: FullModel,
    probe: Sequence[Example],
) -> Online:
    config, t, s = session.config, session.config.trainer, session.config.sampling
    assert isinstance(t, OnlineConfig)
    sampling = build.sampling(config)
    transcripts = Transcripts(session.out, rewards.names, t.samples_every)
    rollouts, policy, needs = Rollouts(session), full_model(), learner.advantage.needs
    rollout = together(session.world, lambda: rollouts.of(policy))
    experience = Experience(rollout, rewards, session.tokenizer, "steps" in needs, session.world)
    limit = rollout.max_tokens
    longest = max(len(p.token_ids) for p in (*data.train, *data.heldout)) + s.max_new_tokens
    if limit is not None and longest > limit:
        raise ValueError(
            f"a prompt and sampling.max_new_tokens={s.max_new_tokens} can make {longest} tokens, the "
            f"engine takes {limit}: raise rollout.max_model_len or the server's --max-model-len, or lower "
            "data.max_tokens with data.overlong=drop"
        )
    composer = learner.composing
    zero_variance = (lambda group: group.zero_variance) if composer is None else composer.zero_variance
    sampler = GroupSampler(config, data.train, plan, sampling, experience, zero_variance, "greedy" in needs)
    heldout = Heldout(t, data.heldout, sampling, experience, transcripts, composer)
    failure_counts = FailureCounts(session.world, rollout, rewards)
    return Online(session, plan, sampler, experience, learner, heldout, transcripts, failure_counts, full_model, probe)


def _summary(session: Session, task: Online, step: int) -> Json:
    last = json.loads((session.out.read("metrics.jsonl") or "").splitlines()[-1])
    last |= task.heldout.after(step)
    if task.composing is not None and session.world.lead:
        task.composing.draw(session.out.path)
    # what a component put into the policy's model is not the policy's
    task.experience.rewards.close()
    summary: Json = {
        "step": step,
        "merged": session.config.merge,
        "seconds": session.seconds(),
        "heldout": f"{len(task.heldout.prompts)} prompts",
        "metrics": {k: v for k, v in last.items() if k.startswith(("loss/", "heldout/")) and v is not None},
        "kl": last.get("kl/reference"),
    }
    if task.heldout.prompts:
        summary["rewards"] = task.transcripts.changes()
    return summary
