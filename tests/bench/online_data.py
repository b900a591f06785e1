"""What the online update is measured on: regimes of groups of completions, and the algorithms of both frameworks.

Prompts, completions and rewards are drawn at random; completions come with the log-probs that an engine would tell.
Nothing here knows who is measured.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
import torch

from align.advantages.baselines import GRPO, RLOO
from align.data.prompts import PromptRow
from align.objectives.mismatch import Masked, Uncorrected
from align.objectives.policy_gradient import Clipped, PolicyGradient
from align.packing import num_tokens
from align.rollout.base import Completion
from align.trainers.experience import Group, examples
from tests.bench.data import EOS, SHAPES

Trainer = Literal["GRPOTrainer", "RLOOTrainer"]


@dataclass(frozen=True)
class Algorithm:
    """One algorithm as both frameworks name it, with TRL's defaults for whatever the two have in common."""

    about: str
    trainer: Trainer
    settings: dict[str, Any]  # of TRL's config, where they are not its defaults
    engine: bool  # TRL believes that vLLM drew
    advantage: Any
    objective: Any
    kl_in_reward: float


def clipped(**changes: Any) -> Clipped:
    """GRPO's objective with the defaults of TRL's GRPOConfig."""
    settings: dict[str, Any] = {
        "aggregation": "token_mean",
        "max_length": None,
        "kl_coefficient": 0.0,
        "kl_estimator": "k3",
        "entropy_coefficient": 0.0,
        "value_coefficient": 0.0,
        "value_clip": None,
        "off_policy_threshold": None,
        "correction": Uncorrected(),
        "clip_low": 0.2,
        "clip_high": 0.2,
        "dual_clip": None,
    }
    return Clipped(**settings | changes)


# TRL adds 1e-4 to the standard deviation
_GRPO = GRPO(divide_by_std=True, epsilon=1e-4, penalty="in_score", score_clip=None)
_REINFORCE = PolicyGradient(
    aggregation="sequence_mean_token_sum",
    max_length=None,
    kl_coefficient=0.0,
    kl_estimator="k3",
    entropy_coefficient=0.0,
    value_coefficient=0.0,
    value_clip=None,
    off_policy_threshold=None,
    correction=Uncorrected(),
)

ALGORITHMS = {
    "grpo": Algorithm(
        "GRPO, completions by transformers' generate; no reference (TRL: beta=0, loss_type=dapo)",
        "GRPOTrainer", {}, False, _GRPO, clipped(), 0.0,
    ),
    "grpo_engine": Algorithm(
        "GRPO, completions by vLLM: sequences weighted by policy / engine probability, 0 above 3 (TRL's default)",
        "GRPOTrainer", {}, True, _GRPO, clipped(correction=Masked("sequence", None, 3.0)), 0.0,
    ),
    "rloo": Algorithm(
        "RLOO with 0.05 of the log-ratio to the reference taken off the reward (TRL: beta=0.05)",
        "RLOOTrainer", {"beta": 0.05}, False, RLOO("in_score", None), _REINFORCE, 0.05,
    ),
}  # fmt: skip


@dataclass(frozen=True)
class Regime:
    """One workload: an algorithm, a model, how many completions of how many prompts, and how long (tokens)."""

    name: str
    algorithm: str  # key of ALGORITHMS
    model: str  # key of SHAPES, or "smollm2"
    lora_rank: int  # 0: all weights are trained
    num_prompts: int  # per optimiser step
    n: int  # completions of each
    prompt: tuple[int, int]  # uniform, both ends included
    median: float  # of the log-normal completion length
    sigma: float  # of its logarithm
    completion: tuple[int, int]  # limits the length is clipped to
    rounds: int  # alternations to measure
    layouts: bool = False  # whether align's other layouts are measured too

    @property
    def vocabulary(self) -> int:
        """Token ids that may be used."""
        return 49152 if self.model == "smollm2" else SHAPES[self.model]["vocab_size"]

    @property
    def about(self) -> str:
        """In words."""
        model = "SmolLM2-135M-Instruct" if self.model == "smollm2" else self.model
        lora = f" with LoRA of rank {self.lora_rank}" if self.lora_rank else ""
        (a, b), (c, d) = self.prompt, self.completion
        return (
            f"{self.algorithm}; {model}{lora}; {self.num_prompts} prompt(s) of {a if a == b else f'{a}-{b}'} tokens, "
            f"{self.n} completions of each, {c if c == d else f'{c}-{d}'} tokens"
        )


