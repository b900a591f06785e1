"""Tests that share what starts slowly run in one worker."""

from __future__ import annotations

import os

import pytest


@pytest.mark.xdist_group("groups")
def test_workers_know_the_groups(request):
    """Otherwise two workers each start what a group shares: two Slurms give their jobs the same numbers, and by them
    the same ports."""
    if "PYTEST_XDIST_WORKER" not in os.environ:
        pytest.skip("one process has all tests of a group")
    assert request.node.nodeid.endswith("@groups")
