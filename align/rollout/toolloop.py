"""Many conversations with a tool in lock-step: the policy writes, calls are run, it writes on.

What the policy emitted is kept as its tokens and never tokenised again; between its emissions stand the tokens that
the chat template puts there. Texts are a view of the tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from typing import Literal

from align.data import chat
from align.data.sources import BadRow
from align.jsons import Json, Tokenizer
from align.rollout.base import Completion, Rollout, Sampling
from align.tools import Observation, Tool

Message = Json
SpanRow = tuple[str, int, int, bool]  # role, start, end, whether the policy wrote it in this trajectory
End = Literal["answer", "length", "turns", "room"]


@dataclass(frozen=True)
class Trajectory:
    """A conversation with a tool, token for token.

    Roles of spans: template, system, user, assistant, tool; observations are tool whatever chat role carried them.
    """

    token_ids: tuple[int, ...]
    spans: tuple[SpanRow, ...]  # tile token_ids
    messages: tuple[Message, ...]  # the prompt's, then alternately the policy's and observations
    num_prompt_messages: int
    logps: tuple[float, ...] | None  # one per target, temperature 1; None where the rollout does not tell
    # answer: the policy gave its final answer. length: an emission hit max_new_tokens. turns: it called the tool in
    # its last turn. room: the next turn might not fit into max_tokens.
    end: End
    num_turns: int  # emissions
    tool_errors: int  # calls that failed
    last_call_failed: bool

    @property
    def finished(self) -> bool:
        """Whether it holds a final answer."""
        return self.end == "answer"

    @property
    def answer(self) -> str:
        """Text of the last emission."""
        return self.messages[-1]["content"] if self.messages[-1]["role"] == "assistant" else ""


@dataclass
class _Open:
    """A trajectory while it is written."""

    messages: list[Message]
    token_ids: list[int]
    spans: list[SpanRow]
    logps: list[float] | None = field(default_factory=list)
    num_prompt_messages: int = 0
    num_turns: int = 0
    tool_errors: int = 0
    last_call_failed: bool = False
    end: End | None = None

    def add(self, role: str, ids: Sequence[int], target: bool = False) -> None:
        start, end = len(self.token_ids), len(self.token_ids) + len(ids)
        if self.spans and self.spans[-1][0] == role == "template":
            start = self.spans.pop()[1]
        if start < end:
            self.spans.append((role, start, end, target))
            self.token_ids += ids


class ToolLoop:
    """Runs conversations with one tool.

    max_turns: emissions of a conversation at most, >= 1; a call in the last of them is not run. max_tokens: a
    conversation that another emission could make longer ends. stop: texts that end an emission besides its end of
    turn, such as the header of an observation that the policy starts to make up. role: the chat role of
    observations, user for the fenced protocol. workers: calls run at the same time.
    """

    def __init__(
        self,
        rollout: Rollout,
        tokenizer: Tokenizer,
        tool: Tool,
        *,
        max_turns: int,
        max_tokens: int,
        stop: Sequence[str] = ("```output",),
        role: Literal["user", "tool"] = "user",
        workers: int = 2,
    ):
        if max_turns < 1:
            raise ValueError(f"max_turns={max_turns}: must be at least 1")
        self.rollout = rollout
        self.tokenizer = tokenizer
        self.tool = tool
        self.max_turns = max_turns
        self.max_tokens = max_tokens
        self.stop = tuple(stop)
        self.role = role
        self.workers = workers

    def run(self, prompts: Sequence[Sequence[Message]], sampling: Sampling, n: int = 1) -> list[list[Trajectory]]:
        """n trajectories from each prompt, in order; sampling.stop is added to. The draws of each turn have a seed
        of their own, and a conversation's draws in it depend on its place among those still open."""
        sampling = replace(sampling, stop=(*self.stop, *sampling.stop))
        started = [self._start(prompt) for prompt in prompts]
        for state, prompt in zip(started, prompts, strict=True):
            if len(state.token_ids) + sampling.max_new_tokens > self.max_tokens:
                raise ValueError(
                    f"a prompt of {len(state.token_ids)} tokens leaves no room for {sampling.max_new_tokens} more in "
                    f"max_tokens={self.max_tokens}: {prompt[-1]['content'][:80]!r}"
                )
        drawn = self.generate([s.token_ids for s in started], sampling.at(0), n)
        groups = [[self._copy(state) for _ in range(n)] for state in started]
        self._turn([(s, c) for group, row in zip(groups, drawn, strict=True) for s, c in zip(group, row, strict=True)])
        everything = [state for group in groups for state in group]
        for turn in range(1, self.max_turns):
            for state in everything:
                if state.end is None and len(state.token_ids) + sampling.max_new_tokens > self.max_tokens:
                    state.end = "room"
            going = [state for state in everything if state.end is None]
            if not going:
                break
            drawn = self.generate([s.token_ids for s in going], sampling.at(turn))
            self._turn([(state, row[0]) for state, row in zip(going, drawn, strict=True)])
        return [[_close(state) for state in group] for group in groups]

    def generate(self, prompts: Sequence[Sequence[int]], sampling: Sampling, n: int = 1) -> list[list[Completion]]:
        """The rollout's draws of a turn."""
        return self.rollout.generate(prompts, sampling, n)

    def observe(self, calls: Sequence[str]) -> list[Observation]:
        """What the tool says to each call, several at the same time."""
        with ThreadPoolExecutor(self.workers) as pool:
            return list(pool.map(self.tool.run, calls))

    def _start(self, prompt: Sequence[Message]) -> _Open:
        state = _Open(list(prompt), [], [], num_prompt_messages=len(prompt))
        ids = chat.prompt_ids(self.tokenizer, prompt)
        rendering = chat.render(self.tokenizer, prompt, first_target=len(prompt))
        known = len(rendering.row.token_ids)
        if ids[:known] == rendering.row.token_ids.tolist():
            for span in rendering.spans:
                state.add(span.role, ids[span.start : span.end])
        state.add("template", ids[len(state.token_ids) :])
        return state

    @staticmethod
    def _copy(state: _Open) -> _Open:
        return _Open(
            list(state.messages), list(state.token_ids), list(state.spans), num_prompt_messages=len(state.messages)
        )

    def _turn(self, drawn: Sequence[tuple[_Open, Completion]]) -> None:
        """Append emissions, run the calls in them and append what came of it."""
        calls: list[tuple[_Open, Completion, str]] = []
        for state, completion in drawn:
            text = self.tokenizer.decode(completion.token_ids, skip_special_tokens=True)
            state.add("assistant", completion.token_ids, target=True)
            state.messages.append({"role": "assistant", "content": text})
            state.num_turns += 1
            if state.logps is not None:
                state.logps = None if completion.logps is None else state.logps + list(completion.logps)
            call = self.tool.find(text)
            if not completion.finished:
                state.end = "length"
            elif call is None:
                state.end = "answer"
            elif state.num_turns == self.max_turns:
                state.end = "turns"
            else:
                calls.append((state, completion, call))
        # A call that several conversations make in the same words is run once.
        unique = list(dict.fromkeys(call for _, _, call in calls))
        answers = dict(zip(unique, self.observe(unique), strict=True))
        for state, completion, call in calls:
            self._observe(state, completion.stop == "end", answers[call])

    def _observe(self, state: _Open, ended: bool, observation: Observation) -> None:
        state.tool_errors += observation.error
        state.last_call_failed = observation.error
        text = f"```output\n{observation.text}\n```"
        if state.num_turns == self.max_turns - 1:
            text += "\nNo more programs can be run. Give the final answer now."

        def between(content: str) -> list[int]:
            new = [{"role": self.role, "content": content}]
            return chat.between_turns(self.tokenizer, state.messages, new, ended=ended)

        ids, other = between(text), between("x")
        head = _common(ids, other)
        tail = _common(ids[head:][::-1], other[head:][::-1])
        state.add("template", ids[:head])
        state.add("tool", ids[head : len(ids) - tail])
        state.add("template", ids[len(ids) - tail :])
        state.messages.append({"role": self.role, "content": text})


def re_encodes(tokenizer: Tokenizer, trajectory: Trajectory) -> bool:
    """Whether the messages, rendered anew, have the tokens that were emitted: a diagnostic, nothing depends on it."""
    try:
        rendering = chat.render(
            tokenizer,
            trajectory.messages,
            first_target=trajectory.num_prompt_messages,
            finished=trajectory.finished,
        )
    except BadRow:  # a policy may write what no template renders
        return False
    return tuple(rendering.row.token_ids.tolist()) == trajectory.token_ids


def _close(state: _Open) -> Trajectory:
    assert state.end is not None
    return Trajectory(
        tuple(state.token_ids),
        tuple(state.spans),
        tuple(state.messages),
        state.num_prompt_messages,
        None if state.logps is None else tuple(state.logps),
        state.end,
        state.num_turns,
        state.tool_errors,
        state.last_call_failed,
    )


def _common(a: Sequence[int], b: Sequence[int]) -> int:
    n = 0
    while n < min(len(a), len(b)) and a[n] == b[n]:
        n += 1
    return n
