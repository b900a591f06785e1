"""The two things compared: one update by align and the same one by TRL 1.16, from the same scored completions.

A side has a `model` and `step(variant, groups)`, all that follows the scoring of a step's completions: batches,
log-probs of reference and old policy as the framework computes them, advantages, loss, backward, clipping, optimiser.
"""

from __future__ import annotations

import tempfile
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from align.config import OptimizerConfig
from align.engine.local import LocalEngine
from align.models.policy import Policy, is_peft
from align.trainers.experience import Group, episodes, examples, with_columns
from align.trainers.loop import ReferenceModel, TrainContext, token_values, train_step
from align.types import Example, Layout
from tests.bench.online_data import Algorithm
from tests.bench.sides import in_layout, score_completions_only, stand_in_tokenizer

MICRO_BATCH_TOKENS = 4096  # configs/trainer/offline.yaml
MAX_GRAD_NORM = 1.0  # the default of both


@dataclass(frozen=True)
class TrlVariant:
    """How TRL computes a step; batch_size: samples of a forward, accumulated to all samples of the step."""

    recompute: bool
    completions_only: bool
    batch_size: int
    about: str


TRL = {
    "trl default": TrlVariant(True, False, 8, "as shipped: gradient checkpointing, 8 samples at once"),
    # seconds per token of 4, 8, 16 samples at once: 1, 1.2, 1.2; larger batches keep asking the system for memory
    "trl best": TrlVariant(
        False, True, 4,
        "gradient_checkpointing=False, 4 samples at once (the fastest of 4, 8 and 16), and the head on completion "
        "positions only (patched, see below)",
    ),
}  # fmt: skip


@dataclass(frozen=True)
class AlignVariant:
    """How align computes a step."""

    layout: Layout
    old_logps: str  # trainer.old_logps: none, engine or trainer
    about: str


ALIGN = {
    "align padded": AlignVariant("padded", "auto", "rows padded to the longest of like length"),
    "align packed": AlignVariant("packed", "auto", "one stream without padding, each prompt once per completion"),
    "align old pass": AlignVariant("shared", "trainer", "as align, with trainer.old_logps=trainer: a forward more"),
    "align": AlignVariant("shared", "auto", "each prompt computed once for its completions: **align's default**"),
}


class Side(Protocol):
    """What a measurement needs of either framework."""

    model: Any
    gradient: Tensor | None  # of the last step before clipping, flat; kept only with `keep`
    keep: bool

    def step(self, variant: str, groups: Sequence[Group]) -> float:
        """One optimiser step, from scored completions to weights; its loss."""
        ...


def flat_gradient(model: Any) -> Tensor:
    """Of all trained weights."""
    return torch.cat([p.grad.flatten() for p in model.parameters() if p.requires_grad]).clone()


class Align:
    """align's own parts as the online loop calls them. reference: a frozen model; None with LoRA or without a KL.

    older: the policy that drew is an older one, so that the ratio is that of its log-probs and not 1.
    """

    def __init__(self, model: Any, reference: Any | None, algorithm: Algorithm, older: bool = False):
        self.model = model
        self.reference = reference
        self.algorithm = algorithm
        self.older = older
        self.gradient: Tensor | None = None
        self.keep = False
        self.engine = _Kept(self, in_layout(model, "shared"))

    def step(self, variant: str, groups: Sequence[Group]) -> float:
        """One optimiser step with the rate 0."""
        how = ALIGN[variant]
        self.engine.policy = in_layout(self.model, how.layout)
        parts = self.prepared(how, groups)
        cached = None
        if "reference" in self.algorithm.objective.needs:
            cached = ReferenceModel(lambda rows: [row.columns["reference_logps"] for row in rows], None)
        context = TrainContext(self.engine, self.algorithm.objective, how.layout, MICRO_BATCH_TOKENS, cached)
        return train_step(context, parts, lr=0.0)["loss/total"]

    def prepared(self, how: AlignVariant, groups: Sequence[Group]) -> list[Example]:
        """The examples with all columns that the objective reads, as align.trainers.online makes them."""
        algorithm = self.algorithm
        parts = examples(groups, "keep", how.layout, MICRO_BATCH_TOKENS)
        rows = [row for e in parts for row in e.rows]
        columns: dict[str, list[np.ndarray]] = {}
        needs_reference = "reference" in algorithm.objective.needs or algorithm.kl_in_reward > 0
        if needs_reference:
            columns["reference_logps"] = self._values(self._reference_network(how.layout), parts, how.layout)
        if how.old_logps == "trainer":
            columns["old_logps"] = self._values(self._own, parts, how.layout)
        drawn = [row.columns["rollout_logps"] for row in rows]
        if self.older:
            columns["old_logps"] = drawn
        old = columns.get("old_logps", drawn)
        penalties = None
        if algorithm.kl_in_reward > 0:
            both = zip(old, columns["reference_logps"], strict=True)
            penalties = [-algorithm.kl_in_reward * (a - b) for a, b in both]
        estimate = algorithm.advantage(episodes(groups, rows, algorithm.advantage.needs, penalties, None))
        return with_columns(parts, estimate, columns)

    def _own(self, batch: Any) -> Any:
        return self.engine.forward(batch, frozenset())

    def _reference_network(self, layout: Layout) -> Callable[[Any], Any]:
        if self.reference is not None:
            return in_layout(self.reference, layout)
        policy = self.engine.policy
        assert is_peft(self.model)

        def adapter_off(batch: Any) -> Any:
            with policy.as_reference():
                return policy(batch)

        return adapter_off

    def _values(self, network: Callable[[Any], Any], parts: Sequence[Example], layout: Layout) -> list[np.ndarray]:
        self.engine.policy.eval()
        found = token_values(network, parts, layout, MICRO_BATCH_TOKENS, self.engine.policy.device)["token_logps"]
        return [values for part in found for values in part]


