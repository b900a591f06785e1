"""`align score`: the rows of a file with a reward model's scores added, in their order, each accounted for."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from align.config import Config
from align.data.formats import Dialogue, Record, parse
from align.data.sources import BadRow, locate_all, read
from align.evaluate import pairs, reward_bench
from align.files import atomic_writer
from align.jsons import Json
from align.models.device import pick_device
from align.rewards.network import RewardNetwork, load
from align.rewards.preferences import mean_preferences
from align.types import Row

_CHUNK = 256  # rows that are read, scored and written together

Line = Json


def score(config: Config, out: Path, say: Callable[[str], None]) -> int:
    """Write every row of data.train to `out` with score, or score_chosen and score_rejected, or score_ranked; a row of
    RewardBench 2, whose chosen and rejected are lists, with scores.

    Higher is better. Attributes and costs stand beside it: scores_*, cost_*. Returns the exit code. Raises ValueError
    for a row that cannot be scored, unless data.on_bad_row=drop: it is then written with a score of null.
    """
    work = Scoring(config, say)
    done = 0
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        with atomic_writer(out) as stream:
            for line in work.lines():
                stream.write(json.dumps(line, ensure_ascii=False, default=str) + "\n")
                done += 1
    except OSError as error:
        raise ValueError(f"out={out}: cannot be written ({error.strerror})") from error
    say(f"{done} rows{work.missing()}, written to {out}")
    return 0


def evaluate_pairs(config: Config, scored: bool, out: Path, say: Callable[[str], None]) -> int:
    """The report on the pairs of data.train as the directory `out`; scored: they hold their scores already.

    Rows that could not be scored (data.on_bad_row=drop) are counted in it. Returns the exit code. Raises ValueError.
    """
    if scored:
        rows, tau, failed = _objects(config), 1.0, {}
    else:
        work = Scoring(config, say)
        rows = [line for line in work.lines() if line.get("score", 0.0) is not None]
        form = work.network.form
        # two answers' scores of a general preference model differ by the logit itself
        tau = 1.0 if work.network.kind == "general_preference" else float(form.get("tau", 1.0))
        failed = dict(work.failed)
    results = pairs.report(rows, tau=tau, seed=config.seed)
    try:
        pairs.write(results | {"without_scores": failed}, out)
    except RuntimeError as error:  # no matplotlib
        raise ValueError(str(error)) from error
    for line in pairs.lines(results):
        say(line)
    say(f"written {out}")
    return 0


def _objects(config: Config) -> list[Line]:
    rows = []
    for source in locate_all(config.data.train, "data.train"):
        for where, row in read(source):
            if isinstance(row, BadRow):
                raise ValueError(f"{where}: {row}")
            rows.append(row)
    return rows


class Scoring:
    """Reads data.train and scores it in chunks. failed: rows without scores, by reason."""

    def __init__(self, config: Config, say: Callable[[str], None]):
        path = config.model.get("path")
        if path is None:
            raise ValueError("give model=DIR: the directory of a reward model, such as a run's final/")
        self.config = config
        self.sources = locate_all(config.data.train, "data.train")
        self.network = load(
            str(path), config.model.get("revision"), str(config.model.get("dtype", "auto")), pick_device()
        )
        self.failed: Counter[str] = Counter()
        say(f"model {path}: {self.network.kind}, outputs {', '.join(self.network.outputs[:6])}")

    def lines(self) -> Iterator[Line]:
        """The rows in their order. Raises ValueError."""
        chunk: list[tuple[str, Line | BadRow]] = []
        empty = True
        for source in self.sources:
            for row in read(source):
                chunk.append(row)
                empty = False
                if len(chunk) == _CHUNK:
                    yield from self._scored(chunk)
                    chunk = []
        yield from self._scored(chunk)
        if empty:
            raise ValueError(f"data.train={self.config.data.train}: has no rows; give a file with at least one")

    def missing(self) -> str:
        """Of rows without scores, for people."""
        return "".join(f", {n} without scores ({reason})" for reason, n in sorted(self.failed.items()))

    def _scored(self, chunk: Sequence[tuple[str, Line | BadRow]]) -> list[Line]:
        lines: list[Line] = []
        groups: list[list[Row]] = []
        found: list[tuple[int, Record, bool]] = []
        for where, record in chunk:
            try:
                if isinstance(record, BadRow):
                    raise record
                listed = isinstance(record.get("chosen"), list) and all(isinstance(c, str) for c in record["chosen"])
                parsed = _ranked(record) if listed else parse(record)
                groups.append(_rows(self.network, parsed, self.config.data.max_tokens))
                found.append((len(lines), parsed, listed))
                lines.append(dict(record))
            except BadRow as bad:
                if self.config.data.on_bad_row != "drop":
                    raise ValueError(
                        f"{where}: {bad} (reason {bad.reason}; data.on_bad_row=drop writes such rows without scores)"
                    ) from None
                self.failed[bad.reason] += 1
                lines.append({**(record if isinstance(record, dict) else {"unreadable": where}), "score": None})
        outputs, gates = self.network.scores(groups, self.config.trainer.micro_batch_tokens)
        for i, (at, parsed, listed) in enumerate(found):
            where = chunk[at][0]
            if not np.isfinite(outputs[i]).all():
                raise ValueError(f"{where}: the model's score is no finite number; its weights are broken")
            told = fields(self.network, parsed, outputs[i], None if gates is None else gates[i], where)
            lines[at] |= {"scores": told["score_ranked"]} if listed else told
        return lines


def _ranked(record: Line) -> Record:
    """A row of RewardBench 2: its answers one after the other."""
    return parse(
        {"prompt": [{"role": "user", "content": record.get("prompt")}], "ranked": reward_bench.answers(record)}
    )


def _rows(network: RewardNetwork, record: Record, max_tokens: int) -> list[Row]:
    rows = []
    for name, side in record.sides.items():
        if not isinstance(side, Dialogue):
            raise BadRow("tokens", f"{name} came as tokens; a reward model reads texts: give messages")
        row = network.row(side.prompt, side.completion, None if side.tools is None else list(side.tools))
        if len(row.token_ids) > max_tokens:
            raise BadRow("too_long", f"{name} has {len(row.token_ids)} tokens, data.max_tokens={max_tokens}; raise it")
        rows.append(row)
    return rows


def fields(network: RewardNetwork, record: Record, outputs: np.ndarray, gates: np.ndarray | None, source: str) -> Line:
    """What is added to a row. outputs, gates: [R, D] and [R, D / 2] of its R sequences."""
    suffixes = {"pair": ("_chosen", "_rejected"), "ranked": ("_ranked",)}.get(record.kind, ("",))
    if network.kind == "general_preference":
        if len(outputs) < 2:
            raise ValueError(f"{source}: a general preference model compares answers; give pairs or ranked lists")
        rewards = mean_preferences(network.form, outputs, gates)
        extra: Json = {}
    elif network.kind == "pal":
        user = record.numbers.get("user", -1.0)
        if user not in range(outputs.shape[1]):
            raise ValueError(
                f'{source}: a pluralistic model scores for a rater: add "numbers": {{"user": N}} to the row, N from 0 '
                f"to {outputs.shape[1] - 1}"
            )
        rewards, extra = outputs[:, int(user)], {}
    else:
        rewards = outputs.mean(1) * (-1 if network.kind == "cost" else 1)
        extra = {"scores": outputs} if network.kind == "attributes" else {}
        extra |= {"cost": outputs[:, 0]} if network.kind == "cost" else {}
    told: Line = {}
    for name, values in {"score": rewards, **extra}.items():
        plain = [_plain(network, v) for v in values]
        listed = [plain] if record.kind == "ranked" else plain
        told |= {f"{name}{suffix}": value for suffix, value in zip(suffixes, listed, strict=True)}
    return told


def _plain(network: RewardNetwork, value: Any) -> Any:
    if np.ndim(value):
        return dict(zip(network.outputs, map(float, value), strict=True))
    return float(value)
