"""Rewards of steps: a separator divides a completion, and each step gets a number where its last token stands.

What becomes of them is align.advantages.process's.
"""

from __future__ import annotations

from bisect import bisect_left
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from align.deferred import no_grad, torch
from align.jsons import Fields, Tokenizer
from align.models.pretrained import check_place
from align.models.weights import load_classifier
from align.rewards.base import Conversation, RewardHost, StepReward
from align.rewards.calls import FunctionReward
from align.rewards.model import batches, count_failures, positive_limit
from align.rewards.network import check_dtype

_NO_END = "step_end is empty: give the text behind each step at which the model is read"


@dataclass(frozen=True)
class Step:
    """A part of a completion."""

    text: str  # without the separator, and without white space at its ends
    end: int  # place of its last token in the completion; the next step's first token is the one behind it


class Splitter:
    """Completions of one tokenizer to their steps; never none, unless there is no token.

    A step ends at the token whose text completes the separator behind it, the last one at the last token, which is the
    end of turn if the policy ended by itself. White space alone is no step: its tokens belong to the next one, and at
    the end to the last. Steps that end in the same token are one. Cheng et al. 2025, PURE, arXiv 2504.15275; in
    CJReinforce/PURE@41f9363, branch main, only a single token can be a separator, white space can be a step, and the
    separator's token has no advantage.
    """

    def __init__(self, tokenizer: Tokenizer | None, separator: str):
        check_separator(separator)
        if tokenizer is None:
            raise ValueError("rewards of steps stand at the policy's tokens, and there is no policy here")
        self.tokenizer = tokenizer
        self.separator = separator
        self._texts: dict[int, str] = {}  # of single tokens

    def __call__(self, token_ids: Sequence[int]) -> list[Step]:
        """The steps of a completion, in order."""
        if not token_ids:
            return []
        *closed, rest = (text := self._decoded(token_ids)).split(self.separator)
        place = self._places(token_ids, text)
        last, read = len(token_ids) - 1, 0
        steps: list[Step] = []
        for piece in closed:
            read += len(piece) + len(self.separator)
            if piece.strip():
                self._add(steps, piece, place(read))
        if rest.strip() or not steps:
            self._add(steps, rest, last)
        else:
            steps[-1] = Step(steps[-1].text, last)
        return steps

    def _add(self, steps: list[Step], piece: str, end: int) -> None:
        if steps and steps[-1].end == end:
            piece = f"{steps.pop().text}{self.separator}{piece}"
        steps.append(Step(piece.strip(), end))

    def _places(self, token_ids: Sequence[int], text: str) -> Callable[[int], int]:
        """A function: number of characters, the last of them a separator's -> place of the token that completes them.

        Tokens whose texts together are the whole text are counted. Others are those that hold a part of a character or
        are written in another way at the beginning of a text; there growing parts of the completion are decoded.
        """
        pieces = [self._text(token) for token in token_ids]
        if "".join(pieces) == text:
            reached = np.cumsum([len(piece) for piece in pieces])
            return lambda read: int(np.searchsorted(reached, read))

        def place(read: int) -> int:
            start = text[:read]
            counts = range(1, len(token_ids))
            return bisect_left(counts, True, key=lambda n: self._decoded(token_ids[:n]).startswith(start))

        return place

    def _text(self, token: int) -> str:
        if token not in self._texts:
            self._texts[token] = self._decoded([token])
        return self._texts[token]

    def _decoded(self, token_ids: Sequence[int]) -> str:
        return self.tokenizer.decode(token_ids, skip_special_tokens=True)


def check_separator(separator: str) -> None:
    """Raises ValueError for an empty one."""
    if not separator:
        raise ValueError("separator is empty: give the text between two steps, such as a blank line")


