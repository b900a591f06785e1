"""A GPU that is pretended: see device.py."""
