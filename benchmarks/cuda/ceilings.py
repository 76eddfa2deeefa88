"""What a GPU reaches where nothing but memory or matrix units counts."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from epbackend.kernels.triton.tuning import time_us

VALUES = 1 << 29
"""float32, 2 GiB: many times what caches hold."""


def memory_rates() -> dict[str, float]:
    """Bytes / s in three ways. Experts of few tokens read weights and write next to nothing, as `read` does.

    A copy is slower than that: memory that turns between reading and writing loses time, and torch leaves a plain copy
    to the driver. So the ceiling is the best of the three.
    """
    source = torch.randn(VALUES, device="cuda")
    target = torch.empty_like(source)
    size = source.nbytes
    return {
        "read": _rate(size, lambda: source.sum()),
        "elementwise": _rate(2 * size, lambda: torch.neg(source, out=target)),
        "copy": _rate(2 * size, lambda: target.copy_(source)),
    }


def product_rate(size: int = 8192) -> float:
    """FLOP / s of a bfloat16 product on random data."""
    left, right = (torch.randn(size, size, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    return 2 * size**3 / time_us([lambda: left @ right]) * 1e6


def _rate(size: int, move: Callable[[], Tensor]) -> float:
    return size / time_us([move]) * 1e6
