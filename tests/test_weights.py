"""A model that is not whole, not itself or cannot be saved is refused in one line, before the first step."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from align.cli import main
from align.engine.loading import fill, shard_plan
from align.engine.world import World
from align.models.policy import Discrepancy
from align.models.pretrained import Pretrained, from_hub, tiny
from align.models.weights import WrongWeights
from align.rewards.network import load
from align.trainers.selfcheck import describe
from tests.trainers.test_train import write_pairs

DOWN = "model.layers.0.mlp.down_proj.weight"


def opened(path: Path) -> Pretrained:
    return from_hub(str(path), None, False, False, None, "auto")


@pytest.fixture
def directory(tmp_path) -> Path:
    source = tiny(seed=0, hidden_size=32, num_layers=1)
    source.model().save_pretrained(tmp_path / "model")
    source.tokenizer().save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def changed(directory: Path, change) -> None:
    weights = load_file(directory / "model.safetensors")
    change(weights)
    save_file(weights, directory / "model.safetensors", metadata={"format": "pt"})


def configured(directory: Path, **settings) -> None:
    config = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps(config | settings))


def without_one(directory: Path) -> str:
    changed(directory, lambda w: w.pop(DOWN))
    return f"do not hold {DOWN} of LlamaForCausalLM, which would be random"


def with_more_layers(directory: Path) -> str:
    configured(directory, num_hidden_layers=5)
    return "do not hold model.layers.1.input_layernorm.weight and 35 other weights of LlamaForCausalLM"


def with_an_untied_head(directory: Path) -> str:
    configured(directory, tie_word_embeddings=False)
    return "do not hold lm_head.weight of LlamaForCausalLM"


def with_fewer_layers(directory: Path) -> str:
    configured(directory, num_hidden_layers=0)
    return "its files hold model.layers.0.input_layernorm.weight and 8 other weights, for which LlamaForCausalLM has no"


def of_another_shape(directory: Path) -> str:
    changed(directory, lambda w: w.update({DOWN: torch.zeros(3, 3)}))
    return rf"{DOWN} is \(3, 3\) in its files and \(32, 64\) in LlamaForCausalLM as config.json has it"


def with_nan(directory: Path) -> str:
    changed(directory, lambda w: w[DOWN].__setitem__((0, slice(0, 3)), torch.nan))
    return f"3 numbers of {DOWN} are nan or inf"


def with_both_infinities(directory: Path) -> str:
    changed(directory, lambda w: w[DOWN].__setitem__((0, slice(0, 2)), torch.tensor([torch.inf, -torch.inf])))
    return f"2 numbers of {DOWN} are nan or inf"


FAULTS = [
    without_one,
    with_more_layers,
    with_an_untied_head,
    with_fewer_layers,
    of_another_shape,
    with_nan,
    with_both_infinities,
]


@pytest.mark.parametrize("fault", FAULTS, ids=lambda f: f.__name__)
def test_files_that_are_not_the_model_are_refused(directory, fault):
    said = fault(directory)
    with pytest.raises(WrongWeights, match=said) as raised:
        opened(directory).model()
    assert str(raised.value).startswith(f"{directory}: ")
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("fault", FAULTS, ids=lambda f: f.__name__)
def test_they_are_refused_in_shards_too(directory, fault):
    """Stage 3 reads tensor by tensor: what it cannot place it gives to the loader of whole models."""
    said = fault(directory)
    source = opened(directory)
    plan, _ = shard_plan(source, torch.float32)
    with pytest.raises(WrongWeights, match=said):
        source.model() if plan is None else fill(plan, lambda _shard: None, World())


def test_numbers_whose_sum_runs_over_are_finite(directory):
    changed(directory, lambda w: w[DOWN].fill_(3e38))
    assert opened(directory).model() is not None


def run_words(tmp_path: Path, model: Path, *more: str) -> list[str]:
    pairs = write_pairs(tmp_path / "pairs.jsonl", 12, 0)
    return [
        "train", "recipe=dpo", f"model={model}", f"data.train={pairs}", f"run.dir={tmp_path / 'run'}",
        f"reference.cache_dir={tmp_path / 'cache'}", "trainer.max_steps=1", "trainer.batch_size=4",
        "trainer.num_samples=0", "log.tensorboard=false", *more,
    ]  # fmt: skip


def one_line(capsys) -> str:
    found = [line for line in capsys.readouterr().err.splitlines() if line.startswith("align: ")]
    assert len(found) == 1, found
    return found[0]


def assert_no_step(tmp_path: Path) -> None:
    assert not (tmp_path / "run" / "metrics.jsonl").exists() or not (tmp_path / "run" / "metrics.jsonl").read_text()


def test_a_run_is_refused_before_its_first_step(directory, tmp_path, capsys):
    without_one(directory)
    assert main(run_words(tmp_path, directory)) == 2
    assert f"its files do not hold {DOWN} of LlamaForCausalLM" in one_line(capsys)
    assert_no_step(tmp_path)


def test_a_reference_too(directory, tmp_path, capsys):
    with_nan(directory)
    (tmp_path / "policy").mkdir()
    source = tiny(seed=1, hidden_size=32, num_layers=1)
    source.model().save_pretrained(tmp_path / "policy")
    source.tokenizer().save_pretrained(tmp_path / "policy")
    assert main(run_words(tmp_path, tmp_path / "policy", f"reference.path={directory}")) == 2
    assert f"{directory}: 3 numbers of {DOWN} are nan or inf" in one_line(capsys)
    assert_no_step(tmp_path)


def test_a_generation_config_that_cannot_be_saved_is_found_first(directory, tmp_path, capsys):
    (directory / "generation_config.json").write_text(json.dumps({"temperature": 0.6, "do_sample": False}))
    assert main(run_words(tmp_path, directory)) == 2
    said = one_line(capsys)
    assert f"{directory}: its generation_config.json cannot be saved with a trained model (`temperature`" in said
    assert "mend that file" in said
    assert_no_step(tmp_path)


def with_a_token_too_many(directory: Path) -> int:
    """A tokenizer whose end of turn was added without resizing the model; returns its id."""
    tokenizer = tiny(seed=0, hidden_size=32, num_layers=1).tokenizer()
    tokenizer.add_tokens(["<|new|>"], special_tokens=True)
    tokenizer.chat_template = tokenizer.chat_template.replace("'<|im_end|>", "'<|new|>")
    tokenizer.eos_token = "<|new|>"
    tokenizer.save_pretrained(directory)
    return tokenizer.convert_tokens_to_ids("<|new|>")


ROUNDS = ("recipe=online_dpo", "reward=everyday_gold", "trainer.rounds=1", "trainer.prompts_per_round=4")


@pytest.mark.parametrize(
    "more", [(), ("recipe=remax", "reward=everyday_gold"), ROUNDS], ids=["pairs", "prompts", "rounds"]
)
def test_tokens_beyond_the_embedding_are_named(directory, tmp_path, capsys, more):
    token = with_a_token_too_many(directory)
    words = [w for w in run_words(tmp_path, directory, *more) if not (more and w == "recipe=dpo")]
    assert main(words) == 2
    assert f"its tokenizer writes '<|new|>' as token {token}, and its embedding has rows 0 to {token - 1}" in one_line(
        capsys
    )
    assert_no_step(tmp_path)


def test_they_are_named_where_completions_are_only_written(directory, tmp_path, capsys):
    token = with_a_token_too_many(directory)
    pairs = write_pairs(tmp_path / "pairs.jsonl", 2, 0)
    assert main(["generate", f"model={directory}", f"data.train={pairs}", f"out={tmp_path / 'out.jsonl'}"]) == 2
    assert f"its tokenizer writes '<|new|>' as token {token}" in one_line(capsys)


def test_a_reward_model_is_held_to_the_same(tmp_path):
    from transformers import LlamaConfig, LlamaForSequenceClassification

    tokenizer = tiny(seed=0, hidden_size=32, num_layers=1).tokenizer()
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=4,
        num_labels=1, pad_token_id=0,
    )  # fmt: skip
    path = tmp_path / "reward"
    LlamaForSequenceClassification(config).save_pretrained(path)
    tokenizer.save_pretrained(path)
    changed(path, lambda w: w.update({"lm_head.weight": torch.zeros(2, 2)}))  # left over: scoring does not read it
    assert load(str(path)) is not None
    changed(path, lambda w: w.update({"model.layers.1.self_attn.q_proj.weight": torch.zeros(32, 32)}))
    with pytest.raises(WrongWeights, match=r"its files hold model.layers.1.self_attn.q_proj.weight, for which Llama"):
        load(str(path))
    changed(path, lambda w: (w.pop("model.layers.1.self_attn.q_proj.weight"), w["score.weight"].fill_(torch.nan)))
    with pytest.raises(WrongWeights, match=r"32 numbers of score.weight are nan or inf"):
        load(str(path))
    changed(path, lambda w: w["score.weight"].fill_(0.5))
    token = with_a_token_too_many(path)
    with pytest.raises(ValueError, match=rf"path={path}: its tokenizer writes '<\|new\|>' as token {token}"):
        load(str(path))


def test_an_adapter_of_another_base_is_refused(directory, tmp_path):
    from align.models.policy import lora, with_adapter

    def adapted(layers: int):
        base = tiny(seed=0, hidden_size=32, num_layers=layers).model()
        return lora(base, rank=2, alpha=4, dropout=0.0, targets="all-linear", seed=0)

    adapted(2).save_pretrained(tmp_path / "adapter")
    with pytest.raises(ValueError, match=r"its adapter does not fit the model \(.*layers.1"):
        with_adapter(opened(directory).model(), str(tmp_path / "adapter"))
    fitting = with_adapter(tiny(seed=0, hidden_size=32, num_layers=2).model(), str(tmp_path / "adapter"))
    assert fitting.active_adapter == "default"
    file = tmp_path / "adapter" / "adapter_model.safetensors"
    weights = load_file(file)
    save_file({k: torch.full_like(w, torch.nan) if "lora_B" in k else w for k, w in weights.items()}, file)
    with pytest.raises(WrongWeights, match=r"adapter: 64 numbers of .*lora_B.default.weight are nan or inf"):
        with_adapter(tiny(seed=0, hidden_size=32, num_layers=2).model(), str(tmp_path / "adapter"))


SCALED = """
from transformers import LlamaConfig, LlamaForCausalLM


