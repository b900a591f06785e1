"""Loss to step: what holds the weights and the optimiser."""
