"""`align train` in rounds: draw, score, select, train, and start the next from what was left: docs/iterate.md."""

from align.trainers.iterate.run import train

__all__ = ["train"]
