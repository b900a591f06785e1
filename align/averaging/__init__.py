"""Averages of models in weight space: what `align average` does. Knows files and tensors, no trainer and no network."""
