"""Completions from prompts: token ids in, token ids out."""
