"""Where a round's rows come from, and on what its policy is measured: prompts with rewards, or problems with a tool."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
from omegaconf import OmegaConf

from align import build
from align.config import IterateConfig
from align.config.values import check_enough
from align.data.chat import prompt_ids
from align.data.prompts import PromptRow, load_prompts, prompts_fingerprint
from align.engine.world import by_lead, together
from align.evaluate.heldout import changes, heldout_metrics
from align.jsons import Json
from align.models.device import pick_device
from align.rewards.build import RewardHost, components
from align.rollout.base import seed_of
from align.trainers.collect import Collector, collected, collector_of, problems_of, solved_summary
from align.trainers.directions import directed, directed_rounds, directional, scorer
from align.trainers.experience import Experience, Group
from align.trainers.iterate.policies import LoadedPolicy, Policies
from align.trainers.iterate.samples import DRAW, HELDOUT, line_of, sample_metrics, slices, split
from align.trainers.iterate.select import select
from align.trainers.online.probe import probe_of
from align.trainers.row_cache import Line, RowCache
from align.trainers.session import Session
from align.trainers.steploop import Metrics

_ANSWERS = "answers.jsonl"


class Prompts:
    """Completions of prompts, scored by rewards. A chunk is drawn by the policy, the seed, the round and its number."""

    def __init__(self, session: Session):
        """Raises ValueError for data whose rounds could not be learnt from."""
        config, t, s = session.config, session.config.trainer, session.config.sampling
        assert isinstance(t, IterateConfig)
        self.session = session
        self.config = config
        self.trainer = t
        self.sampling = build.sampling(config)
        self.composer = directional(config)
        found = load_prompts(config.data, session.tokenizer, s.max_new_tokens, config.seed)
        session.account(found.audit)
        more = " (data.repeat=[2] sees each prompt twice)"
        check_enough(len(found.train), t.rounds, t.prompts_per_round, f"data.train={config.data.train}", more)
        self.slices = slices(len(found.train), t.rounds, t.prompts_per_round)
        self.train, heldout = self._directed(found.train, found.heldout)
        distinct: dict[tuple[int, ...], PromptRow] = {}
        for prompt in heldout:
            distinct.setdefault(prompt.token_ids, prompt)
        self.heldout = list(distinct.values())[: t.num_samples]
        self.hashes = {"data.train": prompts_fingerprint(self.train), "data.heldout": prompts_fingerprint(heldout)}
        self.rows = [prompt.token_ids for prompt in (*self.train, *self.heldout)]
        self.probe = probe_of(self.train, t.micro_batch_tokens)
        sizes = sorted({len(part) for part in self.slices})
        session.log.say(
            f"plan {t.rounds} rounds of {' or '.join(map(str, sizes))} prompts from {len(self.train)}, "
            f"{s.n} completions of each{' and a greedy one' if t.greedy else ''}"
        )
        room = 2 if session.objective.kind == "pair" else 1
        longest = max(len(p.token_ids) for p in self.train) + room * s.max_new_tokens
        if longest > t.micro_batch_tokens:
            raise ValueError(
                f"trainer.micro_batch_tokens={t.micro_batch_tokens}: a row of a round's data can have {longest} "
                f"tokens; use at least {longest}"
            )
        host = RewardHost(
            None,  # a policy is in memory for one round only
            session.tokenizer,
            pick_device(),
            session.autocast,
            t.micro_batch_tokens,
            session.signals.check,
            session.log.say,
        )
        self.rewards = together(session.world, lambda: components(build.reward_node(config), host))
        session.closing.callback(self.rewards.close)

    def _directed(self, train: list[PromptRow], heldout: list[PromptRow]) -> tuple[list[PromptRow], list[PromptRow]]:
        """The prompts as they are asked: with composer=directional each tells a direction."""
        if self.composer is None:
            return train, heldout
        composer, tokenizer, seed = self.composer, self.session.tokenizer, self.config.seed
        return (
            directed_rounds(train, self.slices, composer, tokenizer, seed),
            directed(heldout, composer, tokenizer, seed + 1),  # the same in each evaluation: they are compared
        )

    def before(self, policies: Policies) -> None:
        """Ask the untrained policy what is held out."""
        self.evaluate(0, policies)

    def draw(self, number: int, policies: Policies) -> tuple[Path, Metrics]:
        """A round's rows: the file that the offline trainer reads, and what is told of them. What an earlier start drew
        is read. Raises ValueError if they would teach nothing."""
        t = self.trainer
        prompts = [self.train[i] for i in self.slices[number - 1]]
        cache = self._cache(number, prompts, policies)
        experience = self._experience(policies.of(number - 1))

        def chunk(k: int, places: range) -> list[Line]:
            chosen, sampling = [prompts[i] for i in places], self.sampling.at(DRAW, number, k)
            return self._lines(experience.draw(chosen, sampling, self.config.sampling.n, t.greedy))

        progress = self.session.shown(f"round {number}: completions")
        lines = cache.chunked("samples", len(prompts), t.chunk_prompts, chunk, progress)
        chosen = select(self.config, number, lines)
        row = sample_metrics(lines, self.rewards.names) | chosen.metrics()
        self.session.log.say(f"round {number}/{t.rounds}: reward {row['reward/total']:.3f}; {chosen.line()}")
        if not chosen.rows:
            failures = f"; failures so far: {self.rewards.counts}" if self.rewards.counts else ""
            raise ValueError(
                f"round {number}: trainer.select={t.select} leaves nothing to learn from: {chosen.line()}{failures}; "
                "raise sampling.n or sampling.temperature, or choose another rule with pairs=... or trainer.min_score"
                + (" in another run.dir" if number > 1 else "")
            )
        cache.write("data.jsonl", chosen.rows)
        seconds = {"time/generate_s": experience.generate_seconds, "time/score_s": experience.score_seconds}
        return cache.directory / "data.jsonl", row | seconds

    def _cache(self, number: int, prompts: Sequence[PromptRow], policies: Policies) -> RowCache:
        """The place of a round's completions; what was drawn under another key is thrown away, which is said."""
        sources = "\n".join(p.source for p in prompts)
        key = {
            "round": number,
            "prompts": prompts_fingerprint(prompts),
            "sources": hashlib.sha256(sources.encode()).hexdigest(),
            "greedy": self.trainer.greedy,
            "chunk": self.trainer.chunk_prompts,
        }
        cache = RowCache(policies.directory(number), self.session.world)
        if cache.begin(key | self._depends_on(policies.of(number - 1))):
            said = "was made with other settings, weights or prompts; it is begun anew"
            self.session.log.say(f"{cache.directory} {said}")
        return cache

    def _depends_on(self, held: LoadedPolicy) -> Json:
        """What all completions of a policy depend on."""
        tree = OmegaConf.to_container(self.config.tree, resolve=True)
        assert isinstance(tree, dict)
        settings = {name: tree.get(name) for name in ("seed", "sampling", "rollout", "reward", "composer")}
        return {"weights": held.hash, "precision": self.session.precision_name, **settings}

    def _experience(self, held: LoadedPolicy) -> Experience:
        by = None if self.composer is None else scorer(self.composer, self.rewards.names)
        return Experience(held.rollout, self.rewards, self.session.tokenizer, world=self.session.world, scorer=by)

    def _lines(self, groups: Sequence[Group]) -> list[Line]:
        return [line_of(group, self.rewards.names, self.session.tokenizer) for group in groups]

    def evaluate(self, number: int, policies: Policies) -> Metrics:
        """The policy that a round left, on the held-out prompts, which are asked once; empty without any."""
        if not self.heldout:
            return {}
        t, held = self.trainer, policies.of(number)
        cache = self._answers(policies, number)
        key = {"prompts": prompts_fingerprint(self.heldout), "answers": [t.heldout_n, t.sample_tokens]}
        cache.begin(key | self._depends_on(held))

        def answers() -> list[Line]:
            sampling = replace(self.sampling, max_new_tokens=t.sample_tokens).at(HELDOUT)
            with policies.rollouts.showing(f"round {number}: held-out prompts"):
                return self._lines(self._experience(held).draw(self.heldout, sampling, t.heldout_n, greedy=True))

        lines = cache.rows(_ANSWERS, answers)
        return dict(heldout_metrics(*split(lines), self.rewards.names, t.pass_component))

    def summary(self, policies: Policies) -> Json:
        """What summary.json says of them: before the first round and after the newest."""
        out: Json = {"heldout": f"{len(self.heldout)} prompts"}
        if self.heldout:
            places = (self._answers(policies, number) for number in (0, policies.newest))
            before, after = (split(cache.read(_ANSWERS) or [])[0] for cache in places)
            out["rewards"] = changes(before, after, self.rewards.names)
        return out

    def _answers(self, policies: Policies, number: int) -> RowCache:
        return RowCache(policies.directory(number) / "heldout", self.session.world)


