"""Input that cannot be averaged: one line that names the cure, and nothing written."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys

import pytest
import torch

from align.averaging.arguments import METHODS, parse
from tests.averaging.build import adapter, average, model, rewrite


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    """Two models that agree."""
    root = tmp_path_factory.mktemp("pair")
    return model(root / "a", 0), model(root / "b", 1, shard="20KB")


def refused(tmp_path, *words) -> str:
    """The message, one line; nothing new below tmp_path, with and without --check."""
    before = sorted(p.name for p in tmp_path.iterdir())
    said = []
    for more in ([], ["--check"]):
        with pytest.raises(ValueError, match=".") as caught:
            average(*words, f"out={tmp_path / 'out'}", *more)
        said.append(str(caught.value))
    assert sorted(p.name for p in tmp_path.iterdir()) == before
    assert said[0] == said[1]
    assert "\n" not in said[0]
    return said[0]


def test_models_of_another_shape(pair, tmp_path):
    other = model(tmp_path / "wide", 0, intermediate_size=48)
    assert "intermediate_size: 64, 48" in refused(tmp_path, pair[0], other)


def test_models_of_another_vocabulary(pair, tmp_path):
    other = model(tmp_path / "words", 0, vocab_size=97)
    assert "differ in vocab_size (96, 97): models of different vocabularies" in refused(tmp_path, pair[0], other)


def test_models_of_another_architecture(pair, tmp_path):
    other = shutil.copytree(pair[0], tmp_path / "other")
    config = json.loads((other / "config.json").read_text())
    (other / "config.json").write_text(json.dumps(config | {"architectures": ["MistralForCausalLM"]}))
    assert "differ in architectures" in refused(tmp_path, pair[0], other)


def test_shapes_and_keys_that_only_the_tensors_tell(pair, tmp_path):
    def cut(found):
        found["model.norm.weight"] = found["model.norm.weight"][:-1].clone()

    other = rewrite(shutil.copytree(pair[0], tmp_path / "cut"), cut)
    assert "model.norm.weight" in (said := refused(tmp_path, pair[0], other))
    assert "differs in shape ([32], [31])" in said
    other = rewrite(shutil.copytree(pair[0], tmp_path / "less"), lambda found: found.pop("model.norm.weight"))
    assert f"only {pair[0]} of" in (said := refused(tmp_path, other, pair[0]))
    assert "has model.norm.weight;" in said


def test_one_tied_and_one_untied_model(pair, tmp_path):
    other = model(tmp_path / "untied", 0, tie_word_embeddings=False)
    assert "differ in tie_word_embeddings (True, False)" in refused(tmp_path, pair[0], other)
    told = json.loads((other / "config.json").read_text())
    (other / "config.json").write_text(json.dumps(told | {"tie_word_embeddings": True}))
    assert "stores lm_head.weight of its own" in refused(tmp_path, pair[0], other)


def test_different_dtypes_need_a_word(pair, tmp_path):
    other = model(tmp_path / "half", 1, dtype=torch.bfloat16)
    assert "(F32, BF16); add dtype=float32" in refused(tmp_path, pair[0], other)
    average(pair[0], other, f"out={tmp_path / 'out'}", "dtype=float32")


def test_missing_truncated_and_foreign_shards(pair, tmp_path):
    def broken(name, change):
        copy = shutil.copytree(pair[1], tmp_path / name)
        change(sorted(copy.glob("model-*.safetensors"))[1])
        return refused(tmp_path, pair[0], copy)

    assert "is missing, and model.safetensors.index.json names it" in broken("gone", lambda path: path.unlink())
    assert "is truncated" in broken("short", lambda path: path.write_bytes(path.read_bytes()[:-3]))
    assert "is truncated or no safetensors" in broken("empty", lambda path: path.write_bytes(b""))
    assert "no safetensors header" in broken("noise", lambda path: path.write_bytes(b"\x08" + bytes(63)))
    first = "model-00001-of-*.safetensors"
    said = broken("foreign", lambda path: shutil.copyfile(next(path.parent.glob(first)), path))
    assert "has no tensor" in said
    copy = shutil.copytree(pair[1], tmp_path / "unindexed")
    (copy / "model.safetensors.index.json").unlink()
    assert "has shards but no model.safetensors.index.json" in refused(tmp_path, pair[0], copy)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_no_numbers(pair, tmp_path, value):
    def spoil(found):
        found["model.layers.1.mlp.up_proj.weight"][3, 5] = value

    other = rewrite(shutil.copytree(pair[0], tmp_path / "bad"), spoil)
    before = sorted(tmp_path.iterdir())
    with pytest.raises(ValueError, match=f"{other}: model.layers.1.mlp.up_proj.weight holds NaN or infinity"):
        average(*pair, other, f"out={tmp_path / 'out'}")
    assert sorted(tmp_path.iterdir()) == before


def test_numbers_too_large_for_the_dtype(pair, tmp_path):
    other = rewrite(shutil.copytree(pair[0], tmp_path / "big"), lambda found: found["model.norm.weight"].fill_(1e6))
    with pytest.raises(ValueError, match="exceeds the range of float16; use dtype=bfloat16"):
        average(other, f"out={tmp_path / 'out'}", "dtype=float16")
    assert not (tmp_path / "out").exists()


def test_quantised_models(pair, tmp_path):
    def pack(found):
        found["model.norm.weight"] = found["model.norm.weight"].to(torch.float8_e4m3fn)

    other = rewrite(shutil.copytree(pair[0], tmp_path / "fp8"), pack)
    assert "model.norm.weight is quantised or of an unknown dtype (F8_E4M3)" in refused(tmp_path, pair[0], other)

    def whole(found):
        found["model.norm.weight"] = found["model.norm.weight"].to(torch.int8)

    other = rewrite(shutil.copytree(pair[0], tmp_path / "int8"), whole)
    assert "model.norm.weight is quantised (I8)" in refused(tmp_path, other, pair[0])
    other = shutil.copytree(pair[0], tmp_path / "told")
    config = json.loads((other / "config.json").read_text())
    (other / "config.json").write_text(json.dumps(config | {"quantization_config": {"quant_method": "gptq"}}))
    assert "quantization_config in config.json" in refused(tmp_path, pair[0], other)


def test_tokenizers(pair, tmp_path):
    def changed(name, change, file="tokenizer.json"):
        other = shutil.copytree(pair[0], tmp_path / name)
        told = json.loads((other / file).read_text())
        change(told)
        (other / file).write_text(json.dumps(told))
        return other

    other = changed("tokens", lambda told: told["added_tokens"][0].update(content="<other>"))
    assert "differ (tokenizer.json, added_tokens)" in refused(tmp_path, pair[0], other)
    other = changed("special", lambda told: told.update(eos_token="<|pad|>"), "tokenizer_config.json")
    assert "differ (eos_token: <|im_end|>, <|pad|>)" in refused(tmp_path, pair[0], other)
    other = model(tmp_path / "without", 1, tokenizer=False)
    assert f"{pair[0]} has tokenizer.json and {other} has not" in refused(tmp_path, pair[0], other)
    other = changed("cut", lambda told: told.update(truncation={"max_length": 8}))  # how it was last used
    average(pair[0], other, f"out={tmp_path / 'out'}", "--check")


def test_dropout_may_differ_between_runs(pair, tmp_path):
    other = shutil.copytree(pair[0], tmp_path / "dropped")
    config = json.loads((other / "config.json").read_text())
    (other / "config.json").write_text(json.dumps(config | {"attention_dropout": 0.1, "transformers_version": "4.0"}))
    assert average(pair[0], other, "--check")[-1].startswith("ok")


def test_directories_that_hold_no_model(pair, tmp_path):
    assert "is not a directory; give a local model directory" in refused(tmp_path, pair[0], "org/name")
    run = tmp_path / "run"
    shutil.copytree(pair[0], run / "final")
    assert f"{run} has no config.json; give {run / 'final'}" in refused(tmp_path, pair[0], run)
    (tmp_path / "pickled").mkdir()
    shutil.copyfile(pair[0] / "config.json", tmp_path / "pickled" / "config.json")
    (tmp_path / "pickled" / "pytorch_model.bin").touch()
    assert "pickled weights are not read" in refused(tmp_path, pair[0], tmp_path / "pickled")
    assert "is an adapter and" in refused(tmp_path, pair[0], adapter(tmp_path / "lora", pair[0], 0))


def test_a_check_tells_what_it_found_and_writes_nothing(pair, tmp_path):
    said = average(*pair, f"out={tmp_path / 'out'}", "--check")
    assert said[0] == "2 x LlamaForCausalLM: 20 tensors, 0.0 M numbers (float32), vocabulary 96"
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "words, message",
    [
        ("a b out=o metod=uniform", "metod= is not a setting of align average; did you mean method=?"),
        ("a b out=o method=wieghted weights=[1,0]", "did you mean method=weighted?"),
        ("a b out=o method=linear", "multiplies sums of factors"),
        ("a b", "give out=DIR"),
        ("out=o", "name the model directories"),
        ("a b out=o --dry", "--dry is not an option"),
        ("a b out=o out=p", "out= is given twice"),
        ("a b out=o method=weighted", "needs weights=: one number a model"),
        ("a b out=o method=weighted weights=[0.5,0.4]", "sum to 0.9, not 1"),
        ("a b out=o method=weighted weights=[1]", "1 numbers for 2 models"),
        ("a b out=o method=weighted weights=0.5", "must be a list, for example weights=[1,2]"),
        ("a b out=o method=weighted weights=[nan,1]", "must be a finite number"),
        ("a b out=o method=weighted weights=[1.5,-0.5]", "add extrapolate=true"),
        ("a out=o method=weighted weights=[1]", "needs at least two models"),
        ("a b out=o weights=[0.5,0.5]", "has no effect with method=uniform; remove it (it belongs to method=weighted)"),
        ("a b out=o method=loss", "needs penalty="),
        ("a b out=o method=loss penalty=1 values=[0,1]", "must be above 0"),
        ("a b out=o method=loss penalty=-1 values=[2,1]", "must be 0 (uniform) or more"),
        ("a b out=o method=stock", "needs base="),
        ("a out=o method=stock base=c", "needs at least two models"),
        ("a b out=o method=interpolate base=c alpha=0.5", "takes one model and base="),
        ("a out=o method=interpolate base=c", "needs one of alpha="),
        ("a out=o method=interpolate base=c alpha=1.5", "is outside [0, 1]"),
        ("a out=o method=interpolate base=c sweep=[0,0]", "names a number twice"),
        ("a out=o method=interpolate base=c blocks=[10] alphas=[1]", "needs alphas= with 2 numbers"),
        ("a out=o method=interpolate base=c blocks=[10] alphas=[1,0]", "needs other="),
        ("a out=o method=interpolate base=c blocks=[9,3] alphas=[1,0,0] other=0", "each larger than the one before"),
        ("a out=o method=interpolate base=c alpha=0.5 alphas=[1,0]", "belong to blocks="),
        ("a b out=o method=localize base=c density=0", "must be above 0 and at most 1"),
        ("a b out=o dtype=float8", "must be one of float32, bfloat16, float16, float64"),
        ("a b out=o shard_gib=0", "shard_gib must be above 0"),
        ("a b out=o max_memory_mib=x", "must be a whole number"),
        ("a b out=o method=stock base=c clamp=yes", "must be true or false"),
    ],
)
def test_words_that_cannot_be(words, message):
    with pytest.raises(ValueError, match=".") as caught:
        parse(words.split())
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_directory_may_be_named_like_a_setting(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "lr=1e-5").mkdir()
    assert [str(path) for path in parse(["lr=1e-5", "out=o"]).models] == ["lr=1e-5"]


def test_words_are_read_without_torch():
    program = (
        "import sys\nfrom align.averaging.command import run\n"
        "try:\n    run(['a', 'metod=x'], print)\nexcept ValueError:\n    pass\n"
        "assert not {'torch', 'transformers'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", program], check=True)


def test_averaging_does_not_import_trainers_or_networks():
    program = (
        "import sys\nimport align.averaging.engine\n"
        "bad = [m for m in sys.modules if m.startswith(('align.trainers', 'align.models', 'transformers', 'peft'))]\n"
        "assert not bad, bad"
    )
    subprocess.run([sys.executable, "-c", program], check=True)


def test_every_method_is_in_the_usage_and_the_document():
    from pathlib import Path

    from align.cli import pages, table

    found = table.find(["average"])
    assert found
    usage = pages.page(found[0])
    page = (Path(__file__).parents[2] / "docs" / "averaging.md").read_text()
    for name, (needed, allowed) in METHODS.items():
        assert name in usage
        assert f"`{name}`" in page
        for key in (*needed, *allowed):
            assert f"{key}=" in page
            assert found[0].takes(key)
