"""One round of trajectories from the policy itself, and the data files that a trainer reads of it.

The policy solves problems with a tool; a verifier says which trajectories are right; right and wrong ones of one
problem make pairs (multi-turn DPO) or stand alone with their label (multi-turn KTO). Xiong et al. 2024, Building Math
Agents with Multi-Turn Iterative Preference Learning, arXiv 2409.02392. What is learnt from the files is offline.py's.

collect/key.json  collect/trajectories-000.jsonl ...  collect/pairs.jsonl  collect/labelled.jsonl  collect/collect.json
problems-before.jsonl  problems-after.jsonl
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from align import build
from align.config import CollectConfig
from align.data.reasoning import Problem, ProblemSet, final_answer, prompt_messages
from align.data.reasoning import problems as problem_set
from align.engine.world import World, by_lead
from align.evaluate.samples import paired_bootstrap
from align.jsons import Fields, Json, Tokenizer
from align.rollout.base import Completion, Rollout, Sampling
from align.rollout.toolloop import ToolLoop, Trajectory, re_encodes
from align.tools import Observation, Tool
from align.trainers.generation import generate_distributed
from align.trainers.row_cache import Progress, RowCache, read_rows, write
from align.trainers.session import Session

Row = Json


@dataclass(frozen=True)
class Collected:
    """What a round left behind."""

    directory: Path
    report: Fields  # collect.json

    def file(self, kind: str) -> Path:
        """The data file for objectives of a kind, pair or labelled. Raises ValueError when it would teach nothing."""
        r = self.report
        if kind == "pair" and r["pairs"] == 0 or r["right"] == 0 or r["wrong"] == 0:
            raise ValueError(
                f"collect.task={r['task']}: {r['right']} right and {r['wrong']} wrong trajectories of {r['problems']} "
                f"problems, {r['problems_with_both']} problems have both; raise collect.samples_per_problem or "
                "collect.num_problems, or make the problems "
                + ("harder" if r["accuracy"] > 0.5 else "easier")
                + " in collect.task_settings"
            )
        return self.directory / ("pairs.jsonl" if kind == "pair" else "labelled.jsonl")

    def lines(self) -> list[str]:
        """The report for people."""
        r = self.report
        dropped = ", ".join(f"{n} {reason}" for reason, n in r["dropped"].items()) or "none"
        return [
            f"collected {r['trajectories']} trajectories of {r['problems']} problems, {r['accuracy']:.1%} right; "
            f"usable {r['right']} right, {r['wrong']} wrong; left out: {dropped}",
            f"problems with right and wrong ones {r['problems_with_both']}, only right {r['problems_only_right']}, "
            f"only wrong {r['problems_only_wrong']}, neither {r['problems_with_neither']}; "
            f"{r['pairs']} pairs, {r['labelled']} labelled rows",
        ]


class Collector:
    """Asks a policy; `settings` is the section collect of the configuration.

    directory: the run's. part: the places of the problems to learn from; None: all. progress: wraps the loop over
    chunks, may raise. In a run of several processes all of them make the same calls.
    """

    def __init__(
        self,
        settings: CollectConfig,
        rollout: Rollout,
        tokenizer: Tokenizer,
        tool: Tool,
        directory: Path,
        *,
        seed: int,
        max_tokens: int,
        part: range | None = None,
        world: World | None = None,
        progress: Progress = lambda items, _: items,
    ):
        self.settings = settings
        self.tokenizer = tokenizer
        self.world = world or World()
        self.directory = directory / "collect"
        self.cache = RowCache(self.directory, self.world)
        self.answers = RowCache(directory, self.world)  # those of held-out problems
        self.seed = seed
        self.max_tokens = max_tokens
        self.progress = progress
        self.loop = _Loop(
            self.world,
            rollout,
            tokenizer,
            tool,
            max_turns=settings.max_turns,
            max_tokens=max_tokens,
            stop=settings.stop,
            role=settings.observation_role,
        )
        self.problems: ProblemSet = problems_of(settings)
        self.train = self.problems.train if part is None else [self.problems.train[i] for i in part]

    def begin(self, key: Fields, bound: bool = False) -> bool:
        """Delete trajectories of other settings, weights or problems; see RowCache.begin. key: what else they depend
        on, such as the hash of the weights."""
        own = {"settings": vars(self.settings), "questions": self.problems.fingerprint()}
        key = {**key, "seed": self.seed, "max_tokens": self.max_tokens, **own}
        answers = [self.answers.directory / f"problems-{phase}.jsonl" for phase in ("before", "after")]
        return self.cache.begin(key, bound, answers)

    def collect(self) -> Collected:
        """The round, from where an earlier start left it; a finished one is only read."""
        s = self.settings
        rows = self.cache.chunked("trajectories", len(self.train), s.chunk_problems, self._chunk, self.progress)
        pairs, labelled, account = select(rows, s, self.seed)
        report = {"task": s.task, "repeated_problems": self.problems.num_repeated, **account}
        self.cache.write("pairs.jsonl", pairs)
        self.cache.write("labelled.jsonl", labelled)
        by_lead(self.world, lambda: write(self.directory / "collect.json", json.dumps(report, indent=1) + "\n"))
        return Collected(self.directory, report)

    def before(self) -> list[float]:
        """Of each held-out problem 1.0 if the untrained policy's greedy answer is right, else 0.0.

        Written to problems-before.jsonl, which a resumed run reads.
        """
        return _solved(self.answers.rows("problems-before.jsonl", lambda: self._evaluate("before")))

    def after(self) -> list[float]:
        """The same of the policy as it is now, in the same order; written to problems-after.jsonl."""
        return _solved(self.answers.write("problems-after.jsonl", self._evaluate("after")))

    def _evaluate(self, phase: str) -> list[Row]:
        heldout = self.problems.heldout
        sampling = Sampling(self.settings.max_new_tokens, temperature=0.0)
        answers = self.loop.run([self._prompt(p) for p in heldout], sampling)
        return [{"phase": phase, **self._row(p, t)} for p, (t,) in zip(heldout, answers, strict=True)]

    def _chunk(self, number: int, places: range) -> list[Row]:
        s, problems = self.settings, [self.train[i] for i in places]
        sampling = Sampling(s.max_new_tokens, s.temperature, s.top_p, seed=self.seed).at(number)
        groups = self.loop.run([self._prompt(p) for p in problems], sampling, s.samples_per_problem)
        return [self._row(p, t) for p, group in zip(problems, groups, strict=True) for t in group]

    def _prompt(self, problem: Problem) -> list[Json]:
        return prompt_messages(problem, self.settings.num_examples)

    def _row(self, problem: Problem, trajectory: Trajectory) -> Row:
        right = trajectory.finished and self.problems.correct(problem, trajectory.answer)
        first = trajectory.num_prompt_messages
        return {
            "problem": problem.id,
            "answer": problem.answer,
            "given": final_answer(trajectory.answer) if trajectory.finished else None,
            "prompt_messages": list(trajectory.messages[:first]),
            "messages": list(trajectory.messages[first:]),
            "token_ids": list(trajectory.token_ids),
            "spans": [list(span) for span in trajectory.spans],
            "logps": None if trajectory.logps is None else list(trajectory.logps),
            "label": right,
            "reward": float(right),
            "finished": trajectory.finished,
            "end": trajectory.end,
            "num_turns": trajectory.num_turns,
            "tool_errors": trajectory.tool_errors,
            "last_call_failed": trajectory.last_call_failed,
            "re_encodes": re_encodes(self.tokenizer, trajectory),
        }


class _Loop(ToolLoop):
    """Of all processes of a run: the draws of each turn are divided among them, a call is run by the lead alone."""

    def __init__(self, world: World, *arguments: Any, **keys: Any):
        super().__init__(*arguments, **keys)
        self.world = world

    def generate(self, prompts: Sequence[Sequence[int]], sampling: Sampling, n: int = 1) -> list[list[Completion]]:
        """See ToolLoop."""
        return generate_distributed(self.world, self.rollout, prompts, sampling, n)

    def observe(self, calls: Sequence[str]) -> list[Observation]:
        """See ToolLoop."""
        return self.world.share(by_lead(self.world, lambda: ToolLoop.observe(self, calls)))


def collector_of(
    session: Session, rollout: Rollout, directory: Path, seed: int, what: str, part: range | None = None
) -> Collector:
    """A collector as the settings of a run say; what: the name of its progress."""
    config = session.config
    assert config.collect is not None
    return Collector(
        config.collect,
        rollout,
        session.tokenizer,
        build.tool(config),
        directory,
        seed=seed,
        max_tokens=config.data.max_tokens,
        part=part,
        world=session.world,
        progress=session.shown(what),
    )


def collected(
    session: Session, collector: Collector, key: Fields, bound: bool = False, first: bool = True
) -> Collected:
    """What a policy writes before training, collected now or by an earlier start; see Collector.begin. first: whether
    its answers to the held-out problems are wanted too."""
    collector.begin(key, bound)
    if first:
        collector.before()
    found = collector.collect()
    for line in found.lines():
        session.log.say(line)
    return found


def solved_summary(first: Path, last: Path) -> Json:
    """Shares of held-out problems solved before and after, as two collectors left them in their directories, and their
    difference with its interval."""
    before, after = (
        _solved(read_rows(where / f"problems-{phase}.jsonl")) for where, phase in ((first, "before"), (last, "after"))
    )
    change = paired_bootstrap(before, after)
    return {
        "count": len(before),
        "before": sum(before) / len(before),
        "after": sum(after) / len(after),
        "change": {"mean": change.mean, "low": change.low, "high": change.high},
    }


def _solved(rows: Sequence[Row]) -> list[float]:
    return [float(row["reward"]) for row in rows]


def problems_of(settings: CollectConfig) -> ProblemSet:
    """The problems that the settings of `collect` name. Raises ValueError for impossible ones."""
    s = settings
    return problem_set(s.task, s.task_settings or {}, s.num_problems, s.num_heldout, s.problem_seed)


def select(rows: Sequence[Row], settings: CollectConfig, seed: int) -> tuple[list[Row], list[Row], Json]:
    """Pairs, labelled rows and the account of them. Every trajectory is used or counted under one reason.

    Left out: unfinished ones; repeated ones (same tokens, same problem); right ones that called no tool, or whose last
    call failed: their answer was not read from the tool. Of each problem min(right, wrong, max_pairs_per_problem)
    pairs, drawn at random without replacement by seed and problem; max_labelled_per_problem of each label alike.
    """
    by_problem: dict[str, list[Row]] = {}
    for row in rows:
        by_problem.setdefault(row["problem"], []).append(row)
    dropped: Counter[str] = Counter()
    kinds: Counter[str] = Counter()
    pairs: list[Row] = []
    labelled: list[Row] = []
    totals = {"right": 0, "wrong": 0}
    for problem, group in by_problem.items():
        right, wrong = _usable(group, dropped)
        totals["right"] += len(right)
        totals["wrong"] += len(wrong)
        kinds[_kind(right, wrong)] += 1
        rng = _generator(seed, problem)
        right, wrong = ([side[i] for i in rng.permutation(len(side))] for side in (right, wrong))
        for chosen, rejected in list(zip(right, wrong, strict=False))[: settings.max_pairs_per_problem]:
            sides = {"chosen": _conversation(chosen), "rejected": _conversation(rejected)}
            pairs.append({"problem": problem, **sides, "origin": "on_policy"})
        for side, label in ((right, True), (wrong, False)):
            for row in side[: settings.max_labelled_per_problem]:
                labelled.append({"problem": problem, **_conversation(row), "label": label, "origin": "on_policy"})
    num_right = sum(row["label"] for row in rows)
    report = {
        "problems": len(by_problem),
        "trajectories": len(rows),
        "accuracy": num_right / max(1, len(rows)),
        **totals,
        "dropped": dict(sorted(dropped.items())),
        **{f"problems_{kind}": kinds[kind] for kind in ("with_both", "only_right", "only_wrong", "with_neither")},
        "pairs": len(pairs),
        "labelled": len(labelled),
        "turns_mean": float(np.mean([row["num_turns"] for row in rows])) if rows else 0.0,
        "called_tool": sum(_called(row) for row in rows),
        "tool_errors": sum(row["tool_errors"] for row in rows),
        "policy_tokens": sum(end - start for row in rows for _, start, end, target in row["spans"] if target),
        "re_encoded_differently": sum(not row["re_encodes"] for row in rows),
    }
    assert totals["right"] + totals["wrong"] + dropped.total() == len(rows)
    return pairs, labelled, report


def _usable(group: Sequence[Row], dropped: Counter[str]) -> tuple[list[Row], list[Row]]:
    seen: set[tuple[int, ...]] = set()
    right: list[Row] = []
    wrong: list[Row] = []
    for row in group:
        ids = tuple(row["token_ids"])
        if not row["finished"]:
            dropped["unfinished"] += 1
        elif ids in seen:
            dropped["repeated"] += 1
        elif row["label"] and not _called(row):
            dropped["right_without_call"] += 1
        elif row["label"] and row["last_call_failed"]:
            dropped["right_after_failed_call"] += 1
        else:
            (right if row["label"] else wrong).append(row)
        seen.add(ids)
    return right, wrong


def _called(row: Row) -> bool:
    return any(role == "tool" for role, *_ in row["spans"])


def _kind(right: Sequence[Row], wrong: Sequence[Row]) -> str:
    if right and wrong:
        return "with_both"
    return "only_right" if right else "only_wrong" if wrong else "with_neither"


def _conversation(row: Row) -> Row:
    """The tokens, and as messages what follows the worked examples: the question is the first of them."""
    messages = [row["prompt_messages"][-1], *row["messages"]]
    return {"token_ids": row["token_ids"], "spans": row["spans"], "messages": messages, "finished": row["finished"]}


def _generator(seed: int, problem: str) -> np.random.Generator:
    digest = hashlib.blake2b(f"{seed} {problem}".encode(), digest_size=8).digest()
    return np.random.default_rng(int.from_bytes(digest, "little"))
