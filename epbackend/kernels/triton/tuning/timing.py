"""Time on a GPU: calls captured in a CUDA graph, each with other data, the median of many replays."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from statistics import median

import torch

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
