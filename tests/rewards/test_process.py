"""Rewards of steps: where they stand, what the model and the functions of users give, and a policy that learns them."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from transformers import BertConfig, BertForTokenClassification, LlamaConfig, LlamaForTokenClassification

from align.models.pretrained import byte_tokenizer, smollm2
from align.rewards.base import Conversation
from align.rewards.build import RewardHost, components
from align.rewards.process import Splitter, Step

HERE = "tests.rewards.step_functions"
BYTES = byte_tokenizer()
END = BYTES.eos_token_id


def ids(text: str, ended: bool = True) -> tuple[int, ...]:
    return (*BYTES(text, add_special_tokens=False)["input_ids"], *([END] if ended else []))


def said(text: str, ended: bool = True, **fields) -> Conversation:
    return Conversation("Why?", text, ended, token_ids=ids(text, ended), fields=fields)


# ---------------------------------------------------------------------- where a step ends


@pytest.mark.parametrize(
    ("text", "ended", "wanted"),
    [
        # the second line feed completes a step; the end of turn the last one
        ("ab\n\nc", True, [("ab", 3), ("c", 5)]),
        ("ab\n\nc", False, [("ab", 3), ("c", 4)]),
        ("ab", True, [("ab", 2)]),
        # a separator at the end is the last step's, a step of white space the next one's
        ("ab\n\n", True, [("ab", 4)]),
        ("ab\n\n \n\n", False, [("ab", 6)]),
        ("ab\n\n\n\n\nc", True, [("ab", 3), ("c", 8)]),
        ("\n\nab\n\nc", True, [("ab", 5), ("c", 7)]),
        # a single line feed separates nothing
        ("a\nb\n\nc", True, [("a\nb", 4), ("c", 6)]),
        # nothing is one step, to be judged as any other
        ("", True, [("", 0)]),
        ("\n\n", False, [("", 1)]),
        # a character of several tokens: 2 + 3 + 4 bytes, then the separator
        ("é日🙂\n\nü", True, [("é日🙂", 10), ("ü", 13)]),
    ],
)
def test_steps_by_hand(text, ended, wanted):
    """Every token is a byte."""
    assert Splitter(BYTES, "\n\n")(ids(text, ended)) == [Step(*step) for step in wanted]


def test_no_token_has_no_step_and_a_broken_character_is_no_obstacle():
    split = Splitter(BYTES, "\n\n")
    assert split(()) == []
    first, second = BYTES("é", add_special_tokens=False)["input_ids"]
    broken = (first, *ids("\n\n", False), second, *ids("\n\nb"))
    assert split(broken) == [Step("�", 2), Step("�", 5), Step("b", 7)]


@pytest.fixture(scope="module")
def subwords():
    return smollm2().tokenizer()


TEXTS = [
    "First, add 3 and 4.\n\nThat is 7.\n\n\n\nSo the answer is \\boxed{7}.",
    "日本語の問題です。\n\n答えは🙂🙂です\n\n\nend",
    "a.\n\n\nb \n\n c\n\n",
    "\n\n\n\nx",
    "🙂",
    "def f():\n    return 1\n\n\ndef g():\n\treturn 2",
]


@pytest.mark.parametrize("text", TEXTS)
@pytest.mark.parametrize("ended", [True, False])
def test_a_step_ends_at_the_token_that_holds_the_last_byte_of_its_separator(subwords, text, ended):
    """The bytes of each token by the alphabet of byte-level tokenizers, not by decoding."""
    from tokenizers.pre_tokenizers import ByteLevel

    alphabet = len(ByteLevel.alphabet())
    assert alphabet == 256  # a token of n letters is n bytes
    tokens = subwords(text, add_special_tokens=False)["input_ids"]
    reached = np.cumsum([len(t) for t in subwords.convert_ids_to_tokens(tokens)])
    assert reached[-1] == len(text.encode())
    wanted, read = [], 0
    *closed, rest = text.split("\n\n")
    for piece in closed:
        read += len(piece.encode()) + 2
        if piece.strip():
            wanted.append(int(np.flatnonzero(reached >= read)[0]))
    last = len(tokens) - 1 + ended
    wanted = [*wanted, last] if rest.strip() else [*wanted[:-1], last]
    found = Splitter(subwords, "\n\n")((*tokens, *([subwords.eos_token_id] if ended else [])))
    assert [step.end for step in found] == wanted
    assert [step.text for step in found] == [piece.strip() for piece in (*closed, rest) if piece.strip()]


def test_steps_that_end_in_one_token_are_one(subwords):
    """With the separator "a" the token "banana" would end three steps."""
    tokens = subwords(" banana", add_special_tokens=False)["input_ids"]
    assert len(tokens) == 1
    found = Splitter(subwords, "a")((*tokens, *subwords(" on", add_special_tokens=False)["input_ids"]))
    assert found == [Step("banan", 0), Step("on", 1)]


def test_decoding_and_counting_find_the_same_places(subwords):
    """Counting where tokens are whole texts; the other way is taken by force."""
    tokens = subwords("One.\n\nTwo is a sum.\n\n\n\nThree", add_special_tokens=False)["input_ids"]
    counted, decoded = Splitter(subwords, "\n\n"), Splitter(subwords, "\n\n")
    decoded._text = lambda _: "?"
    assert counted(tokens) == decoded(tokens)
    assert len(counted(tokens)) == 3


# ---------------------------------------------------------------------- functions


@pytest.fixture
def make():
    """A function (name of a function, settings) -> Rewards with that component named r; all are closed at the end."""
    made = []

    def build(function: str, say=lambda _: None, **settings):
        path = function if "." in function else f"{HERE}.{function}"
        node = {"_target_": "align.rewards.process.StepFunction", "function": path, "keys": None, "seconds": 20.0,
                "separator": "\n\n"}  # fmt: skip
        made.append(components({"r": node | settings}, RewardHost(tokenizer=BYTES, say=say)))
        return made[-1]

    yield build
    for rewards in made:
        rewards.close()


def placed(length: int, **numbers: float) -> list[float]:
    row = np.full(length, np.nan)
    for place, number in numbers.items():
        row[int(place[1:])] = number
    return row


def test_a_function_judges_each_step_and_its_number_stands_at_the_last_token(make):
    rewards = make("known")
    assert rewards.steps_name == "r"
    assert rewards.weights.tolist() == [0.0]
    columns, rows = rewards.score_with_steps([said("one\n\ntwo"), said(""), said("three\n\none\n\n", False)])
    # tokens: 3 + 2, 3 + the end; the end alone; 5 + 2, 3 + 2
    np.testing.assert_allclose(rows[0], placed(9, _4=0.255, _8=-0.496))
    np.testing.assert_allclose(rows[1], placed(1, _0=-0.124))
    np.testing.assert_allclose(rows[2], placed(12, _6=0.757, _11=0.255))
    np.testing.assert_allclose(columns[:, 0], [-0.496, -0.124, 0.255])  # the smallest
    np.testing.assert_array_equal(rewards.score([said("one\n\ntwo")])[:, 0], columns[:1, 0])
    assert rewards.counts == {}
    columns, rows = rewards.score_with_steps([])
    assert (columns.shape, rows) == ((0, 1), [])


def test_a_function_may_ask_for_all_steps_its_place_and_the_row_s_columns(make):
    rewards = make("in_its_place", keys={"factor": 2.0})
    _, rows = rewards.score_with_steps([said("a\n\nb\n\nc", answer=7), said("a", answer=1)])
    np.testing.assert_array_equal(rows[0], placed(8, _2=6 + 7, _5=26 + 7, _7=46 + 7))
    np.testing.assert_array_equal(rows[1], placed(2, _1=2 + 1))
    _, rows = make("at_once").score_with_steps([said("a\n\nbb"), said("ccc")])
    np.testing.assert_array_equal(rows[0], placed(6, _2=1, _5=102))
    np.testing.assert_array_equal(rows[1], placed(4, _3=3))


def test_a_step_without_a_number_costs_the_completion_its_steps_and_no_other(make):
    lines: list[str] = []
    rewards = make("known", lines.append)
    columns, rows = rewards.score_with_steps([said("one\n\nunknown\n\ntwo"), said("two")])
    assert np.isnan(rows[0]).all()
    assert np.isnan(columns[0, 0])
    np.testing.assert_allclose(rows[1], placed(4, _3=-0.496))
    assert rewards.counts == {"r/raised": 1}
    assert len(lines) == 1
    assert "unknown" in lines[0]
    hanging = make("hangs", seconds=0.5)
    _, rows = hanging.score_with_steps([said("one"), said("one\n\ntwo\n\nthree"), said("three")])
    assert [bool(np.isnan(row).all()) for row in rows] == [False, True, False]
    assert hanging.counts == {"r/timeout": 1}


def test_what_cannot_be_used_is_told_before_it_is_called(make):
    with pytest.raises(ValueError, match=r"^reward\.r: function=tests\.nothing\.here: cannot be found"):
        make("tests.nothing.here")
    with pytest.raises(ValueError, match=r"function=tests\.rewards\.step_functions\.Here: runs in the trainer's"):
        make("Here")
    with pytest.raises(ValueError, match="separator is empty"):
        make("known", separator="")
    node = {"_target_": "align.rewards.process.StepFunction", "function": f"{HERE}.known", "keys": {}, "separator": "."}
    with pytest.raises(ValueError, match="there is no policy here"):
        components({"r": node}, RewardHost())
    with pytest.raises(ValueError, match=r"^reward: a and b give rewards of steps; keep one of them"):
        components({"a": node, "b": node}, RewardHost(tokenizer=BYTES))


class Infinite:
    """A component of the user's that forgets to look."""

    in_process = True
    gives_steps = True

    def __init__(self, host):  # noqa: ARG002
        self.counts = {}

    def steps(self, conversations):  # noqa: ARG002
        return [np.array([np.nan, 1.0, np.inf]), np.array([0.5, -1.0])]

    def close(self):
        pass


