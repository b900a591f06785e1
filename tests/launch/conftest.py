"""One Slurm for all tests of a session."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.launch.cluster import Cluster, NotHere


@pytest.fixture(scope="session")
def slurm(tmp_path_factory) -> Iterator[Cluster]:
    """A controller and two nodes on loopback; skips where packages or rights are missing, and says which."""
    try:
        cluster = Cluster(tmp_path_factory.mktemp("slurm"))
    except NotHere as why:
        pytest.skip(f"no Slurm on this machine: {why}")
    yield cluster
    cluster.close()
