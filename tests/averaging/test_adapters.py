"""LoRA adapters by real PEFT: the average is the mean of the deltas, which PEFT's "linear" is not."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from tests.averaging.build import adapter, average, model
from tests.averaging.test_methods import VECTORS

IDS = torch.arange(24).view(2, 12)


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """The model that adapters belong to."""
    return model(tmp_path_factory.mktemp("base") / "base", 0)


@pytest.fixture(scope="module")
def two(base, tmp_path_factory):
    """Two adapters of different rank, alpha and scaling rule."""
    root = tmp_path_factory.mktemp("adapters")
    return [
        adapter(root / "a", base, 1, rank=2, alpha=4),
        adapter(root / "b", base, 2, rank=3, alpha=5, use_rslora=True, rank_pattern={"layers.1.self_attn.q_proj": 1}),
    ]


def deltas(path, base):
    """The change of every adapted weight, as PEFT merges it into float64 weights."""
    plain = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float64)
    before = {k: v.clone() for k, v in plain.state_dict().items()}
    merged = PeftModel.from_pretrained(plain, path).merge_and_unload()
    return {k: v - before[k] for k, v in merged.state_dict().items() if not torch.equal(v, before[k])}


def mean_delta(paths, base, weights):
    """The weighted mean of the deltas."""
    found = [deltas(path, base) for path in paths]
    return {k: sum(w * d[k] for w, d in zip(weights, found, strict=True)) for k in found[0]}


@pytest.mark.parametrize("words, weights", [([], [0.5, 0.5]), (["method=weighted", "weights=[0.2,0.8]"], [0.2, 0.8])])
def test_the_average_of_adapters_is_the_mean_of_their_deltas(base, two, tmp_path, words, weights):
    average(*two, f"out={tmp_path / 'out'}", *words)
    got, want = deltas(tmp_path / "out", base), mean_delta(two, base, weights)
    assert got.keys() == want.keys()
    assert len(got) == 4
    for key, value in want.items():
        # factors are stored in float32
        torch.testing.assert_close(got[key], value, rtol=0, atol=2e-6 * float(value.abs().max()))
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"], config["use_rslora"]) == (5, 5, False)
    assert config["rank_pattern"] == {"model.layers.1.self_attn.q_proj": 3}


def test_merging_into_the_base_is_the_mean_of_the_merged_models(base, two, tmp_path):
    average(*two, f"out={tmp_path / 'out'}", f"merge={base}")
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    want = AutoModelForCausalLM.from_pretrained(base)
    start = load_file(base / "model.safetensors")
    change = mean_delta(two, base, [0.5, 0.5])
    for key, value in merged.state_dict().items():
        if key in start:
            exact = (start[key].double() + change.get(key, 0)).float()
            torch.testing.assert_close(value, exact, rtol=2e-7, atol=1e-9)
    assert not torch.allclose(merged(IDS).logits, want(IDS).logits, atol=1e-3)
    adapted = PeftModel.from_pretrained(want, two[0])
    assert not torch.allclose(merged(IDS).logits, adapted(IDS).logits, atol=1e-3)


def test_both_ways_of_writing_the_mean_compute_the_same(base, two, tmp_path):
    average(*two, f"out={tmp_path / 'adapter'}")
    average(*two, f"out={tmp_path / 'merged'}", f"merge={base}")
    lm = AutoModelForCausalLM.from_pretrained(base)
    one = PeftModel.from_pretrained(lm, tmp_path / "adapter")(IDS).logits
    two_ = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")(IDS).logits
    torch.testing.assert_close(one, two_, rtol=0, atol=1e-4)


def vector_adapters():
    """The vector's adapters on a model whose one adapted matrix has its shape, as PEFT holds them."""
    from peft import LoraConfig, get_peft_model

    entry = VECTORS["lora_average_0"]
    layer = torch.nn.Sequential(torch.nn.Linear(4, 3, bias=False)).double()
    peft = get_peft_model(layer, LoraConfig(r=2, lora_alpha=4, target_modules=["0"]), adapter_name="x0")
    peft.add_adapter("x1", LoraConfig(r=2, lora_alpha=4, target_modules=["0"]))
    with torch.no_grad():
        for i in range(2):
            for factor in ("A", "B"):
                value = torch.tensor(entry["inputs"][factor][i], dtype=torch.float64)
                name = f"base_model.model.0.lora_{factor}.x{i}.weight"
                peft.get_parameter(name).data = value
    return peft, entry


