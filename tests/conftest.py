"""Fixtures that every folder of tests may use."""

from __future__ import annotations

import pytest
from ranks import RankPool


@pytest.fixture(scope="session")
def ranks():
    """`ranks.run(size, function, *args)` runs a function on gloo processes; see `ranks.py`."""
    pool = RankPool()
    yield pool
    pool.close()
