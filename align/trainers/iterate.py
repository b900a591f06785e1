"""`align train` in rounds: the policy draws, its completions are scored and selected, the offline trainer learns from
them, and the next round starts from what it left.

A round's training is an ordinary offline run in rounds/NN/train. rounds.py has what else a round keeps. A round is a
function of the weights it starts from, its prompts, the seed and its number: one that was killed comes out the same.
"""

from __future__ import annotations

import gc
import hashlib
import shutil
import time
from collections.abc import Sequence
from dataclasses import fields, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from omegaconf import DictConfig, OmegaConf

from align import build, checkpoint
from align.config import Config, IterateConfig, TrainerConfig
from align.data.chat import prompt_ids
from align.data.pairs import MaxMin
from align.data.prompts import PromptRow, load_prompts, prompts_fingerprint
from align.evaluate.heldout import changes, heldout_metrics
from align.jsons import Json
from align.models.device import pick_device
from align.models.policy import Policy, weights_hash
from align.models.pretrained import Pretrained, from_hub
from align.rewards.build import RewardHost, components
from align.rollout.base import Sampling, seed_of
from align.rundir import environment
from align.trainers import offline, resume, rounds, selfcheck, trained
from align.trainers.collect import Collector, problems_of
from align.trainers.directions import directed, directed_rounds, directional, scorer
from align.trainers.experience import Experience
from align.trainers.final import final_table, model_card
from align.trainers.loop import token_values
from align.trainers.offline import solved_summary
from align.trainers.online.probe import ENGINE_TOLERANCE, PROBE_PROMPTS
from align.trainers.rollouts import Rollouts
from align.trainers.session import SelfCheckError, Session, start
from align.types import Example, Prompt, Row

_DRAW, _TRAIN, _HELDOUT = range(3)  # the first key of the seeds of each stage
_LAST = ("loss/", "accuracy/", "reward/margin", "wpo/", "nll/", "kl/")  # of a round's training, told with the round


def train(config: Config, command: str) -> int:
    """Run or resume; returns the exit code. Raises ValueError for what the user can cure."""
    objective = build.objective(config)
    return start(config, command, objective, lambda session: Iteration(session).run())


