"""Reward models: tiny random networks of real classes against transformers' own forward."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import save_file
from transformers import LlamaConfig, LlamaForCausalLM, LlamaForSequenceClassification

from align.models.policy import Policy, lora
from align.models.pretrained import byte_tokenizer
from align.packing import pack
from align.rewards.base import Conversation
from align.rewards.build import RewardHost, components
from align.types import Example, Prompt, Row

TOKENIZER = byte_tokenizer()


def config(**changes) -> LlamaConfig:
    common = dict(
        vocab_size=len(TOKENIZER), hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=512, initializer_range=0.3,
        pad_token_id=TOKENIZER.pad_token_id, eos_token_id=TOKENIZER.eos_token_id,
    )  # fmt: skip
    return LlamaConfig(**(common | changes))


def saved(directory, **changes) -> str:
    torch.manual_seed(0)
    LlamaForSequenceClassification(config(**({"num_labels": 1} | changes))).save_pretrained(directory)
    TOKENIZER.save_pretrained(directory)
    return str(directory)


ROWS = [
    Conversation("Why?", "Because.", True),
    Conversation(
        "b",
        "A rather longer answer to it",
        True,
        ({"role": "system", "content": "s"}, {"role": "user", "content": "b"}),
    ),
    Conversation("Why?", "", False),
    Conversation("c", "<|pad|><|pad|>", True),  # the padding's own token inside a text is text
]


def chats() -> list[list[int]]:
    out = []
    for row in ROWS:
        chat = [*(row.messages or ({"role": "user", "content": row.prompt},))]
        chat.append({"role": "assistant", "content": row.completion})
        text = "".join(f"<|im_start|>{m['role']}\n{m['content']}<|im_end|>\n" for m in chat)
        out.append(TOKENIZER(text, add_special_tokens=False)["input_ids"])
    return out


def node(path: str, **changes) -> dict:
    common = {"_target_": "align.rewards.model.RewardModel", "path": path, "revision": None, "dtype": "float32",
              "max_tokens": 256}  # fmt: skip
    return {"r": common | changes}


@pytest.mark.parametrize("budget", [1, 64, 100_000])
def test_scores_are_those_of_transformers_one_at_a_time(tmp_path, budget):
    path = saved(tmp_path)
    model = LlamaForSequenceClassification.from_pretrained(path).eval()
    with torch.no_grad():
        wanted = [float(model(torch.tensor([ids])).logits[0, 0]) for ids in chats()]
    rewards = components(node(path), RewardHost(micro_batch_tokens=budget))
    scores = rewards.score(ROWS)[:, 0]
    assert np.ptp(wanted) > 0.01
    np.testing.assert_allclose(scores, wanted, atol=1e-5)  # rounding of float32
    assert rewards.counts == {}


def test_the_last_token_is_read_although_its_id_is_the_padding_s(tmp_path):
    # ChatML ends with a line end; here the line end's id is also the id of the padding
    newline = TOKENIZER("\n")["input_ids"][0]
    path = saved(tmp_path, pad_token_id=newline)
    model = LlamaForSequenceClassification.from_pretrained(path).eval()
    wanted = []
    with torch.no_grad():
        for ids in chats():
            hidden = model.model(torch.tensor([ids])).last_hidden_state
            wanted.append(float(model.score(hidden)[0, -1, 0]))
        stock = float(model(torch.tensor([chats()[0]])).logits[0, 0])
    scores = components(node(path), RewardHost()).score(ROWS)[:, 0]
    np.testing.assert_allclose(scores, wanted, atol=1e-5)
    assert abs(stock - wanted[0]) > 1e-3  # transformers itself reads the token before


def test_too_long_and_not_finite_have_no_score(tmp_path):
    path = saved(tmp_path)
    lines: list[str] = []
    lengths = [len(ids) for ids in chats()]
    rewards = components(node(path, max_tokens=max(lengths) - 1), RewardHost(say=lines.append))
    assert np.isnan(rewards.score(ROWS)[:, 0]).tolist() == [n == max(lengths) for n in lengths]
    assert rewards.counts == {"r/too_long": 1}
    rewards._parts["r"].network.network.head.score.weight.fill_(torch.inf)
    assert np.isnan(rewards.score(ROWS)).all()
    assert rewards.counts == {"r/too_long": 2, "r/not_finite": 3}
    assert len(lines) == 2


def test_models_that_are_none_are_refused(tmp_path):
    two = saved(tmp_path / "two", num_labels=2)
    with pytest.raises(ValueError, match=r"reward\.r: path=.*: has 2 outputs"):
        components(node(two), RewardHost())
    torch.manual_seed(0)
    LlamaForCausalLM(config(num_labels=1)).save_pretrained(tmp_path / "lm")
    TOKENIZER.save_pretrained(tmp_path / "lm")
    with pytest.raises(ValueError, match=r"do not hold score\.weight of LlamaFor"):
        components(node(str(tmp_path / "lm")), RewardHost())
    with pytest.raises(ValueError, match=r"^reward\.r: "):
        components(node(str(tmp_path / "nothing")), RewardHost())
    with pytest.raises(ValueError, match=r"reward\.r\.seconds has no effect"):
        components(node(two, seconds=3.0), RewardHost())


def lm() -> LlamaForCausalLM:
    torch.manual_seed(1)
    return LlamaForCausalLM(config()).eval()


@pytest.fixture
def adapter(tmp_path):
    """A directory with an adapter of non-zero weights and a head; and the hidden states' model that has it."""
    torch.manual_seed(2)
    model = get_peft_model(lm(), LoraConfig(r=3, lora_alpha=6, target_modules="all-linear", task_type="CAUSAL_LM"))
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "lora_" in name:
                p.normal_(std=0.2)
    model.save_pretrained(tmp_path)
    weight = torch.randn(1, 32)
    save_file({"weight": weight}, tmp_path / "score.safetensors")
    return tmp_path, model.eval(), weight


