"""Online runs on a random model of one layer: their settings, what they leave, and a training stopped before a step."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

from align import build
from align.config import compose
from align.trainers.online.run import composer_of, prepared, prompts_of
from align.trainers.online.task import Online
from align.trainers.resume import planned
from align.trainers.session import Session, open_session
from tests.killer import Hook, evidence, leftovers, shared

REWARDS = "tests.trainers.online_rewards."


def prompts_file(path: Path, count: int = 11) -> Path:
    """Prompts of different lengths, with an answer each."""
    rows = [{"prompt": [{"role": "user", "content": f"{i} {'ab' * (i % 4)}"}], "answer": i} for i in range(count)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def words_of(directory: Path, *more: str) -> list[str]:
    """Words of an online run of 5 steps below `directory`; the last word for a key wins, key= unsets."""
    train, heldout = directory / "prompts.jsonl", directory / "heldout.jsonl"
    if not train.exists():
        prompts_file(train)
        heldout.write_text('{"prompt": "what now?", "answer": 7}\n{"prompt": "and then", "answer": 8}\n')
    words = {
        "trainer": "online", "model": "tiny", "model.hidden_size": 16, "model.num_layers": 1, "data.train": train,
        "data.heldout": heldout, "optimizer.lr": 3e-3, "trainer.max_steps": 5, "trainer.batch_size": 4,
        "trainer.micro_batch_tokens": 256, "trainer.save_every": 2, "trainer.eval_every": 2, "trainer.heldout_n": 2,
        "trainer.precision": "float32", "trainer.max_missing_fraction": 1.0, "sampling.max_new_tokens": 8,
        "sampling.n": 2, "log.tensorboard": "false",
    } | dict(word.split("=", 1) for word in more)  # fmt: skip
    if not any(word.startswith("reward") for word in words):
        words["reward.mixed._target_"] = f"{REWARDS}mixed"
    return [f"{key}={value}" for key, value in words.items() if value != ""]


REMAX = ("objective=policy_gradient", "advantage=remax", "trainer.kl_in_reward=0.05", "lora.rank=4")
# name -> words: with failures to be counted, several updates on the same completions, a value head, further draws
FAMILY = {
    "remax": (*REMAX, f"reward.flaky._target_={REWARDS}flaky"),
    "grpo": (
        "objective=clipped", "advantage=grpo", "sampling.n=3", "trainer.num_minibatches=2", "trainer.ppo_epochs=2",
        "objective.kl_coefficient=0.01",
    ),
    "ppo": (
        "objective=clipped", "advantage=ppo", "objective.value_coefficient=0.5", "trainer.kl_in_reward=0.05",
        "trainer.num_minibatches=2", "lora.rank=4",
    ),
    "dynamic": (
        "objective=policy_gradient", "advantage=rloo", "trainer.dynamic_sampling=2",
        f"reward.coin._target_={REWARDS}coin", "trainer.max_steps=null", "trainer.epochs=2", "lora.rank=4",
    ),
}  # fmt: skip


def left(run: Path) -> dict[str, Any]:
    """evidence, with the samples of the steps."""
    samples = {path.name: path.read_bytes() for path in sorted((run / "samples").glob("*"))}
    return evidence(run) | {"samples": samples}


def assert_survives(hook: Hook, words: list[str], run: Path, whole: dict[str, Any]) -> None:
    """Killed at the hook, the same words lead to what the undisturbed run left."""
    killed = shared().run(words, [hook])
    assert killed.code == -9, killed.said
    done = shared().run(words)
    assert done.code == 0, done.said
    assert left(run) == whole
    assert leftovers(run) == []


def rows_of(run: Path) -> list[dict[str, Any]]:
    """metrics.jsonl."""
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def samples_of(run: Path, step: int) -> list[dict[str, Any]]:
    """The prompts of a step with their completions."""
    return [json.loads(line) for line in (run / "samples" / f"step-{step:06d}.jsonl").read_text().splitlines()]


class Ready:
    """An online run with all its parts that has not begun."""

    def __init__(self, session: Session, task: Online):
        self.session = session
        self.task = task
        self.sampler = task.sampler
        self.learner = task.learner
        self.experience = task.experience
        self.engine = task.learner.context.engine
        self.advantage = task.learner.advantage
        self.composing = task.composing
        self.rewards = task.experience.rewards
        self.tokenizer = session.tokenizer
        self.sampling = task.sampler.sampling
        self.train = task.sampler.train

    def budget(self, max_tokens: int) -> None:
        """Other micro-batches from here on."""
        self.learner.context = replace(self.learner.context, max_tokens=max_tokens)

    def close(self) -> None:
        """See Session."""
        self.session.close()


def ready(directory: Path, *more: str) -> Ready:
    """An online run before its first step; its reward's process is ended by close."""
    config = compose(words_of(directory, f"run.dir={directory / 'run'}", *more))
    session, advantage = open_session(config, "a test", build.objective(config)), build.advantage(config)
    try:
        composer = composer_of(config, advantage, print)
        asked = prompts_of(session, composer)
        plan = planned(session, None, len(asked.train))
        return Ready(session, prepared(session, advantage, composer, asked, plan, None).task)
    except BaseException:
        session.close()
        raise
