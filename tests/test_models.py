"""Which models may be packed, what a model's own scaling does, and what is refused."""

from __future__ import annotations

import copy
import math

import pytest
import torch

from align.models.device import MemoryPlan, memory_plan, pick_activation_checkpointing, pick_precision
from align.models.policy import (
    Discrepancy,
    Policy,
    ScoreHead,
    Scorer,
    attention,
    choose_layout,
    lora,
    own_attention,
    own_attention_name,
    probe_layout,
    weights_hash,
)
from tests.conftest import gpt_oss, tiny_model


def test_causal_attention_is_shared_and_dropout_packs():
    assert choose_layout(tiny_model("llama"), "auto", 0.0)[0] == "shared"
    assert choose_layout(tiny_model("mistral"), "auto", 0.0)[0] == "shared"
    assert choose_layout(tiny_model("llama"), "auto", 0.1)[0] == "packed"


@pytest.mark.parametrize("family", ["mamba", "rwkv"])
def test_other_kinds_fall_back_to_padded_rows_with_the_reason(family):
    from transformers import CONFIG_MAPPING, AutoModelForCausalLM

    config = CONFIG_MAPPING[family](vocab_size=96, hidden_size=32, num_hidden_layers=2, attention_hidden_size=32)
    model = AutoModelForCausalLM.from_config(config)
    layout, reason = choose_layout(model, "auto", 0.0)
    assert (layout, bool(reason)) == ("padded", True)
    with pytest.raises(ValueError, match=r"trainer.layout=shared: .*use trainer.layout=padded"):
        choose_layout(model, "shared", 0.0)


def recurrent_gemma(**overrides):
    return tiny_model(
        "recurrent_gemma",
        num_hidden_layers=3,
        lru_width=32,
        attention_window_size=16,
        num_key_value_heads=1,
        **overrides,
    )


@pytest.mark.parametrize(
    ("model", "layout"),
    [
        (lambda: tiny_model("granite", logits_scaling=3.0), "shared"),
        (lambda: tiny_model("cohere", logit_scale=0.25), "shared"),
        (lambda: tiny_model("gemma2", final_logit_softcapping=2.0, attn_logit_softcapping=1.0), "shared"),
        (lambda: tiny_model("gemma2", final_logit_softcapping=2.0, attn_logit_softcapping=1.0), "padded"),
        (lambda: recurrent_gemma(logits_soft_cap=2.0), "padded"),
        (gpt_oss, "padded"),
    ],
    ids=["granite", "cohere", "gemma2", "gemma2 padded", "recurrent_gemma", "gpt_oss"],
)
def test_log_probs_are_those_of_the_models_own_logits(model, layout, make_pairs):
    # softmax, norms or, of gpt-oss, everything is float32; what is left out would be off by 0.1 and more
    assert probe_layout(Policy(model(), layout), make_pairs(2)).largest < 1e-4


def test_sinks_and_states_choose_padded_rows():
    layout, reason = choose_layout(gpt_oss(), "auto", 0.0)
    assert (layout, reason) == ("padded", "GptOssForCausalLM has attention sinks")
    layout, reason = choose_layout(recurrent_gemma(), "auto", 0.0)
    assert (layout, reason) == ("padded", "RecurrentGemmaForCausalLM carries a state from token to token")


@pytest.mark.parametrize("layout", ["shared", "padded"])
@pytest.mark.parametrize("scale", [1.0, 5.0])
def test_probe_sees_a_head_that_align_does_not_know(layout, scale, make_pairs):
    model = tiny_model("llama")
    own = model.forward

    def scaled(*args, logits_to_keep=0, **kwargs):
        out = own(*args, logits_to_keep=logits_to_keep, **kwargs)
        out.logits = out.logits * scale
        return out

    model.forward = scaled
    gap = probe_layout(Policy(model, layout), make_pairs(2)).largest
    assert (gap > 1) == (scale > 1)


def test_probe_sees_an_attention_the_packed_path_does_not_know(make_pairs):
    policy = Policy(tiny_model("qwen2", use_sliding_window=True, sliding_window=3, max_window_layers=0), "shared")
    assert probe_layout(policy, make_pairs(4)).largest < 1e-9
    for layer in policy.model.model.layers:
        layer.self_attn.sliding_window = None  # the own mask still has the window of the config
    assert probe_layout(policy, make_pairs(4)).largest > 1e-3


