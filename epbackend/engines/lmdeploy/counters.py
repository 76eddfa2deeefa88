"""The rows that all MoE layers of a process compute, counted in one piece of memory on their device.

Each layer counts in lines of its own, where a replayed CUDA graph counts too, so that they never move. Behind each step
of the engine the device adds up every line and copies lines and sums to the host: three operations, however many
layers there are, and nobody waits for them. What has arrived on the host tells by itself which step it shows.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

LINES = 256
"""Layers of which each rank has equally many slots, or fewer of others."""
STEPS = 1024
"""Steps whose sums are kept one by one."""


@dataclass(frozen=True)
class Snapshot:
    """What had been counted when a step ended."""

    step: int
    """From 1 on; 0: none has ended."""
    oldest: int
    """The first step whose sums are still there."""
    rows_NW: np.ndarray
    """Rows of the slots of each line."""
    sums_SN: np.ndarray
    """The lines' sums after each of the last STEPS steps, those of step s at s % STEPS."""


class Counters:
    """Lines of `width` counters each on one device, and their copies on the host."""

    def __init__(self, place: torch.device, width: int) -> None:
        self.place, self.width = place, max(1, width)
        self.steps = 0
        """Steps that were asked for; the device may be behind."""
        self.lines = 0
        """Lines that are taken."""
        shape = LINES, self.width
        # Only into pinned memory does a device copy while the host goes on.
        on_host: Any = {"dtype": torch.int64, "pin_memory": place.type != "cpu"}
        # Models are loaded in inference mode, whose tensors could not be changed outside of it.
        with torch.inference_mode(False):
            self._rows_NW = torch.zeros(shape, dtype=torch.int64, device=place)
            self._sums_N = torch.zeros(LINES, dtype=torch.int64, device=place)
            self._host_rows_NW = torch.zeros(shape, **on_host)
            self._host_sums_SN = torch.zeros(STEPS, LINES, **on_host)
        self._path: _Path | None = None

    def has_room(self, slots: int) -> bool:
        return self.lines + self._needed(slots) <= LINES

    @torch.inference_mode(False)
    def seat(self, slots: int) -> tuple[range, Tensor]:
        """Counters for so many slots, and the lines that hold them."""
        lines = range(self.lines, self.lines + self._needed(slots))
        self.lines, self._path = lines.stop, None
        return lines, self._rows_NW.view(-1)[lines.start * self.width :][:slots]

    def step(self) -> None:
        """Send what was counted to the host, behind what the current stream has to do for this step."""
        path = self._path or self._way()
        self.steps += 1
        torch.sum(path.rows_NW, 1, out=path.sums_N)
        path.host_sums[self.steps % STEPS].copy_(path.sums_N, non_blocking=True)
        path.host_rows_NW.copy_(path.rows_NW, non_blocking=True)

    def arrived(self) -> Snapshot | None:
        """The newest step that is whole on the host; None while one is half there. Asks the device nothing.

        From any thread: a question to the device from another one would break a capture in the main thread.
        """
        lines = self.lines
        rows_NW = self._host_rows_NW.numpy()[:lines].copy()
        sums_SN = self._host_sums_SN.numpy()[:, :lines].copy()
        issued = self.steps  # read last: nothing in the copies is newer
        # The rows of a step add up to its sums. Those of another step do not, unless nothing happened between them.
        fits_S = (sums_SN == rows_NW.sum(1)).all(1)
        steps = np.arange(issued, max(issued - STEPS, -1), -1)
        fitting = steps[fits_S[steps % STEPS]]
        if not len(fitting):
            return None
        return Snapshot(int(fitting[0]), int(steps[-1]), rows_NW, sums_SN)

    def _needed(self, slots: int) -> int:
        return max(1, -(-slots // self.width))

    @torch.inference_mode(False)
    def _way(self) -> _Path:
        """The views that every step takes, until another layer joins."""
        lines = self.lines
        self._path = _Path(
            self._rows_NW[:lines],
            self._sums_N[:lines],
            self._host_rows_NW[:lines],
            [sums_N[:lines] for sums_N in self._host_sums_SN],
        )
        return self._path


@dataclass(frozen=True)
class _Path:
    """From the counters of the lines that are taken to the host."""

    rows_NW: Tensor
    sums_N: Tensor
    host_rows_NW: Tensor
    host_sums: list[Tensor]
    """One for each of the STEPS."""
