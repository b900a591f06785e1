"""Ensembles of tiny random reward models: each member against the model by itself, the sum of them by numpy."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import LlamaForCausalLM, LlamaForSequenceClassification

from align.rewards.build import RewardHost, components
from tests.rewards.test_model import ROWS, TOKENIZER, chats, config, saved

WIDTH = 32


def form(directory, **changes) -> None:
    wanted = {"kind": "bradley_terry", "outputs": ["reward"], "ends": "end_of_turn", "prompts": "chat"} | changes
    (directory / "reward_model.json").write_text(json.dumps(wanted))


def whole(tmp_path, count: int = 3) -> list[str]:
    out = []
    for m in range(count):
        directory = tmp_path / f"whole_{m}"
        saved(directory)
        torch.manual_seed(10 + m)
        LlamaForSequenceClassification(config(num_labels=1)).save_pretrained(directory)
        out.append(str(directory))
    return out


@pytest.fixture
def base(tmp_path) -> str:
    torch.manual_seed(1)
    directory = tmp_path / "base"
    LlamaForCausalLM(config()).save_pretrained(directory)
    TOKENIZER.save_pretrained(directory)
    return str(directory)


def adapters(tmp_path, base: str, count: int = 3, **changes) -> list[str]:
    out = []
    for m in range(count):
        directory = tmp_path / f"adapter_{m}"
        torch.manual_seed(20 + m)
        settings = LoraConfig(r=2 + m, lora_alpha=6, target_modules="all-linear", task_type="CAUSAL_LM")
        model = get_peft_model(LlamaForCausalLM.from_pretrained(base), settings)
        with torch.no_grad():
            for name, p in model.named_parameters():
                if "lora_" in name:
                    p.normal_(std=0.2)
        model.save_pretrained(directory)
        TOKENIZER.save_pretrained(directory)
        save_file({"weight": torch.randn(1, WIDTH)}, directory / "score.safetensors")
        form(directory, mean=[0.5 * m], std=[1.0 + m], **changes)
        out.append(str(directory))
    return out


def heads(tmp_path, count: int = 3) -> list[str]:
    out = []
    for m in range(count):
        directory = tmp_path / f"head_{m}"
        directory.mkdir()
        torch.manual_seed(30 + m)
        save_file({"weight": torch.randn(1, WIDTH)}, directory / "score.safetensors")
        form(directory)
        out.append(str(directory))
    return out


def node(names: list[str], **changes) -> dict:
    common = {
        "_target_": "align.rewards.ensemble.Ensemble", "members": names, "base": None, "dtype": "float32",
        "combine": "uncertainty", "coefficient": 0.5, "ddof": 0, "normalise": False, "max_tokens": 256, "output": None,
    }  # fmt: skip
    return {"r": common | changes}


def single(path: str, rows=ROWS) -> np.ndarray:
    settings = {"_target_": "align.rewards.model.RewardModel", "path": path, "revision": None, "dtype": "float32",
                "max_tokens": 256}  # fmt: skip
    return components({"r": settings}, RewardHost()).score(rows)[:, 0]


def read_at_the_end_of_turn(lm, weight: torch.Tensor) -> list[float]:
    """By transformers' own forward. Ours stop before the line feed that ChatML writes behind the end of turn, and take
    control tokens in a message for text."""
    out = []
    for row in ROWS:
        ids: list[int] = []
        messages = [*(row.messages or ({"role": "user", "content": row.prompt},))]
        for m in [*messages, {"role": "assistant", "content": row.completion}]:
            ids += TOKENIZER(f"<|im_start|>{m['role']}\n")["input_ids"]
            ids += TOKENIZER(m["content"], split_special_tokens=True)["input_ids"]
            ids += TOKENIZER("<|im_end|>\n")["input_ids"]
        with torch.no_grad():
            out.append(float(lm.model(torch.tensor([ids[:-1]])).last_hidden_state[0, -1] @ weight[0]))
    return out


def test_whole_models(tmp_path):
    members = whole(tmp_path)
    alone = np.stack([single(m) for m in members])
    assert alone.std(0).min() > 0.01
    rewards = components(node(members), RewardHost())
    np.testing.assert_allclose(rewards._parts["r"].member_scores(ROWS), alone, rtol=0, atol=1e-6)
    for how, wanted in {
        "mean": alone.mean(0),
        "worst": alone.min(0),
        "median": np.sort(alone, 0)[1],
        "uncertainty": alone.mean(0) - 0.5 * alone.var(0),
    }.items():
        scores = components(node(members, combine=how), RewardHost()).score(ROWS)[:, 0]
        np.testing.assert_allclose(scores, wanted, rtol=0, atol=1e-6)
    rewards.score(ROWS)
    assert rewards._parts["r"].metrics == {"disagreement": pytest.approx(alone.std(0).mean(), abs=1e-6)}
    assert rewards.counts == {}
    rewards.close()


@pytest.mark.parametrize("budget", [1, 100_000])
def test_adapters_on_one_base(tmp_path, base, budget):
    members = adapters(tmp_path, base)
    alone = []
    for m in members:
        lm = PeftModel.from_pretrained(LlamaForCausalLM.from_pretrained(base), m).eval().get_base_model()
        alone.append(read_at_the_end_of_turn(lm, load_file(f"{m}/score.safetensors")["weight"]))
    rewards = components(node(members), RewardHost(micro_batch_tokens=budget))
    part = rewards._parts["r"]
    for _ in range(2):  # the switches leave nothing behind
        np.testing.assert_allclose(part.member_scores(ROWS), alone, rtol=0, atol=1e-4)
    np.testing.assert_allclose(part.member_scores(ROWS), [single(m) for m in members], rtol=0, atol=1e-5)
    assert np.ptp(alone, axis=0).min() > 0.05
    # the base once, however many members
    model = part._parts[0].network.network.model
    own = sum(p.numel() for name, p in model.named_parameters() if "lora_" not in name)
    assert own == sum(p.numel() for p in LlamaForCausalLM.from_pretrained(base).parameters())
    assert not any(p.requires_grad for p in model.parameters())


def test_a_base_that_moved_is_named(tmp_path, base):
    members = adapters(tmp_path, base, 2)
    before = components(node(members), RewardHost()).score(ROWS)
    (tmp_path / "base").rename(tmp_path / "elsewhere")
    with pytest.raises(ValueError, match=r"^reward\.r: the model .*base that the members belong to cannot be loaded"):
        components(node(members), RewardHost())
    after = components(node(members, base=str(tmp_path / "elsewhere")), RewardHost()).score(ROWS)
    np.testing.assert_array_equal(after, before)


def test_heads_on_one_trunk_take_one_forward(tmp_path, base):
    members = heads(tmp_path, 4)
    lm = LlamaForCausalLM.from_pretrained(base).eval()
    alone = [read_at_the_end_of_turn(lm, load_file(f"{m}/score.safetensors")["weight"]) for m in members]
    rewards = components(node(members, base=base), RewardHost())
    part = rewards._parts["r"]
    forwards = []
    network = part._parts[0].network.network
    network.causal_lm.get_decoder().register_forward_hook(lambda *_: forwards.append(1))
    np.testing.assert_allclose(part.member_scores(ROWS), alone, rtol=0, atol=1e-4)
    assert len(forwards) == 1
    assert np.ptp(alone, axis=0).min() > 0.05


def test_scores_can_be_put_on_one_scale(tmp_path, base):
    members = adapters(tmp_path, base)  # means 0, 0.5, 1 and deviations 1, 2, 3
    raw = components(node(members), RewardHost())._parts["r"].member_scores(ROWS)
    scaled = components(node(members, normalise=True), RewardHost())._parts["r"].member_scores(ROWS)
    np.testing.assert_allclose(scaled, (raw - [[0], [0.5], [1]]) / [[1], [2], [3]], rtol=0, atol=1e-12)
    with pytest.raises(ValueError, match=r"normalise=true needs mean and std in its reward_model\.json"):
        components(node(heads(tmp_path), base=base, normalise=True), RewardHost())


def test_one_of_several_outputs(tmp_path, base):
    members = heads(tmp_path, 2)
    for m in members:
        torch.manual_seed(len(m))
        save_file({"weight": torch.randn(2, WIDTH)}, f"{m}/score.safetensors")
    for k, m in enumerate(members):
        form(tmp_path / f"head_{k}", kind="attributes", outputs=["helpful", "brief"])
        assert m.endswith(str(k))
    with pytest.raises(ValueError, match="has outputs helpful, brief; choose one with output=NAME"):
        components(node(members, base=base), RewardHost())
    scores = [
        components(node(members, base=base, output=name), RewardHost()).score(ROWS) for name in ("helpful", "brief")
    ]
    assert np.abs(scores[0] - scores[1]).min() > 1e-3


def test_a_completion_that_one_member_cannot_score_has_none(tmp_path):
    members = whole(tmp_path)
    longest = max(len(ids) for ids in chats())
    lines: list[str] = []
    rewards = components(node(members, max_tokens=longest - 1), RewardHost(say=lines.append))
    missing = [len(ids) == longest for ids in chats()]
    assert np.isnan(rewards.score(ROWS)[:, 0]).tolist() == missing
    assert rewards.counts == {"r/incomplete": 1, "r/too_long": 3}
    rewards._parts["r"]._parts[1].network.network.head.score.weight.fill_(torch.inf)
    assert np.isnan(rewards.score(ROWS)).all()
    assert rewards.counts["r/incomplete"] == 5
    assert rewards._parts["r"].metrics == {}
    known = rewards._parts["r"].member_scores(ROWS)
    assert np.isfinite(known[[0, 2]][:, ~np.array(missing)]).all()
    assert len([line for line in lines if "incomplete" in line]) == 1


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"combine": "wco"}, "combine=wco: must be one of mean, worst, uncertainty, median"),
        ({"coefficient": -1.0}, "coefficient=-1.0: must be a finite number, at least 0"),
        ({"ddof": 2}, "ddof=2: must be 0"),
        ({"members": "a"}, "members=a: must be a list"),
        ({"members": ["a"]}, r"members=\['a'\]: an ensemble has at least two; use reward=model for one"),
        ({"members": ["a", "a/"]}, "members: a stands twice"),
        ({"base": "b"}, "base=b has no effect: the members are whole models"),
    ],
)
def test_settings_are_refused_before_anything_is_loaded(changes, message):
    with pytest.raises(ValueError, match=rf"^reward\.r: {message}"):
        components(node(["a", "b"], **changes), RewardHost())


def test_members_that_do_not_belong_together(tmp_path, base):
    models, parts, tops = whole(tmp_path, 2), adapters(tmp_path, base, 2), heads(tmp_path, 2)
    with pytest.raises(ValueError, match="is a whole and .* a adapter; give members of one form"):
        components(node([models[0], parts[0]]), RewardHost())
    with pytest.raises(ValueError, match="base is missing: members that are heads alone"):
        components(node(tops), RewardHost())
    described = tmp_path / "adapter_1" / "adapter_config.json"
    text = described.read_text()
    described.write_text(text.replace(base, "/another"))
    with pytest.raises(ValueError, match="their adapters belong to /another and .*give members of one base"):
        components(node(parts), RewardHost())
    described.write_text(text)
    form(tmp_path / "adapter_1", kind="cost")
    with pytest.raises(ValueError, match="adapter_1 is a cost model and .*adapter_0 is not"):
        components(node(parts), RewardHost())
    form(tmp_path / "adapter_0", kind="cost")
    with pytest.raises(ValueError, match="combine=uncertainty: of costs high is bad"):
        components(node(parts), RewardHost())
    assert components(node(parts, combine="mean"), RewardHost()).score(ROWS).shape == (4, 1)
    form(tmp_path / "adapter_1", kind="cost", prompts="text")
    with pytest.raises(ValueError, match=r"on prompts=chat and .*adapter_1 on prompts=text"):
        components(node(parts, combine="mean"), RewardHost())
    save_file({"weight": torch.randn(1, WIDTH - 1)}, tmp_path / "head_1" / "score.safetensors")
    with pytest.raises(ValueError, match=r"head_1: its head is \(1, 31\); .* must be \(1, 32\)"):
        components(node(tops, base=base), RewardHost())
    (tmp_path / "head_1" / "reward_model.json").unlink()
    with pytest.raises(ValueError, match=r"head_1: has no reward_model\.json"):
        components(node(tops, base=base), RewardHost())


def test_an_adapter_of_another_network_is_refused(tmp_path, base):
    members = adapters(tmp_path, base, 2)
    torch.manual_seed(5)
    other = LlamaForCausalLM(config(num_hidden_layers=1))
    other.save_pretrained(tmp_path / "other")
    with pytest.raises(ValueError, match="its adapter does not fit the model"):
        components(node(members, base=str(tmp_path / "other")), RewardHost())
    changed = TOKENIZER.__class__.from_pretrained(members[1])
    changed.chat_template = "{{ messages[0]['content'] }}"
    changed.save_pretrained(members[1])
    with pytest.raises(ValueError, match="have different tokenizers"):
        components(node(members), RewardHost())
