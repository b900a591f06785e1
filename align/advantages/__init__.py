"""Advantages: what each token earned, from the rewards of a whole rollout. Imports torch and types only."""