class Iteration:
    """Rounds of training on the policy's own completions, in the order they happen."""

    def __init__(self, session: Session):
        config = session.config
        assert isinstance(config.trainer, IterateConfig)
        self.session = session
        self.config = config
        self.objective = session.objective
        self.out = session.out
        self.log = session.log
        self.tokenizer = session.tokenizer
        self.rollouts = Rollouts(session)
        self.trainer = config.trainer
        s = config.sampling
        self.sampling = Sampling(s.max_new_tokens, s.temperature, s.top_p, s.top_k, tuple(s.stop), config.seed)
        self.composer = directional(config)
        self.rewards: Any = None
        self.train: list[PromptRow] = []
        self.heldout: list[PromptRow] = []
        self._at = 0  # the round that left the policy in memory
        self._policy: Policy | None = None
        self._loaded: Any = None
        self._hash = ""

    def run(self) -> int:
        """Everything from prompts to final/."""
        t, log = self.trainer, self.log
        self.out.write_json("environment.json", environment(self.session.command))
        self._load()
        state = resume.restore_point(self.session, self.data_hash)
        done = state.step if state is not None else 0
        if done == t.rounds and resume.complete(self.session, done):
            log.say(f"{self.out.path} is complete after round {done}")
            return 0
        log.say(f"precision {self.session.precision_name} ({self.session.precision_why})")
        if done == 0 or t.reference == "fixed":
            self._load_policy(0)
            self.start_hash = self._hash
            resume.check_weights(self.session, state, self.start_hash)
        else:
            assert state is not None
            self.start_hash = state.progress["model"]
        if state is not None and done:
            log.say(f"resumed {self.out.path} after round {done}")
        self.bound = state is not None
        log.keep(done)
        if done == 0:
            self._evaluate(0)
        for number in range(done + 1, t.rounds + 1):
            self._row(number, self._round(number))
            self._save(number)
        self._finish()
        return 0

    # ------------------------------------------------------------------ what is asked

    def _load(self) -> None:
        """The prompts, or the problems, and the slice of each round."""
        t, config = self.trainer, self.config
        if config.collect is not None:
            settings = config.collect
            self.tool = build.tool(config)
            self.slices = rounds.slices(settings.num_problems, t.rounds, t.prompts_per_round, "collect.num_problems")
            self.data_hash = {"collect": problems_of(settings).fingerprint()}
            return
        prompts = load_prompts(config.data, self.tokenizer, self.sampling.max_new_tokens, config.seed)
        count, source = len(prompts.train), f"data.train={config.data.train}"
        self.slices = rounds.slices(count, t.rounds, t.prompts_per_round, source)
        if self.composer is not None:
            composer, tokenizer, seed = self.composer, self.tokenizer, config.seed
            train = directed_rounds(prompts.train, self.slices, composer, tokenizer, seed)
            # the same in each evaluation: they are compared
            heldout = directed(prompts.heldout, composer, tokenizer, seed + 1)
            prompts = replace(prompts, train=train, heldout=heldout)
        distinct: dict[tuple[int, ...], PromptRow] = {}
        for prompt in prompts.heldout:
            distinct.setdefault(prompt.token_ids, prompt)
        self.train, self.heldout = prompts.train, list(distinct.values())[: t.num_samples]
        self.out.write_json("audit.json", prompts.audit.as_dict())
        for line in prompts.audit.lines():
            self.log.say(line)
        self.data_hash = {
            "data.train": prompts_fingerprint(prompts.train),
            "data.heldout": prompts_fingerprint(prompts.heldout),
        }
        sizes = sorted({len(part) for part in self.slices})
        self.log.say(
            f"plan {t.rounds} rounds of {' or '.join(map(str, sizes))} prompts from {len(self.train)}, "
            f"{config.sampling.n} completions of each{' and a greedy one' if t.greedy else ''}"
        )
        room = 2 if self.objective.kind == "pair" else 1
        longest = max(len(p.token_ids) for p in self.train) + room * self.sampling.max_new_tokens
        if longest > t.micro_batch_tokens:
            raise ValueError(
                f"trainer.micro_batch_tokens={t.micro_batch_tokens}: a row of a round's data can have {longest} "
                f"tokens; use at least {longest}"
            )
        self.rewards = components(self._node("reward"), self._reward_host())
        self.session.closing.callback(self.rewards.close)

    def _node(self, name: str) -> Json:
        node = OmegaConf.to_container(self.config.tree[name], resolve=True)
        assert isinstance(node, dict)
        return node  # type: ignore[return-value]

    def _reward_host(self) -> RewardHost:
        return RewardHost(
            None,  # a policy is in memory for one round only
            self.tokenizer,
            pick_device(),
            self.session.autocast,
            self.trainer.micro_batch_tokens,
            self.session.signals.check,
            self.log.say,
        )

    # ------------------------------------------------------------------ policies

    def _directory(self, number: int) -> Path:
        return self.out.path / "rounds" / f"{number:02d}"

    def _final(self, number: int) -> Path:
        """The model that a round left."""
        return self._directory(number) / "train" / "final"

    def _pretrained_of(self, number: int) -> Pretrained:
        """What round `number` left; 0: what the run starts from. The tokenizer is the same throughout."""
        if number == 0:
            return self.session.pretrained
        path = self._final(number)
        fault = checkpoint.problem(path)
        if fault:
            raise ValueError(f"{path} is damaged ({fault}); restore it from a copy, or give another run.dir")
        trust = bool(self.config.model.get("trust_remote_code", False))
        found = from_hub(str(path), None, trust, False, None, "auto")
        return replace(found, tokenizer=self.session.pretrained.tokenizer)

    def _load_policy(self, number: int) -> Policy:
        """The policy that round `number` left, in memory and in the rollout. Always from its files: what was trained in
        this process and what is read again by another one must be the same."""
        if self._policy is not None and self._at == number:
            return self._policy
        if number or self._policy is not None:
            self._release()
            self._loaded = self._pretrained_of(number).model()
        if self._loaded is None:
            self._loaded = trained.load(self.session)
        model = self._loaded.to(pick_device())
        if number == 0:
            rows = (p.token_ids for p in (*self.train, *self.heldout))
            selfcheck.check_tokens_of(self.session, model, rows)
        if self.session.precision == torch.float32:
            model = model.float()  # weights kept in bfloat16 would be computed with in bfloat16
        self._loaded = model
        self._policy, self._at = Policy(model, "padded").eval(), number
        self._hash = weights_hash(model)
        self.rollouts.of(self._policy).sync(self._policy)
        self._prove(number)
        return self._policy

    def _release(self) -> None:
        """Forget the policy: the next one takes its memory."""
        self._policy = self._loaded = None
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()

    @torch.no_grad()
    def _prove(self, number: int) -> None:
        """The engine must give the probe's prompts what the policy gives them. Raises SelfCheckError."""
        policy = self._policy
        assert policy is not None
        probe = [ids for ids in self._probe() if len(ids) > 1][:PROBE_PROMPTS]
        if not probe:
            return
        there = self.rollouts.of(policy).logps(probe, [1] * len(probe))
        rows = [Row(np.array(ids, dtype=np.int32), np.arange(len(ids)) > 0) for ids in probe]

        def network(batch: object) -> Any:
            with self.session.autocast():
                return policy(batch)

        here = token_values(
            network,
            [Example((row,), "probe", Prompt((), "")) for row in rows],
            "padded",
            max(self.trainer.micro_batch_tokens, *map(len, probe)),
            policy.device,
        )["token_logps"]
        apart = max(float(np.abs(np.array(a) - b).max()) for a, (b,) in zip(there, here, strict=True))
        if not apart <= ENGINE_TOLERANCE[self.session.precision_name]:
            raise SelfCheckError(
                f"round {number + 1}: the rollout's log-probs differ from the policy's by up to {apart:.2g} nats; the "
                "weights did not reach it whole, or it computes in another precision"
            )

    def _probe(self) -> list[Sequence[int]]:
        if self.config.collect is None:
            return [p.token_ids for p in self.train[: 2 * PROBE_PROMPTS]]
        message = {"role": "user", "content": "What is 2 + 3?"}
        return [prompt_ids(self.tokenizer, [message])]

    # ------------------------------------------------------------------ a round

    def _round(self, number: int) -> dict[str, float]:
        """Everything of a round but its line."""
        begun = time.perf_counter()
        policy = self._load_policy(number - 1)
        directory = self._directory(number)
        if rounds.begin(directory, self._key(number)):
            self.log.say(f"{directory} was made with other settings, weights or prompts; it is begun anew")
        if self.config.collect is None:
            data, row = self._draw(number, policy)
        else:
            data, row = self._collect(number)
        if not self.bound:  # from here on the settings are what the run is
            self._save(0)
            self.bound = True
        start = time.perf_counter()
        row |= self._train(number, data)
        middle = time.perf_counter()
        row |= self._evaluate(number)
        end = time.perf_counter()
        times = {"time/train_s": middle - start, "time/eval_s": end - middle, "time/round_s": end - begun}
        return row | times

    def _key(self, number: int) -> Json:
        """What a round's completions depend on."""
        part = self.slices[number - 1]
        key = {"round": number} | self._drawn_with()
        if self.config.collect is not None:
            return key | {"problems": [part.start, part.stop]}  # the collector has a key of its own
        prompts = [self.train[i] for i in part]
        sources = [p.source for p in prompts]
        t = self.trainer
        return key | {
            "prompts": prompts_fingerprint(prompts),
            "sources": hashlib.sha256("\n".join(sources).encode()).hexdigest(),
            "greedy": t.greedy,
            "chunk": t.chunk_prompts,
        }

    def _drawn_with(self) -> Json:
        """What all completions of the policy in memory depend on."""
        tree = OmegaConf.to_container(self.config.tree, resolve=True)
        assert isinstance(tree, dict)
        settings = {name: tree.get(name) for name in ("seed", "sampling", "rollout", "reward", "composer")}
        return {"weights": self._hash, "precision": self.session.precision_name, **settings}

    def _experience(self, policy: Policy) -> Experience:
        by = None if self.composer is None else scorer(self.composer, self.rewards.names)
        return Experience(self.rollouts.of(policy), self.rewards, self.tokenizer, scorer=by)

    def _draw(self, number: int, policy: Policy) -> tuple[Path, dict[str, float]]:
        """The round's completions, scored, a chunk of prompts at a time, and the rows made of them."""
        t, directory = self.trainer, self._directory(number)
        part = self.slices[number - 1]
        experience = self._experience(policy)
        chunks = range(-(-len(part) // t.chunk_prompts))
        lines: list[rounds.Line] = []
        for k in self.session.shown(f"round {number}: completions")(chunks, len(chunks)):
            path = directory / f"samples-{k:03d}.jsonl"
            if not path.exists():
                places = part[k * t.chunk_prompts : (k + 1) * t.chunk_prompts]
                groups = experience.draw(
                    [self.train[i] for i in places],
                    self.sampling.at(_DRAW, number, k),
                    self.config.sampling.n,
                    t.greedy,
                )
                written = [rounds.line_of(group, self.rewards.names, self.tokenizer) for group in groups]
                rounds.write_rows(path, written)
            lines += rounds.read_rows(path)
        chosen = self._select(number)(lines)
        row = rounds.sample_metrics(lines, self.rewards.names) | chosen.metrics()
        self.log.say(f"round {number}/{t.rounds}: reward {row['reward/total']:.3f}; {chosen.line()}")
        if not chosen.rows:
            failures = f"; failures so far: {self.rewards.counts}" if self.rewards.counts else ""
            raise ValueError(
                f"round {number}: trainer.select={t.select} leaves nothing to learn from: {chosen.line()}{failures}; "
                "raise sampling.n or sampling.temperature, or choose another rule with pairs=... or trainer.min_score"
                + (" in another run.dir" if self.bound else "")
            )
        data = directory / "data.jsonl"
        rounds.write_rows(data, chosen.rows)
        seconds = {"time/generate_s": experience.generate_seconds, "time/score_s": experience.score_seconds}
        return data, row | seconds

    def _select(self, number: int) -> rounds.Select:
        t = self.trainer
        if t.select == "best_of_n":
            return rounds.BestOfN(t.min_score)
        if t.select == "labelled" and t.min_score is not None:
            return rounds.Labelled(t.min_score)
        rule = MaxMin() if self.config.pairs is None else build.pair_rule(self.config)
        pairs = rounds.Pairs(rule, t.max_pairs_per_prompt, seed_of(self.config.seed, number))
        return pairs if t.select == "pairs" else rounds.BestAndWorst(pairs)

    def _collector(self, number: int) -> Collector:
        """Of a round's problems, with the policy in the rollout."""
        settings, part = self.config.collect, self.slices[number - 1]
        assert settings is not None
        assert self._policy is not None
        collector = Collector(
            settings,
            self.rollouts.of(self._policy),
            self.tokenizer,
            self.tool,
            self._directory(number),
            seed=seed_of(self.config.seed, _DRAW, number),
            max_tokens=self.config.data.max_tokens,
            key={"model": self._hash, "precision": self.session.precision_name, "problems": [part.start, part.stop]},
            progress=self.session.shown(f"round {number}: trajectories"),
        )
        problems = collector.problems
        collector.problems = replace(problems, train=tuple(problems.train[i] for i in part))
        return collector

    def _collect(self, number: int) -> tuple[Path, dict[str, float]]:
        """The round's trajectories, and the rows made of them."""
        start = time.perf_counter()
        self.collector = collector = self._collector(number)
        if number == 1:
            collector.before()
        collected = collector.collect()
        for line in collected.lines():
            self.log.say(f"round {number}/{self.trainer.rounds}: {line}")
        kind = self.objective.kind
        report = collected.report
        row = {f"collect/{name}": report[name] for name in ("accuracy", "trajectories", "right", "wrong", "problems")}
        row |= {f"data/dropped_{reason}": count for reason, count in report["dropped"].items()}
        row["data/rows"] = report["pairs" if kind == "pair" else "labelled"]
        return collected.file(kind), row | {"time/generate_s": time.perf_counter() - start}

    # ------------------------------------------------------------------ a round's training

    def _train(self, number: int, data: Path) -> dict[str, float]:
        """The offline trainer on the round's rows, from where an earlier start left it."""
        t, policy = self.trainer, self._policy
        assert policy is not None
        settings = self._settings_of(number, data)
        directory = Path(str(settings.run.dir))
        directory.mkdir(exist_ok=True)
        # The run itself has compared its settings; paths in them may have moved with it.
        rounds.write(directory / "config.yaml", OmegaConf.to_yaml(settings.tree, resolve=False))
        self.log.say(f"round {number}/{t.rounds}: training in {directory}")
        # the reference stays: from the second round on it is no longer what the training starts from
        stays = t.reference == "fixed" and number > 1 and self.config.reference.path is None
        part = self.session.part(settings)
        try:
            offline.run(part, offline.Given(policy.model, self.session.pretrained if stays else None))
        finally:
            part.close()
        self._release()
        last = rounds.read_rows(directory / "metrics.jsonl")[-1]
        told = {name: value for name, value in last.items() if name.startswith(_LAST) and value is not None}
        return {"train/steps": last["step"]} | {f"train/{k.replace('/', '_')}": v for k, v in told.items()}

    def _settings_of(self, number: int, data: Path) -> Config:
        """A round's training as the settings of an offline run."""
        config, t = self.config, self.trainer
        own = {f.name: getattr(t, f.name) for f in fields(TrainerConfig)}
        own |= {"kind": "offline", "precision": self.session.precision_name, "num_samples": 0}
        more = t.offline_data
        sources = [str(data), *([more] if isinstance(more, str) else more or [])]
        changed: Json = {
            "run": {"dir": str(self._directory(number) / "train")},
            "seed": seed_of(config.seed, _TRAIN, number) % 2**31,
            "merge": config.lora.rank > 0,
            "trainer": own,
            "data": {
                **{f.name: getattr(config.data, f.name) for f in fields(config.data)},
                **{"train": sources if len(sources) > 1 else sources[0], "heldout": None, "heldout_fraction": 0.0},
                **{"repeat": None, "gold": None, "format": None, "loader": None},  # rows that are written here
            },
        }
        tree = OmegaConf.create(OmegaConf.to_container(config.tree, resolve=False))
        assert isinstance(tree, DictConfig)
        for name, value in changed.items():
            tree[name] = value
        for name in ("collect", "reward", "pairs", "advantage", "composer"):
            tree[name] = None
        tree.log.wandb = "off"
        if number > 1:
            trust = bool(config.model.get("trust_remote_code", False))
            tree.model = {
                "_target_": "align.models.pretrained.from_hub",
                **{"path": str(self._final(number - 1)), "revision": None, "trust_remote_code": trust},
                **{"allow_pickle": False, "chat_template": None, "dtype": "auto"},
            }
        return replace(
            config,
            run=replace(config.run, dir=changed["run"]["dir"]),
            seed=changed["seed"],
            merge=changed["merge"],
            trainer=TrainerConfig(**own),
            data=replace(config.data, **changed["data"]),
            log=replace(config.log, wandb="off"),
            collect=None,
            reward=None,
            composer=None,
            pairs=None,
            model=tree.model,
            tree=tree,
        )

    # ------------------------------------------------------------------ held-out prompts

    def _answers_path(self, number: int) -> Path:
        return self._directory(number) / "heldout" / "answers.jsonl"

    def _evaluate(self, number: int) -> dict[str, float]:
        """The policy that round `number` left on the held-out prompts, or problems; asked once."""
        t = self.trainer
        if self.config.collect is not None:
            if number == 0:
                return {}  # the first round's collector asks before it collects
            self._load_policy(number)  # into the rollout that the round's collector asks
            values = self.collector.after()
            return {"heldout/solved": float(np.mean(values)), "heldout/problems": len(values)}
        if not self.heldout:
            return {}
        policy = self._load_policy(number)
        path = self._answers_path(number)
        key = {"prompts": prompts_fingerprint(self.heldout), "answers": [t.heldout_n, t.sample_tokens]}
        rounds.begin(path.parent, key | self._drawn_with())
        if not path.exists():
            sampling = replace(self.sampling, max_new_tokens=t.sample_tokens).at(_HELDOUT)
            experience = self._experience(policy)
            with self.rollouts.showing(f"round {number}: held-out prompts"):
                groups = experience.draw(self.heldout, sampling, t.heldout_n, greedy=True)
            rounds.write_rows(path, [rounds.line_of(group, self.rewards.names, self.tokenizer) for group in groups])
        return heldout_metrics(*rounds.heldout(rounds.read_rows(path)), self.rewards.names, t.pass_component)

    # ------------------------------------------------------------------ what stays

    def _row(self, number: int, row: dict[str, float]) -> None:
        self.log.row({"step": number, "round": number} | row)
        short = {
            "reward/total": "reward",
            "collect/accuracy": "right",
            "data/rows": "rows",
            "heldout/total_greedy": "held-out reward",
            "heldout/solved": "held-out solved",
        }
        parts = [f"{word} {row[key]:.4g}" for key, word in short.items() if key in row]
        seconds = ", ".join(f"{s} {row[f'time/{s}_s']:.0f}" for s in ("generate", "train", "eval"))
        self.log.say("  ".join([f"round {number}/{self.trainer.rounds}", *parts, f"seconds: {seconds}"]))

    def _save(self, number: int) -> None:
        """A round is done: a checkpoint without weights, which are in its final/."""
        self.log.flush()
        progress = {"data": self.data_hash, "model": self.start_hash}
        checkpoint.save(self.out.checkpoints, number, progress, lambda _: None)
        checkpoint.retain(self.out.checkpoints, 2)

    def _finish(self) -> None:
        number = self.trainer.rounds
        rows = rounds.read_rows(self.out.path / "metrics.jsonl")
        kept = ("heldout/", "train/")
        summary: Json = {
            "step": number,
            "merged": self.config.merge,
            "seconds": self.session.seconds(),
            "heldout": f"{len(self.heldout)} prompts",
            "metrics": {k: v for k, v in rows[-1].items() if k.startswith(kept) and v is not None},
            "kl": None,
        }
        if self.config.collect is not None:
            solved = [self._problems(1, "before"), self._problems(number, "after")]
            summary["problems"] = solved_summary(*solved)
        elif self.heldout:
            before, after = (rounds.heldout(rounds.read_rows(self._answers_path(n)))[0] for n in (0, number))
            summary["rewards"] = changes(before, after, self.rewards.names)
        told = summary | {"step": sum(row["train/steps"] for row in rows)}
        checkpoint.atomic_directory(self.out.final, partial(self._write_final, told))
        self.out.write_json("summary.json", summary)
        table = final_table(told)
        if table.row_count:
            self.log.console.print(table)
        self.log.say(f"model {self.out.final}, evidence {self.out.path}")

    def _problems(self, number: int, phase: str) -> list[float]:
        lines = rounds.read_rows(self._directory(number) / f"problems-{phase}.jsonl")
        return [float(line["reward"]) for line in lines]

    def _write_final(self, summary: Json, target: Path) -> None:
        """The last round's model, with a card of the whole run."""
        source = self._final(self.trainer.rounds)
        for path in source.iterdir():
            if path.name not in (checkpoint.MANIFEST, "README.md"):
                shutil.copy2(path, target / path.name)
        plain = replace(self.config, merge=self.config.lora.rank > 0)
        card = model_card(plain, self.session.pretrained.name, self.session.command, summary)
        (target / "README.md").write_text(card)
