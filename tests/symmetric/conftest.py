"""The CUDA device, or the interpreter that stands for it (TRITON_INTERPRET=1)."""

from __future__ import annotations

import pytest

from epbackend.device.cuda import CudaDevice


@pytest.fixture(scope="session")
def place_of():
    """The torch device of CUDA's tensors; skips with the device's own reason where it cannot be used."""
    device = CudaDevice()
    if reason := device.unavailable():
        pytest.skip(f"cuda: {reason}")
    return device.torch_device(0)
