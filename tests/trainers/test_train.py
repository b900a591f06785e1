"""`align train` end to end on a tiny model: the names that users and other tools rely on."""

from __future__ import annotations

import json
import random
import shutil

import pytest
import torch

from align.config import compose
from align.trainers.offline import train

WORDS = ["red", "blue", "green", "cat", "dog", "house", "tree", "run", "sun", "moon", "star", "rain", "fish"]


def write_pairs(path, count: int, seed: int, origins: bool = False) -> str:
    """Chosen answers end in "good" and are short, rejected ones end in "bad"."""
    rng = random.Random(seed)
    rows = []
    for i in range(count):
        row = {
            "prompt": [{"role": "user", "content": f"question {seed} {i} " + " ".join(rng.choices(WORDS, k=4))}],
            "chosen": [{"role": "assistant", "content": " ".join(rng.choices(WORDS, k=3)) + " good"}],
            "rejected": [{"role": "assistant", "content": " ".join(rng.choices(WORDS, k=6)) + " bad"}],
        }
        if origins:
            row["origin"] = "on_policy" if i % 2 else "hot"
        rows.append(json.dumps(row) + "\n")
    path.write_text("".join(rows))
    return str(path)


@pytest.fixture
def words(tmp_path):
    """The command of the documentation, on small files."""
    return [
        "recipe=wpo",
        "model=tiny",
        f"data.train={write_pairs(tmp_path / 'train.jsonl', 24, 0, origins=True)}",
        f"data.heldout={write_pairs(tmp_path / 'held.jsonl', 6, 1)}",
        f"run.dir={tmp_path / 'run'}",
        f"reference.cache_dir={tmp_path / 'cache'}",
        "trainer.max_steps=5",
        "trainer.batch_size=8",
        "trainer.micro_batch_tokens=2048",
        "trainer.save_every=3",
        "trainer.num_samples=2",
        "trainer.sample_tokens=8",
        "trainer.precision=float32",
        "log.tensorboard=false",
        "optimizer.lr=1e-3",
        "seed=0",
    ]


def metrics(path) -> list[dict]:
    return [json.loads(line) for line in (path / "run" / "metrics.jsonl").read_text().splitlines()]


