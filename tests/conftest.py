"""Fixtures that every folder of tests may use."""

from __future__ import annotations

from importlib.util import find_spec

import pytest
from ranks import RankPool

if find_spec("hypothesis"):  # a machine with a GPU may have torch, triton and pytest alone
    import hypothesis

    # A machine that does other work as well is slow at any moment, which says nothing about the code.
    hypothesis.settings.register_profile(
        "busy", deadline=None, suppress_health_check=[hypothesis.HealthCheck.too_slow]
    )
    hypothesis.settings.load_profile("busy")


@pytest.fixture(scope="session")
def ranks():
    """`ranks.run(size, function, *args)` runs a function on gloo processes; see `ranks.py`."""
    pool = RankPool()
    yield pool
    pool.close()
