"""Measurements of networks, and intervals around them."""