_MIXED = ((128, 256), 110, 0.7, (32, 256))
_LONG_PROMPT = ((512, 512), 64, 0.0, (64, 64))
_LONG_COMPLETION = ((32, 64), 220, 0.6, (64, 512))

_BRIEF = ((64, 128), 60, 0.7, (16, 128))

REGIMES = {
    regime.name: regime
    for regime in (
        Regime("mixed n=4", "grpo", "proxy", 0, 2, 4, *_MIXED, 2),
        Regime("mixed n=8", "grpo", "proxy", 0, 1, 8, *_MIXED, 3, layouts=True),
        Regime("mixed n=16", "grpo", "proxy", 0, 1, 16, *_MIXED, 2),
        Regime("long prompt", "grpo", "proxy", 0, 1, 8, *_LONG_PROMPT, 2),
        Regime("long completion", "grpo", "proxy", 0, 1, 8, *_LONG_COMPLETION, 2),
        Regime("engine", "grpo_engine", "proxy", 0, 2, 4, *_MIXED, 2),
        Regime("rloo", "rloo", "proxy", 0, 2, 4, *_MIXED, 2),
        Regime("smollm2 lora", "rloo", "smollm2", 16, 2, 4, *_BRIEF, 2),
    )
}

QUICK = Regime("quick", "grpo", "nano", 0, 2, 4, (16, 32), 24, 0.7, (8, 64), 1)


def make_groups(regime: Regime, seed: int = 0) -> list[Group]:
    """Random prompts and completions of the regime's lengths with random rewards, the same for the same seed."""
    rng = np.random.default_rng(seed)

    def length() -> int:
        value = regime.median * float(np.exp(regime.sigma * rng.standard_normal()))
        return int(np.clip(round(value), *regime.completion))

    def tokens(num: int) -> list[int]:
        return rng.integers(10, regime.vocabulary - 10, size=num).tolist()

    groups = []
    for i in range(regime.num_prompts):
        prompt = tuple(tokens(int(rng.integers(regime.prompt[0], regime.prompt[1] + 1))))
        completions = tuple(Completion((*tokens(length() - 1), EOS), "end") for _ in range(regime.n))
        scores = rng.standard_normal(regime.n)
        texts = ("",) * regime.n
        groups.append(Group(PromptRow(f"random:{i}", prompt, ""), completions, texts, scores[:, None], scores))
    return groups


@torch.no_grad()
def told_by_engine(groups: Sequence[Group], model: Any, noise: float = 0.0, seed: int = 0) -> list[Group]:
    """The groups with the log-probs of their completions by `model`, one row at a time by full logits.

    noise: spread of what an engine of other arithmetic would add to each, nats; the first completion of all then gets
    2 nats less as a whole, so that a limit of 3 on its ratio counts.
    """
    rng = np.random.default_rng(seed)
    training = model.training
    model.eval()
    out = []
    for i, group in enumerate(groups):
        told = []
        for k, completion in enumerate(group.completions):
            ids = torch.tensor([[*group.prompt.token_ids, *completion.token_ids]])
            start = len(group.prompt.token_ids)
            logps = model(ids, use_cache=False).logits[0, start - 1 : -1].double().log_softmax(-1)
            values = logps.gather(1, ids[0, start:, None])[:, 0].numpy()
            if noise:
                values = values + noise * rng.standard_normal(len(values)) - (2.0 / len(values) if i == k == 0 else 0)
            told.append(replace(completion, logps=tuple(values.tolist())))
        out.append(replace(group, completions=tuple(told)))
    model.train(training)
    return out


def token_counts(groups: Sequence[Group]) -> dict[str, int]:
    """Tokens of a step: real, as TRL pads them, with shared prompts, of completions."""
    parts = examples(groups, "keep", "shared", 1 << 30)
    rows = [row for e in parts for row in e.rows]
    completions = [int(row.targets.sum()) for row in rows]
    return {
        "real": sum(len(row.token_ids) for row in rows),
        # prompts are padded on the left, completions on the right
        "padded": len(rows) * (max(len(g.prompt.token_ids) for g in groups) + max(completions)),
        "shared": sum(num_tokens(e.rows, "shared") for e in parts),
        "completion": sum(completions),
    }
