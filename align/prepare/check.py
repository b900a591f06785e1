"""What can be wrong with data that can be read: findings about rows, pairs of rows and both splits.

Reads the renderings that training would use and tokenises nothing but the end of turn, so that what it says is about
the tokens that would be trained on. One pass over the rows and hash tables; nothing compares rows two by two.
How findings are shown and saved is report.py's.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

import numpy as np

from align.data.audit import NO_FAULT, OVERLONG
from align.data.chat import terminator
from align.data.examples import prompt_key
from align.jsons import Json, Tokenizer

if TYPE_CHECKING:
    from align.config import DataConfig
    from align.data.audit import Audit, SplitAudit
    from align.data.chat import Rendering, Span
    from align.data.examples import Loaded
    from align.data.load import Data
    from align.types import Row

Severity = Literal["error", "warning", "note", "figure"]  # a figure describes a split, good or bad
SEVERITIES: tuple[Severity, ...] = ("error", "warning", "note", "figure")

SKEW_RATIO = 1.2  # a difference of lengths below this says little beside the spread between answers
_SKEW_PAIRS = 10  # with fewer pairs the bootstrap interval is not worth the name
_RESAMPLES = 1000
_KTO_BALANCE = (1.0, 4 / 3)  # desirable to undesirable, weights included: what TRL 1.16 asks for
# The renderer's notes: what is learnt differs from what generation would do, or is not what the row says.
_WARNINGS = ("context", "control_token", "dropped_message", "special_text")
_OTHERS = ("system", "user", "tool")  # roles that generation does not start from
_SHOWN = 3  # findings of a kind that the terminal shows in full


@dataclass(frozen=True)
class Finding:
    """One thing that the data's owner should know. Without a line it is about the whole split."""

    kind: str
    severity: Severity
    detail: str  # what is wrong, and how to cure it
    split: str = "train"
    file: str | None = None
    line: int | None = None
    numbers: Mapping[str, float] = field(default_factory=dict)  # the figures in `detail`, for programs
    column: str | None = None  # that nothing reads, and how many rows fill it
    rows: int | None = None

    @property
    def where(self) -> str:
        """ "file:line", or the split for what is about all of it."""
        return self.split if self.file is None else f"{self.file}:{self.line}"

    def as_dict(self) -> Json:
        """For JSON. `row` is the number of the row in its file, counted as lines are."""
        out = {"kind": self.kind, "severity": self.severity, "split": self.split, "row": self.line}
        out |= {"file": self.file, "line": self.line, "detail": self.detail}
        out |= {} if self.column is None else {"column": self.column, "rows": self.rows}
        return out | ({"numbers": dict(self.numbers)} if self.numbers else {})


def check(
    data: Data, tokenizer: Tokenizer, config: DataConfig | None = None, mismatched: bool = False
) -> list[Finding]:
    """All findings, errors first, otherwise in the order of the data.

    data: loaded with keep=True. config: without it every dropped row is an error; with it one that the settings
    allow to be dropped is a warning, as long as they are not too many. mismatched: the objective wants each prompt
    with the completion of another.
    """
    end = _TurnEnd(tokenizer)
    out: list[Finding] = []
    splits = (("train", data.audit.train, data.train_rows), ("heldout", data.audit.heldout, data.heldout_rows))
    for name, split, rows in splits:
        out += _conservation(name, split, len(rows))
        # held-out rows that were not given are kept back from the training file, perhaps none
        if not rows and (name == "train" or split.rows_in or split.sources != data.audit.train.sources):
            detail = f"no row of {split.rows_in} in {', '.join(split.sources)} can be used; give others"
            out.append(Finding("no_rows", "error", detail, name))
        # rows that are kept back count for the file they come from, as in load
        total = split.rows_in + (data.audit.heldout.rows_in if config and config.heldout is None else 0)
        out += _dropped(name, split, total, config)
        out += _read(name, split, len(rows))
        out += _doubts(name, rows, config)
        for loaded in rows:
            out += _row(name, loaded, end, tokenizer.bos_token_id)
        out += _duplicates(name, rows)
        out += _boundary_proof(name, rows)
        out += _target_share(name, rows)
        out += _lengths(name, rows)
        out += _labels(name, rows)
    out += _leaks(data.train_rows, data.heldout_rows)
    if mismatched and data.train and len({prompt_key(example) for example in data.train}) == 1:
        detail = "all rows have one prompt, the objective's KL point needs two; add data, or use one without it"
        out.append(Finding("one_prompt", "error", detail))
    return sorted(out, key=lambda finding: SEVERITIES.index(finding.severity))


