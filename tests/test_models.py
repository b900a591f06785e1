"""Which models may be packed, what a model's own scaling does, and what is refused."""

from __future__ import annotations

import pytest
import torch

from align.device import MemoryPlan, memory_plan, pick_precision, pick_recompute
from align.models import Policy, choose_layout, head_of, lora, probe_layout, weights_hash
from tests.conftest import tiny_model


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


def test_granite_and_cohere_scale_their_logits(make_pairs):
    # the probe compares with the padded path through the same head, so compare with the model's own logits
    pairs = make_pairs(2)
    for family, extra in (("granite", {"logits_scaling": 3.0}), ("cohere", {"logit_scale": 0.25})):
        model = tiny_model(family, **extra)
        from tests.test_layouts import naive_logps

        expected = torch.stack([v for p in pairs for v in naive_logps(model, p)])
        from align.packing import pack

        actual = Policy(model, "shared")(pack(pairs, "shared")).logps
        torch.testing.assert_close(actual, expected, rtol=0, atol=1e-8)
        assert head_of(model).scale != 1.0


def test_probe_sees_an_attention_the_packed_path_does_not_know(make_pairs):
    # Gemma 2's stock attention takes its softmax in float32
    assert probe_layout(Policy(tiny_model("gemma2"), "shared"), make_pairs(2)) < 1e-5
    policy = Policy(tiny_model("qwen2", use_sliding_window=True, sliding_window=3, max_window_layers=0), "shared")
    assert probe_layout(policy, make_pairs(4)) < 1e-9
    for layer in policy.model.model.layers:
        layer.self_attn.sliding_window = None  # the stock mask still has the window of the config
    assert probe_layout(policy, make_pairs(4)) > 1e-3


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
    assert pick_recompute("auto", plan, 2000)[0] == "off"
    assert pick_recompute("auto", plan, 1000)[0] == "selective"  # 600 <= 800 < 1000
    assert pick_recompute("auto", plan, 10)[0] == "full"
    assert pick_recompute("selective", plan, 2000)[0] == "selective"


def test_memory_estimate_orders_the_modes_and_grows_with_tokens():
    config = tiny_model("llama", num_hidden_layers=8).config
    small, large = (memory_plan(config, 1000, tokens, torch.float32).activations for tokens in (100, 200))
    assert small["off"] > small["selective"] > small["full"]
    assert large["off"] == 2 * small["off"]


def test_precision_can_be_set():
    assert pick_precision("float32", torch.device("cpu"))[0] == torch.float32
    assert pick_precision("auto", torch.device("cpu"))[0] in (torch.float32, torch.bfloat16)