class _Kept(LocalEngine):
    """The engine of a run; its side may ask for the gradient before it is clipped."""

    def __init__(self, side: Align, policy: Policy):
        super().__init__(
            policy,
            OptimizerConfig(0.0, [0.9, 0.999], 1e-8, 0.0, MAX_GRAD_NORM, "constant", 0.0, 1.0),
            torch.float32,
        )
        self.side = side

    def gradient_norm(self) -> Tensor:
        """See LocalEngine."""
        if self.side.keep:
            self.side.gradient = flat_gradient(self.side.model)
        return super().gradient_norm()


class Trl:
    """TRL's trainer: everything but the sampling, which returns what the groups hold. reference as in Align.

    loss_inputs: changes what compute_loss gets, for tests.
    """

    def __init__(self, model: Any, reference: Any | None, algorithm: Algorithm, n: int, num_samples: int):
        self.model = model
        self.algorithm = algorithm
        self.gradient: Tensor | None = None
        self.keep = False
        self.loss_inputs: Callable[[dict[str, Any]], dict[str, Any]] = lambda inputs: inputs
        self.trainer = _trainer(model, reference, algorithm, n, num_samples)
        self.optimizer = torch.optim.AdamW(
            [p for p in model.parameters() if p.requires_grad], lr=0.0, weight_decay=0.0, fused=True
        )

    def step(self, variant: str, groups: Sequence[Group]) -> float:
        """One optimiser step with the rate 0."""
        how, trainer = TRL[variant], self.trainer
        score_completions_only(how.completions_only)
        if how.recompute:
            self.model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        else:
            self.model.gradient_checkpointing_disable()
        num_samples = sum(len(group.completions) for group in groups)
        parts = max(1, num_samples // how.batch_size)
        trainer.args.per_device_train_batch_size = num_samples // parts
        trainer.args.gradient_accumulation_steps = trainer.args.steps_per_generation = parts
        trainer.current_gradient_accumulation_steps = parts  # the training loop sets it
        trainer._generate = lambda prompts: self._drawn(groups, prompts)
        trainer._buffered_inputs = None
        asked = [{"prompt": "a", "told": float(score)} for group in groups for score in group.scores]
        total = 0.0
        for trainer._step in range(parts):
            inputs = trainer._prepare_inputs(asked)  # pads and scores all samples at the first part, then hands out
            loss = trainer.compute_loss(self.model, self.loss_inputs(inputs))
            if self.algorithm.trainer == "RLOOTrainer":
                loss = loss / parts  # in transformers' training_step; GRPO's loss has done it
            loss.backward()
            total += float(loss.detach())
        if self.keep:
            self.gradient = flat_gradient(self.model)
        trainer.accelerator.clip_grad_norm_(self.model.parameters(), MAX_GRAD_NORM)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return total

    def _drawn(self, groups: Sequence[Group], prompts: Sequence[str]) -> tuple[Any, ...]:
        """In place of TRL's `_generate`, in the form of each trainer."""
        prompt_ids = [list(g.prompt.token_ids) for g in groups for _ in g.completions]
        completions = [c for g in groups for c in g.completions]
        ids = [list(c.token_ids) for c in completions]
        assert len(prompts) == len(ids)
        texts = [""] * len(ids)
        if self.algorithm.trainer == "RLOOTrainer":
            return prompt_ids, ids, texts
        logps = [list(c.logps or ()) for c in completions] if self.algorithm.engine else None
        return prompt_ids, ids, None, texts, logps, {}, None, None


def _told(prompts: Sequence[str], told: Sequence[float], **_: Any) -> list[float]:
    """The reward function: what the groups hold."""
    assert len(prompts) == len(told)
    return list(told)


def _trainer(model: Any, reference: Any | None, algorithm: Algorithm, n: int, num_samples: int) -> Any:
    """A GRPOTrainer or RLOOTrainer around the models; a step learns from num_samples."""
    import datasets
    import transformers
    import trl
    from trl.trainer.utils import add_fused_lm_head

    warnings.filterwarnings("ignore")
    transformers.logging.set_verbosity_error()
    datasets.disable_progress_bars()
    config_class = getattr(trl, algorithm.trainer.replace("Trainer", "Config"))
    beta = algorithm.settings.get("beta", 0.0)
    with tempfile.TemporaryDirectory() as scratch:  # the trainer makes its directory, writes nothing
        config = config_class(
            output_dir=scratch,
            per_device_train_batch_size=num_samples,
            num_generations=n,
            max_completion_length=512,
            bf16=False,
            use_cpu=True,
            report_to=[],
            save_strategy="no",
            max_steps=1,
            dataloader_pin_memory=False,
            # a full-weights reference is set below: TRL can only load it by name
            **algorithm.settings | ({} if reference is None else {"beta": 0.0}),
        )
        trainer = getattr(trl, algorithm.trainer)(
            model=model,
            reward_funcs=_told,
            args=config,
            train_dataset=datasets.Dataset.from_list([{"prompt": "a"}] * num_samples),
            processing_class=stand_in_tokenizer(),
        )
    if reference is not None:
        trainer.beta, trainer.ref_model = beta, reference
        add_fused_lm_head(reference, temperature=trainer.temperature)
    if "ref" in getattr(model, "peft_config", ()):
        model.delete_adapter("ref")  # of a given adapter TRL keeps a copy; of a new one the reference is the bare model
    if algorithm.engine:
        trainer.use_vllm = True  # after the start, which would look for an engine
    model.train()
    return trainer
