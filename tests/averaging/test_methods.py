"""The mathematics against the public vectors, values derived by hand, and invariances."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch

from align.averaging.methods import (
    block_ratio,
    concatenated_factors,
    layer_groups,
    metric_weights,
    normalised_alphas,
    offsets_gram,
    stitch,
    stock,
    stock_ratio,
    top_k_masks,
    uniform_mean,
    weighted_sum,
)

_FILE = Path(__file__).parents[1] / "vectors" / "reward_public.json"
VECTORS = {entry["name"]: entry for entry in json.loads(_FILE.read_text())}


def vector(name):
    """config, inputs, expected of an entry."""
    entry = VECTORS[name]
    return entry["config"], entry["inputs"], entry["expected"]


def f64(value) -> torch.Tensor:
    """A tensor in float64."""
    return torch.tensor(value, dtype=torch.float64)


def close(one, two, tolerance=1e-9):
    """Equal within the vectors' absolute tolerance."""
    torch.testing.assert_close(one, f64(two) if isinstance(two, list) else two, rtol=0, atol=tolerance)


def test_uniform_average_is_the_vectors_and_not_the_bfloat16_accumulation():
    _, inputs, expected = vector("warm_M3")
    third = [1 / 3] * 3
    wrong = []
    for key, want in expected["average"].items():
        xs = [f64(state[key]) for state in inputs["state_dicts"]]
        close(weighted_sum(xs, third), want)
        rounded = [x.to(torch.bfloat16) for x in xs]
        close(weighted_sum([x.double() for x in rounded], third), expected["average_of_bf16_inputs_fp64_accum"][key])
        # as the engine does it: one rounding
        got = uniform_mean([x.double() for x in rounded]).to(torch.bfloat16)
        assert torch.equal(got.double(), f64(expected["bf16_out_of_fp32_accum"][key]))
        wrong.append(torch.equal(got.double(), f64(expected["wrong_bf16_accum"][key])))
    assert not all(wrong)


@pytest.mark.parametrize("name", ["model_stock_3x4_N2_layer", "model_stock_4x2_N3_layer", "model_stock_3x5_N2_filter"])
def test_model_stock_vectors(name):
    config, inputs, expected = vector(name)
    base, tuned = f64(inputs["w0"]), [f64(w) for w in inputs["ws"]]
    if config["filter_wise"]:
        ratio = stock_ratio(offsets_gram(base, tuned), clamp=False).unsqueeze(-1)
    else:
        flat = offsets_gram(base.flatten(), [w.flatten() for w in tuned])
        ratio = stock_ratio(flat, clamp=False)
        close(ratio, f64(expected["t"]))
    close(stock(base, tuned, ratio), expected["merged"])


def test_model_stock_at_a_negative_cosine_clamps_or_is_mergekits():
    """Offsets (1, 0) and (-0.6, 0.8): c = -0.6, t = 2c / (1 + c) = -3; clamped 0, the base."""
    gram = offsets_gram(f64([0.0, 0.0]), [f64([1.0, 0.0]), f64([-0.6, 0.8])])
    close(stock_ratio(gram, clamp=False), f64(-3.0))
    assert float(stock_ratio(gram, clamp=True)) == 0.0


def test_model_stock_beyond_the_pole_is_the_base():
    """Three offsets whose mean cosine is -1/2, the pole of N = 3, give the base and not a ratio of +1."""
    angles = [0, 2 * math.pi / 3, 4 * math.pi / 3]
    gram = offsets_gram(f64([0.0, 0.0]), [f64([math.cos(a), math.sin(a)]) for a in angles])
    assert float(stock_ratio(gram, clamp=True)) == 0.0


def test_model_stock_of_equal_offsets_is_the_mean_however_small_they_are():
    """c = 1 gives t = 1; mergekit's floor of norms turns offsets of 1e-5 towards the base."""
    base = f64([1.0, 2.0])
    tuned = [base + 1e-5, base + 1e-5]
    assert float(stock_ratio(offsets_gram(base, tuned), clamp=True)) == pytest.approx(1.0)
    assert float(stock_ratio(offsets_gram(base, tuned), clamp=False)) < 0.001
    assert float(stock_ratio(offsets_gram(base, [base, base]), clamp=True)) == 0.0


@pytest.mark.parametrize("name", ["mwa_loss_p1.0", "mwa_loss_p5.0", "mwa_steps_p1.0", "mwa_steps_p2.0"])
def test_metric_weight_vectors(name):
    config, inputs, expected = vector(name)
    weights = metric_weights(inputs["values"], config["penalty"], config["kind"])
    assert weights == pytest.approx(expected["weights"], abs=1e-12)
    close(weighted_sum([f64(t) for t in inputs["tensors"]], weights), expected["merged"])


