"""Models: what is loaded, how its hidden states and log-probs are computed, and on what machine."""
