"""The devices under test."""

from __future__ import annotations

import pytest

from epbackend.device import devices
from epbackend.kernels.reference import ReferenceKernels


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


@pytest.fixture(scope="session")
def place(device):
    """The torch device of the first rank's tensors."""
    return device.torch_device(0)


@pytest.fixture(scope="session", params=["reference", "own"])
def kernels(request, device):
    """The device's own kernels, and the reference that they are held to."""
    return device.kernels if request.param == "own" else ReferenceKernels()
