"""A rollout that says what a test wants it to say: no network, real tokens."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from align.models.pretrained import byte_tokenizer
from align.rollout.base import Completion, Sampling

END = "<|im_end|>"


class Scripted:
    """Answers each prompt by `say(prompt text, sample)`: what is written, its end of turn included if there is one.

    A text longer than the limit is cut as a network's would be; one with a stop text is cut after it.
    """

    def __init__(self, say: Callable[[str, int], str]):
        self.tokenizer = byte_tokenizer()
        self.say = say
        self.calls: list[tuple[int, int, Sampling]] = []  # prompts, n, sampling of each call

    def generate(
        self, prompts: Sequence[Sequence[int]], sampling: Sampling, n: int = 1, greedy: bool = False
    ) -> list[list[Completion]]:
        assert not greedy
        self.calls.append((len(prompts), n, sampling))
        return [[self._one(self.tokenizer.decode(p), k, sampling) for k in range(n)] for p in prompts]

    def sync(self, _: Any) -> None:
        raise AssertionError("nothing to sync")

    def close(self) -> None:
        pass

    def _one(self, prompt: str, k: int, sampling: Sampling) -> Completion:
        text = self.say(prompt, k)
        stop = "end" if text.endswith(END) else "length"
        for word in sampling.stop:
            if word in text:
                text, stop = text[: text.index(word) + len(word)], "string"
        ids = tuple(self.tokenizer(text, add_special_tokens=False).input_ids)
        if len(ids) > sampling.max_new_tokens:
            ids, stop = ids[: sampling.max_new_tokens], "length"
        return Completion(ids, stop, tuple(-0.25 for _ in ids))
