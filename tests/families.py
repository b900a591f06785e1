"""python -m tests.families: docs/models.md, what becomes of a small random model of every causal class of transformers.

A family's own defaults made small: the names that say how wide, how deep and how many are set, the rest is as it comes.
"""

from __future__ import annotations

import contextlib
import signal
import sys
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
from transformers.utils import logging

from align.models.policy import Policy, ScoreHead, Scorer, choose_layout, lora, probe_layout
from align.packing import pack
from align.types import Example, Row
from tests.conftest import pair_of

PAGE = Path(__file__).parents[1] / "docs" / "models.md"
TOLERANCE = 1e-4  # nats; float32
BIGGEST = 150_000_000  # weights; larger ones keep a size under a name that is not known here

WIDTHS = dict.fromkeys(["hidden_size", "d_model", "n_embd", "word_embed_proj_dim", "embedding_size"], 64)
WIDTHS |= dict.fromkeys(["intermediate_size", "ffn_dim", "n_inner", "dim_ff", "mlp_intermediate_size"], 64)
DEPTHS = dict.fromkeys(["num_hidden_layers", "n_layer", "n_layers", "num_layers", "decoder_layers"], 2)
HEADS = dict.fromkeys(["num_attention_heads", "n_head", "n_heads", "decoder_attention_heads"], 4)
SMALL = WIDTHS | DEPTHS | HEADS | {
    "vocab_size": 128, "num_key_value_heads": 2, "max_position_embeddings": 256, "n_positions": 256, "head_dim": 16,
    "num_experts": 4, "num_local_experts": 4, "n_routed_experts": 4, "num_experts_per_tok": 2, "n_group": 1,
    "topk_group": 1, "moe_intermediate_size": 32, "shared_expert_intermediate_size": 32, "n_shared_experts": 1,
    "first_k_dense_replace": 1, "sliding_window": 8, "rotary_dim": 8, "pad_token_id": 0, "bos_token_id": 1,
    "eos_token_id": 2, "mamba_n_heads": 4, "mamba_d_head": 32, "mamba_d_state": 16, "mamba_n_groups": 1,
}  # fmt: skip
# multi-head latent attention: heads of queries and keys are made of two parts
LATENT = {"q_lora_rank": 16, "kv_lora_rank": 16, "qk_nope_head_dim": 16, "qk_rope_head_dim": 8, "v_head_dim": 16}


@dataclass(frozen=True)
class Outcome:
    """What became of a family."""

    name: str
    layout: str  # "": it is refused
    apart: float  # from the model's own forward, nats
    adapter: bool  # LoRA has a gradient on every layer that it is on
    reward: bool  # a score head reads what the model's own trunk gives
    remark: str


def pairs() -> list[Example]:
    """Two pairs that share their prompts."""
    rng = np.random.default_rng(0)

    def row(prompt: np.ndarray, n: int) -> Row:
        ids = np.concatenate([prompt, rng.integers(3, 100, n)]).astype(np.int32)
        return Row(ids, np.arange(len(ids)) >= len(prompt))

    prompts = [rng.integers(3, 100, 14) for _ in range(2)]
    return [pair_of(row(p, 9), row(p, 6), f"r:{k}") for k, p in enumerate(prompts)]


def small(name: str) -> Any:
    """A random model of the family. Raises what transformers raises for a size that it cannot have."""
    config = AutoConfig.for_model(name)
    text = config.get_text_config()
    values = dict(SMALL)
    if hasattr(text, "kv_lora_rank"):
        values |= LATENT | {"num_key_value_heads": 4, "head_dim": LATENT["qk_rope_head_dim"]}
    for part in {id(part): part for part in (config, text)}.values():
        for key, value in values.items():
            with contextlib.suppress(Exception):  # a name that is another's alias, or differs by layer
                if getattr(part, key, None) is not None or key == "pad_token_id":
                    setattr(part, key, value)
        with contextlib.suppress(Exception):  # one layer of each kind, where the config holds them in a list
            kinds = list(dict.fromkeys(part.layer_types))
            part.layer_types = (kinds * 2)[: max(2, len(kinds))]
            part.num_hidden_layers = len(part.layer_types)
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).float().eval()
    count = sum(p.numel() for p in model.parameters())
    if count > BIGGEST:
        raise ValueError(f"still of {count / 1e6:.0f}M weights")
    for module in model.modules():  # as training does
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    return model


def tried(name: str, seconds: int = 60) -> Outcome:
    """Layout, difference, adapter and reward head of a family."""
    try:
        with _deadline(seconds), torch.no_grad():
            model = small(name)
            model(input_ids=torch.arange(3, 12)[None], use_cache=False)
    except Exception as error:
        return Outcome(name, "", 0.0, False, False, f"not made: {_first(error)}")
    try:
        with _deadline(seconds):
            return _tried(name, model)
    except Exception as error:
        return Outcome(name, "", 0.0, False, False, _first(error))


def _tried(name: str, model: Any) -> Outcome:
    examples = pairs()
    layout, why = choose_layout(model, "auto", 0.0)
    apart = probe_layout(Policy(model, layout).eval(), examples).largest
    if not apart <= TOLERANCE:
        return Outcome(name, "", apart, False, False, "its head or attention is not known to align")
    scorer = Scorer(model, layout, ScoreHead(model.config.get_text_config().hidden_size, 1)).eval()
    reward = probe_layout(scorer, examples).largest <= TOLERANCE
    why = "" if layout == "shared" else why
    try:
        adapted = lora(model, rank=2, alpha=4, dropout=0.0, targets="all-linear", seed=0)
        Policy(adapted, layout).train()(pack(examples, layout)).logps.sum().backward()
    except Exception as error:
        return Outcome(name, layout, apart, False, reward, f"{why}; LoRA: {_first(error)}".removeprefix("; "))
    grads = [p.grad for n, p in adapted.named_parameters() if "lora_B" in n]
    adapter = bool(grads) and sum(g is not None and bool(torch.isfinite(g).all()) for g in grads) == len(grads)
    return Outcome(name, layout, apart, adapter, reward, why)


@contextlib.contextmanager
def _deadline(seconds: int) -> Iterator[None]:
    def ended(*_: object) -> None:
        raise TimeoutError(f"took more than {seconds} s")

    before = signal.signal(signal.SIGALRM, ended)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def _first(error: Exception) -> str:
    return " ".join(str(error).split())[:90] or type(error).__name__


def line(outcome: Outcome) -> str:
    """Of the table."""
    marks = ["yes" if flag else "no" for flag in (outcome.adapter, outcome.reward)] if outcome.layout else ["", ""]
    layout = outcome.layout or ("not made" if outcome.remark.startswith("not made") else "refused")
    apart = f"{outcome.apart:.0e}" if outcome.layout else ""
    remark = outcome.remark.removeprefix("not made: ").replace("|", "/")
    return f"| {outcome.name} | {layout} | {apart} | {marks[0]} | {marks[1]} | {remark} |"


def main() -> None:
    """All of them, or those named; the page is written for all."""
    warnings.filterwarnings("ignore")
    logging.set_verbosity_error()
    torch.set_num_threads(1)
    names = sys.argv[1:] or list(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)
    lines = []
    for name in names:
        lines.append(line(tried(name)))
        print(lines[-1], flush=True)
    if not sys.argv[1:]:
        head = PAGE.read_text().split("|---")[0]
        PAGE.write_text(head + "|---|---|---|---|---|---|\n" + "\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