class Problems:
    """Problems solved with a tool, which a verifier judges: the trajectories of a round are a collection."""

    def __init__(self, session: Session):
        config = session.config
        assert config.collect is not None
        assert isinstance(config.trainer, IterateConfig)
        self.session = session
        rounds, count = config.trainer.rounds, config.trainer.prompts_per_round
        self.slices = slices(config.collect.num_problems, rounds, count)
        self.hashes = {"collect": problems_of(config.collect).fingerprint()}
        self.rows: list[tuple[int, ...]] = []
        text = "What is 2 + 3?"  # the prompts of problems are made by the loop with the tool
        ids = tuple(prompt_ids(session.tokenizer, [{"role": "user", "content": text}]))
        self.probe = probe_of([PromptRow("probe", ids, text)], config.trainer.micro_batch_tokens)

    def before(self, policies: Policies) -> None:
        """The first round's collector asks before it collects."""

    def draw(self, number: int, policies: Policies) -> tuple[Path, Metrics]:
        """A round's rows: the file that the offline trainer reads, and what is told of them."""
        start = time.perf_counter()
        held, part = policies.of(number - 1), self.slices[number - 1]
        key = {"model": held.hash, "precision": self.session.precision_name, "problems": [part.start, part.stop]}
        found = collected(self.session, self._collector(number, policies), key, first=number == 1)
        kind, report = self.session.objective.kind, found.report
        reported = ("accuracy", "trajectories", "right", "wrong", "problems")
        row: Metrics = {f"collect/{name}": report[name] for name in reported}
        row |= {f"data/dropped_{reason}": count for reason, count in report["dropped"].items()}
        row["data/rows"] = report["pairs" if kind == "pair" else "labelled"]
        return found.file(kind), row | {"time/generate_s": time.perf_counter() - start}

    def _collector(self, number: int, policies: Policies) -> Collector:
        """Of a round, with the policy in memory."""
        assert policies.held is not None
        directory, seed = policies.directory(number), seed_of(self.session.config.seed, DRAW, number)
        what = f"round {number}: trajectories"
        return collector_of(self.session, policies.held.rollout, directory, seed, what, self.slices[number - 1])

    def evaluate(self, number: int, policies: Policies) -> Metrics:
        """The policy that a round left, on held-out problems."""
        policies.of(number)
        values = self._collector(number, policies).after()
        return {"heldout/solved": float(np.mean(values)), "heldout/problems": len(values)}

    def summary(self, policies: Policies) -> Json:
        """What summary.json says of them: before the first round and after the newest."""
        first, last = (policies.directory(number) for number in (1, policies.newest))
        solved = self.session.world.share(by_lead(self.session.world, lambda: solved_summary(first, last)))
        return {"heldout": f"{solved['count']} problems", "problems": solved}
