"""The fixed networks that a policy is compared with: the reference, and the policy as the run found it."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path

import torch

from align.config import Config, cache_root
from align.data.stored import View
from align.engine.base import Engine
from align.models.policy import Network, Policy, choose_layout, weights_hash
from align.models.pretrained import Pretrained, from_hub
from align.models.reference import ReferenceCache
from align.objectives.base import Objective
from align.report.log import Log
from align.trainers.loop import ReferenceModel
from align.types import Example, PackedBatch, Stats

Forward = Callable[[PackedBatch], Stats]


class ReferenceModels:
    """Builds them as reference.mode and reference.path say. Before a checkpoint is restored: until then the policy is
    what the run found.

    examples: those whose log-probs are cached; None: they come as the run goes, and reference.mode=cached means what
    `fresh` says. check is called between forwards and may raise. probe compares a network
    with its model's own forward and may raise: see selfcheck.check_layout. foreign: a reference that
    reference.path cannot name.
    """

    def __init__(
        self,
        config: Config,
        engine: Engine,
        pretrained: Pretrained,
        model_hash: str,
        examples: Sequence[Example] | None,
        log: Log,
        check: Callable[[], None],
        probe: Callable[[Network], object],
        foreign: Pretrained | None = None,
    ):
        self.config = config
        self.engine = engine
        self.pretrained = pretrained
        self.model_hash = model_hash
        self.examples = examples
        self.log = log
        self.check = check
        self.probe = probe
        path = config.reference.path
        # a reference that is not the model the run starts from
        self.foreign = foreign if path is None else from_hub(path, None, False, False, None, "auto")

    def of(self, objective: Objective) -> tuple[ReferenceModel | None, dict[str, ReferenceModel]]:
        """The reference if an objective needs it, and the networks of its extras.

        Raises ValueError for a setting without effect.
        """
        reference = None
        if "reference" in objective.needs:
            reference = self._own() if self.foreign is None else self._other(self.foreign)
        elif self.foreign is not None:
            raise ValueError(
                f"reference.path={self.foreign.name} has no effect: {self.config.choices['objective']} has no reference"
            )
        if "start_token_logps" not in objective.extras:
            return reference, {}
        start = self._own() if reference is None or self.foreign is not None else reference
        return reference, {"start_token_logps": start}

    def network(self, reference: ReferenceModel | None) -> Forward:
        """The reference as a network, for batches that no cache knows."""
        if reference is not None and reference.network is not None:
            return reference.network
        if self.config.lora.rank > 0 and self.foreign is None:
            return self._adapter_off()
        return self._frozen(self._network(self.pretrained) if self.foreign is None else self._checked(self.foreign))

    def fresh(self) -> Forward:
        """The reference for rows that no cache can know: the adapter switched off, or a second set of weights.

        reference.mode=cached means whichever of the two the policy allows. Raises ValueError for another vocabulary.
        """
        if self.foreign is None and self.config.reference.mode != "model":
            return self.network(None)
        return self._frozen(self._network(self.pretrained) if self.foreign is None else self._checked(self.foreign))

    def _own(self) -> ReferenceModel:
        mode = self.config.reference.mode
        if mode == "cached" and self.examples is not None:
            return ReferenceModel(self._cache(self.engine.policy, self.model_hash, self.examples), None)
        if mode == "adapter" or (mode == "cached" and self.config.lora.rank > 0):
            return ReferenceModel(None, self._adapter_off())
        return ReferenceModel(None, self._frozen(self._network(self.pretrained)))

    def _other(self, foreign: Pretrained) -> ReferenceModel:
        network = self._checked(foreign)
        if self.config.reference.mode == "cached" and self.examples is not None:
            return ReferenceModel(self._cache(network, weights_hash(network.model), self.examples), None)
        return ReferenceModel(None, self._frozen(network))

    def _network(self, source: Pretrained) -> Policy:
        """A model in the policy's layout, in float32; under stage 3 whole until `_frozen` shards it."""
        policy = self.engine.policy
        return Policy(source.model().to(policy.device).float(), policy.layout).eval().requires_grad_(False)

    def _checked(self, foreign: Pretrained) -> Policy:
        """Of a model that is not the policy's: with its vocabulary, and computing here what it computes itself."""
        network = self._network(foreign)
        model = network.causal_lm
        choose_layout(model, network.layout, 0.0)
        there, here = model.config.vocab_size, self.engine.policy.causal_lm.config.vocab_size
        if there != here:
            raise ValueError(
                f"reference.path={foreign.name} has a vocabulary of {there} tokens, the policy of {here}; a reference "
                "must share the tokenizer"
            )
        self.probe(network)
        return network

    def _frozen(self, network: Policy) -> Forward:
        return torch.no_grad()(self._in_precision(self.engine.frozen(network)))

    def _adapter_off(self) -> Forward:
        policy, engine = self.engine.policy, self.engine
        assert isinstance(policy, Policy)

        def forward(batch: PackedBatch) -> Stats:
            with policy.as_reference(), engine.autocast():
                return policy(batch)

        return forward

    def _in_precision(self, network: Network) -> Forward:
        engine = self.engine

        def forward(batch: PackedBatch) -> Stats:
            with engine.autocast():
                return network(batch)

        return forward

    def _cache(self, network: Network, model_hash: str, examples: Sequence[Example]) -> ReferenceCache:
        root = self.config.reference.cache_dir or cache_root() / "reference"
        cache = ReferenceCache(Path(root), model_hash, self.engine.precision)
        network.eval()

        def checked(items: Iterable[int], total: int) -> Iterator[int]:
            for item in self.log.progress("reference")(items, total):
                self.check()
                yield item

        start = time.perf_counter()
        done = cache.fill(
            View(len(examples), lambda i: (*examples[i].rows, *examples[i].extras.values())),
            View(len(examples), lambda i: examples[i].source),
            self._in_precision(network),
            network.layout,
            self.config.trainer.micro_batch_tokens,
            network.device,
            checked,
            self.engine.world,
        )
        seconds = time.perf_counter() - start
        self.log.say(f"reference {done.found} examples from the cache, {done.computed} computed in {seconds:.1f} s")
        return cache
