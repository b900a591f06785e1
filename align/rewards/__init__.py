"""Pure reward functions of prompt and completion; reward models live elsewhere."""
