"""A rank's part in migrations: a thread stages experts, and the serving thread flips them between two steps.

The serving thread does nothing else for it: when a step begins it writes the step's number down and reads two words.
Weights and map change there alone, and only when every rank has staged all that comes to it (`board`). Until then any
failure leaves both as they are.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from epbackend.balance.board import Seat, Verdict
from epbackend.balance.moves import Migration
from epbackend.balance.streams import Streams
from epbackend.balance.transfer import Connections, messages_bytes, stage
from epbackend.errors import EPError
from epbackend.moe import ExpertParallelMoE, Relocation

LOOK_S = 0.25
"""How often the thread looks for an order by itself; while steps are made, the serving thread wakes it."""

logger = logging.getLogger("epbackend")

Recount = Callable[[int, ExpertParallelMoE], AbstractContextManager[None]]
"""Entered around a layer's flip, by number and layer, for who counts what its slots do."""


def _no_count(number: int, layer: ExpertParallelMoE) -> AbstractContextManager[None]:
    return nullcontext()


@dataclass(frozen=True)
class _Staged:
    """All that a flip needs, checked."""

    migration: Migration
    layer: ExpertParallelMoE
    experts: dict[int, Tensor]
    relocation: Relocation


class Migrator:
    """The layers of one rank, whose experts can move."""

    def __init__(
        self,
        places: np.ndarray,
        rank: int,
        device: torch.device,
        staging_bytes: int,
        recount: Recount = _no_count,
    ) -> None:
        """`places` are those of all ranks at the board; this rank's experts are on `device`.

        A migration holds at most `staging_bytes` of experts here; where that is no CPU, on the host and there, in
        memory that the first layers reserve.
        """
        self._device, self._streams = device, Streams(device)
        self._seat, self._rank = Seat(places, rank, self._streams.lead), rank
        self._connections = Connections(self._seat, rank, len(places))
        self._staging_bytes, self._recount = staging_bytes, recount
        self._layers: dict[int, ExpertParallelMoE] = {}
        self._staged: _Staged | None = None
        self._seen = 0
        """The last order that the thread has taken up."""
        self._ended, self._wake = threading.Event(), threading.Event()
        self._thread: threading.Thread | None = None

    def watch(self, number: int, layer: ExpertParallelMoE) -> None:
        """A layer that takes part from now on.

        Raises:
            EPError: one of its experts is larger than the staging buffer.
        """
        length = _expert_bytes(layer)
        if length > self._staging_bytes:
            raise EPError(
                f"balance.staging_mb: {self._staging_bytes / 1e6:g} MB hold no expert of MoE layer {number}, which has "
                f"{length / 1e6:.3g} MB; raise it to that at least"
            )
        self._layers[number] = layer
        room = min(self._staging_bytes // length, len(layer.load.local_experts))
        self._streams.reserve(room * length, messages_bytes(room, length))
        self._seat.has_layer(length)

    def begin_step(self) -> None:
        """To be called by the serving thread before each step, in its stream, on all ranks before the same ones.

        Raises:
            EPError: see `Seat.begin_step`.
        """
        if self._thread is None:
            self._thread = threading.Thread(target=self._stand_by, name="epbackend migration", daemon=True)
            self._thread.start()
        if self._seat.ordered > self._seen:
            self._wake.set()
        self._streams.begin_step()
        staged = self._staged
        verdict = self._seat.begin_step(staged.migration.number if staged else 0)
        if staged is None or verdict is Verdict.WAIT:
            return
        if verdict is Verdict.FLIP:
            began = time.perf_counter()
            self._flip(staged)
            self._streams.flipped()
            self._seat.flipped_in(time.perf_counter() - began)
        self._staged = None
        self._seat.end(staged.migration.number)

    def close(self) -> None:
        """Ends the thread; what is staged is forgotten. Does not wait for a rank that is gone."""
        self._ended.set()
        self._wake.set()

    @torch.inference_mode()
    def _flip(self, staged: _Staged) -> None:
        migration, layer = staged.migration, staged.layer
        with self._recount(migration.layer, layer):
            for place, expert in staged.experts.items():
                memory = layer.slot_memory(place)
                for part, new in zip(memory, expert.split([len(each) for each in memory]), strict=True):
                    part.copy_(new)
            layer.relocate(staged.relocation)

    def _stand_by(self) -> None:
        # Often awake, it would take the interpreter from the serving thread each time.
        while True:
            self._wake.wait(LOOK_S)
            self._wake.clear()
            if self._ended.is_set():
                return
            migration = self._seat.order(self._seen)
            if migration is None:
                continue
            self._seen = migration.number
            try:
                self._staged = self._stage(migration)
            except Exception as error:
                self._seat.answer_failed(migration.number, f"{type(error).__name__}: {error}")
                self._connections.drop()
                self._streams.discard()
                logger.warning("rank %d staged nothing of layer %d: %s", self._rank, migration.layer, error)
            else:
                self._seat.answer_staged(migration.number)

    def _stage(self, migration: Migration) -> _Staged:
        """Raises what `stage` raises, and EPError for an order that is not for the experts that are here."""
        if migration.layer not in self._layers:
            raise EPError(f"this rank has no MoE layer {migration.layer}")
        layer = self._layers[migration.layer]
        if migration.before != layer.slot_map.layout:
            raise EPError(f"layer {migration.layer} holds other experts than the plan starts from")
        length = _expert_bytes(layer)
        incoming = sum(move.target == self._rank for move in migration.moves)
        if incoming * length > self._staging_bytes:
            raise EPError(
                f"{incoming} experts of {length} bytes exceed the staging buffer of {self._staging_bytes}"
            )
        slot_map = replace(layer.slot_map, layout=migration.after, rank_speed=migration.rank_speed)
        with self._streams.beside():
            relocation = layer.prepare(slot_map, self._device)
            experts = stage(
                migration,
                self._rank,
                lambda: self._connections.group(migration),
                layer.slot_memory,
                length,
                layer.slot_layout,
                self._streams.messages,
            )
            experts = self._streams.brought(experts)
        return _Staged(migration, layer, experts, relocation)


def _expert_bytes(layer: ExpertParallelMoE) -> int:
    return sum(len(part) for part in layer.slot_memory(0))
