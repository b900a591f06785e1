"""What is done to data before any training: checks, reports, judgements, searches for prompts."""