def failed(findings: Iterable[Finding]) -> bool:
    """Whether any finding is an error: the command then exits with 1."""
    return any(finding.severity == "error" for finding in findings)


def lines(findings: Sequence[Finding], audit: Audit) -> list[str]:
    """For the terminal: the account of the rows, the first findings of each kind, the verdict."""
    out = audit.lines()
    groups: dict[tuple[Severity, str], list[Finding]] = {}
    for finding in findings:
        groups.setdefault((finding.severity, finding.kind), []).append(finding)
    for (severity, kind), group in groups.items():
        out.append(f"{severity} {kind}" + (f" ({len(group)})" if len(group) > 1 else ""))
        out += [f"  {finding.where}: {finding.detail}" for finding in group[:_SHOWN]]
        if len(group) > _SHOWN:
            out.append(f"  and {len(group) - _SHOWN} more; --json FILE lists them all")
    out.append(f"check {'failed' if failed(findings) else 'passed'}: {counted(findings)}")
    return out


def counted(findings: Sequence[Finding]) -> str:
    """How many of each severity, figures not counted."""
    numbers = {s: sum(finding.severity == s for finding in findings) for s in SEVERITIES if s != "figure"}
    return ", ".join(f"{n} {s}{'' if n == 1 else 's'}" for s, n in numbers.items())


def prompt_difference(loaded: Loaded, sequence: str) -> int | None:
    """The first position at which a sequence does not begin as generation would, None when it does.

    Compares with the tokens of the prompt tokenised alone. A conversation that came as tokens has no others.
    """
    rendering, prompt = loaded.renderings[sequence], loaded.prompts[sequence]
    if prompt is None:
        return None
    ids = rendering.row.token_ids[: rendering.prompt_length]
    first = next((span for span in rendering.spans if span.target), None)
    if first is not None and first.role in _OTHERS:  # data.target_roles: what they say stands inside the prompt
        ids = rendering.row.token_ids[: len(prompt)]
    if not prompt and len(ids) <= 1:  # plain text without a prompt stands after BOS
        return None
    if len(ids) == len(prompt) and np.array_equal(ids, prompt):
        return None
    same = min(len(ids), len(prompt))
    return next((i for i in range(same) if ids[i] != prompt[i]), same)


def trained(loaded: Loaded, sequence: str) -> Row | None:
    """The row of a sequence as the objective gets it, whose targets can be fewer; None if it reads only the other."""
    if loaded.kind == "ranked":
        return loaded.renderings[sequence].row
    rows = [row for example in loaded.examples for row in example.rows[: 2 if loaded.kind == "pair" else 1]]
    at = 1 if sequence == "rejected" else 0
    return rows[at] if at < len(rows) else None