def test_a_user_s_own_class_gives_steps_and_infinite_ones_are_none():
    rewards = components({"r": {"_target_": "tests.rewards.test_process.Infinite", "weight": 2}}, RewardHost())
    columns, rows = rewards.score_with_steps([said("a"), said("b")])
    np.testing.assert_array_equal(columns[:, 0], [np.nan, -1.0])
    assert np.isnan(rows[0]).all()
    assert rows[1].tolist() == [0.5, -1.0]
    assert rewards.weights.tolist() == [2.0]
    rewards.close()


# ---------------------------------------------------------------------- the model


def saved(directory, **changes) -> str:
    torch.manual_seed(0)
    common = dict(
        vocab_size=len(BYTES), hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=512, initializer_range=0.3, num_labels=2,
        pad_token_id=BYTES.pad_token_id, eos_token_id=BYTES.eos_token_id,
    )  # fmt: skip
    model = LlamaForTokenClassification(LlamaConfig(**(common | changes)))
    torch.nn.init.normal_(model.score.bias)
    model.save_pretrained(directory)
    BYTES.save_pretrained(directory)
    return str(directory)


def node(path: str, **changes) -> dict:
    common = {"_target_": "align.rewards.process.ProcessRewardModel", "path": path, "revision": None,
              "dtype": "float32", "max_tokens": 256, "separator": "\n\n", "template": "plain",
              "step_end": "\n"}  # fmt: skip
    return {"r": common | changes}