def test_metric_weights_at_their_limits():
    assert metric_weights([3.0, 1.0, 2.0], 0.0, "loss") == pytest.approx([1 / 3] * 3)
    assert metric_weights([3.0, 1.0, 2.0], 5000.0, "loss") == pytest.approx([0, 1, 0])  # no overflow
    assert metric_weights([3.0, 1.0, 2.0], 5000.0, "steps") == pytest.approx([1, 0, 0])


def test_block_interpolation_vector():
    config, inputs, expected = vector("ama_split_split_10-20_0.4_0.3_0.2")
    for key, want in expected["ratio"].items():
        ratio = block_ratio(key, [10, 20], [0.4, 0.3, 0.2], config["other_ratio"])
        assert ratio == want
        got = weighted_sum([f64(inputs["theta0"][key]), f64(inputs["theta1"][key])], [ratio, 1 - ratio])
        close(got, expected["theta"][key])
    assert block_ratio("score.weight", [10], [0.1, 0.2], 0.7) == 0.7
    assert block_ratio("transformer.h.11.ln_1.weight", [10], [0.1, 0.2], 0.7) == 0.2
    assert block_ratio("transformer.ln_f.weight", [10], [0.1, 0.2], 0.7) == 0.7


def test_normalised_alphas_vector():
    config, inputs, expected = vector("ama_normalised_alphas")
    alphas = normalised_alphas(inputs["raw"], config["init_val"], config["epsilon"])
    assert alphas == pytest.approx(expected["alpha"], abs=1e-12)
    assert sum(alphas) / 3 == pytest.approx(config["init_val"])
    for alpha, want in zip(alphas, expected["theta"], strict=True):
        close(weighted_sum([f64(inputs["theta0"]), f64(inputs["theta1"])], [alpha, 1 - alpha]), want)


@pytest.mark.parametrize("name", ["ama_groups_block3_L26", "ama_groups_block3_L32", "ama_groups_block4_L12"])
def test_layer_group_vectors(name):
    config, inputs, expected = vector(name)
    groups = layer_groups(inputs["n_layers"], int(config["mask_level"].removeprefix("block")))
    assert [str(group) for group in groups] == expected["group_of_layer"]


def test_layer_groups_put_the_remainder_in_the_last_block():
    assert layer_groups(11, 4) == [0, 0, 1, 1, 2, 2, 3, 3, 3, 3, 3]
    assert layer_groups(8, 3) == [0] * 8


def test_stitch_vector():
    _, inputs, expected = vector("stitch")
    masks = [f64(mask) > 0 for mask in inputs["masks"]]
    close(stitch(f64(inputs["theta_pre"]), [f64(t) for t in inputs["theta_ft"]], masks), expected["theta"])


def test_dataless_masks_are_the_vectors_if_strict_and_hold_the_kth_entry_if_not():
    config, inputs, expected = vector("dataless_localise")
    vectors = [f64(row) for row in inputs["task_vectors"]]
    strict = top_k_masks(vectors, config["sparsity"], strict=True)
    assert [mask.double().tolist() for mask in strict] == expected["mask"]
    # the fourth largest of ten is 0.5, left out by a strict comparison
    ours = top_k_masks(vectors, config["sparsity"])
    assert [mask.int().tolist() for mask in ours] == [[0, 1, 0, 0, 0], [1, 1, 0, 1, 0]]
    assert not torch.cat(top_k_masks([f64([0.0, 0.0])], 1.0)).any()


def lora():
    """Factors, scalings, weights and expectations of the vector."""
    config, inputs, expected = vector("lora_average_0")
    down, up = ([f64(x) for x in inputs[name]] for name in ("A", "B"))
    return down, up, inputs["scaling"], config["weights"], expected


def test_concatenated_factors_are_the_exact_mean_and_no_mean_of_factors():
    down, up, scalings, weights, expected = lora()
    a, b = concatenated_factors(down, up, scalings, weights)
    assert (a.shape[0], b.shape[1]) == (4, 4)
    close(b @ a, expected["exact_mean_delta"])
    close(b @ a, expected["peft_cat_delta"], 1e-6)
    for wrong in ("peft_linear_delta", "factor_average_delta"):
        assert float((b @ a - f64(expected[wrong])).abs().max()) > 0.1


def test_a_weight_of_zero_leaves_the_bits_of_the_other():
    x = torch.tensor([-0.0, 1e-40, 3.0])
    assert torch.equal(weighted_sum([x, torch.ones(3)], [1.0, 0.0]).view(torch.int32), x.view(torch.int32))
