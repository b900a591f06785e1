"""A policy's weights as files that vLLM takes, and where they lie. file_transfer is the reader's end."""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
import tempfile
import time
from pathlib import Path
from typing import IO, Any

import torch
from torch import Tensor

from align.models.policy import Policy, is_peft, own_attention

BACKEND = "align_file"  # its name in vLLM

_SHM = Path("/dev/shm")
_PREFIX = "align-weights-"


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


def lora_rank(policy: Policy) -> int:
    """The largest rank of a policy's adapter; 0 without one."""
    configs: list[Any] = list(policy.model.peft_config.values()) if is_peft(policy.model) else []
    return max((config.r for config in configs), default=0)


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
