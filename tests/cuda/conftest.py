"""The CUDA device, or the interpreter that stands for it (TRITON_INTERPRET=1).

This folder is no package: as one it would be found as `cuda`, in the place of NVIDIA's Python packages.
"""

from __future__ import annotations

import pytest

from epbackend.device.cuda import CudaDevice


@pytest.fixture(scope="session")
def cuda():
    """Device cuda; skips with its own reason where it cannot be used."""
    device = CudaDevice()
    if reason := device.unavailable():
        pytest.skip(f"cuda: {reason}")
    return device


@pytest.fixture(scope="session")
def place(cuda):
    """The torch device of its tensors."""
    return cuda.torch_device(0)


@pytest.fixture(scope="session")
def kernels(cuda):
    """The Triton kernels."""
    return cuda.kernels