@pytest.fixture
def policy() -> Policy:
    model = lora(lm(), rank=4, alpha=8.0, dropout=0.5, targets="all-linear", seed=0)
    torch.manual_seed(3)
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p.normal_(std=0.1)
    return Policy(model, "packed").train()


def logps(policy: Policy) -> torch.Tensor:
    ids = np.array(chats()[0], dtype=np.int32)
    batch = pack([Example((Row(ids, np.arange(len(ids)) > 3),), "x:1", Prompt((), ""))], "packed")
    training = policy.training
    policy.eval()
    with torch.no_grad():
        out = policy(batch).token_logps
    policy.train(training)
    return out


def test_an_adapter_on_the_policy_scores_as_the_model_it_was_trained_in(adapter, policy):
    directory, model, weight = adapter
    with torch.no_grad():
        wanted = []
        for ids in chats():
            hidden = model.get_base_model().model(torch.tensor([ids])).last_hidden_state
            wanted.append(float(hidden[0, -1] @ weight[0]))
    before = logps(policy)
    trained = {name for name, p in policy.named_parameters() if p.requires_grad}
    names = set(policy.state_dict())
    settings = {"_target_": "align.rewards.model.AdapterReward", "path": str(directory), "max_tokens": 256}
    host = RewardHost(policy=policy, tokenizer=TOKENIZER, micro_batch_tokens=64)
    rewards = components({"r": settings, "second": settings}, host)
    for _ in range(2):
        scores = rewards.score(ROWS)
        np.testing.assert_allclose(scores, np.array([wanted, wanted]).T, atol=1e-4)
        assert torch.equal(logps(policy), before)
        assert {name for name, p in policy.named_parameters() if p.requires_grad} == trained
        assert policy.model.active_adapter == "default"
        assert policy.training
        assert policy.model.training
    assert not torch.allclose(before, reference(policy), atol=1e-3)  # the policy's own adapter does something
    rewards.close()
    assert set(policy.state_dict()) == names
    assert torch.equal(logps(policy), before)
    assert {name for name, p in policy.named_parameters() if p.requires_grad} == trained


def reference(policy: Policy) -> torch.Tensor:
    with policy.as_reference():
        return logps(policy)


def test_the_adapter_is_not_trained_and_the_reference_is_the_base(adapter, policy):
    directory, _, _ = adapter
    base = reference(policy)
    settings = {"_target_": "align.rewards.model.AdapterReward", "path": str(directory), "max_tokens": 256}
    rewards = components({"r": settings}, RewardHost(policy=policy, tokenizer=TOKENIZER))
    first = rewards.score(ROWS)
    assert torch.equal(reference(policy), base)
    ids = np.array(chats()[0], dtype=np.int32)
    batch = pack([Example((Row(ids, np.arange(len(ids)) > 3),), "x:1", Prompt((), ""))], "packed")
    optimizer = torch.optim.SGD(policy.parameters(), lr=0.01)
    (-policy(batch).token_logps.mean()).backward()
    assert all(p.grad is None for name, p in policy.named_parameters() if ".reward." in name)
    before = logps(policy)
    optimizer.step()
    assert not torch.equal(logps(policy), before)
    np.testing.assert_array_equal(rewards.score(ROWS), first)


def test_an_adapter_needs_a_policy_with_lora_and_all_its_files(adapter, policy):
    directory, _, _ = adapter
    settings = {"_target_": "align.rewards.model.AdapterReward", "path": str(directory), "max_tokens": 256}
    with pytest.raises(ValueError, match=r"reward\.r: .*set lora\.rank"):
        components({"r": settings}, RewardHost(policy=Policy(lm(), "padded"), tokenizer=TOKENIZER))
    save_file({"weight": torch.randn(2, 32)}, directory / "score.safetensors")
    host = RewardHost(policy=policy, tokenizer=TOKENIZER)
    with pytest.raises(ValueError, match=r"must hold weight \[1, 32\], it has \(2, 32\)"):
        components({"r": settings}, host)
    (directory / "score.safetensors").unlink()
    with pytest.raises(ValueError, match=r"there is no score\.safetensors"):
        components({"r": settings}, host)
