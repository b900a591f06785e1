"""Search trees over reasoning steps, and preference pairs of single steps from them: MCTS-DPO.

Xie et al. 2024, arXiv 2405.00451. The search asks two callables, one that proposes steps and one that values what
was written so far, so it runs with any sampler. A tree is plain JSON; its pairs are rows for formats.py.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from align.data.formats import Message
from align.data.pairs import write_lines
from align.data.sources import BadRow, locate, read
from align.jsons import Json

Prompt = str | Sequence[Message]


@dataclass(frozen=True)
class Step:
    """A proposed continuation of what was written so far."""

    text: str
    logp: float  # nats, summed over its tokens
    num_tokens: int  # at least 1
    done: bool  # whether the answer ends here; the end of turn is no part of the text


Propose = Callable[[Prompt, tuple[str, ...], int, np.random.Generator], Sequence[Step]]  # prompt, steps so far, count
Value = Callable[[Prompt, tuple[str, ...], bool], float]  # prompt, steps so far, whether the answer is done


@dataclass(frozen=True)
class Node:
    """A step of the tree with what the search found out about it.

    Of a step that the search decided on, q, v and visits are those at the decision, as its siblings' are.
    """

    text: str  # "" at the root
    q: float  # gain of value over the parent, now and later
    visits: int
    value: float = 0.0  # of everything written up to here, by the value function; 0 at the root
    v: float = 0.0  # mean q of the children, by visits
    prior: float = 0.0  # probability of the step, length-normalised
    done: bool = False
    children: tuple[Node, ...] = ()

    def as_dict(self) -> Json:
        """For JSON; tree_of reads it."""
        return {
            "text": self.text,
            "Q": self.q,
            "V": self.v,
            "visits": self.visits,
            "value": self.value,
            "prior": self.prior,
            "done": self.done,
            "children": [child.as_dict() for child in self.children],
        }


@dataclass(frozen=True)
class Tree:
    """The search of one prompt."""

    prompt: Prompt
    root: Node

    def as_dict(self) -> Json:
        """A line of a file of trees."""
        return {"prompt": self.prompt, "root": self.root.as_dict()}


@dataclass(frozen=True)
class Search:
    """Monte Carlo tree search by PUCT that decides on one step after the other.

    Select: the child with the largest Q + exploration * prior * sqrt(N parent) / (1 + N), the first on ties, where
    prior = exp(logp / num_tokens ** length_power). Expand every new node on the way, down to the end of the answer
    or `depth` steps. A new node has Q = value - value of its parent. Back up once per iteration, from the end:
    Q = value - value of the parent + gamma V, V = sum max(1, N_c) Q_c / sum max(1, N_c) over the children, N + 1.
    After the iterations the most visited child is the next step (ties: larger Q, then V, then the first), and the
    search goes on below it, keeping what it knows.

    The paper's scripts: actions 2, root_actions 2, iterations 64, root_iterations 256, depth 3, exploration 1,
    length_power 1.25, gamma 1. The authors' code also backs up after each expansion on the way, which counts the
    upper nodes several times per iteration, and adds a diversity bonus to the decision; this does neither.
    """

    actions: int  # steps proposed at a node
    root_actions: int  # steps proposed for the first step
    iterations: int  # per decision
    root_iterations: int  # for the first decision
    depth: int  # steps an iteration looks ahead
    max_steps: int  # of an answer; the search stops there
    exploration: float
    length_power: float
    gamma: float

    def __post_init__(self) -> None:
        for key in ("actions", "root_actions", "iterations", "root_iterations", "depth", "max_steps"):
            if getattr(self, key) < 1:
                raise ValueError(f"search.{key}={getattr(self, key)}: must be at least 1")
        if self.exploration < 0 or not 0 < self.gamma <= 1:
            raise ValueError(
                f"search.exploration={self.exploration}, search.gamma={self.gamma}: must be at least 0, and in (0, 1]"
            )

    def __call__(self, prompt: Prompt, propose: Propose, value: Value, seed: int) -> Tree:
        """The tree of one prompt. The only randomness is the generator handed to `propose`.

        At most max_steps decisions, and root_iterations + (max_steps - 1) * iterations iterations.
        """
        rng = np.random.default_rng(seed)
        root = _Open("", 0.0, 0.0, False)
        node, steps = root, ()
        for number in range(self.max_steps):
            for _ in range(self.iterations if number else self.root_iterations):
                self._iterate(node, steps, lambda s: self._expand(prompt, s, propose, value, rng))
            if not node.children:
                break
            for child in node.children:
                child.decided = (child.q, child.v, child.visits)
            node = node.children[_decision([(c.q, c.v, c.visits) for c in node.children])]
            steps = (*steps, node.text)
            if node.done:
                break
        return Tree(prompt, root.frozen())

    def _iterate(self, root: _Open, steps: tuple[str, ...], expand: Callable[[tuple[str, ...]], list[_Open]]) -> None:
        path = [root]
        while not path[-1].done and len(path) <= self.depth and len(steps) < self.max_steps:
            node = path[-1]
            if node.children is None:
                node.children = expand(steps)
                for child in node.children:
                    child.reward = child.q = child.value - node.value
            if not node.children:
                break
            bonus = self.exploration * math.sqrt(node.visits)
            path.append(max(node.children, key=lambda c: c.q + bonus * c.prior / (1 + c.visits)))  # noqa: B023
            steps = (*steps, path[-1].text)
        self._back_up(path)

    def prior(self, step: Step) -> float:
        """exp(logp / num_tokens ** length_power)"""
        return math.exp(step.logp / step.num_tokens**self.length_power)

    def _back_up(self, path: list[_Open]) -> None:
        for node in reversed(path):
            if node is not path[-1]:
                children = node.children or []
                counts = [max(1, child.visits) for child in children]
                node.v = sum(n * c.q for n, c in zip(counts, children, strict=True)) / sum(counts)
            node.q = node.reward + self.gamma * node.v
            node.visits += 1

    def _expand(
        self, prompt: Prompt, steps: tuple[str, ...], propose: Propose, value: Value, rng: np.random.Generator
    ) -> list[_Open]:
        proposed = propose(prompt, steps, self.actions if steps else self.root_actions, rng)
        children: dict[str, _Open] = {}  # the first of equal texts
        for step in proposed:
            if step.text in children:
                continue
            if step.num_tokens < 1 or not step.logp <= 0:
                raise ValueError(f"search: step {step.text!r} has {step.num_tokens} tokens and logp {step.logp}")
            worth = float(value(prompt, (*steps, step.text), step.done))
            if not math.isfinite(worth):
                raise ValueError(f"search: the value of step {step.text!r} is {worth}; mend the value function")
            children[step.text] = _Open(step.text, worth, self.prior(step), step.done)
        return list(children.values())


@dataclass
class _Open:
    """A node while the search runs."""

    text: str
    value: float
    prior: float
    done: bool
    reward: float = 0.0  # value - value of the parent
    q: float = 0.0
    v: float = 0.0
    visits: int = 0
    children: list[_Open] | None = None  # None: not expanded
    decided: tuple[float, float, int] | None = None

    def frozen(self) -> Node:
        q, v, visits = self.decided or (self.q, self.v, self.visits)
        children = tuple(child.frozen() for child in self.children or ())
        return Node(self.text, q, visits, self.value, v, self.prior, self.done, children)


def _decision(children: Sequence[tuple[float, float, int]]) -> int:
    """The next step among (q, v, visits): the most visited, then the larger q, then v, then the first."""
    return max(range(len(children)), key=lambda i: (children[i][2], children[i][0], children[i][1]))


def label_smoothing(visits_better: int, visits_worse: int) -> float:
    """Probability in [0, 0.5] that a step pair is the wrong way round, from how often each step was visited.

    min(0.5, 1 - 1 / (1 + worse / max(1, better))); the authors' "conservative" loss.
    """
    return min(0.5, 1 - 1 / (1 + visits_worse / max(1, visits_better)))


def step_pairs(tree: Tree) -> tuple[list[Json], dict[str, int]]:
    """A preference row for each step the search decided on, and the steps without one by reason.

    Children are ordered by (Q, pi, advantage, value, visits); the last is better, the first is worse. pi: 1 / number
    of the most visited children for those, else 0. advantage: value - value of the parent. A candidate is the path so
    far, the step, and every only child below it, so that chosen and rejected differ from their first differing
    character on. numbers.label_smoothing: see there; *_finished: whether the candidate ends the answer.
    """
    rows: list[Json] = []
    skipped: dict[str, int] = {}
    node, written = tree.root, ""
    while node.children:
        if len(node.children) > 1:
            keys = _order(node)
            ascending = sorted(range(len(keys)), key=keys.__getitem__)
            worse, better = node.children[ascending[0]], node.children[ascending[-1]]
            (chosen, chosen_done), (rejected, rejected_done) = _candidate(better), _candidate(worse)
            if keys[ascending[0]] == keys[ascending[-1]]:
                skipped["equal_score"] = skipped.get("equal_score", 0) + 1
            elif chosen == rejected:
                skipped["identical"] = skipped.get("identical", 0) + 1
            else:
                rows.append(
                    {
                        "prompt": tree.prompt,
                        "chosen": written + chosen,
                        "rejected": written + rejected,
                        "chosen_finished": chosen_done,
                        "rejected_finished": rejected_done,
                        "chosen_score": better.q,
                        "rejected_score": worse.q,
                        "numbers": {"label_smoothing": label_smoothing(better.visits, worse.visits)},
                    }
                )
        node = node.children[_decision([(c.q, c.v, c.visits) for c in node.children])]
        written += node.text
    return rows, skipped


def _order(node: Node) -> list[tuple[float, ...]]:
    """What the children are ordered by."""
    most = max(child.visits for child in node.children)
    pi = 1 / sum(child.visits == most for child in node.children)
    return [
        (c.q, pi if c.visits == most else 0.0, c.value - node.value, c.value, float(c.visits)) for c in node.children
    ]


def _candidate(node: Node) -> tuple[str, bool]:
    """A step with its forced continuation, and whether the answer ends there."""
    text = node.text
    while len(node.children) == 1:
        node = node.children[0]
        text += node.text
    return text, node.done


def build_step_pairs(sources: Sequence[str], out: Path) -> Json:
    """Read files of trees, write their step pairs and return the account, which stands beside as NAME.account.

    Raises ValueError with "file:line" for a tree that cannot be read, and if no pair is left.
    """
    rows: list[Json] = []
    skipped: dict[str, int] = {}
    trees = 0
    for _, tree in read_trees(sources):
        found, without = step_pairs(tree)
        rows += found
        trees += 1
        for reason, count in without.items():
            skipped[reason] = skipped.get(reason, 0) + count
    if not rows:
        raise ValueError(f"out={out}: no step pair from {trees} trees (skipped: {skipped or 'nothing'}); search wider")
    account = {"sources": list(sources), "trees_in": trees, "pairs_out": len(rows), "steps_skipped": skipped}
    write_lines(out, (json.dumps(row, ensure_ascii=False) for row in rows))
    write_lines(out.with_suffix(".account"), [json.dumps(account, indent=1)])
    return account


def read_trees(sources: Sequence[str]) -> Iterator[tuple[str, Tree]]:
    """Each tree of the files with its "file:line". Raises ValueError for the first that cannot be read."""
    for name in sources:
        for where, record in read(locate(name)):
            try:
                if isinstance(record, BadRow):
                    raise record
                yield where, tree_of(record)
            except BadRow as bad:
                raise ValueError(f"{where}: {bad}") from None


def tree_of(record: Json) -> Tree:
    """The tree of {"prompt", "root": {"text", "Q", "visits", "children", ...}}; "value", "V", "prior" and "done" may
    be left out, text at the root too. Raises BadRow, naming the node."""
    prompt = record.get("prompt")
    if not isinstance(prompt, (str, list)) or not prompt:
        raise BadRow("wrong_type", "prompt must be a text or a list of messages")
    root = record.get("root")
    if not isinstance(root, dict):
        raise BadRow("missing_field", "root must be a node: an object with children")
    return Tree(prompt, _node({"text": "", "Q": 0.0, "visits": 0, **root}, "root"))


def _node(record: object, name: str) -> Node:
    if not isinstance(record, dict):
        raise BadRow("wrong_type", f"{name} must be an object")
    for key in ("text", "Q", "visits"):
        if key not in record:
            raise BadRow("missing_field", f"{name}.{key} is missing")
    numbers = {key: record.get(key, 0) for key in ("Q", "V", "visits", "value", "prior")}
    for key, number in numbers.items():
        if isinstance(number, bool) or not isinstance(number, (int, float)) or not math.isfinite(number):
            raise BadRow("wrong_type", f"{name}.{key} must be a number, found {number!r}")
    if not isinstance(record["visits"], int) or record["visits"] < 0:
        raise BadRow("wrong_type", f"{name}.visits must be an integer from 0, found {record['visits']!r}")
    done, children = record.get("done", False), record.get("children", [])
    if not isinstance(record["text"], str) or not isinstance(done, bool) or not isinstance(children, list):
        raise BadRow("wrong_type", f"{name}: text must be a string, done true or false, children a list")
    return Node(
        text=record["text"],
        q=float(numbers["Q"]),
        visits=record["visits"],
        value=float(numbers["value"]),
        v=float(numbers["V"]),
        prior=float(numbers["prior"]),
        done=done,
        children=tuple(_node(child, f"{name}.children[{i}]") for i, child in enumerate(children)),
    )
