"""Whole models: what `align average` writes, against averages in memory, transformers' own loading and invariances."""

from __future__ import annotations

import itertools
import json
import shutil
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

import align.averaging.combine as combine
from align.averaging.combine import Inputs, Localized, Stock, average_of
from align.averaging.files import open_model
from align.averaging.methods import offsets_gram, stitch, stock, stock_ratio, top_k_masks
from align.checkpoint import problem
from tests.averaging.build import average, model, reward_model, rewrite, tensors, ulps

_SMALL = 1 << 12  # bytes of working memory: every matrix is cut into many spans


@pytest.fixture(scope="module")
def three(tmp_path_factory):
    """Three models of one shape; the second is sharded."""
    root = tmp_path_factory.mktemp("models")
    return [model(root / str(i), i, shard="20KB" if i == 1 else "5GB") for i in range(3)]


def mean(paths, weights=None):
    """The average in memory: summed in float64, rounded once."""
    states = [tensors(path) for path in paths]

    def one(key):
        xs = [state[key].double() for state in states]
        if weights is None:
            return sum(xs) / len(xs)
        return sum(w * x for w, x in zip(weights, xs, strict=True))

    return {key: one(key).to(states[0][key].dtype) for key in states[0]}


def told_weights(path):
    """The weights that average.json says."""
    return [member["weight"] for member in json.loads((path / "average.json").read_text())["models"]]


def same(one, two):
    """Whether two dictionaries of tensors are equal bit for bit."""
    return one.keys() == two.keys() and all(torch.equal(one[k], two[k]) for k in one)


def test_uniform_average_of_sharded_and_single_files_loads_in_transformers(three, tmp_path):
    assert (three[1] / "model.safetensors.index.json").exists()
    average(*three, f"out={tmp_path / 'out'}")
    want = mean(three)
    assert same(tensors(tmp_path / "out"), want)
    got = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    in_memory = AutoModelForCausalLM.from_pretrained(three[0])
    in_memory.load_state_dict(want, strict=False)
    in_memory.tie_weights()
    ids = torch.arange(20).view(2, 10)
    assert torch.equal(got(ids).logits, in_memory(ids).logits)
    assert not torch.equal(got(ids).logits, AutoModelForCausalLM.from_pretrained(three[0])(ids).logits)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    assert tokenizer("abc").input_ids == AutoTokenizer.from_pretrained(three[0])("abc").input_ids
    assert tokenizer.chat_template
    assert problem(tmp_path / "out") == ""


def test_shards_have_an_index_with_the_right_total_and_the_same_numbers(three, tmp_path):
    average(*three, f"out={tmp_path / 'whole'}")
    average(*three, f"out={tmp_path / 'cut'}", f"shard_gib={20000 / 2**30}")
    index = json.loads((tmp_path / "cut" / "model.safetensors.index.json").read_text())
    found = tensors(tmp_path / "cut")
    assert len(set(index["weight_map"].values())) > 2
    assert index["metadata"]["total_size"] == sum(t.nbytes for t in found.values())
    assert set(index["weight_map"]) == set(found)
    for path in (tmp_path / "cut").glob("model-*.safetensors"):
        assert sum(t.nbytes for t in load_file(path).values()) <= 20000
    assert same(found, tensors(tmp_path / "whole"))
    ids = torch.arange(8).view(1, 8)
    one, two = (AutoModelForCausalLM.from_pretrained(tmp_path / name)(ids).logits for name in ("cut", "whole"))
    assert torch.equal(one, two)


def test_a_small_budget_cuts_tensors_into_spans_and_changes_no_bit(three):
    models = tuple(open_model(path) for path in three)
    uniform = combine.Uniform()
    spans = 0
    for key in models[0].sets["model"]:
        whole, cut = Inputs(models, "model", 1 << 28), Inputs(models, "model", _SMALL)
        spans = max(spans, len(list(cut.spans(key))))
        one, two = (torch.cat(list(average_of(x, uniform, key, torch.float32))) for x in (whole, cut))
        assert torch.equal(one, two)
    assert spans > 50


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_order_of_the_models_changes_at_most_the_last_place(tmp_path, dtype):
    paths = [model(tmp_path / str(i), i, dtype=dtype) for i in range(3)]
    results = []
    for n, order in enumerate(itertools.permutations(paths)):
        average(*order, f"out={tmp_path / f'out{n}'}")
        results.append(tensors(tmp_path / f"out{n}"))
    for other in results[1:]:
        for key, value in results[0].items():
            assert value.dtype == dtype
            assert ulps(value, other[key]) <= 1


