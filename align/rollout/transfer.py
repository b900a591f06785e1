"""A policy's weights as files that vLLM takes: the trainer's writer, and the weight-transfer backend of the engine.

vllm is imported by `register` only, so that the trainer can import the writer without it.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
import tempfile
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import IO, Any

import torch
from torch import Tensor

from align.models.policy import Policy, is_peft, own_attention

BACKEND = "align_file"

_SHM = Path("/dev/shm")
_PREFIX = "align-weights-"


# ---- the trainer's side ----


def write_model(policy: Policy, directory: Path, dtype: torch.dtype) -> list[str]:
    """Config and weights in Hugging Face format, floating point numbers in `dtype`; returns the paths of the weights.

    Names and shapes are those of a checkpoint on the hub, tied weights stand once, LoRA is left out. The model's own
    generation settings are left out too: what bends sampling there is not the policy.
    """
    from transformers import GenerationConfig
    from transformers.utils import logging

    logging.disable_progress_bar()  # a run tells its own progress
    lm = policy.causal_lm
    own = lm.generation_config
    with own_attention(lm):  # the packed attention exists only inside align
        lm.generation_config = GenerationConfig()
        try:
            lm.save_pretrained(directory, state_dict=_state(lm, dtype), max_shard_size="5GB")
        finally:
            lm.generation_config = own
    return sorted(str(path) for path in directory.glob("*.safetensors"))


def write_adapter(policy: Policy, directory: Path) -> None:
    """The LoRA adapter of a policy in PEFT's format."""
    if not is_peft(policy.model):
        raise ValueError("the policy has no LoRA adapter to write; set lora.rank")
    with own_attention(policy.causal_lm):
        # PEFT would ask the hub whether the vocabulary was resized; the adapter holds no embedding
        policy.model.save_pretrained(str(directory), save_embedding_layers=False, selected_adapters=["default"])


def named_tensors(policy: Policy, dtype: torch.dtype) -> dict[str, Tensor]:
    """What `write_model` writes, as tensors on the policy's device."""
    from transformers.core_model_loading import revert_weight_conversion
    from transformers.modeling_utils import remove_tied_weights_from_state_dict

    lm = policy.causal_lm
    state = remove_tied_weights_from_state_dict(_state(lm, dtype, lm.device), lm)
    return dict(revert_weight_conversion(lm, state))


def _state(lm: Any, dtype: torch.dtype, device: torch.device | str = "cpu") -> dict[str, Tensor]:
    """The state of a causal language model without LoRA; tensors that shared their memory still do."""
    cast: dict[object, Tensor] = {}
    out = {}
    for name, tensor in lm.state_dict().items():
        if "lora_" in name:
            continue
        key = (tensor.data_ptr(), tensor.shape, tensor.stride())
        if key not in cast:
            cast[key] = tensor.to(device, dtype if tensor.is_floating_point() else tensor.dtype)
        out[name.replace(".base_layer", "")] = cast[key]
    return out


class Scratch:
    """A directory for the weights of a sync: in memory if there is room for them twice, else below `fallback`.

    A process that is killed leaves its directory; the next one removes it, told by the lock on it.
    """

    def __init__(self, fallback: Path, num_bytes: int):
        parent = fallback
        remove_stale(fallback)
        if _SHM.is_dir() and os.access(_SHM, os.W_OK):
            remove_stale(_SHM)
            if shutil.disk_usage(_SHM).free >= 2 * num_bytes:
                parent = _SHM
        parent.mkdir(parents=True, exist_ok=True)
        while True:
            self.path = Path(tempfile.mkdtemp(prefix=_PREFIX, dir=parent))
            self._lock: IO[bytes] = (self.path / "lock").open("wb")
            fcntl.flock(self._lock, fcntl.LOCK_EX)
            if (self.path / "lock").exists():  # else another took it for stale between the two lines above
                break

    def close(self) -> None:
        """Remove it."""
        shutil.rmtree(self.path, ignore_errors=True)
        self._lock.close()


def remove_stale(parent: Path) -> None:
    """Remove directories of weights whose owner is gone."""
    for path in parent.glob(f"{_PREFIX}*"):
        with contextlib.suppress(OSError):  # another user's, or removed meanwhile
            if time.time() - path.stat().st_mtime < 60 and not (path / "lock").exists():
                continue  # being made
            with (path / "lock").open("ab") as lock:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                shutil.rmtree(path, ignore_errors=True)


# ---- the engine's side ----


def register() -> None:
    """Make the backend known to vLLM under the name BACKEND, in this process; a second call does nothing.

    An update is one or more {"path": FILE.safetensors} between start and finish. Linear weights are packed after
    loading on a CPU, so that tensors cannot be copied into them: vLLM's layerwise reload unpacks and packs again.
    """
    from dataclasses import dataclass

    from vllm.distributed.weight_transfer.base import (
        WeightTransferEngine,
        WeightTransferInitInfo,
        WeightTransferUpdateInfo,
    )
    from vllm.distributed.weight_transfer.factory import WeightTransferEngineFactory
    from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead, UnquantizedEmbeddingMethod
    from vllm.model_executor.model_loader.reload import finalize_layerwise_reload, initialize_layerwise_reload

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

        def init_transfer_engine(self, init_info: Init) -> None:
            """Nothing to do."""

        def start_weight_update(self) -> None:
            """See the base class."""
            self.loaded: set[str] = set()
            if not hasattr(self, "wanted"):  # tied ones stand under one name until an update fails
                self.wanted = _plain(name for name, _ in self.model.named_parameters())
            elif self.open:  # what an update that failed half-way had loaded would be counted into this one
                finalize_layerwise_reload(self.model, self.model_config)
            self.open = True
            initialize_layerwise_reload(self.model)

        def receive_weights(self, update_info: Update) -> None:
            """Load one file, a tensor at a time."""
            load: Any = self.model.load_weights  # of vLLM's models, not of every module
            self.loaded |= load(_tensors(update_info.path)) or set()

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

    with contextlib.suppress(ValueError):  # registered already
        WeightTransferEngineFactory.register_engine(BACKEND, FileTransfer)


def _tensors(path: str) -> Iterator[tuple[str, Tensor]]:
    from safetensors import safe_open

    with safe_open(path, framework="pt") as file:
        for name in file.keys():  # noqa: SIM118 (not a dict)
            yield name, file.get_tensor(name)


def _plain(names: Iterable[str]) -> set[str]:
    """Names without what a LoRA engine adds to them."""
    return {name.replace(".base_layer", "") for name in names}
