"""Losses: pure functions of log-probs. Imports torch and types only."""
