"""How long a layer's experts take on each rank, measured: the ranks' speeds, and the time table of an objective.

Every rank times its own experts, all at the same moment: ranks that share a host or a power budget slow each other
down in serving too. All of them go through the same grid, so many rows on so many experts, several times, and of each
point the median counts, so that a disturbance costs a point one sample.

Letters: X numbers of rows, A numbers of active experts.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from epbackend.moe import ExpertParallelMoE
from epbackend.placement.speeds import RANK_SPEED

SAMPLE_S = 2e-3
"""A sample is as many calls as take about this long: one alone would be too short for the clock."""
MOST_CALLS = 50
ALIKE = 0.05
"""Ranks whose speeds are nearer to the fastest one's than this share are as fast: measurements differ by as much."""


@dataclass(frozen=True, eq=False)
class Calibration:
    """What all ranks have measured."""

    rows_X: tuple[int, ...]
    experts_A: tuple[int, ...]
    microseconds_RXA: np.ndarray
    layer: int
    """The number of the layer that was timed."""

    @property
    def rank_speed(self) -> tuple[float, ...]:
        """Parts of the fastest rank's speed: the median over the grid of how the mean rank's time is to each one's."""
        mean_XA = np.exp(np.log(self.microseconds_RXA).mean(axis=0))
        speed_R = np.median(mean_XA / self.microseconds_RXA, axis=(1, 2))
        speed_R /= speed_R.max()
        return tuple(1.0 if speed > 1 - ALIKE else round(float(speed), 3) for speed in speed_R)

    @property
    def microseconds_XA(self) -> np.ndarray:
        """Of a rank of speed 1, the median of what ranks say; evened out where more work would take less time."""
        of_speed_1_RXA = self.microseconds_RXA * np.array(self.rank_speed)[:, None, None]
        table_XA = np.median(of_speed_1_RXA, axis=0)
        least_XA = np.maximum.accumulate(np.maximum.accumulate(table_XA, axis=0), axis=1)
        most_XA = np.minimum.accumulate(np.minimum.accumulate(table_XA[::-1, ::-1], axis=0), axis=1)[
            ::-1, ::-1
        ]
        return (least_XA + most_XA) / 2

    def to_dict(self, batch: int) -> dict[str, Any]:
        """What `parse_speeds` and `parse_objective` read, for a batch of so many choices; times rounded to 0.01 us."""
        return {
            RANK_SPEED: list(self.rank_speed),
            "batch": batch,
            "tokens": list(self.rows_X),
            "experts": list(self.experts_A),
            "microseconds": self.microseconds_XA.round(2).tolist(),
            "microseconds_by_rank": self.microseconds_RXA.round(2).tolist(),
            "layer": self.layer,
        }


def active_experts(slots: int) -> tuple[int, ...]:
    """The numbers of active experts that are timed on a rank with so many slots.

    >>> active_experts(12)
    (1, 2, 4, 8, 12)
    """
    powers = [1 << exponent for exponent in range(slots.bit_length()) if 1 << exponent < slots]
    return (*powers, slots)


def time_experts(
    layer: ExpertParallelMoE, hidden_size: int, dtype: torch.dtype, rows_X: tuple[int, ...], rounds: int
) -> np.ndarray:
    """This rank's microseconds, float64 [X, A]; all ranks of the layer call it together.

    Every active expert has a row at least, also where fewer rows are asked for. The most experts are the slots of the
    rank that has fewest.

    Args:
        layer: whose experts are timed.
        hidden_size: D, of its rows.
        dtype: of its rows.
        rows_X: rows on a rank.
        rounds: samples of each point.
    """
    device, slots = layer.load.rows_2L.device, len(layer.load.local_experts)
    experts_A = active_experts(int(layer.slot_map.layout.slots_R.min()))
    rows_SD = torch.randn(max(*rows_X, *experts_A), hidden_size, dtype=torch.float32, device="cpu").to(
        device, dtype
    )
    beginning_1 = torch.zeros(1, dtype=torch.float32, device=device)
    seconds = np.zeros((rounds + 1, len(rows_X), len(experts_A)))
    with torch.inference_mode():
        for round_, x, a in np.ndindex(seconds.shape):
            rows = max(rows_X[x], experts_A[a])
            counts_L = _spread(rows, experts_A[a], slots, first=round_).to(device)
            calls = min(max(round(SAMPLE_S / seconds[0, x, a]), 1), MOST_CALLS) if round_ else 1
            dist.all_reduce(beginning_1, group=layer.ranks.group)  # all begin together
            seconds[round_, x, a] = _timed(layer, rows_SD[:rows], counts_L, calls)
    return 1e6 * np.median(seconds[1:], axis=0)  # the first round compiles, and fills caches


def _spread(rows: int, experts: int, slots: int, first: int) -> Tensor:
    """Rows of each slot, int64 [slots]: as even as can be over so many of them, from another one on each time."""
    counts = np.zeros(slots, dtype=np.int64)
    counts[:experts] = rows // experts
    counts[: rows % experts] += 1
    return torch.from_numpy(np.roll(counts, first))


def _timed(layer: ExpertParallelMoE, rows_SD: Tensor, counts_L: Tensor, calls: int) -> float:
    """Seconds of a call."""
    wait: Callable[[], Any] = (
        (lambda: None) if rows_SD.device.type == "cpu" else getattr(torch, rows_SD.device.type).synchronize
    )
    wait()
    began = time.perf_counter()
    for _ in range(calls):
        layer.experts(rows_SD, counts_L)
    wait()
    return (time.perf_counter() - began) / calls
