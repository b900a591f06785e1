"""A base in 4 bits under LoRA: through `align train`, alone and with two processes; what it cannot do is refused."""

from __future__ import annotations

import json

import pytest
from transformers import LlamaConfig, LlamaForCausalLM

from align.cli import main
from align.models.pretrained import byte_tokenizer
from tests.killer import settings, shared
from tests.trainers.online_runs import words_of
from tests.trainers.test_processes import assert_same_run, done

SHORT = (
    "model.hidden_size=", "model.num_layers=", "model=hub", "model.four_bit=true", "lora.dropout=0", "lora.rank=4",
    "trainer.max_steps=3", "trainer.eval_every=0", "optimizer.lr=1e-2", "trainer.micro_batch_tokens=400",
)  # fmt: skip


@pytest.fixture
def model(tmp_path) -> str:
    tokenizer = byte_tokenizer()
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, eos_token_id=tokenizer.eos_token_id,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    return f"model.path={tmp_path / 'model'}"


def test_trains_alone_and_in_two_processes(tmp_path, model):
    pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed: align-rlhf[four_bit]")
    words = settings(tmp_path, *SHORT, model, "trainer.num_samples=2", "trainer.sample_tokens=4")
    done(shared().run([*words, f"run.dir={tmp_path / 'one'}"]))
    rows = [json.loads(line) for line in (tmp_path / "one" / "metrics.jsonl").read_text().splitlines()]
    assert rows[-1]["loss/total"] < rows[0]["loss/total"]
    assert rows[0]["optimizer/gradient_norm"] > 0
    done(shared().run([*words, f"run.dir={tmp_path / 'two'}", "engine=zero2"], processes=2))
    assert_same_run(tmp_path / "two", tmp_path / "one")


def test_vllm_would_draw_from_other_weights(tmp_path, capsys):
    words = words_of(tmp_path, "recipe=remax", *SHORT[:4], "model.path=nosuch", "lora.rank=4", "rollout=vllm")
    assert main(["train", *words, f"run.dir={tmp_path / 'run'}"]) == 2
    assert "vLLM would draw from weights that are not these; use rollout=hf" in capsys.readouterr().err


def test_without_the_package(tmp_path, model, capsys, monkeypatch):
    monkeypatch.setattr("align.installed.find_spec", lambda _: None)
    assert main(settings(tmp_path, *SHORT, model, f"run.dir={tmp_path / 'run'}")) == 2
    assert 'pip install "align-rlhf[four_bit]"' in capsys.readouterr().err
