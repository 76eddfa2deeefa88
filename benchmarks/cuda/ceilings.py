"""What a GPU reaches where nothing but memory or matrix units counts."""

from __future__ import annotations

import torch
from torch import Tensor

from epbackend.kernels.triton.tuning import time_us


def measured_ceilings() -> tuple[float, float]:
    """(bytes / s of a copy, counting both ways; bfloat16 FLOP / s of an 8192-cubed product), on random data."""
    return _copy_rate(torch.randn(1 << 28, device="cuda")), _product_rate(8192)


def _copy_rate(source: Tensor) -> float:
    target = torch.empty_like(source)
    return 2 * source.nbytes / time_us([lambda: target.copy_(source)]) * 1e6


def _product_rate(size: int) -> float:
    left, right = (torch.randn(size, size, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    return 2 * size**3 / time_us([lambda: left @ right]) * 1e6