def test_a_run_leaves_what_is_documented(words, tmp_path):
    assert train(compose([*words, "merge=true", "data.gold=align.rewards.functions.everyday_gold"]), "test") == 0
    rows = metrics(tmp_path)
    assert [r["step"] for r in rows] == [1, 2, 3, 4, 5]
    assert all({"loss/total", "time/step_s", "tokens/real", "wpo/weight"} <= r.keys() for r in rows)
    assert {"wpo/weight_on_policy", "wpo/weight_hot"} <= rows[0].keys()
    # policy = reference at the first step: the loss is the mean weight times ln 2
    assert rows[0]["loss/total"] == pytest.approx(rows[0]["wpo/weight"] * 0.6931472, abs=1e-5)
    assert "accuracy/heldout" in rows[-1]

    audit = json.loads((tmp_path / "run" / "audit.json").read_text())
    assert (audit["rows_in"], audit["rows_kept"], audit["dropped"]) == (30, 30, {})
    assert (audit["train"]["rows_in"], audit["heldout"]["rows_in"]) == (24, 6)

    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary["gold_change"]["low"] <= summary["gold_change"]["mean"] <= summary["gold_change"]["high"]
    samples = [json.loads(line) for line in (tmp_path / "run" / "samples.jsonl").read_text().splitlines()]
    assert [s["phase"] for s in samples] == ["before", "before", "after", "after"]

    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "final")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "run" / "final")
    ids = tokenizer.apply_chat_template(
        [{"role": "user", "content": "hi"}], add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    assert torch.isfinite(model(**ids).logits).all()
    card = (tmp_path / "run" / "final" / "README.md").read_text()
    assert "preference accuracy" in card
    assert "alignment: sampled" in card


def test_adapter_in_peft_format_gives_the_merged_models_logits(words, tmp_path):
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    from align.models.pretrained import tiny

    assert train(compose(words), "test") == 0
    base = tiny(seed=0, hidden_size=64, num_layers=2).model()
    ids = torch.arange(5, 45)[None]
    untrained = base(ids).logits.detach()
    adapter = PeftModel.from_pretrained(base, tmp_path / "run" / "final")(ids).logits.detach()
    assert (adapter - untrained).abs().max() > 1e-3  # something was learnt
    assert train(compose([*words, "merge=true"]), "test") == 0  # complete: only final/ is written again
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "final")(ids).logits.detach()
    torch.testing.assert_close(merged, adapter, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("mode", ["adapter", "model"])
def test_every_reference_gives_the_same_run(words, tmp_path, mode):
    assert train(compose(words), "test") == 0
    cached = metrics(tmp_path)
    other = [w for w in words if not w.startswith("run.dir")] + [f"run.dir={tmp_path / mode}", f"reference.mode={mode}"]
    assert train(compose(other), "test") == 0
    rows = [json.loads(line) for line in (tmp_path / mode / "metrics.jsonl").read_text().splitlines()]
    for a, b in zip(cached, rows, strict=True):
        assert a["loss/total"] == pytest.approx(b["loss/total"], abs=2e-5)
        assert a["reward/margin"] == pytest.approx(b["reward/margin"], abs=2e-4)


def test_layouts_and_micro_batches_do_not_change_the_run(words, tmp_path):
    found = []
    for n, extra in enumerate(
        [[], ["trainer.layout=packed", "trainer.micro_batch_tokens=700"], ["trainer.layout=padded"]]
    ):
        here = [w for w in words if not w.startswith(("run.dir", "trainer.micro"))] + [f"run.dir={tmp_path / str(n)}"]
        assert train(compose([*here, *extra]), "test") == 0
        found.append([json.loads(x) for x in (tmp_path / str(n) / "metrics.jsonl").read_text().splitlines()])
    assert found[1][0]["tokens/micro_batches"] > found[0][0]["tokens/micro_batches"]
    assert found[0][0]["tokens/processed"] < found[0][0]["tokens/real"] == found[1][0]["tokens/processed"]
    for a, b, c in zip(*found, strict=True):
        assert a["loss/total"] == pytest.approx(b["loss/total"], abs=2e-5)
        assert a["loss/total"] == pytest.approx(c["loss/total"], abs=2e-5)


def test_training_all_weights_without_lora(words, tmp_path):
    assert train(compose([*words, "lora.rank=0", "objective/loss=hinge"]), "test") == 0
    from transformers import AutoModelForCausalLM

    assert AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "final").dtype == torch.float32
    # no adapter to switch off: the KL is to the starting weights, loaded again
    assert json.loads((tmp_path / "run" / "summary.json").read_text())["kl"] != 0
    assert metrics(tmp_path)[-1]["accuracy/heldout"] >= 0.5


def test_a_reference_of_other_weights_is_stopped_before_the_first_step(words, tmp_path):
    # another model's cache under this model's address: what a hand-copied cache directory does
    assert train(compose(words), "test") == 0
    (own,) = (tmp_path / "cache").iterdir()
    here = [w for w in words if not w.startswith("run.dir")]
    assert train(compose([*here, f"run.dir={tmp_path / 'second'}", "model.seed=1"]), "test") == 0
    (other,) = set((tmp_path / "cache").iterdir()) - {own}
    shutil.rmtree(own)
    other.rename(own)
    assert train(compose([*here, f"run.dir={tmp_path / 'third'}"]), "test") == 1
    assert not (tmp_path / "third" / "metrics.jsonl").exists()


def test_base_weights_that_changed_under_an_adapter_are_refused(words, tmp_path):
    # a checkpoint holds the adapter only: resuming it on another base would be another model
    from align.models.pretrained import tiny

    source = tiny(seed=0, hidden_size=64, num_layers=2)
    model = source.model()
    model.save_pretrained(tmp_path / "base")
    source.tokenizer().save_pretrained(tmp_path / "base")
    here = [w for w in words if not w.startswith("model=")] + ["model=hub", f"model.path={tmp_path / 'base'}"]
    assert train(compose(here), "test") == 0
    with torch.no_grad():
        model.model.norm.weight[0] += 1
    model.save_pretrained(tmp_path / "base")
    longer = [w for w in here if not w.startswith("trainer.max_steps")] + ["trainer.max_steps=6"]
    with pytest.raises(ValueError, match="has other weights than when"):
        train(compose(longer), "test")
