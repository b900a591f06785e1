"""Composers: advantages or rewards of several components to one number each. Imports torch and types only."""