class StepFunction(StepReward):
    """A function of the user's for each step, called in a process of its own as every reward function is.

    It is given what align.rewards.worker says, where the completion is a step: its text and its tokens, those of the
    separator and the end of turn included. Two names are columns: `steps`, the texts of all steps of the completion,
    for functions that ask for it without a default, and `step`, the place of this one from 0. It returns one number;
    called for all at once, one number for each step. A completion whose steps do not all have one has none. function:
    dotted path of a function or class; keys: its own; separator: see Splitter; seconds: deadline of a call.
    """

    in_process = True  # only the function is called elsewhere

    def __init__(self, host: RewardHost, *, function: str, keys: Fields | None, separator: str, seconds: float):
        self._split = Splitter(host.tokenizer, separator)
        self._reward = _started(function, keys, seconds, host.name, check=host.check, say=host.say)

    @classmethod
    def check_keys(
        cls,
        *,
        function: str,
        keys: Fields | None,
        separator: str,
        seconds: float,
        **others: object,  # noqa: ARG003
    ) -> None:
        """See RewardTarget. The function is imported, in its process."""
        check_separator(separator)
        _started(function, keys, seconds, "").close()

    @property
    def counts(self) -> dict[str, int]:
        """Of steps."""
        return self._reward.counts

    def steps(self, conversations: Sequence[Conversation]) -> list[np.ndarray]:
        """See StepReward."""
        split = [self._split(c.token_ids) for c in conversations]
        asked = [part for c, steps in zip(conversations, split, strict=True) for part in self._asked(c, steps)]
        numbers = self._reward(asked)
        borders = np.cumsum([len(steps) for steps in split])[:-1]
        parts = np.split(numbers, borders) if split else []
        return [
            placed(steps, part, len(c.token_ids)) for c, steps, part in zip(conversations, split, parts, strict=True)
        ]

    def _asked(self, conversation: Conversation, steps: Sequence[Step]) -> Iterator[Conversation]:
        # all texts with each step: what a long completion's steps send grows with the square of their number
        more = {"steps": [step.text for step in steps]} if "steps" in self._reward.required else {}
        first = 0
        for k, step in enumerate(steps):
            tokens = conversation.token_ids[first : step.end + 1]
            first = step.end + 1
            fields = {**conversation.fields, **more, "step": k}
            yield replace(conversation, completion=step.text, token_ids=tokens, fields=fields)

    def close(self) -> None:
        """End the process."""
        self._reward.close()


def _started(function: str, keys: Fields | None, seconds: float, name: str, **host: Any) -> FunctionReward:
    try:
        reward = FunctionReward(name, function, keys or {}, seconds=seconds, **host)
    except ValueError as error:  # it names _target_, which is this class here
        raise ValueError(f"function={function}: {str(error).partition(': ')[2]}") from error
    if reward.in_process:
        reward.close()
        raise ValueError(f"function={function}: runs in the trainer's process; use it as reward.NAME._target_")
    return reward