class _TurnEnd:
    """Whether targets end as a finished turn does: with the template's end of turn or EOS."""

    def __init__(self, tokenizer: Tokenizer):
        self._tokenizer = tokenizer
        self.text = terminator(tokenizer).strip() if tokenizer.chat_template else ""
        self._special = {i for i, token in tokenizer.added_tokens_decoder.items() if token.special}
        ends = [tokenizer(self.text, add_special_tokens=False).input_ids] if self.text else []
        if tokenizer.eos_token_id is not None:
            ends.append([tokenizer.eos_token_id])
        self._ends = [np.array(ids, dtype=np.int32) for ids in ends]

    def closes(self, ids: np.ndarray) -> bool:
        """ids: a run of targets, at least one."""
        if any(np.array_equal(ids[-len(end) :], end) for end in self._ends):
            return True
        # the end of turn can share a token with the text before it; no tokenizer gives one more than a few tokens
        return bool(self.text) and self.decode(ids[-32:]).rstrip().endswith(self.text)

    def is_special(self, token: int) -> bool:
        """Whether it is a control token."""
        return int(token) in self._special

    def decode(self, ids: np.ndarray) -> str:
        """Text of tokens, special ones included."""
        return self._tokenizer.decode(ids.tolist(), skip_special_tokens=False, clean_up_tokenization_spaces=False)

    def names(self) -> str:
        """For messages."""
        eos = self._tokenizer.eos_token
        return " or ".join(repr(t) for t in dict.fromkeys((self.text, eos)) if t) or "an end of turn"


def _conservation(name: str, split: SplitAudit, num_rows: int) -> Iterator[Finding]:
    dropped = sum(split.dropped.values())
    if split.rows_in != split.rows_kept + dropped or num_rows != split.rows_kept:
        detail = f"{split.rows_in} rows in, {split.rows_kept} kept and {dropped} dropped, {num_rows} seen by the check"
        yield Finding("conservation", "error", f"{detail}; rows are lost on the way: please report this", name)


def _dropped(name: str, split: SplitAudit, total: int, config: DataConfig | None) -> Iterator[Finding]:
    """One finding for each row that is left out, and one if load would refuse that many."""
    counts = {"overlong": 0, "bad": 0}
    for row in split.dropped_rows:
        reason = row["reason"]
        group = "overlong" if reason in OVERLONG else "bad"
        if reason in NO_FAULT:
            severity: Severity = "note"
        else:
            counts[group] += 1
            severity = "warning" if config and (group == "overlong" or config.on_bad_row == "drop") else "error"
        yield _at("dropped", severity, f"{reason}: {row['detail']}", name, row["source"])
        if reason in ("identical", "dead_pair"):
            yield _at("dead_pair", severity, f"left out: {row['detail']}", name, row["source"])
    if config is None:
        return
    cures = {"bad": "mend them", "overlong": "raise data.max_tokens, or set data.overlong=drop or truncate_turns"}
    limited = {"bad": config.on_bad_row == "drop", "overlong": config.overlong == "error"}
    for group, count in counts.items():
        if limited[group] and count > config.max_bad_fraction * total:
            detail = (
                f"{count} of {total} rows ({count / total:.1%}) are left out as {group}, more than "
                f"data.max_bad_fraction={config.max_bad_fraction}; {cures[group]}, or raise the fraction"
            )
            yield Finding("dropped_fraction", "error", detail, name)


def _read(name: str, split: SplitAudit, kept: int) -> Iterator[Finding]:
    """Columns that nothing reads, rows of several shapes, texts that became messages."""
    refused = Counter(row["column"] for row in split.dropped_rows if "column" in row)
    for column, rows in refused.items():
        first = next(row for row in split.dropped_rows if row.get("column") == column)
        yield Finding("unread_column", "error", f"in {rows} rows {first['detail']}", name, column=column, rows=rows)
    for column, rows in split.unread.items():
        detail = f"{column} is not read, in {rows} of {kept} rows; data.columns.NAME={column} reads it, "
        detail += f"data.ignore=[{column}] says that it is known"
        yield Finding("unread_column", "note", detail, name, column=column, rows=rows)
    if len(split.shapes) > 1:
        listed = "; ".join(f"{rows} {shape}" for shape, rows in sorted(split.shapes.items(), key=lambda s: -s[1]))
        yield Finding("mixed_shapes", "note", f"rows of {len(split.shapes)} shapes: {listed}", name)
    if split.from_texts:
        detail = f"{split.from_texts} rows of texts are written by the chat template, as a user's and an assistant's "
        yield Finding("chat_texts", "note", f"{detail}messages; data.text=plain learns them as they stand", name)