def test_pefts_linear_combination_is_not_the_mean_and_its_cat_is():
    """Regression: with PEFT 0.21 "linear" is off by the cross terms of the factors."""
    peft, entry = vector_adapters()
    exact = torch.tensor(entry["expected"]["exact_mean_delta"])
    layer = peft.base_model.model[0]
    for kind in ("cat", "linear"):
        peft.add_weighted_adapter(["x0", "x1"], [0.5, 0.5], kind, combination_type=kind)
    torch.testing.assert_close(layer.get_delta_weight("cat").float(), exact, rtol=0, atol=1e-6)
    linear = layer.get_delta_weight("linear").float()
    torch.testing.assert_close(linear, torch.tensor(entry["expected"]["peft_linear_delta"]), rtol=0, atol=1e-6)
    assert float((linear - exact).abs().max()) > 0.5


def test_adapters_of_the_vector_average_to_its_exact_delta(tmp_path):
    peft, entry = vector_adapters()
    for name in ("x0", "x1"):
        peft.save_pretrained(tmp_path, selected_adapters=[name])
    average(tmp_path / "x0", tmp_path / "x1", f"out={tmp_path / 'out'}", "dtype=float64")
    found = load_file(tmp_path / "out" / "adapter_model.safetensors")
    delta = found["base_model.model.0.lora_B.weight"] @ found["base_model.model.0.lora_A.weight"]
    want = torch.tensor(entry["expected"]["exact_mean_delta"], dtype=torch.float64)
    torch.testing.assert_close(delta, want, rtol=0, atol=1e-9)


def test_heads_beside_adapters_average_as_plain_tensors_and_merge_into_a_classifier(base, two, tmp_path):
    form = {"kind": "bradley_terry", "outputs": ["reward"], "mean": 0.1, "std": 2.0}
    heads = []
    for i, path in enumerate(two):
        copy = shutil.copytree(path, tmp_path / str(i))
        torch.manual_seed(i)
        heads.append(torch.randn(1, 32))
        save_file({"weight": heads[-1]}, copy / "score.safetensors")
        (copy / "reward_model.json").write_text(json.dumps(form | {"mean": 0.3 * i}))
    both = [tmp_path / "0", tmp_path / "1"]
    want = ((heads[0].double() + heads[1].double()) / 2).float()
    average(*both, f"out={tmp_path / 'adapter'}")
    assert torch.equal(load_file(tmp_path / "adapter" / "score.safetensors")["weight"], want)
    average(*both, f"out={tmp_path / 'merged'}", f"merge={base}")
    scorer = AutoModelForSequenceClassification.from_pretrained(tmp_path / "merged")
    assert torch.equal(scorer.score.weight, want)
    assert scorer.config.id2label == {0: "reward"}
    assert "lm_head.weight" not in load_file(tmp_path / "merged" / "model.safetensors")
    trunk = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), tmp_path / "adapter")
    hidden = trunk(IDS, output_hidden_states=True).hidden_states[-1]
    torch.testing.assert_close(scorer(IDS).logits, hidden[:, -1] @ want.T, rtol=0, atol=1e-5)
    with pytest.raises(ValueError, match="is a reward model and"):
        average(both[0], two[1], f"out={tmp_path / 'no'}")


def test_trained_heads_inside_an_adapter_average_as_plain_tensors(base, tmp_path):
    paths = []
    for i in range(2):
        paths.append(adapter(tmp_path / str(i), base, i, modules_to_save=["norm"]))
        file = paths[-1] / "adapter_model.safetensors"
        found = load_file(file)
        found["base_model.model.model.norm.weight"] += i
        save_file(found, file)
    average(*paths, f"out={tmp_path / 'out'}")
    got = load_file(tmp_path / "out" / "adapter_model.safetensors")["base_model.model.model.norm.weight"]
    assert torch.equal(got, torch.full((32,), 1.5))
    average(*paths, f"out={tmp_path / 'merged'}", f"merge={base}")
    assert torch.equal(load_file(tmp_path / "merged" / "model.safetensors")["model.norm.weight"], got)


