"""Tokens by words are the tokenizer's to the last one, or they are left to it."""

from __future__ import annotations

import copy
import random

import pytest
from tokenizers import AddedToken, Regex, Tokenizer, models, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from align.data.words import Words, words_of
from align.models.pretrained import byte_tokenizer, smollm2
from tests.data.test_chat import merged_newlines, metaspace

# patterns as Qwen's, Llama 3's and o200k's tokenizers have them
QWEN = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
LLAMA = QWEN.replace(r"\p{N}|", r"\p{N}{1,3}|", 1)
O200K = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
    r"|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
PARTS = [
    "a",
    "The",
    " cod",
    "'s",
    "'LL",
    "don't",
    "1",
    "2345",
    " ",
    "  ",
    "\n",
    "\r\n",
    "\t",
    ".",
    "!?",
    "é",
    "e\u0301",
]
PARTS += ["ſ", "\u212a", "'ſ", "\u00a0", "\u2028", "\x1c", "\x85", "魚", "🐟", "²", "Ⅷ", "<end>", "<en", "ß", "\u200d"]


def of_pattern(pattern: str, normalizer=None, **added):
    """Bytes with a few merges, cut by a pattern."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    merges = [("Ġ", "c"), ("o", "d"), ("Ċ", "Ċ"), ("Ġ", "Ġ"), ("1", "2"), ("2", "3"), ("'", "s")]
    vocabulary = {c: i for i, c in enumerate([*alphabet, *(a + b for a, b in merges)])}
    backend = Tokenizer(models.BPE(vocab=vocabulary, merges=merges))
    cut = pre_tokenizers.Split(Regex(pattern), "isolated")
    level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.pre_tokenizer = pre_tokenizers.Sequence([cut, level])
    if normalizer is not None:
        backend.normalizer = normalizer
    backend.add_special_tokens([AddedToken("<end>", special=True, **added)])
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<end>")


TOKENIZERS = {
    "smollm2": lambda: copy.deepcopy(smollm2().tokenizer()),
    "bytes": merged_newlines,
    "qwen": lambda: of_pattern(QWEN, normalizers.NFC()),
    "llama": lambda: of_pattern(LLAMA),
    "o200k": lambda: of_pattern(O200K),
}


def proved(tokenizer, monkeypatch) -> Words:
    monkeypatch.setattr("align.data.words._WORTH", 0)
    words = words_of(tokenizer)
    assert words is not None
    return words


def texts(count: int) -> list[str]:
    rng = random.Random(0)
    return ["".join(rng.choices(PARTS, k=rng.randint(1, 8))) for _ in range(count)]


@pytest.mark.parametrize("name", TOKENIZERS)
def test_tokens_are_those_of_the_tokenizer(name, monkeypatch):
    tokenizer = TOKENIZERS[name]()
    words = proved(tokenizer, monkeypatch)
    by_words = 0
    for text in texts(3000):
        ids = words.ids(text)
        by_words += ids is not None
        assert ids in (None, tokenizer(text, add_special_tokens=False).input_ids), text
    assert by_words > 1500
    assert words.ids("") == []


def test_characters_that_are_cut_otherwise_are_left_to_the_tokenizer(monkeypatch):
    """One engine takes U+017F for an s without its case; text that is not composed is normalised first."""
    words = proved(of_pattern(QWEN, normalizers.NFC()), monkeypatch)
    assert words.ids("a cod") is not None
    assert words.ids("cafe\u0301") is None
    assert words.ids("\ud800") is None
    assert words.ids("\u212a") is None  # the Kelvin sign, a K when it is composed


@pytest.mark.parametrize("pattern", [r"\h+|[^\h]+", r"a|(?<=a) |[^a]+"])  # \h: a hexadecimal digit there, a blank here
def test_patterns_that_are_read_otherwise_or_forget_text_prove_nothing_wrong(pattern, monkeypatch):
    tokenizer = of_pattern(pattern)
    words = proved(tokenizer, monkeypatch)
    assert all(words.ids(t) in (None, tokenizer(t, add_special_tokens=False).input_ids) for t in texts(300))
    assert (words.ids("fa ce") is None) == (pattern[1] == "h")


@pytest.mark.parametrize(
    "tokenizer",
    [metaspace(), of_pattern(QWEN, normalizers.Lowercase()), of_pattern(QWEN, lstrip=True), of_pattern("(a)|[^a]+")],
)
def test_other_tokenizers_are_left_alone(tokenizer):
    assert words_of(tokenizer) is None


def test_little_text_is_not_worth_the_proof():
    words = words_of(byte_tokenizer())
    assert words is None or words.ids("a cod") is None
    words = words_of(of_pattern(QWEN))
    assert words is not None
    assert words.ids("a cod") is None
    assert words.ids("a cod" * 200_000) is not None


def test_a_wrong_token_is_found(monkeypatch):
    words = proved(of_pattern(LLAMA), monkeypatch)
    assert words.ids("cod") is not None
    monkeypatch.setitem(words._known, "cod", [1])
    with pytest.raises(RuntimeError, match="cut otherwise than its tokenizer does"):
        [words.ids("cod") for _ in range(501)]