CHAT = ({"role": "system", "content": "s"}, {"role": "user", "content": "Why?"})
ROWS = [
    said("First.\n\nSecond, which is longer\n\nthird"),
    Conversation("Why?", "é\n\nb", False, CHAT, token_ids=ids("é\n\nb", False)),
    said(""),
]
STEPS = [["First.", "Second, which is longer", "third"], ["é", "b"], [""]]
ENDS = [[7, 32, 38], [3, 4], [0]]


@pytest.mark.parametrize("budget", [1, 64, 100_000])
@pytest.mark.parametrize("template", ["plain", "chat"])
def test_the_model_is_read_behind_each_step(tmp_path, subwords, budget, template):
    """transformers' own forward over the prompt and as many steps as there were: what follows must not count."""
    path = saved(tmp_path, vocab_size=len(subwords))
    subwords.save_pretrained(path)  # another tokenizer than the policy's
    model = LlamaForTokenClassification.from_pretrained(path).eval()
    rewards = components(node(path, template=template), RewardHost(tokenizer=BYTES, micro_batch_tokens=budget))
    columns, rows = rewards.score_with_steps(ROWS)
    numbers = []
    for row, steps, ends, conversation in zip(rows, STEPS, ENDS, ROWS, strict=True):
        wanted = np.full(len(conversation.token_ids), np.nan)
        tokens = subwords("Why?", add_special_tokens=False)["input_ids"]
        if template == "chat":
            chat = conversation.messages or ({"role": "user", "content": "Why?"},)
            text = subwords.apply_chat_template(list(chat), tokenize=False, add_generation_prompt=True)
            tokens = subwords(text, add_special_tokens=False)["input_ids"]
        for step, end in zip(steps, ends, strict=True):
            for part in (step, "\n"):
                tokens = tokens + subwords(part, add_special_tokens=False)["input_ids"]
            with torch.no_grad():
                wrong, right = model(torch.tensor([tokens])).logits[0, -1].softmax(-1).tolist()
            wanted[end] = right - wrong
        np.testing.assert_allclose(row, wanted, atol=1e-5)  # rounding of float32
        numbers.append(np.nanmin(wanted))
    assert np.ptp(numbers) > 0.01
    np.testing.assert_allclose(columns[:, 0], numbers, atol=1e-5)
    assert rewards.counts == {}


