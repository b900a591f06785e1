"""Which models can be trained: docs/models.md is what the machine says; auto takes no layout that is then refused."""

from __future__ import annotations

import pytest
import torch
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from align.models import policy
from align.models.policy import choose_layout, trunk_of
from tests import families
from tests.conftest import gpt_oss, tiny_model

LINES = {
    row.split("|")[1].strip(): row for row in families.PAGE.read_text().splitlines() if row.startswith("| ")
}  # fmt: skip
# dense, scaled logits, capped scores, mixture, latent attention, sinks, a state, a mask of its own, odd trunk, no LM
SAMPLE = ["qwen3", "cohere2", "gemma2", "mixtral", "deepseek_v3", "gpt_oss", "mamba", "doge", "llama4_text", "bert"]


def layout_of(row: str) -> str:
    return row.split("|")[2].strip()


def test_the_page_has_every_causal_class():
    assert set(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES) <= set(LINES)
    trained = [row for row in LINES.values() if layout_of(row) in ("shared", "packed", "padded")]
    assert len(trained) > 80


@pytest.mark.parametrize("name", SAMPLE)
def test_the_page_says_what_becomes_of_it(name):
    found = families.line(families.tried(name))
    assert [layout_of(found), *found.split("|")[4:6]] == [layout_of(LINES[name]), *LINES[name].split("|")[4:6]]


def test_a_trunk_that_computes_something_else_on_packed_rows_gets_padded_ones(monkeypatch):
    model = tiny_model("llama", torch.float32)
    assert choose_layout(model, "auto", 0.0)[0] == "shared"
    plain = policy.attention.packed_attention
    monkeypatch.setitem(
        policy.attention.ALL_ATTENTION_FUNCTIONS, policy.attention.NAME,
        lambda *args, **keys: plain(*args, **keys | {"scaling": 1.0}),
    )  # fmt: skip
    layout, why = choose_layout(model, "auto", 0.0)
    assert (layout, why) == ("padded", "the trunk of LlamaForCausalLM computes something else on packed rows")
    assert model.config._attn_implementation != policy.attention.NAME  # as it was


def test_what_gives_no_hidden_states_is_refused_by_name():
    model = gpt_oss()
    assert trunk_of(model) is model.model
    del model.model
    model.get_decoder = lambda: torch.nn.Linear(1, 1)
    with pytest.raises(ValueError, match="GptOssForCausalLM cannot be trained"):
        trunk_of(model)