class ProcessRewardModel(StepReward):
    """A token classification model with two labels, wrong and right, in Hugging Face format with safetensors.

    Each step is followed by the text step_end, at whose last token the model is read: reward p(right) - p(wrong), in
    [-1, 1], computed in float32. Steps and step_end are tokenised one by one, behind the prompt: template=plain is the
    prompt's text (of a chat the last user message), chat is all its messages in the chat template of the model's own
    tokenizer, up to where an answer begins. dtype, max_tokens: as in align.rewards.model.RewardModel; what is too long
    or not finite costs a completion all its steps. separator: see Splitter.
    Cheng et al. 2025, PURE, arXiv 2504.15275; jinachris/PURE-PRM-7B is template=plain with a line feed as step_end.
    """

    in_process = True

    def __init__(
        self,
        host: RewardHost,
        *,
        path: str,
        revision: str | None,
        dtype: str,
        max_tokens: int,
        separator: str,
        template: str,
        step_end: str,
    ):
        self.check_keys(
            path=path, dtype=dtype, template=template, max_tokens=max_tokens, separator=separator, step_end=step_end
        )
        self.host = host
        self.template = template
        self.max_tokens = max_tokens
        self._split = Splitter(host.tokenizer, separator)
        self.tokenizer, self.model = _load(path, revision, dtype)
        if template == "chat" and not self.tokenizer.chat_template:
            raise ValueError(f"path={path}: its tokenizer has no chat template; use template=plain")
        self._end = self._tokens(step_end)
        if not self._end:
            raise ValueError(_NO_END)
        self.model.to(host.device).eval().requires_grad_(False)
        self.counts: dict[str, int] = Counter()

    @classmethod
    def check_keys(
        cls,
        *,
        path: str,
        dtype: str,
        template: str,
        max_tokens: int,
        separator: str,
        step_end: str,
        **others: object,  # noqa: ARG003
    ) -> None:
        """See RewardTarget."""
        check_place("path", path)
        check_dtype(dtype)
        if template not in ("plain", "chat"):
            raise ValueError(f"template={template}: must be plain or chat")
        positive_limit(max_tokens)
        check_separator(separator)
        if not step_end:
            raise ValueError(_NO_END)

    def steps(self, conversations: Sequence[Conversation]) -> list[np.ndarray]:
        """See StepReward."""
        split = [self._split(c.token_ids) for c in conversations]
        rows, ends = zip(*map(self._row, conversations, split), strict=True) if split else ((), ())
        numbers = self._numbers(rows, ends)
        return [
            placed(steps, part, len(c.token_ids)) for c, steps, part in zip(conversations, split, numbers, strict=True)
        ]

    def _row(self, conversation: Conversation, steps: Sequence[Step]) -> tuple[list[int], list[int]]:
        """Tokens, and the places where the model is read."""
        if self.template == "plain":
            row = list(self.tokenizer(conversation.prompt)["input_ids"])
        else:
            chat = conversation.messages or ({"role": "user", "content": conversation.prompt},)
            text = self.tokenizer.apply_chat_template(list(chat), tokenize=False, add_generation_prompt=True)
            row = self._tokens(text)  # the template has written what a sequence begins with
        ends = []
        for step in steps:
            row += self._tokens(step.text) + self._end
            ends.append(len(row) - 1)
        return row, ends

    def _tokens(self, text: str) -> list[int]:
        return list(self.tokenizer(text, add_special_tokens=False)["input_ids"])

    @no_grad
    def _numbers(self, rows: Sequence[list[int]], ends: Sequence[list[int]]) -> list[np.ndarray]:
        """Rewards at the ends of each row; NaN for rows that are too long or have one that is no number."""
        out = [np.full(len(places), np.nan) for places in ends]
        fitting = [i for i, row in enumerate(rows) if ends[i] and len(row) <= self.max_tokens]
        long = sum(len(row) > self.max_tokens for row in rows)
        if long:
            count_failures(self.counts, "too_long", long, f"longer than max_tokens={self.max_tokens}", self.host)
        assert self.model is not None, "closed"
        trunk, head = getattr(self.model, self.model.base_model_prefix), self.model.score
        bias = None if head.bias is None else head.bias.float()
        for part in batches(sorted(fitting, key=lambda i: (len(rows[i]), i)), rows, self.host.micro_batch_tokens):
            self.host.check()
            ids = torch.zeros((len(part), len(rows[part[-1]])), dtype=torch.long)
            mask = torch.zeros_like(ids)
            for k, i in enumerate(part):
                ids[k, : len(rows[i])] = torch.tensor(rows[i])
                mask[k, : len(rows[i])] = 1
            ids, mask = ids.to(self.host.device), mask.to(self.host.device)
            with self.host.autocast():
                states = trunk(input_ids=ids, attention_mask=mask, use_cache=False).last_hidden_state
            for k, i in enumerate(part):
                logits = torch.nn.functional.linear(states[k, ends[i]].float(), head.weight.float(), bias)
                # p(right) - p(wrong) of two labels
                out[i] = ((logits[:, 1] - logits[:, 0]) / 2).tanh().double().cpu().numpy()
        broken = sum(not np.isfinite(out[i]).all() for i in fitting)
        if broken:
            count_failures(self.counts, "not_finite", broken, "a reward of the model is no finite number", self.host)
        return out

    def close(self) -> None:
        """Give up the model's memory."""
        self.model = None


def placed(steps: Sequence[Step], numbers: np.ndarray, length: int) -> np.ndarray:
    """The numbers at the ends of their steps [length], NaN elsewhere; NaN everywhere if one of them is not finite."""
    row = np.full(length, np.nan)
    if np.isfinite(numbers).all():
        row[[step.end for step in steps]] = numbers
    return row


def _load(path: str, revision: str | None, dtype: str) -> tuple[Any, Any]:
    """Tokenizer and model. Raises ValueError for one without a trained linear head of two labels."""
    from transformers import AutoConfig, AutoModelForTokenClassification, AutoTokenizer

    from align.models.policy import own_attention_name

    common = {"revision": revision, "trust_remote_code": False}
    config = AutoConfig.from_pretrained(path, **common)
    if config.num_labels != 2:
        raise ValueError(
            f"path={path}: has {config.num_labels} labels, a process reward model has two, wrong and right"
        )
    tokenizer = AutoTokenizer.from_pretrained(path, **common)
    model = load_classifier(AutoModelForTokenClassification, path, revision, dtype)
    if not isinstance(getattr(model, "score", None), torch.nn.Linear):  # an encoder would see what follows a step
        raise ValueError(f"path={path}: {type(model).__name__} reads both ways; a decoder such as Qwen2 is needed here")
    model.config._attn_implementation = own_attention_name(model)
    return tokenizer, model
