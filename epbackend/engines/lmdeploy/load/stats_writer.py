"""A worker's end of the load report: counts the rows of its MoE layers and writes them to the shared statistics.

The rows of all layers are counted in one piece of memory on their device. Each layer has lines of its own there, some
for prefill and as many for decode, which never move, so that a replayed CUDA graph counts too. After each step of the
engine the device adds up every line and copies lines and sums to the host: three operations, however many layers there
are, and nothing waits for them. Whether what has arrived on the host is one whole step can be seen from the values
alone. A thread looks a few times a second for news or for a reader's request, and writes down all layers at once.

Letters: N lines of counters, W counters of a line, S the steps whose sums are kept, Y layers, E experts, L slots of a
layer, P slots of all layers.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, replace
from threading import Event, Lock, Thread
from typing import Any
from weakref import WeakValueDictionary

import numpy as np
import torch
from torch import Tensor

from epbackend.engines.lmdeploy.load import pairs
from epbackend.engines.lmdeploy.load.pairs import PAIRS_VARIABLE
from epbackend.engines.lmdeploy.load.report import MAX_LAYERS, RANK, STEPS, Counted, rank_row, writing
from epbackend.kernels.pair_counter import PairCounter
from epbackend.moe import ExpertParallelMoE
from epbackend.names import PHASES

LINES = len(PHASES) * MAX_LAYERS
"""One for each phase of a layer whose slots are at most as many as those of the first; a layer with more takes several.
"""


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

    def __init__(self, device: torch.device, width: int) -> None:
        self.device, self.width = device, max(1, width)
        self.steps = 0
        """Steps that were asked for; the device may be behind."""
        self.used = False
        """Whether there ever was a step."""
        self.lines = 0
        """Lines that are allocated."""
        shape = LINES, self.width
        # Only into pinned memory does a device copy while the host goes on.
        on_host: Any = {"dtype": torch.int64, "device": "cpu", "pin_memory": device.type != "cpu"}
        # Models are loaded in inference mode, whose tensors could not be changed outside of it.
        with torch.inference_mode(False):
            self._rows_NW = torch.zeros(shape, dtype=torch.int64, device=device)
            self._sums_N = torch.zeros(LINES, dtype=torch.int64, device=device)
            self._host_rows_NW = torch.zeros(shape, **on_host)
            self._host_sums_SN = torch.zeros(STEPS, LINES, **on_host)
        self._views: _Views | None = None

    def has_room(self, slots: int) -> bool:
        return self.lines + self._needed(slots) <= LINES

    @torch.inference_mode(False)
    def allocate(self, slots: int) -> tuple[range, Tensor]:
        """Lines for so many slots, those of prefill first, and their counters, [2, slots]."""
        lines = range(self.lines, self.lines + self._needed(slots))
        self.lines, self._views = lines.stop, None
        return lines, self._rows_NW[lines.start : lines.stop].view(len(PHASES), -1)[:, :slots]

    def step(self) -> None:
        """Send what was counted to the host, behind what the current stream has to do for this step."""
        views = self._views or self._make_views()
        self.steps, self.used = self.steps + 1, True
        torch.sum(views.rows_NW, 1, out=views.sums_N)
        views.host_sums[self.steps % STEPS].copy_(views.sums_N, non_blocking=True)
        views.host_rows_NW.copy_(views.rows_NW, non_blocking=True)

    @contextmanager
    def forgetting(self) -> Iterator[None]:
        """Steps inside are forgotten, once the device has done them; the counters themselves are the layers'."""
        synchronize = getattr(torch, self.device.type).synchronize
        synchronize()
        before, steps = (self._host_rows_NW.clone(), self._host_sums_SN.clone()), self.steps
        yield
        synchronize()
        for now, kept in zip((self._host_rows_NW, self._host_sums_SN), before, strict=True):
            now.copy_(kept)
        self.steps = steps

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
        return len(PHASES) * max(1, -(-slots // self.width))

    @torch.inference_mode(False)
    def _make_views(self) -> _Views:
        """The views that every step takes, until another layer joins."""
        lines = self.lines
        self._views = _Views(
            self._rows_NW[:lines],
            self._sums_N[:lines],
            self._host_rows_NW[:lines],
            [sums_N[:lines] for sums_N in self._host_sums_SN],
        )
        return self._views


@dataclass(frozen=True)
class _Views:
    """Of the allocated lines, on the device and on the host."""

    rows_NW: Tensor
    sums_N: Tensor
    host_rows_NW: Tensor
    host_sums: list[Tensor]
    """One for each of the STEPS."""


LOOK_S = 0.05
"""How often the thread looks for a request."""
EVERY_S = 0.25
"""How often it writes without a request: what is found of a worker that was killed is no older."""
CLOSING_S = 1.0
"""How long `close` waits for what is on its way from the device."""


@dataclass(frozen=True)
class _Lines:
    """The lines of one layer."""

    lines: range
    experts_L: tuple[int, ...]
    """The expert in each slot."""
    credit_2E: np.ndarray | None = None
    """`LayerStats.credit_2E`, once experts have moved."""

    def slots_2L(self, width: int) -> np.ndarray:
        """The places of its slots among all counters."""
        firsts = self.lines.start + len(self.lines) // len(PHASES) * np.arange(len(PHASES))
        return firsts[:, None] * width + np.arange(len(self.experts_L))


@dataclass(frozen=True)
class _Map:
    """Which counters are whose, for all layers at once."""

    numbers: np.ndarray
    """Of the layers; all that follows is in their order."""
    experts: int
    """The most that a layer has."""
    slots_2P: np.ndarray
    """The places of each slot among the counters."""
    cells_P: np.ndarray
    """The place of each slot's expert in [layers, experts]."""
    lines: np.ndarray
    firsts: np.ndarray
    """Where in `lines` those of each layer begin."""
    credit_2YE: np.ndarray

    @classmethod
    def of(cls, allocated: dict[int, _Lines], width: int, experts: int) -> _Map:
        many = list(allocated.values())
        credit_2YE = np.zeros((len(PHASES), len(many), experts), dtype=np.int64)
        for at, each in enumerate(many):
            if each.credit_2E is not None:
                credit_2YE[:, at, : each.credit_2E.shape[1]] = each.credit_2E
        return cls(
            np.array(list(allocated)),
            experts,
            np.concatenate([each.slots_2L(width) for each in many], axis=1),
            np.concatenate([at * experts + np.array(each.experts_L, int) for at, each in enumerate(many)]),
            np.concatenate([np.array(each.lines) for each in many]),
            np.cumsum([0, *(len(each.lines) for each in many[:-1])]),
            credit_2YE,
        )

    def tokens_2YE(self, shown: Snapshot) -> np.ndarray:
        """Tokens of each layer's experts in each phase, replicas of an expert together."""
        tokens_2YE, rows = self.credit_2YE.copy(), shown.rows_NW.reshape(-1)
        for tokens_YE, slots_P in zip(tokens_2YE, self.slots_2P, strict=True):
            np.add.at(tokens_YE.reshape(-1), self.cells_P, rows[slots_P])
        return tokens_2YE

    def sums_SY(self, shown: Snapshot, steps: np.ndarray) -> np.ndarray:
        """Tokens of each layer after each of those steps."""
        return np.add.reduceat(shown.sums_SN[steps % STEPS][:, self.lines], self.firsts, axis=1)


class StatsWriter:
    """The MoE layers of this process; counts nothing in a process whose parent does not read."""

    def __init__(self) -> None:
        self._layers: WeakValueDictionary[int, ExpertParallelMoE] = WeakValueDictionary()
        self._row: Any = None
        self._counters: Counters | None = None
        self._allocated: dict[int, _Lines] = {}
        self._pairs: dict[int, PairCounter] | None = {} if PAIRS_VARIABLE in os.environ else None
        """Of each layer, where they are recorded; None: they are not, or are written down."""
        self._map: _Map | None = None
        self._write_nothing = False
        self._lock = Lock()
        """Held while lines are allocated or written down."""
        self._thread: Thread | None = None
        self._ended = Event()

    @property
    def layers(self) -> dict[int, ExpertParallelMoE]:
        """Those that are watched, by their numbers."""
        return dict(self._layers)

    def watch(self, rank: int, number: int, layer: ExpertParallelMoE, device: torch.device) -> None:
        """Counts what the layer of that number, whose experts are on `device`, does from now on.

        A layer number that comes again after a step belongs to another model: counting then starts from zero.
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
                or counters.device != device
                or (counters.used and number in self._allocated)
                or not counters.has_room(len(experts_L))
            ):
                counters = self._begin(Counters(device, len(experts_L)))
            lines, rows_2L = counters.allocate(len(experts_L))
            layer.load.count_in(rows_2L)
            if self._pairs is not None and layer.ranks.token_rank == 0:  # the others hold the same tokens
                layer.load.pairs = self._pairs[number] = PairCounter(layer.slot_map.experts, device)
            self._layers[number], self._allocated[number], self._map = layer, _Lines(lines, experts_L), None
            self._row["layers"][number] = True
            self._row["experts"] = max(self._row["experts"], layer.slot_map.experts)
            self._row["top_k"] = layer.top_k
            self._row["dispatchers"] = _note(
                {phase: asdict(choice) for phase, choice in layer.dispatchers.items()}
            )

    @contextmanager
    def moving(self, number: int, layer: ExpertParallelMoE) -> Iterator[None]:
        """Inside, between two steps, a layer's slots get other experts; what was counted stays with the old ones."""
        with self._lock:
            yield
            if number in self._allocated:
                load = layer.load
                self._allocated[number] = replace(
                    self._allocated[number], experts_L=load.local_experts, credit_2E=load.credit_2E.numpy()
                )
                self._map = None

    def step(self) -> None:
        """Sends the counters on their way, behind what the current stream has to do for this step."""
        if self._counters is None or not self._layers:
            return
        self._counters.step()
        if self._thread is None:
            self._row["writer"] = os.getpid()
            self._thread = Thread(target=self._stand_by, name="epbackend load", daemon=True)
            self._thread.start()

    @contextmanager
    def forgetting(self) -> Iterator[None]:
        """What is counted inside is forgotten: a warm-up, which computes random tokens, is no load."""
        if self._counters is None:
            yield
            return
        with self._lock:
            self._write_nothing = True
        try:
            with ExitStack() as each:
                each.enter_context(self._counters.forgetting())
                for layer in self._layers.values():
                    each.enter_context(layer.load.forgetting())
                yield
        finally:
            self._write_nothing = False

    def counted(self, since: int) -> Counted | None:
        """What was counted up to now, for a reader on another machine that knows it up to the step `since`."""
        if self._row is None or self._counters is None:
            return None
        self._write_down(self._counters)
        with self._lock:
            return Counted.of(self._row, since)

    def close(self) -> None:
        """Returns when all is written down. Steps after it are not counted."""
        if self._row is not None and self._pairs is not None:
            pairs.write_down(self._pairs)
            self._pairs = None
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
        self._counters, self._allocated = counters, {}
        with writing(self._row):
            numbers = np.flatnonzero(self._row["layers"])
            self._row["layers"][numbers] = False
            self._row["tokens"][:, numbers] = 0
            self._row["sums"][:, numbers] = 0
            for total in ("steps", "passes", "rounds"):
                self._row[total] = 0
            self._row["experts"] = 0
        return counters

    def _stand_by(self) -> None:
        """Answers the readers. Looking is cheap; writing without a request is done seldom."""
        due = 0.0
        while not self._ended.wait(LOOK_S):
            counters, asked, now = self._counters, int(self._row["asked"]), time.monotonic()
            if counters is None:
                return
            news = counters.steps != self._row["steps"] and now > due
            if (news or asked != self._row["answered"]) and self._write_down(counters) is not None:
                self._row["answered"], due = asked, now + EVERY_S

    def _write_down(self, counters: Counters) -> int | None:
        """Brings the shared statistics up to the step it returns; None: no step is whole on the host just now."""
        with self._lock:
            shown = None if self._write_nothing else counters.arrived()
            if shown is None:
                return None
            row = self._row
            places = self._map = self._map or _Map.of(self._allocated, counters.width, int(row["experts"]))
            loads = [layer.load for layer in self._layers.values()]
            steps = np.arange(max(int(row["steps"]) + 1, shown.oldest), shown.step + 1)
            with writing(row):
                row["tokens"][:, places.numbers, : places.experts] = places.tokens_2YE(shown)
                row["sums"][np.ix_(steps % STEPS, places.numbers)] = places.sums_SY(shown, steps)
                row["passes"] = max((load.most_passes for load in loads), default=row["passes"])
                row["rounds"] = max((load.most_rounds for load in loads), default=row["rounds"])
                row["steps"] = shown.step
            return shown.step


def _note(value: Any) -> bytes:
    text = json.dumps(value).encode()
    return text if len(text) <= RANK["dispatchers"].itemsize else b""
