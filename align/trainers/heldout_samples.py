"""The held-out prompts of a run answered before and after training: samples.jsonl, gold scores, KL."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence

from align.engine.base import Engine
from align.engine.world import by_lead
from align.evaluate.samples import Sample, sequence_kl
from align.rewards.gold import Gold, heldout_rows
from align.rollout.base import Completion, Sampling
from align.trainers.generation import generate_distributed
from align.trainers.rollouts import Rollouts
from align.trainers.session import Session
from align.trainers.trained import FullModel
from align.types import Example, PackedBatch, Stats

# The KL needs samples of its own, at temperature 1; so many bound its cost.
MAX_KL_PROMPTS = 32


class HeldoutSamples:
    """Asks the policy the first trainer.num_samples distinct held-out prompts."""

    def __init__(
        self, session: Session, engine: Engine, full_model: FullModel, rollouts: Rollouts, heldout: Sequence[Example]
    ):
        self.session = session
        self.config = session.config
        self.engine = engine
        self.full_model = full_model
        self.rollouts = rollouts
        seen = dict.fromkeys((e.prompt.token_ids, e.prompt.text) for e in heldout if e.prompt.token_ids)
        self.prompts = list(seen)[: self.config.trainer.num_samples]
        self.path = session.out.path / "samples.jsonl"
        self.gold = Gold(self.config.data.gold) if self.config.data.gold else None

    def before(self) -> None:
        """Greedy answers of the untrained policy; a resumed run already has them."""
        if self.prompts and self.session.out.read(self.path.name) is None:
            self._write(self._answer("before", 0))

    def after(self, step: int) -> list[Sample]:
        """Greedy answers now; returned with those from before, both written."""
        if not self.prompts:
            return []
        samples = [s for s in self._read() if s.phase == "before"] + self._answer("after", step)
        self._write(samples)
        return samples

    def kl(self, reference: Callable[[PackedBatch], Stats]) -> float | None:
        """Of the policy to the reference, nats per answer sampled at temperature 1; None without two prompts."""
        prompts = [ids for ids, _ in self.prompts][:MAX_KL_PROMPTS]
        if len(prompts) < 2:
            return None
        completions = self._generate(prompts, "samples for the KL", self.config.seed)
        policy = self.engine.policy
        policy.eval()

        def forward(batch: PackedBatch) -> Stats:
            return self.engine.forward(batch, frozenset())

        return sequence_kl(forward, reference, policy, prompts, completions, self.config.trainer.micro_batch_tokens)

    def _answer(self, phase: str, step: int) -> list[Sample]:
        completions = self._generate([ids for ids, _ in self.prompts], f"samples {phase}", None)
        world = self.session.world
        samples = by_lead(world, lambda: self._samples(phase, step, completions))
        return world.share(samples)

    def _samples(self, phase: str, step: int, completions: Sequence[Completion]) -> list[Sample]:
        texts = [self.session.tokenizer.decode(c.token_ids, skip_special_tokens=True) for c in completions]
        answered = list(zip(self.prompts, texts, completions, strict=True))
        scores: Sequence[float | None] = [None] * len(answered)
        if self.gold is not None:
            rows = heldout_rows(self.config, self.session.tokenizer) if self.gold.asks_rows else {}
            scores = self.gold(((*prompt, text, c.finished) for prompt, text, c in answered), rows)
        return [
            Sample(phase, step, prompt, text, c.finished, len(c.token_ids), score)
            for ((_, prompt), text, c), score in zip(answered, scores, strict=True)
        ]

    def _generate(self, prompts: list[tuple[int, ...]], what: str, seed: int | None) -> list[Completion]:
        limit = self.config.trainer.sample_tokens
        sampling = Sampling(limit, temperature=0.0) if seed is None else Sampling(limit, seed=seed)
        # before the first step there is nothing to save, after the last one it is saved: stopping is safe
        with self.rollouts.showing(what):
            rollout = self.rollouts.of(self.full_model())
            return [row[0] for row in generate_distributed(self.session.world, rollout, prompts, sampling)]

    def _read(self) -> list[Sample]:
        return [Sample(**json.loads(line)) for line in (self.session.out.read(self.path.name) or "").splitlines()]

    def _write(self, samples: list[Sample]) -> None:
        self.session.out.write(self.path.name, "".join(json.dumps(s.as_dict()) + "\n" for s in samples))