class ScaledConfig(LlamaConfig):
    model_type = "scaled"


class ScaledForCausalLM(LlamaForCausalLM):
    config_class = ScaledConfig

    def forward(self, *args, **kwargs):
        out = super().forward(*args, **kwargs)
        out.logits = out.logits * 30
        return out
"""


@pytest.mark.parametrize("more", [(), ("recipe=remax", "reward=everyday_gold")], ids=["pairs", "prompts"])
def test_a_model_whose_logits_are_not_understood_is_not_trained(directory, tmp_path, capsys, more):
    (directory / "scaled.py").write_text(SCALED)
    auto = {"AutoConfig": "scaled.ScaledConfig", "AutoModelForCausalLM": "scaled.ScaledForCausalLM"}
    configured(directory, model_type="scaled", auto_map=auto)
    words = [w for w in run_words(tmp_path, directory, *more) if not (more and w == "recipe=dpo")]
    assert main([*words, "model.trust_remote_code=true"]) == 1
    said = " ".join("".join(capsys.readouterr()).split())
    assert "stopped: self-check: log-probs in layout shared differ by" in said
    assert "ScaledForCausalLM's own forward; its head or attention is not known to align, report the model" in said
    assert_no_step(tmp_path)


def test_of_a_large_difference_is_said_what_rounding_leaves():
    assert describe(Discrepancy(2e-6, 0.0)) == "log-probs are the model's own to 2.0e-06 nats"
    told = "log-probs are the model's own to 1.7e-01 nats, 3.0e-02 beyond the rounding of its own logits"
    assert describe(Discrepancy(0.17, 0.03)) == told
