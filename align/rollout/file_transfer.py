"""The backend by which vLLM loads files of weights into a live engine: for the engine's own process.

An update is one or more {"path": FILE.safetensors} between start and finish. Linear weights are packed after loading
on a CPU, so that tensors cannot be copied into them: vLLM's layerwise reload unpacks and packs again.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from safetensors import safe_open
from torch import Tensor
from vllm.distributed.weight_transfer.base import WeightTransferEngine, WeightTransferInitInfo, WeightTransferUpdateInfo
from vllm.distributed.weight_transfer.factory import WeightTransferEngineFactory
from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead, UnquantizedEmbeddingMethod
from vllm.model_executor.model_loader.reload import finalize_layerwise_reload, initialize_layerwise_reload

from align.rollout.transfer import BACKEND


def register() -> None:
    """Make the backend known to vLLM under the name BACKEND, in this process; a second call does nothing."""
    with contextlib.suppress(ValueError):  # registered already
        WeightTransferEngineFactory.register_engine(BACKEND, FileTransfer)


@dataclass
class Init(WeightTransferInitInfo):
    """Nothing to agree on beforehand."""


@dataclass
class Update(WeightTransferUpdateInfo):
    """One file of weights that the engine's process can read."""

    path: str


class FileTransfer(WeightTransferEngine[Init, Update]):
    """Loads files of weights into a live engine."""

    init_info_cls = Init
    update_info_cls = Update
    wanted: frozenset[str] = frozenset()  # names of all weights, known from the first update on
    loaded: frozenset[str] = frozenset()  # of those that have come since the update began
    open = False  # an update has begun and has not ended

    def init_transfer_engine(self, init_info: Init) -> None:
        """Nothing to do."""

    def start_weight_update(self) -> None:
        """See the base class."""
        self.loaded = frozenset()
        if not self.wanted:  # tied ones stand under one name until an update fails
            self.wanted = _plain(name for name, _ in self.model.named_parameters())
        elif self.open:  # what an update that failed half-way had loaded would be counted into this one
            finalize_layerwise_reload(self.model, self.model_config)
        self.open = True
        initialize_layerwise_reload(self.model)

    def receive_weights(self, update_info: Update) -> None:
        """Load one file, a tensor at a time."""
        load: Any = self.model.load_weights  # of vLLM's models, not of every module
        self.loaded |= frozenset(load(_tensors(update_info.path)) or ())

    def finish_weight_update(self) -> None:
        """Raises RuntimeError if a weight got no new values: vLLM would keep the old ones with a warning."""
        finalize_layerwise_reload(self.model, self.model_config)
        for module in self.model.modules():
            # A head that shares the embedding's weight keeps a packed copy of it on a CPU; the reload overlooks it.
            if isinstance(module, ParallelLMHead) and isinstance(module.quant_method, UnquantizedEmbeddingMethod):
                module.quant_method.process_weights_after_loading(module)
        self.open = False
        missing = sorted(self.wanted - _plain(self.loaded))
        if missing:
            raise RuntimeError(f"{len(missing)} weights were not in the update, the first is {missing[0]}")

    def shutdown(self) -> None:
        """Nothing is held."""


def _tensors(path: str) -> Iterator[tuple[str, Tensor]]:
    with safe_open(path, framework="pt") as file:
        for name in file.keys():  # noqa: SIM118 (not a dict)
            yield name, file.get_tensor(name)


def _plain(names: Iterable[str]) -> frozenset[str]:
    """Names without what a LoRA engine adds to them."""
    return frozenset(name.replace(".base_layer", "") for name in names)