def test_too_long_and_not_finite_have_no_steps(tmp_path):
    path = saved(tmp_path)
    lines: list[str] = []
    longest = len("Why?") + sum(len(step) + 1 for step in STEPS[0])
    host = RewardHost(tokenizer=BYTES, say=lines.append)
    rewards = components(node(path, max_tokens=longest), host)
    assert not any(np.isnan(row).all() for row in rewards.score_with_steps(ROWS)[1])
    rewards = components(node(path, max_tokens=longest - 1), host)
    assert [bool(np.isnan(row).all()) for row in rewards.score_with_steps(ROWS)[1]] == [True, False, False]
    assert rewards.counts == {"r/too_long": 1}
    rewards._parts["r"].model.score.weight.fill_(torch.inf)
    assert np.isnan(rewards.score(ROWS)).all()
    assert rewards.counts == {"r/too_long": 2, "r/not_finite": 2}
    assert len(lines) == 2


def test_models_that_are_none_are_refused(tmp_path):
    host = RewardHost(tokenizer=BYTES)
    three = saved(tmp_path / "three", num_labels=3)
    with pytest.raises(ValueError, match=r"^reward\.r: path=.*: has 3 labels"):
        components(node(three), host)
    two = saved(tmp_path / "two")
    with pytest.raises(ValueError, match="step_end is empty"):
        components(node(two, step_end=""), host)
    with pytest.raises(ValueError, match="template=none: must be plain or chat"):
        components(node(two, template="none"), host)
    with pytest.raises(ValueError, match=r"reward\.r\.seconds has no effect"):
        components(node(two, seconds=3.0), host)
    encoder = BertConfig(vocab_size=len(BYTES), hidden_size=16, intermediate_size=16, num_hidden_layers=1,
                         num_attention_heads=2, num_labels=2)  # fmt: skip
    BertForTokenClassification(encoder).save_pretrained(tmp_path / "bert")
    BYTES.save_pretrained(tmp_path / "bert")
    with pytest.raises(ValueError, match="reads both ways"):
        components(node(str(tmp_path / "bert")), host)
    LlamaForTokenClassification.from_pretrained(two).model.save_pretrained(tmp_path / "trunk")
    BYTES.save_pretrained(tmp_path / "trunk")
    with pytest.raises(ValueError, match="do not hold score.bias and 1 other weights of LlamaFor"):
        components(node(str(tmp_path / "trunk")), host)


def test_a_model_keeps_the_cap_of_its_attention_scores(tmp_path):
    """Transformers loads it with an attention that ignores the cap."""
    from transformers import Gemma2Config, Gemma2ForTokenClassification

    config = Gemma2Config(
        vocab_size=len(BYTES), hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=1, head_dim=8, num_labels=2, attn_logit_softcapping=0.1, pad_token_id=0,
    )  # fmt: skip
    model = Gemma2ForTokenClassification(config).eval()
    for p in model.parameters():
        torch.nn.init.normal_(p.data, std=0.5, generator=torch.Generator().manual_seed(p.numel()))
    model.save_pretrained(tmp_path / "capped")
    BYTES.save_pretrained(tmp_path / "capped")
    part = components(node(str(tmp_path / "capped")), RewardHost(tokenizer=BYTES))._parts["r"]
    ids = torch.arange(30)[None]
    with torch.no_grad():
        model.config._attn_implementation = "eager"
        torch.testing.assert_close(part.model(ids).logits, model(ids).logits)
        model.config._attn_implementation = "sdpa"
        assert (part.model(ids).logits - model(ids).logits).abs().max() > 1e-3
