"""Fixtures of the Ascend tests."""

from __future__ import annotations

import pytest


@pytest.fixture(scope="session")
def npu(request) -> str:
    """Where the tests run ("A3", "A2" or "npu"); they skip where nobody asked for them."""
    platform = request.config.getoption("--ascend")
    if platform is None:
        pytest.skip("they run by make test-ascend")
    return platform
