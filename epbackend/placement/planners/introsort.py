"""The order in which `torch.sort(descending=True)` leaves equal values on a CPU, which EPLB's answers depend on.

That is the C++ library's `std::sort` (libstdc++): introsort, which is not stable. It partitions by quicksort down to
short runs, with the median of three as pivot, and then sorts by insertion. Insertion is stable, so a stable sort of
the partitioned values gives the same order, and values without ties need no partitioning at all.

The heap sort to which introsort turns when quicksort goes badly is left out: such an input gets another order of ties.
"""

from __future__ import annotations

import numpy as np

SHORT = 16
"""Runs of so many values are left to insertion."""


def descending_order(values_BI: np.ndarray) -> np.ndarray:
    """The indices that sort each row, largest first, int64 [B, I]."""
    order_BI = np.argsort(-values_BI, axis=1, kind="stable")
    sorted_BI = np.take_along_axis(values_BI, order_BI, axis=1)
    for row in np.flatnonzero((sorted_BI[:, 1:] == sorted_BI[:, :-1]).any(axis=1)):
        partitioned_I = _partitioned(values_BI[row].tolist())
        order_BI[row] = partitioned_I[np.argsort(-values_BI[row, partitioned_I], kind="stable")]
    return order_BI


def _partitioned(values: list[float]) -> np.ndarray:
    """Where quicksort leaves each value's index when it stops at short runs, int64 [I]."""
    order = list(range(len(values)))
    levels = 2 * (len(values).bit_length() - 1)
    runs = [(0, len(values), levels)]
    while runs:
        first, last, levels = runs.pop()
        if last - first > SHORT and levels:
            cut = _partition(values, order, first, last)
            runs += [(first, cut, levels - 1), (cut, last, levels - 1)]
    return np.array(order, dtype=np.int64)


def _partition(values: list[float], order: list[int], first: int, last: int) -> int:
    """Cuts the run [first, last) of both lists in two, larger values first, and returns where."""
    _median_to_front(values, order, first, last)
    pivot = values[first]
    low, high = first + 1, last
    while True:
        while values[low] > pivot:
            low += 1
        high -= 1
        while pivot > values[high]:
            high -= 1
        if low >= high:
            return low
        _swap(values, order, low, high)
        low += 1


def _median_to_front(values: list[float], order: list[int], first: int, last: int) -> None:
    a, b, c = first + 1, first + (last - first) // 2, last - 1
    if values[a] > values[b]:
        median = b if values[b] > values[c] else c if values[a] > values[c] else a
    else:
        median = a if values[a] > values[c] else c if values[b] > values[c] else b
    _swap(values, order, first, median)


def _swap(values: list[float], order: list[int], a: int, b: int) -> None:
    values[a], values[b] = values[b], values[a]
    order[a], order[b] = order[b], order[a]
