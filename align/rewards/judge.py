"""Rewards by a judge: a model that compares a completion with another answer to its prompt, in both orders.

How a judge is asked and how its verdict is read is align.prepare.judgements'.
"""

from __future__ import annotations

import json
import math
import queue
import time
from abc import abstractmethod
from collections import Counter, deque
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from align.data.chat import prompt_ids, stop_ids
from align.data.sources import BadRow
from align.jsons import Json
from align.models.pretrained import check_place, from_hub
from align.models.weights import check_tokens
from align.prepare.judgements import Verdicts, answer_text, prompt_text, template
from align.rewards.base import Conversation, Reward, RewardHost
from align.rewards.network import check_dtype
from align.rewards.remote import TICK, TRANSIENT, Call, RemoteReward
from align.rollout.base import Host, Sampling

if TYPE_CHECKING:
    from align.rollout.hf import HFRollout

_BYTES_PER_TOKEN = 64  # of a judgement in JSON, beside a mebibyte for the rest
# What a verdict is worth to the answer that is shown first.
_WORTH = {"A": 1.0, "B": 0.0, "C": 0.5}


@dataclass(frozen=True)
class _Comparison:
    """Two answers to a prompt: a completion, and another one or a baseline."""

    prompt: str
    answers: tuple[str, str]
    places: tuple[int, ...]  # of those answers that are completions, among the conversations


class _Judge(Reward):
    """Asks about each comparison twice, with either answer first: 1, 0.5 (a tie) or 0 each time, and the mean of both.

    baseline: column with the answer that each completion meets, a text or messages (what the assistant says there).
    None: completions of a prompt meet one another, each up to max_opponents (None: all) others going round in the
    order in which they stand, and have the mean of their comparisons; the greedy completion is one of them where a
    trainer draws it. Equal texts are a tie without a question. A comparison of which one judgement has no verdict has
    no result: the other one alone would be worth what the position is worth. counts: judgements by reason, among them
    cut and unparsable; completions (alone, missing_column, bad_column); and `inconsistent`, comparisons whose winner
    changes with the order, which keep their score.
    """

    in_process = True

    def __init__(
        self,
        host: RewardHost,
        baseline: str | None,
        max_opponents: int | None,
        template_: str,
        pattern: str,
        max_new_tokens: int,
    ):
        _Judge.check_keys(
            max_opponents=max_opponents, template=template_, pattern=pattern, max_new_tokens=max_new_tokens
        )
        self.host = host
        self.baseline = baseline
        self.max_opponents = max_opponents
        self.template = template(template_)
        self.verdicts = Verdicts(pattern)
        self.max_new_tokens = max_new_tokens
        self.counts: dict[str, int] = Counter()

    @classmethod
    def check_keys(cls, **keys: Any) -> None:
        """See RewardTarget. keys: max_opponents, max_new_tokens, template and pattern among them."""
        max_opponents, max_new_tokens = keys["max_opponents"], keys["max_new_tokens"]
        if max_opponents is not None and max_opponents < 2:
            raise ValueError(f"max_opponents={max_opponents}: must be at least 2, or null for all")
        if max_new_tokens < 1:
            raise ValueError(f"max_new_tokens={max_new_tokens}: must be at least 1")
        template(keys["template"])
        Verdicts(keys["pattern"])

    def __call__(self, conversations: Sequence[Conversation]) -> np.ndarray:
        """See Reward. In [0, 1]: the part of comparisons that a completion wins."""
        comparisons = self._against_baseline(conversations) if self.baseline else self._among(conversations)
        asked = [c for c in comparisons if c.answers[0] != c.answers[1]]
        judgements = iter(
            self._judgements([self.template.fill(c.prompt, *answers) for c in asked for answers in _orders(c.answers)])
        )
        results: list[list[float]] = [[] for _ in conversations]
        for comparison in comparisons:
            score: float | None = 0.5
            if comparison.answers[0] != comparison.answers[1]:
                score = self._result(next(judgements), next(judgements))
            if score is not None:
                for place, own in zip(comparison.places, (score, 1 - score), strict=False):
                    results[place].append(own)
        return np.array([np.mean(own) if own else math.nan for own in results], dtype=np.float64)

    @abstractmethod
    def close(self) -> None:
        """Give up memory."""

    @abstractmethod
    def _judgements(self, questions: Sequence[str]) -> list[str | None]:
        """What the judge wrote, None where nothing came to its end; that is counted."""

    def _result(self, forward: str | None, swapped: str | None) -> float | None:
        """Of the first answer; swapped: the judgement that saw it as B."""
        worths = []
        for judgement in (forward, swapped):
            verdict = None if judgement is None else self.verdicts(judgement)
            if judgement is not None and verdict is None:
                self._failed("unparsable", f"its last line is no verdict: {' '.join(judgement[-80:].split())!r}")
            worths.append(None if verdict is None else _WORTH[verdict])
        if worths[0] is None or worths[1] is None:
            return None
        if worths[0] != 1 - worths[1]:
            self.counts["inconsistent"] = self.counts.get("inconsistent", 0) + 1
        return (worths[0] + 1 - worths[1]) / 2

    def _against_baseline(self, conversations: Sequence[Conversation]) -> list[_Comparison]:
        found = []
        for place, c in enumerate(conversations):
            baseline = c.fields.get(self.baseline)  # type: ignore[arg-type]
            if baseline is None:
                self._failed("missing_column", f"the prompt's row has no {self.baseline}")
                continue
            try:
                answer = answer_text(baseline)
            except (TypeError, KeyError, AttributeError):
                self._failed("bad_column", f"{self.baseline} is neither a text nor a list of messages")
                continue
            found.append(_Comparison(_prompt(c), (c.completion, answer), (place,)))
        return found

    def _among(self, conversations: Sequence[Conversation]) -> list[_Comparison]:
        groups: dict[object, list[int]] = {}
        for place, c in enumerate(conversations):
            groups.setdefault((c.prompt_ids, _prompt(c)), []).append(place)
        found = []
        for places in groups.values():
            if len(places) == 1:
                self._failed("alone", "a prompt with one completion has none to compare it with; set baseline")
            for i, j in rounds(len(places), self.max_opponents):
                one, other = conversations[places[i]], conversations[places[j]]
                found.append(_Comparison(_prompt(one), (one.completion, other.completion), (places[i], places[j])))
        return found

    def _failed(self, reason: str, message: str, say: bool = True) -> None:
        if say and reason not in self.counts:
            self.host.say(f"judge: no score ({reason}: {message}); said once, then counted")
        self.counts[reason] = self.counts.get(reason, 0) + 1


