"""Data: where rows come from, how they are rendered and tokenised, and the account of what was kept."""

GYM = "gym:"  # before the name of a task in data.train or data.heldout, see align.data.gym
