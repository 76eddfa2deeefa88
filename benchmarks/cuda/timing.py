"""Time on a GPU: calls captured in a CUDA graph, each with other data, the median of many replays."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from statistics import median

import torch
from torch import Tensor

REPLAYS = 20


def time_us(calls: Sequence[Callable[[], object]]) -> float:
    """Microseconds of one of `calls`, which do the same work on different data, so that no cache holds it."""
    for call in calls:  # compiles, and lets the peers' own tuning run, which a capture would forbid
        call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls:
            call()
    for _ in range(3):
        graph.replay()
    times = []
    for _ in range(REPLAYS):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) * 1e3 / len(calls))
    return median(times)


def measured_ceilings() -> tuple[float, float]:
    """(bytes / s of a copy, counting both ways; bfloat16 FLOP / s of an 8192-cubed product), on random data."""
    return _copy_rate(torch.randn(1 << 28, device="cuda")), _product_rate(8192)


def _copy_rate(source: Tensor) -> float:
    target = torch.empty_like(source)
    return 2 * source.nbytes / time_us([lambda: target.copy_(source)]) * 1e6


def _product_rate(size: int) -> float:
    left, right = (torch.randn(size, size, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    return 2 * size**3 / time_us([lambda: left @ right]) * 1e6