def rounds(size: int, max_opponents: int | None) -> list[tuple[int, int]]:
    """Who meets whom, each two once: everyone meets equally many others, at most max_opponents (>= 2).

    Of more, those that stand nearest going round; with an odd max_opponents and an odd size one fewer.
    """
    most = size - 1 if max_opponents is None else min(max_opponents, size - 1)
    steps = list(range(1, most // 2 + 1))
    pairs = [(i, (i + step) % size) for step in steps for i in range(size)]
    if most % 2 and size % 2 == 0:  # the one across
        pairs += [(i, i + size // 2) for i in range(size // 2)]
    return pairs


def _prompt(conversation: Conversation) -> str:
    return conversation.prompt if conversation.messages is None else prompt_text(conversation.messages)


def _orders(answers: tuple[str, str]) -> tuple[tuple[str, str], tuple[str, str]]:
    return answers, (answers[1], answers[0])


class EndpointJudge(_Judge):
    """A judge behind POST url/chat/completions, as vllm serve and other OpenAI-compatible servers have it.

    Asked with temperature 0, `concurrency` requests at a time. Deadline, repetitions and token are as in
    align.rewards.remote.RemoteReward. When as many requests in a row as stand at a time found nobody or came too late,
    the rest of a scoring is not_tried: each would wait as long. See _Judge for the scores.
    """

    def __init__(
        self,
        host: RewardHost,
        *,
        url: str,
        model: str | None,
        seconds: float,
        baseline: str | None,
        max_opponents: int | None,
        template: str,
        pattern: str,
        max_new_tokens: int,
        concurrency: int,
        retries: int,
        backoff_s: float,
        token_variable: str | None,
    ):
        super().__init__(host, baseline, max_opponents, template, pattern, max_new_tokens)
        _check_concurrency(concurrency)
        self.model = model
        self.concurrency = concurrency
        self._link = RemoteReward(
            host,
            url=_completions(url),
            seconds=seconds,
            batch_size=1,
            retries=retries,
            backoff_s=backoff_s,
            token_variable=token_variable,
        )

    @classmethod
    def check_keys(cls, **keys: Any) -> None:
        """See RewardTarget."""
        super().check_keys(**keys)
        _check_concurrency(keys["concurrency"])
        RemoteReward.check_keys(**keys | {"url": _completions(keys["url"]), "batch_size": 1})

    def _judgements(self, questions: Sequence[str]) -> list[str | None]:
        work = _Work(len(questions))
        try:
            while work.open:
                self.host.check()
                self._start(work, questions)
                for request in self._wait(work):
                    self._take(work, request)
        finally:
            for request in work.active:
                request.hang_up()
        return work.out

    def close(self) -> None:
        """Nothing is held."""

    def _start(self, work: _Work, questions: Sequence[str]) -> None:
        """Send what is due, as far as the number of requests at a time goes."""
        if work.lost_in_a_row >= self.concurrency:
            for _ in work.todo:
                self._failed("not_tried", "the server did not answer the ones before")
            work.todo.clear()
        now = time.monotonic()
        due = (task for task in work.todo if task[2] <= now)
        for task in list(islice(due, self.concurrency - len(work.active))):
            work.todo.remove(task)
            body: Json = {} if self.model is None else {"model": self.model}
            body |= {
                "messages": [{"role": "user", "content": questions[task[0]]}],
                "temperature": 0.0,
                "max_tokens": self.max_new_tokens,
            }
            largest = (1 << 20) + self.max_new_tokens * _BYTES_PER_TOKEN
            request = _Request(self._link, json.dumps(body).encode(), largest, task[:2], work.ended)
            work.active.append(request)
            request.start()

    def _wait(self, work: _Work) -> list[_Request]:
        """Requests that ended by now or are too late; not for longer than to the next look at signals."""
        now = time.monotonic()
        moments = [request.deadline for request in work.active]
        if len(work.active) < self.concurrency:
            moments += [due for _, _, due in work.todo]
        if not moments:
            return []
        try:
            ended = [work.ended.get(timeout=max(0.0, min(TICK, min(moments) - now)))]
        except queue.Empty:
            ended = [request for request in work.active if request.deadline <= time.monotonic()]
        return [request for request in ended if request in work.active]

    def _take(self, work: _Work, request: _Request) -> None:
        work.active.remove(request)
        number, attempt = request.task
        late = request.is_alive() and request.deadline <= time.monotonic()
        request.hang_up()
        text, reason, message, again = _read(request, self._link.seconds, late)
        if reason and again and attempt < self._link.retries:
            self._failed("retried", message, say=False)
            work.todo.append((number, attempt + 1, time.monotonic() + self._link.backoff_s * 2**attempt))
            return
        work.lost_in_a_row = work.lost_in_a_row + 1 if reason in ("unreachable", "timeout") else 0
        work.out[number] = text
        if reason:
            self._failed(reason, f"{self._link.parts.netloc}: {message}")


def _check_concurrency(concurrency: int) -> None:
    if concurrency < 1:
        raise ValueError(f"concurrency={concurrency}: must be at least 1")


def _completions(url: str) -> str:
    return f"{url.rstrip('/')}/chat/completions"


@dataclass
class _Work:
    """The requests of a scoring."""

    size: int
    out: list[str | None] = field(init=False)
    todo: deque[tuple[int, int, float]] = field(init=False)  # number, attempts before, not before this moment
    active: list[_Request] = field(default_factory=list)
    ended: queue.SimpleQueue[_Request] = field(default_factory=queue.SimpleQueue)
    lost_in_a_row: int = 0

    def __post_init__(self) -> None:
        self.out = [None] * self.size
        self.todo = deque((number, 0, 0.0) for number in range(self.size))

    @property
    def open(self) -> bool:
        """Whether something is to be sent or waited for."""
        return bool(self.todo or self.active)


class _Request(Call):
    """A question on its way; it reports its end."""

    def __init__(self, link: RemoteReward, body: bytes, largest: int, task: tuple[int, int], ended: queue.SimpleQueue):
        super().__init__(link, body, largest)
        self.task = task
        self.ended = ended
        self.deadline = time.monotonic() + link.seconds

    def run(self) -> None:
        """See Call."""
        super().run()
        self.ended.put(self)


def _read(request: _Request, seconds: float, late: bool) -> tuple[str | None, str, str, bool]:
    """Judgement; reason without one, in words, and whether another attempt may end otherwise."""
    if late:
        return None, "timeout", f"no answer within {seconds:g} s", True
    if request.error is not None:
        return None, "unreachable", f"{type(request.error).__name__}: {request.error}"[:300], True
    if request.status != 200:
        said = " ".join(request.body[:300].decode(errors="replace").split())
        again = request.status in TRANSIENT
        return None, f"http_{request.status}", f"status {request.status} {said}".strip(), again
    try:
        choice = json.loads(request.body)["choices"][0]
        text, ended = choice["message"]["content"], choice["finish_reason"]
    except (ValueError, TypeError, KeyError, IndexError, RecursionError):
        return None, "bad_answer", "the answer is no chat completion", False
    if ended == "length":
        return None, "cut", "the judgement is longer than max_new_tokens", False
    if not isinstance(text, str):
        return None, "bad_answer", "the message of the answer has no text", False
    return text, "", "", False


class ModelJudge(_Judge):
    """A judge in the trainer's process: a causal language model in Hugging Face format with a chat template.

    It writes greedily. max_tokens: a question that does not fit with max_new_tokens is not asked (too_long). dtype:
    auto (as stored), float32 or bfloat16. See _Judge for the scores.
    """

    def __init__(
        self,
        host: RewardHost,
        *,
        path: str,
        revision: str | None,
        dtype: str,
        baseline: str | None,
        max_opponents: int | None,
        template: str,
        pattern: str,
        max_new_tokens: int,
        max_tokens: int,
        batch_size: int,
    ):
        from align.models.policy import Policy
        from align.rollout.hf import HFRollout

        super().__init__(host, baseline, max_opponents, template, pattern, max_new_tokens)
        _check_model(path, dtype, max_tokens, max_new_tokens, batch_size)
        self.max_tokens = max_tokens
        pretrained = from_hub(path, revision, False, False, None, dtype)
        self.tokenizer = pretrained.tokenizer()
        if not self.tokenizer.chat_template:
            raise ValueError(f"path={path}: its tokenizer has no chat template; put a chat_template.jinja beside it")
        model = pretrained.model().to(host.device).eval().requires_grad_(False)
        with suppress(BadRow):  # what its template cannot write is counted when it is asked
            asked = [prompt_ids(self.tokenizer, [{"role": "user", "content": "?"}])]
            asked.append(stop_ids(self.tokenizer, model.generation_config))
            check_tokens(f"path={path}", self.tokenizer, model.get_input_embeddings().weight.shape[0], asked)
        precision = str(model.dtype).removeprefix("torch.")
        inner = Host(
            Policy(model, "padded").eval(),
            self.tokenizer,
            Path(),  # nothing is written
            precision,
            autocast=host.autocast,
            check=host.check,
            say=host.say,
        )
        self._rollout: HFRollout | None = HFRollout(inner, batch_size=batch_size)

    @classmethod
    def check_keys(cls, **keys: Any) -> None:
        """See RewardTarget."""
        super().check_keys(**keys)
        _check_model(*(keys[name] for name in ("path", "dtype", "max_tokens", "max_new_tokens", "batch_size")))

    def _judgements(self, questions: Sequence[str]) -> list[str | None]:
        assert self._rollout is not None
        out: list[str | None] = [None] * len(questions)
        rows: dict[int, list[int]] = {}
        for number, question in enumerate(questions):
            try:
                ids = prompt_ids(self.tokenizer, [{"role": "user", "content": question}])
            except BadRow as bad:  # text that its template cannot write
                self._failed(bad.reason, str(bad))
                continue
            if len(ids) + self.max_new_tokens > self.max_tokens:
                self._failed("too_long", f"a question has {len(ids)} tokens; with max_new_tokens more than max_tokens")
            else:
                rows[number] = ids
        if not rows:
            return out
        written = self._rollout.generate(list(rows.values()), Sampling(self.max_new_tokens, temperature=0.0))
        for number, (completion,) in zip(rows, written, strict=True):
            if completion.finished:
                out[number] = self.tokenizer.decode(completion.token_ids, skip_special_tokens=True)
            else:
                self._failed("cut", "the judgement is longer than max_new_tokens")
        return out

    def close(self) -> None:
        """Give up the model's memory."""
        self._rollout = None


def _check_model(path: str, dtype: str, max_tokens: int, max_new_tokens: int, batch_size: int) -> None:
    if max_tokens <= max_new_tokens:
        raise ValueError(f"max_tokens={max_tokens}: must be greater than max_new_tokens={max_new_tokens}")
    if batch_size < 1:
        raise ValueError(f"batch_size={batch_size}: must be at least 1")
    check_dtype(dtype)
    check_place("path", path)