def test_one_adapter_merges_alone(base, two, tmp_path):
    average(two[1], f"out={tmp_path / 'out'}", f"merge={base}")
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "out")(IDS).logits
    adapted = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), two[1])(IDS).logits
    torch.testing.assert_close(merged, adapted, rtol=0, atol=1e-4)


@pytest.mark.filterwarnings("ignore")  # PEFT warns of embeddings at length
def test_adapters_on_embeddings(base, tmp_path):
    tied, base = base, model(tmp_path / "untied", 0, tie_word_embeddings=False)
    paths = [adapter(tmp_path / str(i), base, i, target_modules=["embed_tokens"]) for i in range(2)]
    average(*paths, f"out={tmp_path / 'adapter'}")
    average(*paths, f"out={tmp_path / 'merged'}", f"merge={base}")
    want = mean_delta(paths, base, [0.5, 0.5])["model.embed_tokens.weight"]
    got = deltas(tmp_path / "adapter", base)["model.embed_tokens.weight"]
    torch.testing.assert_close(got, want, rtol=0, atol=2e-6)
    start, merged = (load_file(path / "model.safetensors") for path in (base, tmp_path / "merged"))
    assert merged.keys() == start.keys()
    key = "model.embed_tokens.weight"
    torch.testing.assert_close(merged[key], (start[key].double() + want).float(), rtol=2e-7, atol=1e-9)
    assert torch.equal(merged["lm_head.weight"], start["lm_head.weight"])
    with pytest.raises(ValueError, match="between embeddings and head, and the adapters change one"):
        average(*paths, f"out={tmp_path / 'no'}", f"merge={tied}")


def test_layers_that_store_their_weight_transposed(tmp_path):
    """GPT-2's projections are [in, out]: PEFT calls that fan_in_fan_out."""
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    base = tmp_path / "gpt2"
    GPT2LMHeadModel(GPT2Config(vocab_size=96, n_positions=64, n_embd=32, n_layer=2, n_head=2)).save_pretrained(base)
    settings = {"target_modules": ["c_attn"], "fan_in_fan_out": True}
    paths = [adapter(tmp_path / str(i), base, i, **settings) for i in range(2)]
    average(*paths, f"out={tmp_path / 'out'}", f"merge={base}")
    start, merged = (load_file(path / "model.safetensors") for path in (base, tmp_path / "out"))
    change = mean_delta(paths, base, [0.5, 0.5])
    assert len(change) == 2
    for key, value in merged.items():
        want = (start[key].double() + change.get(key, 0)).float()
        torch.testing.assert_close(value, want, rtol=2e-7, atol=1e-9)


def test_adapters_that_have_no_exact_mean_are_refused(base, two, tmp_path):
    def check(message, *words):
        with pytest.raises(ValueError, match=message):
            average(two[0], *words, f"out={tmp_path / 'out'}")
        assert not (tmp_path / "out").exists()

    check("method=linear is not offered: of LoRA adapters PEFT's", two[1], "method=linear")
    check("works on whole models; merge each adapter first", two[1], "method=stock", f"base={base}")
    check("use_dora makes an adapter", adapter(tmp_path / "dora", base, 3, use_dora=True))
    check("differ in target_modules", adapter(tmp_path / "modules", base, 3, target_modules=["v_proj"]))
    elsewhere = shutil.copytree(base, tmp_path / "elsewhere")
    check("differ in base_model_name_or_path", adapter(tmp_path / "foreign", elsewhere, 3))
    check("is an adapter itself", two[1], f"merge={two[1]}")
    wide = model(tmp_path / "wide", 0, intermediate_size=48)
    check(r"down_proj.weight is \[32, 48\]", two[1], f"merge={wide}")
    pissa = shutil.copytree(two[0], tmp_path / "pissa")
    config = json.loads((pissa / "adapter_config.json").read_text())
    (pissa / "adapter_config.json").write_text(json.dumps(config | {"init_lora_weights": "pissa_niter_4"}))
    check("changed the base weights too", pissa)
