"""Data: where rows come from, how they are rendered and tokenised, and the account of what was kept."""
