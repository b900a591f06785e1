"""data.gold: the score of answers to held-out prompts, by a function that is called as one of a reward is, here.

What a function may ask for is rewards/worker.py's.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from align.config import Config
from align.jsons import Tokenizer
from align.rewards.base import Conversation
from align.rewards.worker import Refused, bound, call_all, call_each

if TYPE_CHECKING:
    from align.data.prompts import PromptRow

Answered = tuple[tuple[int, ...], str, str, bool]  # tokens of the prompt, its text, the answer, whether it was finished


class Gold:
    """A score for each answer. Raises ValueError for a path that names nothing which can be called so."""

    def __init__(self, path: str):
        self._key = f"data.gold={path}"
        try:
            self._function, self._signature = bound(path, {})
        except Refused as error:
            raise ValueError(f"{self._key}: {error}") from error
        self.columns = self._signature.required  # that each held-out row must have

    @property
    def asks_rows(self) -> bool:
        """Whether it reads more than prompt and answer."""
        asked = {attribute for _, attribute in self._signature.offered}
        rows = bool(self.columns or self._signature.optional or self._signature.rest or "messages" in asked)
        return rows or self._signature.style == "conversations"

    def __call__(self, answered: Iterable[Answered], rows: Mapping[tuple[int, ...], PromptRow]) -> list[float]:
        """Scores in their order. rows: the held-out ones by the tokens of their prompts, where it asks for them.

        Raises ValueError for an answer that has no score.
        """
        asked = [self._conversation(one, rows.get(one[0])) for one in answered]
        if self._signature.style == "each":
            found = [call_each(self._function, self._signature, conversation) for conversation in asked]
        else:
            every = call_all(self._function, self._signature, asked)
            found = every if isinstance(every, list) else [every] * len(asked)
        return [self._score(answer, one) for answer, one in zip(found, asked, strict=True)]

    def _conversation(self, one: Answered, row: PromptRow | None) -> Conversation:
        ids, prompt, text, finished = one
        made = Conversation(prompt, text, finished, prompt_ids=ids)
        if row is not None:
            made = replace(made, messages=row.messages, fields=row.fields)
        lacking = [name for name in self.columns if name not in made.fields]
        if lacking:
            raise ValueError(
                f"{self._key}: asks for the column {lacking[0]}, which the row of the held-out prompt {prompt[:60]!r} "
                "lacks; give it, or use a function of prompt, completion and finished"
            )
        return made

    def _score(self, answer: float | tuple[str, str], one: Conversation) -> float:
        if isinstance(answer, tuple):
            said = ": ".join(answer)
            raise ValueError(f"{self._key}: no score for {one.completion[:60]!r} ({said}); mend it")
        return answer


def heldout_rows(config: Config, tokenizer: Tokenizer) -> Mapping[tuple[int, ...], PromptRow]:
    """The rows of what is held out by the tokens of their prompts, with the columns that training does not read."""
    from align.data.prompts import load_prompts  # for functions that ask alone

    # what training leaves out has no answers here, so that nothing is refused again
    data = replace(config.data, on_bad_row="drop", max_bad_fraction=1.0, overlong="drop", repeat=None)
    if data.heldout is not None:
        data = replace(data, train=data.heldout, heldout=None, heldout_fraction=0.0)
        rows: Sequence[PromptRow] = load_prompts(data, tokenizer, 0, config.seed).train
    else:
        rows = load_prompts(data, tokenizer, 0, config.seed).heldout
    return {row.token_ids: row for row in reversed(rows)}  # of a prompt that stands twice the first
