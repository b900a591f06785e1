"""Tests that share what starts slowly run in one worker."""

from __future__ import annotations

import pytest


@pytest.mark.xdist_group("groups")
def test_workers_know_the_groups(request):
    """Otherwise two workers each start what a group shares: two Slurms give their jobs the same numbers, and by them
    the same ports."""
    if not getattr(request.config.option, "loadgroup", False):
        pytest.skip("only with --dist loadgroup")
    assert request.node.nodeid.endswith("@groups")
