"""`align train` with a policy that learns from what it writes itself: docs/online.md."""

from align.trainers.online.run import train

__all__ = ["train"]
