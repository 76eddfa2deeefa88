"""A worker's end of the load report: brings what its layers have counted to the board.

The serving thread only sends the counters of each step to the host (`counters`). A thread beside it looks a few times a
second whether something arrived or somebody asks, and writes it down, all layers at once.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from threading import Event, Lock, Thread
from typing import Any
from weakref import WeakValueDictionary

import numpy as np
import torch

from epbackend.engines.lmdeploy.counters import STEPS, Counters, Snapshot
from epbackend.engines.lmdeploy.load import RANK, rank_row
from epbackend.moe import ExpertParallelMoE

LOOK_S = 0.05
"""How often the thread looks whether somebody asks."""
EVERY_S = 0.25
"""How often it writes when nobody does: what a reader finds of a worker that was killed is no older."""
CLOSING_S = 1.0
"""How long `close` waits for what is on its way from the device."""


@dataclass(frozen=True)
class _Seat:
    """Where a layer is counted."""

    lines: range
    experts_L: tuple[int, ...]
    """The expert in each slot."""


@dataclass(frozen=True)
class _Map:
    """Which counters are whose, for all layers at once."""

    numbers: np.ndarray
    """Of the layers; all that follows is in their order."""
    experts: int
    """The most that a layer has."""
    slots: np.ndarray
    """The place of each slot among the counters."""
    cells: np.ndarray
    """The place of each slot's expert in [layers, experts]."""
    lines: np.ndarray
    firsts: np.ndarray
    """Where in `lines` those of each layer begin."""

    @classmethod
    def of(cls, seats: dict[int, _Seat], width: int, experts: int) -> _Map:
        many = list(seats.values())
        return cls(
            np.array(list(seats)),
            experts,
            np.concatenate([seat.lines.start * width + np.arange(len(seat.experts_L)) for seat in many]),
            np.concatenate([at * experts + np.array(seat.experts_L, int) for at, seat in enumerate(many)]),
            np.concatenate([np.array(seat.lines) for seat in many]),
            np.cumsum([0, *(len(seat.lines) for seat in many[:-1])]),
        )

    def tokens_LE(self, shown: Snapshot) -> np.ndarray:
        """Tokens of each layer's experts, copies of an expert together."""
        tokens_LE = np.zeros((len(self.numbers), self.experts), dtype=np.int64)
        np.add.at(tokens_LE.reshape(-1), self.cells, shown.rows_NW.reshape(-1)[self.slots])
        return tokens_LE

    def sums_SL(self, shown: Snapshot, steps: np.ndarray) -> np.ndarray:
        """Tokens of each layer after each of those steps."""
        return np.add.reduceat(shown.sums_SN[steps % STEPS][:, self.lines], self.firsts, axis=1)


class LoadWriter:
    """The MoE layers of this process; counts nothing where no parent reads (`epbackend.enable` was not the starter)."""

    def __init__(self) -> None:
        self._layers: WeakValueDictionary[int, ExpertParallelMoE] = WeakValueDictionary()
        self._row: Any = None
        self._counters: Counters | None = None
        self._seats: dict[int, _Seat] = {}
        self._map: _Map | None = None
        self._lock = Lock()
        """Held while seats change or are written down."""
        self._thread: Thread | None = None
        self._ended = Event()

    def watch(self, rank: int, number: int, layer: ExpertParallelMoE, place: torch.device) -> None:
        """Counts what the layer of that number, whose experts are at `place`, does from now on.

        A layer that comes again after a step belongs to another model, and everything is counted anew.
        """
        if self._row is None:
            self._row = rank_row(rank)
        if self._row is None:
            return
        experts_L = layer.load.local_experts
        with self._lock:
            counters = self._counters
            if (
                counters is None
                or counters.place != place
                or (counters.steps and number in self._seats)
                or not counters.has_room(len(experts_L))
            ):
                counters = self._begin(Counters(place, len(experts_L)))
            lines, rows_L = counters.seat(len(experts_L))
            layer.load.count_in(rows_L)
            self._layers[number], self._seats[number], self._map = layer, _Seat(lines, experts_L), None
            self._row["layers"][number] = True
            self._row["experts"] = max(self._row["experts"], layer.slot_map.experts)
            self._row["dispatchers"] = _note(
                {phase: asdict(choice) for phase, choice in layer.dispatchers.items()}
            )

    def step(self) -> None:
        """Sends the counters on their way, behind what the current stream has to do for this step."""
        if self._counters is None or not self._layers:
            return
        self._counters.step()
        if self._thread is None:
            self._row["writer"] = os.getpid()
            self._thread = Thread(target=self._stand_by, name="epbackend load", daemon=True)
            self._thread.start()

    def close(self) -> None:
        """Returns when all is written down. Steps after it are not counted."""
        counters, self._counters = self._counters, None
        if counters is None or self._thread is None:
            return
        self._ended.set()
        self._thread.join()
        deadline = time.monotonic() + CLOSING_S
        while self._write_down(counters) != counters.steps and time.monotonic() < deadline:
            time.sleep(CLOSING_S / 100)
        self._row["writer"] = 0

    def _begin(self, counters: Counters) -> Counters:
        self._counters, self._seats = counters, {}
        with _writing(self._row):
            numbers = np.flatnonzero(self._row["layers"])
            for total in ("experts", "steps", "passes", "rounds"):
                self._row[total] = 0
            self._row["layers"][numbers] = False
            self._row["tokens"][numbers] = 0
            self._row["sums"][:, numbers] = 0
        return counters

    def _stand_by(self) -> None:
        """Answers the readers. Looking is cheap; what it writes for nobody, it writes seldom."""
        due = 0.0
        while not self._ended.wait(LOOK_S):
            counters, asked, now = self._counters, int(self._row["asked"]), time.monotonic()
            if counters is None:
                return
            news = counters.steps != self._row["steps"] and now > due
            if (news or asked != self._row["answered"]) and self._write_down(counters) is not None:
                self._row["answered"], due = asked, now + EVERY_S

    def _write_down(self, counters: Counters) -> int | None:
        """Brings the board up to date, and says up to which step; None: no step is whole on the host just now."""
        with self._lock:
            shown = counters.arrived()
            if shown is None:
                return None
            row = self._row
            places = self._map = self._map or _Map.of(self._seats, counters.width, int(row["experts"]))
            loads = [layer.load for layer in self._layers.values()]
            steps = np.arange(max(int(row["steps"]) + 1, shown.oldest), shown.step + 1)
            with _writing(row):
                row["tokens"][places.numbers, : places.experts] = places.tokens_LE(shown)
                row["sums"][np.ix_(steps % STEPS, places.numbers)] = places.sums_SL(shown, steps)
                row["passes"] = max((load.passes.max for load in loads), default=row["passes"])
                row["rounds"] = max((load.rounds.max for load in loads), default=row["rounds"])
                row["steps"] = shown.step
            return shown.step


@contextmanager
def _writing(row: Any) -> Iterator[None]:
    """Readers look again at what they read meanwhile."""
    row["writing"] += 1
    yield
    row["writing"] += 1


def _note(value: Any) -> bytes:
    text = json.dumps(value).encode()
    return text if len(text) <= RANK["dispatchers"].itemsize else b""