def _doubts(name: str, rows: Sequence[Loaded], config: DataConfig | None) -> Iterator[Finding]:
    """Rows of which more may be learnt than the assistant said: a few may well be answers that were asked for."""
    found = [loaded for loaded in rows if loaded.doubt]
    many = len(found) > (config.max_bad_fraction if config else 0.0) * len(rows)
    for loaded in found:
        yield _at("role_header", "error" if many else "warning", loaded.doubt, name, loaded.source)


Found = Callable[[str, Severity, str], Finding]


def _row(name: str, loaded: Loaded, end: _TurnEnd, bos: int | None) -> Iterator[Finding]:
    """Findings about one row by itself."""

    def found(kind: str, severity: Severity, detail: str) -> Finding:
        return _at(kind, severity, detail, name, loaded.source)

    if loaded.truncated:
        turns = "1 turn was" if loaded.truncated == 1 else f"{loaded.truncated} turns were"
        yield found(
            "truncated",
            "warning",
            f"{turns} cut to keep within data.max_tokens; raise it, or leave such rows out with data.overlong=drop",
        )
    for sequence, rendering in loaded.renderings.items():
        row = trained(loaded, sequence)
        if row is None:
            continue
        if bos is not None and len(row.token_ids) > 1 and row.token_ids[0] == row.token_ids[1] == bos:
            detail = (
                f"{sequence} begins with BOS twice; the text or the chat template holds one and the tokenizer adds "
                "another: take it out of the text or the template"
            )
            yield found("bos_twice", "error", detail)
        at = prompt_difference(loaded, sequence)
        if at is not None:
            # a context note means that the renderer has seen it: the template writes answered prompts otherwise
            severity: Severity = "warning" if _explained(rendering) else "error"
            yield found("boundary", severity, _difference(loaded, sequence, at, end))
        if not row.targets.any():
            detail = f"{sequence} has no target, so nothing of it is trained; give an answer or a weight above 0"
            yield found("no_targets", "error", detail)
            continue
        yield from _ends(found, sequence, rendering, row, loaded.finished[sequence], end)
    yield from _notes(found, loaded)
    if loaded.kind == "pair":
        yield from _dead(found, loaded)


def _notes(found: Found, loaded: Loaded) -> Iterator[Finding]:
    """What the renderer noticed; what chosen and rejected share, once."""
    sequences: dict[str, list[str]] = {}
    for sequence, rendering in loaded.renderings.items():
        if trained(loaded, sequence) is not None:
            for note in rendering.notes:
                sequences.setdefault(note, []).append(sequence)
    for note, names in sequences.items():
        kind, _, detail = note.partition(": ")
        kind = "dropped_message" if kind == "dropped" else kind
        yield found(kind, "warning" if kind in _WARNINGS else "note", f"{' and '.join(names)}: {detail}")


def _explained(rendering: Rendering) -> bool:
    first = next((span.message for span in rendering.spans if span.target and span.message is not None), None)
    return first is not None and any(n.startswith(f"context: message {first + 1}:") for n in rendering.notes)


def _difference(loaded: Loaded, sequence: str, at: int, end: _TurnEnd) -> str:
    rendering, prompt = loaded.renderings[sequence], np.array(loaded.prompts[sequence], dtype=np.int32)
    begun = rendering.row.token_ids[: rendering.prompt_length]
    lengths = "" if len(prompt) == len(begun) else f" ({len(prompt)} and {len(begun)} tokens)"
    return (
        f"{sequence} does not begin as generation would: from token {at + 1} the prompt alone is "
        f"{end.decode(prompt[at : at + 8])!r} and the row {end.decode(begun[at : at + 8])!r}{lengths}; use a chat "
        "template whose rendering of the prompt begins its rendering of the whole conversation"
    )


