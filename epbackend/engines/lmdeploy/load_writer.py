"""A worker's end of the load report: after each step of the engine its layers' counters go to the board.

Nothing waits for the device. The counters stay there, where a replayed CUDA graph moves them too; behind each step
they are gathered and copied to the host, all layers at once, and a thread writes them down when they have arrived.
"""

from __future__ import annotations

import json
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from typing import Any
from weakref import WeakValueDictionary

import numpy as np
import torch
from torch import Tensor

from epbackend.engines.lmdeploy.load import RANK, STEPS, rank_row
from epbackend.moe import ExpertParallelMoE, Load


class LoadWriter:
    """The MoE layers of this process; writes nothing where no parent reads (`epbackend.enable` was not the starter)."""

    def __init__(self) -> None:
        self._layers: WeakValueDictionary[int, ExpertParallelMoE] = WeakValueDictionary()
        self._row: np.ndarray | None = None
        self._steps = 0
        self._thread: ThreadPoolExecutor | None = None

    def watch(self, rank: int, number: int, layer: ExpertParallelMoE) -> None:
        """Counts what the layer of that number does from now on, and the steps anew."""
        if self._row is None:
            self._row = rank_row(rank)
        if self._row is None:
            return
        self._layers[number], self._steps = layer, 0
        self._row["tokens"][number] = 0
        self._row["experts"] = layer.slot_map.experts
        self._row["dispatchers"] = _note(
            {phase: asdict(choice) for phase, choice in layer.dispatchers.items()}
        )

    def step(self) -> None:
        """Sends the counters on their way, behind what the current stream has to do for this step."""
        loads = {number: layer.load for number, layer in self._layers.items() if layer.load.calls}
        if self._row is None or not loads:
            return
        self._steps += 1
        rows = torch.cat([load.rows_L for load in loads.values()])
        if rows.device.type == "cpu":
            _write(self._row, rows, loads, self._steps)
            return
        on_host = rows.to("cpu", non_blocking=True)
        arrived = torch.get_device_module(rows.device).Event(blocking=True)
        arrived.record()
        if self._thread is None:
            self._thread = ThreadPoolExecutor(1, thread_name_prefix="epbackend-load")
        self._thread.submit(_write_when, arrived, self._row, on_host, loads, self._steps)

    def close(self) -> None:
        """Returns when all is written down."""
        if self._thread is not None:
            self._thread.shutdown()
            self._thread = None


def _write_when(arrived: Any, *what: Any) -> None:
    arrived.synchronize()
    _write(*what)


def _write(row: np.ndarray, rows: Tensor, loads: dict[int, Load], steps: int) -> None:
    """Writes to a rank's row of the board what its layers, one after the other in `rows`, did in so many steps."""
    counts = rows.split([len(load.rows_L) for load in loads.values()])
    for (number, load), rows_L in zip(loads.items(), counts, strict=True):
        tokens_E, written_E = load.tokens_of(rows_L).numpy(), row["tokens"][number]
        row["steps"][number, (steps - 1) % STEPS] = tokens_E.sum() - written_E.sum()
        written_E[: len(tokens_E)] = tokens_E
        row["passes"][number], row["rounds"][number] = load.passes.max, load.rounds.max
        row["calls"][number] = steps


def _note(value: Any) -> bytes:
    text = json.dumps(value).encode()
    return text if len(text) <= RANK["dispatchers"].itemsize else b""