@pytest.mark.parametrize("count", [3, 7])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_copies_of_one_model_average_to_it_bit_for_bit(tmp_path, count, dtype):
    source = model(tmp_path / "0", 0, dtype=dtype)
    said = average(*[source] * count, f"out={tmp_path / 'out'}")
    assert same(tensors(tmp_path / "out"), tensors(source))
    assert sum("holds the same weights" in line for line in said) == count - 1


def test_weights_of_one_and_zero_return_the_first_model(three, tmp_path):
    average(*three[:2], f"out={tmp_path / 'out'}", "method=weighted", "weights=[1,0]")
    assert same(tensors(tmp_path / "out"), tensors(three[0]))


def test_weighted_and_extrapolated_averages(three, tmp_path):
    average(*three, f"out={tmp_path / 'a'}", "method=weighted", "weights=[0.2,0.3,0.5]")
    assert same(tensors(tmp_path / "a"), mean(three, [0.2, 0.3, 0.5]))
    words = [*three[:2], f"out={tmp_path / 'b'}", "method=weighted", "weights=[1.5,-0.5]"]
    with pytest.raises(ValueError, match="extrapolate=true"):
        average(*words)
    average(*words, "extrapolate=true")
    assert same(tensors(tmp_path / "b"), mean(three[:2], [1.5, -0.5]))


def test_losses_are_read_beside_the_runs(three, tmp_path):
    """Losses 0.5 and 0.25 at penalty 1 weigh 1 : 2; steps 100 and 300 weigh 1 : 3."""
    for name, source, loss in (("x", three[0], 0.5), ("y", three[2], 0.25)):
        shutil.copytree(source, tmp_path / name / "final")
        (tmp_path / name / "summary.json").write_text(json.dumps({"step": 9, "metrics": {"loss/heldout": loss}}))
    runs = [tmp_path / "x" / "final", tmp_path / "y" / "final"]
    average(*runs, f"out={tmp_path / 'loss'}", "method=loss", "penalty=1")
    weights = told_weights(tmp_path / "loss")
    assert weights == pytest.approx([1 / 3, 2 / 3])
    assert same(tensors(tmp_path / "loss"), mean(runs, weights))
    steps = [shutil.copytree(three[i], tmp_path / f"checkpoint-{n}") for i, n in ((0, 100), (2, 300))]
    average(*steps, f"out={tmp_path / 'steps'}", "method=steps", "penalty=1")
    assert told_weights(tmp_path / "steps") == pytest.approx([0.25, 0.75])
    with pytest.raises(ValueError, match=r"no summary.json beside it; give values="):
        average(*three, f"out={tmp_path / 'none'}", "method=loss", "penalty=1")


def test_model_stock_by_tensor_and_by_row(three, tmp_path):
    base, *tuned = (tensors(path) for path in three)
    for name, more in (("layer", []), ("row", ["filter_wise=true"])):
        average(*three[1:], f"base={three[0]}", f"out={tmp_path / name}", "method=stock", *more)
        got = tensors(tmp_path / name)
        for key, w0 in base.items():
            ws = [state[key].double() for state in tuned]
            w0 = w0.double()
            if name == "row" and w0.dim() > 1:
                ratio = stock_ratio(offsets_gram(w0, ws), clamp=True).unsqueeze(-1)
            else:
                ratio = stock_ratio(offsets_gram(w0.flatten(), [w.flatten() for w in ws]), clamp=True)
            torch.testing.assert_close(got[key], stock(w0, ws, ratio).float(), rtol=1e-6, atol=1e-9)