def _ends(
    found: Found, sequence: str, rendering: Rendering, row: Row, finished: bool, end: _TurnEnd
) -> Iterator[Finding]:
    """Runs of targets that do not end as a turn does."""
    ids = row.token_ids
    spans = {span.end: span for span in rendering.spans}
    # what other roles say has no end of turn; a run that ends inside a span is a part of what is said
    runs = [(a, b) for a, b in target_runs(row.targets) if b in spans and spans[b].role not in _OTHERS]
    for start, stop in runs[:-1]:
        # a call can have an end of its own
        said = end.closes(ids[start:stop]) or end.is_special(ids[stop - 1])
        if not said and not _goes_on(rendering, spans[stop]):
            detail = (
                f"a turn of {sequence} ends with {end.decode(ids[max(start, stop - 8) : stop])!r} and no "
                f"{end.names()} is trained after it; look at the chat template"
            )
            yield found("lost_terminator", "warning", detail)
    if not runs:
        return
    start, stop = runs[-1]
    key = "finished" if sequence == "row" else f"{sequence}_finished"
    if not finished:
        detail = f"{key} is false: {sequence} was cut off, so no end of turn is learnt from it"
        yield found("unfinished", "note", detail)
    elif not end.closes(ids[start:stop]):
        detail = (
            f"{sequence} ends with {end.decode(ids[max(start, stop - 8) : stop])!r}, not with {end.names()}: the "
            f"policy would learn not to stop; set {key} to false if it was cut off, else look at the chat template"
        )
        yield found("lost_terminator", "error", detail)


def _goes_on(rendering: Rendering, span: Span) -> bool:
    """Whether the message of a span says more after it."""
    after = next((s for s in rendering.spans if s.start == span.end), None)
    return after is not None and after.role == span.role and after.message == span.message


def _dead(found: Found, loaded: Loaded) -> Iterator[Finding]:
    a, b = trained(loaded, "chosen"), trained(loaded, "rejected")
    if a is None or b is None:
        return
    prompt, other = (r.row.token_ids[: r.prompt_length] for r in loaded.renderings.values())
    same_tokens = np.array_equal(a.token_ids, b.token_ids)
    same_targets = np.array_equal(a.token_ids[a.targets], b.token_ids[b.targets])
    if same_tokens and np.array_equal(a.targets, b.targets) and _same_weights(a.weights, b.weights):
        detail = "chosen and rejected have the same tokens, so the pair has no gradient; remove it, or if they differ "
        yield found("dead_pair", "error", detail + "only after truncation raise data.max_tokens")
    elif same_tokens:
        detail = "chosen and rejected have the same tokens and differ only in which are targets or in their weight"
        yield found("dead_pair", "warning", detail + "; see that this is meant")
    elif same_targets and np.array_equal(prompt, other):  # else it is one answer to two prompts
        detail = "chosen and rejected have the same targets and differ only in what stands between them; see that "
        yield found("dead_pair", "warning", detail + "this is meant")


def _same_weights(a: np.ndarray | None, b: np.ndarray | None) -> bool:
    return a is b or (a is not None and b is not None and np.array_equal(a, b))


def _duplicates(name: str, rows: Sequence[Loaded]) -> Iterator[Finding]:
    """Rows that say what an earlier one says, or the opposite of it."""
    first: dict[tuple, str] = {}
    for loaded in rows:
        digests = tuple(_digest(r.row.token_ids, r.row.targets) for r in loaded.renderings.values())
        label = loaded.examples[0].label if loaded.kind == "labelled" else None
        key = (loaded.kind, digests, label)
        opposite = (loaded.kind, digests[::-1], None if label is None else not label)
        # a dead pair is its own opposite, an imitated row has none
        if opposite in first and key != opposite:
            what = "prefers the rejected answer of" if label is None else "labels the same tokens otherwise than"
            detail = f"{what} {first[opposite]}; keep the one that is right"
            yield _at("contradiction", "error", detail, name, loaded.source)
        elif key in first:
            detail = f"the same tokens as {first[key]}; remove one, or leave it where the weight is meant"
            yield _at("duplicate", "warning", detail, name, loaded.source)
        first.setdefault(key, loaded.source)


