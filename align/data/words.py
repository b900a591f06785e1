"""Tokens of a text by the words that its tokenizer cuts it into, each of which is tokenised once.

A byte-level BPE tokenizer cuts a text by patterns and tokenises every piece for itself. Pieces come again and again, so
that cutting a text by the same patterns and looking its pieces up is several times cheaper than asking the tokenizer.
The tokens must be the tokenizer's to the last one: only components whose definition is known are taken, that both
engines cut alike is tried on all short texts of every kind of character, each character is tried before a text that
holds it is cut here, and of the texts one in some hundreds is compared as a whole. What is not proved is the
tokenizer's own work, as everything of other tokenizers is.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Sequence
from functools import lru_cache
from itertools import chain, product
from typing import TYPE_CHECKING, Any
from unicodedata import is_normalized

from align.jsons import Json, Tokenizer

if TYPE_CHECKING:
    from regex import Pattern

_WORTH = 500_000  # characters whose tokenisation costs what the proof does
_COMPARED = 500  # of how many texts one is compared as a whole
_KEPT = 200_000  # pieces that are remembered, some 40 MB
_LONG = 64  # characters of a piece that hardly comes again
_KINDS = "aA1 \n.'"  # a character of each kind that patterns of tokenizers tell apart
_SHORT = 5  # characters of the texts that are tried: patterns look one character ahead, and count to three
_AROUND = ("", "a", "1", " ", "\n", ".", "'")  # stands before and after each character that is tried
# the pattern of GPT-2's tokenizer, which a ByteLevel component with use_regex stands for (Radford et al. 2019)
_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"


class Words:
    """The pieces of a tokenizer's texts, and their tokens."""

    def __init__(self, tokenizer: Tokenizer, cutters: list[tuple[Pattern[str], Pattern[str]]], composed: bool):
        backend = tokenizer.backend_tokenizer
        self._backend, self._model = backend, backend.model
        self._cutters = cutters
        self._composed = composed  # texts are brought to Unicode's composed form first
        self._added = _added(tokenizer)
        self._added_ids = {token.content: i for i, token in tokenizer.added_tokens_decoder.items()}
        self._letters = _letters()
        self._known: dict[str, Sequence[int]] = {}
        self._sure: set[str] = set()
        self._unsure: set[str] = set()
        self._seen = 0  # characters, until they are worth the proof; then texts
        self._proved: bool | None = None

    def ids(self, text: str) -> list[int] | None:
        """The tokens of a text without any that the tokenizer puts around it; None for one that is the tokenizer's.

        Raises RuntimeError if a comparison finds other tokens than the tokenizer's.
        """
        if not self._proved and not self._worth(text):
            return None
        if not self._sure.issuperset(text) and not self._try(text):
            return None
        if self._composed and not text.isascii() and not is_normalized("NFC", text):
            return None
        out = self._tokens(text)
        self._seen += 1
        if self._seen % _COMPARED == 0 and out != self._backend.encode(text, add_special_tokens=False).ids:
            raise RuntimeError(f"a text was cut otherwise than its tokenizer does, which must not be: {text[:200]!r}")
        return out

    def _tokens(self, text: str) -> list[int]:
        known, out = self._known, []
        for part, token in _parted(text, self._added):
            if token:
                out.append(self._added_ids[part])
                continue
            pieces = self._cut(part)
            try:
                tokens = [known[piece] for piece in pieces]
            except KeyError:
                tokens = map(self._learnt, pieces)
            out.extend(chain.from_iterable(tokens))
        return out

    def _cut(self, text: str) -> list[str]:
        pieces = [text]
        for whole, parting in self._cutters:
            if len(pieces) == 1:
                pieces = _cut(whole, parting, pieces[0])
                continue
            cut = ([piece] if len(piece) == 1 else _cut(whole, parting, piece) for piece in pieces)
            pieces = list(chain.from_iterable(cut))
        return pieces

    def _learnt(self, piece: str) -> Sequence[int]:
        found = self._known.get(piece)
        if found is None:
            found = tuple(token.id for token in self._model.tokenize(self._level(piece)))
            if len(piece) <= _LONG:
                if len(self._known) >= _KEPT:
                    self._known.clear()
                self._known[piece] = found
        return found

    def _level(self, piece: str) -> str:
        """A letter for each byte, as the tokenizer's vocabulary has them."""
        return "".join(map(self._letters.__getitem__, piece.encode()))

    # ---- the proof

    def _worth(self, text: str) -> bool:
        if self._proved is None:
            self._seen += len(text)
            if self._seen > _WORTH:
                self._seen, self._proved = 0, self._alike(_short_texts())
        return bool(self._proved)

    def _try(self, text: str) -> bool:
        """Whether every character of a text is cut as the tokenizer does, wherever it stands."""
        for c in set(text) - self._sure - self._unsure:
            half = 0xD800 <= ord(c) < 0xE000  # of a pair, which is no character
            alike = not half and self._alike(f"{a}{c}{b}" for a, b in product(_AROUND, repeat=2))
            (self._sure if alike else self._unsure).add(c)
        return self._unsure.isdisjoint(text)

    def _alike(self, texts: Iterable[str]) -> bool:
        normalizer, cutter = self._backend.normalizer, self._backend.pre_tokenizer
        for text in texts:
            known = text if normalizer is None else normalizer.normalize_str(text)
            if [piece for piece, _ in cutter.pre_tokenize_str(known)] != list(map(self._level, self._cut(text))):
                return False
        return True


