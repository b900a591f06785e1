"""Texts to tokens: each in its place, so that tokens do not depend on where a rendering was cut, and none twice.

What the texts are is chat.py's; words.py has most tokens faster than the tokenizer.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Iterable, Sequence
from functools import lru_cache
from itertools import pairwise

import numpy as np

from align.data.sources import BadRow
from align.data.words import words_of
from align.jsons import Tokenizer

_CONTEXT = 64  # characters before a text that its tokenisation is told of: longer than any control token
_CERTAIN = 32  # characters for each token of the limit, below which no text is looked at: no vocabulary is so good
_BLANKS = " \n\t\r"
# after these no token reaches into most texts, and no tokenizer marks the start of a text any more
APART = ("\n", "a")


def encode(texts: Texts, text: str, borders: Iterable[int], edges: Sequence[int]) -> tuple[list[int], list[int]]:
    """Tokens from the first edge to the last, none of which crosses a border; and the number of tokens before each.

    Edges are ascending. A token across an edge that is no border belongs to where it begins.
    """
    first, last = edges[0], edges[-1]
    stops = sorted({first, last} | {border for border in borders if first < border < last})
    inner = [edges[bisect_right(edges, start) : bisect_left(edges, end)] for start, end in pairwise(stops)]
    befores = [text[max(0, start - _CONTEXT) : start] for start in stops[:-1]]
    pieces = [text[start:end] for start, end in pairwise(stops)]
    exact = texts.tokenizer.is_fast  # tells where tokens begin
    for offsets in (True, False):
        asked = [
            whole
            for b, p, within in zip(befores, pieces, inner, strict=True)
            if (bool(within) and exact) is offsets
            for whole in (b, b + p)
        ]
        texts.ask(asked, offsets)
    ids: list[int] = []
    at = dict.fromkeys(edges, 0)
    for before, piece, within, (start, end) in zip(befores, pieces, inner, pairwise(stops), strict=True):
        tokens, begins = texts.in_place(after(before), piece, bool(within) and exact)
        at[start] = len(ids)
        for edge in within:
            if begins is None:  # nearly: the beginning alone may have other tokens
                begun = min(len(texts.in_place(after(before), text[start:edge])[0]), len(tokens))
            else:
                begun = int(np.searchsorted(begins, edge - start))
            at[edge] = len(ids) + begun
        ids += tokens
        at[end] = len(ids)
    return ids, [at[edge] for edge in edges]


def after(before: str) -> tuple[str, ...]:
    """Contexts of a text that stands after `before`."""
    return (before, *APART, "") if before else ("",)


class Texts:
    """Tokens of the texts of one row: those that are asked for together cost one call of the tokenizer, and none is
    tokenised again for the row's other answers.

    limit: of the tokens of a sequence; None where one that is longer is of use.
    """

    def __init__(self, tokenizer: Tokenizer, limit: int | None = None):
        self.tokenizer = tokenizer
        self.limit = limit
        # -> tokens, and where each begins and ends unless nobody asked
        self._known: dict[str, tuple[list[int], Sequence[tuple[int, int]] | None]] = {"": ([], ())}
        self._whole: dict[str, list[int]] = {}
        self._words = words_of(tokenizer)

    def admit(self, text: str) -> None:
        """Raises BadRow for a text that has more tokens than a sequence may have however it is cut: tokens of one of 50
        MB take gigabytes, and a long conversation's turns minutes, to be thrown away."""
        if self.limit is None or len(text) <= _CERTAIN * self.limit:
            return
        longest, counted = _longest_token(self.tokenizer, len(self.tokenizer))
        if self.tokenizer.is_fast and self.tokenizer.backend_tokenizer.normalizer is not None:
            counted = bytes(byte for byte in counted if byte < 128)  # it may make others fewer
        rest = bytes(set(range(256)) - set(counted))
        least = -(-len(text.encode("utf-8", "replace").translate(None, rest)) // longest)
        if least > self.limit:
            raise BadRow(
                "too_long",
                f"a sequence of {len(text)} characters has {least} tokens or many more, the limit is data.max_tokens="
                f"{self.limit}; shorten the row",
            )

    def ask(self, texts: Iterable[str], offsets: bool = False) -> None:
        """Have the tokens of these, without what the tokenizer puts around a text."""
        known = self._known
        new = [t for t in dict.fromkeys(texts) if t not in known or (offsets and known[t][1] is None)]
        if not offsets:
            cut, new = self._cut(new)
            known |= {text: (ids, None) for text, ids in cut.items()}
        if new:
            # the template writes BOS itself
            made = self.tokenizer(new, add_special_tokens=False, return_offsets_mapping=offsets)
            spans = made.offset_mapping if offsets else [None] * len(new)
            known |= zip(new, zip(made.input_ids, spans, strict=True), strict=True)

    def _cut(self, texts: list[str]) -> tuple[dict[str, list[int]], list[str]]:
        """Tokens of those whose words are known, and the other texts."""
        if self._words is None:
            return {}, texts
        cut = {text: ids for text in texts if (ids := self._words.ids(text)) is not None}
        return cut, [text for text in texts if text not in cut]

    def in_place(
        self, contexts: Sequence[str], text: str, offsets: bool = False
    ) -> tuple[list[int], np.ndarray | None]:
        """Tokens of `text` standing after the first of some contexts, whose tokens are already fixed; with offsets,
        where each begins.

        Tokenised together, so that tokenizers which mark the start of a text see it in its place; where a token
        would reach across the border, the text is tokenised after the next context: generation starts from fixed
        tokens too.
        """
        if not text:
            return [], None
        for context in contexts:
            self.ask((context, context + text), offsets)
            head, (whole, spans) = self._known[context][0], self._known[context + text]
            if whole[: len(head)] == head:
                break
        if not offsets:
            return whole[len(head) :], None
        assert spans is not None
        own = np.array(spans[len(head) :], dtype=np.int64).reshape(-1, 2) - len(context)
        # a token begins where the one before ended, though offsets leave out spaces; a character's bytes share theirs
        ends = np.concatenate([[0], np.maximum.accumulate(own[:, 1])[:-1]])
        return whole[len(head) :], np.maximum.accumulate(np.minimum(own[:, 0], ends))

    def begun(self, texts: Sequence[str]) -> list[list[int]]:
        """Tokens of whole texts that something follows, with those that the tokenizer puts before a text."""
        cut, new = self._cut([text for text in dict.fromkeys(texts) if text not in self._whole])
        if cut:
            before, behind = _around(self.tokenizer, len(self.tokenizer))
            self._whole |= {text: before + ids + behind for text, ids in cut.items()}
        if new:
            made = self.tokenizer(new).input_ids
            if _appends_eos(self.tokenizer, len(self.tokenizer)):
                made = [ids[:-1] for ids in made]
            self._whole |= zip(new, made, strict=True)
        return [self._whole[text] for text in texts]


@lru_cache(maxsize=16)
def _longest_token(tokenizer: Tokenizer, size: int) -> tuple[int, bytes]:  # noqa: ARG001  tokens may be added
    """The most bytes of a text that one token stands for, blanks not counted, and the bytes that are sure to be part of
    one: none of vocabularies in which a token stands for any unknown word."""
    if not tokenizer.is_fast or type(tokenizer.backend_tokenizer.model).__name__ != "BPE":
        return 1, b""
    vocabulary = tokenizer.get_vocab()
    if tokenizer.backend_tokenizer.model.byte_fallback:
        blanks = str.maketrans("", "", _BLANKS + "\u2581")
        longest = max(len(token.translate(blanks).encode()) for token in vocabulary)
        return longest, bytes(set(range(256)) - set(_BLANKS.encode()))
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    letters = bytes_to_unicode()
    blanks = str.maketrans("", "", "".join(letters[byte] for byte in _BLANKS.encode()))
    # without a letter for the space its letters are characters, of which others than those of ASCII may be unknown
    several = 256 if letters[ord(" ")] in vocabulary else 128
    counted = [byte for byte in range(several) if letters[byte] in vocabulary and letters[byte].translate(blanks)]
    return max(len(token.translate(blanks)) for token in vocabulary), bytes(counted)


@lru_cache(maxsize=16)
def _appends_eos(tokenizer: Tokenizer, size: int) -> bool:  # noqa: ARG001  tokens may be added
    """Whether the tokenizer ends every text with EOS, which is then no part of a prompt."""
    return tokenizer.eos_token_id is not None and tokenizer("a").input_ids[-1:] == [tokenizer.eos_token_id]


@lru_cache(maxsize=16)
def _around(tokenizer: Tokenizer, size: int) -> tuple[list[int], list[int]]:
    """What the tokenizer puts before a text and after it, but for EOS."""
    made, own = (tokenizer("a", add_special_tokens=added).input_ids for added in (True, False))
    at = next(k for k in range(len(made)) if made[k : k + len(own)] == own)
    behind = made[at + len(own) :]
    return made[:at], behind[:-1] if _appends_eos(tokenizer, size) else behind