def test_model_stock_in_spans_has_the_ratio_of_the_whole_tensor(three):
    models = tuple(open_model(path) for path in three)
    for rows in (False, True):
        method = Stock(rows, True)
        for key in ("model.embed_tokens.weight", "model.layers.0.mlp.up_proj.weight", "model.norm.weight"):
            one, two = (torch.cat(list(method(Inputs(models, "model", m), key))) for m in (1 << 28, _SMALL))
            torch.testing.assert_close(one, two, rtol=1e-12, atol=1e-15)


def test_interpolation_sweeps_and_blocks(three, tmp_path):
    """alpha is the base's weight: 1 is the base, 0 the model, both bit for bit."""
    before, after = three[:2]
    common = [after, f"base={before}", "method=interpolate"]
    average(*common, f"out={tmp_path / 'sweep'}", "sweep=[0,0.25,1]")
    for alpha in (0, 0.25, 1):
        assert same(tensors(tmp_path / "sweep" / f"alpha-{alpha:g}"), mean([before, after], [alpha, 1 - alpha]))
    average(*common, f"out={tmp_path / 'blocks'}", "blocks=[0]", "alphas=[0.4,0.1]", "other=0.9")
    got = tensors(tmp_path / "blocks")
    for key, ratio in (
        ("model.embed_tokens.weight", 0.4),
        ("model.layers.0.input_layernorm.weight", 0.4),
        ("model.layers.1.mlp.up_proj.weight", 0.1),
        ("model.norm.weight", 0.9),
    ):
        assert torch.equal(got[key], mean([before, after], [ratio, 1 - ratio])[key])


def test_localize_finds_the_largest_changes_over_all_tensors(three, tmp_path):
    average(*three[1:], f"base={three[0]}", f"out={tmp_path / 'out'}", "method=localize", "density=0.05")
    base, *tuned = (tensors(path) for path in three)
    keys = list(base)
    masks = [top_k_masks([(t[k].double() - base[k].double()).float() for k in keys], 0.05) for t in tuned]
    got = tensors(tmp_path / "out")
    changed = 0
    for i, key in enumerate(keys):
        want = stitch(base[key].double(), [t[key].double() for t in tuned], [m[i] for m in masks]).float()
        assert torch.equal(got[key], want)
        changed += int((got[key] != base[key]).sum())
    total = sum(t.numel() for t in base.values())
    assert 0.05 * total < changed <= 0.1 * total + 2
    cut = [Inputs(tuple(open_model(path) for path in three), "model", _SMALL)]
    assert Localized.of(cut, 0.05).least == Localized.of([Inputs(cut[0].models, "model", 1 << 28)], 0.05).least


def test_reward_models_average_head_and_all(tmp_path):
    paths = [reward_model(tmp_path / str(i), i) for i in range(3)]
    average(*paths, f"out={tmp_path / 'out'}")
    assert same(tensors(tmp_path / "out"), mean(paths))
    gates = [load_file(path / "head.safetensors")["gate.weight"].double() for path in paths]
    assert torch.equal(load_file(tmp_path / "out" / "head.safetensors")["gate.weight"], (sum(gates) / 3).float())
    told = json.loads((tmp_path / "out" / "reward_model.json").read_text())
    assert told == {"kind": "bradley_terry", "outputs": ["reward"], "tau": 1.0}
    scorer = AutoModelForSequenceClassification.from_pretrained(tmp_path / "out")
    assert torch.equal(scorer.score.weight, mean(paths)["score.weight"])
    with pytest.raises(ValueError, match="differ in outputs"):
        average(paths[0], reward_model(tmp_path / "other", 0, ("harm",)), f"out={tmp_path / 'no'}")
    with pytest.raises(ValueError, match="differ in kind"):
        average(paths[0], reward_model(tmp_path / "cost", 0, kind="cost"), f"out={tmp_path / 'no'}")


def test_a_given_dtype_casts_the_trunk_once_and_spares_the_head(tmp_path):
    paths = [reward_model(tmp_path / str(i), i) for i in range(2)]
    average(*paths, f"out={tmp_path / 'out'}", "dtype=bfloat16")
    got, want = tensors(tmp_path / "out"), mean(paths)
    for key, value in got.items():
        kept = key == "score.weight"
        assert value.dtype == (torch.float32 if kept else torch.bfloat16)
        assert torch.equal(value, want[key].to(value.dtype))
    assert json.loads((tmp_path / "out" / "config.json").read_text())["dtype"] == "bfloat16"