def words_of(tokenizer: Tokenizer) -> Words | None:
    """The words of a tokenizer; None where they are not known to be."""
    return _words(tokenizer, len(tokenizer)) if tokenizer.is_fast else None


@lru_cache(maxsize=16)
def _words(tokenizer: Tokenizer, size: int) -> Words | None:  # noqa: ARG001  tokens may be added
    backend = tokenizer.backend_tokenizer
    if type(backend.model).__name__ != "BPE" or backend.model.dropout or backend.encode_special_tokens:
        return None
    normalizer, cutter = (_state(part) for part in (backend.normalizer, backend.pre_tokenizer))
    if cutter is None or (normalizer is not None and normalizer["type"] != "NFC"):
        return None
    if any(t.single_word or t.lstrip or t.rstrip for t in tokenizer.added_tokens_decoder.values()):
        return None
    patterns = _patterns(cutter)
    if patterns is None:
        return None
    import regex

    try:
        cutters = [(regex.compile(pattern), regex.compile(f"({pattern})")) for pattern in patterns]
    except regex.error:
        return None
    if any(whole.groups for whole, _ in cutters):
        return None
    return Words(tokenizer, cutters, normalizer is not None)


def _state(part: Any) -> Json | None:
    """The definition of a tokenizer's component."""
    return None if part is None else json.loads(part.__getstate__())


def _patterns(cutter: Json) -> list[str] | None:
    """What each component cuts by, in their order; None where one is not known."""
    *parts, last = cutter["pretokenizers"] if cutter["type"] == "Sequence" else [cutter]
    if last["type"] != "ByteLevel" or last["add_prefix_space"]:
        return None
    out = []
    for part in parts:
        if part["type"] == "Digits":
            out.append(r"\p{N}" if part["individual_digits"] else r"\p{N}+")
        elif part["type"] == "Split" and part["behavior"] == "Isolated" and not part["invert"]:
            (kind, pattern), *_ = part["pattern"].items()
            out.append(pattern if kind == "Regex" else re.escape(pattern))
        else:
            return None
    return [*out, _GPT2] if last["use_regex"] else out


def _cut(whole: Pattern[str], parting: Pattern[str], text: str) -> list[str]:
    """Matches and what stands between them."""
    pieces = whole.findall(text)
    if sum(map(len, pieces)) == len(text):
        return pieces
    return [piece for piece in parting.split(text) if piece]


def _added(tokenizer: Tokenizer) -> list[re.Pattern[str]]:
    """Tokens that stand for a text wherever it stands, the longest first: those that are looked for before the text is
    normalised, then the others."""
    listed = tokenizer.added_tokens_decoder.values()
    groups = [[t.content for t in listed if t.normalized is normalized] for normalized in (False, True)]
    texts = [sorted(filter(None, group), key=len, reverse=True) for group in groups]
    return [re.compile(f"({'|'.join(map(re.escape, group))})") for group in texts if group]


def _parted(text: str, added: Sequence[re.Pattern[str]]) -> Iterator[tuple[str, bool]]:
    """The parts of a text, and whether each is an added token."""
    if not added:
        if text:
            yield text, False
        return
    for number, part in enumerate(added[0].split(text)):
        if number % 2:
            yield part, True
        elif part:
            yield from _parted(part, added[1:])


def _short_texts() -> Iterator[str]:
    letters = [chr(first + n) for first in (ord("a"), ord("A")) for n in range(26)]
    for size in range(1, _SHORT + 1):
        yield from map("".join, product(_KINDS, repeat=size))
    for a, b in product(letters, ["", *letters]):
        yield f"a'{a}{b}"  # contractions


@lru_cache(maxsize=1)
def _letters() -> list[str]:
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    table = bytes_to_unicode()
    return [table[byte] for byte in range(256)]
