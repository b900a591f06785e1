"""The account of the data: rows in = rows kept + rows dropped by reason, per split, on screen and in audit.json."""

from __future__ import annotations

from dataclasses import dataclass, field

from align.jsons import Json

# Reasons for which a row is left out that are no fault of it: too long for data.max_tokens (data.overlong rules these),
# of no use to the objective, generated for both splits, left out by data.format or data.form, or without a winner.
OVERLONG = ("too_long", "prompt_too_long", "dead_pair")
NOT_USED = "undesirable"
IN_TRAIN = "also_in_train"
LEFT_OUT = "left_out"
TIE = "tie"  # of answers that are to be compared
NO_FAULT = (NOT_USED, IN_TRAIN, LEFT_OUT, TIE)


@dataclass
class SplitAudit:
    """What became of the rows of one split."""

    sources: list[str] = field(default_factory=list)
    sha256: list[str] = field(default_factory=list)
    rows_in: int = 0
    rows_kept: int = 0
    dropped: dict[str, int] = field(default_factory=dict)
    dropped_rows: list[dict[str, str]] = field(default_factory=list)  # source ("file:line"), reason, detail
    truncated_rows: list[str] = field(default_factory=list)  # "file:line"
    repeated_prompts: int = 0  # kept rows whose prompt stands in an earlier one
    examples: int = 0  # what the rows give the objective: a pair can be two labelled sequences, a set can be repeated
    tokens: int = 0  # of all sequences, shared ones counted for each
    target_tokens: int = 0
    origins: dict[str, int] = field(default_factory=dict)
    unread: dict[str, int] = field(default_factory=dict)  # column that nothing reads -> kept rows that fill it
    shapes: dict[str, int] = field(default_factory=dict)  # fields and what they hold -> kept rows
    from_texts: int = 0  # kept rows whose texts became messages
    doubts: int = 0  # kept rows of which more may be learnt than the assistant said
    first_doubt: str = ""  # "file:line: why" of the first of them

    def drop(self, source: str, reason: str, detail: str, column: str = "") -> None:
        """Count one row that is not used. column: the one that nothing reads, for which it is not used."""
        self.dropped[reason] = self.dropped.get(reason, 0) + 1
        found = {"source": source, "reason": reason, "detail": detail}
        self.dropped_rows.append(found | ({"column": column} if column else {}))


@dataclass
class Audit:
    """Both splits."""

    train: SplitAudit = field(default_factory=SplitAudit)
    heldout: SplitAudit = field(default_factory=SplitAudit)
    prompts_in_both: int = 0
    prompts_only: bool = False  # rows are prompts, nothing is learnt from what they hold

    @classmethod
    def of(cls, told: Json) -> Audit:
        """The account that `as_dict` told."""
        return cls(SplitAudit(**told["train"]), SplitAudit(**told["heldout"]), told["prompts_in_both"])

    def as_dict(self) -> Json:
        """audit.json: totals first, then each split. Fails if a row is unaccounted for."""
        splits = {"train": self.train, "heldout": self.heldout}
        for name, split in splits.items():
            assert split.rows_in == split.rows_kept + sum(split.dropped.values()), name
        reasons = sorted({r for s in splits.values() for r in s.dropped})
        return {
            "rows_in": sum(s.rows_in for s in splits.values()),
            "rows_kept": sum(s.rows_kept for s in splits.values()),
            "dropped": {r: sum(s.dropped.get(r, 0) for s in splits.values()) for r in reasons},
            "prompts_in_both": self.prompts_in_both,
            **{name: vars(split) for name, split in splits.items()},
        }

    def lines(self) -> list[str]:
        """The account for the terminal."""
        out = []
        for name, split in (("train", self.train), ("held-out", self.heldout)):
            dropped = ", ".join(f"{n} {reason}" for reason, n in sorted(split.dropped.items())) or "none"
            cut = f", {len(split.truncated_rows)} of them cut short" if split.truncated_rows else ""
            more = f"; {split.examples} examples" if split.examples != split.rows_kept else ""
            again = f"; {split.repeated_prompts} repeated prompts" if self.prompts_only else ""
            what = f"{split.tokens} prompt" if self.prompts_only else f"{split.target_tokens} target"
            out.append(
                f"data {name}: {split.rows_in} rows in = {split.rows_kept} kept{cut} + "
                f"{sum(split.dropped.values())} dropped ({dropped}){again}{more}; {what} tokens"
            )
        out += _told("train", self.train) + _told("held-out", self.heldout)
        if self.prompts_in_both:
            out.append(f"data warning: {self.prompts_in_both} held-out prompts also stand in the training data")
        return out


def _told(name: str, split: SplitAudit) -> list[str]:
    """What is read otherwise than it came, or not at all."""
    out = []
    if split.unread:
        listed = ", ".join(f"{column} ({rows} rows)" for column, rows in split.unread.items())
        out.append(
            f"data {name}: not read: {listed}; data.columns.NAME=COLUMN reads one, data.ignore=[COLUMN] hides it"
        )
    if len(split.shapes) > 1:
        listed = "; ".join(f"{rows} {shape}" for shape, rows in sorted(split.shapes.items(), key=lambda s: -s[1]))
        out.append(f"data {name}: rows of {len(split.shapes)} shapes: {listed}")
    if split.from_texts:
        out.append(
            f"data {name}: {split.from_texts} rows of texts are written by the chat template, as a user's and an "
            "assistant's messages; data.text=plain learns them as they stand"
        )
    if split.doubts:
        out.append(
            f"data warning: {split.doubts} {name} rows may hold more than the assistant said; see align data check"
        )
    return out