def test_rounding_of_the_own_logits_is_told_apart():
    # 8 bits of a logit of 20 are good to eps * 20 = 0.16, of two of them; the rest is a difference
    gaps, logits = torch.tensor([0.1, 0.2]), torch.tensor([20.0, 2.0])
    found = Discrepancy.of(gaps, torch.finfo(torch.bfloat16).eps * logits)
    assert found.largest == pytest.approx(0.2)
    assert found.beyond_rounding == pytest.approx(0.2 - 2 * 2**-7)
    assert Discrepancy.of(torch.zeros(0), 0.0) == Discrepancy(0.0, 0.0)


def test_probe_sees_what_is_no_number(make_pairs):
    policy = Policy(tiny_model("llama"), "shared")
    with torch.no_grad():
        policy.model.model.norm.weight[0] = torch.nan
    assert probe_layout(policy, make_pairs(2)).largest == math.inf


def test_probe_compares_a_reward_models_scores_with_its_own_trunk(make_pairs):
    scorer = Scorer(gpt_oss(), "padded", ScoreHead(32, 2))
    assert probe_layout(scorer, make_pairs(2)).largest < 1e-6
    for layer in scorer.causal_lm.model.layers:
        layer.self_attn.config = copy.copy(layer.self_attn.config)
        layer.self_attn.config._attn_implementation = "sdpa"  # which drops the sinks
    own = scorer.own_scores

    def with_sinks(row):
        for layer in scorer.causal_lm.model.layers:
            layer.self_attn.config._attn_implementation = "eager"
        return own(row)

    scorer.own_scores = with_sinks
    assert probe_layout(scorer, make_pairs(2)).largest > 1e-4


def test_own_attention_is_the_one_a_model_was_loaded_with():
    model = gpt_oss()
    assert own_attention_name(model) == "eager"
    assert own_attention_name(tiny_model("llama", attn_implementation="eager")) == "eager"
    assert own_attention_name(tiny_model("llama")) == "sdpa"
    gemma = tiny_model("gemma2", attn_implementation="sdpa")  # as transformers loads it, without its cap of scores
    assert own_attention_name(gemma) == "eager"
    assert Policy(gemma, "padded").causal_lm.config._attn_implementation == "eager"
    packed = Policy(tiny_model("llama", attn_implementation="eager"), "shared").causal_lm
    assert packed.config._attn_implementation == attention.NAME
    with own_attention(packed):
        assert packed.config._attn_implementation == "eager"
    assert packed.config._attn_implementation == attention.NAME


def test_lora_on_the_head_is_refused():
    with pytest.raises(ValueError, match="lm_head cannot carry an adapter"):
        lora(tiny_model("llama"), rank=2, alpha=4, dropout=0.0, targets=["q_proj", "lm_head"], seed=0)


def test_weights_hash_is_of_the_base_model_and_of_every_bit():
    base = tiny_model("llama")
    plain = weights_hash(base)
    adapted = lora(base, rank=2, alpha=4, dropout=0.0, targets="all-linear", seed=0)
    assert weights_hash(adapted) == plain
    with torch.no_grad():
        next(p for n, p in adapted.named_parameters() if "norm" in n)[0] += 1e-12
    assert weights_hash(adapted) != plain


def test_recompute_is_the_first_that_fits():
    plan = MemoryPlan(states=100, activations={"off": 900, "selective": 500, "full": 200})
    assert pick_activation_checkpointing("auto", plan, 2000)[0] == "off"
    assert pick_activation_checkpointing("auto", plan, 1000)[0] == "selective"  # 600 <= 800 < 1000
    assert pick_activation_checkpointing("auto", plan, 10)[0] == "full"
    assert pick_activation_checkpointing("selective", plan, 2000)[0] == "selective"


def test_memory_estimate_orders_the_modes_and_grows_with_tokens():
    config = tiny_model("llama", num_hidden_layers=8).config
    small, large = (memory_plan(config, 1000, tokens, torch.float32).activations for tokens in (100, 200))
    assert small["off"] > small["selective"] > small["full"]
    assert large["off"] == 2 * small["off"]


def test_precision_can_be_set():
    assert pick_precision("float32", torch.device("cpu"))[0] == torch.float32
    assert pick_precision("auto", torch.device("cpu"))[0] in (torch.float32, torch.bfloat16)