def test_provenance_names_every_input_with_its_digest(three, tmp_path):
    import hashlib

    average(*three[::2], f"out={tmp_path / 'out'}")
    told = json.loads((tmp_path / "out" / "average.json").read_text())
    assert [m["directory"] for m in told["models"]] == [str(p) for p in three[::2]]
    for path, member in zip(three[::2], told["models"], strict=True):
        digest = hashlib.sha256((path / "model.safetensors").read_bytes()).hexdigest()
        assert member["sha256"] == {"model.safetensors": digest}
        assert member["weight"] == 0.5
    card = (tmp_path / "out" / "README.md").read_text()
    assert str(three[0]) in card
    assert "uniform" in card


def test_a_finished_average_is_recognised_and_nothing_else_is_replaced(three, tmp_path):
    words = [*three, f"out={tmp_path / 'out'}"]
    average(*words)
    assert "holds this average already" in average(*words)[-1]
    with pytest.raises(ValueError, match="exists and is not this average"):
        average(*words, "method=weighted", "weights=[0.5,0.25,0.25]")
    rewrite(tmp_path / "out", lambda found: found["model.norm.weight"].zero_())
    with pytest.raises(ValueError, match="is this average but damaged"):
        average(*words)


def test_one_model_is_its_own_average_and_that_is_said(three, tmp_path):
    said = average(three[1], f"out={tmp_path / 'out'}")
    assert same(tensors(tmp_path / "out"), tensors(three[1]))
    assert "note: the average of one model is that model" in said


def test_integers_and_rotary_frequencies_are_copied(three, tmp_path):
    paths = [shutil.copytree(three[i], tmp_path / str(i)) for i in (0, 2)]
    extra = {"model.rotary_emb.inv_freq": torch.rand(4), "model.position_ids": torch.arange(7)}
    for path in paths:
        rewrite(path, lambda found: found.update(extra))
    average(*paths, f"out={tmp_path / 'out'}")
    got = tensors(tmp_path / "out")
    for key, value in extra.items():
        assert torch.equal(got[key], value)
    for key in extra:
        changed = shutil.copytree(paths[1], tmp_path / f"changed-{key}")
        rewrite(changed, lambda found, key=key: found.update({key: found[key] + 1}))
        with pytest.raises(ValueError, match=f"{key} is no weight and differs"):
            average(paths[0], changed, f"out={tmp_path / 'no'}")


def test_a_redundant_copy_of_a_tied_head_is_left_out(three, tmp_path):
    def store(found):
        found["lm_head.weight"] = found["model.embed_tokens.weight"].clone()

    stored = rewrite(shutil.copytree(three[0], tmp_path / "stored"), store)
    average(stored, three[2], f"out={tmp_path / 'out'}")
    assert same(tensors(tmp_path / "out"), mean([three[0], three[2]]))


def test_a_killed_average_leaves_no_output_and_the_next_one_cleans_up(three, tmp_path):
    program = (
        "import os, sys\nimport align.averaging.combine as combine\nfrom align.averaging.command import run\n"
        "combine.uniform_mean = lambda tensors: os.kill(os.getpid(), 9)\nrun(sys.argv[1:], print)"
    )
    words = [*map(str, three), f"out={tmp_path / 'out'}"]
    assert subprocess.run([sys.executable, "-c", program, *words], capture_output=True).returncode == -9
    assert [path.name for path in tmp_path.iterdir()] == [".incomplete-out"]
    average(*words)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_an_average_that_fails_in_the_middle_leaves_nothing(three, tmp_path, monkeypatch):
    before = sorted(tmp_path.iterdir())
    calls = []

    def dies(tensors):
        calls.append(1)
        if len(calls) == 5:
            raise KeyboardInterrupt
        return sum(tensors) / 3

    monkeypatch.setattr(combine, "uniform_mean", dies)
    with pytest.raises(KeyboardInterrupt):
        average(*three, f"out={tmp_path / 'out'}")
    assert len(calls) == 5
    assert sorted(tmp_path.iterdir()) == before