def _leaks(train: Sequence[Loaded], heldout: Sequence[Loaded]) -> Iterator[Finding]:
    """Held-out sequences and prompts that are also trained on."""
    if not heldout:
        return
    sequences: dict[bytes, str] = {}
    prompts: dict[tuple[int, ...], str] = {}
    for loaded in train:
        for rendering in loaded.renderings.values():
            sequences.setdefault(_digest(rendering.row.token_ids), loaded.source)
        prompts.setdefault(loaded.examples[0].prompt.token_ids, loaded.source)
    prompts.pop((), None)  # rows without a prompt share nothing by that
    for loaded in heldout:
        digests = {name: _digest(r.row.token_ids) for name, r in loaded.renderings.items()}
        leaked = next((name for name, digest in digests.items() if digest in sequences), None)
        prompt = loaded.examples[0].prompt.token_ids
        if leaked is not None:
            detail = f"{leaked} is also trained on, at {sequences[digests[leaked]]}; remove it from one of the splits"
            yield _at("leak", "error", detail, "heldout", loaded.source)
        elif prompt in prompts:
            detail = f"the prompt is also trained on, at {prompts[prompt]}; hold out whole prompts"
            yield _at("leak", "warning", detail, "heldout", loaded.source)


def _boundary_proof(name: str, rows: Sequence[Loaded]) -> Iterator[Finding]:
    sequences = [(loaded, sequence) for loaded in rows for sequence in loaded.renderings]
    given = sum(loaded.prompts[sequence] is None for loaded, sequence in sequences)
    proved = sum(prompt_difference(loaded, sequence) is None for loaded, sequence in sequences) - given
    if sequences:
        numbers = {"sequences": len(sequences), "proved": proved, "given_as_tokens": given}
        detail = f"{proved} of {len(sequences)} sequences begin with exactly the tokens that generation starts from"
        detail += f", {given} came as tokens and cannot be compared" if given else ""
        yield Finding("boundary_proof", "figure", detail, name, numbers=numbers)


def _target_share(name: str, rows: Sequence[Loaded]) -> Iterator[Finding]:
    both = [trained(loaded, sequence) for loaded in rows for sequence in loaded.renderings]
    every = [row for row in both if row is not None]
    tokens, targets = sum(len(r.token_ids) for r in every), sum(int(r.targets.sum()) for r in every)
    if tokens:
        numbers = {"tokens": tokens, "targets": targets, "share": targets / tokens}
        detail = f"{targets} of {tokens} tokens ({targets / tokens:.1%}) are targets"
        yield Finding("target_share", "figure", detail, name, numbers=numbers)


