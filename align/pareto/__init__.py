"""`align front`: runs over weights or thresholds for several composers, and their Pareto fronts side by side."""
