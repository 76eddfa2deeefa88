"""The devices under test."""

from __future__ import annotations

import pytest

from epbackend.device import devices


@pytest.fixture(
    scope="session",
    params=[pytest.param(name, marks=getattr(pytest.mark, name)) for name in ("cpu", "cuda", "ascend")],
)
def device(request):
    """Each device; skipped, with the device's own reason, where it cannot be used."""
    found = devices()[request.param]
    if reason := found.unavailable():
        pytest.skip(f"{request.param}: {reason}")
    return found