def _lengths(name: str, rows: Sequence[Loaded]) -> Iterator[Finding]:
    """Whether chosen is longer than rejected as a rule, which a policy learns before anything else.

    The ratio is exp of the mean over pairs of log(chosen / rejected) targets, its interval the 2.5 % and 97.5 %
    points of a bootstrap over pairs.
    """
    both = [[trained(loaded, k) for k in ("chosen", "rejected")] for loaded in rows if loaded.kind == "pair"]
    whole = [(a, b) for a, b in both if a is not None and b is not None]
    lengths = np.array([[a.targets.sum(), b.targets.sum()] for a, b in whole], dtype=float)
    lengths = lengths[(lengths > 0).all(1)] if len(lengths) else lengths
    if not len(lengths):
        return
    chosen, rejected = lengths.T
    ratios = np.log(chosen / rejected)
    rng = np.random.default_rng(0)  # the same data give the same interval
    means = [ratios[rng.integers(0, len(ratios), len(ratios))].mean() for _ in range(_RESAMPLES)]
    low, high = np.quantile(means, [0.025, 0.975])
    numbers = {
        "pairs": len(lengths),
        "chosen_mean": float(chosen.mean()),
        "rejected_mean": float(rejected.mean()),
        "chosen_median": float(np.median(chosen)),
        "rejected_median": float(np.median(rejected)),
        "chosen_longer": float((chosen > rejected).mean()),
        "ratio": float(np.exp(ratios.mean())),
        "ratio_low": float(np.exp(low)),
        "ratio_high": float(np.exp(high)),
    }
    detail = (
        f"chosen has {chosen.mean():.1f} target tokens (median {np.median(chosen):g}), rejected {rejected.mean():.1f} "
        f"(median {np.median(rejected):g}); chosen is longer in {numbers['chosen_longer']:.0%} of {len(lengths)} "
        f"pairs, ratio {numbers['ratio']:.2f}, 95 % interval {numbers['ratio_low']:.2f} to {numbers['ratio_high']:.2f}"
    )
    yield Finding("lengths", "figure", detail, name, numbers=numbers)
    if (low > 0 or high < 0) and abs(ratios.mean()) > np.log(SKEW_RATIO) and len(lengths) >= _SKEW_PAIRS:
        more, less = ("longer", "shorter") if ratios.mean() > 0 else ("shorter", "longer")
        detail = (
            f"chosen is {more} than rejected, ratio {numbers['ratio']:.2f}, 95 % interval {numbers['ratio_low']:.2f} "
            f"to {numbers['ratio_high']:.2f}: a policy can win by writing {more}; add pairs whose chosen is {less}, or "
            "use a length-normalised objective"
        )
        yield Finding("length_skew", "warning", detail, name, numbers=numbers)


def _labels(name: str, rows: Sequence[Loaded]) -> Iterator[Finding]:
    labels = [loaded.examples[0].label for loaded in rows if loaded.kind == "labelled"]
    if not labels or name != "train":
        return
    good = sum(label is True for label in labels)
    bad = len(labels) - good
    numbers = {"desirable": good, "undesirable": bad}
    yield Finding("labels", "figure", f"{good} desirable and {bad} undesirable rows", name, numbers=numbers)
    low, high = _KTO_BALANCE
    if not good or not bad:
        which = "desirable" if bad else "undesirable"
        detail = f"no {which} row, so nothing says what to prefer; add some"
        yield Finding("label_imbalance", "warning", detail, name, numbers=numbers)
    elif not low <= good / bad <= high:
        detail = (
            f"{good} desirable to {bad} undesirable rows, ratio {good / bad:.3g}; KTO wants it between 1 and 4/3 with "
            f"the weights of the labels multiplied in: objective.desirable_weight from {low * bad / good:.3g} to "
            f"{high * bad / good:.3g} does that, with objective.undesirable_weight=1"
        )
        yield Finding("label_imbalance", "warning", detail, name, numbers=numbers)


def target_runs(targets: np.ndarray) -> list[tuple[int, int]]:
    """Begin and end of each unbroken run of targets."""
    edges = np.flatnonzero(np.diff(np.concatenate([[False], targets, [False]]).astype(np.int8)))
    return [(int(a), int(b)) for a, b in zip(edges[::2], edges[1::2], strict=True)]


def place(source: str) -> tuple[str, int]:
    """ "file:line" as file and line."""
    file, _, line = source.rpartition(":")
    return file, int(line)


def _at(kind: str, severity: Severity, detail: str, split: str, source: str) -> Finding:
    file, line = place(source)
    return Finding(kind, severity, detail, split, file, line)


def _digest(*arrays: np.ndarray) -> bytes:
    digest = hashlib.blake2b(digest_size=16)
    for array in arrays:
        digest.update(len(array).to_bytes(8, "little"))
        digest.update(np.ascontiguousarray(array).tobytes())
    return digest.digest()
