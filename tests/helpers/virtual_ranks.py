"""Virtual ranks: threads of one process that store into each other's tensors, one running at a time.

They run the dispatcher as real ranks do, with the same kernels, on a CPU (Triton's interpreter) or on one GPU. Only
how memory is shared and how ranks meet is their own: no kernel waits for another.

    outputs = run_virtual(3, lambda ranks: layer_of(ranks)(tokens...), torch.device("cpu"))

Between two meetings one rank after the other runs, in a chosen order. So the first of them is as far ahead of the last
as a rank can be, and would overwrite what the last has not read yet, if anything could be overwritten too early.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from threading import Condition
from typing import TypeVar
from unittest import mock

import torch
from torch import Tensor

from epbackend.dispatch import symmetric, symmetric_memory
from epbackend.dispatch.base import RankGroup
from epbackend.dispatch.symmetric_memory import Peers
from epbackend.kernels.triton.symmetric import SymmetricTensor
from tests.helpers.patience import PATIENCE_S

Result = TypeVar("Result")


class Hub:
    """Whose turn it is to run, and what each of the virtual ranks brought to the present meeting."""

    def __init__(self, order: Sequence[int]) -> None:
        self.size, self._order = len(order), order
        self._position, self._failed, self._passed = 0, False, Condition()
        self._brought: list[Tensor | None] = [None] * self.size

    def wait(self, rank: int) -> None:
        """Until it is the rank's turn."""
        with self._passed:
            ours = self._passed.wait_for(
                lambda: self._failed or self._order[self._position] == rank, PATIENCE_S
            )
        if self._failed or not ours:
            raise RuntimeError("another rank failed, or left out a meeting")

    def pass_on(self, failed: bool = False) -> None:
        """Let the next rank run."""
        with self._passed:
            self._position = (self._position + 1) % self.size
            self._failed = self._failed or failed
            self._passed.notify_all()

    def meet(self, rank: int) -> None:
        """When the turn comes back, all others have come to the same meeting."""
        self.pass_on()
        self.wait(rank)

    def gather(self, rank: int, tensor: Tensor) -> list[Tensor]:
        """What each rank brings, the same for all."""
        self._brought[rank] = tensor
        self.meet(rank)
        brought = list(self._brought)
        self.meet(rank)
        return brought


class VirtualPeers(Peers):
    def __init__(self, hub: Hub, rank: int, device: torch.device) -> None:
        super().__init__(rank, hub.size)
        self.hub, self._device = hub, device

    def rendezvous(self, size: int) -> SymmetricTensor:
        local = torch.full((size,), 0xFF, dtype=torch.uint8, device=self._device)  # NaN in every float
        addresses = [memory.data_ptr() for memory in self.hub.gather(self.rank, local)]
        return SymmetricTensor(local, torch.tensor(addresses, dtype=torch.int64, device=self._device))

    def barrier(self, layer: int) -> None:
        self.hub.meet(self.rank)

    def read(self, tensor: Tensor) -> list:
        return tensor.tolist()


def run_virtual(
    size: int,
    function: Callable[[RankGroup], Result],
    device: torch.device,
    order: Sequence[int] | None = None,
) -> list[Result]:
    """`function(ranks)` on each of `size` virtual ranks, whose `ranks.group` is theirs alone."""
    hub = Hub(order or range(size))
    peers = [VirtualPeers(hub, rank, device) for rank in range(size)]

    def work(rank: int) -> Result:
        hub.wait(rank)
        try:
            result = function(RankGroup(group=peers[rank], rank=rank, size=size))  # type: ignore[arg-type]
        except BaseException:
            hub.pass_on(failed=True)
            raise
        hub.pass_on()
        return result

    with (
        mock.patch.object(symmetric_memory, "SymmetricMemoryPeers", lambda group, device, timeout_s: group),
        mock.patch.object(symmetric, "not_built", return_value=None),
        mock.patch.object(symmetric, "no_p2p_access", return_value=None),
        ThreadPoolExecutor(size) as threads,
    ):
        return [future.result() for future in [threads.submit(work, rank) for rank in range(size)]]
