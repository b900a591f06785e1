"""The account of the data: rows in = rows kept + rows dropped by reason, per split, on screen and in audit.json."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any


@dataclass
class SplitAudit:
    """What became of the rows of one split."""

    sources: list[str] = field(default_factory=list)
    sha256: list[str] = field(default_factory=list)
    rows_in: int = 0
    rows_kept: int = 0
    dropped: dict[str, int] = field(default_factory=dict)
    dropped_rows: list[str] = field(default_factory=list)  # "file:line reason"
    tokens: int = 0  # of both sequences, shared ones counted twice
    target_tokens: int = 0
    origins: dict[str, int] = field(default_factory=dict)

    def drop(self, source: str, reason: str) -> None:
        """Count one row that is not used."""
        self.dropped[reason] = self.dropped.get(reason, 0) + 1
        self.dropped_rows.append(f"{source} {reason}")


@dataclass
class Audit:
    """Both splits."""

    train: SplitAudit = field(default_factory=SplitAudit)
    heldout: SplitAudit = field(default_factory=SplitAudit)
    prompts_in_both: int = 0

    def as_dict(self) -> dict[str, Any]:
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
            out.append(
                f"data {name}: {split.rows_in} rows in = {split.rows_kept} kept + "
                f"{sum(split.dropped.values())} dropped ({dropped}); {split.target_tokens} target tokens"
            )
        if self.prompts_in_both:
            out.append(f"data warning: {self.prompts_in_both} held-out prompts also stand in the training data")
        return out
