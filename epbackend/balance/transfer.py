"""The bytes of experts on their way between the ranks of one machine, beside the serving collectives.

The ranks meet at a store of their own and connect by gloo in a process group of their own: no collective of
the engine waits for a migration. After any failure the connections are thrown away, since half a message may be in
them; the next migration makes new ones.

A message is one expert: its bytes, and behind them what it is and their checksum.
"""

from __future__ import annotations

import socket
import time
import zlib
from collections.abc import Callable
from datetime import timedelta

import numpy as np
import torch.distributed as dist
from torch import Tensor

from epbackend.balance.board import LEADER, Seat
from epbackend.balance.moves import Migration, Move
from epbackend.errors import EPError

LOOPBACK = "127.0.0.1"
POLL_S = 0.005

SEAL = np.dtype(
    [
        ("number", np.int64),
        ("layer", np.int64),
        ("expert", np.int64),
        ("checksum", np.int64),
        ("layout", np.int64),
    ]
)


class Connections:
    """One rank's connections to the others, made when the first migration needs them."""

    def __init__(self, seat: Seat, rank: int, ranks: int) -> None:
        self._seat, self._rank, self._ranks = seat, rank, ranks
        self._store: dist.Store | None = None
        self._group: dist.ProcessGroupGloo | None = None
        self._number = -1

    def group(self, migration: Migration) -> dist.ProcessGroupGloo:
        """The connections of that migration; all ranks ask for them together.

        Raises:
            EPError, RuntimeError: the others do not come in time.
        """
        if self._group is None or self._number != migration.connection:
            self._group = None
            timeout = timedelta(seconds=migration.timeout_s)
            store = dist.PrefixStore(f"migration {migration.connection}", self._meet(migration.timeout_s))
            self._group = dist.ProcessGroupGloo(store, self._rank, self._ranks, timeout)
            self._number = migration.connection
        return self._group

    def drop(self) -> None:
        """Never use them again."""
        self._group = None

    def _meet(self, timeout_s: float) -> dist.Store:
        """A store that rank 0 keeps for as long as it runs."""
        if self._store is None:
            timeout = timedelta(seconds=timeout_s)
            if self._rank == LEADER:
                self._store = _own_store(timeout)
                self._seat.listen(self._store.port)
            else:
                deadline = time.monotonic() + timeout_s
                while not self._seat.port:
                    if time.monotonic() > deadline:
                        raise EPError(f"rank {LEADER} does not open the migrations' store")
                    time.sleep(POLL_S)
                self._store = dist.TCPStore(
                    LOOPBACK, self._seat.port, None, False, timeout, wait_for_workers=False
                )
        return self._store


def _own_store(timeout: timedelta) -> dist.TCPStore:
    """A store that listens to this machine alone; one that opens its port itself listens at every address."""
    listener = socket.socket()
    listener.bind((LOOPBACK, 0))
    port = listener.getsockname()[1]
    return dist.TCPStore(
        LOOPBACK, port, None, True, timeout, wait_for_workers=False, master_listen_fd=listener.detach()
    )


def stage(
    migration: Migration,
    rank: int,
    connect: Callable[[], dist.ProcessGroupGloo],
    read: Callable[[int], list[Tensor]],
    length: int,
    layout: str,
    memory: Callable[[list[int]], list[Tensor]],
) -> dict[int, Tensor]:
    """Bring this rank's part: place -> the bytes of the expert that comes there, checked.

    `read(place)` gives the memory of a slot, `length` bytes in all, arranged as `layout` says. Nothing is changed.
    `memory(sizes)` gives uint8 memory of the host for messages: one for each expert that comes, and one if any is sent.

    Raises:
        EPError: an expert did not arrive as it was sent.
        RuntimeError: gloo failed, or a rank did not take part in time.
    """
    incoming = {index: move for index, move in enumerate(migration.moves) if move.target == rank}
    outgoing = {
        index: move
        for index, move in enumerate(migration.moves)
        if move.source == rank and move.target != rank
    }
    travels = any(move.source != move.target for move in migration.moves)
    # All ranks connect, also those without a part in it, which a later migration may need.
    group = connect() if travels else None
    deadline = time.monotonic() + migration.timeout_s
    # Asked for before anything is sent: so every send finds its receiver, whatever the order.
    given = memory([length + SEAL.itemsize] * (len(incoming) + bool(outgoing)))
    messages = dict(zip(incoming, given, strict=False))
    arrivals = [
        group.recv([messages[index]], move.source, index)  # type: ignore[attr-defined]
        for index, move in incoming.items()
        if group is not None and move.source != rank
    ]
    for index, move in outgoing.items():
        _pack(migration, move, read(move.source_place), layout, given[-1])
        assert group is not None
        group.send([given[-1]], move.target, index).wait(_left(deadline))  # type: ignore[attr-defined]
    for index, move in incoming.items():
        if move.source == rank:
            _pack(migration, move, read(move.source_place), layout, messages[index])
    for arrival in arrivals:
        arrival.wait(_left(deadline))
    return {
        move.target_place: _opened(migration, move, messages[index], layout)
        for index, move in incoming.items()
    }


def messages_bytes(experts: int, length: int) -> int:
    """Of the messages of a migration that brings so many experts of `length` bytes, and sends one at a time."""
    return (experts + 1) * (length + SEAL.itemsize)


def _left(deadline: float) -> timedelta:
    return timedelta(seconds=max(deadline - time.monotonic(), 0.001))


def _pack(migration: Migration, move: Move, memory: list[Tensor], layout: str, message: Tensor) -> None:
    body = message[: -SEAL.itemsize]
    for part, here in zip(memory, body.split([len(each) for each in memory]), strict=True):
        here.copy_(part)  # from the experts' device
    seal = _seal_of(message)
    seal["number"], seal["layer"], seal["expert"] = migration.number, migration.layer, move.expert
    seal["layout"] = zlib.crc32(layout.encode())
    seal["checksum"] = zlib.crc32(body.numpy().data) if migration.checks(move) else 0


def _opened(migration: Migration, move: Move, message: Tensor, layout: str) -> Tensor:
    """The expert's bytes. Raises EPError where they are not what was sent."""
    body, seal = message[: -SEAL.itemsize], _seal_of(message)
    came = int(seal["number"]), int(seal["layer"]), int(seal["expert"])
    if came != (migration.number, migration.layer, move.expert):
        raise EPError(
            f"rank {move.source} sent (migration, layer, expert) {came}, "
            f"not {(migration.number, migration.layer, move.expert)}"
        )
    if int(seal["layout"]) != zlib.crc32(layout.encode()):
        raise EPError(
            f"rank {move.source} stores the experts of layer {migration.layer} otherwise than this one ({layout}): set "
            "EPBACKEND_CPU_PRODUCT to the same for all ranks, or let them write to the same cache"
        )
    if migration.checks(move) and zlib.crc32(body.numpy().data) != int(seal["checksum"]):
        raise EPError(f"expert {move.expert} of layer {migration.layer} came damaged from rank {move.source}")
    return body


def _seal_of(message: Tensor) -> np.ndarray:
    return message[-SEAL.itemsize :].numpy().view(SEAL)[0]
