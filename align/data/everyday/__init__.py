"""SmolLM2-135M preference pairs on everyday prompts: the rows, and the script that made them."""
