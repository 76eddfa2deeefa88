"""Virtual ranks: threads of one process that store into each other's tensors, one running at a time.

They run the dispatcher as real ranks do, with the same kernels, on a CPU (Triton's interpreter) or on one GPU. Only
how memory is shared and how ranks meet is their own: no kernel waits for another.

    outputs = run_virtual(3, lambda ranks, device: layer_of(ranks)(tokens...), torch.device("cpu"))
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from threading import Barrier, Lock
from typing import TypeVar
from unittest import mock

import torch
from torch import Tensor

from epbackend.dispatch import symmetric, symmetric_peers
from epbackend.dispatch.ranks import RankGroup
from epbackend.dispatch.symmetric_peers import Peers
from epbackend.kernels.triton.peer.mirror import Mirror

PATIENCE_S = 60.0
Result = TypeVar("Result")


class Hub:
    """What the virtual ranks share: the turn to run, and what each of them brought to the present meeting."""

    def __init__(self, size: int) -> None:
        self.size, self.turn, self.meetings = size, Lock(), 0
        self._barrier = Barrier(size, timeout=PATIENCE_S)
        self._brought: list[Tensor | None] = [None] * size

    def meet(self) -> None:
        """Let the others run until all have come here; called by a rank whose turn it is."""
        self.turn.release()
        try:
            self._barrier.wait()
        finally:
            self.turn.acquire()

    def gather(self, rank: int, tensor: Tensor) -> list[Tensor]:
        """What each rank brings, the same for all."""
        self._brought[rank] = tensor
        self.meet()
        brought = list(self._brought)
        self.meet()
        return brought

    def abort(self) -> None:
        """A rank failed: the others need not wait for it."""
        self._barrier.abort()


class VirtualPeers(Peers):
    def __init__(self, hub: Hub, rank: int, device: torch.device) -> None:
        super().__init__(rank, hub.size)
        self._hub, self._device = hub, device

    def share(self, size: int) -> Mirror:
        mine = torch.full((size,), 0xFF, dtype=torch.uint8, device=self._device)  # NaN in every float
        addresses = [memory.data_ptr() for memory in self._hub.gather(self.rank, mine)]
        return Mirror(mine, torch.tensor(addresses, dtype=torch.int64, device=self._device))

    def meet(self, layer: int) -> None:
        self._hub.meet()

    def read(self, tensor: Tensor) -> list:
        return tensor.tolist()


def run_virtual(size: int, function: Callable[[RankGroup], Result], device: torch.device) -> list[Result]:
    """`function(ranks)` on each of `size` virtual ranks, whose `ranks.group` is theirs alone."""
    hub = Hub(size)
    peers = [VirtualPeers(hub, rank, device) for rank in range(size)]

    def work(rank: int) -> Result:
        with hub.turn:
            try:
                return function(RankGroup(group=peers[rank], rank=rank, size=size))  # type: ignore[arg-type]
            except BaseException:
                hub.abort()
                raise

    with (
        mock.patch.object(symmetric_peers, "connect", lambda group, device, timeout_s: group),
        mock.patch.object(symmetric, "not_built", return_value=None),
        mock.patch.object(symmetric, "unreachable", return_value=None),
        ThreadPoolExecutor(size) as threads,
    ):
        return [future.result() for future in [threads.submit(work, rank) for rank in range(size)]]
