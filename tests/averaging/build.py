"""Small real models on disk, saved by transformers and PEFT, and the command that averages them."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from transformers.utils import logging

from align.averaging.command import run
from align.models.pretrained import byte_tokenizer
from tests.conftest import tiny_model


def model(path: Path, seed: int, tokenizer: bool = True, dtype=torch.float32, shard: str = "5GB", **overrides) -> Path:
    """A tiny Llama, with a tokenizer beside it."""
    logging.disable_progress_bar()
    tiny_model("llama", dtype, seed, **overrides).save_pretrained(path, max_shard_size=shard)
    if tokenizer:
        byte_tokenizer().save_pretrained(path)
    return path


def reward_model(path: Path, seed: int, outputs: tuple[str, ...] = ("reward",), **form) -> Path:
    """A tiny sequence classifier in the form of a saved reward model, with a head file of its own."""
    from transformers import AutoModelForSequenceClassification

    config = tiny_model("llama").config
    config.num_labels = len(outputs)
    torch.manual_seed(seed)
    AutoModelForSequenceClassification.from_config(config).float().save_pretrained(path)
    byte_tokenizer().save_pretrained(path)
    save_file({"gate.weight": torch.randn(1, config.hidden_size)}, path / "head.safetensors")
    told = {
        "kind": "bradley_terry",
        "outputs": list(outputs),
        "tau": 1.0,
        "mean": [0.5 * seed],
        "std": [1.0],
        "count": seed + 2,
    } | form
    (path / "reward_model.json").write_text(json.dumps(told))
    return path


def adapter(path: Path, base: Path, seed: int, rank: int = 2, alpha: float = 4, **overrides) -> Path:
    """A LoRA adapter by PEFT whose factors are all random."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    settings = {"target_modules": ["q_proj", "down_proj"], "task_type": "CAUSAL_LM"} | overrides
    lm = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    peft = get_peft_model(lm, LoraConfig(r=rank, lora_alpha=alpha, **settings))
    torch.manual_seed(seed)
    with torch.no_grad():
        for name, value in peft.named_parameters():
            if "lora_" in name:
                value.normal_(std=0.3)
    peft.save_pretrained(path)
    return path


def average(*words: object) -> list[str]:
    """What `align average` says."""
    said: list[str] = []
    assert run([str(word) for word in words], said.append) == 0
    return said


def tensors(path: Path) -> dict[str, torch.Tensor]:
    """All weights of a model directory, shards or not."""
    out: dict[str, torch.Tensor] = {}
    for file in sorted(path.glob("model*.safetensors")):
        out |= load_file(file)
    return out


def rewrite(path: Path, change) -> Path:
    """Apply `change` to the dictionary of tensors of model.safetensors."""
    found = load_file(path / "model.safetensors")
    change(found)
    save_file(found, path / "model.safetensors", {"format": "pt"})
    return path


def ulps(one: torch.Tensor, two: torch.Tensor) -> int:
    """Largest distance of two tensors of one float dtype, counted in representable numbers."""
    kind, top = (torch.int32, 1 << 31) if one.dtype == torch.float32 else (torch.int16, 1 << 15)
    places = []
    for x in (one, two):
        bits = x.contiguous().view(kind).long()
        places.append(torch.where(bits < 0, -(bits + top), bits))
    return int((places[0] - places[1]).abs().max())
