"""The loops: over fixed pairs now, over rollouts later. Blind to the algorithm."""
